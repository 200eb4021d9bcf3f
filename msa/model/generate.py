"""Text from a model, token by token: chunked prefill into pages, then one token a step.

The tokens are those that a model without a cache would give, which reads everything again at every
step; the cache saves the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from msa.model import checks
from msa.model.cache import Cache
from msa.model.model import Model
from msa.model.vision import Pictures


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Raises:
        TypeError, ValueError: a temperature below 0, a seed that is not an integer.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; else it is drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Each prompt draws by itself: what else is in the batch plays no part."""
    stop: int | None = None
    """The token that ends a text. It is given out too."""

    def __post_init__(self) -> None:
        checks.check_sampling(self)

    def draws(self, prompts: int) -> list[torch.Generator]:
        """A source of chance for each prompt."""
        return [torch.Generator().manual_seed(hash((self.seed, row))) for row in range(prompts)]

    def choose(self, logits: Tensor, draw: torch.Generator) -> int:
        """One token.

        >>> Sampling().choose(torch.tensor([0.0, 2.0, 1.0]), torch.Generator())
        1
        """
        if self.temperature == 0:
            return int(logits.argmax())
        chances = (logits.double() / self.temperature).softmax(-1).cpu()
        return int(torch.multinomial(chances, 1, generator=draw))


def generate(
    model: Model,
    prompts: Sequence[Tensor],
    new_tokens: int,
    *,
    images: Sequence[Pictures | None] | None = None,
    sampling: Sampling = Sampling(),
    chunk: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """What follows each prompt, all at once. Arguments and errors as in `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model, prompts, new_tokens, images=images, sampling=sampling, chunk=chunk, dtype=dtype
    ):
        for answer, token in zip(answers, step):
            answer += [] if token is None else [token]
    return answers


def stream(
    model: Model,
    prompts: Sequence[Tensor],
    new_tokens: int,
    *,
    images: Sequence[Pictures | None] | None = None,
    sampling: Sampling = Sampling(),
    chunk: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Iterator[list[int | None]]:
    """One list per step, as soon as it is known: each prompt's next token, None after its end.

    Args:
        prompts: token ids, of any lengths from 1 on.
        new_tokens: the most tokens that follow a prompt.
        images: for each prompt the pictures in the places of its image tokens.
        chunk: how many tokens of a prompt are read at a time.
        dtype: of the cache; bfloat16 for a model under autocast.

    Tokens that stand for pictures are never given out. The model is left in evaluation mode.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    >>> from msa.model.presets import PRESETS
    >>> model = Model(PRESETS["tiny"].model)
    >>> prompts = [torch.tensor([72, 105]), torch.tensor([65])]
    >>> [len(step) for step in stream(model, prompts, 3)]
    [2, 2, 2]
    """
    checks.check_generation(prompts, new_tokens, images, chunk)
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
    """Prefill, `chunk` tokens of each prompt at a time; the logits behind each prompt.

    The tower sees a prompt's pictures once; a chunk takes as many of their tokens as it has places.
    """
    device, token = model.embed.weight.device, model.config.image_token
    seen: dict[int, Tensor] = {}
    for row, given in enumerate(images or ()):
        if given is not None and model.vision is not None:
            seen[row] = model.vision(given)
            checks.check_places("image", _count(prompts[row], token), len(seen[row]))
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
    """How many of the tokens are this one."""
    return 0 if token is None else int(tokens.eq(token).sum())
