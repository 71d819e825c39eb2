"""`make test-docs`: the marked blocks of docs/, in the order of the site, in one workspace with a small run."""

import os
import shutil
import subprocess
import sys
import time
from itertools import groupby

import pytest
from ruamel.yaml import YAML

from tests.support.main_job import BLOCK, ROOT, MainJob, make_main_job
from tests.support.shipped_params import read_shipped_params
from tools.docs.blocks import APPLY, RUN, find_blocks, find_pages

pytestmark = [pytest.mark.docs, pytest.mark.timeout(1800)]
# `make run` without the set-up: the environment of the tests has everything.
PRELUDE = 'set -euo pipefail\nmake() { command make -o .venv/.ready-run "$@"; }\n'


def make_workspace(root):
    """Return a workspace whose profile `smollm2` is the tests' small run."""
    job = make_main_job(root)
    params = read_shipped_params("smollm2")
    published = params[: params.index("\nsmollm2:\n")]
    (root / "params.yaml").write_text(published + BLOCK.replace("\ntiny:", "\nsmollm2:"), encoding="utf-8")
    shutil.copy(ROOT / "Makefile", root)
    (root / ".venv").symlink_to(sys.prefix)
    job.commit("the small run is called smollm2")
    return MainJob(root)


def apply_fragment(path, fragment):
    """Lay the keys of a fragment over the last profile of params.yaml."""
    yaml = YAML()
    tree = yaml.load(path.read_text(encoding="utf-8"))
    tree["smollm2"].update(YAML(typ="safe", pure=True).load(fragment))
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def execute(block, job):
    """Run a block; return its place and output if it fails, else an empty text."""
    if block.info.endswith(APPLY):
        apply_fragment(job.root / "params.yaml", block.code)
        return ""
    program = (
        ["bash", "-c", PRELUDE + block.code] if block.info.startswith("sh") else [sys.executable, "-c", block.code]
    )
    began = time.monotonic()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(program, cwd=job.root, env=job.environment, check=False, **output)
    print(f"--- {block.place}: {time.monotonic() - began:.0f} s\n{block.code}\n{done.stdout}", flush=True)
    return f"{block.place} ended with {done.returncode}:\n{done.stdout[-2000:]}" if done.returncode else ""


def test_marked_blocks_run_from_top_to_bottom(tmp_path):
    job = make_workspace(tmp_path / "workspace")
    job.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    job.environment["ROPEWAY_CACHE"] = str(tmp_path / "cache")
    params = job.root / "params.yaml"
    pages = [block for page in find_pages() for block in find_blocks(page)]
    ran, faults = 0, []
    for _, blocks in groupby(pages, key=lambda block: block.page):
        text = params.read_text(encoding="utf-8")
        for block in blocks:
            if block.info.endswith((f" {RUN}", APPLY)) and "not-run" not in block.info:
                faults.append(execute(block, job))
                ran += 1
        if params.read_text(encoding="utf-8") != text:  # a page applied a fragment: back to the run of before
            params.write_text(text, encoding="utf-8")
            job.repro()
    assert "\n".join(filter(None, faults)) == ""
    assert ran > 20
