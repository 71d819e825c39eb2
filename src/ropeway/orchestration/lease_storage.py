"""Where a Prefect server keeps the slots of running deployments; `PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE` names it.

A slot is a lease of 300 s that its run renews every 225 s. While the server is away no run can renew, and the server
revokes what has expired as soon as it is back. The run's next renewal then fails, and Prefect (3.9.1) ends the run.
"""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.server.concurrency.lease_storage import filesystem

# Source: `maintain_concurrency_lease(lease_id, 300, ...)` in prefect/flow_engine.py.
LEASE = timedelta(seconds=300)
# How long a run may need to renew once the server is back. Prefect's client doubles its pause at each retry, so after
# an outage of 30 minutes, for which a run waits, the next renewal comes at most 20 minutes later.
RENEWAL = timedelta(minutes=30)
_STARTED = datetime.now(UTC)  # of the server, which imports this module when it starts


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):
    """Leases in files, which outlive the server; Prefect requires this name.

    A lease that was last renewed before this server started is given time for a renewal. The slot of a run whose host
    died is released earlier, when the run is marked as crashed.
    """

    async def read_expired_lease_ids(self, limit: int = 100) -> list[UUID]:
        """Return the ids of leases that have expired, without those that nobody could renew."""
        found = await super().read_expired_lease_ids(limit)
        if datetime.now(UTC) >= _STARTED + RENEWAL:
            return found
        leases = {one: await self.read_lease(one) for one in found}
        return [one for one, lease in leases.items() if lease is None or lease.expiration - LEASE >= _STARTED]
