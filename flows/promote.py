"""The flows `promote` and `rollback`: move an alias from the Prefect UI, like `ropeway registry promote|rollback`."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from ropeway.orchestration.decision import read_expect
from ropeway.orchestration.flow_parameters import read_root, read_text
from ropeway.orchestration.prefect_adapter import artifact_prefix
from ropeway.registry import Artifact, Promotion, Registry
from ropeway.registry.aliases import name_author
from ropeway.reporting.markdown import code, table
from ropeway.runtime.workspace import Workspace

_SHOWN_MOVES = 50


@flow(name="promote")
def promote(
    digest: str, expect: str, by: str, reason: str, alias: str = "production", root: str = "."
) -> State[object]:
    """Point an alias at a version if the alias is still where you expect it.

    Args:
        digest: The version: its digest (8 digits or more) or NAME@v3.
        expect: Where the alias points now: v2, a digest, another alias, or `none` if it does not exist yet.
        by: Your name; recorded permanently.
        reason: Why; recorded permanently.
        alias: The alias to move.
        root: The workspace whose registry holds the version.
    """
    registry = _open(root)
    wanted = read_text("digest", digest)
    version = registry.find(wanted)
    expected = read_expect(registry, wanted, read_text("expect", expect))
    done = version.promote(read_text("alias", alias), expect=expected, by=by.strip(), reason=reason.strip())
    return _show(registry.artifact(version.name), done)


@flow(name="rollback")
def rollback(name: str, expect: str, by: str, reason: str, alias: str = "production", root: str = ".") -> State[object]:
    """Point an alias back at its previous version.

    Args:
        name: The model, e.g. laptop.
        expect: Where the alias points now, e.g. v3.
        by: Your name; recorded permanently.
        reason: Why; recorded permanently.
        alias: The alias to move.
        root: The workspace whose registry holds the versions.
    """
    registry = _open(root)
    artifact = registry.artifact(read_text("name", name))
    expected = registry.version(f"{name}@{read_text('expect', expect)}").digest
    return _show(
        artifact, artifact.rollback(read_text("alias", alias), by=by.strip(), reason=reason.strip(), expect=expected)
    )


def _open(root: str) -> Registry:
    return Registry.open(Workspace(read_root(root), "").registry_url)


def _show(artifact: Artifact, done: Promotion) -> State[object]:
    """Publish the newest moves of the alias and return the final state, which names its version."""
    page = artifact.describe_history(done.alias, limit=_SHOWN_MOVES)
    rows = [
        {
            "at": event["at"],
            "digest": code(event["digest"][:12]),
            "by": code(name_author(event)),
            "reason": code(event["reason"]),
        }
        for event in reversed(page.events)
    ]
    create_markdown_artifact(
        key=f"{artifact_prefix(done.name)}-{done.alias}",
        markdown=f"# {done.name}@{done.alias}\n\nThe newest {len(rows)} of {page.total} moves.\n\n{table(rows)}",
    )
    words = f"{done.name}@{done.alias} is v{artifact.version(done.digest).number} ({done.digest[:12]}…)" + (
        "" if done.moved else " (unchanged)"
    )
    get_run_logger().info(words)
    return Completed(name="Promoted" if done.moved else "Unchanged", message=words)
