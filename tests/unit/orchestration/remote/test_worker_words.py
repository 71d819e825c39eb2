"""What a worker says before it trains: where checkpoints are once it is lost."""

import pytest

from ropeway.orchestration.remote import worker
from ropeway.stages.train import checkpoint_store


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Return a function that executes a stage of which nothing is real and returns what the worker printed."""
    lines = []
    for name in ("choose_profile", "read_revision", "_pull", "_push", "inputs_of"):
        monkeypatch.setattr(worker, name, lambda *_: ())
    monkeypatch.setattr(worker, "repair", lambda _root: [])
    monkeypatch.setattr(worker, "sync_results", lambda *_: None)
    monkeypatch.setattr(worker.exchange, "read_lock_entry", lambda *_: {})
    monkeypatch.setattr(worker.Handover, "receive", lambda *_: Empty())
    monkeypatch.setattr(worker, "update_stage", lambda *_: "ran")
    monkeypatch.setattr(worker, "_say", lines.append)

    def execute(step):
        lines.clear()
        worker.execute(tmp_path, Request(step))
        return lines

    return execute


class Empty:
    def write(self, root):
        pass

    def other_versions(self):
        return []


class Request:
    profile, handover = "laptop", {}

    def __init__(self, step):
        self.step = step


def test_a_worker_without_a_store_says_before_training_that_its_loss_costs_all_steps(said, monkeypatch):
    monkeypatch.delenv(worker.CHECKPOINT_STORE, raising=False)
    (words,) = said("train")
    assert worker.CHECKPOINT_STORE in words
    assert said("evaluate") == []


def test_a_worker_with_a_store_names_it_without_its_password(said, monkeypatch):
    monkeypatch.setenv(worker.CHECKPOINT_STORE, "s3://me:secret@bucket/prefix")
    (words,) = said("train")
    assert "bucket/prefix" in words
    assert "secret" not in words


def test_the_worker_reads_the_variable_that_the_stage_reads():
    assert worker.CHECKPOINT_STORE == checkpoint_store.VARIABLE
