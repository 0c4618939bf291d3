"""The checkpoint reader against the safetensors library, and its errors on damaged folders."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.bias": torch.tensor([1.5, -2.0, 3e-3]).bfloat16(),
    "b.0.weight": torch.full((2, 2), 0.1).half(),
    "b.1.ids": torch.tensor([[1], [-5]]),
    "c.flag": torch.tensor(True),
    "c.none": torch.zeros(0, 3),
    "d.fp8": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
}


def shards(folder: Path, stem: str = "model") -> Path:
    """Two shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    names = sorted(TENSORS)
    for number, group in enumerate((names[:3], names[3:]), 1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in group}, folder / file)
        weight_map.update(dict.fromkeys(group, file))
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("layout", ["single", "index", "no index", "diffusers"])
def test_reads_every_layout(tmp_path: Path, layout: str) -> None:
    root, subfolder = tmp_path, ""
    if layout == "single":
        save_file(TENSORS, tmp_path / "model.safetensors")
    elif layout == "diffusers":
        subfolder = "transformer"
        shards(tmp_path / subfolder, "diffusion_pytorch_model")
    else:
        shards(tmp_path)
        if layout == "no index":
            (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = Checkpoint(root, subfolder)
    assert checkpoint.names() == sorted(TENSORS)
    assert checkpoint.names("b.") == ["b.0.weight", "b.1.ids"]
    assert len(checkpoint) == len(TENSORS)
    for name, expected in TENSORS.items():
        got = checkpoint.read(name)
        assert got.dtype == expected.dtype and got.shape == expected.shape and bits(got) == bits(expected), name
        info = checkpoint.info(name)
        stored = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert list(stored) == bits(expected)


def test_read_numpy(tmp_path: Path) -> None:
    checkpoint = Checkpoint(shards(tmp_path))
    for name in ("a.weight", "a.bias", "b.0.weight"):
        np.testing.assert_array_equal(checkpoint.read_numpy(name), TENSORS[name].float().numpy())
    assert checkpoint.read_numpy("b.1.ids", np.int64).tolist() == [[1], [-5]]
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        checkpoint.read_numpy("d.fp8")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_to_numpy_is_exact(tmp_path: Path, values: list[float]) -> None:
    tensor = torch.tensor(values).bfloat16()
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(Checkpoint(tmp_path).read_numpy("x"), tensor.float().numpy())


def test_headers_need_no_torch(tmp_path: Path) -> None:
    shards(tmp_path)
    code = (
        "import sys; from pathlib import Path; from ming_trt.checkpoint import Checkpoint\n"
        f"c = Checkpoint(Path({str(tmp_path)!r})); c.read_numpy('a.bias'); c.digest(c.names())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_require(tmp_path: Path) -> None:
    checkpoint = Checkpoint(shards(tmp_path))
    assert checkpoint.require("a.weight", (3, 4)).dtype == "F32"
    with pytest.raises(CheckpointError, match=r"shape \[3, 4\], but config.json asks for \[4, 3\]"):
        checkpoint.require("a.weight", (4, 3))
    with pytest.raises(CheckpointError, match=r"'b.0.bias'.*under 'b.0.' there are 1 tensors, e.g. 'b.0.weight'"):
        checkpoint.info("b.0.bias")
    with pytest.raises(CheckpointError, match=r"nothing starts with 'z.'"):
        checkpoint.info("z.weight")
    assert "z.weight" not in checkpoint and "a.weight" in checkpoint


def fails(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    fails(tmp_path / "none", "does not exist")
    fails(tmp_path, "no .safetensors file")
    shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    fails(tmp_path, r"'model-00002-of-00002.safetensors' named by .* is missing")
    (tmp_path / "model.safetensors.index.json").unlink()
    fails(tmp_path, "1 of the 00002 shards and no index")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (shards(tmp_path) / "model.safetensors.index.json").write_text(text)
    fails(tmp_path, "is not a safetensors index")


def test_index_outside_the_folder(tmp_path: Path) -> None:
    index = shards(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    fails(tmp_path, "which is not a file name")


def test_index_names_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    index = shards(tmp_path) / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["e"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    fails(tmp_path, "places tensor 'e' in 'model-00001-of-00002.safetensors', which lacks it")


def test_same_tensor_twice_without_index(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": TENSORS["a.weight"]}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    fails(tmp_path, "tensor 'a' is in")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": TENSORS["a.weight"], "b": TENSORS["a.bias"]}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"cut short|header length is wrong"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("not json", "malformed safetensors header"),
        ("[1, 2]", "malformed safetensors header"),
        ('{"a": {"dtype": "F32", "shape": [2]}}', "malformed safetensors header"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"F32 \[2\] in 4 bytes"),
        ('{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}', "F31"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "does not fit"),
    ],
)
def test_malformed_header(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(64))
    fails(tmp_path, message)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", checkpoint.info("a.weight").offset + 1)
    with pytest.raises(CheckpointError, match=r"ends inside tensor 'a.weight'"):
        checkpoint.read("a.weight")


def test_digest_depends_on_content_only(tmp_path: Path) -> None:
    one, two = Checkpoint(shards(tmp_path / "one")), tmp_path / "two"
    two.mkdir()
    save_file(TENSORS, two / "model.safetensors")
    names = one.names()
    assert one.digest(names) == Checkpoint(two).digest(reversed(names)) == one.digest(names * 2)
    seen = {one.digest(names), one.digest(names[1:])}
    for change in (
        {"a.weight": TENSORS["a.weight"] + 1},
        {"a.weight": TENSORS["a.weight"].reshape(4, 3)},
        {"c.flag": torch.tensor(1, dtype=torch.uint8)},  # the same byte, another type
    ):
        save_file({**TENSORS, **change}, two / "model.safetensors")
        seen.add(Checkpoint(two).digest(names))
    assert len(seen) == 5


def test_digest_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = shards(tmp_path / "checkpoint"), tmp_path / "cache"
    names = Checkpoint(folder).names()
    first = Checkpoint(folder).digest(names, cache)
    assert first == Checkpoint(folder).digest(names)

    with monkeypatch.context() as patch:
        patch.setattr("ming_trt.checkpoint._fill", lambda *_: pytest.fail("read although nothing changed"))
        patch.setattr(Checkpoint, "read_bytes", lambda *_: pytest.fail("read although nothing changed"))
        assert Checkpoint(folder).digest(names, cache) == first

    shard = folder / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    offset = Checkpoint(folder).info("a.weight").offset
    data[offset] ^= 1
    shard.write_bytes(data)  # same size and inode, another modification time
    os.utime(shard, ns=(1, 1))
    changed = Checkpoint(folder).digest(names, cache)
    assert changed != first and changed == Checkpoint(folder).digest(names)

    for file in cache.iterdir():
        file.write_text("damaged")
    assert Checkpoint(folder).digest(names, cache) == changed
