"""Triton model `image`; see ming_trt/serving/stages/image.py."""

from ming_trt.serving.stages.image import ImageStage as TritonPythonModel
