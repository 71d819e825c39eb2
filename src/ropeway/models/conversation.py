"""A conversation, as records hold it and templates render it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat: user and assistant take turns, the user first.

    Attributes:
        turns: Texts, even positions said by the user and odd ones by the assistant.
        system: The system message; empty means none.
    """

    turns: tuple[str, ...]
    system: str = ""

    def to_messages(self) -> list[dict[str, str]]:
        """Return the conversation as transformers' `apply_chat_template` takes it.

        >>> Conversation(("Hi",), system="Be kind.").to_messages()
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return system + [{"role": roles[at % 2], "content": text} for at, text in enumerate(self.turns)]
