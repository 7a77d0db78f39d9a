"""What every step of the recipe shares: what it needs of the others, and how it ends without it."""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import NoReturn

FAILED, BAD_ARGUMENT, NO_FARM, INTERRUPTED = 1, 2, 4, 130
CORPUS = "corpus"
_MADE_BY = {
    CORPUS: (1, "corpus", "--out"),
    "features.npz": (2, "features", "--out"),
    "lexicon.txt.gz": (3, "lexicon", "--data"),
    "symbols.json": (3, "lexicon", "--out"),
    "codes.npz": (4, "quantiser", "--out"),
    "quantiser.safetensors": (4, "quantiser", "--out"),
    "codec_decoder.onnx": (5, "codec_decoder", "--out"),
    "codec_decoder.safetensors": (5, "codec_decoder", "--out"),
    "g2p.safetensors": (6, "g2p", "--out"),
    "dual_ar.safetensors": (7, "dual_ar", "--out"),
}
"""Each file: the step that makes it, and the option that says where."""
_PACKAGES = {"flite": "flite", "t2p": "flite", "fortunes": "fortunes"}
_PACKAGES |= {"american-english": "wamerican"}
"""Programs and files of the system: the Debian package that brings them."""


class StepError(Exception):
    """A step cannot go on; the message says why, and what to do."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """A bad argument is one line; --help tells the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENT, f"{self.prog}: {message} (--help lists the arguments)\n")


def parser(described: str | None, out: str = "build/voice") -> Parser:
    """A step's arguments. ``described``: its module's documentation."""
    made = Parser(prog=_name(), description=(described or "").splitlines()[0])
    made.add_argument("--out", type=Path, default=Path(out), help=f"folder of the files ({out})")
    return made


def count(text: str) -> int:
    """An argument of at least 1."""
    value = whole(text)
    if value == 0:
        raise argparse.ArgumentTypeError("'0' is no whole number above 0")
    return value


def whole(text: str) -> int:
    """An argument of at least 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return value


def made(folder: Path, name: str) -> Path:
    """What an earlier step left in ``folder``. Raises StepError where it is not there, or not
    whole because that step was killed while it wrote."""
    path = folder / name
    number, step, option = _MADE_BY[name]
    there = any(path.glob("?????.npz")) if name == CORPUS else path.is_file()
    wrong = "" if there else "is missing"
    if there and path.suffix == ".npz" and not zipfile.is_zipfile(path):
        wrong = "is not whole"
    if wrong:
        command = f"python -m training.{step} {option} {folder}"
        raise StepError(f"{path} {wrong}; step {number} makes it: {command}")
    return path


def step(*expected: type[Exception]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """For a step's ``main``: what its user can mend is told in one line, with an exit code.

    ``expected``: more exceptions than StepError and OSError whose own words say what to do.
    """

    def wrap(main: Callable[[], None]) -> Callable[[], None]:
        @wraps(main)
        def run() -> None:
            try:
                main()
            except StepError as error:
                _end(str(error), error.code)
            except OSError as error:
                _end(_explained(error), FAILED)
            except expected as error:
                _end(str(error), FAILED)
            except KeyboardInterrupt:
                sys.exit(INTERRUPTED)

        return run

    return wrap


def _explained(error: OSError) -> str:
    package = _PACKAGES.get(Path(str(error.filename)).name)
    if isinstance(error, FileNotFoundError) and package:
        return f"{error.filename} is missing; install it: apt-get install {package}"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _end(message: str, code: int) -> NoReturn:
    print(f"{_name()}: {message}", file=sys.stderr)
    sys.exit(code)


def _name() -> str:
    """Of the command that runs, such as training.corpus."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
