"""What a real run would meet besides its stages: its plan of ranks, memory and disk, its registry, the files it names.

Nothing of the real workspace is written. Of the real registry one object is written and deleted, as by `doctor`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.frozen import read_texts
from ropeway.config.params import Profile
from ropeway.orchestration.doctor import check_store
from ropeway.orchestration.stage_process import template_files
from ropeway.planning.plan import RunPlan, plan_run
from ropeway.registry.signing import load_signer
from ropeway.rehearse.shrink import OFFLOADS
from ropeway.runtime.devices import count_ranks, detect_gpus, list_gpus
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.terminal import format_count, format_large
from ropeway.runtime.workspace import Workspace, format_bytes
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json


@dataclass(frozen=True, slots=True)
class PreflightCheck:
    """One check: the stage of a real run that would fail, and what returns a sentence or raises.

    Attributes:
        name: Name of the check, in the rehearsal's output.
        stage: The stage in which a real run would fail.
        run: Returns (what was found, what to warn of).
    """

    name: str
    stage: str
    run: Callable[[], tuple[str, tuple[str, ...]]]


def list_checks(root: Path, name: str, profile: Profile, registry: str, *, ranks: int | None) -> list[PreflightCheck]:
    """Return the checks of a real run in the order in which it would meet them.

    Args:
        root: The real workspace.
        name: Name of the profile.
        profile: The profile.
        registry: URL of the real registry.
        ranks: Ranks of the real run; None: as `plan_ranks`.
    """
    return [
        PreflightCheck("files", "identity", lambda: _check_files(root, profile)),
        PreflightCheck("plan", "train", lambda: _check_plan(root, name, profile, ranks or plan_ranks(profile))),
        PreflightCheck("registry", "publish", lambda: _check_registry(registry)),
        *(
            [PreflightCheck("tasks", "evaluate", lambda: _check_tasks(root, profile))]
            if profile.evaluation.tasks
            else []
        ),
    ]


def is_for_other_machine(profile: Profile) -> bool:
    """Return whether a run needs GPUs and this machine has none."""
    return not list_gpus() and (profile.dtype == "fp16" or profile.fused_kernels)


def plan_ranks(profile: Profile) -> int:
    """Return the ranks of the real run: those of this machine, or those that the published batch states.

    `gradient_accumulation_steps` belongs to the number of ranks of a run that needs GPUs, so it gives that number.
    """
    if not is_for_other_machine(profile):
        return count_ranks()
    rows = profile.per_device_train_batch_size * profile.gradient_accumulation_steps
    return max(1, profile.global_batch_size // rows) * profile.sequence_parallel


def _check_files(root: Path, profile: Profile) -> tuple[str, tuple[str, ...]]:
    """Read every file that params name, as `identity` does, and parse what later stages parse."""
    from ropeway.stages.evaluate.samples import parse_generation_configs, parse_prompts  # torch and transformers, 3 s

    evaluation = profile.evaluation
    texts = {
        **read_texts(root, profile.contamination.prompts, key="contamination.prompts"),
        **read_texts(root, [profile.deepspeed_config], key="deepspeed_config"),
        **read_texts(root, [evaluation.prompts], key="evaluation.prompts"),
        **read_texts(root, [evaluation.sampling], key="evaluation.sampling"),
        **read_texts(root, template_files(profile), key="template"),
    }
    parse_deepspeed_json(texts[profile.deepspeed_config], profile.deepspeed_config)
    prompts = parse_prompts(texts[evaluation.prompts], evaluation.prompts)
    ways = parse_generation_configs(texts[evaluation.sampling], evaluation.sampling)
    words = f"{format_count(len(texts), 'file')}: {format_count(len(prompts), 'prompt')}"
    return f"{words}, {format_count(len(ways), 'generation configuration')}", ()


def _check_plan(root: Path, name: str, profile: Profile, ranks: int) -> tuple[str, tuple[str, ...]]:
    """Plan the real run.

    Raises:
        ConfigError: The ranks do not divide the batch, DeepSpeed refuses the offloading, or the disk of this machine is
            too small for the run.
    """
    _check_offload(root, profile)
    plan = plan_run(Workspace(root, name), profile, ranks=ranks)
    steps = "" if plan.optimizer_steps is None else f", {plan.optimizer_steps:,} steps"
    parts = [
        f"{format_count(ranks, 'rank')}, {format_large(plan.parameters)} weights{steps}",
        f"{format_bytes(plan.gpu_bytes['total'])} per rank",
        f"disk {format_bytes(plan.disk_bytes)} of {format_bytes(plan.disk_free_bytes)} free here",
    ]
    return "; ".join(parts), tuple(_check_fit(plan, elsewhere=is_for_other_machine(profile)))


def _check_fit(plan: RunPlan, *, elsewhere: bool) -> list[str]:
    """Return warnings; raise ConfigError if the disk of this machine, on which the run would be, is too small."""
    warnings = []
    short = plan.disk_bytes - plan.disk_free_bytes
    if short > 0:
        words = (
            f"the real run needs {format_bytes(plan.disk_bytes)} of disk, {format_bytes(plan.disk_free_bytes)} are "
            "free here; `ropeway plan` has the parts"
        )
        if not elsewhere:
            raise ConfigError(f"{words}. Free {format_bytes(short)}, or lower save_total_limit")
        warnings.append(f"disk: {words} (it needs GPUs, so it is for another machine)")
    if plan.fits is False:
        needed = next(iter(plan.cards.values())).needed_bytes
        memory = min(gpu.memory_bytes for gpu in detect_gpus())
        warnings.append(
            f"memory: the plan needs {format_bytes(needed)} per GPU, the smallest here has {format_bytes(memory)}"
        )
    return warnings


def _check_registry(registry: str) -> tuple[str, tuple[str, ...]]:
    """Write one key of the real registry twice and delete it: of two writers only one may win.

    Raises:
        ConfigError: It cannot be written, or loses writes.
        TemporaryError: It does not answer.
    """
    load_signer()
    finding = check_store(registry)
    if finding.state == "wrong":
        raise ConfigError(f"the registry {finding.words}: {finding.fix}")
    return finding.words, ()


def _check_offload(root: Path, profile: Profile) -> None:
    """Let DeepSpeed read the offloading that a rehearsal leaves out where there is no GPU.

    Raises:
        ConfigError: DeepSpeed refuses it.
    """
    path = profile.deepspeed_config
    zero = parse_json((root / path).read_bytes()).get("zero_optimization", {})
    if list_gpus() or not any(zero.get(name) for name in OFFLOADS):
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        raise ConfigError(f"{path}: DeepSpeed refuses zero_optimization: {error}") from None


def _check_tasks(root: Path, profile: Profile) -> tuple[str, tuple[str, ...]]:
    """Load the tasks' questions."""
    from ropeway.stages.evaluate.tasks import open_tasks  # torch and transformers

    names = profile.evaluation.tasks
    open_tasks(names, root, Workspace(root, "").tasks)
    return f"{format_count(len(names), 'task')} installed and loaded", ()
