"""The gate of `llm-checkpoint`: what was written, read back, against the torch definition with the official tensors.

For the first and the last layer: every product of the engine's layer against the same input times the official
matrix (per expert; ranks put together), and attention and experts as a whole against the torch modules. Inputs are
embeddings of drawn ids with unit rows for media. Weights are in memory for one module at a time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from builders.calibration_samples import SYNTHETIC, Source, load
from builders.trtllm_layout import LAYER, Kind, Matrix, Parallel, layout
from builders.trtllm_numpy import NumpyEngine
from builders.verify import ComponentReport, OutputReport, compare
from ming_trt.bundle import FAILED, PASSED
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig
from ming_trt.models.llm import DecoderLayer, weight_map
from ming_trt.presets import Thresholds
from ming_trt.trtllm.contract import check_checkpoint
from ming_trt.trtllm.rope_table import rope_table

Floats = npt.NDArray[np.float32]
# One FP8 product with per-tensor scales: 25 dB is 5.6 % of error.
LINEAR_SQNR_DB = 25.0


def verify(folder: Path, config: MingConfig, checkpoint: Checkpoint, thresholds: Thresholds) -> ComponentReport:
    """Reads the checkpoint in `folder` back. Thresholds are those of whole blocks; an FP8 product needs 25 dB.

    Before that the network definition must ask for just these weights (`ming_trt.trtllm.contract`).
    """
    problems = check_checkpoint(folder)
    if problems:
        return ComponentReport(FAILED, (), thresholds, problems[0])
    check = _Check(folder, config, checkpoint, thresholds)
    for layer in sorted({0, config.llm.num_layers - 1}):
        check.layer(layer)
    verdict = PASSED if all(report.verdict == PASSED for report in check.reports) else FAILED
    return ComponentReport(verdict, tuple(check.reports), thresholds)


class _Check:
    def __init__(self, folder: Path, config: MingConfig, checkpoint: Checkpoint, thresholds: Thresholds) -> None:
        self.llm, self.checkpoint, self.thresholds = config.llm, checkpoint, thresholds
        self.linear_thresholds = replace(thresholds, min_sqnr_db=max(thresholds.min_sqnr_db, LINEAR_SQNR_DB))
        self.reports: list[OutputReport] = []
        self.engine = NumpyEngine(folder, tap=self._tap)
        self.sample = load(Source(SYNTHETIC, ""), config, checkpoint)[0]
        whole = layout(config.llm, Parallel(1, 1))
        self.matrices = {
            (m.module, -1 if m.expert is None else m.expert): m
            for module in whole.modules
            if module.kind is Kind.LINEAR
            for m in module.matrices
        }
        self.parts: dict[tuple[str, int], list[tuple[int, Floats, Floats]]] = {}

    @torch.inference_mode()
    def layer(self, index: int) -> None:
        c, sources, prefix = self.llm, weight_map(self.llm), f"layers.{index}."
        sample, length = self.sample, len(self.sample.embeds)
        with torch.device("meta"):
            layer = DecoderLayer(c)
        for name, _ in list(layer.named_parameters()):
            if name not in ("mlp.gate_up", "mlp.down"):
                owner, _, leaf = name.rpartition(".")
                value = torch.nn.Parameter(sources[prefix + name].load(self.checkpoint, torch.float32), False)
                setattr(layer.get_submodule(owner), leaf, value)
        normed = layer.input_layernorm(sample.embeds)
        table = rope_table(c, sample.positions.numpy(), 0, length)
        got = self.engine.attention(index, normed.numpy(), table)
        cache = torch.zeros(1, c.num_kv_heads, length, c.head_dim)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        start = torch.zeros(1, dtype=torch.long)
        expected, _, _ = layer.attention(normed[None], sample.positions[:, None], start, mask, cache, cache)
        self._block(f"layer {index} attention", got, expected[0].numpy())
        normed = layer.post_attention_layernorm(sample.embeds + expected[0])
        got = self.engine.moe(index, normed.numpy(), sample.modality.numpy())
        self._block(f"layer {index} experts", got, self._experts(index, layer, normed).numpy())
        self._linears(LAYER.format(index))

    def _experts(self, index: int, layer: DecoderLayer, x: torch.Tensor) -> torch.Tensor:
        """The torch definition's mixture, with one expert's matrices in memory."""
        experts, weights = layer.mlp.route(layer.mlp.router_logits(x, self.sample.modality))
        total = layer.mlp.shared_experts(x)
        for e in range(self.llm.num_experts):
            token, place = (experts == e).nonzero(as_tuple=True)
            if len(token):
                up, gate = functional.linear(x[token], self._official(f"{LAYER.format(index)}mlp.fc", e)).chunk(2, -1)
                down = self._official(f"{LAYER.format(index)}mlp.proj", e)
                out = functional.linear(functional.silu(gate) * up, down)
                total.index_add_(0, token, out * weights[token, place].unsqueeze(-1))
        return total

    def _official(self, module: str, expert: int) -> torch.Tensor:
        matrix = self.matrices[module, expert]
        return torch.cat([self.checkpoint.read(name).float() for name in matrix.sources])

    def _block(self, name: str, got: Floats, expected: Floats) -> None:
        self.reports.append(compare(name, got, expected, self.thresholds))

    def _tap(self, module: str, expert: int, rank: int, x: Floats, y: Floats) -> None:
        if (module, expert) in self.matrices:
            self.parts.setdefault((module, expert), []).append((rank, x, y))

    def _linears(self, prefix: str) -> None:
        """One report a module; of a stack the worst expert."""
        worst: dict[str, OutputReport] = {}
        for (module, expert), parts in self.parts.items():
            matrix = self.matrices[module, expert]
            weight = self._official(module, expert).numpy()
            name = module.removeprefix("transformer.") + ("" if expert < 0 else f" (expert {expert})")
            report = self._linear(name, matrix, weight, parts)
            if module not in worst or report.sqnr_db < worst[module].sqnr_db:
                worst[module] = report
        self.reports += worst.values()
        self.parts.clear()

    def _linear(
        self, name: str, matrix: Matrix, weight: Floats, parts: list[tuple[int, Floats, Floats]]
    ) -> OutputReport:
        """Ranks put together: their columns of the output, or the sum where the input is split."""
        spread = Parallel(self.engine.mapping["tp_size"], self.engine.mapping["moe_ep_size"])
        blocks = next(
            m.blocks
            for module in layout(self.llm, spread).modules
            if module.name == matrix.module
            for m in module.matrices
            if m.expert == matrix.expert
        )
        got, expected = [], []
        for rank, x, y in parts:
            block = blocks[rank]
            rows = np.concatenate([weight[a:b] for a, b in block.rows])[:, slice(*block.columns)]
            got.append(y)
            expected.append(x @ rows.T)
        return compare(name, np.concatenate(got, axis=-1), np.concatenate(expected, axis=-1), self.linear_thresholds)
