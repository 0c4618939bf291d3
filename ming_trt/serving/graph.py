"""The Triton graph as data: which models exist, which tensors they take and give, and when a bundle has them.

The tensor names, types and shapes are the contract of docs/DESIGN.md, section 4.2; every target keeps them.
`configs.py` turns this into Triton's configuration, `assemble.py` into a repository.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

ENSEMBLE = "ming"
# A dimension that `Stage.tensors` replaces by the hidden size of the bundle's language model.
HIDDEN = -2


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output: `dtype` as NumPy names it, or `bytes`; -1 = any size; `HIDDEN` = the LLM's width."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One Triton model.

    `component`: the bundle's folder whose engine it runs ("" = none; then every bundle has the stage).
    `in_graph`: whether it is a step of the ensemble. `instances`: processes; more than one only where order is free.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    component: str = ""
    decoupled: bool = False
    in_graph: bool = True
    instances: int = 1


REQUEST = Tensor("request", "bytes", (1,))
MEDIA = tuple(Tensor(name, "bytes", (-1,), optional=True) for name in ("images", "videos", "audios"))
TEXT = Tensor("text", "bytes", (1,))
STATE = Tensor("state", "bytes", (1,))

_REQUEST_ID = Tensor("request_id", "bytes", (1,))
_OPTIONS = Tensor("options", "bytes", (1,))
_PROMPT = (
    Tensor("input_ids", "int32", (-1,)),
    Tensor("modality", "uint8", (-1,)),
    Tensor("positions", "int32", (3, -1)),
    Tensor("position_delta", "int32", (1,)),
    Tensor("feature_index", "int32", (-1,)),
)
_PATCHES = (Tensor("pixel_values", "float32", (-1, 1176)), Tensor("image_grid", "int32", (-1, 3)))
_MEL = (Tensor("mel", "float32", (-1, 128)), Tensor("mel_lengths", "int32", (-1,)))
_VISION_ROWS = Tensor("vision_rows", "float32", (-1, HIDDEN))
_AUDIO_ROWS = Tensor("audio_rows", "float32", (-1, HIDDEN))
_TOKENS = (
    Tensor("token_ids", "int32", (-1,)),
    Tensor("context_ids", "int32", (-1,)),
    Tensor("llm_state", "bytes", (1,)),
)

STAGES: tuple[Stage, ...] = (
    Stage(
        "preprocess",
        inputs=(REQUEST, *MEDIA),
        outputs=(_REQUEST_ID, _OPTIONS, *_PROMPT, *_PATCHES, *_MEL),
        instances=2,
    ),
    Stage("vision_encoder", inputs=_PATCHES, outputs=(_VISION_ROWS,), component="vision_encoder"),
    Stage("audio_encoder", inputs=_MEL, outputs=(_AUDIO_ROWS,), component="audio_encoder"),
    Stage(
        "llm",
        inputs=(_REQUEST_ID, _OPTIONS, *_PROMPT, _VISION_ROWS, _AUDIO_ROWS),
        outputs=_TOKENS,
        component="llm",
        decoupled=True,
    ),
    # One instance: two would let the answers of one stream overtake each other.
    Stage("postprocess", inputs=_TOKENS, outputs=(TEXT, STATE)),
    Stage("cancel", inputs=(REQUEST,), outputs=(STATE,), in_graph=False),
)

# What a bundle must hold so that the ensemble can be made at all.
REQUIRED_COMPONENTS = ("vision_encoder", "audio_encoder", "llm")


def stages_for(components: Collection[str]) -> tuple[Stage, ...]:
    """The stages that a bundle with those components gets, in the order of the graph."""
    return tuple(stage for stage in STAGES if not stage.component or stage.component in components)
