"""Archives whose bytes are the same in every process: gzip's header would hold the second they were made in."""

import functools
import gzip
import io
import tarfile
import zipfile

gz = functools.partial(gzip.compress, mtime=0)


def make_zip(members, *, method=zipfile.ZIP_DEFLATED):
    """A zip of (name, bytes) pairs or a mapping; a name that ends in `/` is a folder."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return sink.getvalue()


def make_tar(members, *, form=tarfile.PAX_FORMAT):
    """A tar of (name or TarInfo, bytes) pairs or a mapping."""
    sink = io.BytesIO()
    with tarfile.TarFile(fileobj=sink, mode="w", format=form) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()
