"""The head of a log is a hint: it saves requests, and no content of a head changes a result."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from ropeway.registry import Registry
from ropeway.registry.layout import Log, alias_log, versions_log
from ropeway.registry.log import find_head, read_events, seal_event, verify_log
from ropeway.registry.names import model_logs
from ropeway.runtime.errors import DataError, NotFoundError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import Store, open_store
from tests.support.registry_world import count_requests, grow, make_package, move, own_fields, put, replace, tiny

NOW = timedelta(seconds=-60)  # a grace period that every object is past, for any clock of the store
MAX_REQUESTS = 40
VERSIONS = versions_log("tiny")
CANDIDATE = alias_log("tiny", "candidate")


@pytest.fixture
def three(fill, store) -> list[str]:
    """Return the digests of three versions; `tiny@candidate` pointed to each in turn, now to the last."""
    digests = fill(3)
    for digest in digests:
        move(store, digest)
    return digests


def heads(store: Store) -> list[str]:
    return store.list_keys("models/tiny/heads/")


def remove_heads(store: Store) -> None:
    """Change a registry into one written by a Ropeway without heads."""
    for log in model_logs(store, "tiny"):
        for key in [key for key in store.list_keys(log.folder) if key.endswith(".json")]:
            replace(store, key, canonical_json(own_fields(store, key)))
    for key in heads(store):
        store.delete(key)


def check_answers(store: Store, digests: list[str]) -> None:
    """Check that every lookup returns what the events contain."""
    count = len(digests)
    assert [Registry(store).version(f"tiny@v{number}").digest for number in range(1, count + 1)] == digests
    assert [Registry(store).version(f"tiny@{digest}").digest for digest in digests] == digests
    assert all(tiny(store).find(digest) for digest in digests)
    assert not tiny(store).find("0" * 64)
    assert read_events(store, VERSIONS).digests == digests
    assert tiny(store).alias("candidate").digest == tiny(store).alias("candidate").events[-1]["digest"]


def count_operations(store: Store, place: Path, count: int) -> dict[str, Counter[str]]:
    """Return the requests of each operation on a registry with `count` versions, by kind."""
    put(store, make_package(place / "first"))
    grow(store, count)
    assert len(verify_log(store, VERSIONS)) == len(verify_log(store, CANDIDATE)) == count
    new, digest = make_package(place / "new", b"new"), Registry(store).version(f"tiny@v{count}").digest
    acts: dict[str, Callable[[], object]] = {
        "pull by alias": lambda: Registry(store).version("tiny@candidate").pull(place / "by-alias"),
        "pull by number": lambda: Registry(store).version(f"tiny@v{count}").pull(place / "by-number"),
        "pull by digest": lambda: Registry(store).version(f"tiny@{digest}").pull(place / "by-digest"),
        "publish": lambda: put(store, new),
        "publish again": lambda: put(store, new),
        "promote": lambda: move(store, Registry(store).version(f"tiny@v{count + 1}").digest),
        "roll back": lambda: tiny(store).rollback("candidate", by="a test", reason="worse"),
    }
    counted = {}
    for name, act in acts.items():
        with count_requests(store) as counted[name]:
            act()
    return counted


@pytest.mark.parametrize("counts", [(1, 30), pytest.param((1, 1000), marks=pytest.mark.slow)])
def test_the_number_of_requests_does_not_depend_on_the_number_of_versions(store, tmp_path, counts):
    few, many = (count_operations(open_store(f"{store.url}-{count}"), tmp_path / f"{count}", count) for count in counts)
    assert few == many
    assert all(sum(requests.values()) < MAX_REQUESTS for requests in few.values())


def test_an_append_keeps_one_valid_head_per_log(store, three):
    assert heads(store) == [CANDIDATE.head_key(3), VERSIONS.head_key(3)]
    for log in (VERSIONS, CANDIDATE):
        events = read_events(store, log)
        assert find_head(store, events) == log.head_key(3)
        assert events.digests == three


def test_a_registry_without_heads_gets_one_at_the_next_publish(store, three, package, tmp_path):
    remove_heads(store)
    check_answers(store, three)
    assert put(store, package).number == 1
    assert not heads(store), "reads and a repeated publish write nothing"
    fourth = put(store, make_package(tmp_path / "fourth", b"fourth"))
    check_answers(store, [*three, fourth.digest])
    assert VERSIONS.head_key(4) in heads(store)
    assert tiny(store).rollback("candidate", by="a test", reason="worse").digest == three[1]
    assert Registry(store).version("tiny@v4").verify().files == 4


def test_a_stale_head_is_completed_from_the_log(store, three, tmp_path):
    head = store.get(VERSIONS.head_key(3))
    digests = [*three, *(put(store, make_package(tmp_path / name, name.encode())).digest for name in ("d", "e"))]
    for number in (4, 5):  # as written by a Ropeway without heads
        replace(store, VERSIONS.key(number), canonical_json(own_fields(store, VERSIONS.key(number))))
    store.delete(VERSIONS.head_key(5))
    store.put_if_absent(VERSIONS.head_key(3), head)
    check_answers(store, digests)
    sixth = put(store, make_package(tmp_path / "sixth", b"sixth"))
    check_answers(store, [*digests, sixth.digest])
    assert [key for key in heads(store) if "versions" in key] == [VERSIONS.head_key(6)]
    assert len(verify_log(store, VERSIONS)) == 6


# Each number and each content on S3 too; all pairs of them in a folder, where a case takes a tenth of the time.
FORGED = [(number, content) for number in (2, 3, 4, 99_999_999) for content in ("swapped", "not text", "none")]
ON_S3 = [(2, "swapped"), (3, "not text"), (4, "none"), (99_999_999, "swapped")]


@pytest.mark.parametrize(
    ("store", "number", "content"),
    [("folder", *case) for case in FORGED] + [("s3", *case) for case in ON_S3],
    indirect=["store"],
)
def test_a_forged_head_changes_no_result_and_is_replaced(store, three, tmp_path, number, content):
    if content != "none":
        for key in heads(store):
            store.delete(key)
    documents = {
        "swapped": "".join(f"{digest}\n" for digest in (three[1], three[0], three[2])).encode(),
        "not text": b"\xff\x00" * 40,
        "none": b"",
    }
    for log in (VERSIONS, CANDIDATE):
        store.put_if_absent(log.head_key(number), documents[content])
    check_answers(store, three)
    assert not move(store, three[2]).moved
    fourth = put(store, make_package(tmp_path / "fourth", b"fourth"))
    assert (fourth.number, fourth.created) == (4, True)
    check_answers(store, [*three, fourth.digest])
    fifth = put(store, make_package(tmp_path / "fifth", b"fifth"))
    check_answers(store, [*three, fourth.digest, fifth.digest])
    assert find_head(store, read_events(store, VERSIONS)) == VERSIONS.head_key(5)


def test_an_unknown_object_among_the_heads_is_ignored(store, three):
    store.put_if_absent(f"{VERSIONS.heads}00000000.md", b"x")
    check_answers(store, three)


def test_an_append_deletes_nothing_that_is_not_a_head(store, three):
    unknown = f"{CANDIDATE.heads}00000000.md"
    store.put_if_absent(unknown, b"x")
    move(store, three[0])
    assert store.get(unknown) == b"x"
    assert heads(store) == [unknown, *(CANDIDATE.head_key(number) for number in (4, 3)), VERSIONS.head_key(3)]
    check_answers(store, three)


def test_a_crash_between_event_and_head_loses_nothing(store, three, tmp_path, monkeypatch):
    package = make_package(tmp_path / "fourth", b"fourth")
    real = store.put_if_absent

    def die(key, data, *, sha256=None):
        if "/heads/" in key:
            raise KeyboardInterrupt
        return real(key, data, sha256=sha256)

    monkeypatch.setattr(store, "put_if_absent", die)
    with pytest.raises(KeyboardInterrupt):
        put(store, package)
    monkeypatch.undo()
    assert heads(store)[-1] == VERSIONS.head_key(3)
    again = put(store, package)
    assert (again.number, again.created) == (4, False)
    check_answers(store, [*three, again.digest])
    fifth = put(store, make_package(tmp_path / "fifth", b"fifth"))
    check_answers(store, [*three, again.digest, fifth.digest])
    assert VERSIONS.head_key(5) in heads(store)


@pytest.mark.parametrize("at", ["versions", "heads"])
def test_two_concurrent_publishes_get_two_numbers_and_a_valid_head(store, three, tmp_path, monkeypatch, at):
    ours, theirs = (make_package(tmp_path / name, name.encode()) for name in ("ours", "theirs"))
    real, other = store.put_if_absent, []

    def publish_first(key, data, *, sha256=None):
        if f"tiny/{at}/" in key:
            monkeypatch.undo()
            other.append(put(store, theirs))
        return real(key, data, sha256=sha256)

    monkeypatch.setattr(store, "put_if_absent", publish_first)
    done = put(store, ours)
    numbered = sorted((one.number, one.digest) for one in (done, *other))
    assert [number for number, _ in numbered] == [4, 5]
    check_answers(store, [*three, *(digest for _, digest in numbered)])
    events = verify_log(store, VERSIONS)
    assert find_head(store, events) == store.first_key(VERSIONS.heads) == VERSIONS.head_key(5)
    Registry(store).collect(grace=NOW, withdrawn=False)
    assert [key for key in heads(store) if "versions" in key] == [VERSIONS.head_key(5)]


def test_a_head_deleted_during_a_read_changes_no_result(store, three, monkeypatch):
    real = store.get

    def vanish(key):
        if "/heads/" in key:
            raise NotFoundError(key)
        return real(key)

    monkeypatch.setattr(store, "get", vanish)
    check_answers(store, three)


@pytest.mark.usefixtures("three")
def test_a_collection_deletes_every_invalid_head(store):
    for number, document in ((2, b"old"), (9, b"forged")):
        store.put_if_absent(VERSIONS.head_key(number), document)
    store.delete(CANDIDATE.head_key(3))
    store.put_if_absent(CANDIDATE.head_key(3), b"wrong")
    Registry(store).collect(grace=NOW, withdrawn=False)
    assert heads(store) == [VERSIONS.head_key(3)]


@pytest.mark.parametrize("log", [VERSIONS, CANDIDATE])
def test_verify_detects_a_missing_or_changed_event_and_collect_one_of_a_version(store, three, log):
    event = json.loads(store.get(log.key(2)))
    changed = canonical_json({**event, "digest": "0" * 64})
    for document in (None, changed, b"{"):
        store.delete(log.key(2))
        if document is not None:
            store.put_if_absent(log.key(2), document)
        with pytest.raises(DataError):
            Registry(store).version(f"tiny@{three[0]}").verify()
        before = store.list_keys("")
        if log is VERSIONS:  # only versions reference objects
            with pytest.raises(DataError):
                Registry(store).collect(grace=NOW, withdrawn=False)
        else:
            Registry(store).collect(grace=NOW, withdrawn=False)
        assert store.list_keys("") == before
    replace(store, log.key(2), canonical_json(event))
    assert Registry(store).version(f"tiny@{three[0]}").verify().files == 4


def reseal(store: Store, log: Log, number: int, changes: dict[str, object]) -> None:
    """Change an event and its seal, as a writer of the store can who knows the format."""
    key, previous = log.key(number), json.loads(store.get(log.key(number)))["seal"]["previous"]
    head = "".join(f"{digest}\n" for digest in read_events(store, log).digests[:number]).encode()
    replace(store, key, canonical_json(seal_event(own_fields(store, key) | changes, head, previous)))


CHANGES = {
    VERSIONS.folder: {
        "published_at": "2020",
        "provenance": {"evaluation": {"loss": 0.0}},
        "attachments": {"a.json": 1},
        "new": 1,
    },
    CANDIDATE.folder: {
        "by": "ceo",
        "reason": "audited",
        "at": "2020",
        "identity": "authenticated",
        "review": {"by": "ceo"},
    },
}


@pytest.mark.parametrize(
    ("log", "field", "value"), [(log, *one) for log in (VERSIONS, CANDIDATE) for one in CHANGES[log.folder].items()]
)
def test_a_change_of_any_field_of_an_event_is_found_when_it_is_read(store, three, log, field, value):
    for number in (1, 3):
        original = store.get(log.key(number))
        replace(store, log.key(number), canonical_json({**json.loads(original), field: value}))
        with pytest.raises(DataError, match="changed after it was written"):
            read_events(store, log)[number - 1]
        with pytest.raises(DataError, match="changed after it was written"):
            Registry(store).version(f"tiny@{three[1]}").verify()
        replace(store, log.key(number), original)
    assert Registry(store).version(f"tiny@{three[1]}").verify().files == 4


@pytest.mark.parametrize("log", [VERSIONS, CANDIDATE])
@pytest.mark.parametrize("as_old", [True, False])
def test_an_earlier_event_that_was_changed_with_its_seal_is_found(store, three, log, as_old):
    original = store.get(log.key(1))
    if as_old:  # without a seal, as of an older Ropeway
        changed = own_fields(store, log.key(1)) | CHANGES[log.folder]
        replace(store, log.key(1), canonical_json(changed | {"head": json.loads(original)["head"]}))
    else:
        reseal(store, log, 1, CHANGES[log.folder])
    with pytest.raises(DataError, match=f"{log.key(2)} does not match"):
        Registry(store).version(f"tiny@{three[1]}").verify()


@pytest.mark.parametrize("damage", ["format", "missing", "not a mapping", "spelling"])
def test_a_seal_that_is_not_one_is_refused(store, three, damage):
    event = json.loads(store.get(VERSIONS.key(2)))
    seal = event["seal"]
    documents = {
        "format": canonical_json({**event, "seal": {**seal, "format": "ropeway-seal/2"}}),
        "missing": canonical_json({**event, "seal": {"sha256": seal["sha256"]}}),
        "not a mapping": canonical_json({**event, "seal": seal["sha256"]}),
        "spelling": b'{"published_at":"2020",' + store.get(VERSIONS.key(2))[1:],
    }
    replace(store, VERSIONS.key(2), documents[damage])
    with pytest.raises(DataError, match="not a valid event"):
        read_events(store, VERSIONS)[1]
    with pytest.raises(DataError, match="not a valid event"):
        Registry(store).version("tiny@v2")
    assert three[1] == event["digest"]


@pytest.mark.usefixtures("three")
def test_events_of_older_and_newer_ropeways_follow_each_other(store, tmp_path):
    fields = own_fields(store, VERSIONS.key(1))
    remove_heads(store)
    put(store, make_package(tmp_path / "fourth", b"fourth"))
    digests = [*read_events(store, VERSIONS).digests, "5" * 64]
    head = hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
    store.put_if_absent(VERSIONS.key(5), canonical_json({**fields, "digest": "5" * 64, "head": head}))
    put(store, make_package(tmp_path / "sixth", b"sixth"))
    assert ["seal" in json.loads(store.get(VERSIONS.key(number))) for number in (3, 4, 5, 6)] == [False, True] * 2
    assert len(verify_log(store, VERSIONS)) == 6
    assert "seal" not in read_events(store, VERSIONS)[3]
    replace(store, VERSIONS.key(3), canonical_json({**own_fields(store, VERSIONS.key(3)), "published_at": "2020"}))
    with pytest.raises(DataError, match=f"{VERSIONS.key(4)} does not match"):
        verify_log(store, VERSIONS)


def test_a_field_that_json_stores_in_another_form_is_sealed_as_it_is_read(store, package):
    provenance = {"by_length": {16: 1.0, 2: 1e-05, 100: None}, "spans": (1, 2), "word": "\u00e9\u2028"}
    tiny(store).publish(package, provenance=provenance, attachments={})
    assert read_events(store, VERSIONS)[0]["provenance"]["by_length"] == {"16": 1.0, "2": 1e-05, "100": None}
