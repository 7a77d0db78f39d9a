"""Input that cannot be spoken in time is rejected with the numbers, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.harness import WorkerProcess
from workers.errors import ApiError
from workers.model.contract import SpeechRequest
from workers.queueing.deadline import TimeLimit
from workers.queueing.speech_rate import MIN_REQUESTS, SpeechRate

MINUTE = TimeLimit(60, "")


def speech(characters: int, speed: float = 1.0) -> SpeechRequest:
    return SpeechRequest("x" * characters, "v", speed)


def measured(*requests: tuple[SpeechRequest, float]) -> SpeechRate:
    speech_rate = SpeechRate()
    for request, seconds in requests * MIN_REQUESTS:
        speech_rate.add(request, seconds)
    return speech_rate


def test_rejection_has_the_numbers() -> None:
    speech_rate = measured((speech(1), 0.0), (speech(1000), 12.0))
    speech_rate.check(speech(4999), MINUTE)
    with pytest.raises(ApiError) as refused:
        speech_rate.check(speech(16000), MINUTE)
    assert refused.value.status == 400
    assert refused.value.message == (
        "input is too long: 16000 characters would take about 192 s at the measured 12 ms per "
        "character, and the limit is 60 s (workers.request_timeout); shorten the input, or raise "
        "the limit."
    )


def test_nothing_is_rejected_before_enough_measurements() -> None:
    speech_rate = SpeechRate()
    for _ in range(MIN_REQUESTS - 1):
        speech_rate.add(speech(1000), 50.0)
    speech_rate.check(speech(16000), MINUTE)


def test_fixed_cost_does_not_count_per_character() -> None:
    """Half a second each, and a millisecond a character: 16,000 take 16.5 s, not 216."""
    speech_rate = measured((speech(2), 0.502), (speech(40), 0.54))
    speech_rate.check(speech(16000), MINUTE)
    assert speech_rate.rate() == pytest.approx(0.001, rel=0.1)


def test_rate_is_that_of_fast_requests() -> None:
    """As when most of them met a busy machine."""
    fast, slow = (speech(1000), 1.0), (speech(1000), 30.0)
    measured(fast, *[slow] * 5).check(speech(16000), MINUTE)


@pytest.mark.parametrize("costs_by_length", [True, False])
@pytest.mark.parametrize("spoken", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("asked", [0.25, 1.0, 4.0])
def test_speed_never_rejects_a_feasible_request(
    costs_by_length: bool, spoken: float, asked: float
) -> None:
    """Whether the model's cost depends on how long the speech is, or on the text alone."""

    def cost(request: SpeechRequest) -> float:
        share = 1 / request.speed if costs_by_length else 1.0
        return 0.01 * len(request.input) * share

    request = speech(1000, spoken)
    speech_rate = measured((request, cost(request)))
    longest = 1
    while cost(speech(longest * 2, asked)) < 60:
        longest *= 2
    speech_rate.check(speech(longest, asked), MINUTE)


def test_worker_rejects_input_measured_as_too_long(tmp_path: Path) -> None:
    with WorkerProcess(
        tmp_path,
        "tests.workers.models.speech:Steady",
        {"fixed": 0.01, "each": 0.001},
        spec={"request_timeout": 8.0},
    ) as worker:

        def spoken(characters: int) -> int:
            body = {"input": "x" * characters, "response_format": "pcm"}
            answer = worker.client.post("/v1/audio/speech", json=body)
            if answer.status_code == 400:
                message = answer.json()["error"]["message"]
                assert "input is too long: 16000 characters would take about" in message
                assert "8 s (workers.request_timeout)" in message
            return answer.status_code

        assert [spoken(size) for size in (1, *[100] * MIN_REQUESTS)] == [200] * (MIN_REQUESTS + 1)
        assert spoken(16000) == 400
        assert spoken(2000) == 200
