from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.data.ledger import (
    EpochTotals,
    FindingCounts,
    Findings,
    Ledger,
    RecordTotals,
    SourceEpoch,
    SourceLedger,
    SplitTotals,
    check_ledger,
)
from ropeway.runtime.errors import DataError

EVEN = Ledger(
    sources=(
        SourceLedger(
            "talk",
            "conversation",
            RecordTotals(15, {"not JSON": 1}, {"conversation without turns": 1}, 13, 2, {}, 0),
            sequences=SplitTotals(13, 7, 2, 1, 2, 1),
            tokens=SplitTotals(130, 70, 20, 10, 25, 5),
            findings=Findings(
                FindingCounts("remove", 1, 1, 20), FindingCounts("remove", 1, 1, 5), FindingCounts("remove", 1, 1, 5), 0
            ),
            epochs=(SourceEpoch(0, 2, 5, 50, 1, 6, 1, 4, 48, 8, 40, 30),),
        ),
        SourceLedger(
            "text",
            "document",
            RecordTotals(3, {}, {}, 3, 0, {}, 1),
            sequences=SplitTotals(5, 4, 1, 0, 0, 0),
            tokens=SplitTotals(55, 44, 11, 0, 0, 0),
            findings=Findings(
                FindingCounts("count", 2, 3, 30), FindingCounts("off", 0, 0, 0), FindingCounts("count", 1, 2, 9), 1
            ),
            epochs=(SourceEpoch(0, 0, 5, 60, 0, 0, 1, 4, 64, 8, 56, 55, repeated=1, repeated_tokens=16),),
        ),
    ),
    epochs=(EpochTotals(0, 10, 9, 4, 2, 1),),
)
IN_NO_SUM = {"with_special_tokens", "without_tokens", "windowed", "cut", "epoch", "name", "kind"}


def test_a_ledger_whose_sums_come_out_even_passes():
    check_ledger(EVEN)
    assert EVEN.to_json()["sources"][0]["sequences"] == {
        "all": 13,
        "train": 7,
        "validation": 2,
        "unused": 1,
        "duplicate": 2,
        "contaminated": 1,
    }


@pytest.mark.parametrize("what", ["exact", "near", "contaminated"])
@pytest.mark.parametrize("unit", ["sequences", "tokens"])
def test_what_is_removed_is_in_the_sums_and_what_is_only_counted_is_not(what, unit):
    for at, complains in ((0, True), (1, False)):
        findings = EVEN.sources[at].findings
        found = getattr(findings, what)
        more = replace(findings, **{what: replace(found, **{unit: getattr(found, unit) + 1})})
        ledger = changed(EVEN, at, findings=more)
        if complains:
            with pytest.raises(DataError, match="removed as"):
                check_ledger(ledger)
        else:
            check_ledger(ledger)


def numbers_of(ledger):
    """(path, ledger with one more there) for every number that a sum must hold."""
    for at, account in enumerate(ledger.sources):
        for part in ("records", "sequences", "tokens"):
            value = getattr(account, part)
            for name in (field.name for field in fields(value) if isinstance(getattr(value, field.name), int)):
                more = replace(value, **{name: getattr(value, name) + 1})
                yield f"{account.name}.{part}.{name}", changed(ledger, at, **{part: more})
        for name in (field.name for field in fields(SourceEpoch)):
            (epoch,) = account.epochs
            more = replace(epoch, **{name: getattr(epoch, name) + 1})
            yield f"{account.name}.epoch.{name}", changed(ledger, at, epochs=(more,))
    for name in ("rows", "global_batch_size", "steps", "left_over"):
        (epoch,) = ledger.epochs
        yield f"epochs.{name}", replace(ledger, epochs=(replace(epoch, **{name: getattr(epoch, name) + 1}),))


def changed(ledger, at, **parts):
    sources = list(ledger.sources)
    sources[at] = replace(sources[at], **parts)
    return replace(ledger, sources=tuple(sources))


FREE = {"with_special_tokens", "without_tokens", "windowed", "cut", "epoch", "supervised"}


@pytest.mark.parametrize(
    ("path", "ledger"), [pair for pair in numbers_of(EVEN) if pair[0].rsplit(".", 1)[1] not in FREE]
)
def test_one_record_row_or_token_too_many_anywhere_is_found(path, ledger):
    with pytest.raises(DataError, match="sums of the ledger are wrong"):
        check_ledger(ledger)
    assert path


def test_only_an_epoch_with_repeats_states_them():
    without, with_repeats = (account["epochs"][0] for account in EVEN.to_json()["sources"])
    assert (with_repeats["repeated"], with_repeats["repeated_tokens"]) == (1, 16)
    assert not {"repeated", "repeated_tokens"} & without.keys()


def test_an_uneven_sum_names_all_its_numbers():
    uneven = changed(EVEN, 0, tokens=SplitTotals(130, 70, 20, 9, 25, 5))
    says = r"talk, tokens = removed as duplicate .* \+ unused: 130 is not 25 \+ 5 \+ 70 \+ 20 \+ 9 = 129"
    with pytest.raises(DataError, match=says):
        check_ledger(uneven)


def test_more_supervised_tokens_than_tokens_is_found():
    epoch = replace(EVEN.sources[0].epochs[0], supervised=41)
    with pytest.raises(DataError, match="tokens in rows = supervised"):
        check_ledger(changed(EVEN, 0, epochs=(epoch,)))


def test_a_source_that_teaches_nothing_is_refused_with_its_counts():
    epoch = replace(EVEN.sources[0].epochs[0], supervised=0)
    with pytest.raises(DataError, match=r"source talk: 0 supervised tokens in 5 rows \(13 records kept of 15 read"):
        check_ledger(changed(EVEN, 0, epochs=(epoch,)))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_any_even_split_passes(train, validation, unused):
    even = SplitTotals(train + validation + unused, train, validation, unused, 0, 0)
    epoch = replace(EVEN.sources[1].epochs[0], not_drawn=train - 4)
    tokens = SplitTotals(51 + train, 40 + train, 11, 0, 0, 0)
    ledger = changed(EVEN, 1, sequences=even, tokens=tokens, epochs=(epoch,))
    if train >= 4:
        check_ledger(ledger)
    else:
        with pytest.raises(DataError, match="drawn"):
            check_ledger(ledger)
