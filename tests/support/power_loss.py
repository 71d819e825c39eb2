"""What a disk can hold after a power loss at any moment of a record of `recorded_disk`.

A file's data is durable from the file's fsync on, an entry of a folder from the folder's fsync on. Of everything later
a disk may hold nothing (`lost`), every name but no data (`names`), or any part (`some`): of each folder the first
changes, of each file the first writes, or its length with zeros.
"""

import os
from dataclasses import dataclass, field

STATES = ("lost", "names", "some")


@dataclass
class _File:
    data: bytearray = field(default_factory=bytearray)
    mode: int = 0o644
    target: str | None = None  # of a symbolic link
    durable: tuple[bytes, int] = (b"", 0o644)
    later: list = field(default_factory=list)  # writes (offset, data) and lengths since the fsync


@dataclass
class _Folder:
    entries: dict = field(default_factory=dict)
    durable: dict = field(default_factory=dict)
    later: list = field(default_factory=list)  # each a list of (name, number or None), applied together


class Disk:
    """The files and folders of a disk, by the numbers of the record."""

    def __init__(self):
        self.nodes = {0: _Folder()}
        self.marks = []

    def apply(self, operation):
        """Apply the next operation of the record."""
        kind, *values = operation
        getattr(self, f"_{kind}")(*values)

    def _mark(self, text):
        self.marks.append(text)

    def _change(self, folder, changes):
        node = self.nodes[folder]
        node.later.append(changes)
        _enter(node.entries, changes)

    def _add(self, folder, name, number, kind, target):
        if kind == "dir":
            self.nodes[number] = _Folder()
        elif kind != "link":
            self.nodes[number] = _File(target=target)
        self._change(folder, [(name, number)])

    def _remove(self, folder, name):
        self._change(folder, [(name, None)])

    def _rename(self, old_folder, old, new_folder, new, number):
        if old_folder == new_folder:
            self._change(old_folder, [(old, None), (new, number)])
        else:
            self._change(new_folder, [(new, number)])
            self._change(old_folder, [(old, None)])

    def _write(self, number, offset, data):
        node = self.nodes[number]
        _store(node.data, offset, data)
        node.later.append((offset, data))

    def _truncate(self, number, length):
        node = self.nodes[number]
        _resize(node.data, length)
        node.later.append((length, None))

    def _chmod(self, number, mode):
        if isinstance(node := self.nodes[number], _File):
            node.mode = mode

    def _fsync(self, number):
        node = self.nodes[number]
        node.durable, node.later = (bytes(node.data), node.mode), []

    def _fsyncdir(self, number):
        node = self.nodes[number]
        node.durable, node.later = dict(node.entries), []

    def sync(self):
        """Make everything durable."""
        for number, node in self.nodes.items():
            (self._fsync if isinstance(node, _File) else self._fsyncdir)(number)

    def write(self, target, state, draw):
        """Create the folder `target` as a power loss now can leave the disk; `draw` decides where several can be."""
        self._write_folder(0, target, state, draw, {})

    def _write_folder(self, number, target, state, draw, written):
        target.mkdir()
        for name, child in self._entries(self.nodes[number], state, draw).items():
            place = target / name
            if isinstance(self.nodes[child], _Folder):
                self._write_folder(child, place, state, draw, written)
            elif child in written:
                os.link(written[child], place, follow_symlinks=False)
            else:
                self._write_file(self.nodes[child], place, state, draw)
                written[child] = place

    @staticmethod
    def _entries(node, state, draw):
        if state == "names":
            return node.entries
        entries = dict(node.durable)
        for changes in node.later[: draw.randint(0, len(node.later)) if state == "some" else 0]:
            _enter(entries, changes)
        return entries

    @staticmethod
    def _write_file(node, place, state, draw):
        if node.target is not None:
            place.symlink_to(node.target)
            return
        data, mode = bytearray(node.durable[0]), node.durable[1] if state == "lost" else node.mode
        if state != "lost" and node.later:
            kept = 0 if state == "names" else draw.randint(0, len(node.later))
            for offset, change in node.later[:kept]:
                _resize(data, offset) if change is None else _store(data, offset, change)
            if kept < len(node.later) and draw.random() < 0.5:  # the length was stored, the data was not
                _resize(data, len(node.data))
        place.write_bytes(data)
        place.chmod(mode)


def _enter(entries, changes):
    for name, number in changes:
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def _store(data, offset, change):
    _resize(data, max(len(data), offset))
    data[offset : offset + len(change)] = change


def _resize(data, length):
    if length < len(data):
        del data[length:]
    else:
        data.extend(bytes(length - len(data)))
