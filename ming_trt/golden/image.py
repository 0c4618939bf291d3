"""Replays the picture cases: condition, denoiser, autoencoder, denoising loops, and whole requests.

What an engine outputs comes from the built engine. Inner values, which no engine outputs, come from the torch
definition: before and after the connector's stack, the condition MLP, activations inside the denoiser.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from PIL import Image

from ming_trt.bundle import DRAWING_ENGINES
from ming_trt.golden.image_host import replay_host, unknown_groups
from ming_trt.golden.llm_driver import Floats, LLMDriver
from ming_trt.golden.session import NotRun, Session
from ming_trt.processing.draw import DrawOptions
from ming_trt.runtime.flow_match import FlowMatchSchedule, Guidance
from ming_trt.runtime.image import ImageEngines, ImageJob, ImageRequest, Prompt

GROUPS = ("prompt", "ratio", "ref", "sched", "cond", "dit", "vae", "loop", "e2e")
SPEECH = ("bpe", "talker", "flow", "hift", "stream")
NOISE_TOLERANCE = 2e-6  # the reference's noise uses another vectorised log, sin and cos


def covers(name: str) -> bool:
    """Whether an array belongs to the picture path; `e2e.speech` does not."""
    return name.split(".")[0] in GROUPS and not name.startswith("e2e.speech")


def replay(session: Session) -> None:
    """Adds a line for every output of every picture case."""
    replay_host(session)
    unknown_groups(session, GROUPS, SPEECH)
    for component in DRAWING_ENGINES:
        reason = session.absent(component)
        if reason is not None:
            session.not_run += [NotRun(f"{group}.", reason) for group in ("cond", "dit", "vae", "loop", "e2e")]
            return
    engines = _engines(session)
    conditions = {kind: _condition(session, engines, kind) for kind in _middles(session, "cond") if kind != "zero"}
    _zero(session)
    prompts = {kind: prompt for kind, prompt in conditions.items() if prompt is not None}
    for shape, kind in sorted(
        {tuple(name.split(".")[1:3]) for name in session.cases.arrays if name.startswith("dit.")}
    ):
        _dit(session, engines, f"dit.{shape}.{kind}", prompts.get(kind))
    _vae(session, engines)
    for name in sorted(n for n in session.cases.arrays if n.startswith("loop.") and n.endswith(".latents")):
        _loop(session, engines, name.removesuffix(".latents"), prompts)
    for kind in _middles(session, "e2e"):
        if kind != "speech":
            _whole(session, engines, kind)


def _middles(session: Session, group: str) -> list[str]:
    """The second parts of the names of a group."""
    return sorted({name.split(".")[1] for name in session.cases.arrays if name.startswith(f"{group}.")})


def _engines(session: Session) -> ImageEngines:
    from ming_trt.image_config import schedule_config, vae_config

    schedule, vae = schedule_config(session.config), vae_config(session.config)
    opened = {name: session.engine(name) for name in DRAWING_ENGINES}
    return ImageEngines(
        opened, FlowMatchSchedule(schedule.shift, schedule.train_steps), vae.factor, vae.latent_channels
    )


def _condition(session: Session, engines: ImageEngines, kind: str) -> Prompt | None:
    """One `cond` case; gives what the denoiser is told, by the engines."""
    import torch

    from ming_trt.processing.query import USED

    case = f"cond.{kind}"
    if f"{case}.hidden" not in session.cases:
        session.not_run.append(NotRun(case, "its hidden states are not among the arrays"))
        return None
    mask = session.cases.array(f"prompt.{kind}.gen_mask").astype(bool)
    hidden = session.cases.array(f"{case}.hidden")[mask][-USED:]
    condition, prompt = engines.condition(hidden)
    session.add(case, "engine", f"{case}.condition", condition)
    connector, told = (cast(Any, session.reference(name)) for name in ("connector", "condition"))
    with torch.no_grad():
        inner = connector.proj_in(torch.from_numpy(hidden)[None])
        session.add(case, "torch", f"{case}.connector_in", inner[0].numpy())
        session.add(case, "torch", f"{case}.connector_out", connector.model(inner)[0].numpy())
        tokens = told.mlp(torch.from_numpy(condition)[None])
        session.add(case, "torch", f"{case}.mlp", tokens[0].numpy())
        session.add(case, "torch", f"{case}.pooled", told.pool(tokens)[0].numpy())
    return prompt


def _zero(session: Session) -> None:
    import torch

    if "cond.zero.mlp" not in session.cases:
        return
    told = cast(Any, session.reference("condition"))
    with torch.no_grad():
        tokens = told.mlp(torch.zeros(1, 1, session.config.llm.hidden_size))
        session.add("cond.zero", "torch", "cond.zero.mlp", tokens[0].numpy())
        session.add("cond.zero", "torch", "cond.zero.pooled", told.pool(tokens)[0].numpy())


def _feeds(latent: Floats, time: Floats, prompt: Prompt, reference: Floats | None) -> dict[str, Any]:
    """The denoiser's inputs for rows that share a prompt and a reference [1, C, h, w]."""
    rows, channels, height, width = latent.shape
    tokens = height * width // 4

    def shared(values: Floats) -> Floats:
        return np.ascontiguousarray(np.broadcast_to(values, (rows, *values.shape)))

    return {
        "latent": latent,
        "time": time.astype(np.float32),
        "context": shared(prompt.context),
        "pooled": shared(prompt.pooled),
        "reference": shared(np.zeros((channels, 2, 2), np.float32) if reference is None else reference[0]),
        "token_index": np.arange(tokens if reference is None else 2 * tokens),
    }


def _dit(session: Session, engines: ImageEngines, case: str, prompt: Prompt | None) -> None:
    cases = session.cases
    if prompt is None:
        session.not_run.append(NotRun(case, "the condition it uses is not among the cases"))
        return
    latent, time = cases.array(f"{case}.latent"), cases.array(f"{case}.t")
    reference = cases.array(f"{case}.ref") if f"{case}.ref" in cases else None
    feeds = _feeds(latent, time, prompt, reference)
    dit = engines.engines["dit"]
    session.add(case, "engine", f"{case}.velocity", dit.run(feeds)["velocity"])
    if f"{case}.velocity_uncond" in cases:
        nothing = None if reference is None else np.zeros_like(reference)
        negative = engines.negative(session.config.llm.hidden_size)
        bare = _feeds(latent[:1], time[:1], negative, nothing)
        session.add(case, "engine", f"{case}.velocity_uncond", dit.run(bare)["velocity"])
    if any(name.startswith(f"{case}.act.") for name in cases.arrays):
        _activations(session, case, feeds)


def _activations(session: Session, case: str, feeds: dict[str, Any]) -> None:
    """Values inside the denoiser, by the torch definition."""
    import torch

    model = cast(Any, session.reference("dit"))
    seen: dict[str, torch.Tensor] = {"context": torch.from_numpy(feeds["context"])}

    def keep(*names: str) -> Callable[..., None]:
        def hook(_: object, __: object, output: Any) -> None:
            seen.update(zip(names, output if isinstance(output, tuple) else (output,), strict=True))

        return hook

    hooks = [
        model.pos_embed.register_forward_hook(keep("patches")),
        model.ref_pos_embed.register_forward_hook(keep("ref_patches")),
        model.noise_refiner[-1].register_forward_hook(keep("noise_refined")),
        model.ref_image_refiner[-1].register_forward_hook(keep("ref_refined")),
    ]
    for i, block in enumerate(model.transformer_blocks):
        hooks.append(block.register_forward_hook(keep(f"block{i}", f"block{i}_context")))
    inputs = [torch.from_numpy(values) for values in feeds.values()]
    try:
        with torch.no_grad():
            model(*inputs)
            seen["temb"] = model.time_text_embed(inputs[1], torch.float32) + inputs[3]
    finally:
        for handle in hooks:
            handle.remove()
    for name, entry in session.cases.arrays.items():
        if not name.startswith(f"{case}.act."):
            continue
        what = name.removeprefix(f"{case}.act.")
        if what in seen:
            session.add(case, "torch", name, seen[what][: entry["shape"][0]].numpy())
        else:
            session.not_run.append(NotRun(name, f"activation '{what}' is not known", unsupported=True))


def _vae(session: Session, engines: ImageEngines) -> None:
    from ming_trt.image_config import vae_config

    if "vae.image" in session.cases:
        config = vae_config(session.config)
        latent = engines.engines["vae_encoder"].run({"image": session.cases.array("vae.image")[None]})["latent"][0]
        session.add("vae", "engine", "vae.ref_latent", latent)
        session.add("vae", "engine", "vae.mode", latent / np.float32(config.scale) + np.float32(config.shift))
    if "vae.latent" in session.cases:
        given = {"latent": session.cases.array("vae.latent")[None]}
        session.add("vae", "engine", "vae.decoded", engines.engines["vae_decoder"].run(given)["image"][0])


def _loop(session: Session, engines: ImageEngines, case: str, prompts: dict[str, Prompt]) -> None:
    """A denoising loop from given noise. Names say what guides it: t2i, edit, edit_img.mode1 to mode6."""
    cases, settings = session.cases, session.cases.index["loop"]
    found = re.fullmatch(r"loop\.(t2i|edit|edit_img)(?:\.mode(\d))?", case)
    if found is None:
        session.not_run.append(NotRun(case, f"a loop named '{case}' is not known", unsupported=True))
        return
    kind = "t2i" if found[1] == "t2i" else "edit"
    if kind not in prompts:
        session.not_run.append(NotRun(case, "the condition it uses is not among the cases"))
        return
    noise = cases.array(f"loop.{kind}.noise")
    if "noise_seed" in settings:
        from ming_trt.runtime.flow_match import initial_noise

        drawn = initial_noise(int(settings["noise_seed"]), noise.shape)
        session.add(case, "host", f"loop.{kind}.noise", drawn, NOISE_TOLERANCE)
    guidance = Guidance(
        float(settings["cfg"]), float(settings["image_cfg"]) if found[1] == "edit_img" else 1.0, int(found[2] or 1)
    )
    reference = None
    if kind == "edit":
        reference = engines.engines["vae_encoder"].run({"image": cases.array("vae.image")[None]})["latent"][0]
    steps = int(settings["steps"])
    sigmas, times = engines.schedule.levels(steps)
    hidden = np.zeros((1, session.config.llm.hidden_size), np.float32)
    request = ImageRequest(hidden, DrawOptions(steps=steps))
    job = ImageJob(request, 0, prompts[kind], reference, noise, sigmas, times, guidance, {"denoise": 0.0})
    latents, velocities = [], []
    while not job.finished:
        engines.step([job])
        latents.append(job.latent)
        velocities.append(job.velocity)
    whole = cases.arrays[f"{case}.latents"]["shape"][0] == steps
    session.add(case, "engine", f"{case}.latents", np.stack(latents if whole else latents[-1:]))
    if f"{case}.velocity" in cases:
        session.add(case, "engine", f"{case}.velocity", np.stack(cast(Any, velocities)))
    if f"{case}.image" in cases:
        session.add(case, "engine", f"{case}.image", engines.decode(job.latent))


def _whole(session: Session, engines: ImageEngines, kind: str) -> None:
    """A request from its prompt ids (and picture) to the pixels."""
    from ming_trt.processing.image import FIRST_PASS, GENERATION_PASS, first_pass, process_image
    from ming_trt.processing.query import APPENDED, USED
    from ming_trt.processing.reference import prepare_reference

    case, cases = f"e2e.{kind}", session.cases
    needed = ("llm", "vision_encoder") if f"{case}.raw" in cases else ("llm",)
    for component in needed:
        reason = session.absent(component)
        if reason is not None:
            session.not_run.append(NotRun(case, reason))
            return
    settings = cases.index["e2e"][kind]
    grid, vision, reference = None, None, None
    if f"{case}.raw" in cases:
        from ming_trt.golden.understanding import vision_rows

        picture = Image.fromarray(cases.array(f"{case}.raw"))
        limit = settings.get("pixels_limit")
        limits = GENERATION_PASS if limit is None else (float(limit), float(limit))
        prepared = process_image(picture, pixel_limits=limits)
        grid = np.array([prepared.grid])
        vision = vision_rows(session, prepared.pixel_values, grid)
        reference = prepare_reference(first_pass(picture, *FIRST_PASS))
        _sampled(session, case, "image_embeds_rows", "engine", vision)
        _sampled(session, case, "ref_u8_rows", "host", reference.pixels, 1.0)
        if f"{case}.grid_thw" in cases:
            session.add(case, "host", f"{case}.grid_thw", grid[0])
    hidden, embeds = _query_rows(session, case, grid, vision)
    session.add(case, "engine", f"{case}.hidden_query", hidden[-APPENDED:])
    rows = cases.arrays[f"{case}.inputs_embeds_query"]["shape"][0]
    session.add(case, "engine", f"{case}.inputs_embeds_query", embeds[-APPENDED:][:rows])
    height, width = settings.get("requested_size", (512, 512))
    options = DrawOptions(
        width=width,
        height=height,
        steps=int(settings["steps"]),
        cfg=float(settings["cfg"]),
        image_cfg=float(settings.get("image_cfg", 1.0)),
        cfg_mode=int(settings.get("cfg_mode", 1)),
    )
    # the last delimiter follows the query rows
    used = np.ascontiguousarray(hidden[-1 - USED : -1])
    session.add(case, "engine", f"{case}.condition", engines.condition(used)[0])
    job = engines.start(ImageRequest(used, options, reference, case, cases.array(f"{case}.noise")))
    while not job.finished:
        engines.step([job])
    session.add(case, "engine", f"{case}.latents", job.latent)
    session.add(case, "engine", f"{case}.image", engines.finish(job).pixels)


def _sampled(session: Session, case: str, what: str, route: Any, values: Any, tolerance: float | None = None) -> None:
    """Compares every k-th row, k from the stored number of rows."""
    name = f"{case}.{what}"
    if name in session.cases:
        stored = session.cases.arrays[name]["shape"][0]
        session.add(case, route, name, values[:: max(1, round(len(values) / stored))][:stored], tolerance)


def _query_rows(session: Session, case: str, grid: Any, vision: Floats | None) -> tuple[Floats, Floats]:
    """Post-norm hidden states and input rows of the LLM [L, H] for the case's prompt with query spans."""
    from ming_trt.models.connector import query_tokens
    from ming_trt.processing.positions import position_ids
    from ming_trt.processing.query import append_query_tokens

    tokens, llm = session.config.tokens, session.config.llm
    spans = append_query_tokens(
        session.cases.array(f"{case}.input_ids"),
        grid,
        start=tokens.image_start,
        patch=tokens.image_patch,
        end=tokens.image_end,
    )
    positions, _ = position_ids(
        spans.input_ids, spans.grid_thw, image_patch=tokens.image_patch, rope_kind=llm.rope_kind
    )
    session.add(case, "host", f"{case}.position_ids", positions)
    learned = query_tokens(llm.hidden_size).load(session.open_checkpoint()).float().numpy()
    patches = spans.input_ids == tokens.image_patch
    index = np.where(patches, np.cumsum(patches) - 1, -1)
    driver = LLMDriver(session.engine("llm"), llm, capacity=len(spans.input_ids))
    driver.features = learned if vision is None else np.concatenate([vision, learned])
    _, hidden, embeds = driver.step(spans.input_ids, positions, patches.astype(np.int64), index)
    return hidden, embeds
