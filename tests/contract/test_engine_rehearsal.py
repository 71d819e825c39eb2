"""Planned memory against DeepSpeed's engine, which runs the first and the last rank on tensors without memory."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from benchmarks.engine_rehearsal import PROMISED, RANKS, all_configurations, load_of, planned
from ropeway.engine_rehearsal import compare
from ropeway.engine_rehearsal.compare import RankResult, check_rehearsable, describe_rehearsal, run_rank
from ropeway.planning.phases import PHASES, offloaded_bytes
from ropeway.runtime.errors import ConfigError, RopewayError
from tests.support import forked

SMALL = 2  # layers; all widths are the published ones
LAST = RANKS - 1
FAR = ("ZeRO-1", "ZeRO-3")  # at 40 layers only, in `make test-slow`: their parts are in ZeRO-2 and ZeRO-3, offloaded
NEAR = [name for name in all_configurations(SMALL) if name not in FAR]


def run_forked(command, **options):
    done = forked.run(command, **options)
    return subprocess.CompletedProcess(command, done.returncode, stdout=done.stdout, stderr=done.stdout)


@pytest.fixture(scope="module")
def small():
    """Return configuration -> peaks of the last rank; one process rehearses all of them."""
    configurations = {name: one for name, one in all_configurations(SMALL).items() if name in NEAR}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_forked))
        peaks = run_rank(list(configurations.values()), rank=LAST, ranks=RANKS)
    return dict(zip(configurations, peaks, strict=True))


def assert_planned(configuration, peaks, rank):
    expected, found = planned(configuration, rank=rank), peaks["card"]
    assert max(expected.values()) == pytest.approx(max(found.values()), rel=PROMISED)
    for phase in PHASES:
        assert expected[phase] == pytest.approx(found[phase], rel=PROMISED), phase


@pytest.mark.parametrize("name", NEAR)
def test_every_phase_at_two_layers_is_planned_within_5_percent(small, name):
    assert_planned(all_configurations(SMALL)[name], small[name], LAST)


def test_offloaded_states_are_counted_on_the_host_and_not_on_the_card(small):
    name = "ZeRO-2, packed, optimizer offloaded"
    profile, _ = all_configurations(SMALL)[name]
    peaks, plain = small[name], small["ZeRO-2 (published)"]
    assert plain["host"]["optimizer_step"] < 1024  # counters of steps
    weights = 962_257_920  # 2 layers of 317,204,480, two tables of 32,016 x 5,120, one norm
    assert profile.expected_model.num_hidden_layers == SMALL
    assert peaks["host"]["optimizer_step"] >= 16 * weights // RANKS  # fp32 weights, gradients and two moments
    assert peaks["card"]["optimizer_step"] < plain["card"]["optimizer_step"] - 12 * weights // RANKS


def test_offloaded_states_on_the_host_are_planned_within_5_percent(small):
    for name in ("ZeRO-2, packed, optimizer offloaded", "ZeRO-3, optimizer offloaded"):
        load = load_of(all_configurations(SMALL)[name])
        found = small[name]["host"]["forward"]
        assert offloaded_bytes(load, rank=LAST) == pytest.approx(found, rel=PROMISED), name


def test_adams_moments_are_in_the_second_forward_and_not_in_the_start(small):
    peaks = small["ZeRO-2 (published)"]["card"]
    weights = 962_257_920
    assert peaks["engine_start"] == pytest.approx(2 * 2 * weights, rel=1e-3)  # 16-bit weights twice
    assert peaks["forward"] > (2 + 12 / RANKS) * weights


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", all_configurations())
def test_the_published_40_layers_are_planned_within_5_percent(name):
    configuration = all_configurations()[name]
    with ThreadPoolExecutor(2) as pool:
        starts = {rank: pool.submit(run_rank, [configuration], rank=rank, ranks=RANKS) for rank in (0, LAST)}
    for rank, started in starts.items():
        assert_planned(configuration, started.result()[0], rank)


def test_a_run_without_a_flash_kernel_is_refused():
    profile, _ = all_configurations(SMALL)["ZeRO-2 (published)"]
    with pytest.raises(ConfigError, match="use_flash_attention"):
        check_rehearsable(profile.model_copy(update={"use_flash_attention": False}), ranks=8)
    with pytest.raises(ConfigError, match="multiple of"):
        check_rehearsable(profile, ranks=7)


def test_a_faulty_deepspeed_json_is_reported_as_in_training(monkeypatch):
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_forked))
    profile, _ = all_configurations(SMALL)["ZeRO-2 (published)"]
    with pytest.raises(ConfigError, match="unknown key"):
        run_rank([(profile, json.dumps({"autotuning": {}}))], rank=0, ranks=RANKS)


def test_a_rank_that_fails_is_an_error_with_its_last_lines(monkeypatch):
    monkeypatch.setattr(compare, "MODULE", "ropeway.no_such_module")
    with pytest.raises(RopewayError, match=r"rank 0 ended with exit code 1: .*no_such_module"):
        run_rank([], rank=0, ranks=RANKS)


def test_the_table_names_the_rank_with_the_highest_peak():
    low, high = dict.fromkeys(PHASES, 2**30), dict.fromkeys(PHASES, 2**31)
    text = describe_rehearsal([RankResult(0, high, low, {}), RankResult(7, high, high, {})])
    last = text.strip().splitlines()[-1].split()
    assert last[:3] == ["peak", "rank", "7"]
    assert last[-1] == "+0.0%"
