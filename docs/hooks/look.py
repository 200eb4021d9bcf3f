"""The built site as its readers see it: every page in Chromium, on a desk and on a phone.

    python -m docs.hooks.look [folder for screenshots]

Fails on errors in the console, requests that fail or leave the machine, formulas that were not
drawn, and pages that scroll sideways.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[2] / "site"
CHROMIUM = "/usr/bin/chromium"
VIEWS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 390)}
STATE = """() => ({
    wide: document.documentElement.scrollWidth > innerWidth,
    wrong: document.querySelectorAll('.katex-error').length,
    undrawn: [...document.querySelectorAll('.arithmatex')].filter(e => !e.querySelector('.katex')).length,
})"""


class Silent(SimpleHTTPRequestHandler):
    """A server that does not talk."""

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def visit(browser: Browser, root: str, name: str, view: str, shots: Path | None) -> list[str]:
    """Open one page; what was wrong with it."""
    scheme, width = VIEWS[view]
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    tab, wrong = context.new_page(), []
    tab.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(f"error: {e}"))
    tab.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
    tab.on("request", lambda r: None if r.url.startswith((root, "data:")) else wrong.append(r.url))
    tab.goto(f"{root}/{name}")
    tab.wait_for_timeout(150)
    state = tab.evaluate(STATE)
    wrong += [f"{what}: {value}" for what, value in state.items() if value]
    if shots:
        path = shots / f"{name.replace('/', '_').removesuffix('.html')}_{view}.png"
        tab.screenshot(path=path, full_page=True)
    context.close()
    return [f"{name} ({view}): {fault}" for fault in wrong]


def main(shots: Path | None) -> int:
    """Visit every page in every view; 1 if anything was wrong."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    names = [str(p.relative_to(SITE)) for p in sorted(SITE.rglob("*.html")) if p.name != "404.html"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        faults = [f for n in names for v in VIEWS for f in visit(browser, root, n, v, shots)]
        browser.close()
    server.shutdown()
    print("\n".join(faults) or f"{len(names)} pages, {len(VIEWS)} views each: nothing wrong")
    return int(bool(faults))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    sys.exit(main(folder))
