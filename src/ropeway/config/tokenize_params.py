"""The values of params.yaml that tokenize reads: parts of keys, so that another `fraction` does not rerun it."""

from typing import Literal, Self

from ropeway.config.params import PrepareParams, Profile
from ropeway.config.sections import PersonalKind, Positive, Section


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


class PersonalSearch(Section):
    """Which personal data is looked for, and what is done with it."""

    action: Literal["count", "mask", "refuse"]
    kinds: list[PersonalKind]


class TokenizeParams(Section):
    """The values, named as in params.yaml."""

    special_tokens_in_text: Literal["parse", "escape", "reject"]  # how a special token's string in a text is handled
    history: Literal["refuse", "per_turn"]  # conversations whose earlier turns the template rewrites
    personal_data: PersonalSearch | None  # None if `personal_data.action` is off
    datasets: dict[str, Chunks]  # source -> options
    duplicates: Signatures | None  # None if `duplicates.near` is off
    contamination: WordRuns | None  # None if `contamination.action` is off

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """Return the values of a profile that tokenize reads."""
        personal = profile.personal_data
        return cls.model_validate(
            {
                "special_tokens_in_text": profile.special_tokens_in_text,
                "history": profile.history,
                "personal_data": None if personal.action == "off" else personal.model_dump(),
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
