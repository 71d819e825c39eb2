"""Encode a special token's string in a text as ordinary tokens, by renaming the tokenizer's special tokens."""

import json
import re
from typing import NotRequired, TypedDict

from tokenizers import Tokenizer

from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import Rendered
from ropeway.runtime.errors import ConfigError

# Noncharacters around the id: Unicode reserves them for internal use, so text meant for interchange has none.
ESCAPE_MARKER = re.compile("\ufdd0[0-9]+\ufdd1")
_SLOT = "\x00([0-9]+)\x00"


class Escape:
    """Encodes texts so that the only special tokens in the output are BOS and those of the chat template.

    The renamed tokens keep their ids and flags, so the text between them is split and normalized as before (including
    a Llama tokenizer's "▁" after a special token). Their original names are in neither the added tokens nor the
    vocabulary, so no text can produce them. Two alternatives fail: encoding the texts separately adds to each the
    leading space that some tokenizers add to the first text only, and `encode_special_tokens` keeps the vocabulary's
    entry.

    Attributes:
        tokenizer: The copy with renamed special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer and rename its special tokens.

        Raises:
            ConfigError: In the copy, a special token's id does not come from exactly its new name.
        """
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
        self._special = re.compile(alternatives or r"(?!)")

    def _check_name(self, old: str, new: str, number: int | None) -> None:
        """Raise ConfigError unless only the new name encodes to the id; a normalizer may strip the noncharacters."""
        own, *others = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (new, old, new[1:-1]))
        if own != [number] or any(number in ids for ids in others):
            raise ConfigError(
                f"special_tokens_in_text: escape: this tokenizer cannot distinguish {old!r} from text; "
                "use reject or parse"
            )

    def render(self, conversation: Conversation, *, end: str) -> str:
        """Return a conversation in the published template with its special tokens renamed and the texts unchanged."""
        texts = (*conversation.turns, conversation.system)
        slots = [f"\x00{number}\x00" for number in range(len(texts))]
        frame = OPEN_ASSISTANT.render(
            Conversation(tuple(slots[:-1]), slots[-1] if conversation.system else ""), end=end
        )
        return self._frame.sub(lambda hit: texts[int(hit[1])] if hit[1] else self._names[hit[2]], frame)

    def rename(self, rendered: Rendered) -> Rendered:
        """Return a rendered conversation with the special tokens outside of its slots renamed."""
        text, slots = rendered.text, rendered.slots or ()
        parts: list[str] = []
        moved: list[tuple[int, int]] = []  # (where a renamed token ends, characters added so far)
        done = added = 0
        for begin, end in zip(
            (0, *(slot[1] for slot in slots)), (*(slot[0] for slot in slots), len(text)), strict=True
        ):
            for hit in self._special.finditer(text, begin, end):
                new = self._names[hit[0]]
                parts += [text[done : hit.start()], new]
                done, added = hit.end(), added + len(new) - len(hit[0])
                moved.append((done, added))

        def move(place: int) -> int:
            return place + next((by for at, by in reversed(moved) if at <= place), 0)

        return Rendered(
            "".join([*parts, text[done:]]), tuple((move(begin), move(end)) for begin, end in rendered.answers)
        )


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
