"""The rule of `kernels="auto"`: which kernels of the triton backend select, attend, and so on.

    portable    the Triton kernels beside the spec's files: every shape, any GPU, the interpreter
    hopper      the Gluon kernels of msa/triton_impl/hopper: GPUs of compute capability 9.x, the
                shapes below
    auto        for the selection: hopper where these kernels run, else portable
                for attention, its gradients and the block scores of a step of decoding: hopper
                where it runs and was measured to be faster

The hopper selection is the same bit for bit, and it was faster on every shape that was measured
(docs/ladder.md). Attention has two hopper kernels, the walk along unions and KV-outer, which give
the same result up to rounding. With them `loop_order="auto"` means:

    up to LONGEST_WHOLE blocks    every tile walks its whole union
    longer                        a tile walks the blocks that two queries of a consumer share, and
                                  KV-outer does the others (`loop_order.SHARED`)

For longer sequences "auto" takes them only with SPLIT_GROUP heads in a group, the shape that was
measured. A caller may name `loop_order="union"` at every length. Where neighbours then select
nothing alike, the hopper walk takes longer than the portable kernels do with "auto".

A prefill over pages of 8 bits may write their keys and values once in 16 bits (`widens`,
`msa/triton_impl/wide_pages.py`). The walk then takes the kernels of 16 bits, with factors.

The gradients have two halves, dQ and dK with dV, and each half has its own choice. A caller who
names "hopper" for an attention names the walk. The gradients then run on these kernels where they
can.

`choose` decides, and nothing else does: `msa explain` prints its rule, and benchmarks write its
answer into their results.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from msa.checks import dtype_name, either, is_eight_bits, is_interpreted, is_torch
from msa.config import MSAConfig
from msa.ir import Array, PagedKV, Selection, Sequences

Kernels = Literal["auto", "portable", "hopper"]
Half = Literal["queries", "keys"]
"""A half of the gradients of attention: dQ, or dK and dV."""

CAPABILITY = 9
"""The major number of the compute capability whose instructions the kernels use."""
TRITON = (3, 6)
"""The first release of triton whose Gluon compiles them."""
DTYPES = ("float16", "bfloat16")
INDEX_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
"""With larger blocks the products do not fit into the registers of a consumer."""
LARGEST_GROUPS = 256
"""A tile has so many rows, and holds at least one query of all groups."""
LARGEST_PLACES = 64
"""Blocks of a row that are not forced. So many scores stay in the registers of a thread."""

READABLE = (
    "start each token at a multiple of 16 bytes, and each page and head a whole number of tokens, "
    "or inside a token, behind the first"
)
"""How pages have to lie for the copy engine, which reads them as a matrix with a row per token."""

WALK_DIM, WALK_BLOCK_SIZE = 128, 128
"""D and Dv, and the block size, of the hopper walk."""
LARGEST_GROUP = 64
"""Query heads of a group: a consumer of the walk has so many rows, and at least one query."""
SPLIT_GROUP = 16
"""Query heads of a group with which the hopper kernels are faster on sequences of every length."""
CHUNK_GROUPS = (8, 16, 32, 64)
"""Query heads of a group that the hopper kernel of KV-outer takes: an edge's heads are copied whole
and fill a consumer's 64 rows."""
LOSS_GROUPS = (8, 16, 32, 64)
"""Query heads of a group in the hopper kernel of the alignment loss: it reads 64 rows at a time."""
SMALLEST_GROUP = 9
"""With fewer query heads in a group, the hopper walk spills registers, and rows of it are empty:
"auto" avoids it."""
FEWEST_ROWS = 2**15
"""With fewer rows (queries times heads), a Hopper GPU has hardly two tiles of the walk for each
multiprocessor: "auto" avoids it."""
LARGEST_SCALE = 0.5
"""With a larger softmax scale, a logit may pass float32's range, and the hopper walk gives NaN for
it, where the portable walk still weighs it right: "auto" avoids it."""
KEY_GROUPS = (8, 16, 32, 64)
"""Query heads of a group in the hopper kernel of dK and dV: whole queries fill its tile of rows."""
SMALLEST_SCALE = 2.0**-64
"""The kernel of dK and dV divides the LSE by the softmax scale."""
SCALED_DTYPE = "bfloat16"
"""The dtype of the hopper walk over blocks with factors. Outputs are kept in units of a factor, and
in float16 a factor may be of any size."""
LONGEST_WHOLE = 128
"""Blocks of a sequence up to which the hopper walk along whole unions was measured to be faster
than "auto" on the portable kernels, for every selection."""

WIDE_BYTES = 2**30
"""Bound on the memory of keys and values that are widened from 8 bits: 524,288 tokens of the usual
shape. A call that needs more converts numbers in its kernels, each time that a tile reads them."""
KEYS_PER_QUERY = 400
"""Where a call has at most so many keys for each query, they are widened. Widening takes about a
nanosecond for each key of the usual shape, and spares each query about 0.2 microseconds; it costs
less where few blocks are selected."""
MARKED_READERS = 32
"""With fewer queries on average that select a block (of each group), only blocks that are selected
are widened: neighbours often select alike, and leave blocks without a reader."""
EIGHT_BITS = "float8_e4m3fn"
"""Pages of index keys may also have this dtype."""
LARGEST_STEP = 32
"""New queries of a sequence times groups, in a step of decoding: the columns of a product, four
times over with pages of 8 bits, have to fit into registers."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a call runs; every choice depends on it."""

    device: str
    capability: tuple[int, int] | None
    """None where the device is not a CUDA device."""
    triton: str | None
    """The version of triton; None where there is none."""
    interpreted: bool
    """Whether kernels run in Triton's interpreter."""
    readable: bool = True
    """Whether the copy engine can read the keys and values, or index keys, where they lie. Packed
    ones that it cannot read are copied; pages are not."""


@dataclass(frozen=True, kw_only=True)
class Call(Place):
    """What the choice for a selection depends on."""

    q_dtype: str
    k_dtype: str
    index_dim: int
    groups: int
    block_size: int
    places: int
    """top_k less the forced blocks."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall(Place):
    """What every choice for an attention over a selection depends on."""

    q_dtype: str
    k_dtype: str
    v_dtype: str
    dim: int
    dim_v: int
    group: int
    """Query heads of a group."""
    block_size: int
    rows: int
    """Queries times heads."""
    blocks: int
    """Blocks of the longest sequence."""
    scale: float
    """The softmax scale."""
    scaled: bool = False
    """Whether blocks of keys and values have factors."""


@dataclass(frozen=True, kw_only=True)
class WalkCall(AttentionCall):
    """What the choice for an attention depends on: for its walk along unions and for KV-outer."""

    loop_order: str


@dataclass(frozen=True, kw_only=True)
class BackwardCall(AttentionCall):
    """What the choice for a half of the gradients depends on."""

    half: Half


@dataclass(frozen=True, kw_only=True)
class PageCall(Place):
    """What the choice for the block scores of a step of decoding depends on."""

    q_dtype: str
    k_dtype: str
    """The dtype of the pages of index keys."""
    index_dim: int
    block_size: int
    rows: int
    """New queries of a sequence times groups."""


@dataclass(frozen=True, kw_only=True)
class LossCall(Place):
    """What the choice for an alignment loss depends on."""

    q_dtype: str
    k_dtype: str
    q_idx_dtype: str
    k_idx_dtype: str
    dim: int
    index_dim: int
    group: int
    """Query heads of a group."""
    block_size: int


AnyCall = Call | AttentionCall | PageCall | LossCall


def call_of(q_idx: Array, k_idx: Array, config: MSAConfig) -> Call:
    """What the choice depends on, for these arguments of a selection."""
    return Call(
        q_dtype=dtype_name(q_idx),
        k_dtype=dtype_name(k_idx),
        index_dim=q_idx.shape[-1],
        groups=q_idx.shape[-2],
        block_size=config.block_size,
        places=config.top_k - config.forced_blocks,
        **machine_of(q_idx),
    )


def walk_call_of(
    q: Array, k: Array, v: Array, selection: Selection, scale: float, loop_order: str
) -> WalkCall:
    """What the choice depends on, for these arguments of an attention over a selection."""
    return WalkCall(loop_order=loop_order, **attention_of(q, k, v, selection, scale))


def backward_call_of(
    q: Array, k: Array, v: Array, selection: Selection, scale: float, half: Half
) -> BackwardCall:
    """What the choice depends on, for a half of the gradients of these arguments."""
    return BackwardCall(half=half, **attention_of(q, k, v, selection, scale))


def attention_of(
    q: Array, k: Array, v: Array, selection: Selection, scale: float
) -> dict[str, Any]:
    """The fields of an `AttentionCall`."""
    return {
        "q_dtype": dtype_name(q),
        "k_dtype": dtype_name(k),
        "v_dtype": dtype_name(v),
        "dim": q.shape[-1],
        "dim_v": v.shape[-1],
        "group": q.shape[-2] // k.shape[-2],
        "block_size": selection.block_size,
        "rows": selection.sequences.total_q * q.shape[-2],
        "blocks": longest(selection.sequences.cu_seqlens_k, selection.block_size),
        "scale": scale,
        **machine_of(q),
    }


def page_call_of(q_idx: Array, cache: PagedKV) -> PageCall:
    """What the choice depends on, for these arguments of a step of decoding."""
    return PageCall(
        q_dtype=dtype_name(q_idx),
        k_dtype=dtype_name(cache.k_idx_pages),
        index_dim=q_idx.shape[-1],
        block_size=cache.k_idx_pages.shape[1],
        rows=q_idx.shape[1] * q_idx.shape[2],
        **machine_of(q_idx),
    )


def loss_call_of(q: Array, k: Array, q_idx: Array, k_idx: Array, block_size: int) -> LossCall:
    """What the choice depends on, for these arguments of an alignment loss."""
    return LossCall(
        q_dtype=dtype_name(q),
        k_dtype=dtype_name(k),
        q_idx_dtype=dtype_name(q_idx),
        k_idx_dtype=dtype_name(k_idx),
        dim=q.shape[-1],
        index_dim=q_idx.shape[-1],
        group=q.shape[-2] // k.shape[-2],
        block_size=block_size,
        **machine_of(q),
    )


@lru_cache(maxsize=64)
def longest(cu_seqlens_k: tuple[int, ...], block_size: int) -> int:
    """Blocks of the longest sequence, kept for borders that come again."""
    keys = (stop - start for start, stop in zip(cu_seqlens_k, cu_seqlens_k[1:]))
    return max((-(-n // block_size) for n in keys), default=0)


def machine_of(array: Array) -> dict[str, Any]:
    """The fields of a call that say where it runs."""
    on_gpu = is_torch(array) and array.is_cuda
    return {
        "device": str(array.device) if is_torch(array) else "the CPU",
        "capability": capability_of(array.device.index) if on_gpu else None,
        "triton": triton_version(),
        "interpreted": is_interpreted(),
    }


def usual_call() -> Call:
    """The usual shape of this machine: bfloat16, 4 groups, Di = 128, and the default config."""
    config, capability = MSAConfig(), None
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        capability = capability_of(torch.cuda.current_device())
    return Call(
        q_dtype="bfloat16",
        k_dtype="bfloat16",
        index_dim=128,
        groups=4,
        block_size=config.block_size,
        places=config.top_k - config.forced_blocks,
        device="the CPU" if capability is None else "the current GPU",
        capability=capability,
        triton=triton_version(),
        interpreted=is_interpreted(),
    )


@lru_cache(maxsize=64)
def capability_of(device: int) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None for a GPU of AMD, whose numbers mean others."""
    import torch

    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The version of triton, or None where it cannot be imported."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError:
        return None
    return triton.__version__


def is_older(version: str, than: tuple[int, int]) -> bool:
    """Whether a version such as "3.6.0+git1" is older than a release.

    >>> is_older("3.5.1", (3, 6)), is_older("3.6.0+git1", (3, 6)), is_older("4.0", (3, 6))
    (True, False, False)
    """
    major, minor, *_ = version.split(".")
    return (int(major), int(minor)) < than


def must(name: str, wanted: str, got: object, do: str = "use kernels='portable'") -> str:
    """The message that an argument is not as the hopper kernels want it."""
    return f"{name} must {wanted} for kernels='hopper', got {got}: {do}"


def obstacle(call: AnyCall) -> TypeError | ValueError | None:
    """Why the hopper kernels cannot take a call: the argument, what is wanted, what came (R20).

    None if they can.
    """
    if isinstance(call, Call):
        found = wrong_selection(call)
    elif isinstance(call, PageCall):
        found = wrong_pages(call)
    elif isinstance(call, LossCall):
        found = wrong_loss(call)
    elif isinstance(call, BackwardCall):
        found = wrong_attention(call) or wrong_backward(call)
    else:
        found = wrong_attention(call)
        if found is None and isinstance(call, WalkCall):
            found = wrong_walk(call)
    return found or wrong_machine(call)


def wrong_selection(call: Call) -> TypeError | ValueError | None:
    """What the hopper kernels cannot take of a selection."""
    for name, dtype in (("q_idx", call.q_dtype), ("k_idx", call.k_dtype)):
        if dtype not in DTYPES:
            return TypeError(must(name, f"have dtype {either(DTYPES)}", dtype))
    if call.k_dtype != call.q_dtype:
        return TypeError(must("k_idx", f"have dtype {call.q_dtype} as q_idx has", call.k_dtype))
    if call.index_dim not in INDEX_DIMS:
        return ValueError(must("q_idx", f"have Di = {either(INDEX_DIMS)}", call.index_dim))
    if not call.readable:
        return ValueError(must("cache.k_idx_pages", READABLE, "other strides"))
    if call.block_size not in BLOCK_SIZES:
        return ValueError(must("block_size", f"be {either(BLOCK_SIZES)}", call.block_size))
    if call.groups > LARGEST_GROUPS:
        return ValueError(must("q_idx", f"have at most {LARGEST_GROUPS} groups", call.groups))
    if call.places > LARGEST_PLACES:
        least = f"be at most {LARGEST_PLACES} more than sink_blocks + local_blocks"
        return ValueError(must("top_k", least, f"{call.places} more"))
    return None


def wrong_dtypes(q: str, **others: str) -> TypeError | None:
    """The first dtype that is not of 16 bits, or not that of q."""
    for name, dtype in {"q": q, **others}.items():
        if dtype not in DTYPES:
            return TypeError(must(name, f"have dtype {either(DTYPES)}", dtype))
        if dtype != q:
            return TypeError(must(name, f"have dtype {q} as q has", dtype))
    return None


def wrong_dims(*dims: tuple[str, str, int]) -> ValueError | None:
    """The first size that is not WALK_DIM; each is given with its argument and its letter."""
    for name, symbol, size in dims:
        if size != WALK_DIM:
            return ValueError(must(name, f"have {symbol} = {WALK_DIM}", size))
    return None


def wrong_attention(call: AttentionCall) -> TypeError | ValueError | None:
    """What no hopper kernel of attention can take."""
    found = wrong_dtypes(q=call.q_dtype, k=call.k_dtype, v=call.v_dtype)
    found = found or wrong_dims(("q", "D", call.dim), ("v", "Dv", call.dim_v))
    if found:
        return found
    if call.scaled and call.q_dtype != SCALED_DTYPE:
        wanted = f"have dtype {SCALED_DTYPE} where pages have 8 bits"
        return TypeError(must("q", wanted, call.q_dtype))
    if not call.readable:
        return ValueError(must("cache.k_pages and cache.v_pages", READABLE, "other strides"))
    if call.block_size != WALK_BLOCK_SIZE:
        return ValueError(must("block_size", f"be {WALK_BLOCK_SIZE}", call.block_size))
    if call.group > LARGEST_GROUP:
        return ValueError(must("q", f"have at most {LARGEST_GROUP} heads in a group", call.group))
    return None


def wrong_loss(call: LossCall) -> TypeError | ValueError | None:
    """What the hopper kernel cannot take of an alignment loss."""
    found = wrong_dtypes(
        q=call.q_dtype, k=call.k_dtype, q_idx=call.q_idx_dtype, k_idx=call.k_idx_dtype
    )
    found = found or wrong_dims(("q", "D", call.dim), ("q_idx", "Di", call.index_dim))
    if found:
        return found
    if call.block_size != WALK_BLOCK_SIZE:
        return ValueError(must("block_size", f"be {WALK_BLOCK_SIZE}", call.block_size))
    if call.group not in LOSS_GROUPS:
        return ValueError(must("q", f"have {either(LOSS_GROUPS)} heads in a group", call.group))
    return None


def wrong_walk(call: WalkCall) -> ValueError | None:
    """What the hopper kernels of the forward cannot take beside."""
    if call.loop_order == "kv_outer" and call.group not in CHUNK_GROUPS:
        heads = f"have {either(CHUNK_GROUPS)} heads in a group where loop_order is 'kv_outer'"
        return ValueError(must("q", heads, call.group))
    return None


def wrong_backward(call: BackwardCall) -> ValueError | None:
    """What the hopper kernel of dK and dV cannot take beside."""
    if call.half == "keys" and call.group not in KEY_GROUPS:
        return ValueError(must("q", f"have {either(KEY_GROUPS)} heads in a group", call.group))
    if call.half == "keys" and not call.scale >= SMALLEST_SCALE:
        least = f"be at least {SMALLEST_SCALE:g}"
        return ValueError(must("softmax_scale", least, call.scale))
    return None


def wrong_pages(call: PageCall) -> TypeError | ValueError | None:
    """What the hopper kernel cannot take of a step of decoding."""
    if call.q_dtype not in DTYPES:
        return TypeError(must("q_idx", f"have dtype {either(DTYPES)}", call.q_dtype))
    if call.k_dtype not in (call.q_dtype, EIGHT_BITS):
        wanted = f"have dtype {call.q_dtype} as q_idx has, or {EIGHT_BITS}"
        return TypeError(must("cache.k_idx_pages", wanted, call.k_dtype))
    if call.index_dim not in INDEX_DIMS:
        return ValueError(must("q_idx", f"have Di = {either(INDEX_DIMS)}", call.index_dim))
    if not call.readable:
        return ValueError(must("cache.k_idx_pages", READABLE, "other strides"))
    if call.block_size not in BLOCK_SIZES:
        return ValueError(must("block_size", f"be {either(BLOCK_SIZES)}", call.block_size))
    if call.rows > LARGEST_STEP:
        wanted = f"have at most {LARGEST_STEP} new queries times groups"
        return ValueError(must("q_idx", wanted, call.rows))
    return None


def wrong_machine(call: AnyCall) -> ValueError | None:
    """What the machine lacks for hopper kernels."""
    if call.capability is None or call.capability[0] != CAPABILITY:
        got, name = call.device, "q" if isinstance(call, AttentionCall) else "q_idx"
        if call.capability is not None:
            got += " of {}.{}".format(*call.capability)
        return ValueError(must(name, f"be on a GPU of compute capability {CAPABILITY}.x", got))
    if call.interpreted:
        unset = "unset it before Python starts, or use kernels='portable'"
        return ValueError(must("TRITON_INTERPRET", "not be set", "'1'", unset))
    if call.triton is None or is_older(call.triton, TRITON):
        least = "be {}.{} or newer".format(*TRITON)
        return ValueError(must("the version of triton", least, call.triton))
    return None


def choose(kernels: Kernels, call: AnyCall) -> Literal["portable", "hopper"]:
    """The kernels for a selection, an attention, half of its gradients, a loss, or page scores.

    Raises:
        TypeError, ValueError: "hopper" is named, and these kernels cannot take the call (R20).
    """
    if kernels == "portable":
        return "portable"
    found = obstacle(call)
    if kernels == "hopper" and found is not None:
        raise found
    if found is not None or (kernels == "auto" and not is_better(call)):
        return "portable"
    return "hopper"


def is_better(call: AnyCall) -> bool:
    """Whether the hopper kernels, which can take the call, are the better choice for it."""
    if isinstance(call, Call | LossCall):
        return True
    if isinstance(call, PageCall):
        return call.k_dtype == EIGHT_BITS
    if isinstance(call, BackwardCall) and call.half == "keys":
        return call.scale <= LARGEST_SCALE
    fits = call.group >= SMALLEST_GROUP and call.rows >= FEWEST_ROWS
    if isinstance(call, BackwardCall):
        return fits
    short = call.blocks <= LONGEST_WHOLE or call.group == SPLIT_GROUP
    wanted = short or getattr(call, "loop_order", "auto") != "auto"
    return wanted and fits and call.scale <= LARGEST_SCALE


def chunks_of(walker: str, call: WalkCall) -> Literal["portable", "hopper"]:
    """The kernel of KV-outer beside this kernel of the walk; the hopper one takes fewer groups."""
    return "hopper" if walker == "hopper" and call.group in CHUNK_GROUPS else "portable"


def runs_on_hopper(kernels: Kernels, call: BackwardCall) -> bool:
    """Whether a half of the gradients runs on a hopper kernel; "hopper" means where it can."""
    if kernels == "hopper":
        return obstacle(call) is None
    return choose(kernels, call) == "hopper"


def order_on_hopper(call: WalkCall) -> str:
    """The loop order of a call that runs on the hopper kernels.

    "auto" is then "union" up to LONGEST_WHOLE blocks: no tile leaves blocks to KV-outer.
    """
    whole = call.loop_order == "auto" and call.blocks <= LONGEST_WHOLE
    return "union" if whole else call.loop_order


def widens(
    q: Array, k_pages: Array, v_pages: Array, sequences: Sequences, kernels: Kernels
) -> bool:
    """Whether a prefill widens the keys and values of its pages from 8 to 16 bits.

    Sequences without queries have no keys here. A caller who names "hopper" has them widened for
    any number of queries, because the hopper walk needs 16 bits.
    """
    if not is_eight_bits(k_pages) or dtype_name(q) not in DTYPES or not sequences.total_q:
        return False
    block_size, groups, dim = k_pages.shape[1:]
    blocks = sequences.cu_blocks(block_size)[-1]
    fits = 2 * blocks * block_size * groups * (dim + v_pages.shape[-1]) <= WIDE_BYTES
    many = sequences.total_k <= KEYS_PER_QUERY * sequences.total_q
    return fits and (many or kernels == "hopper")


def marks(selection: Selection) -> bool:
    """Whether the blocks that are selected are marked first, and no others are widened."""
    sequences, top_k = selection.sequences, selection.top_k
    blocks = sequences.cu_blocks(selection.block_size)[-1]
    return sequences.total_q * top_k < MARKED_READERS * blocks


def rule() -> list[tuple[str, str]]:
    """What a selection must have for the hopper kernels: pairs of a name and the wanted values."""
    return [
        ("compute capability", f"{CAPABILITY}.x, not in Triton's interpreter"),
        ("triton", "{}.{} or newer".format(*TRITON)),
        ("dtype of q_idx and k_idx", either(DTYPES)),
        ("Di", either(INDEX_DIMS)),
        ("block_size", either(BLOCK_SIZES)),
        ("groups", f"at most {LARGEST_GROUPS}"),
        ("top_k less the forced blocks", f"at most {LARGEST_PLACES}"),
    ]


def walk_rule() -> list[tuple[str, str]]:
    """What an attention must have for the hopper kernels: names and wanted values."""
    long = f"{SPLIT_GROUP} heads in a group or at most {LONGEST_WHOLE} blocks in a sequence"
    return [
        ("compute capability and triton", "as above"),
        ("dtype of q, k and v", either(DTYPES)),
        ("D and Dv", str(WALK_DIM)),
        ("block_size", str(WALK_BLOCK_SIZE)),
        ("query heads of a group", f"{SMALLEST_GROUP} to {LARGEST_GROUP}"),
        ("softmax scale", f"at most {LARGEST_SCALE:g}"),
        ("queries times heads", f"{FEWEST_ROWS} or more"),
        ("loop_order", f"'union'; 'kv_outer', {either(CHUNK_GROUPS)} heads; 'auto', {long}"),
    ]


def wide_rule() -> list[tuple[str, str]]:
    """What a prefill over pages of 8 bits must have to be widened: names and wanted values."""
    size = f"at most {WIDE_BYTES / 2**30:g} GiB in 16 bits"
    return [
        ("dtype of q", either(DTYPES)),
        ("keys for each query", f"at most {KEYS_PER_QUERY}; any number with kernels='hopper'"),
        ("keys and values of the sequences", size),
        ("only blocks that are selected", f"below {MARKED_READERS} readers for each block"),
    ]


def key_rule() -> list[tuple[str, str]]:
    """What an attention must have for the hopper kernel of dK and dV: names and wanted values."""
    groups, scales = either(KEY_GROUPS), f"{SMALLEST_SCALE:.1e} to {LARGEST_SCALE:g}"
    same = "compute capability, triton, dtypes, D, Dv and block_size"
    return [(same, "as above"), ("query heads of a group", groups), ("softmax scale", scales)]


def page_rule() -> list[tuple[str, str]]:
    """What a step of decoding must have for the hopper scores: pairs of a name and the values."""
    sizes = ("compute capability, triton, Di, block_size", "as for a selection")
    rows = ("new queries times groups", f"at most {LARGEST_STEP}")
    dtypes = [("dtype of q_idx", either(DTYPES)), ("dtype of cache.k_idx_pages", EIGHT_BITS)]
    return [sizes, *dtypes, rows]


def loss_rule() -> list[tuple[str, str]]:
    """What an alignment loss must have for the hopper kernel: names and wanted values."""
    return [
        ("compute capability and triton", "as above"),
        ("dtype of q, k, q_idx and k_idx", f"one of {either(DTYPES)} for all"),
        ("D and Di", str(WALK_DIM)),
        ("block_size", str(WALK_BLOCK_SIZE)),
        ("query heads of a group", either(LOSS_GROUPS)),
    ]
