"""Line charts drawn with Pillow, which the package has anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, RULE, PAPER = (32, 36, 44), (104, 112, 126), (226, 229, 234), (255, 255, 255)
COLORS = (
    (0, 95, 204),
    (0, 150, 136),
    (120, 80, 190),
    (214, 96, 0),
    (190, 30, 60),
    (125, 125, 125),
    (30, 30, 30),
    (230, 160, 0),
)
"""Colours of the series, in order, readable on white."""

_FINE = 2  # drawn so many times larger, then averaged down: smooth lines
_TEXT, _TITLE = 15, 20
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP, _FOOT = 460, 400, 76, 88, 56, 64


@dataclass(frozen=True)
class Series:
    """One named line, or loose points.

    Args:
        name: What the legend says.
        points: Per panel the `(x, y)` points.
        joined: Whether a line joins the points.
    """

    name: str
    points: Sequence[Sequence[tuple[float, float]]]
    joined: bool = True


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most `most` + 1 round values from at or below `low` to at or above `high`."""
    raw = (high - low) / most if high > low else 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(step for factor in (1, 2, 2.5, 5, 10) if (step := factor * unit) >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 10) for number in range(first, max(last, first + 1) + 1)]


def draw_chart(title: str, y_label: str, x_labels: Sequence[str], series: Sequence[Series]) -> Image.Image:
    """One panel for each x label, side by side on a common y axis, and the legend below them."""
    panels = len(x_labels)
    width = _LEFT + panels * _WIDTH + (panels - 1) * _GAP + 24
    legend_rows = math.ceil(len(series) / 2)
    height = _TOP + _HEIGHT + _FOOT + 26 * legend_rows + 12
    image = Image.new("RGB", (_FINE * width, _FINE * height), PAPER)
    pen = _Pen(ImageDraw.Draw(image))
    pen.write((24, 16), title, _TITLE, INK)
    y_ticks = ticks(*_range([y for line in series for points in line.points for _, y in points]))
    for number, x_label in enumerate(x_labels):
        left = _LEFT + number * (_WIDTH + _GAP)
        x_ticks = ticks(*_range([0.0, *(x for line in series for x, _ in line.points[number])]))
        place = _Axes(left, x_ticks, y_ticks)
        place.draw(pen, x_label, y_label if number == 0 else "")
        for line, color in zip(series, COLORS[: len(series)], strict=True):
            pen.plot([place(*point) for point in sorted(line.points[number])], color, line.joined)
    for number, (line, color) in enumerate(zip(series, COLORS[: len(series)], strict=True)):
        x = _LEFT + (number % 2) * (width - _LEFT) // 2
        y = _TOP + _HEIGHT + _FOOT + 26 * (number // 2)
        pen.plot([(x, y + 8), (x + 30, y + 8)] if line.joined else [(x + 15, y + 8)], color, line.joined)
        pen.write((x + 42, y), line.name, _TEXT, INK)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


@dataclass(frozen=True)
class _Axes:
    left: int
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.left + across * _WIDTH, _TOP + (1 - up) * _HEIGHT

    def draw(self, pen: _Pen, x_label: str, y_label: str) -> None:
        for y in self.y_ticks:
            start = self(self.x_ticks[0], y)
            pen.line([start, self(self.x_ticks[-1], y)], RULE, 1)
            pen.write((start[0] - 10, start[1]), f"{y:g}", _TEXT, FAINT, "rm")
        for x in self.x_ticks:
            start = self(x, self.y_ticks[0])
            pen.line([start, (start[0], start[1] + 6)], FAINT, 1)
            pen.write((start[0], start[1] + 10), f"{x:g}", _TEXT, FAINT, "ma")
        pen.write((self.left + _WIDTH / 2, _TOP + _HEIGHT + 32), x_label, _TEXT, INK, "ma")
        pen.write((self.left, _TOP - 14), y_label, _TEXT, INK, "ls")


@dataclass(frozen=True)
class _Pen:
    draw: ImageDraw.ImageDraw

    def write(
        self, place: tuple[float, float], text: str, size: int, color: tuple[int, ...], anchor: str = "la"
    ) -> None:
        x, y = place
        self.draw.text(
            (_FINE * x, _FINE * y), text, font=ImageFont.load_default(_FINE * size), fill=color, anchor=anchor
        )

    def line(self, points: Sequence[tuple[float, float]], color: tuple[int, ...], width: int) -> None:
        self.draw.line(
            [(_FINE * x, _FINE * y) for x, y in points], fill=color, width=round(_FINE * width), joint="curve"
        )

    def plot(self, points: Sequence[tuple[float, float]], color: tuple[int, ...], joined: bool) -> None:
        if joined and len(points) > 1:
            self.line(points, color, 2)
        radius = 4 if joined else 5
        for x, y in points:
            box = [_FINE * value for value in (x - radius, y - radius, x + radius, y + radius)]
            self.draw.ellipse(box, fill=color if joined else PAPER, outline=color, width=2 * _FINE)
