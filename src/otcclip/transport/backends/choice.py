"""Which backend solves: by name, or the fastest that is installed and serves the device and dtype."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal, cast, get_args

import torch

from otcclip.errors import UserError
from otcclip.transport.backends.base import Backend

Name = Literal["auto", "torch", "numba", "triton"]
NAMES = get_args(Name)
_DEVICE = {"numba": "cpu", "triton": "cuda"}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name`; for `"auto"` the fastest that serves vectors of this device and dtype.

    Raises:
        ValueError: no such backend, or it does not serve this device or dtype.
        UserError: its package is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        fitting = [n for n, kind in _DEVICE.items() if device.type == kind and dtype == torch.float32 and _installed(n)]
        name = fitting[0] if fitting else "torch"
    elif name != "torch":
        if not _installed(name):
            raise UserError(f"backend: {name!r} needs a package that is not installed: pip install {name}")
        if dtype != torch.float32:
            raise ValueError(f"backend: {name!r} solves in float32, got {dtype}; use 'torch'")
        if device.type != _DEVICE[name] and not (name == "triton" and _interpreted()):
            raise ValueError(f"backend: {name!r} runs on {_DEVICE[name]}, got vectors on {device}; use 'torch'")
    return cast(Backend, importlib.import_module(f"otcclip.transport.backends.{name}"))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU (TRITON_INTERPRET=1)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
