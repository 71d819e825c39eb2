"""Code counts by meaning: an edited comment changes no digest, a changed constant changes every stage that uses it."""

import json
import shutil
from pathlib import Path

import pytest

import ropeway
from ropeway.orchestration.stage_process import STAGE_NAMES
from ropeway.runtime import code_digests
from ropeway.runtime.code_digests import Digests, module_digest, stage_code_digest
from ropeway.runtime.manifest import digest_of

REPORTING = Path(ropeway.__file__).parent / "reporting"


@pytest.fixture
def source(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(ropeway.__file__).parent, tmp_path / "ropeway", ignore=ignored)


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    """Return (digest by stage of the code as it is, the record of what was parsed for them)."""
    kept = tmp_path_factory.mktemp("parsed") / "code.json"
    return digests(Path(ropeway.__file__).parent, kept), kept


def digests(source, kept):
    code = Digests(source, kept)
    found = {stage: digest_of(code.modules(stage)) for stage in STAGE_NAMES}
    code.keep()
    return found


@pytest.fixture
def name_changed(source, unedited, tmp_path):
    """Return a function that names the stages whose digest an edit of `source` changed; it parses edited files only."""
    before, record = unedited

    def name():
        after = digests(source, shutil.copy(record, tmp_path / "parsed.json"))
        return {stage for stage in STAGE_NAMES if after[stage] != before[stage]}

    return name


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_comment_a_docstring_and_a_message_do_not_count(source):
    before = stage_code_digest(source, "train")
    edit(source / "stages/train/loss.py", '"""The two', '"""The edited two')
    edit(source / "stages/train/loss.py", "from torch import Tensor\n", "from torch import Tensor  # a comment\n")
    edit(source / "data/batches.py", "index exceeds", "the index exceeds")
    edit(source / "stages/train/saving.py", "resuming after step", "going on after step")
    assert stage_code_digest(source, "train") == before


def test_a_constant_in_the_stage_counts(source):
    before = {stage: stage_code_digest(source, stage) for stage in ("train", "prepare")}
    edit(source / "stages/train/loss.py", "EPSILON = 1e-8", "EPSILON = 1e-7")
    assert stage_code_digest(source, "train") != before["train"]
    assert stage_code_digest(source, "prepare") == before["prepare"]


def test_a_constant_in_shared_code_counts_for_every_stage_that_uses_it(source):
    before = {stage: stage_code_digest(source, stage) for stage in ("fetch", "prepare", "train")}
    edit(source / "data/batches.py", "PAD_MULTIPLE = 16", "PAD_MULTIPLE = 8")
    assert stage_code_digest(source, "train") != before["train"]
    assert stage_code_digest(source, "prepare") != before["prepare"]
    assert stage_code_digest(source, "fetch") == before["fetch"]


OUTSIDE = [
    "cli",
    "config",
    "orchestration",
    "planning",
    "registry",
    "engine_rehearsal",
    "reporting",
    "runtime",
    "storage",
]


@pytest.mark.parametrize("package", OUTSIDE)
def test_code_that_shows_describes_starts_or_stores_a_run_invalidates_no_stage_that_computes(
    source, name_changed, package
):
    paths = list((source / package).rglob("*.py"))
    assert paths
    for path in paths:
        path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert name_changed() == ({"report_data", "report_eval", "report_package"} if package == "reporting" else set())


def test_a_log_flag_of_the_launcher_and_a_limit_of_the_watchdog_retrain_nothing(source):
    before = stage_code_digest(source, "train")
    edit(source / "runtime/launcher.py", "--log_level=warning", "--log_level=info")
    edit(source / "runtime/watchdog.py", "LEAST_SECONDS = 600.0", "LEAST_SECONDS = 900.0")
    edit(source / "runtime/progress.py", "_BAR_CELLS = 20", "_BAR_CELLS = 10")
    assert stage_code_digest(source, "train") == before


@pytest.mark.parametrize("path", sorted(path.name for path in (REPORTING / "templates").iterdir()))
def test_an_edit_of_a_template_reruns_the_report_stages_alone(source, name_changed, path):
    template = source / "reporting" / "templates" / path
    template.write_text(template.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert name_changed() == {stage for stage in STAGE_NAMES if stage.startswith("report_")}


@pytest.mark.parametrize(
    ("path", "reading"),
    [
        ("data/packing.py", {"prepare", "train", "evaluate", "report_data", "report_eval", "report_package"}),
        (
            "data/raw_records.py",  # pages show records turn by turn
            {"fetch", "base", "tokenize", "prepare", "package", "report_data", "report_eval", "report_package"},
        ),
        ("data/words.py", {"tokenize", "prepare", "report_data", "report_eval", "report_package"}),
        ("models/lora.py", {"train"}),
        ("models/rope.py", {"base", "train", "evaluate", "package"}),
        ("stages/train/loss.py", {"train"}),
        ("stages/evaluate/passkey.py", {"evaluate"}),
    ],
)
def test_a_constant_of_data_or_models_invalidates_exactly_the_stages_that_read_it(source, name_changed, path, reading):
    path = source / path
    path.write_text(path.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")
    assert name_changed() == reading


def test_text_that_is_data_counts():
    assert module_digest("name = 'a'") != module_digest("name = 'b'")
    assert module_digest("raise ValueError('a')") == module_digest("raise ValueError('b')")
    assert module_digest("raise ValueError(1)") != module_digest("raise ValueError(2)")


def test_what_was_parsed_is_kept_and_an_edit_still_counts(source, unedited, tmp_path, monkeypatch):
    before, record = unedited
    kept = shutil.copy(record, tmp_path / "code.json")
    assert before == {stage: stage_code_digest(source, stage) for stage in STAGE_NAMES}
    code_digests._scan.cache_clear()  # what is not parsed again was in the record
    parsed = []
    monkeypatch.setattr(
        "ropeway.runtime.code_digests.module_digest", lambda text: parsed.append(text) or module_digest(text)
    )
    assert digests(source, kept) == before
    assert not parsed
    edit(source / "stages/train/loss.py", "EPSILON = 1e-8", "EPSILON = 1e-7")
    after = digests(source, kept)
    assert len(parsed) == 1
    assert {stage for stage in STAGE_NAMES if after[stage] != before[stage]} == {"train"}


@pytest.mark.parametrize("damage", ["cut", "a digit", "another Python", "no mapping", "not UTF-8"])
def test_a_damaged_or_foreign_record_of_what_was_parsed_is_as_good_as_none(source, unedited, tmp_path, damage):
    before, record = unedited
    kept = Path(shutil.copy(record, tmp_path / "code.json"))
    facts, data = json.loads(kept.read_bytes()), kept.read_bytes()
    key = next(iter(facts["scans"]))
    if damage == "cut":
        kept.write_bytes(data[: len(data) // 2])
    elif damage == "a digit":
        kept.write_bytes(data.replace(facts["scans"][key]["digest"].encode(), b"0" * 64))
    elif damage == "another Python":
        scans = {key: {"digest": "0" * 64, "names": []} for key in facts["scans"]}
        kept.write_text(json.dumps(facts | {"maker": "2.7", "scans": scans, "digest": digest_of(scans)}))
    else:
        kept.write_bytes(b"[1]" if damage == "no mapping" else b"\xff\xfe")
    assert digests(source, kept) == before
