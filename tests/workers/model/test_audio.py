"""Audio encoding: every format, complete and in chunks, at every rate."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from workers.model.audio import CONTENT_TYPES, PROGRESSIVE, encode, encoder, samples, writable_rate
from workers.model.contract import Audio
from workers.model.resampling import Resampler


def tone(rate: int, seconds: float = 1.0, pitch: float = 440.0) -> Audio:
    times = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def cut(audio: Audio, size: int = 1111) -> list[Audio]:
    return [audio[begin : begin + size] for begin in range(0, len(audio), size)]


def pitch_of(audio: Audio, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    return float(np.argmax(spectrum) * rate / len(audio))


@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 96000])
@pytest.mark.parametrize("name", sorted(set(CONTENT_TYPES) - {"pcm"}))
@pytest.mark.parametrize("progressive", [False, True])
def test_every_format_decodes_to_the_same_tone(name: str, rate: int, progressive: bool) -> None:
    chunks = cut(tone(rate))
    if progressive:
        writer = encoder(rate, name)
        body = b"".join([*map(writer.feed, chunks), writer.finish()])
    else:
        body = encode(chunks, rate, name)
    read, read_rate = soundfile.read(io.BytesIO(body), dtype="float32")
    assert read_rate == writable_rate(rate, name)
    # an mp3 whose length was not known when its head left ends with a few frames of silence
    assert 1.0 <= len(read) / read_rate < (1.2 if name == "mp3" else 1.001)
    middle = read[read_rate // 10 : read_rate * 9 // 10]  # a codec rings where a tone is cut off
    assert pitch_of(middle, read_rate) == pytest.approx(440, abs=3)
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", sorted(PROGRESSIVE))
def test_progressive_formats_return_bytes_before_the_end(name: str) -> None:
    writer = encoder(24000, name)
    pieces = [writer.feed(chunk) for chunk in cut(tone(24000, 4.0))]
    pieces.append(writer.finish())
    assert sum(map(bool, pieces[:-1])) >= 2
    assert sum(map(len, pieces[:-1])) > sum(map(len, pieces)) / 4


def test_pcm_is_little_endian_and_clipped() -> None:
    chunk = np.array([0, 1, -1, 0.5, 7, -7], np.float32)
    values = struct.unpack("<6h", encode([chunk], 24000, "pcm"))
    assert values == (0, 32767, -32767, 16384, 32767, -32767)


def test_pcm_does_not_depend_on_the_cut() -> None:
    for rate in (16000, 24000):
        audio = tone(rate)
        assert encode([audio], rate, "pcm") == encode(cut(audio, 7), rate, "pcm")


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
def test_pcm_is_always_24_khz(rate: int) -> None:
    """It states no rate, and OpenAI's clients play it at this one."""
    assert writable_rate(rate, "pcm") == 24000
    read = np.frombuffer(encode(cut(tone(rate)), rate, "pcm"), "<i2").astype(np.float32)
    assert len(read) == 24000
    assert pitch_of(read, 24000) == pytest.approx(440, abs=1)


def test_wav_header_has_the_length_unless_streamed() -> None:
    audio = tone(16000)
    complete = encode([audio], 16000, "wav")
    assert struct.unpack("<I", complete[4:8])[0] == len(complete) - 8
    assert struct.unpack("<I", complete[40:44])[0] == 2 * len(audio)
    writer = encoder(16000, "wav")
    streamed = writer.feed(audio) + writer.finish()
    assert struct.unpack("<I", streamed[40:44])[0] == 0xFFFFFFFF
    assert streamed[44:] == complete[44:]


@pytest.mark.parametrize(
    ("rate", "target"), [(22050, 24000), (44100, 48000), (96000, 48000), (11025, 12000), (7, 8)]
)
def test_resampling_does_not_depend_on_the_cut(rate: int, target: int) -> None:
    audio = np.random.default_rng(0).standard_normal(3 * rate).astype(np.float32)
    results = []
    for size in (len(audio), 1, 313):
        resampler = Resampler(rate, target)
        parts = [resampler.feed(chunk) for chunk in cut(audio, size)]
        results.append(np.concatenate([*parts, resampler.finish()]))
    assert len(results[0]) == 3 * target
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_resampling_keeps_a_tone_and_drops_frequencies_above_nyquist() -> None:
    resampler = Resampler(22050, 24000)
    out = np.concatenate([resampler.feed(tone(22050)), resampler.finish()])
    assert np.abs(out - tone(24000))[300:-300].max() < 1e-3
    resampler = Resampler(96000, 48000)
    out = np.concatenate([resampler.feed(tone(96000, pitch=40000)), resampler.finish()])
    assert np.abs(out)[300:-300].max() < 1e-2


def test_chunks_are_checked() -> None:
    assert samples(np.zeros((1, 4), np.float64)).shape == (4,)
    assert samples([0.0, 0.5]).dtype == np.float32
    with pytest.raises(ValueError, match="must be finite"):
        samples(np.array([0.0, np.nan], np.float32))
    with pytest.raises(ValueError, match="mono"):
        samples(np.zeros((2, 4), np.float32))
    with pytest.raises(TypeError, match="int16"):
        samples(np.zeros(4, np.int16))


def test_tensors_are_chunks() -> None:
    torch = pytest.importorskip("torch")
    assert samples(torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32
