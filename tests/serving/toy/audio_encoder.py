"""A row of ones per four frames."""

import numpy as np

from ming_trt.serving.stages.base import Stage, read


class TritonPythonModel(Stage):
    def answer(self, request):
        return {"audio_rows": np.ones((len(read(request, "mel")) // 4, 8), np.float32)}
