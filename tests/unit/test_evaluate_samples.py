import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from ropeway import evaluate
from ropeway.errors import ConfigError, DataError
from ropeway.evaluate.opening import open_model
from ropeway.evaluate.samples import answer, derive_seed, encode_prompt, read_prompts, sample
from tests.tiny_run import make_run


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    return workspace, profile, *open_model(workspace.model, like=workspace.model)


def always(model, *ids):
    """A copy of the model whose most likely tokens are these, in turn, whatever it is asked."""
    copy = LlamaForCausalLM(model.config).eval()
    forward = copy.forward
    said = iter(ids)

    def speak(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(next(said)), out.logits.shape[-1]).float() * 99
        return out

    copy.forward = speak
    return copy


def test_greedy_answers_are_the_most_likely_token_after_the_other(opened):
    _, _, model, tokenizer = opened
    ids = encode_prompt(tokenizer, "What is a list?")
    row = list(ids)
    for _ in range(8):
        with torch.inference_mode():
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    assert answer(model, tokenizer, ids, {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}, seed=0) == expected


def test_an_answer_ends_at_the_end_token_and_does_not_show_it(opened):
    _, _, model, tokenizer = opened
    word = tokenizer.encode("even", add_special_tokens=False)[0]
    speaker = always(model, word, word, tokenizer.eos_token_id)  # a fourth token would exhaust it
    text = answer(speaker, tokenizer, encode_prompt(tokenizer, "Hi"), {"max_new_tokens": 8, "do_sample": False}, seed=0)
    assert text.split() == tokenizer.decode([word, word]).split()


def test_a_row_of_the_padded_vocabulary_that_no_token_has_is_shown_as_nothing(opened):
    _, _, model, tokenizer = opened
    speaker = always(model, 2010, 2010, tokenizer.eos_token_id)
    ids = encode_prompt(tokenizer, "Hi")
    assert answer(speaker, tokenizer, ids, {"max_new_tokens": 8, "do_sample": False}, seed=0) == ""


def test_a_prompt_is_this_models_own_template_with_one_bos(opened):
    _, _, _, tokenizer = opened
    ids = encode_prompt(tokenizer, "Hi")
    assert ids.count(1) == 1
    assert ids[:2] == [1, 2000]
    assert ids[-2:] == [2, 2001]
    messages = [{"role": "user", "content": "Hi"}]
    told = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert told == ids


def test_a_tokenizer_that_puts_no_bos_in_front_is_refused(opened):
    workspace, *_ = opened
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"expected one BOS \(id 1\) in front of a prompt, found ids \[2000"):
        encode_prompt(tokenizer, "Hi")


def test_sampled_answers_repeat_and_leave_the_global_generator_alone(opened):
    _, _, model, tokenizer = opened
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (sample(model, tokenizer, ["Hi", "Why?"], max_new_tokens=8, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert sample(model, tokenizer, ["Why?"], max_new_tokens=8, seed=3) == first[1:]
    other = sample(model, tokenizer, ["Hi", "Why?"], max_new_tokens=8, seed=4)
    assert [one["greedy"] for one in other] == [one["greedy"] for one in first]
    assert [one["k50"] for one in other] != [one["k50"] for one in first]


def test_seeds_follow_from_the_run_and_the_names_alone():
    assert derive_seed(1, "k50", "Hi") == 8363188654836202129
    assert derive_seed(1, "k50", "Hi") != derive_seed(2, "k50", "Hi")


def test_samples_json_is_read_by_viewers_of_the_published_family(tmp_path):
    workspace, profile = make_run(tmp_path)
    evaluate.run(workspace, profile)
    report = json.loads(workspace.samples.read_bytes())
    assert set(report) == {"model_name", "date", "args", "prompts"}
    assert report["model_name"] == "tiny-3"
    assert report["date"] is None
    assert [one["prompt"] for one in report["prompts"]] == ["What is a list?", "How are you?"]
    for one in report["prompts"]:
        assert [result["sampling_config"] for result in one["results"]] == [
            "base/greedy", "base/k50", "tuned/greedy", "tuned/k50",
        ]  # fmt: skip
        for result in one["results"]:
            assert set(result) == {"sampling_config", "sampling_params", "outputs"}
            assert len(result["outputs"]) == 1
            assert "</s>" not in result["outputs"][0]
    assert report["prompts"][0]["results"][1]["sampling_params"]["top_k"] == 50


@pytest.mark.parametrize(
    ("text", "said"),
    [('"a"\nb\n', "line 2: expected a JSON string, found b"), ("{}\n", "line 1: expected a JSON"), ("\n", "no prompt")],
)
def test_faults_of_a_prompts_file_are_said_with_their_line(tmp_path, text, said):
    (tmp_path / "prompts.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prompts(tmp_path / "prompts.jsonl")
