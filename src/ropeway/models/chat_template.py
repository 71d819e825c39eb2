"""Chat templates: one object each for rendering, loss masks, prompts and the exported tokenizer.

A template is added by a subclass of `ChatTemplate` and its entry in `TEMPLATES`, both here. A model folder says by its
own `chat_template.jinja` which one it was trained with: `open_template`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError

FILE = "chat_template.jinja"
_REMEDY = "Run `dvc repro`, so that base, data and model come from one run"
_GENERATION = ("{%- generation -%}", "{%- endgeneration -%}")


class Speaker(IntEnum):
    """Who said a token of a conversation."""

    SYSTEM = 0  # BOS and the system message
    USER = 1
    ASSISTANT = 2


class ChatTemplate(ABC):
    """How conversations become token sequences, in data, training, evaluation and the exported tokenizer.

    Attributes:
        name: As params and reports name it.
        jinja: What `apply_chat_template` renders; marks with `{% generation %}` what the assistant says.
        added_tokens: Special tokens that the base's tokenizer gets, in the order of their ids.
        generation_prompt: What opens the assistant's turn.
    """

    name: str
    jinja: str
    added_tokens: tuple[str, ...]
    generation_prompt: str

    @abstractmethod
    def render_turns(self, conversation: Conversation, *, end: str) -> list[str]:
        """Return one string per turn, whose concatenation is tokenized; BOS comes from the tokenizer.

        Args:
            conversation: What is rendered.
            end: The text of the tokenizer's end token.
        """

    @abstractmethod
    def speakers(
        self, tokens: NDArray[np.integer], lengths: NDArray[np.integer] | None, *, ids: Mapping[str, int]
    ) -> NDArray[np.uint8]:
        """Return `(T,)` `Speaker` of each token: what the loss mask is decided by.

        Args:
            tokens: `(T,)`, rendered conversations one after another.
            lengths: `(N,)` tokens of each conversation; None means one.
            ids: `added_tokens` -> id.
        """

    def render(self, conversation: Conversation, *, end: str) -> str:
        """Return the whole conversation as the one string that is tokenized."""
        return "".join(self.render_turns(conversation, end=end))

    def render_prompt(self, turns: Sequence[str], *, end: str, system: str = "") -> str:
        """Return what a model is asked to continue: the turns so far and an open assistant turn."""
        return self.render(Conversation(tuple(turns), system), end=end) + self.generation_prompt

    @property
    def plain_jinja(self) -> str:
        """`jinja` for readers that know no `{% generation %}`: transformers before 4.43, and most servers."""
        begin, end = _GENERATION
        return self.jinja.replace(begin, "").replace(end, "")

    @property
    def digest(self) -> str:
        """The sha256 of the template; data, model and evaluation must agree on it."""
        return hashlib.sha256("\n".join((self.jinja, *self.added_tokens)).encode()).hexdigest()


class OpenAssistantTemplate(ChatTemplate):
    """`<|system|>S</s><|prompter|>Q</s><|assistant|>A</s>...`, concatenated without blanks, one BOS in front.

    Source: the model card, "Conversation Template", and Open-Assistant's formatting (July 2023).
    """

    name = "open_assistant"
    generation_prompt = "<|assistant|>"
    # Fixed order, hence fixed ids: the original put them through a set, so ids changed from process to process.
    added_tokens = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>")
    # `</s>` stands for the tokenizer's end token, whatever its name. Every turn ends with it.
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

        An empty system message is left out altogether; a conversation without turns is empty, as in the original.

        >>> OPEN_ASSISTANT.render_turns(Conversation(("Hi", "Hello"), system="Be kind."), end="</s>")
        ['<|system|>Be kind.</s><|prompter|>Hi</s>', '<|assistant|>Hello</s>']
        """
        user, assistant, system = self.added_tokens[:3]
        parts = [f"{user if at % 2 == 0 else assistant}{text}{end}" for at, text in enumerate(conversation.turns)]
        if parts and conversation.system:
            parts[0] = f"{system}{conversation.system}{end}{parts[0]}"
        return parts

    def speakers(
        self, tokens: NDArray[np.integer], lengths: NDArray[np.integer] | None = None, *, ids: Mapping[str, int]
    ) -> NDArray[np.uint8]:
        """Return `(T,)` `Speaker` of each token, each conversation seen from its beginning.

        A turn begins with its role token. Turns are counted, not read: the first is the user's, the second the
        assistant's and so on, whichever role token opens it; what stands before the first is nobody's. Source:
        Open-Assistant's dialogue collator (July 2023), where a literal role token in a text begins a turn as well.
        """
        user, assistant = (ids[token] for token in self.added_tokens[:2])
        turn = np.cumsum((tokens == user) | (tokens == assistant), dtype=np.int32)
        if lengths is not None:
            ends = np.cumsum(lengths)
            earlier = np.concatenate(([np.int32(0)], turn))[ends - lengths]  # turns of the conversations before
            turn -= np.repeat(earlier, lengths)
        said = np.where(turn & 1, np.uint8(Speaker.USER), np.uint8(Speaker.ASSISTANT))
        said[turn == 0] = Speaker.SYSTEM
        return said


OPEN_ASSISTANT = OpenAssistantTemplate()
TEMPLATES: tuple[ChatTemplate, ...] = (OPEN_ASSISTANT,)


def choose_template() -> ChatTemplate:
    """Return the template that stage base gives every base, in place of the base's own: the published one.

    It is chosen here for all profiles; no key of params.yaml chooses another yet.
    """
    return OPEN_ASSISTANT


def open_template(folder: Path, *, remedy: str = _REMEDY) -> ChatTemplate:
    """Return the template of a model or tokenizer folder, by its `chat_template.jinja`, `{% generation %}` or not.

    Raises:
        DataError: The file is missing or holds another template than those this version renders.
    """
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{path}: expected the template that the folder was made with, found no file. {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). {remedy}") from None
    for template in TEMPLATES:
        if text in (template.jinja, template.plain_jinja):
            return template
    known = max(TEMPLATES, key=lambda one: _first_difference(text, one.jinja))
    place = _first_difference(text, known.jinja)
    raise DataError(
        f"{path}: differs from template {known.name} at character {place}: expected "
        f"{known.jinja[place : place + 30]!r}, found {text[place : place + 30]!r}. {remedy}"
    )


def _first_difference(one: str, other: str) -> int:
    return next(at for at, pair in enumerate(zip_longest(one, other)) if pair[0] != pair[1])
