"""Times the CUDA kernels on this machine's GPU, beside what the card can do at most and beside torch.

    python benchmarks/gpu_kernels.py -o benchmarks/results/kernels-h200.json

Needs torch, pytest, nvcc and g++; nothing else of the project. First it measures two ceilings: bytes per second of a
large copy, and FLOP per second of a large bf16 matrix product. For each kernel and size it prints microseconds, the
floor (the larger of bytes / copy rate and FLOP / product rate), the share of the floor that is reached, and torch eager
and torch.compile on the same inputs. Each figure is the median over replays of a CUDA graph that goes through several
sets of inputs, so that no set is still in the cache when its turn comes. Bytes are counted as what must move: inputs
once, outputs once, and of the experts' weights those that were chosen.

It does not measure launch overhead outside graphs, other dtypes than bfloat16, or several GPUs. The last line of stdout
is the JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tests.gpu import gpu
from tests.plugins import binding, calls, reference

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6
HEADS, KV_HEADS, HEAD_DIM, THETA = 16, 4, 128, 600000.0
SECTIONS = (16, 24, 24)
DTYPE = torch.bfloat16
Run = Callable[[], object]


@dataclass
class Row:
    """One kernel at one size. Times in microseconds; `share` is floor / time, of 1."""

    kernel: str
    size: str
    time: float
    floor: float
    share: float
    bound: str
    bytes: int
    flop: int
    eager: float | None = None
    compiled: float | None = None
    error: float | None = None
    notes: list[str] = field(default_factory=list)


def replay_time(runs: Sequence[Run], replays: int) -> float:
    """Median microseconds of one run, by events around replays of a graph that holds all of `runs`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times) * 1e3 / len(runs)


def stream_time(runs: Sequence[Run], rounds: int) -> float:
    """The same without a graph, for code that cannot be captured (it reads the device on its way)."""
    for run in runs:
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for run in runs:
            run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6 / len(runs)


def copy_rate() -> float:
    """Bytes per second, read plus written, of a copy of 2 GiB."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_time([lambda: target.copy_(source)], 20) * 1e6


def product_rate() -> float:
    """FLOP per second of an 8192 x 8192 x 8192 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / replay_time([lambda: torch.mm(a, b, out=out)], 20) * 1e6


def eager_rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inverse: torch.Tensor, axes: torch.Tensor):
    """The rotation as a model writes it in torch."""
    angle = positions.float().index_select(0, axes).permute(1, 2, 0).unsqueeze(1) * inverse
    cos, sin = angle.cos(), angle.sin()

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.float().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    return turned(q), turned(k)


def eager_moe(moe: calls.Moe) -> torch.Tensor:
    """The experts one after another, as a model writes it in torch; it waits for the device to know who was chosen."""
    weight, expert = moe.logits.float().softmax(-1).topk(moe.top_k)
    weight = weight / weight.sum(-1, keepdim=True)
    total = torch.zeros(moe.x.shape, dtype=torch.float32, device="cuda")
    for e in expert.unique().tolist():
        token, place = (expert == e).nonzero(as_tuple=True)
        gate, up = (moe.x[token] @ moe.gate_up[e].T).chunk(2, dim=-1)
        out = (torch.nn.functional.silu(gate) * up) @ moe.down[e].T
        total.index_add_(0, token, out.float() * weight[token, place].unsqueeze(-1))
    return total.to(moe.x.dtype)


def gathered_moe(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """For few tokens: weights gathered per choice, batched products. Its shapes are static."""
    weight, expert = logits.float().softmax(-1).topk(TOP_K)
    weight = weight / weight.sum(-1, keepdim=True)
    both = torch.einsum("nkih,nh->nki", gate_up[expert], x)
    gate, up = both.chunk(2, dim=-1)
    out = torch.einsum("nkhi,nki->nkh", down[expert], torch.nn.functional.silu(gate) * up)
    return (out.float() * weight.unsqueeze(-1)).sum(1).to(x.dtype)


def grouped_moe(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """For many tokens: sorted by expert, torch's own grouped product."""
    weight, expert = logits.float().softmax(-1).topk(TOP_K)
    weight = weight / weight.sum(-1, keepdim=True)
    order = expert.flatten().argsort(stable=True)
    # torch.bincount would wait for the device, which a graph cannot hold.
    counts = (expert.flatten() == torch.arange(EXPERTS, device=x.device).unsqueeze(1)).sum(1)
    ends = counts.cumsum(0).int()
    both = torch._grouped_mm(x[order // TOP_K], gate_up.transpose(1, 2), offs=ends)
    gate, up = both.chunk(2, dim=-1)
    out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(out)
    back[order] = out
    return (back.view(-1, TOP_K, HIDDEN).float() * weight.unsqueeze(-1)).sum(1).to(x.dtype)


class Bench:
    def __init__(self, replays: int, torch_too: bool) -> None:
        self.replays, self.torch_too = replays, torch_too
        self.rows: list[Row] = []
        self.copy_rate, self.product_rate = copy_rate(), product_rate()

    def add(self, kernel: str, size: str, time_us: float, moved: int, flop: int) -> Row:
        by_bytes, by_flop = moved / self.copy_rate * 1e6, flop / self.product_rate * 1e6
        floor, bound = max((by_bytes, "bytes"), (by_flop, "flop"))
        row = Row(kernel, size, time_us, floor, floor / time_us, bound, moved, flop)
        self.rows.append(row)
        return row

    def try_torch(self, row: Row, name: str, measure: Callable[[], float]) -> None:
        """Fills `row.name`; what torch cannot do is noted with its reason and not measured."""
        if not self.torch_too:
            return
        try:
            setattr(row, name, measure())
        except (RuntimeError, AttributeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
            row.notes.append(f"{name}: {str(error).splitlines()[0][:120]}")

    def rope(self, batch: int, tokens: int) -> None:
        library = gpu.library("mrope")
        axes = reference.frequency_axes(reference.THREE_D, SECTIONS)
        moved = 2 * 2 * batch * tokens * (HEADS + KV_HEADS) * HEAD_DIM + 3 * 8 * batch * tokens
        sets = max(2, min(64, 2**28 // moved))
        ours, eager, compiled = [], [], []
        compiled_rope = torch.compile(eager_rope, dynamic=False)
        for _ in range(sets):
            q, k = (torch.randn(batch, n, tokens, HEAD_DIM, device="cuda").to(DTYPE) for n in (HEADS, KV_HEADS))
            positions = torch.randint(0, 9000, (3, batch, tokens), device="cuda")
            rope = calls.Rope(q, k, positions, axes, THETA)
            q_out, k_out = torch.empty_like(q), torch.empty_like(k)
            call, axes_argument = rope.call(q_out, k_out)

            def run(call=call, axes_argument=axes_argument, keep=(rope, q_out, k_out)) -> None:
                status = library.ming_mrope(ctypes.byref(call), axes_argument, len(axes), THETA, gpu.stream())
                calls.check(status)

            on_device = (rope.inverse(), torch.tensor(axes, device="cuda"))
            ours.append(run)
            eager.append(lambda q=q, k=k, p=positions, rest=on_device: eager_rope(q, k, p, *rest))
            compiled.append(lambda q=q, k=k, p=positions, rest=on_device: compiled_rope(q, k, p, *rest))
        row = self.add("mrope", f"{batch}x{tokens}", replay_time(ours, self.replays), moved, 0)
        self.try_torch(row, "eager", lambda: replay_time(eager, self.replays))
        self.try_torch(row, "compiled", lambda: replay_time(compiled, self.replays))

    def moe(self, tokens: int, path: int, name: str, fp8: bool = False) -> None:
        library = gpu.library("moe")
        base = calls.random_moe(tokens, HIDDEN, WIDTH, EXPERTS, TOP_K, seed=tokens, device="cuda")
        base = base.in_fp8() if fp8 else base
        size = library.ming_moe_workspace(tokens, HIDDEN, WIDTH, EXPERTS, TOP_K)
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        ours, cases, chosen = [], [], []
        for seed in range(8):
            fresh = calls.random_moe(tokens, HIDDEN, 8, EXPERTS, TOP_K, seed=seed, device="cuda")
            moe = replace(base, x=fresh.x, logits=fresh.logits)
            y = torch.empty_like(moe.x)
            call = moe.call(y, workspace, path)
            ours.append(
                lambda call=call, keep=(moe, y): calls.check(library.ming_moe(ctypes.byref(call), gpu.stream()))
            )
            cases.append(moe)
            chosen.append(len(reference.route(moe.logits, TOP_K, True)[0].unique()))
        per_expert = 3 * HIDDEN * WIDTH
        weight_bytes = base.gate_up.element_size()
        moved = int(
            weight_bytes * per_expert * statistics.mean(chosen) + 2 * 2 * tokens * HIDDEN + 2 * tokens * EXPERTS
        )
        flop = 2 * per_expert * tokens * TOP_K
        row = self.add(name, f"{tokens} tokens", replay_time(ours, self.replays), moved, flop)
        row.notes.append(f"{statistics.mean(chosen):.1f} of {EXPERTS} experts chosen")
        y = cases[0].run(library, path, gpu.stream())
        row.error = calls.relative_error(y, cases[0].expected())
        if fp8:
            row.notes.append("FP8: the floor counts products at the rate of bf16; torch is not compared")
            return
        function = gathered_moe if tokens <= binding.MAX_DECODE_TOKENS else grouped_moe
        inputs = [(m.x, m.logits, m.gate_up, m.down) for m in cases]
        self.try_torch(row, "eager", lambda: stream_time([lambda m=m: eager_moe(m) for m in cases], 5))
        best = torch.compile(function, dynamic=False)
        self.try_torch(row, "compiled", lambda: replay_time([lambda i=i: best(*i) for i in inputs], self.replays))


def table(bench: Bench) -> str:
    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        f"copy {bench.copy_rate / 1e12:.2f} TB/s, bf16 product {bench.product_rate / 1e12:.0f} TFLOP/s",
        f"{'kernel':18} {'size':12} {'us':>9} {'floor us':>9} {'share':>6} {'bound':>6} {'eager us':>10} "
        f"{'compiled us':>11} {'error':>8}",
    ]
    for r in bench.rows:
        error = "-" if r.error is None else f"{r.error:.1e}"
        lines.append(
            f"{r.kernel:18} {r.size:12} {r.time:9.1f} {r.floor:9.1f} {r.share:6.0%} {r.bound:>6} {number(r.eager):>10} "
            f"{number(r.compiled):>11} {error:>8}"
        )
        lines += [f"    {note}" for note in r.notes]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--replays", type=int, default=50, help="timed replays of each graph (default 50)")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch eager and torch.compile")
    options = parser.parse_args()
    if gpu.REASON:
        print(f"nothing is measured: {gpu.REASON}", file=sys.stderr)
        return 1
    bench = Bench(options.replays, not options.no_torch)
    for batch, tokens in ((1, 1), (8, 1), (1, 2048), (1, 8192), (8, 2048)):
        bench.rope(batch, tokens)
    for tokens in (1, 2, 4, 8, 16):
        bench.moe(tokens, binding.DECODE, "moe decode")
    for tokens in (64, 256, 1024, 2048, 4096):
        bench.moe(tokens, binding.PREFILL, "moe prefill")
    bench.moe(2048, binding.PREFILL_PORTABLE, "moe portable")
    if gpu.capability() >= (8, 9):
        for tokens in (1, 8, 2048):
            bench.moe(tokens, binding.AUTOMATIC, "moe fp8", fp8=True)
    print(table(bench))
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "architecture": gpu.architecture(),
        "copy_bytes_per_second": bench.copy_rate,
        "product_flop_per_second": bench.product_rate,
        "rows": [asdict(row) for row in bench.rows],
    }
    text = json.dumps(result)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
