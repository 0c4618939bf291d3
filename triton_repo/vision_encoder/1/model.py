"""Triton model `vision_encoder`; see ming_trt/serving/stages/vision_encoder.py."""

from ming_trt.serving.stages.vision_encoder import VisionEncoderStage as TritonPythonModel
