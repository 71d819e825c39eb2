import base64
import json
import os
import subprocess
import sys

import pytest

from ropeway.runtime import launcher
from ropeway.runtime.devices import count_local_ranks, count_ranks, device_index, expand_host_list, read_hostfile
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.launcher import adopt_device, adopt_slurm, build_launch_command, rank_environment

ARGUMENTS = ["/w", "tiny", "abc"]


def test_one_machine_uses_the_launcher_of_deepspeed():
    command = build_launch_command({}, ARGUMENTS, ranks=2, port=4711)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert command[-4:] == ["ropeway.stages.train.rank", *ARGUMENTS]
    assert "--master_port=4711" in command


def test_a_hostfile_uses_the_runner_and_forwards_our_variables(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two of them\na slots=8\nb slots=8  # new\n\n")
    environment = {"ROPEWAY_HOSTFILE": str(hostfile), "DS_ACCELERATOR": "cuda", "AWS_SECRET_ACCESS_KEY": "hidden"}
    command = build_launch_command(environment, ARGUMENTS, ranks=16, port=1)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert {"--launcher=pdsh", "--master_addr=a", "--force_multi"} <= set(command)
    assert command[command.index("env") :] == [
        "env", "DS_ACCELERATOR=cuda", sys.executable, "-m", "ropeway.stages.train.rank", *ARGUMENTS,
    ]  # fmt: skip
    assert (count_ranks(environment), count_local_ranks(environment, 16)) == (16, 8)
    with pytest.raises(ConfigError, match=rf"{hostfile}.*8 ranks.*16 slots.*ROPEWAY_RANKS"):
        build_launch_command(environment, ARGUMENTS, ranks=8, port=1)


@pytest.mark.parametrize("text", ["a\n", "a slots=x\n", "a slots=1\na slots=1\n", "", "# comment only\n"])
def test_an_invalid_hostfile_is_a_config_error(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match="slots=N"):
        read_hostfile(tmp_path / "hosts")


def test_the_message_names_a_missing_hostfile(tmp_path):
    with pytest.raises(ConfigError, match="none cannot be read"):
        read_hostfile(tmp_path / "none")


@pytest.fixture
def _names_resolve(monkeypatch):
    monkeypatch.setattr("ropeway.runtime.launcher.socket.getaddrinfo", lambda *_: [])


def srun_options(environment, *, ranks):
    command = build_launch_command(environment, ARGUMENTS, ranks=ranks, port=5)
    return command[command.index("srun") + 1 :]


FAKE_SRUN = """#!/bin/sh
while test "${1#--}" != "$1"; do shift; done
"$@"
exit 143
"""


@pytest.mark.usefixtures("_names_resolve")
@pytest.mark.parametrize(("ends", "code"), [(64, 64), (0, 143)])
def test_the_code_of_the_rank_that_failed_first_is_that_of_the_ranks(tmp_path, monkeypatch, ends, code):
    (tmp_path / ".work").mkdir()
    (tmp_path / "srun").write_text(FAKE_SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setattr("ropeway.runtime.launcher.sys.executable", "sh")
    command = build_launch_command({**JOB, "SLURM_NODELIST": "a"}, [str(tmp_path)], ranks=4, port=5)
    rank = command.index("-m")
    command[rank - 1 :] = ["sh", "-c", f"exit {ends}"]
    done = subprocess.run(command, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False)
    assert done.returncode == code
    assert list((tmp_path / ".work").iterdir()) == []


@pytest.mark.usefixtures("_names_resolve")
def test_a_slurm_job_with_several_tasks_uses_srun():
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "a,b"}
    assert count_ranks(environment) == 16
    command = srun_options(environment, ranks=16)
    assert command[:2] == ["--ntasks=16", "--kill-on-bad-exit=1"]
    assert "MASTER_PORT=5" in command[2]
    assert (
        build_launch_command({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, ARGUMENTS, ranks=2, port=5)[0]
        == sys.executable
    )


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("hosts", "master"),
    [
        ({"SLURM_JOB_NODELIST": "node[01-03,7],gpu-a"}, "node01"),
        ({"SLURM_JOB_NODELIST": "gpu-a,node[01-03]"}, "gpu-a"),
        ({"SLURM_NODELIST": "rack2-n[100,104-105]"}, "rack2-n100"),
        ({"SLURM_JOB_NODELIST": "first", "SLURM_NODELIST": "second"}, "first"),
    ],
)
@pytest.mark.usefixtures("_names_resolve")
def test_under_slurm_rank_0_is_reached_on_the_first_host_of_the_job(hosts, master):
    assert srun_options({**JOB, **hosts}, ranks=4)[2] == f"--export=ALL,MASTER_ADDR={master},MASTER_PORT=5"


def test_a_slurm_job_without_a_list_of_hosts_is_a_config_error():
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        build_launch_command(JOB, ARGUMENTS, ranks=4, port=5)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu-a", ["gpu-a"]),
        ("gpu-a,gpu-b.local", ["gpu-a", "gpu-b.local"]),
        ("node[3]", ["node3"]),
        ("node[01-03,7],gpu-a", ["node01", "node02", "node03", "node7", "gpu-a"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[8-9]-ib", ["r1n8-ib", "r1n9-ib", "r2n8-ib", "r2n9-ib"]),
        ("a[1,3],b[2,4]", ["a1", "a3", "b2", "b4"]),
    ],
)
def test_a_slurm_host_list_is_expanded_in_its_order(text, hosts):
    assert expand_host_list(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "a,,b", "n[", "n[]", "n[1", "n]1", "n[a-b]", "n[3-1]", "n[1,]", "n[1-2-3]", "n[[1]]"]
)
def test_what_is_no_slurm_host_list_is_a_config_error(text):
    with pytest.raises(ConfigError, match="expected hosts such as"):
        expand_host_list(text)


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 8, 0), (7, 8, 7), (0, 1, 0), (3, 1, 0)],  # the last: Slurm made one GPU visible to each task
)
def test_a_rank_uses_a_gpu_that_is_visible_to_it(local_rank, visible, index):
    environment = {"LOCAL_RANK": str(local_rank)}
    assert adopt_device(environment, visible=visible) == device_index(local_rank, visible) == index
    assert environment == {"LOCAL_RANK": str(index)}


@pytest.mark.parametrize(("local_rank", "visible"), [(0, 0), (2, 2), (8, 4)])
def test_a_rank_without_a_gpu_of_its_own_is_a_config_error(local_rank, visible):
    with pytest.raises(ConfigError, match=f"rank {local_rank} of .* {visible} are visible"):
        device_index(local_rank, visible)


SLURM = {**JOB, "SLURM_JOB_NODELIST": "n[1-2]"}
ONE_MACHINE = {}


@pytest.mark.parametrize(
    ("environment", "gpus_here", "accelerator"),
    [
        (SLURM, "", None),
        (SLURM, "0", None),
        (SLURM | {"DS_ACCELERATOR": "cpu"}, "0", "cpu"),
        ({"ROPEWAY_HOSTFILE": "hosts"}, "", None),
        ({"ROPEWAY_HOSTFILE": "hosts"}, "0", None),
        (ONE_MACHINE, "", "cpu"),
        (ONE_MACHINE, "0", None),
    ],
)
def test_a_head_node_without_a_gpu_sets_no_accelerator_for_other_machines(
    monkeypatch, tmp_path, environment, gpus_here, accelerator
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    planned = rank_environment({**environment, "CUDA_VISIBLE_DEVICES": gpus_here}, ranks=4)
    assert planned.get("DS_ACCELERATOR") == accelerator


def test_the_compiler_of_a_head_node_matters_only_if_ranks_run_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "DS_ACCELERATOR" not in rank_environment({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, ranks=4)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        rank_environment({"CUDA_VISIBLE_DEVICES": ""}, ranks=4)


def test_shared_memory_is_checked_for_the_ranks_of_this_machine(monkeypatch):
    checked = []
    monkeypatch.setattr(launcher, "check_shared_memory", checked.append)
    rank_environment({"CUDA_VISIBLE_DEVICES": ""}, ranks=4)
    rank_environment({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, ranks=4)
    assert checked == [4]


def test_threads_and_offline_mode_reach_the_ranks_of_a_hostfile(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=1\nb slots=1\n")
    named = {"ROPEWAY_HOSTFILE": str(hostfile), "CUDA_VISIBLE_DEVICES": "", "NCCL_SOCKET_IFNAME": "ib0"}
    command = build_launch_command(rank_environment(named, ranks=2), ARGUMENTS, ranks=2, port=1)
    passed = dict(word.split("=", 1) for word in command[command.index("env") + 1 : len(command) - len(ARGUMENTS) - 3])
    assert passed["HF_HUB_OFFLINE"] == "1"
    assert int(passed["OMP_NUM_THREADS"]) >= 1
    assert passed["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("visible", "devices"), [("4,5", ["4", "5"]), ("GPU-1a,GPU-2b,GPU-3c", ["GPU-1a", "GPU-2b"]), (None, [0, 1])]
)
def test_ranks_of_one_machine_use_the_gpus_that_the_user_named(visible, devices):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = build_launch_command(environment, ARGUMENTS, ranks=2, port=1)
    world = next(word.partition("=")[2] for word in command if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": devices}


def test_slurm_sets_the_rank_only_where_no_launcher_has_set_it():
    task = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    adopt_slurm(task)
    assert (task["RANK"], task["WORLD_SIZE"], task["LOCAL_RANK"]) == ("3", "4", "1")
    launched = {**task, "RANK": "0"}
    adopt_slurm(launched)
    assert launched["RANK"] == "0"


def test_a_stage_started_by_torchrun_is_a_config_error():
    with pytest.raises(ConfigError, match="torchrun"):
        build_launch_command({"TORCHELASTIC_RUN_ID": "none"}, ARGUMENTS, ranks=2, port=1)
