"""Decoding on a GPU: captured graphs, eager steps and the whole sentence give the same codes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scores import whole_sentence
from tests.workers.voice.test_decoding import GREEDY, WARM, decode
from tests.workers.voice.tiny_voice import tiny_conditions, tiny_model
from workers.models.voice.decoding import FrameDecoder
from workers.models.voice.sampling import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_decode_what_eager_steps_decode(dtype: torch.dtype, sampling: Sampling) -> None:
    device = torch.device("cuda:0")
    conditions = tiny_conditions(140).to(device=device, dtype=dtype)
    eager = FrameDecoder(tiny_model(), device, dtype)
    captured = FrameDecoder(tiny_model(), device, dtype)
    captured.warm_up()
    assert captured.engine.kind == "cuda-graph"
    assert torch.equal(decode(captured, conditions, sampling), decode(eager, conditions, sampling))


def test_a_gpu_decodes_what_the_whole_sentence_scores_highest() -> None:
    device, conditions = torch.device("cuda:0"), tiny_conditions(60)
    decoder = FrameDecoder(tiny_model(), device, torch.float32)
    decoder.warm_up()
    codes = decode(decoder, conditions.to(device)).cpu()
    agree = whole_sentence(tiny_model(), conditions, codes).argmax(-1) == codes
    # Sums in another order may turn a choice between two codes with nearly equal scores.
    assert float(agree.float().mean()) > 0.99
