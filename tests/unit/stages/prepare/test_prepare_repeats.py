"""Duplicates and contamination in the stage: planted, counted, removed; nothing else moves."""

import json
import pickle
import random

import pytest

from ropeway.config.frozen import write_values
from ropeway.config.sections import DatasetOptions
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer
from ropeway.runtime.manifest import file_sha256
from ropeway.runtime.workspace import Workspace
from ropeway.stages.prepare import stage as prepare
from tests.support.raw_records import PUBLISHED, TOKENIZER, write_raw
from tests.support.raw_records import profile as plain_profile
from tests.support.tokenizing import tokenize_and_prepare

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ra", "si", "to") for b in ("b", "d", "g", "k", "m", "n")]
PROMPT = "Which of the forty odd syllables would you rather not have to say aloud, and why?"


def text(seed, count=40):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def like(seed, count=40):
    """A text with another last word: a near duplicate of `text(seed)`."""
    return f"{text(seed, count).rsplit(' ', 1)[0]} other"


def talk(seed, system=""):
    return Conversation((text(seed, 12), text(seed + 1000, 30)), system)


WHOLE = [{"talk": DatasetOptions(max_val_set=8)}, {"text": DatasetOptions(max_val_set=8)}]  # documents in one chunk
TALKS = [talk(n, ("", "Be brief.")[n % 2]) for n in range(40)]
TEXTS = [text(n + 2000) for n in range(30)]


def profile(exact="count", near="count", contaminated="count", prompts=(), **changes):
    options = {"exact": exact, "near": near}
    asked = {"action": contaminated, "prompts": list(prompts)}
    changes["duplicates"] = PUBLISHED.duplicates.model_copy(update=options)
    changes["contamination"] = PUBLISHED.contamination.model_copy(update=asked)
    return plain_profile(**changes)


def run(root, talks=TALKS, texts=TEXTS, **changes):
    """Prepare these records; return (shards, the findings of both sources, the ledger)."""
    workspace = write_raw(root, talks, texts)
    write_values(workspace, "", {"contamination": {"prompts.jsonl": json.dumps(PROMPT)}})
    tokenize_and_prepare(workspace, profile(**changes))
    ledger = json.loads(workspace.ledger.read_bytes())
    return open_shards(workspace.data), [source["findings"] for source in ledger["sources"]], ledger


def counts(findings, *parts):
    return [[found[part]["records"] for part in parts] for found in findings]


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TOKENIZER)


def ids(tokenizer, record):
    return tokenizer.encode(
        OPEN_ASSISTANT.render(record, end="</s>") if isinstance(record, Conversation) else record
    ).ids


def parts_of(shards, source):
    """{part: token lists} of one source, in the order the sampler counts."""
    part = shards.sources[source]
    return {
        name: [part.read(int(number))[0].tolist() for number in getattr(part, name)] for name in ("train", "validation")
    }


def test_repeats_within_and_across_sources_are_counted_and_no_byte_of_data_changes(tmp_path, capsys):
    talks = [*TALKS, TALKS[3], talk(7, "Another system message."), Conversation((TEXTS[2],))]
    texts = [*TEXTS, f" {TEXTS[5]}\n", like(2009), TALKS[0].turns[0]]
    shards, findings, ledger = run(tmp_path / "a", talks, texts, datasets=WHOLE)
    assert counts(findings, "exact", "near") == [[2, 0], [2, 1]]  # TEXTS[2] stands in talk, which comes first
    tokens = shards.sources[0].lengths[[40, 41]].sum()
    assert findings[0]["exact"] == {"action": "count", "records": 2, "sequences": 2, "tokens": tokens}
    assert [source["sequences"]["duplicate"] for source in ledger["sources"]] == [0, 0]
    printed = capsys.readouterr().out
    assert "talk: exact duplicates of earlier records: 2 (2 sequences" in printed
    assert "text: near duplicates of earlier records: 1 (" in printed
    assert "kept (duplicates.near: count)" in printed
    run(tmp_path / "b", talks, texts, near="off", contaminated="off", datasets=WHOLE)
    digests = [file_sha256(tmp_path / name / "runs/run/data/manifest.json") for name in "ab"]
    assert digests[0] == digests[1]


def test_removing_is_as_if_they_had_never_been_there(tmp_path):
    talks = [TALKS[0], TALKS[0], *TALKS[1:20], TALKS[5], *TALKS[20:], like_talk(8)]
    texts = [*TEXTS[:10], TEXTS[1], *TEXTS[10:], TEXTS[4], like(2006)]
    removed, findings, ledger = run(tmp_path / "a", talks, texts, exact="remove", near="remove")
    never, _, _ = run(tmp_path / "b")
    assert counts(findings, "exact", "near") == [[2, 1], [2, 1]]
    for source in (0, 1):
        assert parts_of(removed, source) == parts_of(never, source)
        sequences = ledger["sources"][source]["sequences"]
        assert sequences["duplicate"] == sum(findings[source][how]["sequences"] for how in ("exact", "near"))
        assert sequences["all"] == len(removed.sources[source].lengths)  # their tokens stay in the shard


def like_talk(seed):
    question, answer = talk(seed).turns
    return Conversation((question, answer + " indeed"))


@pytest.mark.parametrize("split", ["permutation", "by_hash"])
@pytest.mark.parametrize("split_by", ["chunk", "document"])
def test_removed_documents_leave_no_chunk_in_any_split(tmp_path, split, split_by):
    texts = [*TEXTS[:9], "", TEXTS[2], *TEXTS[9:], TEXTS[0]]
    options = {"exact": "remove", "near": "off", "split": split, "split_by": split_by}
    removed, findings, ledger = run(tmp_path / "a", texts=texts, **options)
    never, _, _ = run(tmp_path / "b", texts=[*TEXTS[:9], "", *TEXTS[9:]], **options)
    assert findings[1]["exact"]["records"] == 2
    assert findings[1]["exact"]["sequences"] > 4
    assert parts_of(removed, 1) == parts_of(never, 1)
    assert ledger["sources"][1]["sequences"]["duplicate"] == findings[1]["exact"]["sequences"]


def test_exact_duplicates_are_not_near_ones_too(tmp_path):
    _, findings, _ = run(tmp_path, [*TALKS, TALKS[3], TALKS[3]])
    assert counts(findings, "exact", "near") == [[2, 0], [0, 0]]


def test_refused_records_do_not_shift_what_is_found(tmp_path, tokenizer):
    talks = [TALKS[0], Conversation(("a </s>", "b")), Conversation(()), *TALKS[1:], TALKS[9]]
    options = {"special_tokens_in_text": "reject", "max_refused_fraction": 0.1, "exact": "remove"}
    shards, findings, _ = run(tmp_path, talks, **options)
    assert counts(findings, "exact") == [[1], [0]]
    held = [tokens for part in parts_of(shards, 0).values() for tokens in part]
    assert held.count(ids(tokenizer, TALKS[9])) <= 1
    assert 40 not in {*shards.sources[0].train, *shards.sources[0].validation}


def contaminated_talks():
    """Talks of which the odd ones share a run of words each with the one before."""
    return [Conversation((text(n, 12), f"{text(n // 2 + 500, 20)} {text(n + 700, 20)}")) for n in range(40)]


def shared_with_validation(shards, talks, tokenizer):
    """Numbers of the training talks whose partner validates."""
    train, validation = (set(getattr(shards.sources[0], part).tolist()) for part in ("train", "validation"))
    assert shards.sources[0].read(3)[0].tolist() == ids(tokenizer, talks[3])
    return {number for number in train if (number ^ 1) in validation}


@pytest.mark.parametrize("action", ["count", "remove"])
def test_training_that_shares_a_run_of_words_with_validation(tmp_path, tokenizer, capsys, action):
    talks = contaminated_talks()
    plain, _, _ = run(tmp_path / "a", talks, contaminated="off")
    expected = shared_with_validation(plain, talks, tokenizer)
    assert len(expected) >= 3
    shards, findings, ledger = run(tmp_path / "b", talks, contaminated=action)
    found = findings[0]["contaminated"]
    assert (found["action"], found["records"], found["sequences"]) == (action, len(expected), len(expected))
    assert found["tokens"] == sum(plain.sources[0].lengths[number] for number in expected)
    gone = expected if action == "remove" else set()
    assert shards.sources[0].train.tolist() == [n for n in plain.sources[0].train.tolist() if n not in gone]
    assert shards.sources[0].validation.tolist() == plain.sources[0].validation.tolist()
    assert ledger["sources"][0]["sequences"]["contaminated"] == len(gone)
    assert f"with validation or a prompt: {len(expected)} (" in capsys.readouterr().out


def test_validation_of_one_source_contaminates_training_of_another(tmp_path):
    answers = [one.turns[1] for one in TALKS[:30]]  # of another number, another permutation
    shards, findings, _ = run(tmp_path, texts=answers, datasets=WHOLE)
    talks, texts = shards.sources
    expected = set(talks.validation.tolist()) & set(texts.train.tolist())
    expected_back = set(texts.validation.tolist()) & set(talks.train.tolist())
    assert len(expected) > 0
    assert counts(findings, "contaminated") == [[len(expected_back)], [len(expected)]]


def test_a_shared_system_message_and_a_shared_short_turn_are_no_contamination(tmp_path):
    system = text(1, 30)
    talks = [Conversation((text(n, 12), "Thank you for asking, here it is."), system) for n in range(40)]
    _, findings, _ = run(tmp_path, talks)
    assert findings[0]["contaminated"]["sequences"] == 0


@pytest.mark.parametrize("action", ["count", "remove"])
def test_training_that_holds_an_evaluation_prompt(tmp_path, action):
    talks = [*TALKS, *(Conversation((PROMPT.upper(), text(n, 20))) for n in range(5000, 5020))]
    shards, findings, _ = run(tmp_path, talks, contaminated=action, prompts=["prompts.jsonl"])
    plain = shards.sources[0].train.tolist()
    assert findings[0]["with_prompts"] >= 10
    assert any(number >= 40 for number in plain) == (action == "count")


def digest(root):
    return file_sha256(root / "runs/run/data/manifest.json"), (root / "runs/run/ledger.json").read_bytes()


def elsewhere_and_backwards(function, jobs, **_):
    """Do as other processes do: function, job and result travel as bytes, and who is done first is not known."""
    for job in jobs[::-1]:
        there, task = pickle.loads(pickle.dumps((function, job)))  # noqa: S301 - our own bytes
        yield pickle.loads(pickle.dumps(there(task)))  # noqa: S301


@pytest.fixture
def repeating(monkeypatch):
    """Records that repeat, in several units a source."""
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 400)
    monkeypatch.setattr("ropeway.stages.tokenize.stage.UNIT_BYTES", 1500)
    talks = [*contaminated_talks(), *TALKS[:3], TALKS[1], like_talk(2)]
    options = {"exact": "remove", "near": "remove", "contaminated": "remove"}
    return {"talks": talks, "texts": [*TEXTS, TEXTS[0], like(2001)], **options}


def test_neither_units_nor_who_makes_them_in_which_order_changes_a_byte(tmp_path, repeating, monkeypatch):
    _, findings, _ = run(tmp_path / "a", **repeating)
    assert all(found[what]["records"] for found in findings[:1] for what in ("exact", "near", "contaminated"))
    monkeypatch.setattr("ropeway.stages.tokenize.encode_workers.run_jobs", elsewhere_and_backwards)
    run(tmp_path / "b", **repeating)
    monkeypatch.undo()
    shards, _, _ = run(tmp_path / "d", **repeating)
    assert len(shards.sources[0].shard_sequences) == 1
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "d")[1] == digest(tmp_path / "a")[1]  # other units: other shards, the same ledger


def test_only_the_split_and_what_repeats_is_rebuilt_under_another_rule(tmp_path, repeating):
    run(tmp_path / "a", **repeating)
    counted = {**repeating, "exact": "count", "near": "count", "contaminated": "count"}
    run(tmp_path / "b", **counted)
    workspace = Workspace(tmp_path / "b", "run")
    prepare.run(workspace, profile(**{key: repeating[key] for key in ("exact", "near", "contaminated")}))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert not list(workspace.work.iterdir())
