"""Tasks of lm-evaluation-harness on an opened model, through its HF backend and this model's chat template.

The only module that knows lm_eval, which is the extra `eval` and needed by nobody who names no task. A task is found
in `configs/tasks/` of the workspace, where paths of data files count from the workspace, or among the harness's own.
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

_KEY = "params.yaml: evaluation.tasks"


class TaskIndex(Protocol):
    """What is used of the harness's TaskManager."""

    task_index: Mapping[str, object]
    all_tasks: Sequence[str]
    all_subtasks: Sequence[str]

    def load(self, names: list[str]) -> object:
        """Open tasks and their data."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks whose names and data were found."""

    names: tuple[str, ...]  # as params name them: tasks, groups or tags
    manager: TaskIndex  # the harness's index of all that it can open
    root: Path  # data files' paths count from here


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What one model came to in one task."""

    version: str  # the task's own version; figures of two versions cannot be compared
    shots: int  # solved examples that stand before each question
    n: int  # questions asked
    metrics: Mapping[str, float]  # `acc` and such, `<metric>_stderr` beside each that has one


def find_harness(names: Sequence[str]) -> str:
    """Return the harness's version.

    Raises:
        ConfigError: Tasks are named and the extra `eval` is not installed.
    """
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{_KEY} names {', '.join(names)}, and lm-evaluation-harness is not installed: `make setup EXTRAS=eval` "
            "installs it (or `python3 requirements/install.py eval`). Or write tasks: []"
        ) from None


def open_tasks(names: Sequence[str], root: Path, folder: Path) -> Tasks | None:
    """Return the tasks that params name, each opened once so that what is missing is said before a model is measured.

    `folder` has the workspace's own tasks, YAML of the harness; they win over its own of the same name.

    Raises:
        ConfigError: The harness is not installed, a name is unknown, or a data set is not there and may not be fetched.
        TemporaryError: A data set could not be fetched.
    """
    if not names:
        return None
    find_harness(names)
    from huggingface_hub.constants import HF_HUB_OFFLINE

    tasks = Tasks(tuple(names), index_tasks(names, folder), root)
    for name in names:
        if name not in tasks.manager.task_index:
            near = get_close_matches(name, tasks.manager.all_tasks, n=3)
            maybe = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{_KEY}: {name} is neither in {folder} nor among the harness's own{maybe}")
        try:
            with contextlib.chdir(root):
                tasks.manager.load([name])
        except OSError as error:  # of datasets' errors too: ConnectionError, DatasetNotFoundError
            told = f"{_KEY}: the data of {name} cannot be read: {type(error).__name__}: {error}"
            if HF_HUB_OFFLINE:
                remedy = "HF_HUB_OFFLINE is set: fetch it once without, it stays in the cache of `datasets`"
                raise ConfigError(f"{told}. {remedy}") from None
            if isinstance(error, FileNotFoundError):
                raise ConfigError(f"{told}. Paths of data files count from {root}") from None
            raise TemporaryError(f"{told}. Run it again when the network is back") from None
    return tasks


def index_tasks(names: Sequence[str], folder: Path) -> TaskIndex:
    """Return the harness's index: of the workspace's tasks alone if all names are theirs, else of its 14,000 too."""
    from lm_eval.tasks import TaskManager

    options: dict[str, object] = {}
    if folder.is_dir():
        options = {"include_path": folder}
        own: TaskIndex = TaskManager(**options, include_defaults=False)  # 0.1 s; all of them took 8 s
        if set(names) <= set(own.all_subtasks):  # a group may hold tasks of the harness, a task cannot
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
    """Return task -> what a model came to, groups' own figures among them.

    Under dynamic scaling questions go one by one, since it stretches a whole batch by its longest row. Of a prompt
    longer than `max_length` tokens the harness leaves out the beginning, and BOS with it. It seeds the global
    generators; torch's is restored.

    Raises:
        DataError: A figure is not finite.
    """
    import torch
    from lm_eval import simple_evaluate

    one_by_one = longest_independent(model.config.rope_parameters, model.config.max_position_embeddings) is not None
    # Own frequencies: under dynamic scaling longer rows measured before, by this process and no other, change them.
    with rope_of(model), torch.random.fork_rng(), contextlib.chdir(tasks.root):
        found = simple_evaluate(
            wrap(model, tokenizer, batch_size=1 if one_by_one else batch_size, max_length=max_length),
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
        )
        for name, line in sorted(found["results"].items())
    }


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int) -> object:
    """Return a model as the harness asks it, so that exactly one BOS stands in front of whatever it reads.

    BOS comes from the chat template, and where the harness uses none (`loglikelihood_rolling`, an empty context) it
    puts one itself. So its tokenizer must add none: left to itself, rolling windows began with two (lm_eval 0.4.13).
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    # Else transformers fills what a task leaves open from the folder's own generation settings.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, add_bos_token=False
    )


def read_metrics(task: str, line: Mapping[str, object]) -> dict[str, float]:
    """Return the figures of a line of the harness's results, six decimals; a filter stays in the name if there is one.

    >>> read_metrics("t", {"alias": "t", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1.0})
    {'acc': 0.5, 'f1,strict': 1.0}

    Raises:
        DataError: A figure is not finite.
    """
    # Metrics are `name,filter`; `N/A` stands where a metric has no standard error.
    figures = {
        key.removesuffix(",none"): float(value)
        for key, value in line.items()
        if "," in key and isinstance(value, SupportsFloat)
    }
    for key, value in figures.items():
        if not math.isfinite(value):
            raise DataError(f"task {task}: {key} is {value}. Look at the model's losses, or leave the task out")
    return {key: round(value, 6) for key, value in figures.items()}


def report_tasks(found: Mapping[str, Mapping[str, TaskScore]]) -> dict[str, object]:
    """Return eval.json's part, of model -> task -> score: task -> version, shots, n, and the metrics of each model."""
    first = next(iter(found.values()))
    return {
        name: {
            "version": one.version,
            "shots": one.shots,
            "n": one.n,
            **{model: dict(scores[name].metrics) for model, scores in found.items()},
        }
        for name, one in first.items()
    }
