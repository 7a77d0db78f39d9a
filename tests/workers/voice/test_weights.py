"""Strict loading: the message of any error names the file and the key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.voice.tiny_voice import CHUNKS, CONFIG, tiny_files, tiny_model, write_voice
from workers.models.voice.weights import (
    DATA,
    FILES,
    Weights,
    WeightsError,
    dtype_of,
    load,
    parameters,
)


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as refused:
        load(folder)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_complete_folder_loads(tmp_path: Path) -> None:
    weights = load(write_voice(tmp_path))
    assert weights.dual_ar.config == CONFIG
    assert weights.chunks == CHUNKS
    assert weights.codec_decoder == tmp_path / "codec_decoder.onnx"
    assert weights.pitch.mean == pytest.approx(5.2)
    assert not weights.dual_ar.training
    assert not weights.g2p.training
    expected = tiny_model()
    for name, value in weights.dual_ar.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    assert parameters(weights.dual_ar) == parameters(expected)


def test_the_fingerprint_depends_on_every_file(tmp_path: Path) -> None:
    folder = write_voice(tmp_path)
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    (folder / "codec_decoder.onnx").write_bytes(b"another")
    assert load(folder).fingerprint != first


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    (write_voice(tmp_path) / name).unlink()
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message
    assert "No such file" in message
    assert all(file in message for file in FILES)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")


SAFETENSORS = [name for name in FILES if name.endswith(".safetensors")]


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    path = write_voice(tmp_path) / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "not a safetensors file" in message


@pytest.mark.parametrize(
    "content",
    [b"<html>not found</html>", pickle.dumps({"weight": 1}), b"\xff" * 4096],
    ids=["page", "pickle", "noise"],
)
@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_file_of_another_format(tmp_path: Path, name: str, content: bytes) -> None:
    path = write_voice(tmp_path) / name
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert str(path) in message
    assert "not a safetensors file" in message


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("dual_ar", "layers.1.attention.wqkv.weight"),
        ("dual_ar", "fast_output"),
        ("g2p", "embeddings.weight"),
        ("pitch", "pitch_book"),
        ("pitch", "pitch_stats"),
    ],
)
class TestKeys:
    def test_missing(self, tmp_path: Path, file: str, key: str) -> None:
        files = tiny_files()
        del files[file][0][key]
        message = refusal(write_voice(tmp_path, files))
        assert str(tmp_path / f"{file}.safetensors") in message
        assert f"{key} is missing" in message

    def test_of_the_wrong_shape(self, tmp_path: Path, file: str, key: str) -> None:
        files = tiny_files()
        value = files[file][0][key]
        wrong = torch.zeros(value.shape[0] + 1, *value.shape[1:])
        files[file][0][key] = wrong
        message = refusal(write_voice(tmp_path, files))
        assert str(tmp_path / f"{file}.safetensors") in message
        assert f"{key} has shape {tuple(wrong.shape)}, expected {tuple(value.shape)}" in message


@pytest.mark.parametrize("file", ["dual_ar", "g2p", "pitch"])
def test_an_unexpected_key(tmp_path: Path, file: str) -> None:
    files = tiny_files()
    files[file][0]["surprise"] = torch.zeros(2)
    message = refusal(write_voice(tmp_path, files))
    assert str(tmp_path / f"{file}.safetensors") in message
    assert "surprise is unexpected" in message


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    files = tiny_files()
    for number in range(40):
        files["dual_ar"][0][f"odd.{number}"] = torch.zeros(1)
    message = refusal(write_voice(tmp_path, files))
    assert "and 35 more" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config"),
        ("not json", "configuration"),
        ("[]", "configuration"),
        (json.dumps({**CONFIG.to_json(), "n_layers": 2}), "n_layers"),
        (json.dumps({k: v for k, v in CONFIG.to_json().items() if k != "dim"}), "dim"),
        (json.dumps({**CONFIG.to_json(), "dim": "wide"}), "dim"),
        (json.dumps({**CONFIG.to_json(), "n_layer": -1}), "n_layer"),
        (json.dumps({**CONFIG.to_json(), "n_local_heads": 3}), "n_local_heads"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, config: str | None, said: str) -> None:
    files = tiny_files()
    tensors, _ = files["dual_ar"]
    files["dual_ar"] = (tensors, {} if config is None else {"config": config})
    message = refusal(write_voice(tmp_path, files))
    assert str(tmp_path / "dual_ar.safetensors") in message
    assert said in message


@pytest.mark.parametrize("chunks", [None, "not json", "{}", '["k", 3]', '["k", "qq"]', "[]"])
def test_chunks_that_do_not_fit(tmp_path: Path, chunks: str | None) -> None:
    files = tiny_files()
    tensors, _ = files["g2p"]
    files["g2p"] = (tensors, {} if chunks is None else {"chunks": chunks})
    message = refusal(write_voice(tmp_path, files))
    assert str(tmp_path / "g2p.safetensors") in message
    assert "chunks" in message


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    files = tiny_files()
    tensors, metadata = files["dual_ar"]
    halved = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    weights = load(write_voice(tmp_path, {**files, "dual_ar": (halved, metadata)}))
    assert {p.dtype for p in weights.dual_ar.parameters()} == {torch.float32}


def test_dtypes_by_name() -> None:
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match=r"float8.*float32, bfloat16, float16"):
        dtype_of("float8")


def shipped() -> list[str]:
    return [name for name in FILES if not (DATA / name).exists()]


@pytest.mark.skipif(bool(shipped()), reason=f"the voice's folder lacks {', '.join(shipped())}")
def test_the_shipped_voice_loads_and_is_small() -> None:
    weights: Weights = load()
    config: dict[str, Any] = weights.dual_ar.config.to_json()
    assert config["num_codebooks"] >= 2
    assert sum((DATA / name).stat().st_size for name in FILES) < 38 * 2**20
