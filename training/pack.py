"""Put what training made where the voice loads it from: ``workers/voice/data``.

python -m training.pack --out build/voice
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from workers.voice.weights import DATA, load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/voice"))
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    quantiser = load_file(args.out / "quantiser.safetensors")
    pitch = {name: quantiser[name] for name in ("pitch_book", "pitch_stats")}
    save_file(pitch, args.data / "pitch.safetensors")
    for name in ("dual_ar.safetensors", "codec_decoder.onnx", "spelling.safetensors"):
        shutil.copyfile(args.out / name, args.data / name)
        (args.data / name).chmod(0o644)
    (args.data / "pitch.safetensors").chmod(0o644)
    print(f"{args.data}: fingerprint {load(args.data).fingerprint}")


if __name__ == "__main__":
    main()
