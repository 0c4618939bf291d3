"""What rounding does to a decoder's choice of tokens: how often the best one changes, how far the distribution moves.

The gate's inputs are a few tokens. These figures are made of more, since of random logits only few have a clear best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from builders.component import Component, Feeds
from builders.verify import SEED, Array

if TYPE_CHECKING:
    from ming_trt.config import MingConfig

# Of the tokens whose best logit leads by more than the error: they may not change.
MIN_AGREEMENT = 0.99
# The error of a logit that is stated: so many times its root mean square, which is passed by one logit in thousands.
DEVIATIONS = 4.0
_DRAWS = 24
# The axis of requests in an input; all others have it first. `features` are counted on from one request to the next.
_REQUESTS = {"position_ids": 1}


@dataclass(frozen=True, slots=True)
class Agreement:
    """`share` of equal best tokens among the `decided`, whose lead exceeds `error`; `total` tokens; the mean KL
    divergence from the definition's distribution in nats."""

    share: float
    decided: int
    total: int
    error: float
    divergence: float

    def problem(self) -> str:
        """Why the tokens are not good enough, or ""."""
        if self.share >= MIN_AGREEMENT:
            return ""
        return f"top-1 agreement {self.share:.1%} of {self.decided} is below {MIN_AGREEMENT:.0%}"

    def remark(self) -> str:
        """The sentence about them."""
        found = (
            f"top-1 agreement {self.share:.1%} of {self.decided} decided tokens" if self.decided else "no token decided"
        )
        return f"{found} ({self.total} in all; a lead above {self.error:.2g}), KL {self.divergence:.2g} nats; "


def token_agreement(got: Array, expected: Array) -> Agreement:
    """Of logits [..., V]."""
    a, b = (np.asarray(value, np.float64).reshape(-1, value.shape[-1]) for value in (got, expected))
    ordered = np.sort(b, axis=-1)
    difference = np.abs(a - b)
    error = min(float(difference.max()), DEVIATIONS * float(np.sqrt((difference**2).mean())))
    decided = ordered[:, -1] - ordered[:, -2] > error
    same = a.argmax(axis=-1) == b.argmax(axis=-1)
    share = float(same[decided].mean()) if decided.any() else 1.0

    def log_softmax(x: Array) -> Array:
        shifted = x - x.max(axis=-1, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return result

    p = log_softmax(b)
    divergence = float((np.exp(p) * (p - log_softmax(a))).sum(axis=-1).mean())
    return Agreement(share, int(decided.sum()), len(b), error, divergence)


def all_tokens(feeds: Feeds) -> Feeds:
    """Asks a decoder for the logits of every token of the step."""
    if "logit_index" not in feeds:
        return feeds
    batch, steps = feeds["attention_mask"].shape[0], feeds["attention_mask"].shape[2]
    return {**feeds, "logit_index": np.tile(np.arange(steps), (batch, 1))}


def many_tokens(component: Component, config: MingConfig) -> Feeds:
    """The inputs of several draws as one batch of the language model; nothing for another engine."""
    draws = [component.sample_feeds(config, np.random.default_rng(SEED + k)) for k in range(_DRAWS)]
    if not {"logit_index", "features"} <= draws[0].keys():
        return {}
    rows = np.cumsum([0, *(len(feeds["features"]) for feeds in draws)])
    for feeds, first in zip(draws, rows, strict=False):
        index = feeds["feature_index"]
        feeds["feature_index"] = np.where(index >= 0, index + first, index)
    return all_tokens(
        {name: np.concatenate([feeds[name] for feeds in draws], axis=_REQUESTS.get(name, 0)) for name in draws[0]}
    )
