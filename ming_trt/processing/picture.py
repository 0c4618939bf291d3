"""A drawing request to arrays: the prompt with its query spans, and the reference picture of an edit.

The mode is chosen by the request's `draw`, not by words: the prompt is that of a question, with the query tokens after
the assistant prefix. Pictures are seen by the LLM at the size that the model takes for drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ming_trt.errors import InputError
from ming_trt.processing.image import GENERATION_PASS, decode_image, first_pass
from ming_trt.processing.image_size import requested_size
from ming_trt.processing.positions import position_ids
from ming_trt.processing.prepare import Prepared, Processor, index_features
from ming_trt.processing.query import APPENDED, append_query_tokens
from ming_trt.processing.reference import Reference, prepare_reference
from ming_trt.processing.request import ImagePart, Request


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """`prompt`: L tokens, the last `APPENDED` of them query spans. Its `feature_index` counts vision rows, then the
    query rows, then audio rows. `reference`: what an edit starts from, made of the first picture, or None."""

    prompt: Prepared
    reference: Reference | None


def prepare_picture(
    processor: Processor,
    request: Request,
    images: Sequence[bytes] = (),
    videos: Sequence[bytes | Path] = (),
    audios: Sequence[bytes] = (),
) -> PreparedPicture:
    """Arrays for a request with `draw` and its encoded files. Raises `InputError`."""
    if request.draw is None:
        raise InputError("the request has no 'draw': add it, or ask for text")
    if not images:
        requested_size(request.draw.height, request.draw.width)
    prompt = processor.prepare(request, images, videos, audios, pixel_limits=GENERATION_PASS)
    tokens = processor.config.tokens
    if prompt.length + APPENDED > processor.max_prompt_tokens:
        raise InputError(
            f"the prompt has {prompt.length} tokens and a picture needs {APPENDED} more, which is above the "
            f"{processor.max_prompt_tokens} that are served: shorten the text, or send fewer or smaller media"
        )
    merge = processor.patch_shape.merge
    spans = append_query_tokens(
        prompt.input_ids,
        prompt.image_grid,
        start=tokens.image_start,
        patch=tokens.image_patch,
        end=tokens.image_end,
        merge=merge,
    )
    positions, delta = position_ids(
        spans.input_ids,
        spans.grid_thw,
        image_patch=tokens.image_patch,
        rope_kind=processor.config.llm.rope_kind,
        merge_size=merge,
    )
    modality, feature_index = index_features(spans.input_ids.astype(np.int32), tokens)
    extended = replace(
        prompt,
        input_ids=spans.input_ids.astype(np.int32),
        modality=modality,
        positions=positions,
        position_delta=np.asarray([delta], np.int32),
        feature_index=feature_index,
    )
    return PreparedPicture(extended, _reference(processor, request, images[0]) if images else None)


def _reference(processor: Processor, request: Request, data: bytes) -> Reference:
    parts = (part for message in request.messages for part in message.content)
    part = next(part for part in parts if isinstance(part, ImagePart))
    picture = first_pass(decode_image(data), part.min_pixels, part.max_pixels, processor.patch_shape.factor)
    return prepare_reference(picture)
