r"""Find personal data and secrets in texts, by form and checksum: no model, no dictionary, no network.

A kind is found by something that few texts have: an `@`, a `+`, a run of digits, the prefix that the issuer of a token
states. So a text without them costs a few passes of C code. Names, addresses and national numbers have no such form and
are not found. `docs/decisions/0028-whose-text.md` has the choice and the measured speeds.
"""

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address
from itertools import accumulate

from ropeway.config.sections import PersonalKind
from ropeway.data.raw_records import Record, iterate_texts
from ropeway.data.text_batches import BATCH_CHARACTERS, iterate_batches
from ropeway.models.conversation import Conversation

_BREAK = "\n\n"  # between joined texts; no pattern but that of private keys spans a line
_LOCAL_PART = 64  # characters before the @. Source: RFC 5321, 4.5.3.1.1
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+\Z")
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9_-])")
_PHONE = re.compile(r"\+[1-9][0-9 ()./-]{6,22}[0-9](?![0-9])")
# Source: ITU-T E.164, assigned country codes; 8 to 15 digits in all.
_COUNTRY = re.compile(
    r"1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|(?:21|22|23|24|25|26|29|35|37|38|42|50|59|67|68|69|80|85|87|88|96|97|99)[0-9]"
)
_PHONE_DIGITS = range(8, 16)
# Cards, IBANs and addresses have such a run: one pass finds the places to look at.
_DIGITS = re.compile(r"[0-9][0-9 .-]{5,}[0-9]")
_BEFORE, _AFTER = 24, 34  # characters around a run that an IBAN may have
_CARD = re.compile(r"[0-9](?:[ -]?[0-9]){12,18}(?![0-9])")
_IBAN = re.compile(r"[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBAN_LENGTHS = range(15, 35)  # Source: ISO 13616; the shortest is Norway's
_IP = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![.]?[0-9])")
_KEY_BEGIN = "-----BEGIN "
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----[^\0]{0,8192}?-----END [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----"
)
# Prefix -> the token that begins with it. Source: the documentation of AWS, GitHub, GitLab, Slack, Google, Stripe, npm,
# PyPI, Hugging Face, OpenAI, Anthropic and SendGrid; RFC 7519 (JWT, whose two first parts are JSON objects).
_TOKENS = {
    "AKIA": re.compile(r"AKIA[A-Z2-7]{16}(?![A-Za-z0-9])"),
    "ASIA": re.compile(r"ASIA[A-Z2-7]{16}(?![A-Za-z0-9])"),
    "ghp_": re.compile(r"ghp_[A-Za-z0-9]{36}"),
    "gho_": re.compile(r"gho_[A-Za-z0-9]{36}"),
    "ghs_": re.compile(r"ghs_[A-Za-z0-9]{36}"),
    "github_pat_": re.compile(r"github_pat_[A-Za-z0-9_]{50,100}"),
    "glpat-": re.compile(r"glpat-[A-Za-z0-9_-]{20,}"),
    "xox": re.compile(r"xox[abeoprs]-[A-Za-z0-9-]{20,}"),
    "AIza": re.compile(r"AIza[A-Za-z0-9_-]{35}"),
    "_live_": re.compile(r"(?:sk|rk)_live_[A-Za-z0-9]{20,}"),
    "npm_": re.compile(r"npm_[A-Za-z0-9]{36}"),
    "pypi-": re.compile(r"pypi-AgE[A-Za-z0-9_-]{50,}"),
    "hf_": re.compile(r"hf_[A-Za-z]{30,40}(?![A-Za-z0-9_])"),
    "sk-": re.compile(r"sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}"),
    "SG.": re.compile(r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
    "eyJ": re.compile(r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
}
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FoundData:
    """A span of a text with personal data or a secret."""

    begin: int
    end: int
    kind: PersonalKind


def find_personal_data(text: str, kinds: Sequence[PersonalKind]) -> list[FoundData]:
    """Return what is found, in the order of the text; of two that overlap the one that begins first, or is longer."""
    found = [
        FoundData(*span, kind) for kind in kinds if kind not in _NUMERIC for span in _FINDERS[kind](text, 0, len(text))
    ]
    numeric = [kind for kind in kinds if kind in _NUMERIC]
    if numeric:
        for begin, end in _iterate_numeric_parts(text):
            found += [FoundData(*span, kind) for kind in numeric for span in _FINDERS[kind](text, begin, end)]
    found.sort(key=lambda one: (one.begin, -one.end))
    kept: list[FoundData] = []
    for one in found:
        if not kept or one.begin >= kept[-1].end:
            kept.append(one)
    return kept


def _iterate_numeric_parts(text: str) -> Iterator[Span]:
    """Yield the parts of a text that may have a number of interest, without overlaps."""
    begin = end = -1
    for match in _DIGITS.finditer(text):
        first, last = max(0, match.start() - _BEFORE), match.end() + _AFTER
        if begin >= 0 and first > end:
            yield begin, end
            begin = first
        begin, end = (first if begin < 0 else begin), last
    if begin >= 0:
        yield begin, end


def count_personal_data(records: Sequence[Record], kinds: Sequence[PersonalKind]) -> tuple[Counter[str], int]:
    """Return (kind -> occurrences, records with any); texts are joined, since a call per short text takes longer."""
    counts, affected = Counter[str](), 0
    if not kinds:
        return counts, affected
    for batch in iterate_batches(records, lambda one: sum(map(len, iterate_texts(one))), BATCH_CHARACTERS):
        joined = ["\n".join(iterate_texts(record)) for record in batch]
        found = find_personal_data(_BREAK.join(joined), kinds)
        counts.update(one.kind for one in found)
        if found:
            ends = list(accumulate(len(text) + len(_BREAK) for text in joined))
            affected += len({bisect_right(ends, one.begin) for one in found})
    return counts, affected


def mask_record(record: Record, kinds: Sequence[PersonalKind]) -> Record:
    """Return the record with each span replaced by a placeholder such as `[EMAIL]`."""

    def mask(text: str) -> str:
        return mask_text(text, kinds)

    if not isinstance(record, Conversation):
        return mask(record)
    form = record.form
    if form and any(find_personal_data(text, kinds) for text in record.further_texts()):
        form = json.dumps(_map_strings(json.loads(form), mask), ensure_ascii=False, separators=(",", ":"))
    return replace(record, turns=tuple(map(mask, record.turns)), system=mask(record.system), form=form)


def mask_text(text: str, kinds: Sequence[PersonalKind]) -> str:
    """Return a text with each span replaced by a placeholder.

    >>> mask_text("Write to anna@example.org.", ["email"])
    'Write to [EMAIL].'
    """
    for one in reversed(find_personal_data(text, kinds)):
        text = f"{text[: one.begin]}[{one.kind.upper()}]{text[one.end :]}"
    return text


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(part, change) for key, part in value.items()}
    return [_map_strings(part, change) for part in value] if isinstance(value, list) else value


def _find_emails(text: str, begin: int, end: int) -> Iterator[Span]:
    for match in _DOMAIN.finditer(text, begin, end):
        at = match.start()
        if local := _LOCAL.search(text, max(0, at - _LOCAL_PART), at):
            yield local.start(), match.end()


def _find_phones(text: str, begin: int, end: int) -> Iterator[Span]:
    for match in _PHONE.finditer(text, begin, end):
        digits = re.sub(r"\D", "", match[0])
        alone = not text[max(0, match.start() - 1) : match.start()].isalnum()
        if alone and len(digits) in _PHONE_DIGITS and _COUNTRY.match(digits):
            yield match.span()


def _find_cards(text: str, begin: int, end: int) -> Iterator[Span]:
    for match in _CARD.finditer(text, begin, end):
        before = text[max(0, match.start() - 2) : match.start()]
        if before[-1:].isalnum() or re.fullmatch(r"[0-9][.,]", before) or before[-1:] == "+":
            continue
        digits = re.sub(r"\D", "", match[0])
        if digits[0] in "23456" and len(set(digits)) > 1 and passes_luhn(digits):
            yield match.span()


def passes_luhn(digits: str) -> bool:
    """Return whether the last digit is the check digit. Source: ISO/IEC 7812-1.

    >>> passes_luhn("4111111111111111"), passes_luhn("4111111111111112")
    (True, False)
    """
    doubled = (int(digit) * (1 + at % 2) for at, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0  # noqa: PLR2004 - digits


def _find_ibans(text: str, begin: int, end: int) -> Iterator[Span]:
    for match in _IBAN.finditer(text, begin, end):
        compact = match[0].replace(" ", "")
        alone = not text[max(0, match.start() - 1) : match.start()].isalnum()
        if alone and len(compact) in _IBAN_LENGTHS and passes_mod97(compact):
            yield match.span()


def passes_mod97(iban: str) -> bool:
    """Return whether the check digits of an IBAN without spaces are right. Source: ISO 13616, ISO 7064 mod 97-10.

    >>> passes_mod97("GB82WEST12345698765432"), passes_mod97("GB83WEST12345698765432")
    (True, False)
    """
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _find_addresses(text: str, begin: int, end: int) -> Iterator[Span]:
    for match in _IP.finditer(text, begin, end):
        before = text[max(0, match.start() - 1) : match.start()]
        try:
            is_global = IPv4Address(match[0]).is_global
        except AddressValueError:
            continue
        if is_global and not before.isalnum() and before not in (".", "-"):
            yield match.span()


def _find_keys(text: str, begin: int, end: int) -> Iterator[Span]:
    if _KEY_BEGIN in text:
        yield from (match.span() for match in _KEY.finditer(text, begin, end))


def _find_tokens(text: str, begin: int, end: int) -> Iterator[Span]:
    for prefix, pattern in _TOKENS.items():
        if prefix in text:
            for match in pattern.finditer(text, begin, end):
                if not text[max(0, match.start() - 1) : match.start()].isalnum():
                    yield match.span()


_NUMERIC = ("credit_card", "iban", "ip_address")
_FINDERS: dict[PersonalKind, Callable[[str, int, int], Iterator[Span]]] = {
    "email": _find_emails,
    "phone": _find_phones,
    "credit_card": _find_cards,
    "iban": _find_ibans,
    "ip_address": _find_addresses,
    "private_key": _find_keys,
    "token": _find_tokens,
}
