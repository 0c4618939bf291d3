"""A checkpoint as wide as the published one, but for a few layers: every component, every file, random weights.

For what depends on real widths and must be measured: memory, sizes. A quarter of the experts and an eighth of the
vocabularies are kept, so that it fits a small machine; what comes out of it means nothing.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from builders.skeleton import HEADERS, write_skeleton
from ming_trt.checkpoint import Checkpoint
from ming_trt.resources import shipped

LAYERS, ENCODER_LAYERS, EXPERTS = 2, 4, 16
VOCABULARY, TALKER_TEXT, TALKER_VOCABULARY = 16384, 8192, 16384
# Tensors of layers from this on are left out: pattern of a name (folder first) -> layers that stay.
_DEPTHS = {
    r"/model\.model\.layers\.(\d+)\.": LAYERS,
    r"/vision\.blocks\.(\d+)\.": ENCODER_LAYERS,
    r"/audio\.blocks\.(\d+)\.": ENCODER_LAYERS,
    r"/talker\.model\.model\.layers\.(\d+)\.": LAYERS,
    r"connector/model\.layers\.(\d+)\.": LAYERS,
    r"transformer/transformer_blocks\.(\d+)\.": LAYERS + 1,
    r"\.experts\.(\d+)\.": EXPERTS,
}
# Rows that stay: of vocabularies, of the routers, of the denoiser's tables.
_ROWS = {
    r"/model\.(lm_head|model\.word_embeddings)\.weight": VOCABULARY,
    r"/talker\.model\.(lm_head|model\.embed_tokens)\.weight": TALKER_VOCABULARY,
    r"\.mlp\.(audio_|image_)?gate\.weight": EXPERTS,
    r"connector/model\.embed_tokens": 1024,
}
_TABLE_SIDE, _LAST_BLOCK = 128, 23


def write(folder: Path) -> Path:
    """Writes the checkpoint (1.6 GB) into `folder` unless it is there. Returns `folder`."""
    mark = folder / "written"
    if mark.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    source, plain = shipped("engines") / "official", folder / "plain"
    plain.mkdir(parents=True)
    for path in source.rglob("*"):
        if path.is_file() and path.name != "README.md":
            (plain / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, plain / path.relative_to(source))
    files: dict[str, dict[str, Any]] = json.loads(gzip.decompress((source / HEADERS).read_bytes()))
    cut = {file: _cut(file, tensors) for file, tensors in files.items()}
    (plain / HEADERS).write_bytes(gzip.compress(json.dumps(cut).encode()))
    for name, change in _CONFIGS.items():
        values = json.loads((plain / name).read_text("utf-8"))
        change(values)
        (plain / name).write_text(json.dumps(values), "utf-8")
    write_skeleton(plain, folder)
    shutil.rmtree(plain)
    for file in cut:
        _fill(folder, file)
    mark.touch()
    return folder


def _cut(file: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The header of `file` without what is left out."""
    folder = file.rpartition("/")[0]
    kept = {}
    for name, (dtype, shape) in tensors.items():
        # the denoiser's last block is of its own kind: it takes the place of the first that is left out
        if f"transformer_blocks.{LAYERS}." in name:
            continue
        name = name.replace(f"transformer_blocks.{_LAST_BLOCK}.", f"transformer_blocks.{LAYERS}.")
        path, shape = f"{folder}/{name}", list(shape)
        if any((found := re.search(pattern, path)) and int(found[1]) >= stay for pattern, stay in _DEPTHS.items()):
            continue
        for pattern, rows in _ROWS.items():
            if re.search(pattern, path):
                shape[0] = rows
        if name.endswith("pos_embed.pos_embed"):
            shape[1] = _TABLE_SIDE**2
        kept[name] = (dtype, shape)
    return kept


def _fill(folder: Path, file: str) -> None:
    """Random values in the places of the tensors of `file`: N(0, 1 / fan-in), norms near one."""
    part, _, name = file.rpartition("/")
    root = Checkpoint(folder, file if name.endswith(".pt") else part)
    rng = np.random.default_rng([*file.encode()])
    with (folder / file).open("r+b") as stream:
        for tensor in root.names():
            info = root.info(tensor)
            if info.file != folder / file:
                continue
            scale = math.prod(info.shape[1:]) ** -0.5 if len(info.shape) > 1 else 0.1
            values = scale * rng.standard_normal(info.shape, dtype=np.float32)
            if len(info.shape) == 1 and tensor.endswith("weight"):
                values += 1
            if tensor.endswith("original0"):
                values = np.abs(values) + 0.5
            stream.seek(info.offset)
            stream.write((values.view(np.uint32) >> 16).astype("<u2").tobytes() if info.dtype == "BF16" else values)


def _main(values: dict[str, Any]) -> None:
    llm, talker = values["llm_config"], values["talker_config"]
    llm |= {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "vocab_size": VOCABULARY}
    llm |= {"eos_token_id": 1, "pad_token_id": 1, "image_patch_token": 2, "image_start_token": 3}
    llm |= {"video_start_token": 4}
    values["vision_config"] |= {"depth": ENCODER_LAYERS, "fullatt_block_indexes": [ENCODER_LAYERS - 1]}
    values["audio_config"]["whisper_encoder_config"]["n_layer"] = ENCODER_LAYERS
    talker |= {"vocab_size": TALKER_VOCABULARY, "text_vocab_size": TALKER_TEXT}
    talker |= {"audio_vocab_size": TALKER_VOCABULARY - TALKER_TEXT}


_CONFIGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "config.json": _main,
    "connector/config.json": lambda v: v.update(num_hidden_layers=LAYERS, vocab_size=1024),
    "transformer/config.json": lambda v: v.update(
        num_layers=LAYERS + 1, dual_attention_layers=[0, 1], pos_embed_max_size=_TABLE_SIDE
    ),
    "talker/config.json": lambda v: v.update(num_hidden_layers=LAYERS, vocab_size=TALKER_TEXT),
}
