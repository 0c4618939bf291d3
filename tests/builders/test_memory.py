"""The plan's figure of a serving process against a real one: the audio encoder at the official width, four layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders import audio_encoder
from builders.activations import activation_bytes
from builders.component import ExportOptions
from builders.export import signature_of
from builders.plan import plan
from builders.plan_serving import PROCESS, working_bytes
from ming_trt import presets
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.models import audio
from ming_trt.models.weights import tensor_shapes
from ming_trt.resources import shipped

FRAMES = 3000
CHILD = """
import sys
from pathlib import Path
import numpy as np
from ming_trt.runtime.engine import open_engine
engine = open_engine(Path(sys.argv[1]), "audio_encoder", threads=1)
mel = np.random.default_rng(0).standard_normal((int(sys.argv[2]), 128)).astype(np.float32)
for _ in range(2):
    engine.run({"mel": mel})
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_resident_memory_within_ten_percent(tmp_path: Path) -> None:
    values = json.loads((shipped("engines") / "official" / "config.json").read_text("utf-8"))
    values["audio_config"]["whisper_encoder_config"] |= {"n_layer": 4, "n_ctx": FRAMES}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    shapes = tensor_shapes(audio.weight_map(config.audio, config.llm))
    # equal tensors would be kept once
    random = torch.Generator().manual_seed(0)
    tensors = {k: (0.02 * torch.randn(s, generator=random)).bfloat16() for k, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    preset, options = presets.load("cpu-fp32"), ExportOptions()
    component = audio_encoder.COMPONENT
    component.export(config, Checkpoint(tmp_path), tmp_path / "engine", options)

    weights = next(e for e in plan(tmp_path, preset, ("audio_encoder",)).engines if not e.reason).weight_bytes
    signature = signature_of(lambda: component.graph(config, options))
    needed = activation_bytes(signature, {"frames": FRAMES}, scores=True)
    expected = PROCESS + weights + working_bytes(needed, preset.target)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "engine" / "model.onnx"), str(FRAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert expected == pytest.approx(1024 * int(done.stdout), rel=0.1)
