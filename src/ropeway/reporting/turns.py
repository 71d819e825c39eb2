"""A conversation turn by turn for display: roles, names, reasoning, tool calls, and which turns are trained on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ropeway.config.params import RowParams
from ropeway.data.find_record import RecordFinder, SequenceRecord
from ropeway.data.tokenized import open_tokenized
from ropeway.models.chat_template import OpenAssistantTemplate, open_template
from ropeway.models.conversation import Conversation, Message
from ropeway.models.tokenizer import read_special_names
from ropeway.reporting.shown_parts import cut_text, shown_calls
from ropeway.runtime.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Cut:
    """A text for display.

    Attributes:
        text: Its beginning.
        left_out: Number of characters that are not in it.
    """

    text: str
    left_out: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A message, and whether it is trained on.

    Attributes:
        message: In the format of `apply_chat_template`.
        is_trained: Whether the sequence supervises it.
        has_no_weight: Whether its record says `weight: 0`.
        drops_reasoning: Whether the template leaves its reasoning out of this sequence.
    """

    message: Message
    is_trained: bool
    has_no_weight: bool
    drops_reasoning: bool

    @property
    def use(self) -> str:
        """Whether it is trained on, in words."""
        return "trained" if self.is_trained else "context, weight 0" if self.has_no_weight else "context"

    def to_json(self) -> Message:
        """Return the whole message with its use."""
        more = {"weight": 0} if self.has_no_weight else {}
        more |= {"reasoning_dropped": True} if self.drops_reasoning else {}
        return {**self.message, **more, "trained": self.is_trained}


@dataclass(frozen=True, slots=True)
class Turns:
    """The conversation of a sequence.

    Attributes:
        record: Number of the record in its source, from 0.
        answer: Which answer of the conversation the sequence ends with, from 1; 0: it has the whole conversation.
        tools: The functions offered to the assistant.
    """

    record: int
    answer: int
    tools: tuple[Message, ...]
    turns: tuple[Turn, ...]

    @property
    def title(self) -> str:
        """What is shown, in words."""
        part = f", up to answer {self.answer}" if self.answer else ""
        return f"conversation of record {self.record:,}{part}: {len(self.turns)} messages"

    def list_tools(self, limit: int) -> Iterator[tuple[str, Cut]]:
        """Yield name and description of each tool, on one line."""
        for tool in self.tools:
            function = tool["function"]
            yield str(function["name"]), Cut(*cut_text(" ".join(str(function.get("description") or "").split()), limit))

    def to_json(self) -> Mapping[str, Any]:
        """Return it for programs, uncut."""
        turns = [turn.to_json() for turn in self.turns]
        return {"record": self.record, "answer": self.answer or None, "tools": list(self.tools), "turns": turns}


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """A turn for display, with its values cut."""

    heading: str
    use: str
    is_trained: bool
    reasoning_title: str
    reasoning: Cut
    text: Cut
    calls: tuple[tuple[str, Cut], ...]


def show_turn(turn: Turn, limit: int) -> ShownTurn:
    """Return a turn with at most `limit` characters of each value."""
    message = turn.message
    names = [str(message[key]) for key in ("name", "tool_call_id") if message.get(key)]
    calls = [
        (name, Cut(*cut_text(arguments, limit))) for name, arguments in shown_calls(message.get("tool_calls") or ())
    ]
    return ShownTurn(
        heading=" ".join([str(message["role"]), *names]),
        use=turn.use,
        is_trained=turn.is_trained,
        reasoning_title="reasoning, not in this sequence" if turn.drops_reasoning else "reasoning",
        reasoning=Cut(*cut_text(str(message.get("reasoning_content") or ""), limit)),
        text=Cut(*cut_text(str(message.get("content") or ""), limit)),
        calls=tuple(calls),
    )


class ConversationFinder:
    """Finds the conversations of a workspace's sequences."""

    def __init__(self, workspace: Workspace, profile: RowParams) -> None:
        """Open tokens/ and the template; raise DataError if a file is missing."""
        self._sources, _ = open_tokenized(workspace.tokens, verify=False)
        self._template = open_template(workspace.base)
        self._profile, self._end = profile, read_special_names(workspace.base)["eos"]
        self._finders = {
            name: RecordFinder(workspace.raw / name, source, self._template, self._end)
            for name, source in self._sources.items()
            if source.facts["kind"] == "conversation"
        }

    def find(self, source: str, sequence: int) -> Turns | None:
        """Return the conversation of a sequence; None for a document, or if it cannot be found."""
        found = self._finders[source].find(sequence) if source in self._finders else None
        return None if found is None else self._read(found)

    def _read(self, found: SequenceRecord) -> Turns:
        conversation, form = found.conversation, found.conversation.read_form()
        messages, trained = conversation.to_messages(), self._trained(conversation)
        answer = 0
        if found.parts > 1 or found.text != self._template.render(conversation, end=self._end):
            trained = [sorted(trained)[found.part]]
            messages, answer = messages[: trained[0] + 1], found.part + 1
        no_fields: list[Message] = [{}] * bool(conversation.system)
        turns = tuple(
            Turn(
                message,
                is_trained=at in trained,
                has_no_weight=fields.get("weight", 1) == 0,
                drops_reasoning=str(message.get("reasoning_content") or "").strip() not in found.text,
            )
            for at, (message, fields) in enumerate(zip(messages, [*no_fields, *form["fields"]], strict=False))
        )
        return Turns(found.number, answer, tuple(form.get("tools", ())), turns)

    def _trained(self, conversation: Conversation) -> list[int]:
        """Return which messages are supervised: a template's loss mask in words."""
        roles = [message["role"] for message in conversation.to_messages()]
        if not self._profile.label_masking:
            return list(range(len(roles)))
        if not isinstance(self._template, OpenAssistantTemplate):
            return [at for at in conversation.supervised_messages() if at > 0]
        counted = ("system", "assistant") if self._profile.what_counts == "published" else ("assistant",)
        return [at for at, role in enumerate(roles) if role in counted]
