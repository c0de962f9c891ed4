"""What an attack's own files hold is part of a run's identity, whoever else is of its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from otcclip.specs import Spec
from otcclip.training.white_box import file_digests


def test_two_patches_of_one_attack_are_two_digests(tmp_path: Path) -> None:
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for i, path in enumerate(paths):
        np.save(path, np.full((3, 2, 2), i / 4, np.float32))
    specs = [Spec.parse(f"badclip:patch={path},name={path.stem}") for path in paths]
    before = file_digests(specs)
    np.save(paths[0], np.full((3, 2, 2), 0.9, np.float32))
    after = file_digests(specs)
    assert len(before) == len(set(before.values())) == 2
    assert sum(after[key] != before[key] for key in before) == 1
