"""The server of transformers answers as the package that it serves; `make test-serve`."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ropeway.orchestration.serving_check import check_server
from ropeway.runtime.launcher import free_port
from ropeway.stages.package.expected_answers import expected_answers
from tests.support.tiny_run import make_package, make_run

pytestmark = pytest.mark.serve
START_SECONDS = 300


@contextmanager
def transformers_server(folder, log):
    """Yield the URL of a server of this folder's model."""
    port = free_port()
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(folder), "--host", "127.0.0.1"]
    with log.open("w") as said:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], stdout=said, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            until = time.monotonic() + START_SECONDS
            while not _is_up(f"http://127.0.0.1:{port}"):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def _is_up(url):
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"), "package")
    make_package(workspace, profile)
    return workspace.package


def test_the_server_of_transformers_answers_as_the_package(package, tmp_path):
    expected = expected_answers(package)
    assert len(expected) >= 2
    with transformers_server(package, tmp_path / "log.txt") as url:
        checks = check_server(url, expected, model=str(package))
    print(*checks, sep="\n")
    assert not [check for check in checks if check.outcome == "failed"]
    assert [check.outcome for check in checks if "greedy answer" in check.name] == ["passed"] * len(expected)


def test_a_package_with_another_template_is_noticed(package, tmp_path):
    expected = expected_answers(package)
    other = shutil.copytree(package, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template + "{{ 'x' }}")
    with transformers_server(other, tmp_path / "log.txt") as url:
        checks = check_server(url, expected, model=str(other))
    assert [check for check in checks if check.outcome == "failed"]
