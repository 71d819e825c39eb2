"""Schema of params.yaml: the keys that each stage reads, and all keys of one run. `load_params` reads the file.

`ropeway.config.sections` has the values inside the keys.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ropeway.config.sections import (
    PUBLISHED_TEMPLATE,
    RECORD_DIGEST,
    RUN,
    SOURCE_NAME,
    TEMPLATE,
    Base,
    Card,
    Contamination,
    Count,
    DatasetOptions,
    Dtype,
    Duplicates,
    Evaluation,
    Fraction,
    Gate,
    Length,
    Lora,
    ModelShape,
    Packaging,
    PersonalData,
    Positive,
    ScratchBase,
    Section,
    Seed,
    Source,
    StopRules,
    SuperhotConfig,
)


class RowParams(Section):
    """Keys that determine rows and loss masks.

    The classes from here to `Profile` contain the keys that a stage reads: a stage receives a profile typed as its
    class, so mypy rejects every other key.
    """

    datasets: Annotated[list[dict[str, DatasetOptions]], Field(min_length=1)]
    """The mixture: one entry per source, in sampling order, with the names of `sources`."""
    document_end: Literal["masked", "eos", "published"]
    """Loss at a document's last position: masked (`masked`), supervised with EOS at the true end only (`eos`), or as in
    the published run (`published`)."""
    label_masking: bool
    """Mask tokens that `what_counts` excludes. false: every token is supervised."""
    max_length: Length
    """Length of a training row in tokens."""
    rng_seed: Seed
    """Random seed of the run. The train/validation split has a separate, fixed seed."""
    what_counts: Literal["published", "answers"]
    """Supervised tokens: all but the user's turns (`published`), or the assistant's answers and their end token
    (`answers`)."""

    @property
    def mixture(self) -> list[tuple[str, DatasetOptions]]:
        """The sources with their options, in the order of the file, which is the sampling order."""
        return [next(iter(entry.items())) for entry in self.datasets]


class EpochParams(RowParams):
    """Keys that determine the rows of every epoch."""

    global_batch_size: Positive
    """Rows per optimizer step over all ranks. Gradient accumulation is derived from it, the micro-batch size and the
    number of ranks."""
    layout: Literal["padded", "packed"]
    """One sequence per row with padding (`padded`), or several isolated sequences per row (`packed`)."""
    num_train_epochs: Positive
    """Number of epochs."""
    random_offset_probability: Fraction
    """Probability that a conversation longer than `max_length` is cut to a random window; otherwise its end is
    truncated."""
    sort_by_length: Literal[False]
    """Published key; only false is supported."""
    use_custom_sampler: Literal[True]
    """Published key; only true is supported: each epoch samples per dataset."""


class FetchParams(Section):
    """Params of the stage fetch."""

    forget: list[Annotated[str, Field(pattern=RECORD_DIGEST)]]
    """Digests of records that no run reads, 32 hex digits each, quoted: `ropeway forget RECORD` adds them, `ropeway
    contains RECORD --json` prints them. Stage fetch drops these records; the ledger counts them, and the digests that
    match none."""
    max_refused_fraction: Fraction
    """Maximum fraction of a source's records that may be rejected; above it, fetch fails."""
    sources: dict[str, Source]
    """The sources of records, by name."""


class BaseParams(Section):
    """Params of the stage base."""

    base: Base
    """Kind of the base model; `model_name` identifies it."""
    expected_model: ModelShape | None
    """Shape of the base: `ropeway plan` uses it, stage base compares the model with it, `kind: scratch` creates it.
    null: the shape in the base's own config.json."""
    max_length: Length
    model_name: str
    """Folder (`base.kind: folder`) or Hub repository (`hub`) of the base; otherwise only a label."""
    new_rows: Literal["normal", "mean"]
    """Initial values of added embedding rows: N(0, 0.02) (`normal`), or the mean of the existing rows (`mean`)."""
    pad_vocab_to_multiple_of: Positive
    """The embedding's number of rows is padded to a multiple of this."""
    rng_seed: Seed
    template: Annotated[str, Field(pattern=TEMPLATE)]
    """Chat template of data, prompts and package: the published run's (`open_assistant`), the base model's own
    (`base`), or a Jinja file of the workspace (`PATH.jinja`)."""
    superhot: bool
    """Apply `superhot_config`. false: the base keeps its own RoPE scaling."""
    superhot_config: SuperhotConfig
    """RoPE scaling for training and export."""


class PrepareParams(EpochParams, FetchParams):
    """Params of the stage prepare."""

    contamination: Contamination
    duplicates: Duplicates
    split: Literal["permutation", "by_hash"]
    """Train/validation split by random permutation, or by hash of each sequence (new records do not move others)."""
    split_by: Literal["chunk", "document"]
    """Unit of the split: a chunk, or a whole document."""
    val_split: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of each source that is held out for validation."""
    validation_with_replacement: bool
    """Sample the `max_val_set` sequences with replacement, as in the published run."""


class WeightParams(EpochParams):
    """Keys that determine the trained weights."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    """Adam's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    """Adam's decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)]
    """Adam's epsilon."""
    deepspeed_config: str
    """DeepSpeed JSON file: ZeRO stage, offloading, optimizer type. It must not contain settings of the profile, such as
    batch sizes, learning rate or bf16."""
    deterministic: bool
    """Train with deterministic GPU kernels, so that the same GPUs, versions and ranks give the same bytes. On a
    CPU runs are deterministic either way."""
    dtype: Dtype
    """Data type of training."""
    fused_kernels: bool
    """Use Liger's fused kernels for RMSNorm, RoPE and the MLP (`make setup EXTRAS=gpu`). Refused on a CPU."""
    gradient_accumulation_steps: Positive
    """Published key: micro-batches per step on 8 GPUs. The run derives its own number from `global_batch_size`."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: uses less memory and more time."""
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate."""
    lora: Lora | None
    """LoRA settings; required with `peft_model: true`, otherwise null."""
    loss_normalisation: Literal["micro_batch", "token"]
    """Average over each micro-batch, as published, or over all supervised tokens of a step."""
    lr_schedule: Literal["constant", "cosine", "linear"]
    """Learning rate schedule after the linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Maximum L2 norm of the gradient; larger gradients are clipped."""
    peft_model: bool
    """Train LoRA adapters instead of all weights. The export is merged."""
    per_device_eval_batch_size: Positive
    """Rows per rank and forward pass in validation and evaluation."""
    per_device_train_batch_size: Positive
    """Rows per rank and micro-batch."""
    residual_dropout: Annotated[float, Field(ge=0, le=0)]
    """Published key; only 0 is supported. Dropout that a base's config states is off in training, which stage base
    prints, and stays in config.json."""
    resume_from: Annotated[str, Field(pattern=f"^{RUN}$")] | None
    """Checkpoint of another run to continue from: FINGERPRINT or FINGERPRINT@STEP in .checkpoints. null: train
    from the base."""
    sequence_parallel: Positive
    """Ranks that share each row (Ulysses): each has a slice of the row's tokens, and in attention a slice of the heads.
    For rows that do not fit one GPU. 1: every rank has rows of its own."""
    use_flash_attention: bool
    """Use flash attention on a GPU; needs fp16 or bf16. A CPU always uses SDPA."""
    warmup_steps: Count
    """Length of the linear warm-up, in optimizer steps. As in the published run, DeepSpeed's schedule has rate 0 at
    steps 1 and 2 and the full rate from step `warmup_steps` + 2, 4 at the earliest. 0 with `lr_schedule: constant`: the
    full rate at every step."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay."""


class TrainSettings(Section):
    """Evaluation and checkpoint intervals, tracking, stop rules. No stage depends on them: they change no result.

    A rewind does change the weights. It is recorded and does not invalidate a finished run:
    docs/decisions/0007-rewind.md.
    """

    async_save: bool
    """Write checkpoints in the background: weights and optimizer state are copied to host memory, and training goes on
    while they are written. Needs host memory for one more copy. false: training waits."""
    eval_steps: Positive
    """Interval of validation, in optimizer steps."""
    log_dir: str
    """Part of the run's name in W&B."""
    output_dir: str
    """Published key; outputs are in runs/PROFILE."""
    save_minutes: Annotated[float, Field(gt=0)] | None
    """Longest time between two checkpoints, in minutes, besides `save_steps`. null: no limit."""
    save_steps: Positive
    """Interval of checkpoints, in optimizer steps."""
    save_total_limit: Positive
    """Number of checkpoints kept per run."""
    stop: StopRules


class TrainParams(WeightParams, TrainSettings):
    """Params of the stage train."""


class EvaluateParams(RowParams):
    """Params of the stage evaluate."""

    evaluation: Evaluation
    per_device_eval_batch_size: Positive
    """Rows per rank and forward pass in validation and evaluation."""


class PackageParams(PrepareParams, WeightParams, EvaluateParams, BaseParams):
    """Params of the stage package: all keys that determine the model, its card and its files."""

    card: Card
    history: Literal["refuse", "per_turn"]
    """Conversations whose earlier turns the template renders differently once later ones follow, e.g. without their
    reasoning: reject them (`refuse`), or train each answer as a sequence of its own (`per_turn`)."""
    package: Packaging
    personal_data: PersonalData
    special_tokens_in_text: Literal["parse", "escape", "reject"]
    """A special token's string inside a text becomes the token (`parse`), stays plain text (`escape`), or causes
    the record to be rejected (`reject`)."""


class Profile(PackageParams, TrainParams):
    """All params of one run. The same profile and data give the same shards and optimizer steps."""

    gate: Gate

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        scale = self.superhot_config.scale if self.superhot else 1
        shape = self.expected_model
        if shape is None and isinstance(self.base, ScratchBase):
            raise ValueError("expected_model is null, but base.kind scratch creates a model of its shape; state it")
        reach = shape.max_position_embeddings * scale if shape else math.inf
        # Without superhot or shape stage base checks max_length against the base's own config.
        if shape and self.max_length > reach and (self.superhot or isinstance(self.base, ScratchBase)):
            raise ValueError(
                f"max_length is {self.max_length} tokens, but expected_model.max_position_embeddings "
                f"{shape.max_position_embeddings} x superhot_config.scale {scale:g} allows only "
                f"{reach:g} tokens; increase the scale or reduce max_length"
            )
        if self.layout == "packed" and self.document_end == "published":
            raise ValueError(
                "layout: packed does not support document_end: published, because the token after a document belongs "
                "to the next sequence; set document_end to masked or eos"
            )
        if self.template != PUBLISHED_TEMPLATE and self.what_counts == "published":
            raise ValueError(
                f"what_counts: published belongs to template: open_assistant; with template: {self.template} set "
                "what_counts: answers (each answer and its end token, and nothing else)"
            )
        if self.template == "base" and isinstance(self.base, ScratchBase):
            raise ValueError("template: base, but base.kind scratch has none; set open_assistant or a Jinja file")
        if self.peft_model and self.lora is None:
            raise ValueError(
                "peft_model is true, but lora is null; set lora to a mapping with rank, alpha, dropout, "
                "target_modules and train_embeddings"
            )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        if many := [entry for entry in self.datasets if len(entry) != 1]:
            raise ValueError(f"datasets: expected one source per entry, found {list(many[0])}")
        names = [name for name, _ in self.mixture]
        if odd := [name for name in self.sources if not SOURCE_NAME.fullmatch(name)]:
            raise ValueError(
                f"sources: {odd[0]!r} cannot be a source's name, which is also that of a folder; expected 1 to 80 "
                "characters without / and \\ and control characters, not beginning with a dot"
            )
        if lost := sorted(set(names) ^ set(self.sources)):
            raise ValueError(f"datasets and sources must have the same names; only one of them has {', '.join(lost)}")
        if unknown := sorted(set(self.card.dataset_licenses) - set(self.sources)):
            raise ValueError(f"card.dataset_licenses: {unknown[0]} is not a source; sources: {', '.join(self.sources)}")
        if len(set(names)) != len(names):
            raise ValueError(f"datasets: expected each source once, found {', '.join(names)}")
        return self

    def reading(self, names: Iterable[str]) -> Self:
        """Return this profile with only these keys; access to another key raises AttributeError."""
        return self.model_construct(**{name: getattr(self, name) for name in names})
