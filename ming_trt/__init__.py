"""Build and serve Ming-lite-omni v1.5.

Importing this package loads none of torch, onnxruntime and tensorrt (a test holds it to that).
"""

__version__ = "0.1.0"
