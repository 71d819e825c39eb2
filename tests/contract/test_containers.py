"""Dockerfile, compose.yaml and the bare machine agree with README, the commands and the environment variables."""

import re
import shlex
import subprocess
from pathlib import Path

import prefect.settings
import pytest
import typer
from ruamel.yaml import YAML

from ropeway.cli.main import app
from ropeway.config.load_params import read_block
from ropeway.runtime import environment
from tools import fresh_image, fresh_machine
from tools.docs import reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
SERVICES = YAML(typ="safe", pure=True).load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
COMMANDS = dict(reference.commands(typer.main.get_command(app), "ropeway"))
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "ropeway"}


def instructions(kind):
    return re.findall(rf"(?m)^{kind} (.*)$", DOCKERFILE)


def test_every_list_of_debian_packages_is_that_of_readme():
    packages = fresh_machine.readme_packages(README)
    assert "g++" in packages
    (installed,) = re.findall(r"apt-get install --yes ([^&]+?) +&&", DOCKERFILE)
    (started,) = re.findall(
        r"`apt-get install ([^`]+)`", (ROOT / "docs" / "get-started.md").read_text(encoding="utf-8")
    )
    (stated,) = re.findall(r"on Debian: ([^)]+)\)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert [installed.split(), started.split(), stated.split()] == [packages] * 3


def test_the_image_has_what_set_up_installs_for_the_default_profile():
    (set_up,) = re.findall(r"/\.ready-run: .*\n\t\$\(INSTALL\) (.+)\n", (ROOT / "Makefile").read_text(encoding="utf-8"))
    calls = [line for line in instructions("RUN") if "requirements/install.py" in line]
    assert len(calls) == 2
    for call in calls:
        words = shlex.split(call[call.index("requirements/install.py") :].split("&&")[0])
        assert words[-len(set_up.split()) :] == set_up.split() == ["smollm2"]


def test_every_path_that_the_image_copies_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [word for line in instructions("COPY") for word in shlex.split(line)[:-1] if not word.startswith("--")]
    assert len(sources) > 1
    assert [one for one in sources if one != "." and f"\n{one}/" not in tracked and f"\n{one}\n" not in tracked] == []
    assert [
        path for path in re.findall(r"\S+\.py\b", DOCKERFILE) if f"\n{path}\n" not in tracked and "/test_" not in path
    ] == []


def test_the_image_leaves_out_what_git_ignores():
    ignored = (ROOT / ".gitignore").read_text().split()
    ignored += [f"/.dvc{line}" for line in (ROOT / ".dvc" / ".gitignore").read_text().split()]
    stated = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    # Docker's patterns start at the root of the context.
    anywhere = ("__pycache__/", "*.egg-info/")
    assert sorted(stated) == sorted((f"**/{one}" if one in anywhere else one).strip("/") for one in ignored)


def test_the_image_runs_as_a_user_without_privileges():
    assert [line.split()[0] for line in instructions("USER")] == ["ropeway"]
    assert DOCKERFILE.index("\nUSER") < DOCKERFILE.index("requirements/install.py")


def test_commands_and_options_of_the_services_exist():
    assert OURS.keys() == {"server", "worker"}
    for service in OURS.values():
        words = service["command"]
        known = {word for one in COMMANDS[" ".join(words[:2])].params for word in one.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_variables_of_the_services_are_those_that_a_run_or_prefect_reads():
    known = {one.name for group in environment.VARIABLES.values() for one in group}
    stated = {name for service in OURS.values() for name in service["environment"]}
    assert len(stated & known) > 8
    assert [name for name in stated - known if not hasattr(prefect.settings, name)] == []
    assert not hasattr(prefect.settings, "PREFECT_NO_SUCH_SETTING")


def test_ports_are_published_on_loopback_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_comes_from_the_environment_and_must_be_set():
    secret = re.compile(r"AUTH_STRING|SECRET|ACCESS_KEY")
    values = [
        value for service in SERVICES.values() for name, value in service["environment"].items() if secret.search(name)
    ]
    assert len(values) == 6
    assert all(re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value) for value in values)


def test_what_the_worker_needs_is_what_the_other_services_state():
    worker = OURS["worker"]["environment"]
    assert worker["PREFECT_API_AUTH_STRING"] == OURS["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    bucket = worker["ROPEWAY_REGISTRY"].removeprefix("s3://").partition("/")[0]
    assert f"-bucket={bucket}" in SERVICES["store"]["command"]
    assert worker["AWS_SECRET_ACCESS_KEY"] == SERVICES["store"]["environment"]["AWS_SECRET_ACCESS_KEY"]
    for name in ("PREFECT_API_URL", "AWS_ENDPOINT_URL_S3"):
        host, port = re.fullmatch(r"http://(\w+):(\d+)(?:/api)?", worker[name]).groups()
        assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]
        assert OURS["worker"]["depends_on"][host] == {"condition": "service_healthy"}
        assert SERVICES[host]["healthcheck"]


def test_the_image_of_the_test_is_the_base_that_the_dockerfile_names():
    assert fresh_image.base_image(DOCKERFILE)[0] == instructions("FROM")[0]


def test_the_image_runs_the_smallest_profile_of_the_tests(tmp_path):
    params = (ROOT / "params.yaml").read_text(encoding="utf-8") + fresh_image.smallest_profile()
    (tmp_path / "params.yaml").write_text(params, encoding="utf-8")
    assert read_block(tmp_path / "params.yaml", "tiny")["model_name"] == "scratch"


def test_pips_settings_and_the_files_that_they_name_reach_the_bare_machine(tmp_path):
    wheels, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    for folder in (wheels, index):
        folder.mkdir(parents=True)
    certificate = tmp_path / "ca.pem"
    certificate.touch()
    config = (
        f"global.find-links='/old'\n:env:.cert='{certificate}'\nglobal.extra-index-url='{index.as_uri()} https://mirror/simple'\n"
        f"install.find-links='{wheels} /gone'\n"
    )
    variables, shared = fresh_machine.hand_over(fresh_machine.pip_variables(config))
    under = fresh_machine.SHARED
    assert variables == {
        "PIP_EXTRA_INDEX_URL": f"file://{under}{index} https://mirror/simple",
        "PIP_FIND_LINKS": f"{under}{wheels} /gone",
        "PIP_CERT": f"{under}{certificate}",
    }
    # An index names its files in a folder beside it.
    assert shared == {path: f"{under}{path}" for path in (index.parent, wheels, certificate)}


def test_missing_programs_of_the_bare_machine_are_named_with_the_command_that_installs_them(capsys):
    with pytest.raises(SystemExit) as end:
        fresh_machine.check_host({"no-such-program": "its-package", "git": "git"}, 0)
    assert end.value.code == 64
    assert "apt-get install its-package`" in capsys.readouterr().err
