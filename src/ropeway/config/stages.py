"""The stages of a run, declared once: which keys of params.yaml, files and results of other stages each one reads.

dvc.yaml says the same to DVC, with descriptions and plots; a contract test compares the two. A stage is added here, in
dvc.yaml, and as a package of `ropeway.stages` (or a module of `ropeway.reporting`) with `run(workspace, profile)`.
"""

from dataclasses import dataclass

from ropeway.config.params import Profile

# Cadence, tracking and when to give up: they change neither a weight nor a metric, so no stage depends on them. (What a
# rewind left out does; it is recorded, and no reason to make a finished run again: docs/decisions/0007.)
UNHASHED = ("eval_steps", "log_dir", "output_dir", "save_steps", "save_total_limit", "stop")
# What the stage `identity` freezes beside each stage's code and params.
FROZEN = ("sources", "base", "contamination", "deepspeed", "prompts", "tasks")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of dvc.yaml.

    Attributes:
        name: Also that of its package.
        reads: Keys of params.yaml.
        inputs: What it reads of other stages, below runs/<profile>.
        outputs: What it writes there.
        metrics: JSON that `dvc metrics` shows.
        plots: CSV that `dvc plots` shows.
        frozen: Which of `FROZEN` it reads.
    """

    name: str
    reads: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def dependencies(self) -> list[str]:
        """Return `deps` of dvc.yaml."""
        own = (f"code-{self.name}", f"params-{self.name}", *self.frozen)
        return [*(frozen_path(one) for one in own), *(f"runs/${{profile}}/{one}" for one in self.inputs)]


def frozen_path(name: str) -> str:
    """Return where `identity` writes something frozen, as dvc.yaml names it."""
    return f".identity/{name}.json"


_ROWS = (
    "datasets", "label_masking", "layout", "max_length", "num_train_epochs", "random_offset_probability", "rng_seed",
    "sort_by_length", "use_custom_sampler", "what_counts", "document_end", "global_batch_size",
)  # fmt: skip
_PREPARED = (
    *_ROWS, "contamination", "duplicates", "max_refused_fraction", "sources", "split", "split_by", "val_split",
    "validation_with_replacement",
)  # fmt: skip
_TOKENIZER = ("base/tokenizer.json", "base/tokenizer_config.json")

STAGES = (
    StageSpec("fetch", ("max_refused_fraction", "sources"), frozen=("sources",), outputs=("raw",)),
    StageSpec(
        "base",
        ("base", "expected_model", "max_length", "model_name", "new_rows", "pad_vocab_to_multiple_of", "rng_seed",
         "superhot", "superhot_config"),
        frozen=("base",),
        inputs=("raw",),
        outputs=("base",),
    ),
    StageSpec(
        "tokenize",
        ("contamination", "datasets", "duplicates", "special_tokens_in_text"),  # in part: `tokenize_params`
        inputs=("raw", *_TOKENIZER),
        outputs=("tokens",),
    ),
    StageSpec(
        "prepare",
        _PREPARED,
        frozen=("contamination",),
        inputs=("raw/manifest.json", "tokens"),
        outputs=("data",),
        metrics=("ledger.json",),
    ),
    StageSpec(
        "report_data",
        _PREPARED,
        inputs=("raw/manifest.json", *_TOKENIZER, "data", "ledger.json"),
        outputs=("report.html",),
    ),
    StageSpec(
        "train",
        (*_ROWS, "adam_beta1", "adam_beta2", "adam_epsilon", "deepspeed_config", "dtype",
         "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "lora", "loss_normalisation",
         "lr_schedule", "max_grad_norm", "peft_model", "per_device_eval_batch_size", "per_device_train_batch_size",
         "residual_dropout", "resume_from", "use_flash_attention", "warmup_steps", "weight_decay"),
        frozen=("deepspeed",),
        inputs=("base", "data"),
        outputs=("model", "provenance.json"),
        metrics=("train.json",),
        plots=("steps.csv",),
    ),
    StageSpec(
        "evaluate",
        ("datasets", "document_end", "evaluation", "label_masking", "max_length", "per_device_eval_batch_size",
         "rng_seed", "what_counts"),
        frozen=("prompts", "tasks"),
        inputs=("base", "data", "model"),
        outputs=("samples.json", "tables"),
        metrics=("eval.json",),
    ),
    StageSpec(
        "report_eval",
        ("max_length",),
        inputs=("steps.csv", "samples.json", "tables"),
        outputs=("plots", "samples.html"),
    ),
    StageSpec(
        "package",
        tuple(name for name in Profile.model_fields if name not in (*UNHASHED, "gate")),
        inputs=("raw/manifest.json", "base/manifest.json", "data/manifest.json", "ledger.json", "model", "train.json",
                "steps.csv", "eval.json", "samples.json"),
        outputs=("package",),
    ),
    StageSpec(
        "report_package",
        (),
        inputs=("plots", "samples.html", "tables", "package/card.json", "package/eval.json", "package/ledger.json",
                "package/manifest.json", "package/samples.json"),
        outputs=("pages",),
    ),
)  # fmt: skip
READS = {stage.name: stage.reads for stage in STAGES}
