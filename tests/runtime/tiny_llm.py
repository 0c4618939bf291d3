"""A small `llm` engine for tests: the tensors of docs/DESIGN.md 4.1, and its twin in NumPy without a cache.

Two layers of attention, so that what is in the cache decides the next token; positions, modality and features enter the
first layer. A prompt whose features hold a NaN gets NaN logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

V, H, HEADS, KV, D, LAYERS = 97, 32, 4, 2, 8, 2
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
CACHE = ["B", KV, "T", D]
INPUTS = {
    "input_ids": (INT, ["B", "S"]),
    "features": (FLOAT, ["R", H]),
    "feature_index": (INT, ["B", "S"]),
    "modality": (INT, ["B", "S"]),
    "position_ids": (INT, [3, "B", "S"]),
    "write_index": (INT, ["B"]),
    "attention_mask": (BOOL, ["B", 1, "S", "T"]),
    "logit_index": (INT, ["B", "K"]),
    **{f"past_{part}_{i}": (FLOAT, CACHE) for i in range(LAYERS) for part in ("key", "value")},
}
OUTPUTS = {
    "logits": (FLOAT, ["B", "K", V]),
    "hidden": (FLOAT, ["B", "S", H]),
    "embeds": (FLOAT, ["B", "S", H]),
    **{f"present_{part}_{i}": (FLOAT, CACHE) for i in range(LAYERS) for part in ("key", "value")},
}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The engine's matrices, f32."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 2.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale / np.sqrt(rows)).astype(np.float32)

    made = {"embedding": matrix(V, H, 12.0), "kinds": matrix(3, H, 2.5), "axes": matrix(3, H, 3.0)}
    for i in range(LAYERS):
        made |= {f"q{i}": matrix(H, HEADS * D), f"k{i}": matrix(H, KV * D), f"v{i}": matrix(H, KV * D)}
        made |= {f"o{i}": matrix(HEADS * D, H, 6.0)}
    return made | {"head": matrix(H, V, 3.0)}


def write(path: Path, seed: int = 0) -> Path:
    """Writes the engine's ONNX file."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = weights(seed)

    def constant(value: object, dtype: type = np.int64) -> str:
        constants[f"constant{len(constants)}"] = np.array(value, dtype)
        return list(constants)[-1]

    def op(kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def heads(x: str, count: int) -> str:
        return op("Transpose", op("Reshape", x, constant([0, 0, count, D])), perm=[0, 2, 1, 3])

    zero, last = constant(0), constant([-1])
    by_row = op("Gather", "features", op("Max", "feature_index", zero))
    is_row = op("Unsqueeze", op("GreaterOrEqual", "feature_index", zero), last)
    chosen = op("Where", is_row, by_row, op("Gather", "embedding", "input_ids"))
    places = op("Transpose", op("Cast", "position_ids", to=FLOAT), perm=[1, 2, 0])
    turned = op("Mul", op("Sin", op("MatMul", places, "axes")), constant(2, np.float32))
    mixed = op("Add", op("Add", chosen, op("Gather", "kinds", "modality")), turned)
    x = op("Identity", mixed, name="embeds")
    for i in range(LAYERS):
        normed = op("Tanh", x)
        key = op(
            "TensorScatter",
            f"past_key_{i}",
            heads(op("MatMul", normed, f"k{i}"), KV),
            "write_index",
            name=f"present_key_{i}",
        )
        value = op(
            "TensorScatter",
            f"past_value_{i}",
            heads(op("MatMul", normed, f"v{i}"), KV),
            "write_index",
            name=f"present_value_{i}",
        )
        seen = op("Attention", heads(op("MatMul", normed, f"q{i}"), HEADS), key, value, "attention_mask")
        flat = op("Reshape", op("Transpose", seen, perm=[0, 2, 1, 3]), constant([0, 0, HEADS * D]))
        x = op("Add", x, op("MatMul", flat, f"o{i}"))
    op("Tanh", x, name="hidden")
    wanted = op("GatherND", "hidden", op("Unsqueeze", "logit_index", last), batch_dims=1)
    op("MatMul", wanted, "head", name="logits")
    graph = helper.make_graph(
        nodes,
        "tiny_llm",
        [helper.make_tensor_value_info(name, *spec) for name, spec in INPUTS.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in OUTPUTS.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def forward(
    ids: Sequence[int],
    modality: Sequence[int] | None = None,
    positions: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    index: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [L, V], hidden [L, H] and embeds [L, H] of a whole sequence, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights(seed).items()}
    length = len(ids)
    kinds = np.zeros(length, int) if modality is None else np.asarray(modality)
    places = np.tile(np.arange(length), (3, 1)) if positions is None else positions
    chosen = w["embedding"][list(ids)]
    if index is not None:
        use = np.asarray(index) >= 0
        chosen[use] = rows[np.asarray(index)[use]]
    x = embeds = chosen + w["kinds"][kinds] + 2 * np.sin(places.T.astype(np.float64) @ w["axes"])
    causal = np.tril(np.ones((length, length), bool))
    for i in range(LAYERS):
        normed = np.tanh(x)
        q = (normed @ w[f"q{i}"]).reshape(length, HEADS, D).transpose(1, 0, 2)
        k, v = (
            np.repeat((normed @ w[f"{part}{i}"]).reshape(length, KV, D).transpose(1, 0, 2), HEADS // KV, axis=0)
            for part in "kv"
        )
        scores = np.where(causal, q @ k.transpose(0, 2, 1) / np.sqrt(D), -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        seen = share / share.sum(-1, keepdims=True) @ v
        x = x + seen.transpose(1, 0, 2).reshape(length, HEADS * D) @ w[f"o{i}"]
    hidden = np.tanh(x)
    return hidden @ w["head"], hidden, embeds


def greedy(prompt: Sequence[int], count: int, delta: int = 0, **prompt_arrays: object) -> list[int]:
    """The answer of `count` tokens that the engine must give, each from the whole sequence anew."""
    arrays = {name: np.asarray(value) for name, value in prompt_arrays.items()}
    ids = list(prompt)
    for _ in range(count):
        more = len(ids) - len(prompt)
        full = dict(arrays)
        if "modality" in full:
            full["modality"] = np.concatenate([full["modality"], np.zeros(more, int)])
        if "index" in full:
            full["index"] = np.concatenate([full["index"], np.full(more, -1)])
        places = full.get("positions", np.tile(np.arange(len(prompt)), (3, 1)))
        full["positions"] = np.concatenate([places, np.tile(np.arange(len(prompt), len(ids)) + delta, (3, 1))], axis=1)
        ids.append(int(np.argmax(forward(ids, **full)[0][-1])))
    return ids[len(prompt) :]
