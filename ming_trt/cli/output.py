"""What commands print for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Where stdout is no terminal nobody wraps lines: tables keep their columns whole.
_UNBOUNDED = 240


def console() -> Console:
    """A console on stdout that prints text as it is, as wide as the terminal, or wide enough for a file."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _UNBOUNDED)
