"""The real stage over an LLM that repeats the prompt, a token each 5 ms, and then tells the number of feature rows."""

import os
import signal
import threading
import time

from ming_trt.errors import CancelledError, EngineError, InputError
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.events import ErrorEvent, FinishEvent, Handle, Timings, TokenEvent, Usage
from ming_trt.serving.stages.base import board_folder
from ming_trt.serving.stages.llm import LLMStage
from ming_trt.serving.stages.presence import Presence


class Echo:
    def __init__(self, board):
        self.board = board

    def close(self):
        pass

    def submit(self, request):
        text = bytes(request.input_ids.astype("uint8")).decode()
        if text == "too long":
            raise InputError("the prompt has 9 tokens and the limit is 8: shorten it")
        handle = Handle(request.request_id)
        threading.Thread(target=self.run, args=(handle, request, text), daemon=True).start()
        return handle

    def run(self, handle, request, text):
        answer = (text + f" rows={len(request.features)}").encode()
        limit = min(request.sampling.max_tokens, len(answer)) if "for ever" not in text else 10**9
        for i in range(limit):
            time.sleep(0.005)
            if self.board.is_cancelled(handle.request_id):
                return handle.put(ErrorEvent(CancelledError(f"request '{handle.request_id}' has ended")))
            if text == "fail midway" and i == 3:
                return handle.put(ErrorEvent(EngineError("the llm gave logits that are not finite")))
            if text == "bug midway" and i == 3:
                return handle.put(TokenEvent(("no number",), i))
            if text == "die in llm" and i == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            token = answer[i % len(answer)]
            handle.put(TokenEvent((token,), i, tuple(answer[max(0, i - 3) : i])))
        reason = "length" if limit < len(answer) else "stop"
        handle.put(
            FinishEvent(reason, Usage(len(request.input_ids), limit), Timings(0.0, 0.0, 0.0, 0.0), tuple(answer[-3:]))
        )


class TritonPythonModel(LLMStage):
    def load(self):
        folder = board_folder(self.repository)
        self.board, self.presence = CancelBoard(folder), Presence(folder)
        self.llm = Echo(self.board)
