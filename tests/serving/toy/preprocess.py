"""Real request checks; the text's bytes are its tokens; every picture is four patches, every clip eight frames."""

import os
import signal

import numpy as np

from ming_trt.processing.request import check_media, parse_request
from ming_trt.serving.stages.base import Stage, read_bytes, text_array


class TritonPythonModel(Stage):
    def answer(self, request):
        parsed = parse_request(read_bytes(request, "request")[0])
        media = [read_bytes(request, name) for name in ("images", "videos", "audios")]
        check_media(parsed, *map(len, media))
        text = parsed.messages[-1].text
        if text == "die in preprocess":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "bug in preprocess":
            raise ZeroDivisionError("a bug")
        ids = np.frombuffer(text.encode() or b" ", np.uint8).astype(np.int32)
        pictures, clips = len(media[0]) + len(media[1]), len(media[2])
        if parsed.lease:
            self.board.renew(parsed.id, parsed.lease)
        return {
            "request_id": text_array(parsed.id),
            "options": text_array(parsed.to_json()),
            "input_ids": ids,
            "modality": np.zeros(len(ids), np.uint8),
            "positions": np.zeros((3, len(ids)), np.int32),
            "position_delta": np.zeros(1, np.int32),
            "feature_index": np.full(len(ids), -1, np.int32),
            "pixel_values": np.ones((4 * pictures, 1176), np.float32),
            "image_grid": np.ones((pictures, 3), np.int32),
            "mel": np.ones((8 * clips, 128), np.float32),
            "mel_lengths": np.full(clips, 8, np.int32),
        }

    def load(self):
        from ming_trt.runtime.cancel import CancelBoard
        from ming_trt.serving.stages.base import board_folder

        self.board = CancelBoard(board_folder(self.repository))
