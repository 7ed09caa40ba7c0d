"""Stacked bars as SVG text, in the colours of the line charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from line_chart import FAINT, INK, PAPER, RULE, ticks

_BAR, _STEP, _TOP, _WIDTH, _GAP, _FOOT = 18, 26, 74, 400, 44, 60
_TEXT, _TITLE = 13, 18
_LETTER = 7.8  # widest mean width of a letter at `_TEXT`

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Bar:
    """One bar.

    Args:
        name: Written to the left of it.
        pieces: Length of each piece by its name.
        mark: Where the mark across it stands; None for none.
    """

    name: str
    pieces: Mapping[str, float]
    mark: float | None = None

    @property
    def length(self) -> float:
        """Of all pieces."""
        return sum(self.pieces.values())

    def as_share(self) -> Bar:
        """The same bar with length 1."""
        mark = None if self.mark is None else self.mark / self.length
        return Bar(self.name, {name: value / self.length for name, value in self.pieces.items()}, mark)


def draw_bars(title: str, unit: str, mark: str, bars: Sequence[Bar], colors: Mapping[str, Color]) -> str:
    """Two panels of the same bars: their lengths, and each as a whole; the legend below them.

    Args:
        title: Above both.
        unit: Below the first panel.
        mark: What the marks mean.
        bars: From top to bottom.
        colors: Of every piece that a bar can have, in the order in which pieces stand.
    """
    left = 24 + _LETTER * max(len(bar.name) for bar in bars)
    width, foot = left + 2 * _WIDTH + _GAP + 24, _TOP + _STEP * len(bars)
    shown = [name for name in colors if any(name in bar.pieces for bar in bars)]
    legend = _legend(shown, mark, colors, left, foot + _FOOT)
    height = foot + _FOOT + 24 * math.ceil((len(shown) + 1) / 4) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="{_TEXT}">',
        f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
        _write(24, 32, title, INK, size=_TITLE),
        *(_write(left - 12, _middle(row), bar.name, INK, "end") for row, bar in enumerate(bars)),
        *_panel(left, unit, bars, colors),
        *_panel(left + _WIDTH + _GAP, "share", [bar.as_share() for bar in bars], colors),
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _panel(left: float, unit: str, bars: Sequence[Bar], colors: Mapping[str, Color]) -> list[str]:
    at = ticks(0.0, max(bar.length for bar in bars), 5)
    scale, foot = _WIDTH / at[-1], _TOP + _STEP * len(bars)
    lines = []
    for value in at:
        x = left + scale * value
        lines.append(f'<path d="M{x:.1f} {_TOP - 8}V{foot}" stroke="{_hex(RULE)}"/>')
        lines.append(_write(x, foot + 18, f"{value:g}", FAINT, "middle"))
    lines.append(_write(left + _WIDTH / 2, foot + 38, unit, INK, "middle"))
    for row, bar in enumerate(bars):
        x, top = left, _TOP + _STEP * row
        for name in colors:
            length = scale * bar.pieces.get(name, 0.0)
            if length > 0:
                lines.append(_box(x, top, length, colors[name], f"{bar.name}, {name}: {bar.pieces[name]:.3g}"))
                x += length
        if bar.mark is not None:
            x = left + scale * bar.mark
            lines.append(f'<path d="M{x:.1f} {top - 3}v{_BAR + 6}" stroke="{_hex(INK)}" stroke-width="2"/>')
    return lines


def _legend(names: Sequence[str], mark: str, colors: Mapping[str, Color], left: float, top: float) -> list[str]:
    lines, column = [], (2 * _WIDTH + _GAP) / 4
    for number, name in enumerate([*names, mark]):
        x, y = left + column * (number % 4), top + 24 * (number // 4)
        if number < len(names):
            lines.append(_box(x, y, 14, colors[name], name, height=14))
        else:
            lines.append(f'<path d="M{x + 7:.1f} {y - 2:.1f}v18" stroke="{_hex(INK)}" stroke-width="2"/>')
        lines.append(_write(x + 22, y + 12, name, INK))
    return lines


def _middle(row: int) -> float:
    return _TOP + _STEP * row + _BAR - 4


def _box(x: float, y: float, width: float, color: Color, title: str, height: float = _BAR) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" fill="{_hex(color)}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _write(x: float, y: float, text: str, color: Color, anchor: str = "start", size: int = _TEXT) -> str:
    style = f'fill="{_hex(color)}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
