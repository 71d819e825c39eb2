"""What `make fuzz` feeds with arbitrary bytes: every parser of bytes that Ropeway did not write itself.

A target takes bytes. It may return or raise a RopewayError, which names the fault to the user. Whatever else it raises
is a finding, and so is a target that needs more than a second or a gigabyte.
"""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import get_args

from pydantic import ValidationError
from ruamel.yaml.error import YAMLError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ropeway.config.load_params import load_profiles
from ropeway.config.sections import PersonalKind
from ropeway.config.yaml_limits import load_yaml
from ropeway.data.data_profile import DataProfile
from ropeway.data.drift import compare_profiles
from ropeway.data.personal_data import find_personal_data
from ropeway.data.record_identity import exact_keys
from ropeway.data.record_index import RecordGroup, RecordIndex, RecordOutcome, build_record_index
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import JinjaTemplate, UnusableConversationError, find_own_templates
from ropeway.models.tokenizer import (
    open_tokenizer,
    read_additional,
    read_other_names,
    read_response_template,
    read_special_names,
    read_special_texts,
)
from ropeway.orchestration.alert_sender import read_hook, read_limits
from ropeway.orchestration.decision import read_expect
from ropeway.orchestration.display import retry_seconds
from ropeway.orchestration.flow_parameters import read_hours, read_profile, read_root, read_switch, read_text
from ropeway.orchestration.remote.pool_caller import _silent_seconds
from ropeway.orchestration.remote.request import StageRequest
from ropeway.registry import Registry
from ropeway.registry.aliases import check_text
from ropeway.registry.layout import read_reference, reviews_log, versions_log
from ropeway.registry.log import read_event
from ropeway.registry.rules import PackageFile, check_content, check_files
from ropeway.registry.signing import _read_chain, check_statement
from ropeway.registry.signing_keys import Trust
from ropeway.registry.version_manifest import VersionManifest, load_version_manifest
from ropeway.reporting.history import read_price
from ropeway.reporting.markdown import escape
from ropeway.runtime.devices import count_ranks, read_hostfile
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.grace import read_seconds
from ropeway.runtime.worker_processes import read_process_count
from ropeway.stages.base.stage import check_gguf_rope
from ropeway.stages.fetch.archives import Archive, SkippedMember, iterate_members
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.records import find_unused, required_columns, to_record
from ropeway.stages.fetch.values import UnreadableError
from ropeway.stages.package.weights import locate_tensors, read_dtypes
from ropeway.stages.train.stage import _read_keep_runs
from ropeway.storage import open_store
from ropeway.storage.folder import FileStore
from ropeway.storage.s3_client import _read_number

ROWS = ("messages", "sharegpt", "alpaca", "text")
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst", ".json.bz2")
MOST_ITEMS = 2000
ROOT = Path(__file__).parents[2]
KINDS = get_args(PersonalKind)
TOKENIZER = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")).to_str().encode()  # noqa: S106
FILE = PackageFile("config.json", "0" * 64, 2)


class OneObject:
    """A store in which every key has the same bytes."""

    url = "file:///fuzz"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def get(self, _key):
        return self.data


def scratch_folder(pid: int) -> Path:
    """Return the folder in which the targets of a process write, in memory."""
    return Path("/dev/shm", f"ropeway-fuzz-{pid}")  # noqa: S108 - made with mkdir, which fails if it exists


@cache
def _folder() -> Path:
    folder = scratch_folder(os.getpid())
    folder.mkdir()
    return folder


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def manifest(data):
    import hashlib

    load_version_manifest(OneObject(data), "tiny", hashlib.sha256(data).hexdigest())


def event(data):
    for log in (versions_log("tiny"), reviews_log("tiny")):
        read_event(OneObject(data), log, 1)


def reference(data):
    read_reference(data.decode(errors="surrogateescape"))


def package_path(data):
    text = data.decode(errors="surrogateescape")
    check_files([PackageFile(text, "0" * 64, 2), FILE])


def package_content(data):
    name = ("a.json", "a.safetensors", "a.model", "a.png", "a.html")[len(data) % 5]
    check_content(_file("content", data), name)


def signature(data):
    _read_chain(data)
    assert not check_statement(data, VersionManifest("tiny", (FILE,), {}), Trust({}))


def params(data):
    load_profiles(ROOT / "params.yaml", text=data.decode(errors="surrogateescape"))


def rows(data):
    """A file of records in any format and kind of rows, chosen by its first two bytes."""
    if len(data) < 2:
        return
    kind, form = ROWS[data[0] % len(ROWS)], FORMATS[data[1] % len(FORMATS)]
    form = ".txt" if kind == "text" and data[1] % 3 == 0 else form
    _read_rows(InputFile.of(_file(f"rows{form}", data[2:])), kind)


def _read_rows(file: InputFile, kind: str) -> None:
    for count, (_, value) in enumerate(iterate_objects(file, required_columns(kind, {}))):
        if not isinstance(value, UnreadableError):
            try:
                to_record(value, kind, {})
                find_unused(value, kind, {})
            except UnreadableError:
                pass
        if count > MOST_ITEMS:
            break


def archive(data):
    if not data:
        return
    name = ("rows.zip", "rows.tar", "rows.tgz", "rows.tar.zst")[data[0] % 4]
    path = _file(name, data[1:])
    found = Archive(name, path, None, [], documents=bool(data[0] & 128), scratch=_folder() / "scratch")
    (_folder() / "scratch").mkdir(exist_ok=True)
    for count, one in enumerate(iterate_members(found)):
        if not isinstance(one, SkippedMember):
            _read_rows(one[1], "text" if found.documents else "messages")
        if count > MOST_ITEMS:
            break


def record(data):
    """A JSON value as a record of each kind of rows."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    for kind in ROWS:
        try:
            to_record(value, kind, {})
            find_unused(value, kind, {})
        except UnreadableError:
            pass


def template(data):
    chat = JinjaTemplate(data.decode(errors="surrogateescape"), {"bos": "<s>", "eos": "</s>"}, ["<s>", "</s>"])
    with suppress(UnusableConversationError):
        chat.render(Conversation("be kind", ("hello", "yes")), end="</s>")


def request(data):
    StageRequest.from_json(data.decode(errors="surrogateescape"))


def data_profile(data):
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        try:
            compare_profiles(values, values, None)
            DataProfile.from_json(values)
        except (KeyError, TypeError, ValueError):  # its readers make these a DataError
            pass


def record_index(data):
    """An index of records, and digests that it has or has not."""
    index = RecordIndex.open(lambda at, count: data[at : at + count], len(data), "records.index")
    for asked in ([data[-11:-2].ljust(9, b"\0"), b"\xff" * 9], [bytes([one] * 9) for one in range(100)]):
        assert len(index.find(asked)) == len(asked)


def personal_data(data):
    """Text in which personal data is looked for: what is found lies in the text, in order."""
    text, end = data.decode(errors="replace"), 0
    for found in find_personal_data(text, KINDS):
        assert end <= found.begin < found.end <= len(text)
        end = found.end


def tokenizer(data):
    folder = _folder() / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER if data[:1] == b"#" else data)
    (folder / "tokenizer_config.json").write_bytes(data[1:] if data[:1] == b"#" else b"{}")
    open_tokenizer(folder)
    read_special_names(folder)
    read_special_texts(folder)
    read_additional(folder)
    read_other_names(folder)
    read_response_template(folder)
    find_own_templates(folder)


def weights(data):
    folder = _folder() / "weights"
    folder.mkdir(exist_ok=True)
    index = folder / "model.safetensors.index.json"
    if data[:1] == b"{":
        index.write_bytes(data)
        assert all(path.parent == folder for path in locate_tensors(folder).values())
        return
    index.unlink(missing_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(data)
    list(read_dtypes(path))
    locate_tensors(folder)


def markdown(data):
    """Text of a record in a page: no tag of it may survive."""
    text = escape(data.decode(errors="replace"))
    assert "<" not in text.replace("\\<", "").replace("&lt;", ""), text


FLOW_PARAMETERS = {
    "digest": partial(read_text, "digest"), "expect": partial(read_text, "expect"), "root": read_root,
    "profile": read_profile, "rehearse": partial(read_switch, "rehearse"),
    "expires_hours": partial(read_hours, "expires_hours"),
    "trigger": partial(read_text, "trigger", is_empty_allowed=True),
}  # fmt: skip


def flow_parameters(data):
    """Parameters of a flow run as an API client sends them: JSON values, by name, and the same value for each name."""
    try:
        sent = json.loads(data)
    except (ValueError, RecursionError):
        sent = data.decode(errors="surrogateescape")
    values = sent if isinstance(sent, dict) else dict.fromkeys(FLOW_PARAMETERS, sent)
    for name, read in FLOW_PARAMETERS.items():
        try:
            found = read(values.get(name))
        except ALLOWED:
            continue
        assert name in ("rehearse", "expires_hours", "profile") or str(found).isprintable()
        if name in ("digest", "expect"):
            for parse in (read_reference, _registry().find, lambda text: read_expect(_registry(), "tiny@v1", text)):
                with suppress(ALLOWED):
                    parse(found)


@cache
def _registry():
    return Registry(FileStore(_folder() / "registry"))


def review_form(data):
    """The answer to a review as a person types it or an API client posts it: what is recorded is a printable text."""
    try:
        sent = json.loads(data)
    except (ValueError, RecursionError):
        sent = {"decision": "approve", "reviewer": data.decode(errors="surrogateescape"), "comment": "ok"}
    try:
        said = _form()(**sent) if isinstance(sent, dict) and all(isinstance(key, str) for key in sent) else None
    except ValidationError:
        return
    if said is None:
        return
    for text in (said.reviewer.strip(), said.comment.strip()):
        check_text("answer", text)
        json.dumps(text).encode()
        assert "<" not in escape(text).replace("\\<", "").replace("&lt;", "")
    assert said.decision in ("approve", "reject")


@cache
def _form():
    from flows.review import Form

    return Form


# Readers of variables that state numbers and addresses.
NUMBERS = {
    "ROPEWAY_RANKS": lambda env: count_ranks(env, devices=_folder()), "ROPEWAY_KEEP_RUNS": _read_keep_runs,
    "ROPEWAY_TOKENIZE_WORKERS": partial(read_process_count, "ROPEWAY_TOKENIZE_WORKERS"),
    "ROPEWAY_GRACE_SECONDS": lambda env: read_seconds(env, "ROPEWAY_GRACE_SECONDS"),
    "ROPEWAY_GPU_HOUR_PRICE": read_price,
}  # fmt: skip
PROCESS_VARIABLES = {
    "ROPEWAY_RETRY_SECONDS": retry_seconds, "ROPEWAY_ALERT_URL": read_hook, "ROPEWAY_ALERT_REVIEW_HOURS": read_limits,
    "ROPEWAY_WORKER_SILENCE_SECONDS": _silent_seconds,
    "ROPEWAY_S3_TIMEOUT_SECONDS": lambda: _read_number("ROPEWAY_S3_TIMEOUT_SECONDS", 60),
}  # fmt: skip


def environment(data):
    """A value for each variable that states a number or an address."""
    text = data.replace(b"\0", b"").decode(errors="surrogateescape")
    with suppress(ALLOWED):
        open_store(text)
    for name, read in NUMBERS.items():
        with suppress(ALLOWED):
            read({name: text})
    for name, read in PROCESS_VARIABLES.items():
        os.environ[name] = text
        try:
            with suppress(ALLOWED):
                read()
        finally:
            del os.environ[name]
    with suppress(ALLOWED):
        read_hostfile(_file("hostfile", data))


def yaml(data):
    """A lock or stage graph of DVC."""
    with suppress(YAMLError, ValueError):  # its readers make these a ConfigError
        load_yaml(data)


def gguf(data):
    check_gguf_rope(_file("a.gguf", data + b".rope.scaling."))


TARGETS: dict[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (
        manifest, event, reference, package_path, package_content, signature, params, rows, archive, record, template,
        request, data_profile, record_index, personal_data, tokenizer, weights, markdown, flow_parameters,
        review_form, environment, yaml, gguf,
    )
}  # fmt: skip
ALLOWED = RopewayError


def seeds() -> dict[str, list[bytes]]:
    """Return valid inputs per target, from which mutations start."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tools = {"messages": [*chat["messages"], {"role": "tool", "content": [{"type": "text", "text": "x"}]}], "tools": []}
    other = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
    told = {"instruction": "a", "input": "", "output": "b"}
    jsons = [json.dumps(one).encode() for one in (chat, tools, other, told, {"text": "a b"}, [chat])]
    lines = b"\n".join(jsons)
    table = b'instruction,output\n"a","b ""c"""\n'
    document = VersionManifest("tiny", (FILE,), {"dtype": "fp32"}).document
    event_fields = {"digest": "0" * 64, "published_at": "x", "provenance": {}, "attachments": {}}
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.jsonl", lines)
        made.writestr("b/c.txt", "words")
    with tarfile.open(fileobj=tarred, mode="w") as made:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(lines)
        made.addfile(info, io.BytesIO(lines))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    tensors = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    chatml = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    bundle = {
        "verificationMaterial": {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}},
        "dsseEnvelope": {"payload": "e30=", "payloadType": "x", "signatures": [{"sig": "AA==", "keyid": ""}]},
    }
    signed = [json.dumps(one).encode() for one in (bundle, bundle["dsseEnvelope"])]
    asked = StageRequest("train", "tiny", "/srv/x.git", "0" * 40, "", "0" * 32).to_json().encode()
    histogram = {"lengths": [1] * 60, "turns": [1] * 8, "records": 3, "scripts": {"latin": 3}, "roles": {}}
    group = RecordGroup(RecordOutcome("a", "trained"), exact_keys([("a",), ("b",), ("c",)]))
    built = build_record_index([group])
    return {
        "manifest": [document],
        "event": [json.dumps(event_fields).encode()],
        "reference": [b"laptop@candidate", b"laptop@v3", b"x@0123abcd"],
        "package_path": [b"a/b.json", b"../x.json", b"con.txt"],
        "package_content": [tensors, b"{}", b"\x89PNG\r\n\x1a\nx"],
        "signature": signed,
        "params": [b"profile: a\na: {rng_seed: 1}\n", b"profile: a\nx: &x {a: 1}\na: {<<: *x}\n"],
        "rows": [bytes([kind, form]) + body for kind in range(4) for form, body in enumerate(
            (lines, jsons[5], table, table.replace(b",", b"\t"), b"words", b"PAR1PAR1", b"ARROW1\0\0",
             gzip.compress(lines), b"\x28\xb5\x2f\xfd", b"BZh9"))],
        "archive": [b"\0" + zipped.getvalue(), b"\1" + tarred.getvalue(), b"\2" + gzip.compress(tarred.getvalue())],
        "record": jsons,
        "template": [chatml.encode(), b"{% set x = namespace(a=1) %}{% if x.a %}y{% endif %}"],
        "request": [asked],
        "data_profile": [json.dumps(histogram).encode()],
        "record_index": [built],
        "personal_data": [b"ana@example.org +49 30 123456 4111 1111 1111 1111 DE89370400440532013000 8.8.8.8"],
        "tokenizer": [TOKENIZER, b'#{"eos_token": "</s>", "chat_template": [{"name": "a", "template": "x"}]}'],
        "weights": [tensors, json.dumps({"weight_map": {"w": "model-00001.safetensors"}}).encode()],
        "flow_parameters": [json.dumps(one).encode() for one in (
            {"digest": "tiny@v1", "expect": "none", "root": "/tmp", "profile": None, "rehearse": False,  # noqa: S108
             "expires_hours": 168.0, "trigger": "docs changed"}, 1e308, [1], "v3", True)] + [b"0123abcd", b"NaN"],
        "review_form": [json.dumps({"decision": "approve", "reviewer": "Ana", "comment": "<b>good</b>"}).encode()],
        "environment": [b"2", b"60.5", b"1e9", b"https://example.org:8080/a", b"s3://bucket/prefix", b"file:///srv/r",
                        b"host slots=8\n", b"inf", b"9" * 5000, b"http://[::1"],
        "yaml": [b"stages:\n  a: {cmd: x, deps: [a]}\n", b"a: &a [1]\nb: {<<: {c: *a}}\n"],
        "gguf": [b"GGUF\3\0\0\0" + bytes(16),
                 b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"a\4\0\0\0" + bytes(4)],
        "markdown": [b"<script>alert(1)</script>", b"[a](javascript:x) `<b>`", b"&lt;&#60;"],
    }  # fmt: skip
