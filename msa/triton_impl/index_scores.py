"""Index branch, unfused: the score of every block, written out (eq. 6, R4, R5).

    for each tile of rows (query, group) and each run of blocks:
        for each block b of the run:
            S    = index_scale * q_idx_rows @ k_idx[b]^T
            M[b] = max over the visible tokens of S;  -inf if none is visible

What the fast form changes:
 1. All groups share one index key, so the rows of a tile are (query, group) pairs: with four
    groups a key tile serves four times as many rows.
 2. Blocks before the tile's first query are visible as a whole and need no mask.
 3. The hardware's maximum drops NaN, so only a block with no other score needs a check.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, BlockScores, Sequences
from msa.triton_impl.launch import is_exact, pad, require_kernels
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import tile_table
from msa.triton_impl.tile_verbs import along, load_tile
from msa.triton_impl.tile_walk import load_tile_record
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def score_kernel(q, k, tiles, out, scale, n_blocks, stride_qt, stride_qr, stride_kt,
                 HKV: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                 BK: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One tile of BM rows times RUN blocks.

    Parameters:
        q: [Tq, Hkv, Di], 16-bit or float32; index queries
        k: [Tk, Di], as q; index keys
        tiles: [tiles, 5], int32; a `tile_table`
        out: [Tq, Hkv, NB], float32; scores, written
        scale: float; index scale
        n_blocks: int; NB
        stride_qt, stride_kt: elements from one token of q, k to the next
        stride_qr: elements from one group of q to the next
        HKV, BM: groups, rows of the tile (queries times groups)
        DIM, BD: Di, and rounded up to a power of two
        BK, BN: keys of a block, keys of one product
        RUN: blocks of one program
        PRECISION: input precision of the products
    """
    start, stop, own, first_key, _ = load_tile_record(tiles, tl.program_id(0))
    o_m = tl.arange(0, BM)
    o_t = start + o_m // HKV  # [BM] query
    b_own = own + o_m // HKV  # [BM] its own key
    m_m = o_t < stop
    o_d = tl.arange(0, BD)
    p_q = q + along(o_t, stride_qt) + along(o_m % HKV, stride_qr)  # [BM]
    b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]
    p_out = out + (o_t.to(tl.int64) * HKV + o_m % HKV) * n_blocks  # [BM]

    last_own = own + stop - start - 1
    i_first = tl.program_id(1) * RUN
    for i_b in range(i_first, tl.minimum(i_first + RUN, n_blocks)):
        b_max = tl.full([BM], float("-inf"), tl.float32)
        if first_key + i_b * BK <= last_own:
            for n in tl.static_range(0, BK, BN):
                o_n = first_key + i_b * BK + n + tl.arange(0, BN)
                p_k = k + along(o_n, stride_kt)[None, :] + o_d[:, None]
                m_k = (o_n <= last_own)[None, :] & (o_d < DIM)[:, None]
                b_s = tl.dot(b_q, tl.load(p_k, mask=m_k, other=0.0), input_precision=PRECISION)
                if first_key + i_b * BK + n + BN > own:
                    b_s = tl.where(o_n[None, :] <= b_own[:, None], b_s, float("-inf"))
                b_s = tl.max(b_s, 1)
                b_max = tl.maximum(b_max, tl.where(b_s == b_s, b_s, float("-inf")))
        tl.store(p_out + i_b, b_max * scale, mask=m_m)


@on_its_device
def score_blocks(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig, tile: TileConfig | None = None,
) -> BlockScores:  # fmt: skip
    """For every query, group and block the highest visible token score (R4, R5), float32."""
    require_kernels(config.block_size, q_idx=q_idx, k_idx=k_idx)
    n_q, groups, dim = q_idx.shape
    n_blocks = sequences.max_blocks(config.block_size)
    values = torch.empty((n_q, groups, n_blocks), dtype=torch.float32, device=q_idx.device)
    tile = tile or choose("select", q_idx.dtype, pad(dim), config.block_size)
    rows = max(tile.rows // 2, pad(groups))
    tiles = tile_table(sequences, rows // groups, q_idx.device)
    run = 16
    if len(tiles) and n_blocks:
        score_kernel[len(tiles), triton.cdiv(n_blocks, run)](
            q_idx, k_idx, tiles, values, config.index_scale_for(dim), n_blocks,
            q_idx.stride(0), q_idx.stride(1), k_idx.stride(0),
            HKV=groups, DIM=dim, BD=pad(dim), BM=rows, BK=config.block_size, BN=tile.keys,
            RUN=run, PRECISION=is_exact(q_idx), **tile.launch(),
        )  # fmt: skip
    return BlockScores(values, sequences, config.block_size)
