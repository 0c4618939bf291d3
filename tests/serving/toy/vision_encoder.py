"""A row of ones per four patches."""

import numpy as np

from ming_trt.serving.stages.base import Stage, read


class TritonPythonModel(Stage):
    def answer(self, request):
        return {"vision_rows": np.ones((len(read(request, "pixel_values")) // 4, 8), np.float32)}
