"""Files of tensors without torch: equal to what torch reads, and nothing in them is run."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from ming_trt.checkpoint import Checkpoint
from ming_trt.errors import CheckpointError
from ming_trt.torch_file import load_torch_file, state_dict

TALKER = Path(__file__).parent / "data" / "golden" / "generation" / "checkpoint" / "talker"


@pytest.mark.parametrize("name", ["flow_stream.pt", "hift_v2.pt"])
def test_equal_to_torch(name: str) -> None:
    expected = torch.load(TALKER / name, weights_only=True)
    expected = expected.get("model", expected)
    checkpoint = Checkpoint(TALKER.parent)
    assert set(checkpoint.part(f"talker/{name}").names()) == set(expected)
    for key, value in expected.items():
        full = f"talker/{name}/{key}"
        assert full in checkpoint and torch.equal(checkpoint.read(full), value)
    digest = checkpoint.digest([f"talker/{name}/{key}" for key in expected])
    assert digest == Checkpoint(TALKER.parent).digest([f"talker/{name}/{key}" for key in expected])


def test_dtypes_views_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "view": base[1:3],
        "parameter": torch.nn.Parameter(base),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    torch.save(content, tmp_path / "x.pt")
    infos = state_dict(tmp_path / "x.pt")
    assert {name: info.shape for name, info in infos.items()} == {n: tuple(v.shape) for n, v in content.items()}
    for name, info in infos.items():
        with info.file.open("rb") as file:
            file.seek(info.offset)
            data = bytearray(file.read(info.nbytes))
        expected = content[name].detach()
        got = torch.frombuffer(data, dtype=expected.dtype).reshape(expected.shape) if data else expected
        assert torch.equal(got, expected), name


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/owned",)


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"a": _Evil()}, file)
    with pytest.raises(CheckpointError, match="system"):
        load_torch_file(file)
    torch.save({"a": torch.ones(3, 4).T}, file)
    with pytest.raises(CheckpointError, match="not contiguous"):
        load_torch_file(file)
    torch.save({"a": torch.ones(3), "b": "text"}, file)
    assert load_torch_file(file)["b"] == "text"
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        state_dict(file)
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="zip format"):
        load_torch_file(file)
    with pytest.raises(CheckpointError, match="missing"):
        load_torch_file(tmp_path / "absent.pt")
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="zip format"):
        load_torch_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "x")
    with pytest.raises(CheckpointError, match="no torch data"):
        load_torch_file(file)


def test_cut_and_compressed_files(tmp_path: Path) -> None:
    whole = (TALKER / "hift_v2.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        load_torch_file(tmp_path / "cut.pt")
    torch.save({"a": torch.ones(1000)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        load_torch_file(tmp_path / "x.pt")
