"""Every argument check and message about bad input (R20), but for those of `checks_cache`.

A message names the argument, says what was wanted and what came. Arrays come through
`check_plain` first; then they are only looked at through `shape`, `dtype` and comparison, so that
one check serves NumPy and torch alike. torch is imported where a tensor was given, not before. All
checks run before any work is done.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from msa.config import MSAConfig
    from msa.ir import Selection, Sequences

BACKENDS = ("auto", "reference", "torch", "triton")
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
KERNEL_DTYPES = FLOAT_DTYPES[:3]
EIGHT_BITS = "float8_e4m3fn"
"""The dtype of pages that have scales (torch only); their tokens come in KERNEL_DTYPES."""
KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)
KERNEL_TOP_K = 1024
"""The most blocks per query that every kernel of the triton backend has room for."""
OPTIONS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "loop_order": (("auto", "kv_outer", "union"), "has one order"),
    "index_dtype": ((None, "fp8_e4m3"), "keeps the dtype that it is given"),
}
"""Options of the triton backend: their values, the default first, and why others have no choice."""
LSE_DTYPES = ("float32", "float64")
INDEX_DTYPES = ("int32", "int64")
"""What backends count with; other integers are converted where they are only read."""
INTEGER_DTYPES = ("int8", "int16", *INDEX_DTYPES, "uint8", "uint16", "uint32", "uint64")

LARGEST_TOP_K = 16384
"""Places of a query: a context of two million tokens, whole, in blocks of 128."""
LARGEST_BLOCK_SIZE = 65536
"""Tokens of a block. Backends fill the last block up, so even one token takes the memory of a whole
one: here 32 MiB for each head of 128 numbers in float32."""
LARGEST_CHUNK_SIZE = 2 * LARGEST_TOP_K * LARGEST_BLOCK_SIZE
"""Edges of a work item: what `lower` takes by itself for the largest configuration (R14)."""
LARGEST_BORDER = 2**63 - 1
"""Borders of sequences are int64 on the device."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
"""The kernels compute in float32, with exp2: a scale, and a scale times log2(e), must be a normal
number of it."""

PLAIN = ("numpy.ndarray", "numpy.memmap", "torch.Tensor", "torch.nn.parameter.Parameter")
ADVICE = {
    "MaskedArray": "a mask would be ignored, so give .filled(...)",
    "DTensor":
        "give the part of each device, .to_local(), or wrap the call in "
        "torch.distributed.tensor.experimental.local_map",
    "NestedTensor":
        "give .values(), packed, and .offsets() as cu_seqlens",
    "FakeTensor": "it has no numbers; msa.ops can be traced",
    "FunctionalTensor":
        "it has no numbers; msa.ops can be traced",
}  # fmt: skip
"""What to do about the best known classes that are not PLAIN."""
MAY_BE_EMPTY = ("Tq", "Tk", "B", "n", "pages", "table")


# -- configuration and sequence borders -----------------------------------------------------------
def check_integer(name: str, value: Any) -> int:
    """An integer of Python or NumPy; bool does not count as one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    return operator.index(value)


def check_seed(name: str, value: Any) -> None:
    """What NumPy and torch both take: an integer from 0 up to 63 bits."""
    if check_count(name, value, 0) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}")


def check_count(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`."""
    number = check_integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_at_most(name: str, value: int, **limit: int) -> int:
    """No more than a constant, which the message names: give it as LARGEST_X=LARGEST_X."""
    ((constant, most),) = limit.items()
    if value > most:
        raise ValueError(f"{name} must be at most {constant} = {most}, got {value}")
    return value


def check_block_size(name: str, value: Any) -> int:
    """1 to LARGEST_BLOCK_SIZE."""
    return check_at_most(name, check_count(name, value, 1), LARGEST_BLOCK_SIZE=LARGEST_BLOCK_SIZE)


def check_positive(name: str, value: Any) -> float:
    """A finite positive number of Python or NumPy; bool does not count as one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = _to_float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be finite and positive, got {number}")
    return number


def check_scale(name: str, value: Any) -> float | None:
    """None, or a number from LEAST_SCALE to LARGEST_SCALE."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be None or a number, got {value!r} of type {type(value).__name__}"
        )
    number = _to_float(value)
    if not LEAST_SCALE <= number <= LARGEST_SCALE:
        raise ValueError(
            f"{name} must be finite and positive, from LEAST_SCALE = 2^-126 to LARGEST_SCALE = "
            f"2^127, since kernels compute in float32, got {number}"
        )
    return number


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction beyond float64
        return float("inf") if value > 0 else float("-inf")


def check_config(config: MSAConfig) -> dict[str, int | float | None]:
    """The six numbers of an MSAConfig, as Python's own."""
    block_size = check_block_size("block_size", config.block_size)
    top_k = check_at_most(
        "top_k", check_count("top_k", config.top_k, 1), LARGEST_TOP_K=LARGEST_TOP_K
    )
    sink_blocks = check_count("sink_blocks", config.sink_blocks, 0)
    local_blocks = check_count("local_blocks", config.local_blocks, 1)
    if sink_blocks + local_blocks > top_k:
        raise ValueError(
            f"sink_blocks + local_blocks must be at most top_k = {top_k}, "
            f"got {sink_blocks} + {local_blocks}"
        )
    return {
        "block_size": block_size,
        "top_k": top_k,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "softmax_scale": check_scale("softmax_scale", config.softmax_scale),
        "index_scale": check_scale("index_scale", config.index_scale),
    }


def check_sequences(sequences: Sequences) -> dict[str, tuple[int, ...]]:
    """Borders start at 0 and never decrease; no sequence has more queries than keys (R1, R2).

    Returns them as Python's own integers.
    """
    names = ("cu_seqlens_q", "cu_seqlens_k")
    cu_seqlens = {name: _as_integers(name, getattr(sequences, name)) for name in names}
    for name, borders in cu_seqlens.items():
        if not borders or borders[0] != 0:
            raise ValueError(f"{name} must start with 0, got {_short(borders)}")
        for s, (start, stop) in enumerate(zip(borders, borders[1:])):
            if stop < start:
                raise ValueError(
                    f"{name} must not decrease, got {start} then {stop} at sequence {s}"
                )
        check_at_most(f"{name}[{len(borders) - 1}]", borders[-1], LARGEST_BORDER=LARGEST_BORDER)
    cu_q, cu_k = cu_seqlens.values()
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q = {len(cu_q)}, got {len(cu_k)}"
        )
    for s, (q_0, q_1, k_0, k_1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:])):
        if q_1 - q_0 > k_1 - k_0:
            raise ValueError(
                f"cu_seqlens_q must give each sequence at most as many queries as keys (R2), "
                f"got {q_1 - q_0} queries for {k_1 - k_0} keys in sequence {s}"
            )
    return cu_seqlens


def _as_integers(name: str, borders: Any) -> tuple[int, ...]:
    """A tuple of integers, of Python or NumPy."""
    if type(borders) is not tuple:
        raise TypeError(f"{name} must be a tuple of integers, got {kind(borders)}")
    if all(type(border) is int for border in borders):
        return borders
    return tuple(check_integer(f"{name}[{i}]", border) for i, border in enumerate(borders))


def read_borders(name: str, borders: Any) -> tuple[int, ...]:
    """cu_seqlens from a tuple, list, range, array or tensor of integers to plain integers."""
    if isinstance(borders, str) or not isinstance(borders, Sequence):
        check_integers(name, borders)
        array = to_numpy(borders)
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape [batch + 1], got {list(array.shape)}")
        return tuple(array.tolist())
    for border in borders:
        if isinstance(border, Sequence) or getattr(border, "ndim", 0):
            raise ValueError(
                f"{name} must have shape [batch + 1], got {kind(border)} inside a {kind(borders)}"
            )
    return _as_integers(name, tuple(_number(name, border) for border in borders))


def _number(name: str, border: Any) -> Any:
    """What an array without dims holds; anything else as it is."""
    if isinstance(border, np.generic) or not hasattr(border, "dtype"):
        return border
    check_integers(name, border)
    return border.item()


def check_totals(sequences: Sequences, total_q: int, total_k: int, whose: str) -> None:
    """The last borders are the numbers of packed tokens."""
    for name, borders, letter, total in (
        ("cu_seqlens_q", sequences.cu_seqlens_q, "Tq", total_q),
        ("cu_seqlens_k", sequences.cu_seqlens_k, "Tk", total_k),
    ):
        if borders[-1] != total:
            raise ValueError(f"{whose}{name} must end with {letter} = {total}, got {borders[-1]}")


def check_lengths(n_q: int, n_k: int) -> None:
    """Without cu_seqlens the shapes say how long the sequences are."""
    if n_q > n_k:
        raise ValueError(f"q must have at most as many tokens as k = {n_k} (R2), got {n_q}")


def check_absent(name: str, borders: Any, reason: str) -> None:
    """cu_seqlens must be left out where something else says what they would."""
    if borders is not None:
        raise ValueError(f"{name} must be None where {reason}, got {kind(borders)}")


def check_both(cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    """Borders of queries and of keys come together."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        names = ["cu_seqlens_q", "cu_seqlens_k"]
        missing, given = names if cu_seqlens_q is None else names[::-1]
        raise ValueError(f"{missing} must be given along with {given}, got None")


# -- tensors --------------------------------------------------------------------------------------
def check_plain(name: str, array: Any) -> None:
    """A NumPy array or a torch tensor whose numbers lie in memory as they are.

    Every array that a caller gives comes through here first. Subclasses are refused, for theirs
    may mean more than its numbers (a mask, a shard, units); so are tensors without numbers, with
    some left out, or wrapped by a transform, none of which a kernel could read.
    """
    found = kind(array)
    if found not in PLAIN:
        if isinstance(array, np.generic):
            return
        known = type(array).__name__
        if isinstance(array, np.ndarray):
            advice = ADVICE.get(known, "give numpy.asarray(...) of it")
            raise TypeError(f"{name} must be a numpy.ndarray itself, got {found}: {advice}")
        if "torch.Tensor" in map(_full_name, type(array).__mro__):
            advice = ADVICE.get(known, "give .as_subclass(torch.Tensor) of it, if that means it")
            raise TypeError(f"{name} must be a torch.Tensor itself, got {found}: {advice}")
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {found}")
    if found.startswith("torch"):
        _check_in_memory(name, array)


def _check_in_memory(name: str, tensor: Any) -> None:
    """Dense, with numbers, which no pending operation changes and no transform wraps."""
    import torch

    if tensor.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor: pack it, with cu_seqlens")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}: give .to_dense()")
    if tensor.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the device meta")
    if tensor.is_neg():
        raise ValueError(
            f"{name} must hold its numbers, got a view that is yet to be negated: "
            "give .resolve_neg()"
        )
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"{name} must be a tensor outside of torch.func, got one inside a transform such as "
            "vmap or grad: call with the whole batch, and use torch.autograd"
        )
    if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} must have no tangent, got a dual tensor of forward-mode differentiation: "
            "there are gradients in reverse mode alone"
        )


def check_array(name: str, array: Any, dtypes: tuple[str, ...] = FLOAT_DTYPES) -> None:
    """A NumPy array or a torch tensor of one of the dtypes, its last dim contiguous."""
    check_plain(name, array)
    if dtype_name(array) not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(dtypes)}, got {array.dtype}")
    stride = array.stride() if is_torch(array) else [s // array.itemsize for s in array.strides]
    if 0 not in array.shape and array.ndim and array.shape[-1] > 1 and stride[-1] != 1:
        raise ValueError(f"{name} must be contiguous in its last dim, got strides {list(stride)}")


def check_integers(name: str, array: Any, dtypes: tuple[str, ...] = INTEGER_DTYPES) -> None:
    """A NumPy array or a torch tensor of integers, of any strides; bool is none."""
    check_plain(name, array)
    if dtype_name(array) not in dtypes:
        raise TypeError(f"{name} must hold integers ({_either(dtypes)}), got {array.dtype}")


def check_same_dtype(**arrays: Any) -> None:
    """The first array sets the standard."""
    (first, model), *others = arrays.items()
    for name, array in others:
        if dtype_name(array) != dtype_name(model):
            raise TypeError(
                f"{name} must have the dtype of {first} = {model.dtype}, got {array.dtype}"
            )


def check_same_place(**arrays: Any) -> None:
    """All arrays of one kind and on one device; the first one sets the standard."""
    (first, model), *others = arrays.items()
    for name, array in others:
        if is_torch(array) != is_torch(model):
            raise TypeError(f"{name} must be a {kind(model)} as {first} is, got {kind(array)}")
        if is_torch(array) and array.device != model.device:
            raise ValueError(
                f"{name} must be on the device of {first} = {model.device}, got {array.device}"
            )


def check_shape(name: str, array: Any, dims: str, sizes: dict[str, int]) -> None:
    """Each letter of `dims` has the size it had before; new letters are added to `sizes`.

    Token, batch and page counts may be 0, every other size is at least 1.
    """
    letters, got = dims.split(), list(array.shape)
    wanted = ", ".join(str(sizes.get(d, "any")) for d in letters)
    if len(got) != len(letters) or any(
        g != sizes[d] if d in sizes else g < (d not in MAY_BE_EMPTY) for d, g in zip(letters, got)
    ):
        raise ValueError(f"{name} must have shape [{', '.join(letters)}] = [{wanted}], got {got}")
    sizes |= dict(zip(letters, got))


def check_layout(name: str, array: Any, dims: str, batched: bool | None) -> bool:
    """Whether the array has one dim more than `dims`, as the arguments before it do."""
    rank = len(dims.split())
    packed, with_batch = (f"[{', '.join(d.split())}]" for d in (dims, f"B {dims}"))
    forms = {None: f"{packed} or {with_batch}", False: packed, True: with_batch}
    if array.ndim - rank not in ((0, 1) if batched is None else (int(batched),)):
        raise ValueError(f"{name} must have shape {forms[batched]}, got {list(array.shape)}")
    return array.ndim > rank


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Query heads come in groups, one group per key/value head."""
    if q_heads % kv_heads:
        raise ValueError(
            f"q must have a number of heads Hq that is a multiple of Hkv = {kv_heads}, "
            f"got {q_heads}"
        )


# -- forms ----------------------------------------------------------------------------------------
def check_indices(selection: Selection) -> None:
    """The kind and the shape of the ids: what can be said without looking at them."""
    ids, total = selection.indices, selection.sequences.total_q
    check_plain("selection.indices", ids)
    if dtype_name(ids) != "int32":
        raise TypeError(f"selection.indices must have dtype int32, got {ids.dtype}")
    if ids.ndim != 3 or ids.shape[0] != total or 0 in ids.shape[1:]:
        raise ValueError(
            f"selection.indices must have shape [Tq, Hkv, k] = [{total}, any, any], "
            f"got {list(ids.shape)}"
        )
    check_at_most("selection.indices.shape[2]", ids.shape[2], LARGEST_TOP_K=LARGEST_TOP_K)


def check_selection(selection: Selection) -> None:
    """The canonical form (R8), entry by entry. The ids stay on their device unless one is bad."""
    check_indices(selection)
    ids, own = selection.indices, own_blocks(selection)[:, None]
    valid = ids >= 0
    rules = [
        ("hold block ids or -1", ids < -1, ids),
        ("have -1 only after the last id", valid[..., 1:] & ~valid[..., :-1], ids[..., 1:]),
        (
            "be ascending and unique",
            valid[..., 1:] & (ids[..., 1:] <= ids[..., :-1]),
            ids[..., 1:],
        ),
        ("hold visible blocks only", ids > own[..., None], ids),
        ("hold each query's own block", ~(ids == own[..., None]).any(-1), ids[..., 0]),
    ]
    broken = read_together([bad.any() for _, bad, _ in rules])
    for (wanted, bad, shown), is_broken in zip(rules, broken):
        if is_broken:
            where = np.argwhere(to_numpy(bad))[0].tolist()
            raise ValueError(
                f"selection.indices must {wanted} (R8), got {int(to_numpy(shown)[tuple(where)])} "
                f"at query {where[0]}, group {where[1]}, own block {int(own[where[0], 0])}: "
                f"{to_numpy(ids[where[0], where[1]]).tolist()}"
            )


def own_blocks(selection: Selection) -> Any:
    """[Tq]: for each query the block that it stands in (R3), beside the ids."""
    cu_q, cu_k = selection.sequences.cu_seqlens_q, selection.sequences.cu_seqlens_k
    counts, total = np.diff(np.array(cu_q)), cu_q[-1]
    shift = np.diff(np.array(cu_k)) - np.array(cu_q[1:], np.int64)  # from place to position (R2)
    if not is_torch(selection.indices):
        return (np.arange(total) + np.repeat(shift, counts)) // selection.block_size
    import torch

    device = selection.indices.device
    both = torch.from_numpy(np.stack([counts, shift]))
    counts, shift = both.to(device, non_blocking=True)  # else it would wait for the device
    shift = torch.repeat_interleave(shift, counts, output_size=total)
    return (torch.arange(total, device=device) + shift) // selection.block_size


def read_together(arrays: list[Any]) -> list[Any]:
    """Arrays of integers or bools of one device as NumPy's, in int64, after one wait for it."""
    if not is_torch(arrays[0]):
        return arrays
    import torch

    sizes = [array.numel() for array in arrays]
    whole = torch.cat([array.reshape(-1).long() for array in arrays]).cpu().numpy()
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    return [part.reshape(tuple(array.shape)) for part, array in zip(parts, arrays)]


def check_selection_for(selection: Selection, arrays: dict[str, Any]) -> None:
    """A canonical Selection (R8) with the groups, kind and device of the tensors beside it."""
    check_indices(selection)
    groups = arrays["k"].shape[-2]
    if selection.indices.shape[1] != groups:
        raise ValueError(
            f"selection.indices must have Hkv = {groups} groups as k has, "
            f"got {selection.indices.shape[1]}"
        )
    check_same_place(q=arrays["q"], **{"selection.indices": selection.indices})
    check_selection(selection)


# -- backends -------------------------------------------------------------------------------------
def check_backend(name: Any, available: tuple[str, ...]) -> None:
    """A known name whose libraries are installed."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name != "auto" and name not in available:
        raise ValueError(
            f"backend must be available here ({', '.join(available)}), got {name!r}: "
            f"install it with pip install 'msa-stack[{name}]'"
        )


def check_triton_device(array: Any, interpreted: bool) -> None:
    """Kernels need a GPU, or Triton's interpreter, which runs them on the CPU for tests."""
    if not interpreted and not (is_torch(array) and array.is_cuda):
        where, other = f"a {kind(array)}", "reference"
        if is_torch(array):
            where, other = f"a tensor on {array.device}", "torch"
        raise ValueError(
            f"backend='triton' must be given CUDA tensors, got {where}: use backend='{other}', or "
            "set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_captured(array: Any) -> bool:
    """Whether what is done with this array now goes into a CUDA graph."""
    if not is_torch(array) or not array.is_cuda:
        return False
    import torch

    with torch.cuda.device(array.device):
        return torch.cuda.is_current_stream_capturing()


def check_known_before_capture(capturing: bool) -> None:
    """What kernels look up in is made by the first call, which cannot be part of a CUDA graph."""
    if capturing:
        raise ValueError(
            "cu_seqlens (or the shapes that say the same) must have been used in a call before a "
            "CUDA graph is captured with them, got new ones during capture: make the same call "
            "once outside of it"
        )


def check_capturable(backend: str) -> None:
    """Only kernels that read lengths on the device can be replayed while these grow."""
    if backend != "triton":
        raise ValueError(
            f"backend must be 'triton' while a CUDA graph is captured, got {backend!r}"
        )


def check_top_k(top_k: int) -> None:
    """What the triton backend has room for."""
    if top_k > KERNEL_TOP_K:
        raise ValueError(
            f"top_k must be at most {KERNEL_TOP_K} for backend='triton', got {top_k}: "
            "use backend='torch'"
        )


def check_kernels(block_size: int, top_k: int = 1, **arrays: Any) -> None:
    """What the triton backend has kernels for."""
    check_top_k(top_k)
    if block_size not in KERNEL_BLOCK_SIZES:
        raise ValueError(
            f"block_size must be {_either(KERNEL_BLOCK_SIZES)} for backend='triton', "
            f"got {block_size}: use backend='torch'"
        )
    for name, array in arrays.items():
        dtypes = LSE_DTYPES if name == "lse" else KERNEL_DTYPES  # it is read in float32
        if dtype_name(array) not in dtypes:
            raise TypeError(
                f"{name} must have dtype {_either(dtypes)} for backend='triton', "
                f"got {array.dtype}: use backend='torch'"
            )
        if is_interpreted() and dtype_name(array) == "bfloat16":
            raise TypeError(
                f"{name} must have dtype float16 or float32 for backend='triton' under "
                f"TRITON_INTERPRET=1, for Triton's interpreter multiplies bfloat16 wrongly, "
                f"got {array.dtype}: use backend='torch'"
            )


def check_options(backend: str, array: Any, **options: Any) -> None:
    """Known values; the defaults alone for other backends than triton; 8 bits on a GPU alone."""
    for name, value in options.items():
        known, reason = OPTIONS[name]
        if value not in known:
            raise ValueError(f"{name} must be {_either(map(repr, known))}, got {value!r}")
        if backend != "triton" and value != known[0]:
            raise ValueError(
                f"{name} must be {known[0]!r} for backend={backend!r}, which {reason}, "
                f"got {value!r}"
            )
    if options.get("index_dtype") and not (is_torch(array) and array.is_cuda):
        raise ValueError("index_dtype must be None off a CUDA device, got 'fp8_e4m3'")


def check_flag(name: str, value: Any) -> None:
    """True or False; nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )


def check_with_gradient(with_gradient: bool) -> None:
    """The operator of the alignment loss found the gradient that is now asked for."""
    if not with_gradient:
        raise ValueError(
            "with_gradient must be True where q_idx or k_idx requires a gradient, got False"
        )


def check_type(name: str, value: Any, wanted: type) -> None:
    """One of this package's own classes."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a msa.{wanted.__name__}, got {kind(value)}")


def check_torch(name: str, array: Any) -> None:
    """A torch tensor: what 8-bit floats need."""
    if not is_torch(array):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind(array)}")


def check_no_gradient(name: str, array: Any) -> None:
    """The reference computes no gradients, so it must not be asked for one unawares."""
    if array.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient on the reference backend, which has none, "
            "got requires_grad=True: use backend='torch', or detach it"
        )


# -- small tools ----------------------------------------------------------------------------------
def is_torch(array: Any) -> bool:
    """Whether the array is a torch tensor, found out without importing torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def is_eight_bits(array: Any) -> bool:
    """Whether the numbers are 8-bit floats, which mean nothing without a scale."""
    return dtype_name(array) == EIGHT_BITS


def dtype_name(array: Any) -> str:
    """ "float32" for numpy.float32 and torch.float32 alike."""
    return str(array.dtype).removeprefix("torch.")


def beside(model: Any, array: np.ndarray) -> Any:
    """An array of the host in the library, and on the device, of the model."""
    if not is_torch(model):
        return array
    import torch

    return torch.from_numpy(array).to(model.device)


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy view or copy of an integer or boolean array of either kind."""
    return array.detach().cpu().numpy() if is_torch(array) else np.asarray(array)


def _either(values: Iterable[Any]) -> str:
    """ "1, 2 or 3"."""
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} or {last}"


def kind(value: Any) -> str:
    """ "list", "numpy.ndarray" or "torch.Tensor": what came instead of what was wanted."""
    return _full_name(type(value)).removeprefix("builtins.")


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _short(borders: tuple[int, ...]) -> str:
    shown = ", ".join(str(b) for b in borders[:4])
    return f"({shown}{', ...' if len(borders) > 4 else ''})"
