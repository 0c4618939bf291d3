"""Triton model `speech`; see ming_trt/serving/stages/speech.py."""

from ming_trt.serving.stages.speech import SpeechStage as TritonPythonModel
