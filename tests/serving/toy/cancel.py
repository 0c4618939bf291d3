"""The real stage."""

from ming_trt.serving.stages.cancel import CancelStage


class TritonPythonModel(CancelStage):
    pass
