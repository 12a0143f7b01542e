"""Two bar charts of a run as one SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from benchmark.summary import Range, Samples, is_streams

_COLOURS = {
    "bare": "#9aa0a6",
    "opta-lmx": "#d1495b",
    "llama-server": "#00798c",
    "llama-server split": "#2e5f8a",
    "llama-server router": "#66c2c9",
    "llama_cpp.server": "#edae49",
    "mlx_lm.server": "#7a5195",
}
_OTHER_COLOUR = "#444444"
_WIDTH, _PANEL, _LEFT, _TOP = 860, 250, 64, 66

Value = Callable[[str, str], Range | None]


def write(samples: Samples, subtitle: str, path: Path) -> None:
    """Tokens per second and time to the first token, by number of streams."""
    workloads = [name for name in samples.workloads() if is_streams(name)]
    contenders = [
        name for name in samples.contenders() if any(samples.of(name, w) for w in workloads)
    ]
    parts = [_text(16, 22, "scripts/bench", size=15, weight="bold"), _text(16, 40, subtitle)]
    panels: Sequence[tuple[str, str]] = (
        ("tokens_per_s", "tokens/s, all streams together"),
        ("first_token_p50_ms", "time to first token (p50), ms"),
    )
    for number, (metric, title) in enumerate(panels):
        y = _TOP + number * (_PANEL + 60)

        def value(contender: str, workload: str, metric: str = metric) -> Range | None:
            return samples.range(contender, workload, metric)

        parts += _panel(y, title, contenders, workloads, value)
    height = _TOP + len(panels) * (_PANEL + 60) + 24
    parts += _legend(contenders, height - 18)
    style = "font-family:system-ui,sans-serif;font-size:12px"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" style="{style}">\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(
    top: float, title: str, contenders: Sequence[str], workloads: Sequence[str], value: Value
) -> list[str]:
    """Groups of bars, one group per workload, with a whisker for the range."""
    ranges = {(c, w): value(c, w) for c in contenders for w in workloads}
    highest = max((r.high for r in ranges.values() if r), default=1.0)
    step = _step(highest)
    ceiling = math.ceil(highest / step) * step
    bottom = top + _PANEL

    def y(amount: float) -> float:
        return bottom - amount / ceiling * (_PANEL - 24)

    parts = [_text(16, top + 4, title, weight="bold")]
    for tick in range(round(ceiling / step) + 1):
        level = y(tick * step)
        parts.append(_line(_LEFT, level, _WIDTH - 16, level, "#e3e3e3"))
        parts.append(_text(_LEFT - 8, level + 4, f"{tick * step:g}", anchor="end"))
    group = (_WIDTH - 16 - _LEFT) / max(1, len(workloads))
    bar = min(44.0, group * 0.8 / max(1, len(contenders)))
    for i, workload in enumerate(workloads):
        middle = _LEFT + (i + 0.5) * group
        parts.append(_text(middle, bottom + 18, workload, anchor="middle"))
        for j, contender in enumerate(contenders):
            found = ranges[contender, workload]
            if found is None:
                continue
            x = middle + (j - len(contenders) / 2) * bar
            level = y(found.median)
            colour = _COLOURS.get(contender, _OTHER_COLOUR)
            label = f"{contender}, {workload}: {found.median:.1f} "
            label += f"({found.low:.1f} to {found.high:.1f})"
            parts.append(
                f'<rect x="{x:.1f}" y="{level:.1f}" width="{bar - 3:.1f}" '
                f'height="{bottom - level:.1f}" fill="{colour}">'
                f"<title>{escape(label)}</title></rect>"
            )
            centre = x + (bar - 3) / 2
            parts.append(_line(centre, y(found.low), centre, y(found.high), "#222222"))
            parts.append(
                _text(centre, y(found.high) - 4, f"{found.median:.0f}", anchor="middle", size=10)
            )
    return parts


def _legend(contenders: Sequence[str], y: float) -> list[str]:
    parts = []
    x = float(_LEFT)
    for contender in contenders:
        colour = _COLOURS.get(contender, _OTHER_COLOUR)
        parts.append(f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y, contender))
        x += 40 + 7 * len(contender)
    return parts


def _step(highest: float) -> float:
    """A round number of which four to eight make up the axis."""
    rough = max(highest, 1e-9) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= rough)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="#222222">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
