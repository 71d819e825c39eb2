"""A run whose stages are partly in work pools: what is pushed and pulled around them, and which outputs stay away.

Single files (metrics, pages) come back after each stage. A folder (data, weights) is pulled when a stage here reads it.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ropeway.config.load_params import load_profile
from ropeway.orchestration import dvc_exchange as exchange
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.dvc_stage import LineWriter, Site, quote_lines, retry_while_busy, run_command
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.publish import Publication
from ropeway.orchestration.remote.handover import Handover, inputs_of
from ropeway.orchestration.remote.request import (
    PREFIX,
    PUBLISH,
    StageRequest,
    check_committed_remote,
    find_repository,
)
from ropeway.orchestration.revision import Revision
from ropeway.orchestration.stage_process import name_files
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.git import ask_git
from ropeway.runtime.manifest import Json

if TYPE_CHECKING:
    from ropeway.orchestration.remote.pool_caller import PoolCaller


@dataclass(frozen=True, slots=True)
class Placement:
    """The stages of a run that are in work pools.

    Attributes:
        pools: Step -> work pool.
        site: The workspace of the calling run.
        profile: The profile.
        caller: Calls a pool.
        revision: The workspace's revision.
        repository: What workers clone.
    """

    pools: Mapping[str, str]
    site: Site
    profile: str
    caller: "PoolCaller"
    revision: Revision
    repository: str

    @classmethod
    def check(
        cls, pools: Mapping[str, str], site: Site, profile: str, caller: "PoolCaller", revision: Revision
    ) -> "Placement":
        """Return the placement, once nothing stands against it.

        Raises:
            ConfigError: Workers could not get this commit, or the stage's inputs, or the registry.
        """
        _, params = load_profile(site.root / "params.yaml", profile)
        check_committed_remote(site.root, graph.read_remotes(site.root)[0])
        if "base" in pools and params.base.kind == "folder":
            raise ConfigError(
                f"{PREFIX}BASE: the base is a folder of this machine ({params.model_name}), which a worker cannot "
                f"read. Unset {PREFIX}BASE; workers receive its outputs"
            )
        if PUBLISH in pools and not _registry():
            raise ConfigError(
                f"{PREFIX}PUBLISH: ROPEWAY_REGISTRY names no store that a worker reaches. Set it to s3://bucket/prefix"
            )
        named = name_files(site.root, params)
        return cls(pools, site, profile, caller, revision, find_repository(site.root, revision, named.data, os.environ))

    def run_stage(self, name: str, write_line: LineWriter) -> str:
        """Run a stage in its pool and take its result over; return `ran`, `restored` or `unchanged`.

        Raises:
            RopewayError: See `PoolCaller.call`.
        """
        result = self._call(name, inputs_of(self.site.root, name), write_line)
        self._take_over(name, result["lock"], write_line)
        return str(result["outcome"])

    def publish(self, paths: Iterable[str], run_seconds: float, write_line: LineWriter) -> Publication:
        """Publish in a pool; `paths` are the outputs that a version consists of."""
        found = self._call(PUBLISH, tuple(paths), write_line, run_seconds=run_seconds)
        return Publication.from_json(found["publication"])

    @contextmanager
    def inputs_here(self, name: str, write_line: LineWriter) -> Iterator[None]:
        """Pull what a stage that runs here reads; afterwards remove folders of which it needed only some files.

        Raises:
            DataError: The remote does not return them.
        """
        root = self.site.root
        wanted = exchange.inputs(root, name)
        folders = {path for paths in exchange.outputs(root).values() for path in paths} - {*wanted}
        partly = [each for each in folders if not (root / each).exists() and _has_part(each, wanted)]
        self.fetch_inputs(wanted, write_line)
        try:
            yield
        finally:
            for folder in partly:  # else DVC would take a part of it for an edited output
                shutil.rmtree(root / folder, ignore_errors=True)

    def fetch_inputs(self, paths: Iterable[str], write_line: LineWriter) -> None:
        """Pull those of these outputs that are not here.

        Raises:
            DataError: The remote does not return them.
        """
        root = self.site.root
        if not (missing := [path for path in paths if not (root / path).exists()]):
            return
        write_line(f"pulling {', '.join(missing)}, made in a work pool")
        code, lines = run_command(self.site, "pull", [*DVC, "pull", "--", *missing], write_line)
        if code:
            quote = quote_lines(lines)
            raise DataError(f"the DVC remote does not return {', '.join(missing)}; last lines:\n{quote}")

    def small_outputs(self) -> list[str]:
        """Return the outputs that are single files, of every stage."""
        root = self.site.root
        outputs = exchange.outputs(root)
        entries = [exchange.read_lock_entry(root, name) for name in outputs]
        known = {path for paths in outputs.values() for path in paths}  # dvc.lock may still name another profile's
        return [path for entry in entries if entry for path in _files(entry) if path in known]

    def _call(
        self, step: str, inputs: tuple[str, ...], write_line: LineWriter, *, run_seconds: float | None = None
    ) -> Json:
        self._push(inputs, write_line)
        request = StageRequest(
            step=step,
            profile=self.profile,
            repository=self.repository,
            commit=str(self.revision.commit),
            folder=ask_git(self.site.root, "rev-parse", "--show-prefix") or "",
            handover=Handover.collect(self.site.root, step).send(self.site.root),
            registry=_registry(),
            run_seconds=run_seconds,
        )
        return self.caller.call(self.pools[step], request, write_line)

    def _push(self, paths: tuple[str, ...], write_line: LineWriter) -> None:
        """Push those of a stage's inputs that are here; the others are in the remote already."""
        if here := [path for path in paths if (self.site.root / path).exists()]:
            code, lines = run_command(self.site, "push", [*DVC, "push", "--", *here], write_line)
            if code:
                quote = quote_lines(lines)
                raise TemporaryError(f"the inputs {', '.join(here)} did not reach the DVC remote; last lines:\n{quote}")

    def _take_over(self, name: str, entry: Json, write_line: LineWriter) -> None:
        """Record a worker's result in dvc.lock; pull its single files, remove what is here of an earlier result.

        Raises:
            DataError: The result has other outputs than the stage.
        """
        root = self.site.root
        exchange.check_entry(root, name, entry)
        before = exchange.read_lock_entry(root, name)
        retry_while_busy(partial(exchange.write_lock_entry, root, name, entry), write_line)
        paths = exchange.outputs(root)[name]
        if before != entry:
            for path in paths:  # of an earlier result, as DVC itself removes outputs before a stage
                place = root / path
                shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        self.fetch_inputs(_files(entry), write_line)


def _has_part(folder: str, paths: Iterable[str]) -> bool:
    return any(path.startswith(f"{folder}/") for path in paths)


def _files(entry: Json) -> list[str]:
    """Return the outputs of an entry of dvc.lock that are single files."""
    return [out["path"] for out in entry.get("outs", []) if not out["md5"].endswith(".dir")]


def _registry() -> str:
    """Return the registry of the environment if a worker elsewhere can use it and its URL holds no secret."""
    url = os.environ.get("ROPEWAY_REGISTRY", "")
    return url if url.startswith("s3://") and "@" not in url else ""
