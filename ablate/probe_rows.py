"""What `ablate probe` writes: one JSON object per line in results/<grid>/probe/. Torch-free: figures read it anywhere.

gradients.jsonl     signal and noise of the policy gradient, by number of points
levels.jsonl        the same by noise level, every level a point
bias.jsonl          estimators against the true log-likelihood and the true policy gradient
likelihoods.jsonl   value and truth of single samples, for the scatter
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from ablate.recipe import Strict
from ablate.record import write_atomic
from ablate.source import InputError, dotted, parse_json, read_text

FOLDER = "probe"  # beside a grid's cells


class Measured(Strict):
    """What every row has: what was measured, and the settings it was measured with."""

    file: ClassVar[str]
    key: str
    """Digest of all settings that the row depends on; a measurement whose key is there is not repeated."""
    weights: str
    """`base`, or the folder that `--weights` names."""
    seed: int
    """Of rollouts and probes."""
    sampler: str
    """As the grid has it; `exact` for samples of a world's density itself."""
    estimator: str
    """As the grid has it; in a world, with its law of sigma."""
    axes: dict[str, Any]
    """Values of the grid's recipe axes."""


class GradientRow(Measured):
    """Signal and noise of an update of `groups` groups with `points` points per sample."""

    file = "gradients.jsonl"
    points: int
    """Per sample, as many as the estimator really draws."""
    groups: int
    """Prompts of the rollout."""
    group_size: int
    """Images per prompt."""
    draws: int
    """Independent probes on the same rollouts."""
    signal: float
    """Squared norm of E g given the rollouts, unbiased; g the gradient in nats per dimension."""
    noise: float
    """tr Cov g given the rollouts: what drawing the probe adds."""
    total_signal: float
    """Squared norm of E g over rollouts and probes."""
    total_noise: float
    """tr Cov g over rollouts and probes."""
    cosine: float
    """Of one draw's gradient with the mean of all other draws at every number of points, on the same rollouts."""
    effective_points: float
    """(sum w)^2 / sum w^2 over a sample's points, mean over samples."""
    largest_share: float
    """Of the weight on one point, mean over samples."""
    rollout_calls: float
    """Network calls of the rollout."""
    update_calls: float
    """Network calls of one gradient; one with gradient counts three."""
    rollout_seconds: float
    """Of the rollout, with its rewards."""
    update_seconds: float
    """Of one gradient, a group at a time."""


class LevelRow(Measured):
    """One noise level's part in the gradient with a point at every level."""

    file = "levels.jsonl"
    level: int
    """From 0, the noisiest, on; a stratum where the law of sigma is continuous."""
    sigma: float
    """Mean noise level."""
    weight_share: float
    """Of all points' weight w."""
    signal: float
    """Of this level's part of the gradient, given the rollouts."""
    noise: float
    """Of this level's part, given the rollouts."""
    total_signal: float
    """Of this level's part, over rollouts and probes."""
    total_noise: float
    """Of this level's part, over rollouts and probes."""


class BiasRow(Measured):
    """An estimator against the truth, in nats in all."""

    file = "bias.jsonl"
    world: str
    """`gaussian`, `mixture`, `mixture, velocity 5% off`, or `model`."""
    oracle: str
    """Where the truth comes from."""
    num_samples: int
    """Compared with the truth."""
    num_dims: int
    """Of a sample."""
    truth_error: float
    """Mean standard error of a sample's true log-likelihood by Hutchinson's estimate; 0 where it is exact."""
    truth_step_error: float
    """Mean change of the truth when the ODE's steps are twice as long; 0 for closed forms and adaptive solvers."""
    gap_mean: float
    """Mean over samples of value - truth."""
    gap_sd: float
    """Of value - truth, across samples."""
    gap_error: float
    """Standard error of gap_mean."""
    point_sd: float
    """Standard deviation of one point's value around its sample's mean over points."""
    bound: bool
    """Whether the estimator is a lower bound by its formula."""
    bound_holds: bool | None
    """gap_mean is at most two of its errors above 0; null where no bound is claimed."""
    pearson: float
    """Correlation of value and truth across samples."""
    spearman: float
    """Rank correlation of value and truth across samples."""
    angle: float | None
    """Degrees between its policy gradient and the true one, on the same samples and advantages."""
    angle_low: float | None
    """Lower end of its 95 % interval."""
    angle_high: float | None
    """Upper end of its 95 % interval."""


class LikelihoodRow(Measured):
    """One sample, in nats in all."""

    file = "likelihoods.jsonl"
    world: str
    """As in bias.jsonl."""
    sample: int
    """Its number."""
    truth: float
    """Its log-likelihood."""
    value: float
    """What the estimator says, the mean over all points drawn."""


R = TypeVar("R", bound=Measured)


class Table(Generic[R]):
    """A file of rows, written whole after every addition, so that it is never half a measurement."""

    def __init__(self, folder: Path, kind: type[R]) -> None:
        self.path = folder / kind.file
        self._rows: list[R] = list(read_rows(self.path, kind))

    @property
    def keys(self) -> set[str]:
        """Of the measurements that are there."""
        return {row.key for row in self._rows}

    def replace(self, key: str, rows: Sequence[R]) -> None:
        """Write the rows of a measurement in place of what it had."""
        self._rows = [row for row in self._rows if row.key != key] + list(rows)
        write_atomic(self.path, "".join(row.model_dump_json() + "\n" for row in self._rows))


def read_rows(path: Path, kind: type[R]) -> Iterable[R]:
    """The rows of a file, none where there is none. Raises InputError with file and line."""
    if not path.exists():
        return
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), start=1):
        try:
            yield kind.model_validate(parse_json(line, str(path), first=number))
        except ValidationError as error:
            problem = f"{dotted(error.errors()[0]['loc'])}: {error.errors()[0]['msg']}"
            raise InputError(f"{path}:{number}: cannot be read: {problem}; delete the file to measure anew") from None
