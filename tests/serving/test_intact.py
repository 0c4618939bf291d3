"""A damaged bundle is refused by name before a server is started on it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt import bundle as bundles
from ming_trt.bundle import Bundle
from ming_trt.errors import BundleError
from ming_trt.serving.assemble import assemble
from ming_trt.serving.intact import check_files
from ming_trt.serving.launch import Server

from .toy_bundle import write_bundle

SIZES = {"llm/model.onnx": 100, "llm/model.onnx.data": 3 << 20, "assets/config.json": 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("intact") / "bundle"
    manifest = Bundle.open(write_bundle(folder)).manifest
    files = {}
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(index % 251 for index in range(size)))
        files[name] = bundles.FileEntry(bundles.sha256(folder / name), size)
    steps = {"llm": bundles.StepEntry("OK", files=files)}
    made = bundles.Manifest(manifest.model, manifest.target, manifest.preset, {}, {}, steps, manifest.components)
    (folder / bundles.MANIFEST).write_text(made.to_json(), "utf-8")
    return Bundle.open(folder)


@given(name=st.sampled_from(sorted(SIZES)), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere(whole: Bundle, name: str, place: float, bit: int) -> None:
    path, at = whole.path / name, int(place * SIZES[name])

    def flip() -> None:
        with path.open("r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)[0]
            stream.seek(at)
            stream.write(bytes([byte ^ 1 << bit]))

    flip()
    try:
        with pytest.raises(BundleError, match=f"is damaged: '{name}' does not have the digest"):
            check_files(whole, lambda _: None)
    finally:
        flip()
    assert check_files(whole, lambda _: None)


def checked(folder: Path) -> list[str]:
    """What `ming-trt inspect --check` says of it."""
    try:
        return Bundle.open(folder).check()
    except BundleError as error:
        return [str(error)]


def test_one_flipped_byte_in_any_file_of_a_real_bundle(understanding_bundle: Path, tmp_path: Path) -> None:
    """Every file that a build publishes, the manifest included: `inspect --check` and `serve` find it by name."""
    folder = tmp_path / "bundle"
    shutil.copytree(understanding_bundle, folder)
    names = [name for name in bundles.files_below(folder) if not name.startswith(".")]
    assert len(names) >= 10 and bundles.MANIFEST in names
    assemble(folder, tmp_path / "repo")
    for number, name in enumerate(names):
        path = folder / name
        before = path.read_bytes()
        at = (number + 1) * 7919 % len(before)
        path.write_bytes(before[:at] + bytes([before[at] ^ 0x5A]) + before[at + 1 :])
        server = Server(tmp_path / "repo")
        with pytest.raises(BundleError, match=re.escape(name)):
            server.start()
        assert server.run_dir == Path()
        assert any(name in problem for problem in checked(folder))
        path.write_bytes(before)
    assert Bundle.open(folder).check() == []


def test_serve_refuses_before_anything_is_started(whole: Bundle, tmp_path: Path) -> None:
    assemble(whole.path, tmp_path / "repo")
    data = whole.path / "assets/config.json"
    before = data.read_bytes()
    server = Server(tmp_path / "repo")
    data.write_bytes(b"other")
    try:
        with pytest.raises(BundleError, match=r"'assets/config\.json' does not have the digest"):
            server.start()
    finally:
        data.write_bytes(before)
    # no folder of a run was made
    assert server.run_dir == Path()


def test_a_stop_ends_the_reading(whole: Bundle) -> None:
    assert not check_files(whole, lambda _: None, lambda: True)


def test_progress_of_a_long_check(whole: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from ming_trt.serving import intact

    monkeypatch.setattr(intact, "_REPORT_EVERY_S", 0.0)
    lines: list[str] = []
    check_files(whole, lines.append)
    assert lines[-1].startswith("checking the bundle: 100% of 0.0 GB")
