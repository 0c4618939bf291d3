"""Triton model `postprocess`; see ming_trt/serving/stages/postprocess.py."""

from ming_trt.serving.stages.postprocess import PostprocessStage as TritonPythonModel
