"""Writes a small checkpoint in the official layout, with random weights, for trying and testing everything without the
36 GB download.

Each component has a module here with `write(folder, seed, config)`, which writes its files and may add to the root
`config.json`. All are listed in `COMPONENTS`, in the order in which they run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from filecmp import cmpfiles
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ming_trt.errors import ConfigError

COMPONENTS = ("understanding", "image", "speech")


class Writer(Protocol):
    """Module of a component."""

    def write(self, folder: Path, seed: int, config: dict[str, Any]) -> None:
        """Writes the component into `folder`; equal seeds give equal bytes. `config` becomes `config.json`."""
        ...


def write_mini(folder: Path, seed: int = 0) -> bool:
    """Makes `folder` a small checkpoint; equal seeds give equal bytes. Nothing of it is visible until all is written.

    Returns False if that very checkpoint is there already. Raises `ConfigError` if `folder` holds anything else.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file: give a folder that does not exist yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config: dict[str, Any] = {}
        for name in COMPONENTS:
            writer: Writer = import_module(f"ming_trt.mini.{name}")
            writer.write(staging, seed, config)
            # Rewritten after each component, since later ones may read the configuration.
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if folder.exists() and any(folder.iterdir()):
            if _same(staging, folder):
                return False
            raise ConfigError(
                f"'{folder}' is not empty and holds something else: give a new folder, or remove it first"
            )
        staging.chmod(0o755)
        staging.replace(folder)
        return True
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _same(one: Path, two: Path) -> bool:
    files = _files(one)
    return files == _files(two) and cmpfiles(one, two, files, shallow=False)[0] == files
