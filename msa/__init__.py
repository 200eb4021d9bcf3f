"""MiniMax Sparse Attention from math to metal. Importing this needs NumPy and jaxtyping alone."""

from msa import moved
from msa.api import (
    align_index,
    append_tokens,
    attention,
    decode,
    lower,
    prefill,
    select,
    sparse_attention,
)
from msa.config import MSAConfig
from msa.dispatch import available_backends
from msa.ir import (
    BlockScores,
    Output,
    PagedKV,
    Partials,
    ReverseIndex,
    Schedule,
    Selection,
    Sequences,
    TileUnion,
)
from msa.page_arrays import SequencePages
from msa.paging import PagePool
from msa.pipeline import Trace
from msa.quality import CacheQuality, cache_quality
from msa.warming import ServingShapes, warm_up

moved.install()
__version__ = "0.1.0"

__all__ = [
    "BlockScores",
    "CacheQuality",
    "MSAConfig",
    "Output",
    "PagePool",
    "PagedKV",
    "Partials",
    "ReverseIndex",
    "Schedule",
    "Selection",
    "SequencePages",
    "Sequences",
    "ServingShapes",
    "TileUnion",
    "Trace",
    "align_index",
    "append_tokens",
    "attention",
    "available_backends",
    "cache_quality",
    "decode",
    "lower",
    "prefill",
    "select",
    "sparse_attention",
    "warm_up",
]
