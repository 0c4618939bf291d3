"""Replays what the picture path does on the host: query spans, size buckets, reference pictures, the schedule."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ming_trt.golden.session import NotRun, Session


def replay_host(session: Session) -> None:
    """Adds a line for every output of the groups `prompt`, `ratio`, `ref` and `sched`, and the picture sizes."""
    names = session.cases.arrays
    for case in sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("prompt.")}):
        _prompt(session, case)
    if "ratio.table" in names:
        _ratios(session)
    for case in sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("ref.")}):
        _reference(session, case)
    for case in sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("sched.")}):
        _schedule(session, case)
    _grids(session)


def _prompt(session: Session, case: str) -> None:
    from ming_trt.golden.tokenizer import ByteTokenizer
    from ming_trt.processing.positions import position_ids
    from ming_trt.processing.query import append_query_tokens

    tokens = session.config.tokens
    entry = session.cases.index["prompts"][case.removeprefix("prompt.")]
    grid = None if entry["grid_thw"] is None else np.array([entry["grid_thw"]])
    ids = session.cases.array(f"{case}.input_ids")
    encoded = ByteTokenizer.from_cases(session.cases.index).encode(entry["expanded"])
    session.add_equal(case, f"{case}.input_ids", encoded, ids.tolist())
    spans = append_query_tokens(ids, grid, start=tokens.image_start, patch=tokens.image_patch, end=tokens.image_end)
    positions, _ = position_ids(
        spans.input_ids, spans.grid_thw, image_patch=tokens.image_patch, rope_kind=session.config.llm.rope_kind
    )
    values = {
        "all_ids": spans.input_ids,
        "gen_mask": spans.query_mask,
        "grid_thw": spans.grid_thw,
        "image_mask": spans.input_ids == tokens.image_patch,
        "position_ids": positions,
    }
    for what, value in values.items():
        session.add(case, "host", f"{case}.{what}", value)


def _ratios(session: Session) -> None:
    from ming_trt.processing.image_size import fit_size

    rows = []
    for height, width in session.cases.array("ratio.table")[:, :2].tolist():
        size = fit_size(height, width)
        rows.append([height, width, size.height, size.width, size.resize_height, size.resize_width])
    session.add("ratio.table", "host", "ratio.table", np.array(rows))


def _reference(session: Session, case: str) -> None:
    from ming_trt.processing.image import first_pass
    from ming_trt.processing.reference import prepare_reference

    picture = Image.fromarray(session.cases.array(f"{case}.raw"))
    loaded = first_pass(picture)
    session.add(case, "host", f"{case}.first_pass_size", np.array([loaded.height, loaded.width]))
    for kind, source in (("direct", picture), ("loaded", loaded)):
        reference = prepare_reference(source)
        values = {
            "size": np.array([reference.size.height, reference.size.width]),
            "u8": reference.pixels,
            "u8_rows": reference.pixels[::16],
            "rows": reference.vae_input()[0, :, :2],
        }
        for what, value in values.items():
            name = f"{case}.{kind}.{what}"
            if name in session.cases:
                # pictures may differ by one grey level, as the cases' notes allow
                tolerance = {"size": 0.0, "rows": 2 / 255}.get(what, 1.0)
                session.add(case, "host", name, value, tolerance)


def _schedule(session: Session, case: str) -> None:
    from ming_trt.image_config import schedule_config
    from ming_trt.runtime.flow_match import FlowMatchSchedule

    config = schedule_config(session.config)
    schedule = FlowMatchSchedule(config.shift, config.train_steps)
    sigmas, times = schedule.levels(int(case.removeprefix("sched.")))
    session.add(case, "host", f"{case}.sigmas", sigmas)
    session.add(case, "host", f"{case}.timesteps", times)


def _grids(session: Session) -> None:
    from ming_trt.processing.image import FIRST_PASS, GENERATION_PASS
    from ming_trt.processing.patches import fit

    for entry in session.cases.index.get("image_token_grid", []):
        name = f"image_token_grid {entry['height']}x{entry['width']}"
        first = fit(entry["height"], entry["width"], *FIRST_PASS)
        session.add_equal(name, f"{name} first", list(first), entry["first_pass"])
        session.add_equal(name, f"{name} second", list(fit(*first, *GENERATION_PASS)), entry["second_pass"])


def unknown_groups(session: Session, known: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Notes arrays of groups that neither this replay (`known`) nor the speech replay (`others`) has."""
    groups = sorted({name.split(".")[0] for name in session.cases.arrays})
    for group in groups:
        if group not in (*known, *others):
            session.not_run.append(NotRun(f"{group}.", f"group '{group}' is not known", unsupported=True))
