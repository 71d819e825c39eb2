"""Chat templates in Jinja, a base model's own or a file: rendering by transformers, loss mask from character offsets.

Whatever a template does, a conversation is accepted only if what is supervised is what the model would generate: for
each assistant turn the text before it equals the generation prompt of the history, and the text up to and including
the end token is supervised, and nothing else.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path
from typing import Any

from ropeway.models.conversation import Conversation, Message
from ropeway.models.template_limits import check_limits
from ropeway.models.template_probes import WatchedText, mark_parts, mark_tools
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json

FILE = "chat_template.jinja"
OWN_FILE = "own_chat_template.jinja"  # of a base whose template the run replaces: evaluation asks the base in it
# Some templates write today's date (`strftime_now`). Data must not depend on the day on which they are made.
DATE = datetime(2024, 7, 26, tzinfo=UTC)
_SLOT = re.compile("\x00([0-9]+)\x00")
_SHOWN = 80  # characters of a template's own message in a reason
_UNKNOWN_DATE = datetime(2001, 2, 3, tzinfo=UTC)

Span = tuple[int, int]  # characters of the rendered text, begin and end


class UnusableConversationError(ValueError):
    """A template cannot render a conversation as inference would; records are counted by the message."""


class LostTextError(UnusableConversationError):
    """A template drops or changes a text."""

    def __init__(self, role: str) -> None:
        """Keep the role of the text's message."""
        super().__init__(f"the template drops or changes a text of role {role}")
        self.role = role


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence: a rendered conversation, or its beginning up to one answer.

    Attributes:
        text: What is tokenized, including BOS where the template writes it.
        answers: What is supervised: content and end token of each answer, as characters of `text`.
        slots: Where the messages' contents are in `text`, which is the template's own elsewhere; None: not known.
        frame: What is the same in all conversations of this form; None: not known.
    """

    text: str
    answers: tuple[Span, ...]
    slots: tuple[Span, ...] | None = None
    frame: "Frame | None" = None


@dataclass(frozen=True, slots=True)
class Frame:
    """A conversation of one form, rendered with slots instead of texts.

    Attributes:
        literals: The template's own text before, between and after the slots, each slot an empty string.
        order: Number of the message in each slot.
        answers: For each answer: (its slot, characters of the template's own text before and after it that the model
            generates too, e.g. the end token).
        marks: For each answer: (number of the last special token before it, the text from that token to the answer,
            number of the special token that ends it). Empty if there is no special token between an answer and the
            text before it.
        special_tokens: Special tokens in `literals`, in order.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]
    answers: tuple[tuple[int, int, int], ...]
    marks: tuple[tuple[int, str, int], ...]
    special_tokens: tuple[str, ...]


class JinjaTemplate:
    """A chat template in Jinja, rendered by transformers' sandboxed engine as `apply_chat_template` does.

    Attributes:
        name: `base`, or the file's name.
        jinja: The template.
        added_tokens: Always empty: the base's tokenizer has what its template writes.
        tokenizer_adds_bos: False: BOS is in the text where the template writes it, as with `apply_chat_template`.
    """

    added_tokens: tuple[str, ...] = ()
    tokenizer_adds_bos = False

    def __init__(self, jinja: str, names: Mapping[str, str], special: Iterable[str], *, name: str = "base") -> None:
        """Keep the template.

        Args:
            jinja: The template.
            names: `bos`, `eos`, `unk`, `pad` -> text, as far as the tokenizer has them.
            special: Texts of all special tokens of the tokenizer.
            name: For messages.
        """
        self.jinja, self.name = jinja, name
        self._names = {f"{short}_token": text for short, text in names.items()}
        self._special = frozenset(special)
        longest_first = sorted(self._special, key=lambda text: (-len(text), text))
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._frames: dict[tuple[bool, int], Frame | UnusableConversationError] = {}
        self._date = DATE

    @property
    def plain_jinja(self) -> str:
        """The template as it is in the package: unchanged."""
        return self.jinja

    @property
    def digest(self) -> str:
        """sha256 of the template; data, model and evaluation must have the same."""
        return hashlib.sha256(self.jinja.encode()).hexdigest()

    def render_messages(
        self, messages: Sequence[Message], tools: Sequence[Message] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """Return the rendered text; a date in it is always `DATE`.

        Raises:
            UnusableConversationError: The template refuses the messages, or fails on them.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        self._check_limits()
        try:
            pin_date(self.jinja, self._date)
            (text,), _ = render_jinja_template(
                # As apply_chat_template does: a template must not see a content of null.
                conversations=[[{key: part for key, part in one.items() if part is not None} for one in messages]],
                tools=list(tools) or None,
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise UnusableConversationError(f"the template refuses it: {str(error)[:_SHOWN]}") from None
        return str(text)

    def render(self, conversation: Conversation, *, end: str) -> str:  # noqa: ARG002 - the template knows its end
        """Return the conversation as one string, as it is tokenized."""
        return self.render_messages(conversation.to_messages(), conversation.read_form().get("tools", ()))

    def render_prompt(self, turns: Sequence[str], *, end: str, system: str = "") -> str:  # noqa: ARG002
        """Return a generation prompt: the given turns and the prefix of the assistant's turn."""
        messages = Conversation(tuple(turns), system).to_messages()
        return self.render_messages(messages, add_generation_prompt=True)

    def render_question(self, conversation: Conversation, *, end: str) -> str:  # noqa: ARG002
        """Return the generation prompt after a conversation of any form.

        Raises:
            UnusableConversationError: The template refuses the conversation, or has no place for a part of it.
        """
        self._prove_nothing_is_lost(conversation)
        return self.render_messages(
            conversation.to_messages(), conversation.read_form().get("tools", ()), add_generation_prompt=True
        )

    def sequences(self, conversation: Conversation, *, per_turn: bool) -> list[Rendered]:
        """Return the sequences to train on: one, or one per answer where the template rewrites earlier turns.

        Args:
            conversation: The conversation.
            per_turn: Accept a conversation whose earlier turns the template renders differently once later ones
                follow (e.g. without their reasoning), as one sequence per answer.

        Raises:
            UnusableConversationError: The message is the reason.
        """
        if not conversation.form:
            frame = self._frame(len(conversation.turns), has_system=bool(conversation.system))
            if isinstance(frame, LostTextError):
                raise LostTextError(frame.role)
            if isinstance(frame, Frame) and (found := self._fill_frame(conversation, frame)):
                return [found]
        else:
            self._prove_nothing_is_lost(conversation)
        return self._render_each_answer(conversation, per_turn=per_turn)

    def _fill_frame(self, conversation: Conversation, frame: Frame) -> Rendered | None:
        """Return a plain conversation by one rendering; None if the template does more than to insert the texts."""
        if self._looks_at_texts:
            return None
        try:
            text = self._render_plain(conversation.to_messages())
        except Exception:  # noqa: BLE001 - a template may raise anything; `render_messages` says what
            return None
        contents = (conversation.system, *conversation.turns) if conversation.system else conversation.turns
        for change in (None, str.strip):  # some templates strip the texts
            pieces = list(frame.literals)
            parts = [contents[at] if change is None else change(contents[at]) for at in frame.order]
            pieces[1::2] = parts
            if "".join(pieces) == text:
                ends = list(accumulate(map(len, pieces)))
                slots = tuple(zip(ends[::2], ends[1::2], strict=False))
                answers = tuple((slots[at][0] - before, slots[at][1] + after) for at, before, after in frame.answers)
                return Rendered(text, answers, slots, frame)
        return None

    @cached_property
    def _looks_at_texts(self) -> bool:
        """Whether what the template writes may depend on a text, e.g. `'/no_think' in content`.

        Then each prompt has to be rendered. Joining and stripping texts, and asking if there is one, do not count.
        """
        seen: list[str] = []
        for system in ("s", ""):
            texts = [WatchedText(text, seen) for text in ("q", "a", "r", "b")]
            messages = Conversation(tuple(texts), system and WatchedText(system, seen)).to_messages()
            for count in range(1, len(messages) + 1):
                for asks in (False, True):
                    with suppress(Exception):  # `render_messages` says what
                        self._render_plain(messages[:count], add_generation_prompt=asks)
        return bool(seen)

    def _render_plain(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render messages of role and text without the checks and copies that transformers makes for others."""
        self._check_limits()
        pin_date(self.jinja, self._date)
        options = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return str(_compile(self.jinja).render(messages=messages, **options, **self._names))

    def _check_limits(self) -> None:
        messages = Conversation(("Hello.", "Hi.", "Bye."), "Be kind.").to_messages()
        options = {"tools": None, "documents": None, "add_generation_prompt": True}
        check_limits(
            self.jinja, self.name, lambda: _compile(self.jinja).render(messages=messages, **options, **self._names)
        )

    def _frame(self, turns: int, *, has_system: bool) -> Frame | UnusableConversationError:
        key = (has_system, turns)
        if key not in self._frames:
            slots = [f"\x00{number}\x00" for number in range(turns + has_system)]
            conversation = Conversation(tuple(slots[has_system:]), slots[0] if has_system else "")
            try:
                (rendered,) = self._render_each_answer(conversation, per_turn=False)
                self._frames[key] = _to_frame(rendered, self._special_pattern)
            except UnusableConversationError as error:
                self._frames[key] = error
        return self._frames[key]

    def _render_each_answer(self, conversation: Conversation, *, per_turn: bool) -> list[Rendered]:
        messages, tools = conversation.to_messages(), conversation.read_form().get("tools", ())
        wanted = [at for at in conversation.supervised_messages() if at > 0]  # no prompt comes before the first message
        if not wanted:
            raise UnusableConversationError("no answer counts")
        whole = self.render_messages(messages, tools)
        for one in messages:
            if one["role"] != "assistant" and not _has_text(whole, one):
                raise LostTextError(one["role"])
        answers, each = [], []
        is_stable = all(_has_text(whole, one) for one in messages)
        for at in wanted:
            prompt = self.render_messages(messages[:at], tools, add_generation_prompt=True)
            answered = self.render_messages(messages[: at + 1], tools)
            if not answered.startswith(prompt):
                raise UnusableConversationError("an answer does not begin as the template's generation prompt ends")
            span = (len(prompt), self._find_end(answered, len(prompt)))
            if not _has_text(answered[slice(*span)], messages[at]):
                raise LostTextError("assistant")
            answers.append(span)
            each.append(Rendered(answered, (span,)))
            is_stable &= whole.startswith(answered[: span[1]])
        if is_stable:
            return [Rendered(whole, tuple(answers))]
        if not per_turn:
            raise UnusableConversationError("the template rewrites earlier turns (history: per_turn trains each)")
        return each

    def _prove_nothing_is_lost(self, conversation: Conversation) -> None:
        """Raise UnusableConversationError if a part of the conversation has no place in the rendered text.

        The parts are replaced by unique words, because a part may also be found elsewhere. Ids are not looked for, nor
        the name of a tool beside its result.
        """
        messages, words = mark_parts(conversation.to_messages())
        tools, tool_words = mark_tools(conversation.read_form().get("tools", ()))
        whole = self.render_messages(messages, tools)
        if missing := [what for word, what in tool_words.items() if word not in whole]:
            raise UnusableConversationError(f"the template has no place for {missing[0]}")
        for at, (message, own) in enumerate(zip(messages, words, strict=True)):
            text = whole
            if message["role"] == "assistant":  # earlier answers may lose their reasoning: a rewritten history
                text = self.render_messages(messages[: at + 1], tools)
            for word, what in own.items():
                if word not in text:
                    raise UnusableConversationError(f"the template has no place for {what}")

    def _find_end(self, answered: str, begin: int) -> int:
        """Return where the end token ends, after which the template may write e.g. a line break."""
        end = len(answered) - self._trailing
        for length in {len(text) for text in self._special}:
            if end - length >= begin and answered[end - length : end] in self._special:
                return end
        raise UnusableConversationError("the template ends an answer without a special token")

    @cached_property
    def _trailing(self) -> int:
        """Number of characters that the template writes after the end token of a last answer.

        What it writes there only because nothing follows (e.g. EOS after the whole conversation) is not the answer's.
        """
        messages = Conversation(("Hi", "\x000\x00", "Why?")).to_messages()
        answered, continued = self.render_messages(messages[:2]), self.render_messages(messages)
        common = commonprefix([answered, continued])  # noqa: RUF071 - of texts, not of paths
        ends = [hit.end() for hit in self._special_pattern.finditer(common, common.find("\x000\x00") + 1)]
        return len(answered) - max(ends) if "\x000\x00" in common and ends else len(answered) - len(answered.rstrip())

    @cached_property
    def depends_on_date(self) -> bool:
        """Whether the template writes today's date."""
        messages = Conversation(("Hi",)).to_messages()
        today = self.render_messages(messages, add_generation_prompt=True)
        self._date = _UNKNOWN_DATE
        try:
            return self.render_messages(messages, add_generation_prompt=True) != today
        finally:
            self._date = DATE

    @cached_property
    def generation_prompt(self) -> str:
        """Prefix of the assistant's turn after a user's turn."""
        messages = Conversation(("Hi",)).to_messages()
        asked = self.render_messages(messages, add_generation_prompt=True)
        try:
            done = self.render_messages(messages)
        except UnusableConversationError:  # it renders no question alone
            done = asked[: asked.rfind("Hi") + 2]
        # What a template writes at the end of a conversation, e.g. EOS, is not in the prompt.
        common = commonprefix([asked, done])  # noqa: RUF071 - of texts, not of paths
        inside = [hit.start() for hit in self._special_pattern.finditer(asked) if hit.start() < len(common) < hit.end()]
        return asked[inside[0] if inside else len(common) :]

    def control_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that the template writes around a short conversation, in order."""
        found = list(self._special_pattern.findall(self.render_messages(Conversation(("Hi", "Hello")).to_messages())))
        found += self._special_pattern.findall(self.generation_prompt)
        return tuple(dict.fromkeys(found))

    def end_token(self) -> str:
        """Return the special token that ends an answer.

        Raises:
            UnusableConversationError: The template cannot render a question and an answer as inference would.
        """
        (rendered,) = self._render_each_answer(Conversation(("Hi", "Hello")), per_turn=True)
        begin, end = rendered.answers[0]
        return str(self._special_pattern.findall(rendered.text[begin:end])[-1])


def pin_date(jinja: str, date: datetime = DATE) -> None:
    """Make a template, when transformers renders it in this process, write this date instead of today's.

    transformers makes strings of what it is given for a template, so that a function cannot be handed over.
    """
    _compile(jinja).globals["strftime_now"] = date.strftime


def _compile(jinja: str) -> Any:  # noqa: ANN401 - Jinja's class, which only reporting may import
    from transformers.utils.chat_template_utils import _compile_jinja_template  # it keeps what it compiled

    return _compile_jinja_template(jinja)


def _to_frame(rendered: Rendered, special: re.Pattern[str]) -> Frame:
    literals = _SLOT.split(rendered.text)
    order = tuple(map(int, literals[1::2]))
    literals[1::2] = [""] * len(order)
    places = [hit.span() for hit in _SLOT.finditer(rendered.text)]
    answers = []
    for begin, end in rendered.answers:
        slot = next(at for at, (there, _) in enumerate(places) if there >= begin)
        answers.append((slot, places[slot][0] - begin, end - places[slot][1]))
    found = [*special.finditer(rendered.text)]
    hits = [hit.span() for hit in found]
    marks = []
    for begin, end in rendered.answers:
        before = [number for number, (_, there) in enumerate(hits) if there <= begin]
        at = next((number for number, (_, there) in enumerate(hits) if there == end), None)
        header = rendered.text[hits[before[-1]][0] : begin] if before else ""
        if header and at is not None and not _SLOT.search(header):
            marks.append((before[-1], header, at))
    complete = tuple(marks) if len(marks) == len(answers) else ()
    return Frame(tuple(literals), order, tuple(answers), complete, tuple(hit[0] for hit in found))


def _has_text(text: str, message: Message) -> bool:
    """Return whether a message's content is in the rendered text; templates may write a tool's result as JSON."""
    content = (message.get("content") or "").strip()
    as_json = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return content in text or (message["role"] == "tool" and any(one in text for one in as_json))


def find_own_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a model folder by name; one without a name is `default`.

    They are in chat_template.jinja and additional_chat_templates/, else in tokenizer_config.json or chat_template.json.

    Raises:
        ConfigError: A file cannot be read as UTF-8.
    """
    try:
        more = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
        if (path := folder / FILE).is_file():
            return {"default": path.read_text("utf-8"), **more}
        for name in ("tokenizer_config.json", "chat_template.json"):
            if (path := folder / name).is_file() and (
                found := parse_json(path.read_text("utf-8")).get("chat_template")
            ):
                named = found if isinstance(found, list) else [{"name": "default", "template": found}]
                return {str(one["name"]): str(one["template"]) for one in named} | more
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: its chat template cannot be read: {error}") from None
    return more
