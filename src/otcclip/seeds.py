"""What a seed may be: numpy takes none below 0, and torch none that doesn't fit its word once epochs are mixed in."""

from __future__ import annotations

from otcclip.errors import UserError

END = 2**32


def check_seed(seed: int, what: str = "--seed") -> None:
    """Raises UserError for a seed that is not from 0 to 4294967295; `what` says whose it is."""
    if not 0 <= seed < END:
        raise UserError(f"{what} {seed}: seeds are whole numbers from 0 to {END - 1}")
