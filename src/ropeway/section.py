"""What every part of params.yaml is made of: a closed model, and the numbers that have bounds."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Of a profile, hence of its folder, its model in the registry and its address there.
PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A closed part of params.yaml: no late writes, no silent casts, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())
