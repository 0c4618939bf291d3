"""Compares a bundle with its digests before anything is loaded from it; says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from ming_trt.bundle import Bundle

_REPORT_EVERY_S = 5.0


class _StopRequested(Exception):
    """Ends the reading of files."""


def check_files(
    bundle: Bundle, progress: Callable[[str], None], stop_requested: Callable[[], bool] = lambda: False
) -> bool:
    """Reads every file of the bundle; False if `stop_requested` before the end.

    Raises `BundleError` naming a damaged file. `progress` gets a line every few seconds.
    """
    total = sum(entry.size for entry in bundle.manifest.files.values())
    done = 0
    started = reported = time.monotonic()

    def read(size: int) -> None:
        nonlocal done, reported
        done += size
        now = time.monotonic()
        if stop_requested():
            raise _StopRequested
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            rate = done / 1e6 / (now - started)
            progress(f"checking the bundle: {done / total:.0%} of {total / 1e9:.1f} GB, {rate:.0f} MB/s")

    try:
        bundle.require_intact(read)
    except _StopRequested:
        return False
    return True
