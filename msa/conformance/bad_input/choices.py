"""Wrong names of backends, and options that a backend does not have."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msa.conformance.bad_input import BadInput, attention
from msa.conformance.bad_input.kit import Kit

CHOICE_CASES = [
    attention("unknown backend", ValueError, ("backend", "reference, torch, triton", "'cuda'"),
              lambda kit: {"backend": "cuda"}),
    BadInput("unavailable backend", ValueError, ("backend", "available", "'torch'", "pip install"),
             lambda kit: _without_libraries(kit)),
    BadInput("chunk size 0", ValueError, ("chunk_size", "at least 1", "got 0"),
             lambda kit: kit.lower(chunk_size=0)),
    BadInput("chunk size beyond the largest", ValueError,
             ("chunk_size", "LARGEST_CHUNK_SIZE = 2147483648", "got 1180591620717411303424"),
             lambda kit: kit.lower(chunk_size=2**70)),
    BadInput("fractional tile size", TypeError, ("tile_size", "integer", "8.0"),
             lambda kit: kit.lower(tile_size=8.0)),
    BadInput("tile size 32", ValueError, ("tile_size", "at most 31", "got 32"),
             lambda kit: kit.lower(tile_size=32)),
    BadInput("a dictionary as config of lower", TypeError, ("config", "MSAConfig", "dict"),
             lambda kit: kit.lower(config={})),
    attention("no config", TypeError, ("config", "MSAConfig", "NoneType"),
              lambda kit: {"config": None}),
    BadInput("no config of select", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: kit.select(config=None)),
    BadInput("no config of align_index", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: kit.align(config=None)),
    BadInput("no config of align_index over a selection", TypeError,
             ("config", "MSAConfig", "NoneType"),
             lambda kit: kit.align(selection=kit.selection(), config=None)),
    BadInput("no config of lower", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: kit.lower(config=None)),
    BadInput("no config of decode", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: kit.decode(config=None)),
]  # fmt: skip


OPTION_CASES = [
    attention("unknown loop order", ValueError,
              ("loop_order", "'auto', 'kv_outer' or 'union'", "'outer'"),
              lambda kit: {"loop_order": "outer"}),
    attention("unknown index dtype", ValueError, ("index_dtype", "None or 'fp8_e4m3'", "'int8'"),
              lambda kit: {"index_dtype": "int8"}),
    BadInput("unknown loop order of sparse_attention", ValueError, ("loop_order", "got None"),
             lambda kit: kit.sparse(loop_order=None)),
    BadInput("unknown index dtype of select", ValueError, ("index_dtype", "None", "got 'auto'"),
             lambda kit: kit.select(index_dtype="auto")),
    attention("unknown kernels", ValueError,
              ("kernels", "'auto', 'portable' or 'hopper'", "got 'gluon'"),
              lambda kit: {"kernels": "gluon"}),
    BadInput("unknown kernels of sparse_attention", ValueError, ("kernels", "'auto'", "got 'all'"),
             lambda kit: kit.sparse(kernels="all")),
    BadInput("unknown kernels of select", ValueError, ("kernels", "'auto'", "got None"),
             lambda kit: kit.select(kernels=None)),
    attention("kernels for the reference", ValueError,
              ("kernels", "'auto' for backend='reference'", "no kernels", "got 'hopper'"),
              lambda kit: {"kernels": "hopper", "backend": "reference"}),
    BadInput("kernels of select for the reference", ValueError,
             ("kernels", "'auto' for backend='reference'", "got 'portable'"),
             lambda kit: kit.select(kernels="portable", backend="reference")),
    BadInput("kernels of sparse_attention for the reference", ValueError,
             ("kernels", "'auto' for backend='reference'", "got 'hopper'"),
             lambda kit: kit.sparse(kernels="hopper", backend="reference")),
    attention("a loop order for the reference", ValueError,
              ("loop_order", "'auto' for backend='reference'", "one order", "got 'union'"),
              lambda kit: {"loop_order": "union", "backend": "reference"}),
    BadInput("a loop order of sparse_attention for the reference", ValueError,
             ("loop_order", "'auto' for backend='reference'", "got 'kv_outer'"),
             lambda kit: kit.sparse(loop_order="kv_outer", backend="reference")),
    BadInput("8 bits for the reference", ValueError,
             ("index_dtype", "None for backend='reference'", "keeps the dtype", "'fp8_e4m3'"),
             lambda kit: kit.select(index_dtype="fp8_e4m3", backend="reference")),
]  # fmt: skip


def _without_libraries(kit: Kit) -> Any:
    with mock.patch("msa.dispatch.available_backends", lambda: ("reference",)):
        return kit.attention(backend="torch")
