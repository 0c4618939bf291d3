"""How fast `llm-checkpoint` is written, against reading and writing the same bytes with nothing in between.

    python benchmarks/trtllm_export.py --layers 2 --precision fp8

Makes a checkpoint of the official widths (2048, 64 experts of 1408) with few layers and a small vocabulary, 1.1 GiB a
layer, in a temporary folder. Every phase runs in a process of its own with the source dropped from the page cache.
Prints one JSON object: MB/s of source (10^6 bytes) for the export and for the plain copy, their ratio, and the export's
peak resident memory. FP8 scales of inputs are set to 1: calibration is not part of the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_BLOCK = 8 << 20
_NAME = "model.safetensors"


def config(layers: int) -> dict[str, object]:
    """A config.json with the official widths; what the language model does not use is small."""
    llm = {
        "hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "num_shared_experts": 2, "vocab_size": 1024, "rms_norm_eps": 1e-5, "rope_theta": 600000.0,
        "max_position_embeddings": 32768, "norm_topk_prob": True, "multi_gate": True, "eos_token_id": 1,
        "rope_scaling": {"type": "3D"}, "image_patch_token": 900, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 80, "num_heads": 2, "intermediate_size": 96, "fullatt_block_indexes": [1],
        "out_hidden_size": 256,
    }  # fmt: skip
    whisper = {"n_mels": 128, "n_ctx": 160, "n_state": 128, "n_head": 2, "n_layer": 1}
    return {"llm_config": llm, "vision_config": vision, "audio_config": {"whisper_encoder_config": whisper}}


def make(folder: Path, layers: int) -> None:
    """Writes the checkpoint: one block of normal bf16 numbers of the usual size, again and again."""
    from ming_trt.config import load_config
    from ming_trt.models.llm import weight_map
    from ming_trt.models.weights import tensor_shapes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    header: dict[str, object] = {}
    end = 0
    for name, shape in sorted(tensor_shapes(weight_map(load_config(folder).llm)).items()):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(0).standard_normal(_BLOCK // 2, np.float32) * np.float32(0.02)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / _NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left:
            left -= file.write(block[: min(left, len(block))])
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drops a file's clean pages from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path, share: float) -> float:
    """Seconds to read all of the source and to write `share` of its bytes, synced."""
    started = time.monotonic()
    buffer = memoryview(bytearray(_BLOCK))
    with (source / _NAME).open("rb", buffering=0) as reading, out.open("wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            writing.write(buffer[: int(count * share)])
        os.fdatasync(writing.fileno())
    return time.monotonic() - started


def export(source: Path, out: Path, precision: str) -> dict[str, float]:
    """Seconds, bytes read and written, and peak resident memory of one export."""
    from builders.steps import peak_memory
    from builders.trtllm_layout import layout, parallel
    from builders.trtllm_write import Exporter
    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import load_config

    llm = load_config(source).llm
    made = layout(llm, parallel(llm, 1, 1))
    exporter = Exporter(Checkpoint(source), made, precision, {module.name: 448.0 for module in made.modules})
    started = time.monotonic()
    moved = exporter.run(out, "benchmark")
    seconds = time.monotonic() - started
    return {"seconds": seconds, "read": moved.read, "written": moved.written, "peak": peak_memory()}


def _phase(arguments: list[str]) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where to work; a temporary folder if not given.")
    parser.add_argument("--phase", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        kind, source, out = options.phase[0], Path(options.phase[1]), Path(options.phase[2])
        forget(source / _NAME)
        if kind == "copy":
            share = 0.5 if options.precision == "fp8" else 1.0
            print(json.dumps({"seconds": copy(source, out, share)}))
        else:
            print(json.dumps(export(source, out, options.precision)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source = Path(work) / "source"
        make(source, options.layers)
        best: dict[str, float] = {}
        for i in range(options.rounds):
            arguments = ["--precision", options.precision, "--phase"]
            plain = _phase([*arguments, "copy", str(source), str(Path(work) / f"copy{i}")])
            (Path(work) / f"copy{i}").unlink()
            written = _phase([*arguments, "export", str(source), str(Path(work) / f"out{i}")])
            rates = {
                "copy": written["read"] / 1e6 / plain["seconds"],
                "export": written["read"] / 1e6 / written["seconds"],
            }
            best = {
                "copy_mb_per_s": round(max(rates["copy"], best.get("copy_mb_per_s", 0)), 1),
                "export_mb_per_s": round(max(rates["export"], best.get("export_mb_per_s", 0)), 1),
                "peak_bytes": max(written["peak"], best.get("peak_bytes", 0)),
                "source_bytes": written["read"],
                "written_bytes": written["written"],
            }
    best["ratio"] = round(best["export_mb_per_s"] / best["copy_mb_per_s"], 3)
    print(json.dumps({"layers": options.layers, "precision": options.precision, **best}))


if __name__ == "__main__":
    main()
