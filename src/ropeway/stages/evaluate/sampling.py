"""The files that name what is asked and how answers are drawn: prompts, and generation configurations.

Source of the second's format, names and values: Open-Assistant's model_eval/manual/config/default.json (July 2023):
`{default: {generate_args}, configurations: [{name, generate_args}]}`, each laid over the default. Of the original's
default ours leaves out `min_new_tokens: 5`: a model that answers "No." and stops is to be seen doing so.
"""

import json
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ropeway.runtime.errors import ConfigError

_OURS = ("max_new_tokens", "max_length", "bos_token_id", "eos_token_id", "pad_token_id", "num_return_sequences")
Configurations = Mapping[str, Mapping[str, Any]]


def parse_prompts(text: str, path: str) -> list[str]:
    """Return the prompts of a file with one JSON string per line; `path` names it in messages.

    Raises:
        ConfigError: A line that is not a JSON string, or no prompt at all.
    """
    prompts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)
        except ValueError:
            prompt = None
        if not isinstance(prompt, str):
            raise ConfigError(f"{path}, line {number}: expected a JSON string, found {line[:60]}")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: no prompt in it; one JSON string per line")
    return prompts


def parse_configurations(text: str, path: str) -> Configurations:
    """Return name -> arguments of transformers' `generate`, the file's default laid under each; `path` names it.

    Raises:
        ConfigError: Not of this form, a name twice, or an argument that transformers does not know or that another
            place decides.
    """
    try:
        stated = json.loads(text)
        default = dict(stated["default"]["generate_args"])
        named = [(str(one["name"]), {**default, **one["generate_args"]}) for one in stated["configurations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected {{default: {{generate_args}}, configurations: [{{name, generate_args}}]}}, found: "
            f"{type(error).__name__}: {error}"
        ) from None
    names = [name for name, _ in named]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"{path}: expected configurations of different names, found {', '.join(names) or 'none'}")
    known = {name for name in vars(GenerationConfig()) if name[0] != "_"} - set(_OURS)
    for name, arguments in named:
        if unknown := sorted(set(arguments) - known):
            decided = "decided elsewhere (params, the tokenizer)" if unknown[0] in _OURS else "unknown to transformers"
            raise ConfigError(f"{path}, {name}: generate_args: {unknown[0]} is {decided}")
    return dict(named)
