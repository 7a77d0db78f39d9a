"""Shared by all steps of the recipe: their arguments, input files and errors."""

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
_STEP_OF = {
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
"""File → the step that makes it, and that step's option for the folder."""
_PACKAGES = {"flite": "flite", "t2p": "flite", "fortunes": "fortunes"}
_PACKAGES |= {"american-english": "wamerican"}
"""Programs and files of the system → their Debian package."""


class StepError(Exception):
    """A step cannot continue; the message names the cause and the remedy."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; --help shows the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENT, f"{self.prog}: {message} (--help lists the arguments)\n")


def parser(doc: str | None, out: str = "build/voice") -> Parser:
    """Make a step's parser; ``doc`` is its module's docstring."""
    arguments = Parser(prog=_name(), description=(doc or "").splitlines()[0])
    arguments.add_argument(
        "--out", type=Path, default=Path(out), help=f"folder of the files ({out})"
    )
    return arguments


def count(text: str) -> int:
    """Parse an argument of at least 1."""
    value = non_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be a positive integer, got '0'")
    return value


def non_negative(text: str) -> int:
    """Parse an argument of at least 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return value


def input_file(folder: Path, name: str) -> Path:
    """Return the path of an earlier step's file.

    Raises StepError if it is missing, or incomplete because that step was killed while writing.
    """
    path = folder / name
    number, step, option = _STEP_OF[name]
    there = any(path.glob("?????.npz")) if name == CORPUS else path.is_file()
    wrong = "" if there else "is missing"
    if there and path.suffix == ".npz" and not zipfile.is_zipfile(path):
        wrong = "is incomplete"
    if wrong:
        command = f"python -m training.{step} {option} {folder}"
        raise StepError(f"{path} {wrong}; step {number} makes it: {command}")
    return path


def step(*expected: type[Exception]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorate a step's ``main``: an error that its user can fix becomes one line and an exit code.

    ``expected``: exceptions beside StepError and OSError whose message names the remedy.
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
    """Return the name of the running command, such as training.corpus."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
