"""Chapter 6: the same attention by a mask and by a gather. Write the gather.

`by_mask` is right and slow: it computes every score. `by_gather` may touch only k[token] and
v[token] for the tokens of the selected blocks.
"""

import torch


def by_mask(q, k, v, ids, block):
    """q [T, H, D], k and v [T, D], ids [T, kept], -1 for an empty place."""
    T = len(k)
    chosen = torch.zeros(T, -(-T // block) + 1, dtype=torch.bool)
    chosen[torch.arange(T)[:, None], ids] = True  # an id of -1 marks the spare last column
    mask = chosen[:, :-1].repeat_interleave(block, 1)[:, :T].tril()
    scores = torch.einsum("thd,sd->ths", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v


def by_gather(q, k, v, ids, block):
    """The same function; no tensor with T x T numbers."""
    return by_mask(q, k, v, ids, block)  # TODO: token ids [T, kept * block], then k[token]
