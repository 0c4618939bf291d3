"""Decoding of several requests in one step against one request: tokens per second of all together.

Beside each figure stands what the model's own arithmetic allows: more tokens choose more experts, so more weights are
read, and a step that is bound by reading them cannot take as long as a step of one token. The projection to the
official vocabulary is read once for all; rows that include it add what it took in the same rounds.

    python benchmarks/batch_scaling.py [--threads N] [--seconds S]
"""

from __future__ import annotations

from collections.abc import Mapping

from harness import (
    READ_BYTES,
    Measurement,
    Row,
    Work,
    arguments,
    cores,
    finish,
    interleave,
    measure_ceiling,
    reader,
    same_memory,
)
from llm_step import OurStep, head_bytes, head_engines, step_inputs
from random_model import config, engine_file

from builders.llm import LLM
from ming_trt.bench.stats import ratio_of_medians
from ming_trt.models.cost import llm_step

BATCHES = (1, 2, 4, 8)
TARGETS = {4: 2.0}


def main() -> None:
    options = arguments(str(__doc__), past={"type": int, "default": 512, "help": "tokens in the cache"})
    threads, model = cores(options.threads), config(options.tiny)
    past = 32 if options.tiny else options.past
    ceiling, rows = measure_ceiling(threads), list[Row]()
    heads = head_engines(options.tiny, threads)
    for precision in ("int8", "int4"):
        engine = OurStep(engine_file(LLM(), model, precision), threads)
        steps: dict[str, Work] = {"reading": reader(threads)}
        for batch in BATCHES:
            steps[f"batch {batch}"] = engine.step(step_inputs(model.llm, 1, past, batch, past + 128))
            for name, (head, llm) in heads.items():
                steps[f"{name} {batch}"] = head.step(step_inputs(llm, 1, 8, batch, 64))
        times = interleave(steps, options.seconds / 2, repeats=5)
        engine.close()
        bandwidth = READ_BYTES / times["reading"].median
        sizes = {batch: llm_step(model.llm, 1, past, batch, logits=0).bytes(precision) for batch in BATCHES}
        layers = {batch: times[f"batch {batch}"] for batch in BATCHES}
        rows += _rows(precision, layers, sizes, bandwidth, options.tiny)
        whole = {b: _with_head(layers[b], times[f"wide {b}"], times[f"narrow {b}"]) for b in BATCHES}
        more = head_bytes(options.tiny)
        sizes = {batch: size + more for batch, size in sizes.items()}
        rows += _rows(f"{precision}, vocabulary included", whole, sizes, bandwidth, options.tiny)
    finish("batch_scaling", rows, options, ceiling, "ratio: tokens per second of all / those of one request alone")


def _with_head(layers: Measurement, wide: Measurement, narrow: Measurement) -> Measurement:
    """What the layers and the projection took in the same round, one after the other."""
    taken = zip(layers.seconds, wide.seconds, narrow.seconds, strict=True)
    return Measurement(layers.name, tuple(step + wide - narrow for step, wide, narrow in taken))


def _rows(
    what: str, times: Mapping[int, Measurement], sizes: Mapping[int, float], bandwidth: float, tiny: bool
) -> list[Row]:
    """A row for each batch against one request; `times` and `sizes` (bytes read by a step) by batch."""
    rows, one = [], times[1]
    for batch, ours in times.items():
        if batch == 1:
            continue
        ratio = ratio_of_medians(ours.seconds, [batch * value for value in one.seconds])
        rows.append(
            Row(
                f"{batch} at once, {what}",
                1000 * ours.median,
                "batch 1",
                1000 * one.median,
                ratio.value,
                ratio.low,
                ratio.high,
                0 if tiny else TARGETS.get(batch, 0),
                spread={"ours": ours.spread, "peer": one.spread},
                more={
                    "tokens_per_s": batch / ours.median,
                    "allowed_by_reading": batch * sizes[1] / sizes[batch],
                    "MBU": sizes[batch] / ours.median / bandwidth,
                    "MBU_batch_1": sizes[1] / one.median / bandwidth,
                    "read_GB_per_s": bandwidth / 1e9,
                },
            )
        )
    return rows


if __name__ == "__main__":
    same_memory()
    main()
