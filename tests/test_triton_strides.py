"""Kernels address every argument by its strides, in 64 bits.

A strided argument holds the same numbers as a contiguous one, so every result is equal to the bit.
Between the numbers there is NaN, or a huge integer. `far` puts the entries of one dim so far apart
that the last one lies beyond 2^31 numbers: on a GPU, or in a sparse file, which takes memory only
for parts that are used.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
from dataclasses import replace
from itertools import count

import pytest
import torch

import msa
from msa import triton_impl
from msa.ir import PagedKV, Selection, Sequences

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter multiplies bfloat16 wrongly
BLOCK, DIM = (128, 128) if CUDA else (16, 16)  # on a GPU the measured tiles, copied in bulk
TOKENS, HEADS, GROUPS = (520, 32, 4) if CUDA else (23, 6, 3)
CONFIG = msa.MSAConfig(BLOCK, top_k=2)
E4M3 = torch.float8_e4m3fn


# -- layouts --------------------------------------------------------------------------------------
def rubbish(x):
    return 77 if not x.is_floating_point() else float("nan")


def full(x, *shape):
    return torch.full(shape, rubbish(x), device=x.device).to(x.dtype)


def spaced(x):
    """Every second entry of every dim except the last, which is a part of a wider dim."""
    *lead, last = x.shape
    wide = full(x, *(2 * n for n in lead), last + 16)
    view = wide[(*[slice(None, None, 2)] * len(lead), slice(last))]
    return fill(view, x)


def turned(x):
    """All dims except the last have the opposite order in memory: heads, then tokens."""
    *lead, last = range(x.dim())
    view = full(x, *(x.shape[d] for d in reversed(lead)), x.shape[-1])
    return fill(view.permute(*reversed(lead), last), x)


def columns(x):
    """Every second entry of every dim, the last one too."""
    wide = full(x, *(2 * n for n in x.shape))
    return fill(wide[(slice(None, None, 2),) * x.dim()], x)


def transposed(x):
    return fill(full(x, *reversed(x.shape)).permute(*reversed(range(x.dim()))), x)


def expanded(x):
    """The first entry of the first dim repeated for all others, by stride 0."""
    return x[:1].expand(x.shape)


def fill(view, x):
    with torch.no_grad():
        bits = torch.uint8 if x.dtype == E4M3 else x.dtype  # not every release copies 8-bit floats
        view.view(bits).copy_(x.view(bits))
    return view


def far(x, dim, folder):
    """The same numbers, with one dim so far apart that its last entry lies beyond 2^31.

    Before the first entry there is memory too, for offsets that overflow to negative numbers.
    """
    step = -(-(2**31) // (x.shape[dim] - 1) // 16) * 16
    step = step if step * (x.shape[dim] - 1) >= 2**31 else step + 16
    others = [n for d, n in enumerate(x.shape) if d != dim]
    inner = list(torch.empty(others, device="meta").stride())
    size, start = 2**32 + 2**26, 2**31
    assert step < 2**31 <= step * (x.shape[dim] - 1) <= size - start - x.numel()
    if CUDA:
        memory = torch.zeros(size, dtype=x.dtype, device="cuda")
    else:
        path = tempfile.mktemp(dir=folder)
        memory = torch.from_file(path, shared=True, size=size, dtype=x.dtype)
    strides = (*inner[:dim], step, *inner[dim:])
    return fill(memory.as_strided(x.shape, strides, start), x)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield path


def same(got, want):
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype
        bits = torch.uint8 if one.dtype == E4M3 else one.dtype
        one, other = one.contiguous().view(bits), other.contiguous().view(bits)
        assert not one.is_floating_point() or not one.isnan().any(), place
        assert torch.equal(one, other), place


# -- prefill and training -------------------------------------------------------------------------
def normal(seed, *shape):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(DTYPE).to(DEVICE)


def packed():
    return {
        "q": normal(0, TOKENS, HEADS, DIM), "k": normal(1, TOKENS, GROUPS, DIM),
        "v": normal(2, TOKENS, GROUPS, DIM), "q_idx": normal(3, TOKENS, GROUPS, DIM),
        "k_idx": normal(4, TOKENS, DIM),
    }  # fmt: skip


BORDERS = (0, TOKENS - 4, TOKENS)


def attend(tensors, order):
    """The results of attention."""
    output = msa.attention(
        **tensors, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, backend="triton",
        loop_order=order,
    )  # fmt: skip
    return [output.out, output.lse, output.selection.indices]


def train(tensors):
    """The results with the loss, and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = msa.attention(
        **leaves, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, align=True,
        backend="triton",
    )  # fmt: skip
    parts = (output.out, output.lse, output.kl)
    upstream = (normal(5, *output.out.shape), *(torch.ones_like(x) for x in parts[1:]))
    grads = torch.autograd.grad(parts, list(leaves.values()), upstream)
    return [*parts, output.selection.indices, *grads]


@pytest.fixture(scope="module")
def wanted():
    """The results for contiguous tensors."""
    return {
        "train": train(packed()), "warm up": warm_up(packed()),
        "kv_outer": attend(packed(), "kv_outer"), "union": attend(packed(), "union"),
    }  # fmt: skip


def check_all(tensors, wanted):
    """Every way through the kernels of prefill and training."""
    same(train(tensors), wanted["train"])
    same(warm_up(tensors), wanted["warm up"])
    for order in ("kv_outer", "union"):
        same(attend(tensors, order), wanted[order])


@pytest.mark.parametrize("layout", [spaced, turned])
def test_attention_and_its_gradients(wanted, layout):
    check_all({name: layout(x) for name, x in packed().items()}, wanted)


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1])
def test_attention_and_its_gradients_beyond_2_31(wanted, dim, folder):
    """Tokens far apart; heads far apart, as in a view of head-major tensors."""
    check_all(
        {n: far(x, dim, folder) if x.dim() > dim + 1 else x for n, x in packed().items()}, wanted
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_attention_and_its_gradients_of_expanded_tensors(dim):
    """Tokens or heads that share their memory; gradients have a place for each."""
    tensors = {
        name: x.narrow(dim, 0, 1).expand(x.shape) if x.dim() > dim + 1 else x
        for name, x in packed().items()
    }
    assert all(x.stride(dim) == 0 for x in tensors.values() if x.dim() > dim + 1)
    same(train(tensors), train({name: x.contiguous() for name, x in tensors.items()}))


def warm_up(tensors):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name != "v"}
    loss = msa.align_index(
        **leaves, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, backend="triton"
    )
    index = [leaves["q_idx"], leaves["k_idx"]]
    return [loss, *torch.autograd.grad(loss, index)]


@pytest.mark.parametrize("layout", [columns, transposed])
def test_a_selection_and_a_known_lse(wanted, layout):
    tensors, (out, lse, kl, indices, *_) = packed(), wanted["train"]
    chosen = Selection(layout(indices), Sequences(BORDERS, BORDERS), BLOCK)
    q, k, v, q_idx, k_idx = tensors.values()
    output = msa.sparse_attention(q, k, v, chosen, backend="triton")
    same((output.out, output.lse), (out, lse))
    loss = msa.align_index(
        q, k, q_idx, k_idx, chosen, lse=spaced(lse.detach()), config=CONFIG, backend="triton"
    )
    same([loss], [kl])


@pytest.mark.parametrize("layout", [columns, transposed])
def test_upstream_gradients(layout):
    tensors = {name: x.requires_grad_() for name, x in packed().items() if name in "qkv"}
    chosen = triton_impl.select_fused(
        *list(packed().values())[3:], Sequences(BORDERS, BORDERS), CONFIG
    )
    output = msa.sparse_attention(**tensors, selection=chosen, backend="triton")
    upstream = normal(5, *output.out.shape), normal(6, *output.lse.shape).float()
    grads = [
        torch.autograd.grad(
            (output.out, output.lse), list(tensors.values()), given, retain_graph=True
        )
        for given in (upstream, tuple(layout(x) for x in upstream))
    ]
    same(*grads)


def loosened(form):
    """The same form with every tensor in every second entry of a larger one."""
    changes = {n: columns(x) for n, x in vars(form).items() if isinstance(x, torch.Tensor)}
    changes |= {n: loosened(x) for n, x in vars(form).items() if n == "reverse_index"}
    return replace(form, **changes)


def test_every_form_of_the_lowering():
    """A stage accepts the output of the stage before with other strides."""
    q, k, v, q_idx, k_idx = packed().values()
    sequences = Sequences(BORDERS, BORDERS)
    scores = triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG)
    chosen = triton_impl.select_blocks(scores, CONFIG)
    index = triton_impl.reverse_selection(chosen)
    schedule = triton_impl.schedule_chunks(index, 5)
    partials = triton_impl.attend_chunks(q, k, v, schedule, 0.1)
    united = triton_impl.unite_tiles(chosen, 4)
    walked = triton_impl.attend_union(q, k, v, united, 0.1)
    slots = torch.arange(chosen.top_k, device=DEVICE) < chosen.counts[..., None]
    slots = slots.repeat_interleave(HEADS // GROUPS, 1)  # what was written: [Tq, Hq, k]

    def tensors(form):
        return [x for x in vars(form).values() if isinstance(x, torch.Tensor)]

    same(tensors(triton_impl.select_blocks(loosened(scores), CONFIG)), tensors(chosen))
    same(tensors(triton_impl.reverse_selection(loosened(chosen))), tensors(index))
    same(tensors(triton_impl.schedule_chunks(loosened(index), 5)), tensors(schedule))
    again = triton_impl.attend_chunks(q, k, v, loosened(schedule), 0.1)
    same((again.out[slots], again.lse[slots]), (partials.out[slots], partials.lse[slots]))
    same(tensors(triton_impl.unite_tiles(loosened(chosen), 4)), tensors(united))
    same(tensors(triton_impl.attend_union(q, k, v, loosened(united), 0.1)), tensors(walked))
    whole, loose = (triton_impl.combine_partials(x) for x in (partials, loosened(partials)))
    same((loose.out, loose.lse), (whole.out, whole.lse))


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1])
def test_scores_that_are_written_out_beyond_2_31(dim, folder):
    q_idx, k_idx = list(packed().values())[3:]
    sequences = Sequences(BORDERS, BORDERS)
    want = triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG).values
    q_idx, k_idx = far(q_idx, dim, folder), k_idx if dim else far(k_idx, 0, folder)
    assert torch.equal(triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG).values, want)


# -- decoding -------------------------------------------------------------------------------------
BATCH, PAGES = 3, 9
EIGHTS = [(), ("k", "v", "k_idx")]
INTEGERS = ("page_table", "lengths")  # the others are contiguous in their last dim (R20)


def cached(eight=()):
    """Three sequences of three, zero and two pages, in any order."""
    shapes = {"k": (GROUPS, DIM), "v": (GROUPS, DIM), "k_idx": (DIM,)}
    made = {
        f"{name}_pages": normal(seed, PAGES, BLOCK, *dims)
        for seed, (name, dims) in enumerate(shapes.items())
    }
    for seed, name in enumerate(eight):
        made[f"{name}_pages"] = made[f"{name}_pages"].float().to(E4M3)
        powers = torch.randint(
            -3, 4, (PAGES, *shapes[name][:-1]), generator=torch.manual_seed(seed)
        )
        made[f"{name}_scales"] = (2.0 ** powers.float()).to(DEVICE)
    table = torch.tensor([[4, 0, 7, 1], [8, 8, 8, 8], [2, 5, 3, 6]], dtype=torch.int32)
    lengths = torch.tensor([2 * BLOCK + 7, 0, BLOCK + 11], dtype=torch.int32)
    return made | {"page_table": table.to(DEVICE), "lengths": lengths.to(DEVICE)}


def asked(n=1):
    return {"q": normal(7, BATCH, n, HEADS, DIM), "q_idx": normal(8, BATCH, n, GROUPS, DIM)}


def step(parts, queries, backend="triton"):
    output = msa.decode(**queries, cache=PagedKV(**parts), config=CONFIG, backend=backend)
    live = output.out[[0, 2]], output.lse[[0, 2]]
    assert not output.out[1].any() and (output.lse[1] == -torch.inf).all()
    return [*live, output.selection.indices]


def every(change, change_integers, home):
    """All arguments in another layout, if the checks allow it."""
    return {n: (change_integers if n in INTEGERS else change)(x) for n, x in home.items()}


LAYOUTS = [(spaced, columns), (turned, transposed)]


@pytest.mark.parametrize("eight", EIGHTS, ids=["wide", "8 bits"])
def test_decode(eight):
    parts, queries = cached(eight), asked()
    want = step(parts, queries)
    for layout in LAYOUTS:
        same(step(every(*layout, parts), every(*layout, queries)), want)
    for name in INTEGERS:
        same(step(parts | {name: columns(parts[name])}, queries), want)


@pytest.mark.parametrize("name", [*(n for n in cached(EIGHTS[1]) if n != "k_idx_scales"), *asked()])
def test_decode_with_expanded_tensors(name):
    parts, queries = cached(EIGHTS[1]), asked()
    parts["lengths"] = torch.full_like(parts["lengths"], BLOCK + 3)
    home = parts if name in parts else queries
    home[name] = expanded(home[name])
    assert home[name].stride(0) == 0
    got, want = (
        msa.decode(**{n: change(x) for n, x in queries.items()}, config=CONFIG, backend="triton",
                   cache=PagedKV(**{n: change(x) for n, x in parts.items()}))
        for change in (lambda x: x, torch.clone)
    )  # fmt: skip
    same((got.out, got.lse, got.selection.indices), (want.out, want.lse, want.selection.indices))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_decode_with_any_integers(dtype, as_users_run_it):
    """An empty slot is recognised with unsigned integers too."""
    parts, queries = cached(), asked()
    want = step(parts, queries)
    if torch.iinfo(dtype).max >= 2 * BLOCK + 7:
        same(step(parts | {"lengths": parts["lengths"].to(dtype)}, queries), want)
    same(step(parts | {"page_table": parts["page_table"].to(dtype)}, queries), want)


@pytest.mark.large
@pytest.mark.parametrize("eight", EIGHTS, ids=["wide", "8 bits"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_decode_beyond_2_31(eight, dim, folder):
    parts, queries = cached(eight), asked(n=3)
    want = step(parts, queries)
    parts = {name: far_if_long(name, x, dim, folder) for name, x in parts.items()}
    queries = {name: far_if_long(name, x, dim, folder) for name, x in queries.items()}
    same(step(parts, queries), want)


def far_if_long(name, x, dim, folder):
    """A dim of at least three entries, which need not be contiguous, is spread far apart."""
    lead = x.dim() if name in INTEGERS else x.dim() - 1
    return far(x, dim, folder) if dim < lead and x.shape[dim] > 2 else x


def tokens(n=3):
    shapes = {"k": (GROUPS, DIM), "v": (GROUPS, DIM), "k_idx": (DIM,)}
    return {name: normal(20 + s, BATCH, n, *dims) for s, (name, dims) in enumerate(shapes.items())}


def append(parts, new):
    """The cache afterwards. The page of block 2 of the last sequence is a new one."""
    msa.append_tokens(PagedKV(**parts), **new)
    return list(parts.values())


APPENDED = EIGHTS if CUDA else EIGHTS[:1]  # the interpreter rounds to e4m3 wrongly


def fresh(eight):
    parts = cached(eight)
    parts["lengths"][2] = 2 * BLOCK - 1
    return parts


@pytest.mark.parametrize("eight", APPENDED, ids=["wide", "8 bits"][: len(APPENDED)])
def test_append_tokens(eight):
    """The caller's own tensors are written, whatever their strides."""
    want = append(fresh(eight), tokens())
    assert want[-1].tolist() == [2 * BLOCK + 10, 0 + 3, 2 * BLOCK + 2]
    for layout in LAYOUTS:
        same(append(every(*layout, fresh(eight)), every(*layout, tokens())), want)
    shared = {name: expanded(x) for name, x in tokens().items()}
    whole = {name: x.contiguous() for name, x in shared.items()}
    same(append(fresh(eight), shared), append(fresh(eight), whole))


def test_append_tokens_needs_memory_for_keys_and_for_values():
    parts = fresh(())
    parts["v_pages"] = parts["k_pages"]
    wanted = "cache.v_pages must have memory of its own, got that of cache.k_pages"
    with pytest.raises(ValueError, match=wanted):
        append(parts, tokens())


def test_append_tokens_writes_only_what_it_should():
    """The lengths are a column of a wider tensor; the other column does not change."""
    parts = fresh(())
    both = torch.stack([parts["lengths"], torch.full_like(parts["lengths"], 55)], 1)
    parts["lengths"] = both[:, 0]
    append(parts, tokens())
    assert both.tolist() == [[2 * BLOCK + 10, 55], [3, 55], [2 * BLOCK + 2, 55]]


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_append_tokens_beyond_2_31(dim, folder):
    want = append(fresh(APPENDED[-1]), tokens())
    parts, new = (
        {name: far_if_long(name, x, dim, folder) for name, x in home.items()}
        for home in (fresh(APPENDED[-1]), tokens())
    )
    same(append(parts, new), want)


@pytest.mark.parametrize("name", ["lengths", "k_pages", "v_pages", "k_idx_pages"])
def test_append_tokens_refuses_what_has_no_place_for_each_entry(name):
    parts = fresh(())
    parts[name] = expanded(parts[name])
    with pytest.raises(ValueError, match=rf"cache.{name} must have memory for each number, got"):
        append(parts, tokens())


# -- the rule for strides -------------------------------------------------------------------------
def test_no_kernel_multiplies_a_stride_itself():
    """Kernels use strides only as arguments of `along` and of other kernels."""
    found, names = count(), []
    for module in sorted({m for m in vars(triton_impl).values() if inspect.ismodule(m)}, key=str):
        tree = ast.parse(inspect.getsource(module))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or function.name == "along":
                continue
            given = {id(a) for c in ast.walk(function) if isinstance(c, ast.Call) for a in c.args}
            for name in ast.walk(function):
                if isinstance(name, ast.Name) and name.id.startswith("stride"):
                    next(found)
                    if id(name) not in given:
                        names.append(f"{module.__name__}:{name.lineno}: {name.id}")
    assert not names
    assert next(found) > 50  # the test has seen them
