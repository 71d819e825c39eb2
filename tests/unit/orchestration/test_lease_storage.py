"""The slots of served runs: kept over a restart of the server, given time after it, and revoked as ever otherwise."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
from prefect.server.concurrency.lease_storage import ConcurrencyLimitLeaseMetadata, get_concurrency_lease_storage
from prefect.settings import PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE, temporary_settings

from ropeway.orchestration import lease_storage
from ropeway.orchestration.lease_storage import LEASE, RENEWAL, ConcurrencyLeaseStorage
from ropeway.orchestration.prefect_server import prefect_settings


@pytest.fixture
def storage(tmp_path):
    return ConcurrencyLeaseStorage(tmp_path / "leases")


def make_lease(storage, *, renewed):
    """Return the id of a lease that was last renewed so long ago."""
    metadata = ConcurrencyLimitLeaseMetadata(slots=1)
    return asyncio.run(storage.create_lease([], LEASE - renewed, metadata)).id


def list_expired(storage, monkeypatch, *, up):
    """Return the expired leases of a server that has been up so long."""
    monkeypatch.setattr(lease_storage._CLOCK, "since", datetime.now(UTC) - up)
    return asyncio.run(storage.read_expired_lease_ids())


def test_a_lease_that_expired_while_the_server_was_away_can_still_be_renewed(storage, monkeypatch):
    lease = make_lease(storage, renewed=timedelta(minutes=20))
    assert list_expired(storage, monkeypatch, up=timedelta(minutes=1)) == []
    assert asyncio.run(storage.renew_lease(lease, LEASE))
    assert list_expired(storage, monkeypatch, up=RENEWAL + timedelta(minutes=1)) == []


def test_a_lease_that_nobody_renews_after_the_server_is_back_expires(storage, monkeypatch):
    lease = make_lease(storage, renewed=timedelta(minutes=40))
    assert list_expired(storage, monkeypatch, up=RENEWAL + timedelta(seconds=1)) == [lease]


def test_a_lease_expires_as_ever_while_the_server_is_up(storage, monkeypatch):
    lease = make_lease(storage, renewed=LEASE + timedelta(seconds=1))
    assert list_expired(storage, monkeypatch, up=timedelta(minutes=6)) == [lease]


def test_a_lease_whose_file_is_gone_is_still_cleared_from_the_index(storage, monkeypatch):
    lease = make_lease(storage, renewed=timedelta(minutes=20))
    (storage.storage_path / f"{lease}.json").unlink()
    assert list_expired(storage, monkeypatch, up=timedelta(minutes=1)) == [lease]


@pytest.mark.parametrize("jump", [timedelta(days=365), timedelta(days=-365)])
def test_no_lease_expires_because_the_clock_was_set(storage, monkeypatch, jump):
    clock = lease_storage._CLOCK
    lease = make_lease(storage, renewed=timedelta(days=365) if jump > timedelta() else timedelta(minutes=1))
    monkeypatch.setattr(clock, "since", datetime.now(UTC) - timedelta(days=400))
    monkeypatch.setattr(clock, "_now", datetime.now(UTC) - jump)
    monkeypatch.setattr(clock, "_ticks", time.monotonic())
    assert asyncio.run(storage.read_expired_lease_ids()) == []
    assert asyncio.run(storage.renew_lease(lease, LEASE))
    assert list_expired(storage, monkeypatch, up=RENEWAL + timedelta(minutes=1)) == []


def test_a_server_of_a_workspace_uses_this_storage(tmp_path):
    module = prefect_settings(tmp_path)["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    with temporary_settings({PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE: module}):
        assert isinstance(get_concurrency_lease_storage(), ConcurrencyLeaseStorage)
