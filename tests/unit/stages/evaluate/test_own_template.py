"""Base and tuned model are each asked in the template they know; bytes are counted for what an answer says."""

import json

import numpy as np

from ropeway.models.chat_template import OPEN_ASSISTANT, open_prompt_template, open_template
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import OWN_FILE, JinjaTemplate
from ropeway.models.tokenizer import open_tokenizer
from ropeway.runtime.manifest import write_manifest
from ropeway.stages.evaluate import measuring
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.text import read_segments
from ropeway.stages.tokenize.encode import Encoder
from tests.support.chat_templates import MISTRAL, STYLES, write_tokenizer
from tests.support.tiny_run import make_run


def test_a_base_with_a_template_of_its_own_is_asked_in_it_and_the_report_says_so(tmp_path, monkeypatch):
    workspace, profile = make_run(tmp_path)
    facts = json.loads((workspace.base / "manifest.json").read_bytes())
    (workspace.base / OWN_FILE).write_text(MISTRAL)
    write_manifest(workspace.base, {key: value for key, value in facts.items() if key != "files"})
    asked = []

    def keep(model, tokenizer, template, questions, *, seed):
        asked.append((template.name, model.config.eos_token_id))
        return answer(model, tokenizer, template, questions, seed=seed)

    answer = measuring.answer_questions
    monkeypatch.setattr(measuring, "answer_questions", keep)
    evaluate.run(workspace, profile)
    assert [name for name, _ in asked] == ["its own", "open_assistant"]
    assert [ends for _, ends in asked] == [[2], [2]]
    report = json.loads(workspace.evaluation.read_bytes())
    assert report["asked_in"] == {"base": "its own", "tuned": "open_assistant"}


def test_without_a_template_of_its_own_a_base_is_asked_in_the_runs(tmp_path):
    workspace, _ = make_run(tmp_path)
    assert open_prompt_template(workspace.base) is open_template(workspace.base) is OPEN_ASSISTANT


def test_the_header_before_an_answer_is_no_supervised_text(tmp_path):
    write_tokenizer(tmp_path, STYLES["chatml"])
    tokenizer, template = open_tokenizer(tmp_path), open_template(tmp_path)
    assert isinstance(template, JinjaTemplate)
    end = tokenizer.token_to_id("<|im_end|>")
    encoder = Encoder(tokenizer, {"eos": end, "pad": end}, template, None, "parse")
    (found,) = encoder.encode_batches([Conversation(("Hi", "Hello there", "Why", "So"))])
    special = {end: "eos", tokenizer.token_to_id("<|im_start|>"): "<|im_start|>"}
    profile = make_run(tmp_path / "run")[1].model_copy(update={"what_counts": "answers"})
    segments = list(read_segments(found.tokens.astype(np.int64), found.kinds, profile, tokenizer, special))
    assert [one.text for one in segments if one.is_supervised] == ["Hello there", "<|im_end|>", "So", "<|im_end|>"]
