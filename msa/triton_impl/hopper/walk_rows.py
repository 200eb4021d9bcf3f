"""What a consumer of the union walk does with its rows: load, softmax, fold, write (R9, R10, R16).

The functions of `union_walk.py` that need no ring. Scores are not scaled when they arrive. The
softmax takes exp2(s * scale - shift), one multiply-add for each score, where shift is the rounded
product of the row's highest score `top` and the scale. All blocks of a row use the same shift until
`top` rises, so its rounding cancels: at the end, `finish` takes it off the sum.

Where |shift| >= LARGE it would not cancel, because s * scale is then rounded more coarsely than the
weights allow. There the scale is rounded up to a power of two, whose products are exact. A token
that is not at the maximum has a weight of next to nothing with either scale. A logit beyond
float32's range gives NaN, which a softmax scale of at most LARGEST_SCALE (`msa.kernel_choice`)
rules out.

Where the keys and values of a block have factors (`wide_pages.py`), the scores of the block are
multiplied by the first one. It is part of the scale: s * (factor * scale) - shift, so it costs
nothing for a score. `top` is the rounded product of a score and its factor. Where logits are large,
the block's own highest score is subtracted before, without the factor: the difference of 0 at the
maximum is then exact again. The second factor stands outside of the sum over a block's tokens. The
outputs are kept in units of the last block's factor, and a step to another unit is part of the
decay.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-(2.0**128 - 2.0**104))  # float32's lowest number: a maximum of no scores
LARGE = gl.constexpr(2.0**28)  # beyond this, a logit's last bit decides everything


# -- softmax --------------------------------------------------------------------------------------
@gluon.jit
def rounded_product(x, y):
    """x * y rounded to float32: the compiler must not fuse it with an addition."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def shift_of(top, scale, scale_up):
    """Of each row: what is subtracted from scaled scores, the scale, whether logits are large."""
    shift = rounded_product(top, scale + gl.zeros_like(top))
    large = gl.abs(shift) >= LARGE
    factor = gl.where(large, scale_up, scale)
    shift = gl.where(large, gl.maximum(top * scale_up, LOWEST), shift)
    return shift, factor, large


@gluon.jit
def softmax_step(s, top, shift, total, m_row, scale, scale_up, by, SCALED: gl.constexpr):
    """Take in the scores s [rows, BK]: the new top, shift and total, the weights, the decay.

    by: the factor of the scores, used with SCALED only.
    """
    peak = gl.max(s, 1)
    high = peak
    if SCALED:
        high = rounded_product(peak, by + gl.zeros_like(peak))
    new = gl.where(m_row, gl.maximum(top, high), top)
    new_shift, factor, large = shift_of(new, scale, scale_up)
    less = -new_shift
    if SCALED:
        less = gl.where(large, (high - new) * scale_up - peak * scale_up, less)
        factor = gl.where(large, scale_up, scale * by)
    less = gl.where(m_row, less, float("-inf"))
    p = gl.exp2(gl.fma(s, gl.expand_dims(factor, 1).broadcast_to(s.shape),
                       gl.expand_dims(less, 1).broadcast_to(s.shape)))  # fmt: skip
    decay = gl.exp2(gl.where(large, (top - new) * scale, shift - new_shift))
    return new, new_shift, total * decay + gl.sum(p, 1), p, decay


@gluon.jit
def mask_tokens(s, first, own, o_i, BK: gl.constexpr, S_MMA: gl.constexpr):
    """-inf where the token stands behind the row's own key."""
    o_n = first + gl.arange(0, BK, layout=gl.SliceLayout(0, S_MMA))
    return gl.where(o_n[None, :] <= (own + o_i)[:, None], s, float("-inf"))


@gluon.jit
def to_rows(x, MMA: gl.constexpr):
    """A number of each row, as the outputs lie; nothing moves."""
    return gl.convert_layout(x, gl.SliceLayout(1, MMA), assert_trivial=True)


@gluon.jit
def along_rows(x, MMA: gl.constexpr):
    """The same, as a column."""
    return gl.expand_dims(to_rows(x, MMA), 1)


# -- an item: one tile of queries, one group ------------------------------------------------------
@gluon.jit
def load_item(tables, item, U, HKV: gl.constexpr, BK: gl.constexpr):
    """Of an item: where its union lies, how many blocks it has, and how many need a token mask."""
    tiles, ids, _unused, counts = tables
    record = tiles + (item // HKV) * 5
    n = gl.load(counts + item)
    base = item.to(gl.int64) * U
    own = gl.load(record + 2)
    first_key = gl.load(record + 3)
    last = gl.load(ids + base + gl.maximum(n - 1, 0))
    before = gl.load(ids + base + gl.maximum(n - 2, 0))
    edges = ((n > 0) & (first_key + (last + 1) * BK - 1 > own)).to(gl.int32)
    edges += ((n > 1) & (first_key + (before + 1) * BK - 1 > own)).to(gl.int32)
    return n, edges, base, own, first_key, gl.load(record + 4)


@gluon.jit
def load_bits(masks, base, n, j):
    """Bits of the queries that selected the block of step j; blocks come in descending order."""
    return gl.load(masks + base + gl.maximum(n - 1 - j, 0))


@gluon.jit
def load_first(wide, item, HKV: gl.constexpr, SCALED: gl.constexpr):
    """Where the factors of a sequence's first block lie, for the group of this item.

    The blocks of a sequence are neighbours among pages that were widened.
    """
    owners, table, stride_ts, factors = wide
    if SCALED:
        p_table = table + gl.load(owners + item // HKV).to(gl.int64) * stride_ts
        return factors + (gl.load(p_table).to(gl.int64) * HKV + item % HKV) * 2
    else:
        return factors


@gluon.jit
def load_factors(p_first, ids, base, n, j, HKV: gl.constexpr, SCALED: gl.constexpr):
    """The factors of the keys and of the values of the block of step j; 1 without SCALED."""
    if SCALED:
        i_b = gl.load(ids + base + n - 1 - j)
        p_factor = p_first + i_b.to(gl.int64) * (2 * HKV)
        return gl.load(p_factor), gl.load(p_factor + 1)
    else:
        return 1.0, 1.0


@gluon.jit
def load_rows(q, tiles, item, m, d, W: gl.constexpr, POS: gl.constexpr, HEADS: gl.constexpr,
              G: gl.constexpr, HKV: gl.constexpr, stride_qt, stride_qh):  # fmt: skip
    """The queries of consumer W in this item, [rows, DIM]; zeros where there is no row."""
    p_tile = tiles + (item // HKV) * 5
    t = gl.load(p_tile) + W * POS + m // HEADS
    h = m % HEADS
    real = (t < gl.load(p_tile + 1)) & (h < G)
    p = q + t.to(gl.int64) * stride_qt + ((item % HKV) * G + h).to(gl.int64) * stride_qh
    return gl.load(p[:, None] + d[None, :], mask=real[:, None], other=0.0)


@gluon.jit
def clear_foreign(v, first, key_stop):
    """Zeros in place of the values of another sequence, whose NaN must not get here."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    n = first + gl.arange(0, v.shape[0], layout=gl.SliceLayout(1, L))
    x = v.load(L)
    v.store(gl.where((n < key_stop)[:, None], x, 0.0))
    fence_async_shared()


@gluon.jit
def fold(acc, top, total, parts, part_tops, part_totals, part_counts, t, x, i_r, real, d, scale,
         HKV: gl.constexpr, DIM: gl.constexpr, TOP_K: gl.constexpr):  # fmt: skip
    """Add the slots of blocks that the walk left out (R16)."""
    count = gl.load(part_counts + t * HKV + i_r, mask=real, other=0)
    for i in range(gl.max(count, 0)):
        m = i < count
        b_top = gl.load(part_tops + x * TOP_K + i, mask=m, other=LOWEST)
        b_total = gl.load(part_totals + x * TOP_K + i, mask=m, other=0.0)
        most = gl.maximum(top, b_top)
        decay = gl.exp2((top - most) * scale)
        weight = b_total * gl.exp2((b_top - most) * scale)
        p_part = parts + (x * TOP_K + i)[:, None] * DIM + d[None, :]
        part = gl.load(p_part, mask=m[:, None], other=0.0)
        acc = acc * decay[:, None] + weight[:, None] * part.to(gl.float32)
        total = total * decay + weight
        top = most
    return acc, top, total


@gluon.jit
def finish(acc, top, shift, total, folded, out, lse, i_r, t, h, real, o_d, scale, scale_up,
           G: gl.constexpr, HKV: gl.constexpr, DIM: gl.constexpr, TOP_K: gl.constexpr,
           FOLD: gl.constexpr):  # fmt: skip
    """Divide by the sum, fold in the slots of other blocks, write out and lse."""
    parts, part_tops, part_totals, part_counts = folded
    _, _, large = shift_of(top, scale, scale_up)
    rest = gl.fma(top, scale + gl.zeros_like(top), -shift)  # what rounding took off the shift
    right = gl.exp2(gl.where(large, 0.0, -rest))
    total = total * right
    x = t.to(gl.int64) * (HKV * G) + i_r * G + h
    if FOLD:
        acc = acc * right[:, None]
        acc, top, total = fold(acc, top, total, parts, part_tops, part_totals, part_counts,
                               t.to(gl.int64), x, i_r, real, o_d, scale, HKV, DIM,
                               TOP_K)  # fmt: skip
        o = acc * (1.0 / total)[:, None]
    else:
        o = acc * (right / total)[:, None]
    p_out = out + x[:, None] * DIM + o_d[None, :]
    gl.store(p_out, o.to(out.dtype.element_ty), mask=real[:, None])
    gl.store(lse + x, top * (scale * LN2) + gl.log(total), mask=real)
