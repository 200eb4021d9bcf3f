"""A check of the widgets in a browser: they show what Python computed and react to controls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Locator, Page

PAGES = {
    "cost": "chapters/01-cost.html", "rows": "chapters/03-index-branch.html",
    "orders": "lowering/index.html",
}  # fmt: skip
"""Where each widget stands."""


def data_of(box: Locator) -> dict[str, Any]:
    """The numbers that the build wrote for a widget."""
    return json.loads(box.locator("script").text_content() or "")


def slide(box: Locator, name: str, place: int) -> None:
    """Put a slider to its place, as a hand would: with an event."""
    box.locator(f'input[name="{name}"]').fill(str(place))


def words_of(box: Locator, attribute: str) -> dict[str, str]:
    """The text in the marked places of a widget."""
    found = box.locator(f"[{attribute}]").evaluate_all(
        "(all, name) => all.map(e => [e.getAttribute(name), e.textContent])", attribute
    )
    return dict(found)


def close(a: Any, b: Any) -> bool:
    """Whether two values are equal: numbers to nine digits, words exactly."""
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(b, int | float) else a == b


def look_at_cost(tab: Page, box: Locator) -> Iterator[str]:
    """Compare the script's formulas and words with those of `docs/hooks/cost.py`."""
    data = data_of(box)
    places = {c["name"]: c["values"].index for c in data["controls"]}
    for check in data["checks"]:
        layer = check["layer"]
        found = box.evaluate("(box, layer) => box.costs(layer)", layer)
        for name, stages in check["costs"].items():
            for stage, wanted in stages.items():
                got = [found[name][stage][x] for x in ("operations", "bytes", "seconds", "bound")]
                if not all(close(a, b) for a, b in zip(got, wanted)):
                    yield f"{layer}: {name}.{stage} must be {wanted}, got {got}"
        for name, value in layer.items():
            slide(box, name, places[name](value))
        shown = words_of(box, "data-cell")
        yield from (
            f"{layer}: {place} must say {words!r}, got {shown.get(place)!r}"
            for place, words in check["words"].items()
            if shown.get(place) != words
        )
    before = words_of(box, "data-cell")
    box.locator("input").first.focus()
    tab.keyboard.press("ArrowRight")
    if words_of(box, "data-cell") == before:
        yield "an arrow key changes nothing"


def look_at_orders(tab: Page, box: Locator) -> Iterator[str]:
    """Compare the counts at each position of the slider with the loads that Python wrote."""
    orders = data_of(box)["orders"]
    for step in (0, 1, 5, 11, 12, 39, 40):
        slide(box, "step", step)
        for n, loads in enumerate(orders):
            done = loads[:step]
            wanted = {
                "loads": len(done),
                "partials": sum(load["partials"] for load in done),
                "idle": sum(len(load["idle"]) for load in done),
            }
            panel = box.locator(f'[data-order="{n}"]')
            shown = {name: int(x) for name, x in words_of(panel, "data-count").items()}
            if shown != wanted:
                yield f"order {n} at {step}: must count {wanted}, got {shown}"
            later = panel.locator(".w-later").count()
            rest = sum(len(load["queries"] + load["idle"]) for load in loads[step:])
            if later != rest:
                yield f"order {n} at {step}: must leave {rest} cells pale, got {later}"
    box.get_by_label("one load back").press("Enter")
    if box.locator(".w-later").count() != 1:
        yield "the button that steps back does not"


def look_at_rows(tab: Page, box: Locator) -> Iterator[str]:
    """Compare the marked blocks and the shown scores with what Python wrote."""
    layers = data_of(box)["layers"]
    for layer, query in ((0, 0), (1, 17), (2, 200), (0, 383)):
        box.locator("select").select_option(index=layer)
        slide(box, "query", query)
        for r, scores in enumerate(layers[layer]["scores"][query]):
            marked = box.locator(f".w-read{r}").evaluate_all("all => all.map(e => e.dataset.block)")
            chosen = layers[layer]["chosen"][query][r]
            if [int(b) for b in marked] != chosen:
                yield f"query {query}, group {r}: must mark {chosen}, got {marked}"
            told = words_of(box, "data-cell")
            for b, score in enumerate(scores):
                if float(told[f"{r}.{b}"]) != score / 10:
                    yield f"query {query}: block {b} must say {score / 10}, got {told[f'{r}.{b}']}"
    box.locator('[data-token="40"]').click()
    if box.locator(".w-query").get_attribute("data-token") != "40":
        yield "a click on a token does not move the query there"
    box.locator('input[name="query"]').press("ArrowRight")
    if box.locator(".w-query").get_attribute("data-token") != "41":
        yield "an arrow key does not move the query"


LOOKS = {"cost": look_at_cost, "rows": look_at_rows, "orders": look_at_orders}


def without_scripts(browser: Browser, address: str, kind: str) -> str:
    """Check what a widget shows in a browser that runs no scripts."""
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address)
    words = tab.locator(f'[data-widget="{kind}"]').inner_text()
    context.close()
    return words


def look_at_widgets(browser: Browser, root: str) -> list[str]:
    """Yield what is wrong with the widgets, one line each."""
    faults: list[str] = []
    for kind, name in PAGES.items():
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(f"{root}/{name}")
        box = tab.locator(f'[data-widget="{kind}"]')
        static = set(without_scripts(browser, f"{root}/{name}", kind).split())
        if len(static) < 20 or not static <= set(box.inner_text().split()):
            faults.append(f"{kind}: what stands there without scripts must be where it starts")
        faults += [f"{kind}: {fault}" for fault in LOOKS[kind](tab, box)]
        context.close()
    return [*faults, *look_at_taps(browser, root)]


def look_at_taps(browser: Browser, root: str) -> Iterator[str]:
    """On a phone, a tap on an abbreviation opens its words, and a tap beside it closes them."""
    context = browser.new_context(has_touch=True, viewport={"width": 390, "height": 900})
    tab = context.new_page()
    tab.goto(f"{root}/chapters/02-gqa.html")
    word, box = tab.locator("article abbr").first, tab.locator(".tap")
    if not tab.evaluate("matchMedia('(pointer: coarse)').matches || navigator.maxTouchPoints > 0"):
        yield "taps: the browser does not act as a phone"
    word.tap()
    if "grouped-query attention" not in box.inner_text():
        yield f"taps: the words of GQA must open, got {box.inner_text()!r}"
    tab.locator("h1").tap()
    if box.is_visible():
        yield "taps: a tap beside the word must close the box"
    context.close()
