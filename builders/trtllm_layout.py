"""Names, shapes and places of a TensorRT-LLM 1.2.1 checkpoint of the language model, before any weight is read.

A rank file holds *modules* (`transformer.layers.0.mlp.fc`), each made of one matrix or of a stack of experts. A
`Matrix` says which official tensors it comes from, stacked on rows, and which *block* of it each rank holds, so that a
reader needs no other rule: copy the row ranges, cut the columns. Conventions (TensorRT-LLM 1.2.1, `layers/moe.py`,
`layers/mlp.py`, `layers/attention.py`, `mapping.py`):

* `fc` of experts and of the shared expert has the rows of `up_proj` first, then those of `gate_proj`.
* Attention and the shared expert are split over all ranks. The experts are split over the same ranks:
  tp_size = moe_tp_size * moe_ep_size, expert rank = rank % moe_ep_size, slice of an expert = rank // moe_ep_size.
* With more ranks than key/value heads each head lies on several ranks.
* The head's rows are padded with zeros to a multiple of the ranks; routers are float32 and whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ming_trt.config import LLMConfig
from ming_trt.errors import BuildError

Range = tuple[int, int]
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = ".weight", ".weights_scaling_factor", ".activation_scaling_factor"
KV_SCALE = "attention.kv_cache_scaling_factor"
LAYER = "transformer.layers.{}."


class Kind(Enum):
    """How a matrix is stored: `PLAIN` in the model's type, `ROUTER` in float32, `LINEAR` in FP8 where asked for."""

    PLAIN = "plain"
    ROUTER = "router"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class Parallel:
    """How the model is spread: `ranks` GPUs; the experts in `expert` groups, and each expert cut in `expert_slices`."""

    ranks: int
    expert: int

    @property
    def expert_slices(self) -> int:
        return self.ranks // self.expert

    def expert_rank(self, rank: int) -> int:
        return rank % self.expert

    def expert_slice(self, rank: int) -> int:
        return rank // self.expert

    def mapping(self) -> dict[str, int]:
        """The `mapping` of the checkpoint's config.json."""
        return {
            "world_size": self.ranks,
            "tp_size": self.ranks,
            "pp_size": 1,
            "moe_tp_size": self.expert_slices,
            "moe_ep_size": self.expert,
        }


@dataclass(frozen=True, slots=True)
class Block:
    """What a rank holds of a matrix: these row ranges, one after the other, then `pad` zero rows; these columns."""

    rows: tuple[Range, ...]
    columns: Range
    pad: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return sum(end - start for start, end in self.rows) + self.pad, self.columns[1] - self.columns[0]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Part of `module`: the official tensors `sources` on top of each other, [rows, columns] (a vector is one column
    wide and stored as a vector). `blocks` maps ranks to what they hold; `slots` to the place in their expert stack."""

    module: str
    sources: tuple[str, ...]
    rows: int
    columns: int
    kind: Kind
    blocks: Mapping[int, Block]
    expert: int | None = None
    slots: Mapping[int, int] | None = None
    vector: bool = False


@dataclass(frozen=True, slots=True)
class Module:
    """The matrices of one module, written together. `experts` is how many a rank holds, 0 if it is no stack."""

    name: str
    matrices: tuple[Matrix, ...]
    kind: Kind
    experts: int = 0

    def shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the module's weight on that rank."""
        matrix = next(m for m in self.matrices if rank in m.blocks)
        rows, columns = matrix.blocks[rank].shape
        if matrix.vector:
            return (rows,)
        return (self.experts, rows, columns) if self.experts else (rows, columns)


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole checkpoint: modules in the order in which they are written."""

    parallel: Parallel
    modules: tuple[Module, ...]
    num_layers: int

    def sources(self) -> list[str]:
        """All official tensors that are read, each once."""
        names = (name for module in self.modules for matrix in module.matrices for name in matrix.sources)
        return list(dict.fromkeys(names))


def parallel(config: LLMConfig, tensor: int, expert: int) -> Parallel:
    """The spread for `--tp tensor --ep expert`. Raises `BuildError` if the model cannot be cut like that.

    TensorRT-LLM spreads attention and experts over the same GPUs, so `--ep` must divide `--tp`; `--tp 1` with
    `--ep E` means E GPUs.
    """
    ranks = expert if tensor == 1 else tensor
    if ranks % expert:
        raise BuildError(
            f"--ep {expert} does not divide --tp {tensor}, over whose GPUs the experts are spread: "
            f"take an --ep that divides {tensor}"
        )
    made = Parallel(ranks, expert)
    kv = config.num_kv_heads
    for value, what, size in (
        (config.num_heads, "attention heads", ranks),
        (config.shared_width, "features of the shared expert", ranks),
        (config.expert_width, "features of an expert", made.expert_slices),
        (config.num_experts, "experts", expert),
    ):
        if value % size:
            raise BuildError(
                f"{value} {what} do not divide by {size}: choose --tp {tensor} --ep {expert} so that they do"
            )
    if kv % ranks and ranks % kv:
        raise BuildError(f"{kv} key/value heads can be neither split over nor repeated on {ranks} GPUs: choose --tp")
    return made


def layout(config: LLMConfig, spread: Parallel, prefix: str = "model.") -> Layout:
    """Every module of the checkpoint, from the official names `prefix + model.layers...`."""
    return Layout(spread, tuple(_modules(config, spread, prefix)), config.num_layers)


def _modules(c: LLMConfig, p: Parallel, prefix: str) -> Iterator[Module]:
    base = f"{prefix}model."
    embedding = f"{base}word_embeddings.weight"
    yield _single("transformer.vocab_embedding", (embedding,), c.vocab_size, c.hidden_size, Kind.PLAIN, p)
    for i in range(c.num_layers):
        yield from _layer(c, p, f"{base}layers.{i}.", LAYER.format(i))
    yield _vector("transformer.ln_f", f"{base}norm.weight", c.hidden_size, p)
    head = embedding if c.tie_embeddings else f"{prefix}lm_head.weight"
    per_rank = -(-c.vocab_size // p.ranks)
    blocks = {}
    for rank in range(p.ranks):
        start, end = (min(per_rank * r, c.vocab_size) for r in (rank, rank + 1))
        blocks[rank] = Block(((start, end),), (0, c.hidden_size), per_rank - (end - start))
    matrix = Matrix("lm_head", (head,), c.vocab_size, c.hidden_size, Kind.PLAIN, blocks)
    yield Module("lm_head", (matrix,), Kind.PLAIN)


def _layer(c: LLMConfig, p: Parallel, official: str, target: str) -> Iterator[Module]:
    hidden, heads, mlp = c.hidden_size, c.head_dim, f"{official}mlp."
    yield _vector(f"{target}input_layernorm", f"{official}input_layernorm.weight", hidden, p)
    blocks = {}
    for rank in range(p.ranks):
        query = _part(c.num_heads, p.ranks, rank)
        kv = _kv_heads(c.num_kv_heads, p.ranks, rank)
        starts = (0, c.num_heads, c.num_heads + c.num_kv_heads)
        rows = tuple(((s + a) * heads, (s + b) * heads) for s, (a, b) in zip(starts, (query, kv, kv), strict=True))
        blocks[rank] = Block(rows, (0, hidden))
    qkv = f"{official}attention.query_key_value.weight"
    yield _module(f"{target}attention.qkv", (qkv,), c.query_width + 2 * c.kv_width, hidden, blocks)
    dense = {r: Block(((0, hidden),), _part(c.query_width, p.ranks, r)) for r in range(p.ranks)}
    yield _module(f"{target}attention.dense", (f"{official}attention.dense.weight",), hidden, c.query_width, dense)
    yield _vector(f"{target}post_layernorm", f"{official}post_attention_layernorm.weight", hidden, p)
    gates = ("gate", "image_gate", "audio_gate") if c.multi_gate else ("gate",) * 3
    for router, gate in zip(("router", "image_router", "audio_router"), gates, strict=True):
        yield _single(f"{target}mlp.{router}", (f"{mlp}{gate}.weight",), c.num_experts, hidden, Kind.ROUTER, p)
    yield from _experts(c, p, mlp, target)
    shared, width = f"{mlp}shared_experts.", c.shared_width
    fc = {r: Block(_halves(width, p.ranks, r), (0, hidden)) for r in range(p.ranks)}
    halves = (f"{shared}up_proj.weight", f"{shared}gate_proj.weight")
    yield _module(f"{target}mlp.shared_expert.fc", halves, 2 * width, hidden, fc)
    proj = {r: Block(((0, hidden),), _part(width, p.ranks, r)) for r in range(p.ranks)}
    yield _module(f"{target}mlp.shared_expert.proj", (f"{shared}down_proj.weight",), hidden, width, proj)


def _experts(c: LLMConfig, p: Parallel, mlp: str, target: str) -> Iterator[Module]:
    hidden, width, local = c.hidden_size, c.expert_width, c.num_experts // p.expert
    fc, proj = [], []
    for e in range(c.num_experts):
        owners = [rank for rank in range(p.ranks) if p.expert_rank(rank) == e // local]
        slots = dict.fromkeys(owners, e % local)
        name = f"{mlp}experts.{e}."
        halves = {r: Block(_halves(width, p.expert_slices, p.expert_slice(r)), (0, hidden)) for r in owners}
        up_gate = (f"{name}up_proj.weight", f"{name}gate_proj.weight")
        fc.append(Matrix(f"{target}mlp.fc", up_gate, 2 * width, hidden, Kind.LINEAR, halves, e, slots))
        columns = {r: Block(((0, hidden),), _part(width, p.expert_slices, p.expert_slice(r))) for r in owners}
        down = (f"{name}down_proj.weight",)
        proj.append(Matrix(f"{target}mlp.proj", down, hidden, width, Kind.LINEAR, columns, e, slots))
    yield Module(f"{target}mlp.fc", tuple(fc), Kind.LINEAR, local)
    yield Module(f"{target}mlp.proj", tuple(proj), Kind.LINEAR, local)


def _part(size: int, parts: int, index: int) -> Range:
    return size // parts * index, size // parts * (index + 1)


def _halves(width: int, parts: int, index: int) -> tuple[Range, Range]:
    start, end = _part(width, parts, index)
    return (start, end), (width + start, width + end)


def _kv_heads(heads: int, ranks: int, rank: int) -> Range:
    if heads >= ranks:
        return _part(heads, ranks, rank)
    head = rank * heads // ranks
    return head, head + 1


def _module(name: str, sources: tuple[str, ...], rows: int, columns: int, blocks: Mapping[int, Block]) -> Module:
    return Module(name, (Matrix(name, sources, rows, columns, Kind.LINEAR, blocks),), Kind.LINEAR)


def _single(name: str, sources: tuple[str, ...], rows: int, columns: int, kind: Kind, p: Parallel) -> Module:
    blocks = dict.fromkeys(range(p.ranks), Block(((0, rows),), (0, columns)))
    return Module(name, (Matrix(name, sources, rows, columns, kind, blocks),), kind)


def _vector(name: str, source: str, size: int, p: Parallel) -> Module:
    blocks = dict.fromkeys(range(p.ranks), Block(((0, size),), (0, 1)))
    return Module(name, (Matrix(name, (source,), size, 1, Kind.PLAIN, blocks, vector=True),), Kind.PLAIN)
