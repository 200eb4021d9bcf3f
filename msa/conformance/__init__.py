"""The rules R1-R21 as properties that any backend can be tried against.

cases        what is drawn: a description of tensors that fits on a line
strategies   how it is drawn: every shape and value that the rules allow
yardstick    the definition in float64, written a second time
tolerances   the one error budget, and its derivation
backends     what can be tried here
properties_* the rules, each a plain function of a backend and a case
strides      how a tensor lies in memory (R21)
bad_input    R20, case by case
seeds        known kinds of bugs, tried first
conventions  how other projects call selection and attention; adapters, packing: there and back
target       a function of one's own in place of a backend; targets: those that are shipped
report       `msa verify`

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
