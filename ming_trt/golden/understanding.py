"""Replays the understanding cases: positions, rotary embedding, towers, routers, LLM, processors, prompts.

What an engine outputs comes from the built engine. Inner values, which no engine outputs, come from the torch
definition: rotated queries and keys, the router's choices, the residual stream between layers, a tower before its
projector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from ming_trt.errors import CheckpointError, ConfigError, MingError
from ming_trt.golden.llm_driver import Floats, Ints, LLMDriver
from ming_trt.golden.session import NotRun, Session
from ming_trt.golden.tokenizer import ByteTokenizer

Case = dict[str, Any]
_NO_GRIDS = np.zeros((0, 3), np.int64)


def covers(name: str) -> bool:
    """Every array of the understanding set is ours."""
    return True


def replay(session: Session) -> None:
    """Adds a line for every output of every case."""
    from ming_trt.golden.understanding_host import HOST_GROUPS, replay_lists

    handlers: dict[str, Callable[[Session, Case], None]] = {
        **HOST_GROUPS,
        "rotary": _rotary,
        "vision": _vision,
        "audio": _audio,
        "router": _router,
        "llm": _llm,
        "end_to_end": _end_to_end,
    }
    for case in session.cases.index["cases"]:
        handler = handlers.get(case["group"])
        if handler is None:
            session.not_run.append(NotRun(case["id"], f"group '{case['group']}' is not known", unsupported=True))
        else:
            try:
                handler(session, case)
            except (CheckpointError, ConfigError):
                raise  # of no case: nothing can be replayed
            except MingError as error:
                session.fail(case["id"], error)
    replay_lists(session)


def _input(session: Session, case: Case, ending: str) -> Any:
    """The case's input whose name ends so, or None."""
    names = [name for name in case["inputs"] if name.endswith(ending)]
    return session.cases.array(names[0]) if names else None


def _rotary(session: Session, case: Case) -> None:
    import torch

    from ming_trt.models import rope

    name = case["id"]
    llm = session.with_rope(case["rope"]).llm
    q, k, positions = (
        torch.from_numpy(_input(session, case, ending)) for ending in (".q_in", ".k_in", ".position_ids")
    )
    tables = rope.cos_sin(positions[:, None], llm.rope_theta, llm.rope_kind, llm.rope_sections)
    cos, sin = (table[0] for table in tables)
    session.add(name, "torch", f"{name}.cos", cos.numpy())
    session.add(name, "torch", f"{name}.sin", sin.numpy())
    session.add(name, "torch", f"{name}.q_rot", rope.rotate(q, cos, sin).numpy())
    session.add(name, "torch", f"{name}.k_rot", rope.rotate(k, cos, sin).numpy())


def vision_rows(session: Session, pixels: Floats, grids: Ints) -> Floats:
    """Rows of the built vision engine for one or more pictures."""
    from ming_trt.runtime.stages import VisionEncoder

    return VisionEncoder(session.engine("vision_encoder"), session.config)(pixels, grids.astype(np.int32))


def audio_rows(session: Session, mel: Floats) -> Floats:
    """Rows of the built audio engine for one clip."""
    from ming_trt.runtime.stages import AudioEncoder

    return AudioEncoder(session.engine("audio_encoder"), session.config)(mel, np.array([len(mel)], np.int32))


def _vision(session: Session, case: Case) -> None:
    import torch

    from ming_trt.processing.vision_index import vision_indices

    name = case["id"]
    pixels, grids = _input(session, case, ".pixel_values"), _input(session, case, ".grid_thw")
    tower = cast(Any, session.reference("vision_encoder"))
    indices = vision_indices(grids, session.config.vision)
    with torch.no_grad():
        inner = tower.tower(torch.from_numpy(pixels), *(torch.from_numpy(values) for values in indices.values()))
    session.add(name, "torch", f"{name}.tower", inner.numpy())
    session.add(name, "engine", f"{name}.embeds", vision_rows(session, pixels, grids))


def _audio(session: Session, case: Case) -> None:
    import torch

    name = case["id"]
    mel = _input(session, case, ".mel")
    with torch.no_grad():
        inner = cast(Any, session.reference("audio_encoder")).tower(torch.from_numpy(mel)).squeeze(0)
    rows = audio_rows(session, mel)
    session.add(name, "torch", f"{name}.tower", inner.numpy())
    session.add(name, "engine", f"{name}.embeds", rows)
    session.add(name, "engine", f"{name}.length", len(rows))


def _router(session: Session, case: Case) -> None:
    import torch

    x, modality = (torch.from_numpy(_input(session, case, ending))[None] for ending in (".x", ".modality"))
    moe = cast(Any, session.reference("llm")).layers[case["layer"]].mlp
    with torch.no_grad():
        logits = moe.router_logits(x, modality)
        experts, weights = moe.route(logits)
        out = moe(x, modality)
    for what, value in (("logits", logits), ("expert_ids", experts), ("expert_weights", weights), ("moe_out", out)):
        session.add(case["id"], "torch", f"router.{what}", value[0].numpy())


def _modality_and_features(
    session: Session, ids: Ints, vision: Floats | None, audio: Floats | None, audio_place: Ints | None
) -> tuple[Ints, Ints, Floats | None]:
    """Modality codes [L], feature index [L] (vision rows first) and the rows."""
    modality = np.zeros(len(ids), np.int64)
    index = np.full(len(ids), -1, np.int64)
    patches = np.flatnonzero(ids == session.config.tokens.image_patch)
    modality[patches], index[patches] = 1, np.arange(len(patches))
    if audio_place is not None and audio is not None:
        start, count = (int(v) for v in audio_place)
        modality[start : start + count] = 2
        index[start : start + count] = len(patches) + np.arange(count)
    rows = [part for part in (vision, audio) if part is not None]
    return modality, index, np.concatenate(rows) if rows else None


def _prefill(
    session: Session,
    case: Case,
    ids: Ints,
    grids: Ints,
    vision: Floats | None,
    audio: Floats | None,
    place: Ints | None,
) -> tuple[LLMDriver, Ints, int, tuple[Floats, Floats, Floats]]:
    from ming_trt.processing.positions import position_ids

    rope = case.get("rope", session.config.llm.rope_kind)
    positions, delta = position_ids(ids, grids, image_patch=session.config.tokens.image_patch, rope_kind=rope)
    modality, index, features = _modality_and_features(session, ids, vision, audio, place)
    driver = LLMDriver(session.engine("llm", rope), session.config.llm, capacity=len(ids) + 16)
    if features is not None:
        driver.features = features
    return driver, positions, delta, driver.step(ids, positions, modality, index)


def _greedy(driver: LLMDriver, first: Floats, delta: int, steps: int) -> tuple[list[int], list[Floats], list[Floats]]:
    """Tokens g0..g(steps), and the logits and hidden states after feeding g0..g(steps-1)."""
    tokens, logits, hidden = [int(first.argmax())], [], []
    for _ in range(steps):
        position = np.full((3, 1), driver.length + delta, np.int64)
        step_logits, step_hidden, _ = driver.step(np.array(tokens[-1:]), position)
        logits.append(step_logits[0])
        hidden.append(step_hidden[0])
        tokens.append(int(step_logits[0].argmax()))
    return tokens, logits, hidden


def _llm(session: Session, case: Case) -> None:
    name = case["id"]
    stem = case["outputs"][0].rsplit(".", 1)[0]
    ids, pixels, mel = (_input(session, case, ending) for ending in (".input_ids", ".pixel_values", ".mel"))
    grids = _input(session, case, ".grid_thw")
    grids = _NO_GRIDS if grids is None else grids
    vision = None if pixels is None else vision_rows(session, pixels, grids)
    audio = None if mel is None else audio_rows(session, mel)
    place = _input(session, case, ".audio_placeholder")
    driver, positions, delta, (logits, hidden, embeds) = _prefill(session, case, ids, grids, vision, audio, place)
    steps = session.cases.arrays[f"{stem}.generated_ids"]["shape"][0] - 1
    start = driver.length
    tokens, step_logits, step_hidden = _greedy(driver, logits[-1], delta, steps)
    values: dict[str, tuple[Any, Any]] = {
        "position_ids": ("host", positions),
        "decode_positions": ("host", start + delta + np.arange(steps)),
        "prefill_logits": ("engine", logits),
        "prefill_hidden": ("engine", hidden),
        "inputs_embeds": ("engine", embeds),
        "generated_ids": ("engine", tokens),
        "decode_logits": ("engine", np.stack(step_logits)),
        "decode_hidden": ("engine", np.stack(step_hidden)),
    }
    for output in case["outputs"]:
        what = output.rsplit(".", 1)[1]
        if what == "layer_hidden":
            layers = _layer_hidden(session, ids, positions, vision, audio, place)
            session.add(name, "torch", output, layers)
        elif what in values:
            session.add(name, values[what][0], output, values[what][1])
        else:
            session.not_run.append(NotRun(output, f"output '{what}' is not known", unsupported=True))


def _layer_hidden(
    session: Session, ids: Ints, positions: Ints, vision: Floats | None, audio: Floats | None, place: Ints | None
) -> Floats:
    """The residual stream after each layer but the last, [layers - 1, L, H], by the torch definition."""
    import torch

    from ming_trt.models.llm import MingLLM, trace

    model = cast(MingLLM, session.reference("llm"))
    modality, index, features = _modality_and_features(session, ids, vision, audio, place)
    count, llm = len(ids), session.config.llm
    rows = np.zeros((1, llm.hidden_size), np.float32) if features is None else features
    cache = torch.zeros(1, llm.num_kv_heads, count, llm.head_dim)
    feeds = (
        torch.from_numpy(ids.astype(np.int64))[None],
        torch.from_numpy(rows),
        torch.from_numpy(index)[None],
        torch.from_numpy(modality)[None],
        torch.from_numpy(positions.astype(np.int64))[:, None],
        torch.zeros(1, dtype=torch.int64),
        torch.ones(count, count).tril().bool()[None, None],
        torch.tensor([[count - 1]]),
        *[cache.clone() for _ in range(2 * llm.num_layers)],
    )
    layers = torch.stack([hidden[0] for hidden in trace(model, *feeds).layer_hidden[:-1]])
    return cast(Floats, layers.numpy())


def _end_to_end(session: Session, case: Case) -> None:
    """Raw picture and waveform through the processors, the towers and the LLM."""
    from ming_trt.golden.understanding_host import prepare_raw

    tokenizer = ByteTokenizer.from_cases(session.cases.index)
    picture, waveform = _input(session, case, ".raw"), _input(session, case, ".waveform")
    prepared = prepare_raw(session.config, tokenizer, case["prompt_before_expansion"], picture, waveform)
    vision = vision_rows(session, prepared.pixel_values, prepared.image_grid)
    audio = audio_rows(session, prepared.mel)
    place = np.array([int(np.flatnonzero(prepared.modality == 2)[0]), int((prepared.modality == 2).sum())])
    driver, _, delta, (logits, _, _) = _prefill(
        session, case, prepared.input_ids, prepared.image_grid, vision, audio, place
    )
    steps = session.cases.arrays[f"{case['id']}.generated_ids"]["shape"][0] - 1
    tokens, step_logits, _ = _greedy(driver, logits[-1], delta, steps)
    session.add(case["id"], "host", f"{case['id']}.input_ids", prepared.input_ids)
    session.add(case["id"], "host", f"{case['id']}.image_grid_thw", prepared.image_grid)
    session.add(case["id"], "host", f"{case['id']}.audio_placeholder", place)
    session.add(case["id"], "engine", f"{case['id']}.last_logits", logits[-1])
    session.add(case["id"], "engine", f"{case['id']}.decode_logits", np.stack(step_logits))
    session.add(case["id"], "engine", f"{case['id']}.generated_ids", tokens)
