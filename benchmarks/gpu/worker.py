"""One worker process of the benchmark: JSON lines of commands on stdin, of responses on stdout.

    python -m benchmarks.gpu.worker KIND JOB

KIND is a model of ``subjects.load``, decoded in a closed loop, or ``speech``: the complete voice.
The process exits when its stdin is closed.
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
"""Frames of one request: some tens of milliseconds on a large GPU."""
Request = Callable[[int], int]
"""Serves the request with this number and returns its frames."""


def request_server(kind: str, job: Job) -> tuple[Request, dict[str, Any]]:
    """Load KIND; return the function that serves a request, and its health report."""
    if kind == "speech":
        voice, text = subjects.load_voice(job), "Ready." if job.quick else LONGEST_TEXT
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
    """Return (start, seconds, frames) of every request that began between two monotonic times."""
    time.sleep(max(0.0, begin - time.monotonic()))
    done: list[tuple[float, float, int]] = []
    while (begun := time.monotonic()) < end or not done:
        frames = request(len(done))
        done.append((begun, time.monotonic() - begun, frames))
    return done


def memory() -> dict[str, int]:
    """Return the bytes of device memory that torch's allocator holds."""
    if not torch.cuda.is_initialized():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "reserved_most": torch.cuda.max_memory_reserved(),
    }


def handle(command: dict[str, Any], request: Request) -> dict[str, Any]:
    if command["do"] == "memory":
        return memory()
    if command["do"] == "once":
        return {"frames": request(0)}
    os.sched_setaffinity(0, command["cores"])
    return {"requests": closed_loop(request, command["begin"], command["end"])}


def exit_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    """Exit between two frames: an MPS client must not be killed with work on the device."""
    raise SystemExit(0)


def main() -> None:
    # Output that a library prints must not mix with responses.
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent stops it
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    torch.set_num_threads(1)
    begun = time.monotonic()
    request, health = request_server(kind, job)
    request(0)
    ready = {"ready": True, "seconds": time.monotonic() - begun, "health": health}
    print(json.dumps(ready), file=responses, flush=True)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line), request)), file=responses, flush=True)


if __name__ == "__main__":
    main()
