"""Loads a model folder as a user does, and checks that its tokenizer and template are those of the data."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ropeway.data.shards import Shards
from ropeway.models.chat_template import open_template
from ropeway.models.open_model import load_tokenizer, open_folder, read_config
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import file_sha256

# Models with fewer parameters run on one CPU thread.
SCORE_SINGLE_THREADED_BELOW = 1 << 26
GENERATE_SINGLE_THREADED_BELOW = 1 << 28  # generation has one token per step, even less work for a second thread
_REMEDY = "Run `dvc repro`, so that base, data and model come from one run"


def open_model(folder: Path, *, like: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) as a user loads them: in fp32 on a CPU, in the export's dtype on a GPU.

    Args:
        folder: The model folder.
        like: The exported model, whose dtype base and tuned model both use on a GPU, for a fair comparison.
    """
    disable_progress_bar()  # stages print plain lines
    # It warns beyond max_position_embeddings, which under RoPE scaling is the base's context length, not the model's.
    logging.getLogger("transformers.generation.stopping_criteria").setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    dtype = read_config(like, {}).dtype if cuda else torch.float32
    tokenizer = load_tokenizer(folder)  # before the weights: its check of the template forks
    model = open_folder(folder, dtype)
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


@contextmanager
def cpu_threads_for(model: PreTrainedModel, *, single_threaded_below: int) -> Iterator[None]:
    """Run a small model on one CPU thread: for small matrices a second thread costs more than it saves.

    Measured on two cores. 3.3 M parameters: 72 rows take 2.0 s on one thread and 1.8 s on two; on a busy machine 3 s
    and 14 s, and 12 answers 1.5 s and 8 to 20 s. 135 M parameters on a busy machine: 89 ms per sampled token on one
    thread, 340 to 400 ms on two.
    """
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and model.num_parameters() < single_threaded_below
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_data(folder: Path, shards: Shards) -> None:
    """Raise DataError unless a folder's tokenizer and chat template are those of the data.

    A model that is measured with another template than it was trained with has wrong scores, without any error.
    """
    tokenizer, expected = folder / "tokenizer.json", str(shards.manifest["tokenizer"])
    if (found := file_sha256(tokenizer)) != expected:
        raise DataError(f"{tokenizer}: sha256 is {found[:12]}…, that of the data is {expected[:12]}…. {_REMEDY}")
    check_template(folder, shards)


def check_template(folder: Path, shards: Shards, *, remedy: str = _REMEDY) -> None:
    """Raise DataError unless a folder's chat template is the one of the data."""
    template, expected = open_template(folder, remedy=remedy), str(shards.manifest["template"])
    if template.digest != expected:
        raise DataError(
            f"{folder}: its template {template.name} ({template.digest[:12]}…) is not that of the data "
            f"({expected[:12]}…). {remedy}"
        )
