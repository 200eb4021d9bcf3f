"""One function under test, wrapped as the functions of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from msa.config import MSAConfig
from msa.conformance.foreign.arguments import in_order
from msa.conformance.foreign.signature import Function, FunctionKind
from msa.integrations import arrays
from msa.ir import Array, Output, Selection, Sequences

Order = Callable[[Array], Array]


@dataclass(frozen=True)
class WrappedFunction:
    """One adapted function, completed to a backend by the functions of `base`.

    For calls without queries `base` is used, because the function need not support them.
    """

    adapted: Function
    base: Any
    order: Order = in_order

    def stages(self, kind: FunctionKind, gives: frozenset[str]) -> dict[str, Function]:
        """The functions under test, by their names in msa.interface.Backend."""
        match kind:
            case "select":
                return {"select_fused": self.select, "attend": self.attend_by(self.select, None)}
            case "sparse_attention":
                attend = self.attend_by(self.base.select_fused, self.attend_selection)
                return {"attend_selection": self.attend_selection, "attend": attend}
            case "attention":
                index = {"select_fused": self.select_of_whole} if "ids" in gives else {}
                return {"attend": self.attend, **index}

    def select(
        self, q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig, **options: int
    ) -> Selection:
        """The index branch, by the function."""
        if sequences.total_q == 0:
            return self.base.select_fused(q_idx, k_idx, sequences, config)
        ids = self.adapted(q_idx, k_idx, sequences, config, **options)
        return Selection(self.order(ids), sequences, config.block_size)

    def attend_selection(
        self, q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> Output:
        """The main branch, by the function. If it gives no lse, lse is NaN and is not tested."""
        if len(q) == 0:
            return self.base.attend_selection(q, k, v, selection, scale)
        out, lse = self.adapted(q, k, v, selection, scale)
        return Output(out, out[..., 0] * np.nan if lse is None else lse, selection)

    def attend_by(self, select: Function, attend: Function | None) -> Function:
        """The whole path from two halves; without `attend` the second half is that of the base."""
        main = attend or self.base.attend_selection

        def attend_whole(
            q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array,
            sequences: Sequences, config: MSAConfig,
        ) -> Output:  # fmt: skip
            selection = select(q_idx, k_idx, sequences, config)
            output = main(q, k, v, selection, config.softmax_scale_for(q.shape[-1]))
            return replace(output, selection=selection)

        return attend_whole

    def attend(
        self, q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array,
        sequences: Sequences, config: MSAConfig,
    ) -> Output:  # fmt: skip
        """The whole path, by the function. If it gives no ids, those of the base are used."""
        if len(q) == 0:
            return self.base.attend(q, k, v, q_idx, k_idx, sequences, config)
        out, lse, ids = self.adapted(q, k, v, q_idx, k_idx, sequences, config)
        if ids is None:
            selection = self.base.select_fused(q_idx, k_idx, sequences, config)
        else:
            selection = Selection(self.order(ids), sequences, config.block_size)
        return Output(out, out[..., 0] * np.nan if lse is None else lse, selection)

    def select_of_whole(
        self, q_idx: Array, k_idx: Array, sequences: Sequences, config: MSAConfig
    ) -> Selection:
        """The ids of the whole path, called with q, k and v of 0 in the index branch's sizes."""
        q, k = arrays.zeros_like(q_idx), arrays.zeros_like(k_idx)
        k = arrays.stack([k] * q_idx.shape[1], 1)
        output = self.attend(q, k, k, q_idx, k_idx, sequences, config)
        assert output.selection is not None
        return output.selection
