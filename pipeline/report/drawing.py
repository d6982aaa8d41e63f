"""Pictures for the report, as SVG text for its page: equal bytes for equal data, and nothing from outside.

This is what all of them share: sizes, colours that become the page's own, light or dark, and how a figure of matplotlib
becomes an ``<svg>`` element. `picture_tradeoff`, `picture_depth` and `picture_timeline` draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROW = (4.6, 3.2)  # inches, of 72 points: as wide as a phone, so that letters keep their size there
WIDE = 9.0  # a picture that has to be scrolled there


@dataclass(frozen=True)
class Paint:
    """Colours by their use; `one` to `three` tell kinds apart, also for who sees no red or no green."""

    ink: str
    soft: str
    line: str
    good: str
    bad: str
    one: str
    two: str
    three: str
    paper: str


# drawn in these, which then become the page's own
PAGE = Paint("#010101", "#020202", "#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909")
_VARIABLES = Paint(
    "currentColor",
    "var(--soft)",
    "var(--line)",
    "var(--good)",
    "var(--bad)",
    "var(--one)",
    "var(--two)",
    "var(--three)",
    "var(--paper)",
)
LIGHT = Paint("#1c2430", "#5b6675", "#d8dee6", "#00684a", "#b3261e", "#0b62a8", "#b35900", "#7a3e9d", "#ffffff")

Draw = Callable[["Axes", Paint], None]


def style(paint: Paint, size: float) -> Any:
    """matplotlib's settings, whose type is a dict of 330 literals; `size` of letters, in points."""
    return {
        "svg.hashsalt": "exportyard",
        "svg.fonttype": "none",
        "font.size": size,
        "text.color": paint.ink,
        "axes.edgecolor": paint.soft,
        "axes.labelcolor": paint.soft,
        "xtick.color": paint.soft,
        "ytick.color": paint.soft,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
    }


def svg(draw: Draw, size: tuple[float, float], *, name: str, title: str, told: Mapping[str, str] | None = None) -> str:
    """An ``<svg>`` element.

    Args:
        draw: draws into the axes that it is given.
        size: in inches.
        name: of the picture, unique in its page; letters, digits and ``-``.
        title: what it shows, for those who can't see it.
        told: what to say of the marks whose ``gid`` is a key.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with rc_context(style(PAGE, 9.5 if size[0] < WIDE else 10)):
        figure = _figure(size)
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), PAGE)
        written = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _for_page(written.getvalue(), name, title, told or {})


def png(draw: Draw, size: tuple[float, float]) -> bytes:
    """The same as a PNG file on white, for places that show no SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(style(LIGHT, 10)):
        figure = _figure(size)
        FigureCanvasAgg(figure)
        draw(figure.add_subplot(), LIGHT)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return written.getvalue()


def _figure(size: tuple[float, float]) -> Figure:
    # a figure of its own: pyplot would keep every figure, and look for a display
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=72, layout="constrained")


def plain(text: str, most: int = 40) -> str:
    """A name as matplotlib shall draw it: not as a formula, not too long, the end kept."""
    cut = text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]
    return cut.replace("$", r"\$")


def identifier(text: str) -> str:
    """A name as part of an identifier of a mark."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)


def _for_page(written: str, name: str, title: str, told: Mapping[str, str]) -> str:
    """The ``<svg>`` element alone, in the page's colours and font, with identifiers that no other picture has."""
    text = written[written.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)  # each letter's, and a name may end one
    for use, drawn in vars(PAGE).items():
        text = text.replace(drawn, getattr(_VARIABLES, use))
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace("*{stroke-linejoin", "svg *{stroke-linejoin")  # or it would style the whole page
    for mark, words in told.items():
        start = f'<g id="{name}-{mark}">'
        text = text.replace(start, f"{start}<title>{escape(words)}</title>")
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label={quoteattr(title)}>{rest}'
