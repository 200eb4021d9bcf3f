"""Drawing by hand: a few shapes whose colours are classes, so that they follow light and dark."""

from __future__ import annotations

from html import escape


class Drawing:
    """Shapes on a canvas of width x height units; classes are those of `assets/site.css`.

    >>> drawing = Drawing(10, 10)
    >>> drawing.rect(0, 0, 4, 4, "d-own")
    >>> "d-own" in drawing.figure("A square.", "one square")
    True
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def rect(
        self, x: float, y: float, w: float, h: float, style: str, opacity: float = 1, r: float = 1.5
    ) -> None:
        """A box with slightly round corners."""
        see_through = "" if opacity == 1 else f' opacity="{opacity:.2f}"'
        self.parts.append(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{w:.4g}" height="{h:.4g}" rx="{r}" '
            f'class="{style}"{see_through}/>'
        )

    def text(
        self, x: float, y: float, words: object, style: str = "d-ink", size: float = 12,
        anchor: str = "start",
    ) -> None:  # fmt: skip
        """Words whose baseline starts, ends or is centred at a point."""
        self.parts.append(
            f'<text x="{x:.4g}" y="{y:.4g}" class="{style}" font-size="{size}" '
            f'text-anchor="{anchor}">{escape(str(words))}</text>'
        )

    def box(
        self, x: float, y: float, w: float, h: float, words: object, style: str, size: float = 12.5,
        r: float = 6,
    ) -> None:  # fmt: skip
        """A box with words in its middle."""
        self.rect(x, y, w, h, style, r=r)
        self.text(x + w / 2, y + h / 2 + 0.37 * size, words, "d-on d-bold", size, "middle")

    def line(
        self, *points: tuple[float, float], style: str = "d-line", arrow: bool = False
    ) -> None:
        """A line through points, with a head at its end if it is an arrow."""
        path = " L".join(f"{x:.4g} {y:.4g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="{style}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            u, w = (x - x0) / length, (y - y0) / length
            ends = (
                f"{x:.4g} {y:.4g} L{x - 7 * u + 3.5 * w:.4g} {y - 7 * w - 3.5 * u:.4g} "
                f"L{x - 7 * u - 3.5 * w:.4g} {y - 7 * w + 3.5 * u:.4g}"
            )
            self.parts.append(f'<path d="M{ends}Z" class="d-muted"/>')

    def svg(self, alt: str, least: float = 0) -> str:
        """The drawing alone, no wider than it was made, nor narrower than a part of that."""
        return (
            f'<svg viewBox="0 0 {self.width:.5g} {self.height:.5g}" role="img" '
            f'aria-label="{escape(alt, quote=True)}" '
            f'style="max-width:{self.width:.5g}px;min-width:{least * self.width:.5g}px">'
            f"{''.join(self.parts)}</svg>"
        )

    def figure(self, caption: str, alt: str) -> str:
        """The drawing and what it shows, as HTML."""
        return (
            f'<figure class="drawn">{self.svg(alt, 0.8)}<figcaption>{caption}</figcaption></figure>'
        )
