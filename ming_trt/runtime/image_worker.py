"""Draws pictures for many requests in one thread: requests of one size share the denoiser's runs.

Requests join and leave between two steps, as every row of the denoiser has its own time. The oldest request decides
which size is drawn; others of that size join up to `max_batch`, the rest wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.errors import CancelledError, EngineError, InputError, MingError, ServeError
from ming_trt.processing.query import USED
from ming_trt.runtime.events import ErrorEvent
from ming_trt.runtime.image import ImageEngines, ImageJob, ImageRequest, Picture

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepEvent:
    """`done` of `steps` denoising steps are made; `seconds` since the request was begun."""

    done: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewEvent:
    """What the picture looks like after `done` steps: u8 [H, W, 3]."""

    done: int
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PictureEvent:
    """The end of a good request."""

    picture: Picture


ImageEvent = StepEvent | PreviewEvent | PictureEvent | ErrorEvent


class ImageHandle:
    """One submitted request. Iterate over it once: the last event is a PictureEvent or an ErrorEvent."""

    def __init__(self, request: ImageRequest, cancelled: Callable[[], bool] | None) -> None:
        self.request = request
        self._events: SimpleQueue[ImageEvent] = SimpleQueue()
        self._flag = threading.Event()
        self._ask = cancelled

    def cancel(self) -> None:
        """Asks for the end, which comes between two steps. Harmless after it."""
        self._flag.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called, or the callable given to `submit` says so."""
        return self._flag.is_set() or (self._ask is not None and self._ask())

    def put(self, event: ImageEvent) -> None:
        """Used by the worker."""
        self._events.put(event)

    def __iter__(self) -> Iterator[ImageEvent]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, PictureEvent | ErrorEvent):
                return

    def result(self) -> Picture:
        """Waits for the picture. Raises the error of an ErrorEvent."""
        for event in self:
            if isinstance(event, ErrorEvent):
                raise event.error
            if isinstance(event, PictureEvent):
                return event.picture
        raise AssertionError("a handle ends with a PictureEvent or an ErrorEvent")


@dataclass(slots=True, eq=False)
class _Active:
    handle: ImageHandle
    job: ImageJob
    began: float


class ImageGenerator:
    """The worker. `max_batch` requests share a step, `max_waiting` wait at most. Close it to end its thread."""

    def __init__(self, engines: ImageEngines, *, max_batch: int = 2, max_waiting: int = 64) -> None:
        self.engines = engines
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self._waiting: deque[ImageHandle] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="image-generator", daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest, cancelled: Callable[[], bool] | None = None) -> ImageHandle:
        """Queues a request. `cancelled` is asked between two steps. Raises `InputError` for a request that cannot be
        drawn, `ServeError` if too many wait."""
        # a bad number of steps or size is refused before it waits
        self.engines.schedule.levels(request.options.steps)
        _group(request)
        if request.hidden.ndim != 2 or len(request.hidden) != USED:
            raise InputError(
                f"hidden states of shape {list(request.hidden.shape)}: give {USED} rows, one per query token"
            )
        handle = ImageHandle(request, cancelled)
        with self._changed:
            if self._closing:
                raise ServeError("the image stage is shutting down: send the request again later")
            if len(self._waiting) >= self.max_waiting:
                raise ServeError(f"{self.max_waiting} pictures are waiting already: send the request again later")
            self._waiting.append(handle)
            self._changed.notify()
        return handle

    def close(self) -> None:
        """Ends the thread; requests that are not finished get a CancelledError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        active: list[_Active] = []
        while True:
            with self._changed:
                while not active and not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    for handle in (*(each.handle for each in active), *self._waiting):
                        handle.put(ErrorEvent(CancelledError("the image stage is shutting down")))
                    return
            try:
                active = self._advance(self._admit(active))
            except Exception as error:  # a bug must not end the thread while clients wait
                log.exception("image worker")
                for each in active:
                    each.handle.put(ErrorEvent(EngineError(f"stage 'image' failed: {error}")))
                active = []

    def _admit(self, active: list[_Active]) -> list[_Active]:
        """Starts waiting requests, oldest first, that may share a step with the active ones."""
        active = list(active)
        for handle in list(self._waiting):
            if len(active) >= self.max_batch and not handle.cancelled:
                continue
            if active and not handle.cancelled and _group(handle.request) != _group(active[0].handle.request):
                continue
            with self._changed:
                self._waiting.remove(handle)
            if handle.cancelled:
                handle.put(_cancelled(handle))
                continue
            began = perf_counter()
            try:
                active.append(_Active(handle, self.engines.start(handle.request), began))
            except MingError as error:
                handle.put(ErrorEvent(error))
        return active

    def _advance(self, active: list[_Active]) -> list[_Active]:
        """One step of all; returns those that go on."""
        going = []
        for each in active:
            if each.handle.cancelled:
                each.handle.put(_cancelled(each.handle))
            else:
                going.append(each)
        return [each for each in self._step(going) if self._report(each)]

    def _step(self, going: Sequence[_Active]) -> list[_Active]:
        if not going:
            return []
        try:
            self.engines.step([each.job for each in going])
            return list(going)
        except EngineError as error:
            if len(going) == 1:
                going[0].handle.put(ErrorEvent(error))
                return []
        # One bad request must not take the others with it: which one it is shows when each steps alone.
        return [each for one in going for each in self._step([one])]

    def _report(self, each: _Active) -> bool:
        """Sends what the step brought; whether the request goes on."""
        job, handle = each.job, each.handle
        handle.put(StepEvent(job.done, len(job.times), perf_counter() - each.began))
        try:
            if job.finished:
                handle.put(PictureEvent(self.engines.finish(job)))
                return False
            every = job.request.options.preview_every
            if every and job.done % every == 0:
                handle.put(PreviewEvent(job.done, self.engines.preview(job)))
        except MingError as error:
            handle.put(ErrorEvent(error))
            return False
        return True


def _group(request: ImageRequest) -> tuple[int, int, bool]:
    size = request.size
    return size.height, size.width, request.reference is not None


def _cancelled(handle: ImageHandle) -> ErrorEvent:
    return ErrorEvent(CancelledError(f"request '{handle.request.request_id}' was cancelled"))


def open_image(bundle: Bundle, *, max_batch: int = 2) -> ImageGenerator:
    """The bundle's picture engines, running. Raises `BundleError` or `EngineError`."""
    return ImageGenerator(ImageEngines.open(bundle, threads=bundle.preset.threads), max_batch=max_batch)
