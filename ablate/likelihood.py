"""The exact log-likelihood of a flow, through its probability-flow ODE: the oracle for the estimators.

dx/ds = v(x, s) carries data (s = 0) to noise (s = 1), and log p(x0) = log N(x1; 0, I) + integral of div v(x_s, s) ds.
The divergence is exact, at one backward per dimension, or Hutchinson's estimate: the mean over m vectors u of random
signs, drawn once per solve, of u . (dv/dx) u, which is unbiased, and whose spread over u is its error.

Source: Chen et al. 2018 (arXiv 1806.07366), eq. 8; Grathwohl et al. 2019 (FFJORD, arXiv 1810.01367), eqs. 5 and 7; for
diffusion, Song et al. 2021 (arXiv 2011.13456), eq. 39. Solvers: torchdiffeq.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from ablate.flow import Velocity
from ablate.seeding import Streams
from ablate.source import choices

ADAPTIVE = ("dopri5", "dopri8", "bosh3")
FIXED_STEP = ("euler", "midpoint", "rk4")


@dataclass(frozen=True, kw_only=True)
class LogLikelihood:
    """log p(x0) of b samples, differentiable in whatever the velocity depends on."""

    each: Tensor  # [b, m]  nats in all, by each of m sign vectors; [b, 1] where the divergence is exact
    num_dims: int
    num_calls: int  # of the velocity, all samples at once

    @property
    def nats(self) -> Tensor:
        """[b], nats in all."""
        return self.each.mean(1)

    @property
    def per_dimension(self) -> Tensor:
        """[b], nats per latent dimension, the unit of the estimators."""
        return self.nats / self.num_dims

    @property
    def standard_error(self) -> Tensor | None:
        """[b], Hutchinson's, nats in all; None where it is exact, or with a single sign vector."""
        m = self.each.shape[1]
        return self.each.detach().std(1) / math.sqrt(m) if m > 1 else None


@dataclass(frozen=True, kw_only=True)
class ProbabilityFlow:
    """How the ODE is solved.

    * solver: adaptive (`dopri5`, `dopri8`, `bosh3`: local errors below `tolerance`, relative and absolute, steps common
      to the batch) or, with `num_steps`, `euler`, `midpoint` or `rk4`.
    * power: the fixed steps lie at (i / num_steps)^power; above 1 they are finer near data, where networks change most.
    * num_probes: sign vectors m of Hutchinson's estimate; null: the exact divergence.
    * start: the level that x0 is taken to have; 0 is data.
    """

    solver: str = "dopri5"
    tolerance: float = 1e-6
    num_steps: int | None = None
    power: float = 1.0
    num_probes: int | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.solver not in (known := (*ADAPTIVE, *FIXED_STEP)):
            raise ValueError(f"solver {self.solver!r} is unknown{choices(self.solver, known)}")
        if (self.solver in FIXED_STEP) != (self.num_steps is not None):
            raise ValueError(f"num_steps goes with {', '.join(FIXED_STEP)}, tolerance with {', '.join(ADAPTIVE)}")

    def log_likelihood(
        self,
        velocity: Velocity,
        x0: Tensor,
        *,
        streams: Streams | None = None,
        parameters: Sequence[Tensor] | None = None,
    ) -> LogLikelihood:
        """log p of x0 [b, ...]; `streams` draw the sign vectors.

        Gradients go through the solver's steps, whose graph grows with their number; with `parameters`, to these alone
        and by the adjoint ODE, in the memory of one step. Under torch.no_grad there is no graph at all.
        """
        signs = None
        if self.num_probes is not None:
            assert streams is not None, "Hutchinson's estimate draws sign vectors"
            signs = streams.normal([self.num_probes, *x0.shape[1:]], x0).sign()
        num_calls = 0

        def derivative(level: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal num_calls
            num_calls += 1
            x, differentiable = state[0], torch.is_grad_enabled()
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                v = velocity(x, level.expand(len(x)))
                return v, _divergence(v, x, signs, differentiable=differentiable)

        levels = torch.tensor([self.start, 1.0], dtype=x0.dtype, device=x0.device)
        start = (x0, x0.new_zeros(len(x0), self.num_probes or 1))
        options = {"grid_constructor": self._grid} if self.num_steps else None
        given = {"method": self.solver, "rtol": self.tolerance, "atol": self.tolerance, "options": options}
        if parameters is None:
            x, integral = odeint(derivative, start, levels, **given)
        else:
            x, integral = odeint_adjoint(derivative, start, levels, adjoint_params=tuple(parameters), **given)
        x1, num_dims = x[-1].flatten(1), x0[0].numel()
        base = -0.5 * (x1.square().sum(1) + num_dims * math.log(2 * math.pi))
        return LogLikelihood(each=base[:, None] + integral[-1], num_dims=num_dims, num_calls=num_calls)

    def _grid(self, _: object, __: object, ends: Tensor) -> Tensor:
        """The levels between two ends, in their order: the adjoint goes from noise to data."""
        assert self.num_steps is not None
        levels = torch.linspace(0, 1, self.num_steps + 1, dtype=ends.dtype, device=ends.device) ** self.power
        levels = ends.min() + (ends.max() - ends.min()) * levels
        return levels if ends[0] < ends[-1] else levels.flip(0)


def _divergence(v: Tensor, x: Tensor, signs: Tensor | None, *, differentiable: bool) -> Tensor:
    """[b, m]: div v at x [b, ...] by signs [b, m, ...], or exact [b, 1]."""

    def product(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(v, x, cotangent, create_graph=differentiable, retain_graph=True)[0]

    if signs is not None:
        return torch.stack([(product(u) * u).flatten(1).sum(1) for u in signs.unbind(1)], 1)
    basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape[1:])
    return torch.stack([(product(e.expand_as(x)) * e).flatten(1).sum(1) for e in basis]).sum(0)[:, None]
