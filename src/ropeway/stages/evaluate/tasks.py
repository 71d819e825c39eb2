"""Tasks of lm-evaluation-harness, through its HF backend and the model's chat template.

The only module that imports lm_eval (the extra `eval`), which is needed only where params name tasks. Tasks are looked
up in `configs/tasks/` of the workspace, with data file paths relative to the workspace, then among the harness's own.
Written for lm_eval 0.4.13.
"""

import contextlib
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, SupportsFloat

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.models.open_model import rope_of
from ropeway.models.rope import longest_independent
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.stages.evaluate.samples import stop_ids
from ropeway.storage.hub import check_endpoint

_KEY = "params.yaml: evaluation.tasks"


class TaskIndex(Protocol):
    """The part of the harness's TaskManager that is used here."""

    task_index: Mapping[str, object]
    all_tasks: Sequence[str]
    all_subtasks: Sequence[str]

    def load(self, names: list[str]) -> object:
        """Load tasks and their data."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that exist and whose data can be loaded."""

    names: tuple[str, ...]  # of tasks, groups or tags, as in params
    manager: TaskIndex  # the harness's index of tasks
    root: Path  # paths of data files are relative to this folder


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The scores of one model on one task."""

    version: str  # of the task; scores of different versions cannot be compared
    shots: int  # few-shot examples per question
    n: int  # number of questions
    metrics: Mapping[str, float]  # e.g. `acc`, and `<metric>_stderr` where the harness computes it
    lower_is_better: tuple[str, ...] = ()  # metrics such as perplexities, without the name of a filter


def harness_version(names: Sequence[str]) -> str:
    """Return the harness's version.

    Raises:
        ConfigError: Tasks are named and the extra `eval` is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{_KEY} names {', '.join(names)}, but lm-evaluation-harness is not installed. Run `make setup "
            "EXTRAS=eval` (or `python3 requirements/install.py eval`), or set tasks: []"
        ) from None


def open_tasks(names: Sequence[str], root: Path, folder: Path) -> Tasks | None:
    """Return the tasks that params name, each loaded once, so that errors appear before a model is measured.

    `folder` has the workspace's own tasks as YAML; they override the harness's tasks of the same name.

    Raises:
        ConfigError: The harness is not installed, a name is unknown, or a dataset is missing and may not be downloaded.
        TemporaryError: A dataset could not be downloaded.
    """
    if not names:
        return None
    harness_version(names)
    from huggingface_hub.constants import HF_HUB_OFFLINE

    check_endpoint()
    tasks = Tasks(tuple(names), index_tasks(names, folder), root)
    for name in names:
        if name not in tasks.manager.task_index:
            near = get_close_matches(name, tasks.manager.all_tasks, n=3)
            maybe = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{_KEY}: task {name} does not exist in {folder} or in the harness{maybe}")
        try:
            with contextlib.chdir(root):
                tasks.manager.load([name])
        except OSError as error:  # includes ConnectionError and DatasetNotFoundError of datasets
            message = f"{_KEY}: the data of task {name} cannot be loaded: {type(error).__name__}: {error}"
            if HF_HUB_OFFLINE:
                remedy = "HF_HUB_OFFLINE is set: run once without it, which fills the cache of `datasets`"
                raise ConfigError(f"{message}. {remedy}") from None
            if isinstance(error, FileNotFoundError):
                raise ConfigError(f"{message}. Paths of data files are relative to {root}") from None
            raise TemporaryError(f"{message}. Run the same command again once the network works") from None
    return tasks


def index_tasks(names: Sequence[str], folder: Path) -> TaskIndex:
    """Return the index of the workspace's tasks, and of the harness's 14,000 only where a name needs them."""
    from lm_eval.tasks import TaskManager

    options: dict[str, object] = {}
    if folder.is_dir():
        options = {"include_path": folder}
        own: TaskIndex = TaskManager(**options, include_defaults=False)  # 0.1 s instead of 8 s with all tasks
        if set(names) <= set(own.all_subtasks):  # tasks only: a group may contain tasks of the harness
            return own
    every: TaskIndex = TaskManager(**options)
    return every


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
) -> dict[str, TaskScore]:
    """Return task -> scores of a model, including the aggregate scores of groups.

    Under dynamic RoPE scaling the batch size is 1, since the longest row of a batch decides the scaling of all. The
    harness truncates prompts of more than `max_length` tokens on the left, including BOS. It seeds the global random
    generators; torch's state is restored.

    Raises:
        DataError: A score is not finite.
    """
    import torch
    from lm_eval import simple_evaluate

    one_by_one = longest_independent(model.config.rope_parameters, model.config.max_position_embeddings) is not None
    # rope_of: under dynamic scaling longer rows that this process measured before have changed the frequencies.
    with rope_of(model), torch.random.fork_rng(), contextlib.chdir(tasks.root):
        found = simple_evaluate(
            wrap_for_harness(model, tokenizer, batch_size=1 if one_by_one else batch_size, max_length=max_length),
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            apply_chat_template=True,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {
        name: TaskScore(
            version=str(found["versions"].get(name)),
            shots=int(found["n-shot"].get(name, 0)),
            n=int(line["sample_len"]),
            metrics=read_metrics(name, line),
            lower_is_better=tuple(
                sorted(metric for metric, higher in found["higher_is_better"].get(name, {}).items() if higher is False)
            ),
        )
        for name, line in sorted(found["results"].items())
    }


def wrap_for_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int
) -> object:
    """Return the model as the harness's HFLM, so that every input starts with exactly one BOS.

    The chat template adds BOS. Where the harness uses no template (`loglikelihood_rolling`, an empty context) it adds
    BOS itself. So the tokenizer must not add one: by default rolling windows start with two (lm_eval 0.4.13).
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    # Otherwise transformers takes settings that a task does not have from the folder's generation_config.json.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, add_bos_token=False
    )


def read_metrics(task: str, line: Mapping[str, object]) -> dict[str, float]:
    """Return the scores of one task of the harness's results, six decimals; a filter is part of the metric's name.

    >>> read_metrics("t", {"alias": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1.0})
    {'acc': 0.5, 'f1,strict': 1.0}

    Raises:
        DataError: A score is not finite.
    """
    # Keys are `name,filter`; the value is `N/A` where a metric has no standard error.
    scores = {
        key.removesuffix(",none"): float(value)
        for key, value in line.items()
        if "," in key and isinstance(value, SupportsFloat)
    }
    for key, value in scores.items():
        if not math.isfinite(value):
            raise DataError(
                f"task {task}: {key} is {value}, expected a finite number. Check the model's losses, or remove the task"
            )
    return {key: round(value, 6) for key, value in scores.items()}


def report_tasks(found: Mapping[str, Mapping[str, TaskScore]]) -> dict[str, object]:
    """Return the tasks section of eval.json: task -> version, shots, n, directions, and the metrics of each model."""
    first = next(iter(found.values()))
    return {
        name: {
            "version": one.version,
            "shots": one.shots,
            "n": one.n,
            "lower_is_better": list(one.lower_is_better),
            **{model: dict(scores[name].metrics) for model, scores in found.items()},
        }
        for name, one in first.items()
    }
