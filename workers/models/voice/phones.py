"""The input symbols of the voice: the teacher's phones, with stress and position in the word."""

from __future__ import annotations

from dataclasses import dataclass

PAUSE = "pau"
VOWELS = tuple("aa ae ah ao aw ax ay eh er ey ih iy ow oy uh uw".split(" "))  # noqa: SIM905
CONSONANTS = tuple("b ch d dh f g hh jh k l m n ng p r s sh t th v w y z zh".split(" "))  # noqa: SIM905
PHONES = [PAUSE, *VOWELS, *CONSONANTS]
PHONE_ID = {phone: number for number, phone in enumerate(PHONES)}
SIGNS = ".?!"
"""Ends of sentences; they decide the melody."""

NO_WORD, INSIDE, FIRST, LAST, ONLY = range(5)
PLACES = 5


@dataclass(frozen=True)
class Phone:
    """One phone of a sentence."""

    name: str
    stressed: bool
    place: int
    """Position in its word: NO_WORD for a pause, else INSIDE, FIRST, LAST or ONLY."""

    @property
    def symbol(self) -> int:
        """Return phone, stress and place as one number below NUM_SYMBOLS."""
        return (PHONE_ID[self.name] * 2 + self.stressed) * PLACES + self.place


NUM_SYMBOLS = len(PHONES) * 2 * PLACES


def place(index: int, length: int) -> int:
    """Return the place of phone ``index`` in a word of ``length`` phones."""
    if length == 1:
        return ONLY
    return FIRST if index == 0 else LAST if index == length - 1 else INSIDE
