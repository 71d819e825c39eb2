"""The data profile that tokenize writes: what it counts, and that it depends on the data alone."""

import json

import numpy as np
import pytest

from ropeway.data.data_profile import (
    MAX_HASHES,
    DataProfile,
    bin_names,
    build_data_profile,
    count_scripts,
    histogram,
    smallest,
)
from ropeway.data.shards import open_shards
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import canonical_json
from ropeway.stages.tokenize.profile_unit import profile_unit
from tests.support.raw_records import TALKS, TEXTS, profile, write_raw
from tests.support.tokenizing import run_tokenize, tokenize_and_prepare

NO_KEYS = np.empty((0, 2), np.uint64)
WEATHER = {"type": "function", "function": {"name": "weather"}}


def read_profile(workspace):
    return json.loads((workspace.tokens / "profile.json").read_bytes())


def test_a_profile_counts_what_the_shards_hold(tmp_path):
    workspace = write_raw(tmp_path)
    tokenize_and_prepare(workspace, profile())
    found = read_profile(workspace)["sources"]
    for source in open_shards(workspace.data).sources:
        own = found[source.name]
        ids = np.concatenate([source.read(number)[0] for number in range(len(source.lengths))])
        assert (own["sequences"], own["tokens"]) == (len(source.lengths), len(ids))
        assert sum(own["lengths"]) == len(source.lengths)
        assert sum(own["tokens_by_bucket"]) == len(ids)
        numbers, counts = np.unique(ids, return_counts=True)
        assert own["top_tokens"] == {
            str(key): count for key, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        }
    talk = found["talk"]
    assert talk["records"] == talk["conversations"] == 40
    assert talk["roles"] == {"assistant": 40, "system": 20, "user": 40}
    assert (talk["with_system"], sum(talk["systems"]), max(talk["systems"])) == (20, 20, 20)
    assert talk["characters"] == sum(len(one.system) + sum(map(len, one.turns)) for one in TALKS)
    assert (found["text"]["records"], found["text"]["conversations"]) == (30, 0)
    assert found["text"]["characters"] == sum(map(len, TEXTS))
    assert len(found["text"]["hashes"]) == len({" ".join(text.split()) for text in TEXTS})


def test_a_profile_is_the_same_from_one_unit_and_from_many(tmp_path, monkeypatch):
    one, many = write_raw(tmp_path / "one"), tmp_path / "many"
    run_tokenize(one, profile())
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 200)
    monkeypatch.setattr("ropeway.stages.tokenize.stage.UNIT_BYTES", 900)
    many = write_raw(many)
    run_tokenize(many, profile())
    assert len(list(many.tokens.glob("talk/tokens-*.npy"))) > 3
    assert read_profile(many) == read_profile(one)


def test_a_unit_whose_profile_is_missing_is_made_again_and_tokens_without_one_are_refused(tmp_path):
    workspace = write_raw(tmp_path)
    run_tokenize(workspace, profile())
    manifest = workspace.tokens / "manifest.json"
    facts = json.loads(manifest.read_bytes())
    del facts["files"]["profile.json"]
    (workspace.tokens / "profile.json").unlink()
    manifest.write_bytes(canonical_json(facts))
    from ropeway.data.tokenized import open_tokenized

    with pytest.raises(DataError, match=r"profile\.json"):
        open_tokenized(workspace.tokens)


def test_tools_calls_reasoning_and_later_system_messages_are_counted():
    talk = Conversation.from_messages(
        [
            {"role": "user", "content": "Is it warm?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather"}}],
                "reasoning_content": "x",
            },
            {"role": "tool", "content": "20"},
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "<think>short</think>Yes."},
        ],
        [WEATHER],
    )
    plain = Conversation(("Hi", "<think>a</think> Hello"), "Be brief.")
    found = profile_unit([talk, plain], [], NO_KEYS)
    assert (found.with_tools, found.with_calls, found.with_reasoning, found.with_system) == (1, 1, 3, 2)
    assert dict(found.roles) == {"user": 2, "assistant": 3, "tool": 1, "system": 2}
    assert max(found.systems) == 2  # equal texts are in one bucket
    assert found.turns.tolist() == histogram([5, 2]).tolist()


def test_code_points_are_counted_by_script():
    text = "Tea 42! чай, 茶 お茶 차 é" + "\ud800"
    found = count_scripts(text)
    assert sum(found.values()) == len(text)
    assert {name: found[name] for name in ("latin", "cyrillic", "han", "kana", "hangul")} == {
        "latin": 4,
        "cyrillic": 3,
        "han": 2,
        "kana": 1,
        "hangul": 1,
    }


def test_bins_are_two_per_doubling_and_the_last_is_open():
    assert bin_names()[3:9] == ["3", "4 to 5", "6 to 7", "8 to 11", "12 to 15", "16 to 22"]
    assert bin_names()[-1] == "11,863,284 or more"
    assert histogram([0, 1]).tolist()[:2] == [2, 0]
    assert histogram([1 << 60]).tolist()[-1] == 1


def test_the_smallest_hashes_are_those_of_a_full_sort_also_with_many_duplicates():
    drawn = np.random.default_rng(3)
    for values in (drawn.integers(0, 1 << 63, 50_000), drawn.integers(0, 3_000, 50_000), np.zeros(9_000)):
        hashes = values.astype(np.uint64)
        expected = sorted(set(hashes.tolist()) - {0})[:MAX_HASHES]
        assert smallest(hashes).tolist() == expected


def test_a_profile_of_many_roles_and_tokens_stays_small_and_reads_back():
    found = DataProfile(records=1)
    found.roles.update({f"role {n}": n for n in range(1, 40)})
    found.count_tokens(np.arange(60_000), np.asarray([60_000]))
    found.hashes = np.arange(1, MAX_HASHES + 1, dtype=np.uint64)
    written = found.to_json()
    assert len(written["roles"]) == 13
    assert sum(written["roles"].values()) == sum(range(1, 40))
    assert DataProfile.from_json(written).to_json() == written
    ledger = {
        "name": "a",
        "kind": "conversation",
        "records": {"read": 1, "refused_by_fetch": {}, "refused_by_tokenize": {"odd": 2}},
        "findings": {"exact": {"records": 3}, "near": {"records": 0}},
        "epochs": [{"row_tokens": 7}],
    }
    whole = build_data_profile({"tokenizer": "t", "sources": {"a": written}}, {"sources": [ledger]})
    assert (whole["all"]["refused"], whole["all"]["exact_duplicates"], whole["all"]["trained_tokens"]) == (2, 3, 7)
    assert len(canonical_json(whole)) < 30_000
