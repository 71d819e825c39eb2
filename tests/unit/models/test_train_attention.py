import sys
from inspect import Parameter, Signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ropeway.config.load_params import load_profile
from ropeway.models import attention
from ropeway.models.attention import (
    VARLEN,
    Heads,
    attend_each,
    borders,
    choose_attention,
    flash_attention_2,
    flash_attention_3,
    kernel_fault,
    register_attention,
    torch_varlen,
    varlen_attention,
)
from ropeway.runtime.errors import ConfigError
from tests.support.small_llama import batch, small_llama
from tests.support.tiny_run import ROOT


class RecordingKernel:
    """Computes a flash kernel's result on the CPU, sequence by sequence; records the boundaries it receives."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, cu_seqlens, longest, scale):
        self.calls.append((cu_seqlens.tolist(), longest))
        rows = [slice(begin, end) for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        assert max(row.stop - row.start for row in rows) == longest
        return torch.cat([self._attend(query[row], key[row], value[row], scale) for row in rows])

    def _attend(self, *parts_and_scale):
        *parts, scale = parts_and_scale
        q, k, v = (part.transpose(0, 1) for part in parts)
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(0, 1)


def compare(ours, reference, given):
    """Compare losses and gradients of two models on one batch."""
    found, expected = ours(**given), reference(**given)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("lengths", "rows"), [((7, 1, 12), 1), ((9,), 3)], ids=["packed", "padded"])
def test_the_kernel_gets_all_sequence_boundaries_and_matches_sdpa_losses_and_gradients(lengths, rows, checkpointed):
    kernel = RecordingKernel()
    register_attention(kernel)
    ours, reference = small_llama(VARLEN, checkpointed=checkpointed), small_llama("sdpa")
    given = batch(lengths, rows)
    compare(ours, reference, given)
    ends = np.cumsum([0, *lengths * rows]).tolist()
    assert kernel.calls == [(ends, max(lengths))] * len(kernel.calls)
    assert len(kernel.calls) == (4 if checkpointed else 2)


def test_on_a_cpu_packed_sequences_are_isolated_and_match_sdpa():
    register_attention(attend_each)
    ours, reference = small_llama(VARLEN, checkpointed=True), small_llama("sdpa")
    given = batch((7, 1, 12))
    compare(ours, reference, given)


def test_a_sequence_begins_where_the_position_is_0():
    ends, longest = borders(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]))
    assert ends.tolist() == [0, 4, 6, 7, 8]
    assert longest == 4


def test_an_attention_mask_is_rejected():
    with pytest.raises(ConfigError, match="mask"):
        varlen_attention(
            None, *[torch.zeros(1, 1, 2, 4)] * 3, torch.ones(1, 2), kernel=RecordingKernel(), cu_seqlens=None, longest=2
        )


HEADS = Heads(query=4, key_value=2, size=8)
CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def profile():
    return load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]


def test_on_a_cpu_attention_is_sdpa_and_packed_rows_go_sequence_by_sequence(profile):
    assert choose_attention(profile, HEADS, CPU).implementation == "sdpa"
    packed = choose_attention(profile.model_copy(update={"layout": "packed"}), HEADS, CPU)
    assert (packed.implementation, packed.kernel) == (VARLEN, attend_each)


def test_flash_attention_in_fp32_is_refused(profile):
    with pytest.raises(ConfigError, match="fp16 or bf16"):
        choose_attention(profile.model_copy(update={"dtype": "fp32"}), HEADS, CARD)


def kernels(monkeypatch, *found):
    """Make these the installed flash kernels: (name, kernel or the error of its import)."""

    def load(name, kernel):
        def act(**_):
            if isinstance(kernel, Exception):
                raise kernel
            return name, kernel

        return act

    monkeypatch.setattr(attention, "FLASH_KERNELS", tuple((name, load(name, kernel)) for name, kernel in found))
    fault = kernel_fault
    monkeypatch.setattr(attention, "kernel_fault", lambda kernel, heads, dtype, _: fault(kernel, heads, dtype, CPU))


def fails(*_):
    raise RuntimeError("no kernel image is available for execution on the device\nmore")


def ignores_boundaries(q, k, v, _cu, longest, scale):
    return attend_each(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), longest, scale)


def wrong_gradient(q, k, v, cu, longest, scale):
    return attend_each(q, k.detach() + 0 * k, v, cu, longest, scale)


def test_the_first_kernel_that_works_is_used_and_broken_ones_are_named(profile, monkeypatch):
    absent, broken = ModuleNotFoundError("x"), ImportError("undefined symbol")
    kernels(monkeypatch, ("absent", absent), ("broken", broken), ("old card", fails), ("good", attend_each))
    chosen = choose_attention(profile, HEADS, CARD)
    assert (chosen.effective, chosen.kernel) == ("good (cuda)", attend_each)
    assert [reason.partition(":")[0] for reason in chosen.rejected] == ["broken", "old card"]


def test_without_a_working_kernel_the_refusal_names_every_one_with_its_reason(profile, monkeypatch):
    kernels(monkeypatch, ("absent", ModuleNotFoundError("x")), ("old card", fails))
    with pytest.raises(ConfigError, match=r"absent: not installed; old card: RuntimeError: no kernel image.*false"):
        choose_attention(profile, HEADS, CARD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [HEADS, Heads(4, 4, 8)], ids=["grouped", "equal"])
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [(attend_each, None), (ignores_boundaries, "output differs"), (wrong_gradient, "gradient of k differs")],
)
def test_a_kernel_is_checked_on_output_and_gradients(kernel, fault, heads, dtype):
    found = kernel_fault(kernel, heads, dtype, CPU)
    assert found is None if fault is None else found.startswith(fault)


def fake_varlen(*names):
    """Return a stand-in for torch's `varlen_attn` that has these keyword arguments and rejects others."""

    def varlen_attn(*parts, **options):
        query, key, value, ends, also_ends, longest, also_longest = parts
        if unknown := set(options) - set(names):
            raise TypeError(f"unexpected {unknown}")
        assert options["window_size"] == (-1, 0)
        assert (ends is also_ends, longest) == (True, also_longest)
        assert options.get("enable_gqa") or query.shape[1] == key.shape[1]
        return attend_each(query, key, value, ends, longest, options["scale"]), torch.zeros(())

    varlen_attn.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in names])
    return varlen_attn


@pytest.mark.parametrize(
    "names",
    [("scale", "window_size"), ("scale", "window_size", "enable_gqa")],
    ids=["torch 2.11", "torch 2.13"],
)
def test_torchs_kernel_gets_only_the_arguments_that_its_version_has(monkeypatch, names):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", fake_varlen(*names))
    name, kernel = torch_varlen()
    assert torch.__version__ in name
    assert kernel_fault(kernel, HEADS, torch.float16, CPU) is None


@pytest.mark.parametrize(
    ("module", "load"), [("flash_attn", flash_attention_2), ("flash_attn_interface", flash_attention_3)]
)
def test_flash_attn_of_either_generation_gets_boundaries_scale_and_causality(monkeypatch, module, load):
    def flash_attn_varlen_func(*parts, softmax_scale=None, causal=False, deterministic=False):
        query, key, value, ends, _, longest, _ = parts
        assert (causal, deterministic) == (True, True)
        return attend_each(query, key, value, ends, longest, softmax_scale), None

    fake = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, module, fake)
    name, kernel = load(deterministic=True)
    assert "unknown version" in name
    assert kernel_fault(kernel, HEADS, torch.bfloat16, CPU) is None
