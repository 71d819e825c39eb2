"""Frozen inputs for a workspace whose stages are called in this process: what `ropeway stage identity` would write."""

import functools
from pathlib import Path

import ropeway
from ropeway.config.frozen import PARAMS_FILE, freeze, read_texts, write_values
from ropeway.config.load_params import load_profile
from ropeway.config.stages import READS
from ropeway.runtime.code_digests import Digests
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch import stage as fetch
from ropeway.stages.fetch.sources import source_identity


@functools.cache
def code_digests(stage):
    """Return what `identity` freezes of a stage's code."""
    return Digests(Path(ropeway.__file__).parent).modules(stage)


def freeze_inputs(root, name=None, *, profile=None, **facts):
    """Freeze a workspace's params and the files they name; return the workspace.

    Args:
        root: The folder of params.yaml.
        name: The profile; default: the chosen one.
        profile: Other values than the file's.
        facts: Identities, e.g. `sources={...}`, where a stage reads them; by default no source or base is asked.
    """
    text = (root / PARAMS_FILE).read_text(encoding="utf-8")
    name, stated = load_profile(root / PARAMS_FILE, name, text=text)
    profile = profile or stated
    named = profile.evaluation
    texts = {
        "contamination": read_texts(root, profile.contamination.prompts, key="contamination.prompts"),
        "deepspeed": read_texts(root, [profile.deepspeed_config], key="deepspeed_config"),
        "prompts": read_texts(root, [named.prompts, named.sampling], key="evaluation"),
    }
    empty = {"base": {}, "sources": {}, "tasks": {}, "code-train": {}}
    freeze(Workspace(root, name), profile, text, {**empty, **texts, **facts})
    return Workspace(root, name)


def freeze_sources(workspace, profile):
    """Freeze what fetch reads, and nothing else."""
    sources = {name: source_identity(one, workspace.root) for name, one in profile.sources.items()}
    write_values(workspace, "", {"sources": sources})


def run_fetch(workspace, profile):
    """Ask the sources what they are, then fetch: both as DVC does it."""
    freeze_sources(workspace, profile)
    fetch.run(workspace, profile.reading(READS["fetch"]))
