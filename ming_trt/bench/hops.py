"""Where the time of a request goes: rows that add up to its end-to-end time.

Two clocks are read, each for what it alone can see. Triton's statistics tell, per model, how long requests waited,
how long inputs were copied in, the model computed, and outputs were copied out. The language model streams, so
Triton sees only that it took the request over; its own clock tells queue, prefill and decoding, and comes with
every answer. What the server's total has beyond its stages is Triton's scheduling and the python stubs; what the
client's total has beyond the server's is the network, the client and HTTP/2.

Rows are means over a phase. The stages are one after the other, but for the encoders, which run side by side: only
the slower one is on the path. Text leaves while it is decoded, so only the last response's `postprocess` counts.
Drawing and speaking are called from there and stream: Triton sees only that they took a request over. Their own clocks
tell the parts of a drawing, and of the time from the last text to the last sound; speaking before that goes on beside
the text. What is left (waiting, messages, the file of the picture) is what the server took beyond the other rows,
scheduling included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ming_trt.bench.samples import Sample
from ming_trt.bench.server import PARTS, ModelCount
from ming_trt.serving.graph import ENSEMBLE

# Rows may miss the end-to-end time by this much of it.
TOLERANCE = 0.05
ENCODERS = ("vision_encoder", "audio_encoder")
_LABELS = {"queue": "queue", "compute_input": "input", "compute_infer": "compute", "compute_output": "output"}
CLIENT, REST = "client and network", "scheduling and python"


@dataclass(frozen=True, slots=True)
class Row:
    """Mean milliseconds that `part` of `hop` adds to a request. `first`: also before its first token."""

    hop: str
    part: str
    ms: float
    first: bool = True


@dataclass(frozen=True, slots=True)
class Accounting:
    """Rows that add up to `total` ms within `TOLERANCE` if `closes`; `beside`: work that ran at the same time as
    something slower, ms. `note` says why an accounting is not to be trusted, or nothing."""

    rows: tuple[Row, ...]
    total: float
    beside: Mapping[str, float]
    note: str = ""

    @property
    def sum(self) -> float:
        return sum(row.ms for row in self.rows)

    @property
    def closes(self) -> bool:
        return self.total > 0 and abs(self.sum - self.total) <= TOLERANCE * self.total

    def by_hop(self) -> dict[str, float]:
        """Milliseconds per hop, in the order of the path."""
        hops: dict[str, float] = {}
        for row in self.rows:
            hops[row.hop] = hops.get(row.hop, 0.0) + row.ms
        return hops

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "total_ms": self.total,
            "sum_ms": self.sum,
            "closes": self.closes,
            "beside_ms": dict(self.beside),
            "note": self.note,
        }


def account(samples: Sequence[Sample], counts: Mapping[str, ModelCount]) -> Accounting | None:
    """The accounting of one phase; None if no request succeeded.

    `samples`: its requests; `counts`: what Triton counted meanwhile.
    """
    good = [sample for sample in samples if sample.ok]
    if not good:
        return None
    total = 1000 * fmean(sample.seconds for sample in good)
    # A request of an open loop that starts late waits in the client: that is not the network's fault.
    late = 1000 * fmean(sample.late for sample in good)
    server = _mean(counts.get(ENSEMBLE, ModelCount()))
    encoders = {name: sum(_parts(counts.get(name, ModelCount())).values()) for name in ENCODERS}
    slow = max(encoders, key=encoders.__getitem__)
    rows = [Row("client", "started late", late)] if late >= 0.001 * total else []
    rows += _stage("preprocess", counts) + _stage(slow, counts)
    llm = _parts(counts.get("llm", ModelCount()))
    rows += [Row("llm", "input", llm["queue"] + llm["compute_input"])]
    rows += [Row("llm", name, 1000 * fmean(s.engine.get(name, 0.0) for s in good)) for name in ("queue", "prefill")]
    rows += [Row("llm", "decode", 1000 * fmean(s.engine.get("decode", 0.0) for s in good), first=False)]
    rows += _stage("postprocess", counts)
    after = sorted(
        name for name, count in counts.items() if count.succeeded and name not in (*_CHAIN, ENSEMBLE, "cancel")
    )
    for name, part in dict.fromkeys((s.called[0], part) for s in good for part in s.called[1]):
        taken = sum(s.called[1].get(part, 0.0) for s in good if s.called[0] == name)
        rows.append(Row(name, part, 1000 * taken / len(good), first=False))
    known = sum(row.ms for row in rows if row.hop != "client")
    rest = server - known
    # Two clocks of means can cross by a little: what is below nothing shows in the sum and not as a negative row.
    rows += [
        Row(" + ".join(after), "by difference", max(0.0, rest), first=False) if after else Row(REST, "", max(0.0, rest))
    ]
    rows += [Row(CLIENT, "", max(0.0, total - late - server))]
    beside = {name: ms for name, ms in encoders.items() if name != slow and ms > 0}
    return Accounting(tuple(rows), total, beside, _note(good, samples, counts))


_CHAIN = ("preprocess", *ENCODERS, "llm", "postprocess")


def _stage(name: str, counts: Mapping[str, ModelCount]) -> list[Row]:
    parts = _parts(counts.get(name, ModelCount()))
    return [Row(name, _LABELS[part], parts[part]) for part in PARTS]


def _parts(count: ModelCount) -> dict[str, float]:
    """Milliseconds per request by part. Between the parts Triton's own bookkeeping takes some time, which is the
    stage's: it goes to `queue`, where it is spent."""
    if not count.succeeded:
        return dict.fromkeys(PARTS, 0.0)
    parts = {part: 1000 * count.parts[part] / count.succeeded for part in PARTS}
    parts["queue"] += max(0.0, _mean(count) - sum(parts.values()))
    return parts


def _mean(count: ModelCount) -> float:
    return 1000 * count.total / count.succeeded if count.succeeded else 0.0


def _note(good: Sequence[Sample], samples: Sequence[Sample], counts: Mapping[str, ModelCount]) -> str:
    seen = counts.get(ENSEMBLE, ModelCount())
    if seen.succeeded + seen.failed > len(samples):
        return (
            f"the server counted {seen.succeeded + seen.failed} requests and {len(samples)} were ours: others used it"
        )
    if len(good) < len(samples):
        return f"{len(samples) - len(good)} requests failed; the stages' means include what they did for them"
    return ""
