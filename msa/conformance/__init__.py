"""The rules R1-R20 as properties that any backend can be tried against.

cases        what is drawn: a description of tensors that fits on a line
strategies   how it is drawn: every shape and value that the rules allow
yardstick    the definition in float64, written a second time
tolerances   the one error budget, and its derivation
backends     what can be tried here
properties_* the rules, each a plain function of a backend and a case
bad_input    R20, case by case
report       `msa verify`

from msa.conformance import Domain, Subject, all_properties, as_module
mine = Subject("mine", as_module({"select_blocks": my_selection}), kind="numpy")
"""

from msa.conformance.backends import Domain, Subject, as_module, subjects
from msa.conformance.properties import Property, all_properties
from msa.conformance.report import Result, VerifyOptions, run, verify

__all__ = [
    "Domain",
    "Property",
    "Result",
    "Subject",
    "VerifyOptions",
    "all_properties",
    "as_module",
    "run",
    "subjects",
    "verify",
]
