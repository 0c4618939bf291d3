"""What the components of the picture path must do, from their configurations alone; conventions as in `cost.py`.

Counted as the definitions have it: where there is no reference picture the denoiser still refines the one token that
stands for it.
"""

from __future__ import annotations

from itertools import pairwise

from ming_trt.image_config import ConditionConfig, ConnectorConfig, DiTConfig, VAEConfig
from ming_trt.models.cost import ATTENTION, CONVOLUTIONS, Cost, attend, product, total
from ming_trt.models.cost_layers import qwen2_layer
from ming_trt.processing.query import USED

_TIME_CHANNELS = 256  # of the sinusoid, as in `dit.py`
_WINDOW = 9  # places that a convolution of 3 x 3 sees


def connector(config: ConnectorConfig, tokens: int = USED) -> Cost:
    """Hidden rows of one prompt's query tokens into its condition; every token sees every other."""
    c = config
    return total(
        (
            product(tokens, c.llm_hidden, c.hidden),
            qwen2_layer(c, tokens) * c.layers,
            product(tokens, c.hidden, c.llm_hidden),
        )
    )


def condition(config: ConditionConfig, tokens: int = USED) -> Cost:
    """What the denoiser is told of one condition."""
    c = config
    return total(
        (
            product(tokens, c.llm_hidden, c.mlp_hidden),
            product(tokens, c.mlp_hidden, c.joint_dim),
            product(tokens, c.joint_dim, c.dit_hidden),
            product(1, c.pooled_dim, c.dit_hidden),
            product(1, c.dit_hidden, c.dit_hidden),
        )
    )


def dit(config: DiTConfig, height: int, width: int, rows: int = 2, reference: bool = False, tokens: int = USED) -> Cost:
    """One denoising step of `rows` latents of that height and width: a row for each branch of the guidance of each
    picture. `reference`: with a latent of the same size beside each; `tokens`: of the prompt."""
    c, d = config, config.hidden
    own = (height // c.patch) * (width // c.patch)
    other = own if reference else 1
    seen = own + other if reference else own
    numbers = c.patch**2 * c.channels
    parts = [product(rows, _TIME_CHANNELS, d), product(rows, d, d)]
    for count in (own, other):
        parts.append(product(rows * count, numbers, d, CONVOLUTIONS))
        parts.append(_refiner(d, rows, count) * c.refiners)
    for layer in range(c.layers):
        parts.append(_block(d, rows, seen, tokens, layer in c.dual_layers, layer == c.layers - 1))
    parts += [product(rows, d, 2 * d), product(rows * own, d, numbers)]
    return total(parts)


def _refiner(d: int, rows: int, count: int) -> Cost:
    return total((product(rows, d, 6 * d), _attention(d, rows, count), _feed_forward(d, rows * count)))


def _block(d: int, rows: int, seen: int, tokens: int, dual: bool, last: bool) -> Cost:
    """A block of two streams: `seen` tokens of the picture, `tokens` of the prompt, which the last block drops."""
    parts = [
        product(rows, d, (9 if dual else 6) * d),
        product(rows, d, (2 if last else 6) * d),
        product(rows * seen, d, 4 * d, ATTENTION),
        product(rows * tokens, d, (3 if last else 4) * d, ATTENTION),
        attend(seen + tokens, seen + tokens, d, rows),
        _feed_forward(d, rows * seen),
    ]
    if dual:
        parts.append(_attention(d, rows, seen))
    if not last:
        parts.append(_feed_forward(d, rows * tokens))
    return total(parts)


def _attention(d: int, rows: int, count: int) -> Cost:
    return product(rows * count, d, 4 * d, ATTENTION) + attend(count, count, d, rows)


def _feed_forward(d: int, count: int) -> Cost:
    return product(count, d, 4 * d) + product(count, 4 * d, d)


def vae_encoder(config: VAEConfig, height: int, width: int) -> Cost:
    """One picture of that height and width, pixels (multiples of the factor), into its latent."""
    c, moments = config, 2 * config.latent_channels
    places = height * width
    parts = [_conv(places, c.picture_channels, c.widths[0])]
    before = c.widths[0]
    for number, channels in enumerate(c.widths):
        parts += [_resnets(places, before, channels, c.layers)]
        if number < len(c.widths) - 1:
            places //= 4
            parts.append(_conv(places, channels, channels))
        before = channels
    parts += [_middle(c, places), _conv(places, before, moments)]
    if c.quant_conv:
        parts.append(product(places, moments, moments, CONVOLUTIONS))
    return total(parts)


def vae_decoder(config: VAEConfig, height: int, width: int) -> Cost:
    """One latent of that height and width into its picture."""
    c, widths = config, tuple(reversed(config.widths))
    places = height * width
    parts = [_conv(places, c.latent_channels, widths[0]), _middle(c, places)]
    if c.post_quant_conv:
        parts.append(product(places, c.latent_channels, c.latent_channels, CONVOLUTIONS))
    for number, (before, channels) in enumerate(pairwise((widths[0], *widths))):
        parts.append(_resnets(places, before, channels, c.layers + 1))
        if number < len(widths) - 1:
            places *= 4
            parts.append(_conv(places, channels, channels))
    return total((*parts, _conv(places, widths[-1], c.picture_channels)))


def _conv(places: int, inputs: int, outputs: int) -> Cost:
    """3 x 3; `places`: of the result."""
    return product(places, _WINDOW * inputs, outputs, CONVOLUTIONS)


def _resnets(places: int, inputs: int, outputs: int, count: int) -> Cost:
    """`count` one after the other: the first changes the number of channels, with a shortcut where that is another."""
    first = _conv(places, inputs, outputs) + _conv(places, outputs, outputs)
    if inputs != outputs:
        first += product(places, inputs, outputs, CONVOLUTIONS)
    return first + _conv(places, outputs, outputs) * (2 * (count - 1))


def _middle(config: VAEConfig, places: int) -> Cost:
    channels = config.widths[-1]
    blocks = _resnets(places, channels, channels, 2)
    if not config.mid_attention:
        return blocks
    return blocks + product(places, channels, 4 * channels, ATTENTION) + attend(places, places, channels)
