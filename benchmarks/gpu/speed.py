"""Frames per second, eager and graph alternating, and the device's copy bandwidth."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu import subjects
from benchmarks.gpu.job import GIB, BenchmarkError, Job, Rows
from benchmarks.gpu.subjects import GREEDY, Subject
from workers.model.contract import Work
from workers.models.voice.decoding import FrameDecoder


def synchronise(device: str) -> None:
    """Wait until the device has finished its queued work."""
    if device != "cpu":
        torch.cuda.synchronize()


def decoding(job: Job) -> Rows:
    """Yield rows of the tables ``models`` and ``speed``."""
    for name in job.models:
        subject = subjects.load(job, name, job.scale.frames)
        yield {
            "table": "models",
            "model": name,
            "parameters": subject.parameters,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "weights": subject.fingerprint,
            "frames": job.scale.frames,
        }
        yield from _alternate(job, subject)


def _alternate(job: Job, subject: Subject) -> Rows:
    device = torch.device(job.device)
    graph = FrameDecoder(subject.model, device, subject.dtype)
    graph.warm_up()
    if job.on_gpu and graph.engine.kind != "cuda-graph":
        raise BenchmarkError(f"graphs are not captured: the engine is {graph.engine.kind}")
    eager = FrameDecoder(subject.model, device, subject.dtype)
    with torch.inference_mode():
        eager.engine.warm_up()
    frames = len(subject.conditions)
    read = sum(graph.frame_bytes(i) for i in range(1, frames)) / (frames - 1)
    for number in range(-1, job.scale.rounds):
        for mode, decoder in (("eager", eager), ("graph", graph)):
            seconds, whole = _time(decoder, subject, job.device)
            if number < 0:  # the first of each is a warm-up
                continue
            yield {
                "table": "speed",
                "model": subject.name,
                "mode": mode,
                "engine": decoder.engine.kind,
                "round": number,
                "frames": frames - 1,
                "seconds": seconds,
                "sentence_seconds": whole,
                "frames_per_second": (frames - 1) / seconds,
                "codes_per_second": (frames - 1) / seconds * subject.model.config.num_codebooks,
                "bytes_per_frame": read,
            }


def _time(decoder: FrameDecoder, subject: Subject, device: str) -> tuple[float, float]:
    """Return seconds of all frames but the first, and of the sentence with drawing its noise."""
    synchronise(device)
    begun = time.perf_counter()
    frames = decoder.decode(subject.conditions, GREEDY, 1, Work())
    next(frames)
    synchronise(device)
    first = time.perf_counter()
    for _ in frames:
        pass
    synchronise(device)
    ended = time.perf_counter()
    return ended - first, ended - begun


def copying(job: Job) -> Rows:
    """Yield rows of the table ``bandwidth``: bytes read and written by a copy on the device."""
    size = job.scale.copied
    if job.on_gpu:
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
        if size < GIB // 16:
            raise BenchmarkError(
                f"free device memory is too small for copies: {4 * size} bytes; "
                "stop other processes on the device"
            )
    source = torch.ones(size, dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    for number in range(job.scale.copies):
        synchronise(job.device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronise(job.device)
        seconds = time.perf_counter() - begun
        yield {
            "table": "bandwidth",
            "round": number,
            "bytes": 2 * size,
            "seconds": seconds,
            "bytes_per_second": 2 * size / seconds,
        }
