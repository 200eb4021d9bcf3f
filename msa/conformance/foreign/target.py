"""Your own function in place of a backend: how it is called, and which rules it is tested for.

The rest of the path comes from the reference (for torch tensors from the torch backend): the
attention for a selection function, the selection for an attention. So properties of the whole path
test your function too. Only rules that apply to the function are tested.

>>> import msa
>>> make_target(msa.select, TargetOptions()).rules
('R1', 'R2', 'R3', 'R4', 'R5', 'R6', 'R7', 'R8', 'R19')
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from msa.config import MSAConfig
from msa.conformance.backends import OPTIONS, REFERENCE, STAGES, Domain, Subject, as_module
from msa.conformance.cases import Case, Fill
from msa.conformance.foreign.arguments import in_order
from msa.conformance.foreign.bad_target import BadTarget, check_choice, failed_call
from msa.conformance.foreign.conventions import CONVENTIONS
from msa.conformance.foreign.signature import Convention, Function, FunctionKind
from msa.conformance.foreign.wrapped_function import Order, WrappedFunction
from msa.conformance.properties import Property
from msa.conformance.tolerances import HOPPER, PRECISIONS
from msa.dispatch import load_backend
from msa.ir import Sequences

SELECTION = ("R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R19")
ATTENTION = ("R1", "R2", "R3", "R9", "R10", "R11", "R12", "R19")
RULES_OF: dict[FunctionKind, tuple[str, ...]] = {
    "select": SELECTION,
    "sparse_attention": ATTENTION,
    "attention": (*SELECTION[:-1], *ATTENTION[3:]),
}
"""The rules for each kind of function. All other rules are about steps inside the function."""


@dataclass(frozen=True)
class TargetOptions:
    """How your own function is called, and with which tensors."""

    convention: Literal["msa", "transformers", "vllm", "official"] = "msa"
    """The project whose arguments and results the target has."""
    kind: FunctionKind = "select"
    """What the target does: select blocks, attend to selected blocks, or both."""
    tensors: Literal["numpy", "cpu", "cuda"] | None = None
    """NumPy arrays, or torch tensors on a device. By default numpy for msa, cpu for the others."""
    dtypes: tuple[str, ...] = ("float32",)
    """Dtypes that the target is given: float64, float32, float16, bfloat16."""
    block_sizes: tuple[int, ...] = ()
    """Block sizes that the target supports, such as 128. By default any."""
    head_sizes: tuple[int, ...] = ()
    """Head sizes that the target supports, such as 128. By default any."""


@dataclass(frozen=True)
class Target:
    """A function under test, wrapped as a backend, and the rules that it is tested for."""

    subject: Subject
    """The target with its ids sorted into canonical order."""
    as_given: Subject
    """The target with its ids in the order in which it returned them, for R8."""
    rules: tuple[str, ...]

    def tried_for(self, rule: str) -> Subject:
        """The subject on which a rule is tested."""
        return self.as_given if rule == "R8" else self.subject

    def asked(self, properties: list[Property]) -> list[Property]:
        """The properties that apply: those of its rules that need nothing that it lacks."""
        domain = self.subject.domain
        return [p for p in properties if p.rule in self.rules and domain.has(*p.needs)]


def make_target(function: Function, options: TargetOptions, name: str = "target") -> Target:
    """Make a target of a function, after a first call that shows that it can be called.

    Raises:
        BadTarget: the convention, kind, dtype or kind of tensors is unknown; the convention does
            not have this kind; the first call raised an error, or gave another shape or dtype.

    >>> try:
    ...     make_target(len, TargetOptions())
    ... except BadTarget as error:
    ...     print(str(error)[:48])
    target must take the call f(q_idx [Tq, Hkv, Di],
    """
    check_choice("convention", options.convention, CONVENTIONS)
    convention = CONVENTIONS[options.convention]
    check_choice(f"kind of convention {convention.name}", options.kind, convention.signatures)
    here = ("numpy", "cpu", "cuda") if convention.name == "msa" else ("cpu", "cuda")
    tensors = options.tensors or here[0]
    check_choice(f"tensors of convention {convention.name}", tensors, here)
    for dtype in options.dtypes:
        check_choice("dtype", dtype, PRECISIONS)
    signature = convention.signatures[options.kind]
    kind: Literal["numpy", "torch"] = "numpy" if tensors == "numpy" else "torch"
    base: Any = REFERENCE if kind == "numpy" else load_backend("torch")
    device = "cpu" if kind == "numpy" else tensors
    plain = Subject(name, base, kind, domain_of(convention, options, tensors), device)
    wrapped = WrappedFunction(signature.adapter(function), base)
    try:
        gives = first_call(wrapped, options.kind, plain)
    except BadTarget:
        raise
    except Exception as error:
        raise failed_call(str(signature), error) from error

    def subject(order: Order) -> Subject:
        functions = replace(wrapped, order=order).stages(options.kind, gives)
        domain = replace(plain.domain, missing=missing_of(options.kind, gives))
        return replace(plain, module=as_module(functions, base), domain=domain)

    return Target(subject(in_order), subject(lambda ids: ids), RULES_OF[options.kind])


def domain_of(convention: Convention, options: TargetOptions, tensors: str) -> Domain:
    """The domain from which cases for the target are drawn."""
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


def missing_of(kind: FunctionKind, gives: frozenset[str]) -> frozenset[str]:
    """The functions and abilities that the target does not have, and is not tested for."""
    shown: dict[FunctionKind, set[str]] = {
        "select": {"select_fused", "attend"},
        "sparse_attention": {"attend_selection", "attend"},
        "attention": {"attend", *({"select_fused"} if "ids" in gives else ())},
    }
    return frozenset({*STAGES, "api", "backward", "lse"} - shown[kind] - (gives & {"lse"}))


def first_call(wrapped: WrappedFunction, kind: FunctionKind, plain: Subject) -> frozenset[str]:
    """Call the function on three blocks of random numbers; return which of lse, ids it gives."""
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
            wrapped.adapted(q_idx, k_idx, case.sequences, case.config)
            return frozenset({"ids"})
        case "sparse_attention":
            selection = wrapped.base.select_fused(q_idx, k_idx, case.sequences, case.config)
            found = (*wrapped.adapted(q, k, v, selection, inputs.scale), None)
        case "attention":
            found = wrapped.adapted(q, k, v, q_idx, k_idx, case.sequences, case.config)
    return frozenset(name for name, part in zip(("lse", "ids"), found[1:]) if part is not None)
