"""A lower bound of OT_ε from one vector and a few numbers a set, so that one GEMM rules out most of a pool.

After the first half of an iteration Sinkhorn's dual value is Σ_i a_i f_i, f_i = −ε log E_j e^{(v_i·t_j − 1)/ε}, and it
only rises from there. So a bound of that value is one of every later iterate, converged or not. With t̄ the mean
of a set, R = max_j |t_j − t̄| and s² the variance of v_i·t_j over j (averaged over i), Bennett's lemma for the
moment generating function of a variable of mean 0, variance s² and maximum R gives

    OT_ε ≥ 1 − v̄·t̄ − ψ,   ψ = ε log [(R² e^{−s²/(Rε)} + s² e^{R/ε}) / (R² + s²)]

(for a mean over i, as log(α + βs²)-like terms are concave in s²). s² = ⟨E v vᵀ, Σ⟩ ≤ ‖Σ‖_F, Σ the covariance of the
t_j, whose Frobenius norm is that of their centred Gram matrix over weights. ψ is a number a set: the bound for a
whole pool is one row of a GEMM (bfloat16 if the summary is) less a vector.

The bound is sharp where a set's vectors say one thing, as a trained tower's do, and says nothing where they
scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from otcclip.transport.problem import UNIT_TOLERANCE, FeatureSets

# Sets that are summarised at a time: their vectors stay in a core's cache or near it.
_SETS = 256


@dataclass(frozen=True)
class Summary:
    """What the bound needs of `m` sets.

    Attributes:
        direction: `[m, d]`, unit means; float32, or bfloat16 for half the memory and a fraction of the time.
        length: `[m]` float32, |mean|. radius: `[m]` float32, R. variance: `[m]` float32, ‖Σ‖_F.
    """

    direction: Float[Tensor, "m d"]
    length: Float[Tensor, " m"]
    radius: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]

    @classmethod
    def of(cls, sets: FeatureSets, dtype: torch.dtype = torch.float32) -> Summary:
        """One pass over the sets, a stretch at a time."""
        n, device = len(sets), sets.values.device
        direction = torch.empty(n, sets.dim, dtype=dtype, device=device)
        length, radius, variance = (torch.empty(n, device=device) for _ in range(3))
        for start in range(0, n, _SETS):
            stop = min(start + _SETS, n)
            some = sets.stretch(start, stop)
            rows, mask = some.rows(torch.arange(len(some)))
            values = some.values.detach()[rows.to(device)].float()
            weights = some.shares().float()[rows.to(device)] * mask.to(device)
            mean = torch.bmm(weights[:, None], values)[:, 0]
            # Of centred vectors without centring them: G_ij − (G w)_i − (G w)_j + wᵀG w.
            gram = torch.bmm(values, values.transpose(1, 2))
            to_mean = torch.bmm(gram, weights[..., None])
            square = torch.bmm(weights[:, None], to_mean)
            gram += square - to_mean - to_mean.transpose(1, 2)
            length[start:stop] = square.clamp(min=0).sqrt()[:, 0, 0]
            radius[start:stop] = gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=0).sqrt()
            variance[start:stop] = (gram.square_() * (weights[:, :, None] * weights[:, None])).sum((1, 2)).sqrt()
            direction[start:stop] = torch.nn.functional.normalize(mean, dim=1).to(dtype)
        return cls(direction, length, radius, variance)

    def __len__(self) -> int:
        return len(self.length)

    @property
    def slack(self) -> float:
        """How far a cosine of two of these may be off: two roundings to 8 bits and one of the result, or float32's."""
        return 0.006 if self.direction.dtype == torch.bfloat16 else 1e-5

    def stretch(self, start: int, stop: int) -> Summary:
        """The sets from `start` to `stop`, views."""
        return Summary(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def reach(self, epsilon: float) -> Float[Tensor, " m"]:
        """ψ of each set."""
        # The vectors v are of unit norm to a tolerance.
        r = (1 + UNIT_TOLERANCE) * self.radius.double().clamp(min=1e-6)
        s2 = ((1 + UNIT_TOLERANCE) ** 2 * self.variance.double()).clamp(max=r.square())
        spread = r.square() + s2
        terms = (r.square() / spread).log() - s2 / (r * epsilon), (s2 / spread).log() + r / epsilon
        return (epsilon * torch.logaddexp(*terms)).to(self.radius)


def cosine_needed(queries: Summary, pool: Summary, reach: Tensor, value: Tensor) -> Float[Tensor, " n"]:
    """The cosine below which no set of the pool has a bound as low as `value [n]`, less the cosines' slack.

    Solves the bound for the cosine at the pool's most favourable length and reach: one comparison a pair then
    does nearly all of the ruling out.
    """
    spare = 1 - reach.max() - value
    length = torch.where(spare > 0, pool.length.max(), pool.length.min())
    return spare / (queries.length * length).clamp(min=1e-12) - pool.slack
