"""Two partial checkpoints become one."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ming_trt.errors import CheckpointError
from ming_trt.golden.overlay import overlay


def make(folder: Path, tensors: dict[str, float], config: str, extra: str) -> Path:
    (folder / extra).mkdir(parents=True)
    save_file({k: np.full(2, v, np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    (folder / extra / "x.json").write_text(extra)
    return folder


def test_same_shard_name_different_tensors_and_the_later_wins(tmp_path: Path) -> None:
    a = make(tmp_path / "a", {"model.w": 1, "shared": 1}, "first", "vae")
    b = make(tmp_path / "b", {"talker.w": 2, "shared": 2}, "second", "talker")
    merged = overlay([a, b], tmp_path / "m")
    weight_map = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == {"model.w", "talker.w", "shared"}
    assert (merged / weight_map["shared"]).resolve() == (b / "model.safetensors").resolve()
    assert (merged / weight_map["model.w"]).resolve() == (a / "model.safetensors").resolve()
    assert (merged / "config.json").read_text() == "second"
    assert (merged / "vae" / "x.json").exists() and (merged / "talker" / "x.json").exists()


def test_folders_may_be_links(tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, {f"{name}.w": 1}, name, f"part_{name}") for name in "ab")
    (tmp_path / "elsewhere").mkdir()
    (b / "part_b").rename(tmp_path / "elsewhere" / "part_b")
    (b / "part_b").symlink_to(tmp_path / "elsewhere" / "part_b")
    assert (overlay([a, b], tmp_path / "m") / "part_b" / "x.json").read_text() == "part_b"


def test_a_single_folder_is_used_as_it_is(tmp_path: Path) -> None:
    a = make(tmp_path / "a", {"w": 1}, "", "vae")
    assert overlay([a], tmp_path / "m") == a and not (tmp_path / "m").exists()


def test_missing_and_damaged(tmp_path: Path) -> None:
    a = make(tmp_path / "a", {"w": 1}, "", "vae")
    with pytest.raises(CheckpointError, match="does not exist"):
        overlay([a, tmp_path / "none"], tmp_path / "m")
    (a / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        overlay([a, a], tmp_path / "m2")


def test_made_again_only_over_its_own(tmp_path: Path) -> None:
    """With `golden --work` the folder of the last time is there; somebody's own checkpoint is left alone."""
    a, b = (make(tmp_path / name, {f"{name}.w": 1}, name, name) for name in "ab")
    overlay([a, b], tmp_path / "m")
    (a / "model.safetensors").unlink()
    merged = overlay([a, b], tmp_path / "m")
    assert set(json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]) == {"b.w"}
    assert not any("overlay0" in path.name for path in merged.iterdir())
    with pytest.raises(CheckpointError, match="was not made by ming-trt"):
        overlay([a, b], b)
    assert (b / "model.safetensors").exists()
