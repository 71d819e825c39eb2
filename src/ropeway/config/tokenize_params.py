"""The values of params.yaml that tokenize reads: parts of keys, so that another `fraction` does not rerun it."""

from typing import Literal, Self

from ropeway.config.params import PrepareParams, Profile
from ropeway.config.sections import Positive, Section


class Chunks(Section):
    """The options of one source that tokenize reads."""

    max_chunk_size: Positive | None


class Signatures(Section):
    """Settings of the MinHash signatures that detect near duplicates."""

    ngram: Positive
    permutations: Positive


class WordRuns(Section):
    """Settings of the n-grams that detect contamination."""

    ngram: Positive


class TokenizeParams(Section):
    """The values, named as in params.yaml."""

    special_tokens_in_text: Literal["parse", "escape", "reject"]  # how a special token's string in a text is handled
    history: Literal["refuse", "per_turn"]  # conversations whose earlier turns the template rewrites
    datasets: dict[str, Chunks]  # source -> options
    duplicates: Signatures | None  # None if `duplicates.near` is off
    contamination: WordRuns | None  # None if `contamination.action` is off

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """Return the values of a profile that tokenize reads."""
        return cls.model_validate(
            {
                "special_tokens_in_text": profile.special_tokens_in_text,
                "history": profile.history,
                **values_shared_with_prepare(profile),
            }
        )


def values_shared_with_prepare(profile: PrepareParams) -> dict[str, object]:
    """Return all values except how texts are encoded; prepare compares them with those the tokens were made with."""
    repeats, runs = profile.duplicates, profile.contamination
    near = {"ngram": repeats.ngram, "permutations": repeats.permutations}
    return {
        "datasets": {name: {"max_chunk_size": options.max_chunk_size} for name, options in profile.mixture},
        "duplicates": None if repeats.near == "off" else near,
        "contamination": None if runs.action == "off" else {"ngram": runs.ngram},
    }
