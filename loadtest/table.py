"""A summary as tables for people, narrow enough for a plain terminal."""

# ruff: noqa: RUF001 - the multiplication sign and the dash are meant

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loadtest.farm import named
from loadtest.summary import Figures

_RATES = (
    *("users", "req/\nmin", "req/s", "× real\ntime", "avg\nms", "P50\nms", "P95\nms", "P99\nms"),
    *("answered", "failed", "refused", "unfi-\nnished"),
)
_INTERVALS = ("users", "avg ms, between", "P95 ms, between", "queue\navg ms", "inference\navg ms")


def render(summary: Figures, farm: dict[str, Any] | None, console: Console) -> None:
    """Print one row a step and the total; below it, who answered. ``farm`` is farm.describe's."""
    console.print(_table(_RATES, summary, _rates))
    console.print("With 95 % confidence, if requests of one run are independent (?: too few):")
    console.print(_table(_INTERVALS, summary, _intervals))
    _print_speech(summary["total"], console)
    answered = summary["total"]["workers"]
    if farm is None:
        console.print(f"workers that answered: {answered}; the farm's health is not stored here")
        return
    count = f"workers {len(farm['workers'])} ({answered} answered)"
    text = " · ".join(f"{key} {named(farm, key)}" for key in ("device", "dtype", "engine"))
    lines = (farm["url"], count, text, f"provider really used: {named(farm, 'provider')}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _table(columns: tuple[str, ...], summary: Figures, cells: Any) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for step in summary["steps"]:
        table.add_row(str(step["users"]), *cells(step))
    table.add_section()
    table.add_row("total", *cells(summary["total"]), style="bold")
    return table


def _rates(figures: Figures) -> list[str]:
    latency = figures["latency_ms"] or {}
    return [
        _number(figures["requests_per_minute"]),
        _number(figures["requests_per_second"]),
        _number(figures["times_real_time"]),
        *(_number(latency.get(key)) for key in ("average", "p50", "p95", "p99")),
        *(str(figures[key]) for key in ("answered", "failed", "refused", "unfinished")),
    ]


def _intervals(figures: Figures) -> list[str]:
    latency = figures["latency_ms"] or {}
    margin = latency.get("average_plus_minus")
    # The margin is the same on both sides, though a few slow answers stretch only the upper one:
    # the lower end can come out below zero, where no latency is. It is cut there.
    ends = [] if margin is None else [latency["average"] + sign * margin for sign in (-1, 1)]
    return [
        " – ".join(_number(end) if end > 0 else "0" for end in ends) or "? – ?",
        f"{_number(latency.get('p95_low'), '?')} – {_number(latency.get('p95_high'), '?')}",
        *(_number((figures[key] or {}).get("average")) for key in ("queue_ms", "inference_ms")),
    ]


def _number(value: float | None, absent: str = "–") -> str:
    if value is None:
        return absent
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def _print_speech(total: Figures, console: Console) -> None:
    """The figures that only speech has."""
    for key, name, unit, digits in (
        ("real_time_factor", "real-time factor (inference per audio second)", "", ".4f"),
        (
            "caller_factor",
            "real-time factor, waiting included (latency per audio second)",
            "",
            ".4f",
        ),
        ("first_audio_ms", "time to first audio", " ms", ".0f"),
    ):
        spread = total[key]
        if spread:
            average, p95 = format(spread["average"], digits), format(spread["p95"], digits)
            line = f"{name}: avg {average}{unit}, P95 {p95}{unit}, n = {spread['n']}"
            console.print(line, soft_wrap=True, highlight=False)
