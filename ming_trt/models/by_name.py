"""Weight maps of modules whose parameters carry the official names already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ming_trt.models.weights import Tensor, WeightSource


def by_name(build: Callable[[], nn.Module], folder: Callable[[str], str]) -> dict[str, WeightSource]:
    """Each parameter of `build()` is the tensor of its own name and shape in the checkpoint's folder `folder(name)`.

    The module is built on the `meta` device, so nothing is allocated.
    """
    with torch.device("meta"):
        module = build()
    return {
        name: Tensor(f"{folder(name)}/{name}", tuple(parameter.shape)) for name, parameter in module.named_parameters()
    }
