"""Torch definitions of the picture path against the reference cases; tolerances are the cases' own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ming_trt.checkpoint import Checkpoint
from ming_trt.image_config import (
    TABLES,
    ConditionConfig,
    DiTConfig,
    condition_config,
    dit_config,
    vae_config,
)
from ming_trt.models import condition, dit
from ming_trt.models.weights import check_sources

from ..picture import FOLDER, cases, checkpoint, config, kinds, module, no_grad, query_rows


@pytest.mark.parametrize("kind", kinds("cond"))
def test_connector(kind: str) -> None:
    model, rows = module("connector"), torch.from_numpy(query_rows(kind))[None]
    inner = no_grad(model.proj_in, rows)
    cases().check(f"cond.{kind}.connector_in", inner[0].numpy())
    cases().check(f"cond.{kind}.connector_out", no_grad(model.model, inner)[0].numpy())
    cases().check(f"cond.{kind}.condition", no_grad(model, rows)[0].numpy())


def test_connector_is_bidirectional() -> None:
    model = module("connector")
    rows = torch.from_numpy(query_rows(kinds("cond")[0]))[None]
    changed = rows.clone()
    changed[:, -1] += 1
    assert (no_grad(model, changed)[0, 0] - no_grad(model, rows)[0, 0]).abs().max() > 1e-5


@pytest.mark.parametrize("kind", kinds("cond"))
def test_condition_mlp(kind: str) -> None:
    model = module("condition")
    given = no_grad(module("connector"), torch.from_numpy(query_rows(kind))[None])
    tokens = no_grad(model.mlp, given)
    cases().check(f"cond.{kind}.mlp", tokens[0].numpy())
    cases().check(f"cond.{kind}.pooled", no_grad(model.pool, tokens)[0].numpy())


def test_zero_condition_is_not_zero_context() -> None:
    model = module("condition")
    tokens = no_grad(model.mlp, torch.zeros(1, 256, config().llm.hidden_size))
    cases().check("cond.zero.mlp", tokens[0, :1].numpy())
    cases().check("cond.zero.pooled", no_grad(model.pool, tokens)[0].numpy())
    assert tokens.abs().max() > 0.1


def _inputs(name: str, kind: str, rows: int, conditioned: bool = True) -> list[torch.Tensor]:
    latent = torch.from_numpy(cases().array(f"{name}.latent"))[:rows]
    time = torch.from_numpy(cases().array(f"{name}.t"))[:rows]
    given = no_grad(module("connector"), torch.from_numpy(query_rows(kind))[None])
    context, pooled = no_grad(module("condition"), given if conditioned else torch.zeros_like(given))
    tokens = latent.shape[2] * latent.shape[3] // 4
    if kind == "edit":
        reference = torch.from_numpy(cases().array(f"{name}.ref")) * float(conditioned)
        tokens *= 2
    else:
        reference = torch.zeros(1, latent.shape[1], 2, 2)
    shared = [value.expand(rows, *value.shape[1:]) for value in (context, pooled, reference)]
    return [latent, time, *shared, torch.arange(tokens)]


@pytest.mark.parametrize("size", ["square", "wide"])
@pytest.mark.parametrize("kind", kinds("dit"))
def test_dit(size: str, kind: str) -> None:
    name = f"dit.{size}.{kind}"
    cases().check(f"{name}.velocity", no_grad(module("dit"), *_inputs(name, kind, 4)).numpy())
    bare = _inputs(name, kind, 1, conditioned=False)
    cases().check(f"{name}.velocity_uncond", no_grad(module("dit"), *bare).numpy())


def test_dit_without_reference_ignores_the_stand_in() -> None:
    """The 2 x 2 latent that takes the reference's place must not matter."""
    kind = kinds("dit")[0]
    inputs = _inputs(f"dit.wide.{kind}", kind, 2)
    inputs[5] = torch.arange(inputs[0].shape[2] * inputs[0].shape[3] // 4)
    inputs[4] = torch.zeros(2, inputs[0].shape[1], 2, 2)
    other = [*inputs[:4], torch.randn_like(inputs[4]), inputs[5]]
    assert torch.equal(no_grad(module("dit"), *inputs), no_grad(module("dit"), *other))


def test_vae() -> None:
    encoder, decoder = module("vae_encoder"), module("vae_decoder")
    image = torch.from_numpy(cases().array("vae.image"))[None]
    cases().check("vae.mode", no_grad(encoder.mode, image)[0].numpy())
    cases().check("vae.ref_latent", no_grad(encoder, image)[0].numpy())
    latent = torch.from_numpy(cases().array("vae.latent"))[None]
    cases().check("vae.decoded", no_grad(decoder, latent)[0].numpy())


def _sizes(full: int, side: int) -> DiTConfig:
    return DiTConfig(16, 2, 64, 2, 32, 1, (0,), 2, True, 128, full, side, True)


@pytest.mark.parametrize(("full", "side"), [(72, 64), (73, 65), (48, 48)])
def test_cut_table_gives_the_same_crops(full: int, side: int) -> None:
    """Every crop that the cut table can serve is the crop that the reference takes from the whole table."""
    whole = dit.position_table(_sizes(full, full)).view(full, full, -1)
    cut = dit.position_table(_sizes(full, side)).view(side, side, -1)
    for rows in range(1, side + 1):
        top, here = (full - rows) // 2, (side - rows) // 2
        assert torch.equal(whole[top : top + rows, top : top + rows], cut[here : here + rows, here : here + rows])


def test_stored_table_is_cut_from_the_checkpoint(tmp_path: object) -> None:
    """Cutting a stored table and computing the cut one agree (the tables of the cases follow the formula)."""
    sizes = replace(dit_config(config()), stored_tables=False)
    rebuilt = dit.CentralTable(f"transformer/{TABLES[0]}", sizes)
    assert rebuilt.names == ()
    values = rebuilt.load(checkpoint(), torch.float32)
    assert values.shape == rebuilt.shape
    if dit_config(config()).stored_tables:
        stored = dit.CentralTable(f"transformer/{TABLES[0]}", dit_config(config()))
        np.testing.assert_array_equal(stored.load(checkpoint()).numpy(), values.numpy())


def test_table_is_read_from_the_small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    from ming_trt.config import load_config
    from ming_trt.mini import write_mini

    folder = tmp_path_factory.mktemp("mini") / "checkpoint"
    write_mini(folder)
    sizes = dit_config(load_config(folder))
    assert sizes.stored_tables
    assert sizes.table_full_side > sizes.table_side
    source = dit.weight_map(sizes)[TABLES[1]]
    # stored in bfloat16: 8 significant bits of values up to 1
    difference = source.load(Checkpoint(folder), torch.float32) - dit.position_table(sizes)
    assert difference.abs().max() <= 2**-8


def test_maps_fit_the_checkpoint() -> None:
    from builders.registry import component
    from ming_trt.bundle import DRAWING_ENGINES

    for name in DRAWING_ENGINES:
        assert component(name).needs(config(), checkpoint()) is None
        check_sources(component(name).sources(config()), checkpoint())


def test_official_size() -> None:
    """Denoiser and condition MLP of the official sizes have the number of parameters that the official log states."""
    sizes = DiTConfig(16, 2, 1536, 24, 64, 24, tuple(range(13)), 2, True, 128, 384, 64, True)
    told = ConditionConfig(2048, 2048, 4096, 2048, 1536)
    with torch.device("meta"):
        modules = dit.DiT(sizes), condition.Condition(told)
    count = sum(
        parameter.numel()
        for each in modules
        for name, parameter in each.named_parameters()
        if not name.endswith("pos_embed.pos_embed")
    )
    assert count == 2_425_834_176


def test_configuration_reads_the_files() -> None:
    assert vae_config(config()).factor == 8
    shape = checkpoint().info("mlp/mlp.fc1.weight").shape
    assert condition_config(config()).mlp_hidden == shape[0]
    assert FOLDER.is_dir()
