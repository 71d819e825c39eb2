"""`ropeway doctor`: looks at everything a run will need, and says for each thing that is wrong how to fix it."""

import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from ropeway.config.load_params import load_profile
from ropeway.config.stages import READS
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.cleanup import format_sizes
from ropeway.orchestration.prefect_server import DEFAULT_PORT, find_server, is_answering, is_free
from ropeway.orchestration.stage_process import base_identity
from ropeway.planning.plan import plan_run
from ropeway.runtime.devices import count_ranks, detect_gpus, list_gpus
from ropeway.runtime.errors import ConfigError, RopewayError
from ropeway.runtime.launcher import LOOPBACK
from ropeway.runtime.op_build import BUFFERS, check_shared_memory
from ropeway.runtime.terminal import Paragraph, format_count, show
from ropeway.runtime.tracking import choose_modes
from ropeway.runtime.workspace import Workspace
from ropeway.storage import FileStore, Store, open_store

_LIBRARIES = ("torch", "deepspeed", "transformers", "prefect", "dvc", "boto3", "wandb")
_GIB = 2**30
_PIN = re.compile(r"([A-Za-z0-9_.-]+)==(\S+)")
REMOTE = "store"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look came to.

    Attributes:
        state: `ok`; `note`: a run works, but know this; `wrong`: it will fail, or something will be lost.
        fix: What to do; empty where all is well.
    """

    about: str
    state: Literal["ok", "note", "wrong"]
    words: str
    fix: str = ""


def run_checks(root: Path, profile: str | None = None) -> list[Finding]:
    """Return every finding, in the order in which a run of a profile (None: the selected one) would meet it."""
    root = root.resolve()
    machine = (_python, _compiler, _shared_memory, _libraries, _gpus)
    of_profile = (_params, _precision, _base, _disk)
    findings = [finding for look in machine for finding in _safely(look, root)]
    findings += [finding for look in of_profile for finding in _safely(look, root, profile)]
    looks = (_use, _git, _remote, _registry, _prefect, _port, _wandb)
    return findings + [finding for look in looks for finding in _safely(look, root)]


def fix_remote(root: Path, remote: str | None) -> list[str]:
    """Create the DVC remote, or switch verification on in the one that is there; return what was done, in words.

    Raises:
        ConfigError: There is no remote and no address was given for one, or it cannot be used.
    """
    root = root.resolve()
    name, remotes = graph.read_remotes(root)
    done = []
    if remote and not name:
        if fault := _overlap(remote, Workspace(root, "").registry_url):
            raise ConfigError(fault)
        graph.configure_remote(root, "add", "--default", REMOTE, remote)
        name, remotes = graph.read_remotes(root)
        done.append(f"DVC remote '{REMOTE}' is {remote}; commit .dvc/config")
    if not name:
        fix = "name one: `ropeway doctor --fix --remote s3://bucket/prefix`"
        raise ConfigError(f"there is no DVC remote to fix; {fix}")
    if not remotes[name].get("verify"):
        # DVC does not hash what comes in unless it is told to (dvc 3.67.1).
        graph.configure_remote(root, "modify", name, "verify", "true")
        done.append(f"DVC remote '{name}' now verifies pulls; commit .dvc/config")
    return done


def print_findings(findings: list[Finding]) -> None:
    """Print findings, each with what to do about it, and how many are wrong."""
    signs = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
    width = max(len(finding.about) for finding in findings)
    lead = width + 9
    for finding in findings:
        show(Paragraph(f"{signs[finding.state]}  {finding.about:<{width}}  {finding.words}", indent=lead))
        if finding.fix:
            show(Paragraph(f"{'':{lead}}fix: {finding.fix}", indent=5))
    wrong = sum(finding.state == "wrong" for finding in findings)
    show("", f"{format_count(wrong, 'thing')} to fix before a run" if wrong else "nothing to fix before a run")


def _safely(look: Callable[..., Iterator[Finding]], root: Path, *more: str | None) -> Iterator[Finding]:
    """Yield a look's findings; an error of ours is a finding too, and its message holds the remedy."""
    try:
        yield from look(root, *more)
    except RopewayError as error:
        yield Finding(look.__name__.strip("_").replace("_", " "), "wrong", str(error))


def _python(_root: Path) -> Iterator[Finding]:
    version = sys.version.split()[0]
    if sys.version_info < (3, 11):  # noqa: UP036 - the reason for looking
        yield Finding("python", "wrong", version, "Python 3.11 or newer: `make setup PYTHON=python3.11`")
    else:
        yield Finding("python", "ok", f"{version}, {sys.prefix}")


def _compiler(_root: Path) -> Iterator[Finding]:
    name = os.environ.get("CXX", "c++")
    if path := shutil.which(name):
        yield Finding("compiler", "ok", path)
    else:
        fix = "Debian: `apt-get install g++`; Fedora: `dnf install gcc-c++`; or set CXX"
        yield Finding("compiler", "note" if list_gpus() else "wrong", f"no `{name}` on PATH", fix)


def _shared_memory(_root: Path) -> Iterator[Finding]:
    if not list_gpus():
        check_shared_memory(count_ranks())
        yield Finding("shared memory", "ok", f"{shutil.disk_usage(BUFFERS).free / _GIB:,.1f} GiB free in {BUFFERS}")


def _libraries(root: Path) -> Iterator[Finding]:
    """Compare with the lock files: other versions may work, but were not tested."""
    tested = read_pins(root / "requirements")
    for name in _LIBRARIES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "wrong", "not installed", "`make setup`")
            continue
        other = tested.get(name, version.partition("+")[0]) != version.partition("+")[0]
        words = f"{version}; tested with {tested[name]}" if other else version
        fix = "`make setup` installs the tested versions" if other else ""
        yield Finding(name, "note" if other else "ok", words, fix)


def read_pins(folder: Path) -> dict[str, str]:
    """Return name -> version of the lock files in a folder."""
    lines = (line for path in sorted(folder.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines())
    return {found[1]: found[2] for line in lines if (found := _PIN.match(line))}


def _gpus(_root: Path) -> Iterator[Finding]:
    cards, listed = detect_gpus(), list_gpus()
    if cards:
        names = ", ".join(f"{card.name} {card.memory_bytes / _GIB:.0f} GiB" for card in cards)
        yield Finding("GPUs", "ok", f"{len(cards)}: {names}")
    elif listed:
        fix = "the driver: `nvidia-smi` must answer; CUDA_VISIBLE_DEVICES must name cards that are there"
        yield Finding("GPUs", "wrong", f"{len(listed)} are there, the driver does not answer", fix)
    else:
        yield Finding("GPUs", "ok", f"none: training uses {format_count(count_ranks(), 'rank')} on the CPU")


def _params(root: Path, profile: str | None) -> Iterator[Finding]:
    name, _ = load_profile(root / "params.yaml", profile)
    yield Finding("params", "ok", f"profile {name}")


def _precision(root: Path, profile: str | None) -> Iterator[Finding]:
    _, chosen = load_profile(root / "params.yaml", profile)
    if chosen.dtype == "fp16" and not list_gpus():
        fix = "run it on a machine with GPUs, or set dtype: bf16; `ropeway rehearse` tries its stages here"
        yield Finding("precision", "wrong", "the profile trains in fp16, which a CPU cannot", fix)
    else:
        yield Finding("precision", "ok", chosen.dtype)


def _base(root: Path, profile: str | None) -> Iterator[Finding]:
    _, chosen = load_profile(root / "params.yaml", profile)
    base_identity(chosen.reading(READS["base"]), root)
    name = "a new model" if chosen.base.kind == "scratch" else chosen.model_name
    yield Finding("base", "ok", f"{name} ({chosen.base.kind})")


def _disk(root: Path, profile: str | None) -> Iterator[Finding]:
    name, chosen = load_profile(root / "params.yaml", profile)
    free = shutil.disk_usage(root).free
    needed = plan_run(Workspace(root, name), chosen, ranks=count_ranks()).disk_bytes
    words = f"{free / _GIB:,.1f} GiB free; a complete run of {name} needs {needed / _GIB:,.1f} GiB"
    if free < needed:
        fix = "free some, or lower save_total_limit; `ropeway plan` has the parts"
        yield Finding("disk", "wrong", words, fix)
    else:
        yield Finding("disk", "ok", words)


def _use(root: Path) -> Iterator[Finding]:
    yield Finding("on disk", "ok", f"{format_sizes(root)}; `ropeway clean` shows what can go")


def _git(root: Path) -> Iterator[Finding]:
    from ropeway.orchestration.revision import read_revision

    revision = read_revision(root)
    if not revision.commit:
        fix = "`git init`, commit: what no commit makes never becomes production"
        yield Finding("git", "wrong" if not (root / ".git").exists() else "note", "no commit here", fix)
    elif revision.dirty:
        words = f"{revision}: uncommitted changes in {', '.join(revision.dirty[:3])}"
        yield Finding("git", "note", words, "commit before the run whose model is to become production")
    else:
        yield Finding("git", "ok", str(revision))


def _remote(root: Path) -> Iterator[Finding]:
    name, remotes = graph.read_remotes(root)
    if not name:
        fix = "`ropeway doctor --fix --remote s3://bucket/prefix` (or a folder elsewhere)"
        yield Finding("DVC remote", "note", "none: outputs exist only on this machine", fix)
        return
    url = str(remotes[name].get("url"))
    graph.check_remote_is_encrypted(name, remotes)
    if fault := _overlap(url, Workspace(root, "").registry_url):
        yield Finding("DVC remote", "wrong", f"'{name}' {fault}", "give one of them a prefix of its own")
    if remotes[name].get("verify"):
        yield Finding("DVC remote", "ok", f"'{name}' {url}, pulls are verified")
    else:
        fix = f"`ropeway doctor --fix`, or `dvc remote modify {name} verify true`"
        words = f"'{name}' {url} is not verified on pull (DVC's default): damage is not noticed"
        yield Finding("DVC remote", "wrong", words, fix)


def _registry(root: Path) -> Iterator[Finding]:
    yield check_store(Workspace(root, "").registry_url)


def check_store(url: str) -> Finding:
    """Write one key of a registry's store twice and delete it: of two writers only one may win.

    Args:
        url: The registry. A folder that does not exist is not created; the check is made in the folder above.

    Raises:
        ConfigError: The store is not writable, or the URL is invalid.
        TemporaryError: The store does not answer.
    """
    store = open_store(url)
    if isinstance(store, FileStore):
        above = next(folder for folder in (store.root, *store.root.parents) if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            return Finding(
                "registry", "wrong", f"{above} cannot be written to", "correct ROPEWAY_REGISTRY or the rights"
            )
        # A folder of its own, removed as a whole: a store keeps the folders of keys that were deleted.
        with tempfile.TemporaryDirectory(dir=above, prefix=".doctor-") as scratch:
            works = _keeps_first(FileStore(Path(scratch)))
    else:
        works = _keeps_first(store)
    if works:
        return Finding("registry", "ok", f"{store.url}; of two simultaneous writes the first wins")
    fix = "use a store that honours If-None-Match, or a folder, file:///…"
    return Finding("registry", "wrong", f"{store.url}: two simultaneous writes both succeed, so one would be lost", fix)


def _keeps_first(store: Store) -> bool:
    key = f"doctor/{uuid.uuid4().hex}.json"
    try:
        return store.put_if_absent(key, b"{}") and not store.put_if_absent(key, b"[]") and store.get(key) == b"{}"
    finally:
        store.delete(key)


def _prefect(root: Path) -> Iterator[Finding]:
    stated = os.environ.get("PREFECT_API_URL")
    if stated and not is_answering(stated):
        fix = "start it, or unset PREFECT_API_URL; `ropeway run --no-prefect` needs none"
        yield Finding("Prefect", "wrong", f"PREFECT_API_URL is {stated}, which does not answer", fix)
    elif url := stated or find_server(root):
        yield Finding("Prefect", "ok", f"a server answers at {url}")
    else:
        yield Finding("Prefect", "ok", "no server runs; a run starts a temporary one. `ropeway server` shows the runs")


def _port(root: Path) -> Iterator[Finding]:
    stated = os.environ.get("PREFECT_API_URL", "")
    ours = find_server(root) or (stated if f":{DEFAULT_PORT}/" in stated else None)
    if ours or is_free(LOOPBACK, DEFAULT_PORT):
        yield Finding(
            "ports",
            "ok",
            f"{ours} is the server that this workspace uses" if ours else f"{DEFAULT_PORT} is free for the UI",
        )
    else:
        fix = f"`ropeway server --port {DEFAULT_PORT + 1}`"
        yield Finding("ports", "note", f"another program has {DEFAULT_PORT}", fix)


def _wandb(_root: Path) -> Iterator[Finding]:
    modes = choose_modes(os.environ, home=Path.home())
    words = {
        (): "off (WANDB_MODE=disabled)",
        ("offline",): "offline: kept in the run's folder, `wandb sync` sends it later",
    }.get(modes, "online, offline if it does not answer")
    yield Finding("W&B", "ok", words)


def _overlap(remote: str, registry: str) -> str | None:
    """Return what is wrong when one place lies in the other: garbage collection of one would take the other's."""
    a, b = (url.removeprefix("file://").rstrip("/") + "/" for url in (remote, registry))
    return f"and the registry share {min(a, b, key=len)}" if a.startswith(b) or b.startswith(a) else None
