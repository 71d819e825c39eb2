"""`ropeway chat`: a conversation with a model in the terminal, or line by line through a pipe.

What is opened are safetensors and JSON, with the folder's own template, and nothing that could run code.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import digest_of, load_manifest

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase, TextStreamer

# What torch, keras, flax and numpy load by running it, or may. Source: the suffixes that picklescan looks into.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".h5", ".msgpack"}
_NO_LIMIT = 10**9  # transformers' stand-in for "no model_max_length" is 1e30
_COMMANDS = "/new starts a new conversation, /system TEXT sets the system message and starts a new conversation"
_HELP = f"Ctrl-D ends the chat, Ctrl-C stops an answer, {_COMMANDS}"
Write = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to answer; an empty system message is none, temperature 0 takes the most likely token every time."""

    system: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the model said.

    Attributes:
        ended: It said its end token; else `max_new_tokens` cut it.
        forgotten: Turns that no longer fitted into the context.
    """

    text: str
    tokens: int
    ended: bool
    forgotten: int


def locate_model(source: str, registry: str | None) -> Path:
    """Return a model's folder, given as a path or as a registry version, which is pulled into the cache; check it."""
    folder = Path(source)
    if not folder.is_dir():
        if "@" not in source or "/" in source:
            raise ConfigError(
                f"{source}: expected an existing folder (e.g. runs/PROFILE/package) or a registry version (NAME@ALIAS)"
            )
        from ropeway.cli.registry_commands import open_registry, pull_cached

        folder = pull_cached(open_registry(registry).version(source)).folder
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise DataError unless a folder has safetensors, no pickle, no custom code, and the files of its manifest."""
    if (folder / MANIFEST).is_file():
        load_manifest(folder, remedy="Pull or package it again")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if pickles := [path for path in paths if path.suffix.lower() in _PICKLES]:
        raise DataError(
            f"{pickles[0]}: may be a pickle file, and loading one can run code ({len(pickles)} such files). Convert "
            "the model to safetensors, or remove these files"
        )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise DataError(f"{folder}: no *.safetensors file; expected a folder as `dvc repro package` writes it")
    for path in paths:
        if path.name in ("config.json", "tokenizer_config.json") and "auto_map" in json.loads(path.read_bytes()):
            raise DataError(
                f"{path}: auto_map names custom code, which is not run. Remove auto_map if the model needs none"
            )


def fit_turns(turns: Sequence[str], count: Callable[[Sequence[str]], int], limit: int) -> list[str]:
    """Return the latest turns that fit: the oldest question is dropped with its answer until the prompt fits.

    >>> fit_turns(["a" * 5, "b" * 5, "c" * 5], lambda turns: sum(map(len, turns)), 9)
    ['ccccc']

    Raises:
        ConfigError: The last question alone does not fit.
    """
    kept = list(turns)
    while (found := count(kept)) > limit:
        if not kept[2:]:  # the last question stands alone
            raise ConfigError(
                f"the question has {found:,} tokens with its template; {limit:,} fit with the answer. Shorten "
                "it, or lower --max-new-tokens"
            )
        del kept[:2]
    return kept


class ChatSession:
    """One conversation with one model."""

    def __init__(self, folder: Path, generation: GenerationSettings) -> None:
        """Open the model; raise DataError if transformers cannot load it or it has no chat template."""
        from ropeway.stages.evaluate.load_model import GENERATE_SINGLE_THREADED_BELOW, cpu_threads_for, open_model

        try:
            self._model, self._tokenizer = open_model(folder, like=folder)
        except Exception as error:
            raise DataError(f"{folder}: transformers cannot load it ({type(error).__name__}: {error})") from error
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{folder}: its tokenizer has no chat template, so prompts cannot be formatted. Use a chat model"
            )
        self._threads = lambda: cpu_threads_for(self._model, single_threaded_below=GENERATE_SINGLE_THREADED_BELOW)
        self.generation, self.turns = generation, list[str]()
        self._asked = 0

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        stated = int(self._tokenizer.model_max_length)
        return stated if stated < _NO_LIMIT else int(self._model.config.max_position_embeddings)

    def begin(self, system: str | None = None) -> None:
        """Forget what was said; set the system message if one is given."""
        self.turns, self._asked = [], 0
        if system is not None:
            self.generation = replace(self.generation, system=system)

    def ask(self, question: str, write: Write) -> ChatAnswer:
        """Return the answer, which `write` gets piece by piece as it comes; question and answer are remembered."""
        asked = [*self.turns, question]
        kept = fit_turns(
            asked, lambda turns: len(self._encode(turns)), self.context_tokens - self.generation.max_new_tokens
        )
        ids = self._encode(kept)
        said = self._generate(ids, write)
        ended = bool(said) and said[-1] in self._ends()
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        self.turns, self._asked = [*kept, text], self._asked + 1
        return ChatAnswer(text, len(said), ended, len(asked) - len(kept))

    def _encode(self, turns: Sequence[str]) -> list[int]:
        messages = Conversation(tuple(turns), self.generation.system).to_messages()
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids

    def _ends(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def _generate(self, ids: list[int], write: Write) -> list[int]:
        import torch

        generation = self.generation
        drawn = {"do_sample": True, "temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
        settings = drawn if generation.temperature else {"do_sample": False}
        prompt = torch.tensor([ids], device=self._model.device)
        # transformers draws from torch's global generator: borrowed, and given back. A seed of its own for each turn.
        seed = int(digest_of([generation.seed, "chat", self._asked])[:15], 16)
        with torch.random.fork_rng(), torch.inference_mode(), self._threads():
            torch.manual_seed(seed)
            out = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=generation.max_new_tokens,
                streamer=_stream(self._tokenizer, write),
                **settings,
            )
        said: list[int] = out[0, len(ids) :].tolist()
        return said


def chat(session: ChatSession, source: TextIO, out: TextIO, *, as_json: bool) -> None:
    """Hold the conversation until the input ends: at a terminal with a prompt, from a pipe one question a line."""
    if source.isatty() and not as_json:
        print(_HELP, file=sys.stderr)
        with suppress(ImportError):
            importlib.import_module("readline")  # arrows and history for input()
        _converse(session, _read_lines(), out)
        return
    for line in source:
        if not (question := line.rstrip("\r\n")).strip():
            continue
        if as_json:
            answer = session.ask(question, lambda _piece: None)
            facts = {"prompt": question, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
            print(json.dumps({**facts, "forgotten": answer.forgotten}, ensure_ascii=False), file=out, flush=True)
        else:
            _print_answer(session, question, out)


def _converse(session: ChatSession, lines: Iterator[str], out: TextIO) -> None:
    for line in lines:
        command, _, text = line.partition(" ")
        if line == "/new":
            session.begin()
        elif command == "/system":
            session.begin(text.strip())
        elif command.startswith("/") and "/" not in command[1:]:  # a path may begin a question
            print(f"{command}: no such command. {_COMMANDS}", file=sys.stderr)
        elif line:
            try:
                _print_answer(session, line, out)
            except ConfigError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped; the question is not part of the conversation)", file=sys.stderr)


def _read_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def _print_answer(session: ChatSession, question: str, out: TextIO) -> None:
    def write(piece: str) -> None:
        out.write(piece)
        out.flush()

    answer = session.ask(question, write)
    write("\n")
    if not answer.text.strip():
        print("(empty answer: the model generated no visible text)", file=sys.stderr)
    if not answer.ended:
        print(f"(cut at {answer.tokens:,} tokens; --max-new-tokens allows more)", file=sys.stderr)
    if answer.forgotten:
        print(f"(the oldest {answer.forgotten} turns exceeded the context and were dropped)", file=sys.stderr)


def _stream(tokenizer: "PreTrainedTokenizerBase", write: Write) -> "TextStreamer":
    from transformers import TextStreamer

    class Stream(TextStreamer):  # type: ignore[misc]
        """Hands on text as soon as it is whole: no half word, no half character."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002
            write(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
