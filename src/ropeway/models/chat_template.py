"""The conversation template: one object for data, training, evaluation and the exported tokenizer.

`<|system|>S</s><|prompter|>Q</s><|assistant|>A</s>...`, concatenated without blanks, one BOS in front put there by
the tokenizer. Source: the model card, "Conversation Template", and Open-Assistant's formatting (July 2023).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

PROMPTER, ASSISTANT, SYSTEM = "<|prompter|>", "<|assistant|>", "<|system|>"
# Fixed order, hence fixed ids: the original put them through a set, so ids changed from process to process.
ROLE_TOKENS = (PROMPTER, ASSISTANT, SYSTEM, "<|prefix_begin|>", "<|prefix_end|>")

# `</s>` stands for the tokenizer's end token, whatever its name. Every turn ends with it.
JINJA = (
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


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat: prompter and assistant take turns, the prompter first.

    Attributes:
        turns: Texts, even positions said by the prompter and odd ones by the assistant.
        system: The system message; empty means none.
    """

    turns: tuple[str, ...]
    system: str = ""


def render_turns(conversation: Conversation, *, end: str) -> list[str]:
    """Return one string per turn; a non-empty system message is part of the first.

    An empty system message is left out altogether; without turns nothing is left, as in the original.

    >>> render_turns(Conversation(("Hi", "Hello"), system="Be kind."), end="</s>")
    ['<|system|>Be kind.</s><|prompter|>Hi</s>', '<|assistant|>Hello</s>']
    """
    parts = [
        f"{PROMPTER if position % 2 == 0 else ASSISTANT}{text}{end}" for position, text in enumerate(conversation.turns)
    ]
    if parts and conversation.system:
        parts[0] = f"{SYSTEM}{conversation.system}{end}{parts[0]}"
    return parts


def render(conversation: Conversation, *, end: str) -> str:
    """Return the whole conversation as the one string that is tokenized."""
    return "".join(render_turns(conversation, end=end))


def render_prompt(turns: Sequence[str], *, end: str, system: str = "") -> str:
    """Return what a model is asked to continue: the turns so far and an open assistant turn.

    >>> render_prompt(["Hi"], end="</s>")
    '<|prompter|>Hi</s><|assistant|>'
    """
    return render(Conversation(tuple(turns), system), end=end) + ASSISTANT


def to_messages(conversation: Conversation) -> list[dict[str, str]]:
    """Return a conversation as transformers' `apply_chat_template` takes it.

    >>> to_messages(Conversation(("Hi",), system="Be kind."))
    [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
    """
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    roles = ("user", "assistant")
    return system + [{"role": roles[at % 2], "content": text} for at, text in enumerate(conversation.turns)]


def template_digest() -> str:
    """Return the sha256 of the template; data, model and evaluation must agree on it."""
    return hashlib.sha256("\n".join((JINJA, *ROLE_TOKENS)).encode()).hexdigest()
