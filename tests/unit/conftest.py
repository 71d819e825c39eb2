"""What the registry's tests begin with: a package, versions in a store, a place to pull to."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from ropeway.storage import Store, open_store
from tests.support.registry_world import copy_store, make_package, put

WEIGHTS = (b"weights", b"other weights", b"third weights")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What the first version is made of."""
    return make_package(tmp_path / "package")


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Store, list[str]]]:
    """Registries of one, two or three versions, each made once, to copy: a publish waits for the disk."""

    @functools.cache
    def publish(count: int) -> tuple[Store, list[str]]:
        place = tmp_path_factory.mktemp("published")
        store = open_store((place / "registry").as_uri())
        packages = [make_package(place / f"p{n}", weights) for n, weights in enumerate(WEIGHTS[:count])]
        return store, [put(store, package).digest for package in packages]

    return publish


@pytest.fixture
def fill(store: Store, published: Callable[[int], tuple[Store, list[str]]]) -> Callable[[int], list[str]]:
    """Publish `count` versions in the empty `store`; return their digests."""

    def fill(count: int) -> list[str]:
        source, digests = published(count)
        copy_store(source, store)
        return digests

    return fill


@pytest.fixture
def digest(fill: Callable[[int], list[str]]) -> str:
    """The digest of the one version of `store`."""
    return fill(1)[0]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A place to pull to, in a folder of its own."""
    return tmp_path / "place" / "model"
