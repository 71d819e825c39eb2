"""The flow that a Prefect worker runs: it checks out the caller's commit and executes one stage there.

Its page has the lines of the stage. An artifact, rewritten every few seconds, is the sign of life that the calling run
looks for, and carries the stage's progress. The result is a flow-run input named `result`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Failed

from ropeway.orchestration.dvc_stage import MARGIN_SECONDS, LineWriter, end_supervised, progress_path
from ropeway.orchestration.remote.clones import open_clone
from ropeway.orchestration.remote.request import StageRequest
from ropeway.orchestration.revision import code_environment
from ropeway.orchestration.run_page import PageLog
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.git import ask_git
from ropeway.runtime.manifest import Json
from ropeway.runtime.progress import read_last_record

FLOW = "stage"
ENTRYPOINT = f"{__name__}.run_in_pool"
RESULT = "result"
SIGN_OF_LIFE = "ropeway-stage"
_BEAT_SECONDS = 3.0
_FLUSH_SECONDS = 20.0


@flow(name=FLOW, validate_parameters=False, persist_result=False)
def run_in_pool(step: str, profile: str, request: str) -> State[object]:
    """Execute one request on this machine.

    Args:
        step: The stage, or `publish`.
        profile: The profile.
        request: The `StageRequest` as JSON.
    """
    flow_run = str(runtime.flow_run.id)
    log = PageLog(str(PREFECT_API_URL.value()))

    def say(line: str) -> None:
        print(line, flush=True)
        log.add(step, line, flow_run=flow_run, task_run=None)

    life = SignOfLife(UUID(flow_run))
    try:
        with life.shown():
            result: dict[str, Any] = dict(_execute(StageRequest.from_json(request), life, say))
    except RopewayError as error:  # the clone, or a request of another version
        say(str(error))
        result = {"error": {"exit_code": error.exit_code, "message": str(error)}}
    finally:
        lost = log.close(_FLUSH_SECONDS).get(step, 0)
    result["lost_lines"] = lost
    with get_client(sync_client=True) as client:
        client.create_flow_run_input(UUID(flow_run), RESULT, json.dumps(result))
    if life.is_cancelled:
        return Cancelled(message=f"{step} of {profile} was stopped; it resumes from its last checkpoint")
    if failure := result.get("error"):
        return Failed(message=f"exit code {failure['exit_code']}: {failure['message']}")
    return Completed(message=f"{step} of {profile}: {result.get('outcome', 'done')} on {result['host']}")


class SignOfLife:
    """Rewrites an artifact of this flow run every few seconds, and notices that the run is to be cancelled."""

    def __init__(self, flow_run: UUID) -> None:
        """Show nothing yet."""
        self._flow_run = flow_run
        self._artifact: UUID | None = None
        self._done = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._root: Path | None = None
        self._step = ""
        self.is_cancelled = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it while the block runs."""
        thread = threading.Thread(target=self._beat, name="sign-of-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(_BEAT_SECONDS)

    def watch(self, child: "subprocess.Popen[str]", root: Path, step: str) -> None:
        """End `child` if the run is cancelled, and show the progress of its stage."""
        self._root, self._step, self._child = root, step, child
        if self.is_cancelled:
            child.terminate()

    def _beat(self) -> None:
        settings = {PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(settings), get_client(sync_client=True) as client:
            while True:
                with suppress(httpx.HTTPError, PrefectException):
                    now = datetime.now(UTC).isoformat(timespec="seconds")
                    text = json.dumps({"at": now, "host": socket.gethostname(), **self._progress()})
                    if self._artifact is None:
                        wanted = ArtifactCreate(
                            key=SIGN_OF_LIFE, type="markdown", data=f"`{text}`", flow_run_id=self._flow_run
                        )
                        self._artifact = client.create_artifact(wanted).id
                    else:
                        client.update_artifact(self._artifact, ArtifactUpdate(data=f"`{text}`"))
                    state = client.read_flow_run(self._flow_run).state
                    if not self.is_cancelled and state and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                        self.is_cancelled = True
                        if self._child:
                            self._child.terminate()  # the supervisor, which lets the ranks save
                if self._done.wait(_BEAT_SECONDS):
                    return

    def _progress(self) -> Json:
        record = read_last_record(progress_path(self._root, self._step)) if self._root else None
        return {"progress": record} if record else {}


def _execute(request: StageRequest, life: SignOfLife, say: LineWriter) -> Json:
    with open_clone(request) as root, tempfile.TemporaryDirectory(prefix="ropeway-worker-") as folder:
        say(f"{request.step} at {request.commit[:12]} in {root}")
        source, target = Path(folder, "request.json"), Path(folder, "result.json")
        source.write_text(request.to_json(), encoding="utf-8")
        record = root / ".work" / f"{request.step}.worker.json"
        record.parent.mkdir(exist_ok=True)
        supervisor = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(record)]
        supervisor += ["--leader", str(os.getpid()), "--margin", str(2 * MARGIN_SECONDS), "--"]
        command = [*supervisor, sys.executable, "-m", "ropeway.orchestration.remote.worker", str(source), str(target)]
        child = subprocess.Popen(
            command,
            cwd=root,
            env=_environment(root, request),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a signal to this process's group must not reach DeepSpeed's launcher
        )
        try:
            life.watch(child, root, request.step)
            for line in child.stdout or ():
                say(line.rstrip("\n"))
        finally:
            end_supervised(child, record, margins=3)  # the stage saves a checkpoint
        if target.is_file():
            result: Json = json.loads(target.read_text(encoding="utf-8"))
            return result
        how = f"exit code {child.returncode}"
        return {"error": {"exit_code": 75, "message": f"{request.step} was ended on the worker ({how}); it resumes"}}


def _environment(root: Path, request: StageRequest) -> Mapping[str, str]:
    """Return this process's environment with the clone's code first, and the caller's registry if it named one."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT__")}
    found |= code_environment(Path(ask_git(root, "rev-parse", "--show-toplevel") or root))
    found["PYTHONUNBUFFERED"] = "1"
    if request.registry:
        found["ROPEWAY_REGISTRY"] = request.registry
    return found
