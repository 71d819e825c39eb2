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
    columns: dict[str, str]
    expected_rows: Positive | None
    ignored_keys: list[str] = Field(default_factory=list)
    splits: list[Literal["train", "validation", "test"]] = Field(default_factory=list)


class HuggingfaceSource(RowsSource):
    """Files of one data set repository at one revision."""

    kind: Literal["huggingface"]
    repo: str
    revision: str
    files: list[str]


class FilesSource(RowsSource):
    """json, jsonl or parquet files, also compressed."""

    kind: Literal["files"]
    paths: list[str]


class PythonDocsSource(Section):
    """The documentation that comes with the running Python: `topics` are documents, `docstrings` conversations."""

    kind: Literal["python_docs"]
    part: Literal["topics", "docstrings"]
    expected_rows: Positive | None


Source = Annotated[HuggingfaceSource | FilesSource | PythonDocsSource, Field(discriminator="kind")]


class FolderBase(Section):
    """`model_name` is a folder that transformers opens."""

    kind: Literal["folder"]


class HubBase(Section):
    """`model_name` is a repository on the Hub, at this revision."""

    kind: Literal["hub"]
    revision: str


class ScratchBase(Section):
    """Weights from the seed, in the shape of `expected_model`; the tokenizer is trained on the sources."""

    kind: Literal["scratch"]


class GgufBase(Section):
    """A GGUF file that an installed Python package carries, opened de-quantised."""

    kind: Literal["gguf"]
    package: str
    file: str


Base = Annotated[FolderBase | HubBase | ScratchBase | GgufBase, Field(discriminator="kind")]


class Duplicates(Section):
    """Records that say what an earlier one said. What is removed is in neither train nor validation."""

    exact: Literal["count", "remove"]
    near: Literal["off", "count", "remove"]
    threshold: Annotated[float, Field(gt=0, le=1)]  # Jaccard similarity of two sets of n-grams of words
    permutations: Annotated[int, Field(gt=0, le=1024)]  # of the MinHash signature, 4 bytes each a record
    ngram: Positive

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
    action: Literal["off", "count", "remove"]
    prompts: list[str]


class StretchScaling(Section):
    """RoPE scaling in the published spelling; `ropeway.models.rope` turns it into the one object used everywhere."""

    type: Literal["linear", "dynamic"]
    scale: Scale


class YarnScaling(Section):
    """YaRN. Source: Peng et al. 2023, arXiv:2309.00071: beta_fast 32 and beta_slow 1 for Llama."""

    type: Literal["yarn"]
    scale: Scale
    beta_fast: Annotated[float, Field(gt=0)]
    beta_slow: Annotated[float, Field(gt=0)]


class Llama3Scaling(Section):
    """Llama 3.1's scaling. Source: its config.json: low_freq_factor 1, high_freq_factor 4."""

    type: Literal["llama3"]
    scale: Scale
    low_freq_factor: Annotated[float, Field(gt=0)]
    high_freq_factor: Annotated[float, Field(gt=0)]

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
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    size: Positive | None = None
    max_chunk_size: Positive | None = None

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError("fraction and size are two ways to say one thing; keep one")
        return self


class ModelShape(Section):
    """The base model's shape: enough to plan memory without opening it, and checked when it is opened."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    max_position_embeddings: Positive
    rope_theta: Annotated[float, Field(gt=0)]
    rms_norm_eps: Annotated[float, Field(gt=0)]
    tie_word_embeddings: bool


class Lora(Section):
    """What `peft_model: true` trains. Source: Hu et al. 2021, arXiv:2106.09685.

    `train_embeddings` also trains embedding and head, which the new role tokens need unless they are frozen noise.
    """

    rank: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    train_embeddings: bool


class StopRules(Section):
    """When training ends itself, the last good checkpoint named, or goes back and leaves rows out.

    No stage depends on it: a run that no rule ends is the same under all of them, and what was left out is recorded.

    Attributes:
        spike_ratio: A loss is a spike above this many times the median of the last `spike_window_steps` calm ones.
        rewinds: How often a run goes back to its last good checkpoint instead, and passes over the steps whose loss
            or gradient was not finite, or which spiked.
        hang_seconds: A micro-batch that takes longer hangs; null: 20 times the usual one, at least 10 minutes.
    """

    max_skipped_in_row: Positive  # steps skipped for overflow, one after another
    spike_window_steps: Positive
    spike_ratio: Annotated[float, Field(gt=1)]
    max_spikes_in_row: Positive  # one spike passes by itself; so many in a row are a divergence
    rewinds: Annotated[int, Field(ge=0)]
    hang_seconds: Annotated[float, Field(gt=0)] | None


class Positions(Section):
    """Loss by position: `rows` rows of `row_tokens` tokens, longer than max_length, in buckets of `bucket_tokens`."""

    rows: Positive
    row_tokens: Annotated[int, Field(gt=1)]
    bucket_tokens: Positive


class Passkey(Section):
    """Passkey retrieval at every length (tokens) x depth (0 in front, 1 behind), `repeats` keys each."""

    lengths: Annotated[list[Positive], Field(min_length=1)]
    depths: Annotated[list[Fraction], Field(min_length=1)]
    repeats: Positive


class Evaluation(Section):
    """What evaluate does beside losses; `sampling` names a file of generation configurations, `tasks` the harness's."""

    prompts: str
    sampling: str
    max_new_tokens: Positive
    positions: Positions
    passkey: Passkey
    tasks: list[str]


class Gate(Section):
    """When a new version may become `candidate`."""

    max_loss_increase_nats: Annotated[float, Field(ge=0)]
    min_gain_over_base_nats: float


class Packaging(Section):
    """How the package's weights are stored."""

    dtype: Dtype
    max_shard_bytes: Positive


class Card(Section):
    """What no run can know of itself."""

    license: str
    license_name: str
    license_link: str
    base_model: str | None
    upstream_datasets: list[str]
    developers: list[str]
    sponsored_by: str | None
    thanks: str | None


class RowParams(Section):
    """What a stage reads that makes rows of sequences, and masks what is not learned in them.

    The classes from here to `Profile` are the keys that stages read: a stage gets a profile as its class, so that mypy
    refuses any other key.
    """

    datasets: Annotated[list[dict[str, DatasetOptions]], Field(min_length=1)]
    document_end: Literal["masked", "eos", "published"]
    label_masking: bool
    max_length: Length
    rng_seed: Seed
    what_counts: Literal["published", "answers"]

    @property
    def mixture(self) -> list[tuple[str, DatasetOptions]]:
        """The sources with their options, in the order of the file (the order the sampler draws in)."""
        return [next(iter(entry.items())) for entry in self.datasets]


class EpochParams(RowParams):
    """What decides the rows of every epoch."""

    global_batch_size: Positive
    layout: Literal["padded", "packed"]
    num_train_epochs: Positive
    random_offset_probability: Fraction
    sort_by_length: Literal[False]
    use_custom_sampler: Literal[True]


class FetchParams(Section):
    """What fetch reads."""

    max_refused_fraction: Fraction
    sources: dict[str, Source]


class BaseParams(Section):
    """What base reads."""

    base: Base
    expected_model: ModelShape
    max_length: Length
    model_name: str
    new_rows: Literal["normal", "mean"]
    pad_vocab_to_multiple_of: Positive
    rng_seed: Seed
    superhot: bool
    superhot_config: SuperhotConfig


class PrepareParams(EpochParams, FetchParams):
    """What prepare reads."""

    contamination: Contamination
    duplicates: Duplicates
    split: Literal["permutation", "by_hash"]
    split_by: Literal["chunk", "document"]
    val_split: Annotated[float, Field(ge=0, lt=1)]
    validation_with_replacement: bool


class WeightParams(EpochParams):
    """What decides trained weights."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    adam_epsilon: Annotated[float, Field(gt=0)]
    deepspeed_config: str
    dtype: Dtype
    gradient_accumulation_steps: Positive
    gradient_checkpointing: bool
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lora: Lora | None
    loss_normalisation: Literal["micro_batch", "token"]
    lr_schedule: Literal["constant", "cosine", "linear"]
    max_grad_norm: Annotated[float, Field(gt=0)]
    peft_model: bool
    per_device_eval_batch_size: Positive
    per_device_train_batch_size: Positive
    residual_dropout: Annotated[float, Field(ge=0, le=0)]
    resume_from: Annotated[str, Field(pattern=f"^{RUN}$")] | None
    use_flash_attention: bool
    warmup_steps: Count
    weight_decay: Annotated[float, Field(ge=0)]


class TrainSettings(Section):
    """Cadence, tracking and when to give up: they change neither a weight nor a metric, so no stage depends on them.

    (What a rewind left out does; it is recorded, and no reason to make a finished run again: docs/decisions/0007.)
    """

    eval_steps: Positive
    log_dir: str
    output_dir: str
    save_steps: Positive
    save_total_limit: Positive
    stop: StopRules


class TrainParams(WeightParams, TrainSettings):
    """What train reads."""


class EvaluateParams(RowParams):
    """What evaluate reads."""

    evaluation: Evaluation
    per_device_eval_batch_size: Positive


class PackageParams(PrepareParams, WeightParams, EvaluateParams, BaseParams):
    """What package reads: whatever determines the model, and how it is presented."""

    card: Card
    package: Packaging
    special_tokens_in_text: Literal["parse", "escape", "reject"]


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
