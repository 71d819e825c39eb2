"""Chat templates: rendering, loss masks, prompts and the exported tokenizer use the same object.

The `chat_template.jinja` of a model folder identifies the template that the model was trained with: `open_template`.
It is either the published run's, whose masks come from role tokens as in the original, or any other Jinja template,
whose masks come from character offsets (`ropeway.models.jinja_template`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import FILE, OWN_FILE, JinjaTemplate, Rendered, UnusableConversationError
from ropeway.models.tokenizer import read_special_names, read_special_texts
from ropeway.runtime.errors import ConfigError, DataError

_REMEDY = "Run `dvc repro`, so that base, data and model come from one run"
_GENERATION = ("{%- generation -%}", "{%- endgeneration -%}")


class Speaker(IntEnum):
    """The speaker of a token in a conversation."""

    SYSTEM = 0  # BOS and the system message
    USER = 1
    ASSISTANT = 2


class OpenAssistantTemplate:
    """`<|system|>S</s><|prompter|>Q</s><|assistant|>A</s>...`, concatenated without spaces, after one BOS.

    Source: the model card, "Conversation Template", and Open-Assistant's formatting (July 2023).

    Attributes:
        name: Name in params.yaml, messages and reports.
        jinja: The template for `apply_chat_template`; `{% generation %}` encloses the assistant's text.
        added_tokens: Special tokens that are added to the base's tokenizer, in the order of their ids.
        generation_prompt: Prefix of the assistant's turn.
        tokenizer_adds_bos: Whether BOS comes from the tokenizer, not from the template.
    """

    name = "open_assistant"
    tokenizer_adds_bos = True
    generation_prompt = "<|assistant|>"
    # Fixed order and ids: the original iterated over a set, so the ids differed between processes.
    added_tokens = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>")
    # Every turn ends with the tokenizer's EOS token, here written as `</s>`.
    jinja = (
        "{%- if add_bos | default(true) -%}{{- bos_token or '' -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' and message['content'] -%}"
        "{{- '<|system|>' + message['content'] + eos_token -}}"
        "{%- elif message['role'] == 'user' -%}"
        "{{- '<|prompter|>' + message['content'] + eos_token -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )

    def render_turns(self, conversation: Conversation, *, end: str) -> list[str]:
        """Return one string per turn; a non-empty system message is part of the first.

        An empty system message is omitted; a conversation without turns gives an empty list, as in the original.

        >>> OPEN_ASSISTANT.render_turns(Conversation(("Hi", "Hello"), system="Be kind."), end="</s>")
        ['<|system|>Be kind.</s><|prompter|>Hi</s>', '<|assistant|>Hello</s>']
        """
        user, assistant, system = self.added_tokens[:3]
        parts = [f"{user if at % 2 == 0 else assistant}{text}{end}" for at, text in enumerate(conversation.turns)]
        if parts and conversation.system:
            parts[0] = f"{system}{conversation.system}{end}{parts[0]}"
        return parts

    @property
    def plain_jinja(self) -> str:
        """`jinja` without `{% generation %}`, for transformers before 4.43 and most inference servers."""
        begin, end = _GENERATION
        return self.jinja.replace(begin, "").replace(end, "")

    @property
    def digest(self) -> str:
        """sha256 of the template; data, model and evaluation must have the same."""
        return hashlib.sha256("\n".join((self.jinja, *self.added_tokens)).encode()).hexdigest()

    def render(self, conversation: Conversation, *, end: str) -> str:
        """Return the conversation as one string, as it is tokenized. The tokenizer adds BOS."""
        return "".join(self.render_turns(conversation, end=end))

    def render_prompt(self, turns: Sequence[str], *, end: str, system: str = "") -> str:
        """Return a generation prompt: the given turns and the prefix of the assistant's turn."""
        return self.render(Conversation(tuple(turns), system), end=end) + self.generation_prompt

    def render_question(self, conversation: Conversation, *, end: str) -> str:
        """Return the generation prompt after a conversation.

        Raises:
            UnusableConversationError: It has other roles, tools or reasoning, which the template cannot write.
        """
        if conversation.form:
            raise UnusableConversationError(_find_unsupported(conversation))
        return self.render_prompt(conversation.turns, end=end, system=conversation.system)

    def control_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that the template writes, besides BOS and EOS."""
        return self.added_tokens

    def sequences(self, conversation: Conversation, *, end: str) -> list[Rendered]:
        """Return the one sequence of a conversation; `speakers` gives its masks.

        Raises:
            UnusableConversationError: It has other roles, tools, reasoning or weights, which the template cannot write.
        """
        if conversation.form:
            raise UnusableConversationError(_find_unsupported(conversation))
        return [Rendered(self.render(conversation, end=end), ())]

    def speakers(
        self, tokens: NDArray[np.integer], lengths: NDArray[np.integer] | None = None, *, ids: Mapping[str, int]
    ) -> NDArray[np.uint8]:
        """Return the `(T,)` `Speaker` of each token.

        A turn begins with a role token. Speakers alternate by the number of the turn: the first turn is the user's, the
        second the assistant's, whichever role token begins it. Tokens before the first turn are `SYSTEM`. Source:
        Open-Assistant's dialogue collator (July 2023), where a literal role token in a text also begins a turn.
        """
        user, assistant = (ids[token] for token in self.added_tokens[:2])
        turn = np.cumsum((tokens == user) | (tokens == assistant), dtype=np.int32)
        if lengths is not None:
            ends = np.cumsum(lengths)
            earlier = np.concatenate(([np.int32(0)], turn))[ends - lengths]  # turns in earlier conversations
            turn -= np.repeat(earlier, lengths)
        found = np.where(turn & 1, np.uint8(Speaker.USER), np.uint8(Speaker.ASSISTANT))
        found[turn == 0] = Speaker.SYSTEM
        return found


def _find_unsupported(conversation: Conversation) -> str:
    """Return what of a conversation the published template cannot write."""
    form = conversation.read_form()
    if form.get("tools"):
        return "template open_assistant has no tools"
    for role in form["roles"]:
        if role not in ("user", "assistant"):
            return "system message not first" if role == "system" else f"template open_assistant has no role {role!r}"
    if fields := {name for each in form["fields"] for name in each}:
        return f"template open_assistant has no {', '.join(sorted(fields))}"
    return "roles out of order"


OPEN_ASSISTANT = OpenAssistantTemplate()
ChatTemplate = OpenAssistantTemplate | JinjaTemplate


def open_template(folder: Path, *, remedy: str = _REMEDY) -> ChatTemplate:
    """Return the template of a model or tokenizer folder; its `chat_template.jinja` may lack `{% generation %}`.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{path}: expected the chat template of this folder, found no file. {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). {remedy}") from None
    if text in (OPEN_ASSISTANT.jinja, OPEN_ASSISTANT.plain_jinja):
        return OPEN_ASSISTANT
    try:
        return JinjaTemplate(text, read_special_names(folder), read_special_texts(folder))
    except (OSError, ValueError, KeyError, ConfigError) as error:
        raise DataError(f"{folder}: its tokenizer's special tokens cannot be read ({error}). {remedy}") from None


def open_prompt_template(folder: Path) -> ChatTemplate:
    """Return the template that the model of a folder knows: a base's own where the run has another one.

    Raises:
        DataError: As in `open_template`.
    """
    own = folder / OWN_FILE
    if not own.is_file():
        return open_template(folder)
    text = own.read_text(encoding="utf-8")
    return JinjaTemplate(text, read_special_names(folder), read_special_texts(folder), name="its own")
