"""What `ropeway rehearse` prints at its end, and the question that it asks the published version."""

from ropeway.rehearse.rehearsal import RehearsalResult
from ropeway.runtime.terminal import AlignedTable, Paragraph, render


def describe_rehearsed(result: RehearsalResult) -> str:
    """Return the summary for a terminal; the failure itself is printed as every error is."""
    total = f"{result.seconds:.0f} s"
    groups = {"warning": result.state.warnings, "not rehearsed": result.state.omitted}
    rows = [(label if not at else "", line) for label, lines in groups.items() for at, line in enumerate(lines)]
    if result.folder:
        rows.append(("folder", result.folder))
    if result.failure is None:
        head = f"{result.profile}: rehearsed in {total}; every stage ended, {result.state.version} was pulled and asked"
    else:
        where = f"a real run would fail in stage {result.stage}" if result.stage else "the rehearsal itself failed"
        head = f"{result.profile}: {where} (found in {total})"
    return render("", Paragraph(head), AlignedTable(("", ""), rows))


def ask_version(version: str, registry: str, question: str) -> str:
    """Pull a version into the cache, open it as `ropeway chat` does, and return its answer."""
    from ropeway.cli.chat import ChatSession, GenerationSettings, locate_model

    session = ChatSession(locate_model(version, registry), GenerationSettings("", 8, 0.0, 1.0, 0))
    return session.ask(question, lambda _piece: None).text
