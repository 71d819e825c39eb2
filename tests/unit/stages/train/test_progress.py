"""Progress of an attempt: what is printed on a terminal and in a log, what is recorded, and the summary."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.data.batches import Piece
from ropeway.runtime.progress import Progress, StepPrinter, describe
from ropeway.stages.train.model import step_flops, token_flops


def line(step, **changes):
    return {
        "step": step, "total_steps": 10, "loss": 5.25, "learning_rate": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0,
        "applied": 1, "applied_steps": step, "skipped_steps": 0, "tokens": 1000, "supervised_tokens": 600,
        "seconds": 2.0, "model_flops": 4e12, "peak_memory_bytes": 3 * 2**30, **changes,
    }  # fmt: skip


@pytest.fixture
def progress(tmp_path):
    now = iter([0.0, 4.0, 8.0, 12.0, 16.0])
    mirrored = []
    made = Progress({"ranks": 2}, tmp_path / "p.jsonl", tmp_path / "a.jsonl", 8e12, mirrored.append, lambda: next(now))
    made.mirrored = mirrored
    return made


def test_a_step_is_printed_with_loss_pace_and_time_left_and_recorded_for_programs(progress, capsys):
    progress.show(line(1))
    progress.saved(1, 1.5)
    progress.show(line(2, validation_topics=4.5, validation_texts=None, loss_topics=None))
    first, saved, second = capsys.readouterr().out.splitlines()
    # 4 s a step by the clock, what lies between the steps included: 9 are left, then 8.
    assert first == (
        "[==                  ] step 1/10  36 s left  loss 5.2500  lr 1.00e-03  grad norm 0.50  500 tokens/s  "
        "MFU 25.0%  peak memory 3.0 GiB"
    )
    assert saved == "checkpoint of step 1 saved in 1.5 s"
    assert "step 2/10  32 s left" in second
    assert second.endswith("GiB  validation loss: topics 4.500")
    written = [json.loads(text) for text in progress.lines.read_text().splitlines()]
    assert written == progress.mirrored
    assert written[1]["supervised_tokens_per_second"] == 300
    assert (written[0]["checkpoint_seconds"], written[1]["checkpoint_seconds"]) == (0.0, 1.5)


RATES = {"tokens_per_second": 1.0, "mfu": None, "eta_seconds": 5000}
LEFT_OUT = {"loss": None, "grad_norm": None, "applied": 0, "left_out": 128}


def test_a_skipped_step_says_so_and_claims_no_norm():
    text = describe(line(3, applied=0, skipped_steps=2, grad_norm=None, loss_scale=32768.0) | RATES)
    assert "grad norm -  loss scale 32768  SKIPPED: gradient overflow (2 so far)" in text
    assert "MFU" not in text
    assert "1 h 23 min left" in text


def test_a_step_left_out_after_a_rewind_says_so_and_how_many_rows():
    text = describe(line(5, validation_topics=4.5, **LEFT_OUT) | RATES)
    assert text.startswith("[==========          ] step 5/10  not trained: 128 rows left out")
    assert text.endswith("validation loss: topics 4.500")


def steps_in(text):
    return [int(step) for step in re.findall(r"step (\d+)/", text)]


def print_steps(printer, steps, total=172, **changes):
    for step in steps:
        printer.print_step(line(step, total_steps=total, **changes) | RATES)


def test_a_log_has_a_line_per_tenth_of_the_steps_and_the_first(capsys):
    print_steps(StepPrinter(), range(1, 173))
    said = capsys.readouterr().out
    assert steps_in(said) == [1, 18, 35, 52, 69, 86, 104, 121, 138, 155, 172]
    assert "\r" not in said
    assert "\x1b" not in said


def test_a_log_shows_evaluations_skipped_and_left_out_steps_and_where_an_attempt_began(capsys):
    printer = StepPrinter()
    print_steps(printer, range(101, 103))
    print_steps(printer, [105], validation_topics=None)
    print_steps(printer, [106], applied=0, skipped_steps=1)
    print_steps(printer, range(107, 109))
    print_steps(printer, [109], **LEFT_OUT)
    assert steps_in(capsys.readouterr().out) == [101, 105, 106, 109]


def test_a_run_of_few_steps_has_each_of_them_in_the_log(capsys):
    print_steps(StepPrinter(), range(1, 5), total=4)
    assert steps_in(capsys.readouterr().out) == [1, 2, 3, 4]


SCRIPT = """
from ropeway.runtime.progress import StepPrinter
line = {
    "total_steps": 50, "loss": 5.0, "learning_rate": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0, "applied": 1,
    "skipped_steps": 0, "tokens_per_second": 1.0, "mfu": None, "eta_seconds": 5, "peak_memory_bytes": 1,
}
with StepPrinter() as printer:
    for step in range(1, 41):
        printer.print_step({**line, "step": step} | ({"validation_a": 1.0} if step == 20 else {}))
        if step == 30:
            printer.print_event("checkpoint of step 30 saved")
print("rewind")
for step in range(41, 51):
    printer.print_step({**line, "step": step})
"""


def show_on_terminal(**environment):
    """Return what a terminal of 60 columns receives from `SCRIPT`."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "60", **environment},
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # Linux: the other end was closed
        while data := os.read(ours, 1 << 16):
            seen += data
    os.close(ours)
    assert child.wait() == 0
    return seen.decode().replace("\r\n", "\n")


def test_a_terminal_has_one_line_that_is_updated_and_lines_that_stay():
    seen = show_on_terminal()
    assert steps_in(seen) == list(range(1, 51))
    left = [row.rpartition("\r\x1b[2K")[2] for row in seen.rstrip().split("\n")]  # what is not erased
    assert [steps_in(row) or row for row in left] == [[1], [20], "checkpoint of step 30 saved", [40], "rewind", [50]]
    drawn = [part for row in seen.rstrip().split("\n") for part in row.split("\r\x1b[2K")[:-1] if part]
    assert len(drawn) == 46
    assert max(map(len, drawn)) <= 59  # a longer line would wrap and could not be erased


def test_a_terminal_that_cannot_move_its_cursor_is_a_log():
    assert steps_in(show_on_terminal(TERM="dumb")) == [1, *range(5, 51, 5)]


def test_the_record_of_an_attempt_sums_it_up(progress):
    progress.show(line(1))
    progress.saved(1, 2.0)
    progress.show(line(2))
    progress.write(ended="finished", more={"wandb": {"mode": "off"}})
    record = json.loads(progress.attempts.read_text())
    assert record["tokens"] == 2000
    assert record["tokens_per_second"] == 500
    assert record["mfu"] == pytest.approx(0.25)
    assert record["checkpoint_stall_fraction"] == pytest.approx(2 / 12)
    assert (record["seconds"], record["wall_seconds"]) == (4, 12)  # of the steps; with saving
    assert record["wandb"] == {"mode": "off"}


def test_flops_are_six_per_multiplying_weight_and_token_and_padding_counts_nothing():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    weights = 2 * layer + 8 * 50 + 8
    per_token = token_flops(model)
    assert per_token == 6 * weights
    one = step_flops(per_token, config, [(Piece(0, 0, 0, 5),)])
    assert one == 5 * 6 * weights + 6 * 2 * 8 * 25
    # Two sequences in one packed row attend to themselves alone.
    assert step_flops(per_token, config, [(Piece(0, 0, 0, 5), Piece(0, 1, 0, 5))]) == 2 * one
    model.requires_grad_(requires_grad=False)
    assert token_flops(model) == 4 * weights
