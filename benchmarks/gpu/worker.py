"""One worker process of the proof: a line of JSON on stdin is an order, one on stdout its answer.

    python -m benchmarks.gpu.worker KIND JOB

KIND is a model of ``subjects.load``, decoded in a closed loop, or ``speech``: the whole voice.
It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu import subjects
from benchmarks.gpu.job import Job
from benchmarks.gpu.subjects import GREEDY
from workers.model.contract import SpeechRequest, Work
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.speech import LONGEST_TEXT

REQUEST_FRAMES = {"voice": 80, "large": 32}
"""Of one request: what takes some tens of milliseconds on a large GPU."""
Request = Callable[[int], int]
"""Serves the request with this number; its frames."""


def server_of(kind: str, job: Job) -> tuple[Request, dict[str, Any]]:
    """What serves a request, and what is told of it."""
    if kind == "speech":
        voice, text = subjects.whole_voice(job), "Ready." if job.quick else LONGEST_TEXT
        voice.decoder.warm_up()

        def speak(seed: int) -> int:
            before = voice.decoder.frames_decoded
            for _ in voice.speak(SpeechRequest(text, voice.voices[0], seed=seed)):
                pass
            return voice.decoder.frames_decoded - before

        return speak, voice.health()
    frames = 8 if job.quick else REQUEST_FRAMES[kind]
    subject = subjects.load(job, kind, frames)
    decoder = FrameDecoder(subject.model, torch.device(job.device), subject.dtype)
    decoder.warm_up()

    def decode(seed: int) -> int:
        *_, codes = decoder.decode(subject.conditions, GREEDY, seed, Work())
        return len(codes.cpu())  # waits for the device, as a caller does

    return decode, {"engine": decoder.engine.kind, "frames": frames}


def closed_loop(request: Request, begin: float, end: float) -> list[tuple[float, float, int]]:
    """(begun, seconds, frames) of every request that began between two monotonic times."""
    time.sleep(max(0.0, begin - time.monotonic()))
    done: list[tuple[float, float, int]] = []
    while (begun := time.monotonic()) < end or not done:
        frames = request(len(done))
        done.append((begun, time.monotonic() - begun, frames))
    return done


def memory() -> dict[str, int]:
    """What torch's allocator has taken of the device, in bytes."""
    if not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "reserved_most": torch.cuda.max_memory_reserved(),
    }


def obey(order: dict[str, Any], request: Request) -> dict[str, Any]:
    if order["do"] == "memory":
        return memory()
    if order["do"] == "once":
        return {"frames": request(0)}
    os.sched_setaffinity(0, order["cores"])
    return {"requests": closed_loop(request, order["begin"], order["end"])}


def leave(_number: int, _frame: FrameType | None) -> None:
    """Between two frames: a client of MPS must not be struck dead with work on the device."""
    raise SystemExit(0)


def main() -> None:
    # What a library prints is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    torch.set_num_threads(1)
    begun = time.monotonic()
    request, told = server_of(kind, job)
    request(0)
    ready = {"ready": True, "seconds": time.monotonic() - begun, "told": told}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
