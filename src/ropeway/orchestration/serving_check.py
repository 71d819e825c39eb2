"""Compare what a serving engine answers with the package that it serves: `ropeway registry verify NAME@v3 --serve URL`.

Expected are the greedy answers of transformers to the questions of the probe (`stages/package/expected_answers.py`).
The engine is asked over OpenAI's HTTP interface, which vLLM, `transformers serve` and others have. What an engine does
not report is listed as not offered, never as passed.

Greedy answers of two engines may part where two tokens are nearly equally likely. Such a place ends the comparison of
an answer, and is stated; a difference at any other place is a fault.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from ropeway.data.expected_answer import MAX_TOKENS, TOP, ExpectedAnswer
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.least_rate import finish_within
from ropeway.runtime.plain_http import check_encrypted
from ropeway.runtime.tls import find_tls_fault

NEAR_TIE = 0.1  # difference of log-probabilities; not measured on a GPU
LOGPROB_TOLERANCE = 0.1
_SECONDS = 300.0  # of one whole answer; a server may load the model first
_MAX_BYTES = 16 << 20  # of an answer: a question has a few dozen tokens
_NOT_OFFERED = (400, 404, 405, 415, 422, 501)  # status codes of an engine without this endpoint or field
Outcome = Literal["passed", "failed", "not offered"]


@dataclass(frozen=True, slots=True)
class ServingCheck:
    """One comparison: what was compared, its outcome, and what was expected and found."""

    name: str
    outcome: Outcome
    detail: str = ""


def check_server(url: str, expected: Sequence[ExpectedAnswer], *, model: str | None = None) -> list[ServingCheck]:
    """Return every comparison of a server's answers with the expected ones.

    Args:
        url: The server, with or without `/v1`.
        expected: As `expected_answers` returns them.
        model: The name under which the server has the model; by default the only one that it lists.

    Raises:
        ConfigError: The server lists several models, or none of this name.
        TemporaryError: It does not answer.
        DataError: It answers in another form than OpenAI's interface has.
    """
    with _open_client(url) as client:
        name = model or _only_model(client, url)
        return [check for number, one in enumerate(expected, 1) for check in _check_answer(client, name, one, number)]


def reach_server(url: str) -> None:
    """Return once the server answers anything at all; raise ConfigError or TemporaryError as `check_server` does."""
    with _open_client(url) as client:
        _request(client, "GET", "/v1/models")


@contextmanager
def _open_client(url: str) -> Iterator[httpx.Client]:
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key.isascii():
        raise ConfigError("OPENAI_API_KEY has characters that no key has. Set it again")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        base = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except (httpx.InvalidURL, ValueError):
        base = httpx.URL("")
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError(f"--serve {url[:200]!r}: expected the URL of a server, e.g. http://127.0.0.1:8000")
    if key:
        check_encrypted(str(base), what="--serve, to which OPENAI_API_KEY is sent")
    with httpx.Client(base_url=base, headers=headers, timeout=_SECONDS) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            if fault := find_tls_fault(error, "SSL_CERT_FILE"):
                raise ConfigError(f"{url}: {fault}") from None
            raise TemporaryError(
                f"{url}: does not answer ({type(error).__name__}). Start the server, or wait"
            ) from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{url}: its answer is not in the form of OpenAI's interface ({type(error).__name__}: {error!s:.200})"
            ) from None


def _request(client: httpx.Client, method: str, path: str, json: object = None) -> httpx.Response:
    """Return the whole answer; httpx's own timeout is the time without a byte."""
    return finish_within(_SECONDS, lambda: _receive(client, method, path, json), what=f"{client.base_url}{path}")


def _receive(client: httpx.Client, method: str, path: str, json: object) -> httpx.Response:
    with client.stream(method, path, json=json) as answer:
        body = bytearray()
        for part in answer.iter_bytes():  # decompressed
            body += part
            if len(body) > _MAX_BYTES:
                raise DataError(f"{answer.url}: its answer has more than {_MAX_BYTES >> 20} MiB")
        return httpx.Response(answer.status_code, content=bytes(body), request=answer.request)


def _only_model(client: httpx.Client, url: str) -> str:
    answer = _request(client, "GET", "/v1/models")
    names = [str(one["id"]) for one in answer.json()["data"]] if answer.is_success else []
    if len(names) != 1:
        raise ConfigError(f"{url}: lists {len(names)} models ({', '.join(names[:5])}). Name one with --model")
    return names[0]


def _check_answer(client: httpx.Client, model: str, one: ExpectedAnswer, number: int) -> Iterator[ServingCheck]:
    yield _check_ids(client, model, one, f"question {number}: token ids of the prompt")
    request = {"model": model, "messages": one.messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": False}
    answer = _request(client, "POST", "/v1/chat/completions", json={**request, "logprobs": True, "top_logprobs": TOP})
    if answer.status_code in _NOT_OFFERED:  # an engine that refuses fields that it does not know
        answer = _request(client, "POST", "/v1/chat/completions", json=request)
    if not answer.is_success:
        raise DataError(f"{answer.url}: answered {answer.status_code}: {answer.text[:200]!r}")
    found = answer.json()
    choice = found["choices"][0]
    counted = (found.get("usage") or {}).get("prompt_tokens")
    yield _compare(f"question {number}: tokens of the prompt", len(one.prompt_ids), counted)
    told = _check_text(one, str(choice["message"]["content"]), number)
    yield told
    if told.outcome == "passed" and not told.detail:
        yield _compare(
            f"question {number}: how the answer ends", "stop" if one.stops else "length", choice.get("finish_reason")
        )
    yield _check_logprobs(one, choice.get("logprobs"), number)


def _compare(name: str, expected: object, found: object) -> ServingCheck:
    if found is None:
        return ServingCheck(name, "not offered")
    same = expected == found
    return ServingCheck(
        name, "passed" if same else "failed", "" if same else f"expected {expected}, found {found!s:.200}"
    )


def _check_ids(client: httpx.Client, model: str, one: ExpectedAnswer, name: str) -> ServingCheck:
    """Compare token ids, which vLLM's `/tokenize` returns."""
    answer = _request(
        client, "POST", "/tokenize", json={"model": model, "messages": one.messages, "add_generation_prompt": True}
    )
    if not answer.is_success:
        return ServingCheck(name, "not offered")
    return _compare(name, one.prompt_ids, answer.json().get("tokens"))


def _check_text(one: ExpectedAnswer, found: str, number: int) -> ServingCheck:
    name = f"question {number}: greedy answer"
    if found == one.text:
        return ServingCheck(name, "passed")
    at = next((place for place, text in enumerate(one.pieces) if not found.startswith(text)), len(one.pieces))
    margin = one.margins[at] if at < len(one.margins) else math.inf
    where = f"parts at token {at + 1} of {len(one.ids)}"
    if margin < NEAR_TIE:
        return ServingCheck(name, "passed", f"{where}, where two tokens differ by {margin:.3f} in log-probability")
    shown = json.dumps(one.text, ensure_ascii=False), json.dumps(found, ensure_ascii=False)
    return ServingCheck(name, "failed", f"{where}: expected {shown[0]:.120}, found {shown[1]:.120}")


def _check_logprobs(one: ExpectedAnswer, found: Any, number: int) -> ServingCheck:  # noqa: ANN401 - JSON
    name = f"question {number}: log-probabilities of the first token"
    content = found.get("content") if isinstance(found, dict) else None
    if not content:
        return ServingCheck(name, "not offered")
    told = {str(top["token"]): float(top["logprob"]) for top in content[0]["top_logprobs"]}
    differences = {token: abs(one.first[token] - told[token]) for token in sorted(one.first.keys() & told.keys())}
    if not differences:
        return ServingCheck(name, "failed", f"expected {sorted(one.first)}, found {sorted(told)}")
    worst = max(differences, key=lambda token: math.inf if math.isnan(told[token]) else differences[token])
    outcome: Outcome = "passed" if differences[worst] <= LOGPROB_TOLERANCE else "failed"  # also for NaN
    return ServingCheck(name, outcome, f"{worst!r}: expected {one.first[worst]:.4f}, found {told[worst]:.4f}")
