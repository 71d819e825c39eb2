"""Read the members of zip and tar archives like files, in the order of the archive; nothing is extracted.

A member is streamed. Only one whose format is read from several places (json, parquet, arrow) is first copied to a
temporary file, one at a time.
"""

import hashlib
import io
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, cast

from ropeway.runtime.errors import ConfigError, DataError, full_disk_explained
from ropeway.stages.fetch.decompress import UNREADABLE, Allowance, InputFile, count_bytes, open_decompressed
from ropeway.stages.fetch.formats import ARCHIVES, DOCUMENTS, find_format
from ropeway.stages.fetch.patterns import check_splits, match_names, split_of
from ropeway.stages.fetch.saved_folders import INFO, SPLITS, STATE, check_listed, read_state
from ropeway.stages.fetch.values import make_printable

_COPIED = (".arrow", ".json", ".parquet")  # formats that are read from several places of the file
_MAX_NAME = 500  # characters; of a longer name of a member, the end is shown, which has its suffix
_ENCRYPTED = 0x1  # bit of a zip member's flags. Source: APPNOTE.TXT 4.4.4
_UNIX = 16  # bits to shift a zip member's external attributes to get its Unix mode
_NOT_REGULAR = "a link or a special file"
_SHOWN = 3
MAX_MEMBERS = 1_000_000  # names are kept to find one that is there twice, 0.1 kB each; zipfile keeps 0.7 kB
_DIRECTORY_BYTES = 128 * MAX_MEMBERS  # of a zip, which zipfile reads at once; an entry has 46 bytes and its name
_LOCAL_HEADER_BYTES = 30  # without the name. Source: APPNOTE.TXT 4.3.7
_HEADER_BYTES = 1 << 20  # of one member of a tar: long names, attributes, the map of a sparse file
_LISTED_CHARACTERS = 64 << 20  # of all names in the state.json files of an archive


@dataclass(frozen=True, slots=True)
class SkippedMember:
    """A member that is not read."""

    where: str
    reason: str  # one of a few fixed texts


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive to read.

    Attributes:
        name: Its name in manifests.
        patterns: Patterns of the members to read; None: all.
        splits: Splits that may be read together.
        documents: Whether the source has documents, so a text file is a record.
        scratch: Folder for temporary files.
    """

    name: str
    path: Path
    patterns: list[str] | None
    splits: list[str]
    documents: bool
    scratch: Path


@dataclass(frozen=True, slots=True)
class _Member:
    """A member that is a file.

    Attributes:
        refusal: Why it cannot be read; empty if it can.
        open: Returns a stream of its bytes, decompressed and counted.
    """

    name: str
    refusal: str
    open: Callable[[], IO[bytes]]


@dataclass(slots=True)
class _Seen:
    """What has been read of an archive so far."""

    members: int = 0
    names: set[bytes] = field(default_factory=set)  # digests: a name in a tar may have a megabyte
    first_of_split: dict[str | None, str] = field(default_factory=dict)
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)
    listed_characters: int = 0
    states: dict[str, list[str]] = field(default_factory=dict)  # folder -> arrow files that its state.json lists
    faults: dict[str, ConfigError] = field(default_factory=dict)  # folder -> why its arrow files cannot be read
    arrow: dict[str, set[str]] = field(default_factory=dict)  # folder -> arrow files that were read


def iterate_members(archive: Archive) -> Iterator[tuple[str, InputFile] | SkippedMember]:
    """Yield (name, file) of each member to read, and each one that is skipped; a file is valid until the next one.

    Raises:
        ConfigError: No member can be read, or members of several splits would be.
        DataError: The archive is damaged or truncated, has a name twice, or a member to read is encrypted.
    """
    seen, allowance = _Seen(), Allowance(archive.path)
    members = _iterate_zip if find_format(archive.path.name) == ".zip" else _iterate_tar
    try:
        for member in members(archive.path, allowance):
            seen.members += 1
            if seen.members > MAX_MEMBERS:
                raise _too_many(archive.path)
            if archive.patterns and not any(match_names(archive.patterns, [member.name]).values()):
                _note_state(archive, member, seen, allowance)
                continue
            name = hashlib.blake2b(member.name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if name in seen.names:
                raise DataError(f"{archive.path}: has two members {_show(member.name)}; pack it again")
            seen.names.add(name)
            yield from _offer(archive, member, seen, allowance)
    except (*UNREADABLE, UnicodeDecodeError) as error:  # the last one: of a member's name
        raise DataError(
            f"{archive.path}: reading failed after {len(seen.names):,} members ({error}); fetch it again"
        ) from error
    _check_end(archive, seen)


def _too_many(path: Path) -> DataError:
    return DataError(
        f"{path}: has more than {MAX_MEMBERS:,} members; pack several archives, or put their records into one file"
    )


def _offer(
    archive: Archive, member: _Member, seen: _Seen, allowance: Allowance
) -> Iterator[tuple[str, InputFile] | SkippedMember]:
    name = f"{archive.name}/{_show(member.name)}"
    label = f"{archive.path}/{_show(member.name)}"
    form = find_format(label)
    reason = _explain_skip(archive, member, form)
    if not reason and member.refusal:
        raise DataError(f"{label}: {member.refusal}")
    if reason:
        seen.skipped += 1
        if seen.skipped <= _SHOWN:
            seen.first_skipped.append(f"{name}: {reason}")
        yield SkippedMember(name, reason)
        return
    with _readable(label, member.open, allowance, archive.scratch if form in _COPIED else None) as file:
        folder, own = str(PurePosixPath(member.name).parent), PurePosixPath(member.name).name
        if own == STATE and (listed := read_state(file)) is not None:
            _note_listed(archive, seen, folder, listed)
            yield SkippedMember(name, "metadata of a saved folder")
            return
        if form == ".arrow":
            seen.arrow.setdefault(folder, set()).add(own)
        if (split := split_of(name)) not in seen.first_of_split:
            seen.first_of_split[split] = name
            check_splits(archive.name, seen.first_of_split.values(), archive.splits)
        yield name, file


def _note_listed(archive: Archive, seen: _Seen, folder: str, listed: list[str]) -> None:
    """Keep the names that a state.json lists; raise DataError if those of an archive are too many to keep."""
    seen.listed_characters += sum(map(len, listed))
    if seen.listed_characters > _LISTED_CHARACTERS:
        raise DataError(
            f"{archive.path}: its {STATE} files list names of more than {_LISTED_CHARACTERS:,} characters; pack the "
            "saved folders into several archives"
        )
    seen.states[folder] = listed


def _note_state(archive: Archive, member: _Member, seen: _Seen, allowance: Allowance) -> None:
    """Read a state.json that no pattern selects: it tells which arrow files beside it have rows."""
    place = PurePosixPath(member.name)
    if place.name != STATE or member.refusal:
        return
    with _readable(f"{archive.path}/{_show(member.name)}", member.open, allowance, archive.scratch) as file:
        try:
            if (listed := read_state(file)) is not None:
                _note_listed(archive, seen, str(place.parent), listed)
        except ConfigError as error:
            seen.faults[str(place.parent)] = error


def _show(name: str) -> str:
    shown = make_printable(name)
    return shown if len(shown) <= _MAX_NAME else f"…{shown[-_MAX_NAME:]}"


def _explain_skip(archive: Archive, member: _Member, form: str | None) -> str:
    """Return why a member is no file of records; empty if it is one."""
    parts = PurePosixPath(member.name).parts
    own = PurePosixPath(member.name).name
    if "__MACOSX" in parts or own.startswith("._"):
        return "metadata of macOS"
    if own in (INFO, SPLITS):
        return "metadata of a saved folder"
    if form is None:
        return "no supported format"
    if form in ARCHIVES:
        return "an archive in an archive"
    if form in DOCUMENTS and not archive.documents:
        return "a document, the source has other rows"
    return member.refusal if member.refusal == _NOT_REGULAR else ""


def _check_end(archive: Archive, seen: _Seen) -> None:
    """Check what is known only after the last member.

    Raises:
        ConfigError: No member was read, or an arrow file is not one of its saved folder.
    """
    for fault in (fault for folder, fault in seen.faults.items() if folder in seen.arrow):
        raise fault
    for folder, listed in seen.states.items():
        found = seen.arrow.get(folder, set())
        check_listed(f"{archive.name}/{folder}/{STATE}", listed, found)
        if (lost := set(listed) - found) and not archive.patterns:
            raise ConfigError(f"sources: {archive.name}/{folder}/{STATE} lists {min(lost)}, which the archive lacks")
    if not seen.first_of_split:
        more = seen.skipped - _SHOWN
        shown = "; ".join(seen.first_skipped) + (f"; and {more:,} more" if more > 0 else "")
        wanted = f" that matches {archive.patterns}" if archive.patterns else ""
        raise ConfigError(f"sources: {archive.name} has no member{wanted} of a supported format ({shown or 'empty'})")


@contextmanager
def _readable(
    label: str, open_member: Callable[[], IO[bytes]], allowance: Allowance, scratch: Path | None
) -> Iterator[InputFile]:
    """Return a member as a file: streamed, or copied to a temporary file in `scratch`."""
    if scratch is None:
        yield InputFile(label, open_member, allowance)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with open_member() as stream, tempfile.NamedTemporaryFile(dir=scratch, prefix="member-") as copy:
        with full_disk_explained(f"sources: {label}", kept="the copy of this member was removed"):
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
        yield InputFile(label, Path(copy.name), allowance)


def _iterate_zip(path: Path, allowance: Allowance) -> Iterator[_Member]:
    with (
        open_decompressed(InputFile.of(path)) as file,
        zipfile.ZipFile(cast("IO[bytes]", _ZipReader(file, path))) as opened,
    ):
        _check_overlaps(opened.infolist())
        for info in opened.infolist():
            mode = info.external_attr >> _UNIX
            if not info.filename:
                raise zipfile.BadZipFile("a member has no name")
            if info.is_dir():
                continue
            refusal = "is encrypted; pack it without a password" if info.flag_bits & _ENCRYPTED else ""
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                refusal = _NOT_REGULAR
            yield _Member(info.filename, refusal, partial(_open_zip_member, opened, info, allowance))


def _open_zip_member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, allowance: Allowance) -> IO[bytes]:
    return count_bytes(opened.open(info), allowance)


def _check_overlaps(members: list[zipfile.ZipInfo]) -> None:
    """Raise BadZipFile if members share bytes, by which a small archive stands for any amount of data.

    Source: David Fifield, "A better zip bomb", WOOT 2019. Python checks it from 3.11.8 and 3.12.2 on.
    """
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise zipfile.BadZipFile(f"the member {_show(info.filename)} has bytes of another one")
        end = info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size


class _ZipReader:
    """The file of a zip; zipfile reads the directory of all members at once."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise _too_many(self._path)
        return self._file.read(size)


def _iterate_tar(path: Path, allowance: Allowance) -> Iterator[_Member]:
    with open_decompressed(InputFile(str(path), path, allowance)) as file:
        reader = _ForwardReader(file)
        with _bounded_header(reader):
            opened = tarfile.TarFile(fileobj=reader, mode="r", tarinfo=_StrictTarInfo)
        with opened:
            while (info := _next_member(opened, reader)) is not None:
                cast("Any", opened).members.clear()  # headers that would be kept in memory until the end
                if not info.isdir():
                    refusal = "" if info.isreg() else _NOT_REGULAR
                    yield _Member(info.name, refusal, partial(_open_tar_member, opened, info, allowance))
        while block := reader.read(1 << 20):
            if block.strip(b"\0"):
                raise tarfile.ReadError("more data after the end marker, as of a second archive")


def _next_member(opened: tarfile.TarFile, reader: "_ForwardReader") -> tarfile.TarInfo | None:
    with _bounded_header(reader):
        info = opened.next()
    if sum(len(key) + len(value) for key, value in opened.pax_headers.items()) > _HEADER_BYTES:
        raise tarfile.ReadError(f"attributes of more than {_HEADER_BYTES:,} bytes for all members")
    return info


@contextmanager
def _bounded_header(reader: "_ForwardReader") -> Iterator[None]:
    """Let tarfile read one member's header, whose parts state their own sizes and may follow each other endlessly.

    Raises:
        ReadError: The header is longer than `_HEADER_BYTES`, or damaged.
    """
    reader.header_bytes = 0
    try:
        yield
    except (RecursionError, ValueError, OverflowError) as error:  # of many parts in a row; of numbers in them
        raise tarfile.ReadError(f"a damaged header ({type(error).__name__})") from None
    finally:
        reader.header_bytes = None


def _open_tar_member(opened: tarfile.TarFile, info: tarfile.TarInfo, allowance: Allowance) -> IO[bytes]:
    stream = opened.extractfile(info)
    if stream is None:
        raise tarfile.ReadError(f"{_show(info.name)} is no regular file")
    # The holes of a sparse file are zeros that the archive does not have.
    return count_bytes(stream, allowance) if info.issparse() else stream


class _StrictTarInfo(tarfile.TarInfo):
    """Reads a member's header; unlike tarfile's own, a damaged or missing one is never taken for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not documented: the end marker was read
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a damaged header, or no end marker: {error}") from None


class _ForwardReader(io.RawIOBase):
    """A stream that is read from its beginning to its end; tarfile seeks forward only.

    Attributes:
        header_bytes: Bytes that were read of a header; None while no header is read.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._at = stream, 0
        self.header_bytes: int | None = None

    def read(self, size: int = -1, /) -> bytes:
        if self.header_bytes is not None:
            self.header_bytes += size
            if size < 0 or self.header_bytes > _HEADER_BYTES:
                raise tarfile.ReadError(f"a header of more than {_HEADER_BYTES:,} bytes")
        return self._advance(size)

    def _advance(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, _whence: int = 0, /) -> int:
        if offset < self._at:
            raise tarfile.ReadError("a member was read twice")
        while self._at < offset and self._advance(min(offset - self._at, 1 << 20)):
            pass
        return self._at
