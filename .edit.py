from pathlib import Path
def sub(path, *pairs):
    p = Path(path); t = p.read_text()
    for a, b in pairs:
        assert t.count(a) == 1, (path, t.count(a), a)
        t = t.replace(a, b)
    p.write_text(t)
sub("flows/summary.py",
('''def ledger_rows(workspace: Workspace) -> list[dict[str, str]]:
    """Return the ledger for a table, one row per source and step; none where there is no ledger yet."""
    return [
''','''def read_ledger(workspace: Workspace) -> list[dict[str, str]]:
    """Return a run's ledger as `ledger_rows`; none where there is no ledger yet."""
    return ledger_rows(_read(workspace.ledger))


def ledger_rows(ledger: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a ledger for a table, one row per source and step; the cells are text and not markdown."""
    return [
'''),
('''        for account in _read(workspace.ledger).get("sources", ())
''','''        for account in ledger.get("sources", ())
'''))
t = Path("flows/retrain.py").read_text(); assert t.count("summary.ledger_rows(workspace)") == 2
Path("flows/retrain.py").write_text(t.replace("summary.ledger_rows(workspace)", "summary.read_ledger(workspace)"))
sub("flows/report.py",
('''def _ledger(version: Version) -> str:
    rows = [
        {
            "source": plain(account["name"]),
            "step": plain(step.name if step.epoch is None else f"epoch {step.epoch}: {step.name}"),
            "": step.sign,
            "how many": "" if step.count is None else f"{step.count:,} {step.unit}",
            "tokens": "" if step.tokens is None else f"{step.tokens:,}",
        }
        for account in version.ledger.get("sources", ())
        for step in list_steps(account)
    ]
    return table(rows)


''', ''),
('''        _ledger(case.new) or "Not recorded''', '''        table([{head: plain(cell) for head, cell in row.items()} for row in ledger_rows(case.new.ledger)])
        or "Not recorded'''),
('''from ropeway.ledger_steps import list_steps
''', ''),
('''from flows.markdown import code, fence, plain, table
''', '''from flows.markdown import code, fence, plain, table
from flows.summary import ledger_rows
'''))
sub("flows/revision.py",
('''    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return Revision(None, ())
    changed = _git(root, "diff", "--name-only", "--relative", "-z", "HEAD").split("\\0")
''','''    commit = ask_git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return Revision(None, ())
    changed = (ask_git(root, "diff", "--name-only", "--relative", "-z", "HEAD") or "").split("\\0")
'''),
('''        lines = _git(root, "diff", "--unified=0", "--relative", "HEAD", "--", name).splitlines()
''','''        lines = (ask_git(root, "diff", "--unified=0", "--relative", "HEAD", "--", name) or "").splitlines()
'''),
('''def _git(root: Path, *arguments: str) -> str:
    """Return git's answer; empty where there is no git, or nothing to answer."""
''','''def ask_git(root: Path, *arguments: str) -> str | None:
    """Return git's answer without the end of its last line; None where there is no git, or it refuses."""
'''),
('''        return ""
    return done.stdout if done.returncode == 0 else ""
''','''        return None
    return done.stdout.rstrip("\\n") if done.returncode == 0 else None
'''),
('''    return Revision(commit.strip(), tuple(''','''    return Revision(commit, tuple('''),
)
p = Path("flows/reproduce.py"); t = p.read_text()
i = t.index("\n\ndef _git(root: Path")
t = t[:i]
assert t.count("_git(") == 4
t = t.replace("_git(", "ask_git(").replace("from flows.retrain import choose_profile\n", "from flows.retrain import choose_profile\nfrom flows.revision import ask_git\n")
p.write_text(t)
sub("src/ropeway/supervise.py", ("import contextlib\n", ""), ("from contextlib import suppress\n", "from contextlib import ExitStack, suppress\n"), ("contextlib.ExitStack()", "ExitStack()"))
