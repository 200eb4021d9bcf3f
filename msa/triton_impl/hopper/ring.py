"""A ring of tiles in shared memory: one producer fills its stages, several consumers read them.

    producer                          ring                       each consumer
    --------                          ----                       -------------
    wait until stage s is empty  <--  empty[s]  <--------------  release stage s
    start the copy into stage s  -->  full[s]   -------------->  wait until stage s is full
    next step                                                    read the tile, next step

Step i uses stage i % STAGES. A barrier has a phase bit, which flips each time that all expected
arrivals are in. A consumer waits for phase (i // STAGES) % 2 of `full`; a producer waits for the
opposite phase of `empty`, so that its first STAGES waits pass at once.

`full` completes when the copy engine has written the announced number of bytes. `empty` completes
when every consumer has arrived once. The ring is correct if each consumer releases every stage
exactly once, also a stage that it does not use.

Names of Gluon that differ between releases of Triton stand in this file only.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.9; 3.6 to 3.8
CALLED_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # 3.9


@gluon.jit
def in_parts(tiles, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as tiles of another shape and layout."""
    if CALLED_REINTERPRET:
        return tiles.reinterpret(tiles.dtype, shape, layout)
    else:
        return tiles._reinterpret(tiles.dtype, shape, layout)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """One barrier for each stage, complete after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(barriers.index(s), count=ARRIVALS)
    return barriers


@gluon.jit
def wait_empty(empty, step, STAGES: gl.constexpr):
    """Producer: wait until every consumer has released the stage of this step."""
    mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)


@gluon.jit
def wait_full(full, step, STAGES: gl.constexpr):
    """Consumer: wait until the tile of this step has arrived."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def produce(desc, row, tiles, full, empty, step, STAGES: gl.constexpr, column=0):
    """Producer: copy a tile of a matrix, from `row` and `column` on, into this step's stage."""
    produce_at(desc, (row, column), tiles, full, empty, step, STAGES)


@gluon.jit
def produce_at(desc, place, tiles, full, empty, step, STAGES: gl.constexpr):
    """Producer: copy the tile of a tensor that begins at `place` into this step's stage.

    The producer waits until the stage is empty.
    """
    wait_empty(empty, step, STAGES)
    s = step % STAGES
    mbarrier.expect(full.index(s), desc.block_type.nbytes)
    copy_tile(desc, place, full.index(s), tiles.index(s))


@gluon.jit
def release(empty, step, STAGES: gl.constexpr):
    """Consumer: this consumer has read the tile of this step."""
    mbarrier.arrive(empty.index(step % STAGES), count=1)
