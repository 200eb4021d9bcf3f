"""Bad input of the functions of `msa.ops` (R20), and which ids are validated."""

from __future__ import annotations

import pytest
import torch
from operator_calls import BORDERS, CONFIG, NAMES, OPS, decode_args, make

import msa
import msa.ops
from msa import selection


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: t.__setitem__(2, t[2][:, :1]), r"v must have shape \[Tk, Hkv, Dv\]"),
        (lambda t: t.__setitem__(4, t[4].double()), "k_idx must have the dtype of q_idx"),
        (lambda t: t.__setitem__(0, t[0][:, :3]), "q must have a number of heads Hq"),
    ],
)
def test_bad_tensors(break_it, message):
    tensors = make()
    break_it(tensors)
    with pytest.raises((TypeError, ValueError), match=message):
        msa.ops.attention(*tensors, *BORDERS, config=CONFIG)


def layouts():
    """Tensors of 40 tokens: packed, 2 sequences of 20, and 4 sequences of 10."""
    return (
        dict(zip(NAMES, make(lead=lead, n_q=n, n_k=n)))
        for lead, n in (((), 40), ((2,), 20), ((4,), 10))
    )


PACKED, TWO, FOUR = layouts()
KINDS = [
    (TWO | {"v": FOUR["v"], "k_idx": FOUR["k_idx"]}, r"v must have shape \[B, Tk, Hkv, Dv\] = \[2"),
    (TWO | {"q_idx": FOUR["q_idx"]}, r"q_idx must have shape \[B, Tq, Hkv, Di\] = \[2, 20, 2"),
    (TWO | {"cu_seqlens_q": [0, 40], "cu_seqlens_k": [0, 40]}, "cu_seqlens_q must be None where t"),
    (PACKED | {"cu_seqlens_q": [0, 40]}, "cu_seqlens_k must be given along with cu_seqlens_q"),
    ({n: x[None, None] for n, x in PACKED.items()}, r"q must have shape .* got \[1, 1, 40, 4, 16"),
    (PACKED | {"cu_seqlens_q": [0.0, 40.0], "cu_seqlens_k": [0, 40]}, r"cu_seqlens_q\[0\] must be"),
    (
        PACKED | {"cu_seqlens_q": 5, "cu_seqlens_k": [0, 40]},
        "cu_seqlens_q must be a tuple, list, a",
    ),
    (PACKED | {"cu_seqlens_q": b"\0(", "cu_seqlens_k": [0, 40]}, "integers, got bytes"),
    (PACKED | {"q": PACKED["q"].numpy()}, "q must be a torch.Tensor, got numpy.ndarray"),
    (
        PACKED | {"k": PACKED["k"].to("meta")},
        "k must hold numbers, got a tensor on the device meta",
    ),
    (PACKED | {"config": None}, "config must be a msa.MSAConfig, got NoneType"),
    (PACKED | {"align": 1}, "align must be True or False, got 1"),
]


@pytest.mark.parametrize(("arguments", "message"), KINDS, ids=[m[:30] for _, m in KINDS])
def test_the_layout_is_checked_before_tensors_are_packed(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        msa.ops.attention(**{"config": CONFIG} | arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: msa.ops.select_blocks(torch.zeros(40, 4), PACKED["k_idx"]),
         r"q_idx must have shape .*, got \[40, 4\]"),
        (lambda: msa.ops.select_blocks(FOUR["q_idx"], PACKED["k_idx"]),
         r"k_idx must have shape \[B, Tk, Di\], got \[40, 8\]"),
        (lambda: msa.ops.align_index(*(TWO[n] for n in ("q", "k", "q_idx", "k_idx")),
                                     lse=torch.zeros(4, 10, 4)),
         r"lse must have shape \[B, Tq, Hq\] = \[2, 20, 4\], got \[4, 10, 4\]"),
        (lambda: msa.ops.sparse_attention(*(PACKED[n] for n in ("q", "k", "v")), None),
         "indices must be a torch.Tensor, got NoneType"),
        (lambda: msa.ops.sparse_attention(*(PACKED[n] for n in ("q", "k", "v")),
                                          torch.zeros(40, 2, 1)),
         "indices must have dtype int32, got torch.float32"),
        (lambda: msa.ops.decode(*decode_args()[:2], None), "cache must be a msa.PagedKV, got None"),
        (lambda: msa.ops.decode(*decode_args(), None), "config must be a msa.MSAConfig, got None"),
        (lambda: msa.ops.decode(*decode_args(), msa.MSAConfig(block_size=4)),
         r"cache.k_pages must have shape .* = \[any, 4, any, any\], got \[6, 8, 2, 16\]"),
        (lambda: msa.ops.decode(decode_args()[0].numpy(), *decode_args()[1:]),
         "q must be a torch.Tensor, got numpy.ndarray"),
    ],
)  # fmt: skip
def test_the_other_functions_check_before_they_pack(call, message, as_users_run_it):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_compiled_call_checks_its_layout():
    compiled = torch.compile(msa.ops.attention, backend="eager")
    for arguments, message in KINDS[:4]:
        torch.compiler.reset()
        with pytest.raises(ValueError, match=message):
            compiled(**arguments, config=CONFIG)


def test_inside_transforms():
    """vmap calls the operator once for each entry. A tangent would be lost, so jvp is refused."""
    q = torch.stack([PACKED["q"], 2 * PACKED["q"]])

    def out(q):
        return msa.ops.attention(**PACKED | {"q": q}, config=CONFIG).out

    assert torch.equal(torch.func.vmap(out)(q), torch.stack([out(q[0]), out(q[1])]))
    with pytest.raises(TypeError, match=r"q must be a tensor outside of torch\.func"):
        torch.func.jvp(out, (q[0],), (q[1],))


def test_what_attention_selects_is_not_read_back(monkeypatch):
    """Validation of a caller's indices waits for the device; those of msa need no validation."""

    def validate(*_):
        raise AssertionError("validated")

    monkeypatch.setattr(selection, "check_canonical", validate)
    counted = lambda ids: True  # noqa: E731 - as on a GPU
    monkeypatch.setattr(selection, "counts_writes", counted)
    q, k, v, q_idx, k_idx = make(grad=True)
    output = msa.ops.attention(q, k, v, q_idx, k_idx, *BORDERS, config=CONFIG, align=True)
    (output.out.sum() + output.kl).backward()
    with pytest.raises(AssertionError, match="validated"):
        msa.ops.align_index(q, k, q_idx, k_idx, output.indices, *BORDERS, config=CONFIG)


def test_bad_numbers():
    q, k, v, q_idx, k_idx = make()
    with pytest.raises(ValueError, match="cu_seqlens_q must end with Tq = 30, got 29"):
        msa.ops.attention(q, k, v, q_idx, k_idx, (0, 29), (0, 40), CONFIG)
    ids = torch.zeros(30, 2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"selection.indices must be ascending and unique \(R8\)"):
        msa.ops.sparse_attention(q, k, v, ids, *BORDERS, block_size=8)
    with pytest.raises(ValueError, match=r"selection.indices must be ascending and unique \(R8\)"):
        msa.ops.align_index(q, k, q_idx, k_idx, ids, *BORDERS, config=CONFIG)
    q_idx.requires_grad_()
    kl, *_ = OPS.align_index(q, k, q_idx, k_idx, None, None, *BORDERS, 8, False)
    with pytest.raises(ValueError, match="with_gradient must be True where q_idx"):
        kl.backward()
