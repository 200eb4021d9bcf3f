"""The first numbers of the site's widgets. `make docs-look` compares the scripts with them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import msa
from docs.hooks import cost, orders, rows, widgets
from msa.explain import trace_example
from msa.reference.denote import selection_edges


@pytest.mark.parametrize("tokens", [5, 12, 64])
def test_pairs_are_those_that_the_spec_reads(tokens):
    rng = np.random.default_rng(0)
    config = msa.MSAConfig(block_size=4, top_k=3)
    q_idx, k_idx = rng.standard_normal((tokens, 1, 2)), rng.standard_normal((tokens, 2))
    chosen = msa.select(q_idx, k_idx, config=config).indices[:, 0]
    own_block_whole = (chosen >= 0).sum(1) * config.block_size
    read = np.minimum(own_block_whole, np.arange(1, tokens + 1)).sum()
    layer = cost.Layer(tokens=tokens, block=4, top_k=3)
    assert read == layer.pairs + layer.kept / 2  # the diagonal, of which `pairs` takes one half


def test_floors_are_set_by_the_slower_of_two():
    assert cost.Cost(cost.TFLOPS * 1e12, 1).seconds == pytest.approx(1.0)
    assert cost.Cost(1, cost.TBPS * 1e12).seconds == pytest.approx(1.0)
    assert {c.bound for c in cost.prefill(cost.Layer()).values()} == {"products"}
    assert {c.bound for c in cost.decode(cost.Layer()).values()} == {"bytes"}


@pytest.mark.parametrize("order", orders.orders(), ids=lambda order: order.name)
def test_every_order_works_on_every_edge_once(order):
    worked = [(i, load.group, load.block) for load in order.loads for i in load.queries]
    assert sorted(worked) == sorted(selection_edges(trace_example("reference").selection))
    for load in order.loads:
        assert not set(load.queries) & set(load.idle)
        assert load.partials == (len(load.queries) if order.form == "Schedule" else 0)


def test_rows_are_chosen_from_the_scores_that_are_shown():
    found = rows.read()
    for layer, said in enumerate(rows.numbers(found)["layers"]):
        for i in range(0, rows.TOKENS, 7):
            own = i // found.block_size
            for scores, chosen in zip(said["scores"][i], said["chosen"][i]):
                assert len(scores) == own + 1 and chosen[-1] == own
                left = [s for b, s in enumerate(scores) if b not in chosen]
                kept = [scores[b] for b in chosen[:-1]]
                assert not left or max(left) <= min(kept), (layer, i)


def test_a_widget_carries_its_numbers_and_stands_without_a_script():
    made = rows.rows_widget("Words.")
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', made, re.S)
    assert json.loads(data) == rows.numbers(rows.read())
    assert len(made) < 300_000
    assert made.count("data-token=") == rows.TOKENS and made.count("w-query") == 1


def test_numbers_cannot_end_their_script():
    made = widgets.widget("cost", {"words": "</script>"}, "", "")
    assert made.count("</script>") == 1
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', made)
    assert json.loads(data) == {"words": "</script>"}
