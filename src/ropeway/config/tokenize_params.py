"""What tokenize reads of params.yaml: single values of some keys, so a changed fraction or threshold is none of its."""

from typing import Literal, Self

from ropeway.config.params import Positive, PrepareParams, Profile, Section


class Chunks(Section):
    """Of one source's options."""

    max_chunk_size: Positive | None


class Signatures(Section):
    """What near duplicates are found by."""

    ngram: Positive
    permutations: Positive


class WordRuns(Section):
    """What contamination is found by."""

    ngram: Positive


class TokenizeParams(Section):
    """The values, under the names that params.yaml gives them."""

    special_tokens_in_text: Literal["parse", "escape", "reject"]  # what becomes of a special token's string in a text
    datasets: dict[str, Chunks]  # by source
    duplicates: Signatures | None  # none where `duplicates.near` is off
    contamination: WordRuns | None  # none where `contamination.action` is off

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """Return what tokenize reads of a profile."""
        return cls.model_validate(
            {"special_tokens_in_text": profile.special_tokens_in_text, **values_shared_with_prepare(profile)}
        )


def values_shared_with_prepare(profile: PrepareParams) -> dict[str, object]:
    """Return all values but the first: prepare compares them with what tokens were made by."""
    repeats, runs = profile.duplicates, profile.contamination
    near = {"ngram": repeats.ngram, "permutations": repeats.permutations}
    return {
        "datasets": {name: {"max_chunk_size": options.max_chunk_size} for name, options in profile.mixture},
        "duplicates": None if repeats.near == "off" else near,
        "contamination": None if runs.action == "off" else {"ngram": runs.ngram},
    }
