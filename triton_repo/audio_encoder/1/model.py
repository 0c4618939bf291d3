"""Triton model `audio_encoder`; see ming_trt/serving/stages/audio_encoder.py."""

from ming_trt.serving.stages.audio_encoder import AudioEncoderStage as TritonPythonModel
