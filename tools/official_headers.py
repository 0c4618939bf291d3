"""Writes `engines/official/headers.json.gz`: names, types and shapes of the official checkpoint's tensors, no weights.

The weight maps of the definitions say which tensors there are; what no engine reads (the connector's embeddings) is
added by hand. Shards are filled in the order of names up to 5 GB, as the published ones were, which only decides their
number. Run it after a change of a weight map or of `engines/official`: `python tools/official_headers.py`.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from ming_trt.config import load_config
from ming_trt.image_config import condition_config, connector_config, dit_config, vae_config
from ming_trt.models import audio, condition, connector, dit, llm, talker, vae, vision
from ming_trt.models.detokenizer_weights import encoder_weights, estimator_weights, f0_weights, vocoder_weights
from ming_trt.models.weights import WeightSource, tensor_shapes
from ming_trt.resources import shipped
from ming_trt.speech_config import FlowConfig, HiftConfig, load_talker_config

SHARD_BYTES = 5_000_000_000
ITEM = {"BF16": 2, "F32": 4}
# folder -> (type in the file, stem of its shards)
PARTS = {
    "": ("BF16", "model"),
    "mlp": ("BF16", "model"),
    "connector": ("F32", "model"),
    "transformer": ("F32", "diffusion_pytorch_model"),
    "vae": ("F32", "diffusion_pytorch_model"),
}
FLOW = FlowConfig(
    vocabulary=4096, width=512, heads=8, feed_forward=2048, encoder_layers=6, up_layers=4, look_ahead=3, mel=80,
    speaker_dim=192, channels=256, time_dim=1024, mid_stages=12, transformers=4, estimator_heads=8,
    estimator_head_dim=64, estimator_feed_forward=1024, chunk=50, guidance=0.7,
)  # fmt: skip
HIFT = HiftConfig(
    mel=80, base=512, harmonics=8, sample_rate=24000, f0_width=512, up_rates=(8, 5, 3), up_kernels=(16, 11, 7),
    resblock_kernels=(3, 7, 11), source_kernels=(7, 7, 11), dilations=(1, 3, 5), n_fft=16, istft_hop=4, slope=0.1,
    limit=0.99, prefix="generator.", weight_norm="parametrizations.weight.original1",
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def shapes(folder: Path) -> Shapes:
    """Every tensor as `folder/name` -> shape."""
    config = load_config(folder)
    maps: list[Mapping[str, WeightSource]] = [
        llm.weight_map(config.llm),
        vision.weight_map(config.vision, config.llm),
        audio.weight_map(config.audio, config.llm),
        connector.weight_map(connector_config(config)),
        {"query_tokens": connector.query_tokens(config.llm.hidden_size)},
        condition.weight_map(condition_config(config, config.llm.hidden_size)),
        vae.weight_map(vae.VAEEncoder, vae_config(config)),
        vae.weight_map(vae.VAEDecoder, vae_config(config)),
        talker.weight_map(load_talker_config(folder)),
        encoder_weights(FLOW),
        estimator_weights(FLOW),
        f0_weights(HIFT),
        vocoder_weights(HIFT),
    ]
    found: Shapes = {}
    for sources in maps:
        found |= tensor_shapes(sources)
    denoiser = dit_config(config, True)
    plain = {k: v for k, v in dit.weight_map(denoiser).items() if k not in dit.TABLES}
    table = (1, denoiser.table_full_side**2, denoiser.hidden)
    found |= tensor_shapes(plain) | {f"transformer/{name}": table for name in dit.TABLES}
    body = json.loads((folder / "connector" / "config.json").read_text("utf-8"))
    found["connector/model.embed_tokens.weight"] = (body["vocab_size"], body["hidden_size"])
    return found


def files(found: Shapes) -> dict[str, dict[str, list[object]]]:
    """File -> tensor -> [type, shape]."""
    made: dict[str, dict[str, list[object]]] = {}
    for part, (dtype, stem) in PARTS.items():
        own = {name.rpartition("/")[2]: shape for name, shape in found.items() if name.rpartition("/")[0] == part}
        shards: list[dict[str, list[object]]] = [{}]
        filled = 0
        for name in sorted(own):
            size = ITEM[dtype] * math.prod(own[name])
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append({})
                filled = 0
            shards[-1][name] = [dtype, list(own[name])]
            filled += size
        for number, shard in enumerate(shards, 1):
            file = f"{stem}-{number:05}-of-{len(shards):05}" if len(shards) > 1 else stem
            made[f"{part}/{file}.safetensors".lstrip("/")] = shard
    for name in sorted(found):
        place, _, tensor = name.rpartition("/")
        if place.endswith(".pt"):
            made.setdefault(place, {})[tensor] = ["F32", list(found[name])]
    return made


def main() -> int:
    folder = shipped("engines") / "official"
    text = json.dumps(files(shapes(folder)), separators=(",", ":"))
    # without a time stamp: equal contents give equal bytes
    (folder / "headers.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(text)} bytes, compressed {(folder / 'headers.json.gz').stat().st_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
