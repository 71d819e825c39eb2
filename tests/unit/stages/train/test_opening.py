"""Weights are opened on the card where every card holds all of them."""

from types import SimpleNamespace

import pytest
import torch

from ropeway.stages.train import rank


@pytest.mark.parametrize(
    ("device", "stage", "expected"), [("cuda", 2, "cuda:3"), ("cuda", 3, "cpu"), ("cpu", 2, "cpu")]
)
def test_weights_are_opened_where_a_rank_holds_all_of_them(monkeypatch, device, stage, expected):
    monkeypatch.setattr(rank, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert rank._opening_device(stage) == expected
