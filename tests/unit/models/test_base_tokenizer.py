import json

import pytest

from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import (
    LLAMA_SPECIAL,
    count_tokens,
    open_tokenizer,
    prepare_tokenizer,
    read_special,
    read_special_names,
    train_tokenizer,
    write_tokenizer,
)
from ropeway.runtime.errors import ConfigError

TEXTS = [f"The lamp number {number} burns at dusk.\n\n    oil = {number * 7}\n" for number in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    prepare_tokenizer(tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT)
    write_tokenizer(folder, tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT, max_length=512)
    return folder


def test_a_trained_tokenizer_has_llamas_specials_bytes_and_exactly_the_asked_size(folder):
    tokenizer = open_tokenizer(folder)
    assert [tokenizer.id_to_token(number) for number in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokenizer.id_to_token(258) == "<0xFF>"
    assert count_tokens(tokenizer) == 405
    assert [tokenizer.token_to_id(token) for token in OPEN_ASSISTANT.added_tokens] == [400, 401, 402, 403, 404]


def test_training_twice_gives_the_same_tokenizer():
    assert train_tokenizer(TEXTS, vocab_size=400).to_str() == train_tokenizer(iter(TEXTS), vocab_size=400).to_str()


def test_too_little_text_for_the_vocabulary_names_both_sizes():
    with pytest.raises(ConfigError, match=r"expected_model\.vocab_size: .*4,000 tokens.* 12 characters .*2\d\d"):
        train_tokenizer(["only a lamp."], vocab_size=4000)


@pytest.mark.parametrize("text", ["", " two  blanks ", "漢字 é 🙂\x00\n\ttab", "<s></s>", "▁marked", "lamp"])
def test_any_text_is_decoded_from_its_tokens(folder, text):
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert ids.count(2) == text.count("</s>")
    if "<" not in text and "▁" not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_transformers_opens_the_folder_both_ways_with_the_same_ids(folder):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = open_tokenizer(folder)
    talk = Conversation(("Is it dusk?", " Yes. ", "Really?", "é"), "Be brief.")
    messages = [{"role": "system", "content": talk.system}]
    messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(talk.turns)]
    for opened in (PreTrainedTokenizerFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)):
        for text in (*TEXTS[:5], OPEN_ASSISTANT.render(talk, end="</s>"), " x", ""):
            assert opened(text).input_ids == ours.encode(text).ids
        assert len(opened) == 405
        assert (opened.pad_token, opened.eos_token, opened.bos_token) == ("</s>", "</s>", "<s>")
        assert (opened.padding_side, opened.model_max_length) == ("right", 512)
        assert set(OPEN_ASSISTANT.added_tokens) < set(opened.all_special_tokens)
        assert opened.chat_template == OPEN_ASSISTANT.jinja
        chat = opened.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert chat["input_ids"] == ours.encode(OPEN_ASSISTANT.render(talk, end="</s>")).ids
        said = [number for number, mark in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if mark]
        assert said == [*ours.encode(" Yes. </s>").ids[1:], *ours.encode("é</s>").ids[1:]]


def test_special_token_ids_are_read_from_the_folder(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.add_special_tokens(
        list(reversed(OPEN_ASSISTANT.added_tokens))
    )  # as a model published earlier may have them
    prepare_tokenizer(tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT)
    write_tokenizer(tmp_path, tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT, max_length=512)
    special = read_special(tmp_path, open_tokenizer(tmp_path), OPEN_ASSISTANT)
    assert [special[token] for token in OPEN_ASSISTANT.added_tokens] == [404, 403, 402, 401, 400]
    assert [special[name] for name in ("bos", "eos", "pad")] == [1, 2, 2]


def test_a_tokenizer_without_bos_is_made_to_prepend_it(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    bare = json.loads(tokenizer.to_str())
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    opened = open_tokenizer(tmp_path)
    assert opened.encode("lamp").ids[0] != 1
    prepare_tokenizer(opened, LLAMA_SPECIAL, OPEN_ASSISTANT)
    assert opened.encode("lamp").ids[0] == 1


def test_truncation_and_padding_of_the_file_are_disabled(folder, tmp_path):
    tokenizer = open_tokenizer(folder)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path).encode(TEXTS[0]).ids == open_tokenizer(folder).encode(TEXTS[0]).ids


def test_a_tokenizer_without_an_end_token_is_refused_with_what_its_config_names():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    with pytest.raises(ConfigError, match=r"no eos_token in its vocabulary .* names '<end>'"):
        prepare_tokenizer(tokenizer, {"bos": "<s>", "eos": "<end>"}, OPEN_ASSISTANT)
    with pytest.raises(ConfigError, match="no bos_token"):
        prepare_tokenizer(tokenizer, {"eos": "</s>"}, OPEN_ASSISTANT)


def test_missing_and_broken_files_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="not found; only fast tokenizers"):
        open_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="expected the tokenizer's JSON config"):
        read_special_names(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read it"):
        open_tokenizer(tmp_path)


def test_a_tokenizer_without_role_tokens_is_rejected(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    write_tokenizer(tmp_path, tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT, max_length=512)
    with pytest.raises(ConfigError, match=r"no <\|prompter\|>, .*`dvc repro base` adds them"):
        read_special(tmp_path, tokenizer, OPEN_ASSISTANT)


def test_names_may_be_written_as_token_objects(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    assert read_special_names(tmp_path) == {"bos": "<s>", "eos": "</s>"}
