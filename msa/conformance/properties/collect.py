"""The list of all properties."""

from __future__ import annotations

from msa.conformance.properties import (
    Property,
    alignment,
    attention,
    behaviour,
    index,
    lowering,
    not_finite,
    options,
    places_gpu,
    places_pages,
    places_strides,
    places_threads,
    prefill,
    selection,
    sequences,
    sizes,
    training,
)

THEMES = (
    sequences,
    prefill,
    index,
    selection,
    attention,
    lowering,
    alignment,
    training,
    behaviour,
    options,
    not_finite,
    places_strides,
    places_pages,
    places_threads,
    places_gpu,
    sizes,
)


def all_properties() -> tuple[Property, ...]:
    """The properties of all files, in the order of THEMES."""
    return tuple(p for theme in THEMES for p in vars(theme).values() if isinstance(p, Property))
