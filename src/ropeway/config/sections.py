"""Schema of the values inside the keys of a profile: frozen, strict sections of params.yaml that reject unknown keys.

`ropeway.config.params` has the keys themselves. Keys have no defaults: a pinned run must not change when this module
changes. The exceptions are the dataset options that the published card omits (None: not stated) and two lists of a
source that are empty by default.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Scale = Annotated[float, Field(ge=1)]
Dtype = Literal["fp16", "bf16", "fp32"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Length = Annotated[int, Field(gt=1)]  # of a row, in tokens
RUN = r"[0-9a-f]{16}(@[0-9]+)?"  # fingerprint of a training run, optionally with @STEP of a checkpoint
RECORD_DIGEST = r"^[0-9a-f]{32}$"  # of a record's text: `ropeway.data.record_identity`
PUBLISHED_TEMPLATE = "open_assistant"
TEMPLATE = rf"^({PUBLISHED_TEMPLATE}|base|.+\.jinja)$"
# Also the model's name in the registry, and part of paths and S3 keys.
SOURCE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f]{1,80}")
PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")


class Section(BaseModel):
    """A section of params.yaml: read-only, without type coercion or unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class RowsSource(Section):
    """Files of records: their layout and the columns that are read."""

    rows: Literal["orca_chat", "messages", "sharegpt", "prompt_completion", "alpaca", "text"]
    """Layout of a record; the reference of sources has the columns that each layout reads."""
    columns: dict[str, str]
    """Name that the layout uses -> column of the file. A column that is not mapped has the layout's own name; `system`
    is read only if it is mapped (`orca_chat`: `instruction`)."""
    expected_rows: Positive | None
    """Expected number of sequences: `ropeway plan` uses it before the data exists; prepare reports a difference. null:
    unknown."""
    ignored_keys: list[str] = Field(default_factory=list)
    """Fields of a record or turn that are dropped even if they have a value; `*` matches all that the layout does not
    read. A record with any other unused field is rejected. A field that the layout reads, e.g. `tool_calls`, is dropped
    only if it is named."""
    splits: list[Literal["train", "validation", "test"]] = Field(default_factory=list)
    """Splits that one pattern may read together. Empty: a pattern over several splits is an error."""


class HuggingfaceSource(RowsSource):
    """Files of one dataset repository at one revision."""

    kind: Literal["huggingface"]
    repo: str
    """Dataset repository on the Hub, `owner/name`."""
    revision: str
    """Branch, tag or commit. A branch is resolved to a commit before the run and recorded."""
    files: list[str]
    """Paths or globs inside the repository, also of members of an archive or of a folder that `datasets` saved."""


class FilesSource(RowsSource):
    """Files of records or documents, archives of them, and folders that `datasets` saved."""

    kind: Literal["files"]
    paths: list[str]
    """Paths or globs, relative to the workspace or absolute, also of members of an archive (`a.zip/train/*.jsonl`); or
    `https://` and `s3://` addresses."""


class PythonDocsSource(Section):
    """Documentation of the installed Python."""

    kind: Literal["python_docs"]
    part: Literal["topics", "docstrings"]
    """`topics` are documents, `docstrings` are conversations."""
    expected_rows: Positive | None
    """Expected number of sequences, as for files. null: unknown; it depends on the Python version."""


Source = Annotated[HuggingfaceSource | FilesSource | PythonDocsSource, Field(discriminator="kind")]


class FolderBase(Section):
    """`model_name` is a folder that transformers can load."""

    kind: Literal["folder"]


class HubBase(Section):
    """`model_name` is a repository on the Hub, at this revision."""

    kind: Literal["hub"]
    revision: str
    """Branch, tag or commit. A branch is resolved to a commit before the run and recorded."""


class ScratchBase(Section):
    """Random initial weights with the shape of `expected_model`; the tokenizer is trained on the sources."""

    kind: Literal["scratch"]


class GgufBase(Section):
    """A GGUF file of an installed Python package, dequantized on load."""

    kind: Literal["gguf"]
    package: str
    """Installed Python package that contains the file."""
    file: str
    """Name of the GGUF file in the package."""


Base = Annotated[FolderBase | HubBase | ScratchBase | GgufBase, Field(discriminator="kind")]


class Duplicates(Section):
    """Deduplication of records. Removed records are in neither the training nor the validation split."""

    exact: Literal["count", "remove"]
    """Identical records, within and across sources: count them, or remove all but the first."""
    near: Literal["off", "count", "remove"]
    """Records with a similarity of at least `threshold`. `remove` requires `exact: remove`."""
    threshold: Annotated[float, Field(gt=0, le=1)]
    """Jaccard similarity of the two sets of word n-grams, estimated with MinHash."""
    permutations: Annotated[int, Field(gt=0, le=1024)]
    """Length of the MinHash signature; 4 bytes each per record on disk."""
    ngram: Positive
    """Words per n-gram."""

    @model_validator(mode="after")
    def _near_is_removed_with_exact(self) -> Self:
        if self.near == "remove" and self.exact == "count":
            raise ValueError("near: remove requires exact: remove, found exact: count; set exact to remove")
        return self


class Contamination(Section):
    """Training sequences that share `ngram` consecutive words with a validation sequence or an evaluation prompt."""

    ngram: Positive
    """Shared consecutive words. Source of 13: Brown et al. 2020, arXiv:2005.14165, appendix C."""
    action: Literal["off", "count", "remove"]
    """Whether contaminated training sequences are counted or removed; `off`: no check."""
    prompts: list[str]
    """JSON Lines files of evaluation prompts to compare with, besides the validation split."""


PersonalKind = Literal["email", "phone", "credit_card", "iban", "ip_address", "private_key", "token"]


class PersonalData(Section):
    """Personal data and secrets in texts, found by form and checksum. Names and postal addresses are not found."""

    action: Literal["off", "count", "mask", "refuse"]
    """`off`: not looked for, and the ledger says so. `count`: counted by kind. `mask`: also replaced, before
    tokenizing, by a placeholder such as `[EMAIL]`. `refuse`: a record with any is rejected; more than
    `max_refused_fraction` of them stop the run."""
    kinds: list[PersonalKind]
    """Kinds to look for: addresses of mail, telephone numbers in international form, credit cards (Luhn), IBANs
    (check digits), public IPv4 addresses, private keys (PEM, PGP), tokens of services (AWS, GitHub, Slack, JWT)."""


class StretchScaling(Section):
    """RoPE scaling with the published keys; `ropeway.models.rope` converts it to `RopeScaling`."""

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
    """Dimensions with more rotations than this over the original context are not scaled."""
    beta_slow: Annotated[float, Field(gt=0)]
    """Dimensions with fewer rotations than this over the original context are scaled fully."""


class Llama3Scaling(Section):
    """Llama 3.1's scaling. Source: its config.json: low_freq_factor 1, high_freq_factor 4."""

    type: Literal["llama3"]
    scale: Scale
    """Factor by which the context is extended."""
    low_freq_factor: Annotated[float, Field(gt=0)]
    """Wavelengths longer than the original context divided by this are scaled fully."""
    high_freq_factor: Annotated[float, Field(gt=0)]
    """Wavelengths shorter than the original context divided by this are not scaled."""

    @model_validator(mode="after")
    def _low_below_high(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor {self.high_freq_factor:g}"
            )
        return self


class ThetaScaling(Section):
    """A larger theta instead of scaled positions. Source: Xiong et al. 2023, arXiv:2309.16039."""

    type: Literal["theta"]
    scale: Scale
    """Factor by which the context is extended: the export states that many times the base's positions."""
    rope_theta: Annotated[float, Field(gt=1)]
    """The theta of training and export, e.g. 500000 for a base with 10000. Must be larger than the base's."""


class LongropeScaling(Section):
    """LongRoPE, with the same factors for texts of every length. Source: Ding et al. 2024, arXiv:2402.13753."""

    type: Literal["longrope"]
    scale: Scale
    """Factor by which the context is extended."""
    long_factor: list[Annotated[float, Field(gt=0)]] | None
    """Divisor of each frequency: one number for each pair of dimensions of a head that RoPE turns, fastest first.
    Exported as `long_factor` and `short_factor`. null: the `long_factor` of the base, if it has longrope."""
    attention_factor: Annotated[float, Field(gt=0)] | None
    """Multiplier of sine and cosine. null: sqrt(1 + ln(scale) / ln(original context))."""


SuperhotConfig = Annotated[
    StretchScaling | YarnScaling | Llama3Scaling | ThetaScaling | LongropeScaling, Field(discriminator="type")
]


class DatasetOptions(Section):
    """Sampling options of one source in the mixture. Source: the keys of the card's `datasets`."""

    max_val_set: Positive | None = None
    """Maximum number of validation sequences that are evaluated. null: all."""
    fraction: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Fraction of the training split that an epoch samples. Above 1, sequences repeat: 2.5 is all of them twice and a
    random half once more. null: all. Not together with `size`."""
    size: Positive | None = None
    """Number of training sequences that an epoch samples, at most all of them. Not together with `fraction`."""
    max_chunk_size: Positive | None = None
    """Maximum length of a document's chunks, in characters. null: documents are not split."""

    @model_validator(mode="after")
    def _fraction_excludes_size(self) -> Self:
        if self.fraction is not None and self.size is not None:
            raise ValueError("fraction and size exclude each other; remove one")
        return self


class ModelShape(Section):
    """Shape of the base model: `ropeway plan` uses it, and stage base compares it with the model."""

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
    """Tokens, as in the base's config.json. `kind: scratch`: size of the tokenizer that is trained on the sources."""
    max_position_embeddings: Positive
    """Context length of the base, in tokens."""
    rope_theta: Annotated[float, Field(gt=0)]
    """Base of the RoPE frequencies."""
    rms_norm_eps: Annotated[float, Field(gt=0)]
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool
    """Whether input embedding and output head share weights."""
    head_dim: Positive | None = None
    """Size of an attention head. null: `hidden_size` / `num_attention_heads`."""


class Lora(Section):
    """LoRA settings for `peft_model: true`. Source: Hu et al. 2021, arXiv:2106.09685."""

    rank: Positive
    """Rank of the adapter matrices."""
    alpha: Positive
    """The adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout probability on the adapter's input during training."""
    target_modules: Annotated[list[str], Field(min_length=1)]
    """Names of the linear layers that get an adapter, e.g. q_proj."""
    train_embeddings: bool
    """Also train embedding and head. Otherwise the embeddings of the added role tokens keep their initial values."""


class StopRules(Section):
    """When training stops, or rewinds and skips rows.

    No stage depends on these keys: without a stop or rewind they do not change the result; a rewind is recorded.
    """

    max_skipped_in_row: Positive
    """Training stops after this many consecutive steps that fp16 overflow skipped."""
    spike_window_steps: Positive
    """Number of recent steps whose losses, without spikes, give the median."""
    spike_ratio: Annotated[float, Field(gt=1)]
    """A loss above the median times this ratio is a spike."""
    max_spikes_in_row: Positive
    """Training stops after this many consecutive spikes."""
    rewinds: Annotated[int, Field(ge=0)]
    """Maximum number of rewinds to the last good checkpoint before training stops; a rewind skips the rows of the
    faulty steps."""
    hang_seconds: Annotated[float, Field(gt=0)] | None
    """Timeout of one micro-batch, in seconds. null: 20 times the usual duration, at least 600 seconds."""


class Positions(Section):
    """Loss by position in long rows."""

    rows: Positive
    """Number of long rows."""
    row_tokens: Annotated[int, Field(gt=1)]
    """Tokens per row, usually longer than `max_length`."""
    bucket_tokens: Positive
    """Tokens per bucket of the table."""


class Passkey(Section):
    """Passkey retrieval for each combination of length and depth."""

    lengths: Annotated[list[Positive], Field(min_length=1)]
    """Lengths of the text, in tokens."""
    depths: Annotated[list[Fraction], Field(min_length=1)]
    """Position of the key in the text: 0 is the start, 1 the end."""
    repeats: Positive
    """Number of keys per length and depth."""


class LongContext(Section):
    """Questions on long texts that need more than one passkey.

    Source of the kinds: Hsieh et al. 2024, arXiv:2404.06654.
    """

    kinds: Annotated[
        list[Literal["multi_key", "multi_value", "variable_tracking", "common_words"]], Field(min_length=1)
    ]
    """One of several keys (`multi_key`), all values of one key (`multi_value`), all variables with one value
    (`variable_tracking`), the most frequent words (`common_words`)."""
    lengths: Annotated[list[Positive], Field(min_length=1)]
    """Lengths of the text, in tokens."""
    repeats: Positive
    """Number of questions per kind and length."""


class Evaluation(Section):
    """Evaluation besides the validation loss."""

    prompts: str
    """JSON Lines file of prompts for the sample answers."""
    sampling: str
    """JSON file of named generation configurations."""
    max_new_tokens: Positive
    """Maximum length of a sample answer, in tokens."""
    positions: Positions
    passkey: Passkey
    long_context: LongContext | None
    """Questions on long texts. null: none."""
    tasks: list[str]
    """Tasks, groups or tags of lm-evaluation-harness (extra `eval`), or your own in configs/tasks. Empty: no
    tasks."""


class DriftLimits(Section):
    """Limits of data drift. Above one, the verdict of the gate names it as a reason for a person to look at the data.

    A distribution counts as drifted only if its PSI or divergence is also above what sampling alone explains.
    """

    max_psi: Annotated[float, Field(gt=0)] | None
    """Maximum population stability index of a distribution: tokens per source, lengths, turns, scripts, roles, system
    messages, tokens. Common practice: 0.1 is a small shift, 0.25 a large one. null: not limited."""
    max_js_divergence: Annotated[float, Field(gt=0, le=1)] | None
    """Maximum Jensen-Shannon divergence of the same distributions, in bits: 0 is equal, 1 is disjoint. null: not
    limited."""
    max_share_change: Fraction | None
    """Maximum change of a share, 0 to 1: duplicates, rejected records, conversations with a system message, with tools,
    answers with tool calls, with reasoning. null: not limited."""
    max_size_ratio: Annotated[float, Field(gt=1)] | None
    """Maximum ratio of records, or of tokens, of the larger to the smaller version. null: not limited."""
    min_seen_share: Fraction | None
    """Minimum share of record texts that the earlier version had too, 0 to 1. null: not limited."""
    window: Positive
    """A new version is compared with the one before, the champion, and the oldest of this many versions before it: a
    slow shift can be small from one version to the next."""


class Gate(Section):
    """Conditions for the alias `candidate`."""

    max_loss_increase_nats: Annotated[float, Field(ge=0)]
    """Maximum increase of each source's validation loss over the champion, in nats/token."""
    min_gain_over_base_nats: float
    """Minimum decrease of the mean validation loss compared with the base, in nats/token."""
    max_accuracy_decrease: Fraction | None
    """Maximum decrease of each source's token accuracy below the champion's, 0 to 1. null: not checked."""
    max_position_loss_increase_nats: Annotated[float, Field(ge=0)] | None
    """Maximum increase of the loss by position beyond `max_length` over the champion's, or over the base's where there
    is no champion, in nats/token. null: not checked."""
    max_passkey_decrease: Fraction | None
    """Maximum decrease of the share of passkeys found below the champion's, or below the base's where there is no
    champion, at each length up to `max_length`. null: not checked."""
    min_passkey_accuracy: Fraction | None
    """Minimum share of passkeys found at each length up to `max_length`. null: not checked."""
    max_long_context_decrease: Fraction | None
    """Maximum decrease of the score in `evaluation.long_context` below the champion's, or below the base's where there
    is no champion, for each kind at each length up to `max_length`. null: not checked."""
    max_task_decrease_errors: Annotated[float, Field(ge=0)] | None
    """Maximum decrease of each task's metrics below the champion's, in combined standard errors of both; a metric
    without standard error may not decrease. null: not checked."""
    drift: DriftLimits | None
    """Limits of data drift between versions. null: drift is measured and shown, without limits."""


class Packaging(Section):
    """Storage of the package's weights."""

    dtype: Dtype
    """Data type of the published weights."""
    max_shard_bytes: Positive
    """Maximum size of one safetensors file, in bytes."""


class Card(Section):
    """Model card facts that cannot be computed."""

    license: str
    """SPDX identifier or the Hub's name of the license."""
    license_name: str
    """Display name of the license."""
    license_link: str
    """URL of the license text."""
    base_model: str | None
    """Name of the base on the Hub. null: none."""
    upstream_datasets: list[str]
    """Datasets that the sources derive from."""
    dataset_licenses: dict[str, str] = Field(default_factory=dict)
    """License of each source, for the ML-BOM. A source without one is listed as not recorded."""
    developers: list[str]
    """Names on the card."""
    sponsored_by: str | None
    """Sponsor named on the card. null: none."""
    thanks: str | None
    """Acknowledgement on the card. null: none."""
