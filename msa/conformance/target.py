"""A function of yours in place of a backend: found by name, spoken to in its own convention.

The rest of an attention is the spec's (for tensors that of the torch backend): around a selection
function its attention, around an attention its selection. So the properties of whole paths speak of
your function as well, and only rules that are about it are asked.

>>> import msa
>>> make_target(msa.select, TargetOptions()).rules
('R1', 'R2', 'R3', 'R4', 'R5', 'R6', 'R7', 'R8', 'R19')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from msa.config import MSAConfig
from msa.conformance.adapters import Function, in_order
from msa.conformance.backends import OPTIONS, REFERENCE, STAGES, Domain, Subject, as_module
from msa.conformance.cases import Case, Fill
from msa.conformance.conventions import CONVENTIONS, Convention, Kind
from msa.conformance.messages import BadTarget, check_choice, failed_call
from msa.conformance.properties import Property
from msa.conformance.tolerances import HOPPER, PRECISIONS
from msa.dispatch import load_backend
from msa.integrations import arrays
from msa.ir import Array, Output, Selection, Sequences

SELECTION = ("R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R19")
ATTENTION = ("R1", "R2", "R3", "R9", "R10", "R11", "R12", "R19")
RULES: dict[Kind, tuple[str, ...]] = {
    "select": SELECTION,
    "sparse_attention": ATTENTION,
    "attention": (*SELECTION[:-1], *ATTENTION[3:]),
}
"""What speaks of each kind of function. The others are about steps that it does not show."""
Order = Callable[[Array], Array]


@dataclass(frozen=True)
class TargetOptions:
    """How a function of one's own is called, and on what."""

    convention: Literal["msa", "transformers", "vllm", "official"] = "msa"
    """Whose arguments and order of results the target has."""
    kind: Kind = "select"
    """What it does: choose blocks, attend over chosen ones, or both."""
    tensors: Literal["numpy", "cpu", "cuda"] | None = None
    """NumPy arrays, or torch tensors on a device. None: numpy for msa, cpu for the others."""
    dtypes: tuple[str, ...] = ("float32",)
    """What it is given: float64, float32, float16, bfloat16."""
    block_sizes: tuple[int, ...] = ()
    """The block sizes that it knows, such as 128; any by default."""
    head_sizes: tuple[int, ...] = ()
    """The sizes of heads that it knows, such as 128; any by default."""


@dataclass(frozen=True)
class Target:
    """What is tried in place of a backend, and what it is asked."""

    subject: Subject
    """Its ids in canonical order, whatever order they came in."""
    as_given: Subject
    """Its ids as they came: this is what R8 is about."""
    rules: tuple[str, ...]

    def tried_for(self, rule: str) -> Subject:
        """Which of the two a rule looks at."""
        return self.as_given if rule == "R8" else self.subject

    def asked(self, properties: list[Property]) -> list[Property]:
        """Those that speak of the function: of its rules, and calling nothing that it lacks."""
        domain = self.subject.domain
        return [p for p in properties if p.rule in self.rules and domain.has(*p.needs)]


def make_target(function: Function, options: TargetOptions, name: str = "target") -> Target:
    """A function under a convention, after one plain call that shows that it can be called.

    Raises:
        BadTarget: an unknown convention, kind, dtype or kind of tensors; a kind that the convention
            has not; a call that raises; a result of another shape or dtype.

    >>> try:
    ...     make_target(len, TargetOptions())
    ... except BadTarget as error:
    ...     print(str(error)[:48])
    target must take the call f(q_idx [Tq, Hkv, Di],
    """
    check_choice("convention", options.convention, CONVENTIONS)
    convention = CONVENTIONS[options.convention]
    check_choice(f"kind of convention {convention.name}", options.kind, convention.calls)
    here = ("numpy", "cpu", "cuda") if convention.name == "msa" else ("cpu", "cuda")
    tensors = options.tensors or here[0]
    check_choice(f"tensors of convention {convention.name}", tensors, here)
    for dtype in options.dtypes:
        check_choice("dtype", dtype, PRECISIONS)
    call = convention.calls[options.kind]
    kind: Literal["numpy", "torch"] = "numpy" if tensors == "numpy" else "torch"
    base: Any = REFERENCE if kind == "numpy" else load_backend("torch")
    device = "cpu" if kind == "numpy" else tensors
    plain = Subject(name, base, kind, domain_of(convention, options, tensors), device)
    shown = Shown(call.adapter(function), base)
    try:
        gives = first_call(shown, options.kind, plain)
    except BadTarget:
        raise
    except Exception as error:
        raise failed_call(call.signature, error) from error

    def subject(order: Order) -> Subject:
        functions = replace(shown, order=order).stages(options.kind, gives)
        domain = replace(plain.domain, missing=missing_of(options.kind, gives))
        return replace(plain, module=as_module(functions, base), domain=domain)

    return Target(subject(in_order), subject(lambda ids: ids), RULES[options.kind])


def domain_of(convention: Convention, options: TargetOptions, tensors: str) -> Domain:
    """What may be drawn."""
    return Domain(
        dtypes=options.dtypes,
        block_sizes=options.block_sizes or None,
        dims=options.head_sizes or None,
        options=OPTIONS & {"left_padding"} if convention.left_padding else frozenset(),
        units=HOPPER if tensors == "cuda" else None,
        sinks=convention.sinks,
        more_local=convention.more_local,
        full_rows=convention.full_rows,
    )


def missing_of(kind: Kind, gives: frozenset[str]) -> frozenset[str]:
    """What the function does not show: steps that nobody is to judge it by."""
    shown: dict[Kind, set[str]] = {
        "select": {"select_fused", "attend"},
        "sparse_attention": {"attend_selection", "attend"},
        "attention": {"attend", *({"select_fused"} if "ids" in gives else ())},
    }
    return frozenset({*STAGES, "api", "backward", "lse"} - shown[kind] - (gives & {"lse"}))


def first_call(shown: Shown, kind: Kind, plain: Subject) -> frozenset[str]:
    """Call the function on three blocks of ordinary numbers; which of "lse" and "ids" it gives."""
    domain = plain.domain
    block, dim = min(domain.block_sizes or (16,)), min(domain.dims or (16,))
    names = ("q", "k", "v", "q_idx", "k_idx")
    fills: dict[str, Any] = {name: Fill("normal", seed) for seed, name in enumerate(names)}
    case = Case(
        MSAConfig(block, 2), Sequences.one(2 * block + 1, 2 * block + 1), 2, 2, (dim, dim, dim),
        domain.dtypes[0], **fills,
    )  # fmt: skip
    inputs = case.inputs
    q, k, v, q_idx, k_idx = (plain.give(x, case.dtype) for x in (*inputs.main, *inputs.index))
    match kind:
        case "select":
            shown.adapted(q_idx, k_idx, case.sequences, case.config)
            return frozenset({"ids"})
        case "sparse_attention":
            selection = shown.base.select_fused(q_idx, k_idx, case.sequences, case.config)
            found = (*shown.adapted(q, k, v, selection, inputs.scale), None)
        case "attention":
            found = shown.adapted(q, k, v, q_idx, k_idx, case.sequences, case.config)
    return frozenset(name for name, part in zip(("lse", "ids"), found[1:]) if part is not None)


@dataclass(frozen=True)
class Shown:
    """The functions of a backend that one adapted function gives, with those of `base` around it.

    Without queries there is nothing to ask: then the base answers.
    """

    adapted: Function
    base: Any
    order: Order = in_order

    def stages(self, kind: Kind, gives: frozenset[str]) -> dict[str, Function]:
        """By the names of msa.interface.Backend."""
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
        """The index branch."""
        if sequences.total_q == 0:
            return self.base.select_fused(q_idx, k_idx, sequences, config)
        ids = self.adapted(q_idx, k_idx, sequences, config, **options)
        return Selection(self.order(ids), sequences, config.block_size)

    def attend_selection(
        self, q: Array, k: Array, v: Array, selection: Selection, scale: float
    ) -> Output:
        """The main branch; an lse that is not given is NaN, and nobody asks for it."""
        if len(q) == 0:
            return self.base.attend_selection(q, k, v, selection, scale)
        out, lse = self.adapted(q, k, v, selection, scale)
        return Output(out, out[..., 0] * np.nan if lse is None else lse, selection)

    def attend_by(self, select: Function, attend: Function | None) -> Function:
        """The whole path, one half of it the base's."""
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
        """The whole path in one function; ids that it does not give are the base's."""
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
        """Its ids over queries, keys and values of 0, whose sizes are those of the index branch."""
        q, k = arrays.zeros_like(q_idx), arrays.zeros_like(k_idx)
        k = arrays.stack([k] * q_idx.shape[1], 1)
        output = self.attend(q, k, k, q_idx, k_idx, sequences, config)
        assert output.selection is not None
        return output.selection
