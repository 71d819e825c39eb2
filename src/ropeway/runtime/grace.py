"""How long a stop takes to save a training, and the two files by which the supervisor and the ranks agree on it.

Ranks on other machines are not children of the supervisor, so no signal of it reaches them. While the ranks train,
these files of the shared workspace stand beside the exit record of their stage:

.work/train.grace.json   the seconds that a stop needs, by what this attempt measured
.work/train.stop         empty; the supervisor writes into it, and all ranks then save and end

Rank 0 reads `train.stop` at every look at the stop request. The file exists before it is written into, because NFS
caches the absence of a file for up to a minute, but compares a file with the server whenever it is opened: nfs(5).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import write_json

GRACE_VARIABLE = "ROPEWAY_GRACE_SECONDS"
LEAST_SECONDS = 60.0
SAVE_BYTES_PER_SECOND = 0.2e9  # estimate until a save is measured; hashing alone was measured at 0.4 to 0.78 GB/s
_SAFETY = 1.5  # a later save or step may take longer than the longest so far
_END_SECONDS = 15.0  # from the last save to the end of all processes
_GROWTH = 1.05  # the file is written again when the seconds have grown by this factor


class StopFiles:
    """The two files of a stage."""

    def __init__(self, work: Path, stage: str) -> None:
        """Name the files of a stage in the folder `.work`."""
        self._stop, self._grace = work / f"{stage}.stop", work / f"{stage}.grace.json"
        self._job = work / f"{stage}.slurm.json"  # `ropeway.runtime.slurm`: a job whose ranks may still train

    def open(self) -> None:
        """Create the stop file; from now on the supervisor asks through it. Rank 0 calls this before step 1."""
        self._stop.parent.mkdir(exist_ok=True)
        self._stop.write_bytes(b"")

    def remove(self) -> None:
        """Remove both: no ranks train. They are kept for a Slurm job that outlived its start."""
        if self._job.exists():
            return
        self._stop.unlink(missing_ok=True)
        self._grace.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Return whether there is a stop file."""
        return self._stop.exists()

    def request_stop(self) -> bool:
        """Ask the ranks to save and end; return whether there are ranks that will see it."""
        try:
            with self._stop.open("r+b") as file:
                file.write(b"stop\n")
        except OSError:  # no ranks train
            return False
        return True

    def is_stop_requested(self) -> bool:
        """Return whether the ranks were asked to save and end."""
        try:
            return bool(self._stop.read_bytes())
        except OSError:  # removed, or the file server does not answer at this moment
            return False

    def write_seconds(self, seconds: float) -> None:
        """Record how many seconds a stop needs."""
        with suppress(OSError):  # on a full disk the next save raises the error
            write_json(self._grace, {"seconds": seconds})

    def read_seconds(self) -> float | None:
        """Return how many seconds a stop needs; None if that is not recorded."""
        try:
            return float(json.loads(self._grace.read_bytes())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass
class StopTimes:
    """The longest times of this attempt that a stop waits for.

    Attributes:
        estimated_save_seconds: Counts until a save is measured.
        saves: Saves that a stop may have to wait for: 2 where one may be written in the background.
        check_seconds: Longest time between two looks at the stop request.
        save_seconds: Longest save; None if none is measured.
    """

    estimated_save_seconds: float
    saves: int = 1
    check_seconds: float = 0.0
    save_seconds: float | None = None
    _looked_at: float | None = field(default=None, repr=False)

    @classmethod
    def estimate(cls, checkpoint_bytes: int, *, saves: int = 1) -> "StopTimes":
        """Return the times before anything is measured."""
        return cls(checkpoint_bytes / SAVE_BYTES_PER_SECOND, saves)

    def look(self, now: float) -> None:
        """Record a look at the stop request at `now`, in seconds of a monotonic clock."""
        if self._looked_at is not None:
            self.check_seconds = max(self.check_seconds, now - self._looked_at)
        self._looked_at = now

    def leave_out(self, seconds: float) -> None:
        """Leave seconds that were spent on a save out of the time between two looks."""
        if self._looked_at is not None:
            self._looked_at += seconds

    def record_save(self, seconds: float) -> None:
        """Record how long a save took."""
        self.save_seconds = max(self.save_seconds or 0.0, seconds)

    @contextmanager
    def measure_save(self) -> Iterator[None]:
        """Measure a save during which training waits."""
        began = time.monotonic()
        yield
        self.record_save(time.monotonic() - began)

    @property
    def all_saves_seconds(self) -> float:
        """Seconds of the saves that a stop may have to wait for."""
        return self.saves * (self.estimated_save_seconds if self.save_seconds is None else self.save_seconds)

    @property
    def needed_seconds(self) -> float:
        """Seconds from the request to the end: the rest of what runs between two looks, then a save.

        >>> StopTimes(900.0, check_seconds=12.0, save_seconds=240.0).needed_seconds
        393.0
        >>> StopTimes(0.1).needed_seconds
        60.0
        """
        return max(LEAST_SECONDS, _SAFETY * (self.check_seconds + self.all_saves_seconds) + _END_SECONDS)

    def has_grown(self, before: float) -> bool:
        """Return whether the needed seconds are well above what was written before."""
        return self.needed_seconds > before * _GROWTH

    def describe_shortage(self, stated: float | None) -> str | None:
        """Return a warning if the stated grace period is too short to save; None if it suffices or none is stated."""
        if stated is None or stated >= self.check_seconds + self.all_saves_seconds:
            return None
        how = "estimated from its size" if self.save_seconds is None else "measured"
        return (
            f"{GRACE_VARIABLE} is {stated:g} s, but a stop needs up to {self.check_seconds:.0f} s to the next look at "
            f"the request and {self.all_saves_seconds:.0f} s for saving ({how}): a stopped run then resumes from an "
            f"earlier checkpoint. Set it to {self.needed_seconds:.0f} or more, or unset it"
        )


def stated_seconds(environment: Mapping[str, str] | None = None) -> float | None:
    """Return the grace period that the environment states, in seconds; None if it states none.

    Raises:
        ConfigError: `ROPEWAY_GRACE_SECONDS` is not a positive number.
    """
    return read_seconds(os.environ if environment is None else environment, GRACE_VARIABLE)


def read_seconds(environment: Mapping[str, str], name: str) -> float | None:
    """Return the seconds that a variable states; None if it is not set.

    Raises:
        ConfigError: It is not a positive number.
    """
    stated = environment.get(name)
    if stated is None:
        return None
    with suppress(ValueError):
        if 0 < float(stated) < float("inf"):
            return float(stated)
    raise ConfigError(f"{name}: expected a positive number of seconds, found {stated!r}")


def grace_seconds(files: StopFiles) -> float:
    """Return the grace period of a stop now: as stated, else as the ranks recorded, else 60 s."""
    stated = stated_seconds()
    return stated if stated is not None else files.read_seconds() or LEAST_SECONDS
