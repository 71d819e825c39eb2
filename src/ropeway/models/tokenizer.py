"""Load, train and write tokenizers with the tokenizers library, which runs `tokenizer.json` unmodified.

Transformers' classes are not used: its `LlamaTokenizer` (5.24) rebuilds the pipeline and gives other ids for 246 of 875
test texts. `PreTrainedTokenizerFast` gives the same ids as here. Loading takes milliseconds instead of seconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ropeway.models.jinja_template import FILE as TEMPLATE_FILE
from ropeway.models.jinja_template import JinjaTemplate
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import write_json

if TYPE_CHECKING:
    from ropeway.models.chat_template import ChatTemplate

BLANK = "▁"  # SentencePiece's symbol for a space
LLAMA_SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}  # ids 0, 1, 2, as in Llama 2's tokenizer
_CHARACTER_COVERAGE = (
    0.9995  # fraction of the text; rarer characters are encoded as bytes. Source: SentencePiece's default
)
_CONFIG_KEYS = {"unk": "unk_token", "bos": "bos_token", "eos": "eos_token", "pad": "pad_token"}


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder, with truncation and padding disabled.

    Raises:
        ConfigError: The folder has no readable `tokenizer.json`.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path}: not found; only fast tokenizers are supported. Convert the model's tokenizer with transformers "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…)) and copy its tokenizer.json there"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception
        raise ConfigError(f"{path}: the tokenizers library cannot read it: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_special_names(folder: Path) -> dict[str, str]:
    """Return the texts of `unk`, `bos`, `eos` and `pad` that the folder's tokenizer_config.json defines.

    Raises:
        ConfigError: The file is missing, is not a JSON mapping, or a token has no text.
    """
    config = _read_config(folder)
    named = {short: config.get(key) for short, key in _CONFIG_KEYS.items()}
    return {short: _read_text(folder, _CONFIG_KEYS[short], text) for short, text in named.items() if text}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path}: expected the tokenizer's JSON config, found: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON mapping, found {type(config).__name__}")
    return config


def _read_text(folder: Path, key: str, token: object) -> str:
    """Return the text of a token as a config states it: a string, or a mapping with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: {key}: expected a token's text, found {token!r:.80}")
    return text


def read_additional(folder: Path) -> tuple[str, ...]:
    """Return the further special tokens that the folder's tokenizer_config.json lists."""
    config = _read_config(folder)
    key = "additional_special_tokens" if config.get("additional_special_tokens") else "extra_special_tokens"
    listed = config.get(key)
    return tuple(_read_text(folder, key, token) for token in listed) if isinstance(listed, list) else ()


def read_other_names(folder: Path) -> frozenset[str]:
    """Return the names of tokens in the folder's tokenizer_config.json besides `bos`, `eos`, `unk` and `pad`."""
    config = _read_config(folder)
    extra = config.get("extra_special_tokens")
    named = {key for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)}
    return frozenset(named - set(_CONFIG_KEYS.values())) | frozenset(extra if isinstance(extra, dict) else ())


def read_special_texts(folder: Path) -> list[str]:
    """Return the texts of all special tokens of the folder's tokenizer.json, which is not opened as a tokenizer."""
    path = folder / "tokenizer.json"
    try:
        stated = parse_json(path.read_bytes())
        return [str(token["content"]) for token in stated["added_tokens"] if token["special"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected the JSON of a fast tokenizer with its added tokens ({type(error).__name__})"
        ) from None


def read_special(folder: Path, tokenizer: Tokenizer, template: "ChatTemplate") -> dict[str, int]:
    """Return the ids of `bos`, `eos`, `pad` and of the tokens that the template writes, from the vocabulary.

    A base whose own template is kept may have no `bos`.

    Raises:
        ConfigError: A token is not in the vocabulary.
    """
    names = {short: text for short, text in read_special_names(folder).items() if short != "unk"}
    is_own = isinstance(template, JinjaTemplate)
    written = tuple(text for text in template.control_tokens() if text not in names.values())
    ids = {short: tokenizer.token_to_id(text) for short, text in (names | {t: t for t in written}).items()}
    needed = ("eos", "pad") if is_own else ("bos", "eos", "pad")
    if missing := [name for name in (*needed, *written) if ids.get(name) is None]:
        raise ConfigError(f"{folder}: its tokenizer has no {', '.join(missing)}; `dvc repro base` adds them")
    return {short: number for short, number in ids.items() if number is not None}


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """Return the text of a token id.

    Raises:
        ConfigError: The vocabulary has no such id.
    """
    text = tokenizer.id_to_token(number)
    if text is None:
        raise ConfigError(f"token id {number} is not in the tokenizer's {tokenizer.get_vocab_size():,} tokens")
    return text


def count_tokens(tokenizer: Tokenizer) -> int:
    """Return the number of embedding rows that the tokenizer needs: the highest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Return a tokenizer of Llama's type trained on texts: byte-fallback BPE with BOS but without EOS.

    The same texts in the same order give the same tokenizer.

    Raises:
        ConfigError: The texts give fewer than `vocab_size` tokens.
    """
    texts = list(texts)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = _alphabet(texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*LLAMA_SPECIAL.values(), *bytes_],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),  # exactly this alphabet: a limit by count breaks ties in hash order
        show_progress=False,
    )
    trained = Tokenizer(models.BPE(unk_token=LLAMA_SPECIAL["unk"], byte_fallback=True, fuse_unk=True))
    trained.normalizer = _normalizer()
    # Split into words for training only: merges do not cross words, and each distinct word is processed once.
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(f"{BLANK}*[^{BLANK}\n]+|{BLANK}+|\n+"), behavior="isolated")
    trained.train_from_iterator(texts, trainer)
    model = parse_json(trained.to_str())["model"]
    if (found := len(model["vocab"])) != vocab_size:
        raise ConfigError(
            f"expected_model.vocab_size: expected {vocab_size:,} tokens, but {sum(map(len, texts)):,} characters of "
            f"the sources give {found:,}; lower vocab_size or add text"
        )
    merges = [tuple(pair) for pair in model["merges"]]
    return llama_tokenizer(model["vocab"], merges)


def prepare_tokenizer(tokenizer: Tokenizer, names: dict[str, str], template: "ChatTemplate") -> None:
    """Add the template's missing tokens in fixed order, and make the tokenizer prepend BOS to every text.

    The published template, its training and evaluation require BOS, so it is also added to tokenizers without it
    (GPT-2's type). A tokenizer whose template is kept or comes from a file is not changed.

    Raises:
        ConfigError: The tokenizer has no EOS token, or no BOS for the published template.
    """
    if isinstance(template, JinjaTemplate):
        _require(tokenizer, names, "eos")
        return
    bos, _ = (_require(tokenizer, names, name) for name in ("bos", "eos"))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in template.added_tokens])
    if tokenizer.encode("a").ids[:1] != [bos]:
        tokenizer.post_processor = _prepend_bos(names["bos"], bos)


def read_response_template(folder: Path) -> dict[str, Any] | None:
    """Return how the folder's tokenizer_config.json says that answers are parsed; None if it does not."""
    found = _read_config(folder).get("response_template")
    return found if isinstance(found, dict) else None


def state_response_template(folder: Path, stated: Mapping[str, Any]) -> None:
    """Say in the folder's tokenizer_config.json how answers are parsed."""
    path = folder / "tokenizer_config.json"
    write_json(path, {**parse_json(path.read_bytes()), "response_template": stated})


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    names: dict[str, str],
    template: "ChatTemplate",
    *,
    max_length: int,
    additional: Sequence[str] = (),
) -> None:
    """Write a folder that `PreTrainedTokenizerFast` and `AutoTokenizer` load with the same ids as `open_tokenizer`.

    Padding is on the right, as in the original, with `eos` unless `names` has another `pad`. The template is written to
    its own file and to tokenizer_config.json, because readers use either. `additional`: the base's further special
    tokens, which a template other than the published one keeps.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {_CONFIG_KEYS[short]: text for short, text in ({"pad": names["eos"]} | names).items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [*template.added_tokens, *additional],
        "chat_template": template.jinja,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "right",
        "truncation_side": "right",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(
        folder / "special_tokens_map.json", {**named, "additional_special_tokens": config["additional_special_tokens"]}
    )
    (folder / TEMPLATE_FILE).write_text(template.jinja, encoding="utf-8")


def _require(tokenizer: Tokenizer, names: dict[str, str], name: str) -> int:
    number = tokenizer.token_to_id(names.get(name, ""))
    if number is None:
        raise ConfigError(
            f"the base model's tokenizer has no {name}_token in its vocabulary (tokenizer_config.json names "
            f"{names.get(name)!r}); conversations need BOS and EOS: set {name}_token there"
        )
    return int(number)


def _alphabet(texts: list[str]) -> list[str]:
    """Return the sorted characters that cover `_CHARACTER_COVERAGE` of the text."""
    counts = Counter(BLANK)
    for text in texts:
        counts.update(text.replace(" ", BLANK))
    enough = _CHARACTER_COVERAGE * counts.total()
    kept: list[str] = []
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if enough <= 0:
            break
        kept.append(character)
        enough -= count
    return sorted(kept)


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])


def _prepend_bos(bos: str, number: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)])


def llama_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Return Llama 2's pipeline around this vocabulary. Source: its tokenizer.json, legacy SentencePiece behavior."""
    model = models.BPE(vocab, merges, unk_token=LLAMA_SPECIAL["unk"], byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    tokenizer.post_processor = _prepend_bos(LLAMA_SPECIAL["bos"], 1)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in LLAMA_SPECIAL.values()])
    return tokenizer
