"""One rank of a rehearsal: opens the model on the fake card, starts the real engine, runs two optimizer steps."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import deepspeed
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, PreTrainedModel

from ropeway.config.params import Profile
from ropeway.data.accumulation import accumulation_steps
from ropeway.engine_rehearsal.counting import StorageCounter
from ropeway.engine_rehearsal.fake_gpu import CARD, HOST, KeepDevice, KeepDeviceOfCopies, install
from ropeway.engine_rehearsal.stated_values import AnswerValues
from ropeway.models.architectures import DEFAULT
from ropeway.models.attention import VARLEN, register_attention, torch_varlen
from ropeway.models.lora import add_adapters
from ropeway.models.open_model import DTYPES, model_class
from ropeway.models.sequence_parallel import SequenceGroup, join_sequence_group
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.planning.memory import Sizes
from ropeway.runtime.op_build import collective_timeout
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json, plan_deepspeed, without_compiler
from ropeway.stages.train.loss import micro_batch_loss
from ropeway.stages.train.model import enable_checkpointing, trainable_parameters

STEPS = 2  # Adam's moments exist from the end of the first on
MOST_MICRO_BATCHES = 2  # per step; the first has no accumulated gradients, all later ones are equal
PHASES = ("engine_start", "forward", "backward", "optimizer_step")
_TOTAL_STEPS = 1000  # of the schedule, which has no influence on memory


class RankPeaks(TypedDict):
    """Peaks of a rank in bytes by phase, on the card and on the host."""

    card: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True, slots=True)
class Case:
    """What is rehearsed: a profile with the text of its DeepSpeed JSON."""

    profile: Profile
    deepspeed: str


class _LossOnCard(SupervisedLoss):
    """The model with its loss, created on the card."""

    def to(self, *_: object, **__: object) -> "_LossOnCard":
        """Return the model unchanged; torch cannot move the parameters of fake modules in place."""
        return self


def join_group(rank: int, ranks: int) -> None:
    """Become a rank of a group whose other ranks do not exist: its collectives return at once."""
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"})
    install()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    deepspeed.init_distributed("fake", verbose=False)


def rehearse_rank(case: Case, *, ranks: int) -> RankPeaks:
    """Return the peaks of this rank over two optimizer steps of full rows.

    Every row has `max_length` tokens and every position is supervised: the largest step that the run can have.
    """
    profile = case.profile
    counter = StorageCounter()
    peaks = RankPeaks(card=dict.fromkeys(PHASES, 0), host=dict.fromkeys(PHASES, 0))

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        counter.restart()
        yield
        for part, device in (("card", CARD), ("host", HOST)):
            peaks[part][name] = max(peaks[part][name], counter.peak[device])  # type: ignore[literal-required]

    values = AnswerValues(sequences=profile.per_device_train_batch_size, longest=profile.max_length)
    with KeepDevice(), FakeTensorMode(), KeepDeviceOfCopies(), counter, values:
        with phase("engine_start"):
            engine = _start_engine(case, ranks=ranks)
        for _ in range(STEPS * engine.gradient_accumulation_steps()):
            with phase("forward"):
                loss = micro_batch_loss(engine(**_full_rows(profile)))
            with phase("backward"):
                engine.backward(loss)
                del loss
            with phase("optimizer_step"):
                engine.step()
    return peaks


def _start_engine(case: Case, *, ranks: int) -> Any:  # noqa: ANN401 - DeepSpeed has no types
    """Return the engine around the model, with the configuration of the run but fewer micro-batches per step."""
    profile = case.profile
    named = parse_deepspeed_json(case.deepspeed, profile.deepspeed_config)
    sequence = join_sequence_group(profile.sequence_parallel, timeout=collective_timeout())
    accumulation = min(MOST_MICRO_BATCHES, accumulation_steps(profile, ranks))
    config = plan_deepspeed(profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=_TOTAL_STEPS)
    model = _LossOnCard(_create_model(profile, sequence), sequence)
    with without_compiler(named):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable_parameters(model), config=config)
    return engine


def _create_model(profile: Profile, sequence: SequenceGroup | None) -> PreTrainedModel:
    """Return the profile's model on the card, prepared for training as `open_model` of stage train prepares it."""
    _, kernel = torch_varlen()
    register_attention(kernel, sequence)
    sizes, expected = Sizes.of(profile), profile.expected_model  # raises where it is null
    shape = {**(expected.model_dump() if expected else {}), "vocab_size": sizes.vocabulary}
    config = AutoConfig.for_model(DEFAULT, **shape, attn_implementation=VARLEN)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[profile.dtype])
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)(config)
            add_adapters(model, profile)
    finally:
        torch.set_default_dtype(usual)
    if profile.gradient_checkpointing:
        enable_checkpointing(model)
    _place_on_card(model)
    return model.train()


def _place_on_card(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one on the card; tied parameters stay tied."""
    placed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, part in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(part) not in placed:
                empty = torch.empty(part.shape, dtype=part.dtype, device=CARD)
                placed[id(part)] = nn.Parameter(empty, requires_grad=part.requires_grad)
            setattr(module, name, placed[id(part)])
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD))


def _full_rows(profile: Profile) -> Mapping[str, Tensor]:
    """Return the inputs of `SupervisedLoss`: `(B, T)`, packed `(1, B * T)`; with T over the ranks that share rows."""
    rows, tokens = profile.per_device_train_batch_size, profile.max_length // profile.sequence_parallel
    shape = (1, rows * tokens) if profile.layout == "packed" else (rows, tokens)
    ids = torch.zeros(shape, dtype=torch.long, device=CARD)
    mask = torch.ones(shape, dtype=torch.bool, device=CARD)
    return {"input_ids": ids, "position_ids": torch.zeros_like(ids), "targets": ids, "loss_mask": mask}
