"""Checks of single values: numbers, flags, objects of this package, and how messages name them.

Each check returns the value as Python's own, or raises a TypeError or ValueError that names the
argument, says what was wanted and what came (R20).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

LARGEST_TOP_K = 16384
"""The most blocks that a query may keep: those of two million tokens, in blocks of 128."""
LARGEST_BLOCK_SIZE = 65536
"""The most tokens of a block. Backends fill up the last block, so that one token takes the memory
of a whole
block: 32 MiB for each head of 128 numbers in float32."""
LARGEST_CHUNK_SIZE = 2 * LARGEST_TOP_K * LARGEST_BLOCK_SIZE
"""The most edges of a work item: the default of `lower` for the largest configuration (R14)."""
LARGEST_TILE_SIZE = 31
"""The most queries of a tile that walks a union: each has one bit of an int32 (R9)."""
LARGEST_BORDER = 2**63 - 1
"""Borders of sequences are int64 on the device."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**127
"""Kernels compute in float32, with exp2: a scale, and a scale times log2(e), must be a normal
number of float32."""


# -- numbers --------------------------------------------------------------------------------------
def check_integer(name: str, value: Any) -> int:
    """An integer of Python or NumPy; bool does not count as one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    return operator.index(value)


def check_seed(name: str, value: Any) -> None:
    """An integer from 0 to 2**63 - 1, which both NumPy and torch take as a seed."""
    if check_count(name, value, 0) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}")


def check_count(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`."""
    number = check_integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_at_most(name: str, value: int, **limit: int) -> int:
    """A number of at most a constant; written LARGEST_X=LARGEST_X, so that messages name it."""
    ((constant, most),) = limit.items()
    if value > most:
        raise ValueError(f"{name} must be at most {constant} = {most}, got {value}")
    return value


def check_block_size(name: str, value: Any) -> int:
    """An integer from 1 to LARGEST_BLOCK_SIZE."""
    return check_at_most(name, check_count(name, value, 1), LARGEST_BLOCK_SIZE=LARGEST_BLOCK_SIZE)


def check_tile_size(name: str, value: Any) -> int:
    """An integer from 1 to LARGEST_TILE_SIZE."""
    number = check_count(name, value, 1)
    if number > LARGEST_TILE_SIZE:
        raise ValueError(
            f"{name} must be at most {LARGEST_TILE_SIZE}, one bit of an int32 each, got {number}"
        )
    return number


def check_number(name: str, value: Any, wanted: str = "a number") -> float:
    """A number of Python or NumPy; bool does not count as one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    number: Any = value  # Real promises no comparison
    try:
        return float(number)
    except OverflowError:  # an integer or a fraction beyond float64
        return float("inf") if number > 0 else float("-inf")


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = check_number(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be finite and positive, got {number}")
    return number


def check_scale(name: str, value: Any) -> float | None:
    """None, or a number from LEAST_SCALE to LARGEST_SCALE."""
    if value is None:
        return None
    number = check_number(name, value, "None or a number")
    if not LEAST_SCALE <= number <= LARGEST_SCALE:
        raise ValueError(
            f"{name} must be finite and positive, from LEAST_SCALE = 2^-126 to LARGEST_SCALE = "
            f"2^127, since kernels compute in float32, got {number}"
        )
    return number


def check_integer_tuple(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of integers of Python or NumPy."""
    if type(values) is not tuple:
        raise TypeError(f"{name} must be a tuple of integers, got {kind(values)}")
    if all(type(value) is int for value in values):
        return values
    return tuple(check_integer(f"{name}[{i}]", value) for i, value in enumerate(values))


# -- flags and objects ----------------------------------------------------------------------------
def check_flag(name: str, value: Any) -> None:
    """True or False; 0, 1 and other values that count as true or false are refused."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}"
        )


def check_type(name: str, value: Any, wanted: type) -> None:
    """An object of one of this package's classes."""
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a msa.{wanted.__name__}, got {kind(value)}")


# -- words of messages ----------------------------------------------------------------------------
def kind(value: Any) -> str:
    """ "list", "numpy.ndarray" or "torch.Tensor": the type that a message names."""
    return full_name(type(value)).removeprefix("builtins.")


def full_name(cls: type) -> str:
    """The module and the name of a class."""
    return f"{cls.__module__}.{cls.__name__}"


def either(values: Iterable[Any]) -> str:
    """ "1, 2 or 3"."""
    *most, last = (str(value) for value in values)
    return f"{', '.join(most)} or {last}"
