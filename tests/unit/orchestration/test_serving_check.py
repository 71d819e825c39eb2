"""Answers of a serving engine against the expected ones: each known fault of an engine is named; silence is no pass."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ropeway.data.expected_answer import ExpectedAnswer
from ropeway.orchestration import serving_check
from ropeway.orchestration.serving_check import check_server
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.launcher import free_port

ANSWER = ExpectedAnswer(
    [{"role": "user", "content": "Hi"}],
    [1, 5, 6],
    [7, 8],
    "two words",
    stops=True,
    margins=[3.0, 0.05, 2.0],
    first={"two": -0.1, "one": -2.5},
    pieces=("two", "two words"),
)
IDS, COUNT, TEXT, END, LOGPROBS = (
    f"question 1: {name}"
    for name in (
        "token ids of the prompt", "tokens of the prompt", "greedy answer", "how the answer ends",
        "log-probabilities of the first token",
    )
)  # fmt: skip


class Engine:
    """An engine that answers as ANSWER, with changes."""

    def __init__(self, **changes):
        self.ids, self.count, self.text, self.end = [1, 5, 6], 3, "two words", "stop"
        self.top = {"two": -0.1, "one": -2.5}
        self.models, self.refuses, self.raw = ["tiny"], (), None
        vars(self).update(changes)
        self.asked = []

    def answer(self, path, body):
        """Return status and JSON of an answer."""
        self.asked.append((path, body))
        if self.raw is not None and path == "/v1/chat/completions":
            return self.raw
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/tokenize":
            return (404, {}) if self.ids is None else (200, {"tokens": self.ids})
        if any(name in body for name in self.refuses):
            return 422, {"error": "unexpected fields"}
        choice = {"message": {"content": self.text}, "finish_reason": self.end}
        if self.top and "logprobs" in body:
            told = [{"token": token, "logprob": value} for token, value in self.top.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": told}]}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": self.count}}


@contextmanager
def serving(engine):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, told = engine.answer(self.path, json.loads(body or b"{}"))
            data = told if isinstance(told, bytes) else json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def outcomes(engine, **options):
    with serving(engine) as url:
        return {check.name: check.outcome for check in check_server(f"{url}/v1", [ANSWER], **options)}


def test_an_engine_that_answers_as_the_package_passes_everything():
    assert outcomes(Engine()) == dict.fromkeys((IDS, COUNT, TEXT, END, LOGPROBS), "passed")


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"ids": [1, 1, 5, 6], "count": 4}, {IDS, COUNT}),  # BOS twice: the template and the tokenizer add it
        ({"ids": [1, 9, 6]}, {IDS}),  # another template
        ({"text": "one word"}, {TEXT}),
        ({"text": "two words</s>"}, {TEXT}),  # the end token as text
        ({"text": "two words and more"}, {TEXT}),
        ({"end": "length"}, {END}),  # it does not know the end token
        ({"top": {"two": -0.9, "one": -0.6}}, {LOGPROBS}),  # other weights, or another RoPE
        ({"top": {"three": -0.1}}, {LOGPROBS}),
        ({"top": {"two": float("nan"), "one": -2.5}}, {LOGPROBS}),
    ],
)
def test_each_fault_of_an_engine_is_named(changes, failed):
    found = outcomes(Engine(**changes))
    assert {name for name, outcome in found.items() if outcome == "failed"} == failed


def test_what_an_engine_does_not_report_is_not_passed():
    engine = Engine(ids=None, count=None, refuses=("logprobs",), end=None)
    assert outcomes(engine) == {
        IDS: "not offered", COUNT: "not offered", TEXT: "passed", END: "not offered", LOGPROBS: "not offered",
    }  # fmt: skip
    assert [body.keys() & {"logprobs"} for path, body in engine.asked if "chat" in path] == [{"logprobs"}, set()]


def test_answers_may_part_only_where_two_tokens_are_nearly_equally_likely():
    with serving(Engine(text="two birds")) as url:
        (told,) = (check for check in check_server(url, [ANSWER]) if check.name == TEXT)
    assert (told.outcome, "token 2 of 2" in told.detail) == ("passed", True)


def test_a_server_with_several_models_needs_the_name_of_one():
    with pytest.raises(ConfigError, match="a, b"):
        outcomes(Engine(models=["a", "b"]))
    assert outcomes(Engine(models=["a", "b"]), model="a")[TEXT] == "passed"


@pytest.mark.parametrize("raw", [(200, b"<html>"), (200, []), (200, {"choices": []}), (500, b"broken")], ids=range(4))
def test_an_answer_in_another_form_is_an_error_that_names_the_server(raw):
    with pytest.raises(DataError, match=r"127\.0\.0\.1"):
        outcomes(Engine(raw=raw))


def test_a_server_that_is_away_is_a_temporary_error():
    with pytest.raises(TemporaryError, match="does not answer"):
        check_server(f"http://127.0.0.1:{free_port()}", [ANSWER], model="x")


def test_it_is_missed_before_any_model_is_loaded():
    code = f"""
import sys
from ropeway.cli.registry_commands import _check_serving
from ropeway.runtime.errors import TemporaryError
try:
    _check_serving(None, None, "http://127.0.0.1:{free_port()}", None)
except TemporaryError:
    raise SystemExit("torch" in sys.modules)
raise SystemExit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"choices":[{"message":{"content":"two words"},"logprobs":{"content":[{"top_logprobs":'
        b'[{"token":"two","logprob":' + b"9" * 4000 + b"}]}]}}]}",
    ],
    ids=["deep", "a number beyond floats"],
)
def test_an_answer_beyond_the_parsers_limits_is_no_crash(raw):
    with pytest.raises(DataError, match="not in the form"):
        outcomes(Engine(raw=(200, raw)))


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(serving_check, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match="MiB"):
        outcomes(Engine(raw=(200, b" " * 1001)))


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://[::1", "http://127.0.0.1:x", "\0", "http://", ""])
def test_what_is_no_address_is_a_config_error(url):
    with pytest.raises(ConfigError, match="--serve"):
        serving_check.reach_server(url)


def test_a_key_that_no_header_can_have_is_a_config_error(monkeypatch):
    monkeypatch.delenv("ROPEWAY_ALLOW_HTTP", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    with pytest.raises(ConfigError, match=r"http://engine\.example is not encrypted"):
        serving_check.reach_server("http://engine.example:8000/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "é")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        serving_check.reach_server("http://127.0.0.1:1")
