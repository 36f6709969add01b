"""Everything a cell holds fixed. A preset is a YAML file in grids/recipes/; every field has one meaning.

Torch-free: reports read recipes on machines without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ablate.geometry import check_devices

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Unknown keys are errors, and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _curve(label: str | None) -> str | None:
    if label is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.: -]{0,99}", label):
        allowed = "at most 100 letters, digits, spaces, '_', '.', ':' and '-', the first a letter or digit"
        raise ValueError(f"got {label[:60]!r}, expected {allowed}, as it names curves and files")
    return label


class RewardTerm(Strict):
    """One reward of a sum with its parameters: {"name": "remote", "weight": 0.5, "url": "http://..."}."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    weight: float = 1.0
    label: Annotated[str | None, AfterValidator(_curve)] = None
    """What its curve is called; by default its name. Two of one name need it."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        return self.label or self.name


RewardSpec = str | dict[str, float] | tuple[str | RewardTerm, ...]


def _name_or_terms(value: object) -> object:
    """A reward as people write it; one mapping with a name is a list of one."""
    weights = value.values() if isinstance(value, dict) else []
    if isinstance(value, str) or (weights and all(type(weight) in (int, float) for weight in weights)):
        return value
    terms = [value] if isinstance(value, dict) and "name" in value else value
    if isinstance(terms, (list, tuple)) and terms and all(isinstance(term, (str, dict, RewardTerm)) for term in terms):
        return tuple(RewardTerm.model_validate(term) if isinstance(term, dict) else term for term in terms)
    raise ValueError(
        f"got {value!r}, expected a name, names with weights as in {{scenes: 1, jpeg: 0.1}}, or a list of "
        "{name: ..., weight: ...} with the parameters of each"
    )


def reward_terms(spec: RewardSpec) -> tuple[RewardTerm, ...]:
    """A reward in full, however it was written."""
    if isinstance(spec, str):
        return (RewardTerm(name=spec),)
    if isinstance(spec, dict):
        return tuple(RewardTerm(name=name, weight=weight) for name, weight in spec.items())
    return tuple(RewardTerm(name=term) if isinstance(term, str) else term for term in spec)


class ModelRecipe(Strict):
    path: str = "tiny"
    """`tiny` (the embedded pipeline), a folder written by `save_pretrained`, or a hub id."""
    revision: str | None = None
    """Commit or tag of the hub repository."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; trained weights and log-probs are float32. With float16 the loss is scaled, as gradients
    of a mean over 65,536 dimensions would round to zero."""
    lora_rank: Count | None = None
    """Rank of a LoRA on the attention projections; null trains all weights of the transformer."""
    lora_alpha: Positive = 64
    lora_second_attention: bool = False
    """Adapts the second attention of SD 3.5 Medium's first blocks too."""
    tf32: bool = False
    """TensorFloat-32 in float32 matrix products, where the device has it."""
    compile: bool = False
    """torch.compile of the transformer's blocks: minutes at the start, booked apart, for faster network calls."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Which of torch's kernels computes attention; one that the device does not have is an error. auto: the fastest."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward: less memory, a third more time."""
    vae_tiling: bool = False
    """Decodes images in tiles: less memory at high resolution."""
    offload_encoders: bool = False
    """Text encoders are on the device only while they encode."""
    cache_embeddings: bool = False
    """Keeps prompt embeddings on disk, under ABLATE_CACHE or ~/.cache/ablate."""
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = 256
    """Tokens of the T5 encoder; 0 loads none."""
    resolution: Count = 512
    """Height and width of the images in pixels."""


class PromptsRecipe(Strict):
    train: str = "scenes"
    """`scenes`, `geneval` (families mixed as Flow-GRPO does), `geneval:equal`, `ocr`, or a file: GenEval's *.jsonl or
    one prompt per line."""
    evaluation: str | None = None
    """A file of prompts that are never trained on; null for the built-in sources' own."""


class RolloutRecipe(Strict):
    num_groups: Count = 48
    """Prompts per epoch."""
    group_size: Annotated[int, Field(ge=2)] = 24
    """Images per prompt."""
    num_steps: Count = 10
    """Network calls per image, whatever the sampler."""
    noise_schedule: Literal["diffusers", "linear"] = "diffusers"
    """How the noise levels are spaced before the shift; see ablate/flow.py."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance while sampling; 1 is none, at half the network calls."""
    truncate_timesteps: bool = False
    """Rolls out with int(1000 sigma) as the network's time, while updates take the exact one: a deviation of the
    released code of arXiv 2602.04663 and DiffusionNFT, for fidelity alone."""
    noise: Literal["independent", "group"] = "independent"
    """group: all images of a prompt start from the same noise; what differs is the sampler's own noise."""
    candidates: Count | None = None
    """Images rolled out per prompt, of which the best and the worst group_size / 2 are trained on (the idea behind
    Sol-RL); null: group_size, and all are."""
    resample_rounds: Annotated[int, Field(ge=0)] = 0
    """Further rounds of prompts, at most, until num_groups groups have unequal rewards: dynamic sampling of DAPO.
    Groups of equal rewards fill up what is still missing."""
    batch_size: Count = 24
    """Images that go through the network at once; changes memory and speed, not the result."""

    @model_validator(mode="after")
    def _halves(self) -> RolloutRecipe:
        if self.candidates is not None and self.candidates < self.group_size:
            raise ValueError(f"candidates = {self.candidates} must be at least group_size = {self.group_size}")
        if self.candidates is not None and self.group_size % 2:
            raise ValueError(
                f"group_size = {self.group_size} must be even with candidates: half are the best, half the worst"
            )
        return self


class AdvantageRecipe(Strict):
    transform: Literal["none", "win_rate"] = "none"
    """win_rate: a reward becomes the share of its group that it beats, ties counting half (Pref-GRPO)."""
    several: Literal["sum", "normalised", "whitened"] = "sum"
    """How several rewards become one: their weighted sum; the sum of advantages, each centred and scaled by itself
    (GDPO); or the weighted sum of rewards brought to mean 0 and deviation 1 over the batch."""
    centre: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: the mean of its group, or of the others in its group (RLOO)."""
    scale: Literal["none", "group", "batch"] = "none"
    """What the centred reward is divided by: nothing, or a standard deviation."""
    coef: Positive = 1.0
    whiten: bool = False
    """Brings the advantages to mean 0 and deviation 1 over the batch in the end (GDPO); undoes coef."""
    clip: Positive | None = None
    """Bound on the absolute advantage, after scaling."""


class KLRecipe(Strict):
    coef: NotNegative = 0.0
    """Weight of the regulariser towards the reference; 0 spares the reference's network calls."""
    kind: Literal["velocity", "path", "gaussian_step", "released_gaussian_step", "k1", "k2", "k3", "released_k3"] = (
        "velocity"
    )
    """Which regulariser; see ablate/kl.py. The gaussian_step kinds need an estimator on transitions."""


class OldPolicyRecipe(Strict):
    """After each epoch old = d old + (1 - d) current, d = min(rate max(t - start, 0), limit) after t updates."""

    start: Annotated[int, Field(ge=0)] = 0
    rate: NotNegative = 0.0
    """0: the old policy is the current one of the epoch's beginning."""
    limit: Share = 0.0

    def decay(self, num_updates: int) -> float:
        """d after so many updates."""
        return min(self.rate * max(num_updates - self.start, 0), self.limit)

    @property
    def lags(self) -> bool:
        """Whether the old policy ever differs from the one at the beginning of an epoch."""
        return self.rate > 0 and self.limit > 0


class ReferenceRecipe(Strict):
    refresh_every: Count | None = None
    """Updates after which the reference becomes a copy of the current policy; null: it is the base model for ever."""


class UpdateRecipe(Strict):
    updates_per_epoch: Count = 1
    """Optimizer steps per epoch, each on its own share of the groups."""
    num_points: Count | None = None
    """Evaluation points per sample, the same for every estimator; null: as many as its source uses."""
    group_probe: Literal["independent", "shared", "stratified"] = "independent"
    """shared: all samples of a prompt are probed at the same levels and noise, whose part of the gradient then cancels
    between them, as advantages of a group sum to zero; objectives that compare samples always do. stratified: their
    levels are spread evenly over each group, where the estimator's law of sigma is continuous."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance of the velocity whose likelihood is estimated."""
    micro_batch_size: Count = 32
    """Network inputs (samples x points) per backward; changes memory and speed, not the result."""
    learning_rate: Positive = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null: not at all."""


class EvaluationRecipe(Strict):
    split: Literal["development", "evaluation", "all"] = "evaluation"
    """Choose recipes on `development`, report `evaluation`; `all` is both, for where nothing is chosen."""
    num_prompts: Count = 600
    panel: tuple[str | RewardTerm, ...] = ()
    """Rewards that are measured on the held-out images and never trained on; reports look there for reward hacking."""
    every: Count = 10
    """Epochs between evaluations; the first is before training, the last after it."""
    num_steps: Count = 10
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    seed: int = 0
    """Of the fixed noise, one per prompt: cells and epochs are paired."""
    ema_decay: Share = 0.9
    """Evaluated weights are an average over updates with decay min(this, (1 + t) / (10 + t)); 0 takes the current."""


class ScoringRecipe(Strict):
    """What happens where a reward gives no score for an image: its group is left out of the update and counted."""

    timeout: Positive = 600
    """Seconds without an answer after which a reward is given up."""
    max_missing: Share = 0.25
    """Share of an epoch's groups, or of held-out images, without a score past which the cell ends as
    `reward_unavailable`, to be resumed."""
    offload: bool = False
    """Weights of rewards are on the device only while they score."""


class BudgetRecipe(Strict):
    """A cell stops at whichever comes first."""

    epochs: Count | None = None
    device_hours: Positive | None = None
    """Seconds x devices of rollout, reward and update, without evaluation."""
    target: float | None = None
    """Stops once an evaluation's accuracy (or score, where there is none) reaches this."""

    @model_validator(mode="after")
    def _ends(self) -> BudgetRecipe:
        if self.epochs is None and self.device_hours is None:
            raise ValueError("needs epochs or device_hours, so that a run ends")
        return self


class Recipe(Strict):
    model: ModelRecipe = ModelRecipe()
    prompts: PromptsRecipe = PromptsRecipe()
    reward: Annotated[RewardSpec, BeforeValidator(_name_or_terms)] = "scenes"
    """A name, names with the weights of their sum, or a list of rewards with weights and parameters."""
    scoring: ScoringRecipe = ScoringRecipe()
    rollout: RolloutRecipe = RolloutRecipe()
    advantage: AdvantageRecipe = AdvantageRecipe()
    kl: KLRecipe = KLRecipe()
    old_policy: OldPolicyRecipe = OldPolicyRecipe()
    reference: ReferenceRecipe = ReferenceRecipe()
    update: UpdateRecipe = UpdateRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    budget: BudgetRecipe
    devices: Count = 1
    """GPUs of a cell, one process each; the result is the same on any number that can share its groups."""
    export_weights: bool = True
    """Writes the weights of a finished cell as diffusers loads them; `ablate eval` needs them."""
    checkpoint_every: Count = 10
    """Epochs between checkpoints, from which an interrupted cell resumes."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Recipe:
        if self.rollout.num_groups % self.update.updates_per_epoch:
            raise ValueError(
                f"rollout.num_groups = {self.rollout.num_groups} must be a multiple of update.updates_per_epoch = "
                f"{self.update.updates_per_epoch}, as an update takes whole groups; change either"
            )
        return self

    @model_validator(mode="after")
    def _shared_evenly(self) -> Recipe:
        check_devices(self, self.devices)
        return self


def recipe_fields(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """Dotted paths of all fields of the recipe: kl.coef, rollout.num_steps, ..."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{path}" for path in recipe_fields(inner))
        else:
            yield name
