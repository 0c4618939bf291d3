"""Triton model `llm`; see ming_trt/serving/stages/llm.py."""

from ming_trt.serving.stages.llm import LLMStage as TritonPythonModel
