"""Set-up: what the lock files hold, and where packages and torch come from."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from platform import machine

import pytest

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(f"requirements_{name}", ROOT / "requirements" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install, lock = load("install"), load("lock")
LOCKS = sorted(path for path in (ROOT / "requirements").glob("*.txt") if path.name != "torch.txt")


def test_every_extra_has_a_lock_file():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {path.stem for path in LOCKS} == {"run", "uv", *extras}


@pytest.mark.parametrize(
    "path", [*LOCKS, *sorted((ROOT / "tests" / "loaders").glob("*.txt"))], ids=lambda path: path.stem
)
def test_a_lock_file_has_hashes_for_every_package_and_names_no_index(path):
    text = path.read_text()
    entries = lock.split(text)
    assert entries
    assert [entry.partition("\n")[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert "http" not in re.sub(r"(?m)^[\w.-]*http[\w.-]*==", "", text)


def test_no_lock_file_holds_torch_or_what_its_gpu_build_brings():
    assert [entry for path in LOCKS for entry in lock.split(path.read_text()) if lock.OWN_STEP.match(entry)] == []


def test_an_index_wins_over_the_cpu_index_and_a_wheel_at_hand_over_both(tmp_path):
    ours = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = tmp_path / f"torch-2.13.0+cpu-{ours}-{ours}-manylinux_2_28_{machine()}.whl"
    # Of another version, Python and machine; both latter sort before the right one.
    others = (f"2.13.1-{ours}-{ours}-linux_{machine()}", f"2.13.0+a-cp39-cp39-linux_{machine()}")
    for name in (*others, f"2.13.0+a-{ours}-{ours}-linux_other"):
        (tmp_path / f"torch-{name}.whl").touch()
    assert install.find_wheel({"find-links": [str(tmp_path)]}, "2.13.0") is None
    wheel.touch()
    for place in (str(tmp_path), tmp_path.as_uri()):
        assert install.find_wheel({"find-links": ["https://elsewhere/links", place]}, "2.13.0") == wheel
    assert install.find_wheel({}, "2.13.0") is None

    def index(choice, settings, found, *, gpu):
        return install.choose_build(choice, settings, found, has_device=gpu, platform="linux")[1]

    mirror = {"index-url": ["https://mirror/simple"]}
    assert index("auto", mirror, wheel, gpu=False) is None
    assert index("auto", mirror, None, gpu=False) is None
    assert index("auto", {}, None, gpu=False) == install.CPU_INDEX
    assert index("auto", {}, None, gpu=True) is None
    assert index("cuda", {}, None, gpu=False) is None
    assert index("cpu", {}, None, gpu=True) == install.CPU_INDEX


def test_pips_settings_reach_uv_and_the_environment_has_the_last_word():
    text = (
        "global.index-url='https://old/simple'\nglobal.extra-index-url='file:///a\\nfile:///b'\n"
        "global.cert='/etc/ca.pem'\nglobal.constraint='/c.txt'\ninstall.trusted-host='mirror'\n"
        ":env:.index-url='https://new/simple'\n"
    )
    settings = install.parse_settings(text)
    assert settings["cert"] == ["/etc/ca.pem"]
    assert install.as_options(settings) == [
        *("--default-index", "https://new/simple", "--index", "file:///a", "--index", "file:///b"),
        *("--allow-insecure-host", "mirror"),
    ]


def test_an_unknown_extra_is_named_and_nothing_is_made(tmp_path):
    command = [sys.executable, str(ROOT / "requirements" / "install.py"), "--venv", str(tmp_path / "v"), "smolm2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "no extra 'smolm2'" in done.stderr
    assert not (tmp_path / "v").exists()
