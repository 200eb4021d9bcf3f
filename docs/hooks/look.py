"""A check of the built site in Chromium: every page on a desktop, on a phone and in dark colours.

    python -m docs.hooks.look [folder for screenshots]

Fails on errors in the console, requests that fail or leave the machine, formulas that were not
drawn, pages that scroll sideways, colours that ignore the scheme, and widgets that do not react.
It first opens a page with all of these faults and fails if one of them is not found.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

from docs.hooks.look_widgets import look_at_widgets

SITE = Path(__file__).parents[2] / "site"
VIEWS = {"desk": (1280, "light"), "phone": (390, "light"), "dark": (1280, "dark")}
"""The views of a page after one load: its width, and the colour scheme."""
TOGGLE = """async (scheme) => {
    document.getElementById(scheme === 'dark' ? '__palette_1' : '__palette_0')?.click();
    for (let n = 0; n < 2; n++) await new Promise(requestAnimationFrame);
}"""
STATE = r"""(dark) => {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const outside = 'pre, code, script, style, .katex, .arithmatex, textarea';
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const raw = [];
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const formula = /\\[([]|\$[^$\n]+\$/.test(node.data);
        if (formula && !node.parentElement.closest(outside)) raw.push(node.data.trim().slice(0, 40));
    }
    const light = (color) => Math.max(...color.match(/[\d.]+/g).slice(0, 3).map(Number)) > 128;
    const style = getComputedStyle(document.body);
    const cut = (e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1;
    return {
        'scrolls sideways': document.documentElement.scrollWidth > innerWidth,
        'wrong formulas': all('.katex-error').length,
        'formulas not drawn': all('.arithmatex').filter(e => !e.querySelector('.katex')).length,
        'formulas as text': raw.join('; '),
        'ignores the scheme': light(style.backgroundColor) === dark || light(style.color) !== dark,
        'code that scrolls on a desk': innerWidth < 1000 ? 0
            : all('.md-content pre > code').filter(cut).map(e => e.textContent.slice(0, 40)).join('; '),
    };
}"""
FAULTY = r"""<!doctype html><html style="background: #fff"><body style="background: #fff; color: #000">
<p>A formula \(x\).</p><span class="arithmatex">\(y\)</span><span class="katex-error">z</span>
<div style="width: 2000px">wide</div>
<div class="md-content"><pre><code style="display: block; width: 9em; overflow: auto">a very long
line of code that does not fit where it should</code></pre></div>
<img src="missing.png"><script src="http://127.0.0.1:9/away.js"></script>
<script>console.error("planted"); throw new Error("thrown")</script></body></html>"""
FAULTS = (
    "console: planted", "error: thrown", "failed: ", "leaves the machine", "scrolls sideways",
    "wrong formulas", "formulas not drawn", "formulas as text", "ignores the scheme",
    "code that scrolls",
)  # fmt: skip
"""The faults of `FAULTY`, each by a part of its message."""


class Silent(SimpleHTTPRequestHandler):
    """A server without log messages."""

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a server for a folder, which runs inside the with statement."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def listen(tab: Page, root: str) -> list[str]:
    """The errors of a tab, one line each; the list grows while pages are open."""
    wrong: list[str] = []
    tab.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(f"error: {e}"))
    tab.on(  # a request that the next page cuts off has not failed
        "requestfailed",
        lambda r: None if r.failure == "net::ERR_ABORTED" else wrong.append(f"failed: {r.url}"),
    )
    tab.on("response", lambda r: wrong.append(f"failed: {r.url}") if r.status >= 400 else None)
    tab.on(
        "request",
        lambda r: None if r.url.startswith((root, "data:", "blob:"))
        else wrong.append(f"leaves the machine: {r.url}"),
    )  # fmt: skip
    return wrong


def without_words(route: Route) -> None:
    """An empty search index, because every page would build the index of the site again."""
    route.fulfill(json=route.fetch().json() | {"docs": []})


def tour(browser: Browser, root: str, names: list[str], shots: Path | None = None) -> Iterator[str]:
    """Open pages one after another in one tab and yield what is wrong with them."""
    context = browser.new_context()
    tab = context.new_page()
    tab.route("**/search_index.json", without_words)
    wrong = listen(tab, root)
    for name in names:
        tab.goto(f"{root}/{name}")
        for view, (width, scheme) in VIEWS.items():
            tab.set_viewport_size({"width": width, "height": 900})
            tab.evaluate(TOGGLE, scheme)
            state = tab.evaluate(STATE, scheme == "dark")
            wrong += [f"{what}: {value}" for what, value in state.items() if value]
            yield from (f"{name} ({view}): {fault}" for fault in wrong)
            wrong.clear()
            if shots:
                path = shots / f"{name.replace('/', '_').removesuffix('.html')}_{view}.png"
                tab.screenshot(path=path, full_page=True)
        tab.evaluate(TOGGLE, "light")
    context.close()


def follows(browser: Browser, root: str) -> Iterator[str]:
    """The colours of the home page for a system that prefers a scheme, before a button is pressed."""
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        tab = context.new_page()
        tab.goto(root)
        if tab.evaluate(STATE, scheme == "dark")["ignores the scheme"]:
            yield f"index.html: does not follow a system that prefers {scheme}"
        context.close()


def overlooked(browser: Browser) -> Iterator[str]:
    """The planted faults that a tour does not find."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as root:
        (Path(folder) / "faulty.html").write_text(FAULTY)
        told = "\n".join(tour(browser, root, ["faulty.html"]))
        yield from (f"this check overlooks: {fault}" for fault in FAULTS if fault not in told)


def main(shots: Path | None) -> int:
    """Visit every page in every view; 1 if anything was wrong, 2 if there is no browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print("the check of the site needs Debian's chromium: apt-get install chromium")
        return 2
    names = [str(p.relative_to(SITE)) for p in sorted(SITE.rglob("*.html")) if p.name != "404.html"]
    with sync_playwright() as playwright, serve(SITE) as root:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        faults = list(overlooked(browser))
        faults += [*follows(browser, root), *tour(browser, root, names, shots)]
        faults += look_at_widgets(browser, root)
        browser.close()
    print("\n".join(faults) or f"{len(names)} pages, {len(VIEWS)} views each: nothing wrong")
    return int(bool(faults))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    sys.exit(main(folder))
