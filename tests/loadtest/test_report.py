"""Figures come from rows: they recompute, and what does not is refused."""

# ruff: noqa: RUF001 - the dash of the tables is meant

from __future__ import annotations

import argparse
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest import report, samples
from loadtest.samples import FAILED, OK, REFUSED, UNFINISHED, Sample, SamplesError, Writer
from loadtest.summary import MismatchError, _student, compare, percentile, summarise
from loadtest.table import render
from loadtest.thresholds import judge_figures

START = 1_700_000_000.0
FARM = {"url": "http://farm", "workers": [{"id": "w1", "device": "cpu", "provider": "CPU"}]}


def sample(at: float, latency_ms: float, outcome: str = OK, **more: Any) -> Sample:
    """``at``: seconds after the start of the run; steps of 10 s, of 1 user and of 2."""
    second = at >= 10
    values: dict[str, Any] = {
        "scheduled": START + at,
        "started": START + at + 0.000125,
        "latency_ms": latency_ms,
        "first_byte_ms": latency_ms / 2,
        "status": 200 if outcome == OK else 503,
        "outcome": outcome,
        "error": "" if outcome == OK else "503 no_worker",
        "queue_ms": 1.5,
        "inference_ms": None,
        "audio_seconds": 2.0,
        "real_time_factor": 0.25,
        "worker": "w1",
        "kind": "speech",
        "text": "short",
        "text_length": 12,
        "answer_bytes": 1000,
        "request_id": "a,b",
        "step_users": 2 if second else 1,
        "step_start": START + 10 if second else START,
        "step_seconds": 10.0,
    }
    return Sample(**{**values, **more})


ROWS = [
    *(sample(at, 100 * (at + 1)) for at in range(9)),
    sample(9, 1500),  # ends in the second step, and counts there for the rate
    *(sample(10 + at / 2, 400 + at) for at in range(18)),
    sample(19, 3, REFUSED),
    sample(19.1, 5, FAILED),
    sample(19.5, 400, UNFINISHED),
    sample(19.6, 2000),  # ends after the run
]


def write(folder: Path, rows: list[Sample]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / report.SAMPLES).open("w", newline="") as file:
        writer = Writer(file)
        for row in rows:
            writer.write(row)
    return folder


def test_figures_of_known_rows() -> None:
    figures = summarise(ROWS)
    first, second = figures["steps"]
    assert (first["users"], second["users"]) == (1, 2)
    assert first["latency_ms"]["n"] == first["answered"] == 10
    assert first["latency_ms"]["average"] == pytest.approx((sum(range(1, 10)) * 100 + 1500) / 10)
    assert (first["latency_ms"]["p50"], first["latency_ms"]["p95"]) == (500, 1500)
    assert first["requests_per_second"] == pytest.approx(9 / 10)
    assert second["requests_per_second"] == pytest.approx((1 + 18) / 10)
    assert second["times_real_time"] == pytest.approx(2 * 19 / 10)
    assert [second[key] for key in (REFUSED, FAILED, UNFINISHED)] == [1, 1, 1]
    total = figures["total"]
    assert total["requests"] == len(ROWS)
    assert total["seconds"] == pytest.approx(20)
    assert total["requests_per_minute"] == pytest.approx(60 * 28 / 20)
    assert total["inference_ms"] is None
    assert total["first_audio_ms"] is None
    assert total["caller_factor"]["n"] == 29
    assert total["workers"] == 1


def test_a_step_ends_when_the_next_begins() -> None:
    late = [replace(row, step_start=START + 10.5) for row in ROWS if row.step_users == 2]
    first, second = summarise([row for row in ROWS if row.step_users == 1] + late)["steps"]
    assert (first["seconds"], second["seconds"]) == (pytest.approx(10.5), pytest.approx(10))
    # A step in between in which no request was made does not lengthen the one before.
    far = [replace(row, step_start=START + 30) for row in late]
    assert summarise(ROWS[:10] + far)["steps"][0]["seconds"] == pytest.approx(10)


@pytest.mark.parametrize(("share", "value"), [(0.5, 2), (0.75, 3), (0.76, 4), (1, 4), (0, 1)])
def test_percentiles_are_real_samples(share: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], share) == value


def test_the_interval_of_the_p95_holds_it() -> None:
    """Of many runs from a known distribution, 95 % and a little hold the true p95."""
    dice = random.Random(7)
    held = 0
    for _ in range(200):
        rows = [sample(0.01 * n, 1000 * dice.random()) for n in range(100)]
        latency = summarise(rows)["total"]["latency_ms"]
        held += latency["p95_low"] <= 950 <= latency["p95_high"]
    assert 0.92 <= held / 200 <= 0.995
    few = summarise(ROWS[:10])["total"]["latency_ms"]
    assert few["p95_high"] is None, "ten samples cannot say how bad it gets"


@pytest.mark.parametrize(("freedom", "t"), [(9, 2.2622), (15, 2.1314), (100, 1.9840)])
def test_the_average_of_few_is_less_certain(freedom: int, t: float) -> None:
    assert _student(freedom) == pytest.approx(t, abs=1e-3)


def shown(rows: list[Sample]) -> str:
    """The tables, as text."""
    with io.StringIO() as file:
        render(summarise(rows), FARM, Console(file=file, width=100))
        return file.getvalue()


def test_no_interval_is_below_zero_or_of_a_handful() -> None:
    skewed = [sample(n / 10, 1 + n / 1000) for n in range(19)] + [sample(2, 9000)]
    latency = summarise(skewed)["total"]["latency_ms"]
    assert latency["average"] < latency["average_plus_minus"]
    assert " 0 – 1393" in shown(skewed)
    assert summarise(skewed[:9])["total"]["latency_ms"]["average_plus_minus"] is None
    few = [line for line in shown(skewed[:9]).splitlines() if line.strip().startswith("1 ")]
    assert few[1].split()[1:4] == ["?", "–", "?"]


def test_a_stream_names_its_figures_in_full() -> None:
    rows = [sample(n / 10, 100 + n, kind="stream", real_time_factor=None) for n in range(20)]
    table = shown(rows)
    assert "real-time factor, waiting included (latency per audio second): avg" in table
    assert "real-time factor (inference" not in table


def test_thresholds_use_the_figures_of_the_table() -> None:
    names = ("latency_ms", "failure_share", "refused_share", "real_time_factor")
    options = argparse.Namespace(**{f"max_{name}": "" for name in names})
    figures = summarise(ROWS)["total"]
    assert judge_figures(options, figures) == []
    for name in names:
        setattr(options, f"max_{name}", "0.04")
    verdicts = judge_figures(options, figures)
    assert [verdict.held for verdict in verdicts] == [False, True, True, False]
    assert verdicts[0].value == figures["latency_ms"]["p95"]
    assert str(verdicts[1]) == "held: share of failed requests 0.03226, limit 0.04 " + (
        "(--max-failure-share)"
    )
    nothing = summarise([sample(0, 1, UNFINISHED)])["total"]
    assert not any(verdict.held for verdict in judge_figures(options, nothing))


def test_a_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    again = samples.read(tmp_path / report.SAMPLES)
    assert [row.outcome for row in again] == [row.outcome for row in ROWS]
    assert again[0].request_id == "a,b"
    assert again[0].inference_ms is None
    assert again[0].scheduled == pytest.approx(START, abs=1e-6)
    write(tmp_path / "again", again)
    first, second = tmp_path / report.SAMPLES, tmp_path / "again" / report.SAMPLES
    assert first.read_text() == second.read_text()


def test_a_report_recomputes_and_refuses_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, ROWS)
    figures = summarise(samples.read(tmp_path / report.SAMPLES))
    report.store(tmp_path, figures, FARM)
    assert report.main([str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "provider really used: CPU" in table
    assert "84.0" in table, "requests per minute"

    document = json.loads((tmp_path / report.SUMMARY).read_text())
    document["summary"]["steps"][1]["latency_ms"]["average"] *= 0.99
    (tmp_path / report.SUMMARY).write_text(json.dumps(document))
    assert report.main([str(tmp_path)]) == 1
    refusal = capsys.readouterr()
    assert refusal.out == ""
    assert refusal.err.count("\n") == 1
    assert "steps[1].latency_ms.average is stored as" in refusal.err

    # Nor may a row be taken away from below a summary that is right.
    report.store(tmp_path, figures, FARM)
    write(tmp_path, ROWS[1:])
    assert report.main([str(tmp_path)]) == 1
    assert "but the rows give" in capsys.readouterr().err


def test_differences_are_named() -> None:
    compare({"a": [1.0, None]}, {"a": [1.0 + 1e-9, None]})
    with pytest.raises(MismatchError, match=r"^b is only in the rows$"):
        compare({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(MismatchError, match=r"^a: 1 stored, but the rows give 2$"):
        compare({"a": [1]}, {"a": [1, 2]})
    with pytest.raises(MismatchError, match=r"^a is stored as None"):
        compare({"a": None}, {"a": 2})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "the column scheduled is missing"),
        ("", "the column scheduled is missing"),
        ("HEADER\n", "no samples"),
    ],
)
def test_unreadable_samples(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.csv"
    file.write_text(text.replace("HEADER", ",".join(samples.COLUMNS)))
    assert report.main([str(file)]) == 2
    assert said in capsys.readouterr().err
    assert report.main([str(tmp_path / "nowhere.csv")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_bad_value_names_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS[:2]) / report.SAMPLES
    file.write_text(
        file.read_text().replace(",speech,", ",speech,", 1).replace("200,ok", "x,ok", 1)
    )
    with pytest.raises(SamplesError, match=r":2: status is 'x'"):
        samples.read(file)
    write(tmp_path, [replace(ROWS[0], outcome="fine")])
    with pytest.raises(SamplesError, match=r"outcome is 'fine'; one of ok, refused"):
        samples.read(file)
