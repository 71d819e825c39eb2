import sys

import pytest

from ropeway.runtime.devices import count_local_ranks, count_ranks, read_hostfile
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.launcher import adopt_slurm, build_launch_command

ARGUMENTS = ["/w", "tiny", "abc"]


def test_one_machine_is_deepspeeds_own_launcher():
    command = build_launch_command({}, ARGUMENTS, ranks=2, port=4711)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert command[-4:] == ["ropeway.stages.train.rank", *ARGUMENTS]
    assert "--master_port=4711" in command


def test_a_hostfile_is_deepspeeds_runner_and_our_variables_travel(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two of them\na slots=8\nb slots=8  # the new one\n\n")
    environment = {"ROPEWAY_HOSTFILE": str(hostfile), "DS_ACCELERATOR": "cuda", "AWS_SECRET_ACCESS_KEY": "hidden"}
    command = build_launch_command(environment, ARGUMENTS, ranks=16, port=1)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert {"--launcher=pdsh", "--master_addr=a", "--force_multi"} <= set(command)
    assert command[command.index("env") :] == [
        "env", "DS_ACCELERATOR=cuda", sys.executable, "-m", "ropeway.stages.train.rank", *ARGUMENTS,
    ]  # fmt: skip
    assert (count_ranks(environment), count_local_ranks(environment, 16)) == (16, 8)
    with pytest.raises(ConfigError, match="add up to 16, the run has 8"):
        build_launch_command(environment, ARGUMENTS, ranks=8, port=1)


@pytest.mark.parametrize("text", ["a\n", "a slots=x\n", "a slots=1\na slots=1\n", "", "# nobody\n"])
def test_a_hostfile_that_says_something_else_is_refused(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match="slots=N"):
        read_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none cannot be read"):
        read_hostfile(tmp_path / "none")


def test_a_slurm_job_of_several_tasks_starts_them_through_srun():
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}
    assert count_ranks(environment) == 16
    command = build_launch_command(environment, ARGUMENTS, ranks=16, port=5)
    assert command[:3] == ["srun", "--ntasks=16", "--kill-on-bad-exit=1"]
    assert "MASTER_PORT=5" in command[3]
    assert (
        build_launch_command({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, ARGUMENTS, ranks=2, port=5)[0]
        == sys.executable
    )


def test_a_task_of_slurm_takes_its_place_and_a_launchers_rank_keeps_its_own():
    task = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    adopt_slurm(task)
    assert (task["RANK"], task["WORLD_SIZE"], task["LOCAL_RANK"]) == ("3", "4", "1")
    launched = {**task, "RANK": "0"}
    adopt_slurm(launched)
    assert launched["RANK"] == "0"


def test_a_stage_that_torchrun_multiplied_says_so():
    with pytest.raises(ConfigError, match="torchrun"):
        build_launch_command({"TORCHELASTIC_RUN_ID": "none"}, ARGUMENTS, ranks=2, port=1)
