"""The model is compared with transformers' `minimax_m3_vl`, with the same weights.

Other tests show each point in which transformers differs from docs/spec.md.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

import transformers
from transformers import DynamicCache, MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
)

import msa
from msa.model import Cache, Model, ModelConfig, Pictures
from msa.model.from_transformers import load_weights, our_name
from tests.minimax_models import behind

BOUND = 1e-4
IMAGE, VIDEO = 95, 96
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 12, "index_block_size": 8, "index_topk_blocks": 3,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
TOWER = {
    "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_channels": 3, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "initializer_range": 0.2,
}  # fmt: skip
GRIDS, VIDEO_GRIDS = [(1, 2, 4), (1, 4, 2), (1, 4, 6)], [(3, 2, 2)]


def text_config(attention="dm", mlp="dm", **options):
    """One letter per layer: dense or MSA, dense or MoE."""
    kinds = {
        "num_hidden_layers": len(attention),
        "layer_types": [{"d": "full_attention", "m": "minimax_m3_sparse"}[a] for a in attention],
        "mlp_layer_types": [{"d": "dense", "m": "sparse"}[m] for m in mlp],
    }
    return MiniMaxM3VLTextConfig(**SMALL | kinds | options)


CONFIGS = {
    "one dense layer": text_config("d", "d"),
    "one MSA layer": text_config("m", "m"),
    "as released: dense, then MSA": text_config("ddmm", "ddmm"),
    "experts apart from MSA": text_config("mdm", "mmd"),
    "all heads in one group, tied": text_config(
        "mm", "dm", num_key_value_heads=1, index_n_heads=1, tie_word_embeddings=True
    ),
    "one head a group, two local blocks": text_config(
        "dm", "mm", num_key_value_heads=4, index_n_heads=4, index_local_blocks=2,
        routed_scaling_factor=1.5, swiglu_limit=0.5, swiglu_alpha=1.2, rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 50.0, "partial_rotary_factor": 0.75},
    ),
    "pictures": text_config("dmm", "dmm"),
    "pictures, other sizes": text_config("md", "md"),
}  # fmt: skip
TOWERS = {
    "pictures": TOWER,
    "pictures, other sizes": TOWER | {
        "num_attention_heads": 4, "temporal_patch_size": 1, "num_channels": 1, "patch_size": 3,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 7.0}, "layer_norm_eps": 1e-3,
    },
}  # fmt: skip


def make(config, tower=None, backend="torch", seed=0):
    """Their model with random weights, and ours with the same weights."""
    torch.manual_seed(seed)
    if tower is None:
        theirs = MiniMaxM3VLForCausalLM(config)
    else:
        config = MiniMaxM3VLConfig(
            text_config=config, vision_config=tower, image_token_index=IMAGE,
            video_token_index=VIDEO, projector_hidden_size=28,
        )  # fmt: skip
        theirs = MiniMaxM3SparseForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in theirs.state_dict().items():
            if "norm" in name or name.endswith("bias"):
                weight.add_(0.3 * torch.randn_like(weight))
    ours = Model(ModelConfig.from_transformers(config), backend=backend)
    load_weights(ours, theirs.state_dict())
    return theirs.eval(), ours.eval()


def words(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator) for n in lengths]


def borders(texts):
    return torch.tensor([0, *(len(t) for t in texts)]).cumsum(0)


def padded_right(theirs, texts, **pictures):
    """Their logits of a ragged batch, packed like ours."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    logits = theirs(input_ids=ids, attention_mask=mask, **pictures).logits
    return torch.cat([logits[row, : len(text)] for row, text in enumerate(texts)])


def in_pieces(theirs, text, pieces):
    """Their logits, computed in chunks with their own cache."""
    cache = DynamicCache(config=theirs.config)
    parts = [
        theirs(input_ids=text[None, start:stop], **behind(theirs, cache)).logits[0]
        for start, stop in pairwise(pieces)
    ]
    return torch.cat(parts)


def close(name, found, wanted):
    error = (found - wanted).abs().max().item()
    print(f"{name}: off by {error:.1e} of {wanted.abs().max():.2g}")
    assert found.shape == wanted.shape
    assert error <= BOUND


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_ragged_batch(name, backend):
    if name in TOWERS and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("transformers before 5.23 turns pictures by (frame, row) and mixes images")
    theirs, ours = make(CONFIGS[name], TOWERS.get(name), backend)
    texts, pictures, given = words(61, 8, 33, 1), {}, {}
    if name in TOWERS:
        torch.manual_seed(2)
        merged = ours.config.vision.merge**2
        texts[0][3:5], texts[0][20:22], texts[2][4:10] = IMAGE, IMAGE, IMAGE
        texts[2][20:23] = VIDEO
        sizes = [sum(t * h * w for t, h, w in grids) for grids in (GRIDS, VIDEO_GRIDS)]
        assert [s // merged for s in sizes] == [10, 3]
        patches = [torch.randn(s, ours.config.vision.patch_values) for s in sizes]
        given = {
            "images": Pictures(patches[0], GRIDS),
            "videos": Pictures(patches[1], VIDEO_GRIDS),
        }
        pictures = {
            "pixel_values": patches[0], "image_grid_thw": torch.tensor(GRIDS),
            "pixel_values_videos": patches[1], "video_grid_thw": torch.tensor(VIDEO_GRIDS),
        }  # fmt: skip
    wanted = padded_right(theirs, texts, **pictures)
    found = ours(torch.cat(texts), borders(texts), **given).logits
    close(f"{name}, {backend}", found, wanted)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["as released: dense, then MSA", "experts apart from MSA"])
def test_chunked_prefill_and_cached_decoding(name, backend):
    """Their model reads each text alone, ours all together: in chunks, then token by token."""
    theirs, ours = make(CONFIGS[name], backend=backend)
    texts, cuts = words(44, 13, 30), ([0, 17, 38], [0, 5, 7], [0, 9, 24])
    steps = 6
    wanted = [
        in_pieces(theirs, text, [*cut, *range(cut[-1] + 1, len(text) + 1)])
        for text, cut in zip(texts, cuts)
    ]
    cache = Cache(ours.config, batch=3, max_tokens=50)
    found = [[], [], []]
    for chunk in range(2):
        pieces = [text[c[chunk] : c[chunk + 1]] for text, c in zip(texts, cuts)]
        logits = ours(torch.cat(pieces), borders(pieces), cache=cache).logits
        for text, part in zip(found, logits.split([len(p) for p in pieces])):
            text.append(part)
    for step in range(steps):
        pieces = [text[c[-1] + step : c[-1] + step + 1] for text, c in zip(texts, cuts)]
        logits = ours(torch.cat(pieces), borders(pieces), cache=cache).logits
        for text, part in zip(found, logits):
            text.append(part[None])
    assert cache.lengths == [len(t) for t in texts]
    for s, parts in enumerate(found):
        close(f"{name}, {backend}, cached, text {s}", torch.cat(parts), wanted[s])


def test_kernels_give_the_same_logits():
    """In Triton's interpreter if there is no GPU, with float32 and few tokens."""
    config = text_config("m", "d", index_block_size=16, index_topk_blocks=2, index_head_dim=16)
    theirs, ours = make(config, backend="triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = words(40, 21)
    found = ours.to(device)(torch.cat(texts).to(device), borders(texts)).logits.cpu()
    close("triton", found, padded_right(theirs, texts))


def test_every_weight_has_a_name_of_ours():
    theirs, ours = make(CONFIGS["pictures"], TOWER)
    assert {our_name(name) for name in theirs.state_dict()} == set(ours.state_dict())


def test_weights_that_do_not_fit_are_named():
    theirs, ours = make(CONFIGS["one MSA layer"])
    weights = dict(theirs.state_dict())
    gone = weights.pop("model.layers.0.self_attn.indexer.k_proj.weight")
    with pytest.raises(ValueError, match=r"missing: layers\.0\.attention\.index\.k\.weight$"):
        load_weights(ours, weights)
    weights["model.layers.0.self_attn.indexer.k_proj.weight"] = gone[:, :-1]
    with pytest.raises(ValueError, match=r"index\.k\.weight of shape \[12, 32\], got \[12, 31\]"):
        load_weights(ours, weights)
    with pytest.raises(ValueError, match=r"unexpected: layers\.7\.mtp$"):
        load_weights(ours, theirs.state_dict() | {"model.layers.7.mtp": gone})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        ({"output_router_logits": True}, "output_router_logits must be False"),
        ({"index_n_heads": 1}, "index_n_heads must be 2"),
        ({"index_local_blocks": 0}, "local_blocks must be at least 1"),
        ({"index_local_blocks": 4}, "must be at most top_k = 3"),
        ({"index_head_dim": 6}, "rotary_dim must be even and at most 6"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"rope_parameters\.rope_type must be 'default'",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must hold"),
    ],
)
def test_what_is_not_supported_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_transformers(text_config(**options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden_act": "relu"}, r"vision_config\.hidden_act must be 'gelu'"),
        ({"attention_dropout": 0.5}, r"vision_config\.attention_dropout must be 0\.0"),
    ],
)
def test_what_is_not_supported_of_a_tower_is_named(options, named):
    config = MiniMaxM3VLConfig(
        text_config=text_config(), vision_config=TOWER | options, image_token_index=IMAGE,
        video_token_index=VIDEO,
    )  # fmt: skip
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_transformers(config)


# -- where transformers differs from the spec -----------------------------------------------------
def their_blocks(theirs, text, **options):
    """The selection of the index in their first layer: [groups, T, k]."""
    seen = []
    indexer = theirs.model.layers[0].self_attn.indexer
    hook = indexer.register_forward_hook(lambda module, args, found: seen.append(found))
    theirs(input_ids=text[None], **options)
    hook.remove()
    return seen[0][0]


def test_their_block_lists_are_not_canonical():
    """R8: our ids ascend and have width k; theirs start with the best and have at most as many
    places
    as blocks. The sets are the same, and so are the outputs.
    """
    theirs, ours = make(text_config("m", "d"))
    (text,) = words(50)
    blocks = their_blocks(theirs, text)
    assert any(row[row >= 0].diff().lt(0).any() for group in blocks for row in group)
    assert their_blocks(theirs, text[:9]).shape[-1] == 2 < ours.config.msa.top_k
    chosen, attend = [], msa.attention

    def watch(*args, **options):
        chosen.append(attend(*args, **options))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msa, "attention", watch)
        ours(text)
    ids = chosen[0].selection.indices.transpose(0, 1)
    assert torch.equal(blocks.sort(-1).values, ids.sort(-1).values)


def test_they_ignore_sink_blocks():
    """R6: their configuration accepts the released option for sinks, but does not use it."""
    released = {"sparse_num_index_heads": 2, "sparse_init_block": 1, "sparse_attention_freq": [1]}
    config = text_config("m", "d", sparse_attention_config=released)
    plain, ours = make(text_config("m", "d"))
    theirs, _ = make(config)
    (text,) = words(61)
    wanted = plain(input_ids=text[None]).logits[0]
    assert torch.equal(theirs(input_ids=text[None]).logits[0], wanted)
    attention = ours.layers[0].attention
    attention.config = msa.MSAConfig(8, 3, sink_blocks=1)
    assert (ours(text).logits - wanted).abs().max() > 100 * BOUND


def test_padding_on_the_left_shifts_their_blocks():
    """R3: blocks count from the sequence's start. Theirs count from the start of the padding.

    RoPE depends on distances only, so padding does not change a dense layer.
    """
    (text,) = words(61)
    ids = torch.cat([torch.zeros(3, dtype=torch.long), text])
    mask = torch.cat([torch.zeros(3, dtype=torch.long), torch.ones_like(text)])
    off = {}
    for kind in "dm":
        theirs, ours = make(text_config(kind, "d"))
        padded = theirs(input_ids=ids[None], attention_mask=mask[None]).logits[0, 3:]
        off[kind] = (ours(text).logits - padded).abs().max()
    assert off["d"] <= BOUND
    assert off["m"] > 100 * BOUND


def test_they_do_not_read_rotary_dim():
    """The factor in rope_parameters says how much is turned; without it the whole head is."""
    rope = {"rope_theta": 1e4}
    half, whole = text_config(rotary_dim=8), text_config(index_head_dim=16, rope_parameters=rope)
    assert ModelConfig.from_transformers(half).rotary_dim == 8
    whole.rotary_dim = 8
    assert ModelConfig.from_transformers(whole).rotary_dim == 16
    theirs, ours = make(whole)
    (text,) = words(40)
    close("whole heads", ours(text).logits, theirs(input_ids=text[None]).logits[0])


def test_equal_scores_may_go_to_any_block_of_theirs():
    """R7: for equal scores ours selects the lower block, and theirs the blocks of torch.topk."""
    theirs, _ = make(text_config("m", "d"))
    indexer = theirs.model.layers[0].self_attn.indexer
    indexer.k_norm.weight.fill_(-1.0)  # 1 + weight = 0: every score is 0
    (text,) = words(61)
    q_idx, k_idx = torch.zeros(61, 2, 12), torch.zeros(61, 12)
    ours = msa.select(q_idx, k_idx, config=msa.MSAConfig(8, 3)).indices
    assert ours[60, 0].tolist() == [0, 1, 7]
    assert not torch.equal(their_blocks(theirs, text)[0, 60].sort().values, ours[60, 0].long())
