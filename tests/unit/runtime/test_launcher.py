import sys

import pytest

from ropeway.runtime.devices import count_local_ranks, count_ranks, read_hostfile
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.launcher import adopt_slurm, build_launch_command

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


def test_a_slurm_job_with_several_tasks_uses_srun():
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}
    assert count_ranks(environment) == 16
    command = build_launch_command(environment, ARGUMENTS, ranks=16, port=5)
    assert command[:3] == ["srun", "--ntasks=16", "--kill-on-bad-exit=1"]
    assert "MASTER_PORT=5" in command[3]
    assert (
        build_launch_command({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, ARGUMENTS, ranks=2, port=5)[0]
        == sys.executable
    )


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
