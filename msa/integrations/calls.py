"""What is read of transformers' calls and models, in one place: names differ between releases.

    5.24 and newer    the cache is called `cache`
    before            the cache is called `past_key_values`

>>> def forward(self, hidden_states, past_key_values=None, **kwargs): ...
>>> call = read_call(forward, (1,), {"past_key_values": 2, "position_ids": 3})
>>> call["hidden_states"], cache_of(call), call["position_ids"]
(1, 2, 3)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from msa.integrations import messages

CACHES = "cache", "past_key_values"


def read_call(
    forward: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a module's forward, positional ones too, by their names."""
    return {**dict(zip(names(forward), args)), **options}


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache of a call, or None."""
    return next((call[name] for name in CACHES if call.get(name) is not None), None)


@cache
def names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What a forward calls its arguments, without self.

    Raises:
        TypeError: no cache under a name that is known here, so it would be forgotten.

    >>> names(lambda self, hidden_states, cache=None: ...)
    ('hidden_states', 'cache')
    """
    found = tuple(inspect.signature(forward).parameters)[1:]
    messages.check_cache_name(forward.__qualname__, found, CACHES)
    return found


def is_traced(*values: Any) -> bool:
    """Whether a graph is being exported, or a tensor stands for others and holds no numbers."""
    return torch.compiler.is_exporting() or any(isinstance(x, FakeTensor) for x in values)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model of which this process has a share of the heads alone."""
    shares = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    messages.check_whole_weights(shares, getattr(model, "_tp_size", None))
