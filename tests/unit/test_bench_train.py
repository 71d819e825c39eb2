import pytest

from benchmarks.train import PROMISES, find_missed, ratios, stall_fraction, summarise, with_work


def turn(way, seconds, *, steps=4, supervised=800):
    return {
        "way": way, "steps": steps, "seconds": seconds, "cpu_seconds": seconds / 2, "tokens": supervised,
        "supervised_tokens": supervised,
    }  # fmt: skip


def measured(*, ours=(1.0, 2.0, 8.0), trainer=(1.0, 4.0, 8.0), packed=(2.0, 2.0, 2.0), loss=8.25):
    turns = [
        turn(way, seconds, supervised=supervised)
        for a, b, c in zip(ours, trainer, packed, strict=True)
        for way, seconds, supervised in (
            ("ours", a, 800), ("trainer", b, 0), ("packed", 1.0, 800), ("padded_wide", 1.0, 800),
            ("packed_wide", c, 3200),
        )
    ]  # fmt: skip
    first = {way: [{"loss": value, "grad_norm": 2.0}] for way, value in (("ours", loss), ("trainer", 8.25))}
    return {"turns": turns, "first": first, "saves": [0.2, 0.1, 0.9], "save_steps": 20}


MEMORY = {"plain_bytes": 1000, "chunked_bytes": 250}


def test_a_ratio_is_taken_within_each_round_so_that_a_busy_minute_falls_on_both():
    found = summarise(measured(), MEMORY)
    assert found["step_ratios"] == [1.0, 0.5, 1.0]
    assert found["step_ratio"] == 1.0
    assert found["packed_ratio"] == 2.0  # 3,200 in 2 s against 800 in 1 s
    assert found["ways"]["trainer"]["supervised_tokens_per_second"] == round(2400 / 13, 1)  # the rows of ours
    assert found["loss_memory_ratio"] == 0.25


def test_a_round_that_lacks_a_way_is_no_ratio():
    with pytest.raises(ValueError, match="shorter"):
        ratios([turn("ours", 1.0), turn("ours", 1.0), turn("trainer", 1.0)], "ours", "trainer")


def test_trainers_turns_get_the_tokens_of_the_same_rows_in_the_order_of_rounds():
    turns = [turn("trainer", 1.0, supervised=0), turn("ours", 1.0, supervised=7), turn("ours", 1.0, supervised=9)]
    counted = with_work([*turns, turn("trainer", 1.0, supervised=0)])
    assert [one["supervised_tokens"] for one in counted if one["way"] == "trainer"] == [7, 9]


def test_a_save_counts_as_one_among_the_steps_between_two():
    assert stall_fraction([0.2, 0.1, 0.9], step_seconds=0.09, save_steps=20) == pytest.approx(0.1)


def kept():
    good = {"step_ratio": 1.02, "packed_ratio": 1.5, "checkpoint_stall_fraction": 0.05, "loss_memory_ratio": 0.5}
    return {**good, "rounds": 7, "loss_difference": 1e-7}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_ratio", 1.021),
        ("packed_ratio", 1.49),
        ("checkpoint_stall_fraction", 0.051),
        ("loss_memory_ratio", 0.6),
        ("rounds", 6),
        ("loss_difference", 1e-3),
        ("step_ratio", float("nan")),
        ("loss_difference", float("nan")),
    ],
)
def test_every_promise_can_be_missed_alone_and_is_named_with_its_figure(name, value):
    assert find_missed(kept()) == []
    assert set(PROMISES) <= set(kept())
    (missed,) = find_missed({**kept(), name: value})
    assert name.removesuffix("_difference") in missed
