"""`ropeway serve`: the flows of this workspace, startable from Prefect's pages and by the clock, on one machine.

`prefect.yaml` says the same for work pools; a test holds the two together.
"""

import asyncio
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.orchestration.prefect_server import apply_settings, page_address, standing_server
from ropeway.runtime.errors import ConfigError, TemporaryError

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

CRON = "0 3 * * *"


def serve_flows(root: Path, *, cron: str | None = None) -> None:
    """Serve the flows until somebody ends this process; needs a running server.

    `cron` says when to retrain, in UTC; with None the nightly schedule is there but switched off.

    Raises:
        ConfigError: `cron` is no cron expression.
        TemporaryError: No server answers.
    """
    root = root.resolve()
    apply_settings(root)
    at = f"retrains at '{cron}' in UTC, next {find_next(cron)}" if cron else "no schedule: --cron sets one, in UTC"
    url = standing_server(root)
    if not url:
        raise TemporaryError("no Prefect server runs for this workspace; start `ropeway server` in another terminal")
    os.environ["PREFECT_API_URL"] = url
    os.chdir(root)  # the flows' processes start here
    from prefect import serve

    print(f"serving retrain, review, promote and rollback at {page_address(url, '/deployments')}", flush=True)
    print(at, flush=True)
    deployments = plan_deployments(root, cron=cron)
    take_over(deployments)
    serve(*deployments)


def take_over(deployments: "list[RunnerDeployment]") -> None:
    """Let deployments of these names that the server has already start in this process's folder.

    What serves a deployment updates it, but not its path (Prefect 3.9.1, `RunnerDeployment._update`); one that
    `prefect deploy` made has none, and every run of it would end with "no such file: None".
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for each in deployments:
            with suppress(ObjectNotFound):
                found = client.read_deployment_by_name(f"{each.flow_name}/{each.name}")
                client.update_deployment(found.id, DeploymentUpdate(path="."))


def find_next(cron: str) -> str:
    """Return the next time of a cron expression, in UTC and in this machine's zone; raise ConfigError for none."""
    from prefect.server.schemas.schedules import CronSchedule

    try:
        (moment,) = asyncio.run(CronSchedule(cron=cron, timezone="UTC").get_dates(1))
    except ValueError:
        raise ConfigError(
            f"--cron '{cron}': no time ever; expected a cron expression, e.g. '0 3 * * *' for 03:00 UTC"
        ) from None
    here = moment.astimezone()
    there = "" if here.utcoffset() == timedelta(0) else f", {here:%Y-%m-%d %H:%M %Z} here"
    return f"{moment:%Y-%m-%d %H:%M} UTC{there}"


def plan_deployments(root: Path, *, cron: str | None = None) -> list[Any]:
    """Return the deployments; retraining never runs twice at a time: a second run waits."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from ropeway.orchestration.prefect_adapter import load_flow

    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    schedule = Cron(cron or CRON, timezone="UTC", active=cron is not None)
    common: dict[str, Any] = {"parameters": {"root": str(root)}, "tags": ["ropeway"], "paused": False}
    return [
        load_flow(root, "retrain").to_deployment("retrain", schedules=[schedule], concurrency_limit=one, **common),
        *(load_flow(root, name).to_deployment(name, **common) for name in ("review", "promote", "rollback")),
    ]
