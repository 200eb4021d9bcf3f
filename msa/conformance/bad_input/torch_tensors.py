"""Bad torch tensors: mixed with NumPy, without numbers, sparse, nested, or of a subclass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

import msa
from msa.conformance.bad_input import BadInput, attention
from msa.conformance.bad_input.kit import CONFIG, SHAPES, Kit
from msa.conformance.bad_input.torch_arrays import torch_array, torch_arrays, torch_pool


def _without_interpreter() -> Any:
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}):
        return msa.attention(**torch_arrays(), config=CONFIG, backend="triton")


TORCH_CASES = [
    attention("a loop order for torch", ValueError,
              ("loop_order", "'auto' for backend='torch'", "one order", "got 'union'"),
              lambda kit: torch_arrays(loop_order="union", backend="torch")),
    attention("8 bits for torch", ValueError,
              ("index_dtype", "None for backend='torch'", "got 'fp8_e4m3'"),
              lambda kit: torch_arrays(index_dtype="fp8_e4m3", backend="torch")),
    attention("kernels for torch", ValueError,
              ("kernels", "'auto' for backend='torch'", "no kernels", "got 'hopper'"),
              lambda kit: torch_arrays(kernels="hopper", backend="torch")),
    attention("mixed kinds", TypeError, ("k", "torch.Tensor as q is", "numpy.ndarray"),
              lambda kit: torch_arrays(k=np.ones(SHAPES["k"], np.float32))),
    attention("a tensor without numbers", ValueError, ("v", "hold numbers", "meta"),
              lambda kit: torch_arrays(v=torch_array(*SHAPES["v"], device="meta"))),
    attention("index branch without numbers", ValueError, ("k_idx", "hold numbers", "meta"),
              lambda kit: torch_arrays(k_idx=torch_array(*SHAPES["k_idx"], device="meta"))),
    attention("a gradient asked of the reference", ValueError,
              ("q", "gradient", "requires_grad=True"),
              lambda kit: torch_arrays(q=torch_array(*SHAPES["q"], requires_grad=True),
                                        backend="reference")),
    BadInput("lse without numbers", ValueError, ("lse", "hold numbers", "meta"),
             lambda kit: msa.align_index(
                 **{n: torch_array(*SHAPES[n]) for n in ("q", "k", "q_idx", "k_idx")},
                 lse=torch_array(6, 4, device="meta"), config=CONFIG)),
    BadInput("mixed kinds in a pool", TypeError, ("v_pages", "torch.Tensor as k_pages", "ndarray"),
             lambda kit: torch_pool(v_pages=np.ones((3, 4, 2, 3), np.float32))),
    BadInput("new keys without numbers", ValueError, ("k", "hold numbers", "meta"),
             lambda kit: torch_pool().append(0, *(
                 torch_array(1, *SHAPES[n][1:], device="meta") for n in ("k", "v", "k_idx")))),
    BadInput("triton on the CPU", ValueError, ("backend='triton'", "CUDA", "cpu"),
             lambda kit: _without_interpreter()),
    BadInput("a selection of another kind", TypeError, ("selection.indices", "Tensor", "ndarray"),
             lambda kit: kit.sparse(**{n: torch_array(*SHAPES[n]) for n in ("q", "k", "v")},
                                    selection=msa.Selection(
                                        np.array(kit.subject.read(kit.selection().indices)),
                                        msa.Sequences.one(6, 8), 4))),
]  # fmt: skip


def _views_with_pending_negation() -> Any:
    import torch

    return torch.ones(6, 4, 1, dtype=torch.complex64).conj().imag


def _jagged() -> Any:
    import torch

    return torch.nested.nested_tensor(
        [torch.ones(2, 4, 4), torch.ones(4, 4, 4)], layout=torch.jagged
    )


def _nested() -> Any:
    import torch

    return torch.nested.nested_tensor([torch.ones(2, 4, 4), torch.ones(4, 4, 4)])


def _subclass() -> Any:
    import torch

    class Marked(torch.Tensor):
        """A subclass of tensors."""

    return torch.ones(SHAPES["q"]).as_subclass(Marked)


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch_array(*SHAPES["q"])


def _in_vmap(kit: Kit) -> Any:
    import torch

    def attend(q: Any) -> Any:
        return kit.attention(**torch_arrays(q=q, backend="torch"))

    return torch.func.vmap(attend)(torch_array(2, *SHAPES["q"]))


def _in_grad(kit: Kit) -> Any:
    import torch

    def total(q: Any) -> Any:
        return kit.attention(**torch_arrays(q=q, backend="torch")).out.sum()

    return torch.func.grad(total)(torch_array(*SHAPES["q"]))


def _with_tangent(kit: Kit) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        k = forward_ad.make_dual(torch_array(*SHAPES["k"]), torch_array(*SHAPES["k"]))
        return kit.attention(**torch_arrays(k=k, backend="torch"))


def dense(name: str, says: tuple[str, ...], make: Callable[[], Any]) -> BadInput:
    """A case with another kind of tensor as q."""
    error = ValueError if "resolve_neg" in says[-1] else TypeError
    return attention(name, error, ("q", *says), lambda kit: torch_arrays(q=make()))


MEMORY_CASES = [
    dense("a sparse tensor", ("dense", "torch.sparse_coo", "to_dense"),
          lambda: torch_array(*SHAPES["q"]).to_sparse()),
    dense("a sparse tensor by rows", ("dense", "torch.sparse_csr", "to_dense"),
          lambda: torch_array(*SHAPES["q"]).to_sparse_csr()),
    dense("a nested tensor", ("dense", "nested", "cu_seqlens"), _nested),
    dense("a jagged tensor", ("torch.Tensor itself", "NestedTensor", "offsets()"), _jagged),
    dense("a subclass of tensors", ("torch.Tensor itself", "Marked", "as_subclass"), _subclass),
    dense("a fake tensor", ("torch.Tensor itself", "FakeTensor", "msa.ops"), _fake),
    dense("a view to be negated", ("hold its numbers", "negated", "resolve_neg"),
          _views_with_pending_negation),
    BadInput("a call inside vmap", TypeError, ("q", "torch.func", "vmap", "whole batch"), _in_vmap),
    BadInput("a call inside grad", TypeError, ("q", "torch.func", "torch.autograd"), _in_grad),
    BadInput("a tangent", TypeError, ("k", "no tangent", "forward-mode"), _with_tangent),
    attention("sparse cu_seqlens", TypeError, ("cu_seqlens_k", "dense", "sparse_coo"),
              lambda kit: torch_arrays(cu_seqlens_q=[0, 6],
                                        cu_seqlens_k=torch_array(2).int().to_sparse())),
    attention("cu_seqlens without numbers", ValueError, ("cu_seqlens_k", "hold numbers", "meta"),
              lambda kit: torch_arrays(cu_seqlens_q=[0, 6],
                                        cu_seqlens_k=torch_array(2, device="meta").int())),
    BadInput("ids without numbers", ValueError, ("selection.indices", "hold numbers", "meta"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=torch_array(6, 2, 2, device="meta").int()))),
    BadInput("lengths without numbers", ValueError, ("cache.lengths", "hold numbers", "meta"),
             lambda kit: kit.decode({"lengths": torch_array(2, device="meta").int()})),
    BadInput("the quality without a configuration", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: msa.cache_quality(
                 **torch_arrays(), config=None)),  # type: ignore[arg-type]
]  # fmt: skip
