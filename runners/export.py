"""What a finished cell leaves to others: its weights as diffusers loads them, with a card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from ablate.plan import Cell
from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners.policy import SD3Policy

WEIGHTS, PARTIAL = "weights", "weights.partial"
LORA = "pytorch_lora_weights.safetensors"
CARD = """\
---
base_model: {base}
library_name: diffusers
tags: [{tags}]
---

# {id}

{what} of `{base}`{revision}, trained by `ablate` to raise the reward `{reward}`: objective {objective}, estimator
{estimator}, sampler {sampler}, seed {seed}. The weights are the average that was evaluated.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("{base}", dtype=torch.bfloat16)
{load}
image = pipe("a photo of two clocks", num_inference_steps=40, guidance_scale={guidance}).images[0]
```

Rewards can be raised in ways that nobody wanted: look at images of prompts that were not trained on.
"""


def export(folder: Path, cell: Cell, policy: SD3Policy) -> None:
    """Write the averaged weights and a card to weights/ in a cell's folder: all of it, or nothing that has its name."""
    partial, target = folder / PARTIAL, folder / WEIGHTS
    for left in (partial, target):  # of an attempt that was killed, or that failed later
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    _save(partial, policy)
    (partial / "README.md").write_text(_card(cell), encoding="utf-8")
    for path in (*partial.rglob("*"), partial):  # on the disk before it has its name
        _sync(path)
    partial.replace(target)
    _sync(folder)


def _save(target: Path, policy: SD3Policy) -> None:
    """The averaged weights, as diffusers writes them."""
    with policy.using("average"):
        if policy.recipe.lora_rank is None:
            policy.network.save_pretrained(target / "transformer")
        else:
            StableDiffusion3Pipeline.save_lora_weights(
                target,
                transformer_lora_layers=get_peft_model_state_dict(policy.network),
                transformer_lora_adapter_metadata=policy.network.peft_config["default"].to_dict(),
            )


def _card(cell: Cell) -> str:
    model = cell.recipe.model
    lora = model.lora_rank is not None
    here = 'SD3Transformer2DModel.from_pretrained("transformer", dtype=torch.bfloat16)  # from diffusers too'
    return CARD.format(
        base=model.path,
        revision=f" at `{model.revision}`" if model.revision else "",
        id=cell.id,
        what=f"A LoRA of rank {model.lora_rank}" if lora else "All weights of the transformer",
        tags="lora, text-to-image" if lora else "text-to-image",
        reward=cell.recipe.reward,
        objective=cell.objective,
        estimator=cell.estimator,
        sampler=cell.sampler,
        seed=cell.seed,
        load='pipe.load_lora_weights(".")' if lora else f"pipe.transformer = {here}",
        guidance=cell.recipe.evaluation.guidance_scale,
    )


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(folder: Path, policy: SD3Policy) -> None:
    """Make a cell's exported weights the current ones. Raises InputError where there are none."""
    load_weights(folder / WEIGHTS, policy)


def weights_file(folder: Path, model: ModelRecipe) -> Path:
    """The file in an exported folder that a policy of such a model reads; it need not exist."""
    return folder / (LORA if model.lora_rank else "transformer/diffusion_pytorch_model.safetensors")


def load_weights(folder: Path, policy: SD3Policy) -> None:
    """Make the weights of an exported folder the current ones. Raises InputError where there are none."""
    path = weights_file(folder, policy.recipe)
    if not path.exists():
        raise InputError(
            f"{folder.parent}: has no {folder.name}/; a cell writes them when it ends, if export_weights is true"
        )
    tensors = load_file(path)
    if policy.recipe.lora_rank is not None:
        tensors = {_key(name): tensor for name, tensor in tensors.items()}
    own: dict[str, Tensor] = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
    if missing := own.keys() - tensors.keys():
        raise InputError(f"{folder}: has no {sorted(missing)[0]}; was it written for another recipe?")
    for name, p in own.items():
        p.data.copy_(tensors[name])


def _key(name: str) -> str:
    """`transformer.block.lora_A.weight` of a file -> `block.lora_A.default.weight` of the network."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f"{part}.weight", f"{part}.default.weight")
    return name.removeprefix("transformer.")
