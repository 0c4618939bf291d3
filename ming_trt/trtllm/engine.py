"""From an exported checkpoint to engines, one a rank, with TensorRT-LLM's own builder; needs 1.2.1 and the GPU.

    python -m ming_trt.trtllm.engine CHECKPOINT OUTPUT --preset h200-fp8

`CHECKPOINT` is the folder of component `llm-checkpoint`. Everything is checked before the GPU is used: the release, the
signatures, and that the network asks for just these weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ming_trt import presets
from ming_trt.errors import BuildError, MingError
from ming_trt.presets import Preset
from ming_trt.trtllm import signatures
from ming_trt.trtllm.contract import check_checkpoint
from ming_trt.trtllm.model import register


def build_settings(config: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's `BuildConfig` but for the plugins. Pure: no library is needed.

    The prompt table holds the rows of all slots at once, and twice as many places, since parity is the modality.
    """
    length = config["max_position_embeddings"]
    profile = preset.profile
    return {
        "max_input_len": length - 1,
        "max_seq_len": length,
        "max_batch_size": profile.slots,
        "max_num_tokens": max(profile.prefill_chunk, profile.slots),
        "max_prompt_embedding_table_size": 2 * profile.slots * min(profile.max_image_tokens, length),
        "strongly_typed": True,
        "use_mrope": True,
    }


def plugin_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `PluginConfig`: FP8 products run in TensorRT's own kernels, so there is no plugin for them."""
    dtype = config["dtype"]
    return {
        "gpt_attention_plugin": dtype,
        "moe_plugin": dtype,
        "gemm_plugin": None if config["quantization"]["quant_algo"] == "FP8" else dtype,
        "remove_input_padding": True,
        "paged_kv_cache": True,
        "use_paged_context_fmha": True,
    }


def build_engines(checkpoint: Path, output: Path, preset: Preset) -> list[Path]:
    """Writes `rankN.engine` and `config.json` to `output`. Raises `MingError`, before any work if it cannot be done."""
    differences = signatures.check()
    if differences:
        raise BuildError(f"TensorRT-LLM is not as relied on: {differences[0]}; reinstall release {signatures.VERSION}")
    problems = check_checkpoint(checkpoint)
    if problems:
        raise BuildError(f"the checkpoint in '{checkpoint}' does not fit the network: {problems[0]}; export it again")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    api = signatures.load()
    definition = register(api)
    made = []
    for rank in range(config["mapping"]["world_size"]):
        loaded = definition.config.from_json_file(str(checkpoint / "config.json"))
        model = definition.model.from_checkpoint(str(checkpoint), rank=rank, config=loaded)
        plugins = api.PluginConfig(**plugin_settings(config))
        engine = api.build(model, api.BuildConfig(plugin_config=plugins, **build_settings(config, preset)))
        engine.save(str(output))
        made.append(output / f"rank{rank}.engine")
    return made


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the exported checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder for the engines.")],
    preset: Annotated[str, typer.Option(help="Name of a preset, or a .toml file.")] = "h200-fp8",
) -> None:
    """Builds the language model's engines."""
    try:
        for path in build_engines(checkpoint, output, presets.load(preset)):
            typer.echo(str(path))
    except MingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
