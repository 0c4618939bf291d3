"""Model `cancel`: cancels a request, renews its lease, or takes note of what its client has heard, by its id."""

from __future__ import annotations

import json
from typing import Any

from ming_trt.errors import InputError
from ming_trt.processing.request import MAX_ID_CHARACTERS, MAX_LEASE_SECONDS
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.serving.stages.base import Array, Inputs, Stage, board_folder, json_array, read_bytes
from ming_trt.serving.stages.presence import Presence

OPERATIONS = ("cancel", "renew", "heard")
_SWEEP_EVERY = 1000


class CancelStage(Stage):
    """`request` BYTES [1]: `{"op": "cancel" | "renew" | "heard", "id": ..., "seconds": ...}` → `state` BYTES [1].

    The state holds `op`, `id` and, for "renew", `lost`: the model whose process died while it worked on the request.
    """

    def load(self) -> None:
        folder = board_folder(self.repository)
        self._board = CancelBoard(folder)
        self._presence = Presence(folder)
        self._calls = 0

    def answer(self, request: Inputs) -> dict[str, Array]:
        operation, request_id, seconds = _parse(read_bytes(request, "request")[0])
        state: dict[str, Any] = {"op": operation, "id": request_id}
        if operation == "cancel":
            self._board.cancel(request_id)
        elif operation == "heard":
            self._board.hear(request_id, seconds)
        else:
            self._board.renew(request_id, seconds)
            state["lost"] = self._presence.lost(request_id)
        self._calls += 1
        if self._calls % _SWEEP_EVERY == 0:
            self._board.sweep()
        return {"state": json_array(state)}


def _parse(data: bytes) -> tuple[str, str, float]:
    try:
        body = json.loads(data)
        operation, request_id, seconds = body["op"], body["id"], body.get("seconds", 0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError('the request is not of the form {"op": "cancel", "id": "..."}: send such JSON') from None
    if operation not in OPERATIONS:
        raise InputError(f"'op' is {operation!r}: choose one of {', '.join(OPERATIONS)}")
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARACTERS:
        raise InputError(f"'id' is not a string of 1 to {MAX_ID_CHARACTERS} characters: give the id of a request")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds <= MAX_LEASE_SECONDS:
        raise InputError(f"'seconds' is {seconds!r}: give a number from 0 to {MAX_LEASE_SECONDS}")
    return operation, request_id, float(seconds)
