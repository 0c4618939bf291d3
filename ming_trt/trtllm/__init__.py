"""The production LLM engine on TensorRT-LLM 1.2.1: network definition, what requests carry, and what is relied on."""
