"""Sample answers in the JSON format of the published family, so that its viewers read ours.

Source: Open-Assistant's model_eval/manual (sampling_report.py and config/default.json, July 2023):
`{model_name, date, args, prompts: [{prompt, results: [{sampling_config, sampling_params, outputs}]}]}`.
The prompts go through this model's own template; theirs put the system message behind the prompter.

Generation configurations are in the format of their config/default.json: `{default: {generate_args}, configurations:
[{name, generate_args}]}`, each laid over the default. Of the original's default ours leaves out `min_new_tokens: 5`: a
model that answers "No." and stops is to be seen doing so.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ropeway.models.chat_template import ChatTemplate
from ropeway.models.open_model import rope_of
from ropeway.runtime.errors import ConfigError, DataError

_OURS = ("max_new_tokens", "max_length", "bos_token_id", "eos_token_id", "pad_token_id", "num_return_sequences")
Configurations = Mapping[str, Mapping[str, object]]


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, prompt: str) -> list[int]:
    """Return the ids a model is asked to continue: BOS once, the prompt, an open assistant turn.

    Raises:
        DataError: The tokenizer has a BOS and does not put exactly one in front, as it did in training.
    """
    ids: list[int] = tokenizer(template.render_prompt([prompt], end=tokenizer.eos_token))["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and (ids[0] != bos or ids.count(bos) != 1):
        raise DataError(
            f"{tokenizer.name_or_path}: expected one BOS (id {bos}) in front of a prompt, found ids {ids[:4]}… with "
            f"{ids.count(bos)} of them. Run `dvc repro base`"
        )
    return ids


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    params: Mapping[str, object],
    *,
    seed: int,
) -> str:
    """Return what the model continues `ids` with, up to its end token.

    transformers draws from torch's global generator and takes no other, so that one is borrowed and given back.
    """
    prompt = torch.tensor([list(ids)], device=model.device)
    # Else transformers fills what `params` leave open from the folder's own generation settings.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        **params,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Own frequencies: under dynamic scaling a longer text before would have changed them.
    with rope_of(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        # One row, nothing padded: the mask is all ones, and saying so keeps transformers from guessing by pad id = eos.
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text


def plan_draws(prompts: Sequence[str], configurations: Configurations) -> list[tuple[str, str]]:
    """Return (prompt, configuration) of every answer, prompt by prompt."""
    return [(prompt, name) for prompt in prompts for name in configurations]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    draws: Sequence[tuple[str, str]],
    configurations: Configurations,
    *,
    seed: int,
) -> list[str]:
    """Return an answer for each (prompt, configuration).

    Prompts go one by one: batched they would need left padding, which training never saw. Each answer has its own
    seed, so that a new prompt or configuration changes no other answer, and base and tuned draw alike.
    """
    return [
        answer(
            model,
            tokenizer,
            encode_prompt(tokenizer, template, prompt),
            configurations[name],
            seed=derive_seed(seed, name, prompt),
        )
        for prompt, name in draws
    ]


def derive_seed(seed: int, *names: str) -> int:
    """Return a 63-bit seed of the run's seed and names, whatever the process and its string hashing."""
    digest = hashlib.sha256("/".join((str(seed), "samples", *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def report_samples(
    name: str,
    prompts: Sequence[str],
    configurations: Configurations,
    answers: Mapping[str, Sequence[str]],
    args: Mapping[str, object],
) -> dict[str, object]:
    """Return samples.json: one report in which each model x configuration is a `sampling_config` of its own.

    That way the family's viewers show base and tuned side by side. `date` is there and empty: viewers want a text, but
    the day on which answers were drawn is no property of the model and would make every run's bytes differ. `answers`
    are by model, as `plan_draws` asks for them; `args` is what else decides them.
    """
    size = len(configurations)
    results = [
        [
            {
                "sampling_config": f"{model}/{config}",
                "sampling_params": dict(params),
                "outputs": [answers[model][number * size + at]],
            }
            for model in answers
            for at, (config, params) in enumerate(configurations.items())
        ]
        for number in range(len(prompts))
    ]
    return {
        "model_name": name,
        "date": "",
        "args": dict(args),
        "prompts": [{"prompt": prompt, "results": found} for prompt, found in zip(prompts, results, strict=True)],
    }
