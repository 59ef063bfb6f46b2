"""Small pictures as inline SVG. Colours are CSS classes of `analysis.report_html`, so that they follow the light or dark theme.

Every text is escaped here; every number that comes in is finite.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 370, 250  # of a picture in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
COLOURS = 8  # classes s0 to s7; beyond, the same colours with dashes
RADIUS = 5  # of a point


@dataclass(frozen=True)
class Series:
    """One line. style: class of its colour, with ``dash`` and ``thin``."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    style: str


def style(place: int) -> str:
    """Class of the colour for the number `place` of a list."""
    return f"s{place % COLOURS}" + (" dash" if place // COLOURS % 2 else "")


def linear(value: float) -> float:
    return value


def root(value: float) -> float:
    """Square root scale: opens up what is near zero, and has a zero."""
    return math.sqrt(max(value, 0.0))


class Frame:
    """Axes of one picture, and the way from data to its units."""

    def __init__(self, xs, ys, labels: tuple[str, str], scale: Callable[[float], float] = linear, size=(WIDTH, HEIGHT)):
        self.width, self.height = size
        self.scale, self.labels = scale, labels
        self.x_range, self.y_range = _range(xs), _range(ys)

    def x(self, value: float) -> float:
        low, high = (self.scale(end) for end in self.x_range)
        return LEFT + (self.scale(value) - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def axes(self) -> str:
        parts, floor = [], self.height - BOTTOM
        for tick in ticks(*self.y_range):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
        for tick in self.x_ticks():
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{short(tick)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{floor}" y2="{floor}"/>')
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{self.height - 6}" text-anchor="middle">{escape(self.labels[0])}</text>'
        )
        across = (TOP + floor) / 2
        parts.append(
            f'<text class="label" transform="translate(13 {across:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.labels[1])}</text>"
        )
        return "".join(parts)

    def x_ticks(self) -> list[float]:
        if self.scale is linear:
            return ticks(*self.x_range)
        high = self.x_range[1]
        step = 10 ** math.floor(math.log10(high)) if high > 0 else 1.0
        found, last = [0.0], 0.0
        for value in sorted(step * f for f in (0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)):
            if value <= high * 1.001 and self.x(value) - self.x(last) > 34:
                found.append(value)
                last = value
        return found

    def svg(self, title: str, body: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{self.axes()}{body}</svg>"
        )


def lines(title: str, series: list[Series], labels: tuple[str, str], points: Sequence[Point] = (), *, y=(0.0, 1.0),
          scale=linear, marks: Sequence[float] = ()) -> str:  # fmt: skip
    """Curves and points. y: what the vertical axis must span. marks: vertical lines."""
    xs = [x for one in series for x in one.xs] + [point.x for point in points] + list(marks)
    ys = [value for one in series for value in one.ys] + [point.y for point in points] + list(y)
    frame = Frame([*xs, 0.0], ys, labels, scale)
    parts = []
    for x in marks:
        at, floor = frame.x(x), frame.height - BOTTOM
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
    for one in series:
        path = "L".join(f"{frame.x(x):.1f} {frame.y(value):.1f}" for x, value in zip(one.xs, one.ys, strict=True))
        if path:
            parts.append(f'<path class="line {one.style}" d="M{path}"><title>{escape(one.name)}</title></path>')
    for point in points:
        words = f"{point.name}: {short(point.x)}, {point.y:.3f}"
        parts.append(
            f'<circle class="point {point.style}" cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}" r="{RADIUS}">'
            f"<title>{escape(words)}</title></circle>"
        )
    return frame.svg(title, "".join(parts))


def histogram(title: str, edges: Sequence[float], groups: list[tuple[str, Sequence[float]]], cut: float | None,
              labels: tuple[str, str], size=(370, 205)) -> str:  # fmt: skip
    """Overlaid steps: groups are (class, share in each bin). cut: where removal began, as a vertical line."""
    frame = Frame(edges, [0.0, *(value for _, values in groups for value in values)], labels, size=size)
    floor = frame.y(0.0)
    parts = []
    for name, values in groups:
        steps = [f"M{frame.x(edges[0]):.1f} {floor:.1f}"]
        for start, end, value in zip(edges, edges[1:], values, strict=False):
            steps.append(f"L{frame.x(start):.1f} {frame.y(value):.1f}L{frame.x(end):.1f} {frame.y(value):.1f}")
        parts.append(f'<path class="area {name}" d="{"".join(steps)}L{frame.x(edges[-1]):.1f} {floor:.1f}Z"/>')
    if cut is not None:
        at = frame.x(min(max(cut, edges[0]), edges[-1]))
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor:.1f}"/>')
    return frame.svg(title, "".join(parts))


def scatter(title: str, groups: list[tuple[str, list[tuple[float, float]]]], bounds: tuple, size=(250, 210)) -> str:
    """Dots without axes; groups are (class, points), drawn in this order. bounds: the xs and ys to span."""
    width, height = size
    (left, right), (low, high) = (_range(values) for values in bounds)
    pad = 8

    def place(x: float, y: float) -> str:
        across = pad + (x - left) / ((right - left) or 1) * (width - 2 * pad)
        return f"{across:.1f} {height - pad - (y - low) / ((high - low) or 1) * (height - 2 * pad):.1f}"

    parts = []
    for name, points in groups:
        path = "".join(f"M{place(x, y)}h0" for x, y in points)  # a line of no length with round ends is a dot
        if path:
            parts.append(f'<path class="dots {name}" d="{path}"/>')
    return (
        f'<svg class="framed" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers within the range."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5.5)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's number in few characters."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value:.1e}"
    return f"{round(value, 10):.4g}"


def _range(values) -> tuple[float, float]:
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high
