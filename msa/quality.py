"""How much a cache of 8 bits changes decoding, compared with a cache that is not rounded."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int

from msa import checks
from msa.api import decode
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.ir import Array, Output
from msa.layout import read_layout
from msa.paging import PagePool

KINDS = {"index": ("k_idx",), "kv": ("k", "v"), "both": ("k", "v", "k_idx")}


@dataclass(frozen=True)
class CacheQuality:
    """How close decoding from a rounded cache is to decoding from the exact cache."""

    block_recall: float
    """The share of the exact cache's blocks that are selected from the rounded one as well."""
    score_recall: float
    """The scores of the blocks selected from the rounded cache, over those from the exact cache.

    Both are sums of scores (R5) of the exact tensors, in float64; own blocks, which are always
    selected, do not count. The ratio is meaningful where the best scores are positive, as in large
    blocks.
    """
    output_error: float
    """|out - exact out| / |exact out|, over all queries and heads at once."""


def cache_quality(
    q: Float[Array, "n Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    q_idx: Float[Array, "n Hkv Di"], k_idx: Float[Array, "Tk Di"],
    *, config: MSAConfig = MSAConfig(), backend: BackendName = "auto",
) -> dict[str, CacheQuality]:  # fmt: skip
    """Decode the last n tokens of one sequence from three rounded caches, and compare.

    Args:
        q, k, v, q_idx, k_idx: torch tensors in float16, bfloat16 or float32; queries for the last n
            tokens (R2). The exact cache has their dtypes.
        config, backend: as in `decode`.

    Returns:
        A CacheQuality for 8-bit index keys ("index"), for 8-bit keys and values ("kv"), and for all
        three ("both"). Rounding keys and values does not change the selection: its recalls are 1.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> import torch
    >>> shapes = (2, 4, 32), (4096, 2, 32), (4096, 2, 32), (2, 2, 32), (4096, 32)
    >>> found = cache_quality(*map(torch.randn, shapes), config=MSAConfig(block_size=64, top_k=8))
    >>> found["index"].block_recall > 0.8, found["index"].score_recall > 0.99
    (True, True)
    >>> found["kv"].block_recall, found["kv"].score_recall, 0 < found["kv"].output_error < 0.1
    (1.0, 1.0, True)
    """
    checks.check_type("config", config, MSAConfig)
    arrays = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    for name, array in arrays.items():
        checks.check_torch(name, array)
        checks.check_array(name, array, checks.KERNEL_DTYPES)
    read_layout(arrays, batched=False)

    def run(eight: tuple[str, ...]) -> Output:
        pool = _filled(k, v, k_idx, config.block_size, eight)
        return decode(q[None], q_idx[None], pool.cache, config=config, backend=backend)

    exact = run(())
    return {kind: _judge(q_idx, k_idx, exact, run(eight)) for kind, eight in KINDS.items()}


def _filled(k: Array, v: Array, k_idx: Array, block_size: int, eight: tuple[str, ...]) -> PagePool:
    """A pool that holds one sequence, with pages of 8 bits for the names in `eight`."""
    import torch

    tokens = {"k": k, "v": v, "k_idx": k_idx}
    shape = -(-len(k) // block_size), block_size
    pages = (
        x.new_zeros((*shape, *x.shape[1:]), dtype=torch.float8_e4m3fn if name in eight else x.dtype)
        for name, x in tokens.items()
    )
    pool = PagePool(*pages, batch=1)
    pool.append(0, **tokens)
    return pool


def _judge(q_idx: Array, k_idx: Array, exact: Output, found: Output) -> CacheQuality:
    assert exact.selection is not None and found.selection is not None
    fine, coarse = exact.selection.indices, found.selection.indices
    agree = (fine[..., :, None] == coarse[..., None, :]).any(-1) & (fine >= 0)
    block = exact.selection.block_size
    kept, had = (_scores_kept(q_idx, k_idx, ids, block) for ids in (coarse, fine))
    wanted = exact.out.double()
    return CacheQuality(
        block_recall=_ratio(agree.sum(), (fine >= 0).sum(), 1.0),
        score_recall=_ratio(kept, had, 1.0),
        output_error=_ratio((found.out.double() - wanted).norm(), wanted.norm(), 0.0),
    )


def _scores_kept(
    q_idx: Float[Array, "n Hkv Di"], k_idx: Float[Array, "Tk Di"],
    ids: Int[Array, "n Hkv k"], block_size: int,
) -> float:  # fmt: skip
    """The sum of the scores of selected blocks before each query's own one."""
    total, first = 0.0, len(k_idx) - len(q_idx)
    for i, queries in enumerate(q_idx.double()):
        own = (first + i) // block_size
        if own:
            scores = queries @ k_idx[: own * block_size].double().T
            best = scores.unflatten(1, (own, block_size)).amax(2)
            remote = (ids[i] >= 0) & (ids[i] < own)
            total += float(best.gather(1, ids[i].clamp(0, own - 1).long())[remote].sum())
    return total


def _ratio(part: Array | float, whole: Array | float, of_nothing: float) -> float:
    return float(part / whole) if whole else of_nothing
