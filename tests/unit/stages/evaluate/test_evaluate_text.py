import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ropeway.config.stages import READS
from ropeway.data.loss_mask import loss_mask
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer
from ropeway.runtime.manifest import write_manifest
from ropeway.stages.evaluate.champion import measure_champion
from ropeway.stages.evaluate.text import count_bytes, retokenize
from ropeway.stages.evaluate.token_scores import all_rows
from tests.support.tiny_run import make_run, talks, texts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    return workspace, profile, open_shards(workspace.data)


def varied(profile, **changes):
    return profile.model_construct(**({name: getattr(profile, name) for name in READS["evaluate"]} | changes))


def spell_out(folder):
    """Remove all merges: the same special tokens and template, one token per character."""
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"] = []
    path.write_text(json.dumps(state))
    return folder


def make_champion(workspace, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in workspace.model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return spell_out(folder)


def test_bytes_are_those_of_the_supervised_text(run):
    workspace, profile, shards = run
    whole = varied(profile, max_length=4096)
    talk, text = count_bytes(shards, whole, workspace.base)
    spoken = talks()[:8]
    assert talk == sum(len(one.system.encode()) + len(one.turns[1].encode()) for one in spoken)
    assert text == sum(len(one.encode()) for one in texts()[:6])
    answers = count_bytes(shards, varied(whole, what_counts="answers"), workspace.base)[0]
    assert answers == sum(len(one.turns[1].encode()) for one in spoken)
    everything = count_bytes(shards, varied(whole, label_masking=False), workspace.base)[0]
    assert everything == talk + sum(len(one.turns[0].encode()) for one in spoken)


def test_a_truncated_row_has_the_bytes_of_the_text_that_is_left(run):
    workspace, profile, shards = run
    cut = varied(profile, max_length=20)
    tokenizer = open_tokenizer(workspace.base)
    rows = [row for row in all_rows(shards, cut) if row[0].source == 1]
    left = [tokenizer.decode(shards.sources[1].read(row[0].sequence)[0][1:20].tolist()) for row in rows]
    assert count_bytes(shards, cut, workspace.base)[1] == sum(len(one.encode()) for one in left)


@pytest.mark.parametrize("max_length", [4096, 20])
def test_retokenized_with_the_same_tokenizer_every_row_is_unchanged(run, tmp_path, max_length):
    workspace, profile, shards = run
    reading = varied(profile, max_length=max_length)
    same, other = retokenize(shards, reading, workspace.base, workspace.base, tmp_path)
    for row, new in zip(all_rows(shards, reading), all_rows(same, other), strict=True):
        (piece,), (there,) = row, new
        ids, kinds = shards.sources[piece.source].read(piece.sequence)
        found, said = same.sources[there.source].read(there.sequence)
        np.testing.assert_array_equal(found, ids[: piece.end])
        np.testing.assert_array_equal(loss_mask(said, other), loss_mask(kinds[: piece.end], reading))


def test_retokenized_with_another_tokenizer_the_same_text_is_supervised(run, tmp_path):
    workspace, profile, shards = run
    other = make_champion(workspace, tmp_path)
    rows, reading = retokenize(shards, profile, workspace.base, other, tmp_path / "rows")
    assert sum(source.lengths.sum() for source in rows.sources) > 2 * sum(
        int(piece.end) for (piece,) in all_rows(shards, profile)
    )
    assert count_bytes(rows, reading, other) == count_bytes(shards, profile, workspace.base)
    ids, _ = rows.sources[0].read(0)
    spoken = OPEN_ASSISTANT.render(Conversation((talks()[0].turns), talks()[0].system), end="</s>")
    assert Tokenizer.from_file(str(other / "tokenizer.json")).encode(spoken).ids[: len(ids)] == ids.tolist()


def test_text_that_spells_a_special_token_stays_text(run, tmp_path):
    workspace, profile, shards = run
    tokens, kinds = (array.copy() for array in shards.sources[1].read(0))
    plain = open_tokenizer(workspace.base)
    plain.encode_special_tokens = True
    typed = np.asarray([1, *plain.encode("a </s> b", add_special_tokens=False).ids])
    assert 2 not in typed
    source = shards.sources[1]
    source._open[0] = (
        np.concatenate([typed, tokens[len(typed) :], source._open[0][0][len(tokens) :]]),
        source._open[0][1],
    )
    try:
        rows, _ = retokenize(shards, profile, workspace.base, workspace.base, tmp_path / "rows")
        assert 2 not in rows.sources[1].read(0)[0]
        assert len(kinds) > len(typed)
    finally:
        source._open.clear()


def test_a_champion_with_another_tokenizer_is_scored_in_nats_per_byte(run, tmp_path):
    workspace, profile, shards = run
    other = make_champion(workspace, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    torch.nn.init.zeros_(model.lm_head.weight)  # each token costs ln V: the sums are known
    model.save_pretrained(other)
    write_manifest(other, {"steps": 3})
    measure_champion(workspace, profile, other, tmp_path / "champion.json", ["losses"])
    found = json.loads((tmp_path / "champion.json").read_text())
    assert found["tokenizer"] != shards.manifest["tokenizer"]
    sizes = count_bytes(shards, profile, workspace.base)
    for name, size in zip(("talk", "text"), sizes, strict=True):
        tuned = found["sources"][name]["tuned"]
        assert tuned["bytes"] == size
        assert tuned["nats_per_byte"] == pytest.approx(tuned["tokens"] * math.log(2016) / size, abs=1e-5)
