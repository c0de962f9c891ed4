"""A finished model on disk, in a form that plain open_clip loads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import open_clip
from safetensors.torch import save_file

from otcclip.models.two_tower import TwoTower


def save_open_clip(model: TwoTower, folder: Path) -> Path:
    """Write `open_clip_model.safetensors` and `open_clip_config.json` into `folder`; returns the weights' path.

    `open_clip.create_model(NAME, pretrained=PATH)` and `open_clip.create_model("local-dir:FOLDER")` both load it. The
    local head of small towers is not part of an open_clip model; it goes to `local_head.safetensors` beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "open_clip_model.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in model.clip.state_dict().items()}
    _save(state, weights)
    if model.local_head is not None:
        _save(
            {"weight": model.local_head.weight.detach().cpu().contiguous()}, folder / "local_head.safetensors"
        )
    config = {
        "model_cfg": open_clip.get_model_config(model.name),
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    target = folder / "open_clip_config.json"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=2))
    os.replace(temporary, target)
    return weights


def _save(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    os.replace(temporary, path)
