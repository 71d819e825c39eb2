"""Where a Prefect server keeps the slots of running deployments; `PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE` names it.

A slot is a lease of 300 s that its run renews every 225 s. While the server is away no run can renew, and the server
revokes what has expired as soon as it is back. The run's next renewal then fails, and Prefect (3.9.1) ends the run.
"""

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.server.concurrency.lease_storage import filesystem

# Source: `maintain_concurrency_lease(lease_id, 300, ...)` in prefect/flow_engine.py.
LEASE = timedelta(seconds=300)
# How long a run may need to renew once the server is back. Prefect's client doubles its pause at each retry, so after
# an outage of 30 minutes, for which a run waits, the next renewal comes at most 20 minutes later.
RENEWAL = timedelta(minutes=30)
JUMP = timedelta(minutes=1)


class _Clock:
    """Since when runs could renew: the server's start, or the last time at which the clock was set.

    A clock that is set forward makes every lease look expired. A machine that slept looks the same.
    """

    def __init__(self) -> None:
        """Start with the server, which imports this module when it starts."""
        self.since = self._now = datetime.now(UTC)
        self._ticks = time.monotonic()

    def look(self) -> datetime:
        """Return the time; move `since` there if the clock was set by more than `JUMP` since the last look."""
        now, ticks = datetime.now(UTC), time.monotonic()
        if abs((now - self._now) - timedelta(seconds=ticks - self._ticks)) > JUMP:
            self.since = now
        self._now, self._ticks = now, ticks
        return now


_CLOCK = _Clock()


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):
    """Leases in files, which outlive the server; Prefect requires this name.

    A lease last renewed before this server started, or before the clock was set, is given time for a renewal.
    The slot of a run whose host died is released earlier, when the run is marked as crashed.
    """

    async def read_expired_lease_ids(self, limit: int = 100) -> list[UUID]:
        """Return the ids of leases that have expired, without those that nobody could renew."""
        found = await super().read_expired_lease_ids(limit)
        if _CLOCK.look() >= _CLOCK.since + RENEWAL:
            return found
        leases = {one: await self.read_lease(one) for one in found}
        return [one for one, lease in leases.items() if lease is None or lease.expiration - LEASE >= _CLOCK.since]
