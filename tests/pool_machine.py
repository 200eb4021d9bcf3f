"""A pool of pages beside plain lists of tokens, as a machine that Hypothesis drives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_parts import (
    BATCH,
    BLOCK,
    CACHED,
    CONFIG,
    PAGES,
    SHAPES,
    WIDTH,
    append_8,
    attention,
    backend_of,
    close,
    drawn,
    make_pool,
    page_arrays,
    put,
    read,
    scale_arrays,
)

import msa


class Pool(RuleBasedStateMachine):
    """A pool beside a plain list of tokens for each sequence.

    Wherever the lists have no token the pages hold NaN: at first, and again when a page comes back,
    when tokens are truncated and when a page is copied. The lists hold what the pages stand for;
    where these have 8 bits, their scales are listed too.
    """

    place, eight = "reference", ()

    @initialize(n=st.integers(1, 7), seed=st.integers(0, 999))
    def start(self, n, seed):
        self.pool = make_pool(self.place, eight=self.eight)
        self.lists, self.scales = [{} for _ in range(BATCH)], [{} for _ in range(BATCH)]
        for s in range(BATCH):
            self.forget(s)
        self.add(0, n, seed, by_hand=False)

    def forget(self, s):
        self.lists[s] = {name: np.zeros((0, *dims)) for name, dims in SHAPES.items()}
        self.scales[s] = {name: np.zeros((0, *SHAPES[name][:-1])) for name in self.eight}

    def length(self, s):
        return len(self.lists[s]["k"])

    def blocks(self, s):
        return -(-self.length(s) // BLOCK)

    def own_pages(self, s):
        return read(self.pool.cache.page_table)[s, : self.blocks(s)].tolist()

    def holders(self):
        """How many sequences hold each page."""
        return Counter(page for s in range(BATCH) for page in self.own_pages(s))

    def poison(self, pages):
        """NaN to all places of these pages that no sequence has a token in."""
        used = Counter()
        for s in range(BATCH):
            for b, page in enumerate(self.own_pages(s)):
                used[page] = max(used[page], min(BLOCK, self.length(s) - b * BLOCK))
        scales = [x for x in scale_arrays(self.pool.cache).values() if x is not None]
        for page in pages:
            for array in page_arrays(self.pool.cache).values():
                array[page, used[page] :] = np.nan
            for array in scales if not used[page] else ():
                array[page] = np.nan

    def draw(self, seed, *lead):
        """Integers; of any magnitude where they are to be rounded."""
        rng, new = np.random.default_rng(seed), drawn(seed, *lead)
        for name in self.eight:
            powers = 2.0 ** rng.choice([-150, -9, -3, 0, 6], (*new[name].shape[:-1], 1))
            new[name] = (rng.integers(-17, 18, new[name].shape) * powers).astype(np.float32)
        return new

    def to_copy(self, ids, n):
        """The sequences whose last page others hold, too, as far as they write to it: the last
        sequence to hold a page keeps it."""
        holders, copied = self.holders(), []
        for s in ids:
            if n and self.length(s) % BLOCK:
                last = self.own_pages(s)[-1]
                if holders[last] > 1:
                    holders[last] -= 1
                    copied.append(s)
        return copied

    def refused(self, ids, n):
        """Why n more tokens of each are too many, if they are."""
        blocks = [-(-(self.length(s) + n) // BLOCK) for s in ids]
        more = sum(blocks) - sum(map(self.blocks, ids)) + len(self.to_copy(ids, n))
        if max(blocks, default=0) > WIDTH:
            return "page_table must have"
        return "free pages" if more > self.pool.free_pages else None

    def add(self, sequence, n, seed, by_hand):
        """Append to one sequence or to several; too much of it must be refused."""
        ids = [sequence] if isinstance(sequence, int) else sequence
        new = self.draw(seed, len(ids), n)
        given = new if sequence is ids else {name: x[0] for name, x in new.items()}
        arguments = [put(given, self.place)[name] for name in CACHED]

        def write():
            if by_hand:
                self.pool.reserve(sequence, n)
            else:
                self.pool.append(sequence, *arguments)

        reason, copied = self.refused(ids, n), self.to_copy(ids, n)
        if reason:
            with pytest.raises(ValueError, match=reason):
                write()
            return
        before = {s: self.own_pages(s) for s in ids}
        write()
        for i, s in enumerate(ids):
            after, kept = self.own_pages(s), len(before[s]) - (s in copied)
            assert after[:kept] == before[s][:kept], "what need not be copied stays where it is"
            if s in copied:
                assert after[kept] not in before[s]
            self.list_new(s, {name: x[i] for name, x in new.items()})
            self.poison([self.own_pages(s)[kept]] if s in copied else [])
            if by_hand:
                self.write_by_hand(s, n)

    def list_new(self, s, new):
        """Tokens behind those of a list."""
        for name, x in new.items():
            if name in self.eight:
                old = self.lists[s][name], self.scales[s][name]
                self.lists[s][name], self.scales[s][name] = append_8(*old, x)
            else:
                self.lists[s][name] = np.concatenate([self.lists[s][name], x])

    def write_by_hand(self, s, n):
        """As the code in a captured graph would: plain writes, no book-keeping."""
        cache = self.pool.cache
        assert int(cache.lengths[s]) == self.length(s) - n, "reserve must leave this to the writer"
        cache.lengths[s] += n
        first = (self.length(s) - n) // BLOCK * BLOCK  # older tokens may have to be rounded again
        for name, array in page_arrays(cache).items():
            contents = put({name: self.contents(name, s)}, self.place)[name]
            for j in range(first, self.length(s)):
                array[int(cache.page_table[s, j // BLOCK]), j % BLOCK] = contents[j]
            for b in range(
                first // BLOCK, -(-self.length(s) // BLOCK) if name in self.eight else 0
            ):
                scales = torch.tensor(self.scales[s][name][b])
                scale_arrays(cache)[name][int(cache.page_table[s, b])] = scales

    def contents(self, name, s):
        """What stands in the pages: the numbers, or what times the scale is the numbers."""
        numbers = self.lists[s][name]
        if name not in self.eight:
            return numbers
        scales = self.scales[s][name].repeat(BLOCK, 0)[: len(numbers)]
        return numbers / scales[..., None]

    @rule(s=st.integers(0, BATCH - 1), n=st.integers(0, 3), seed=st.integers(0, 999),
          by_hand=st.booleans())  # fmt: skip
    def append_to_one(self, s, n, seed, by_hand):
        self.add(s, n, seed, by_hand)

    @rule(ids=st.permutations(range(BATCH)), count=st.integers(0, BATCH), n=st.integers(1, 3),
          seed=st.integers(0, 999), by_hand=st.booleans())  # fmt: skip
    def append_to_several(self, ids, count, n, seed, by_hand):
        self.add(ids[:count], n, seed, by_hand)

    @rule(s=st.integers(0, BATCH - 1))
    def free(self, s):
        own = self.own_pages(s)
        self.pool.free(s)
        self.forget(s)
        self.poison(own)

    @rule(ids=st.permutations(range(BATCH)), count=st.integers(1, BATCH), as_list=st.booleans(),
          cuts=st.lists(st.integers(-1, 6), min_size=BATCH, max_size=BATCH))  # fmt: skip
    def truncate(self, ids, count, as_list, cuts):
        """Off with the last tokens; with a cut below 0 there are too few of them for one."""
        if not as_list:
            count = 1
        ids = ids[:count]
        lengths = [max(0, self.length(s) - cut) if cut >= 0 else self.length(s) + 1
                   for s, cut in zip(ids, cuts)]  # fmt: skip
        arguments = (ids, lengths) if as_list else (ids[0], lengths[0])
        if min(cuts[:count]) < 0:
            with pytest.raises(ValueError, match="length must be at most"):
                self.pool.truncate(*arguments)
            return
        own = [page for s in ids for page in self.own_pages(s)]
        self.pool.truncate(*arguments)
        for s, length in zip(ids, lengths):
            self.cut(s, length)
        self.poison(own)

    def cut(self, s, length):
        self.lists[s] = {name: x[:length] for name, x in self.lists[s].items()}
        blocks = self.blocks(s)
        self.scales[s] = {name: x[:blocks] for name, x in self.scales[s].items()}

    def slots(self):
        return [s for s in range(BATCH) if not self.length(s)]

    def live(self):
        return [s for s in range(BATCH) if self.length(s)]

    @precondition(lambda self: self.slots())
    @rule(into=st.none() | st.integers(0, BATCH - 1))
    def copy_of_nothing(self, into):
        for call in (lambda s: self.pool.fork(s, into), self.pool.export):
            with pytest.raises(ValueError, match="sequence must have tokens"):
                call(self.slots()[-1])

    @precondition(lambda self: self.live())
    @rule(pick=st.integers(0, BATCH - 1))
    def copy_to_nowhere(self, pick):
        into = self.live()[pick % len(self.live())] if self.slots() else None
        pages = self.pool.export(self.live()[0])
        for call in (lambda: self.pool.fork(self.live()[0], into),
                     lambda: self.pool.import_(pages, into)):  # fmt: skip
            with pytest.raises(ValueError, match="into must be an empty slot"):
                call()

    def list_again(self, s, into):
        self.lists[into], self.scales[into] = dict(self.lists[s]), dict(self.scales[s])

    def draw_copy(self, pick, first):
        """A live sequence, what is given for `into`, and the slot that must be taken."""
        s, slots = self.live()[pick % len(self.live())], self.slots()
        return (s, None, slots[0]) if first else (s, *[slots[pick % len(slots)]] * 2)

    @precondition(lambda self: self.live() and self.slots())
    @rule(pick=st.integers(0, 9), first=st.booleans())
    def fork(self, pick, first):
        s, into, slot = self.draw_copy(pick, first)
        free = self.pool.free_pages
        assert self.pool.fork(s, into) == slot and self.pool.free_pages == free
        self.list_again(s, slot)
        assert self.own_pages(slot) == self.own_pages(s)

    @precondition(lambda self: self.live() and self.slots())
    @rule(pick=st.integers(0, 9), first=st.booleans(), away=st.booleans())
    def move(self, pick, first, away):
        """Out, perhaps through a pool elsewhere, and in again as another sequence."""
        s, into, slot = self.draw_copy(pick, first)
        pages = self.pool.export(s)
        if away:
            there = "torch" if self.eight or self.place == "reference" else "reference"
            other = make_pool(there, 2 * PAGES, self.eight, batch=1)
            other.import_(pages)
            pages = other.export(0)
            other.free(0)
        self.check_export(pages, s)
        if self.blocks(s) > self.pool.free_pages:
            with pytest.raises(ValueError, match="free pages"):
                self.pool.import_(pages, into)
            return
        assert self.pool.import_(pages, into) == slot
        self.list_again(s, slot)
        self.poison(self.own_pages(slot))

    def check_export(self, pages, s):
        assert pages.length == self.length(s)
        for name in CACHED:
            found = getattr(pages, name)
            if isinstance(found, torch.Tensor):
                assert found.is_contiguous()
            else:
                assert found.flags.c_contiguous
            found = read(found).reshape(-1, *SHAPES[name])
            assert len(found) == self.blocks(s) * BLOCK and not found[pages.length :].any()
            np.testing.assert_array_equal(found[: pages.length], self.contents(name, s))
            scales = getattr(pages, f"{name}_scales")
            if name in self.eight:
                np.testing.assert_array_equal(read(scales), self.scales[s][name])
            else:
                assert scales is None

    @rule(s=st.integers(0, BATCH - 1), n=st.integers(1, 4), written=st.integers(0, 4),
          seed=st.integers(0, 999), back=st.integers(0, 3))  # fmt: skip
    def reserve_ahead(self, s, n, written, seed, back):
        """As for drafts in a captured graph: some of what was reserved is written, some of it kept.

        In between the pool refuses whatever would take the tokens for written.
        """
        written = min(n, written)
        if self.refused([s], n):
            return
        copied, own = self.to_copy([s], n), self.own_pages(s)
        self.pool.reserve(s, n)
        self.list_new(s, {name: x[:written] for name, x in self.draw(seed, n).items()})
        self.poison(self.own_pages(s)[len(own) - 1 : len(own)] if copied else [])
        self.write_by_hand(s, written)
        if written < n:
            new = put(self.draw(seed, 1), self.place)
            for call in (lambda: self.pool.fork(s, (s + 1) % BATCH), lambda: self.pool.export(s),
                         lambda: self.pool.append(s, *(new[name] for name in CACHED))):  # fmt: skip
                with pytest.raises(ValueError, match=r"reserved for it|an empty slot"):
                    call()
            with pytest.raises(ValueError, match="length must be at most"):
                self.pool.truncate(s, self.length(s) + 1)
        elif back == 0:
            return  # the next call finds out for itself
        own, length = self.own_pages(s), max(0, self.length(s) - back)
        self.pool.truncate(s, length)
        self.cut(s, length)
        self.poison(own)

    def teardown(self):
        if hasattr(self, "pool") and self.live():
            self.check_decode(self.pool.cache, range(BATCH), 1)

    @precondition(lambda self: self.live())
    @rule(n=st.integers(1, 3))
    def decode(self, n):
        n = min([n, *filter(None, map(self.length, range(BATCH)))])
        self.check_decode(self.pool.cache, range(BATCH), n)

    @rule(s=st.integers(0, BATCH - 1), n=st.integers(1, 3))
    def decode_beside_poison(self, s, n):
        """Everything that is not this sequence's is NaN, scales included."""
        cache, own, poisoned = self.pool.cache, self.own_pages(s), {}
        for kind, arrays in (("pages", page_arrays(cache)), ("scales", scale_arrays(cache))):
            for name, array in arrays.items():
                if array is not None:
                    full_like = torch.full_like if isinstance(array, torch.Tensor) else np.full_like
                    poisoned[f"{name}_{kind}"] = full_like(array, np.nan)
                    for page in own:
                        poisoned[f"{name}_{kind}"][page] = array[page]
        lengths = cache.lengths * 0
        lengths[s] = self.length(s)
        lonely = replace(cache, **poisoned, lengths=lengths)
        self.check_decode(lonely, [s], min(n, self.length(s) or n))

    def check_decode(self, cache, ids, n):
        ids = [s for s in ids if self.length(s)]
        queries = {name: np.ones((BATCH, n, *SHAPES[name])) for name in ("q", "q_idx")}
        for s in ids:
            for name, x in queries.items():
                x[s] = self.lists[s][name][-n:]
        q, q_idx = put(queries, self.place).values()
        output = msa.decode(q, q_idx, cache, config=CONFIG, backend=backend_of(self.place))
        selected = read(output.selection.indices)
        assert len(selected) == n * len(ids)
        for i, s in enumerate(ids):
            want = attention(self.lists[s], n)
            close(output.out[s], want.out)
            close(output.lse[s], want.lse)
            np.testing.assert_array_equal(
                selected[i * n : (i + 1) * n], want.selection.indices, strict=True
            )
        for s in set(range(BATCH)) - set(ids):
            assert (read(output.out[s]) == 0).all() and (read(output.lse[s]) == -np.inf).all()

    @invariant()
    def memory_is_what_the_lists_say(self):
        """To the byte: each token in its place, NaN in all the others."""
        cache = self.pool.cache
        table, pages, scales = read(cache.page_table), page_arrays(cache), scale_arrays(cache)
        want = {name: np.full(array.shape, np.nan) for name, array in pages.items()}
        want_scales = {name: np.full(scales[name].shape, np.nan, np.float32) for name in self.eight}
        for s, tokens in enumerate(self.lists):
            own = self.own_pages(s)
            assert (table[s, len(own) :] == -1).all()
            for name, found in zip(CACHED, cache.flat(s)):
                for j, number in enumerate(self.contents(name, s)):
                    want[name][table[s, j // BLOCK], j % BLOCK] = number
                dtype = np.float32 if name in self.eight else np.float64
                flat = tokens[name].astype(dtype)
                np.testing.assert_array_equal(read(found), flat, strict=True)
            for name in self.eight:
                want_scales[name][own] = self.scales[s][name]
        for name, array in pages.items():
            np.testing.assert_array_equal(read(array), want[name], strict=True)
        for name, array in want_scales.items():
            np.testing.assert_array_equal(read(scales[name]), array, strict=True)

    @invariant()
    def the_book_is_right(self):
        """Each page is free or counted once for each sequence that holds it, and once in a row."""
        cache, book, holders = self.pool.cache, self.pool._book, self.holders()
        assert book.holders == [holders[page] for page in range(PAGES)]
        assert sorted(book.free + list(holders)) == list(range(PAGES))
        assert all(len(set(self.own_pages(s))) == self.blocks(s) for s in range(BATCH))
        assert self.pool.free_pages == PAGES - len(holders)
        assert read(cache.shared).tolist() == [holders[page] > 1 for page in range(PAGES)]
        np.testing.assert_array_equal(read(cache.page_table), book.table, strict=True)
        lengths = [self.length(s) for s in range(BATCH)]
        assert self.pool.lengths == lengths == read(cache.lengths).tolist()
