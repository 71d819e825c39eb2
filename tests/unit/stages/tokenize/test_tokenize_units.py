"""Units of work: what is planned, what a broken-off tokenize leaves, and what the next one makes of it."""

import errno
import json
import signal
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.config.sections import DatasetOptions
from ropeway.config.stages import READS
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.data.raw_records import RowGroup, iterate_groups, iterate_records, list_groups
from ropeway.data.shards import open_shards
from ropeway.data.tokenized import COLUMNS, SHARDS, open_tokenized
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.stages.prepare import stage as prepare
from ropeway.stages.tokenize import encode_workers as workers
from ropeway.stages.tokenize import store, units
from ropeway.stages.tokenize.units import choose_unit_bytes, plan_units, tokenize_unit
from tests.support.raw_records import PUBLISHED, TALKS, TEXTS, profile, write_raw
from tests.support.tokenizing import run_tokenize, tokenize_and_prepare


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A workspace whose two sources are several units each."""
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 200)
    monkeypatch.setattr("ropeway.stages.tokenize.stage.UNIT_BYTES", 900)
    return write_raw(tmp_path)


@pytest.fixture
def made(monkeypatch):
    """Names of the units that are made."""
    names = []

    def make(unit):
        names.append("/".join(unit.folder.parts[-2:]))
        return tokenize_unit(unit)

    monkeypatch.setattr("ropeway.stages.tokenize.store.tokenize_unit", make)
    return names


def digest(workspace):
    return file_sha256(workspace.tokens / "manifest.json")


def whole_units(workspace):
    return {"/".join(path.parts[-3:-1]) for path in workspace.work.glob("tokenize-run-*/*/*/manifest.json")}


@given(sizes=st.lists(st.integers(0, 30)), limit=st.integers(1, 40))
def test_units_are_all_groups_in_order_and_no_larger_than_they_may_be(sizes, limit):
    groups = [RowGroup("part", number, 1, size) for number, size in enumerate(sizes)]
    planned = plan_units(groups, unit_bytes=limit)
    assert [group for unit in planned for group in unit] == groups
    assert len(planned) >= 1
    for unit in planned:
        assert len(unit) <= 1 or sum(group.text_bytes for group in unit) <= limit
    for unit, following in pairwise(planned):
        assert sum(group.text_bytes for group in (*unit, following[0])) > limit


@pytest.mark.parametrize(("count", "units"), [(0, 1), (1, 1), (5, 5), (64, 32), (6400, 100)])
def test_a_small_source_is_cut_as_finely_as_a_worker_wants_and_a_large_one_as_coarsely_as_it_may(count, units):
    groups = [RowGroup("part", number, 1, 10) for number in range(count)]
    assert len(plan_units(groups, unit_bytes=choose_unit_bytes(groups, at_most=640))) == units


def test_groups_of_one_source_read_apart_are_its_records(many):
    for name, records in (("talk", TALKS), ("text", TEXTS)):
        groups = list_groups(many.raw / name)
        assert len(groups) > 3
        assert sum(group.records for group in groups) == len(records)
        apart = [record for group in groups for record in iterate_groups(many.raw / name, [group])]
        assert apart == list(iterate_records(many.raw / name)) == records


def test_a_groups_size_is_that_of_its_text_even_if_texts_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 10_000)
    workspace = write_raw(tmp_path, texts=["the same text again " * 5] * 300)
    sizes = [group.text_bytes for group in list_groups(workspace.raw / "text")]
    assert all(10_000 < size < 15_000 for size in sizes)


def test_a_tokenize_that_breaks_off_continues_at_the_first_missing_unit(many, made, monkeypatch, tmp_path):
    undisturbed = write_raw(tmp_path / "other")
    run_tokenize(undisturbed, profile())
    expected, everything = digest(undisturbed), list(made)
    assert Counter(name.split("/")[0] for name in everything).keys() == {"talk", "text"}
    made.clear()

    def stumble(unit):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append("/".join(unit.folder.parts[-2:]))
        return tokenize_unit(unit)

    with monkeypatch.context() as patch:
        patch.setattr("ropeway.stages.tokenize.store.tokenize_unit", stumble)
        with pytest.raises(KeyboardInterrupt):
            run_tokenize(many, profile())
    assert not many.tokens.exists()
    assert made == everything[:4]
    assert whole_units(many) == set(everything[:4])
    made.clear()
    run_tokenize(many, profile())
    assert made == everything[4:]
    assert digest(many) == expected


def test_nothing_is_left_of_units_once_tokens_are_whole(many):
    run_tokenize(many, profile())
    assert not list(many.work.iterdir())
    names = {path.name.rpartition("-")[0] or path.stem for path in many.tokens.rglob("*.npy")}
    assert names == {*COLUMNS, *SHARDS}


def break_off(workspace):
    """A tokenize that is stopped after all units are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.Units, "write_source", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run_tokenize(workspace, profile())


@pytest.fixture
def stopped(many, made):
    """A workspace whose units are made, but not its tokens."""
    break_off(many)
    assert whole_units(many) == set(made)
    assert not many.tokens.exists()
    made.clear()
    return many


def test_params_that_tokenize_does_not_read_reuse_the_units(stopped, made):
    run_tokenize(stopped, profile(max_length=20, val_split=0.3, layout="packed"))
    assert made == []


@pytest.mark.parametrize("part", ["tokens.npy", "keys.npy", "manifest.json"])
def test_a_damaged_unit_is_rebuilt_and_no_other(stopped, made, part, capsys):
    (folder,) = stopped.work.glob("tokenize-run-*/text/00001")
    path = folder / part
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    run_tokenize(stopped, profile())
    assert made == ["text/00001"]
    assert f"text/00001/{part}" in capsys.readouterr().out


@pytest.mark.parametrize("edit", ["no tokens", "no counts", "no file", "no sha256", "not a mapping"])
def test_a_unit_whose_manifest_is_incomplete_is_rebuilt_and_no_other(stopped, made, edit, capsys):
    (path,) = stopped.work.glob("tokenize-run-*/text/00001/manifest.json")
    manifest = json.loads(path.read_bytes())
    match edit:
        case "no tokens":
            del manifest["tokens"]
        case "no counts":
            del manifest["records"]["refused"]
        case "no file":
            del manifest["files"]["grams.npy"]
            (path.parent / "grams.npy").unlink()
        case "no sha256":
            del manifest["files"]["grams.npy"]["sha256"]
        case "not a mapping":
            manifest = [manifest]
    write_json(path, manifest)
    run_tokenize(stopped, profile())
    assert made == ["text/00001"]
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "tokenized again" in printed


def test_a_unit_that_is_damaged_before_it_is_placed_is_named_and_rebuilt_the_next_time(stopped, made, monkeypatch):
    (path,) = stopped.work.glob("tokenize-run-*/text/00001/tokens.npy")
    write_source = store.Units.write_source

    def spoil(self, folder):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        write_source(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(store.Units, "write_source", spoil)
        with pytest.raises(DataError, match=r"00001/tokens.npy: sha256 is"):
            run_tokenize(stopped, profile())
    assert not stopped.tokens.exists()
    run_tokenize(stopped, profile())
    assert made == ["text/00001"]


def test_another_recipe_is_other_work_and_earlier_work_of_this_run_goes_in_the_end(stopped, made):
    (foreign := stopped.work / "tokenize-run-b-0123456789abcdef").mkdir()
    run_tokenize(stopped, profile(special_tokens_in_text="reject"))
    assert len(made) > 4
    assert list(stopped.work.iterdir()) == [foreign]


@pytest.mark.parametrize(
    "change", ["raw", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "recipe", "code"]
)
def test_the_fingerprint_changes_with_whatever_a_units_bytes_depend_on(tmp_path, monkeypatch, change):
    base = write_raw(tmp_path).base
    recipe = units.Recipe(None, "parse")
    before = units.fingerprint({"a": {"sha256": "1"}}, base, {"s": recipe})
    if (path := base / change).is_file():
        path.write_bytes(path.read_bytes() + b" ")
    if change == "code":
        monkeypatch.setattr("ropeway.stages.tokenize.units.code_digest", lambda: "other")
    raw = {"a": {"sha256": "2" if change == "raw" else "1"}}
    recipes = {"s": units.Recipe(7, "parse") if change == "recipe" else recipe}
    assert units.fingerprint(raw, base, recipes) != before


def test_a_full_disk_leaves_no_table_and_keeps_what_is_whole(many, made, monkeypatch):
    save, remaining = np.save, [38]

    def save_until_full(path, *args, **more):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", save_until_full)
        with pytest.raises(TemporaryError, match=r"the disk is full.*completed units are kept"):
            run_tokenize(many, profile())
    assert len(made) == 4  # twelve arrays each: three whole units, two arrays of the fourth
    assert whole_units(many) == set(made[:3])
    assert not many.tokens.exists()
    assert not [path for path in many.root.rglob("*") if path.name.endswith(".partial")]
    made.clear()
    run_tokenize(many, profile())
    assert "talk/00002" not in made
    assert made[0] == "talk/00003"


def test_a_disk_that_fills_up_at_the_very_end_keeps_all_units(many, made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.link", full_disk)
        patch.setattr("shutil.copyfile", full_disk)
        with pytest.raises(TemporaryError, match="the disk is full"):
            run_tokenize(many, profile())
    assert not many.tokens.exists()
    assert whole_units(many) == set(made)
    made.clear()
    run_tokenize(many, profile())
    assert made == []


def full_disk(_, target):
    raise OSError(errno.ENOSPC, "No space left on device", str(target))


def test_where_the_disk_knows_no_links_shards_are_copied(many, tmp_path, monkeypatch):
    run_tokenize(many, profile())
    other = write_raw(tmp_path / "other")

    def refuse_link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse_link)
    run_tokenize(other, profile())
    assert digest(other) == digest(many)


def test_a_source_without_records_is_one_empty_shard(tmp_path):
    workspace = write_raw(tmp_path, texts=[])
    run_tokenize(workspace, profile())
    assert np.load(workspace.tokens / "text" / "tokens-00000.npy").shape == (0,)
    sources, _ = open_tokenized(workspace.tokens)
    assert sources["text"].shard_sequences == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "packed"},
        {"num_train_epochs": 3},
        {"val_split": 0.4},
        {"split": "by_hash"},
        {"split_by": "document"},
        {"what_counts": "answers"},
        {"max_length": 16},
        {"max_refused_fraction": 0.2},
        {
            "datasets": [
                {"talk": DatasetOptions(fraction=0.5)},
                {"text": DatasetOptions(max_chunk_size=60, fraction=0.5)},
            ]
        },
        {"duplicates": PUBLISHED.duplicates.model_copy(update={"exact": "remove", "near": "remove", "threshold": 0.5})},
        {"contamination": PUBLISHED.contamination.model_copy(update={"action": "remove"})},
    ],
    ids="-".join,
)
def test_layout_epochs_split_fraction_what_counts_and_duplicate_rules_are_none_of_tokenizes_params(changes):
    assert TokenizeParams.of(profile(**changes)) == TokenizeParams.of(profile())


@pytest.mark.parametrize(
    "changes",
    [
        {"special_tokens_in_text": "reject"},
        {"datasets": [{"talk": DatasetOptions()}, {"text": DatasetOptions(max_chunk_size=61)}]},
        {"datasets": [{"talk": DatasetOptions()}]},
        {"duplicates": PUBLISHED.duplicates.model_copy(update={"ngram": 6})},
        {"duplicates": PUBLISHED.duplicates.model_copy(update={"permutations": 64})},
        {"duplicates": PUBLISHED.duplicates.model_copy(update={"near": "off"})},
        {"contamination": PUBLISHED.contamination.model_copy(update={"ngram": 12})},
        {"contamination": PUBLISHED.contamination.model_copy(update={"action": "off"})},
    ],
    ids="-".join,
)
def test_prepare_refuses_tokens_that_were_made_by_other_params(tmp_path, changes):
    workspace, other = write_raw(tmp_path), profile(**changes)
    assert TokenizeParams.of(other) != TokenizeParams.of(profile())
    run_tokenize(workspace, profile())
    if set(changes) == {"special_tokens_in_text"}:  # prepare does not read it
        return
    with pytest.raises(DataError, match=f"other values of {next(iter(changes))} than params.yaml"):
        prepare.run(workspace, other.reading(READS["prepare"]))
    assert not workspace.data.exists()


def test_sources_in_another_order_are_tokenized_alike_and_prepared_in_that_order(tmp_path):
    workspace, turned = write_raw(tmp_path), profile(datasets=profile().datasets[::-1])
    run_tokenize(workspace, profile())
    prepare.run(workspace, turned.reading(READS["prepare"]))
    assert [source.name for source in open_shards(workspace.data).sources] == ["text", "talk"]


def test_a_unit_made_twice_is_the_first_one(many):
    run_tokenize(many, profile())
    raw = many.raw / "talk"
    unit = units.Unit(tuple(list_groups(raw)), raw, many.base, units.Recipe(None, "parse"), many.work / "x" / "00000")
    first = tokenize_unit(unit)
    inode = (first / "tokens.npy").stat().st_ino
    assert tokenize_unit(unit) == first
    assert (first / "tokens.npy").stat().st_ino == inode
    assert [path.name for path in first.parent.iterdir()] == ["00000"]


def test_records_are_numbered_over_units_and_documents_are_never_torn(many):
    tokenize_and_prepare(many, profile(split_by="document"))
    _, text = open_shards(many.data).sources
    assert len(text.shard_sequences) > 2
    train, validation = (set(part.tolist()) for part in (text.train, text.validation))
    number = 0
    for document in TEXTS:
        chunks = set(range(number, number := number + -(-len(document) // 60)))
        assert chunks <= train or not chunks & train
        assert not (chunks & train and chunks & validation)


@pytest.mark.parametrize(("asked", "text_bytes", "expected"), [("", 0, 0), ("", 1 << 40, 6), ("3", 0, 3)])
def test_as_many_processes_as_asked_for_else_as_are_worth_their_start(monkeypatch, asked, text_bytes, expected):
    monkeypatch.setenv("ROPEWAY_TOKENIZE_WORKERS", asked)
    monkeypatch.setattr("ropeway.stages.tokenize.encode_workers.count_cores", lambda: 6)
    assert workers.count_workers(text_bytes) == expected


@pytest.mark.parametrize("asked", ["0", "two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("ROPEWAY_TOKENIZE_WORKERS", asked)
    with pytest.raises(ConfigError, match=f"ROPEWAY_TOKENIZE_WORKERS: .* found '{asked}'"):
        workers.count_workers(0)
