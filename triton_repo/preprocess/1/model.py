"""Triton model `preprocess`; see ming_trt/serving/stages/preprocess.py."""

from ming_trt.serving.stages.preprocess import PreprocessStage as TritonPythonModel
