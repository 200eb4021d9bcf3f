"""One sequence on several GPUs: context parallel attention on torch.distributed.

    shards         which tokens a rank holds: two chunks of each sequence, so that work is equal
    agreement      all ranks call with the same borders, sizes and options, or all raise
    sharding       whole tensors to rows of a rank, and back
    gathering      keys of all ranks in order; their gradients, summed over ranks in float32
    attention      a rank's two chunks, each an ordinary call on a prefix of the keys
    alignment      the loss of the index warm-up
    prefixes       the same keys, for another attention beside MSA
    decoding       a cache whose pages are dealt out to the ranks

Everything is torch's own: process groups, device meshes, collectives. Start the processes with
torchrun. See docs/howto/parallel.md.
"""

from msa.parallel.alignment import context_parallel_align_index
from msa.parallel.attention import ContextOutput, context_parallel_attention
from msa.parallel.decoding import context_parallel_decode
from msa.parallel.prefixes import Half, attach, key_prefixes
from msa.parallel.sharding import shard, unshard
from msa.parallel.shards import Shards

__all__ = [
    "ContextOutput",
    "Half",
    "Shards",
    "attach",
    "context_parallel_align_index",
    "context_parallel_attention",
    "context_parallel_decode",
    "key_prefixes",
    "shard",
    "unshard",
]
