"""What dvc.yaml calls: one stage by name. `identity` runs in this process, any other under a supervisor."""

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import ropeway
from ropeway.config.frozen import PARAMS_FILE, FrozenInputs, freeze, read_texts
from ropeway.config.load_params import load_profile, read_text
from ropeway.config.params import BaseParams, EvaluateParams, Profile
from ropeway.config.sections import (
    FilesSource,
    FolderBase,
    GgufBase,
    HubBase,
    Source,
)
from ropeway.config.stages import READS
from ropeway.config.suggestion import unknown_name
from ropeway.orchestration.dvc_recovery import repair_for_dvc
from ropeway.runtime.code_digests import CODE, Digests, name_changed_code
from ropeway.runtime.devices import count_ranks, list_gpus, spans_machines
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError, full_disk_explained
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import digest_of, file_sha256, json_mapping
from ropeway.runtime.progress import PROGRESS_FILE
from ropeway.runtime.stage_log import log_path, open_log, writes_to
from ropeway.runtime.worker_processes import CODE_CHECK
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base.base_files import check_folder
from ropeway.stages.fetch.local import find_files
from ropeway.stages.fetch.sources import find_changes, local_files, source_identity
from ropeway.storage import hub

_SHOWN = 5  # changed things in a message
STAGE_NAMES = tuple(READS)
CHECKED_BEFORE_TRAINING = ("evaluate", "package")  # train reports what would make them fail
_REPORTS = "report_"  # stages that only show: ropeway.reporting, one module each


def run_stage(root: Path, name: str, profile: str | None = None) -> int:
    """Run one stage; return its exit code.

    It runs in its own process tree under the supervisor, so that no process outlives DVC or a signal. The default
    profile is the one params.yaml names for `identity`, and that of the frozen inputs for any other stage.

    Raises:
        ConfigError: No such stage, params.yaml is invalid, the frozen inputs are of another profile, or the training
            does not fit the GPU.
        DataError: There are no frozen inputs.
        TemporaryError: Another run holds the workspace lock.
    """
    if name not in ("identity", *STAGE_NAMES):
        raise ConfigError(f"stage '{name}' {unknown_name(name, ['identity', *STAGE_NAMES])}")
    with workspace_lock(root, command=f"ropeway stage {name}", profile=profile or "") as held:
        if name == "identity":
            if held.handle is not None:  # no run has done it
                for line in repair_for_dvc(root):
                    print(line, flush=True)
            write_identity(root, profile)
            return 0
        from ropeway.runtime import supervise

        frozen = FrozenInputs.load(root)
        if profile not in (None, frozen.profile_name):
            raise ConfigError(
                f"stage {name} of profile '{profile}': the frozen inputs in {frozen.folder} are of profile "
                f"'{frozen.profile_name}'. Run `dvc repro` or `ropeway run` to freeze them again"
            )
        if edited := frozen.edited_params(root):
            print(
                f"stage {name}: params.yaml was edited after its inputs were frozen ({', '.join(edited)}); the "
                "frozen values are used. `ropeway stage identity` freezes the new ones",
                flush=True,
            )
        if name == "train":  # here, not in the stage: a changed estimate must not invalidate a trained model
            from ropeway.config.zero import read_zero
            from ropeway.planning.plan import check_memory  # numpy; 0.08 s that no other stage needs

            _, params = load_profile(frozen.params_file, frozen.profile_name)  # memory also depends on keys of base
            zero = read_zero(frozen.text("deepspeed", params.deepspeed_config), params.deepspeed_config)
            check_memory(Workspace(root, frozen.profile_name), params, zero, ranks=count_ranks())
        command = [sys.executable, "-m", "ropeway.cli.main", "execute-stage", name]
        record = root / ".work" / f"{name}.exit.json"
        # Otherwise deepspeed warns on every import. Ranks on other machines choose their device there.
        device = {} if list_gpus() or (name == "train" and spans_machines(os.environ)) else {"DS_ACCELERATOR": "cpu"}
        environment = {**os.environ, **device, **held.environment}
        Workspace(root, "").progress(name).unlink(missing_ok=True)  # that of an earlier start
        return supervise.run(command, record=record, env=environment, cwd=root, log=_own_log(root, name, record))


def _own_log(root: Path, name: str, record: Path) -> Path | None:
    """Return the log that this stage must write itself; None if its output goes there or to a terminal already.

    On a terminal the stage keeps the line that it updates in place.
    """
    path = log_path(root, name)
    if writes_to(sys.stdout, path) or sys.stdout.isatty():
        return None
    earlier = json_mapping(record.read_bytes()) if record.is_file() else {}
    open_log(path, resumes=earlier.get("code") == TemporaryError.exit_code).close()
    return path


def execute_stage(root: Path, name: str) -> None:
    """Run one stage in this process, with only those keys of the profile that it declares.

    Raises:
        ConfigError, DataError: A later stage would fail whatever is trained.
        DataError: A file that the stage reads in place changed after the inputs were frozen. DVC then records nothing:
            neither dvc.lock nor the run-cache may attribute the output to other inputs.
    """
    frozen = FrozenInputs.load(root)
    check_unchanged(root, frozen, name)
    workspace = Workspace(root, frozen.profile_name)
    params = frozen.tokenize_params() if name == "tokenize" else frozen.profile(name)
    if name == "train":
        for later in CHECKED_BEFORE_TRAINING:
            _module(later).check_request(workspace, frozen.profile(later))
    code = [name, digest_of(frozen.value(f"code-{name}")), str(workspace.work / CODE)]
    before = _stat_inputs(root, frozen, name)
    os.environ[CODE_CHECK] = json.dumps(code)  # worker processes compare the code they import with it
    os.environ[PROGRESS_FILE] = str(workspace.progress(name))
    try:
        with full_disk_explained(workspace.run):  # a stage that keeps partial output says so itself
            _module(name).run(workspace, params)
    finally:
        del os.environ[CODE_CHECK], os.environ[PROGRESS_FILE]
    check_unchanged(root, frozen, name)
    if changed := _differing(before, _stat_inputs(root, frozen, name)):
        raise DataError(
            f"stage {name}: {', '.join(changed[:_SHOWN])} was replaced or written while the stage read it, so the "
            "stage is not recorded. Run the same command again"
        )


def _stat_inputs(root: Path, frozen: FrozenInputs, stage: str) -> dict[str, list[int]]:
    """Return inode, size and times of the files a stage reads in place: they reveal a swap, even if undone."""
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
    """Raise DataError if code, local sources, base or tasks of a stage changed after the inputs were frozen."""
    kept = Workspace(root, frozen.profile_name).work / CODE
    changed = name_changed_code(frozen.value(f"code-{stage}"), kept, stage)
    if FrozenInputs.load(root) != frozen:
        changed.append(f"the frozen inputs in {frozen.folder}")
    if stage == "fetch":
        known = frozen.value("sources")
        sources = frozen.profile("fetch").sources
        changed += [one for name, source in sources.items() for one in find_changes(source, known[name], root)]
    if stage == "base" and not isinstance((profile := frozen.profile("base")).base, HubBase):  # a commit is immutable
        changed += _differing(frozen.value("base"), base_identity(profile, root))
    if stage == "evaluate":
        now = _tasks_identity(frozen.profile("evaluate"), Workspace(root, "").tasks)
        changed += _differing(frozen.value("tasks"), now)
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        resumes = " Checkpoints are kept; if you revert the code, the run resumes" if stage == "train" else ""
        raise DataError(
            f"stage {stage}: {', '.join(changed[:_SHOWN])}{more} changed after this run froze its inputs, so the "
            f"stage is not recorded. Run `dvc repro` or `ropeway run`, which freeze the inputs again.{resumes}"
        )


def write_identity(root: Path, name: str | None = None) -> None:
    """Write `.identity/` for a profile (default: the one params.yaml names); the caller holds the workspace lock.

    It holds fingerprints of inputs that DVC does not track, and copies of inputs that may change. It is cheap, since it
    runs at every start.

    Raises:
        ConfigError: A source, base folder or file named in params.yaml is missing.
        TemporaryError: The disk is full, or a server does not answer.
    """
    inputs = collect_inputs(root, name)
    with full_disk_explained(inputs.workspace.identity):
        inputs.code.keep()
        freeze(inputs.workspace, inputs.profile, inputs.params_text, inputs.facts)


@dataclass(frozen=True, slots=True)
class CollectedInputs:
    """What `write_identity` freezes: arguments of `ropeway.config.frozen.freeze`, and the code that was parsed."""

    workspace: Workspace
    profile: Profile
    params_text: str
    facts: dict[str, object]
    code: Digests


def collect_inputs(
    root: Path,
    name: str | None = None,
    *,
    identify_base: Callable[[Profile, Path], object] | None = None,
    identify_source: Callable[[Source, Path], object] = source_identity,
    parses_all: bool = True,
) -> CollectedInputs:
    """Return the inputs of a run as they are now; write nothing but the digest cache of local sources.

    Args:
        root: The workspace.
        name: The profile; default: the one that params.yaml names.
        identify_base: Returns the identity of a base. The default asks the Hub for the commit of a branch.
        identify_source: Returns the identity of a source. The default asks servers, hashes local files and keeps their
            digests in `.work`.
        parses_all: Parse the code even if no module of it was parsed before; else the digests of the code are left out.

    Raises:
        ConfigError: As `write_identity`.
        TemporaryError: A server does not answer.
    """
    text = read_text(root / PARAMS_FILE)
    chosen, profile = load_profile(root / PARAMS_FILE, name, text=text)
    workspace, evaluation = Workspace(root, chosen), profile.evaluation
    code = Digests(Path(ropeway.__file__).parent, workspace.work / CODE)
    facts: dict[str, object] = {
        "base": (identify_base or base_identity)(profile, root),
        "contamination": read_texts(root, profile.contamination.prompts, key="contamination.prompts"),
        "deepspeed": read_texts(root, [profile.deepspeed_config], key="deepspeed_config"),
        "prompts": {
            **read_texts(root, [evaluation.prompts], key="evaluation.prompts"),
            **read_texts(root, [evaluation.sampling], key="evaluation.sampling"),
        },
        "sources": {name: identify_source(one, root) for name, one in sorted(profile.sources.items())},
        "tasks": _tasks_identity(profile, workspace.tasks),
        "template": read_texts(root, template_files(profile), key="template"),
        **({f"code-{stage}": code.modules(stage) for stage in STAGE_NAMES} if parses_all or not code.is_cold else {}),
    }
    return CollectedInputs(workspace, profile, text, facts, code)


def template_files(profile: Profile) -> list[str]:
    """Return the file that `template` names, if it names one."""
    return [profile.template] if profile.template.endswith(".jinja") else []


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """The files of a workspace that a run reads, as paths relative to the workspace.

    Attributes:
        texts: Files that only git can restore: params.yaml, dvc.yaml, DeepSpeed JSON, prompts, sampling, tasks, code.
        data: Local sources and base, whose content DVC stores by digest.
    """

    texts: tuple[str, ...]
    data: tuple[str, ...]


def name_files(root: Path, profile: Profile) -> NamedFiles:
    """Return the files that a profile names, without missing ones, which their reader reports."""
    evaluation = profile.evaluation
    named = [root / PARAMS_FILE, root / "dvc.yaml", root / profile.deepspeed_config]
    texts = (*profile.contamination.prompts, evaluation.prompts, evaluation.sampling, *template_files(profile))
    named += [root / name for name in texts]
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
    """Return what evaluation tasks depend on besides their names; empty if params name no task."""
    names = profile.evaluation.tasks
    if not names:
        return {}
    from ropeway.stages.evaluate.tasks import harness_version

    digests = {path.relative_to(folder.parent.parent).as_posix(): file_sha256(path) for path in _task_files(folder)}
    return {"lm_eval": harness_version(names), **digests}


def _task_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def check_local_base(root: Path, profile: Profile) -> None:
    """Raise ConfigError if a base that is to be on this machine is missing or incomplete; does not ask the Hub."""
    if not isinstance(profile.base, HubBase):
        base_identity(profile.reading(READS["base"]), root)


def base_identity(profile: BaseParams, root: Path) -> dict[str, object]:
    """Return sizes and times of a base folder's files; hashing 26 GB before every run would take 15 s."""
    base = profile.base
    if isinstance(base, FolderBase):
        folder = root / profile.model_name
        if not folder.is_dir():
            raise ConfigError(
                f"params.yaml: model_name {profile.model_name} is not a folder. Put the base model there (config.json, "
                "*.safetensors, tokenizer.json), or set model_name and base.kind (folder, hub, gguf) to its location"
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
                f"params.yaml: base.package {base.package} is not installed; `make setup` installs that of the profile "
                "smollm2"
            ) from None
    return base.model_dump()
