"""`make test-image`: build the Dockerfile without Docker and without a network but the package registries', and run it.

1. mmdebstrap writes a Debian root, which stands for the base image that the Dockerfile names.
2. buildah builds the Dockerfile from a clone of HEAD, with pip's settings as in
   fresh_machine.py.
3. In the image, as its user: `ropeway --help`, then a run of the tests' smallest profile, published to a folder.

What differs from Docker: no network and no cgroup of its own, /dev/shm of this machine, and a base image that has
Debian's packages alone. The last line is JSON; the exit code is 1 if a step failed.
"""

import ast
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tools import fresh_machine
from tools.fresh_machine import PROJECT, Machine

FREE_GIB = 16  # the image's files three times: while it is built, stored, and run
IMAGE = "localhost/ropeway:test"


def base_image(dockerfile: str) -> tuple[str, str]:
    r"""Return (image, Debian suite) of a Dockerfile's only FROM line.

    >>> base_image("# made of Debian\nFROM debian:bookworm-slim\n")
    ('debian:bookworm-slim', 'bookworm')
    """
    ((image, suite),) = re.findall(r"(?m)^FROM (debian:(\w+)-slim)$", dockerfile)
    return image, suite


def smallest_profile() -> str:
    """Return the block `tiny` of the tests, read without importing pytest."""
    tree = ast.parse((PROJECT / "tests" / "support" / "main_job.py").read_text(encoding="utf-8"))
    (block,) = (
        each.value for each in tree.body if isinstance(each, ast.Assign) and ast.unparse(each.targets) == "BLOCK"
    )
    return str(ast.literal_eval(block))


def build(machine: Machine, folder: Path) -> None:
    """Import the root under the base image's name, build the Dockerfile, run the image's commands."""
    image, suite = base_image((PROJECT / "Dockerfile").read_text(encoding="utf-8"))
    buildah = ["buildah", "--storage-driver", "vfs", "--root", f"{folder}/graph", "--runroot", f"{folder}/run"]
    volumes = [word for here, there in machine.shared.items() for word in ("--volume", f"{here.resolve()}:{there}:ro")]
    variables = [word for pair in machine.environment.items() for word in ("--env", "=".join(pair))]

    def create(image: str) -> str:
        command = [*buildah, "from", "--quiet", "--pull-never", image]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    fresh_machine.install_root(machine, suite, fresh_machine.MIRROR)
    base = create("scratch")
    machine.step("base", [*buildah, "add", "--quiet", base, str(machine.root), "/"])
    subprocess.run([*buildah, "config", *variables, base], check=True)
    machine.step("base image", [*buildah, "commit", "--quiet", "--rm", base, f"docker.io/library/{image}"])
    context = folder / "clone"
    machine.step("clone", ["git", "clone", "--quiet", "--no-local", str(PROJECT), str(context)])
    options = ["--pull-never", "--isolation", "chroot", "--tag", IMAGE, *volumes]
    machine.step("image", [*buildah, "build", *options, str(context)])
    container = create(IMAGE)
    run = [*buildah, "run", "--isolation", "chroot", container, "--"]
    machine.step("help", [*run, "ropeway", "--help"])
    append = "import sys; open('params.yaml', 'a').write(sys.argv[1])"
    machine.step("params", [*run, "python", "-c", append, smallest_profile()])
    machine.step("run", [*run, "ropeway", "run", "--profile", "tiny"])
    machine.step("registry", [*run, "ropeway", "registry", "show", "tiny@candidate"])


def main() -> None:
    """Build and run; remove images, containers and the root at every end."""
    fresh_machine.check_host({**fresh_machine.PROGRAMS, "buildah": "buildah"}, FREE_GIB)
    commit = fresh_machine.read_commit()
    with tempfile.TemporaryDirectory(prefix="ropeway-image-") as folder:
        machine = Machine(Path(folder) / "root", *fresh_machine.package_settings())
        os.environ["BUILDAH_ISOLATION"] = "chroot"
        with fresh_machine.reported(machine, {"commit": commit}) as facts:
            build(machine, Path(folder))
            facts["debian"] = machine.read("cat /etc/debian_version")


if __name__ == "__main__":
    main()
