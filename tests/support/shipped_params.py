"""The shipped params.yaml with a profile selected, so that no test depends on which one ships as default."""

from pathlib import Path

from ropeway.config.edit import select_profile

SHIPPED = Path(__file__).parents[2] / "params.yaml"


def read_shipped_params(profile: str = "laptop") -> str:
    """Return the text of the shipped params.yaml with this profile selected."""
    return select_profile(SHIPPED, SHIPPED.read_text(encoding="utf-8"), profile)
