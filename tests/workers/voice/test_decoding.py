"""Frame by frame over static buffers, against the network that sees the whole sentence at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.scores import whole_sentence
from tests.workers.voice.tiny_voice import CONFIG, one_thread, tiny_conditions, tiny_model
from workers.engines.cuda_graph import GraphEngine
from workers.model.contract import Cancelled, Work
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.dual_ar import DualAR
from workers.models.voice.sampling import Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.8)


@pytest.fixture(autouse=True, scope="module")
def narrow() -> Iterator[None]:
    with one_thread():
        yield


def decoder_of(model: DualAR | None = None, dtype: torch.dtype = torch.float32) -> FrameDecoder:
    return FrameDecoder(model or tiny_model(), CPU, dtype)


def decode(
    decoder: FrameDecoder, conditions: Tensor, sampling: Sampling = GREEDY, seed: int = 0
) -> Tensor:
    """(frames, num_codebooks)."""
    codes = torch.empty(0)
    for known in decoder.decode(conditions, sampling, seed, Work()):
        codes = known
    return codes.clone()


@pytest.mark.parametrize("seed", range(4))
def test_step_by_step_picks_what_the_whole_sentence_scores_highest(seed: int) -> None:
    model = tiny_model(seed)
    conditions = tiny_conditions(40, seed)
    codes = decode(decoder_of(model), conditions)
    assert codes.shape == (40, CONFIG.num_codebooks)
    assert len(codes.unique(dim=0)) > 20, "a constant output would prove nothing"
    assert torch.equal(whole_sentence(model, conditions, codes).argmax(-1), codes)


def test_it_agrees_across_a_change_of_buckets() -> None:
    model, conditions = tiny_model(), tiny_conditions(140)
    codes = decode(decoder_of(model), conditions)
    assert torch.equal(whole_sentence(model, conditions, codes).argmax(-1), codes)


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_buckets_do_not_change_the_result(sampling: Sampling) -> None:
    conditions = tiny_conditions(40)
    usual = decode(decoder_of(), conditions, sampling)
    for buckets in ([300], [8, 300], [1, 2, 3, 39, 300]):
        decoder = decoder_of()
        decoder.engine = GraphEngine(decoder.engine.step, buckets, CPU)
        assert torch.equal(decode(decoder, conditions, sampling), usual)


def test_warming_up_does_not_change_the_result() -> None:
    conditions = tiny_conditions(20)
    cold, warm = decoder_of(), decoder_of()
    warm.warm_up()
    assert torch.equal(decode(warm, conditions), decode(cold, conditions))


def test_a_sentence_does_not_affect_the_next() -> None:
    decoder = decoder_of()
    first = decode(decoder, tiny_conditions(30, seed=1), WARM, seed=1)
    decode(decoder, tiny_conditions(60, seed=2), WARM, seed=2)
    assert torch.equal(decode(decoder, tiny_conditions(30, seed=1), WARM, seed=1), first)


def test_a_beginning_does_not_depend_on_what_follows() -> None:
    decoder, conditions = decoder_of(), tiny_conditions(50)
    assert torch.equal(decode(decoder, conditions[:20]), decode(decoder, conditions)[:20])


def test_every_frame_adds_one_and_keeps_those_before() -> None:
    seen: list[Tensor] = []
    for known in decoder_of().decode(tiny_conditions(12), GREEDY, 0, Work()):
        assert len(known) == len(seen) + 1
        if seen:
            assert torch.equal(known[:-1], seen[-1])
        seen.append(known.clone())
    assert len(seen) == 12


def test_codes_lie_in_their_books() -> None:
    codes = decode(decoder_of(), tiny_conditions(60), Sampling(2.0, 1.0), seed=3)
    assert codes.dtype == torch.int64
    assert int(codes.min()) >= 0
    assert int(codes.max()) < CONFIG.codebook_size


def test_a_seed_decides_and_only_when_warm() -> None:
    conditions = tiny_conditions(30)
    decoder = decoder_of()
    assert torch.equal(
        decode(decoder, conditions, WARM, 1), decode(decoder_of(), conditions, WARM, 1)
    )
    assert not torch.equal(
        decode(decoder, conditions, WARM, 1), decode(decoder, conditions, WARM, 2)
    )
    assert torch.equal(
        decode(decoder, conditions, GREEDY, 1), decode(decoder, conditions, GREEDY, 2)
    )


def repeated(codes: Tensor) -> float:
    """Share of codes that equal the frame's before."""
    return float((codes[1:] == codes[:-1]).float().mean())


def test_a_penalty_makes_repeating_rarer() -> None:
    conditions = tiny_conditions(1).expand(80, -1)
    free = decode(decoder_of(), conditions, Sampling(0.0, repetition_penalty=1.0))
    held = decode(decoder_of(), conditions, Sampling(0.0, repetition_penalty=2.0))
    assert repeated(held) < repeated(free)


def cancelling(decoder: FrameDecoder, work: Work, after: int) -> Iterator[int]:
    for known in decoder.decode(tiny_conditions(200), GREEDY, 0, work):
        if len(known) == after:
            work.cancel()
        yield len(known)


def test_cancelling_ends_before_the_next_frame() -> None:
    decoder = decoder_of()
    with pytest.raises(Cancelled):
        list(cancelling(decoder, Work(), after=7))
    assert decoder.frames_decoded == 7
    conditions = tiny_conditions(20)
    assert torch.equal(decode(decoder, conditions), decode(decoder_of(), conditions))


def test_a_deadline_that_has_passed_decodes_nothing() -> None:
    decoder = decoder_of()
    with pytest.raises(Cancelled):
        next(decoder.decode(tiny_conditions(3), GREEDY, 0, Work(deadline=0.0)))
    assert decoder.frames_decoded == 0


SHORT = replace(CONFIG, max_seq_len=24)


def test_the_longest_sentence_is_decoded() -> None:
    assert len(decode(decoder_of(tiny_model(config=SHORT)), tiny_conditions(24))) == 24


def test_a_longer_sentence_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"too many frames: 25; .*24"):
        next(decoder_of(tiny_model(config=SHORT)).decode(tiny_conditions(25), GREEDY, 0, Work()))


def test_bytes_read_grow_with_the_position() -> None:
    decoder = decoder_of()
    weights = sum(p.numel() for p in decoder.model.layers.parameters())
    assert decoder.frame_bytes(0) > 4 * weights
    kv = 2 * CONFIG.n_layer * CONFIG.n_local_heads * CONFIG.head_dim * 4
    assert decoder.frame_bytes(100) - decoder.frame_bytes(0) == 100 * kv
    decode(decoder, tiny_conditions(10))
    assert decoder.bytes_read == sum(decoder.frame_bytes(at) for at in range(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes(dtype: torch.dtype) -> None:
    """``benchmarks.fidelity`` measures how close it comes to single precision."""
    codes = decode(decoder_of(dtype=dtype), tiny_conditions(20))
    assert codes.shape == (20, CONFIG.num_codebooks)
