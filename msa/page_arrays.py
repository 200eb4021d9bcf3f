"""How a `PagePool` changes its arrays (R2): writes tokens, copies pages, exports and imports them.

The arrays are those of a `PagedKV`, of either library and on any device. Pages of 8 bits are moved
as bytes, because not every release of torch indexes 8-bit floats on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from msa import checks, eight_bits
from msa.checks.arrays import Array
from msa.page_book import Change
from msa.paged_kv import PAGE_DIMS, PAGE_DTYPES, SCALE_DIMS, PagedKV

NAMES = ("k", "v", "k_idx")


@dataclass(frozen=True)
class SequencePages:
    """The cache of one sequence outside of a pool: `PagePool.export` gives it, `import_` takes it.

    Pages in the order of the blocks, in contiguous memory, with zeros beyond the length; scales
    where the pages have 8 bits, as in `PagedKV`.
    """

    length: int
    k: Float[Array, "blocks Bk Hkv D"]
    v: Float[Array, "blocks Bk Hkv Dv"]
    k_idx: Float[Array, "blocks Bk Di"]
    k_scales: Float32[Array, "blocks Hkv"] | None = None
    v_scales: Float32[Array, "blocks Hkv"] | None = None
    k_idx_scales: Float32[Array, " blocks"] | None = None


def make_scales(pages: Array) -> Array | None:
    """A scale of 1 for each page and head of 8-bit pages; None for other pages."""
    if not checks.is_eight_bits(pages):
        return None
    return checks.beside(pages, np.ones((len(pages), *pages.shape[2:-1]), np.float32))


def write_tokens(cache: PagedKV, new: dict[str, Array], page: Array, offset: Array) -> None:
    """Write k, v and k_idx of t tokens to their places [t], rounded where pages have 8 bits."""
    where = tuple(checks.beside(cache.k_pages, x) for x in (page, offset))
    places = None
    for name, tokens in new.items():
        pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
        tokens = tokens.reshape(-1, *pages.shape[2:])
        if scales is None:
            pages[where] = tokens.detach() if checks.is_torch(tokens) else tokens
            continue
        if places is None:
            known = vars(eight_bits.Places.of(page, offset)).values()
            places = eight_bits.Places(*(checks.beside(pages, x) for x in known))
        eight_bits.write_tokens(pages, scales, tokens, places)


def apart(cache: PagedKV, arrays: dict[str, Array]) -> dict[str, Array]:
    """The same arrays; those that may share memory with the cache's pages are copied.

    They are read while pages are written, and must not change with the pages.
    """
    parts = _parts(cache).values()
    return {name: _copied(x) if any(_may_share(x, part) for part in parts) else x
            for name, x in arrays.items()}  # fmt: skip


def copy_pages(cache: PagedKV, copies: list[tuple[int, int]]) -> None:
    """Copy pages into other pages, scales included."""
    if not copies:
        return  # as in most steps of a generation
    old, new = (checks.beside(cache.k_pages, x) for x in np.array(copies, np.int64).T)
    for array in _parts(cache).values():
        array[new] = array[old]


def take_out(cache: PagedKV, own: Array, length: int) -> SequencePages:
    """Copy out the pages of one sequence."""
    own = checks.beside(cache.k_pages, own.astype(np.int64))
    parts = {name: _contiguous(array[own]) for name, array in _parts(cache).items()}
    for name in NAMES:
        pages = parts[name]
        pages.reshape(-1, *pages.shape[2:])[length:] = 0
        parts[name] = pages.view(getattr(cache, f"{name}_pages").dtype)
    return SequencePages(length, **parts)


def arrays_of(pages: SequencePages) -> dict[str, Array]:
    """The pages and scales of one sequence by name; no scales where there are none."""
    return {name: part for name, part in vars(pages).items() if hasattr(part, "shape")}


def put_in(cache: PagedKV, own: Array, parts: dict[str, Array]) -> None:
    """Put the same bits into pages of this cache."""
    own = checks.beside(cache.k_pages, own.astype(np.int64))
    for name, array in _parts(cache).items():
        array[own] = _carried(parts[name], array)


def enter(cache: PagedKV, change: Change, turned: dict[int, bool], lengths: bool) -> None:
    """Write a change of the book into the table, the marks of shared pages, and the lengths."""
    if change.entries:
        rows, columns, _, pages = np.array(change.entries, np.int64).T
        _set(cache.page_table, (rows, columns), pages.astype(np.int32))
    if turned:
        pages, now = np.array(list(turned.items()), np.int64).T
        _set(cache.shared, (pages,), now.astype(np.uint8))
    if lengths and change.lengths:
        rows, _, after = np.array(change.lengths, np.int64).T
        _set(cache.lengths, (rows,), after.astype(np.int32))


def _parts(cache: PagedKV) -> dict[str, Array]:
    """The arrays that hold pages and scales, by the names of `SequencePages`."""
    parts: dict[str, Array] = {}
    for name in NAMES:
        pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
        parts[name] = pages if scales is None else _bits(pages)
        if scales is not None:
            parts[f"{name}_scales"] = scales
    return parts


def _set(array: Array, where: tuple[np.ndarray, ...], values: np.ndarray) -> None:
    array[tuple(checks.beside(array, x) for x in where)] = checks.beside(array, values)


def _carried(array: Array, like: Array) -> Array:
    """The same numbers, or bits of 8, in the library and on the device of `like`."""
    if checks.is_eight_bits(array):
        array = _bits(array)
    if not checks.is_torch(like):
        return checks.to_numpy(array)
    if not checks.is_torch(array):
        return checks.beside(like, np.array(array, order="C"))
    return array.detach().to(like.device)


def _bits(array: Array) -> Array:
    """8-bit floats as bytes, in the same memory."""
    import torch

    return array.view(torch.uint8)


def _may_share(one: Array, other: Array) -> bool:
    """Whether two arrays may overlap in memory; never for arrays of two libraries."""
    if checks.is_torch(one) != checks.is_torch(other):
        return False
    if not checks.is_torch(one):
        return np.may_share_memory(one, other)
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def _copied(array: Array) -> Array:
    return array.detach().clone() if checks.is_torch(array) else array.copy()


def _contiguous(array: Array) -> Array:
    return array.contiguous() if checks.is_torch(array) else np.array(array, order="C")


# -- checks (R20) ---------------------------------------------------------------------------------
def check_export(cache: PagedKV, pages: SequencePages) -> None:
    """The pages of one sequence are of the sizes and dtypes of a pool's."""
    checks.check_count("pages.length", pages.length, 1)
    sizes = {"blocks": -(-int(pages.length) // cache.k_pages.shape[1])}
    for name, dims in PAGE_DIMS.items():
        _, *letters = dims.split()
        ours, theirs = getattr(cache, name), getattr(pages, name.removesuffix("_pages"))
        name = f"pages.{name.removesuffix('_pages')}"
        sizes |= dict(zip(letters, ours.shape[1:]))
        checks.check_array(name, theirs, PAGE_DTYPES)
        checks.check_same_dtype(**{"the pool's": ours, name: theirs})
        checks.check_shape(name, theirs, " ".join(("blocks", *letters)), sizes)
    for name, dims in SCALE_DIMS.items():
        theirs, name = getattr(pages, f"{name}_scales"), f"{name}_scales"
        if (getattr(cache, name) is None) != (theirs is None):
            wanted = "None" if theirs is not None else "given"
            raise ValueError(
                f"pages.{name} must be {wanted} as the pool's are, got {checks.kind(theirs)}"
            )
        if theirs is not None:
            checks.check_array(f"pages.{name}", theirs, ("float32",))
            dims = dims.replace("pages", "blocks")
            checks.check_shape(f"pages.{name}", theirs, dims, sizes)
