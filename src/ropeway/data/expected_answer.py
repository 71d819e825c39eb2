"""What a package's model answers to a question of its probe; a serving engine is compared with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_TOKENS = 32  # of an answer
TOP = 5  # first tokens whose log-probabilities are compared


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
