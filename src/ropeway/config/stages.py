"""The stages of a run: the params.yaml keys, files and outputs of other stages that each one reads.

dvc.yaml declares the same for DVC, with descriptions and plots; a contract test compares the two. To add a stage, add
it here, to dvc.yaml, and as a package of `ropeway.stages` (or a module of `ropeway.reporting`) with
`run(workspace, profile)`.
"""

from dataclasses import dataclass

from ropeway.config.params import (
    BaseParams,
    EvaluateParams,
    FetchParams,
    PackageParams,
    PrepareParams,
    TrainSettings,
    WeightParams,
)
from ropeway.config.sections import Section

UNHASHED = tuple(TrainSettings.model_fields)
# What the stage `identity` freezes besides each stage's code and params.
FROZEN = ("sources", "base", "contamination", "deepspeed", "prompts", "tasks", "template")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of dvc.yaml."""

    name: str  # also the name of its package
    reads: tuple[str, ...]  # keys of params.yaml
    inputs: tuple[str, ...] = ()  # outputs of other stages, relative to runs/<profile>
    outputs: tuple[str, ...] = ()  # relative to runs/<profile>
    metrics: tuple[str, ...] = ()  # JSON files for `dvc metrics`
    plots: tuple[str, ...] = ()  # CSV files for `dvc plots`
    frozen: tuple[str, ...] = ()  # names from `FROZEN`

    @property
    def dependencies(self) -> list[str]:
        """Return `deps` of dvc.yaml."""
        own = (f"code-{self.name}", f"params-{self.name}", *self.frozen)
        return [*(frozen_path(one) for one in own), *(f"runs/${{profile}}/{one}" for one in self.inputs)]


def frozen_path(name: str) -> str:
    """Return the path of a frozen input, as written in dvc.yaml."""
    return f".identity/{name}.json"


def _keys(params: type[Section]) -> tuple[str, ...]:
    return tuple(sorted(params.model_fields))


_TOKENIZER = ("base/tokenizer.json", "base/tokenizer_config.json")

STAGES = (
    StageSpec("fetch", _keys(FetchParams), frozen=("sources",), outputs=("raw",)),
    StageSpec(
        "base",
        _keys(BaseParams),
        frozen=("base", "template"),
        inputs=("raw",),
        outputs=("base",),
    ),
    StageSpec(
        "tokenize",
        # Parts of these keys: `tokenize_params`.
        ("contamination", "datasets", "duplicates", "history", "personal_data", "special_tokens_in_text"),
        inputs=("raw", "base/chat_template.jinja", *_TOKENIZER),
        outputs=("tokens",),
    ),
    StageSpec(
        "prepare",
        _keys(PrepareParams),
        frozen=("contamination",),
        inputs=("raw/manifest.json", "tokens"),
        outputs=("data", "records.index"),
        metrics=("ledger.json",),
    ),
    StageSpec(
        "report_data",
        _keys(PrepareParams),
        inputs=("raw", "base/chat_template.jinja", *_TOKENIZER, "tokens", "data", "ledger.json", "records.index"),
        outputs=("report.html", "data_profile.json"),
    ),
    StageSpec(
        "train",
        _keys(WeightParams),
        frozen=("deepspeed",),
        inputs=("base", "data"),
        outputs=("model", "provenance.json"),
        metrics=("train.json",),
        plots=("steps.csv",),
    ),
    StageSpec(
        "evaluate",
        _keys(EvaluateParams),
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
        _keys(PackageParams),
        inputs=("raw/manifest.json", "base/manifest.json", "data/manifest.json", "ledger.json", "model", "train.json",
                "steps.csv", "eval.json", "samples.json"),
        outputs=("package",),
    ),
    StageSpec(
        "report_package",
        (),
        inputs=("plots", "samples.html", "tables", "data_profile.json", "package/card.json", "package/eval.json",
                "package/ledger.json", "package/manifest.json", "package/samples.json"),
        outputs=("pages",),
    ),
)  # fmt: skip
READS = {stage.name: stage.reads for stage in STAGES}
