"""What a likelihood estimator is."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ablate.rollout import Probe, Rollout
from ablate.seeding import Streams

P = TypeVar("P", bound=Probe)


class Estimator(Protocol, Generic[P]):
    """A frozen dataclass: `probe` draws where the policy is asked, `log_prob` turns its answers into likelihood.

    A likelihood ratio means something only when both policies are evaluated at the same random points. `probe` draws
    them once; `log_prob` is then a pure function of the velocity, and networks are called elsewhere.
    """

    @property
    def needs_transitions(self) -> bool:
        """Whether only stochastic samplers will do."""
        ...

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> P:
        """k points per sample, k = `num_points` (None: as many as the source's method uses)."""
        ...

    def log_prob(self, velocity: Tensor, probe: P) -> Tensor:
        """velocity [b, k, ...] -> [b, k], nats per latent dimension up to terms that no policy changes."""
        ...
