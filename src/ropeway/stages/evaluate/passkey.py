"""Passkey retrieval: whether the model finds five digits hidden in a long text, by length and depth.

The prompt uses the model's chat template. The answer is prefilled with "The pass key is", so that the base model can
answer too.

Source of the text: Mohtashami and Jaggi 2023, "Landmark Attention", arXiv:2305.16300, section 4.2.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.config.sections import Passkey
from ropeway.models.chat_template import ChatTemplate
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.progress import track
from ropeway.stages.evaluate.samples import answer_greedily, encode_text

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there. "
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key?"
_OPENING = "The pass key is"
_MAX_ANSWER_TOKENS = 12  # five digits, one token each, a space, and words before them


@dataclass(frozen=True, slots=True)
class PasskeyQuestion:
    """One hidden key."""

    length: int  # tokens of prompt and answer, at most
    depth: float  # position of the key in the filler: 0 at the start, 1 at the end
    repeat: int  # number among questions of the same length and depth
    key: str  # five digits


@dataclass(frozen=True, slots=True)
class PasskeyAnswer:
    """A question and a model's answer."""

    question: PasskeyQuestion
    tokens: int
    text: str

    @property
    def is_correct(self) -> bool:
        """Whether the first number of the answer is the key.

        >>> PasskeyAnswer(PasskeyQuestion(64, 0.5, 0, "12345"), 60, " 12345. Remember").is_correct
        True
        >>> PasskeyAnswer(PasskeyQuestion(64, 0.5, 0, "12345"), 60, " 123456").is_correct
        False
        """
        found = re.search(r"\d+", self.text)
        return found is not None and found[0] == self.question.key


def plan_passkey_questions(wanted: Passkey, *, seed: int) -> list[PasskeyQuestion]:
    """Return all questions, shortest first; a key depends only on seed, length, depth and repeat."""
    return [
        PasskeyQuestion(length, depth, repeat, _draw_key(f"{seed}/passkey/{length}/{depth}/{repeat}"))
        for length in sorted(wanted.lengths)
        for depth in wanted.depths
        for repeat in range(wanted.repeats)
    ]


def _draw_key(seed: str) -> str:
    return str(random.Random(seed).randint(10_000, 99_999))


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    questions: Sequence[PasskeyQuestion],
    *,
    seed: int,
) -> list[PasskeyAnswer]:
    """Return the model's answer to every question.

    Raises:
        ConfigError: A length is shorter than the question alone.
    """
    answers = []
    for question in track(questions, "passkey questions"):
        ids = encode_passkey_question(tokenizer, template, question)
        text = answer_greedily(model, tokenizer, ids, tokens=_MAX_ANSWER_TOKENS, seed=seed)
        answers.append(PasskeyAnswer(question, len(ids), text))
    return answers


def encode_passkey_question(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, question: PasskeyQuestion
) -> list[int]:
    """Return the token ids of the prompt, with as much filler as fits into its length.

    Raises:
        ConfigError: The length is shorter than the question alone.
    """

    def write(fillers: int) -> str:
        before = round(question.depth * fillers)
        body = _FILLER * before + _KEY.format(key=question.key) + _FILLER * (fillers - before)
        return _INTRODUCTION + body + _QUESTION

    return fit_prompt(
        tokenizer,
        template,
        write,
        _OPENING,
        length=question.length,
        answer_tokens=_MAX_ANSWER_TOKENS,
        key="evaluation.passkey.lengths",
    )


def fit_prompt(  # noqa: PLR0913 - a prompt, its start of the answer, and its limits
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    write: Callable[[int], str],
    opening: str,
    *,
    length: int,
    answer_tokens: int,
    key: str,
) -> list[int]:
    """Return the token ids of a prompt with as much filler as fits, and the opening of its answer.

    Args:
        tokenizer: The model's tokenizer.
        template: The model's chat template.
        write: From a number of units of filler to the user's text; more units, more tokens.
        opening: The start of the answer, which the model continues.
        length: The tokens of prompt and answer, at most.
        answer_tokens: The tokens of these that are for the answer.
        key: What the length is in params.yaml, for an error.

    Raises:
        ConfigError: The length is shorter than the question alone.
    """

    def encode(fillers: int) -> list[int]:
        prompt = template.render_prompt([write(fillers)], end=tokenizer.eos_token) + opening
        return encode_text(tokenizer, template, prompt)  # may exceed max_length

    limit = length - answer_tokens
    if (least := len(encode(0))) > limit:
        raise ConfigError(
            f"{key}: {length} tokens are too few: the question alone has {least}, the answer up to {answer_tokens}. "
            f"Set lengths of {least + answer_tokens} or more"
        )
    return encode(_largest_fitting(lambda fillers: len(encode(fillers)) <= limit))


def _largest_fitting(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits; 0 must fit.

    >>> _largest_fitting(lambda number: number <= 13)
    13
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def identify_questions(questions: Sequence[PasskeyQuestion]) -> str:
    """Return a digest of the questions and their wording: reports with equal digests are comparable."""
    return digest_of([[asdict(one) for one in questions], _INTRODUCTION, _FILLER, _KEY, _QUESTION, _OPENING])


def report_passkey(answers: Mapping[str, Sequence[PasskeyAnswer]]) -> dict[str, dict[str, object]]:
    """Return the passkey section of eval.json: how many keys each model found, in all and by length."""
    lengths = table_lengths(answers)
    return {
        name: {
            "asked": len(found),
            "right": sum(one.is_correct for one in found),
            "accuracy": round(_share(found), 6),
            "by_length": {str(line["length"]): line[name] for line in lengths},
        }
        for name, found in answers.items()
    }


def table_answers(answers: Mapping[str, Sequence[PasskeyAnswer]]) -> Iterator[dict[str, object]]:
    """Yield one line per question and model: length, depth, key and answer, wrong answers included."""
    for name, found in answers.items():
        for one in found:
            asked = one.question
            yield {
                "model": name,
                "length": asked.length,
                "depth": asked.depth,
                "repeat": asked.repeat,
                "tokens": one.tokens,
                "key": asked.key,
                "answer": one.text,
                "right": int(one.is_correct),
            }


def table_lengths(answers: Mapping[str, Sequence[PasskeyAnswer]]) -> list[dict[str, float]]:
    """Return one line per length: the share of keys found by each model."""
    lengths = sorted({one.question.length for found in answers.values() for one in found})
    return [
        {"length": length}
        | {
            name: round(_share([one for one in found if one.question.length == length]), 6)
            for name, found in answers.items()
        }
        for length in lengths
    ]


def _share(found: Sequence[PasskeyAnswer]) -> float:
    return sum(one.is_correct for one in found) / len(found)
