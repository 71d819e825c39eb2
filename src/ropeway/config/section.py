"""What every part of params.yaml is made of: a closed model, and the numbers that have bounds."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A closed part of params.yaml: no late writes, no silent casts, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())
