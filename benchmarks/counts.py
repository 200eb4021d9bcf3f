"""Bytes that the stages have to move, for the roofline: every tensor read or written once.

Counted from shapes alone, so a lower bound of what passes between a multiprocessor and the memory
behind the caches. Operations are counted in cases.py; the stages that have no products count one
operation per edge or score, which places them on a roofline at their true share of the bandwidth.
"""

from __future__ import annotations

from benchmarks.cases import CONFIG, DIM, GROUPS, HEADS
from msa.ir import Selection, Sequences

WIDTH = 2  # bytes of a bfloat16
ID = 4  # bytes of an index
EDGE = (HEADS // GROUPS) * DIM * WIDTH
"""Bytes of the queries (or outputs) of one edge: all heads of a group."""
LSE = (HEADS // GROUPS) * 4


def select_bytes(sequences: Sequences, fp8: bool = False) -> int:
    """Index queries and keys are read, ids written; fp8 copies are written and read again."""
    numbers = (sequences.total_q * GROUPS + sequences.total_k) * DIM
    ids = sequences.total_q * GROUPS * CONFIG.top_k * ID
    return numbers * (WIDTH + 2 if fp8 else WIDTH) + ids


def walk_bytes(sequences: Sequences) -> int:
    """Queries, keys, values and block ids are read; outputs and log-sum-exps are written."""
    queries = sequences.total_q * GROUPS
    keys = 2 * sequences.total_k * GROUPS * DIM * WIDTH
    return keys + queries * (2 * EDGE + LSE + CONFIG.top_k * ID)


def partial_bytes(edges: int) -> int:
    """Each edge of KV-outer reads its query; its partial result is written and read again.

    A partial result is an output and two numbers for each head, each as large as an LSE.
    """
    return edges * (EDGE + 2 * (EDGE + 2 * LSE))


def reverse_bytes(selection: Selection) -> int:
    """Block ids are read twice (to count, to place); query ids and slots are written. A word
    marks 32 queries of a row: it is cleared, set and read, and its prefix sum is written."""
    n_q, groups, top_k = selection.indices.shape
    rows = groups * selection.sequences.cu_blocks(selection.block_size)[-1]
    return n_q * groups * top_k * 4 * ID + -(-n_q // 32) * rows * 4 * ID


def topk_bytes(rows: int, blocks: int, k: int) -> int:
    """Float32 scores are read, ids are written."""
    return rows * (4 * blocks + ID * k)
