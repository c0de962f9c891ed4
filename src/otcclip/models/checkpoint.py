"""A finished model on disk, in a form that plain open_clip loads."""

from __future__ import annotations

from pathlib import Path

import open_clip
from safetensors.torch import load_file, save
from torch import Tensor

from otcclip.data.atomic import atomic_file, write_json
from otcclip.models.two_tower import TwoTower, create_two_tower, weights_of

WEIGHTS, LOCAL_HEAD, CONFIG = "open_clip_model.safetensors", "local_head.safetensors", "open_clip_config.json"


def save_open_clip(model: TwoTower, folder: Path) -> Path:
    """Write `open_clip_model.safetensors` and `open_clip_config.json` into `folder`; returns the weights' path.

    `open_clip.create_model(NAME, pretrained=PATH)` and `open_clip.create_model("local-dir:FOLDER")` both load it. The
    local head of small towers is not part of an open_clip model; it goes to `local_head.safetensors` beside it.

    Raises:
        UserError: the disk is full or cannot be written to; no file is left half-written.
    """
    _save(dict(model.clip.state_dict()), folder / WEIGHTS)
    if model.local_head is not None:
        _save({"weight": model.local_head.weight}, folder / LOCAL_HEAD)
    config = {
        "model_cfg": open_clip.get_model_config(model.name),
        "preprocess_cfg": {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    write_json(folder / CONFIG, config)
    return folder / WEIGHTS


def load_two_tower(folder: Path, name: str) -> TwoTower:
    """The finished model that `save_open_clip` wrote, its local head included.

    Raises:
        UserError: as `create_two_tower`; or the local head is missing or damaged.
    """
    model = create_two_tower(name, pretrained=str(folder / WEIGHTS))
    if model.local_head is not None:
        with weights_of(name, folder / LOCAL_HEAD):
            model.local_head.load_state_dict(load_file(folder / LOCAL_HEAD))
    return model


def _save(state: dict[str, Tensor], path: Path) -> None:
    with atomic_file(path) as handle:
        handle.write(save({k: v.detach().cpu().contiguous() for k, v in state.items()}))
