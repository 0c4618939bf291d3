"""How the LLM takes part in drawing: the query tokens' rows go in, hidden states of the last scale come out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.errors import BundleError, EngineError
from ming_trt.processing.query import QUERY_TOKENS, USED
from ming_trt.processing.request import Sampling
from ming_trt.runtime.events import ErrorEvent, Handle, HiddenEvent
from ming_trt.runtime.sequence import GenerationRequest

Floats = npt.NDArray[np.float32]


def open_query_rows(bundle: Bundle) -> Floats:
    """The learned rows f32 [336, H] of the query tokens. Raises `BundleError` if they are absent or damaged."""
    entry = bundle.component("connector")
    path = bundle.model_path("connector").with_name(str(entry.facts.get("query_tokens")))
    try:
        rows: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"the query tokens '{path}' cannot be read ({error}): build the bundle again") from None
    hidden = entry.inputs["hidden"]["shape"][-1]
    if rows.shape != (QUERY_TOKENS, hidden) or rows.dtype != np.float32:
        raise BundleError(
            f"the query tokens '{path}' are {rows.dtype} {list(rows.shape)}, not float32 [{QUERY_TOKENS}, {hidden}]: "
            "build the bundle again"
        )
    return rows


def insert_query_rows(features: Floats, vision_rows: int, query_rows: Floats) -> Floats:
    """`features` f32 [R, H] (vision rows first, then audio rows) with the query rows between the two kinds."""
    return np.concatenate([features[:vision_rows], query_rows, features[vision_rows:]])


def read_only(request: GenerationRequest) -> GenerationRequest:
    """The same prompt, which ends with the query spans, to be read but not answered; the LLM's `HiddenEvent` then has
    the rows of the last scale."""
    length = len(request.input_ids)
    # the last token is the closing delimiter
    wanted = np.arange(length - 1 - USED, length - 1)
    return replace(request, want_hidden=wanted, sampling=Sampling(max_tokens=0))


def hidden_rows(handle: Handle) -> Floats:
    """The rows f32 [256, H] of a `read_only` request. Raises the error that ends it."""
    rows: Floats | None = None
    for event in handle:
        if isinstance(event, ErrorEvent):
            raise event.error
        if isinstance(event, HiddenEvent):
            rows = event.hidden
    if rows is None:
        raise EngineError("the LLM gave no hidden states for the query tokens: look into its log")
    return rows
