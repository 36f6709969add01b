"""Everything a cell holds fixed. A preset is a YAML file in grids/recipes/; every field has one meaning.

Torch-free: reports read recipes on machines without it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Unknown keys are errors, and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelRecipe(Strict):
    path: str = "tiny"
    """`tiny` (the embedded pipeline), a folder written by `save_pretrained`, or a hub id."""
    revision: str | None = None
    """Commit or tag of the hub repository."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; trained weights and log-probs are float32. Not float16: without loss scaling, gradients
    of a mean over 65,536 dimensions round to zero."""
    lora_rank: Count | None = None
    """Rank of a LoRA on the attention projections; null trains all weights of the transformer."""
    lora_alpha: Positive = 64
    max_sequence_length: Annotated[int, Field(ge=0, le=512)] = 256
    """Tokens of the T5 encoder; 0 loads none."""
    resolution: Count = 512
    """Height and width of the images in pixels."""


class PromptsRecipe(Strict):
    train: str = "scenes"
    """`scenes`, or a file: GenEval's *.jsonl or one prompt per line."""
    evaluation: str | None = None
    """A file of prompts that are never trained on; null for a source that has its own."""


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
    batch_size: Count = 24
    """Images that go through the network at once; changes memory and speed, not the result."""


class AdvantageRecipe(Strict):
    centre: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: the mean of its group, or of the others in its group (RLOO)."""
    scale: Literal["none", "group", "batch"] = "none"
    """What the centred reward is divided by: nothing, or a standard deviation."""
    coef: Positive = 1.0
    clip: Positive | None = None
    """Bound on the absolute advantage, after scaling."""


class KLRecipe(Strict):
    coef: NotNegative = 0.0
    """Weight of the squared velocity difference to the reference; 0 spares the reference's network calls."""


class OldPolicyRecipe(Strict):
    decay: Literal["none", "slow", "late"] = "none"
    """After each epoch old = d old + (1 - d) current. none: d = 0. slow: min(0.001 t, 0.5). late: 0 for 75 updates,
    then min(0.0075 (t - 75), 0.999); t counts updates. Types 0, 1 and 2 of DiffusionNFT's `decay_type`."""


class UpdateRecipe(Strict):
    updates_per_epoch: Count = 1
    """Optimizer steps per epoch, each on its own share of the groups."""
    num_points: Count | None = None
    """Evaluation points per sample, the same for every estimator; null: as many as its source uses."""
    share_probe: Literal["no", "group"] = "no"
    """group: all samples of a prompt are probed at the same levels and noise, whose part of the gradient then cancels
    between them, as advantages of a group sum to zero. Objectives that compare samples always do."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance of the velocity whose likelihood is estimated."""
    micro_batch_size: Count = 32
    """Network inputs (samples x points) per backward; changes memory and speed, not the result."""
    learning_rate: Positive = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 1e-4
    max_grad_norm: Positive = 1.0


class EvaluationRecipe(Strict):
    split: Literal["development", "evaluation"] = "evaluation"
    """Choose recipes on `development`; report `evaluation`."""
    num_prompts: Count = 600
    every: Count = 10
    """Epochs between evaluations; the first is before training, the last after it."""
    num_steps: Count = 10
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    seed: int = 0
    """Of the fixed noise, one per prompt: cells and epochs are paired."""
    ema_decay: Share = 0.9
    """Evaluated weights are an average over updates with decay min(this, (1 + t) / (10 + t)); 0 takes the current."""


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
    reward: str = "scenes"
    rollout: RolloutRecipe = RolloutRecipe()
    advantage: AdvantageRecipe = AdvantageRecipe()
    kl: KLRecipe = KLRecipe()
    old_policy: OldPolicyRecipe = OldPolicyRecipe()
    update: UpdateRecipe = UpdateRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    budget: BudgetRecipe
    checkpoint_every: Count = 10
    """Epochs between checkpoints, from which an interrupted cell resumes."""

    @model_validator(mode="after")
    def _whole_groups(self) -> Recipe:
        if self.rollout.num_groups % self.update.updates_per_epoch:
            raise ValueError(
                f"rollout.num_groups = {self.rollout.num_groups} must be a multiple of update.updates_per_epoch = "
                f"{self.update.updates_per_epoch}: an update takes whole groups"
            )
        return self
