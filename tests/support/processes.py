"""Processes of a run that is being tested."""

from contextlib import suppress

import psutil


def kill_all(processes):
    """Send SIGKILL to each; one may end by itself, or of another's end, just before."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def command_of(process):
    """Return the words of a process's command line; none when it has ended."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []
