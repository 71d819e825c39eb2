"""Questions on long texts that need more than one passkey: many keys, many values, variables, frequent words.

multi_key            several codes are hidden; one is asked
multi_value          one thing has several codes, hidden apart; all are asked
variable_tracking    variables are set to one another's value, far apart; asked are all that have one value
common_words         a long list of words; asked are the most frequent ones

The text is generated from words of this module. The prompt uses the model's chat template, and the start of the answer
is given, as for passkeys. An answer's score is the share of the expected items among its first items: listing more
than asked gains nothing.

Source of the kinds: Hsieh et al. 2024, "RULER", arXiv:2404.06654, section 3. Texts and scoring are our own, so scores
cannot be compared with published ones.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.config.sections import LongContext
from ropeway.models.chat_template import ChatTemplate
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.progress import track
from ropeway.stages.evaluate.passkey import fit_prompt
from ropeway.stages.evaluate.samples import answer_greedily

KEY = "evaluation.long_context.lengths"
_HIDDEN_KEYS, _VALUES, _CHAIN = 4, 3, 4  # things with a code; codes of one thing; variables that share a value
_CODES = "The following text contains access codes among other sentences. Remember all of them."
_COMMON, _RARE_PER_BLOCK, _LEAST_BLOCKS = 3, 6, 2
_VOCABULARY = """
amber azure black bronze copper coral crimson golden green ivory olive purple scarlet silver white

anchor basket candle drum engine flute helmet kettle ladder mirror parcel saddle trunk violin wagon

baker carpenter clerk doctor farmer gardener miller painter pilot sailor student tailor teacher

arrives dreams hesitates hurries laughs lingers listens practices reads rests sings waits whistles works

bridge canal chapel corner field gate harbor market mill orchard school shore square station

acorn apron arrow badge barrel beard blanket bottle branch broom bucket button cabin cactus camel canoe carpet castle
cellar chain chalk cherry clover collar comet cotton cradle curtain dagger dolphin donkey eagle falcon feather fiddle
garden garlic hammer hinge island jacket jungle kitten lantern lemon lizard magnet marble meadow needle nickel onion
oyster paddle pebble pepper pillow puddle rabbit ribbon rocket salmon shovel spider sponge tunnel turtle valley velvet
walnut whistle willow window
"""
_COLORS, _THINGS, _PEOPLE, _ACTS, _PLACES, _WORDS = (part.split() for part in _VOCABULARY.split("\n\n"))


@dataclass(frozen=True, slots=True)
class LongContextQuestion:
    """One question; its text follows from these values."""

    kind: str
    length: int  # tokens of prompt and answer, at most
    repeat: int  # number among questions of the same kind and length
    seed: str


@dataclass(frozen=True, slots=True)
class LongContextAnswer:
    """A question and a model's answer."""

    question: LongContextQuestion
    tokens: int
    text: str

    @property
    def score(self) -> float:
        """The share of the expected items among the first items of the answer, as many as are expected."""
        return compose(self.question).score(self.text)


@dataclass(frozen=True, slots=True)
class Puzzle:
    """The text of a question, and what answers it.

    Attributes:
        write: From a number of units of filler to the text in which to look.
        opening: The start of the answer, which is given.
        item: Regular expression of one item of an answer.
    """

    introduction: str
    write: Callable[[int], str]
    question: str
    opening: str
    expected: tuple[str, ...]
    item: str
    answer_tokens: int  # longest answer; items of a tokenizer with a token per digit fit

    def score(self, answer: str) -> float:
        """Return the share of the expected items among the first different items of an answer."""
        found = dict.fromkeys(item.lower() for item in re.findall(self.item, answer, re.IGNORECASE))
        expected = {item.lower() for item in self.expected}
        return len(expected & set(islice(found, len(expected)))) / len(expected)


def plan_long_context(wanted: LongContext | None, *, seed: int) -> list[LongContextQuestion]:
    """Return all questions, shortest first; a text depends only on seed, kind, length and repeat."""
    if wanted is None:
        return []
    return [
        LongContextQuestion(kind, length, repeat, f"{seed}/long_context/{kind}/{length}/{repeat}")
        for length in sorted(set(wanted.lengths))
        for kind in dict.fromkeys(wanted.kinds)
        for repeat in range(wanted.repeats)
    ]


def compose(question: LongContextQuestion) -> Puzzle:
    """Return the puzzle of a question."""
    return _KINDS[question.kind](Random(question.seed))


def encode_long_context(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, question: LongContextQuestion
) -> list[int]:
    """Return the token ids of the prompt, with as much filler as fits into its length.

    Raises:
        ConfigError: The length is shorter than the question alone.
    """
    puzzle = compose(question)

    def write(fillers: int) -> str:
        return f"{puzzle.introduction}\n\n{puzzle.write(fillers)}\n\n{puzzle.question}"

    return fit_prompt(
        tokenizer,
        template,
        write,
        puzzle.opening,
        length=question.length,
        answer_tokens=puzzle.answer_tokens,
        key=f"{KEY}, kind {question.kind}",
    )


def answer_long_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    questions: Sequence[LongContextQuestion],
    *,
    seed: int,
) -> list[LongContextAnswer]:
    """Return the model's answer to every question.

    Raises:
        ConfigError: A length is shorter than the question alone.
    """
    answers = []
    for question in track(questions, "long-context questions"):
        ids = encode_long_context(tokenizer, template, question)
        text = answer_greedily(model, tokenizer, ids, tokens=compose(question).answer_tokens, seed=seed)
        answers.append(LongContextAnswer(question, len(ids), text))
    return answers


def identify_long_context(questions: Sequence[LongContextQuestion]) -> str:
    """Return a digest of the questions and their wording: reports with equal digests are comparable."""
    return digest_of([[asdict(one), _describe(compose(one))] for one in questions])


def _describe(puzzle: Puzzle) -> list[object]:
    words = [puzzle.introduction, puzzle.write(8), puzzle.question, puzzle.opening, puzzle.item]
    return [*words, list(puzzle.expected), puzzle.answer_tokens]


def report_long_context(answers: Mapping[str, Sequence[LongContextAnswer]]) -> dict[str, dict[str, object]]:
    """Return the long_context section of eval.json: each model's mean score, and its score by kind and length."""
    lines = table_long_context(answers)
    return {
        name: {
            "asked": len(found),
            "score": round(_mean(found), 6),
            "by_kind": {
                kind: {str(line["length"]): line[name] for line in lines if line["kind"] == kind}
                for kind in dict.fromkeys(str(line["kind"]) for line in lines)
            },
        }
        for name, found in answers.items()
    }


def table_long_context(answers: Mapping[str, Sequence[LongContextAnswer]]) -> list[dict[str, object]]:
    """Return one line per kind and length: each model's mean score."""
    groups = dict.fromkeys((one.question.kind, one.question.length) for found in answers.values() for one in found)
    return [
        {"kind": kind, "length": length}
        | {
            name: round(_mean([one for one in found if (one.question.kind, one.question.length) == (kind, length)]), 6)
            for name, found in answers.items()
        }
        for kind, length in sorted(groups)
    ]


def table_long_answers(answers: Mapping[str, Sequence[LongContextAnswer]]) -> Iterator[dict[str, object]]:
    """Yield one line per question and model: what was expected and the answer, wrong ones included."""
    for name, found in answers.items():
        for one in found:
            yield {
                "model": name,
                "kind": one.question.kind,
                "length": one.question.length,
                "repeat": one.question.repeat,
                "tokens": one.tokens,
                "expected": " ".join(compose(one.question).expected),
                "answer": one.text,
                "score": round(one.score, 6),
            }


def _mean(found: Sequence[LongContextAnswer]) -> float:
    return sum(one.score for one in found) / len(found)


def _multi_key(random: Random) -> Puzzle:
    names, codes = _draw_names(random, _HIDDEN_KEYS), _draw_codes(random, _HIDDEN_KEYS)
    places = _draw_places(random, _HIDDEN_KEYS)
    asked = random.randrange(_HIDDEN_KEYS)
    statements = [f"The access code of the {name} is {code}." for name, code in zip(names, codes, strict=True)]
    return Puzzle(
        introduction=_CODES,
        write=_hide(list(zip(places, statements, strict=True)), random.random()),
        question=f"What is the access code of the {names[asked]}?",
        opening=f"The access code of the {names[asked]} is",
        expected=(codes[asked],),
        item=r"\d+",
        answer_tokens=16,
    )


def _multi_value(random: Random) -> Puzzle:
    names, codes = _draw_names(random, 2), _draw_codes(random, 2 * _VALUES)
    owners = names * _VALUES  # as many codes of another thing, which are wrong answers
    random.shuffle(owners)
    places = _draw_places(random, len(owners))
    pairs = list(zip(owners, codes, strict=True))
    statements = [f"One access code of the {name} is {code}." for name, code in pairs]
    return Puzzle(
        introduction=_CODES,
        write=_hide(list(zip(places, statements, strict=True)), random.random()),
        question=f"What are the {_VALUES} access codes of the {names[0]}?",
        opening=f"The {_VALUES} access codes of the {names[0]} are",
        expected=tuple(code for name, code in pairs if name == names[0]),
        item=r"\d+",
        answer_tokens=40,
    )


def _variable_tracking(random: Random) -> Puzzle:
    letters = random.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 2 * _CHAIN)
    names = [f"{letter}{random.randint(10, 99)}" for letter in letters]
    codes = _draw_codes(random, 2)
    statements: list[tuple[float, str]] = []
    for chain, code in ((names[:_CHAIN], codes[0]), (names[_CHAIN:], codes[1])):
        values = [code, *(f"the value of variable {name}" for name in chain[:-1])]
        sentences = [f"Variable {name} is set to {value}." for name, value in zip(chain, values, strict=True)]
        statements += zip(_draw_places(random, _CHAIN), sentences, strict=True)
    return Puzzle(
        introduction="The following text sets variables among other sentences. Keep track of their values.",
        write=_hide(sorted(statements), random.random()),
        question=f"Which {_CHAIN} variables have the value {codes[0]}?",
        opening=f"The {_CHAIN} variables with the value {codes[0]} are",
        expected=tuple(names[:_CHAIN]),
        item=r"\b[A-Z]\d\d\b",
        answer_tokens=40,
    )


def _common_words(random: Random) -> Puzzle:
    words = random.sample(_WORDS, len(_WORDS))
    common, rare = words[:_COMMON], words[_COMMON:]
    seed = random.random()

    def write(blocks: int) -> str:
        order, listed = Random(seed), []
        for block in range(_LEAST_BLOCKS + blocks):
            begin = block * _RARE_PER_BLOCK
            picked = [rare[(begin + number) % len(rare)] for number in range(_RARE_PER_BLOCK)]
            listed += order.sample([*common, *picked], _COMMON + _RARE_PER_BLOCK)
        return " ".join(listed)

    return Puzzle(
        introduction=f"The following list has many words. {_COMMON} of them occur much more often than the others.",
        write=write,
        question=f"Which {_COMMON} words occur most often in the list?",
        opening=f"The {_COMMON} words that occur most often are",
        expected=tuple(common),
        item=rf"\b(?:{'|'.join(_WORDS)})\b",
        answer_tokens=40,
    )


_KINDS: Mapping[str, Callable[[Random], Puzzle]] = {
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}


def _draw_names(random: Random, count: int) -> list[str]:
    pairs = zip(random.sample(_COLORS, count), random.sample(_THINGS, count), strict=True)
    return [f"{color} {thing}" for color, thing in pairs]


def _draw_codes(random: Random, count: int) -> list[str]:
    return [str(code) for code in random.sample(range(10_000, 100_000), count)]


def _draw_places(random: Random, count: int) -> list[float]:
    """Return places in the text, 0 at its start and 1 at its end, in order: one in each of `count` equal parts."""
    return [(number + random.random()) / count for number in range(count)]


def _hide(statements: Sequence[tuple[float, str]], seed: float) -> Callable[[int], str]:
    """Return a function from a number of filler sentences to a text with the statements at their places."""

    def write(fillers: int) -> str:
        filler = _read_filler(Random(seed))
        parts: list[str] = []
        done = 0
        for place, statement in statements:
            before = round(place * fillers)
            parts += [*islice(filler, before - done), statement]
            done = before
        return " ".join([*parts, *islice(filler, fillers - done)])

    return write


def _read_filler(random: Random) -> Iterator[str]:
    while True:
        yield f"The {random.choice(_PEOPLE)} {random.choice(_ACTS)} near the {random.choice(_PLACES)}."
