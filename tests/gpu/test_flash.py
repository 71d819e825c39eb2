"""On a card: the flash kernel that params ask for computes what eager attention does, RoPE stays fp32."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.train.attention import VARLEN, register, varlen_kernel
from ropeway.train.loss import SupervisedLoss

pytestmark = pytest.mark.gpu


def losses(implementation, dtype, given):
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=8192,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation).to("cuda", dtype)
    model.model.rotary_emb.inv_freq.data = model.model.rotary_emb.original_inv_freq.to("cuda", torch.float32)
    return SupervisedLoss(model)(**given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(4000, 17, 4175), (2048,)])
def test_flash_gives_the_losses_of_eager_attention_sequence_by_sequence(dtype, lengths):
    register(varlen_kernel())
    alone = []
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    ids = torch.randint(0, 1000, positions.shape, generator=torch.Generator().manual_seed(0)).cuda()
    whole = {"input_ids": ids, "position_ids": positions, "targets": ids, "loss_mask": positions >= 0}
    begin = 0
    for length in lengths:
        part = {name: value[:, begin : begin + length] for name, value in whole.items()}
        alone.append(losses("eager", dtype, part))
        begin += length
    assert torch.allclose(losses(VARLEN, dtype, whole), torch.cat(alone), atol=0.05)
