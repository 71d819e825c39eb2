"""A rehearsal without its supervisor, in a forked process: the same steps in a tenth of the time."""

import sys
from dataclasses import asdict

from ropeway.rehearse.rehearsal import REQUEST
from ropeway.rehearse.rehearse_steps import STATE, RehearsalRequest, read_state
from ropeway.runtime.manifest import write_json
from tests.support import forked
from tests.support.families import SIZES, Family, save_family
from tests.support.whole_run import CHAT, CHATS, jsonl, make_workspace

SMALL = Family("llama", "", more={**SIZES, "num_hidden_layers": 2})


def make_chats(root, rows=CHATS, *, source=CHAT, changes=None, family=SMALL):
    """Return a workspace with a tiny base in a folder and a file of chats."""
    save_family(family, root / "base")
    changes = {
        "base": {"kind": "folder"},
        "model_name": str(root / "base"),
        "expected_model": None,
        "superhot": False,
        **(changes or {}),
    }
    sources = {"talk": {"kind": "files", "paths": ["talk.jsonl"], **source}}
    workspace = make_workspace(root / "workspace", sources, changes)
    (workspace.root / "talk.jsonl").write_bytes(jsonl(rows))
    return workspace


def rehearse_forked(workspace, folder, *, registry=None):
    """Return (exit code, state) of a rehearsal in a folder."""
    (folder / ".work").mkdir(parents=True)
    url = registry or (workspace.root / "registry").as_uri()
    request = RehearsalRequest(str(workspace.root), workspace.profile, url, 2, None)
    write_json(folder / ".work" / REQUEST, asdict(request))
    command = [sys.executable, "-m", "ropeway.cli.main", "execute-rehearsal", str(folder)]
    done = forked.run(command, cwd=folder)
    return done.returncode, read_state(folder / ".work" / STATE)
