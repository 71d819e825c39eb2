"""The planner: memory fit and remedies, disk, hours, GPUs, rejected options; without loading torch."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ropeway.config.load_params import load_profile
from ropeway.config.sections import Lora
from ropeway.config.zero import parse_zero_section
from ropeway.data.accumulation import accumulation_steps
from ropeway.data.batches import plan_epoch
from ropeway.data.shards import open_shards
from ropeway.planning.budget import check_fit, plan_changes, plan_disk, plan_hours, plan_speed, token_flops
from ropeway.planning.measure import measure_cpu, measure_disk
from ropeway.planning.memory import GIB, Load, Sizes, checkpoint_bytes
from ropeway.planning.phases import certain_bytes, plan_gpu, plan_phases
from ropeway.planning.plan import EpochCounts, PlanRequest, check_memory, count_epoch_data, plan_run
from ropeway.planning.plan_text import describe_plan, outline_plan
from ropeway.runtime.devices import detect_gpus
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.workspace import Workspace
from tests.support.tiny_run import BLOCK, PACKED_BLOCK, make_run

ROOT = Path(__file__).parents[3]
NAME = "llama2_13b_orca_8k"


@pytest.fixture
def published():
    return load_profile(ROOT / "params.yaml", NAME)[1]


def zero_of(profile):
    return parse_zero_section(json.loads((ROOT / profile.deepspeed_config).read_text())["zero_optimization"])


def load_of(profile, ranks=8, **fields):
    return replace(Load.of(profile, zero_of(profile), ranks=ranks), **fields)


def test_the_published_run_fits_80_gib_on_8_ranks_and_not_40(published):
    load = load_of(published)
    assert check_fit(load, 128, 80 * GIB).fits
    assert not check_fit(load, 128, 40 * GIB).fits


def test_long_rows_fit_when_ranks_share_them_and_the_plan_says_so(published):
    long = load_of(published, row_tokens=131072, micro_batch_size=1)
    verdict = check_fit(long, 128, 80 * GIB)
    assert not verdict.fits
    words = [words for words, _ in verdict.remedies]
    assert "sequence_parallel: 4" in words  # 2 do not suffice, 40 heads cannot be split over 3, 6 or 7
    assert check_fit(replace(long, sequence_parallel=4), 128, 80 * GIB).fits
    assert not check_fit(replace(long, sequence_parallel=2), 128, 80 * GIB).fits


def test_ranks_that_share_rows_count_as_one_in_the_accumulation(published):
    shared = published.model_copy(update={"sequence_parallel": 4, "gradient_accumulation_steps": 32})
    assert accumulation_steps(published, 8) == load_of(published).accumulation_steps == 8
    assert accumulation_steps(shared, 8) == load_of(shared).accumulation_steps == 32
    with pytest.raises(ConfigError, match="sequence_parallel is 4, which does not divide 6 ranks"):
        accumulation_steps(shared, 6)
    with pytest.raises(ConfigError, match=r"sequence_parallel is 3, over which 40 query heads .* possible are 1, 2, 4"):
        load_of(published.model_copy(update={"sequence_parallel": 3}))


def test_every_remedy_fits_and_none_contains_a_smaller_one(published):
    verdict = check_fit(load_of(published), 128, 40 * GIB)
    assert verdict.remedies
    assert all(total <= 40 * GIB for _, total in verdict.remedies)
    sets = [frozenset(words.split(" + ")) for words, _ in verdict.remedies]
    assert not any(one < other for one in sets for other in sets)
    by_words = {change.words: change.make for change in plan_changes(load_of(published), 128)}
    for (words, total), parts in zip(verdict.remedies, sets, strict=True):
        changed = load_of(published)
        for part in parts:
            changed = by_words[part](changed)
        assert plan_gpu(changed, memory_bytes=40 * GIB)["total"] == total, words


def test_only_the_smallest_number_of_ranks_that_fits_is_proposed(published):
    remedies = dict(check_fit(load_of(published, ranks=4), 128, 80 * GIB).remedies)
    assert "8 ranks" in remedies
    assert "16 ranks" not in remedies


def test_only_changes_that_divide_the_batch_are_proposed(published):
    words = [change.words for change in plan_changes(load_of(published, ranks=64), 128)]
    assert "128 ranks" in words  # with one row each
    assert "256 ranks" not in words


def test_the_parts_of_gpu_memory_add_up_to_the_total(published):
    parts = plan_gpu(load_of(published))
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")


@pytest.mark.parametrize(
    ("section", "lower"),
    [
        ({"stage": 1}, {"optimizer"}),
        ({"stage": 2}, {"optimizer", "gradients"}),
        ({"stage": 3}, {"optimizer", "gradients", "weights"}),
    ],
)
def test_each_zero_stage_partitions_one_more_state(published, section, lower):
    alone, spread = (
        plan_phases(load_of(published, ranks=ranks, zero=parse_zero_section(section)), rank=0)["optimizer_step"]
        for ranks in (1, 8)
    )
    for part in ("optimizer", "gradients", "weights"):
        if part in lower:
            assert spread[part] == pytest.approx(alone[part] / 8, rel=0.04)  # gradients: of whole weights
    assert (spread["weights"] == alone["weights"]) == ("weights" not in lower)


def test_overlapping_reduction_counts_a_second_bucket(published):
    one, two = (
        plan_gpu(
            load_of(
                published, zero=parse_zero_section({"stage": 2, "reduce_bucket_size": 10**9, "overlap_comm": overlap})
            )
        )
        for overlap in (False, True)
    )
    assert (one["buckets"], two["buckets"]) == (2 * 10**9, 4 * 10**9)


def test_optimizer_offload_leaves_only_the_weights_on_the_gpu(published):
    zero = parse_zero_section({"stage": 2, "offload_optimizer": {"device": "cpu"}})
    parts = plan_gpu(load_of(published, zero=zero))
    sizes = Sizes.of(published)
    assert parts["weights"] == 2 * sizes.parameters
    phases = plan_phases(load_of(published, zero=zero), rank=0)
    assert all(phase.get("gradients", 0) == 0 for phase in phases.values())
    assert phases["forward"]["optimizer"] == 2 * sizes.embedding_parameters  # a buffer for the largest gradient


def test_weights_are_flattened_on_the_host_if_the_gpu_cannot_hold_them_twice(published):
    load = load_of(published, zero=parse_zero_section({"stage": 2, "offload_optimizer": {"device": "cpu"}}))
    weights = 2 * load.parameters
    on_card, on_host = (
        sum(plan_phases(load, rank=0, memory_bytes=memory)["engine_start"].values()) for memory in (80 * GIB, 40 * GIB)
    )
    assert (on_card, on_host) == (2 * weights, weights)


def test_the_last_rank_needs_most_since_its_gradients_come_first(published):
    load = load_of(published)
    first, last = (sum(plan_phases(load, rank=rank)["backward"].values()) for rank in (0, 7))
    assert first < last == plan_gpu(load)["total"] - plan_gpu(load)["reserve"]


def test_without_accumulation_there_are_no_gradients_in_forward(published):
    several, single = (plan_phases(load_of(published, global_batch_size=rows), rank=0) for rows in (128, 16))
    assert several["forward"]["gradients"] > 0 == single["forward"]["gradients"]


def test_a_checkpoint_holds_14_bytes_a_weight_in_16_bit_16_in_fp32_and_12_at_stage_3(published):
    weights = Sizes.of(published).parameters
    assert checkpoint_bytes(load_of(published)) == 14 * weights
    assert checkpoint_bytes(load_of(published, number_bytes=4)) == 16 * weights
    assert checkpoint_bytes(load_of(published, zero=parse_zero_section({"stage": 3}))) == 12 * weights


def test_lora_has_optimizer_states_only_for_its_adapters(published):
    lora = Lora(rank=8, alpha=16, dropout=0.0, target_modules=["q_proj", "v_proj"], train_embeddings=False)
    load = load_of(published.model_copy(update={"peft_model": True, "lora": lora}))
    assert load.trainable == load.adapters == 40 * 2 * 8 * (5120 + 5120)  # 6.55 M, as the paper's recipe gives on 13 B
    parts = plan_gpu(load)
    assert parts["optimizer"] == 12 * load.trainable // 8
    assert parts["weights"] == 2 * (Sizes.of(published).parameters + load.adapters)
    assert token_flops(load) < 0.75 * token_flops(load_of(published))
    assert checkpoint_bytes(load) == 2 * load.parameters + 12 * load.trainable


def test_disk_counts_one_more_checkpoint_and_the_copies_in_dvcs_cache(published):
    load = load_of(published)
    parts = plan_disk(published, load, found={"raw": 10, "data": 20, "base": 30}, local_registry=False)
    assert parts["checkpoints"] == 5 * checkpoint_bytes(load)
    assert parts["dvc_cache"] == 10 + 20 + 30 + parts["model"] + parts["package"]
    assert parts["registry"] == 0


def test_hours_follow_from_tokens_peak_and_mfu(published):
    load, tokens = load_of(published), 10**9
    speed = plan_speed("312", 0.5, dtype="fp16")
    hours = plan_hours(load, speed, tokens)
    assert hours == pytest.approx(tokens * token_flops(load) / (8 * 312e12 * 0.5) / 3600)
    # 6 N and a fifth more for attention at this length: 6 x 40 x 5,120 x 8,192 beside 6 x 12.85 B.
    assert token_flops(load) == pytest.approx(6 * 12.852e9 + 6 * 40 * 5120 * 8192, rel=1e-3)


@pytest.mark.parametrize(("card", "mfu"), [("abacus", None), ("-3", None), ("nan", None), (None, 1.5), (None, 0.0)])
def test_unknown_cards_and_impossible_fractions_are_refused(card, mfu):
    with pytest.raises(ConfigError, match=r"--card|--mfu"):
        plan_speed(card, mfu, dtype="fp16")


def test_hours_count_17_validations_of_7000_rows_and_4_checkpoints(published):
    request = PlanRequest(gpu_memory_gib=80, card="312", mfu=0.5, save_gbps=0.78)
    plan = plan_run(Workspace(ROOT, NAME), published, ranks=8, request=request)
    assert (plan.validation_passes, plan.saves) == (17, 4)  # every 200 and 1,000 of 3,319 steps, and after the last
    # The audit's estimate: 7,000 rows of 8,192 tokens, 17 times, at half an A100's peak: about 6 hours.
    assert plan.hours["validation"] == pytest.approx(6, rel=0.1)
    assert plan.hours["saves"] == pytest.approx(4 * 182.2e9 / 0.78e9 / 3600, rel=1e-3)
    training = plan_hours(load_of(published), plan.speed, plan.most_tokens)
    assert plan.hours["at_most"] == pytest.approx(training + plan.hours["validation"] + plan.hours["saves"])
    assert "17 validations" in describe_plan(plan)
    assert "4 checkpoints of 169.7 GiB 16 min at 0.78 GB/s (stated)" in re.sub(r"\s+", " ", describe_plan(plan))


def test_background_saves_are_not_waited_for(published):
    request = PlanRequest(gpu_memory_gib=80, save_gbps=0.78)
    background = published.model_copy(update={"async_save": True})
    assert plan_run(Workspace(ROOT, NAME), background, ranks=8, request=request).hours["saves"] == 0


def test_save_minutes_adds_checkpoints_to_those_by_steps(published):
    request = PlanRequest(gpu_memory_gib=80, card="312", mfu=0.4, save_gbps=0.78)
    often = published.model_copy(update={"save_minutes": 60.0})
    plan = plan_run(Workspace(ROOT, NAME), often, ranks=8, request=request)
    training = plan_hours(load_of(published), plan.speed, plan.most_tokens)
    assert plan.saves == math.ceil(training) > 4


def test_without_a_bandwidth_saves_are_not_in_the_hours(published):
    plan = plan_run(Workspace(ROOT, NAME), published, ranks=8, request=PlanRequest(gpu_memory_gib=80))
    assert plan.hours["saves"] is None
    assert "4 checkpoints not counted" in re.sub(r"\s+", " ", describe_plan(plan))


def test_the_disks_bandwidth_is_measured_without_leaving_a_file(tmp_path):
    assert measure_disk(tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_a_cpu_s_hours_come_from_its_measured_speed():
    assert measure_cpu("fp32", 1) > measure_cpu("fp32", 64) > 0
    profile = with_json(load_profile(ROOT / "params.yaml", "laptop")[1])
    counted = EpochCounts({"docstrings": 800}, {"docstrings": None}, 800, None, 800 * 512, 48, from_data=False)

    def plan(tflops, mfu=None):
        request = PlanRequest(cpu_tflops=tflops, mfu=mfu)
        return plan_run(Workspace(ROOT, "laptop"), profile, ranks=2, request=request, counted=counted)

    slow, fast = plan(0.1), plan(0.2)
    assert slow.hours["at_most"] == pytest.approx(2 * fast.hours["at_most"])
    assert slow.hours["validation"] == pytest.approx(2 * fast.hours["validation"])
    assert plan(0.1, mfu=1).hours["at_most"] == pytest.approx(slow.hours["at_most"] * slow.speed.mfu)
    assert slow.optimizer_steps == 800 // profile.global_batch_size * profile.num_train_epochs
    with pytest.raises(ConfigError):
        plan(0.1, mfu=1.5)


def test_hours_for_fp32_need_a_stated_peak():
    assert plan_speed("a100", None, dtype="fp32").peak_tflops is None
    assert plan_speed("19.5", None, dtype="fp32").peak_tflops == 19.5


def test_unknown_figures_are_shown_as_not_known(tmp_path):
    profile = load_profile(ROOT / "params.yaml", "laptop")[1]
    text = describe_plan(plan_run(Workspace(tmp_path, "laptop"), with_json(profile), ranks=2))
    assert "steps: not known before prepare" in text
    assert "raw and tokens and data (not known before prepare)" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_of_a_plan_is_longer_than_the_terminal(published, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for ranks in (1, 8):
        text = describe_plan(plan_run(Workspace(ROOT, NAME), published, ranks=ranks))
        assert max(map(len, text.splitlines())) <= width
        assert "13.0 B weights" in text
        assert not re.search(r"\b1 (ranks|rows|steps)\b", text)


def with_json(profile):
    return profile.model_copy(update={"deepspeed_config": str(ROOT / profile.deepspeed_config)})


def test_tokens_come_from_the_data_where_it_is_prepared(tmp_path):
    workspace, profile = make_run(tmp_path)
    full = load_profile(tmp_path / "params.yaml")[1]
    counted = count_epoch_data(workspace, full)
    lengths = np.load(workspace.data / "talk" / "lengths.npy")[np.load(workspace.data / "talk" / "train.npy")]
    assert counted.tokens_per_source["talk"] == int(np.minimum(lengths, full.max_length).sum())
    assert counted.tokens == sum(counted.tokens_per_source.values())
    assert counted.most_tokens == counted.rows * full.max_length
    assert profile.max_length == full.max_length


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_plan_counts_repeats_as_the_epoch_has_them(tmp_path, layout):
    block = (PACKED_BLOCK if layout == "packed" else BLOCK).replace(", fraction: 0.5", ", fraction: 2.5")
    workspace, _ = make_run(tmp_path, block=block)
    full = load_profile(tmp_path / "params.yaml")[1]
    counted, plan = count_epoch_data(workspace, full), plan_epoch(open_shards(workspace.data), full, epoch=0)
    train = len(np.load(workspace.data / "text" / "train.npy"))
    assert counted.rows_per_source["text"] == int(2.5 * train) > 2 * train
    assert counted.rows == plan.rows
    assert counted.steps(full) == plan.steps * full.num_train_epochs


def fake_smi(folder, *, gib, name="NVIDIA A100-SXM4-40GB"):
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\necho "{name}, {gib * 1024}"\n')
    script.chmod(0o755)
    return folder


def test_detection_asks_only_for_the_visible_gpus(tmp_path):
    path = fake_smi(tmp_path / "bin", gib=40)
    environment = {"PATH": f"{path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert [(gpu.name, gpu.memory_bytes) for gpu in detect_gpus(environment)] == [("NVIDIA A100-SXM4-40GB", 40 * GIB)]
    assert (path / "asked").read_text().startswith("-i 2,3 ")


def test_without_gpu_or_driver_no_gpu_is_detected(tmp_path):
    assert detect_gpus({"PATH": str(tmp_path)}, devices=tmp_path) == []
    assert detect_gpus({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}) == []


def test_training_is_rejected_if_the_states_exceed_gpu_memory(published, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(fake_smi(tmp_path / "bin", gib=40)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        ConfigError, match=r"40\.0 GiB.* 8 ranks .*47\.4 GiB.*offload_optimizer to cpu.*ROPEWAY_MEMORY_CHECK=off"
    ):
        check_memory(Workspace(Path(), "none"), published, zero_of(published), ranks=8)
    monkeypatch.setenv("ROPEWAY_MEMORY_CHECK", "off")
    check_memory(Workspace(Path(), "none"), published, zero_of(published), ranks=8)


def test_a_run_that_may_not_fit_prints_a_warning_and_starts(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(fake_smi(tmp_path / "bin", gib=60)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert certain_bytes(load_of(published)) < 60 * GIB
    check_memory(Workspace(Path(), "none"), published, zero_of(published), ranks=8)
    assert re.search(r"63\.3 GiB.*60\.0 GiB", capsys.readouterr().out)


def test_the_memory_check_ignores_cpu_runs(published, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_memory(Workspace(Path(), "none"), published, zero_of(published), ranks=8)


def test_the_summary_has_steps_memory_and_remedies(published):
    text = outline_plan(plan_run(Workspace(ROOT, NAME), published, ranks=4, request=PlanRequest(gpu_memory_gib=80)))
    assert "3,319 steps, 4 ranks x 2 rows x accumulation 16" in text
    assert "DOES NOT FIT a GPU of 80 GiB; changes that fit:" in text
    assert "8 ranks: 63.3 GiB" in text


def test_plan_answers_without_loading_torch():
    command = ["plan", "--profile", NAME, "--ranks", "8", "--gpu-memory-gib", "80", "--json"]
    code = f"import sys; from ropeway.cli.main import app; app({command}, standalone_mode=False)\n"
    code += "assert not {'torch', 'transformers', 'deepspeed', 'prefect', 'dvc'} & set(sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    plan = json.loads(said.stdout)
    assert (plan["fits"], plan["optimizer_steps"], plan["ranks"]) == (True, 3319, 8)
