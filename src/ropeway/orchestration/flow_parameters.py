"""Check what an API client sends as parameters of a flow run, before the flow does anything with it.

The flows `retrain` and `review` take their parameters as they come (`validate_parameters=False`), and the server checks
them only where a deployment says so. Text ends in names of runs, logs, pages and messages.
"""

from pathlib import Path

from ropeway.runtime.errors import ConfigError

MAX_CHARACTERS = 2000  # of a parameter; a path has 4,096 bytes at most, a reference 130
MAX_HOURS = 8760.0  # of a review: one year
MAX_TRIGGER = 20_000  # characters; a line per changed source
_SHOWN = 60


def read_text(name: str, value: object, *, is_empty_allowed: bool = False, most: int = MAX_CHARACTERS) -> str:
    """Return a parameter's text.

    Raises:
        ConfigError: It is not a text of printable characters, is empty, or is too long.
    """
    is_text = isinstance(value, str) and len(value) <= most and value.isprintable()
    if isinstance(value, str) and is_text and (value.strip() or is_empty_allowed):
        return value
    raise _refuse(name, value, f"expected a text of 1 to {most:,} printable characters")


def read_root(value: object) -> Path:
    """Return the folder of a workspace; raise ConfigError if the parameter `root` names none."""
    path = Path(read_text("root", value))
    try:
        found = path.resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long; links in a circle
        raise _refuse("root", value, f"expected a folder ({type(error).__name__})") from None
    if not is_folder:
        raise _refuse("root", value, "expected a folder of the machine that runs this flow")
    return found


def read_profile(value: object) -> str | None:
    """Return the parameter `profile`; None for the profile that params.yaml selects."""
    return None if value is None else read_text("profile", value)


def read_switch(name: str, value: object) -> bool:
    """Return a parameter that is true or false; raise ConfigError for anything else, also for the text "false"."""
    if not isinstance(value, bool):
        raise _refuse(name, value, "expected true or false")
    return value


def read_hours(name: str, value: object) -> float:
    """Return a parameter of hours; raise ConfigError unless it is a number above 0 and up to a year."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_HOURS:
        raise _refuse(name, value, f"expected a number of hours above 0, {MAX_HOURS:g} at most")
    return float(value)


def _refuse(name: str, value: object, why: str) -> ConfigError:
    shown = ascii(value if not isinstance(value, str) else value[:_SHOWN])[:_SHOWN] if _is_plain(value) else "a value"
    return ConfigError(f"parameter {name}: {why}, found {type(value).__name__} {shown}; correct it and start a new run")


def _is_plain(value: object) -> bool:
    """Return whether a value may be shown: a large or nested one takes time, a long integer cannot be written."""
    return value is None or isinstance(value, bool | float | str)
