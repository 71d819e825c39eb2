"""Passkey retrieval: does the model find five digits hidden in a long text, at every length and depth?

Source: Mohtashami and Jaggi 2023, "Landmark Attention", arXiv:2305.16300, section 4.2, whose text this is. It is asked
in this model's own template, and the answer begins with "The pass key is" for the base too, which knows no template.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.config.params import Passkey
from ropeway.models.chat_template import ChatTemplate
from ropeway.runtime.errors import ConfigError
from ropeway.stages.evaluate.samples import answer

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there. "
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "What is the pass key?"
_OPENING = "The pass key is"
_MOST_ANSWER_TOKENS = 12  # five digits, one token each, a blank, and words in front
_GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": _MOST_ANSWER_TOKENS}


@dataclass(frozen=True, slots=True)
class Question:
    """One hidden key."""

    length: int  # tokens that the question may have, answer included
    depth: float  # where in the filler the key stands: 0 in front, 1 behind
    repeat: int  # which of several
    key: str  # five digits


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and what a model said."""

    question: Question
    tokens: int
    text: str

    @property
    def right(self) -> bool:
        """Whether the first number of the answer is the key.

        >>> Answered(Question(64, 0.5, 0, "12345"), 60, " 12345. Remember").right
        True
        >>> Answered(Question(64, 0.5, 0, "12345"), 60, " 123456").right
        False
        """
        found = re.search(r"\d+", self.text)
        return found is not None and found[0] == self.question.key


def plan_questions(wanted: Passkey, *, seed: int) -> list[Question]:
    """Return every question, shortest first; a key depends on its own place alone."""
    return [
        Question(length, depth, repeat, _draw_key(f"{seed}/passkey/{length}/{depth}/{repeat}"))
        for length in sorted(wanted.lengths)
        for depth in wanted.depths
        for repeat in range(wanted.repeats)
    ]


def _draw_key(seed: str) -> str:
    return str(random.Random(seed).randint(10_000, 99_999))


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    questions: Sequence[Question],
    *,
    seed: int,
) -> list[Answered]:
    """Return the model's answer to every question.

    Raises:
        ConfigError: A length has no room for the question alone.
    """
    found = []
    for question in questions:
        ids = encode_question(tokenizer, template, question)
        found.append(Answered(question, len(ids), answer(model, tokenizer, ids, _GREEDY, seed=seed)))
    return found


def encode_question(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, question: Question) -> list[int]:
    """Return the question's ids with as much filler as its length leaves room for.

    Raises:
        ConfigError: It leaves none for the question alone.
    """

    def encode(fillers: int) -> list[int]:
        before = round(question.depth * fillers)
        body = _FILLER * before + _KEY.format(key=question.key) + _FILLER * (fillers - before)
        prompt = template.render_prompt([_INTRODUCTION + body + _QUESTION], end=tokenizer.eos_token) + _OPENING
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]  # beyond max_length on purpose
        return ids

    room = question.length - _MOST_ANSWER_TOKENS
    if (least := len(encode(0))) > room:
        raise ConfigError(
            f"evaluation.passkey.lengths: {question.length} tokens; the question alone has {least}, its answer up to "
            f"{_MOST_ANSWER_TOKENS}. Ask for longer ones"
        )
    return encode(_largest(lambda fillers: len(encode(fillers)) <= room))


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, 0 doing so.

    >>> _largest(lambda number: number <= 13)
    13
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def report_passkey(answers: Mapping[str, Sequence[Answered]]) -> dict[str, dict[str, float]]:
    """Return what eval.json holds: how many keys each model found."""
    return {
        name: {"asked": len(found), "right": sum(one.right for one in found), "accuracy": round(_share(found), 6)}
        for name, found in answers.items()
    }


def table_answers(answers: Mapping[str, Sequence[Answered]]) -> Iterator[dict[str, object]]:
    """Yield one line per question and model: what was hidden where and what was said, wrong answers too."""
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
                "right": int(one.right),
            }


def table_lengths(answers: Mapping[str, Sequence[Answered]]) -> list[dict[str, float]]:
    """Return one line per length: the share of keys that each model found."""
    lengths = sorted({one.question.length for found in answers.values() for one in found})
    return [
        {"length": length}
        | {
            name: round(_share([one for one in found if one.question.length == length]), 6)
            for name, found in answers.items()
        }
        for length in lengths
    ]


def _share(found: Sequence[Answered]) -> float:
    return sum(one.right for one in found) / len(found)
