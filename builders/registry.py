"""The engines, in the order in which they are built, and the checkpoint files that serving needs besides them.

A new engine is one module and one line here. Modules are named, not imported: importing them loads torch.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import cast

from builders.component import Component
from ming_trt.errors import BuildError

# engine name -> the module whose `COMPONENT` (or what stands after a colon) builds it
COMPONENTS: dict[str, str] = {
    "vision_encoder": "builders.vision",
    "audio_encoder": "builders.audio_encoder",
    "llm": "builders.llm",
    "connector": "builders.connector",
    "condition": "builders.connector:CONDITION",
    "dit": "builders.dit",
    "vae_encoder": "builders.vae:ENCODER",
    "vae_decoder": "builders.vae:DECODER",
    "talker": "builders.talker",
    "flow_encoder": "builders.audio_decoder:ENCODER",
    "flow_estimator": "builders.audio_decoder:ESTIMATOR",
    "f0_predictor": "builders.audio_decoder:PITCH",
    "vocoder": "builders.audio_decoder:VOCODER",
}

# Copied into `assets/` where the checkpoint has them; patterns are relative to its folder.
ASSETS: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "transformer/config.json",
    "vae/config.json",
    "talker/config.json",
    "talker/*.yaml",
    "talker/s3_bpe/*",
    "talker/tokenizer*.json",
    "talker/added_tokens.json",
    "talker/special_tokens_map.json",
    "talker/vocab.json",
    "talker/merges.txt",
    "talker/*.onnx",
    "talker/spks/*.pt",
)


def module_of(name: str) -> str:
    """The module that builds engine `name`."""
    return COMPONENTS[name].partition(":")[0]


def component(name: str) -> Component:
    """The builder of engine `name`. Imports torch."""
    attribute = COMPONENTS[name].partition(":")[2] or "COMPONENT"
    return cast(Component, getattr(import_module(module_of(name)), attribute))


def check_names(names: tuple[str, ...]) -> None:
    """Raises `BuildError` naming the engines if one of `names` is not an engine."""
    for name in names:
        if name not in COMPONENTS:
            near = get_close_matches(name, COMPONENTS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(COMPONENTS)}"
            raise BuildError(f"there is no component '{name}': {hint}")
