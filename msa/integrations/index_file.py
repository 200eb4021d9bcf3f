"""Write the index branch of a converted model to its own file, and read it again.

The files of the model itself stay as they are.

>>> import tempfile, torch, transformers
>>> from msa import MSAConfig
>>> from msa.integrations.convert import convert
>>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
>>> config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
>>> model = transformers.LlamaForCausalLM(config)
>>> weights = {name: w.clone() for name, w in model.state_dict().items()}
>>> ids, converted = torch.arange(40)[None], convert(model, MSAConfig(block_size=4, top_k=3))
>>> with tempfile.NamedTemporaryFile() as file:
...     save_index(converted, file.name)
...     fresh = transformers.LlamaForCausalLM(config)
...     _ = fresh.load_state_dict(weights)
...     loaded = load_index(fresh, file.name)
>>> bool((loaded(ids).logits == converted(ids).logits).all())
True
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msa.config import MSAConfig
from msa.integrations import messages
from msa.integrations.convert import convert, remove_index
from msa.integrations.converted_layers import CONVERTED, indexes
from msa.integrations.index_projections import IndexProjections

M = TypeVar("M", bound=nn.Module)


def save_index(model: nn.Module, path: str | Path) -> None:
    """Write the projections of all converted layers, and their configuration.

    Raises:
        TypeError: the model is not converted.
        ValueError: the configurations of the layers differ.
    """
    found = indexes(model)
    messages.check_has_layers(len(found), CONVERTED, model)
    first = next(iter(found.values()))
    messages.check_one_config({layer: index.config for layer, index in found.items()})
    made = {
        "config": asdict(first.config),
        "layers": sorted(found),
        "index_dim": len(first.key),
    }
    weights = {
        f"{layer}.{name}": weight.detach().contiguous()
        for layer, index in found.items()
        for name, weight in index.state_dict().items()
    }
    save_file(weights, path, {"msa": json.dumps(made)})


def load_index(model: M, path: str | Path, implementation: str = "msa") -> M:
    """Convert a model and load its index branch from a file; returns the model.

    If the file does not fit the model, an error is raised and the model is not converted.

    Raises:
        ValueError: the file was not written by `save_index`, or is from a model of other sizes; the
            model is already converted.
    """
    with safe_open(path, "pt") as file:
        made: dict[str, Any] = json.loads((file.metadata() or {}).get("msa", "{}"))
        messages.check_index_file(path, made)
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config, layers = MSAConfig(**made["config"]), made["layers"]
    model = convert(model, config, layers, made["index_dim"], implementation)
    try:
        for layer, index in indexes(model).items():
            own = renamed({n: w for n, w in weights.items() if n.startswith(f"{layer}.")})
            messages.check_index_weights(path, layer, index.state_dict(), own)
            index.load_state_dict(own)
    except ValueError:
        remove_index(model)
        raise
    return model


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's weights under the names of IndexProjections. Names of older files are changed.

    >>> list(renamed({"3.q_proj.weight": None, "3.key": None}))
    ['query', 'key']
    """
    names = {name: name.partition(".")[2] for name in weights}
    return {IndexProjections.OLD_NAMES.get(names[n], names[n]): w for n, w in weights.items()}
