"""What a command says while it works: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """A function that tells one line. Everything goes to standard error: standard output is for
    what was asked for."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console  # noqa: PLC0415 - rich takes long to import
    from rich.text import Text  # noqa: PLC0415

    console = Console(stderr=True, highlight=False)
    with console.status(title) as status:

        def say(line: str) -> None:
            console.print(Text(line))
            status.update(title)

        yield say
