"""Installs the environment: `python3 requirements/install.py [EXTRA ...]`, which `make setup` and all targets call.

1. `.venv` is created with this Python if it does not exist.
2. uv is taken from PATH, else installed into `.venv` (uv.txt); if neither works, pip is used, which is slower.
3. run.txt and the file of each extra are installed; the sha256 of every downloaded file is verified.
4. torch (torch.txt) is installed: a wheel of that version in a folder of pip's `find-links`; else, on Linux without
   an NVIDIA device, the CPU build of download.pytorch.org; else the build of the index. `--torch cpu|cuda|index`
   overrides this, e.g. `cuda` on a login node without GPUs.
5. The project is installed in editable mode.

Index, extra indexes, find-links, trusted hosts and certificate come from pip's settings (`pip config list` and PIP_*
variables). This script uses only the standard library.
"""

from __future__ import annotations  # an older Python must be able to print that it is too old

import argparse
import ast
import locale
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import NoReturn
from urllib.parse import urlsplit
from urllib.request import url2pathname

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Names of wheels for this Python and machine: their Python tag and the end of their platform tag.
TAGS = f"*cp{sys.version_info.major}{sys.version_info.minor}-*_{machine()}"
# pip's setting -> uv's option. Source: pip 26 `pip config`, uv 0.13 `uv pip install --help`.
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}


def main() -> None:
    """Install the environment of the lock files; on an error, print one sentence and exit with 64."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this check is for older versions
        stop(f"expected Python 3.11 or newer, found {sys.version.split()[0]}. Run `make PYTHON=python3.11`")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml, e.g. dev smollm2")
    parser.add_argument("--venv", type=Path, default=PROJECT / ".venv")
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda", "index"), default="auto")
    parser.add_argument("--pip", action="store_true", help="install with pip even if uv is available")
    parser.add_argument("--dependencies", action="store_true", help="install everything but this project")
    parser.add_argument(
        "--only", type=Path, metavar="FILE", help="install this lock file and nothing else, without pip"
    )
    options = parser.parse_args()
    if options.only:
        python = make_venv(options.venv, with_pip=False)
        installer = find_installer(python, Path(sys.executable), use_pip=options.pip)
        installer.install("--no-deps", "--require-hashes", "-r", str(options.only))
        return
    files = [HERE / f"{name}.txt" for name in ("run", *options.extras)]
    for path in files:
        if not path.is_file():
            known = sorted(one.stem for one in HERE.glob("*.txt") if one.stem not in ("run", "torch", "uv"))
            stop(f"no extra '{path.stem}'; choose from: {', '.join(known)}")
    check_machine()
    check_path(options.venv.absolute(), locale.getencoding(), compiles=not find_device())
    began = time.monotonic()
    python = make_venv(options.venv)
    installer = find_installer(python, python, use_pip=options.pip)
    locked = [word for path in files for word in ("-r", str(path))]
    installer.install("--no-deps", "--require-hashes", *locked)
    install_torch(installer, options.torch)
    if not options.dependencies:
        install_project(installer)
    print(f"environment: {options.venv}, {installer.name}, {time.monotonic() - began:.0f} s", flush=True)


class Installer:
    """uv, or pip if uv is not available, with pip's settings.

    Attributes:
        name: Name and version for messages, e.g. `uv 0.13.9`.
        python: Interpreter of the target environment.
        settings: pip's settings, see `read_settings`.
    """

    def __init__(self, python: Path, host: Path, uv: str | Path | None) -> None:
        """Store the target interpreter `python`, the interpreter `host` that has pip, and uv (None: use pip)."""
        self.python, self.settings, self._uv = python, read_settings(host), uv
        self._program = [str(uv)] if uv else [str(host), "-m", "pip", "--python", str(python)]
        version = subprocess.run([*self._program, "--version"], check=True, stdout=subprocess.PIPE, text=True).stdout
        self.name = " ".join(version.split()[:2])
        self._caches = can_write(cache := find_cache(os.environ))
        if uv and not self._caches:
            print(f"{cache} is not writable for this user: downloaded packages are not kept", flush=True)

    def install(self, *arguments: str, index: str | None = None) -> None:
        """Install packages; `index` replaces the indexes of pip's settings."""
        environment = dict(os.environ)
        if self._uv:
            command = [*self._program, "pip", "install", "--quiet", "--python", str(self.python)]
            # Like pip: the best version of all indexes, not the first index that has the package.
            command += ["--index-strategy", "unsafe-best-match"]
            command += ["--default-index", index] if index else as_options(self.settings)
            environment["VIRTUAL_ENV"] = str(self.python.parent.parent)
            if not self._caches:
                environment["UV_NO_CACHE"] = "1"
            if certificate := self.settings.get("cert"):
                environment.setdefault("SSL_CERT_FILE", certificate[0])
        else:
            command = [*self._program, "install", "--quiet", "--disable-pip-version-check"]
            command += ["--index-url", index] if index else []
        if subprocess.run([*command, *arguments], env=environment, check=False).returncode:
            stop(
                f"{self.name} could not install {' '.join(arguments)}; its error is above. Packages come from "
                f"{index or name_index(self.settings)}; PIP_INDEX_URL and PIP_FIND_LINKS set a mirror or a folder"
            )


def find_cache(environment: Mapping[str, str]) -> Path:
    """Return uv's cache folder. Source: uv 0.13.9, `uv cache dir`.

    >>> str(find_cache({"XDG_CACHE_HOME": "/c"})), str(find_cache({"UV_CACHE_DIR": "/u"}))
    ('/c/uv', '/u')
    """
    above = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(environment.get("UV_CACHE_DIR") or Path(above) / "uv")


def can_write(folder: Path) -> bool:
    """Return whether this user can write a folder, or create it."""
    return os.access(next(one for one in (folder, *folder.absolute().parents) if one.exists()), os.W_OK | os.X_OK)


def check_machine() -> None:
    """Exit with 64 if set-up lacks something of this machine; name everything at once, with the command that helps."""
    if missing := find_missing(compiles=not find_device()):
        whats = ", ".join(what for what, _, _ in missing)
        debian, fedora = (" ".join(one[place] for one in missing) for place in (1, 2))
        stop(
            f"not found: {whats}. On Debian, run `apt-get install {debian}` as root; on Fedora, `dnf install {fedora}`"
        )


def check_path(folder: Path, encoding: str, *, compiles: bool) -> None:
    """Exit with 64 if an environment in this folder would not work: Python reads its path in the locale's encoding.

    torch (2.13.0, cpp_extension.py) does not quote the path for the linker of the op that is compiled without a GPU.
    """
    try:
        str(folder).encode(encoding)
    except UnicodeEncodeError:
        stop(f"{str(folder)!a}: the encoding of this locale, {encoding}, lacks letters. Run `export LC_ALL=C.UTF-8`")
    if compiles and re.search(r"\s", str(folder)):
        stop(f"'{folder}': torch cannot compile DeepSpeed's op below a path with spaces. Move the checkout elsewhere")


def find_missing(*, compiles: bool) -> list[tuple[str, str, str]]:
    """Return (what is missing, Debian's package, Fedora's package).

    `compiles`: DeepSpeed will compile its op for CPUs, as on every machine without a GPU.
    """
    compiler, headers = os.environ.get("CXX", "c++"), Path(str(sysconfig.get_config_var("INCLUDEPY")))
    needs = [
        (find_spec("ensurepip") is not None, ("Python's modules venv and ensurepip", "python3-venv", "python3-pip")),
        (shutil.which("git") is not None, ("git", "git", "git")),
    ]
    if compiles:
        needs += [
            ((headers / "Python.h").is_file(), (f"{headers}/Python.h", "python3-dev", "python3-devel")),
            (shutil.which(compiler) is not None, (f"a C++ compiler (`{compiler}`)", "g++", "gcc-c++")),
        ]
    return [words for is_there, words in needs if not is_there]


def find_device() -> bool:
    """Return whether this machine has an NVIDIA device."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def make_venv(folder: Path, *, with_pip: bool = True) -> Path:
    """Return the interpreter of the environment; create it if it does not exist, again if it is not complete."""
    python = folder / "bin" / "python"
    if not (python.exists() and (not with_pip or any(folder.glob("lib/python*/site-packages/pip")))):
        print(f"creating {folder} with Python {sys.version.split()[0]}", flush=True)
        options = [] if with_pip else ["--without-pip"]
        # An interrupted call, or a removed Python, leaves a folder without pip or interpreter.
        options += ["--clear"] if (folder / "pyvenv.cfg").exists() else []
        if subprocess.run([sys.executable, "-m", "venv", *options, str(folder)], check=False).returncode:
            stop(f"Python's venv could not create {folder}; its error is above")
    return python


def read_settings(python: Path) -> dict[str, list[str]]:
    """Return pip's settings for the package sources: name -> values.

    Later lines take precedence: pip lists the global section first, then that of `install`, then PIP_* variables.
    """
    done = subprocess.run([str(python), "-m", "pip", "config", "list"], check=False, stdout=subprocess.PIPE, text=True)
    return parse_settings(done.stdout)


def parse_settings(text: str) -> dict[str, list[str]]:
    r"""Return the settings in the output of `pip config list`.

    >>> parse_settings("global.find-links='/opt/wheels'\ninstall.extra-index-url='https://a https://b'\n")
    {'find-links': ['/opt/wheels'], 'extra-index-url': ['https://a', 'https://b']}
    """
    found: dict[str, list[str]] = {}
    for section in ("global", "install", ":env:"):
        for line in text.splitlines():
            key, _, value = line.partition("=")
            where, _, name = key.rpartition(".")
            if where == section and name in (*OPTIONS, "cert", "no-index"):
                found[name] = str(ast.literal_eval(value)).split()
    return found


def as_options(settings: dict[str, list[str]]) -> list[str]:
    """Return the options of uv that are equivalent to pip's settings.

    >>> as_options({"extra-index-url": ["https://a"], "cert": ["/x.pem"], "no-index": ["true"]})
    ['--index', 'https://a', '--no-index']
    """
    chosen = [word for name, option in OPTIONS.items() for value in settings.get(name, []) for word in (option, value)]
    return chosen + (["--no-index"] if settings.get("no-index") in (["true"], ["1"], ["yes"], ["on"]) else [])


def find_installer(python: Path, host: Path, *, use_pip: bool) -> Installer:
    """Return the installer for the environment of `python`: uv from PATH or installed beside `host`, else pip."""
    beside = host.with_name("uv")
    found: str | Path | None = beside if beside.exists() else shutil.which("uv")
    if not (found or use_pip):
        command = [str(host), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--require-hashes", "-r", str(HERE / "uv.txt")], check=False)
        found = beside if done.returncode == 0 else None
        if found is None:
            print("uv could not be installed; installing with pip, which takes minutes", flush=True)
    return Installer(python, host, None if use_pip else found)


def install_torch(installer: Installer, choice: str) -> None:
    """Install the pinned torch as a build for this machine; keep an installed one of the same version."""
    (pinned,) = re.findall(r"(?m)^torch==(\S+)", (HERE / "torch.txt").read_text())
    have = find_version(installer.python, "torch")
    if have and have.partition("+")[0] == pinned and not changes_build(have, choice):
        return
    has_device = find_device()
    wheel = find_wheel(installer.settings, pinned)
    source, index = choose_build(choice, installer.settings, wheel, has_device=has_device)
    why = (
        f" ({'an' if has_device else 'no'} NVIDIA device found; TORCH=cpu|cuda|index overrides)"
        if choice == "auto"
        else ""
    )
    print(f"torch {pinned}: {source}{why}", flush=True)
    # Its dependencies are in run.txt, except the CUDA libraries, which a GPU build pins by version.
    installer.install(f"torch=={pinned}", "-c", str(write_constraints(installer.python)), index=index)


def choose_build(
    choice: str, settings: dict[str, list[str]], wheel: Path | None, *, has_device: bool, platform: str = sys.platform
) -> tuple[str, str | None]:
    """Return (description of the build, its index; None for the indexes of pip's settings).

    >>> choose_build("auto", {}, None, has_device=False, platform="linux")[1]
    'https://download.pytorch.org/whl/cpu'
    >>> choose_build("auto", {"index-url": ["https://mirror"]}, None, has_device=False, platform="linux")
    ("the build of pip's index https://mirror", None)
    """
    if choice == "auto" and wheel:
        return str(wheel), None
    is_plain_cpu = platform == "linux" and not has_device and "index-url" not in settings
    if choice == "cpu" or (choice == "auto" and is_plain_cpu):
        return f"the CPU build of {CPU_INDEX}", CPU_INDEX
    return f"the build of pip's index {name_index(settings)}", None


def name_index(settings: dict[str, list[str]]) -> str:
    """Return the index of pip's settings without its user and password, for messages.

    >>> name_index({}), name_index({"index-url": ["https://me:secret@mirror/simple"]})
    ('https://pypi.org/simple', 'https://mirror/simple')
    """
    return re.sub(r"//[^/]*@", "//", settings.get("index-url", ["https://pypi.org/simple"])[-1])


def changes_build(have: str, choice: str) -> bool:
    """Return whether `choice` needs another build of the installed version.

    >>> changes_build("2.13.0+cpu", "cuda"), changes_build("2.13.0+cpu", "auto")
    (True, False)
    """
    return (choice == "cuda" and have.endswith("+cpu")) or (choice == "cpu" and not have.endswith("+cpu"))


def find_wheel(settings: dict[str, list[str]], version: str, tags: str = TAGS) -> Path | None:
    """Return the wheel of torch for this Python and machine in a folder of pip's find-links, or None."""
    for location in settings.get("find-links", []):
        folder = Path(url2pathname(urlsplit(location).path) if location.startswith("file:") else location)
        for path in sorted(folder.glob(f"torch-{version}[+-]{tags}.whl")) if folder.is_dir() else []:
            return path
    return None


def write_constraints(python: Path) -> Path:
    """Write and return a file with every locked version, without hashes, so that torch changes no other package."""
    path = python.parent.parent / "constraints.txt"
    pins = [line.rstrip(" \\") for one in HERE.glob("*.txt") for line in one.read_text().splitlines() if "==" in line]
    path.write_text("\n".join(pin for pin in pins if not pin.startswith("#")) + "\n")
    return path


def find_version(python: Path, name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    program = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([str(python), "-c", program], check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def install_project(installer: Installer) -> None:
    """Install this checkout in editable mode, unless the environment has it with the current pyproject.toml."""
    stamp = installer.python.parent.parent / "project.stamp"
    stated = f"{PROJECT}\n{(PROJECT / 'pyproject.toml').read_text()}"
    if not (stamp.is_file() and stamp.read_text() == stated and find_version(installer.python, "ropeway")):
        installer.install("--no-deps", "--no-build-isolation", "-e", str(PROJECT))
        stamp.write_text(stated)


def stop(message: str) -> NoReturn:
    """Print a message and exit with 64, the exit code for a wrong option or machine."""
    print(f"setup: {message}", file=sys.stderr, flush=True)
    sys.exit(64)


if __name__ == "__main__":
    main()
