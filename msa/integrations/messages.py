"""What the integrations refuse: argument, what was wanted, what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from msa import checks
from msa.ir import Array, PagedKV, Sequences


# -- layouts --------------------------------------------------------------------------------------
def check_rank(name: str, array: Any, dims: str) -> None:
    """As many dims as named."""
    if not hasattr(array, "shape") or len(array.shape) != len(dims.split()):
        got = list(array.shape) if hasattr(array, "shape") else checks.kind(array)
        raise ValueError(f"{name} must have shape [{', '.join(dims.split())}], got {got}")


def check_uniform(sequences: Sequences) -> None:
    """One length for all sequences of a batch."""
    lengths = {(q.stop - q.start, k.stop - k.start) for q, k in sequences.spans()}
    if len(lengths) > 1:
        raise ValueError(
            "selection.sequences must have one length for [B, T, ...], "
            f"got (queries, keys) {sorted(lengths)}"
        )


def check_width(got: int, wanted: int) -> None:
    """Room for all ids."""
    if wanted < got:
        raise ValueError(f"top_k must be at least the {got} ids of each query, got {wanted}")


def check_no_gaps(name: str, ids: Array, visible: Array) -> None:
    """An id in each of the first places, of which there are as many as visible blocks."""
    gaps = visible & (ids < 0)
    if bool(gaps.any()):
        query, group, place = np.argwhere(checks.to_numpy(gaps))[0].tolist()
        raise ValueError(
            f"{name} must hold an id in each of the first min(k, visible blocks) places, "
            f"got {int(ids[query, group, place])} at query {query}, group {group}, place {place}"
        )


def check_no_scales(cache: PagedKV) -> None:
    """Pages of the usual dtypes."""
    for name in ("k_scales", "v_scales", "k_idx_scales"):
        if getattr(cache, name) is not None:
            raise ValueError(
                f"cache.{name} must be None: each neighbour has scales of its own shape, "
                f"got {checks.kind(getattr(cache, name))}"
            )


def check_head_dims(dim: int, dim_v: int) -> None:
    """Keys and values that share an array have one size."""
    if dim != dim_v:
        raise ValueError(f"cache.v_pages must have Dv = D = {dim} here, got {dim_v}")


def check_divides(name: str, size: int, whole: int) -> None:
    """Whole pages make up a block."""
    if size < 1 or whole % size:
        raise ValueError(f"{name} must divide the block size {whole}, got {size}")


def check_order(order: str) -> None:
    """How heads and tokens of a page lie."""
    if order not in ("NHD", "HND"):
        raise ValueError(f"order must be 'NHD' or 'HND', got {order!r}")


def check_whole_pages(name: str, bad: Array) -> None:
    """Token slots that form whole pages, each in order."""
    if bool(bad.any()):
        row, token = np.argwhere(checks.to_numpy(bad))[0].tolist()
        raise ValueError(
            f"{name} must give each block of a sequence one page of slots, aligned and in order, "
            f"got another slot at row {row}, token {token}"
        )


# -- transformers ---------------------------------------------------------------------------------
def check_padding(mask: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> None:
    """The ones of a row are one run."""
    for row, (first, end) in enumerate(zip(firsts, ends)):
        if not mask[row, first:end].all():
            gap = int(first + np.argmin(mask[row, first:end]))
            raise ValueError(
                "attention_mask must have one run of ones in each row, padding before or behind, "
                f"got a zero between ones at row {row}, token {gap}: padding between tokens would "
                "shift the blocks behind it. Pad before or behind the tokens; to generate, before "
                "them (tokenizer.padding_side = 'left')"
            )


def check_not_shifted(firsts: tuple[int, ...]) -> None:
    """transformers' own indexer counts blocks from the start of the row, padding included."""
    for row, first in enumerate(firsts):
        if first:
            raise ValueError(
                "attention_mask must start with a one in each row for attn_implementation='msa' "
                f"alone, got {first} tokens of padding before row {row}, which shift the blocks of "
                "transformers' indexer: call msa.integrations.transformers.enable(model)"
            )


def check_positions(row: int, found: np.ndarray, wanted: np.ndarray) -> None:
    """Positions count the tokens of each sequence from 0, or from where its row has the first."""
    bad = np.flatnonzero(found != wanted)
    if len(bad):
        raise ValueError(
            "position_ids must count up from 0, from the number of cached tokens, or from 0 again "
            f"where a packed sequence starts, got {int(found[bad[0]])} in place of "
            f"{int(wanted[bad[0]])} at row {row}, token {int(bad[0])}"
        )


def check_mask_form(mask: Any) -> None:
    """None, or one number per token."""
    if mask is not None and getattr(mask, "ndim", None) != 2:
        got = list(mask.shape) if hasattr(mask, "shape") else checks.kind(mask)
        raise ValueError(
            f"attention_mask must be None or have shape [B, T] for attn_implementation='msa', "
            f"got {got}: MSA is causal, and masks of other forms mean something else"
        )


def check_mask_length(mask: Any, seen: int) -> None:
    """A number for each token seen, cached ones included."""
    if mask.shape[1] < seen:
        raise ValueError(
            f"attention_mask must have shape [B, {seen}], cached tokens included, "
            f"got {list(mask.shape)}"
        )


def check_plain_attention(dropout: float, options: dict[str, Any]) -> None:
    """Softmax attention and nothing on top of it."""
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 for attn_implementation='msa', got {dropout}"
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} must be None for attn_implementation='msa', got {options[name]!r}"
            )


def check_not_packed(packs: bool) -> None:
    """transformers' own indexer takes each row for one sequence."""
    if packs:
        raise ValueError(
            "position_ids must not start again within a row for attn_implementation='msa' alone, "
            "got packed sequences, whose blocks transformers' indexer mixes: call "
            "msa.integrations.transformers.enable(model)"
        )


def check_index_heads(index_heads: int, kv_heads: int) -> None:
    """Each index head serves whole groups."""
    if kv_heads % index_heads:
        raise ValueError(
            f"index_n_heads must divide num_key_value_heads = {kv_heads}, got {index_heads}"
        )


def check_has_layers(count: int, wanted: str, model: Any) -> None:
    """Something to do."""
    if not count:
        raise TypeError(f"model must have {wanted}, got {checks.kind(model)} without any")


def check_implementation(name: Any, known: tuple[str, ...]) -> None:
    """One of ours."""
    if name not in known:
        raise ValueError(f"implementation must be one of {', '.join(known)}, got {name!r}")


def check_cache_name(forward: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    """A cache under an unknown name would be forgotten."""
    if not set(found) & set(known):
        raise TypeError(
            f"{forward} must take its cache as {' or '.join(known)}, got {', '.join(found)}: "
            "this release of transformers is not known here"
        )


def check_whole_weights(shares: list[str], tp_size: int | None) -> None:
    """Each process holds every head."""
    if shares or (tp_size or 1) > 1:
        got = f"the DTensor {shares[0]}" if shares else f"one of tp_size = {tp_size}"
        raise ValueError(
            f"model must hold whole weights, got {got}: a share of the heads has not all groups of "
            "the index. Load the model without tp_plan; several devices can share the batch instead"
        )


def check_groups(index_groups: int, kv_heads: int) -> None:
    """Every key head has its index head, and every process all of them."""
    if index_groups != kv_heads:
        raise ValueError(
            f"the index must have one head for each of the {kv_heads} key heads of this process, "
            f"got {index_groups}: tensor parallelism is not supported"
        )


def check_not_traced(traced: bool) -> None:
    """Masks and positions are read, so they must hold numbers."""
    if traced:
        raise ValueError(
            "attention_mask and position_ids must hold numbers for attn_implementation='msa', got "
            "a graph that is being exported: the sequences of a pass are planned by what they say. "
            "Export the model with attn_implementation='sdpa', or build a graph of msa.ops, where "
            "borders of sequences are integers"
        )


# -- conversion -----------------------------------------------------------------------------------
def check_not_converted(layers: list[int]) -> None:
    """A second index branch beside the first would be run as well."""
    if layers:
        raise ValueError(
            f"model must not be converted yet, got one with an index branch in layers {layers}: "
            "take it away first, by msa.integrations.convert.remove_index(model)"
        )


def check_one_decoder(layers: list[int]) -> None:
    """Layers are told apart by their numbers."""
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(
            f"model must be one decoder, got several layers of the numbers {twice}: convert each "
            "of its decoders by itself"
        )


def check_loaded(device: str, layer: int) -> None:
    """Weights that hold numbers."""
    if device == "meta":
        raise ValueError(
            f"model must have its weights, got those of layer {layer} on the meta device: load or "
            "materialise the model first, since the index is drawn on the device of the layer"
        )


def check_compute_dtype(found: list[Any], wide: tuple[Any, ...]) -> None:
    """A dtype to compute in."""
    if not set(found) & set(wide):
        raise ValueError(
            f"model must have a weight in one of {', '.join(map(str, wide))}, in which the index "
            f"would compute, got {', '.join(sorted({str(x) for x in found}))}"
        )


def check_loss_has_gradient(layers: list[int]) -> None:
    """A forward pass without gradients gives a loss that trains nothing."""
    if layers:
        raise ValueError(
            f"the loss of the index must have a gradient, got none in layers {layers}: their "
            "forward pass ran under no_grad. Checkpointing of activations needs "
            "use_reentrant=False; to read the number alone, call this under torch.no_grad() too"
        )


def check_chosen_layers(chosen: list[int], known: list[int]) -> None:
    """Numbers of layers, one at least, each once."""
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"layers must name some of {known}, each once, got {chosen}")


def check_no_window(attention: Any) -> None:
    """Attention to everything before."""
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = attention.config.sliding_window
    if window is not None:
        raise ValueError(
            f"model.config.sliding_window must be None, got {window} in layer "
            f"{attention.layer_idx}: MSA takes the place of full attention"
        )


def check_index_dim(dim: int) -> None:
    """Rotary embedding turns pairs."""
    if dim < 2 or dim % 2:
        raise ValueError(f"index_dim must be even and at least 2, got {dim}")


def check_cache_layer(layer: Any) -> None:
    """A cache that can keep index keys."""
    if not hasattr(layer, "update_index"):
        raise TypeError(
            "past_key_values must have dynamic or static layers, which can keep index keys, "
            f"got {checks.kind(layer)}"
        )


def check_phase(phase: Any) -> None:
    """What a converted layer can do."""
    known = ("sparse", "train", "warm_up", "measure")
    if phase not in known:
        raise ValueError(f"phase must be one of {', '.join(known)}, got {phase!r}")


def check_index_file(path: Any, made: dict[str, Any]) -> None:
    """Written by save_index."""
    if not {"config", "layers", "index_dim"} <= made.keys():
        raise ValueError(f"path must be a file written by save_index, got {path}")


def check_one_config(configs: dict[int, Any]) -> None:
    """The file holds one configuration."""
    first, *others = configs
    for layer in others:
        if configs[layer] != configs[first]:
            raise ValueError(
                f"indexer.config must be the same in all layers of one file, got {configs[first]} "
                f"in layer {first} and {configs[layer]} in layer {layer}"
            )


def check_index_weights(path: Any, layer: int, own: dict[str, Any], found: dict[str, Any]) -> None:
    """All that this model needs, floating, in its sizes."""
    if own.keys() != found.keys():
        raise ValueError(
            f"{path} must hold {', '.join(own)} of layer {layer}, got {', '.join(found) or 'none'}"
        )
    for name, weight in found.items():
        if weight.shape != own[name].shape or not weight.is_floating_point():
            raise ValueError(
                f"{path} must hold {name} of layer {layer} as floating numbers in shape "
                f"{list(own[name].shape)}, got {weight.dtype} {list(weight.shape)}"
            )


def check_text(tokens: int, needed: int) -> None:
    """Enough to read."""
    if tokens < needed:
        raise ValueError(
            f"text must have at least {needed} tokens: one piece of --length for each step, and "
            f"one to be measured on, got {tokens}"
        )


def check_bytes(vocab_size: int) -> None:
    """A token for each byte."""
    if vocab_size < 256:
        raise ValueError(
            f"tokens must be 'model' where the vocabulary has not the 256 bytes, got 'bytes' for "
            f"one of {vocab_size}"
        )
