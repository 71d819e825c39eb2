"""Bytes that a layer of a live model stores for its backward pass, counted on tensors without memory.

`FakeTensorMode` runs the model's own code on shapes and computes nothing. The number of positions is a prime that
divides no width, so that tensors of positions are told from weights and their gradients.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropeway.models.architectures import LayerBytes
from ropeway.models.open_model import backbone, decoder_layers, disable_dropout
from ropeway.models.proofs import shorten

POSITIONS = 1009
_COUNTED = "ropeway_counted"  # name in transformers' AttentionInterface
_DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes per number


def count_activations(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Return bytes per number (`2`, `4`) -> fields of `LayerBytes`.

    Attention is counted as a fused kernel that stores its inputs, its output and a log-sum-exp per head. Empty where a
    layer cannot be run alone, or has tensors of positions x positions.
    """
    AttentionInterface.register(_COUNTED, _fused_attention)
    try:
        return {str(width): asdict(_count_layers(model.config, dtype)) for width, dtype in _DTYPES.items()}
    except Exception as error:  # noqa: BLE001 - a family's own code may raise anything, and the plan does without
        reason = str(error).strip().partition("\n")[0]
        print(f"activations of a layer cannot be counted ({reason}); `ropeway plan` counts those of a Llama")
        return {}


def _count_layers(config: PreTrainedConfig, dtype: torch.dtype) -> LayerBytes:
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):  # new models draw their weights from the global generator
        model = AutoModelForCausalLM.from_config(
            shorten(config), trust_remote_code=False, attn_implementation=_COUNTED, dtype=dtype
        ).train()
        disable_dropout(model)  # as training does
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_drop_gradient)
        layers = decoder_layers(model)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, given, named: calls.append((given, named)), with_kwargs=True)
            for layer in layers
        ]
        with torch.no_grad():
            backbone(model)(
                input_ids=torch.zeros(1, POSITIONS, dtype=torch.long),
                position_ids=torch.arange(POSITIONS)[None],
                use_cache=False,
            )
        for hook in hooks:
            hook.remove()
        counts = [_count_layer(layer, *call) for layer, call in zip(layers, calls, strict=True)]
    return LayerBytes(*(max(each) // POSITIONS for each in zip(*counts, strict=True)))


def _count_layer(layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the bytes of `LayerBytes` for all positions."""
    (states, *others), named = given or (named["hidden_states"],), {**named}
    named.pop("hidden_states", None)

    def run(state: Tensor) -> Tensor:
        found = layer(state, *others, **named)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    with torch.no_grad(), _PositionBytes() as forward:
        run(states)
    leaf = states.detach().requires_grad_()
    with _PositionBytes() as counter:
        out = run(leaf + 0)  # the input is counted only if the layer stores it
        kept = counter.now - out.untyped_storage().nbytes()
        counter.peak = 0
        out.backward(torch.ones_like(out))
    return kept, forward.peak, counter.peak - kept - out.untyped_storage().nbytes()


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


class _PositionBytes(TorchDispatchMode):
    """Counts the bytes of storages with positions that operations create, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = {_storage_id(part) for part in tree_iter((args, kwargs)) if isinstance(part, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, given)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        size = storage.nbytes()
        if key in self._seen or key in given or size % POSITIONS:
            return
        if size % POSITIONS**2 == 0:
            raise ValueError("a tensor has positions x positions elements")
        self._seen.add(key)
        self.now += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - tensors without memory have no address


class _FusedAttention(torch.autograd.Function):
    """The shapes of a fused attention kernel: what it stores, returns and gives back."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous()
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: BackwardCFunction, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


def _fused_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Return `(B, T, H, D)` from `(B, H, T, D)` queries and `(B, K, T, D)` keys and values."""
    return _FusedAttention.apply(query, key, value), None
