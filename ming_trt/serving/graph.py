"""The Triton graph as data: which models exist, which tensors they take and give, and when a bundle has them.

The tensor names, types and shapes are the contract of docs/DESIGN.md, section 4.2; every target keeps them.
`configs.py` turns this into Triton's configuration, `assemble.py` into a repository.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ming_trt.bundle import DRAWING_ENGINES, SPEAKING_ENGINES

ENSEMBLE = "ming"
# A dimension that `Stage.tensors` replaces by the hidden size of the bundle's language model.
HIDDEN = -2
DRAWING, SPEAKING = "dit", "talker"
# The engines without which a bundle cannot draw, or speak.
_ENGINES = {DRAWING: DRAWING_ENGINES, SPEAKING: SPEAKING_ENGINES}


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
# Only where the bundle can draw or speak: a PNG file; 16-bit samples; the file of a reference clip.
IMAGE = Tensor("image", "bytes", (1,))
AUDIO = Tensor("audio", "int16", (-1,))
VOICE = Tensor("voice", "bytes", (-1,), optional=True)

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
_REFERENCE = Tensor("reference", "uint8", (-1, -1, 3))
_IMAGE_REFERENCE = Tensor("image_reference", "uint8", (-1, -1, 3))
_IMAGE_HIDDEN = Tensor("image_hidden", "float32", (-1, HIDDEN))
_VOICE_CLIP = Tensor("voice_clip", "float32", (-1,))
_SPEECH_CLIP = Tensor("speech_clip", "float32", (-1,))
_THINKER_ROWS = Tensor("thinker_rows", "float32", (-1, HIDDEN))

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
    # No steps of the graph: `postprocess` calls them, and only for requests that ask for a picture or for speech.
    Stage(
        "image",
        inputs=(REQUEST, _IMAGE_HIDDEN, _IMAGE_REFERENCE),
        outputs=(IMAGE, STATE),
        component=DRAWING,
        decoupled=True,
        in_graph=False,
    ),
    Stage(
        "speech",
        inputs=(REQUEST, _THINKER_ROWS, _SPEECH_CLIP),
        outputs=(AUDIO, STATE),
        component=SPEAKING,
        decoupled=True,
        in_graph=False,
    ),
)

# What drawing and speaking add to the steps of the graph: component -> step -> (inputs, outputs). All that
# `postprocess` hands on comes through `llm`, as a step must not take tensors from both sides of a decoupled one.
_ADDED: Mapping[str, Mapping[str, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]] = {
    DRAWING: {
        "preprocess": ((), (_REFERENCE,)),
        "llm": ((_REFERENCE,), (_IMAGE_HIDDEN, _IMAGE_REFERENCE)),
        "postprocess": ((_IMAGE_HIDDEN, _IMAGE_REFERENCE), (IMAGE,)),
    },
    SPEAKING: {
        "preprocess": ((VOICE,), (_VOICE_CLIP,)),
        "llm": ((_VOICE_CLIP,), (_THINKER_ROWS, _SPEECH_CLIP)),
        "postprocess": ((_THINKER_ROWS, _SPEECH_CLIP), (AUDIO,)),
    },
}

# What a bundle must hold so that the ensemble can be made at all.
REQUIRED_COMPONENTS = ("vision_encoder", "audio_encoder", "llm")


def can(components: Collection[str], what: str) -> bool:
    """Whether a bundle with those components can do `what`: `DRAWING` or `SPEAKING`."""
    return not absent(components, what)


def absent(components: Collection[str], what: str) -> list[str]:
    """The engines that `what` needs and the bundle lacks."""
    return [name for name in _ENGINES[what] if name not in components]


def left_out(components: Collection[str]) -> list[str]:
    """A sentence for each stage that is left out although the bundle has some of its engines."""
    found = ((stage, absent(components, stage.component)) for stage in STAGES if stage.component in _ENGINES)
    return [
        f"the bundle has no {', '.join(missing)}: the stage '{stage.name}' is left out; build them too to have it"
        for stage, missing in found
        if missing and stage.component in components
    ]


def stages_for(components: Collection[str]) -> tuple[Stage, ...]:
    """The stages that a bundle with those components gets, in the order of the graph."""
    return tuple(_extended(stage, components) for stage in STAGES if _has(stage.component, components))


def _has(component: str, components: Collection[str]) -> bool:
    return can(components, component) if component in _ENGINES else not component or component in components


def empty_tensors(model: str, components: Collection[str], hidden: int) -> dict[str, Tensor]:
    """The outputs that drawing and speaking add to `model` for a bundle with those components; `hidden` filled in."""
    able = [name for name in _ADDED if can(components, name)]
    found = [tensor for name in able for tensor in _ADDED[name].get(model, ((), ()))[1]]
    return {t.name: replace(t, shape=tuple(hidden if size == HIDDEN else size for size in t.shape)) for t in found}


def _extended(stage: Stage, components: Collection[str]) -> Stage:
    """The stage with what the components add to it. A `postprocess` that answers more than once is decoupled."""
    added = [steps[stage.name] for name, steps in _ADDED.items() if can(components, name) and stage.name in steps]
    return replace(
        stage,
        inputs=(*stage.inputs, *(tensor for inputs, _ in added for tensor in inputs)),
        outputs=(*stage.outputs, *(tensor for _, outputs in added for tensor in outputs)),
        decoupled=stage.decoupled or (stage.name == "postprocess" and bool(added)),
    )
