"""What a cell will need of its device's memory, before anything is loaded.

The network's own code runs once on tensors that have a size but no content (torch's fake tensors), and every storage it
allocates and frees is counted: weights of any size take seconds, and gradient checkpointing, guidance or another
attention kernel are seen as they are. Not seen: the context of the device (half a gigabyte on a GPU) and fragmentation.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ablate.components import build
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell
from ablate.recipe import ModelRecipe, Recipe, reward_terms
from runners.attention import use_kernel
from runners.embeddings import CLIP_TOKENS, MOST
from runners.hub import ENCODERS
from runners.identity import model_path
from runners.policy import add_lora, images_at_once
from runners.rewards import load_term

COPIES = 7  # of trained weights in float32: current, gradient, old, reference, average, and Adam's two moments


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The parts of a model on the meta device, without weights."""

    transformer: SD3Transformer2DModel
    autoencoder: AutoencoderKL
    num_encoder_parameters: int
    num_clip_tokens: int = CLIP_TOKENS


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: int  # frozen: transformer and autoencoder
    encoders: int  # frozen: text encoders
    rewards: int  # as they state it themselves; those of one's own do not
    trained: int  # weights with their copies, gradients and the optimizer's moments
    prompts: int  # embeddings that are kept for later epochs
    samples: int  # of an epoch: latents, recorded steps and embeddings
    joining: int  # the batches of a rollout into one: for a moment both are there
    probe: int  # of an epoch, and what an update takes of it and of the embeddings
    rollout: int  # one batch of network calls
    evaluation: int  # the same under its own guidance, and its embeddings; there are no samples then
    update: int  # one micro-batch, forward and backward
    step: int  # of the optimizer: the square roots of all second moments
    decode: int  # one batch of images
    host: int  # of the machine, for each process that has a GPU
    offloaded: bool  # encoders are there only while they encode
    rewards_offloaded: bool  # rewards are not there during updates

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        updating = self.updating if self.rewards_offloaded else self.updating + self.rewards
        at_work = self.samples + max(self.sampling + self.rewards, updating)
        beside = max(self.encoders + self.rewards, at_work) if self.offloaded else self.encoders + at_work
        return self.weights + self.trained + self.prompts + beside

    @property
    def sampling(self) -> int:
        """The most beside the samples while images are made; evaluation comes when the samples are gone."""
        return max(self.joining, self.rollout, self.evaluation - self.samples, self.decode)

    @property
    def updating(self) -> int:
        """The most beside the samples during an update."""
        return self.probe + max(self.update, self.step)

    @property
    def work(self) -> int:
        """The most beside the samples and the rewards, of all that comes one after the other."""
        return max(self.sampling, self.updating)


def read_architecture(recipe: ModelRecipe) -> Architecture:
    """The parts of a recipe's model from its configuration files: kilobytes, from a folder or the hub."""

    def configuration(part: str, file: str = "config.json") -> dict[str, Any]:
        folder = Path(model_path(recipe.path))
        name = f"{part}/{file}" if part else file
        path = folder / name if folder.exists() else hf_hub_download(recipe.path, name, revision=recipe.revision)
        content: dict[str, Any] = json.loads(Path(path).read_text())
        return content

    index = configuration("", "model_index.json")
    encoders = [name for name in ENCODERS if index.get(name, [None])[0]]
    if not recipe.max_sequence_length:
        encoders = [name for name in encoders if name != "text_encoder_3"]
    with torch.device("meta"):
        num_encoder_parameters, num_clip_tokens = 0, CLIP_TOKENS
        for name in encoders:
            kind = getattr(transformers, index[name][1])
            encoder = kind(kind.config_class(**configuration(name)))
            num_encoder_parameters += sum(p.numel() for p in encoder.parameters())
            num_clip_tokens = getattr(encoder.config, "max_position_embeddings", num_clip_tokens)
        return Architecture(
            transformer=SD3Transformer2DModel.from_config(configuration("transformer")),
            autoencoder=AutoencoderKL.from_config(configuration("vae")),
            num_encoder_parameters=num_encoder_parameters,
            num_clip_tokens=num_clip_tokens,
        )


def estimate(cell: Cell, architecture: Architecture) -> MemoryEstimate:
    """What each of the cell's devices needs."""
    recipe, model = cell.recipe, cell.recipe.model
    dtype: torch.dtype = getattr(torch, model.dtype)
    network, autoencoder = architecture.transformer, architecture.autoencoder
    for part in (network, autoencoder):
        nn.Module.to(part, dtype)
    network.requires_grad_(model.lora_rank is None)
    autoencoder.requires_grad_(False)
    if model.lora_rank is not None:
        with torch.device("meta"):
            add_lora(network, model)
    use_kernel(network, model.attention)
    if model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    parts = [t for part in (network, autoencoder) for t in (*part.parameters(), *part.buffers())]
    frozen = sum(t.numel() for t in parts if not t.requires_grad)  # the positions of SD 3.5 alone are 226 million
    side = model.resolution // 2 ** (len(autoencoder.config.block_out_channels) - 1)
    latent = (network.config.in_channels, side, side)
    tokens = (architecture.num_clip_tokens + model.max_sequence_length, network.config.joint_attention_dim)

    with FakeTensorMode():
        _give_storage(network)
        _give_storage(autoencoder)

        def call(num_images: int, guidance_scale: float, *, gradient: bool = False) -> int:
            n = num_images * (1 + (guidance_scale > 1))
            inputs = {
                "hidden_states": torch.empty(n, *latent, dtype=dtype),
                "timestep": torch.empty(n),
                "encoder_hidden_states": torch.empty(n, *tokens, dtype=dtype),
                "pooled_projections": torch.empty(n, network.config.pooled_projection_dim, dtype=dtype),
            }

            def run() -> None:
                casting = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
                with torch.set_grad_enabled(gradient), casting:
                    velocity = network(**inputs, return_dict=False)[0]
                if gradient:
                    velocity.float().square().mean().backward()

            held = sum(x.nbytes for x in inputs.values())
            gradients = 4 * trained if gradient else 0  # counted with what is trained
            return held + max(0, _peak(run) - gradients)

        decoded = min(images_at_once(model), recipe.rollout.batch_size)
        latents = torch.empty(decoded, *latent, dtype=dtype)
        with torch.no_grad():
            decode = _peak(lambda: autoencoder.decode(latents, return_dict=False))
        update = call(recipe.update.micro_batch_size, recipe.update.guidance_scale, gradient=True)
        rollout = call(recipe.rollout.batch_size, recipe.rollout.guidance_scale)
        evaluation = call(recipe.rollout.batch_size, recipe.evaluation.guidance_scale)
    size = dtype.itemsize
    embedding = size * (tokens[0] * tokens[1] + network.config.pooled_projection_dim)
    weights, encoders, rewards = size * frozen, size * architecture.num_encoder_parameters, _rewards(recipe)
    away = encoders * model.offload_encoders + rewards * recipe.scoring.offload
    loaded = weights + encoders + (0 if model.lora_rank else size * trained)  # before it goes to the device
    return MemoryEstimate(
        weights=weights,
        encoders=encoders,
        rewards=rewards,
        trained=4 * COPIES * trained,
        prompts=embedding * _num_prompts(recipe),
        **_samples(cell, 4 * latent[0] * side * side, embedding),
        rollout=rollout,
        evaluation=evaluation + embedding * recipe.evaluation.num_prompts // recipe.devices,
        update=update,
        step=4 * trained,
        decode=decode,
        host=max(loaded, away + _images(recipe) // recipe.devices),
        offloaded=model.offload_encoders,
        rewards_offloaded=recipe.scoring.offload,
    )


def latents_per_sample(cell: Cell) -> tuple[int, int]:
    """How many latents a rollout keeps of a sample (x0, three per recorded step), and its probe (two or three each)."""
    estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES[1:])
    steps = cell.recipe.rollout.num_steps
    num_scored: int = sampler.num_scored(steps)
    points: int = estimator.num_points(cell.recipe.update.num_points, steps, num_scored)
    scored = num_scored if "transitions" in estimator.needs else 0
    recorded = steps if "latents" in estimator.needs else 0
    return 1 + 3 * scored + recorded, (3 if scored else 2) * points


def _samples(cell: Cell, latent: int, embedding: int) -> dict[str, int]:
    """Bytes of the samples of an epoch, and of joining the batches that they come in, on each device."""
    rollout, updates, devices = cell.recipe.rollout, cell.recipe.update.updates_per_epoch, cell.recipe.devices
    rolled, probed = (latent * number for number in latents_per_sample(cell))
    chosen = rollout.num_groups * rollout.group_size
    drawn = rollout.num_groups * (rollout.candidates or rollout.group_size)
    parts = drawn * rolled if drawn > devices * rollout.batch_size else 0
    kept = chosen * rolled if rollout.resample_rounds else 0  # of the rounds before
    sizes = {
        "samples": drawn * (embedding + rolled),
        "joining": parts + kept,
        "probe": chosen * probed + chosen // updates * (embedding + probed),
    }
    return {name: size // devices for name, size in sizes.items()}


def _rewards(recipe: Recipe) -> int:
    """Bytes of the weights of all rewards and of the panel; equal ones are in memory once."""
    terms = (*reward_terms(recipe.reward), *reward_terms(recipe.evaluation.panel))
    rewards = {id(reward): reward for reward in map(load_term, terms)}
    return int(sum(2**30 * reward.about.gibibytes for reward in rewards.values()))


def _images(recipe: Recipe) -> int:
    """Bytes of the images of an epoch, or of an evaluation, whose batches become one array."""
    rollout = recipe.rollout
    drawn = rollout.num_groups * (rollout.candidates or rollout.group_size)
    return 3 * recipe.model.resolution**2 * max(drawn, 2 * recipe.evaluation.num_prompts)


def _num_prompts(recipe: Recipe) -> int:
    """Of how many prompts embeddings are kept in the end."""
    rollout, epochs = recipe.rollout, recipe.budget.epochs
    if epochs is None:
        return MOST
    return min(MOST, recipe.evaluation.num_prompts + epochs * (1 + rollout.resample_rounds) * rollout.num_groups)


def _give_storage(module: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of meta tensors; trained weights are float32."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                dtype = torch.float32 if p.requires_grad else p.dtype
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _peak(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while it ran, beyond what was there before."""
    storages = _Storages()
    with storages:
        work()
    return int(storages.peak)


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._known.add(storage)
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
