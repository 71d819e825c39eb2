"""Set-up: what the lock files hold, and where packages and torch come from."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from platform import machine
from types import SimpleNamespace

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


def test_everything_that_is_missing_is_named_at_once_with_the_packages_that_hold_it(monkeypatch, tmp_path, capsys):
    assert install.find_missing(compiles=True) == []
    monkeypatch.setattr(install, "find_spec", lambda _: None)
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    readme = re.search("`apt-get install ([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))[1].split()
    assert {debian for _, debian, _ in install.find_missing(compiles=True)} == {*readme} - {"make"}
    assert [debian for _, debian, _ in install.find_missing(compiles=False)] == ["python3-venv", "git"]
    monkeypatch.setattr(install, "find_device", lambda: False)
    with pytest.raises(SystemExit) as end:
        install.check_machine()
    assert end.value.code == 64
    assert "`apt-get install python3-venv git python3-dev g++`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "encoding", "compiles", "remedy"),
    [
        ("/home/é/ropeway", "utf-8", True, None),
        ("/home/é/ropeway", "ascii", False, "LC_ALL=C.UTF-8"),
        ("/home/a b/ropeway", "ascii", False, None),
        ("/home/a b/ropeway", "utf-8", True, "Move"),  # the linker is given the path without quotes
    ],
)
def test_a_path_in_which_no_environment_works_is_refused(capsys, path, encoding, compiles, remedy):
    with suppress(SystemExit) if remedy is None else pytest.raises(SystemExit, match="64"):
        install.check_path(Path(path), encoding, compiles=compiles)
    said = capsys.readouterr().err
    assert remedy in said if remedy else said == ""


def make_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        install.subprocess, "run", lambda command, **_: calls.append(command) or SimpleNamespace(returncode=0)
    )
    return calls


@pytest.mark.parametrize("state", ["no pip", "no python", "complete"])
def test_an_environment_that_was_not_completed_is_created_again(monkeypatch, tmp_path, state):
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyvenv.cfg").touch()
    if state != "no python":  # its target was removed, e.g. by an upgrade of Debian
        (tmp_path / "bin" / "python").touch()
    if state != "no pip":  # ensurepip was not installed, or the call was interrupted
        (tmp_path / "lib" / "python3.11" / "site-packages" / "pip").mkdir(parents=True)
    calls = make_calls(monkeypatch)
    assert install.make_venv(tmp_path) == tmp_path / "bin" / "python"
    assert calls == ([] if state == "complete" else [[sys.executable, "-m", "venv", "--clear", str(tmp_path)]])


def test_a_folder_that_is_no_environment_is_never_emptied(monkeypatch, tmp_path):
    (tmp_path / "thesis.md").touch()
    calls = make_calls(monkeypatch)
    install.make_venv(tmp_path)
    assert "--clear" not in calls[0]


@pytest.mark.parametrize("writable", [True, False])
def test_uv_works_without_its_cache_where_that_cannot_be_written(monkeypatch, tmp_path, writable):
    given = []

    def run(_, **options):
        given.append(options.get("env", {}))
        return SimpleNamespace(returncode=0, stdout="uv 0.13.9 (linux)")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install, "read_settings", lambda _: {})
    monkeypatch.setattr(install.os, "access", lambda path, _: writable and path == tmp_path)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "a" / "b"))
    monkeypatch.delenv("UV_NO_CACHE", raising=False)
    install.Installer(Path("/v/bin/python"), Path(sys.executable), "uv").install("a")
    assert given[-1].get("UV_NO_CACHE") == (None if writable else "1")


def test_a_failed_installation_names_its_index_without_a_password(monkeypatch, capsys):
    answer = SimpleNamespace(returncode=1, stdout="uv 0.13.9 (linux)")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(install, "read_settings", lambda _: {"index-url": ["https://me:canary@mirror/simple"]})
    with pytest.raises(SystemExit) as end:
        install.Installer(Path("/v/bin/python"), Path(sys.executable), "uv").install("a")
    assert end.value.code == 64
    said = capsys.readouterr().err
    assert "https://mirror/simple" in said
    assert "canary" not in said


@pytest.mark.parametrize("option", [(), ("--dependencies",)])
def test_the_dependencies_can_be_installed_without_the_project(monkeypatch, tmp_path, option):
    done = []
    installer = SimpleNamespace(name="uv", install=lambda *_, **__: done.append("locked"))
    monkeypatch.setattr(install, "check_machine", lambda: None)
    monkeypatch.setattr(install, "make_venv", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(install, "find_installer", lambda *_, **__: installer)
    monkeypatch.setattr(install, "install_torch", lambda *_: done.append("torch"))
    monkeypatch.setattr(install, "install_project", lambda _: done.append("project"))
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path), *option])
    install.main()
    assert done == ["locked", "torch", *([] if option else ["project"])]
