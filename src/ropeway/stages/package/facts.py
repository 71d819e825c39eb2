"""The facts of a run for its package, loaded once and checked for consistency."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropeway.config.params import PackageParams
from ropeway.config.sections import PersonalData
from ropeway.data.personal_data import mask_text
from ropeway.data.raw_records import iterate_records
from ropeway.models.architectures import DEFAULT
from ropeway.models.base_rope import scaling_from_json
from ropeway.models.chat_template import ChatTemplate, open_template
from ropeway.models.conversation import Conversation
from ropeway.models.rope import RopeScaling
from ropeway.models.tokenizer import read_special_names
from ropeway.runtime.errors import DataError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import file_sha256, load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.package.model_config import TokenizerJson, lowest_loader, plan_tokenizer

_REMEDY = "Run `dvc repro`, so that all of them come from one run"
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts of one finished run."""

    name: str  # the profile's
    profile: PackageParams
    rope: RopeScaling  # the scaling used in training, as the base stage recorded it
    raw: Json  # a manifest, as are `base`, `data` and `model`
    base: Json
    data: Json
    model: Json
    ledger: Json
    train: Json
    evaluation: Json
    samples: Json
    end: str  # the text of the tokenizer's end token
    systems: Counter[str]  # system message -> number of conversations; "" without one
    max_positions: int  # the base's context length in tokens
    base_rope: Json  # `rope_parameters` with which the base was measured
    tokenizer: TokenizerJson  # tokenizer.json of the package
    template: ChatTemplate  # the base's

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, skipped ones included; part of the model's name."""
        return int(self.model["steps"])

    @property
    def applied_steps(self) -> int:
        """Optimizer steps that were applied, not skipped for gradient overflow or left out."""
        return int(self.model["applied_steps"])

    @property
    def loader(self) -> str:
        """The lowest version of transformers that loads the package."""
        return lowest_loader(self.rope, self.tokenizer, self.base["model"].get("model_type", DEFAULT))

    @property
    def title(self) -> str:
        """`<name>-<steps>`, as in llama2-13b-orca-8k-3319."""
        return f"{self.name}-{self.steps}"

    @property
    def special(self) -> Mapping[str, int]:
        """Ids of `bos`, `eos`, `pad` and the role tokens in the data."""
        return dict(self.data["special"])


def load_facts(workspace: Workspace, profile: PackageParams) -> Facts:
    """Return the run's facts.

    Raises:
        DataError: A stage's files are missing, have changed, or are of another run than the others.
    """
    early = load_early_facts(workspace, profile, verify=True)
    model = load_manifest(workspace.model, remedy="Run `dvc repro train`")
    config = _load_json(workspace.model / "config.json", "train")
    check_one_run(workspace, early.data, early.rope, config)
    check_params(model.get("params"), profile, workspace.model)
    return replace(
        early,
        model=model,
        train=_load_json(workspace.train_metrics, "train"),
        evaluation=_load_json(workspace.evaluation, "evaluate"),
        samples=_load_json(workspace.samples, "evaluate"),
        systems=count_systems(workspace, early.raw, profile.personal_data),
        max_positions=int(config["max_position_embeddings"]),
    )


def load_early_facts(workspace: Workspace, profile: PackageParams, *, verify: bool = False) -> Facts:
    """Return the facts known before training, with empty values for those of the trained model.

    Raises:
        DataError: A manifest is missing or incomplete; with `verify`, a file changed after it was written.
    """
    raw, base, data = (
        load_manifest(folder, remedy=f"Run `dvc repro {stage}`", verify=verify)
        for folder, stage in ((workspace.raw, "fetch"), (workspace.base, "base"), (workspace.data, "prepare"))
    )
    config = _load_json(workspace.base / "config.json", "base")
    return Facts(
        name=workspace.profile,
        profile=profile,
        rope=scaling_from_json(base["rope"]),
        raw=raw,
        base=base,
        data=data,
        model={"steps": 0, "applied_steps": 0},
        ledger=_load_json(workspace.ledger, "prepare"),
        train={"rows_left_out": 0, "rewinds": 0, "continued_from": {}},
        evaluation={},
        samples={},
        end=read_special_names(workspace.base)["eos"],
        systems=Counter(),
        max_positions=int(config["max_position_embeddings"]),
        base_rope=config["rope_parameters"],
        tokenizer=plan_tokenizer(_load_json(workspace.base / "tokenizer.json", "base")),
        template=open_template(workspace.base),
    )


def check_one_run(workspace: Workspace, data: Json, rope: RopeScaling, config: Json) -> None:
    """Raise DataError unless tokenizer, template and RoPE scaling of the export are those of data and params."""
    for path in (workspace.base / "tokenizer.json", workspace.model / "tokenizer.json"):
        if (found := file_sha256(path)) != data["tokenizer"]:
            raise DataError(
                f"{path}: sha256 is {found[:12]}…, that of the data is {data['tokenizer'][:12]}…. {_REMEDY}"
            )
    if (template := open_template(workspace.model)).digest != data["template"]:
        raise DataError(
            f"{workspace.model}: its template {template.name} ({template.digest[:12]}…) is not that of the data "
            f"({data['template'][:12]}…). {_REMEDY}"
        )
    if config["rope_parameters"] != rope.to_config():
        raise DataError(
            f"{workspace.model / 'config.json'}: rope_parameters: expected {rope.to_config()}, as in the base, found "
            f"{config['rope_parameters']}. {_REMEDY}"
        )


def check_params(trained: Json | None, profile: PackageParams, folder: Path) -> None:
    """Raise DataError unless the model was trained with the params that the package would record."""
    if trained is None:
        raise DataError(
            f"{folder}: its manifest has no params; an older version of Ropeway wrote it. Run `dvc repro` or `ropeway "
            "run`, which train again"
        )
    now = profile.model_dump(mode="json", include=set(trained))
    if other := [f"{key}: {trained[key]} -> {now.get(key)}" for key in trained if now.get(key) != trained[key]]:
        raise DataError(
            f"{folder}: trained with other params than the frozen ones ({'; '.join(other)}), so the package would "
            "record wrong params. Run `dvc repro` or `ropeway run`, which train again"
        )


def count_systems(workspace: Workspace, raw: Json, personal: PersonalData) -> Counter[str]:
    """Return the number of conversations per system message, over all sources as they were fetched.

    Where personal data is masked or refused in training texts, it is masked here: the card and readers of the registry
    have these messages.
    """
    kinds = personal.kinds if personal.action in ("mask", "refuse") else ()
    systems: Counter[str] = Counter()
    for name, facts in raw["sources"].items():
        if facts["kind"] == "conversation":
            records = iterate_records(workspace.raw / name)
            systems.update(record.system for record in records if isinstance(record, Conversation))
    if not kinds:
        return systems
    masked: Counter[str] = Counter()
    for text, count in systems.items():
        masked[mask_text(text, kinds)] += count
    return masked


def _load_json(path: Path, stage: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"{path}: expected the JSON that stage {stage} writes, found: {error}. Run `dvc repro {stage}`"
        ) from None
