"""Reports for tests: read back from a page, and made up with every kind of trouble in them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pipeline.report.data import Report

JSON = "report.json"
# every element that shows a value, as the page's reader sees it
SHOWN = """
[...document.querySelectorAll('[data-path]')].map((one) => ({
  path: one.dataset.path, key: one.dataset.key ?? null, value: one.getAttribute('value'), text: one.textContent,
  title: one.title, data: one.tagName === 'DATA',
}))
"""
# texts of pictures that can't be read or lie outside of them; and what sticks out of the page
UNREADABLE = """
[...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
  const whole = svg.getBoundingClientRect(), scale = whole.width / svg.viewBox.baseVal.width;
  return [...svg.querySelectorAll('text')].flatMap((text) => {
    const box = text.getBoundingClientRect(), size = parseFloat(getComputedStyle(text).fontSize) * scale;
    const out = box.left < whole.left - 4 || box.right > whole.right + 4 || box.bottom > whole.bottom + 4;
    return size < 9 || out ? [`${svg.getAttribute('aria-label')}: ${text.textContent} (${size.toFixed(1)} px)`] : [];
  });
})
"""
OVERLAPPING = """
[...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
  const all = [...svg.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
  return all.flatMap(([one, a], place) => all.slice(place + 1).filter(([, b]) =>
    a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom
  ).map(([two]) => `${svg.getAttribute('aria-label')}: ${one} on ${two}`));
})
"""
SMALL = """
[...document.querySelectorAll('body *')].filter((one) => one.checkVisibility?.() && !one.closest('svg')
  && [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
  && parseFloat(getComputedStyle(one).fontSize) < 9).map((one) => one.textContent)
"""


def at(data: Any, path: str) -> Any:
    """What lies at a path such as ``targets.0.speed``."""
    for key in path.split("."):
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def compare(shown: list[dict[str, Any]], data: Any) -> dict[str, int]:
    """Check what a page shows with the data; how many numbers and texts that were."""
    count = {"numbers": 0, "texts": 0}
    for one in shown:
        value = at(data, one["path"])
        if one["key"] is not None:
            value = f"sha256:{value[one['key']]}"
        if one["data"]:
            assert one["value"] == str(value), one
            assert reads_as(one["text"], float(value)), (one, value)
            count["numbers"] += 1
        else:
            told = one["title"] or one["text"]
            assert plain(told) == plain(str(value)), one
            assert plain(str(value)).startswith(plain(one["text"])), one
            count["texts"] += 1
    return count


def plain(text: str) -> str:
    """Text without the marks that make a command of it."""
    return " ".join(text.replace("`", "").split())


UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9, "min": 60, "h": 3600}


def reads_as(text: str, value: float) -> bool:
    """Whether `text` is `value`, rounded to the digits that it has."""
    words = {"equal": math.inf, "broken": -math.inf}
    if text in words:
        return value == words[text] or (math.isnan(value) and text == "broken")
    if not math.isfinite(value):
        return text == ("not a number" if math.isnan(value) else "infinite" if value > 0 else "\N{MINUS SIGN}infinite")
    if text == "under 0.1%":
        return 0 < value < 0.001
    if text == "over 1000%":
        return value > 10
    if re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text):
        return value > 1e9
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{NARROW NO-BREAK SPACE}", "")
    found = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]?\d+)?) ?([A-Za-z%]*)", text)
    if found is None:
        return False
    number, unit = found.groups()
    scale = UNITS.get(unit, 1)
    exponent = float("1e" + (number.partition("e")[2] or "0"))
    step = 10.0 ** -len(number.partition("e")[0].partition(".")[2]) * exponent * scale
    # a number of three digits without a point may stand for one with more of them
    digits = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value and "." not in number else 0
    return abs(float(number) * scale - value) <= max(step, digits) * 0.5000001 + abs(value) * 1e-12


def load(page: Path) -> tuple[Any, Report]:
    """The data beside a page, as JSON and as a document."""
    text = page.with_name(JSON).read_text()
    return json.loads(text), Report.model_validate_json(text)
