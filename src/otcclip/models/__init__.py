"""open_clip towers seen as one global vector and a set of local vectors.

Importing this package registers the `otcclip-tiny` config with open_clip, so that
`open_clip.create_model("otcclip-tiny", pretrained=PATH)` works afterwards.
"""

from pathlib import Path

import open_clip

from otcclip.models.checkpoint import load_two_tower, save_open_clip
from otcclip.models.two_tower import Features, TwoTower, create_two_tower

CONFIGS = Path(__file__).parent / "configs"
open_clip.add_model_config(CONFIGS)


def open_clip_model_size(name: str) -> int:
    """The input side in pixels that open_clip's config of `name` states."""
    return int(open_clip.get_model_config(name)["vision_cfg"]["image_size"])


__all__ = [
    "CONFIGS",
    "Features",
    "TwoTower",
    "create_two_tower",
    "load_two_tower",
    "open_clip_model_size",
    "save_open_clip",
]
