"""Reads from Triton's log what its endpoints do not tell: which models are loaded, and why one is not."""

from __future__ import annotations

import re
from pathlib import Path

_LOADED = re.compile(r"successfully loaded '([^']+)'")
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.+)")
_CREATING = re.compile(r"error: creating server: (.+)")
_SENTENCE = re.compile(r"TritonModelException: (.+)")


def loaded_models(log: Path) -> set[str]:
    """Names of the models that the log reports as loaded."""
    return set(_LOADED.findall(_text(log)))


def first_failure(log: Path) -> str:
    """The first reason for which a model, or the server, could not start; "" if there is none."""
    text = _text(log)
    failed = _FAILED.search(text)
    if failed:
        return f"model '{failed[1]}': {_cause(failed[2])}"
    creating = _CREATING.search(text)
    return creating[1].strip() if creating else ""


def requests_are_done(log: Path) -> bool:
    """Whether a server that was told to stop has answered the last request, and only unloads its models."""
    return "All models are stopped, unloading models" in _text(log)


def last_lines(log: Path, count: int = 1) -> str:
    """The last lines of the log that say something, joined."""
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "its log is empty"


def _cause(reason: str) -> str:
    """Our own sentence if the stage raised one, else the server's words, without the traceback that follows them."""
    own = _SENTENCE.search(reason)
    text = own[1] if own else reason
    text = text.replace("\\n", "\n").split("\n")[0]
    return text.strip().strip('"').removeprefix("Internal: ")


def _text(log: Path) -> str:
    try:
        return log.read_text("utf-8", "replace")
    except FileNotFoundError:
        return ""
