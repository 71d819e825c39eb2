"""Ranks save a checkpoint together: each hashes and flushes what it wrote, and the manifest is rank 0's, last."""

import errno
import json
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropeway.runtime import manifest
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.manifest import load_manifest
from ropeway.stages.train import checkpoints, saving
from ropeway.stages.train.checkpoint_writer import CheckpointWriter, copy_to_host
from tests.support.fake_ranks import FakeRanks

RANKS = 2
LOG = [{"step": 1, "applied": 1, "applied_steps": 1}, {"step": 2, "applied": 1, "applied_steps": 2}]


class FakeEngine:
    """Writes what DeepSpeed writes: a shard for each rank, the weights and a script on rank 0."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks, self.device = rank, ranks, torch.device("cpu")
        torch_engine = SimpleNamespace(
            create=lambda _: None,
            save=torch.save,
            commit=lambda _: True,
        )
        self.checkpoint_engine = CheckpointWriter(torch_engine)
        self.checkpoint_engine.rank = rank
        self.state = torch.full((1000,), float(rank))

    def save_checkpoint(self, folder, *, tag, save_latest):
        assert not save_latest
        place = Path(folder) / tag
        place.mkdir(exist_ok=True)
        self.checkpoint_engine.create(None)
        if self.rank == 0:
            self.checkpoint_engine.save({"module": self.state}, str(place / "mp_rank_00_model_states.pt"))
            (Path(folder) / "zero_to_fp32.py").write_text("copied")
        self.checkpoint_engine.save({"shard": self.state}, str(place / f"zero_pp_rank_{self.rank}.pt"))
        self.ranks.barrier()


@pytest.fixture
def ranks(monkeypatch):
    fake = FakeRanks(RANKS)
    monkeypatch.setattr(torch, "distributed", fake)
    return fake


def make_runs(ranks, *, async_save=False):
    profile = SimpleNamespace(save_total_limit=2, async_save=async_save)
    return [
        SimpleNamespace(
            rank=rank,
            world_size=RANKS,
            engine=FakeEngine(rank, ranks),
            profile=profile,
            rewinds=(),
            device=torch.device("cpu"),
        )
        for rank in range(RANKS)
    ]


def test_each_rank_hashes_and_flushes_the_files_that_it_wrote(ranks, tmp_path, monkeypatch):
    runs, hashed, synced = make_runs(ranks), [], []
    describe, sync = manifest.describe_files, manifest.sync_file

    def note(folder, names, **options):
        hashed.append(sorted(names))
        return describe(folder, names, **options)

    monkeypatch.setattr(saving, "describe_files", note)
    monkeypatch.setattr(manifest, "sync_file", lambda path: (synced.append(path.name), sync(path)))
    ranks.run(lambda rank: saving.save(runs[rank], tmp_path, LOG))
    assert sorted(hashed) == [
        ["state/mp_rank_00_model_states.pt", "state/zero_pp_rank_0.pt", "steps.jsonl", "zero_to_fp32.py"],
        ["state/zero_pp_rank_1.pt"],
    ]
    assert sorted(synced) == sorted(Path(name).name for names in hashed for name in names)


def test_the_manifest_is_the_one_that_a_single_process_writes(ranks, tmp_path):
    runs = make_runs(ranks)
    folder, _ = ranks.run(lambda rank: saving.save(runs[rank], tmp_path / "fingerprint", LOG))
    written = (folder / manifest.NAME).read_bytes()
    facts = {"ranks": RANKS, "rewinds": [], **saving.versions(), "fingerprint": "fingerprint", "step": 2}
    manifest.write_manifest(folder, facts)
    assert (folder / manifest.NAME).read_bytes() == written
    assert load_manifest(folder, remedy="-")["step"] == 2


def test_after_a_save_no_rank_reads_the_checkpoint_to_name_it(ranks, tmp_path, monkeypatch):
    runs = make_runs(ranks)
    ranks.run(lambda rank: saving.save(runs[rank], tmp_path, LOG))
    monkeypatch.setattr(checkpoints, "load_manifest", lambda *_, **__: pytest.fail("the checkpoint was read"))
    assert "step 2: " in checkpoints.describe_last_good(tmp_path)


def test_a_file_that_no_rank_hashed_is_never_published(tmp_path):
    partial = checkpoints.partial_folder(tmp_path, 1)
    partial.mkdir()
    (partial / "late.pt").write_bytes(b"written after the files were listed")
    with pytest.raises(manifest.DataError, match=r"late\.pt was not hashed by any rank"):
        checkpoints.publish(tmp_path, 1, {}, {})
    assert checkpoints.list_steps(tmp_path) == []


@pytest.fixture
def saved(ranks, tmp_path):
    """Return a run's folder with checkpoints of steps 1 and 2, as a new process finds it."""
    runs = make_runs(ranks)
    for step in (1, 2):
        ranks.run(lambda rank, step=step: saving.save(runs[rank], tmp_path, LOG[:step]))
    checkpoints._VERIFIED.clear()
    return tmp_path


def test_ranks_open_the_verified_checkpoint_without_reading_it(ranks, saved, monkeypatch):
    monkeypatch.setattr(manifest, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    found = ranks.run(lambda rank: saving.find_checkpoint(saved, rank=rank, verified=2))
    assert [(one.step, len(one.log())) for one in found] == [(2, 2), (2, 2)]
    assert ranks.run(lambda rank: saving.find_checkpoint(saved, rank=rank, verified=0)) == [None, None]


def test_a_checkpoint_that_the_stage_found_damaged_is_removed_first(ranks, saved, monkeypatch):
    ranks.run(lambda rank: saving.find_checkpoint(saved, rank=rank, verified=1))
    monkeypatch.setattr(manifest, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    checkpoints.rotate(saved, keep=1, saved=1)
    assert [step for step, _ in checkpoints.list_steps(saved)] == [1]


@pytest.mark.parametrize("fault", ["cut", "missing", "other run"])
def test_a_checkpoint_that_changed_after_the_stage_verified_it_is_refused_by_all(ranks, saved, fault):
    folder = checkpoints.step_folder(saved, 2)
    if fault == "cut":
        (folder / "state" / "zero_pp_rank_1.pt").write_bytes(b"")
    elif fault == "missing":
        checkpoints.remove(folder)
    else:
        stated = json.loads((folder / manifest.NAME).read_bytes())
        manifest.write_json(folder / manifest.NAME, {**stated, "fingerprint": "another"})
    refused = []

    def find(rank):
        with pytest.raises(saving.CheckpointViewError, match="rank 0 on "):
            saving.find_checkpoint(saved, rank=rank, verified=2)
        refused.append(rank)

    ranks.run(find)
    assert sorted(refused) == [0, 1]


def test_hosts_that_see_different_checkpoints_are_refused(ranks, saved, tmp_path):
    other = tmp_path / "other host" / saved.name
    other.parent.mkdir()
    manifest.shutil.copytree(saved, other, ignore=manifest.shutil.ignore_patterns("other host"))
    folder = checkpoints.step_folder(other, 2)
    stated = json.loads((folder / manifest.NAME).read_bytes())
    manifest.write_json(folder / manifest.NAME, {**stated, "torch": "another"})

    def find(rank):
        with pytest.raises(saving.CheckpointViewError, match="same file system"):
            saving.find_checkpoint((saved, other)[rank], rank=rank, verified=2)

    ranks.run(find)


def make_savers(ranks, tmp_path, reports):
    runs = make_runs(ranks, async_save=True)
    return runs, [
        saving.Saver(run, tmp_path, report=lambda *told: reports.append(told), deadline=nullcontext) for run in runs
    ]


@pytest.fixture
def gates(monkeypatch):
    """Return an event for each rank; its background write waits for it."""
    events, write = [threading.Event() for _ in range(RANKS)], CheckpointWriter.write_copies

    def wait(writer):
        assert events[writer.rank].wait(30)
        write(writer)

    monkeypatch.setattr(CheckpointWriter, "write_copies", wait)
    return events


def test_a_background_save_holds_the_state_of_its_step_and_is_published_last(ranks, tmp_path, gates):
    reports = []
    runs, savers = make_savers(ranks, tmp_path, reports)

    def train(rank):
        savers[rank].save(LOG)
        runs[rank].engine.state.fill_(9)  # the next steps
        savers[rank].poll()
        assert checkpoints.list_steps(tmp_path) == []  # one rank at least still writes
        ranks.barrier()
        gates[rank].set()
        savers[rank].wait()

    ranks.run(train)
    found = checkpoints.newest_valid(tmp_path)
    assert (found.step, len(found.log())) == (2, 2)
    for rank in range(RANKS):
        shard = torch.load(found.folder / "state" / f"zero_pp_rank_{rank}.pt")["shard"]
        assert torch.equal(shard, torch.full((1000,), float(rank)))
    assert [(step, waited < seconds) for step, waited, seconds in reports] == [(2, True)]


def test_ranks_complete_a_background_save_only_when_all_have_written(ranks, tmp_path, gates):
    _, savers = make_savers(ranks, tmp_path, [])
    gates[0].set()

    def train(rank):
        savers[rank].save(LOG)
        if rank == 0:
            savers[0]._pending.files.result(30)
        savers[rank].poll()
        assert checkpoints.list_steps(tmp_path) == []
        ranks.barrier()
        gates[rank].set()
        savers[rank]._pending.files.result(30)
        savers[rank].poll()
        assert [step for step, _ in checkpoints.list_steps(tmp_path)] == [2]

    ranks.run(train)


def test_a_second_save_waits_for_the_first(ranks, tmp_path, gates):
    _, savers = make_savers(ranks, tmp_path, [])

    def train(rank):
        savers[rank].save(LOG[:1])
        gates[rank].set()
        savers[rank].save(LOG)
        assert [step for step, _ in checkpoints.list_steps(tmp_path)] == [1]
        savers[rank].wait()

    ranks.run(train)
    assert [step for step, _ in checkpoints.list_steps(tmp_path)] == [1, 2]


@pytest.mark.parametrize("method", ["poll", "wait", "save"])
@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(errno.ENOSPC, "full"), TemporaryError), (OSError(errno.EROFS, "ro"), ConfigError)]
)
def test_a_failed_background_save_ends_the_run_as_one_in_the_foreground(
    ranks, tmp_path, monkeypatch, method, error, kind
):
    _, savers = make_savers(ranks, tmp_path, [])

    def fail(_writer):
        raise error

    monkeypatch.setattr(CheckpointWriter, "write_copies", fail)

    def train(rank):
        savers[rank].save(LOG)
        with suppress(OSError):
            savers[rank]._pending.files.result(30)
        getattr(savers[rank], method)(*([LOG] if method == "save" else []))

    with pytest.raises(kind, match="saving step 2 failed"):
        ranks.run(train)
    assert checkpoints.list_steps(tmp_path) == []


def make_state(kind):
    flat = torch.arange(24, dtype=torch.float32)
    tied = flat[:6].view(2, 3)
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=kind == "trained")
    parameter.note = "an attribute"
    shared = ["a list", 1.5]
    return {
        "module": {"embed": tied, "head": tied, "tail": flat[20:], "column": flat.view(4, 6)[:, 1]},
        "optimizer": [{"master": parameter, "step": torch.tensor(3)}, (torch.empty(0), None)],
        "scaler": SimpleNamespace(scale=2.0, tensor=torch.ones(2)),
        "shared": [shared, shared],
        "half": torch.ones(4, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_the_copy_of_a_state_is_saved_with_the_same_bytes(tmp_path, kind):
    state = make_state(kind)
    torch.save(state, tmp_path / "state.pt")
    expected = (tmp_path / "state.pt").read_bytes()
    copied = copy_to_host(state)
    state["module"]["embed"].zero_()
    state["scaler"].tensor.zero_()
    state["optimizer"][0]["master"].data.zero_()
    torch.save(copied, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == expected
