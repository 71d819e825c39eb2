"""The process of `recorded_disk`: serves a folder as a disk in user space and records every change.

`python -m tests.support.recorded_disk_server BACKING MOUNT RECORD` ends when MOUNT is unmounted. RECORD is a sequence
of pickled operations, which `power_loss.Disk` applies. What BACKING holds at the start counts as durable.
"""

import errno
import json
import os
import pickle
import sys
from pathlib import Path

import mfusepy

from tests.support.recorded_disk import Fault


class Recorder(mfusepy.Operations):
    """Passes every operation on to `backing`; one at a time, so the record has the order of the changes."""

    use_ns = True  # times are integers

    def __init__(self, backing, record):
        self.backing, self.log = backing, record.open("wb")
        self.ids, self.next = {}, 0
        self.rule, self.seen = None, 0
        self._identify(backing)
        self._record_existing(backing)

    def init(self, _path):
        print("mounted", flush=True)

    def destroy(self, _path):
        self.log.close()

    def _identify(self, path):
        """Give a new file or folder a number of its own; the file system uses those of deleted ones again."""
        self.ids[os.lstat(path).st_ino] = self.next
        self.next += 1
        return self.next - 1

    def _record_existing(self, folder):
        for entry in os.scandir(folder):
            kind = "dir" if entry.is_dir(follow_symlinks=False) else "file"
            number = self._identify(entry.path)
            target = os.readlink(entry.path) if entry.is_symlink() else None
            self._write("add", self._id(folder), entry.name, number, "symlink" if target else kind, target)
            if kind == "dir":
                self._record_existing(entry.path)
            elif target is None:
                self._write("write", number, 0, Path(entry.path).read_bytes())
                self._write("chmod", number, entry.stat().st_mode & 0o7777)
                self._write("fsync", number)
        self._write("fsyncdir", self._id(folder))

    def _write(self, *operation):
        pickle.dump(operation, self.log)

    def _id(self, path):
        return self.ids[os.lstat(path).st_ino]

    def _at(self, path):
        return f"{self.backing}{path}"

    def _parent(self, path):
        parent, _, name = path.rpartition("/")
        return self._id(self._at(parent)), name

    def _meet(self, kind):
        """Raise the error of the present fault, if it concerns this kind of operation."""
        if self.rule is None or kind not in self.rule.kinds:
            return
        self.seen += 1
        if self.rule.skip < self.seen <= self.rule.skip + self.rule.times:
            raise mfusepy.FuseOSError(getattr(errno, self.rule.error))

    def setxattr(self, _path, name, value, _options, _position=0):
        if name == "user.mark":
            self._write("mark", bytes(value).decode())
            self.log.flush()
        elif name == "user.fault":
            self.rule, self.seen = (Fault(**json.loads(bytes(value))) if value else None), 0
        else:
            raise mfusepy.FuseOSError(errno.ENOTSUP)
        return 0

    def getxattr(self, _path, name, _position=0):
        raise mfusepy.FuseOSError(errno.ENODATA if name.startswith("user.") else errno.ENOTSUP)

    def listxattr(self, _path):
        return []

    def getattr(self, path, fh=None):
        facts = os.fstat(fh) if fh else os.lstat(self._at(path))
        names = ("mode", "ino", "nlink", "uid", "gid", "size", "blocks")
        found = {f"st_{name}": getattr(facts, f"st_{name}") for name in names}
        return found | {f"st_{name}": getattr(facts, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}

    def access(self, path, amode):
        if not os.access(self._at(path), amode):
            raise mfusepy.FuseOSError(errno.EACCES)

    def statfs(self, _path):
        facts = os.statvfs(self.backing)
        names = ("bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "flag", "frsize", "namemax")
        return {f"f_{name}": getattr(facts, f"f_{name}") for name in names}

    def readdir(self, path, _fh):
        return [".", "..", *os.listdir(self._at(path))]

    def readlink(self, path):
        return os.readlink(self._at(path))

    def open(self, path, flags):
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._meet("truncate" if flags & os.O_TRUNC else "utimens")
        handle = os.open(self._at(path), flags & ~(os.O_CREAT | os.O_EXCL))
        if flags & os.O_TRUNC:
            self._write("truncate", self._id(self._at(path)), 0)
        return handle

    def create(self, path, mode, _fi=None):
        self._meet("create")
        handle = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        number = self._identify(self._at(path))
        self._write("add", *self._parent(path), number, "file", None)
        self._write("chmod", number, os.fstat(handle).st_mode & 0o7777)
        return handle

    def read(self, _path, size, offset, fh):
        self._meet("read")
        return os.pread(fh, size, offset)

    def write(self, _path, data, offset, fh):
        self._meet("write")
        self._write("write", self.ids[os.fstat(fh).st_ino], offset, bytes(data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        size = os.fstat(fh).st_size if fh else os.lstat(self._at(path)).st_size
        self._meet("grow" if length > size else "truncate")
        if fh:
            os.ftruncate(fh, length)
        else:
            os.truncate(self._at(path), length)
        self._write("truncate", self.ids[os.fstat(fh).st_ino] if fh else self._id(self._at(path)), length)

    def flush(self, _path, _fh):
        return 0

    def release(self, _path, fh):
        os.close(fh)

    def fsync(self, _path, _datasync, fh):
        self._write("fsync", self.ids[os.fstat(fh).st_ino])
        return 0

    def fsyncdir(self, path, _datasync, _fh):
        self._write("fsyncdir", self._id(self._at(path)))
        return 0

    def mkdir(self, path, mode):
        self._meet("mkdir")
        os.mkdir(self._at(path), mode)
        self._write("add", *self._parent(path), self._identify(self._at(path)), "dir", None)

    def symlink(self, target, source):
        self._meet("symlink")
        os.symlink(source, self._at(target))
        self._write("add", *self._parent(target), self._identify(self._at(target)), "symlink", source)

    def link(self, target, source):
        self._meet("link")
        os.link(self._at(source), self._at(target), follow_symlinks=False)
        self._write("add", *self._parent(target), self._id(self._at(target)), "link", None)

    def unlink(self, path):
        self._meet("unlink")
        os.unlink(self._at(path))
        self._write("remove", *self._parent(path))

    def rmdir(self, path):
        self._meet("rmdir")
        os.rmdir(self._at(path))
        self._write("remove", *self._parent(path))

    def rename(self, old, new):
        self._meet("rename")
        moved = (*self._parent(old), *self._parent(new), self._id(self._at(old)))
        os.rename(self._at(old), self._at(new))
        self._write("rename", *moved)

    def chmod(self, path, mode):
        self._meet("chmod")
        os.chmod(self._at(path), mode)
        self._write("chmod", self._id(self._at(path)), mode & 0o7777)

    def chown(self, path, uid, gid):
        os.chown(self._at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path, times=None):
        self._meet("utimens")
        os.utime(self._at(path), ns=times, follow_symlinks=False)


if __name__ == "__main__":
    backing, mount, record = map(Path, sys.argv[1:])
    mfusepy.FUSE(
        Recorder(backing, record),
        str(mount),
        foreground=True,
        nothreads=True,
        fsname="recorded",
        default_permissions=True,
    )
