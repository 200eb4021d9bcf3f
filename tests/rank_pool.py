"""Processes that stay, each a rank of a gloo group, and run one function after another.

A test of torch.distributed that starts its own processes waits seconds for their imports. These are
started once for a module of tests, and a Hypothesis test can send them many cases.
"""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4
"""Ranks of the pool that the fixture `ranks` gives."""
PATIENCE = 20  # seconds until a rank counts as hanging


class RankPool:
    """Ranks 0 to most - 1; a case runs on the first `count` of them, in a group of their own."""

    def __init__(self, most):
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(most):
            ours, theirs = context.Pipe()
            args = theirs, rank, most, str(Path(self.folder.name) / "store")
            self.processes.append(context.Process(target=serve, args=args, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def run(self, count, function, *args):
        """What `function(group, *args)` returned on each rank, or the exception that it raised."""
        for pipe in self.pipes[:count]:
            pipe.send((count, function, args))
        answers = [None] * count
        for rank, pipe in enumerate(self.pipes[:count]):
            answers[rank] = pipe.recv() if pipe.poll(PATIENCE) else TimeoutError("it hangs")
        if any(isinstance(answer, TimeoutError) for answer in answers):
            self.close()
            raise TimeoutError(f"{function.__name__}{args}: {answers}")
        return answers

    def results(self, count, function, *args):
        """What `function(group, *args)` returned on each rank; raises what a rank raised."""
        answers = self.run(count, function, *args)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def serve(pipe, rank, most, store):
    """Run what the pipe brings, until the test process closes it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most)
    groups = {count: dist.new_group(range(count)) for count in range(1, most + 1)}
    while True:
        try:
            count, function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = function(groups[count], *args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send(answer)
