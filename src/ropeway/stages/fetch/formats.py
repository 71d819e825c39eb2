"""The formats of files, by name, and what to do with a file of another one."""

from pathlib import PurePosixPath

from ropeway.runtime.errors import ConfigError

COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
DOCUMENTS = (".md", ".txt")  # the whole file is one document
FORMATS = (".arrow", ".csv", ".json", ".jsonl", *DOCUMENTS, ".parquet", ".tsv")
ARCHIVES = (".tar", ".tgz", ".zip")
_COMPRESSED_INSIDE = (".arrow", ".parquet", ".tgz", ".zip")  # read at any place, or compressed by themselves
SUPPORTED = (
    "expected a file name in .json, .jsonl, .csv, .tsv, .txt or .md (optionally .gz, .zst, .bz2 or .xz), .parquet, "
    ".arrow, .zip, .tar (optionally compressed) or .tgz"
)
# Suffix of an unsupported format -> what to do. Renaming the file would not change its format.
_FIXES = {
    ".feather": "write it as parquet, for example with pyarrow.feather.read_table and pyarrow.parquet.write_table",
    ".xlsx": "export its table as .csv or .parquet",
    ".ndjson": "rename it to end in .jsonl",
    ".7z": "extract it and name the extracted files",
    ".rar": "extract it and name the extracted files",
}


def find_format(name: str) -> str | None:
    """Return the format of a file or archive by its name, one of `FORMATS` or `ARCHIVES`; None if it has none of them.

    >>> find_format("a.jsonl.gz"), find_format("a.tar.zst"), find_format("a.parquet.gz"), find_format("a.pdf")
    ('.jsonl', '.tar', None, None)
    """
    suffixes = [part for part in PurePosixPath(name).suffixes if part not in COMPRESSED]
    form = suffixes[-1] if suffixes else ""
    if form not in (*FORMATS, *ARCHIVES) or (form in _COMPRESSED_INSIDE and name.endswith(COMPRESSED)):
        return None
    return form


def is_archive(name: str) -> bool:
    """Return whether a name is that of an archive."""
    return find_format(name) in ARCHIVES


def check_format(name: str) -> str:
    """Return the format of a file or archive by its name.

    Raises:
        ConfigError: The name has no suffix of a supported format.
    """
    if form := find_format(name):
        return form
    raise ConfigError(f"{name}: {SUPPORTED}; {_suggest_fix(PurePosixPath(name).suffixes)}")


def _suggest_fix(suffixes: list[str]) -> str:
    inner = [part for part in suffixes if part not in COMPRESSED]
    if inner and inner[-1] in _COMPRESSED_INSIDE:
        return f"{inner[-1]} is read without another compression: decompress the file"
    known = [_FIXES[part.lower()] for part in reversed(inner) if part.lower() in _FIXES]
    if known:
        return known[0]
    if inner and inner[-1].lower() in (*FORMATS, *ARCHIVES):
        return "rename the suffix to lower case"
    return "if it has one of these formats, rename it; if not, convert it or remove it from `paths` or `files`"


def check_document(name: str, rows: str) -> None:
    """Raise ConfigError if a file is one whole document and `rows` of its source are not documents."""
    if find_format(name) in DOCUMENTS and rows != "text":
        raise ConfigError(
            f"{name}: a .txt or .md file is one document, but the source has rows: {rows}; name other files in `paths` "
            "or `files`, or set rows: text"
        )


def split_members(pattern: str) -> tuple[str, str | None]:
    """Return (pattern of archives, pattern of their members); the second is None if all members are meant.

    >>> split_members("data/a.zip/train/*.jsonl"), split_members("data/a.zip"), split_members("data/*.jsonl")
    (('data/a.zip', 'train/*.jsonl'), ('data/a.zip', None), ('data/*.jsonl', None))
    """
    parts = pattern.split("/")
    at = next((at for at, part in enumerate(parts, start=1) if is_archive(part)), len(parts))
    return "/".join(parts[:at]), "/".join(parts[at:]) or None
