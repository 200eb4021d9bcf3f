"""The methods that are compared: dense attention, MSA, a window and random blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

import msa
from msa.demo.digits.stream import Stream
from msa.dispatch import BackendName, load_backend, map_arrays
from msa.ir import Array, Output, Selection


@dataclass(frozen=True)
class Outcome:
    """The results of one method, at one budget, on one backend."""

    method: str
    top_k: int
    backend: BackendName
    distribution: Float[Array, "Tq 10"]
    selection: Selection
    accuracy: float
    keys: float
    """The mean number of keys that a query reads in one group. Held-out images are counted too."""
    block_recall: float
    score_recall: float
    seconds: float


def attend_dense(stream: Stream, top_k: int, backend: BackendName) -> Output:
    """Attend to all blocks: the dense limit R11. `top_k` is not used."""
    return attend_msa(stream, stream.sequences.max_blocks(stream.block_size), backend)


def attend_msa(stream: Stream, top_k: int, backend: BackendName) -> Output:
    """Attend to the blocks that the index chooses. The scale is 1: q contains the sharpness."""
    config = msa.MSAConfig(stream.block_size, top_k, softmax_scale=1.0)
    arrays = place(backend, stream.q, stream.k, stream.v, stream.q_idx, stream.k_idx)
    return msa.attention(*arrays, config=config, backend=backend)


def attend_window(stream: Stream, top_k: int, backend: BackendName) -> Output:
    """Attend to the last known blocks. The end of the stream itself has no labels."""
    last = np.arange(stream.known_blocks - (top_k - 1), stream.known_blocks)
    return attend_blocks(
        stream, np.broadcast_to(last, (*stream.q_idx.shape[:2], len(last))), backend
    )


def attend_random(stream: Stream, top_k: int, backend: BackendName) -> Output:
    """Attend to random known blocks, drawn for each query and group from a fixed seed."""
    draw = np.random.default_rng(top_k).random((*stream.q_idx.shape[:2], stream.known_blocks))
    return attend_blocks(stream, np.sort(draw.argsort(axis=-1)[..., : top_k - 1]), backend)


def attend_blocks(
    stream: Stream, chosen: Int[Array, "Tq Hkv chosen"], backend: BackendName
) -> Output:
    """Attend to the chosen known blocks, and to the own block of each query (R6)."""
    own = np.array(stream.sequences.positions()) // stream.block_size
    own = np.broadcast_to(own[:, None, None], (*chosen.shape[:2], 1))
    indices = np.concatenate([chosen, own], axis=-1).astype(np.int32)
    q, k, v, indices = place(backend, stream.q, stream.k, stream.v, indices)
    selection = Selection(indices, stream.sequences, stream.block_size)
    return msa.sparse_attention(q, k, v, selection, softmax_scale=1.0, backend=backend)


METHODS: dict[str, Callable[[Stream, int, BackendName], Output]] = {
    "dense": attend_dense,
    "MSA": attend_msa,
    "window": attend_window,
    "random": attend_random,
}


def place(backend: BackendName, *arrays: Array) -> list[Array]:
    """The arrays as the backend takes them: tensors on the GPU for triton, else NumPy arrays."""
    if backend != "triton":
        return list(arrays)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]


def to_numpy(array: Array) -> Array:
    """The inverse of `place` for one array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def measure(method: str, stream: Stream, top_k: int, backend: BackendName) -> Outcome:
    """Run one method and compute its results."""
    start = time.perf_counter()
    output = METHODS[method](stream, top_k, backend)
    out, selection = (map_arrays(x, to_numpy) for x in (output.out, output.selection))
    seconds = time.perf_counter() - start
    known_mass = np.maximum(out.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    distribution = (out / known_mass).mean(axis=1)  # heads vote with equal weight
    accuracy = float((distribution.argmax(-1) == stream.truth).mean())
    return Outcome(
        method, top_k, backend, distribution, selection, accuracy, keys_read(selection),
        *recall(stream, selection.indices), seconds,
    )  # fmt: skip


def keys_read(selection: Selection) -> float:
    """The mean number of visible tokens in the selected blocks (R3)."""
    position = np.array(selection.sequences.positions())[:, None, None]
    tokens = np.clip(position + 1 - selection.indices * selection.block_size, 0, None)
    tokens = np.minimum(tokens, selection.block_size)
    return float(np.where(selection.indices >= 0, tokens, 0).sum(-1).mean())


def recall(stream: Stream, indices: Int[Array, "Tq Hkv k"]) -> tuple[float, float]:
    """Block recall and score recall over the known blocks.

    Block recall: the share of the blocks with the most weight in dense attention that was chosen.
    Score recall: the weight of the chosen blocks in dense attention. Both leave out the own block,
    which is always read and has no known image.
    """
    mass = stream.dense_mass
    chosen = np.zeros((*mass.shape[:2], stream.sequences.max_blocks(stream.block_size)), bool)
    np.put_along_axis(chosen, np.where(indices < 0, indices[..., :1], indices), True, axis=-1)
    chosen = chosen[..., : stream.known_blocks]
    wanted = min(indices.shape[-1] - 1, stream.known_blocks)
    best = np.argsort(-mass, axis=-1)[..., :wanted]
    found = np.take_along_axis(chosen, best, axis=-1)
    return float(found.mean()), float((mass * chosen).sum(-1).mean())


def usable_backends() -> tuple[BackendName, ...]:
    """The backends that can run here. Triton needs a CUDA device."""

    def runs(name: str) -> bool:
        if name == "triton":
            import torch

            if not torch.cuda.is_available():
                return False
        return hasattr(load_backend(name), "attend")

    names: tuple[BackendName, ...] = ("reference", "torch", "triton")
    return tuple(name for name in names if name in msa.available_backends() and runs(name))
