"""The program of a job that `slurm_job` submitted: starts the ranks with srun and keeps their exit code.

`python -m ropeway.runtime.slurm_batch RANKS ARGUMENT…`, with the arguments of a rank. In a job that Slurm requeued, the
ranks choose their checkpoint themselves: the one that was verified before the submission may be an old one.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ropeway.runtime.errors import RopewayError
from ropeway.runtime.launcher import build_launch_command, free_port, rank_environment
from ropeway.runtime.manifest import write_json
from ropeway.runtime.slurm import ARGUMENTS, SWITCH, exit_path, stop_ranks

_FRESH_ARGUMENTS = 3  # of a rank: workspace, profile, fingerprint; the fourth is the verified checkpoint


def main(ranks: int, arguments: list[str]) -> int:
    """Run the ranks of this job; return the job's exit code."""
    job, root = os.environ["SLURM_JOB_ID"], Path(arguments[0])
    record = exit_path(root, job)
    record.unlink(missing_ok=True)  # that of the job before it was requeued
    # `--signal=B:TERM` reaches this process alone. TERM to srun would kill the ranks.
    signal.signal(signal.SIGTERM, lambda *_: stop_ranks(int(job)))
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        arguments = arguments[:_FRESH_ARGUMENTS]
    mine = (SWITCH, ARGUMENTS, "ROPEWAY_LOCK_HELD", "ROPEWAY_SUPERVISED_BY")
    inherited = {name: value for name, value in os.environ.items() if name not in mine}
    try:
        environment = rank_environment(inherited, ranks=ranks)
        command = build_launch_command(environment, arguments, ranks=ranks, port=free_port())
        code = subprocess.run(command, env=environment, check=False).returncode
    except RopewayError as error:
        print(f"ropeway: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    code = code if code >= 0 else 128 - code
    write_json(record, {"code": code})
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
