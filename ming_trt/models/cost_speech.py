"""What the components of the speech path must do, from their configurations alone; conventions as in `cost.py`.

The vocoder's Fourier transforms are products of its definition, so they are counted; their matrices are not weights.
"""

from __future__ import annotations

from ming_trt.models.cost import ATTENTION, CONVOLUTIONS, HEAD, LINEARS, Cost, attend, product, total
from ming_trt.models.cost_layers import qwen2_layer
from ming_trt.speech_config import FlowConfig, HiftConfig, TalkerConfig

_WINDOW = 3  # frames that the flow's and the predictor's convolutions see
_WIDE = 7  # samples that the vocoder's first and last one sees
_PREDICTOR_LAYERS = 5


def talker_step(config: TalkerConfig, tokens: int = 1, past: int = 0, batch: int = 1, thinker_rows: int = 1) -> Cost:
    """A step of `batch` sequences with `tokens` new tokens each behind `past` ones, one row of logits each.

    tokens = 1 is a spoken id, more a prompt, with whose rows of the language model (`thinker_rows`) it comes; a spoken
    id still has one, and the speaker's, by the definition.
    """
    c = config
    return total(
        (
            product(1, c.speaker_dim, c.hidden),
            product(thinker_rows, c.thinker_hidden, c.hidden),
            qwen2_layer(c, tokens, past, batch) * c.layers,
            product(batch, c.hidden, c.vocab_size, HEAD),
        )
    )


def flow_encoder(config: FlowConfig, codes: int, past: int = 0) -> Cost:
    """A part of `codes` codes behind `past` ones (and the few ahead that its first layer sees) into its mean."""
    c, w = config, config.width
    seen = past + codes
    layer = total(
        (
            product(codes, w, 4 * w, ATTENTION),
            # by distance, of which there are as many as pairs of a query and a key can have
            product(codes + seen - 1, w, w, ATTENTION),
            Cost(2 * codes * (codes + seen - 1) * w, {}),
            attend(codes, seen, w),
            product(codes, w, 2 * c.feed_forward),
            Cost(0, {}, 2.0 * past * w),
        )
    )
    return total(
        (
            product(1, c.speaker_dim, c.mel),
            product(codes + c.look_ahead, w, w),
            product(codes, (c.look_ahead + 1) * w, w, CONVOLUTIONS),
            product(codes, _WINDOW * w, w, CONVOLUTIONS) * 2,
            product(codes, w, w),
            layer * (c.encoder_layers + c.up_layers),
            product(codes, w, c.mel),
        )
    )


def flow_estimator(config: FlowConfig, frames: int, past: int = 0, rows: int = 2) -> Cost:
    """One step of the flow over `frames` frames behind `past` ones; `rows`: with and without the condition."""
    c, places = config, rows * frames
    inner = c.estimator_heads * c.estimator_head_dim
    transformer = total(
        (
            product(places, c.channels, 4 * inner, ATTENTION),
            attend(frames, past + frames, inner, rows),
            product(places, c.channels, 2 * c.estimator_feed_forward),
            Cost(0, {}, 2.0 * rows * past * inner),
        )
    )

    def stage(inputs: int) -> Cost:
        convolutions = _WINDOW * (inputs + c.channels) + inputs  # and the shortcut
        return total(
            (
                product(rows, c.time_dim, c.channels),
                product(places, convolutions, c.channels, CONVOLUTIONS),
                transformer * c.transformers,
            )
        )

    return total(
        (
            product(rows, 4 * c.mel, c.time_dim),
            product(rows, c.time_dim, c.time_dim),
            stage(4 * c.mel),
            stage(c.channels) * c.mid_stages,
            stage(2 * c.channels),
            # after the outer stages, and at the end
            product(places, _WINDOW * c.channels, c.channels, CONVOLUTIONS) * 3,
            product(places, c.channels, c.mel, CONVOLUTIONS),
        )
    )


def f0_predictor(config: HiftConfig, frames: int) -> Cost:
    """The pitch of `frames` mel frames."""
    c, w = config, config.f0_width
    first = product(frames, _WINDOW * c.mel, w, CONVOLUTIONS)
    return first + product(frames, _WINDOW * w, w, CONVOLUTIONS) * (_PREDICTOR_LAYERS - 1) + product(frames, w, 1)


def vocoder(config: HiftConfig, frames: int) -> Cost:
    """`frames` mel frames and their pitch into sound."""
    c, spectrum = config, config.n_fft + 2
    windows = frames * c.hop // c.istft_hop + 1
    parts = [
        product(frames * c.hop, c.harmonics + 1, 1, LINEARS),
        Cost(2 * windows * c.n_fft * spectrum, {}),
        product(frames, _WIDE * c.mel, c.base, CONVOLUTIONS),
    ]
    places, stride = frames, c.hop // c.istft_hop
    for number, (rate, kernel) in enumerate(zip(c.up_rates, c.up_kernels, strict=True)):
        channels, last = c.base >> (number + 1), number == len(c.up_rates) - 1
        # transposed: each place of the input goes to `kernel` places of the output
        parts.append(product(places, 2 * channels, kernel * channels, CONVOLUTIONS))
        places = (places - 1) * rate + kernel - 2 * ((kernel - rate) // 2) + last
        stride //= rate
        parts.append(product(places, spectrum * (1 if stride == 1 else 2 * stride), channels, CONVOLUTIONS))
        for size in (c.source_kernels[number], *c.resblock_kernels):
            parts.append(product(places, size * channels, channels, CONVOLUTIONS) * (2 * len(c.dilations)))
    return total(
        (
            *parts,
            product(places, _WIDE * (c.base >> len(c.up_rates)), spectrum, CONVOLUTIONS),
            # the inverse transform, and the sum of its windows
            Cost(2 * places * c.n_fft * (spectrum + 1), {}),
        )
    )
