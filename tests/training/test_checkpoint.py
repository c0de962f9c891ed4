"""Training state on disk: whole or not at all, and never a door for code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from otcclip.errors import UserError
from otcclip.training.checkpoint import load_state, save_state

STATE = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)},
    "defense": {"action": torch.tensor([0, 2], dtype=torch.int8)},
    "epoch": 4,
    "seconds": 1.5,
    "history": '[{"loss": 1}]',
    "list": [1, "a", None],
}


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / "last.pt"
    save_state(path, STATE)
    got = load_state(path)
    assert got.keys() == STATE.keys()
    assert torch.equal(got["model"]["weight"], STATE["model"]["weight"])
    assert got["defense"]["action"].dtype == torch.int8
    assert {k: got[k] for k in ("epoch", "seconds", "history", "list")} == {
        k: STATE[k] for k in ("epoch", "seconds", "history", "list")
    }
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_damaged_is_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, STATE)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "empty": b"",
            "text": b"not a checkpoint at all",
            "flipped": whole[: middle - 200] + bytes(400) + whole[middle + 200 :],
        }[damage]
    )
    with pytest.raises(UserError, match=r"last\.pt: checkpoint cannot be read .*; delete it to start over"):
        load_state(path)


def test_something_else_is_one_line(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint"):
        load_state(tmp_path / "last.pt")


class Hostile:
    """Unpickling it would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "defense": Hostile(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="checkpoint cannot be read"):
        load_state(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_older_state(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, STATE)
    with pytest.raises(Exception, match="pickle"):
        save_state(path, {**STATE, "epoch": 5, "trouble": lambda: None})
    assert load_state(path)["epoch"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"epoch": 1})

    def full(state: object, handle: object) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")  # what torch's archive writer says as it closes

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_state(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_state(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
