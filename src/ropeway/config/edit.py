"""Edit single lines of params.yaml for commands, and copy a profile's block out of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ropeway.config.load_params import load_profile, load_profiles, read_block
from ropeway.config.presets import KEY, SECTION
from ropeway.config.sections import RUN
from ropeway.config.yaml_limits import BoundedComposer
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import json_mapping, write_atomic, write_json
from ropeway.runtime.workspace import Workspace

_MERGE = "<<"


@lru_cache(maxsize=4)  # a copied block asks several times, and pure Python takes 0.1 s for it
def read_pairs(text: str) -> tuple[tuple[Node, Node], ...]:
    """Return the (key, value) nodes of a file's top level, with their start and end positions in the text.

    An alias is the same object as the node of its anchor.
    """
    yaml = YAML(typ="rt", pure=True)
    yaml.Composer = BoundedComposer
    tree: MappingNode = yaml.compose(text)
    return tuple(tree.value)


def choose_profile(root: Path, name: str) -> None:
    """Set `profile:` in params.yaml to this profile; only this line is edited.

    Raises:
        ConfigError: The value of `profile` is an alias, so its own line cannot be edited.
    """
    _profile_note(root).unlink(missing_ok=True)  # of a served run that was killed: a person chooses now
    if _write_profile(root, name) != name:
        print(f"params.yaml: set `profile: {name}`; later commands use it, too", flush=True)


@contextmanager
def borrow_profile(root: Path, name: str) -> Iterator[None]:
    """Set `profile:` in params.yaml to this profile for the block, and put the person's choice back afterwards.

    DVC reads the profile of a run from that line, so a run must write it. The caller holds the workspace lock. The
    choice is kept in `.work` meanwhile, so that the next run puts it back after a kill. A choice that a person makes
    during the block stays.

    Raises:
        ConfigError: As in `choose_profile`.
    """
    note = _profile_note(root)
    known = json_mapping(note.read_bytes()) if note.is_file() else {}
    path = root / "params.yaml"
    now, before = load_profile(path)[0], read_exact(path)
    own = str(known["own"]) if known.get("own") and known.get("set") == now else now
    if own != name:
        write_json(note, {"own": own, "set": name})
    try:
        _write_profile(root, name)
        borrowed = read_exact(path)
        yield
    finally:
        with suppress(ConfigError):  # params.yaml is being edited: the next run puts the line back
            if own == now and read_exact(path) == borrowed:
                if before != borrowed:
                    write_exact(path, before)  # also its quotes
            elif load_profile(path)[0] == name:
                _write_profile(root, own)
            note.unlink(missing_ok=True)


def _profile_note(root: Path) -> Path:
    return Workspace(root, "").work / "profile.json"


def _write_profile(root: Path, name: str) -> str:
    """Set the line `profile:`; return what it was. A file that is saved by an editor meanwhile is read again."""
    path = root / "params.yaml"
    while True:
        text = read_exact(path)
        was = load_profile(path, text=text)[0]
        if was == name:
            return was
        changed = select_profile(path, text, name)
        if read_exact(path) == text:
            write_exact(path, changed)
            return was


def select_profile(path: Path, text: str, name: str) -> str:
    """Return the text of params.yaml with this profile selected.

    Raises:
        ConfigError: The value of `profile` is an alias, so its own line cannot be edited.
    """
    key, value = next(pair for pair in read_pairs(text) if pair[0].value == "profile")
    if value.start_mark.index < key.end_mark.index:
        raise ConfigError(
            f"{path}: `profile`: expected a profile's name, found a YAML alias; replace the alias by the name"
        )
    return _replace(text, value, name)


def read_exact(path: Path) -> str:
    """Return a file's text with its own line ends."""
    return path.read_bytes().decode()


def write_exact(path: Path, text: str) -> None:
    """Replace a file by this text; a link stays a link, and the permissions stay."""
    path = path.resolve()
    mode = path.stat().st_mode & 0o7777
    write_atomic(path, text.encode(), mode=mode)
    path.chmod(mode)  # also the bits that the umask took


def resume_from(root: Path, profile: str | None, run: str) -> None:
    """Set `resume_from` in a profile's block of params.yaml; `profile` None means the selected profile.

    Raises:
        ConfigError: `run` has an invalid format, or the edit would change other profiles too.
        TemporaryError: A run holds the workspace lock.
    """
    path = root / "params.yaml"
    if not re.fullmatch(RUN, run):
        raise ConfigError(
            f"--resume-from: expected FINGERPRINT or FINGERPRINT@STEP, 16 hex digits, found {run!r}. `ls .checkpoints` "
            "shows them"
        )
    name, chosen = load_profile(path, profile)
    if chosen.resume_from == run:
        return
    with workspace_lock(root, command="ropeway run --resume-from", profile=name):
        text = read_exact(path)
        changed = set_resume_from(text, name, run)
        old, new = (load_profiles(path, text=one)[1] for one in (text, changed))
        if new != old | {name: old[name].model_copy(update={"resume_from": run})}:
            raise ConfigError(
                f"{path}: setting resume_from in '{name}' would change other profiles, which inherit it; add "
                "`resume_from: null` to each of them"
            )
        write_exact(path, changed)
    print(
        f"params.yaml: set resume_from of profile {name} to {run}; set it to null to train from the base again",
        flush=True,
    )


def set_resume_from(text: str, profile: str, run: str) -> str:
    r"""Return the text of params.yaml with `resume_from` of a profile set; the line is added if it is missing.

    >>> print(set_resume_from("a:\n  resume_from: null  # why\nb: 1\n", "a", "00ff@12"), end="")
    a:
      resume_from: "00ff@12"  # why
    b: 1
    >>> print(set_resume_from("a: &x\n  b: 1\n", "a", "00ff"), end="")
    a: &x
      resume_from: "00ff"
      b: 1
    """
    block = {key.value: value for key, value in read_pairs(text)}[profile]
    stated = next((value for key, value in block.value if key.value == "resume_from"), None)
    if stated is not None:
        return _replace(text, stated, f'"{run}"')  # quoted: digits alone would be a number
    first = block.value[0][0].start_mark
    separator = ", " if isinstance(block, MappingNode) and block.flow_style else "\n" + " " * first.column
    return f'{text[: first.index]}resume_from: "{run}"{separator}{text[first.index :]}'


def add_forgotten(root: Path, profile: str | None, digests: Sequence[str], reason: str = "") -> tuple[str, list[str]]:
    """Add digests to `forget` of a profile in params.yaml; None means the selected profile.

    Profiles that take their `forget` from this one get them, too. `reason` becomes a comment beside each.

    Returns:
        The profile's name, and the digests that were not listed before.

    Raises:
        ConfigError: The value of `forget` is an alias or has comments between brackets, or the edit would change
            another key.
        TemporaryError: A run holds the workspace lock.
    """
    path = root / "params.yaml"
    name = load_profile(path, profile)[0]
    with workspace_lock(root, command="ropeway forget", profile=name):
        chosen = load_profile(path, name)[1]  # under the lock: another `forget` may have ended just before
        new = [digest for digest in dict.fromkeys(digests) if digest not in chosen.forget]
        if not new:
            return name, new
        text = read_exact(path)
        changed = set_forgotten(text, name, [*chosen.forget, *new], new, reason)
        old, edited = (load_profiles(path, text=one)[1] for one in (text, changed))
        kept = {one: block.model_copy(update={"forget": edited[one].forget}) for one, block in old.items()}
        if edited != kept or edited[name].forget != [*chosen.forget, *new]:
            raise ConfigError(f"{path}: `forget` of '{name}' cannot be edited there; write it as a list of its own")
        write_exact(path, changed)
    return name, new


def set_forgotten(text: str, profile: str, every: Sequence[str], new: Sequence[str], reason: str = "") -> str:
    r"""Return the text of params.yaml with the digests `new` in `forget` of a profile, where `every` lists all.

    >>> print(set_forgotten("a:\n  forget: []  # none\nb: 1\n", "a", ["00ff"], ["00ff"], "asked"), end="")
    a:
      forget:  # none
        - "00ff"  # asked
    b: 1
    >>> print(set_forgotten("a:\n  forget:\n  - 'aa'  # old\n  b: 1\n", "a", ["aa", "00"], ["00"]), end="")
    a:
      forget:
      - 'aa'  # old
      - "00"
      b: 1
    >>> print(set_forgotten("a: &x\n  b: 1\n", "a", ["00ff"], ["00ff"]), end="")
    a: &x
      forget:
        - "00ff"
      b: 1
    """
    block = {key.value: value for key, value in read_pairs(text)}[profile]
    stated = next(((key, value) for key, value in block.value if key.value == "forget"), None)
    first = block.value[0][0].start_mark
    if not all(one.isprintable() or one.isspace() for one in reason):
        raise ConfigError(f"--reason {reason!r}: expected printable characters")
    comment = f"  # {' '.join(reason.split())}" if reason.strip() else ""
    if isinstance(block, MappingNode) and block.flow_style:  # all on few lines, without room for comments
        listed = "[" + ", ".join(f'"{one}"' for one in every) + "]"
        added = f"{text[: first.index]}forget: {listed}, {text[first.index :]}"
        return _replace(text, stated[1], listed) if stated else added
    if stated is None:
        lines = _list_items(every, new, comment, first.column + 2)
        return f"{text[: first.index]}forget:{lines}\n{' ' * first.column}{text[first.index :]}"
    key, value = stated
    if value.start_mark.index < key.end_mark.index or not isinstance(value, SequenceNode):
        raise ConfigError("params.yaml: `forget`: expected a list of digests, found a YAML alias; write the list there")
    if value.flow_style:
        if "#" in text[value.start_mark.index : value.end_mark.index]:  # a digest has none
            raise ConfigError(
                "params.yaml: `forget`: has comments between [ and ], which this edit would delete; write it as a list "
                "with one `- ` line for each digest"
            )
        colon = text.index(":", key.end_mark.index) + 1
        end = _line_end(text, value.end_mark.index)
        rest = text[value.end_mark.index : end].rstrip()
        return text[:colon] + rest + _list_items(every, new, comment, key.start_mark.column + 2) + text[end:]
    end = _line_end(text, value.value[-1].end_mark.index)
    return text[:end] + _list_items(new, new, comment, value.start_mark.column) + text[end:]


def _list_items(digests: Sequence[str], new: Sequence[str], comment: str, column: int) -> str:
    """Return the lines of a list, each after a line break; quoted, since digits alone would be a number."""
    return "".join(f'\n{" " * column}- "{one}"{comment if one in new else ""}' for one in digests)


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found


def _replace(text: str, node: Node, value: str) -> str:
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]


def without_comments(text: str) -> str:
    r"""Return YAML without its comments, which are for people of the workspace and may name others.

    >>> print(without_comments("# Why.\na: 'x # y'  # it\nb: >- # so\n  # text\n\n# Next.\nc: [1, # 1\n  2]"))
    a: 'x # y'
    b: >-
      # text
    <BLANKLINE>
    c: [1,
      2]
    """
    text = text.removeprefix("\ufeff")  # a byte order mark, after which the scanner counts from 1
    kept, end = [], 0
    for token in YAML(typ="safe", pure=True).scan(text):
        start, stop = token.start_mark.index, token.end_mark.index
        if stop <= end:
            continue
        body = text[start:stop]
        if getattr(token, "style", None) in ("|", ">"):  # a comment may follow the indicator of a block scalar
            head, newline, rest = body.partition("\n")
            body = head.partition(" #")[0].rstrip() + newline + rest
        kept += [_drop_comments(text[end:start], is_line_start=text[end - 1 : end] in ("", "\n")), body]
        end = stop
    return "".join([*kept, _drop_comments(text[end:], is_line_start=text[end - 1 : end] in ("", "\n"))])


def _drop_comments(between: str, *, is_line_start: bool) -> str:
    """Return what stands between two tokens of YAML, comments and the lines that hold nothing else left out."""
    head, newline, lines = ("", "", between) if is_line_start else between.partition("\n")
    return re.sub("[ \t]*#.*", "", head) + newline + re.sub(r"(?m)^[ \t]*#[^\n]*\n?", "", lines)


def cut_block(text: str, name: str) -> str:
    r"""Return the lines of a top-level key and of the comment directly above it.

    >>> print(cut_block("a: 1\n\n# Why.\nb:   # it\n  c: 2\n\n# Next.\nd: 3\n", "b"), end="")
    # Why.
    b:   # it
      c: 2
    """
    lines = text.splitlines()
    keys = [key for key, _ in read_pairs(text)]
    at = next(number for number, key in enumerate(keys) if key.value == name)
    begin = keys[at].start_mark.line
    end = keys[at + 1].start_mark.line if at + 1 < len(keys) else len(lines)
    while end > begin + 1 and lines[end - 1][:1] in ("", "#"):  # these lines belong to the next key
        end -= 1
    while begin and lines[begin - 1].startswith("#"):
        begin -= 1
    return "\n".join(lines[begin:end]) + "\n"


def inherited_names(text: str, name: str) -> list[str]:
    """Return the top-level keys that a block needs, in the order in which they can be written.

    They are what it merges (`<<`), the profile that is its `preset`, and `presets` with all that these need.
    """
    blocks = {key.value: value for key, value in read_pairs(text)}
    needed: list[str] = []
    seen = {name}

    def add(owner: str) -> None:
        seen.add(owner)
        parts = [value for _, value in blocks[owner].value] if owner == SECTION else [blocks[owner]]
        for key, value in (pair for part in parts for pair in part.value):
            for other in _named(key.value, value, blocks):
                if other not in seen:
                    add(other)
                    needed.append(other)

    add(name)
    return needed


def _named(key: str, value: Node, blocks: Mapping[str, Node]) -> list[str]:
    """Return the top-level keys that one key of a block stands for."""
    if key == KEY:
        presets = {name.value for name, _ in blocks[SECTION].value} if SECTION in blocks else set()
        return [SECTION] if value.value in presets else [value.value] if value.value in blocks else []
    merged = value.value if isinstance(value, SequenceNode) else [value]
    return [owner for owner, block in blocks.items() if key == _MERGE and any(block is one for one in merged)]


def write_blocks(params: Path, name: str, target: Path) -> None:
    """Copy a profile's block and the blocks it inherits from params.yaml into a file, and verify the copy.

    Raises:
        ConfigError: The copy has other values than the original, e.g. because of an alias below the first level.
    """
    text = params.read_text(encoding="utf-8")
    target.write_text("\n".join(cut_block(text, one) for one in (*inherited_names(text, name), name)), encoding="utf-8")
    try:
        equal = read_block(target, name) == read_block(params, name)
    except ConfigError:
        equal = False
    if not equal:
        raise ConfigError(
            f"{params}, profile '{name}': a copy of its block has other values than the original; write the block as "
            f"one top-level mapping that uses other blocks only through `{KEY}: NAME` or `<<: *name`"
        )
