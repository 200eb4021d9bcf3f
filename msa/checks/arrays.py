"""Checks of arrays, and tools with which one check works for NumPy and for torch (R20).

`check_plain` checks every array that a caller gives first. Later checks use only its `shape`, its
dtype and comparisons. torch is imported only if a tensor was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from msa.checks.values import check_integer_tuple, either, full_name, kind

Array = Any  # a NumPy array or a torch tensor

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
EIGHT_BITS = "float8_e4m3fn"
"""The dtype of pages that have scales (torch only); their tokens come in KERNEL_DTYPES."""
LSE_DTYPES = ("float32", "float64")
INDEX_DTYPES = ("int32", "int64")
"""Integer dtypes of the backends; arrays of others are converted if they are only read."""
INTEGER_DTYPES = ("int8", "int16", *INDEX_DTYPES, "uint8", "uint16", "uint32", "uint64")

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
"""The advice in messages about the most common classes that are not PLAIN."""
MAY_BE_EMPTY = ("Tq", "Tk", "B", "n", "pages", "table")


# -- tools for both libraries ---------------------------------------------------------------------
def is_torch(array: Any) -> bool:
    """Whether the array is a torch tensor, found out without importing torch."""
    return type(array).__module__.partition(".")[0] == "torch"


def is_eight_bits(array: Any) -> bool:
    """Whether the numbers are 8-bit floats, which need a scale."""
    return dtype_name(array) == EIGHT_BITS


def dtype_name(array: Any) -> str:
    """The name of a dtype: "float32" for numpy.float32 and for torch.float32."""
    return str(array.dtype).removeprefix("torch.")


def beside(model: Any, array: np.ndarray) -> Any:
    """Convert an array of the host to the library and the device of the model."""
    if not is_torch(model):
        return array
    import torch

    return torch.from_numpy(array).to(model.device)


def to_numpy(array: Any) -> np.ndarray:
    """A NumPy view or copy of an integer or boolean array of either kind."""
    return array.detach().cpu().numpy() if is_torch(array) else np.asarray(array)


def read_together(arrays: list[Array]) -> list[np.ndarray]:
    """Copy integer or bool arrays of one device to NumPy in int64, with one wait for it."""
    if not is_torch(arrays[0]):
        return arrays
    import torch

    sizes = [array.numel() for array in arrays]
    whole = torch.cat([array.reshape(-1).long() for array in arrays]).cpu().numpy()
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    return [part.reshape(tuple(array.shape)) for part, array in zip(parts, arrays)]


# -- one array ------------------------------------------------------------------------------------
def check_plain(name: str, array: Any) -> None:
    """A NumPy array or a torch tensor whose numbers lie in memory as they are.

    Subclasses are refused, because they may mean more than their numbers (a mask, a shard, units).
    Tensors without numbers, sparse tensors and tensors inside a transform are refused, because no
    kernel could read them.
    """
    found = kind(array)
    if found not in PLAIN:
        if isinstance(array, np.generic):
            return
        known = type(array).__name__
        if isinstance(array, np.ndarray):
            advice = ADVICE.get(known, "give numpy.asarray(...) of it")
            raise TypeError(f"{name} must be a numpy.ndarray itself, got {found}: {advice}")
        if "torch.Tensor" in map(full_name, type(array).__mro__):
            advice = ADVICE.get(known, "give .as_subclass(torch.Tensor) of it, if that means it")
            raise TypeError(f"{name} must be a torch.Tensor itself, got {found}: {advice}")
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {found}")
    if found.startswith("torch"):
        _check_in_memory(name, array)


def _check_in_memory(name: str, tensor: Any) -> None:
    """A dense tensor with numbers, outside of transforms, and not a view that negates lazily."""
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
    """A NumPy array or a torch tensor of integers, with any strides; bool does not count."""
    check_plain(name, array)
    if dtype_name(array) not in dtypes:
        raise TypeError(f"{name} must hold integers ({either(dtypes)}), got {array.dtype}")


def check_torch(name: str, array: Any) -> None:
    """A torch tensor; NumPy has no 8-bit floats, for example."""
    if not is_torch(array):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind(array)}")


def check_no_gradient(name: str, array: Any) -> None:
    """A tensor that requires no gradient, because the reference computes none."""
    if array.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient on the reference backend, which has none, "
            "got requires_grad=True: use backend='torch', or detach it"
        )


# -- several arrays together ----------------------------------------------------------------------
def check_same_dtype(**arrays: Any) -> None:
    """All arrays have the dtype of the first one."""
    (first, model), *others = arrays.items()
    for name, array in others:
        if dtype_name(array) != dtype_name(model):
            raise TypeError(
                f"{name} must have the dtype of {first} = {model.dtype}, got {array.dtype}"
            )


def check_same_place(**arrays: Any) -> None:
    """All arrays are of the kind and on the device of the first one."""
    (first, model), *others = arrays.items()
    for name, array in others:
        if is_torch(array) != is_torch(model):
            raise TypeError(f"{name} must be a {kind(model)} as {first} is, got {kind(array)}")
        if is_torch(array) and array.device != model.device:
            raise ValueError(
                f"{name} must be on the device of {first} = {model.device}, got {array.device}"
            )


def check_shape(name: str, array: Any, dims: str, sizes: dict[str, int]) -> None:
    """Each letter of `dims` has the size that `sizes` holds; new letters are added to `sizes`.

    Token, batch and page counts may be 0, every other size is at least 1.
    """
    letters, got = dims.split(), list(array.shape)
    if len(got) != len(letters) or any(
        g != sizes[d] if d in sizes else g < int(d not in MAY_BE_EMPTY)
        for d, g in zip(letters, got)
    ):
        wanted = ", ".join(str(sizes.get(d, "any")) for d in letters)
        raise ValueError(f"{name} must have shape [{', '.join(letters)}] = [{wanted}], got {got}")
    sizes |= dict(zip(letters, got))


def check_layout(name: str, array: Any, dims: str, batched: bool | None) -> bool:
    """Whether the array is batched: it has one dim more than `dims`.

    `batched` says whether the arguments before were batched; None for the first argument.
    """
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


def check_lengths(n_q: int, n_k: int) -> None:
    """A sequence has at most as many queries as keys (R2)."""
    if n_q > n_k:
        raise ValueError(f"q must have at most as many tokens as k = {n_k} (R2), got {n_q}")


# -- borders of sequences -------------------------------------------------------------------------
def read_borders(name: str, borders: Any) -> tuple[int, ...]:
    """The plain integers of cu_seqlens, a tuple, list, range, array or tensor of integers."""
    text = isinstance(borders, str | bytes | bytearray | memoryview)
    if text or not (isinstance(borders, Sequence) or hasattr(borders, "dtype")):
        raise TypeError(
            f"{name} must be a tuple, list, array or tensor of integers, got {kind(borders)}"
        )
    if not isinstance(borders, Sequence):
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
    return check_integer_tuple(name, tuple(_number(name, border) for border in borders))


def _number(name: str, border: Any) -> Any:
    """The number in an array without dims; any other border as it is."""
    if isinstance(border, np.generic) or not hasattr(border, "dtype"):
        return border
    check_integers(name, border)
    return border.item()
