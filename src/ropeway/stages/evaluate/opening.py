"""Opens a folder as any user would, and makes sure that it belongs to the data it is measured on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ropeway.data.shards import Shards
from ropeway.models.chat_template import open_template
from ropeway.models.open_model import open_folder, read_config
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import file_sha256

# Models of fewer parameters run on one CPU thread.
MEASURED_ON_ONE = 1 << 26
SAMPLED_ON_ONE = 1 << 28  # a row of one token gives a second thread still less to do
_REMEDY = "Run `dvc repro`, so that base, data and model come from one run"


def open_model(folder: Path, *, like: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model, tokenizer) as any user would open them: fp32 on a CPU, else on the GPU in the export's dtype.

    Args:
        folder: What is opened.
        like: The exported folder, whose dtype base and tuned share on a GPU so that they are compared fairly.
    """
    disable_progress_bar()  # stages print lines
    # It warns beyond max_position_embeddings, which under a RoPE scaling is the base's context and not the model's.
    logging.getLogger("transformers.generation.stopping_criteria").setLevel(logging.ERROR)
    cuda = torch.cuda.is_available()
    dtype = read_config(like, {}).dtype if cuda else torch.float32
    model = open_folder(folder, dtype)
    return model.to("cuda" if cuda else "cpu").eval(), open_tokenizer(folder)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer as others open it."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def threads_for(model: PreTrainedModel, *, one_below: int) -> Iterator[None]:
    """Run a small model on one CPU thread: handing its little matrices to a second costs more than it saves.

    Measured on two cores. 3.3 M weights: 72 rows take 2.0 s on one thread and 1.8 s on two; beside other work 3 s
    against 14 s, and 12 answers 1.5 s against 8 to 20 s. 135 M weights beside other work: 89 ms a sampled token against
    340 to 400.
    """
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and model.num_parameters() < one_below
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_data(folder: Path, shards: Shards) -> None:
    """Raise DataError unless a folder's tokenizer and template are those the data was made with.

    A model trained with one template and measured with another looks broken, or worse, does not.
    """
    made_with, tokenizer = shards.manifest, folder / "tokenizer.json"
    if (found := file_sha256(tokenizer)) != made_with["tokenizer"]:
        wanted = made_with["tokenizer"]
        raise DataError(f"{tokenizer}: sha256 is {found[:12]}…, the data was made with {wanted[:12]}…. {_REMEDY}")
    check_template(folder, shards)


def check_template(folder: Path, shards: Shards, *, remedy: str = _REMEDY) -> None:
    """Raise DataError unless a folder's chat template is the one the data was made with."""
    template, made_with = open_template(folder, remedy=remedy), str(shards.manifest["template"])
    if template.digest != made_with:
        raise DataError(
            f"{folder}: its template {template.name} ({template.digest[:12]}…) is not the data's ({made_with[:12]}…). "
            f"{remedy}"
        )
