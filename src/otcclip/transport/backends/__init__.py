"""Three ways to solve the same problem, chosen by device: numba on a CPU, Triton on a GPU, torch anywhere.

The modules are called after the packages that they use, so nothing in this file may: once imported, they are
attributes of this package by the same names.
"""

from otcclip.transport.backends.base import STABLE_BELOW, Backend, Problem, Settings, Solved
from otcclip.transport.backends.choice import Name, choose

__all__ = ["STABLE_BELOW", "Backend", "Name", "Problem", "Settings", "Solved", "choose"]
