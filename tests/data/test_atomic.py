"""Files and folders appear whole or not at all, also on a full disk and after a kill."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from otcclip.data import atomic
from otcclip.errors import UserError


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_with_its_content_and_nothing_else(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "deep" / "a.json", {"ä": 1})
    assert json.loads((tmp_path / "deep" / "a.json").read_text("utf-8")) == {"ä": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_a_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(KeyError), atomic.atomic_file(path) as handle:
        handle.write(b"half of the n")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic.atomic_file(path) as handle:
        handle.write(b"x")
        assert not path.exists()
    assert path.exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"a\.txt: cannot write: No space left on device") as error:
        atomic.write_text(tmp_path / "a.txt", "x")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_real_enospc_while_writing(tmp_path: Path) -> None:
    """/dev/full answers every write with ENOSPC; the error comes from the kernel, not from a stand-in."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with (
        pytest.raises(UserError, match="No space left on device"),
        atomic.disk_errors(tmp_path),
        Path("/dev/full").open("wb") as handle,
    ):
        handle.write(b"x" * 100_000)


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        atomic.write_text(tmp_path / "file" / "a.txt", "x")


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    for content in ("old", "new"):
        with atomic.atomic_folder(target) as folder:
            (folder / f"{content}.txt").write_text(content)
            assert not (target / f"{content}.txt").exists()
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "corpus"
    with atomic.atomic_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_folder(target) as folder:
        (folder / "new.txt").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_at_the_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "corpus"
    with atomic.atomic_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and not (self / "old.txt").exists():
            full_disk()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="No space left"), atomic.atomic_folder(target) as folder:
        (folder / "new.txt").write_text("new")
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


KILLED = """
import os, sys
from otcclip.data.atomic import atomic_file, atomic_folder
with atomic_folder(sys.argv[1] + "/corpus") as folder:
    (folder / "half").write_text("x")
    with atomic_file(sys.argv[1] + "/a.txt") as handle:
        handle.write(b"half")
        os.kill(os.getpid(), 9)
"""


def test_leftovers_of_a_killed_process_are_swept_and_those_of_a_live_one_are_not(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == 2
    assert not left & {"corpus", "a.txt"}
    alive = tmp_path / f".a.txt.tmp-{atomic._machine()}-{os.getppid()}-0"
    elsewhere = tmp_path / ".a.txt.tmp-00000000-999999999-0"
    alive.touch()
    elsewhere.touch()
    atomic.write_text(tmp_path / "a.txt", "whole")
    with atomic.atomic_folder(tmp_path / "corpus"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "corpus", alive.name, elsewhere.name}
