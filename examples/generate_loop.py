"""Generate text over a paged cache: prefill a long prompt in chunks, then decode token by token.

    python examples/generate_loop.py --backend torch --prompt-tokens 2048 --new-tokens 64

The model is two layers of MSA over bytes, with random weights: what it writes means nothing, but
every step is the one that a trained model takes. Read from `main` upwards.
"""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from rich.progress import Progress, TaskID, TextColumn
from torch import Tensor
from torch.nn.functional import rms_norm

import msa

LAYERS, HEADS, GROUPS, DIM, INDEX_DIM = 2, 8, 2, 32, 16
WIDTH, BYTES = HEADS * DIM, 256
CONFIG = msa.MSAConfig(block_size=64, top_k=8)


@dataclass(frozen=True)
class Options:
    """Generate bytes with a random two-layer model over a paged cache."""

    backend: Literal["auto", "torch", "triton"] = "auto"
    """auto: triton on a GPU, else torch."""
    prompt_tokens: int = 8192
    new_tokens: int = 256
    chunk: int = 1024
    """Prompt tokens that go through the model at a time."""
    index_dtype: Literal["none", "fp8"] = "none"
    """fp8: index keys are cached in 8 bits."""
    kv_dtype: Literal["none", "fp8"] = "none"
    """fp8: keys and values are cached in 8 bits."""


class Layer:
    """One attention layer: its projections, and its own pool of pages."""

    def __init__(self, options: Options, device: torch.device, dtype: torch.dtype) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) * rows**-0.5).to(device, dtype)

        self.backend = options.backend
        self.to_q, self.to_q_idx = weight(WIDTH, HEADS * DIM), weight(WIDTH, GROUPS * INDEX_DIM)
        self.to_k, self.to_v = weight(WIDTH, GROUPS * DIM), weight(WIDTH, GROUPS * DIM)
        self.to_k_idx, self.to_out = weight(WIDTH, INDEX_DIM), weight(HEADS * DIM, WIDTH)

        # 1. The pool: a page holds one block of tokens. Pages of 8 bits are all that fp8 takes.
        tokens = options.prompt_tokens + options.new_tokens
        pages = -(-tokens // CONFIG.block_size), CONFIG.block_size
        kv = torch.float8_e4m3fn if options.kv_dtype == "fp8" else dtype
        index = torch.float8_e4m3fn if options.index_dtype == "fp8" else dtype
        self.pool = msa.PagePool(
            k_pages=torch.zeros(*pages, GROUPS, DIM, device=device).to(kv),
            v_pages=torch.zeros(*pages, GROUPS, DIM, device=device).to(kv),
            k_idx_pages=torch.zeros(*pages, INDEX_DIM, device=device).to(index),
            batch=1,
        )

    def __call__(self, x: Tensor, reserved: bool) -> Tensor:
        """x [n, WIDTH] are the next n tokens: into the cache with their keys, then they attend.

        reserved: the pool has entered pages for them already.
        """
        h = rms_norm(x, (WIDTH,))
        q, k, v = ((h @ to).unflatten(1, (-1, DIM)) for to in (self.to_q, self.to_k, self.to_v))
        q_idx = (h @ self.to_q_idx).unflatten(1, (GROUPS, INDEX_DIM))
        k_idx = h @ self.to_k_idx
        if reserved:  # the device finds the pages, and writes the tokens and the new length
            msa.append_tokens(self.pool.cache, k[None], v[None], k_idx[None])
        else:
            self.pool.append(0, k, v, k_idx)
        if len(x) == 1:
            # 3. Decoding reads the pages where they lie: all index keys, but few keys and values.
            batch = q[None], q_idx[None], self.pool.cache
            out = msa.decode(*batch, config=CONFIG, backend=self.backend).out[0]
        else:
            # 2. A chunk of the prompt: queries are the last tokens of all that the cache holds.
            packed = q, q_idx, self.pool.cache
            out = msa.prefill(*packed, config=CONFIG, backend=self.backend).out
        return x + out.flatten(1) @ self.to_out


class Model:
    """Bytes in, the most likely next byte out; the embedding is the output head, too.

    It sees only what the layers add: with random weights the byte itself would always win.
    """

    def __init__(self, options: Options, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.embedding = torch.randn(BYTES, WIDTH).to(device, dtype)
        self.capturable = device.type == "cuda" and options.backend != "torch"
        self.layers = [Layer(options, device, dtype) for _ in range(LAYERS)]

    def __call__(self, tokens: Tensor, reserved: bool = False) -> Tensor:
        """tokens [n] to the next one [1], which stays on the device."""
        x = embedded = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x, reserved)
        return ((x[-1:] - embedded[-1:]) @ self.embedding.T).argmax(-1)


class Step:
    """One token of decoding; on a GPU a CUDA graph of the whole model, captured on first use.

    Lengths and tables are read on the device, so that one graph serves the growing sequence; only
    its pages come from the host.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, token: Tensor) -> Tensor:
        """token [1] to the next one."""
        if not self.model.capturable:
            return self.model(token)
        for layer in self.model.layers:
            layer.pool.reserve(0, 1)
        if self.graph is None:
            following = self.model(token, reserved=True)  # compiles the kernels, too
            self.token, self.graph = token.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.following = self.model(self.token, reserved=True)
            return following
        self.token.copy_(token)
        self.graph.replay()
        return self.following.clone()


def read_prompt(length: int) -> Tensor:
    """So many bytes of the Python language reference, over and over if need be."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.tensor(list((text * (length // len(text) + 1))[:length]))


@torch.no_grad()
def main(options: Options) -> bytes:
    """Prefill, then decode greedily; returns what was written."""
    if min(options.prompt_tokens, options.new_tokens, options.chunk) < 1:
        raise SystemExit("generate_loop: --prompt-tokens, --new-tokens, --chunk: at least 1 each")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(options, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    prompt = read_prompt(options.prompt_tokens).to(device)
    written: list[Tensor] = []
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[rate]}")) as progress:
        bar = progress.add_task("prefill", total=len(prompt), rate="")
        for tokens in prompt.split(options.chunk):
            token = model(tokens)
            show(progress, bar, len(tokens), token)
        bar = progress.add_task("decode", total=options.new_tokens, rate="")
        step = Step(model)
        for _ in range(options.new_tokens):
            written.append(token)
            token = step(token)
            show(progress, bar, 1, token)
    text = bytes(torch.cat(written).tolist())
    print(f"wrote {text[:60]!r}")
    return text


def show(progress: Progress, bar: TaskID, count: int, token: Tensor) -> None:
    """Move the bar on, once the token is really there."""
    token.item()
    progress.advance(bar, count)
    task = progress.tasks[bar]
    progress.update(bar, rate=f"{task.completed / (task.elapsed or 1e-9):,.0f} tokens/s")


if __name__ == "__main__":
    main(tyro.cli(Options))
