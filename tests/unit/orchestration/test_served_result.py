"""What a served run prints at its end, in the terminal of `ropeway serve`."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from ropeway.orchestration import prefect_adapter


class Run:
    """A run of which nothing is real; `steps` give it its result."""

    def __init__(self, *_, **__):
        self.lock = nullcontext


@pytest.fixture
def end_run(monkeypatch, tmp_path):
    """Return a function that opens and ends a run, and returns what was printed as its result."""
    shown = []
    for name in ("stop_on_suspend", "_show_trigger", "PrefectDisplay"):
        monkeypatch.setattr(prefect_adapter, name, lambda *_: nullcontext())
    monkeypatch.setattr(prefect_adapter, "PageLog", lambda _url: SimpleNamespace(close=lambda _seconds: {}))
    monkeypatch.setattr(prefect_adapter, "PipelineRun", Run)
    monkeypatch.setattr(prefect_adapter, "_lock_when_free", lambda *_: nullcontext())
    monkeypatch.setattr(prefect_adapter, "_api", lambda: "http://host/api")
    monkeypatch.setattr(prefect_adapter, "load_profile", lambda *_: ("tiny", None))
    monkeypatch.setattr(prefect_adapter, "print_result", lambda *what: shown.append(what))

    def end(*, deployment, result=None):
        shown.clear()
        flow_run = SimpleNamespace(id="7", parameters={})
        fake = SimpleNamespace(flow_run=flow_run, deployment=SimpleNamespace(id=deployment))
        monkeypatch.setattr(prefect_adapter, "runtime", fake)
        with prefect_adapter.open_run(str(tmp_path), None) as run:
            if result:
                run.result = result
        return shown

    return end


def test_a_served_run_prints_its_result_once_with_its_page(end_run):
    assert end_run(deployment="2", result="done") == [("done", "http://host/runs/flow-run/7")]


def test_a_run_of_a_command_leaves_it_to_the_command(end_run):
    assert end_run(deployment=None, result="done") == []


def test_a_served_flow_without_a_result_prints_none(end_run):
    assert end_run(deployment="2") == []
