"""Bundles for the serving benchmarks, made unless they are there, and a server on one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import CACHE

from builders.build import Options, build
from builders.code import code_version
from ming_trt import mini, presets
from ming_trt.mini import understanding
from ming_trt.serving.assemble import assemble
from ming_trt.serving.launch import Ports, Server

_ENGINES = ("vision_encoder", "audio_encoder", "llm")
# The language model of the published checkpoint but for its layers and the number of its experts, of which a token
# reads as many: what a token costs is what four layers cost.
_WIDE = {
    "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 16,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "intermediate_size": 5632,
}  # fmt: skip


def mini_bundle() -> Path:
    """The understanding engines of the mini checkpoint, float32."""
    folder = CACHE / "mini"
    mini.write_mini(folder / "checkpoint")
    return _built(folder, "mini-cpu")


def wide_bundle() -> Path:
    """The same with a language model of four layers at true width, int8: a token costs what four real layers cost."""
    folder = CACHE / "wide"
    state = json.dumps([code_version(understanding.__name__), _WIDE])
    mark = folder / "state"
    if not (mark.is_file() and mark.read_text("utf-8") == state):
        shutil.rmtree(folder, ignore_errors=True)
        small = understanding._config

        def wide(tokenizer: Any) -> dict[str, Any]:
            config = small(tokenizer)
            config["llm_config"] |= _WIDE
            return config

        with patch.object(understanding, "_config", wide), patch.object(mini, "COMPONENTS", ("understanding",)):
            mini.write_mini(folder / "checkpoint")
        mark.write_text(state, "utf-8")
    return _built(folder, "cpu-int8")


def _built(folder: Path, preset: str, engines: Sequence[str] = _ENGINES) -> Path:
    """The bundle of `folder/checkpoint`; nothing is done if it is up to date."""
    if not build(Options(folder / "checkpoint", folder / "bundle", presets.load(preset), tuple(engines))).ok:
        raise SystemExit(f"the checkpoint in '{folder}' could not be built: its messages stand above")
    return folder / "bundle"


def server_on(bundle: Path) -> Server:
    """A server on free ports, not started yet."""
    repository = bundle.parent / f"{bundle.name}-repo"
    assemble(bundle, repository)
    return Server(repository, Ports.free(), progress=lambda line: print(line, file=sys.stderr))
