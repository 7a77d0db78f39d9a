"""The demo voice in this process: chunks, seeds, speed, refusals, cancelling."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.voice.tiny_voice import one_thread
from workers.model.contract import Audio, Cancelled, InvalidRequest, SpeechRequest, Work
from workers.models.voice import text
from workers.models.voice.speech import CHUNKS, CONTEXT, FRAME, LONGEST_TEXT, Voice
from workers.models.voice.weights import DATA, FILES

FOLDER = Path(os.environ.get("GPUFARM_TEST_VOICE", DATA))
"""Folder of the tested voice: the shipped one unless the variable names another."""
MISSING = [name for name in FILES if not (FOLDER / name).exists()]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{FOLDER} lacks {', '.join(MISSING)}")

SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def voice() -> Iterator[Voice]:
    with one_thread():
        made = Voice(weights=str(FOLDER))
        made.setup("cpu")
        yield made


def request(
    text: str = "Hello there.",
    *,
    speed: float = 1.0,
    seed: int | None = 1,
    work: Work | None = None,
    **extra: Any,
) -> SpeechRequest:
    return SpeechRequest(text, "slt", speed=speed, seed=seed, extra=extra, work=work or Work())


def samples(voice: Voice, text: str = "Hello there.", **options: Any) -> Audio:
    return np.concatenate(list(voice.speak(request(text, **options))))


def test_it_speaks(voice: Voice) -> None:
    found = samples(voice, SENTENCE)
    assert found.dtype == np.float32
    assert found.ndim == 1
    assert len(found) % FRAME == 0
    # A reader takes two to four seconds for it.
    assert 1.5 < len(found) / voice.sample_rate < 6
    assert float(np.abs(found).max()) <= 1.0
    loud = np.sqrt(np.mean(found.reshape(-1, FRAME) ** 2, axis=1))
    assert float(loud.max()) > 0.02, "speech is louder than this"
    assert float(loud.max()) > 10 * float(loud.min()), "and has pauses"


def test_audio_leaves_before_the_last_frame_is_decoded(voice: Voice) -> None:
    before = voice.decoder.frames_decoded
    chunks, decoded = [], []
    for chunk in voice.speak(request(SENTENCE)):
        chunks.append(len(chunk) // FRAME)
        decoded.append(voice.decoder.frames_decoded - before)
    assert len(chunks) >= 4
    assert decoded[0] == CHUNKS[0] + CONTEXT < decoded[-1] == sum(chunks)
    assert decoded == sorted(decoded)
    assert chunks[:3] == list(CHUNKS)


def test_chunks_join_to_the_complete_speech(voice: Voice) -> None:
    """Waiting between chunks, and other callers' sentences before, change no sample."""
    complete = samples(voice, SENTENCE)
    samples(voice, "Something else.", seed=7, temperature=0.9)
    streamed = [chunk.copy() for chunk in voice.speak(request(SENTENCE))]
    assert np.array_equal(np.concatenate(streamed), complete)


def test_seams_between_chunks_cannot_be_heard(voice: Voice) -> None:
    """Against the codec's decoder run on the whole sentence at once."""
    (sentence,) = text.sentences(SENTENCE, voice.g2p)
    conditions = voice._conditions(sentence, 1.0)
    for codes in voice.decoder.decode(conditions, voice.sampling, 5, Work()):
        known = codes
    frames = len(known)
    noise = np.random.default_rng(5).standard_normal(frames * FRAME, dtype=np.float32)
    complete = voice._chunk(known.numpy(), noise, 0, frames)
    cut = np.concatenate(list(voice.samples(iter([known]), frames, 5, Work())))
    wrong = np.sqrt(np.mean((complete - cut) ** 2)) / np.sqrt(np.mean(complete**2))
    assert wrong < 0.03, f"{wrong:.4f} of the speech's amplitude"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_seed_gives_the_same_samples(voice: Voice, temperature: float) -> None:
    other = Voice(weights=str(FOLDER), temperature=temperature)
    other.setup("cpu")
    other.warm_up()
    first = samples(voice, temperature=temperature, seed=11)
    assert np.array_equal(first, samples(other, seed=11))


def test_another_seed_gives_other_samples(voice: Voice) -> None:
    first, second = (samples(voice, seed=seed, temperature=0.8) for seed in (1, 2))
    assert len(first) == len(second), "the length is decided before sampling"
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("seed", [None, 0, -1, 2**63 - 1, -(2**63)])
def test_any_seed_speaks(voice: Voice, seed: int | None) -> None:
    assert len(samples(voice, "Hi.", seed=seed, temperature=0.5))


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
def test_speed_changes_the_length_in_proportion(voice: Voice, speed: float) -> None:
    (sentence,) = text.sentences(SENTENCE, voice.g2p)
    usual, changed = (len(voice._conditions(sentence, s)) for s in (1.0, speed))
    assert changed == pytest.approx(usual / speed, abs=1 + 1 / speed)


def test_fast_speech_is_short(voice: Voice) -> None:
    assert len(samples(voice, speed=4.0)) < 0.4 * len(samples(voice))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        pytest.param("temperature", 10**400, id="temperature-huge"),
        pytest.param("temperature", [0.5] * 10_000, id="temperature-list"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
    ],
)
def test_settings_out_of_range_are_refused(voice: Voice, name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} = .*must be a number from") as refused:
        next(voice.speak(request(**{name: value})))
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["", "   ", "🎉🚀", "...", "''"])
def test_what_cannot_be_spoken_is_refused(voice: Voice, text: str) -> None:
    with pytest.raises(InvalidRequest, match="letters or digits"):
        next(voice.speak(request(text)))


LONG = {
    "10,000 characters": (SENTENCE + " ") * 223,
    "10,000 digits": "7" * 10_000,
    "10,000 characters without a stop": "one more and " * 770,
    "a word of 4 KB": "x" * 4096,
    "a word of 4 KB with apostrophes": "x'y'" * 1024,
    "10,000 letters that are words": "a " * 5000,
}


@pytest.mark.parametrize("name", LONG)
def test_long_input_streams_at_once_and_can_be_cancelled(voice: Voice, name: str) -> None:
    work = Work()
    chunks = voice.speak(request(LONG[name][:10_000], work=work, seed=3))
    assert all(len(chunk) for chunk in itertools.islice(chunks, 2))
    before = voice.decoder.frames_decoded
    work.cancel()
    with pytest.raises(Cancelled):
        next(chunks)
    assert voice.decoder.frames_decoded == before


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("speed", [0.25, 1.0, 4.0])
def test_no_sentence_outgrows_the_decoder(voice: Voice, name: str, speed: float) -> None:
    most = voice.weights.dual_ar.config.max_seq_len
    longest = int(text.MAX_SENTENCE_LETTERS * min(1.0, speed))
    found = text.sentences(LONG[name][:10_000], voice.g2p, longest)
    # Sentences of like text are of like length: the longest few and some of the others.
    found.sort(key=lambda sentence: len(sentence.phones), reverse=True)
    for sentence in [*found[:3], *found[3::40]]:
        assert 1 <= len(voice._conditions(sentence, speed)) <= most


def test_cancelling_within_a_sentence(voice: Voice) -> None:
    work = Work()
    chunks = voice.speak(request(SENTENCE, work=work))
    next(chunks)
    before = voice.decoder.frames_decoded
    work.cancel()
    with pytest.raises(Cancelled):
        next(chunks)
    assert voice.decoder.frames_decoded == before


def test_a_request_cancelled_before_it_began_decodes_nothing(voice: Voice) -> None:
    before = voice.decoder.frames_decoded
    with pytest.raises(Cancelled):
        next(voice.speak(request(work=Work(deadline=0.0))))
    assert voice.decoder.frames_decoded == before


def test_a_closed_stream_does_not_affect_the_next_request(voice: Voice) -> None:
    complete = samples(voice)
    chunks = voice.speak(request(SENTENCE))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert np.array_equal(samples(voice), complete)


def test_time_is_reported_by_stage(voice: Voice) -> None:
    work = Work()
    list(voice.speak(request(work=work)))
    assert set(work.stages) == {"text", "decoder", "codec"}
    assert all(seconds > 0 for seconds in work.stages.values())


def test_health_reports_what_runs(voice: Voice) -> None:
    samples(voice)
    health = voice.health()
    assert health["device"] == "cpu"
    assert health["dtype"] == "float32"
    assert health["engine"] == "eager"
    assert health["provider"] == "cpu"
    assert set(health["codec_decoder"]["nodes"]) == {"cpu"}
    assert health["decoder"]["frames"] > 0
    assert health["decoder"]["bytes_read"] > health["decoder"]["frames"] * 2**20
    assert health["decoder"]["seconds"] > 0


def test_the_longest_request_can_be_spoken(voice: Voice) -> None:
    body = voice.longest_request()["json"]
    assert body["input"] == LONGEST_TEXT
    assert next(voice.speak(request(body["input"], speed=0.5))).size > 0


def test_defaults_out_of_range_fail_the_start() -> None:
    with pytest.raises(ValueError, match="temperature = 9: must be a number from"):
        Voice(temperature=9)


def test_a_dtype_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match='dtype is unknown: "int3"'):
        Voice(weights=str(FOLDER), dtype="int3").setup("cpu")
