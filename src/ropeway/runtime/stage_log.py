"""The log of a stage: `.work/logs/<stage>.log`, every line that the stage and its ranks print.

`ropeway run` lets dvc write into it. A stage that is started otherwise, e.g. by `dvc repro`, writes into it too, and a
`LogMirror` copies it to where the output would have gone.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from ropeway.runtime.workspace import Workspace

MAX_BYTES = 16 << 20  # of a log that a resumed stage continues; more is cut from its start
_RANK_MARK = "[rank "


def log_path(root: Path, stage: str) -> Path:
    """Return the path of a stage's log."""
    return Workspace(root, "").work / "logs" / f"{file_name(stage)}.log"


def file_name(stage: str) -> str:
    """Return a stage's name without `/` and `:`, which names of stages in other folders contain."""
    return stage.replace("/", "-").replace(":", "-")


def open_log(path: Path, *, resumes: bool) -> BinaryIO:
    """Return a stage's log to append to: an empty one, or with `resumes` what the earlier attempts printed.

    Of a log above 16 MiB the second half stays, with a first line that says how much was cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not resumes:
        path.unlink(missing_ok=True)  # a reader of the old one keeps it
    elif path.is_file() and path.stat().st_size > MAX_BYTES:
        data = path.read_bytes()
        kept = data[-MAX_BYTES // 2 :].partition(b"\n")[2]
        path.write_bytes(f"(the first {len(data) - len(kept):,} bytes of this log were cut)\n".encode() + kept)
    return path.open("ab")


def writes_to(stream: TextIO, path: Path) -> bool:
    """Return whether a stream writes into a file."""
    with suppress(OSError):  # no such file, or a stream without a descriptor
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


class LogMirror:
    """Copies what is appended to a log to this process's standard output."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        """Begin at the end of the log, or at its start."""
        self._file = path.open("rb")
        if not from_start:
            self._file.seek(0, os.SEEK_END)

    def copy(self) -> None:
        """Copy what was appended since the last call. A reader that is gone is no error: the log has everything."""
        with suppress(OSError):
            while data := self._file.read(1 << 16):
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def close(self) -> None:
        """Copy the rest and close the log."""
        self.copy()
        self._file.close()


class RankLines:
    """A text stream that writes whole lines, each marked with the rank that printed it."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        """Write to `stream`."""
        self._stream, self._mark, self._rest = stream, f"{_RANK_MARK}{rank}] ", ""

    def write(self, text: str) -> int:
        """Write the lines that `text` completes, each in one call: those of other ranks cannot break into it."""
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._mark}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: a line is written when it ends."""

    def close(self) -> None:
        """Write a last line without its end."""
        if self._rest:
            self.write("\n")

    def __getattr__(self, name: str) -> object:
        """Return what the stream has besides, e.g. `fileno` and `isatty`."""
        return getattr(self._stream, name)


def label_rank_output(rank: int) -> None:
    """Mark every line that this rank prints, unless it is rank 0, whose lines are those of the run."""
    if rank:
        sys.stdout, sys.stderr = RankLines(sys.stdout, rank), RankLines(sys.stderr, rank)  # type: ignore[assignment]


def split_rank(line: str) -> tuple[int | None, str]:
    """Return the rank that marked a line, and the line without its mark.

    >>> split_rank("[rank 3] out of memory"), split_rank("training run 81aa")
    ((3, 'out of memory'), (None, 'training run 81aa'))
    """
    number, closed, rest = line.removeprefix(_RANK_MARK).partition("] ")
    if line.startswith(_RANK_MARK) and closed and number.isascii() and number.isdigit():
        return int(number), rest
    return None, line
