"""`make test-fresh`: README's two commands on a bare Debian that has only README's packages.

1. mmdebstrap writes a Debian root: essential packages and apt, as in Debian's container images.
2. README's `apt-get install` line runs in it, and a user without privileges is added.
3. HEAD is cloned into the user's home; uncommitted changes are not tested.
4. The user runs `make run`, then the unit and contract tests (`--full`: `make test`).

Each command runs under bubblewrap, with mounts and processes of its own that end with it. pip's settings of this
machine are handed over as PIP_* variables, with the local files that they name, read-only. The last line is JSON; the
exit code is 1 if a step failed and 64 if a program is missing.
"""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

PROJECT = Path(__file__).resolve().parents[1]
MIRROR = "http://deb.debian.org/debian"
PROGRAMS = {"mmdebstrap": "mmdebstrap", "bwrap": "bubblewrap", "git": "git"}  # program -> Debian package
FREE_GIB = 8  # measured after set-up: 2.8 GiB with torch's CPU build, 6.3 GiB with its CUDA build
USER, HOME, HOST = "newcomer", "/home/newcomer", "fresh"
SHARED = "/handed-over"  # in the root, above what pip's settings name on this machine
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def readme_packages(readme: str) -> list[str]:
    """Return the Debian packages of README's `apt-get install` line.

    >>> readme_packages("On Debian: `apt-get install make g++`.")
    ['make', 'g++']

    Raises:
        ValueError: There is not exactly one such line.
    """
    (line,) = re.findall(r"`apt-get install ([^`]+)`", readme)
    return str(line).split()


def pip_variables(config: str) -> dict[str, str]:
    r"""Return the output of `pip config list` as PIP_* variables; a later section takes precedence.

    >>> pip_variables("global.cert='/a.pem'\n:env:.find-links='/w'\nglobal.find-links='/old'\n")
    {'PIP_CERT': '/a.pem', 'PIP_FIND_LINKS': '/w'}
    """
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in config.splitlines():
            key, _, value = line.partition("=")
            where, _, name = key.rpartition(".")
            if where == section:
                found[f"PIP_{name.upper().replace('-', '_')}"] = str(ast.literal_eval(value))
    return found


def hand_over(variables: dict[str, str]) -> tuple[dict[str, str], dict[Path, str]]:
    """Return the variables with the local paths that they name moved below `SHARED`, and path here -> path there.

    They move because Debian's packages write some of them, e.g. the certificates. An index is shared with the folder
    above it, which holds its files.
    """
    moved: dict[Path, str] = {}

    def move(word: str) -> str:
        rest = word.removeprefix("file://")
        path = Path(unquote(rest))
        if not (path.is_absolute() and path.exists()):
            return word
        share = path.parent if word != rest else path
        moved[share] = f"{SHARED}{share}"
        return word.replace(rest, f"{SHARED}{rest}")

    changed = {name: " ".join(move(word) for word in value.split()) for name, value in variables.items()}
    return changed, moved


@dataclass
class Machine:
    """A Debian root and what of this machine is handed over to it.

    Attributes:
        root: Folder of the root file system.
        environment: Variables of every command in it.
        shared: Path on this machine -> path in the root, read-only.
        seconds: Step -> duration, in the order of the steps.
    """

    root: Path
    environment: dict[str, str]
    shared: dict[Path, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, program: str, *, user: bool) -> list[str]:
        """Return the command that runs a bash program in the root, as root or as the user in the clone."""
        shared = {Path("/etc/resolv.conf"): "/etc/resolv.conf", Path("/sys"): "/sys", **self.shared}
        binds = [word for here, there in shared.items() for word in ("--ro-bind", str(here.resolve()), there)]
        home = HOME if user else "/root"
        variables = {"PATH": SYSTEM_PATH, "HOME": home, "USER": USER if user else "root", **self.environment}
        return [
            *("bwrap", "--bind", str(self.root), "/", "--dev", "/dev", "--proc", "/proc", *binds),
            *("--perms", "1777", "--tmpfs", "/dev/shm"),  # noqa: S108 - as on a machine; bubblewrap's own is root's
            *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", HOST),
            *("--die-with-parent", "--new-session"),
            *("--cap-add", "ALL", "--clearenv"),
            *(word for name, value in variables.items() for word in ("--setenv", name, value)),
            *("--chdir", f"{HOME}/ropeway" if user else "/"),
            *(("setpriv", "--reuid", USER, "--regid", USER, "--init-groups", "--inh-caps=-all") if user else ()),
            *("bash", "-euo", "pipefail", "-c", program),
        ]

    def step(self, name: str, program: str | list[str], *, user: bool = False) -> None:
        """Run a step in the root (a list: on this machine) and record its duration.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        command = self.command(program, user=user) if isinstance(program, str) else program
        print(f"fresh: {name}: {program if isinstance(program, str) else ' '.join(program)}", flush=True)
        began = time.monotonic()
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        finally:
            self.seconds[name] = round(time.monotonic() - began, 1)

    def read(self, program: str) -> str:
        """Return what a program in the root prints."""
        command = self.command(program, user=False)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def install_root(machine: Machine, suite: str, mirror: str) -> None:
    """Write the Debian root, with the proxies and date checks of this machine's apt."""
    dump = subprocess.run(["apt-config", "dump", "Acquire"], check=True, capture_output=True, text=True).stdout
    kept = re.findall(r"(?mi)^(Acquire::(?:https?::Proxy|Check-)[^;]*;)", dump)
    options = [f"--aptopt={line}" for line in kept]
    machine.step("root", ["mmdebstrap", "--quiet", "--variant=minbase", *options, suite, str(machine.root), mirror])
    (machine.root / "etc" / "hosts").write_text(
        f"127.0.0.1 localhost {HOST}\n", encoding="utf-8"
    )  # as an installer does
    for here, there in machine.shared.items():  # bubblewrap would create the folders above them for root alone
        target = machine.root / there.lstrip("/")
        (target if here.is_dir() else target.parent).mkdir(parents=True, exist_ok=True)


def install_packages(machine: Machine, packages: list[str]) -> None:
    """Run README's line, which asks before it installs, with `--yes`; then add the user."""
    listed = " ".join(packages)
    program = (
        f"export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; apt-get -qq install --yes {listed} > /tmp/apt 2>&1"
    )
    machine.step("packages", f"{program} || {{ tail -20 /tmp/apt; exit 1; }}")
    machine.step("user", f"useradd --create-home --shell /bin/bash {USER}")


def clone(machine: Machine, commit: str) -> None:
    """Clone the committed tree into the user's home."""
    target = machine.root / HOME.lstrip("/") / "ropeway"
    machine.step("clone", ["git", "clone", "--quiet", "--no-local", str(PROJECT), str(target)])
    machine.step("checkout", ["git", "-C", str(target), "checkout", "--quiet", "--detach", commit])
    machine.step("owner", f"chown -R {USER}:{USER} {HOME}/ropeway")


def package_settings() -> tuple[dict[str, str], dict[Path, str]]:
    """Return the variables and shared paths through which pip and uv reach packages on this machine."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True)
    if done.returncode:
        stop(f"{sys.executable} has no pip, whose settings are handed over; run `make setup` or set PYTHON")
    variables, shared = hand_over(pip_variables(done.stdout))
    variables |= {name: os.environ[name] for name in (*PROXIES, "TORCH") if name in os.environ}
    print(f"fresh: handed over: {', '.join([*variables, *map(str, shared)]) or 'nothing'}", flush=True)
    return variables, shared


def check_host(programs: dict[str, str], free_gib: int) -> None:
    """Exit with 64 if this machine lacks a program, privileges or disk; `programs`: name -> Debian package."""
    missing = [package for program, package in programs.items() if not shutil.which(program)]
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if missing:
        stop(f"programs are missing. On Debian, run `apt-get install {' '.join(missing)}`")
    if os.geteuid() != 0:
        stop("expected root, which owns the files of a Debian root; run `sudo make test-fresh`")
    if free < free_gib << 30:
        stop(f"{folder}: expected {free_gib} GiB free, found {free >> 30} GiB; set TMPDIR to another disk")


def stop(message: str) -> None:
    """Print a message and exit with 64, the exit code for a wrong option or machine."""
    print(f"fresh: {message}", file=sys.stderr, flush=True)
    sys.exit(64)


def git(*words: str) -> str:
    """Return what git prints in this checkout."""
    return subprocess.run(["git", *words], cwd=PROJECT, check=True, capture_output=True, text=True).stdout.strip()


def read_commit() -> str:
    """Return the commit of HEAD; print that uncommitted changes are not tested."""
    if changes := git("status", "--porcelain").splitlines():
        print(f"fresh: not tested: {len(changes)} uncommitted changes", flush=True)
    return git("rev-parse", "HEAD")


def main() -> None:
    """Run the steps; remove the root at every end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="bookworm", help="Debian suite, e.g. bookworm or trixie")
    parser.add_argument("--mirror", default=MIRROR)
    parser.add_argument("--full", action="store_true", help="run `make test` instead of the unit and contract tests")
    parser.add_argument("--run", metavar="PROGRAM", help="run this bash program in the clone instead of both commands")
    options = parser.parse_args()
    check_host(PROGRAMS, FREE_GIB)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commit = read_commit()
    packages = readme_packages(git("show", f"{commit}:README.md"))
    with tempfile.TemporaryDirectory(prefix="ropeway-fresh-") as parent:
        machine = Machine(Path(parent) / "root", *package_settings())
        with reported(machine, {"commit": commit, "suite": options.suite, "packages": packages}) as facts:
            install_root(machine, options.suite, options.mirror)
            install_packages(machine, packages)
            facts |= {"debian": machine.read("cat /etc/debian_version"), "python": machine.read("python3 --version")}
            clone(machine, commit)
            if options.run:
                machine.step("program", options.run, user=True)
            else:
                machine.step("make run", "make run", user=True)
                second = "make test" if options.full else "make test-unit"
                machine.step(second, second, user=True)


@contextmanager
def reported(machine: Machine, facts: dict[str, object]) -> Iterator[dict[str, object]]:
    """Context manager: print facts and the seconds of each step as JSON at the end; exit with 1 if a step failed."""
    result: dict[str, object] = {"ok": False, **facts}
    try:
        yield result
        result["ok"] = True
    except subprocess.CalledProcessError:
        result["failed"] = list(machine.seconds)[-1]
    finally:
        print(json.dumps({**result, "seconds": machine.seconds}), flush=True)
    if not result["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
