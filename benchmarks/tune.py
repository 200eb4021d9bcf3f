"""Measure launch parameters, and print every candidate of each kernel with its time.

    for i in $(seq 0 13); do python -m benchmarks.tune --warm $i/14 & done; wait   # compile
    python -m benchmarks.tune [--training]

Copy the best candidates into `msa/triton_impl/tuning.py` by hand. Compiling is most of the work, so
workers compile shares of the candidates beforehand, on a small problem whose sizes are divisible by
the same numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch

from benchmarks import cases
from msa.ir import Sequences
from msa.triton_impl import selection as selection_stage
from msa.triton_impl import tuning
from msa.triton_impl.attention import attend_selection
from msa.triton_impl.index_loss import index_loss
from msa.triton_impl.key_gradients import key_gradients
from msa.triton_impl.launch import positions_of
from msa.triton_impl.partials import fill_slots
from msa.triton_impl.query_gradients import query_gradients
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.softmax_sums import softmax_sums
from msa.triton_impl.teacher import teacher_probabilities
from msa.triton_impl.tile_reverse_index import reverse_union
from msa.triton_impl.tile_union import split_tiles
from msa.triton_impl.tuning import TileConfig
from msa.triton_impl.union_walk import walk


def tiles(*rows: tuple[int, int, int, int]) -> list[TileConfig]:
    """Make configurations of (rows, keys, warps, stages); keys come by the bulk copy engine."""
    return [TileConfig(r, k, warps, stages, descriptors=True) for r, k, warps, stages in rows]


SELECT = tiles(
    (256, 128, 8, 3), (256, 128, 8, 4), (128, 128, 4, 2), (128, 128, 4, 3), (128, 64, 4, 3),
    (128, 64, 4, 4), (128, 128, 8, 3),
)  # fmt: skip
UNION = tiles(
    (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4),
    (64, 128, 4, 1), (128, 64, 4, 2),
)  # fmt: skip
CHUNKS = [TileConfig(64, keys, 4, stages) for keys in (64, 128) for stages in (2, 3, 5)]
EDGES = (128, 256)
KEYS = tiles((64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 4))
QUERIES = tiles((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 3))
SUMS = tiles((64, 128, 4, 3), (128, 128, 4, 2))
TEACHER = tiles((64, 128, 4, 2), (64, 128, 4, 3), (64, 128, 8, 2))
LOSS = tiles((32, 128, 4, 2), (32, 128, 4, 3), (16, 128, 4, 2))


Candidate = tuple[str, TileConfig, float, Callable[[], object]]


def milliseconds(call: Callable[[], object], repeats: int = 6) -> float:
    """Return the median time of a call, between events."""
    call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in marks:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in marks)[repeats // 2]


def candidates(length: int, keep: float) -> Iterator[Candidate]:
    """Yield every candidate as (kernel and variant, configuration, operations, call)."""
    sequences = Sequences.one(length, length)
    x = cases.make_inputs(sequences)
    chosen = cases.make_selection(sequences, keep)
    flops, scale = cases.attention_flops(chosen), cases.DIM**-0.5
    for tile in SELECT:
        for kind in (None, "fp8_e4m3"):
            yield (
                f"select {kind or 'bf16'}", tile, cases.select_flops(sequences),
                lambda tile=tile, kind=kind: selection_stage.select_portable(
                    x.q_idx, x.k_idx, sequences, cases.CONFIG, kind, tile),
            )  # fmt: skip
    for tile in UNION:
        size = tile.rows * cases.GROUPS // cases.HEADS
        union = split_tiles(chosen, size)
        raw = float(union.counts.sum()) * size * 4 * 16 * cases.DIM * cases.CONFIG.block_size
        yield (
            f"union {size}", tile, raw,
            lambda tile=tile, union=union, size=size: walk(
                x.q, x.k, x.v, sequences, cases.CONFIG.block_size, union.block_ids,
                union.row_masks, union.counts, size, scale, tile=tile),
        )  # fmt: skip
    index = reverse_edges(chosen)
    for tile, edges in product(CHUNKS, EDGES):
        schedule = schedule_edges(index, edges)
        yield (
            f"chunks {edges}", tile, flops,
            lambda tile=tile, schedule=schedule: fill_slots(
                x.q, x.k, x.v, schedule, scale, tile),
        )  # fmt: skip


def training(length: int, keep: float) -> Iterator[Candidate]:
    """Yield the same for the backward and the alignment loss; operations are the useful ones."""
    sequences = Sequences.one(length, length)
    x = cases.make_inputs(sequences)
    chosen = cases.make_selection(sequences, keep)
    flops, scale = cases.attention_flops(chosen), cases.DIM**-0.5
    d_out = torch.randn_like(x.q)
    out, lse, _, _ = vars(attend_selection(x.q, x.k, x.v, chosen, scale)).values()
    d_lse, shared = torch.zeros_like(lse), x.k_idx[:, None].expand(-1, cases.GROUPS, -1)
    union = split_tiles(chosen, positions_of(cases.HEADS // cases.GROUPS))
    for tile in QUERIES:
        yield (
            "queries", tile, 1.5 * flops,
            lambda tile=tile: query_gradients(
                x.q, x.k, x.v, out, d_out, lse, d_lse, union, chosen, scale, tile),
        )  # fmt: skip
    edges = reverse_union(union, chosen, tuning.KEY_TILES)
    for tile in KEYS:
        yield (
            "keys", tile, 2 * flops,
            lambda tile=tile, edges=edges: key_gradients(
                x.q, x.k, x.v, d_out, lse, d_lse, edges, scale, tile),
        )  # fmt: skip
    schedule = schedule_edges(reverse_edges(chosen), tuning.LOSS_EDGES)
    for tile in SUMS:
        yield (
            "sums main", tile, flops / 2,
            lambda tile=tile: softmax_sums(x.q, x.k, schedule, scale, False, tile),
        )  # fmt: skip
        yield (
            "sums index", tile, flops / 32,
            lambda tile=tile: softmax_sums(x.q_idx, shared, schedule, scale, True, tile),
        )  # fmt: skip
    student = softmax_sums(x.q_idx, shared, schedule, scale, is_index=True)
    gradients = torch.empty_like(x.q_idx).float(), torch.zeros_like(x.k_idx).float()
    edges = reverse_union(union, chosen, tuning.TEACHER_TILES)
    for tile in TEACHER:
        yield (
            "teacher", tile, flops / 2,
            lambda tile=tile, edges=edges: teacher_probabilities(
                x.q, x.k, lse, chosen.indices, edges, scale, tile=tile),
        )  # fmt: skip
    teacher = teacher_probabilities(x.q, x.k, lse, chosen.indices, edges, scale)
    for tile in LOSS:
        yield (
            "index_loss", tile, 3 * flops / 32,
            lambda tile=tile: index_loss(
                x.q_idx, x.k_idx, teacher, *student, schedule, scale, gradients, tile),
        )  # fmt: skip


def main() -> None:
    """Compile a share of the candidates, or time all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", help="i/n: compile every n-th candidate, from the i-th on")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--training", action="store_true", help="backward and alignment instead")
    parser.add_argument("--only", default="", help="kernels whose name starts so")
    parser.add_argument("--keep", type=float, default=0.8)
    given = parser.parse_args()
    length = 2048 if given.warm else given.length
    share, of = map(int, given.warm.split("/")) if given.warm else (0, 1)
    found = (training if given.training else candidates)(length, given.keep)
    for i, (name, tile, flops, call) in enumerate(found):
        if i % of != share or not name.startswith(given.only):
            continue
        try:
            if given.warm:
                call()
                torch.cuda.synchronize()
            else:
                took = milliseconds(call)
                print(f"{name:14} {tile}  {took:8.3f} ms  {flops / took / 1e9:6.0f} TFLOP/s")
        except Exception as error:  # a candidate that does not fit is a result, too
            print(f"{name:14} {tile}  {type(error).__name__}: {str(error)[:80]}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
