"""What a command asks of a store does not grow with the number of versions; a page reads its own entries alone."""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from ropeway.orchestration.status import ALIASES
from ropeway.registry import Registry, version_manifest
from ropeway.registry.garbage_collection import find_garbage
from ropeway.registry.layout import manifest_key, tombstone_key
from ropeway.registry.version_manifest import load_version_manifests
from ropeway.runtime.errors import NotFoundError, RegistryError
from tests.support.memory_store import MemoryStore
from tests.support.registry_world import count_requests, grow, make_package, move, put, tiny

FEW, MANY, PAGE = 25, 400, 20
PAST = timedelta(seconds=-60)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], MemoryStore]:
    """Make registries of `tiny` with so many versions, each once candidate; the last is whole, and in production."""
    package = make_package(tmp_path_factory.mktemp("grown") / "package")

    def make(count: int) -> MemoryStore:
        store = MemoryStore()
        digest = put(store, package).digest
        move(store, digest)
        grow(store, count)
        move(store, digest, alias="production")
        tiny(store).version(digest).review(
            "approve", {"by": "a test", "identity": "claimed", "comment": "", "production": None, "via": "a test"}
        )
        return store

    return make


def count(store: MemoryStore, act: Callable[[Registry], object]) -> Counter[str]:
    with count_requests(store) as requests:
        act(Registry(store))
    return +requests


def fail_to_find(registry: Registry, reference: str) -> None:
    with pytest.raises(RegistryError):
        registry.version(reference)


@pytest.mark.parametrize(
    "act",
    [
        lambda registry: registry.describe(),
        lambda registry: registry.artifact("tiny").describe_versions(limit=PAGE),
        lambda registry: registry.artifact("tiny").describe_versions(limit=PAGE, before=PAGE + 1),
        lambda registry: registry.artifact("tiny").describe_history("candidate", limit=PAGE),
        lambda registry: [registry.artifact("tiny").describe_history(alias, limit=1) for alias in ALIASES],
        lambda registry: registry.artifact("tiny").describe_recent(PAGE),
        lambda registry: registry.artifact("tiny").latest(PAGE),
        lambda registry: registry.artifact("tiny").retirable(PAGE),
        lambda registry: list(registry.artifact("tiny").versions()),
        lambda registry: registry.version("tiny@candidate").describe(),
        lambda registry: registry.find(registry.artifact("tiny").latest(1)[0].digest[:12]),
        lambda registry: fail_to_find(registry, "tiny@v9999999"),
        lambda registry: fail_to_find(registry, "tiny@nothing"),
    ],
    ids=[
        "models", "newest", "oldest", "moves", "status", "history", "latest", "retire", "versions", "show", "find",
        "no number", "no alias",
    ],
)  # fmt: skip
def test_no_request_is_added_by_more_versions(grown, act):
    few, many = (count(grown(number), act) for number in (FEW, MANY))
    assert few == many
    assert few.total() < 2 * PAGE + 20


def test_signatures_are_found_without_listing_other_versions(grown):
    store = grown(FEW)
    listed = []
    real = store.list_names
    store.list_names = lambda prefix, start: listed.append(real(prefix, start)) or real(prefix, start)
    version = Registry(store).version("tiny@candidate")
    store.put_if_absent(f"models/tiny/manifests/{version.digest}.{'a' * 16}.sig", b"x")
    store.put_if_absent(f"models/tiny/manifests/{'0' * 64}.{'b' * 16}.sig", b"x")
    assert version.describe()["signed_by"] == ["a" * 16]
    assert max(map(len, listed)) == 2


def test_pages_follow_each_other_without_gap_or_repetition(grown):
    store = grown(FEW)
    store.put_if_absent(tombstone_key("tiny", tiny(store).latest(2)[1].digest), b"{}")
    whole = tiny(store).describe_versions()
    assert [one["number"] for one in whole.events] == list(range(1, FEW + 1))
    assert [one["number"] for one in whole.events if one["withdrawn"]] == [FEW - 1]
    for read in (tiny(store).describe_versions, lambda *page: tiny(store).describe_history("candidate", *page)):
        pages, before = [], None
        while before != 1:
            page = read(10, before)
            assert (page.total, len(page.events)) == (FEW, min(10, (before or FEW + 1) - 1))
            pages, before = [page.events, *pages], page.first
        assert [event for page in pages for event in page] == read().events
    assert tiny(store).describe_versions(10, 1).events == tiny(store).describe_history("nothing").events == []
    assert tiny(store).describe_versions(2, 9_999).first == FEW - 1


def test_a_plan_of_gc_asks_for_one_document_per_version_and_a_collection_for_two(tmp_path):
    counted, verified = {}, {}
    for number in (2, 12):
        store = MemoryStore()
        for each in range(number):
            move(store, put(store, make_package(tmp_path / f"{number}-{each}", b"%d" % each)).digest)
            store.put_if_absent(tombstone_key("tiny", tiny(store).latest(1)[0].digest), b"{}") if each % 2 else None
        counted[number] = count(store, lambda registry: registry.find_garbage(grace=PAST, withdrawn=False))
        with count_requests(store) as requests:
            gone = Registry(store).find_garbage(grace=PAST, withdrawn=True).entries
        assert len(gone) == number // 2 * 2, "weights and manifest.json of each withdrawn version"
        assert requests["get"] == counted[number]["get"]
        with count_requests(store) as requests:
            find_garbage(store, grace=PAST, withdrawn=False, is_verified=True)
        verified[number] = +requests
    assert counted[12] - counted[2] == {"get": 10}
    assert verified[12] - verified[2] == {"get": 2 * 10}


def test_manifests_are_read_in_batches_and_a_missing_one_is_named(store, fill, monkeypatch):
    monkeypatch.setattr(version_manifest, "_BATCH", 2)
    digests = fill(3)
    found = [one.digest for one in load_version_manifests(store, "tiny", digests)]
    assert found == digests
    store.delete(manifest_key("tiny", digests[2]))
    with pytest.raises(RegistryError, match=digests[2][:12]) as caught:
        list(load_version_manifests(store, "tiny", digests))
    assert not isinstance(caught.value, NotFoundError)


def test_the_names_of_a_folder_that_begin_alike_are_listed_alone(store):
    for key in ("a/one.x", "a/one.y", "a/on/deeper", "a/two", "b/one"):
        store.put_if_absent(key, b"x")
    assert store.list_names("a/", "one.") == ["one.x", "one.y"]
    assert store.list_names("none/", "") == []
    assert "two" in store.list_names("a/", "")


def test_a_publish_into_many_versions_asks_for_as_much_as_into_few(grown, tmp_path):
    new = make_package(Path(tmp_path / "new"), b"new")
    few, many = (count(grown(number), lambda registry: put(registry.store, new)) for number in (FEW, MANY))
    assert few == many
