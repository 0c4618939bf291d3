"""How fast `llm-checkpoint` is written, against reading and writing the same bytes with nothing in between.

    python benchmarks/trtllm_export.py [--rounds N] [--layers 2]

Makes a checkpoint of the official widths (2048, 64 experts of 1408) with few layers and a small vocabulary, 1.1 GiB a
layer, in a temporary folder. Copy and export take turns, each in a process of its own; before each the source is
dropped from the page cache, everything older is on the disk, and freed memory has come to rest. The copy writes as
many bytes as the export does and syncs once, at its end; the export syncs for its journal, too. Rates are MB/s of
source (10^6 bytes). FP8 scales of inputs are set to 1: calibration is not part of the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Measurement, Row, against, arguments, finish

TARGET = 0.7
PRECISIONS = ("fp8", "bf16")
_BLOCK = 8 << 20
# A virtual machine gives memory that was freed back to its host two seconds later, which stalls whoever runs then.
_SETTLE_S = 6.0
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


def copy(source: Path, out: Path, precision: str) -> dict[str, float]:
    """Seconds to read all of the source and to write its bytes (of FP8: half of them), synced."""
    out.mkdir()
    started = time.monotonic()
    buffer = memoryview(bytearray(_BLOCK))
    with (source / _NAME).open("rb", buffering=0) as reading, (out / "copy").open("wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            writing.write(buffer[: count // 2 if precision == "fp8" else count])
        os.fdatasync(writing.fileno())
    return {"seconds": time.monotonic() - started}


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


def phase(kind: str, precision: str, source: Path, out: Path) -> dict[str, float]:
    """One copy or export in a process of its own; what it wrote is removed."""
    forget(source / _NAME)
    os.sync()
    time.sleep(_SETTLE_S)
    command = [sys.executable, __file__, kind, precision, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(precision: str, source: Path, work: Path, rounds: int) -> Row:
    """Copy and export in turns; which of them is first changes from round to round."""
    took: dict[str, list[float]] = {"copy": [], "export": []}
    moved: dict[str, float] = {}
    peak = 0.0
    for number in range(rounds):
        for kind in ("copy", "export") if number % 2 else ("export", "copy"):
            result = phase(kind, precision, source, work / "out")
            took[kind].append(result["seconds"])
            if kind == "export":
                moved, peak = result, max(peak, result["peak"])
    ours, peer = (Measurement(kind, tuple(took[kind])) for kind in ("export", "copy"))
    rates = {f"{m.name}_mb_per_s": round(moved["read"] / 1e6 / m.median) for m in (ours, peer)}
    sizes = {"source_bytes": moved["read"], "written_bytes": moved["written"], "peak_bytes": peak}
    seconds = {f"{kind}_s": [round(value, 3) for value in values] for kind, values in took.items()}
    return against(ours, [peer], f"export in {precision}", TARGET, **rates, **sizes, **seconds)


def main() -> None:
    """See the module's docstring."""
    options = arguments(
        str(__doc__),
        rounds={"type": int, "default": 5, "help": "how often each is done"},
        layers={"type": int, "default": 2, "help": "of the checkpoint, 1.1 GiB each"},
        folder={"type": Path, "help": "where to work; a temporary folder if not given"},
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        make(work / "source", 1 if options.tiny else options.layers)
        rounds = 1 if options.tiny else options.rounds
        rows = [compare(precision, work / "source", work, rounds) for precision in PRECISIONS]
    finish("trtllm_export", rows, options, None, "medians; ratio: time of the copy / time of the export")


if __name__ == "__main__":
    if sys.argv[1:2] in (["copy"], ["export"]):
        run = copy if sys.argv[1] == "copy" else export
        print(json.dumps(run(Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[2])))
    else:
        main()
