"""`ropeway chat`: a conversation with a model in the terminal, or line by line through a pipe.

An answer's reasoning and tool calls are shown apart and kept in the conversation as the model's template has them.

What is opened are safetensors and JSON, with the folder's own template, and nothing that could run code.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ropeway.cli.answer_display import AnswerDisplay, is_colorful
from ropeway.models.answer_parts import MARKERS, STATED, AnswerPart, parse_answer, to_message, to_records
from ropeway.models.conversation import Message
from ropeway.models.template_probes import mark_tools
from ropeway.models.weight_files import check_weight_files
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.json_text import parse_json, read_json
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import digest_of, load_manifest
from ropeway.runtime.terminal import escape_controls

if TYPE_CHECKING:  # slow imports
    import torch
    from transformers import PreTrainedTokenizerBase, TextStreamer

# What torch, keras, flax and numpy load by running it, or may. Source: the suffixes that picklescan looks into.
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".h5", ".msgpack"}
_NO_LIMIT = 10**9  # transformers' stand-in for "no model_max_length" is 1e30
_COMMANDS = (
    "/new starts a new conversation, /system TEXT sets the system message and starts a new conversation, "
    "/tool NAME RESULT answers a tool call"
)
_HELP = f"Ctrl-D ends the chat, Ctrl-C stops an answer, {_COMMANDS}"
_PROBE = "qzprobe"  # a word that no template writes by itself
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
        forgotten: Messages that no longer fitted into the context.
        parts: Its reasoning, tool calls and text; `text` is the whole.
    """

    text: str
    tokens: int
    ended: bool
    forgotten: int
    parts: tuple[AnswerPart, ...]


def locate_model(source: str, registry: str | None) -> Path:
    """Return a model's folder, given as a path or as a registry version, which is pulled into the cache; check it."""
    folder = Path(source)
    if not folder.is_dir():
        if "@" not in source or "/" in source:
            raise ConfigError(
                f"{source}: expected an existing folder (e.g. runs/PROFILE/package) or a registry version (NAME@ALIAS)"
            )
        from ropeway.cli.registry_commands import pull_cached
        from ropeway.cli.registry_options import open_registry

        folder = pull_cached(open_registry(registry).version(source)).folder
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise DataError unless a folder has safetensors, no pickle, no custom code, and the files of its manifest.

    What else transformers would read weights from is refused, too.
    """
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
    check_weight_files(folder)
    for path in paths:
        is_config = path.name in ("config.json", "tokenizer_config.json")
        if is_config and "auto_map" in read_json(path, remedy="Pull the package again"):
            raise DataError(
                f"{path}: auto_map names custom code, which is not run. Remove auto_map if the model needs none"
            )


def fit_messages(messages: Sequence[Message], count: Callable[[Sequence[Message]], int], limit: int) -> list[Message]:
    """Return the latest messages that fit: the oldest question is dropped with all up to the next one.

    Raises:
        ConfigError: The last question alone does not fit.
    """
    kept = list(messages)
    while (found := count(kept)) > limit:
        later = [at for at, message in enumerate(kept) if at and message["role"] == "user"]
        if not later:  # the last question stands alone
            raise ConfigError(
                f"the question has {found:,} tokens with its template; {limit:,} fit with the answer. Shorten "
                "it, or lower --max-new-tokens"
            )
        del kept[: later[0]]
    return kept


def load_tools(path: Path) -> list[Message]:
    """Return the tools of a JSON file: a list of functions with JSON schemas, as OpenAI's API has them.

    Raises:
        ConfigError: The file cannot be read, or is no such list.
    """
    from ropeway.stages.fetch.messages import read_tools
    from ropeway.stages.fetch.values import UnreadableError

    try:
        tools = read_tools(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, UnreadableError) as error:
        raise ConfigError(f"{path}: expected a JSON list of tools: {error}") from None
    if not tools:
        raise ConfigError(f"{path}: no tools; expected a JSON list of functions")
    return tools


class ChatSession:
    """One conversation with one model."""

    def __init__(self, folder: Path, generation: GenerationSettings, tools: Sequence[Message] = ()) -> None:
        """Open the model.

        Raises:
            DataError: transformers cannot load it, or it has no chat template.
            ConfigError: Its template has no place for a part of the tools.
        """
        from ropeway.stages.evaluate.load_model import GENERATE_SINGLE_THREADED_BELOW, cpu_threads_for, open_model

        try:
            self._model, self._tokenizer = open_model(folder, like=folder)
        except ConfigError:  # says what is wrong, e.g. with the chat template
            raise
        except Exception as error:
            raise DataError(f"{folder}: transformers cannot load it ({type(error).__name__}: {error})") from error
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{folder}: its tokenizer has no chat template, so prompts cannot be formatted. Use a chat model"
            )
        self._threads = lambda: cpu_threads_for(self._model, single_threaded_below=GENERATE_SINGLE_THREADED_BELOW)
        self.generation, self.tools = generation, list(tools)
        self.messages: list[Message] = []
        self._asked = self._called = 0
        self._pending: list[Message] = []
        self._has_place = self._probe_template()
        self._check_tools(folder)

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        stated = int(self._tokenizer.model_max_length)
        return stated if stated < _NO_LIMIT else int(self._model.config.max_position_embeddings)

    def begin(self, system: str | None = None) -> None:
        """Forget what was said; set the system message if one is given."""
        self.messages, self._pending, self._asked = [], [], 0
        if system is not None:
            self.generation = replace(self.generation, system=system)

    @property
    def pending_calls(self) -> list[str]:
        """Names of the functions that the last answer calls and that have no result yet."""
        return [call["function"]["name"] for call in self._pending]

    @property
    def states_parts(self) -> bool:
        """Whether the tokenizer itself states how answers are parsed; their parts are known once they are complete."""
        return bool(getattr(self._tokenizer, STATED, None))

    def ask(self, question: str, write: Write) -> ChatAnswer:
        """Return the answer, which `write` gets piece by piece as it comes; question and answer are remembered."""
        answer = self._answer([*self.messages, {"role": "user", "content": question}], write)
        self._asked += 1
        return answer

    def give_result(self, name: str, result: str, write: Write) -> ChatAnswer | None:
        """Take the result of a tool call; return the answer once all calls have one, else None.

        Raises:
            ConfigError: The last answer does not call this function.
        """
        if name not in self.pending_calls:
            waiting = ", ".join(self.pending_calls) or "none"
            raise ConfigError(f"/tool {name}: no call waits for its result; calls without a result: {waiting}")
        call = self._pending.pop(self.pending_calls.index(name))
        self.messages.append({"role": "tool", "name": name, "tool_call_id": call["id"], "content": result})
        if self._pending:
            return None
        answer = self._answer(self.messages, write)
        self._asked += 1
        return answer

    @cached_property
    def opening(self) -> str:
        """A generation prompt, which may end inside the reasoning."""
        with suppress(ConfigError):
            return str(self._tokenizer.decode(self._encode([{"role": "user", "content": "Hi"}])))
        return ""

    def _answer(self, asked: Sequence[Message], write: Write) -> ChatAnswer:
        limit = self.context_tokens - self.generation.max_new_tokens
        kept = fit_messages(asked, lambda messages: len(self._encode(messages)), limit)
        ids = self._encode(kept)
        said = self._generate(ids, write)
        ended = bool(said) and said[-1] in self._ends()
        prompt = self._tokenizer.decode(ids, skip_special_tokens=False)
        answer = parse_answer(self._tokenizer, said, prompt=prompt, ends=self._ends())
        message = to_message(answer, **self._has_place, make_id=self._make_call_id)
        self.messages = [*kept, message]
        self._pending = list(message.get("tool_calls", ()))
        return ChatAnswer(answer.text, len(said), ended, len(asked) - len(kept), answer.parts)

    def _make_call_id(self) -> str:
        self._called += 1
        return f"call{self._called:05d}"  # Mistral's templates want nine letters and digits

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                self._with_system(messages),
                tools=self.tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:
            raise ConfigError(
                f"the model's chat template refuses the conversation: {error}. /new starts over"
            ) from error
        return ids

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = self.generation.system
        return [*([{"role": "system", "content": system}] if system else []), *messages]

    def _render(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> str:
        """Return rendered messages; empty if the template refuses them."""
        with suppress(Exception):  # a template may raise anything
            return str(self._tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False))
        return ""

    def _probe_template(self) -> dict[str, bool]:
        """Return whether the template writes an answer's reasoning, and its tool calls with their results."""
        question: Message = {"role": "user", "content": "Hi"}
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": f"{_PROBE}1", "arguments": {"x": f"{_PROBE}2"}},
        }
        thought = {"role": "assistant", "content": "Hello", "reasoning_content": _PROBE}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "name": f"{_PROBE}1", "tool_call_id": "call00000", "content": f"{_PROBE}3"}
        used = self._render([question, called, result])
        return {
            "has_reasoning": _PROBE in self._render([question, thought]),
            "has_calls": all(f"{_PROBE}{number}" in used for number in (1, 2, 3)),
        }

    def _check_tools(self, folder: Path) -> None:
        marked, words = mark_tools(self.tools)
        text = self._render([{"role": "user", "content": "Hi"}], marked) if marked else ""
        if missing := [what for word, what in words.items() if word not in text]:
            raise ConfigError(f"{folder}: its chat template has no place for {missing[0]}. Leave out --tools")
        if self.tools and not self._has_place["has_calls"]:
            raise ConfigError(f"{folder}: its chat template has no place for tool calls and results. Leave out --tools")

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
                streamer=_stream(self._tokenizer, write, self._ends()),
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
        command, _, result = question.partition(" ")
        if command == "/tool" and session.tools:
            _give_result(session, result, out, as_json=as_json)
        elif as_json:
            _print_json(question, session.ask(question, lambda _piece: None), out)
        else:
            _print_answer(session, partial(session.ask, question), out)


def _print_json(question: str, answer: ChatAnswer, out: TextIO) -> None:
    facts = {"prompt": question, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
    parts = {"parts": to_records(answer.parts)} if any(part.kind != "text" for part in answer.parts) else {}
    print(json.dumps({**facts, "forgotten": answer.forgotten, **parts}, ensure_ascii=False), file=out, flush=True)


def _give_result(session: ChatSession, words: str, out: TextIO, *, as_json: bool = False) -> None:
    """Give a result, `NAME RESULT`, to the model; print its answer once all calls have one."""
    name, _, result = words.strip().partition(" ")
    if as_json:
        if answer := session.give_result(name, result, lambda _piece: None):
            _print_json(f"/tool {words}", answer, out)
    else:
        _print_answer(session, partial(session.give_result, name, result), out)
    if session.pending_calls:
        print(f"(calls without a result: {escape_controls(', '.join(session.pending_calls))})", file=sys.stderr)


def _converse(session: ChatSession, lines: Iterator[str], out: TextIO) -> None:
    for line in lines:
        command, _, text = line.partition(" ")
        if line == "/new":
            session.begin()
        elif command == "/system":
            session.begin(text.strip())
        elif command.startswith("/") and "/" not in command[1:] and command != "/tool":  # a path may begin a question
            print(f"{command}: no such command. {_COMMANDS}", file=sys.stderr)
        elif line:
            try:
                if command == "/tool":
                    _give_result(session, text, out)
                else:
                    _print_answer(session, partial(session.ask, line), out)
            except ConfigError as error:
                print(escape_controls(error), file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped; the question is not part of the conversation)", file=sys.stderr)


def _read_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return


def _print_answer(session: ChatSession, ask: Callable[[Write], ChatAnswer | None], out: TextIO) -> None:
    display = AnswerDisplay(out, prompt=session.opening, is_held=session.states_parts, is_colorful=is_colorful(out))
    answer = ask(display.feed)
    if answer is None:
        return
    display.finish(answer.parts)
    if not answer.text.strip():
        print("(empty answer: the model generated no visible text)", file=sys.stderr)
    if any(part.kind == "reasoning" and not part.is_finished for part in answer.parts):
        print("(the answer ended inside its reasoning)", file=sys.stderr)
    if not answer.ended:
        print(f"(cut at {answer.tokens:,} tokens; --max-new-tokens allows more)", file=sys.stderr)
    if answer.forgotten:
        print(f"(the oldest {answer.forgotten} turns exceeded the context and were dropped)", file=sys.stderr)
    if session.pending_calls:
        print(f"(/tool {escape_controls(session.pending_calls[0])} RESULT gives the model a result)", file=sys.stderr)


def _stream(tokenizer: "PreTrainedTokenizerBase", write: Write, ends: Sequence[int]) -> "TextStreamer":
    from transformers import TextStreamer

    # Special tokens are dropped, as in the answer, but for those by which its parts are found.
    dropped = {*tokenizer.all_special_ids, *ends}
    if not getattr(tokenizer, STATED, None):
        dropped -= {*(number for number in dropped if tokenizer.convert_ids_to_tokens(number) in MARKERS)} - {*ends}

    class Stream(TextStreamer):  # type: ignore[misc]
        """Hands on text as soon as it is whole: no half word, no half character."""

        def put(self, value: "torch.Tensor") -> None:
            if self.next_tokens_are_prompt or int(value.reshape(-1)[0]) not in dropped:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002, ARG002
            write(text)

    return Stream(tokenizer, skip_prompt=True, skip_special_tokens=False)
