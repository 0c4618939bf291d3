"""Where the data that ships with the project lies: presets and the source of the Triton repository.

In a checkout these are top-level folders; a wheel carries them inside the package (`ming_trt/_data`).
"""

from __future__ import annotations

from pathlib import Path

from ming_trt.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The shipped folder (or file) `name`, for example `engines` or `triton_repo`.

    Raises `ConfigError` if the installation lacks it.
    """
    for root in (_PACKAGE / "_data", _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise ConfigError(f"the shipped data '{name}' is not in this installation ({_PACKAGE}): install ming-trt again")


def engines_dir() -> Path:
    """The folder of the presets (`*.toml`)."""
    return shipped("engines")


def triton_repo_dir() -> Path:
    """The folder that holds the source of the Triton model repository."""
    return shipped("triton_repo")
