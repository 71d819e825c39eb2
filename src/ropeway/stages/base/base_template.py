"""Choose the chat template of a run, and prove on the base's tokenizer that it can be trained with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from typing_extensions import TypedDict

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import BaseParams
from ropeway.config.sections import PUBLISHED_TEMPLATE
from ropeway.models.chat_template import OPEN_ASSISTANT, ChatTemplate
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import DATE, JinjaTemplate, UnusableConversationError
from ropeway.runtime.errors import ConfigError

_NAME = re.compile(r"\w+_token\b")


@dataclass(frozen=True, slots=True)
class BaseTokenizer:
    """The base's tokenizer and what its files say about it.

    Attributes:
        names: `unk`, `bos`, `eos`, `pad` -> text, as far as it has them.
        additional: Its further special tokens.
        templates: Its own chat templates by name.
        other_names: Names of tokens that its files define besides these, e.g. `sep_token`.
        response_template: How transformers parses its answers, if it states that.
    """

    tokenizer: Tokenizer
    names: Mapping[str, str]
    additional: tuple[str, ...] = field(default=())
    templates: Mapping[str, str] = field(default_factory=dict)
    other_names: frozenset[str] = frozenset()
    response_template: Mapping[str, Any] | None = None

    @property
    def template(self) -> str | None:
        """The chat template for every conversation: `default`, or the only one; None if it has none."""
        only = next(iter(self.templates.values())) if len(self.templates) == 1 else None
        return self.templates.get("default", only)

    def in_jinja(self, text: str, *, name: str) -> JinjaTemplate:
        """Return a template that this tokenizer is used with; padding is EOS where it has none of its own."""
        special = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        return JinjaTemplate(text, {"pad": self.names.get("eos", "")} | dict(self.names), special, name=name)


class TemplateFacts(TypedDict):
    """What the base's manifest says about the template."""

    name: str  # as in params.yaml
    replaces_own: bool  # the base's own template is not used
    not_kept: list[str]  # names of other templates of the base, e.g. `tool_use`
    generation_prompt: str
    end: str  # the special token that ends an answer
    rewrites_history: bool  # earlier turns are rendered differently once later ones follow
    date: str | None  # written instead of today's date; None: the template writes no date


def choose_template(profile: BaseParams, root: Path, opened: BaseTokenizer) -> ChatTemplate:
    """Return the template that `template` of params.yaml names.

    Raises:
        ConfigError: The base has no template of its own.
    """
    if profile.template == PUBLISHED_TEMPLATE:
        return OPEN_ASSISTANT
    text = opened.template
    if profile.template != "base":
        text = FrozenInputs.load(root).text("template", profile.template)
    if text is None:
        named = f"several and none named default ({', '.join(opened.templates)})" if opened.templates else "none"
        raise ConfigError(
            f"template: base: expected a chat template of {profile.model_name} (chat_template.jinja, or the key in "
            f"tokenizer_config.json), found {named}; set template: open_assistant, or name a Jinja file of your own"
        )
    if text in (OPEN_ASSISTANT.jinja, OPEN_ASSISTANT.plain_jinja):
        return OPEN_ASSISTANT
    return opened.in_jinja(text, name=profile.template)


def prove_template(template: ChatTemplate, opened: BaseTokenizer, *, name: str) -> TemplateFacts:
    """Return what is known about a template after it rendered short conversations as inference would.

    Raises:
        ConfigError: It cannot render a question and an answer, its generation prompt is not what its answers begin
            with, it ends an answer without a special token, or it writes BOS twice.
    """
    end, rewrites, date = opened.names.get("eos", ""), False, None
    if not isinstance(template, JinjaTemplate):
        prompt = template.generation_prompt
    else:
        try:
            rendered = template.sequences(Conversation(("Hi", "Hello")), per_turn=True)
            end = template.end_token()
            prompt = template.generation_prompt
            date = DATE.date().isoformat() if template.depends_on_date else None
        except UnusableConversationError as error:
            raise ConfigError(
                f"template: {name}: it cannot be trained with: {error}. Set template: open_assistant, or name a Jinja "
                "file in which every answer follows the generation prompt and ends with a special token"
            ) from None
        bos = opened.names.get("bos")
        if bos and rendered[0].text.startswith(bos * 2):
            raise ConfigError(f"template: {name}: it begins a conversation with two {bos}; remove one")
        if (
            opened.tokenizer.token_to_id(end)
            not in opened.tokenizer.encode(rendered[0].text, add_special_tokens=False).ids
        ):
            raise ConfigError(
                f"template: {name}: the tokenizer does not read {end}, which ends an answer, as one token"
            )
        if lost := sorted(opened.other_names & set(_NAME.findall(template.jinja))):
            raise ConfigError(
                f"template: {name}: it writes {', '.join(lost)}, a token that is not kept by that name; write the "
                "token itself in a Jinja file of your own"
            )
        rewrites = _rewrites_history(template)
    return {
        "name": name,
        "replaces_own": opened.template not in (None, template.jinja, template.plain_jinja),
        "not_kept": sorted(
            one for one, text in opened.templates.items() if text not in (template.jinja, opened.template)
        ),
        "generation_prompt": prompt,
        "end": end,
        "rewrites_history": rewrites,
        "date": date,
    }


def find_replaced_template(template: ChatTemplate, opened: BaseTokenizer) -> str | None:
    """Return the base's own template if the run replaces it and it can ask questions. Evaluation then asks in it."""
    if opened.template is None or opened.template in (template.jinja, template.plain_jinja):
        return None
    try:
        opened.in_jinja(opened.template, name="its own").end_token()
    except UnusableConversationError as error:
        print(f"the base's own chat template cannot ask it ({error}); evaluation asks it in the run's template")
        return None
    return opened.template


def _rewrites_history(template: JinjaTemplate) -> bool:
    try:
        template.sequences(Conversation(("Hi", "Hello", "Why?", "So.")), per_turn=False)
    except UnusableConversationError:
        return True
    return False


def describe_template(facts: TemplateFacts) -> str:
    """Return the log lines about the template."""
    lines = [f"template {facts['name']}: answers follow {facts['generation_prompt']!r} and end with {facts['end']!r}"]
    if facts["replaces_own"]:
        lines.append("the base's own chat template is replaced; `template: base` keeps it")
    if facts["not_kept"]:
        lines.append(f"the base's other chat templates are not kept: {', '.join(facts['not_kept'])}")
    if facts["rewrites_history"]:
        lines.append("the template renders earlier turns differently once later ones follow; see `history`")
    if facts["date"]:
        lines.append(f"the template writes today's date; data and prompts have {facts['date']}")
    return "\n".join(lines)
