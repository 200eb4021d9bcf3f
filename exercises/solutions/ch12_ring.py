"""Chapter 12: a ring of tiles, without the deadlock and the race."""


def producer(tiles, stages):
    """Copy tiles 0, 1, 2, ... into the ring."""
    for step in range(tiles):
        stage, phase = step % stages, step // stages % 2
        yield "wait", "empty", stage, 1 - phase  # passes at once in the first round
        yield "copy", stage, step


def consumer(tiles, stages):
    """Multiply each tile. A product reads the stage from its start until it is finished."""
    for step in range(tiles):
        stage, phase = step % stages, step // stages % 2
        yield "wait", "full", stage, phase
        yield "start product", stage, step
        yield "finish product", stage, step
        yield "signal", "empty", stage
