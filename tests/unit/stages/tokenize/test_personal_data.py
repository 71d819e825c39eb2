"""Personal data and secrets: what is found, what only looks like it, and what tokenize does with it."""

import json

import pytest

from ropeway.config.sections import PersonalData
from ropeway.data.personal_data import count_personal_data, find_personal_data, mask_record
from ropeway.data.raw_records import iterate_records
from ropeway.data.record_identity import record_digest
from ropeway.data.record_index import RecordIndex
from ropeway.data.shards import open_shards
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.ledger_steps import list_steps
from tests.support.raw_records import TALKS, TEXTS, profile, write_raw
from tests.support.tokenizing import tokenize_and_prepare

KINDS = ("email", "phone", "credit_card", "iban", "ip_address", "private_key", "token")
# Numbers that issuers publish as examples; tokens are made up.
PRESENT = {
    "email": ["ada@example.org", "a.b+c@mail.example.co.uk", "<o'hara@example.com>"],
    "phone": ["+44 20 7946 0958", "+1 (202) 555-0143", "tel:+493012345678"],
    "credit_card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "MT84MALT011000012345MTLCAST001S"],
    "ip_address": ["8.8.8.8", "(203.1.112.9)"],
    "private_key": ["-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----"],
    "token": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    ],
}  # fmt: skip
ABSENT = [
    "@property, a@b, user@localhost, @functools.wraps",
    "4111 1111 1111 1112 and 1234567890123456 and 0000000000000000, 3.4111111111111111",
    "GB83WEST12345698765432, AB12 is a plate",
    "192.168.1.7 127.0.0.1 10.0.0.1 version 1.2.3.4.5 and 999.1.1.1",
    "1+23456789 = x, +12, C++11, +0 123 456 789",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "AKIA, ghp_short, sk-learn, eyJ.eyJ",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PRESENT.items() for text in texts])
def test_each_kind_is_found_alone_and_amid_words(kind, text):
    for around in (text, f"Write to {text}, or not.", f"{text}\n{'x' * 90}"):
        assert [one.kind for one in find_personal_data(around, KINDS)] == [kind], around
    assert find_personal_data(text, [one for one in KINDS if one != kind]) == []


@pytest.mark.parametrize("text", ABSENT)
def test_what_only_looks_like_it_is_not_found(text):
    assert find_personal_data(text, KINDS) == []


def test_counts_are_of_occurrences_and_of_records_that_have_any():
    talk = Conversation(("My mail is ada@example.org.", "Mine is bob@example.org."), "Call +44 20 7946 0958.")
    counts, affected = count_personal_data([talk, "nothing", "8.8.8.8", talk], KINDS)
    assert (dict(counts), affected) == ({"email": 4, "phone": 2, "ip_address": 1}, 3)
    assert count_personal_data([talk], ()) == ({}, 0)


def test_a_mask_replaces_texts_and_arguments_of_calls_and_leaves_valid_json():
    call = {
        "type": "function",
        "function": {"name": "send", "arguments": '{"to": "ada@example.org", "n": 4111111111111111}'},
    }
    messages = [
        {"role": "user", "content": "Write to ada@example.org and bob@example.org"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 1},
    ]
    masked = mask_record(Conversation.from_messages(messages), ("email",))
    assert masked.turns[0] == "Write to [EMAIL] and [EMAIL]"
    (found,) = masked.read_form()["fields"][1]["tool_calls"]
    assert json.loads(found["function"]["arguments"]) == {"to": "[EMAIL]", "n": 4111111111111111}
    plain = Conversation(("Hi", "Hello"))
    assert mask_record(plain, KINDS) == plain
    assert mask_record("Pay GB82WEST12345698765432 now", KINDS) == "Pay [IBAN] now"


ADA = Conversation(("Who is Ada?", "Ask ada@example.org."))


def prepared(root, action):
    workspace = write_raw(root, [*TALKS, ADA], [*TEXTS, "Mail ada@example.org or 8.8.8.8."])
    wanted = PersonalData(action=action, kinds=list(KINDS))
    tokenize_and_prepare(workspace, profile(personal_data=wanted, max_refused_fraction=0.5))
    return workspace, json.loads(workspace.ledger.read_bytes())["sources"]


def all_text(workspace):
    tokenizer = open_tokenizer(workspace.base)
    sources = open_shards(workspace.data).sources
    return "".join(
        tokenizer.decode(source.read(number)[0].tolist()) for source in sources for number in range(len(source.lengths))
    )


def find(workspace, record):
    data = workspace.record_index.read_bytes()
    index = RecordIndex.open(lambda start, count: data[start : start + count], len(data), "records.index")
    return index.find([record_digest(record)])[0]


def test_counting_changes_no_token_and_off_says_that_nothing_is_known(tmp_path):
    off, none = prepared(tmp_path / "off", "off")
    counted, ledger = prepared(tmp_path / "count", "count")
    assert [one["records"]["personal_data"] for one in ledger] == [
        {"action": "count", "records": 1, "found": {"email": 1}},
        {"action": "count", "records": 1, "found": {"email": 1, "ip_address": 1}},
    ]
    assert "personal_data" not in none[0]["records"]
    for name in ("talk", "text"):
        tokens = [each.data / name / "tokens-00000.npy" for each in (off, counted)]
        assert tokens[0].read_bytes() == tokens[1].read_bytes()
    assert "ada@example.org" in all_text(counted)
    assert off.record_index.read_bytes() == counted.record_index.read_bytes()
    assert any(step.name == "personal data: email" and step.count == 1 for step in list_steps(ledger[0]))
    assert any(step.name == "personal data: not looked for" for step in list_steps(none[0]))


def test_masked_text_is_in_no_token_and_the_record_is_still_known_by_its_own_digest(tmp_path):
    workspace, ledger = prepared(tmp_path, "mask")
    text = all_text(workspace)
    assert "example.org" not in text
    assert "[EMAIL]" in text.replace(" ", "")
    assert ledger[0]["records"]["kept"] == len(TALKS) + 1
    assert find(workspace, ADA) is not None
    assert ADA in iterate_records(workspace.raw / "talk"), "raw/ keeps what was fetched"


def test_refused_records_have_their_reason_in_the_ledger_and_in_the_index(tmp_path):
    workspace, ledger = prepared(tmp_path, "refuse")
    assert ledger[0]["records"]["refused_by_tokenize"] == {"personal data: email": 1}
    assert ledger[0]["records"]["kept"] == len(TALKS)
    assert find(workspace, ADA).reason == "refused: personal data: email"
