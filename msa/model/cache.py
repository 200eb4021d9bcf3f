"""Keys, values and index keys of the tokens that a model has read, in pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from msa import PagedKV, PagePool
from msa.model.config import ModelConfig


class LayerCache:
    """Keys, values and index keys of one layer, in pages of one block each.

    Every pool has index keys. A dense layer has none, so it stores one zero per token.
    """

    def __init__(
        self, config: ModelConfig, layer: int, batch: int, max_tokens: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        block = config.msa.block_size
        each = -(-max_tokens // block)
        index_dim = config.index_dim if config.attention[layer] == "msa" else 1
        k, v = (
            torch.zeros(
                batch * each, block, config.groups, config.head_dim, device=device, dtype=dtype
            )
            for _ in "kv"
        )
        k_idx = torch.zeros(batch * each, block, index_dim, device=device, dtype=dtype)
        self.pool = PagePool(k, v, k_idx, batch=batch, pages_per_sequence=each)
        self.dtype = dtype
        tail = config.mixed_tokens - 1
        self.tails = torch.zeros(batch, tail, config.width, device=device, dtype=dtype)
        """The last inputs of each sequence, for the layer `attention.Mixing`."""

    def append(
        self,
        slots: list[int], counts: list[int], k: Float[Tensor, "T Hkv D"],
        v: Float[Tensor, "T Hkv D"], k_idx: Float[Tensor, "T Di"] | None,
    ) -> None:  # fmt: skip
        """Add packed new tokens: `counts[i]` of them to the sequence in `slots[i]`."""
        k_idx = k.new_zeros(len(k), 1) if k_idx is None else k_idx
        new = [x.to(self.dtype) for x in (k, v, k_idx)]
        if len(set(counts)) == 1:
            k, v, k_idx = (x.unflatten(0, (len(slots), counts[0])) for x in new)
            self.pool.append(slots, k, v, k_idx)
            return
        for slot, *parts in zip(slots, *(x.split(counts) for x in new)):
            self.pool.append(slot, *parts)

    def packed(self, slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and k_idx of these sequences, packed as `msa.attention` takes them."""
        k, v, k_idx = zip(*(self.pool.cache.flat(slot) for slot in slots))
        return torch.cat(k), torch.cat(v), torch.cat(k_idx)

    def view(self, slots: list[int]) -> PagedKV:
        """The cache of these sequences alone, as `msa.decode` takes it."""
        cache = self.pool.cache
        rows = torch.tensor(slots, device=cache.lengths.device)
        return replace(cache, page_table=cache.page_table[rows], lengths=cache.lengths[rows])


class Cache:
    """The caches of all layers. `Model.forward` adds tokens; `free` empties a slot.

    Args:
        config: the model's sizes.
        batch: the number of slots, one for a sequence.
        max_tokens: the most tokens of a sequence.

    >>> config = ModelConfig(
    ...     vocab_size=9, width=8, attention=("dense", "msa"), mlp=("dense", "dense"), heads=2,
    ...     groups=1, head_dim=4, rotary_dim=2, index_dim=4, mlp_width=8, experts=1,
    ...     experts_per_token=1, expert_width=8, shared_width=8)
    >>> cache = Cache(config, batch=2, max_tokens=200)
    >>> cache.lengths, [layer.pool.free_pages for layer in cache.layers]
    ([0, 0], [4, 4])
    """

    def __init__(
        self, config: ModelConfig, *, batch: int, max_tokens: int,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        place = torch.device(device)
        self.layers = [
            LayerCache(config, layer, batch, max_tokens, place, dtype)
            for layer in range(config.layers)
        ]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return self.layers[0].pool.lengths

    def free(self, slot: int) -> None:
        """Remove a sequence. Its slot and its pages can be used again."""
        for layer in self.layers:
            layer.pool.free(slot)
            layer.tails[slot] = 0
