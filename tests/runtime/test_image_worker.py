"""The picture worker with engines made of a few lines of numpy: events, sharing of steps, cancellation, bad values."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ming_trt.errors import CancelledError, EngineError, InputError, MingError, ServeError
from ming_trt.processing.draw import DrawOptions
from ming_trt.processing.reference import prepare_reference
from ming_trt.runtime.engine import TensorSpec, check_finite
from ming_trt.runtime.events import ErrorEvent
from ming_trt.runtime.flow_match import FlowMatchSchedule
from ming_trt.runtime.image import ImageEngines, ImageRequest
from ming_trt.runtime.image_worker import ImageGenerator, PictureEvent, PreviewEvent, StepEvent

H, D = 8, 4


class NumpyEngine:
    """An engine from a function of its feeds. `rows` records the batch of each run; `gate` holds a run back."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function
        self.inputs: dict[str, TensorSpec] = {}
        self.outputs: dict[str, TensorSpec] = {}
        self.rows: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(
        self, feeds: Mapping[str, Any], outputs: Collection[str] | None = None, into: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        self.gate.wait(10)
        self.rows.append(len(next(iter(feeds.values()))))
        result = {name: np.asarray(value, np.float32) for name, value in self.function(**feeds).items()}
        check_finite(self.name, result, result)
        return result

    def close(self) -> None:
        pass


def _velocity(latent: Any, time: Any, context: Any, pooled: Any, reference: Any, token_index: Any) -> dict[str, Any]:
    tokens = latent.shape[2] * latent.shape[3] // 4
    assert len(token_index) in (tokens, 2 * tokens)
    assert (reference.shape[2:] == latent.shape[2:]) == (len(token_index) == 2 * tokens)
    push = pooled.sum(1) + reference.mean((1, 2, 3))
    return {"velocity": latent * 0.1 + (push + time * 1e-3)[:, None, None, None]}


@pytest.fixture
def engines() -> ImageEngines:
    made = {
        "connector": NumpyEngine("connector", lambda hidden: {"condition": hidden}),
        "condition": NumpyEngine(
            "condition", lambda condition: {"context": condition[..., :D], "pooled": condition.mean(1)[:, :D]}
        ),
        "dit": NumpyEngine("dit", _velocity),
        "vae_encoder": NumpyEngine("vae_encoder", lambda image: {"latent": np.repeat(image[:, :1, ::8, ::8], 16, 1)}),
        "vae_decoder": NumpyEngine("vae_decoder", lambda latent: {"image": latent[:, :3].repeat(8, 2).repeat(8, 3)}),
    }
    return ImageEngines(made, FlowMatchSchedule(3.0), 8, 16)  # type: ignore[arg-type]


@pytest.fixture
def worker(engines: ImageEngines) -> Iterator[ImageGenerator]:
    generator = ImageGenerator(engines, max_batch=2)
    yield generator
    generator.close()


def _request(value: float = 0.1, name: str = "r", **options: Any) -> ImageRequest:
    settings = {"steps": 4, "height": 256, "width": 1024, "seed": 3, **options}
    return ImageRequest(np.full((256, H), value, np.float32), DrawOptions(**settings), request_id=name)


def test_events_and_picture(worker: ImageGenerator) -> None:
    events = list(worker.submit(_request(preview_every=2, seed=77)))
    steps = [event.done for event in events if isinstance(event, StepEvent)]
    assert steps == [1, 2, 3, 4]
    previews = [event for event in events if isinstance(event, PreviewEvent)]
    assert [event.done for event in previews] == [2]
    assert previews[0].pixels.shape == (256, 1024, 3)
    last = events[-1]
    assert isinstance(last, PictureEvent)
    assert last.picture.pixels.shape == (256, 1024, 3)
    assert (last.picture.seed, last.picture.steps) == (77, 4)
    assert {"condition", "encode", "denoise", "decode"} <= last.picture.seconds.keys()


def test_equal_seeds_give_equal_pictures(worker: ImageGenerator) -> None:
    one, two, other = (worker.submit(_request(seed=seed)).result().pixels for seed in (5, 5, 6))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_random_seeds_are_reported(worker: ImageGenerator) -> None:
    seeds = {worker.submit(_request(steps=1, seed=seed)).result().seed for seed in (-1, -1, -1, -1)}
    assert len(seeds) > 1
    assert all(0 <= seed < 65535 for seed in seeds)


def test_requests_of_one_size_share_steps(engines: ImageEngines) -> None:
    dit: Any = engines.engines["dit"]
    dit.gate.clear()
    worker = ImageGenerator(engines, max_batch=2)
    try:
        handles = [worker.submit(_request(0.1 * i, steps=3 + i)) for i in range(2)]
        other = worker.submit(_request(steps=1, height=512, width=512))
        dit.gate.set()
        pictures = [handle.result() for handle in handles]
        other.result()
        assert 4 in dit.rows  # two requests with two branches each
        alone = [worker.submit(_request(0.1 * i, steps=3 + i)).result() for i in range(2)]
        for together, single in zip(pictures, alone, strict=True):
            assert np.array_equal(together.pixels, single.pixels)
    finally:
        worker.close()


def test_edit_uses_the_reference(worker: ImageGenerator) -> None:
    bright, dark = (prepare_reference(Image.new("RGB", (120, 40), (level, level, level))) for level in (250, 5))
    options = DrawOptions(steps=2, seed=1, image_cfg=2.0)
    hidden = np.full((256, H), 0.1, np.float32)
    pictures = [
        worker.submit(ImageRequest(hidden, options, reference)).result() for reference in (bright, dark, bright)
    ]
    assert pictures[0].size == bright.size
    assert np.array_equal(pictures[0].pixels, pictures[2].pixels)
    assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)


def test_cancelled_between_steps(engines: ImageEngines) -> None:
    worker = ImageGenerator(engines)
    try:
        handle = worker.submit(_request(steps=200, name="long"))
        events = iter(handle)
        assert isinstance(next(events), StepEvent)
        handle.cancel()
        rest = list(events)
        assert isinstance(rest[-1], ErrorEvent)
        assert isinstance(rest[-1].error, CancelledError)
        assert "long" in str(rest[-1].error)
        assert len(rest) < 199
        asked = worker.submit(_request(steps=200), cancelled=lambda: True)
        with pytest.raises(CancelledError):
            asked.result()
        assert worker.submit(_request(steps=1)).result().steps == 1
    finally:
        worker.close()


@pytest.mark.parametrize("stage", ["llm", "connector", "condition", "dit", "vae_encoder", "vae_decoder"])
def test_not_finite_names_the_stage(engines: ImageEngines, stage: str) -> None:
    """Never a black picture: a NaN anywhere ends the request with the name of the stage, and the next one is served."""
    worker = ImageGenerator(engines)
    reference = prepare_reference(Image.new("RGB", (64, 64)))
    good = _request(steps=2)
    try:
        if stage == "llm":
            bad = ImageRequest(np.full((256, H), np.nan, np.float32), good.options)
            with pytest.raises(EngineError, match="'llm'"):
                worker.submit(bad).result()
        else:
            engine: Any = engines.engines[stage]
            engine_function = engine.function
            engine.function = lambda **feeds: {k: v * np.nan for k, v in engine_function(**feeds).items()}
            with pytest.raises(EngineError, match=f"'{stage}'"):
                worker.submit(ImageRequest(good.hidden, good.options, reference)).result()
            engine.function = engine_function
        assert worker.submit(good).result().steps == 2
    finally:
        worker.close()


def test_bad_request_does_not_take_its_neighbour_along(engines: ImageEngines) -> None:
    dit: Any = engines.engines["dit"]
    good_function = dit.function

    def poisoned(**feeds: Any) -> dict[str, Any]:
        out = good_function(**feeds)["velocity"]
        out[feeds["pooled"][:, 0] > 0.5] = np.nan
        return {"velocity": out}

    dit.function = poisoned
    dit.gate.clear()
    worker = ImageGenerator(engines, max_batch=2)
    try:
        bad, good = worker.submit(_request(1.0)), worker.submit(_request(0.1))
        dit.gate.set()
        with pytest.raises(EngineError, match="'dit'"):
            bad.result()
        assert good.result().steps == 4
    finally:
        worker.close()


def test_size_that_no_bucket_resembles(worker: ImageGenerator) -> None:
    with pytest.raises(InputError, match="picture size 2000x20"):
        worker.submit(_request(height=20, width=2000))


def test_wrong_hidden_rows(worker: ImageGenerator) -> None:
    with pytest.raises(InputError, match="256 rows"):
        worker.submit(ImageRequest(np.zeros((336, H), np.float32)))


def test_queue_has_a_limit(engines: ImageEngines) -> None:
    dit: Any = engines.engines["dit"]
    dit.gate.clear()
    worker = ImageGenerator(engines, max_batch=1, max_waiting=1)
    try:
        handles = [worker.submit(_request(steps=1))]
        with pytest.raises(ServeError, match="waiting"):
            for _ in range(3):
                handles.append(worker.submit(_request(steps=1)))
        dit.gate.set()
        assert all(handle.result().steps == 1 for handle in handles)
    finally:
        worker.close()


def test_close_ends_waiting_requests(engines: ImageEngines) -> None:
    worker = ImageGenerator(engines)
    handle = worker.submit(_request(steps=200))
    worker.close()
    with pytest.raises(MingError, match="shutting down"):
        handle.result()
    with pytest.raises(ServeError, match="shutting down"):
        worker.submit(_request())
