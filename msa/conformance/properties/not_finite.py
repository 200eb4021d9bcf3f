"""R9 if k or v holds one NaN or infinity: the results and gradients that it may change.

The readers of the entry are the queries and heads whose selected visible tokens include its token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Case, Inputs, PagedCase
from msa.conformance.gradients import attention_gradients
from msa.conformance.properties import holds_for
from msa.conformance.properties.training import upstream
from msa.conformance.run_stage import attend_selection, dense, selected, spec
from msa.conformance.strategies import NOT_FINITE, Want
from msa.conformance.tolerances import AGREES, Measure, compare, require, same, worst
from msa.conformance.yardstick import Attention, block_mask
from msa.conformance.yardstick_training import Gradients
from msa.ir import Array, Output, Selection

NAN = (float("nan"),)
KEYS = Want(shapes=("prefill", "chunk"))


def plant(case: Case, tensor: str, place: int, value: float) -> Case:
    """The same call with one entry of k or v replaced."""
    return replace(case, **{tensor: replace(getattr(case, tensor), planted=((place, value),))})


@st.composite
def spoiled(
    draw: DrawFn, domain: Domain, in_k: tuple[float, ...] = NOT_FINITE, tensors: str = "kv"
) -> Case:
    """A call in which one entry of one of `tensors` is not finite."""
    case = draw(strategies.cases(domain, KEYS))
    tensor = draw(st.sampled_from(tensors))
    value = draw(st.sampled_from(NOT_FINITE if tensor == "v" else in_k))
    return plant(case, tensor, draw(st.integers(0, 9999)), value)


@st.composite
def spoiled_pages(draw: DrawFn, domain: Domain) -> PagedCase:
    """A decoding step in which one entry of k or v is not finite."""
    paged = draw(strategies.paged_cases(domain))
    tensor, value = draw(st.sampled_from("kv")), draw(st.sampled_from(NOT_FINITE))
    return replace(paged, case=plant(paged.case, tensor, draw(st.integers(0, 9999)), value))


@dataclass(frozen=True)
class Reach:
    """The results that the one entry that is not finite may change, by R9."""

    clean: Inputs
    """The call before the entry was planted."""
    spoiled: Inputs
    selection: Selection

    @cached_property
    def where(self) -> tuple[str, tuple[int, int, int]] | None:
        """ "k" or "v", and (token, group, column) of the entry; None if there are no keys."""
        for name, x in zip("kv", self.spoiled.main[1:]):
            for at in np.argwhere(~np.isfinite(x)).tolist():
                return name, (at[0], at[1], at[2])
        return None

    @cached_property
    def mask(self) -> Array:
        """The mask of the selection: [Tq, Hkv, Tk]."""
        block = self.selection.block_size
        return block_mask(self.selection.indices, self.clean.sequences, block)

    def heads(self, groups: Array) -> Array:
        """Values of groups [Tq, Hkv] repeated for query heads [Tq, Hq]."""
        return np.repeat(groups, self.clean.main[0].shape[1] // groups.shape[1], axis=1)

    @cached_property
    def readers(self) -> Array:
        """The queries and heads that read the token: [Tq, Hq]."""
        reads = np.zeros(self.mask.shape[:2], bool)
        if self.where:
            token, group, _ = self.where[1]
            reads[:, group] = self.mask[:, group, token]
        return self.heads(reads)

    @cached_property
    def near(self) -> Array:
        """The queries and heads of the same sequence and group, readers included: [Tq, Hq]."""
        near = np.zeros(self.mask.shape[:2], bool)
        if self.where:
            token, group, _ = self.where[1]
            for qs, ks in self.clean.sequences.spans():
                if ks.start <= token < ks.stop:
                    near[qs, group] = True
        return self.heads(near)

    @cached_property
    def near_tokens(self) -> Array:
        """The tokens of the same sequence and group: [Tk, Hkv]."""
        near = np.zeros(self.clean.main[1].shape[:2], bool)
        if self.where:
            token, group, _ = self.where[1]
            for _, ks in self.clean.sequences.spans():
                if ks.start <= token < ks.stop:
                    near[ks, group] = True
        return near

    @cached_property
    def read_with_it(self) -> Array:
        """The tokens that some reader reads: [Tk, Hkv]."""
        found = np.zeros(self.clean.main[1].shape[:2], bool)
        if self.where:
            token, group, _ = self.where[1]
            reads = self.mask[:, group, token]
            found[:, group] = self.mask[reads, group].any(0)
        return found

    def formula(self) -> tuple[Array, Array, Attention]:
        """Where R9's formula is finite, for out [Tq, Hq, Dv] and lse [Tq, Hq]; and its values.

        A score of -inf has the weight 0, so attention over the other tokens gives the value.
        """
        out = np.ones((*self.readers.shape, self.clean.main[2].shape[-1]), bool)
        lse = np.ones(self.readers.shape, bool)
        want = dense(self.clean, self.selection.indices)
        if not self.where:
            return out, lse, want
        name, (token, group, column) = self.where
        if name == "v":
            out[..., column] = ~self.readers
            return out, lse, want
        (q, k, _), mask = self.spoiled.main, self.mask.copy()
        with np.errstate(invalid="ignore"):
            # one column of the key is not finite
            scores = np.einsum("ihd,d->ih", q, k[token, group])
        mask[:, group, token] = False
        some = self.heads(mask.any(-1))
        lse = ~self.readers | ((scores == -np.inf) & some)
        out &= lse[..., None]
        without = Attention(*self.clean.main, mask, self.clean.scale, parts=want.parts)
        return out, lse, without


def check_reach(subject: Subject, reach: Reach, got: Output, clean: Output) -> Measure:
    """Check out and, if it is claimed, lse against the last sentences of R9."""
    precision = subject.domain.precision(reach.clean.dtype)
    out, lse, want = reach.formula()
    parts = [("out", got.out, clean.out, want.out, out, want.out_bound(precision))]
    if subject.domain.has("lse"):
        parts.append(("lse", got.lse, clean.lse, want.lse, lse, want.lse_bound(precision)))
    found: list[Measure] = []
    for name, mine, before, value, finite, bound in parts:
        same(f"{name} of other sequences and groups", mine[~reach.near], before[~reach.near])
        require(
            not np.isfinite(mine[~finite]).any(),
            f"{name} must not be finite where the formula is not",
        )
        near = reach.near[..., None] if mine.ndim == 3 else reach.near
        kept = near & finite & ~np.isnan(mine)
        found.append(compare(f"{name} beside it", mine[kept], value[kept], bound[kept]))
    return worst(*found)


def attend_some_way(subject: Subject, case: Case, inputs: Inputs) -> Output:
    """Attend over the case's selection in one of the backend's loop orders, chosen by the case."""
    ways = subject.loop_orders(case.group) if subject.domain.has("loop_order") else ("",)
    if subject.domain.has("unite_tiles", "attend_union"):
        ways = (*ways, "attend_union")
    way = ways[case.q.seed % len(ways)]
    if way == "attend_union":
        union = spec(subject).run("unite_tiles", case.selection, case.tile_size, cast=case.dtype)
        return subject.run(way, *inputs.main, union, inputs.scale, cast=case.dtype)
    options = {"loop_order": way} if way else {}
    return attend_selection(subject, inputs, case.selection, **options)


def without_planted(case: Case) -> Case:
    """The case without the planted numbers in q, k and v."""
    return replace(case, **{name: replace(getattr(case, name), planted=()) for name in "qkv"})


@holds_for(spoiled, needs=("attend_selection",))
def r9_what_is_not_finite_reaches_its_readers_alone(subject: Subject, case: Case) -> Measure:
    """A NaN or infinity in k or v changes no result of other sequences and groups.

    For its readers the result is not finite where the formula of R9 is not finite. All other
    results of its sequence and group are NaN or right.
    """
    reach = Reach(without_planted(case).inputs, case.inputs, case.selection)
    got, clean = (attend_some_way(subject, case, x) for x in (reach.spoiled, reach.clean))
    return check_reach(subject, reach, got, clean)


@holds_for(spoiled_pages, needs=("decode_step",))
def r9_what_is_not_finite_reaches_its_readers_in_pages_too(
    subject: Subject, paged: PagedCase
) -> Measure:
    """In decoding too; and NaN behind a sequence's length changes no result."""
    live, case = np.array(paged.live, bool), paged.case
    clean = replace(paged, case=without_planted(case))
    outputs: list[Output] = []
    for one in (paged, clean):
        args = (*one.queries, one.cache, case.config)
        found = subject.run("decode_step", *args, cast=case.dtype)
        out, lse = (x[live].reshape(-1, *x.shape[2:]) for x in (found.out, found.lse))
        outputs.append(Output(out, lse, found.selection))
    got, want = outputs
    same("selection", selected(got), selected(want))
    assert got.selection is not None
    return check_reach(subject, Reach(clean.case.inputs, case.inputs, got.selection), got, want)


@holds_for(partial(spoiled, in_k=NAN), needs=("attend_selection", "backward"))
def r9_what_is_not_finite_reaches_no_other_gradient(subject: Subject, case: Case) -> Measure:
    """A NaN in k, or NaN or infinity in v, changes no gradient of other sequences and groups.

    A gradient is not finite where the chain rule through a reader says so. All other gradients of
    its sequence and group are NaN or right.
    """
    reach, d_outs = (
        Reach(without_planted(case).inputs, case.inputs, case.selection),
        upstream(without_planted(case)),
    )
    got = attention_gradients(subject, reach.spoiled, case.selection, *d_outs)
    clean = attention_gradients(subject, reach.clean, case.selection, *d_outs)
    attention = Attention(*reach.clean.main, reach.mask, reach.clean.scale, parts=case.config.top_k)
    want = Gradients(attention, *d_outs)
    values, bounds = want.values(), want.bounds(subject.domain.precision(case.dtype))
    # dv is computed from p, not from v
    through_p = reach.where is not None and reach.where[0] == "k"
    lost = {"q": reach.readers, "k": reach.read_with_it, "v": reach.read_with_it & through_p}
    near = {"q": reach.near, "k": reach.near_tokens, "v": reach.near_tokens}
    found: list[Measure] = []
    for n in "qkv":
        mine = got[n]
        same(f"d{n} of other sequences and groups", mine[~near[n]], clean[n][~near[n]])
        require(
            not np.isfinite(mine[lost[n]]).any(), f"d{n} through its readers must not be finite"
        )
        free = (near[n] & ~lost[n])[..., None] & ~np.isnan(mine)
        found.append(compare(f"d{n} beside it", mine[free], values[n][free], bounds[n][free]))
    return worst(*found)


@holds_for(partial(spoiled, in_k=NAN, tensors="qk"), needs=("align_index",))
def r17_a_teacher_that_is_not_a_number_is_told(subject: Subject, case: Case) -> Measure:
    """A NaN in a query, or in a key that some query reads, makes the loss NaN."""
    reach = Reach(without_planted(case).inputs, case.inputs, case.selection)
    args = (*case.inputs.main[:2], *case.inputs.index)
    read = reach.readers.any() or np.isnan(args[0]).any()
    for selection in (case.selection, None):
        given = (*args, selection, case.sequences, case.config)
        loss = float(subject.run("align_index", *given, cast=case.dtype))
        require(np.isnan(loss) or not read, f"loss must be nan, got {loss!r}")
    return AGREES
