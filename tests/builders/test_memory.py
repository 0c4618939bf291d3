"""The plan's figures of serving processes against real ones, which run the mini engines at the plan's sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from builders.arena import Arena, Event, arena_peak, live_peak
from builders.plan import plan
from builders.plan_serving import PROCESSES, SHRINKING, engines_of, process_bytes
from ming_trt.bundle import Bundle

CHILD = Path(__file__).with_name("process_memory.py")
TOLERANCE = 0.1


def measured(bundle: Path, stage: str, sizes: dict[str, list[dict[str, int]]]) -> dict[str, int]:
    job = {"bundle": str(bundle), "shrink": stage in SHRINKING, "engines": sizes}
    command = [sys.executable, str(CHILD), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def compared(bundle: Path, checkpoint: Path, stage: str) -> tuple[int, int]:
    """Planned and measured peak of the process of `stage`; what it takes without weights is the plan's in both."""
    preset = Bundle.open(bundle).preset
    engines = engines_of(stage, plan(checkpoint, preset).engines)
    capacity = {"T": preset.profile.max_seq_len}
    sizes = {
        engine.name: [
            {**capacity, **{symbol: typical for symbol, (_, typical, _) in way.sizes.items()}}
            for way in engine.profiles
        ]
        for engine in engines
    }
    found = measured(bundle, stage, sizes)
    base = found["ready"] - found["weights"]
    return process_bytes(stage, engines, found["caches"]), found["peak"] - base + PROCESSES[stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vision_encoder", "audio_encoder", "llm"])
def test_processes_of_the_understanding_path_within_ten_percent(understanding_bundle: Path, stage: str) -> None:
    planned, real = compared(understanding_bundle, understanding_bundle.parent / "checkpoint", stage)
    assert planned == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "speech"])
def test_processes_of_pictures_and_speech_within_ten_percent(
    mini_bundle: Path, understanding_bundle: Path, stage: str
) -> None:
    planned, real = compared(mini_bundle, understanding_bundle.parent / "checkpoint", stage)
    assert planned == pytest.approx(real, rel=TOLERANCE)


def test_arena_by_hand() -> None:
    """Regions of 1, 2, 4 MiB; what is free in one is not joined with another's."""
    arena, mib = Arena(), 1 << 20
    arena.allocate(1, mib)
    arena.allocate(2, mib)
    assert arena.touched == 2 * mib
    arena.free(1)
    arena.allocate(3, mib // 2)
    assert arena.touched == 2 * mib
    # one and a half are free in all, in two pieces
    arena.allocate(4, mib + mib // 2)
    assert arena.touched == 2 * mib + mib + mib // 2
    arena.free(3)
    arena.allocate(5, mib)
    assert arena.touched == 3 * mib + mib // 2


def test_growing_tensors_leave_holes() -> None:
    """Each fits into none of the holes before it: the arena holds their sum, though one is in use at a time."""
    sizes = [1 << 20, 3 << 20, 9 << 20]
    events = [event for key, size in enumerate(sizes) for event in (Event(key, size), Event(key))]
    assert live_peak(events) == max(sizes) and arena_peak(events) == sum(sizes)
    # written over what it was made from
    over = [Event(0, 1 << 20), Event(1, 1 << 20, 0), Event(1)]
    assert live_peak(over) == arena_peak(over) == 1 << 20
