"""The fidelity command: what it measures, its errors, and that it notices a difference."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks import fidelity
from benchmarks.fidelity import REORDERED, Reference, Row, codec_in_torch
from benchmarks.scores import Decoded, compare, decode, joined
from tests.repository import REPOSITORY
from tests.workers.voice.tiny_voice import one_thread, tiny_conditions, tiny_model
from workers.models.voice.speech import Voice
from workers.models.voice.weights import DATA, FILES

FOLDER = Path(os.environ.get("GPUFARM_TEST_VOICE", DATA))
MISSING = [name for name in FILES if not (FOLDER / name).exists()]
shipped = pytest.mark.skipif(bool(MISSING), reason=f"{FOLDER} lacks {', '.join(MISSING)}")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def narrow() -> Iterator[None]:
    with one_thread():
        yield


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.fidelity", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@shipped
def test_a_cpu_is_measured() -> None:
    done = command("--weights", str(FOLDER), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["device"] == "cpu"
    assert report["holds"] is True
    rows = {(row["compared"], row["against"]): row for row in report["rows"]}
    assert rows.pop(("graph", "eager"))["skipped"] == "no graphs on a CPU"
    assert {
        ("step by step", "whole sentence"),
        ("ONNX on cpu", "torch on cpu"),
        ("eager bfloat16", "eager float32"),
        ("eager float16", "eager float32"),
    } == set(rows)
    for row in rows.values():
        assert row["n"] > 0
        assert row["required"] <= row["cosine_least"] <= row["cosine_mean"] <= 1 + 1e-6
        assert row["difference_most"] >= 0
    # Single and half precision differ; comparing a decoding with itself would give 0.
    assert rows["eager bfloat16", "eager float32"]["difference_most"] > 0


def tiny_references(seed: int = 0, frames: int = 24) -> list[Reference]:
    """Two sentences as a tiny model decodes them."""
    decoder = fidelity.decoder_of(tiny_model(seed), CPU, "float32")
    conditions = [tiny_conditions(frames, seed=number) for number in (1, 2)]
    symbols, sign = torch.tensor([[3, 5, 7]]), torch.tensor([0])
    return [Reference(symbols, sign, c, decode(decoder, c, fidelity.GREEDY)) for c in conditions]


class Speaker:
    """The attributes of a voice that comparisons of scores read."""

    def __init__(self, seed: int = 0) -> None:
        self.device = CPU
        self.weights = self
        self.dual_ar = tiny_model(seed)


def test_steps_agree_with_the_whole_sentence() -> None:
    (row,) = fidelity.steps(Speaker(), tiny_references())  # type: ignore[arg-type]
    assert row.holds
    assert row.n == 2 * 24 * 5
    assert row.difference_most is not None
    assert row.difference_most < 1e-3


def test_another_network_is_noticed() -> None:
    (row,) = fidelity.steps(Speaker(seed=1), tiny_references(seed=0))  # type: ignore[arg-type]
    assert not row.holds


def test_a_small_change_is_noticed() -> None:
    speaker = Speaker()
    with torch.no_grad():
        speaker.dual_ar.layers[0].feed_forward.w1.weight *= 1.05  # type: ignore[union-attr, operator]
    (row,) = fidelity.steps(speaker, tiny_references())  # type: ignore[arg-type]
    assert not row.holds


def test_captured_and_eager_decoding_are_compared_greedy_and_sampled() -> None:
    conditions = [tiny_conditions(24, seed=number) for number in (1, 2)]
    rows = list(fidelity.graph_against_eager(tiny_model(), CPU, "float32", conditions))
    assert [row.against for row in rows] == [
        "eager float32 at temperature 0",
        "eager float32 at temperature 0.8",
    ]
    for row in rows:
        assert row.holds
        assert row.codes_equal == row.codes == 2 * 24 * 5
        assert row.n == row.codes


def test_a_code_that_differs_does_not_hold() -> None:
    row = Row("a", "b", "scores", 12, 1.0, 1.0, 0.0, REORDERED, codes=12, codes_equal=11)
    assert not row.holds
    assert "11/12" in fidelity.table([row])


def test_scores_are_compared_up_to_the_first_code_that_differs() -> None:
    decoded = tiny_references()[0].decoded
    codes = decoded.codes.clone()
    codes[3, 1] += 1
    difference = compare(decoded, Decoded(decoded.scores, codes))
    assert difference.scores == 24 * 5 - 3
    assert difference.difference_most == 0


def test_half_precision_is_near() -> None:
    rows = list(fidelity.halves(Speaker(), tiny_references()))  # type: ignore[arg-type]
    assert [row.compared for row in rows] == ["eager bfloat16"] * 2 + ["eager float16"] * 2
    for row in rows:
        assert row.n > 0
        assert row.cosine_mean is not None
        assert row.cosine_mean > 0.9
    scores = [row.difference_most or 0.0 for row in rows[::2]]
    assert scores[0] > scores[1] > 0, "bfloat16 has fewer digits than float16"


def test_the_compared_model_is_unchanged() -> None:
    speaker = Speaker()
    before = copy.deepcopy(speaker.dual_ar.state_dict())
    list(fidelity.halves(speaker, tiny_references()))  # type: ignore[arg-type]
    for name, value in speaker.dual_ar.state_dict().items():
        assert torch.equal(value, before[name])


def test_decoded_scores_are_not_overwritten_by_the_next_sentence() -> None:
    first, second = tiny_references()
    assert not torch.equal(first.decoded.scores, second.decoded.scores)
    decoder = fidelity.decoder_of(tiny_model(), CPU, "float32")
    alone = decode(decoder, first.conditions, fidelity.GREEDY)
    assert torch.equal(first.decoded.scores, alone.scores)


@pytest.fixture(scope="module")
def voice() -> Voice:
    made = Voice(weights=str(FOLDER), dtype="float32")
    made.setup("cpu")
    return made


def short_reference(voice: Voice) -> list[Reference]:
    return fidelity.decode_references(voice, ("Hello.",))


@shipped
def test_onnx_agrees_with_torch_and_the_voice_keeps_its_engine(voice: Voice) -> None:
    engine = voice.codec
    (row,) = fidelity.codecs(voice, short_reference(voice))
    assert row.holds
    assert row.n >= 2
    assert voice.codec is engine


@shipped
def test_another_codec_is_noticed(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    network = codec_in_torch(voice.weights.codec_decoder)
    with torch.no_grad():
        network.mel_mean += 0.5
        network.leave.weight *= 3
    monkeypatch.setattr(fidelity, "codec_in_torch", lambda path: network)
    (row,) = fidelity.codecs(voice, short_reference(voice))
    assert not row.holds


@shipped
def test_without_the_onnx_package_the_comparison_is_skipped(
    voice: Voice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    (row,) = fidelity.codecs(voice, short_reference(voice))
    assert row.skipped == "the onnx package is not installed"
    assert row.holds


def test_a_graph_without_the_constants_is_reported(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(LookupError, match=r"other\.onnx has no constant named 'mel_books'"):
        codec_in_torch(tmp_path / "other.onnx")


def test_the_table_shows_counts_and_verdicts() -> None:
    rows = [
        Row("a", "b", "scores", 12, 0.99995, 1.0, 0.25, REORDERED),
        Row("c", "d", "scores", 3, 0.5, 0.75, 9.0, REORDERED),
        Row("e", "f", "samples", skipped="no graphs"),
    ]
    head, good, bad, none = fidelity.table(rows).splitlines()
    assert "least cosine" in head
    assert good.split() == [
        "a",
        "b",
        "scores",
        "12",
        *["0.999950", "1.000000", "0.25", "0.9999", "yes"],
    ]
    assert bad.endswith("NO")
    assert none.endswith("no graphs")


@shipped
@pytest.mark.parametrize(("cosine", "code"), [(0.9999, 0), (0.99, 1), (float("nan"), 1)])
def test_the_exit_code_is_1_below_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cosine: float, code: int
) -> None:
    row = Row("a", "b", "scores", 1, cosine, cosine, 0.1, 0.999)
    monkeypatch.setattr(fidelity, "measure", lambda voice: iter([row]))
    monkeypatch.setattr(sys, "argv", ["fidelity", "--weights", str(FOLDER)])
    assert fidelity.main() == code
    assert ("NO" in capsys.readouterr().out) == bool(code)


def error_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["fidelity", *arguments])
    assert fidelity.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


def test_missing_weights_get_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = error_line(monkeypatch, capsys, "--weights", str(tmp_path))
    assert str(tmp_path / FILES[0]) in line


@shipped
@pytest.mark.parametrize("device", ["cuda:0", "banana"])
def test_a_missing_device_gets_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    line = error_line(monkeypatch, capsys, "--weights", str(FOLDER), "--device", device)
    assert "CUDA" in line or device in line


def test_joining_keeps_every_frame() -> None:
    parts = [s.decoded for s in tiny_references(frames=6)]
    complete = joined(parts)
    assert isinstance(complete, Decoded)
    assert torch.equal(complete.codes[6:], parts[1].codes)
    assert torch.equal(complete.scores[:6], parts[0].scores)
