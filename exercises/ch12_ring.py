"""Chapter 12: a ring of tiles, with a deadlock and a race. Mend both.

Producer and consumer are generators. Each `yield` is one action; the check runs them in many
orders. Every stage has two barriers, "full" and "empty". A barrier has a phase, 0 at first, which
changes each time somebody signals it. ("wait", name, stage, phase) passes when the barrier's phase
is not `phase` any more.
"""


def producer(tiles, stages):
    """Copy tiles 0, 1, 2, ... into the ring."""
    for step in range(tiles):
        stage, phase = step % stages, step // stages % 2
        yield "wait", "empty", stage, phase  # TODO: at first every stage is empty: nobody signals
        yield "copy", stage, step  # signals "full" when the tile is there


def consumer(tiles, stages):
    """Multiply each tile. A product reads the stage from its start until it is finished."""
    for step in range(tiles):
        stage, phase = step % stages, step // stages % 2
        yield "wait", "full", stage, phase
        yield "start product", stage, step
        yield "signal", "empty", stage  # TODO: is the tile no longer read?
        yield "finish product", stage, step
