"""Digits and what belongs to them, spelt out."""

from __future__ import annotations

import pytest

from workers.models.voice.number_expansion import expand_numbers


def words(text: str) -> str:
    """Spelt out, spaces evened out."""
    return " ".join(expand_numbers(text).replace(" ,", ",").split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("7", "seven"),
        ("007", "zero zero seven"),
        ("1,234,567", "one million two hundred and thirty four thousand five hundred and sixty"),
        ("3.14", "three point one four"),
        (".5", "zero point five"),
        ("-5 is less", "minus five is less"),
        ("5-3", "five - three"),
        ("a 2x4", "a two x four"),
        (
            "1234567890123456",
            "one two three four five six seven eight nine zero one two three four",
        ),
        ("3.14159265358979323846", "three point one four one five nine two six five three five"),
        ("192.168.0.1", "one hundred and ninety two point one hundred and sixty eight point zero"),
        ("3 * 4", "three times four"),
        ("50%", "fifty %"),
        ("\u0663 and \u0967", "three and one"),
    ],
)
def test_numbers(text: str, said: str) -> None:
    assert words(text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$1", "one dollar"),
        ("$5", "five dollars"),
        ("5€", "five euros"),
        ("5 £", "five pounds"),
        ("¥1,000", "one thousand yen"),
        ("$1.50", "one dollar and fifty cents"),
        ("$0.99", "ninety nine cents"),
        ("$2.01", "two dollars and one cent"),
        ("£0.50", "fifty pence"),
        ("$2.5", "two point five dollars"),
        ("$2.5 million", "two point five million dollars"),
        ("$5 million", "five million dollars"),
        ("-$5", "minus five dollars"),
        ("$5 and $6", "five dollars and six dollars"),
        ("$5th", "five dollars th"),
        ("$", "$"),
    ],
)
def test_money(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1st 2nd 3rd 4th", "first second third fourth"),
        ("21st", "twenty first"),
        ("1,000th", "one thousandth"),
        ("5TH", "fifth"),
        ("12345678901234567th", "one two three four five six seven eight nine zero one two three"),
    ],
)
def test_ordinals(text: str, said: str) -> None:
    assert words(text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10:30", "ten thirty"),
        ("10:05", "ten oh five"),
        ("10:00", "ten o'clock"),
        ("7:30pm", "seven thirty p m"),
        ("7:30 a.m. sharp", "seven thirty ay m sharp"),
        ("5 PM", "five p m"),
        ("5am", "five ay m"),
        ("10:00 am", "ten ay m"),
    ],
)
def test_times(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("in 1999", "in nineteen ninety nine"),
        ("in 1905", "in nineteen oh five"),
        ("in 2024", "in two thousand and twenty four"),
        ("the 1990s", "the nineteen nineties"),
        ("the '80s", "the ' eighties"),
        ("1,999", "one thousand nine hundred and ninety nine"),
    ],
)
def test_years(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 km", "one kilometer"),
        ("5kg", "five kilograms"),
        ("1 mph, 30 mph", "one mile an hour, thirty miles an hour"),
        ("44.1 kHz", "forty four point one kilohertz"),
        ("5 kmh", "five kmh"),
    ],
)
def test_measures(text: str, said: str) -> None:
    assert words(text) == said
