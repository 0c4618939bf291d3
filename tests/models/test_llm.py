"""The language model against the reference: rotation, routers, whole prompts and greedy steps with the cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ming_trt.config import MingConfig
from ming_trt.golden.cases import Cases
from ming_trt.models import audio, llm, ops, rope, vision
from ming_trt.processing.vision_index import vision_indices

MakeLLM = Callable[[str], llm.MingLLM]
LLM_CASES = ["text", "image", "image.video_rope", "video", "video.video_rope", "audio", "image_audio", "two_images"]


def case_of(cases: Cases, name: str) -> dict[str, object]:
    return next(case for case in cases.index["cases"] if case["id"] == name)


@pytest.mark.parametrize("kind", ["3D", "video_rope"])
def test_rotation(cases: Cases, config: MingConfig, kind: str) -> None:
    if f"rope.{kind}.cos" not in cases:
        pytest.skip(f"these cases have no rotation of kind {kind}; the prompts of that kind cover it")
    positions = torch.from_numpy(cases.array(f"rope.{kind}.position_ids")).unsqueeze(1)
    c = config.llm
    cos, sin = rope.cos_sin(positions, c.rope_theta, kind, c.rope_sections)
    cases.check(f"rope.{kind}.cos", cos[0])
    cases.check(f"rope.{kind}.sin", sin[0])
    q, k = (torch.from_numpy(cases.array(f"rope.{kind}.{part}_in")).unsqueeze(0) for part in "qk")
    q, k = ops.mrope(q, k, positions, c.rope_theta, kind, list(c.rope_sections))
    cases.check(f"rope.{kind}.q_rot", q[0])
    cases.check(f"rope.{kind}.k_rot", k[0])


@torch.no_grad()
def test_routers(cases: Cases, make_llm: MakeLLM) -> None:
    moe = make_llm("3D").layers[0].mlp
    x = torch.from_numpy(cases.array("router.x")).unsqueeze(0)
    modality = torch.from_numpy(cases.array("router.modality")).unsqueeze(0)
    logits = moe.router_logits(x, modality)[0]
    experts, weights = moe.route(logits)
    cases.check("router.logits", logits)
    cases.check("router.expert_ids", experts)
    cases.check("router.expert_weights", weights)
    cases.check("router.moe_out", moe(x, modality)[0])


class Session:
    """One request on a cache of `capacity` places."""

    def __init__(self, model: llm.MingLLM, capacity: int) -> None:
        c = model.config
        self.model, self.capacity, self.length = model, capacity, 0
        self.cache = [torch.zeros(1, c.num_kv_heads, capacity, c.head_dim) for _ in range(2 * c.num_layers)]
        self.no_features = torch.zeros(1, c.hidden_size)

    def step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        features: torch.Tensor | None = None,
        feature_index: torch.Tensor | None = None,
        modality: torch.Tensor | None = None,
    ) -> llm.StepTrace:
        count = len(ids)
        rows = torch.arange(count)
        mask = torch.arange(self.capacity) <= (self.length + rows).unsqueeze(1)
        trace = llm.trace(
            self.model,
            ids.unsqueeze(0),
            self.no_features if features is None else features,
            (torch.full((count,), -1) if feature_index is None else feature_index).unsqueeze(0),
            (torch.zeros(count, dtype=torch.int64) if modality is None else modality).unsqueeze(0),
            positions.unsqueeze(1),
            torch.tensor([self.length]),
            mask[None, None],
            rows.unsqueeze(0),
            *self.cache,
        )
        self.cache = list(trace.outputs[3:])
        self.length += count
        return trace


@pytest.fixture(scope="module")
def features(
    cases: Cases, config: MingConfig, vision_encoder: vision.VisionEncoder, audio_encoder: audio.AudioEncoder
) -> Callable[[str], torch.Tensor]:
    @torch.no_grad()
    def rows(name: str) -> torch.Tensor:
        """Vision rows, then audio rows of a case."""
        parts = [torch.zeros(0, config.llm.hidden_size)]
        for source in case_of(cases, name)["inputs"]:  # type: ignore[attr-defined]
            if source.endswith(".pixel_values"):
                grid = vision_indices(cases.array(source.replace("pixel_values", "grid_thw")), config.vision)
                arrays = {"patches": cases.array(source), **grid}
                parts.append(vision_encoder(*(torch.from_numpy(np.array(arrays[n])) for n in vision.INPUT_NAMES)))
            elif source.endswith(".mel"):
                parts.append(audio_encoder(torch.from_numpy(cases.array(source))))
        return torch.cat(parts)

    return rows


@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("name", LLM_CASES)
def test_prompt_and_greedy_steps(
    cases: Cases,
    config: MingConfig,
    make_llm: MakeLLM,
    features: Callable[[str], torch.Tensor],
    name: str,
    chunk: int | None,
) -> None:
    """Logits and hidden states of the prompt (whole, and in chunks), then 8 greedy steps, token for token."""
    case = f"llm.{name}"
    base = case.removesuffix(".video_rope")
    ids = torch.from_numpy(cases.array(f"{base}.input_ids"))
    positions = torch.from_numpy(cases.array(f"{case}.position_ids"))
    rows = features(case)
    special = (ids == config.tokens.image_patch) | (ids == config.tokens.audio_patch)
    modality = torch.where(ids == config.tokens.image_patch, 1, torch.where(ids == config.tokens.audio_patch, 2, 0))
    # Vision rows precede audio rows, as their patches do in these prompts.
    feature_index = torch.where(special, special.cumsum(0) - 1, -1)
    assert int(special.sum()) == len(rows)
    if len(rows) == 0:
        rows = torch.zeros(1, config.llm.hidden_size)

    session = Session(make_llm("video_rope" if case.endswith("video_rope") else "3D"), len(ids) + 20)
    parts = torch.arange(len(ids)).split(chunk or len(ids))
    traces = [session.step(ids[p], positions[:, p], rows, feature_index[p], modality[p]) for p in parts]
    logits, hidden, embeds = (torch.cat([t.outputs[i] for t in traces], 1)[0] for i in range(3))
    cases.check(f"{case}.prefill_logits", logits)
    cases.check(f"{case}.prefill_hidden", hidden)
    if f"{case}.inputs_embeds" in cases:
        cases.check(f"{case}.inputs_embeds", embeds)
        layers = [torch.cat([t.layer_hidden[i] for t in traces], 1) for i in range(config.llm.num_layers - 1)]
        cases.check(f"{case}.layer_hidden", torch.cat(layers))

    generated = [int(logits[-1].argmax())]
    steps = []
    for position in cases.array(f"{case}.decode_positions").tolist():
        trace = session.step(torch.tensor(generated[-1:]), torch.full((3, 1), position))
        steps.append((trace.outputs[0][0, 0], trace.outputs[1][0, 0]))
        generated.append(int(steps[-1][0].argmax()))
    cases.check(f"{case}.generated_ids", np.array(generated))
    cases.check(f"{case}.decode_logits", torch.stack([logits for logits, _ in steps]))
    cases.check(f"{case}.decode_hidden", torch.stack([hidden for _, hidden in steps]))


@torch.no_grad()
def test_rows_of_a_batch_are_independent(cases: Cases, config: MingConfig, make_llm: MakeLLM) -> None:
    """A decode step of three requests of different lengths gives each what it gets alone (float32 sums in another
    order: 1e-4), whatever lies beyond its length in the cache."""
    model = make_llm("3D")
    ids = torch.from_numpy(cases.array("llm.text.input_ids"))
    lengths, capacity = (5, len(ids) - 1, 1), len(ids) + 2
    alone, sessions = [], []
    for length in lengths:
        session = Session(model, capacity)
        session.step(ids[:length], torch.arange(length).expand(3, -1))
        sessions.append([cache.clone() for cache in session.cache])
        alone.append(session.step(ids[length : length + 1], torch.full((3, 1), length)).outputs)
    index = torch.tensor(lengths)
    mask = (torch.arange(capacity) <= index.unsqueeze(1))[:, None, None, :]
    unused = torch.arange(capacity) >= index.unsqueeze(1)
    caches = [torch.cat(parts).masked_fill(unused[:, None, :, None], 1e4) for parts in zip(*sessions, strict=True)]
    got = model(
        ids[index].unsqueeze(1),
        torch.zeros(1, config.llm.hidden_size),
        torch.full((3, 1), -1),
        torch.zeros(3, 1, dtype=torch.int64),
        index.expand(3, 3).unsqueeze(-1),
        index,
        mask,
        torch.zeros(3, 1, dtype=torch.int64),
        *caches,
    )
    assert [tuple(out.shape) for out in got[:3]] == [
        (3, 1, config.llm.vocab_size),
        *((3, 1, config.llm.hidden_size),) * 2,
    ]
    for row, expected in enumerate(alone):
        for a, b in zip(got[:3], expected[:3], strict=True):
            assert torch.allclose(a[row], b[0], atol=1e-4)
        for a, b in zip(got[3:], expected[3:], strict=True):
            length = lengths[row] + 1
            assert torch.allclose(a[row, :, :length], b[0, :, :length], atol=1e-4)


@torch.no_grad()
def test_logits_only_where_asked(cases: Cases, config: MingConfig, make_llm: MakeLLM) -> None:
    model = make_llm("3D")
    ids = torch.from_numpy(cases.array("llm.text.input_ids")[:6]).unsqueeze(0)
    session = Session(model, 6)
    rows = torch.arange(6)
    common = (
        torch.zeros(1, config.llm.hidden_size),
        torch.full_like(ids, -1),
        torch.zeros_like(ids),
        rows.expand(3, 1, 6),
        torch.tensor([0]),
        (rows <= rows.unsqueeze(1))[None, None],
    )
    every = model(ids, *common, rows.unsqueeze(0), *session.cache)[0]
    some = model(ids, *common, torch.tensor([[5, 0]]), *session.cache)[0]
    assert torch.allclose(some, every[:, [5, 0]], atol=1e-5)


def test_names_match_the_signature(config: MingConfig) -> None:
    assert len(llm.input_names(config.llm)) == 8 + 2 * config.llm.num_layers
    assert llm.output_names(config.llm)[:5] == ["logits", "hidden", "embeds", "present_key_0", "present_value_0"]
