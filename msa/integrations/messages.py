"""The checks of the integrations. Each error names the argument, what was wanted and what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from msa import checks
from msa.ir import Array, PagedKV, Sequences


# -- layouts --------------------------------------------------------------------------------------
def check_rank(name: str, array: Any, dims: str) -> None:
    """Check that an array has as many dims as `dims` names."""
    if not hasattr(array, "shape") or len(array.shape) != len(dims.split()):
        got = list(array.shape) if hasattr(array, "shape") else checks.kind(array)
        raise ValueError(f"{name} must have shape [{', '.join(dims.split())}], got {got}")


def check_uniform(sequences: Sequences) -> None:
    """Check that all sequences of a batch have the same lengths."""
    lengths = {(q.stop - q.start, k.stop - k.start) for q, k in sequences.spans()}
    if len(lengths) > 1:
        raise ValueError(
            "selection.sequences must have one length for [B, T, ...], "
            f"got (queries, keys) {sorted(lengths)}"
        )


def check_width(got: int, wanted: int) -> None:
    """Check that top_k is not smaller than the number of ids per query."""
    if wanted < got:
        raise ValueError(f"top_k must be at least the {got} ids of each query, got {wanted}")


def check_no_gaps(name: str, ids: Array, visible: Array) -> None:
    """Check that there is an id in each place for which a block is visible."""
    gaps = visible & (ids < 0)
    if bool(gaps.any()):
        query, group, place = np.argwhere(checks.to_numpy(gaps))[0].tolist()
        raise ValueError(
            f"{name} must hold an id in each of the first min(k, visible blocks) places, "
            f"got {int(ids[query, group, place])} at query {query}, group {group}, place {place}"
        )


def check_no_scales(cache: PagedKV) -> None:
    """Check that the cache has no scales, so its pages are not of 8 bits."""
    for name in ("k_scales", "v_scales", "k_idx_scales"):
        if getattr(cache, name) is not None:
            raise ValueError(
                f"cache.{name} must be None: each project has scales of another shape, "
                f"got {checks.kind(getattr(cache, name))}"
            )


def check_head_dims(dim: int, dim_v: int) -> None:
    """Check that keys and values have the same head size, since they share an array."""
    if dim != dim_v:
        raise ValueError(f"cache.v_pages must have Dv = D = {dim} here, got {dim_v}")


def check_divides(name: str, size: int, whole: int) -> None:
    """Check that a page size divides the block size, or a block size the number of slots."""
    if size < 1 or whole % size:
        raise ValueError(f"{name} must divide the block size {whole}, got {size}")


def check_order(order: str) -> None:
    """Check the name of the order of heads and tokens in a page."""
    if order not in ("NHD", "HND"):
        raise ValueError(f"order must be 'NHD' or 'HND', got {order!r}")


def check_whole_pages(name: str, bad: Array) -> None:
    """Raise an error if a token slot is bad: it forms no whole page with its neighbours."""
    if bool(bad.any()):
        row, token = np.argwhere(checks.to_numpy(bad))[0].tolist()
        raise ValueError(
            f"{name} must give each block of a sequence one page of slots, aligned and in order, "
            f"got another slot at row {row}, token {token}"
        )


# -- transformers ---------------------------------------------------------------------------------
def check_padding(mask: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> None:
    """Check that the ones of each row form one run."""
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
    """Check that no row starts with padding, which the indexer of transformers counts."""
    for row, first in enumerate(firsts):
        if first:
            raise ValueError(
                "attention_mask must start with a one in each row for attn_implementation='msa' "
                f"alone, got {first} tokens of padding before row {row}, which shift the blocks of "
                "transformers' indexer: call msa.integrations.transformers.enable(model)"
            )


def check_positions(row: int, found: np.ndarray, wanted: np.ndarray) -> None:
    """Check that positions count the tokens of each sequence."""
    bad = np.flatnonzero(found != wanted)
    if len(bad):
        raise ValueError(
            "position_ids must count up from 0, from the number of cached tokens, or from 0 again "
            f"where a packed sequence starts, got {int(found[bad[0]])} in place of "
            f"{int(wanted[bad[0]])} at row {row}, token {int(bad[0])}"
        )


def check_mask_form(mask: Any) -> None:
    """Check that a mask is None or has one number per token."""
    if mask is not None and getattr(mask, "ndim", None) != 2:
        got = list(mask.shape) if hasattr(mask, "shape") else checks.kind(mask)
        raise ValueError(
            f"attention_mask must be None or have shape [B, T] for attn_implementation='msa', "
            f"got {got}: MSA is causal, and a mask of another form may ask for other attention"
        )


def check_mask_length(mask: Any, seen: int) -> None:
    """Check that a mask has a number for each token seen, cached ones included."""
    if mask.shape[1] < seen:
        raise ValueError(
            f"attention_mask must have shape [B, {seen}], cached tokens included, "
            f"got {list(mask.shape)}"
        )


def check_plain_attention(dropout: float, options: dict[str, Any]) -> None:
    """Check that plain softmax attention is wanted: no dropout, window, soft cap or sinks."""
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
    """Check that rows are not packed: transformers' indexer takes a row as one sequence."""
    if packs:
        raise ValueError(
            "position_ids must not start again within a row for attn_implementation='msa' alone, "
            "got packed sequences, whose blocks transformers' indexer mixes: call "
            "msa.integrations.transformers.enable(model)"
        )


def check_index_heads(index_heads: int, kv_heads: int) -> None:
    """Check that the number of index heads divides the number of key heads."""
    if kv_heads % index_heads:
        raise ValueError(
            f"index_n_heads must divide num_key_value_heads = {kv_heads}, got {index_heads}"
        )


def check_has_layers(count: int, wanted: str, model: Any) -> None:
    """Check that a model has at least one layer of the wanted kind."""
    if not count:
        raise TypeError(f"model must have {wanted}, got {checks.kind(model)} without any")


def check_implementation(name: Any, known: tuple[str, ...]) -> None:
    """Check the name of an attention implementation."""
    if name not in known:
        raise ValueError(f"implementation must be one of {', '.join(known)}, got {name!r}")


def check_cache_name(forward: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Check that a forward has a known name for its cache; else it would be ignored."""
    if not set(found) & set(known):
        raise TypeError(
            f"{forward} must take its cache as {' or '.join(known)}, got {', '.join(found)}: "
            "this release of transformers is not known here"
        )


def check_whole_weights(shares: list[str], tp_size: int | None) -> None:
    """Check that this process holds all heads of the model."""
    if shares or (tp_size or 1) > 1:
        got = f"the DTensor {shares[0]}" if shares else f"one of tp_size = {tp_size}"
        raise ValueError(
            f"model must hold whole weights, got {got}: with a share of the heads the index lacks "
            "some groups. Load the model without tp_plan; devices can split the batch instead"
        )


def check_groups(index_groups: int, kv_heads: int) -> None:
    """Check that there is one index head for each key head of this process."""
    if index_groups != kv_heads:
        raise ValueError(
            f"the index must have one head for each of the {kv_heads} key heads of this process, "
            f"got {index_groups}: tensor parallelism is not supported"
        )


def check_not_traced(traced: bool) -> None:
    """Check that no graph is traced, since the numbers of masks and positions are read."""
    if traced:
        raise ValueError(
            "attention_mask and position_ids must hold numbers for attn_implementation='msa', got "
            "a graph that is being exported: their numbers give the sequences of a forward pass. "
            "Export the model with attn_implementation='sdpa', or build a graph of msa.ops, where "
            "borders of sequences are integers"
        )


# -- conversion -----------------------------------------------------------------------------------
def check_not_converted(layers: list[int]) -> None:
    """Check that no layer has an index branch yet; a second one would also run."""
    if layers:
        raise ValueError(
            f"model must not be converted yet, got one with an index branch in layers {layers}: "
            "take it away first, by msa.integrations.convert.remove_index(model)"
        )


def check_one_decoder(layers: list[int]) -> None:
    """Check that every layer has its own number, by which it is found."""
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(
            f"model must be one decoder, got several layers of the numbers {twice}: convert each "
            "decoder alone"
        )


def check_loaded(device: str, layer: int) -> None:
    """Check that the weights of a layer are not on the meta device."""
    if device == "meta":
        raise ValueError(
            f"model must have its weights, got those of layer {layer} on the meta device: load or "
            "materialise the model first, since the index is drawn on the device of the layer"
        )


def check_compute_dtype(found: list[Any], wide: tuple[Any, ...]) -> None:
    """Check that at least one weight has a dtype in which the index can compute."""
    if not set(found) & set(wide):
        raise ValueError(
            f"model must have a weight in one of {', '.join(map(str, wide))}, in which the index "
            f"would compute, got {', '.join(sorted({str(x) for x in found}))}"
        )


def check_loss_has_gradient(layers: list[int]) -> None:
    """Check that no layer has a loss without a gradient, which would train nothing."""
    if layers:
        raise ValueError(
            f"the loss of the index must have a gradient, got none in layers {layers}: their "
            "forward pass ran under no_grad. Checkpointing of activations needs "
            "use_reentrant=False; to read the number alone, call this under torch.no_grad() too"
        )


def check_chosen_layers(chosen: list[int], known: list[int]) -> None:
    """Check that the numbers of the chosen layers exist, each once, at least one."""
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"layers must name some of {known}, each once, got {chosen}")


def check_no_window(attention: Any) -> None:
    """Check that a layer has no sliding window."""
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = attention.config.sliding_window
    if window is not None:
        raise ValueError(
            f"model.config.sliding_window must be None, got {window} in layer "
            f"{attention.layer_idx}: MSA takes the place of full attention"
        )


def check_index_dim(dim: int) -> None:
    """Check that the index dim is even, since rotary embeddings rotate pairs."""
    if dim < 2 or dim % 2:
        raise ValueError(f"index_dim must be even and at least 2, got {dim}")


def check_cache_layer(layer: Any) -> None:
    """Check that a cache layer can keep index keys."""
    if not hasattr(layer, "update_index"):
        raise TypeError(
            "past_key_values must have dynamic or static layers, which can keep index keys, "
            f"got {checks.kind(layer)}"
        )


def check_phase(phase: Any) -> None:
    """Check the name of a phase."""
    known = ("sparse", "train", "warm_up", "measure")
    if phase not in known:
        raise ValueError(f"phase must be one of {', '.join(known)}, got {phase!r}")


def check_index_file(path: Any, made: dict[str, Any]) -> None:
    """Check that a file was written by save_index."""
    if not {"config", "layers", "index_dim"} <= made.keys():
        raise ValueError(f"path must be a file written by save_index, got {path}")


def check_one_config(configs: dict[int, Any]) -> None:
    """Check that all layers have the same configuration, since a file holds one."""
    first, *others = configs
    for layer in others:
        if configs[layer] != configs[first]:
            raise ValueError(
                f"indexer.config must be the same in all layers of one file, got {configs[first]} "
                f"in layer {first} and {configs[layer]} in layer {layer}"
            )


def check_index_weights(path: Any, layer: int, own: dict[str, Any], found: dict[str, Any]) -> None:
    """Check that a file holds all weights of a layer, as floating numbers of the right shape."""
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
    """Check that a text has enough tokens."""
    if tokens < needed:
        raise ValueError(
            f"text must have at least {needed} tokens: one piece of --length for measuring, and "
            f"one more for training, got {tokens}"
        )


def check_bytes(vocab_size: int) -> None:
    """Check that a vocabulary has a token for each byte."""
    if vocab_size < 256:
        raise ValueError(
            f"tokens must be 'model' for a vocabulary of less than 256 tokens, got 'bytes' for "
            f"one of {vocab_size}"
        )
