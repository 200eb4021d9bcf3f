"""Text from a model, token by token: chunked prefill into pages, then one token a step.

The tokens are the same as without a cache. A model without a cache reads all tokens again at every
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msa.checks import check_count, check_positive, check_seed
from msa.model.cache import Cache
from msa.model.model import Model, check_places
from msa.model.vision import Pictures


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Raises:
        TypeError, ValueError: a temperature below 0, a seed that is not an integer.
    """

    temperature: float = 0.0
    """0 takes the likeliest token. Else the token is drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Each prompt has its own draws, which do not depend on the other prompts of the batch."""
    stop: int | None = None
    """The token that ends a text. It is the last token of the answer."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.temperature != 0:
            check_positive("temperature", self.temperature)

    def draws(self, prompts: int) -> list[torch.Generator]:
        """A random generator for each prompt."""
        return [torch.Generator().manual_seed(hash((self.seed, row))) for row in range(prompts)]

    def choose(self, logits: Tensor, draw: torch.Generator) -> int:
        """Choose one token.

        >>> Sampling().choose(torch.tensor([0.0, 2.0, 1.0]), torch.Generator())
        1
        """
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits.double() / self.temperature).softmax(-1).cpu()
        return int(torch.multinomial(chances, 1, generator=draw))


def generate(
    model: Model, prompts: Sequence[Tensor], new_tokens: int, *,
    images: Sequence[Pictures | None] | None = None, sampling: Sampling = Sampling(),
    chunk: int = 2048, dtype: torch.dtype = torch.float32,
) -> list[list[int]]:  # fmt: skip
    """The tokens after each prompt, once all are known. Arguments and errors as in `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model, prompts, new_tokens, images=images, sampling=sampling, chunk=chunk, dtype=dtype
    ):
        for answer, token in zip(answers, step):
            answer += [] if token is None else [token]
    return answers


def stream(
    model: Model, prompts: Sequence[Tensor], new_tokens: int, *,
    images: Sequence[Pictures | None] | None = None, sampling: Sampling = Sampling(),
    chunk: int = 2048, dtype: torch.dtype = torch.float32,
) -> Iterator[list[int | None]]:  # fmt: skip
    """After each step, a list with the next token of each prompt; None for prompts that ended.

    Args:
        prompts: token ids. The prompts may have different lengths, at least 1.
        new_tokens: the most tokens after a prompt.
        images: for each prompt the pictures of its image tokens.
        chunk: the number of tokens of a prompt that are read at a time.
        dtype: the dtype of the cache; bfloat16 for a model under autocast.

    Tokens that stand for pictures are never chosen. The model is in evaluation mode afterwards.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    >>> from msa.training.presets import PRESETS
    >>> model = Model(PRESETS["tiny"].model)
    >>> prompts = [torch.tensor([72, 105]), torch.tensor([65])]
    >>> [len(step) for step in stream(model, prompts, 3)]
    [2, 2, 2]
    """
    _check_arguments(prompts, new_tokens, images, chunk)
    model.eval()
    device = model.embed.weight.device
    size = max(map(len, prompts)) + new_tokens
    cache = Cache(model.config, batch=len(prompts), max_tokens=size, device=device, dtype=dtype)
    draws = sampling.draws(len(prompts))
    never = [t for t in (model.config.image_token, model.config.video_token) if t is not None]
    never = torch.tensor(never, dtype=torch.int64, device=device)
    last = _read(model, cache, prompts, images, chunk)
    for step in range(new_tokens):
        tokens = {
            row: sampling.choose(logits.index_fill(0, never, -torch.inf), draws[row])
            for row, logits in last.items()
        }
        yield [tokens.get(row) for row in range(len(prompts))]
        live = [row for row, token in tokens.items() if token != sampling.stop]
        if not live or step + 1 == new_tokens:
            return
        for row in tokens.keys() - live:
            cache.free(row)
        new = torch.tensor([tokens[row] for row in live], device=device)
        with torch.no_grad():
            logits = model(new, range(len(live) + 1), cache=cache, slots=live).logits
        last = dict(zip(live, logits))


@torch.no_grad()
def _read(
    model: Model, cache: Cache, prompts: Sequence[Tensor],
    images: Sequence[Pictures | None] | None, chunk: int,
) -> dict[int, Tensor]:  # fmt: skip
    """Prefill, `chunk` tokens of each prompt at a time. Returns the logits after each prompt.

    The vision tower reads the pictures of a prompt once. Each chunk gets its tokens of them.
    """
    device, token = model.embed.weight.device, model.config.image_token
    seen: dict[int, Tensor] = {}
    for row, given in enumerate(images or ()):
        if given is not None and model.vision is not None:
            seen[row] = model.vision(given)
            check_places("image", _count(prompts[row], token), len(seen[row]))
    last: dict[int, Tensor] = {}
    for start in range(0, max(map(len, prompts)), chunk):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) > start]
        parts = [prompts[row][start : start + chunk].to(device) for row in rows]
        features: list[Tensor] = []
        for row, part in zip(rows, parts):
            if row in seen:
                places = _count(part, token)
                features.append(seen[row][:places])
                seen[row] = seen[row][places:]
        borders = [0, *accumulate(map(len, parts))]
        logits = model(
            torch.cat(parts), borders, cache=cache, slots=rows,
            images=torch.cat(features) if features else None,
        ).logits  # fmt: skip
        last |= {row: logits[end - 1].clone() for row, end in zip(rows, borders[1:])}
    return {row: last[row] for row in range(len(prompts))}


def _count(tokens: Tensor, token: int | None) -> int:
    """The number of times that the tokens contain this one."""
    return 0 if token is None else int(tokens.eq(token).sum())


def _check_arguments(
    prompts: Sequence[Tensor], new_tokens: int, images: Sequence[Pictures | None] | None, chunk: int
) -> None:
    """There are prompts, none is empty, and all or none have an entry in images."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"prompts must hold at least one text, of at least one token each, "
            f"got lengths {[len(prompt) for prompt in prompts]}"
        )
    check_count("new_tokens", new_tokens, 1)
    check_count("chunk", chunk, 1)
    if images is not None and len(images) != len(prompts):
        raise ValueError(
            f"images must have an entry for each of the {len(prompts)} prompts, got {len(images)}"
        )
