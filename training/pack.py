"""Copy the trained files to the voice's folder, ``workers/models/voice/data``.

python -m training.pack --out build/voice
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from training import recipe
from workers.models.voice.weights import DATA, WeightsError, load

COPIED = ("dual_ar.safetensors", "codec_decoder.onnx", "g2p.safetensors")


@recipe.step(WeightsError)
def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    # Check all files first: an incomplete set must not overwrite a voice.
    files = {name: recipe.input_file(args.out, name) for name in ("quantiser.safetensors", *COPIED)}
    args.data.mkdir(parents=True, exist_ok=True)
    quantiser = load_file(files["quantiser.safetensors"])
    pitch = {name: quantiser[name] for name in ("pitch_book", "pitch_stats")}
    save_file(pitch, args.data / "pitch.safetensors")
    for name in COPIED:
        shutil.copyfile(files[name], args.data / name)
        (args.data / name).chmod(0o644)
    (args.data / "pitch.safetensors").chmod(0o644)
    print(f"{args.data}: fingerprint {load(args.data).fingerprint}")


if __name__ == "__main__":
    main()
