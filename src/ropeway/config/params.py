"""params.yaml: what it may hold, as frozen, strict, closed models without defaults. `load_params` reads it.

A run pinned by a file must not change its meaning when this module does. The few keys that the card itself leaves out
of a data set's options are the exception, and `None` there means "not stated".
"""

import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(ge=1)]
Dtype = Literal["fp16", "bf16", "fp32"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Length = Annotated[int, Field(gt=1)]  # of a row, in tokens
RUN = r"[0-9a-f]{16}(@[0-9]+)?"  # a training run's fingerprint, and which of its checkpoints
# Also a model's name in the registry, part of paths and of S3 keys.
PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")


class Section(BaseModel):
    """A closed part of params.yaml: no late writes, no silent casts, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class RowsSource(Section):
    """Files of rows: of which form they are, and which of their columns are read.

    `ignored_keys` are fields, of records or of their turns, that may carry something and are left out all the same,
    `*` any; a record with another one is refused. `splits` are those that one pattern may read together.
    """

    rows: Literal["orca_chat", "messages", "sharegpt", "alpaca", "text"]
    """Layout of a record; the reference of sources has the columns that each layout reads."""
    columns: dict[str, str]
    """Name that the layout uses -> column of the file. A column that is not mapped has the layout's own name; `system`
    is read only if it is mapped (`orca_chat`: `instruction`)."""
    expected_rows: Positive | None
    """Sequences this source is expected to give: `ropeway plan` uses it before the data exists, prepare reports a
    difference. null: not known."""
    ignored_keys: list[str] = Field(default_factory=list)
    """Fields of a record or a turn that are dropped although they carry a value; `*` matches all. Any other unused
    field refuses the record."""
    splits: list[Literal["train", "validation", "test"]] = Field(default_factory=list)
    """Splits that one pattern may read together. Empty: a pattern over several splits is an error."""


class HuggingfaceSource(RowsSource):
    """Files of one data set repository at one revision."""

    kind: Literal["huggingface"]
    repo: str
    """Dataset repository on the Hub, `owner/name`."""
    revision: str
    """Branch, tag or commit. A branch is resolved to a commit before the run and recorded."""
    files: list[str]
    """Paths or globs inside the repository."""


class FilesSource(RowsSource):
    """json, jsonl or parquet files, also compressed."""

    kind: Literal["files"]
    paths: list[str]
    """Paths or globs, relative to the workspace or absolute; also `https://` and `s3://` addresses."""


class PythonDocsSource(Section):
    """The documentation that comes with the running Python: `topics` are documents, `docstrings` conversations."""

    kind: Literal["python_docs"]
    part: Literal["topics", "docstrings"]
    """`topics` are documents, `docstrings` are conversations."""
    expected_rows: Positive | None
    """As for files; null: it depends on the Python version."""


Source = Annotated[HuggingfaceSource | FilesSource | PythonDocsSource, Field(discriminator="kind")]


class FolderBase(Section):
    """`model_name` is a folder that transformers opens."""

    kind: Literal["folder"]


class HubBase(Section):
    """`model_name` is a repository on the Hub, at this revision."""

    kind: Literal["hub"]
    revision: str
    """Branch, tag or commit. A branch is resolved to a commit before the run and recorded."""


class ScratchBase(Section):
    """Weights from the seed, in the shape of `expected_model`; the tokenizer is trained on the sources."""

    kind: Literal["scratch"]


class GgufBase(Section):
    """A GGUF file that an installed Python package carries, opened de-quantised."""

    kind: Literal["gguf"]
    package: str
    """Installed Python package that contains the file."""
    file: str
    """Name of the GGUF file in the package."""


Base = Annotated[FolderBase | HubBase | ScratchBase | GgufBase, Field(discriminator="kind")]


class Duplicates(Section):
    """Records that say what an earlier one said. What is removed is in neither train nor validation."""

    exact: Literal["count", "remove"]
    """Equal records, within and across sources: count them, or remove all but the first."""
    near: Literal["off", "count", "remove"]
    """Records at or above `threshold`. `remove` needs `exact: remove`."""
    threshold: Annotated[float, Field(gt=0, le=1)]
    """Jaccard similarity of the two sets of word n-grams, estimated with MinHash."""
    permutations: Annotated[int, Field(gt=0, le=1024)]
    """Length of the MinHash signature; 4 bytes each per record on disk."""
    ngram: Positive
    """Words per n-gram."""

    @model_validator(mode="after")
    def _near_is_removed_with_exact(self) -> Self:
        if self.near == "remove" and self.exact == "count":
            raise ValueError(
                "near is remove and exact count: copies would stay and what is only like them go; set exact to remove"
            )
        return self


class Contamination(Section):
    """Training sequences that share a run of `ngram` words with a validation sequence, or with a prompt in a file."""

    ngram: Positive
    """Length of the shared run in words. Source of 13: Brown et al. 2020, arXiv:2005.14165, appendix C."""
    action: Literal["off", "count", "remove"]
    """What happens to a training sequence that is hit."""
    prompts: list[str]
    """JSON Lines files of evaluation prompts to compare with, besides the validation split."""


class StretchScaling(Section):
    """RoPE scaling in the published spelling; `ropeway.models.rope` turns it into the one object used everywhere."""

    type: Literal["linear", "dynamic"]
    """Position interpolation (`linear`) or NTK-aware scaling that grows with the sequence (`dynamic`)."""
    scale: Scale
    """Factor by which the context is extended."""


class YarnScaling(Section):
    """YaRN. Source: Peng et al. 2023, arXiv:2309.00071: beta_fast 32 and beta_slow 1 for Llama."""

    type: Literal["yarn"]
    scale: Scale
    """Factor by which the context is extended."""
    beta_fast: Annotated[float, Field(gt=0)]
    """Rotations above which a dimension is not scaled."""
    beta_slow: Annotated[float, Field(gt=0)]
    """Rotations below which a dimension is scaled fully."""


class Llama3Scaling(Section):
    """Llama 3.1's scaling. Source: its config.json: low_freq_factor 1, high_freq_factor 4."""

    type: Literal["llama3"]
    scale: Scale
    """Factor by which the context is extended."""
    low_freq_factor: Annotated[float, Field(gt=0)]
    """Wavelengths longer than the old context divided by this are scaled fully."""
    high_freq_factor: Annotated[float, Field(gt=0)]
    """Wavelengths shorter than the old context divided by this are not scaled."""

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor {self.high_freq_factor:g}"
            )
        return self


SuperhotConfig = Annotated[StretchScaling | YarnScaling | Llama3Scaling, Field(discriminator="type")]


class DatasetOptions(Section):
    """How one source enters the mixture. Source: the keys of the card's `datasets`."""

    max_val_set: Positive | None = None
    """At most this many sequences of the validation split are evaluated. null: all."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the training split that an epoch draws. null: all. Excludes `size`."""
    size: Positive | None = None
    """Number of training sequences that an epoch draws. Excludes `fraction`."""
    max_chunk_size: Positive | None = None
    """Documents are cut into chunks of at most this many characters. null: not cut."""

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError("fraction and size are two ways to say one thing; keep one")
        return self


class ModelShape(Section):
    """The base model's shape: enough to plan memory without opening it, and checked when it is opened."""

    hidden_size: Positive
    """Width of the residual stream."""
    intermediate_size: Positive
    """Width of the MLP."""
    num_hidden_layers: Positive
    """Number of transformer layers."""
    num_attention_heads: Positive
    """Number of query heads."""
    num_key_value_heads: Positive
    """Number of key and value heads."""
    vocab_size: Positive
    """As in the base's config.json. `kind: scratch`: size of the tokenizer that is trained on the sources."""
    max_position_embeddings: Positive
    """Context length of the base, in tokens."""
    rope_theta: Annotated[float, Field(gt=0)]
    """Base of the RoPE frequencies."""
    rms_norm_eps: Annotated[float, Field(gt=0)]
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool
    """Whether input embedding and output head share weights."""


class Lora(Section):
    """What `peft_model: true` trains. Source: Hu et al. 2021, arXiv:2106.09685.

    `train_embeddings` also trains embedding and head, which the new role tokens need unless they are frozen noise.
    """

    rank: Positive
    """Rank of the update."""
    alpha: Positive
    """Scale of the update is alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """On the adapter's input, while training."""
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers that get an adapter, e.g. q_proj."""
    train_embeddings: bool
    """Also train embedding and head. The new role tokens need it: otherwise they stay at their initial values."""


class StopRules(Section):
    """When training stops by itself, or rewinds and leaves rows out.

    No stage depends on it: a run that no rule stops is the same under all of them, and what was left out is recorded.
    """

    max_skipped_in_row: Positive
    """Training stops after this many consecutive steps that fp16 overflow skipped."""
    spike_window_steps: Positive
    """Number of recent non-spike losses that the median is taken over."""
    spike_ratio: Annotated[float, Field(gt=1)]
    """A loss above this many times that median is a spike."""
    max_spikes_in_row: Positive
    """Training stops after this many consecutive spikes."""
    rewinds: Annotated[int, Field(ge=0)]
    """Instead of stopping, rewind to the last good checkpoint this many times and leave out the rows of the steps at
    fault."""
    hang_seconds: Annotated[float, Field(gt=0)] | None
    """Timeout of one micro-batch, in seconds. null: 20 times the usual duration, at least 600."""


class Positions(Section):
    """Loss by position: `rows` rows of `row_tokens` tokens, longer than max_length, in buckets of `bucket_tokens`."""

    rows: Positive
    """Number of long rows."""
    row_tokens: Annotated[int, Field(gt=1)]
    """Tokens per row, usually longer than `max_length`."""
    bucket_tokens: Positive
    """Tokens per bucket of the table."""


class Passkey(Section):
    """Passkey retrieval at every length (tokens) x depth (0 in front, 1 behind), `repeats` keys each."""

    lengths: Annotated[list[Positive], Field(min_length=1)]
    """Lengths of the text, in tokens."""
    depths: Annotated[list[Fraction], Field(min_length=1)]
    """Position of the key in the text: 0 is the start, 1 the end."""
    repeats: Positive
    """Number of keys per length and depth."""


class Evaluation(Section):
    """What evaluate does beside losses; `sampling` names a file of generation configurations, `tasks` the harness's."""

    prompts: str
    """JSON Lines file of prompts for the sample answers."""
    sampling: str
    """JSON file of named generation configurations."""
    max_new_tokens: Positive
    """Limit of one sample answer."""
    positions: Positions
    passkey: Passkey
    tasks: list[str]
    """Tasks, groups or tags of lm-evaluation-harness (extra `eval`), or your own in configs/tasks. Empty: none are
    run."""


class Gate(Section):
    """When a new version may become `candidate`."""

    max_loss_increase_nats: Annotated[float, Field(ge=0)]
    """Allowed increase of validation loss per source over the champion, in nats/token."""
    min_gain_over_base_nats: float
    """Required decrease of the mean validation loss compared with the base, in nats/token."""


class Packaging(Section):
    """How the package's weights are stored."""

    dtype: Dtype
    """Data type of the published weights."""
    max_shard_bytes: Positive
    """Upper limit of one safetensors file."""


class Card(Section):
    """What no run can know of itself."""

    license: str
    """SPDX identifier or the Hub's name of the license."""
    license_name: str
    """As the card shows it."""
    license_link: str
    """URL of the license text."""
    base_model: str | None
    """Name of the base on the Hub. null: none."""
    upstream_datasets: list[str]
    """Datasets that the sources derive from."""
    developers: list[str]
    """Names on the card."""
    sponsored_by: str | None
    """Sponsor named on the card. null: none."""
    thanks: str | None
    """Acknowledgement on the card. null: none."""


class RowParams(Section):
    """What a stage reads that makes rows of sequences, and masks what is not learned in them.

    The classes from here to `Profile` are the keys that stages read: a stage gets a profile as its class, so that mypy
    refuses any other key.
    """

    datasets: Annotated[list[dict[str, DatasetOptions]], Field(min_length=1)]
    """The mixture: one entry per source, in the order the sampler draws in; the names are those of `sources`."""
    document_end: Literal["masked", "eos", "published"]
    """Loss on a document's last token: none (`masked`), at true ends of documents only (`eos`), or as the published
    run did (`published`)."""
    label_masking: bool
    """Leave tokens that `what_counts` does not name out of the loss. false: every token counts."""
    max_length: Length
    """Length of a training row in tokens."""
    rng_seed: Seed
    """Seed of the run. The train/validation split has a fixed seed of its own."""
    what_counts: Literal["published", "answers"]
    """Tokens in the loss: all but the user's turns (`published`), or the assistant's answers and their end token
    (`answers`)."""

    @property
    def mixture(self) -> list[tuple[str, DatasetOptions]]:
        """The sources with their options, in the order of the file (the order the sampler draws in)."""
        return [next(iter(entry.items())) for entry in self.datasets]


class EpochParams(RowParams):
    """What decides the rows of every epoch."""

    global_batch_size: Positive
    """Rows per optimizer step over all ranks. The accumulation follows from it, the micro-batch size and the number of
    ranks."""
    layout: Literal["padded", "packed"]
    """One sequence per row with padding, or several isolated sequences per row."""
    num_train_epochs: Positive
    """Passes over the mixture."""
    random_offset_probability: Fraction
    """Probability that a conversation longer than `max_length` is windowed; otherwise it is cut at the end."""
    sort_by_length: Literal[False]
    """Published key; only false is supported."""
    use_custom_sampler: Literal[True]
    """Published key; only true is supported: each epoch samples per dataset."""


class FetchParams(Section):
    """What fetch reads."""

    max_refused_fraction: Fraction
    """Share of a source's records that may be refused before the stage fails."""
    sources: dict[str, Source]
    """Name -> where its records come from."""


class BaseParams(Section):
    """What base reads."""

    base: Base
    """Kind of the base model; `model_name` says which."""
    expected_model: ModelShape
    """Shape of the base: the planner computes with it, stage base checks the model against it, `kind: scratch` creates
    it."""
    max_length: Length
    model_name: str
    """Folder or Hub repository of the base, by `base.kind`; otherwise only a label."""
    new_rows: Literal["normal", "mean"]
    """Initial values of added embedding rows: N(0, 0.02), or the mean of the old rows."""
    pad_vocab_to_multiple_of: Positive
    """The vocabulary is padded to a multiple of this."""
    rng_seed: Seed
    superhot: bool
    """Apply `superhot_config`. false: the base's own RoPE scaling is kept."""
    superhot_config: SuperhotConfig
    """RoPE scaling to train with and to export."""


class PrepareParams(EpochParams, FetchParams):
    """What prepare reads."""

    contamination: Contamination
    duplicates: Duplicates
    split: Literal["permutation", "by_hash"]
    """Random permutation, or by hash of each sequence, where a new record does not move old ones."""
    split_by: Literal["chunk", "document"]
    """Unit of the split: a chunk, or a whole document."""
    val_split: Annotated[float, Field(ge=0, lt=1)]
    """Share of each source that is set aside for validation."""
    validation_with_replacement: bool
    """Draw the `max_val_set` sequences with replacement, as the published run did."""


class WeightParams(EpochParams):
    """What decides trained weights."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    """Adam's decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    """Adam's decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)]
    """Adam's epsilon."""
    deepspeed_config: str
    """DeepSpeed JSON file: ZeRO stage, offloading, optimizer type. It must not state what the profile states, such as
    batch sizes, learning rate or bf16."""
    dtype: Dtype
    """Data type of training."""
    gradient_accumulation_steps: Positive
    """Published key: the accumulation on 8 GPUs. The run derives its own from `global_batch_size`."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, more time."""
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate."""
    lora: Lora | None
    """LoRA settings; required with `peft_model: true`, otherwise null."""
    loss_normalisation: Literal["micro_batch", "token"]
    """Average over each micro-batch, as published, or over all supervised tokens of a step."""
    lr_schedule: Literal["constant", "cosine", "linear"]
    """After linear warm-up."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are clipped to this L2 norm."""
    peft_model: bool
    """Train LoRA adapters instead of all weights. The export is merged."""
    per_device_eval_batch_size: Positive
    """Rows per rank and forward pass in validation and evaluation."""
    per_device_train_batch_size: Positive
    """Rows per rank and micro-batch."""
    residual_dropout: Annotated[float, Field(ge=0, le=0)]
    """Published key; only 0 is supported."""
    resume_from: Annotated[str, Field(pattern=f"^{RUN}$")] | None
    """Checkpoint of another run to continue from: FINGERPRINT or FINGERPRINT@STEP in .checkpoints. null: start from
    the base."""
    use_flash_attention: bool
    """Use flash attention on a GPU; needs fp16 or bf16. A CPU always uses SDPA."""
    warmup_steps: Count
    """Optimizer steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay."""


class TrainSettings(Section):
    """Cadence, tracking and when to give up: they change neither a weight nor a metric, so no stage depends on them.

    (What a rewind left out does; it is recorded, and no reason to make a finished run again: docs/decisions/0007.)
    """

    eval_steps: Positive
    """Validation loss is computed every this many steps."""
    log_dir: str
    """Part of the run's name in W&B."""
    output_dir: str
    """Published key; outputs are in runs/PROFILE."""
    save_steps: Positive
    """A checkpoint is written every this many steps."""
    save_total_limit: Positive
    """Number of checkpoints of a run that are kept."""
    stop: StopRules


class TrainParams(WeightParams, TrainSettings):
    """What train reads."""


class EvaluateParams(RowParams):
    """What evaluate reads."""

    evaluation: Evaluation
    per_device_eval_batch_size: Positive
    """Rows per rank and forward pass in validation and evaluation."""


class PackageParams(PrepareParams, WeightParams, EvaluateParams, BaseParams):
    """What package reads: whatever determines the model, and how it is presented."""

    card: Card
    package: Packaging
    special_tokens_in_text: Literal["parse", "escape", "reject"]
    """A special token's string inside a text becomes the token (`parse`), stays plain text (`escape`), or refuses the
    record (`reject`)."""


class Profile(PackageParams, TrainParams):
    """One run. Equal profiles on equal data give equal shards and equal optimizer steps."""

    gate: Gate

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        scale = self.superhot_config.scale if self.superhot else 1
        reach = self.expected_model.max_position_embeddings * scale
        # Without superhot a base's own scaling is kept, and how far that reaches is known when the base is opened.
        if self.max_length > reach and (self.superhot or isinstance(self.base, ScratchBase)):
            raise ValueError(
                f"max_length is {self.max_length} tokens, but expected_model.max_position_embeddings "
                f"{self.expected_model.max_position_embeddings} x superhot_config.scale {scale:g} reaches only "
                f"{reach:g}; raise the scale or shorten max_length"
            )
        if self.layout == "packed" and self.document_end == "published":
            raise ValueError(
                "layout is packed and document_end published: the token after a document is the next sequence's; set "
                "document_end to masked or eos"
            )
        if self.peft_model and self.lora is None:
            raise ValueError("peft_model is true, but lora says null; give rank, alpha, dropout, target_modules, …")
        if many := [entry for entry in self.datasets if len(entry) != 1]:
            raise ValueError(f"datasets: every entry holds one name; found {list(many[0])}")
        names = [name for name, _ in self.mixture]
        if lost := sorted(set(names) ^ set(self.sources)):
            raise ValueError(f"datasets and sources must name the same; only one of them has {', '.join(lost)}")
        if len(set(names)) != len(names):
            raise ValueError(f"datasets names one source twice: {', '.join(names)}")
        return self

    def reading(self, names: Iterable[str]) -> Self:
        """Return this profile with only these keys: touching another one is an AttributeError."""
        return self.model_construct(**{name: getattr(self, name) for name in names})
