"""What a stage uses is frozen when the digests are taken: a later edit changes nothing, or is found."""

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import ropeway
from ropeway.config import frozen
from ropeway.config.edit import without_comments
from ropeway.config.frozen import FrozenInputs, read_version
from ropeway.config.load_params import load_profiles
from ropeway.config.stages import READS, UNHASHED
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.orchestration.dvc_graph import describe_change
from ropeway.orchestration.stage_process import check_unchanged, execute_stage, run_stage, write_identity
from ropeway.runtime.code_digests import CODE, Digests, check_code
from ropeway.runtime.devices import Gpu
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.worker_processes import CODE_CHECK, check_worker_code
from ropeway.runtime.workspace import Workspace
from tests.support.freezing import freeze_inputs
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]
BASE_CONFIG = '{"model_type": "llama"}'


@pytest.fixture(scope="module")
def parsed(tmp_path_factory):
    """The record of a first run's parse of the code, which takes 0.5 s."""
    record = tmp_path_factory.mktemp("parsed") / CODE
    code = Digests(Path(ropeway.__file__).parent, record)
    for stage in READS:
        code.modules(stage)
    code.keep()
    return record


@pytest.fixture
def root(tmp_path, parsed):
    """A workspace whose profile reads a file of its own and starts from a folder."""
    (tmp_path / ".work").mkdir()
    shutil.copy(parsed, tmp_path / ".work")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "talks.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(BASE_CONFIG)
    (tmp_path / "base" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    source = "{kind: files, paths: [talks.jsonl], rows: messages, columns: {}, expected_rows: null}"
    text = read_shipped_params("own") + (
        "own:\n  <<: *published\n  model_name: base\n  datasets: [{talks: {size: 9}}]\n  base: {kind: folder}\n"
        f"  sources: {{talks: {source}}}\n"
    )
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("name", ["llama2_13b_orca_8k", "smollm2", "laptop"])
def test_a_stage_reads_the_very_values_of_the_file_and_no_others(tmp_path, name):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    freeze_inputs(tmp_path, name)
    frozen, (_, profiles) = FrozenInputs.load(tmp_path), load_profiles(tmp_path / "params.yaml")
    assert frozen.profile_name == name
    assert frozen.tokenize_params() == TokenizeParams.of(profiles[name])
    for stage, keys in READS.items():
        if stage == "tokenize":  # it reads parts of keys
            continue
        read = (*keys, *UNHASHED) if stage == "train" else keys
        assert frozen.profile(stage) == profiles[name].reading(read)
        assert all(type(getattr(frozen.profile(stage), key)) is type(getattr(profiles[name], key)) for key in read)
    with pytest.raises(AttributeError):
        _ = frozen.profile("fetch").learning_rate


def test_an_edit_of_any_file_that_params_name_reaches_no_stage(root):
    write_identity(root)
    names = ("params.yaml", "configs/zero_config_pretrain.json", "configs/prompts.jsonl", "configs/sampling.json")
    before = {name: (root / name).read_text(encoding="utf-8") for name in names}
    for name in names:
        (root / name).write_text("edited", encoding="utf-8")
    frozen = FrozenInputs.load(root)
    assert frozen.profile("train").learning_rate == 1e-5
    assert frozen.text("deepspeed", names[1]) == before[names[1]]
    assert frozen.text("prompts", names[2]) == frozen.text("contamination", names[2]) == before[names[2]]
    assert frozen.text("prompts", names[3]) == before[names[3]]
    assert frozen.params_file.read_text(encoding="utf-8") == without_comments(before["params.yaml"])
    for stage in ("train", "evaluate", "prepare", "package"):
        check_unchanged(root, frozen, stage)


def change_code(root, monkeypatch):
    source = shutil.copytree(
        Path(ropeway.__file__).parent, root / "ropeway", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(ropeway, "__file__", str(source / "__init__.py"))
    yield
    edit(source / "stages" / "train" / "loss.py", "EPSILON = 1e-8", "EPSILON = 1e-7")
    yield
    edit(source / "stages" / "train" / "loss.py", "EPSILON = 1e-7", "EPSILON = 1e-8  # the same")


def change_source(root, _):
    yield
    (root / "talks.jsonl").write_text('{"messages": [1]}\n')
    yield
    (root / "talks.jsonl").write_text('{"messages": []}\n')


def change_base(root, _):
    path = root / "base" / "config.json"
    yield
    path.write_text(BASE_CONFIG + " ")
    yield
    path.write_text(BASE_CONFIG)
    write_identity(root)  # its time of change cannot be put back


@pytest.mark.parametrize(
    ("change", "stage", "named"),
    [
        (
            change_code,
            "train",
            r"ropeway\.stages\.train\.loss changed after this run froze its inputs.*revert the code",
        ),
        (change_source, "fetch", "talks.jsonl changed after this run froze its inputs"),
        (change_base, "base", "config.json changed after this run froze its inputs"),
    ],
)
def test_what_is_read_in_place_may_not_change_until_the_stage_ends(root, monkeypatch, change, stage, named):
    steps = change(root, monkeypatch)
    next(steps)
    write_identity(root)
    frozen = FrozenInputs.load(root)
    check_unchanged(root, frozen, stage)
    next(steps)
    with pytest.raises(DataError, match=named):
        check_unchanged(root, frozen, stage)
    assert next(steps, None) is None
    check_unchanged(root, FrozenInputs.load(root), stage)


def test_a_rank_that_imported_other_code_does_not_train_though_the_code_is_put_back_later(root, monkeypatch):
    steps = change_code(root, monkeypatch)
    next(steps)
    write_identity(root)
    before, kept = FrozenInputs.load(root).value("code-train"), root / "code.json"
    check_code(before, kept, "train")
    next(steps)
    with pytest.raises(DataError, match=r"ropeway\.stages\.train\.loss: .*changed.*dvc repro"):
        check_code(before, kept, "train")


@pytest.mark.parametrize("stage", ["fetch", "base"])
def test_a_file_that_is_swapped_and_put_back_while_it_is_read_is_found(root, monkeypatch, stage):
    path = root / {"fetch": "talks.jsonl", "base": "base/model.safetensors"}[stage]
    write_identity(root)

    def swap(*_):
        path.rename(path.with_name("aside"))
        path.write_text("foreign")
        path.unlink()
        path.with_name("aside").rename(path)

    monkeypatch.setattr(f"ropeway.stages.{stage}.stage.run", swap)
    with pytest.raises(
        DataError, match=r"was replaced or written while the stage read it|changed after this run froze its inputs"
    ):
        execute_stage(root, stage)


def test_a_disk_that_fills_in_any_stage_is_said_and_may_be_retried(root, monkeypatch):
    def fill(*_):
        raise OSError("329370 requested and 51136 written")  # as numpy says it

    write_identity(root)
    monkeypatch.setattr("ropeway.stages.base.stage.run", fill)
    with pytest.raises(TemporaryError, match="the disk is full"):
        execute_stage(root, "base")


def test_cards_that_cannot_hold_a_training_refuse_it_before_it_starts(root, monkeypatch):
    write_identity(root)
    monkeypatch.setattr("ropeway.planning.plan.detect_gpus", lambda: [Gpu("a small card", 2**30)])
    with pytest.raises(ConfigError, match=r"1\.0 GiB, .* \d+ ranks"):
        run_stage(root, "train")


def test_a_worker_that_imported_other_code_does_not_work(root, monkeypatch):
    steps = change_code(root, monkeypatch)
    next(steps)
    write_identity(root)
    digest = digest_of(FrozenInputs.load(root).value("code-train"))
    monkeypatch.setenv(CODE_CHECK, json.dumps(["train", digest, str(root / "code.json")]))
    check_worker_code()
    next(steps)
    with pytest.raises(DataError, match="a worker process imported other code"):
        check_worker_code()


def test_addresses_that_only_signatures_tell_apart_are_refused(root):
    edit(root / "params.yaml", "paths: [talks.jsonl]", 'paths: ["https://h/d?token=A", "https://h/d?token=B"]')
    with pytest.raises(ConfigError, match=r"params\.yaml, sources: .*\(https://h/d\)"):
        freeze_inputs(root, "own")


def test_no_signature_of_any_profile_and_no_comment_is_kept_with_the_run(root):
    more = (
        "# asked by Anna SECRET8, https://host/x?key=SECRET9\n"
        "# last week: https://host/a.jsonl?X-Amz-Signature=SECRET1\n"
        "# https://host/a,b.jsonl?sig=SECRET3 //host/c?files=[1]&sig=SECRET4 https://host/d#access_token=SECRET5\n"
        "# https://anna:SECRET6@host/e https://host/f?api_key=SECRET7\n"
        "other:\n  <<: *published\n  datasets: [{talks: {size: 9}}]\n  sources: {talks: {kind: files, "
        'paths: ["https://host/b?sig=SECRET2&n=1", "https://host/c?key=SECRET11", "https://host/c?key=SECRET11x", '
        '"https://a:b@SECRET12@host/e"], rows: messages, columns: {}, expected_rows: null}}\n'
        "   # SECRET10\n"
    )
    with (root / "params.yaml").open("a", encoding="utf-8") as file:
        file.write(more)
    write_identity(root)
    kept = "".join(path.read_text(encoding="utf-8") for path in (root / ".identity").iterdir())
    assert "SECRET" not in kept
    assert load_profiles(root / ".identity" / "params.yaml")[1].keys() == load_profiles(root / "params.yaml")[1].keys()


def test_signed_urls_are_for_this_user_only(root):
    kept = root / ".identity" / "addresses.json"
    kept.parent.mkdir(exist_ok=True)
    kept.touch(mode=0o644)  # that of an older Ropeway
    write_identity(root)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_a_stage_whose_input_changes_while_it_runs_fails_at_its_end(root, monkeypatch):
    write_identity(root)
    (root / "talks.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    )
    with pytest.raises(DataError, match=r"stage fetch: talks.jsonl changed after this run froze its inputs"):
        execute_stage(root, "fetch")  # before it begins
    write_identity(root)
    from ropeway.stages.fetch import stage as fetch

    real = fetch.run

    def run(workspace, profile):
        real(workspace, profile)
        (root / "talks.jsonl").write_text("{}")

    monkeypatch.setattr(fetch, "run", run)
    with pytest.raises(DataError, match=r"stage fetch: talks.jsonl changed after this run froze its inputs"):
        execute_stage(root, "fetch")


def test_frozen_inputs_that_are_edited_missing_or_unfinished_are_refused(root):
    with pytest.raises(DataError, match=r"\.identity: .*missing or incomplete"):
        FrozenInputs.load(root)
    write_identity(root)
    frozen = FrozenInputs.load(root)
    path = root / ".identity" / "params-train.json"
    text = path.read_text()
    path.write_text(text.replace("1e-05", "5e-02"))
    with pytest.raises(DataError, match=r"params-train.json: sha256 is .* changed after it was written"):
        FrozenInputs.load(root)
    path.unlink()
    with pytest.raises(DataError, match=r"params-train.json: missing"):
        FrozenInputs.load(root)
    path.write_text(text)
    assert FrozenInputs.load(root) == frozen
    (root / ".identity" / "manifest.json").unlink()
    with pytest.raises(DataError, match="missing or incomplete"):
        FrozenInputs.load(root)


def test_new_digests_in_the_middle_of_a_stage_are_found(root):
    write_identity(root)
    frozen = FrozenInputs.load(root)
    edit(root / "params.yaml", "  learning_rate: 1e-5", "  learning_rate: 2e-5")
    write_identity(root)
    with pytest.raises(DataError, match=r"the frozen inputs in .* changed"):
        check_unchanged(root, frozen, "train")


@pytest.mark.parametrize(
    "key", ["deepspeed_config", "evaluation.prompts", "evaluation.sampling", "contamination.prompts"]
)
@pytest.mark.parametrize("fault", ["missing", "not UTF-8"])
def test_a_file_that_params_name_and_that_cannot_be_read_is_said_with_its_key(root, key, fault):
    name = {
        "deepspeed_config": "zero_config_pretrain.json",
        "evaluation.sampling": "sampling.json",
    }.get(key, "prompts.jsonl")
    (root / "configs" / name).unlink()
    if key == "evaluation.prompts":
        edit(root / "params.yaml", "prompts: [configs/prompts.jsonl]", "prompts: []")
    if fault == "not UTF-8":
        (root / "configs" / name).write_bytes(b"\xff\xfe")
    said = "not a file below" if fault == "missing" else "not UTF-8"
    with pytest.raises(ConfigError, match=f"params.yaml: {key} names configs/{name}, which is {said}"):
        write_identity(root)


def test_a_stage_of_another_profile_than_the_digests_does_not_start(root):
    write_identity(root)
    with pytest.raises(
        ConfigError, match=r"stage train of profile 'laptop': the frozen inputs .* are of profile 'own'"
    ):
        run_stage(root, "train", "laptop")


def test_a_stage_says_that_params_were_edited_after_they_were_frozen(root, monkeypatch, capsys):
    monkeypatch.setattr("ropeway.runtime.supervise.run", lambda *_, **__: 0)
    write_identity(root)
    assert run_stage(root, "fetch") == 0
    assert "edited" not in capsys.readouterr().out
    edit(root / "params.yaml", "  learning_rate: 1e-5", "  learning_rate: 2e-5")
    assert run_stage(root, "fetch") == 0
    said = capsys.readouterr().out
    assert "(learning_rate)" in said
    assert "`ropeway stage identity`" in said


def test_digests_are_not_taken_while_a_run_holds_the_workspace(root):
    write_identity(root)
    before = FrozenInputs.load(root)
    with workspace_lock(root, command="ropeway run"), pytest.raises(TemporaryError, match="is held by"):
        run_stage(root, "identity", "laptop")
    assert FrozenInputs.load(root) == before


def test_every_version_is_kept_under_the_hash_that_dvc_records(root):
    path = root / ".identity" / "params-train.json"
    hashes = []
    for rate in ("1e-5", "2e-5", "3e-5"):
        text = (root / "params.yaml").read_text()
        (root / "params.yaml").write_text(text.replace("  learning_rate: 1e-5", f"  learning_rate: {rate}"))
        write_identity(root)
        (root / "params.yaml").write_text(text)
        hashes.append(hashlib.md5(path.read_bytes()).hexdigest())  # noqa: S324 - DVC's
    kept = [read_version(root, one) for one in hashes]
    assert [one["params"]["learning_rate"] for one in kept] == [1e-5, 2e-5, 3e-5]
    assert describe_change("params-train", kept[0], kept[2]) == ["learning_rate: 1e-05 -> 3e-05"]
    assert read_version(root, "0" * 32) is None


def test_what_changed_in_a_frozen_input_is_named_by_its_leaf():
    old = {"params": {"datasets": [{"talks": {"size": 9}}], "lora": None}}
    new = {"params": {"datasets": [{"talks": {"size": 7}}], "lora": {"rank": 4}}}
    assert describe_change("params-prepare", old, new) == ["datasets[0].talks.size: 9 -> 7", "lora.rank: none -> 4"]
    assert describe_change("sources", {"a": 1, "b": 1}, {"a": 2, "b": 1, "c": 1}) == [
        "source a changed",
        "source c changed",
    ]
    assert describe_change("deepspeed", {"x.json": "{}"}, {"x.json": "{ }"}) == ["x.json changed"]


def test_where_stages_read_their_settings_is_a_folder_of_json(root):
    write_identity(root)
    workspace = Workspace(root, "own")
    facts = json.loads((workspace.identity / "params-train.json").read_bytes())
    assert set(facts) == {"digest", "of"}
    assert set(facts["of"]["params"]) == set(READS["train"])


def test_a_full_disk_while_digests_are_taken_is_said_and_leaves_nothing_whole(root, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ropeway.runtime.manifest.os.fsync", full)
        with pytest.raises(TemporaryError, match="the disk is full"):
            write_identity(root)
    with pytest.raises(DataError, match="missing or incomplete"):
        FrozenInputs.load(root)
    write_identity(root)
    assert FrozenInputs.load(root).profile_name == "own"


def test_versions_of_this_run_are_kept_although_the_clock_was_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "_KEPT_VERSIONS", 2)
    folder = tmp_path / "inputs"
    folder.mkdir()
    for number in range(3):  # from before the clock was set back a year
        (folder / f"{number}.json").write_text("{}")
        os.utime(folder / f"{number}.json", (2e9 + number, 2e9 + number))
    (tmp_path / "now").write_text("now")
    frozen._keep_versions([tmp_path / "now"], folder)
    assert (folder / f"{hashlib.md5(b'now', usedforsecurity=False).hexdigest()}.json").is_file()
    assert not (folder / "0.json").exists()


def test_a_comment_after_a_byte_order_mark_is_dropped():
    assert without_comments("\ufeff# of a person\na: 1  # of another\nb: 2\n").strip() == "a: 1\nb: 2"
