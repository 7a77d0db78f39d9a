"""Word error of the voice and of its teacher, by a recogniser, on held-out sentences.

    python -m training.evaluate --out training/results [--url http://127.0.0.1:8000]

pocketsphinx recognises both with its own acoustic and language model. The ratio of the two errors
counts, because the recogniser itself is far from perfect. Every sentence is a row of the CSV file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from pocketsphinx import Decoder
from safetensors.torch import load_file

from training import recipe
from training.corpus import HELD_OUT, say
from training.features import log_mel, pitch
from training.quantiser import frames_of, nearest
from workers.model.contract import SpeechRequest, Work
from workers.models.voice import Voice
from workers.models.voice.codec_decoder import PITCH_BOOK

WORD = re.compile(r"[a-z']+")
MAX_TEMPERATURE = 2.0  # temperature that the voice takes


def recogniser() -> Decoder:
    return Decoder(samprate=16000, loglevel="FATAL")


def heard(decoder: Decoder, samples: NDArray[np.int16]) -> str:
    """Recognise 16 kHz samples."""
    silence = np.zeros(3200, dtype=np.int16)
    decoder.start_utt()
    whole = np.concatenate([silence, samples, silence])
    decoder.process_raw(whole.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else ""


def errors(said: str, understood: str) -> tuple[int, int]:
    """Return the word edits between the two texts, and the words of the first."""
    a, b = WORD.findall(said.lower()), WORD.findall(understood.lower())
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1], len(a)


def voice_speaker(url: str | None, temperature: float) -> Callable[[str], NDArray[np.int16]]:
    """Return a function that speaks through a running farm or, without a URL, in this process."""
    if url is not None:

        def ask(text: str) -> NDArray[np.int16]:
            body = {"input": text, "response_format": "pcm", "seed": 1, "temperature": temperature}
            try:
                answer = httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise recipe.StepError(
                    f"no farm responds at {url} ({error}); `gpufarm up` starts one", recipe.NO_FARM
                ) from None
            if answer.status_code != 200:
                detail = " ".join(answer.text.split())[:200]
                raise recipe.StepError(f"{url} returned status {answer.status_code}: {detail}")
            return np.frombuffer(answer.content, dtype=np.int16)

        return ask
    voice = Voice()
    voice.setup("cpu")
    voice.warm_up()

    def speak(text: str) -> NDArray[np.int16]:
        request = SpeechRequest(text, voice.voices[0], seed=1, extra={"temperature": temperature})
        return np.asarray(np.concatenate(list(voice.speak(request))) * 32767, dtype=np.int16)

    return speak


def codec_speaker(folder: Path) -> Callable[[str], NDArray[np.int16]]:
    """Return a function that passes the teacher's speech through the codec: the decoder's limit."""
    quantiser = load_file(recipe.input_file(folder, "quantiser.safetensors"))
    mean, std, weight = quantiser["pitch_stats"]
    voice = Voice()
    voice.setup("cpu")

    def speak(text: str) -> NDArray[np.int16]:
        signal = say(text)[0].astype(np.float64) / 32768
        mel, spoken = torch.from_numpy(log_mel(signal)), torch.from_numpy(pitch(signal))
        left = (mel - quantiser["mel_mean"]) / quantiser["mel_scale"]
        left = frames_of(left, [len(mel)])
        prosody = torch.stack([(spoken[:, 0] - mean) / std, spoken[:, 1] / weight], 1)
        codes = []
        for book in quantiser["mel_books"]:
            codes.append(nearest(left, book))
            left = left - book[codes[-1]]
        codes.insert(PITCH_BOOK, nearest(frames_of(prosody, [len(mel)]), quantiser["pitch_book"]))
        known = torch.stack(codes, 1)
        steps = (known[: i + 1] for i in range(len(known)))
        samples = np.concatenate(list(voice.samples(steps, len(known), 1, Work())))
        return np.asarray(samples * 32767, dtype=np.int16)

    return speak


@recipe.step()
def main() -> None:
    parser = recipe.parser(__doc__, out="training/results")
    parser.add_argument(
        "--url", help="URL of a running farm; default: run the voice in this process"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--codec", type=Path, help="folder of the training: evaluate the codec too")
    args = parser.parse_args()
    if not 0 <= args.temperature <= MAX_TEMPERATURE:
        parser.error(
            f"argument --temperature: must be from 0 to {MAX_TEMPERATURE}, got {args.temperature}"
        )
    # As in workers. The number of threads changes sums slightly; where two codes are almost equally
    # likely, that decides between them, and so everything that follows.
    torch.set_num_threads(1)
    decoder = recogniser()
    speakers: dict[str, Callable[[str], NDArray[np.int16]]] = {
        "voice": voice_speaker(args.url, args.temperature),
        "flite slt": lambda text: say(text)[0],
    }
    if args.codec is not None:
        speakers["flite slt through the codec"] = codec_speaker(args.codec)
    rows, totals = [], {name: [0, 0] for name in speakers}
    for sentence in HELD_OUT.read_text().splitlines():
        for name, speak in speakers.items():
            understood = heard(decoder, speak(sentence))
            wrong, words = errors(sentence, understood)
            totals[name][0] += wrong
            totals[name][1] += words
            rows.append([name, sentence, understood, wrong, words])
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "word_error.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["speaker", "said", "understood", "errors", "words"])
        writer.writerows(rows)
    for name, (wrong, words) in totals.items():
        print(f"{name}: word error {wrong / words:.3f} ({wrong} of {words} words)")
    ratio = totals["voice"][0] / totals["flite slt"][0]
    print(f"ratio {ratio:.2f}, {len(rows) // len(speakers)} sentences")


if __name__ == "__main__":
    main()
