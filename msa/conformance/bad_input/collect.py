"""The list of all cases of bad input (R20)."""

from __future__ import annotations

from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.array_types import ARRAY_TYPE_CASES
from msa.conformance.bad_input.borders import BORDER_CASES
from msa.conformance.bad_input.caches import CACHE_CASES, POOL_CASES
from msa.conformance.bad_input.choices import CHOICE_CASES, OPTION_CASES
from msa.conformance.bad_input.configs import CONFIG_CASES
from msa.conformance.bad_input.eight_bits import EIGHT_BIT_CASES
from msa.conformance.bad_input.kernels import KERNEL_CASES
from msa.conformance.bad_input.prefill import PREFILL_CASES, PREFILL_EIGHT_CASES
from msa.conformance.bad_input.selections import SELECTION_CASES
from msa.conformance.bad_input.tensors import KIND_CASES, SHAPE_CASES
from msa.conformance.bad_input.torch_tensors import MEMORY_CASES, TORCH_CASES
from msa.dispatch import available_backends

BAD_INPUTS: tuple[BadInput, ...] = (
    *CONFIG_CASES,
    *SHAPE_CASES,
    *BORDER_CASES,
    *KIND_CASES,
    *SELECTION_CASES,
    *CACHE_CASES,
    *POOL_CASES,
    *PREFILL_CASES,
    *ARRAY_TYPE_CASES,
    *CHOICE_CASES,
    *OPTION_CASES,
    *(KERNEL_CASES if "triton" in available_backends() else []),
    *(PREFILL_EIGHT_CASES if "torch" in available_backends() else []),
    *(EIGHT_BIT_CASES if "torch" in available_backends() else []),
    *(TORCH_CASES if "torch" in available_backends() else []),
    *(MEMORY_CASES if "torch" in available_backends() else []),
)
