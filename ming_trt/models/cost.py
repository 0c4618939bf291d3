"""What a component must do for its answer: operations and bytes, from the configuration alone.

These are ceilings to print beside measurements: a decoding step cannot be faster than its weights can be read, a
prefill not faster than its products can be multiplied. Counted are matrix products and attention (a product of
[m, k] and [k, n] is 2·m·k·n operations) and the weights and cache entries that must be read once. Not counted:
norms, activations, softmax, rotations, and what an implementation reads twice or writes in between.

Numbers are floats: with few tokens in a step the experts that are read are an expectation (see `distinct_experts`).

Here are the language model and the two encoders; the picture path is in `cost_image.py`, speech in `cost_speech.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ming_trt.config import AudioConfig, LLMConfig, VisionConfig
from ming_trt.errors import ConfigError

# Groups of weights that a precision may treat differently.
EXPERTS, ATTENTION, LINEARS, ROUTERS, HEAD, CONVOLUTIONS = (
    "experts",
    "attention",
    "linears",
    "routers",
    "head",
    "convolutions",
)
_GROUPS = (EXPERTS, ATTENTION, LINEARS, ROUTERS, HEAD, CONVOLUTIONS)
# One float32 scale per 128 weights.
_SCALE = 4 / 128
_CACHE_BYTES = 4


def _all(size: float) -> dict[str, float]:
    return dict.fromkeys(_GROUPS, size)


_Q8, _Q4 = 1 + _SCALE, 0.5 + _SCALE
_FLOATS = {ROUTERS: 4.0, CONVOLUTIONS: 4.0}
BYTES_PER_WEIGHT: Mapping[str, Mapping[str, float]] = {
    "fp32": _all(4),
    "fp16": _all(2),
    "bf16": _all(2),
    "fp8": {**_all(1), ROUTERS: 2.0, HEAD: 2.0},
    # as `builders.quantize.SCHEMES` says; routers and convolutions stay float32
    "int8": {**_all(_Q8), **_FLOATS},
    "w8a8": {**_all(1), ATTENTION: _Q8, HEAD: _Q8, **_FLOATS},
    "int4": {**_all(_Q4), ATTENTION: _Q8, HEAD: _Q8, **_FLOATS},
}


@dataclass(frozen=True, slots=True)
class Cost:
    """`flops`: operations; `weights`: weights that are read, by group; `cache`: numbers read from the KV cache."""

    flops: float
    weights: Mapping[str, float]
    cache: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        groups = {**self.weights}
        for group, count in other.weights.items():
            groups[group] = groups.get(group, 0.0) + count
        return Cost(self.flops + other.flops, groups, self.cache + other.cache)

    def __mul__(self, count: int) -> Cost:
        """`count` like this one: layers of one shape, or the same run again, which reads its weights again."""
        groups = {group: count * weights for group, weights in self.weights.items()}
        return Cost(count * self.flops, groups, count * self.cache)

    def bytes(self, precision: str) -> float:
        """Bytes that are read at `precision` (a scheme of the build); the cache is float32. Raises `ConfigError`."""
        if precision not in BYTES_PER_WEIGHT:
            raise ConfigError(f"no sizes are known for '{precision}': choose {', '.join(BYTES_PER_WEIGHT)}")
        sizes = BYTES_PER_WEIGHT[precision]
        return sum(count * sizes[group] for group, count in self.weights.items()) + self.cache * _CACHE_BYTES

    def seconds(self, precision: str, bytes_per_s: float, flops_per_s: float) -> float:
        """The least time on a machine with those rates: reading and computing may overlap, the slower one decides."""
        return max(self.bytes(precision) / bytes_per_s, self.flops / flops_per_s)


def total(costs: Iterable[Cost]) -> Cost:
    """All of them, one after the other."""
    return sum(costs, Cost(0, {}))


def product(rows: int, inputs: int, outputs: int, group: str = LINEARS) -> Cost:
    """A linear layer over `rows`; a convolution too, whose rows are its places and whose inputs those of a window."""
    return Cost(2 * rows * inputs * outputs, {group: float(inputs * outputs)})


def attend(queries: int, keys: int, width: int, batch: int = 1) -> Cost:
    """Scores and the mixing of values of all heads, `width` numbers wide together; there are no weights in it."""
    return Cost(4 * batch * queries * keys * width, {})


def distinct_experts(config: LLMConfig, tokens: int) -> float:
    """Expected number of different experts that `tokens` tokens choose, if each chooses evenly and for itself."""
    return config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** tokens)


def llm_step(config: LLMConfig, tokens: int, past: int = 0, batch: int = 1, logits: int | None = None) -> Cost:
    """A step of `batch` sequences with `tokens` new tokens each behind `past` ones.

    tokens = 1 is a decoding step, more is a prefill. `logits`: rows of logits per sequence (default 1). Attention is
    counted as it is defined, over all past + tokens places, also where the mask hides them.
    """
    c, rows = config, batch * tokens
    heads = batch * (1 if logits is None else logits)
    seen = past + tokens
    attention = c.hidden_size * (c.query_width + 2 * c.kv_width) + c.query_width * c.hidden_size
    expert, routers = 3 * c.hidden_size * c.expert_width, 3 * c.num_experts * c.hidden_size
    shared, head = 3 * c.hidden_size * c.shared_width, c.hidden_size * c.vocab_size
    products = attention + routers + shared + c.top_k * expert
    scores = 2 * c.query_width * seen
    return Cost(
        2 * rows * c.num_layers * (products + scores) + 2 * heads * head,
        {
            EXPERTS: c.num_layers * distinct_experts(c, rows) * expert,
            ATTENTION: float(c.num_layers * attention),
            LINEARS: float(c.num_layers * shared),
            ROUTERS: float(c.num_layers * routers),
            HEAD: float(head if heads else 0),
        },
        2.0 * c.num_layers * batch * past * c.kv_width,
    )


def vision(config: VisionConfig, hidden_out: int, grid: tuple[int, int, int]) -> Cost:
    """One picture or video of `grid` (t, h, w) patches into rows of `hidden_out` numbers.

    Windows at the border are counted whole, since they are padded; frames attend within themselves.
    """
    c, (t, h, w) = config, grid
    patches, side = t * h * w, c.merge_size * c.window_cells
    windows = t * -(-h // side) * -(-w // side)
    cells, cell = patches // c.merge_size**2, c.hidden_size * c.merge_size**2
    block = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.mlp_width
    full = len(c.full_attention)
    scores = 4 * c.hidden_size * (
        full * t * (h * w) ** 2 + (c.num_layers - full) * windows * c.window_patches**2
    )  # fmt: skip
    embed = c.patch_width * c.hidden_size
    merger = cell * cell + cell * c.out_size
    project = c.out_size * hidden_out + hidden_out**2
    return Cost(
        2 * patches * (embed + c.num_layers * block) + 2 * cells * (merger + project) + scores,
        {
            ATTENTION: 4.0 * c.num_layers * c.hidden_size**2,
            LINEARS: float(embed + c.num_layers * 3 * c.hidden_size * c.mlp_width + merger + project),
        },
    )


def audio(config: AudioConfig, hidden_out: int, frames: int) -> Cost:
    """One clip of `frames` mel frames into rows of `hidden_out` numbers."""
    c, width = config, config.hidden_size
    rows = -(-frames // 2)
    out = -(-rows // 2)
    block = 12 * width**2
    first, second = 3 * c.num_mels * width, 3 * width**2
    joined, linear = 3 * width * hidden_out, hidden_out**2
    flops = 2 * frames * first + 2 * rows * second + c.num_layers * (2 * rows * block + 4 * rows**2 * width)
    return Cost(
        flops + 2 * out * (joined + linear),
        {
            ATTENTION: 4.0 * c.num_layers * width**2,
            LINEARS: float(c.num_layers * 8 * width**2 + linear),
            CONVOLUTIONS: float(first + second + joined),
        },
    )
