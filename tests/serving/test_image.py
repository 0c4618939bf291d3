"""Pictures through the real server: equal to those of one process, step by step, cancelled, refused, failing loudly."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ming_trt.bundle import Bundle, Manifest, sha256
from ming_trt.errors import CancelledError, EngineError, InputError
from ming_trt.processing.request import parse_request
from ming_trt.runtime.draw import Painter
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.serving.assemble import assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Server

from .conftest import free_ports

pytestmark = [pytest.mark.triton, pytest.mark.slow]
SCENE = (Path(__file__).parents[2] / "examples" / "scene.jpg").read_bytes()
QUICK = {"width": 256, "height": 1024, "steps": 2}
CASES: dict[str, tuple[str, dict[str, Any], list[bytes]]] = {
    "text": ("a red fox in snow", {**QUICK, "steps": 3, "seed": 5}, []),
    "edit": ("turn the coat blue", {"steps": 2, "cfg": 3.0, "image_cfg": 2.0, "cfg_mode": 6, "seed": 9}, [SCENE]),
}


@pytest.fixture
def client(mini_server: Server) -> Iterator[Client]:
    with Client(mini_server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(mini_bundle: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Pixels u8 [H, W, 3] of every case, drawn in this process."""
    bundle, pictures = Bundle.open(mini_bundle), {}
    with Pipeline.open(bundle) as pipeline:
        painter = Painter.open(bundle, pipeline)
        for name, (text, draw, images) in CASES.items():
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
            request = parse_request({"messages": [{"role": "user", "content": content}], "draw": draw})
            pictures[name] = painter.picture(request, images).pixels
        painter.close()
    return pictures


def drawn(client: Client, name: str) -> np.ndarray[Any, Any]:
    text, draw, images = CASES[name]
    answer = client.ask(text, images=images, draw=draw)
    assert answer.read_all() == ""
    assert answer.finish_reason == "stop" and answer.image is not None
    return pixels(answer.image)


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_picture_of_one_process(client: Client, expected: dict[str, Any], name: str) -> None:
    """Bit for bit: the same engines, the same order of operations."""
    found = drawn(client, name)
    assert np.array_equal(found, expected[name])
    assert found.std() > 1, "a picture of one colour proves nothing"


def test_two_at_once(client: Client, expected: dict[str, Any]) -> None:
    """They may share the denoiser's steps, whose sums may then be taken in another order: 1e-4 of full scale is below
    half a level, so a level may tip over and no more."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(drawn(client, "text"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 2
    for picture in found:
        assert np.abs(picture.astype(int) - expected["text"]).max() <= 1


def test_steps_previews_and_sizes(client: Client) -> None:
    answer = client.ask("a fox", draw={"width": 300, "height": 1100, "steps": 3, "preview_every": 2})
    deltas = list(answer)
    assert [delta.progress for delta in deltas if delta.progress] == [(1, 3), (2, 3), (3, 3)]
    previews = [delta.image for delta in deltas if delta.preview]
    assert len(previews) == 1 and previews[0] is not None
    assert pixels(previews[0]).shape == (928, 256, 3) and previews[0] != answer.image
    assert answer.picture["asked"] == [300, 1100] and answer.picture["given"] == [256, 928]
    assert answer.picture["steps"] == 3 and set(answer.picture["seconds"]) >= {"denoise", "decode"}
    assert deltas[-1].image == answer.image and deltas[-1].state["finish_reason"] == "stop"


def test_text_and_pictures_at_once(client: Client, expected: dict[str, Any]) -> None:
    alone = client.ask("Hello", sampling={"max_tokens": 20}).read_all()
    answer = client.ask("a red fox in snow", draw=CASES["text"][1])
    beside = [client.ask("Hello", sampling={"max_tokens": 20}) for _ in range(3)]
    assert [each.read_all() for each in beside] == [alone] * 3
    answer.read_all()
    assert answer.image is not None and np.array_equal(pixels(answer.image), expected["text"])


def test_cancellation_frees_every_stage(mini_server: Server, client: Client) -> None:
    answer = client.ask("a fox", draw={**QUICK, "steps": 200})
    next(delta for delta in answer if delta.progress)
    started = time.monotonic()
    answer.cancel()
    with pytest.raises(CancelledError):
        answer.read_all()
    assert time.monotonic() - started < 60  # a step, not the two hundred
    nobody_works(mini_server)
    assert drawn(client, "text").size


def nobody_works(server: Server) -> None:
    """No stage has a request."""
    folder = server.run_dir / "board.present"
    for _ in range(200):
        left = [path.name for path in folder.iterdir()]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"still at work: {left}")


def test_nothing_is_left_after_pictures(mini_server: Server, client: Client) -> None:
    drawn(client, "text")
    nobody_works(mini_server)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(Image.new("RGB", (420, 280), "red"), "JPEG", exif=exif)


USABLE: dict[str, tuple[Callable[[], bytes], tuple[int, int]]] = {
    "CMYK": (lambda: encoded(Image.new("CMYK", (300, 300), (0, 99, 0, 0)), "JPEG"), (512, 512)),
    "16 bit": (lambda: encoded(Image.fromarray(np.full((300, 300), 40000, np.uint16))), (512, 512)),
    "animation": (
        lambda: encoded(Image.new("P", (300, 300)), "GIF", save_all=True, append_images=[Image.new("P", (300, 300))]),
        (512, 512),
    ),
    "transparent": (lambda: encoded(Image.new("RGBA", (300, 300), (9, 9, 9, 128))), (512, 512)),
    "turned": (_turned, (416, 608)),
}


@pytest.mark.parametrize("name", USABLE)
def test_unusual_reference_pictures(client: Client, name: str) -> None:
    make, (width, height) = USABLE[name]
    answer = client.ask("make it blue", images=[make()], draw={"steps": 1})
    answer.read_all()
    assert answer.picture["given"] == [width, height]


FAULTS: dict[str, dict[str, Any]] = {
    "narrow": {"draw": {"width": 10, "height": 9000}},
    "zero width": {"draw": {"width": 0}},
    "no steps": {"draw": {"steps": 0}},
    "1000 steps": {"draw": {"steps": 1000}},
    "negative cfg": {"draw": {"cfg": -1}},
    "mode 7": {"draw": {"cfg_mode": 7}},
    "unknown option": {"draw": {"style": "oil"}},
    "unknown preset": {"draw": {"preset": "may"}},
    "damaged reference": {"draw": QUICK, "images": [SCENE[: len(SCENE) // 2]]},
    "no picture": {"draw": QUICK, "images": [b"hello"]},
    "with thinking": {"draw": QUICK, "thinking": True},
    "with speech": {"draw": QUICK, "speak": {}},
    "long prompt": {"draw": QUICK, "text": "word " * 6000},
    "empty": {"draw": QUICK, "text": ""},
}


@pytest.mark.parametrize("name", FAULTS)
def test_unusable_input_is_one_sentence(mini_server: Server, client: Client, name: str) -> None:
    with pytest.raises(InputError) as caught:
        client.ask(**{"text": "a fox", **FAULTS[name]}).read_all()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()


def without_numbers(bundle: Path, folder: Path, engine: str) -> Path:
    """A copy of the bundle that looks intact and in which all weights of that engine are NaN."""
    shutil.copytree(bundle, folder)
    weights, manifest = folder / engine / "model.onnx.data", folder / "manifest.json"
    before, size = sha256(weights), weights.stat().st_size
    weights.write_bytes(np.full(size // 4, np.nan, "<f4").tobytes().ljust(size, b"\0"))
    document = json.loads(manifest.read_text().replace(before, sha256(weights)))
    manifest.write_text(Manifest.from_dict(document).to_json())
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ming_trt", *arguments], capture_output=True, text=True, check=False)


def test_command_writes_the_picture(mini_server: Server, expected: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["ask", "a red fox in snow", "--draw", str(tmp_path / "fox.png"), "--size", "256x1024", "--steps", "3"]
    done = run(*arguments, "--seed", "5", "--url", mini_server.grpc_url)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3" in done.stderr and "256x1024 (asked for 256x1024), 3 steps, seed 5" in done.stderr
    assert np.array_equal(pixels((tmp_path / "fox.png").read_bytes()), expected["text"])
    assert [path.name for path in tmp_path.iterdir()] == ["fox.png"]


def test_command_leaves_nothing_on_failure(mini_server: Server, tmp_path: Path) -> None:
    arguments = ["ask", "x", "--draw", str(tmp_path / "fox.png"), "--size", "10x9000", "--url", mini_server.grpc_url]
    done = run(*arguments)
    assert done.returncode != 0 and done.stderr.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["dit", "vae_decoder"])
def test_bad_numbers_become_an_error_that_names_the_stage(mini_bundle: Path, tmp_path: Path, engine: str) -> None:
    """Weights that are not numbers: the client hears of it, there is no black picture, and text is still answered."""
    assemble(without_numbers(mini_bundle, tmp_path / "bundle", engine), tmp_path / "repo")
    with (
        Server(tmp_path / "repo", free_ports(), ready_timeout_s=120) as server,
        Client(server.grpc_url) as client,
    ):
        with pytest.raises(EngineError, match=rf"stage 'image'.*{engine}.*not finite"):
            client.ask("a fox", draw=QUICK).read_all()
        assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()


def test_the_bundle_says_what_it_draws_and_speaks_with(mini_bundle: Path) -> None:
    """Without the checkpoint: what a benchmark's ceilings are computed from."""
    from ming_trt.bench.ceiling import ServedModel

    model = ServedModel.of(mini_bundle)
    assert model.picture is not None and model.talker is not None and model.on_processor
    assert {"dit", "vae_encoder", "vae_decoder", "talker"} <= model.precisions.keys()
