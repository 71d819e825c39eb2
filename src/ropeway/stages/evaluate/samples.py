"""Sample answers in the JSON format of Open-Assistant's sampling reports, which its viewers can read.

Source: Open-Assistant's model_eval/manual (sampling_report.py and config/default.json, July 2023):
`{model_name, date, args, prompts: [{prompt, results: [{sampling_config, sampling_params, outputs}]}]}`.
The prompts use the model's own chat template; Open-Assistant's put the system message after the prompter's turn.

Generation configurations are in the format of their config/default.json: `{default: {generate_args}, configurations:
[{name, generate_args}]}`, each overriding the default. Unlike the original's default, ours has no `min_new_tokens: 5`,
so that short answers such as "No." are shown.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ropeway.models.chat_template import ChatTemplate
from ropeway.models.jinja_template import JinjaTemplate
from ropeway.models.open_model import rope_of
from ropeway.runtime.errors import ConfigError, DataError

_RESERVED = ("max_new_tokens", "max_length", "bos_token_id", "eos_token_id", "pad_token_id", "num_return_sequences")
GenerationConfigs = Mapping[str, Mapping[str, object]]


def parse_prompts(text: str, path: str) -> list[str]:
    """Return the prompts of a file with one JSON string per line; error messages name it `path`.

    Raises:
        ConfigError: A line is not a JSON string, or the file has no prompt.
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
            raise ConfigError(f"{path}:{number}: expected a JSON string, found {line[:60]}")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path}: no prompts; write one JSON string per line")
    return prompts


def parse_generation_configs(text: str, path: str) -> GenerationConfigs:
    """Return name -> arguments of transformers' `generate`, with the file's defaults; error messages name it `path`.

    Raises:
        ConfigError: The file has another structure, a duplicate name, or an argument that transformers does not know
            or that params or tokenizer set.
    """
    try:
        stated = json.loads(text)
        default = dict(stated["default"]["generate_args"])
        named = [(str(one["name"]), {**default, **one["generate_args"]}) for one in stated["configurations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected {{default: {{generate_args}}, configurations: [{{name, generate_args}}]}}, found "
            f"{type(error).__name__}: {error}"
        ) from None
    names = [name for name, _ in named]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f"{path}: expected configurations with unique names, found {', '.join(names) or '0 configurations'}"
        )
    known = {name for name in vars(GenerationConfig()) if name[0] != "_"} - set(_RESERVED)
    for name, arguments in named:
        if unknown := sorted(set(arguments) - known):
            problem = (
                "set by params.yaml or the tokenizer; remove it"
                if unknown[0] in _RESERVED
                else "unknown to transformers"
            )
            raise ConfigError(f"{path}, {name}: generate_args: {unknown[0]} is {problem}")
    return dict(named)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, prompt: str) -> list[int]:
    """Return the token ids of a prompt: the user's turn and the start of the assistant's turn, as in training.

    Raises:
        DataError: Under the published template the ids do not begin with exactly one BOS.
    """
    ids = encode_text(tokenizer, template, template.render_prompt([prompt], end=tokenizer.eos_token))
    bos = tokenizer.bos_token_id
    if template.tokenizer_adds_bos and bos is not None and (ids[0] != bos or ids.count(bos) != 1):
        raise DataError(
            f"{tokenizer.name_or_path}: expected one BOS (id {bos}) at the start of a prompt, found {ids.count(bos)} "
            f"in ids {ids[:4]}…. Run `dvc repro base`"
        )
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, text: str) -> list[int]:
    """Return the token ids of a rendered text, as in training: some templates write BOS themselves."""
    ids: list[int] = tokenizer(text, add_special_tokens=template.tokenizer_adds_bos, verbose=False)["input_ids"]
    return ids


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None
) -> list[int]:
    """Return the ids of all tokens that end an answer: the model's own, the tokenizer's and the template's."""
    stated = model.config.eos_token_id
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if isinstance(template, JinjaTemplate):
        ends = [*ends, tokenizer.convert_tokens_to_ids(template.end_token())]
    return list(dict.fromkeys([*ends, tokenizer.eos_token_id]))


def generate_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    params: Mapping[str, object],
    *,
    seed: int,
) -> str:
    """Return the text that the model generates after `ids`, up to any of its end tokens.

    transformers samples only from torch's global random generator, whose state is restored afterwards.
    """
    prompt = torch.tensor([list(ids)], device=model.device)
    # Otherwise transformers takes arguments that `params` do not have from the folder's generation_config.json.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        **params,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    # rope_of: under dynamic scaling an earlier, longer text has changed the frequencies.
    with rope_of(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        # Without a mask transformers would infer padding from the pad id, which may be that of eos.
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    text: str = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    return text


def answer_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, tokens: int, seed: int
) -> str:
    """Return the most probable answer after `ids`, of at most `tokens` tokens."""
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens}
    return generate_answer(model, tokenizer, ids, greedy, seed=seed)


def plan_samples(prompts: Sequence[str], configurations: GenerationConfigs) -> list[tuple[str, str]]:
    """Return (prompt, configuration) of every sample, prompt by prompt."""
    return [(prompt, name) for prompt in prompts for name in configurations]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    samples: Sequence[tuple[str, str]],
    configurations: GenerationConfigs,
    *,
    seed: int,
) -> list[str]:
    """Return an answer for each (prompt, configuration).

    Prompts are not batched: that would need left padding, which training does not have. Each answer has its own seed,
    so that a new prompt or configuration changes no other answer, and base and tuned model use the same seeds.
    """
    return [
        generate_answer(
            model,
            tokenizer,
            encode_prompt(tokenizer, template, prompt),
            configurations[name],
            seed=derive_seed(seed, name, prompt),
        )
        for prompt, name in samples
    ]


def derive_seed(seed: int, *names: str) -> int:
    """Return a 63-bit seed derived from the run's seed and the names, the same in every process."""
    digest = hashlib.sha256("/".join((str(seed), "samples", *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def report_samples(
    name: str,
    prompts: Sequence[str],
    configurations: GenerationConfigs,
    answers: Mapping[str, Sequence[str]],
    args: Mapping[str, object],
) -> dict[str, object]:
    """Return samples.json: one report in which each model x configuration is a `sampling_config`.

    Open-Assistant's viewers then show base and tuned model side by side. `date` is an empty string: viewers need the
    key, but a date would make the file differ between identical runs. `answers`: model -> answers in the order of
    `plan_samples`; `args`: the other settings that determine the answers.
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
