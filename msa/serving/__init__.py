"""The kernels as a serving engine calls them: many times a second, with tensors it has checked.

    step.py      the parts of a step, and what runs for each layer: score, select, attend
    warm_up.py   compiles every kernel of an engine's shapes before the first request

`msa.prefill` and `msa.decode` check everything and give new tensors. A layer of an engine cannot
afford this: here nothing is read from the device, results go into memory of the engine, and tables
are made once for all layers of a step. What is not checked is said at each function.
"""

from msa.serving.step import (
    DecodePart,
    IndexPages,
    KVPages,
    PrefillPart,
    Scores,
    attend_given,
    attend_scored,
    attend_selected,
    given,
    score,
    select,
    sequences_of,
)
from msa.serving.warm_up import warm_up_layer

__all__ = [
    "DecodePart",
    "IndexPages",
    "KVPages",
    "PrefillPart",
    "Scores",
    "attend_given",
    "attend_scored",
    "attend_selected",
    "given",
    "score",
    "select",
    "sequences_of",
    "warm_up_layer",
]
