"""What the transport tests share: makers of ragged unit vectors, and Sinkhorn written twice over, plainly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from otcclip.transport import FeatureSets

Maker = Callable[..., FeatureSets]


def _unit(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1).to(dtype)


def _ragged(sizes: list[int], dim: int = 6, *, seed: int = 0) -> FeatureSets:
    return FeatureSets.from_list(list(_unit(sum(sizes), dim, seed=seed).split(sizes)))


def _reference(v: Tensor, t: Tensor, epsilon: float, iterations: int) -> tuple[float, np.ndarray]:
    """Dual value and plan after `iterations` of Sinkhorn from g = 0, f first; one pair, float64, log form."""
    cost = 1 - v.double().numpy() @ t.double().numpy().T
    log_a, log_b = -np.log(len(v)), -np.log(len(t))
    g = np.zeros(len(t))
    for _ in range(iterations):
        f = -epsilon * logsumexp((g - cost) / epsilon + log_b, axis=1)
        g = -epsilon * logsumexp((f[:, None] - cost) / epsilon + log_a, axis=0)
    plan = np.exp((f[:, None] + g - cost) / epsilon + log_a + log_b)
    return float(f.mean() + g.mean()), plan


def _oracle(v: Tensor, t: Tensor, epsilon: float) -> float:
    """OT_ε by POT in float64, converged: ⟨P, C⟩ + ε KL(P ‖ abᵀ)."""
    cost = 1 - v.double().numpy() @ t.double().numpy().T
    a, b = np.full(len(v), 1 / len(v)), np.full(len(t), 1 / len(t))
    p = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=3000, stopThr=1e-7, warn=False)
    p = np.maximum(p, 1e-300)
    return float((p * cost).sum() + epsilon * (p * np.log(p / np.outer(a, b))).sum())


@pytest.fixture(scope="session")
def unit() -> Callable[..., Tensor]:
    return _unit


@pytest.fixture(scope="session")
def ragged() -> Maker:
    return _ragged


@pytest.fixture(scope="session")
def reference() -> Callable[..., tuple[float, np.ndarray]]:
    return _reference


@pytest.fixture(scope="session")
def oracle() -> Callable[[Tensor, Tensor, float], float]:
    return _oracle
