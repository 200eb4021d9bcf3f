"""The rules R1-R21 as properties that any backend can be tested against.

properties/         the rules: each property is a plain function of a backend and a case
bad_input/          R20: calls that must be refused
foreign/            functions of other projects, or of your own, tested in place of a backend

cases               a small description of the tensors of one call
strategies          draws cases: every shape and value that the rules allow
seeds               cases that are tried first: kinds of bugs that users have reported
strides             how a tensor lies in memory (R21)
backends            the backends that can be tested on this machine
own_targets         the same backends as plain functions, for `msa verify --target`
run_stage           calls one function of a backend, and compares an output
gradients           asks a backend for gradients, and the reference for finite differences
yardstick           attention by its definition in float64, written a second time
yardstick_training  its gradients, and the KL loss
tolerances          the error budget of every comparison, and its derivation
search              the search for a counterexample to one property
results             every property on every backend; results_table prints the results
verify_run          the command `msa verify`

from msa.conformance import Domain, Subject, all_properties, as_module
mine = Subject("mine", as_module({"select_blocks": my_selection}), kind="numpy")
"""

from msa.conformance.backends import Domain, Subject, as_module, subjects
from msa.conformance.foreign.target import Target, TargetOptions, make_target
from msa.conformance.properties import Property
from msa.conformance.properties.collect import all_properties
from msa.conformance.results import Result, verify, verify_target
from msa.conformance.verify_run import VerifyOptions, run

__all__ = [
    "Domain",
    "Property",
    "Result",
    "Subject",
    "Target",
    "TargetOptions",
    "VerifyOptions",
    "all_properties",
    "as_module",
    "make_target",
    "run",
    "subjects",
    "verify",
    "verify_target",
]
