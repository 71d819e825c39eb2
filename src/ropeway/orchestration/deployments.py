"""`ropeway serve`: serves this workspace's flows on one machine, to be started from the Prefect UI or on a schedule.

`prefect.yaml` declares the same for work pools; a test compares the two.
"""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.config.load_params import load_profile
from ropeway.orchestration.prefect_server import apply_settings, await_own_server, page_address
from ropeway.orchestration.run_queue import QueueKeeper
from ropeway.orchestration.source_watch import parse_interval
from ropeway.orchestration.source_watcher import SourceWatcher
from ropeway.runtime.errors import ConfigError, TemporaryError

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

CRON = "0 3 * * *"


def serve_flows(
    root: Path,
    *,
    crons: Sequence[str] = (),
    profiles: Sequence[str] = (),
    watch: str | None = None,
    rehearse: bool = False,
) -> None:
    """Serve the flows until this process is stopped; needs a running server.

    Args:
        root: The workspace.
        crons: Schedules of retraining, in UTC: of every profile, or `PROFILE=EXPRESSION` of one. Without any the
            nightly schedule exists but is inactive.
        profiles: Profiles that are scheduled and watched. Default: the one that params.yaml names when a run starts.
        watch: How often to look at the sources, e.g. `10m`; a changed one starts a run.
        rehearse: Every run first runs the pipeline on a few records.

    Raises:
        ConfigError: A cron expression or interval is invalid, or params.yaml does not have a profile.
        TemporaryError: No server answers.
    """
    root = root.resolve()
    interval = parse_interval(watch) if watch else None
    profiles = list(dict.fromkeys(profiles))  # one that is stated twice would be scheduled twice
    schedules = read_schedules(crons, profiles)
    for name in profiles:
        load_profile(root / "params.yaml", name)
    apply_settings(root)
    url = await_own_server(root)
    if url:  # Prefect reads it when it is imported, which `next_start` does
        os.environ["PREFECT_API_URL"] = url
    at = [
        f"schedule{f' of {name}' if name else ''}: '{cron}' (UTC), next start {next_start(cron)}"
        for name, cron in schedules
    ]
    if not url:
        raise TemporaryError(
            "no Prefect server is running for this workspace; start `ropeway server` in another terminal"
        )
    os.chdir(root)  # flow processes start in this folder
    from prefect import serve

    print(f"serving retrain, review, promote and rollback at {page_address(url, '/deployments')}", flush=True)
    print("\n".join(at or ["no schedule; set one with --cron (UTC)"]), flush=True)
    deployments = build_deployments(root, schedules, rehearse=rehearse)
    adopt_deployments(deployments)
    default = load_profile(root / "params.yaml")[0]
    if watch:
        watched = profiles or [default]
        print(f"watch: looks at the sources of {', '.join(watched)}: {watch}; a changed one starts a run", flush=True)
        SourceWatcher(root, url, watched, interval, rehearse=rehearse).start()
    QueueKeeper(url, default).start()
    # Else Prefect pauses the schedule when this process is stopped, and nobody is told of the nights that follow.
    serve(*deployments, pause_on_shutdown=False)


def adopt_deployments(deployments: "list[RunnerDeployment]") -> None:
    """Set the path of existing deployments of these names to this process's folder.

    Serving a deployment updates it, but not its path (Prefect 3.9.1, `RunnerDeployment._update`); a deployment made by
    `prefect deploy` has no path, and every run of it would fail with "no such file: None".
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for each in deployments:
            with suppress(ObjectNotFound):
                found = client.read_deployment_by_name(f"{each.flow_name}/{each.name}")
                client.update_deployment(found.id, DeploymentUpdate(path="."))


def next_start(cron: str) -> str:
    """Return the next start of a cron schedule, in UTC and local time; raise ConfigError if it is invalid."""
    from prefect.server.schemas.schedules import CronSchedule

    try:
        (moment,) = asyncio.run(CronSchedule(cron=cron, timezone="UTC").get_dates(1))
    except ValueError:
        raise ConfigError(f"--cron '{cron}': expected a cron expression, e.g. '0 3 * * *' for 03:00 UTC") from None
    here = moment.astimezone()
    there = "" if here.utcoffset() == timedelta(0) else f", {here:%Y-%m-%d %H:%M %Z} here"
    return f"{moment:%Y-%m-%d %H:%M} UTC{there}"


def read_schedules(crons: Sequence[str], profiles: Sequence[str]) -> list[tuple[str, str]]:
    """Return (profile, cron expression) of each schedule; an empty profile is the one that params.yaml names.

    >>> read_schedules(["0 3 * * *", "b=0 5 * * *"], ["a", "b", "c"])
    [('a', '0 3 * * *'), ('b', '0 5 * * *'), ('c', '0 3 * * *')]
    >>> read_schedules(["0 3 * * *"], []), read_schedules([], ["a"])
    ([('', '0 3 * * *')], [])

    Raises:
        ConfigError: A profile has two schedules, or is none of `profiles`.
    """
    own: dict[str, str] = {}
    for text in crons:
        name, sign, expression = text.partition("=")
        key, cron = (name.strip(), expression.strip()) if sign else ("", text.strip())
        if not cron:
            raise ConfigError(f"--cron '{text}': expected a cron expression, e.g. '0 3 * * *' for 03:00 UTC")
        if key and key not in profiles:
            raise ConfigError(f"--cron '{text}': {key} is no served profile; add --profile {key}")
        if key in own:
            raise ConfigError(f"--cron '{text}': {key or 'every profile'} has a schedule already: '{own[key]}'")
        own[key] = cron
    common = own.pop("", "")
    if not profiles:
        return [("", common)] if common else []
    return [(name, cron) for name in profiles if (cron := own.get(name, common))]


def build_deployments(root: Path, schedules: Sequence[tuple[str, str]] = (), *, rehearse: bool = False) -> list[Any]:
    """Return the deployments; only one retraining runs at a time, a second one waits.

    `schedules` are as `read_schedules` returns them; without any the nightly one exists, but is off.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron

    from ropeway.orchestration.prefect_adapter import load_flow

    one = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
    # No slugs: Prefect (3.9.1) keeps schedules with slugs that a later start no longer names, and refuses some.
    timed = [Cron(cron, timezone="UTC", parameters={"profile": name} if name else {}) for name, cron in schedules] or [
        Cron(CRON, timezone="UTC", active=False)
    ]
    common: dict[str, Any] = {"parameters": {"root": str(root)}, "tags": ["ropeway"], "paused": False}
    asked = common | {"parameters": {"root": str(root), "rehearse": rehearse}}
    return [
        load_flow(root, "retrain").to_deployment("retrain", schedules=timed, concurrency_limit=one, **asked),
        *(load_flow(root, name).to_deployment(name, **common) for name in ("review", "promote", "rollback")),
    ]
