"""The sections of params.yaml on what data repeats: duplicates and contamination."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ropeway.config.section import Positive, Section


class Duplicates(Section):
    """Records that say what an earlier one said. What is removed is in neither train nor validation."""

    exact: Literal["count", "remove"]
    near: Literal["off", "count", "remove"]
    threshold: Annotated[float, Field(gt=0, le=1)]  # Jaccard similarity of two sets of n-grams of words
    permutations: Annotated[int, Field(gt=0, le=1024)]  # of the MinHash signature, 4 bytes each a record
    ngram: Positive

    @model_validator(mode="after")
    def _near_is_removed_with_exact(self) -> Self:
        if self.near == "remove" and self.exact == "count":
            raise ValueError(
                "near is remove and exact count: copies would stay and what is only like them go; set exact to remove"
            )
        return self


class Contamination(Section):
    """Training sequences that share a run of `ngram` words with a validation sequence, or with a prompt in a file."""

    ngram: Positive
    action: Literal["off", "count", "remove"]
    prompts: list[str]
