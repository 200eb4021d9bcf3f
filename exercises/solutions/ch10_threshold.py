"""Chapter 10: the best blocks by a threshold and a short buffer."""


def keep_best(scores, places, room, buffer):
    """The ids of the best `places` scores, ascending."""
    threshold = float("-inf")
    for block, score in enumerate(scores):
        if score > threshold or len(buffer) < places:
            buffer.append((score, block))
        if len(buffer) == room:
            kept = sorted(buffer, key=lambda c: (-c[0], c[1]))[:places]
            buffer.cut(sorted(kept, key=lambda c: c[1]))
            threshold = min(score for score, _ in kept)
    best = sorted(buffer, key=lambda c: (-c[0], c[1]))[:places]
    return sorted(block for _, block in best)
