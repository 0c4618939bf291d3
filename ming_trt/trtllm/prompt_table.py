"""How rows of pictures, videos and sounds enter a TensorRT-LLM engine, and how it knows their modality.

A token id of `vocab_size + r` takes row `r` of the request's prompt table instead of an embedding. No further input per
token is possible, so the parity of `r` carries the modality: picture and video rows are even, sound rows odd. The
network reads it from the ids (`modality_of`) and needs no state: chunks, batches and decode steps are all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ming_trt.errors import InputError

Ints = npt.NDArray[np.int32]
TEXT, IMAGE, AUDIO = 0, 1, 2
# The engine compares ids in float32, which is exact below this.
_LARGEST_ID = 1 << 24


@dataclass(frozen=True, slots=True)
class PromptTable:
    """`input_ids` int32 [L] for the engine, and `rows` float32 [P, H] (P may be 0) for its prompt table."""

    input_ids: Ints
    rows: npt.NDArray[np.float32]


def prompt_table(
    input_ids: npt.ArrayLike,
    modality: npt.ArrayLike,
    feature_index: npt.ArrayLike,
    features: npt.NDArray[np.float32],
    vocab_size: int,
    max_rows: int,
) -> PromptTable:
    """Codes a prompt. `feature_index` [L] is the row of `features` [R, H] that stands for a token, -1 for text.

    `max_rows` is what the engine was built for. Raises `InputError` if the prompt needs more, or if a media token has
    no row.
    """
    ids = np.array(input_ids, np.int64)
    codes, index = np.asarray(modality), np.asarray(feature_index)
    if ((codes == TEXT) != (index < 0)).any():
        raise InputError("a token of the prompt has a modality but no row, or a row but no modality: prepare it again")
    size = 0
    for code, parity in ((IMAGE, 0), (AUDIO, 1)):
        places = np.flatnonzero(codes == code)
        ids[places] = vocab_size + 2 * np.arange(len(places)) + parity
        size = max(size, 2 * len(places) - 1 + parity if len(places) else 0)
    if size > max_rows:
        raise InputError(
            f"the pictures, videos and sounds of the prompt take {size} places of the engine's table of {max_rows}: "
            "send fewer or smaller ones"
        )
    if vocab_size + size > _LARGEST_ID:
        raise InputError(f"the prompt's table reaches id {vocab_size + size}, above {_LARGEST_ID}: send fewer media")
    rows = np.zeros((size, features.shape[1]), np.float32)
    media = index >= 0
    rows[ids[media] - vocab_size] = features[index[media]]
    return PromptTable(ids.astype(np.int32), rows)


def modality_of(input_ids: npt.ArrayLike, vocab_size: int) -> npt.NDArray[np.int64]:
    """What the network reads from the ids: 0 text, 1 picture or video, 2 sound."""
    rows = np.asarray(input_ids, np.int64) - vocab_size
    return np.where(rows < 0, TEXT, np.where(rows % 2 == 0, IMAGE, AUDIO))
