"""Where calibration prompts come from: a folder of the user's, the shipped one, or numbers drawn from a seed.

A folder holds any of

    *.json   a request as clients send it (docs/DESIGN.md, 4.2) or a list of them, each with `images`, `videos` and
             `audios`: paths of its media, relative to the file. Needs the checkpoint's tokenizer; media run through
             the torch definitions of the towers.
    *.npz    a prepared prompt: `input_ids` [L], `modality` [L], `positions` [3, L], `feature_index` [L] and
             `features` [R, hidden size], as in docs/DESIGN.md, 4.2.

Without a folder the shipped requests (`examples/calibration`) are used, and for a checkpoint that has no tokenizer,
such as a small one for tests, `synthetic`: the ranges then describe those numbers and no real prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.calibration import MODALITIES, Sample
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig
from ming_trt.errors import BuildError, InputError
from ming_trt.models import audio, vision
from ming_trt.models.weights import load_weights
from ming_trt.processing.positions import position_ids
from ming_trt.processing.prepare import Prepared, Processor
from ming_trt.processing.request import Request, parse_request
from ming_trt.processing.tokenizer import Tokenizer
from ming_trt.processing.vision_index import vision_indices
from ming_trt.resources import shipped

SYNTHETIC, SHIPPED = "synthetic numbers, since the checkpoint has no tokenizer", "the shipped requests"
_MEDIA = ("images", "videos", "audios")
_ARRAYS = ("input_ids", "modality", "positions", "feature_index", "features")
_SEED = 20250715


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request of a file, and the media files it mentions by kind."""

    name: str
    request: Request
    media: Mapping[str, tuple[Path, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """Chosen data, checked but not loaded. `what` names it in the facts, `digest` stands for all its bytes."""

    what: str
    digest: str
    prompts: tuple[Prompt, ...] = ()
    arrays: tuple[Path, ...] = ()


def choose(folder: Path | None, checkpoint: Path) -> Source:
    """The data to calibrate with. Reads requests and digests media. Raises `BuildError` if it cannot be used."""
    if folder is None:
        if not (checkpoint / "tokenizer.json").is_file():
            return Source(SYNTHETIC, f"synthetic-{_SEED}")
        folder, what = shipped("examples") / "calibration", SHIPPED
    else:
        what = f"the folder '{folder.name}'"
    if not folder.is_dir():
        raise BuildError(f"fp8 needs calibration and there is no folder '{folder}': give --calibration FOLDER")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".npz"))
    prompts = tuple(prompt for path in files if path.suffix == ".json" for prompt in _requests(path))
    arrays = tuple(path for path in files if path.suffix == ".npz")
    if not prompts and not arrays:
        raise BuildError(
            f"fp8 needs calibration and '{folder}' holds no *.json request and no *.npz prompt: put samples there"
        )
    if prompts and not (checkpoint / "tokenizer.json").is_file():
        raise BuildError(
            f"the calibration requests in '{folder}' need a tokenizer and '{checkpoint}' has none: "
            "copy its tokenizer files there, or give prepared *.npz prompts"
        )
    if not arrays:
        _check_modalities(folder, prompts)
    read = [*files, *(path for prompt in prompts for paths in prompt.media.values() for path in paths)]
    digest = hashlib.sha256()
    for path in read:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return Source(what, digest.hexdigest(), prompts, arrays)


def load(source: Source, config: MingConfig, checkpoint: Checkpoint) -> list[Sample]:
    """The samples as they enter the first layer. The towers are in memory one after the other, in float32."""
    if not source.prompts and not source.arrays:
        return [_sample(f"synthetic {i}", config, checkpoint, **prompt) for i, prompt in enumerate(_synthetic(config))]
    samples = []
    if source.prompts:
        prepared = _prepared(source.prompts, config, checkpoint)
        sights, sounds = _vision_rows(prepared, config, checkpoint), _audio_rows(prepared, config, checkpoint)
        for prompt, p, seen, heard in zip(source.prompts, prepared, sights, sounds, strict=True):
            features = torch.cat((seen, heard)).numpy()
            arrays = {"input_ids": p.input_ids, "modality": p.modality, "positions": p.positions}
            index = {"feature_index": p.feature_index, "features": features}
            samples.append(_sample(prompt.name, config, checkpoint, **arrays, **index))
    for path in source.arrays:
        with np.load(path) as data:
            lacking = [name for name in _ARRAYS if name not in data]
            if lacking:
                raise BuildError(f"the calibration prompt '{path}' lacks {', '.join(lacking)}: add them")
            samples.append(_sample(path.name, config, checkpoint, **{name: data[name] for name in _ARRAYS}))
    return samples


def _sample(name: str, config: MingConfig, checkpoint: Checkpoint, **arrays: Any) -> Sample:
    """Rows of the embedding where there is no feature; reads those rows only."""
    ids, index = np.asarray(arrays["input_ids"], np.int64), np.asarray(arrays["feature_index"], np.int64)
    features = torch.from_numpy(np.array(arrays["features"], np.float32))
    hidden, length = config.llm.hidden_size, len(ids)
    shapes = [np.shape(arrays[key]) for key in ("modality", "positions", "feature_index")]
    if shapes != [(length,), (3, length), (length,)] or features.shape[1:] != (hidden,) or index.max() >= len(features):
        raise BuildError(f"the arrays of calibration prompt '{name}' do not belong together: prepare it again")
    if (ids < 0).any() or (ids >= config.llm.vocab_size).any():
        raise BuildError(f"calibration prompt '{name}' has ids outside of {config.llm.vocab_size}: use its tokenizer")
    embeds = torch.empty(length, hidden)
    table = "model.model.word_embeddings.weight"
    dtype = checkpoint.info(table).nbytes // (config.llm.vocab_size * hidden)
    for place, (number, row) in enumerate(zip(ids.tolist(), index.tolist(), strict=True)):
        if row >= 0:
            embeds[place] = features[row]
        else:
            size = hidden * dtype
            data = checkpoint.read_range(table, number * size, (number + 1) * size)
            embeds[place] = torch.frombuffer(data, dtype={4: torch.float32, 2: torch.bfloat16}[dtype]).float()
    modality = torch.from_numpy(np.asarray(arrays["modality"], np.int64))
    return Sample(name, embeds, modality, torch.from_numpy(np.array(arrays["positions"], np.int64)))


def _requests(path: Path) -> Iterator[Prompt]:
    try:
        data = json.loads(path.read_text("utf-8"))
        for i, entry in enumerate(data if isinstance(data, list) else [data]):
            media = {kind: tuple(path.parent / name for name in entry.pop(kind, ())) for kind in _MEDIA}
            yield Prompt(f"{path.name}[{i}]", parse_request(entry), media)
    except (ValueError, AttributeError, TypeError, InputError) as error:
        raise BuildError(f"the calibration request '{path}' cannot be used ({error}): correct it") from None
    missing = [str(p) for paths in media.values() for p in paths if not p.is_file()]
    if missing:
        raise BuildError(f"the calibration request '{path}' names '{missing[0]}', which is missing: add the file")


def _check_modalities(folder: Path, prompts: tuple[Prompt, ...]) -> None:
    """Every router needs tokens of its own; a missing kind is said before any weight is read."""
    found = {kind for prompt in prompts for kind, paths in prompt.media.items() if paths}
    if not found & {"images", "videos"} or "audios" not in found:
        lacking = "pictures" if not found & {"images", "videos"} else "sounds"
        raise BuildError(
            f"the calibration samples in '{folder}' have no {lacking}, whose experts would be guessed: add some"
        )


def _prepared(prompts: tuple[Prompt, ...], config: MingConfig, checkpoint: Checkpoint) -> list[Prepared]:
    processor = Processor(config, Tokenizer.from_checkpoint(checkpoint.root))
    made = []
    for prompt in prompts:
        images, audios = ([path.read_bytes() for path in prompt.media[kind]] for kind in ("images", "audios"))
        made.append(processor.prepare(prompt.request, images, prompt.media["videos"], audios))
    return made


@torch.inference_mode()
def _vision_rows(prepared: list[Prepared], config: MingConfig, checkpoint: Checkpoint) -> list[torch.Tensor]:
    with torch.device("meta"):
        tower = vision.VisionEncoder(config.vision, config.llm)
    load_weights(tower, checkpoint, vision.weight_map(config.vision, config.llm))
    rows = []
    for p in prepared:
        if not len(p.image_grid):
            rows.append(torch.zeros(0, config.llm.hidden_size))
            continue
        indices = vision_indices(p.image_grid, config.vision)
        inputs = {"patches": torch.from_numpy(np.array(p.pixel_values))}
        inputs |= {name: torch.from_numpy(np.array(value)) for name, value in indices.items()}
        rows.append(tower(*(inputs[name] for name in vision.INPUT_NAMES)))
    return rows


@torch.inference_mode()
def _audio_rows(prepared: list[Prepared], config: MingConfig, checkpoint: Checkpoint) -> list[torch.Tensor]:
    with torch.device("meta"):
        tower = audio.AudioEncoder(config.audio, config.llm)
    load_weights(tower, checkpoint, audio.weight_map(config.audio, config.llm))
    rows = []
    for p in prepared:
        clips = [torch.from_numpy(clip) for clip in np.split(p.mel, np.cumsum(p.mel_lengths)[:-1]) if len(clip)]
        rows.append(torch.cat([torch.zeros(0, config.llm.hidden_size), *(tower(clip) for clip in clips)]))
    return rows


def _synthetic(config: MingConfig) -> Iterator[dict[str, Any]]:
    """Eight prompts of text, a picture of 4 x 6 cells, a sound of 24 rows and text again, ids and unit rows drawn."""
    rng, tokens = np.random.default_rng(_SEED), config.tokens
    merge = config.vision.merge_size
    reserved = {getattr(tokens, name) for name in tokens.__dataclass_fields__}
    words = np.array([i for i in range(config.llm.vocab_size) if i not in reserved])
    for _ in range(8):
        picture = [tokens.image_start, *[tokens.image_patch] * 24, tokens.image_end]
        sound = [tokens.audio_start, *[tokens.audio_patch] * 24, tokens.audio_end]
        ids = np.array([*rng.choice(words, 16), *picture, *rng.choice(words, 8), *sound, *rng.choice(words, 24)])
        modality = np.where(ids == tokens.image_patch, 1, np.where(ids == tokens.audio_patch, 2, 0))
        grid = np.array([[1, 4 * merge, 6 * merge]])
        rope = config.llm.rope_kind
        positions, _ = position_ids(ids, grid, image_patch=tokens.image_patch, rope_kind=rope, merge_size=merge)
        index = np.full(len(ids), -1)
        index[modality > 0] = np.arange(48)
        rows = rng.standard_normal((48, config.llm.hidden_size))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        yield dict(zip(_ARRAYS, (ids, modality, positions, index, rows), strict=True))


def describe(source: Source, samples: list[Sample]) -> dict[str, Any]:
    """What the facts of a build say of the data: where it came from, how many prompts, and tokens by modality."""
    counts = {name: sum(int((s.modality == code).sum()) for s in samples) for code, name in MODALITIES.items()}
    return {"source": source.what, "prompts": len(samples), "tokens": counts}
