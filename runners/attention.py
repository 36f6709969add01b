"""Which of torch's kernels computes the attention of one transformer.

`torch.nn.attention.sdpa_kernel` sets flags of the whole process: a reward that scores on another thread would meet
them, and the recomputation of a checkpointed block, which runs outside of its context, would not. So the kernel is part
of the network's attention processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ablate.source import InputError, choices

Kernel = Callable[[Tensor, Tensor, Tensor], Any]
"""Of query, key and value [b, heads, t, d]; the output [b, heads, t, d] comes first."""
_aten = torch.ops.aten


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Any:
    if query.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return _aten._scaled_dot_product_flash_attention(query, key, value)


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return _aten._scaled_dot_product_efficient_attention(query, key, value, None, torch.is_grad_enabled())


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return _aten._scaled_dot_product_cudnn_attention(query, key, value, None, torch.is_grad_enabled())


KERNELS: Mapping[str, Kernel] = {
    "flash": _flash,
    "efficient": _efficient,
    "cudnn": _cudnn,
    "math": _aten._scaled_dot_product_attention_math,
}
OF_CPU = ("flash", "math")


def check_kernel(name: str, device: torch.device) -> None:
    """Raises InputError for a kernel that this kind of device does not have."""
    if device.type == "cpu" and name in KERNELS and name not in OF_CPU:
        raise InputError(f"model.attention: got {name!r}, which no CPU has{choices(name, ('auto', *OF_CPU))}")


def use_kernel(network: SD3Transformer2DModel, name: str) -> None:
    """Let all attention of a network take this kernel; `auto` leaves the choice to torch, call by call."""
    if name != "auto":
        network.set_attn_processor(_Processor(KERNELS[name]))


class _Processor(JointAttnProcessor2_0):  # type: ignore[misc]
    """Joint attention of SD3 by one kernel, in whatever thread or context it is called."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def __call__(self, attn: Attention, *given: Any, **more: Any) -> Any:
        with _Instead(self._kernel):
            return super().__call__(attn, *given, **more)


class _Instead(TorchFunctionMode):
    """A kernel in place of the function that chooses one; of this thread alone."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return self._kernel(query, key, value)[0]
