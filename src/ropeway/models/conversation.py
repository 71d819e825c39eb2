"""The type of a conversation in records and templates."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat in which user and assistant alternate, starting with the user.

    Attributes:
        turns: Texts of the user (even positions) and the assistant (odd positions).
        system: The system message; empty if there is none.
    """

    turns: tuple[str, ...]
    system: str = ""

    def to_messages(self) -> list[dict[str, str]]:
        """Return the conversation in the format of transformers' `apply_chat_template`.

        >>> Conversation(("Hi",), system="Be kind.").to_messages()
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        roles = ("user", "assistant")
        return system + [{"role": roles[at % 2], "content": text} for at, text in enumerate(self.turns)]
