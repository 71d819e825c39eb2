"""The chunked loss equals plain cross entropy in value and gradient; both normalizations are as documented."""

import pytest
import torch
from torch import nn

from ropeway.models.supervised_loss import chunked_losses
from ropeway.stages.train.loss import micro_batch_loss, token_loss


def plain(hidden, head, targets):
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunked_losses_and_gradients_equal_plain_cross_entropy(chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (13,))
    results = []
    for losses in (lambda *args: chunked_losses(*args, chunk=chunk), plain):
        hidden = torch.randn(13, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head.zero_grad()
        value = losses(hidden, head, targets)
        value.sum().backward()
        results.append((value.detach(), hidden.grad.clone(), head.weight.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sixteen_bit_states_are_scored_in_fp32():
    head = nn.Linear(8, 50, bias=False).to(torch.bfloat16)
    assert chunked_losses(torch.randn(3, 8, dtype=torch.bfloat16), head, torch.tensor([1, 2, 3])).dtype == torch.float32


def test_a_micro_batch_without_targets_gives_zero_and_still_runs_backward():
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = micro_batch_loss(chunked_losses(hidden, nn.Linear(8, 50), torch.empty(0, dtype=torch.long)))
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    "cuts", [(10,), (5, 5), (1, 9), (2, 3, 5), (4, 4, 2), (1, 1, 8), (7, 3), (3, 3, 3, 1), (9, 1), (1,) * 10]
)
def test_token_normalisation_is_the_same_however_the_rows_are_cut(cuts):
    losses = torch.arange(1.0, 11.0)
    parts = torch.split(losses, list(cuts))
    shares = [token_loss(part, total=10, micro_batches=len(cuts)) for part in parts]
    assert float(sum(shares) / len(cuts)) == pytest.approx(float(losses.mean()), rel=1e-6)


def test_micro_batch_normalisation_weighs_every_micro_batch_alike():
    parts = [torch.tensor([4.0]), torch.tensor([1.0, 1.0, 1.0])]
    assert float(sum(map(micro_batch_loss, parts)) / 2) == pytest.approx(2.5)
