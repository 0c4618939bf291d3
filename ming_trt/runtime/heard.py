"""Back-pressure of a listener who is far away: sound goes out only so far ahead of what the client says it has taken.

A stream of Triton takes responses without limit, whatever the client reads. So the client names a limit (`ahead` of the
request's `speak`) and reports what it has taken, by model `cancel`; who sends the sound waits in between, and then
decoder and talker wait, too (`speech.py`).
"""

from __future__ import annotations

import time

from ming_trt.errors import CancelledError
from ming_trt.runtime.cancel import CancelBoard

_POLL_SECONDS = 0.02


class Allowance:
    """What may be sent of one answer: `ahead` seconds more than the client has reported, 0 = any."""

    def __init__(self, board: CancelBoard, request_id: str, ahead: float) -> None:
        self._board, self._id, self._ahead = board, request_id, ahead
        self.sent = 0.0

    def spend(self, seconds: float) -> None:
        """Waits until less than `ahead` seconds are on their way, then counts `seconds` as sent: so at most one chunk
        more than `ahead`. Raises `CancelledError`, also when the request's lease runs out."""
        while self._ahead and self.sent - self._board.heard(self._id) >= self._ahead:
            if self._board.is_cancelled(self._id):
                raise CancelledError(f"request '{self._id}' was cancelled while its sound waited for the client")
            time.sleep(_POLL_SECONDS)
        self.sent += seconds
