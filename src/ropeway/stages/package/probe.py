"""The probe: expected token ids, texts and logits of a package, computed from the run.

Token ids come from the tokenizers library, texts from the chat template, frequencies from the formula; none of them
from the transformers classes that `check` compares with them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ropeway.models.chat_template import ChatTemplate, open_template
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import UnusableConversationError
from ropeway.models.open_model import DTYPES, open_folder
from ropeway.models.rope import RopeScaling
from ropeway.models.tokenizer import open_tokenizer, read_special_names

FORMAT = 1
# Known errors of loaders and servers: the space after a special token, leading and double spaces, bytes outside the
# vocabulary, digits, an end token in the text. Source: llama.cpp#7094, transformers#29872, #31513.
TEXTS = (
    "", "Hello", " Hello", "  two blanks", "a\tb\n\nc ", "naïve — 漢字 🙂", "1234567890", "def f(x):\n    return x",
    "</s>", "<s>", "ends</s> here",
)  # fmt: skip
CONVERSATIONS = (
    Conversation(("Hi",)),
    Conversation(("Hi", "Hello."), system="Be kind."),
    Conversation(("What is a list?", " A list holds things.\n", "And a tuple?", "So does a tuple.", "Thanks")),
    Conversation(("Why?", "Because 2 > 1, and 漢字 too.", "Go on", "No."), system=" Explain\nin steps. "),
)


class TextCase(TypedDict):
    """A text and its token ids."""

    text: str
    ids: list[int]


class ConversationCase(TextCase):
    """A conversation, its text and token ids, and both with the generation prompt where it ends with a question."""

    prompt: str
    prompt_ids: list[int]
    messages: list[dict[str, str]]


class Probe(TypedDict):
    """probe.json: expected ids of texts and conversations, special tokens, RoPE and dtype."""

    format: int
    dtype: str
    rope: dict[str, object]
    special: dict[str, int]
    stops: dict[str, int | list[int]]
    max_length: int
    texts: list[TextCase]
    conversations: list[ConversationCase]


def plan_probe(
    tokenizer_folder: Path,
    *,
    rope: RopeScaling,
    special: Mapping[str, int],
    stops: Mapping[str, int | list[int]],
    dtype: str,
    max_length: int,
) -> Probe:
    """Return the probe of a run; `tokenizer_folder` has its tokenizer and template."""
    tokenizer, template = open_tokenizer(tokenizer_folder), open_template(tokenizer_folder)
    names = read_special_names(tokenizer_folder)
    texts = (*TEXTS, *(f"{role}{text}" for role in template.added_tokens for text in ("text", " text")))
    return {
        "format": FORMAT,
        "dtype": dtype,
        "rope": rope.to_json(),
        "special": dict(special),
        "stops": dict(stops),
        "max_length": max_length,
        "texts": [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts],
        "conversations": [*_plan_conversations(tokenizer, names, template)],
    }


def _plan_conversations(
    tokenizer: Tokenizer, names: Mapping[str, str], template: ChatTemplate
) -> Iterator[ConversationCase]:
    """Yield the conversations that the template accepts; some accept no system message."""
    adds_bos = template.tokenizer_adds_bos
    bos = names["bos"] if adds_bos else ""
    for conversation in CONVERSATIONS:
        try:
            text, prompt = template.render(conversation, end=names["eos"]), ""
            if len(conversation.turns) % 2:
                prompt = template.render_prompt(conversation.turns, end=names["eos"], system=conversation.system)
        except UnusableConversationError:
            continue
        yield {
            "messages": conversation.to_messages(),
            "text": bos + text,
            "ids": tokenizer.encode(text, add_special_tokens=adds_bos).ids,
            "prompt": bos + prompt if prompt else "",
            "prompt_ids": tokenizer.encode(prompt, add_special_tokens=adds_bos).ids if prompt else [],
        }


def probe_row(probe: Probe) -> list[int]:
    """Return the `(T,)` token ids whose logits are compared: all conversations, concatenated."""
    row = [number for conversation in probe["conversations"] for number in conversation["ids"]]
    return row[: probe["max_length"]]


@torch.inference_mode()
def probe_logits(model: PreTrainedModel, probe: Probe) -> NDArray[np.float32]:
    """Return `(T, V)` fp32 logits of the probe row."""
    logits = model(input_ids=torch.tensor([probe_row(probe)]), use_cache=False).logits[0]
    found: NDArray[np.float32] = logits.float().numpy()
    return found


def expected_logits(folder: Path, probe: Probe) -> NDArray[np.float32]:
    """Return the probe row's logits of the exported model, with weights cast to the package's dtype."""
    disable_progress_bar()
    return probe_logits(open_folder(folder, DTYPES[probe["dtype"]]).eval(), probe)
