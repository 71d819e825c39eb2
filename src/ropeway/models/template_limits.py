"""Limits on what rendering a chat template may cost: a template of somebody else can loop for years or fill the memory.

A short conversation is rendered once in a child process with limits on processor time and memory. Jinja's sandbox
limits neither. A template that is only slow for other conversations is not found here.
"""

import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

from ropeway.runtime.errors import ConfigError

SECONDS = 10  # of processor time
MEMORY_BYTES = 1 << 30  # beyond what the process has
_OUT_OF_MEMORY = 3
_passed: set[str] = set()


def check_limits(jinja: str, name: str, render: Callable[[], object]) -> None:
    """Raise ConfigError if `render` needs more than `SECONDS` or `MEMORY_BYTES`; whatever it raises is ignored.

    A template that passed is not checked again in this process.
    """
    if jinja in _passed:
        return
    with warnings.catch_warnings():
        # The child runs Jinja and nothing else, so threads of other libraries cannot matter to it.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _render_limited(render)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == _OUT_OF_MEMORY:
        memory = os.WIFEXITED(status)
        limit = f"more than {MEMORY_BYTES >> 30} GiB of memory" if memory else f"more than {SECONDS} s"
        raise ConfigError(
            f"the chat template {name!r} ({len(jinja):,} characters) needs {limit} for a conversation of three short "
            "messages, so it is not used. Correct it, or name another one with `template` in params.yaml"
        )
    _passed.add(jinja)


def _render_limited(render: Callable[[], object]) -> None:
    """Render and end this process; a signal ends it at the limit of time."""
    code = 0
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, now + MEMORY_BYTES)
        _limit(resource.RLIMIT_CPU, SECONDS)
        _limit(resource.RLIMIT_CORE, 0)
        render()
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException:  # noqa: BLE001, S110 - a template may raise anything; rendering it again says what
        pass
    os._exit(code)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, hard))
