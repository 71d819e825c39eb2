"""Text that spells a special token stays text: the same tokenizer, its special tokens under names no text has."""

import json
import re
from typing import NotRequired, TypedDict

from tokenizers import Tokenizer

from ropeway.models.chat_template import ChatTemplate
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError

# Noncharacters around the id: Unicode keeps them for a program's own use, so they are in no text meant for exchange.
OWN_MARK = re.compile("\ufdd0[0-9]+\ufdd1")
_SLOT = "\x00([0-9]+)\x00"


class Escape:
    """Encodes with the tokenizer's own pipeline; of special tokens, only the template's and BOS come out.

    The renamed tokens keep their ids and flags, so pieces between them are cut and normalized as before (a Llama
    tokenizer's "▁" after a special token included); their old names are in neither the added tokens nor the
    vocabulary, so no text can give them. Two other ways fail: encoding pieces by themselves gives each the space that
    some tokenizers put in front of the first only, and `encode_special_tokens` leaves the vocabulary's entry.

    Attributes:
        tokenizer: The renamed copy.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Make the copy.

        Raises:
            ConfigError: The copy does not give a special token's id for its new name, or not only for it.
        """
        self._template = template
        state = json.loads(tokenizer.to_str())
        special = [token for token in state["added_tokens"] if token["special"]]
        self._names = {str(token["content"]): f"\ufdd0{token['id']}\ufdd1" for token in special}
        for token in special:
            token["content"] = self._names[token["content"]]
        _rename_vocabulary(state["model"], self._names)
        self.tokenizer = Tokenizer.from_str(json.dumps(state))
        for old, new in self._names.items():
            self._check_name(old, new, tokenizer.token_to_id(old))
        alternatives = "|".join(map(re.escape, sorted(self._names, key=len, reverse=True)))
        self._frame = re.compile(f"{_SLOT}|({alternatives})")

    def _check_name(self, old: str, new: str, number: int | None) -> None:
        """Raise ConfigError unless only the new name gives the id; a normalizer may take the marks off its digits."""
        own, *others = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (new, old, new[1:-1]))
        if own != [number] or any(number in ids for ids in others):
            raise ConfigError(
                f"special_tokens_in_text: escape: this tokenizer cannot tell its {old!r} from text; use reject or parse"
            )

    def render(self, conversation: Conversation, *, end: str) -> str:
        """Return the template's rendering with the template's tokens renamed and the texts as they are."""
        texts = (*conversation.turns, conversation.system)
        slots = [f"\x00{number}\x00" for number in range(len(texts))]
        frame = self._template.render(
            Conversation(tuple(slots[:-1]), slots[-1] if conversation.system else ""), end=end
        )
        return self._frame.sub(lambda hit: texts[int(hit[1])] if hit[1] else self._names[hit[2]], frame)


class _Model(TypedDict):
    vocab: dict[str, int] | list[tuple[str, float]]
    unk_token: NotRequired[str | None]


def _rename_vocabulary(model: _Model, names: dict[str, str]) -> None:
    """Rename special tokens in the model's vocabulary: a mapping, or pairs of piece and score in a Unigram model."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(piece, piece), score) for piece, score in model["vocab"]]
    unknown = model.get("unk_token")
    if unknown in names:
        model["unk_token"] = names[unknown]
