"""SGLang's sparse attention of MiniMax-M3 and its hook registry, unchanged, behind stubs.

    with sglang_files.loaded(folder) as engine:
        cache = sglang_files.Slots(...)                      # as SGLang's pools hold tokens
        theirs = engine.decode(cache, q, q_idx)
        engine.plug_in()                                      # what SGLang's loader does
        ours = engine.decode(cache, q, q_idx)

SGLang's top-k of a decode is compiled by another library when it runs. Here its other top-k runs,
in Triton, which SGLang has for this case.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_files import MINIMAX, load, modules_of, stub

PAGE = 128
FUNCTIONS = "sglang.srt.layers.attention.minimax_sparse_ops.minimax_sparse"


class Settings:
    """SGLang's environment variables: none is set."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: None)


@dataclass
class Slots:
    """Slots of tokens, and for each request the slot of each of its tokens."""

    k: Tensor
    v: Tensor
    k_idx: Tensor
    req_to_token: Tensor
    slot_ids: Tensor
    """The requests' rows of req_to_token."""
    lengths: list[int]

    @property
    def device(self) -> torch.device:
        """Where all lie."""
        return self.k.device


class Engine:
    """SGLang's files, and calls of its functions as its backend makes them."""

    def __init__(self, folder: Path, top_k: int) -> None:
        self.folder, self.top_k = folder, top_k
        stub("sglang", __version__="0.5.23")
        stub("sglang.srt.environ", envs=Settings())
        on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        stub("sglang.srt.runtime_context",
             get_platform=lambda: SimpleNamespace(is_sm90=on_hopper))  # fmt: skip
        stub("sglang.srt.utils", is_gfx95_supported=lambda: False, is_hip=lambda: False,
             is_xpu=lambda: False)  # fmt: skip
        names = ("common.tile_ptr", "common.utils", "common.index", "decode.topk_sparse",
                 "decode.flash_with_topk_idx", "prefill.flash_with_topk_idx",
                 "prefill.topk_sparse")  # fmt: skip
        self.kernels = [load(folder, f"{MINIMAX.replace('/', '.')}.{name}") for name in names]
        self.functions = load(folder, FUNCTIONS)
        load(folder, "sglang.srt.plugins.hook_registry")
        self.plugins = load(folder, "sglang.srt.plugins")

    def plug_in(self) -> None:
        """What SGLang's loader does: run the plug-ins, then apply their hooks."""
        logging.getLogger("sglang").setLevel(logging.ERROR)
        vars(self.plugins)["_plugins_loaded"] = False
        self.plugins.load_plugins()

    def decode(self, slots: Slots, q: Tensor, q_idx: Tensor, **others: Any) -> Tensor:
        """One new token of each request."""
        longest = others.pop("longest", max(slots.lengths))
        lengths = others.pop("seq_lens", torch.tensor(slots.lengths, device=slots.device))
        return self.functions.minimax_sparse_decode(
            q, None, slots.k, slots.v, q_idx, None, slots.k_idx, None, slots.req_to_token,
            slots.slot_ids, lengths, longest, 1, PAGE, self.top_k, 0, 1, score_type="max",
            disable_index_value=True, page_size=PAGE, **others,
        )[1]  # fmt: skip

    def prefill(
        self, slots: Slots, new: list[int], q: Tensor, q_idx: Tensor, **others: Any
    ) -> tuple[Tensor, Tensor]:
        """New tokens of each request; the output, and the ids of the blocks."""
        device = slots.device
        borders = torch.tensor([0, *new]).cumsum(0).to(torch.int32).to(device)
        lengths = torch.tensor(slots.lengths, dtype=torch.int32)
        before = lengths - torch.tensor(new, dtype=torch.int32)
        _, out, ids = self.functions.minimax_sparse_prefill(
            q, slots.k, slots.v, None, q_idx, slots.k_idx, None, None, slots.req_to_token,
            slots.slot_ids, borders, lengths.to(device), before.to(device), max(new),
            max(slots.lengths), 1, PAGE, self.top_k, 0, 1, score_type="max",
            disable_index_value=True, page_size=PAGE, seqlens_cpu=new, seq_lens_cpu=lengths,
            return_topk_idx=True, **others,
        )  # fmt: skip
        return out, ids


@contextmanager
def loaded(folder: Path, top_k: int) -> Iterator[Engine]:
    """SGLang's files of an unpacked wheel; afterwards no module of them is left."""
    with modules_of("sglang", "msa.integrations.sglang_layers"):
        yield Engine(folder, top_k)
