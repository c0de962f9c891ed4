"""The Triton kernel under Triton's interpreter, against the torch backend: values, counts, gradients."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: Triton reads the variable when a kernel is made.
SCRIPT = """
import torch
from otcclip.transport import FeatureSets, all_costs, pair_costs

torch.manual_seed(0)
def ragged(sizes):
    return FeatureSets.from_list([torch.nn.functional.normalize(torch.randn(n, 40), dim=1) for n in sizes])

x, y = ragged([5, 17, 1]), ragged([3, 18])
shares = torch.rand(len(x.values)); shares[6] = 0
shares = torch.cat([part / part.sum() for part in shares.split(x.sizes.tolist())])
index = torch.tensor([2, 0, 1, 1]), torch.tensor([0, 1, 1, 0])
for weights in (None, shares):
    for how in (
        {"epsilon": 0.1}, {"epsilon": 0.01, "iterations": 7}, {"epsilon": 0.1, "ranking": "sharp", "iterations": 60},
        {"epsilon": 0.05, "iterations": 40, "tolerance": 1e-3},
    ):
        found = {}
        for backend in ("torch", "triton"):
            v, t = x.values.clone().requires_grad_(), y.values.clone().requires_grad_()
            sets = FeatureSets(v, x.offsets, weights), FeatureSets(t, y.offsets)
            every = all_costs(*sets, backend=backend, **how)
            listed = pair_costs(*sets, pairs=index, backend=backend, **how)
            total = every.value.square().sum() + 3 * listed.value.sum()
            found[backend] = [every.value, listed.value, every.marginal_error, *torch.autograd.grad(total, (v, t))]
            if "tolerance" in how:
                assert every.converged.all() and every.iterations.max() < 40
            else:
                assert (every.iterations == how.get("iterations", 20)).all()
        for mine, theirs in zip(found["triton"], found["torch"]):
            # With a tolerance the two stop at different iterations.
            off = float((mine - theirs).abs().max())
            assert off < (2e-3 if "tolerance" in how else 2e-5), (how, off)
print("agreed")
"""


def test_interpreted_kernel_agrees_with_torch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "agreed" in done.stdout, done.stderr[-2000:]
