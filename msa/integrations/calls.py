"""Reading the calls and models of transformers, whose argument names differ between releases.

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
    """All arguments of a call of a module's forward by name, positional ones too."""
    return {**dict(zip(names(forward), args)), **options}


def cache_of(call: Mapping[str, Any]) -> Any:
    """The cache argument of a call, or None."""
    return next((call[name] for name in CACHES if call.get(name) is not None), None)


@cache
def names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a forward, without self.

    Raises:
        TypeError: no argument has a known name of the cache, so the cache would be ignored.

    >>> names(lambda self, hidden_states, cache=None: ...)
    ('hidden_states', 'cache')
    """
    found = tuple(inspect.signature(forward).parameters)[1:]
    messages.check_cache_name(forward.__qualname__, found, CACHES)
    return found


def is_traced(*values: Any) -> bool:
    """Whether a graph is being exported, or one of the tensors is fake and holds no numbers."""
    return torch.compiler.is_exporting() or any(isinstance(x, FakeTensor) for x in values)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if this process holds only a share of the model's heads."""
    shares = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    messages.check_whole_weights(shares, getattr(model, "_tp_size", None))
