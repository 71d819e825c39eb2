"""A rehearsal as one process: preflight, samples, every stage of dvc.yaml in order, publish, pull, chat.

The stages run in this process, one after the other: a process and a `dvc repro` for each would take longer than the
stages themselves. Training starts its ranks as processes, and evaluation and package start theirs, as always.

Each step is recorded in `STATE`; its line is printed with `MARK`, by which the parent recognizes it.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ropeway.config.frozen import FrozenInputs
from ropeway.config.load_params import load_profile, read_block
from ropeway.config.params import Profile
from ropeway.config.stages import READS
from ropeway.config.zero import read_zero
from ropeway.orchestration.publish import publish_package
from ropeway.orchestration.revision import Revision
from ropeway.orchestration.stage_process import execute_stage, template_files, write_identity
from ropeway.planning.plan import check_memory
from ropeway.rehearse.preflight import is_for_other_machine, list_checks, plan_ranks
from ropeway.rehearse.shrink import (
    STEPS,
    RehearsalMachine,
    RehearsedBase,
    ShrunkValue,
    SourceSample,
    choose_length,
    records_wanted,
    shrink_deepspeed,
    shrink_profile,
)
from ropeway.runtime.devices import list_gpus
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.manifest import write_json
from ropeway.runtime.terminal import format_count
from ropeway.runtime.workspace import Workspace

STATE = "rehearsal.json"  # in .work of the rehearsal's workspace
MARK = "rehearsal| "
PROMPTS = 2  # of evaluation.prompts that are answered
QUESTION = "Hello! Who are you?"
Ask = Callable[[str, str, str], str]  # a version, the registry's URL and a question -> the answer


@dataclass(frozen=True, slots=True)
class RehearsalRequest:
    """What is rehearsed, and where.

    Attributes:
        root: The real workspace.
        profile: Name of the profile.
        registry: URL of the real registry.
        ranks: Ranks of the rehearsal.
        planned_ranks: Ranks of the real run, for its plan; None: see `preflight.plan_ranks`.
    """

    root: str
    profile: str
    registry: str
    ranks: int
    planned_ranks: int | None


@dataclass(slots=True)
class RehearsalState:
    """What a rehearsal has found so far; written after every step.

    Attributes:
        steps: Name, seconds and words of each complete step.
        running: The step that runs, None between two steps.
        stage: The stage of a real run that would fail if this step does.
        changes: What differs from the real profile.
        warnings: What does not stop a real run, or not for sure.
        omitted: What was not rehearsed.
        error: Class, exit code and message of the error that ended it.
        version: The version that was published and pulled.
        answer: What it answered.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    running: str | None = None
    stage: str | None = None
    changes: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    version: str | None = None
    answer: str | None = None


class _Recorder:
    """Runs steps and records them."""

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, RehearsalState()

    def step(self, name: str, stage: str, work: Callable[[], str]) -> None:
        """Run a step; `work` returns what it did, in words."""
        self.state.running, self.state.stage = name, stage
        self.save()
        began = time.monotonic()
        words = work()
        seconds = time.monotonic() - began
        self.state.steps.append({"name": name, "seconds": round(seconds, 2), "words": words})
        self.state.running = self.state.stage = None
        self.save()
        print(f"{MARK}{name:<14} {seconds:5.1f} s  {words}", flush=True)

    def say(self, line: str) -> None:
        """Print a line for the terminal."""
        print(f"{MARK}{line}", flush=True)

    def save(self) -> None:
        """Write the state."""
        write_json(self.path, asdict(self.state))


def run_rehearsal(request: RehearsalRequest, folder: Path, ask: Ask) -> int:
    """Rehearse in `folder`, the rehearsal's workspace; return the exit code.

    `ask` pulls a version and asks it.
    """
    recorder = _Recorder(folder / ".work" / STATE)
    try:
        _rehearse(_Rehearsal(request, folder, recorder), ask)
    except RopewayError as error:
        recorder.state.error = {"kind": type(error).__name__, "code": error.exit_code, "message": str(error)}
        code = error.exit_code
    except SystemExit as error:  # of stage train: a rank has printed why
        code = error.code if isinstance(error.code, int) else 1
        recorder.state.error = {"kind": "SystemExit", "code": code, "message": ""}
    except Exception as error:  # noqa: BLE001 - a stage's own bug would end a real run too
        traceback.print_exc()
        code = RopewayError.exit_code
        message = f"{type(error).__name__}: {error}"
        recorder.state.error = {"kind": RopewayError.__name__, "code": code, "message": message}
    else:
        code = 0
    recorder.save()
    return code


@dataclass(slots=True)
class _Rehearsal:
    """One rehearsal: what is known of it by now."""

    request: RehearsalRequest
    folder: Path
    recorder: _Recorder
    samples: list[SourceSample] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return Path(self.request.root)

    @property
    def machine(self) -> RehearsalMachine:
        return RehearsalMachine(self.request.ranks, bool(list_gpus()))

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder, self.request.profile)


def _rehearse(run: _Rehearsal, ask: Ask) -> None:
    request, recorder = run.request, run.recorder
    _, profile = load_profile(run.root / "params.yaml", request.profile)
    for check in list_checks(run.root, request.profile, profile, request.registry, ranks=request.planned_ranks):

        def work(check: Any = check) -> str:  # noqa: ANN401 - of this turn of the loop
            words, warnings = check.run()
            recorder.state.warnings += warnings
            return str(words)

        recorder.step(check.name, check.stage, work)
    recorder.step("samples", "fetch", lambda: _take_samples(run, profile))
    recorder.step("base model", "base", lambda: _write_workspace(run, profile))
    for change in recorder.state.changes:
        recorder.say(f"  {ShrunkValue(**change)}")
    _isolate_environment(run)
    recorder.step("identity", "identity", lambda: _freeze(run))
    for name in READS:
        recorder.step(name, name, lambda name=name: _run_stage(run, name))  # type: ignore[misc]
    recorder.step("publish", "publish", lambda: _publish(run))
    recorder.step("pull and chat", "publish", lambda: _chat(run, ask))


def _take_samples(run: _Rehearsal, profile: Profile) -> str:
    """Write the samples of all sources."""
    from ropeway.rehearse.source_samples import sample_source

    block = read_block(run.root / "params.yaml", run.request.profile)
    count = records_wanted(block, run.machine)
    elsewhere, state = is_for_other_machine(profile), run.recorder.state
    for name, source in profile.sources.items():
        sample = sample_source(name, source, run.root, run.folder, count=count, may_generate=elsewhere)
        run.samples.append(sample)
        refused = sum(sample.refused.values())
        if refused > profile.max_refused_fraction * len(sample.lengths):
            first = next(iter(sample.refused))
            state.warnings.append(
                f"source {name}: {refused} of {len(sample.lengths)} records of the sample are refused ({first}); a "
                f"real run fails above max_refused_fraction {profile.max_refused_fraction:g}"
            )
    mine = [one.name for one in run.samples if not one.is_generated]
    made = [one.name for one in run.samples if one.is_generated]
    state.omitted += [f"the records of {', '.join(made)}: they are not on this machine"] if made else []
    state.omitted += ["records beyond the first of each source"] if mine else []
    records = sum(len(one.lengths) for one in run.samples)
    words = f"{records} records of {format_count(len(run.samples), 'source')}"
    return words + (f"; GENERATED, not your data: {', '.join(made)}" if made else "")


def _write_workspace(run: _Rehearsal, profile: Profile) -> str:
    """Choose or make the base, write params.yaml and the files that it names."""
    from ropeway.rehearse.stand_in import choose_base, make_base

    block = read_block(run.root / "params.yaml", run.request.profile)
    choice = choose_base(run.root, profile, has_gpu=run.machine.has_gpu)
    length = choose_length(block, run.samples, has_gpu=run.machine.has_gpu)
    base = make_base(profile, choice, _sample_texts(run), run.folder, length=length)
    small, changes = shrink_profile(block, run.samples, base, run.machine)
    changes += _copy_texts(run, profile, small)
    path = run.folder / "params.yaml"
    yaml = YAML()
    yaml.width = 10_000
    with path.open("w", encoding="utf-8") as file:
        yaml.dump({"profile": run.request.profile, run.request.profile: small}, file)
    run.recorder.state.changes = [asdict(change) for change in changes]
    run.recorder.state.omitted += _list_omitted(run, profile, base, small)
    load_profile(path)
    return base.words


def _sample_texts(run: _Rehearsal) -> list[str]:
    """Return the texts that stage base will train a tokenizer on, in its order."""
    from ropeway.config.sections import FilesSource
    from ropeway.data.raw_records import iterate_texts
    from ropeway.stages.fetch.sources import RefusedRecord, open_source, source_identity

    texts: list[str] = []
    for sample in sorted(run.samples, key=lambda one: one.name):
        source = FilesSource.model_validate(sample.block)
        identity = source_identity(source, run.folder)
        for record in open_source(source, run.workspace, identity):
            if not isinstance(record, RefusedRecord):
                texts += iterate_texts(record)
    return texts


def _copy_texts(run: _Rehearsal, profile: Profile, small: dict[str, Any]) -> tuple[ShrunkValue, ...]:
    """Copy the files that params name; the DeepSpeed JSON and the prompts get smaller.

    A file outside of the workspace is copied into it, and `small` names it there.
    """
    changes: tuple[ShrunkValue, ...] = ()
    evaluation, places = profile.evaluation, dict[str, str]()
    names = [*profile.contamination.prompts, evaluation.prompts, evaluation.sampling, *template_files(profile)]
    for name in dict.fromkeys([*names, profile.deepspeed_config]):
        is_outside = not os.path.normpath(run.folder / name).startswith(f"{os.path.normpath(run.folder)}{os.sep}")
        places[name] = f"outside/{len(places)}-{Path(name).name}" if is_outside else name
        text = (run.root / name).read_text(encoding="utf-8")
        if name == profile.deepspeed_config:
            text, smaller = shrink_deepspeed(text, name, run.machine)
            changes += smaller
        elif name == evaluation.prompts:
            lines = [line for line in text.splitlines() if line.strip()]
            if len(lines) > PROMPTS:
                changes += (ShrunkValue(name, f"{len(lines)} prompts", str(PROMPTS)),)
            text = "\n".join(lines[:PROMPTS]) + "\n"
        target = run.folder / places[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    small["contamination"]["prompts"] = [places[name] for name in profile.contamination.prompts]
    small["evaluation"] |= {"prompts": places[evaluation.prompts], "sampling": places[evaluation.sampling]}
    small["deepspeed_config"] = places[profile.deepspeed_config]
    small["template"] = places.get(profile.template, profile.template)
    return changes


def _list_omitted(run: _Rehearsal, profile: Profile, base: RehearsedBase, small: Mapping[str, Any]) -> list[str]:
    omitted = [] if base.is_real else [f"the weights of {profile.model_name}"]
    if not base.has_own_tokenizer:
        omitted.append("the real tokenizer")
    if not base.has_own_tokenizer:
        omitted.append("whether the shortest passkey and long-context questions fit: that depends on the tokenizer")
    if small["max_length"] < profile.max_length:
        omitted.append(f"rows of {profile.max_length:,} tokens, and the memory that they need")
    if not run.machine.has_gpu:
        stated = {"flash attention": profile.use_flash_attention, "fp16": profile.dtype == "fp16",
                  "Liger's kernels": profile.fused_kernels}  # fmt: skip
        omitted.append(", ".join(["GPUs and NCCL", *(name for name, used in stated.items() if used)]))
    planned = run.request.planned_ranks or plan_ranks(profile)
    if planned != run.request.ranks:
        omitted.append(f"{planned} ranks; {run.request.ranks} here")
    if profile.resume_from:
        omitted.append(f"continuing from {profile.resume_from}")
    if profile.evaluation.tasks:
        omitted.append("answers to the evaluation's tasks")
    omitted.append("quality: the gate's verdict, the losses and the answers of so few steps mean nothing")
    omitted.append("DVC and Prefect: the stages ran in one process")
    return omitted


def _isolate_environment(run: _Rehearsal) -> None:
    """Point this process and its children at the rehearsal's own folder and at this machine alone."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "DVC_"))]:
        del os.environ[name]
    for name in ("ROPEWAY_HOSTFILE", "ROPEWAY_DASK_SCHEDULER", "ROPEWAY_LOCK_HELD", "ROPEWAY_SKIP_WARM_UP"):
        os.environ.pop(name, None)
    os.environ |= {
        "ROPEWAY_RANKS": str(run.request.ranks),
        "ROPEWAY_REGISTRY": (run.folder / "registry").as_uri(),
        "ROPEWAY_CACHE": str(run.folder / "cache"),
        "WANDB_MODE": "disabled",
        "ROPEWAY_TOKENIZE_WORKERS": "1",
    }
    os.chdir(run.folder)


def _freeze(run: _Rehearsal) -> str:
    write_identity(run.folder, run.request.profile)
    return "froze the rehearsed inputs"


def _run_stage(run: _Rehearsal, name: str) -> str:
    frozen = FrozenInputs.load(run.folder)
    if name == "train":
        _, params = load_profile(frozen.params_file, frozen.profile_name)
        zero = read_zero(frozen.text("deepspeed", params.deepspeed_config), params.deepspeed_config)
        check_memory(run.workspace, params, zero, ranks=run.request.ranks)
    execute_stage(run.folder, name)
    return _describe(run, name)


def _describe(run: _Rehearsal, name: str) -> str:
    """Return what a stage made, in a few words."""
    workspace = run.workspace
    if name == "fetch":
        sources = json.loads((workspace.raw / "manifest.json").read_bytes())["sources"]
        return f"{sum(one['kept'] for one in sources.values())} records of {format_count(len(sources), 'source')}"
    if name == "base":
        return f"{json.loads((workspace.base / 'manifest.json').read_bytes())['parameters']:,} weights"
    if name == "train":
        found = json.loads(workspace.train_metrics.read_bytes())
        words = f"{format_count(found['steps'], 'step')} on {format_count(run.request.ranks, 'rank')}"
        if found["steps"] > 4 * STEPS:
            run.recorder.state.warnings.append(f"the sample gave {found['steps']} steps; a rehearsal aims at {STEPS}")
        return f"{words}, loss {found['final_loss']:.2f}"
    if name == "package":
        files = [path for path in workspace.package.iterdir() if path.suffix == ".safetensors"]
        return f"{format_count(len(files), 'file')} of weights; the reloaded package equals the model"
    return ""


def _publish(run: _Rehearsal) -> str:
    """Publish to the rehearsal's registry, without a revision: `git diff` would write the real workspace's index."""
    profile = load_profile(run.folder / "params.yaml")[1]
    done = publish_package(run.workspace, profile, Revision(None, ()), lambda _champion, _sections: None)
    run.recorder.state.version = done.version
    return f"{done.version} in a registry of its own"


def _chat(run: _Rehearsal, ask: Ask) -> str:
    answer = ask(run.recorder.state.version or "", run.workspace.registry_url, QUESTION)
    run.recorder.state.answer = answer
    return f"pulled, verified, and answered {len(answer)} characters"


def read_state(path: Path) -> RehearsalState:
    """Return a rehearsal's state; an empty one if it has not begun."""
    try:
        return RehearsalState(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return RehearsalState()


def last_lines(lines: Sequence[str]) -> str:
    r"""Return the end of a log, indented, from the rehearsal's own last line on.

    >>> last_lines(["old", f"{MARK}prepare 0.1 s", "epoch 0", "rank 0: no"])
    '    epoch 0\n    rank 0: no'
    """
    own = [at for at, line in enumerate(lines) if line.startswith(MARK)]
    return "\n".join(f"    {line}" for line in lines[own[-1] + 1 if own else 0 :])
