"""Files that a command writes: whole ones or none."""

import wave
from pathlib import Path

import pytest

from ming_trt.cli.media_files import PictureFile, SoundFile
from ming_trt.errors import CancelledError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_preview_is_no_picture(tmp_path: Path) -> None:
    """A request that fails after a preview leaves nothing; one that ends leaves the picture."""
    with pytest.raises(CancelledError), PictureFile(tmp_path / "fox.png") as file:
        file.write(b"preview", preview=True)
        assert (tmp_path / "fox.png").read_bytes() == b"preview"
        raise CancelledError("cancelled")
    assert names(tmp_path) == []
    with PictureFile(tmp_path / "fox.png") as file:
        file.write(b"preview", preview=True)
        file.write(b"picture", preview=False)
    assert names(tmp_path) == ["fox.png"] and (tmp_path / "fox.png").read_bytes() == b"picture"


def test_an_older_picture_stays_if_nothing_came(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(b"old")
    with pytest.raises(CancelledError), PictureFile(tmp_path / "fox.png"):
        raise CancelledError("cancelled")
    assert (tmp_path / "fox.png").read_bytes() == b"old"


def test_sound_appears_when_it_is_complete(tmp_path: Path) -> None:
    with SoundFile(tmp_path / "a.wav") as file:
        file.write(b"\x01\x00" * 240, 24000)
        assert "a.wav" not in names(tmp_path) and file.seconds == 0.01
        file.finish()
    with wave.open(str(tmp_path / "a.wav")) as stored:
        assert (stored.getnframes(), stored.getframerate(), stored.getsampwidth()) == (240, 24000, 2)
    with pytest.raises(CancelledError), SoundFile(tmp_path / "b.wav") as file:
        file.write(b"\x01\x00", 24000)
        raise CancelledError("cancelled")
    assert names(tmp_path) == ["a.wav"]
