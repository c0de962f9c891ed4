"""Debian packages unpacked into a folder, without root and without running a line of theirs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from otcclip.errors import UserError
from otcclip.progress import bar

_TIMEOUT_S = 900


def unpack(packages: Sequence[str], folder: Path) -> Path:
    """Download `packages` with apt and unpack their files under `folder`; maintainer scripts are not run.

    Returns:
        `folder`, which then stands for `/`.

    Raises:
        UserError: no apt here, an unknown package, no network, or a full disk.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"this corpus is built from the Debian packages {', '.join(packages)}, and {missing[0]} was not found; "
            "build it on a Debian or Ubuntu machine and copy its folder"
        )
    with bar() as progress:
        progress.add_task(f"downloading {', '.join(packages)}", total=None)
        _run(["apt-get", "download", *packages], folder)
        for archive in sorted(folder.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive), str(folder)], folder)
            archive.unlink()
    return folder


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} did not finish in {_TIMEOUT_S} s: is the network up?") from error
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run: {error.strerror or error}") from error
    if done.returncode != 0:
        said = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: e"))]
        raise UserError(f"{command[0]} failed: {'; '.join(said[:2]) or 'it gave no reason'} (try `apt-get update`)")
