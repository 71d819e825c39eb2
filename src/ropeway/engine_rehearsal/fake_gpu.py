"""A card that DeepSpeed sees and that has no memory: tensors on it are torch's fake tensors.

`cpu:1` is the card and `cpu` is the host. Fake tensors treat the two as different devices, while autograd runs both on
a torch without CUDA. A fake tensor on "cuda" ends such a process: no device guard is linked in.
"""

from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.ops.adam import cpu_adam, fused_adam
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CARD = torch.device("cpu", 1)
HOST = torch.device("cpu")
_UNLIMITED = 2**60  # bytes


class FakeGpu(CPU_Accelerator):
    """DeepSpeed's CPU accelerator under another device name, with the properties of a card that decide about memory."""

    def device_name(self, device_index: int | None = None) -> str:
        """Return the card's name; DeepSpeed moves tensors to it, as to "cuda", which means the current card."""
        del device_index
        return str(CARD)

    def current_device_name(self) -> str:
        """Return the device on which DeepSpeed allocates what belongs to the card."""
        return str(CARD)

    def device_count(self) -> int:
        """Return 1: a rank uses one card."""
        return 1

    def is_fp16_supported(self) -> bool:
        """Return True, as every card does; nothing is computed."""
        return True

    def available_memory(self, device_index: int | None = None) -> int:
        """Return more bytes than a model needs; with too few, DeepSpeed would flatten the weights on the host."""
        del device_index
        return _UNLIMITED

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on the card."""
        return tensor.device == CARD

    def get_op_builder(self, class_name: str) -> None:
        """Return None, so that no op is compiled; a card has no shared-memory op either. Adam: see `install`."""
        del class_name


class _NoOpBuilder:
    """Stands for a compiled Adam. DeepSpeed allocates the moments; the op would only fill them."""

    def load(self) -> SimpleNamespace:
        """Return a module whose functions do nothing."""
        names = ("create_adam", "adam_update", "destroy_adam", "multi_tensor_adam")
        return SimpleNamespace(**dict.fromkeys(names, _do_nothing))


def _do_nothing(*_: object) -> None:
    return None


def install() -> None:
    """Make DeepSpeed use the fake card in this process. Nothing is compiled and no rank waits for another."""
    deepspeed.accelerator.set_accelerator(FakeGpu())
    cpu_adam.CPUAdamBuilder = _NoOpBuilder
    fused_adam.FusedAdamBuilder = _NoOpBuilder
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = _do_nothing  # compares values between ranks


class KeepDevice(TorchFunctionMode):
    """Puts tensors made of Python numbers on the card if that was asked for: torch ignores the index of `cpu:1`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run a function, and move its result to the device that was asked for."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.Tensor.new_tensor:
            return _on(kwargs.get("device", args[0].device), out)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return _on(kwargs["device"], out)
        return out


class KeepDeviceOfCopies(TorchDispatchMode):
    """The same for copies of such tensors, which torch makes outside of its fake tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation, and move its result to the device that was asked for."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:  # noqa: SLF001 - its only name
            return _on(kwargs["device"], out)
        return out


def _on(device: torch.device | str, tensor: torch.Tensor) -> torch.Tensor:
    device = torch.device(device)
    return tensor if tensor.device == device else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
