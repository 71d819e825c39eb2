import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ropeway.config.load_params import load_profile
from ropeway.models.attention import (
    VARLEN,
    attend_each,
    borders,
    choose_attention,
    register_attention,
    varlen_attention,
    varlen_kernel,
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


def test_an_unused_gpu_does_not_change_the_kernel_of_a_cpu_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert varlen_kernel(on_cuda=False) is attend_each


def test_a_sequence_begins_where_the_position_is_0():
    ends, longest = borders(torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]))
    assert ends.tolist() == [0, 4, 6, 7, 8]
    assert longest == 4


def test_an_attention_mask_is_rejected():
    with pytest.raises(ConfigError, match="mask"):
        varlen_attention(
            None, *[torch.zeros(1, 1, 2, 4)] * 3, torch.ones(1, 2), kernel=RecordingKernel(), cu_seqlens=None, longest=2
        )


def test_the_effective_attention_is_one_that_the_device_supports():
    profile = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]
    assert choose_attention(profile, cuda=False).effective == "sdpa (cpu)"
    packed = choose_attention(profile.model_copy(update={"layout": "packed"}), cuda=False)
    assert (packed.effective, packed.implementation) == ("sdpa sequence by sequence (cpu)", VARLEN)
    asked = choose_attention(profile, cuda=True)
    assert (asked.implementation, asked.on_cuda) == (VARLEN, True)
    assert not packed.on_cuda
    with pytest.raises(ConfigError, match="fp16 or bf16"):
        choose_attention(profile.model_copy(update={"dtype": "fp32"}), cuda=True)
