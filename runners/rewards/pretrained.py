"""Weights of files as transformers' models: every one of them, under the names that transformers gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# counts that older files hold and newer versions compute, and what only a loss needs
DISPENSABLE = re.compile(r"(^|\.)(position_ids|relative_position_index)$|^criterion\.")
State = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


def read(path: Path) -> Any:
    """What a torch file holds: tensors and plain data, nothing that is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def part(state: State, prefix: str) -> State:
    """The weights of a module within another, under their names in it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def renamed(state: State, names: Mapping[str, str]) -> State:
    """The weights under other names: patterns and what replaces them, applied in order."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        found[name] = tensor
    return found


def frozen(network: Network) -> Network:
    """The network for inference: no dropout, no gradients."""
    return network.eval().requires_grad_(False)


def complete(kind: Any, folder: Path | None = None, *, state: State | None = None, **options: Any) -> Any:
    """A transformers model in float32, of a folder or of `state` and a `config`.

    Raises ValueError where weights are missing or left over: transformers would fill them in at random, or drop them.
    """
    network, report = kind.from_pretrained(
        folder, state_dict=state, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **options
    )
    for problem, names in (("missing", report["missing_keys"]), ("unknown", report["unexpected_keys"])):
        if names := [name for name in names if not DISPENSABLE.search(name)]:
            raise ValueError(f"{kind.__name__}: {len(names)} weights are {problem}, as {min(names)}")
    return frozen(network)
