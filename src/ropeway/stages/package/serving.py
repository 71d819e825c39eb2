"""Compare what a serving engine answers with the package that it serves: `ropeway registry verify NAME@v3 --serve URL`.

Expected are the answers of transformers to the questions of the probe, generated greedily here. The engine is asked
over OpenAI's HTTP interface, which vLLM, `transformers serve` and others have. What an engine does not report is listed
as not offered, never as passed.

Greedy answers of two engines may part where two tokens are nearly equally likely. Such a place ends the comparison of
an answer, and is stated; a difference at any other place is a fault.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
from transformers import AutoTokenizer

from ropeway.models.open_model import load_with_info
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.stages.package.check import read_probe

MAX_TOKENS = 32
TOP = 5
NEAR_TIE = 0.1  # difference of log-probabilities; bf16 kernels of two engines differ by less than half of it
LOGPROB_TOLERANCE = 0.1
_SECONDS = 300  # of one answer; a server may load the model first
_TRANSLATED = (400, 404, 405, 415, 422, 501)  # an engine without this endpoint or field
Outcome = Literal["passed", "failed", "not offered"]


@dataclass(frozen=True, slots=True)
class ExpectedAnswer:
    """The answer of transformers to one conversation.

    Attributes:
        messages: The conversation, as a client sends it.
        prompt_ids: Token ids of the generation prompt.
        ids: Token ids of the answer, without an end token.
        text: The answer.
        stops: Whether it ends with an end token, else by its length.
        margins: For each token how much likelier it was than the second one, in log-probability; also for the end.
        first: The likeliest first tokens as text, and their log-probabilities.
    """

    messages: list[dict[str, str]]
    prompt_ids: list[int]
    ids: list[int]
    text: str
    stops: bool
    margins: list[float]
    first: Mapping[str, float]
    pieces: tuple[str, ...] = field(default=())  # the text after each token


@dataclass(frozen=True, slots=True)
class ServingCheck:
    """One comparison: what was compared, its outcome, and what was expected and found."""

    name: str
    outcome: Outcome
    detail: str = ""


@torch.inference_mode()
def expected_answers(folder: Path) -> list[ExpectedAnswer]:
    """Return the answers of a package's model to the questions of its probe."""
    probe = read_probe(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, _ = load_with_info(folder)
    model.eval()
    stated = probe["stops"]["eos_token_id"]
    ends = set(stated if isinstance(stated, list) else [stated])
    answers = []
    for case in probe["conversations"]:
        if not case["prompt_ids"]:
            continue
        prompt = torch.tensor([case["prompt_ids"]])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found = out.sequences[0, prompt.shape[1] :].tolist()
        scores = torch.stack(out.scores)[:, 0].float().log_softmax(-1)
        best = scores.topk(2).values
        stops = bool(found) and found[-1] in ends
        ids = found[:-1] if stops else found
        top = scores[0].topk(TOP)
        answers.append(
            ExpectedAnswer(
                case["messages"],
                case["prompt_ids"],
                ids,
                tokenizer.decode(ids, skip_special_tokens=True),
                stops,
                (best[:, 0] - best[:, 1]).tolist(),
                {
                    tokenizer.decode([token]): float(value)
                    for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                },
                tuple(tokenizer.decode(ids[: count + 1], skip_special_tokens=True) for count in range(len(ids))),
            )
        )
    return answers


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
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_SECONDS) as client:
        try:
            name = model or _only_model(client, url)
            return [
                check for number, one in enumerate(expected, 1) for check in _check_answer(client, name, one, number)
            ]
        except httpx.HTTPError as error:
            raise TemporaryError(
                f"{url}: does not answer ({type(error).__name__}). Start the server, or wait"
            ) from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{url}: its answer is not in the form of OpenAI's interface ({type(error).__name__}: {error})"
            ) from None


def _only_model(client: httpx.Client, url: str) -> str:
    answer = client.get("/v1/models")
    names = [str(one["id"]) for one in answer.json()["data"]] if answer.is_success else []
    if len(names) != 1:
        raise ConfigError(f"{url}: lists {len(names)} models ({', '.join(names[:5])}). Name one with --model")
    return names[0]


def _check_answer(client: httpx.Client, model: str, one: ExpectedAnswer, number: int) -> Iterator[ServingCheck]:
    yield _check_ids(client, model, one, f"question {number}: token ids of the prompt")
    request = {"model": model, "messages": one.messages, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": False}
    answer = client.post("/v1/chat/completions", json={**request, "logprobs": True, "top_logprobs": TOP})
    if answer.status_code in _TRANSLATED:  # an engine that refuses fields that it does not know
        answer = client.post("/v1/chat/completions", json=request)
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
    return ServingCheck(name, "passed" if same else "failed", "" if same else f"expected {expected}, found {found}")


def _check_ids(client: httpx.Client, model: str, one: ExpectedAnswer, name: str) -> ServingCheck:
    """Compare token ids, which vLLM's `/tokenize` returns."""
    answer = client.post("/tokenize", json={"model": model, "messages": one.messages, "add_generation_prompt": True})
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
