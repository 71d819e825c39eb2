"""Processes of a run that is being tested."""

import os
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


def read_until(process, text):
    """Return the lines that a process prints up to the first that holds `text`."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was not said:\n{''.join(seen)}")


def describe_worker(_share):
    """Return the card of this process and torch's threads in it.

    Here: a process that calls it imports the module of the function.
    """
    import torch

    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


def raise_config_error(message, _share):
    """Fail as a share of an evaluation does whose params are wrong."""
    from ropeway.runtime.errors import ConfigError

    raise ConfigError(message)


def is_server(process):
    """Return whether a process is a Prefect server that Ropeway started."""
    return command_of(process)[1:3] == ["-m", "ropeway.orchestration.server_entry"]
