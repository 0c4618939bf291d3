"""Chooses the next token from logits.

Order of the steps, as the reference's library has it: repetition penalty, n-gram ban, then (unless greedy) temperature,
top-k, top-p, and one draw. A request owns its random generator, so its tokens do not depend on its neighbours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ming_trt.errors import InputError
from ming_trt.processing.request import Sampling

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Sampler:
    """The choices of one request: `next` is called once a token, with everything that came before."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def next(self, logits: Logits, history: Ids) -> int:
        """The next token. `logits` f32 [V], finite; `history` int64 [n]: prompt and output so far.

        Raises `InputError` if the options leave no token to choose.
        """
        options = self.sampling
        scores = logits
        if options.repetition_penalty != 1.0:
            scores = penalise(scores, history, options.repetition_penalty)
        if options.no_repeat_ngram_size:
            banned = banned_tokens(history, options.no_repeat_ngram_size)
            scores = scores.copy()
            scores[banned] = -np.inf
            if banned.size and not np.isfinite(scores).any():
                raise InputError(
                    f"no_repeat_ngram_size {options.no_repeat_ngram_size} leaves no token to choose: raise it"
                )
        if options.temperature == 0.0:
            return int(np.argmax(scores))
        ids, probabilities = distribution(scores, options.temperature, options.top_k, options.top_p)
        total = np.cumsum(probabilities)
        place = np.searchsorted(total, self._random.random() * total[-1], side="right")
        return int(ids[min(int(place), ids.size - 1)])


def penalise(logits: Logits, history: Ids, penalty: float) -> Logits:
    """A copy in which every token of `history` has its logit divided by `penalty` if positive, multiplied if
    negative."""
    scores = logits.copy()
    seen = np.unique(history)
    values = scores[seen]
    scores[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return scores


def banned_tokens(history: Ids, size: int) -> Ids:
    """Tokens that would repeat an n-gram of `size` which `history` holds already. int64 [n], sorted."""
    if history.size < size:
        return np.empty(0, np.int64)
    grams = np.lib.stride_tricks.sliding_window_view(history, size)
    prefix = history[history.size - size + 1 :]
    banned: Ids = np.unique(grams[(grams[:, :-1] == prefix).all(axis=1), -1])
    return banned


def distribution(logits: Logits, temperature: float, top_k: int, top_p: float) -> tuple[Ids, npt.NDArray[np.float64]]:
    """What may be drawn: token ids, ascending, and their probabilities (sum 1), float64.

    top-k keeps the k best and what ties with the last of them; top-p keeps the smallest set of best tokens (ties:
    lower id first) whose probability reaches `top_p`.
    """
    scores = logits.astype(np.float64)
    ids = np.flatnonzero(np.isfinite(scores))
    if 0 < top_k < ids.size:
        threshold = np.partition(scores[ids], ids.size - top_k)[ids.size - top_k]
        ids = ids[scores[ids] >= threshold]
    # The difference is taken before the division: a tiny temperature must not overflow.
    weights = np.exp((scores[ids] - scores[ids].max()) / temperature)
    probabilities = weights / weights.sum()
    if top_p < 1.0:
        # Tokens below (1 - p) / n weigh less than 1 - p together, so none of them is in the set: no need to sort them.
        likely = np.flatnonzero(probabilities >= (1.0 - top_p) / ids.size)
        order = likely[np.argsort(-probabilities[likely], kind="stable")]
        reached = np.cumsum(probabilities[order])
        kept = np.sort(order[: int(np.searchsorted(reached, top_p, side="left")) + 1])
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    return ids, probabilities
