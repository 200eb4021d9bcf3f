"""Chapter 10: the best blocks by a threshold and a short buffer.

`keep_best` sees the scores one after the other. It may hold at most `room` candidates. When the
buffer is full, cut it back to the `places` best ones and raise the threshold to the worst of them.
Equal scores go to the lower id.
"""


def keep_best(scores, places, room, buffer):
    """The ids of the best `places` scores, ascending. Candidates go through `buffer.append`.

    `buffer` is a list of (score, id) that counts how full it was; `buffer.cut(kept)` replaces its
    content.
    """
    threshold = float("-inf")
    for block, score in enumerate(scores):
        if score >= threshold:  # TODO: what does an equal score of a later block deserve?
            buffer.append((score, block))
        # TODO: cut back a full buffer, and raise the threshold
    best = sorted(buffer, key=lambda c: -c[0])[:places]
    return sorted(block for _, block in best)
