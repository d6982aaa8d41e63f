"""Values of ``report.json`` as a page shows them: rounded for people, and each with the place that it is from.

``<data value="0.0161" data-path="targets.0.speed.time.median_ms">0.0161 ms</data>`` can be read back, so that a test
compares what a page says with the data, number by number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from pipeline import console

MINUS = "\N{MINUS SIGN}"


class Spot:
    """A value in plain JSON data (`raw`) and the path that leads to it (`place`); attributes are spots, too."""

    __slots__ = ("place", "raw")

    def __init__(self, raw: Any, place: str = "") -> None:
        self.raw, self.place = raw, place

    def __getattr__(self, name: str) -> Spot:
        if name.startswith("__") or not isinstance(self.raw, dict) or name not in self.raw:
            raise AttributeError(f"`{self.place}` has no `{name}`")
        return self[name]

    def __getitem__(self, key: str | int) -> Spot:
        return Spot(self.raw[key], f"{self.place}.{key}" if self.place else str(key))

    def __iter__(self) -> Iterator[Spot]:
        keys = self.raw if isinstance(self.raw, dict) else range(len(self.raw))
        return (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self.raw)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __html__(self) -> Markup:
        """A text as it is; a test finds it by its path as well."""
        if isinstance(self.raw, str):
            return Markup('<span data-path="{}">{}</span>').format(self.place, self.raw)
        return shown(self, str(self.raw))

    def __str__(self) -> str:
        return str(self.raw)

    @property
    def as_number(self) -> float:
        """The value as a number; JSON has none for an infinity, so that it is a word there."""
        return float(self.raw)


def shown(spot: Spot, text: str) -> Markup:
    """A number as `text`, with its exact value and where it is from; nothing for a number that isn't known."""
    if spot.raw is None:
        return Markup("")
    return Markup('<data value="{}" data-path="{}">{}</data>').format(spot.raw, spot.place, text)


def of(format_: Any) -> Any:
    """A filter for templates: a spot in, the number's text and place out."""

    def filtered(spot: Spot, *words: Any) -> Markup:
        if spot.raw is None:
            return shown(spot, "")
        value = spot.as_number
        return shown(
            spot, format_(value, *words) if math.isfinite(value) or format_ in (decibels, bare) else odd(value)
        )

    return filtered


def odd(value: float) -> str:
    """What isn't a number that one can write with digits."""
    return "not a number" if math.isnan(value) else "infinite" if value > 0 else f"{MINUS}infinite"


def size(value: float) -> str:
    """Bytes."""
    return console.size(int(value))


def milliseconds(value: float) -> str:
    """Milliseconds, three digits."""
    return f"{digits(value)} ms"


def seconds(value: float) -> str:
    """Seconds, as exact as one wants to know it; minutes and hours where there are many."""
    if value >= 3600:
        return f"{value / 3600:.1f} h"
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def decibels(value: float) -> str:
    """An SQNR; two equal tensors have no noise at all."""
    if math.isnan(value) or value == -math.inf:
        return "broken"
    return "equal" if value == math.inf else f"{value:.1f} dB"


def bare(value: float) -> str:
    """As `decibels`, where it is said elsewhere that these are some."""
    return decibels(value).removesuffix(" dB")


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def percent(value: float) -> str:
    """A share."""
    if value > 10:
        return "over 1000%"
    few = 0 < value < 0.001
    return "under 0.1%" if few else f"{value:.1%}"


def fixed(value: float, places: int = 4) -> str:
    """A number with so many digits after the point."""
    return f"{value:.{places}f}" if math.isfinite(value) else odd(value)


def signed(value: float, places: int = 4) -> str:
    """A difference, with its sign."""
    return f"{value:+.{places}f}".replace("-", MINUS) if math.isfinite(value) else odd(value)


def digits(value: float) -> str:
    """Three digits, without an exponent where people would rather read it without."""
    if value and 1e-4 <= abs(value) < 1e6:
        shown_ = f"{value:.3g}"
        return f"{value:.0f}" if "e" in shown_ else shown_.replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def whole(value: float) -> str:
    """A count."""
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def large(value: float) -> str:
    """A large count, such as multiply-accumulates."""
    for unit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{word}"
    return f"{value:.0f}"


def date(value: float) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")


FILTERS = {
    name: of(format_)
    for name, format_ in {
        "size": size,
        "ms": milliseconds,
        "seconds": seconds,
        "db": decibels,
        "bare": bare,
        "times": times,
        "percent": percent,
        "fixed": fixed,
        "signed": signed,
        "digits": digits,
        "whole": whole,
        "large": large,
        "date": date,
    }.items()
}


def sizes(spot: Spot) -> Markup:
    """Axis sizes on one line: ``batch=1 seq=64``."""
    if not spot.raw:
        return Markup("fixed")
    return Markup(" ").join(Markup("{}={}").format(name, shown(spot[name], str(spot.raw[name]))) for name in spot.raw)


def short(spot: Spot, most: int = 16) -> Markup:
    """The beginning of a digest or commit; the whole is in its title."""
    text = str(spot.raw)
    return Markup('<code data-path="{}" title="{}">{}</code>').format(spot.place, text, text[:most])


def breakable(text: str) -> Markup:
    """A name that may be broken after ``.``, ``/``, ``_`` and ``-``."""
    found = escape(text)
    for mark in "./_-":
        found = found.replace(mark, Markup("{}<wbr>").format(mark))
    return found
