"""Sample answers in the JSON format of Open-Assistant's sampling reports, which its viewers can read.

Source: Open-Assistant's model_eval/manual (sampling_report.py and config/default.json, July 2023):
`{model_name, date, args, prompts: [{prompt, results: [{sampling_config, sampling_params, outputs}]}]}`.
The prompts use the model's own chat template; Open-Assistant's put the system message after the prompter's turn.
A result whose answers have reasoning or tool calls also has `parts`, one list per output; `outputs` are always whole.

Generation configurations are in the format of their config/default.json: `{default: {generate_args}, configurations:
[{name, generate_args}]}`, each overriding the default. Unlike the original's default, ours has no `min_new_tokens: 5`,
so that short answers such as "No." are shown.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ropeway.models.answer_parts import ParsedAnswer, parse_answer, to_records
from ropeway.models.chat_template import ChatTemplate
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import JinjaTemplate, UnusableConversationError
from ropeway.models.open_model import rope_of
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.progress import track

_RESERVED = ("max_new_tokens", "max_length", "bos_token_id", "eos_token_id", "pad_token_id", "num_return_sequences")
GenerationConfigs = Mapping[str, Mapping[str, object]]
Prompt = str | Conversation
_EXPECTED = 'expected a JSON string, or {"messages": […], "tools": […]}'
_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def parse_prompts(text: str, path: str) -> list[Prompt]:
    """Return the prompts of a file with one JSON value per line; error messages name it `path`.

    A prompt is a string, or an object of `messages` and optionally `tools` in the format of `apply_chat_template`.

    Raises:
        ConfigError: A line is no prompt, or has a key that would be lost, or the file has no prompt.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_read_prompt(parse_json(line)))
        except ValueError as error:  # JSON's own is one, too
            reason = _EXPECTED if isinstance(error, json.JSONDecodeError) else error
            raise ConfigError(f"{path}:{number}: {reason}, found {line[:60]}") from None
    if not prompts:
        raise ConfigError(f"{path}: no prompts; write one JSON string per line")
    return prompts


def _read_prompt(value: object) -> Prompt:
    """Return a prompt; raise ValueError if it is none, or if something in it would be lost."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise ValueError(_EXPECTED)
    if unknown := sorted(set(value) - {"messages", "tools"}):
        raise ValueError(f"unused key {unknown[0]!r} of a prompt")
    for message in value["messages"]:
        _check_message(message)
    if value["messages"][-1]["role"] not in ("user", "tool"):
        raise ValueError("the last message of a prompt is of role user or tool")
    tools = value.get("tools", [])
    if not isinstance(tools, list) or not all(_is_function(tool) for tool in tools):
        raise ValueError('tools are a list of {"type": "function", "function": {"name": …}}')
    return Conversation.from_messages(value["messages"], tools)


def _check_message(message: object) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in _FIELDS:
        raise ValueError(f"a message of a prompt has one of the roles {', '.join(_FIELDS)}")
    if unknown := sorted(set(message) - _FIELDS[role]):
        raise ValueError(f"unused key {unknown[0]!r} of a message of role {role}")
    content, calls = message.get("content"), message.get("tool_calls", [])
    others = [value for key, value in message.items() if key not in ("content", "tool_calls")]
    if not all(isinstance(one, str) for one in others) or not (isinstance(content, str) or (content is None and calls)):
        raise ValueError(f"a message of role {role} has texts")
    if not isinstance(calls, list) or not all(
        _is_function(call) and isinstance(call["function"].get("arguments"), dict) for call in calls
    ):
        raise ValueError('tool_calls are a list of {"type": "function", "function": {"name": …, "arguments": {…}}}')


def _is_function(one: object) -> bool:
    function = one.get("function") if isinstance(one, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def describe_prompt(prompt: Prompt) -> str:
    r"""Return a prompt as pages show it, and by which its answers are found.

    >>> describe_prompt(Conversation(("Hi", "Hello", "Why?"), "Be kind."))
    'system: Be kind.\nuser: Hi\nassistant: Hello\nuser: Why?'
    """
    if isinstance(prompt, str):
        return prompt
    tools = [tool["function"]["name"] for tool in prompt.read_form().get("tools", ())]
    lines = [f"tools: {', '.join(tools)}"] if tools else []
    for message in prompt.to_messages():
        calls = [
            f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
            for call in message.get("tool_calls", ())
        ]
        lines.append(f"{message['role']}: {' '.join(filter(None, (message.get('content'), *calls)))}")
    return "\n".join(lines)


def parse_generation_configs(text: str, path: str) -> GenerationConfigs:
    """Return name -> arguments of transformers' `generate`, with the file's defaults; error messages name it `path`.

    Raises:
        ConfigError: The file has another structure, a duplicate name, or an argument that transformers does not know
            or that params or tokenizer set.
    """
    try:
        stated = parse_json(text)
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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt: the user's turn and the start of the assistant's turn, as in training.

    Raises:
        ConfigError: The template has no place for a part of the prompt.
        DataError: Under the published template the ids do not begin with exactly one BOS.
    """
    end = tokenizer.eos_token
    try:
        asked = (
            template.render_prompt([prompt], end=end)
            if isinstance(prompt, str)
            else template.render_question(prompt, end=end)
        )
    except UnusableConversationError as error:
        shown = describe_prompt(prompt)[:60]
        raise ConfigError(f"the prompt {shown!r} cannot be asked in template {template.name}: {error}") from None
    ids = encode_text(tokenizer, template, asked)
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
    """Return the text that the model generates after `ids`, up to any of its end tokens, without special tokens."""
    text: str = tokenizer.decode(generate_ids(model, tokenizer, ids, params, seed=seed), skip_special_tokens=True)
    return text


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    params: Mapping[str, object],
    *,
    seed: int,
) -> list[int]:
    """Return the tokens that the model generates after `ids`, up to and including any of its end tokens.

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
    said: list[int] = out[0, len(ids) :].tolist()
    return said


def answer_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, tokens: int, seed: int
) -> str:
    """Return the most probable answer after `ids`, of at most `tokens` tokens."""
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens}
    return generate_answer(model, tokenizer, ids, greedy, seed=seed)


def plan_samples(prompts: Sequence[Prompt], configurations: GenerationConfigs) -> list[tuple[Prompt, str]]:
    """Return (prompt, configuration) of every sample, prompt by prompt."""
    return [(prompt, name) for prompt in prompts for name in configurations]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    samples: Sequence[tuple[Prompt, str]],
    configurations: GenerationConfigs,
    *,
    seed: int,
) -> list[ParsedAnswer]:
    """Return an answer for each (prompt, configuration).

    Prompts are not batched: that would need left padding, which training does not have. Each answer has its own seed,
    so that a new prompt or configuration changes no other answer, and base and tuned model use the same seeds.
    """
    ends, answers = stop_ids(model, tokenizer), []
    for prompt, name in track(samples, "sample answers"):
        ids = encode_prompt(tokenizer, template, prompt)
        own_seed = derive_seed(seed, name, describe_prompt(prompt))
        said = generate_ids(model, tokenizer, ids, configurations[name], seed=own_seed)
        asked = str(tokenizer.decode(ids, skip_special_tokens=False))
        answers.append(parse_answer(tokenizer, said, prompt=asked, ends=ends))
    return answers


def derive_seed(seed: int, *names: str) -> int:
    """Return a 63-bit seed derived from the run's seed and the names, the same in every process."""
    digest = hashlib.sha256("/".join((str(seed), "samples", *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def report_samples(
    name: str,
    prompts: Sequence[Prompt],
    configurations: GenerationConfigs,
    answers: Mapping[str, Sequence[ParsedAnswer]],
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
                **_report_answer(answers[model][number * size + at]),
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
        "prompts": [
            {"prompt": describe_prompt(prompt), "results": found}
            for prompt, found in zip(prompts, results, strict=True)
        ],
    }


def _report_answer(answer: ParsedAnswer) -> dict[str, object]:
    """Return the keys of a result that hold its answer; `parts` only if there is something besides text."""
    return {"outputs": [answer.text]} | ({"parts": [to_records(answer.parts)]} if answer.has_parts else {})
