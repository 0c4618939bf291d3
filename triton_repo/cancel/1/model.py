"""Triton model `cancel`; see ming_trt/serving/stages/cancel.py."""

from ming_trt.serving.stages.cancel import CancelStage as TritonPythonModel
