"""Expands everything with digits into words: numbers, money, ordinals, times, years, measures.

One pattern consumes each amount together with its currency, unit or ending, so the time is linear
in the length of any text.
"""

from __future__ import annotations

import re

CURRENCIES = {
    "$": ("dollar", "cent"),
    "€": ("euro", "cent"),
    "£": ("pound", "pence"),
    "¥": ("yen", ""),
}
UNITS = {
    "km": "kilometer", "cm": "centimeter", "mm": "millimeter", "kg": "kilogram",
    "mg": "milligram", "ms": "millisecond", "tb": "terabyte", "gb": "gigabyte",
    "mb": "megabyte", "kb": "kilobyte", "ghz": "gigahertz", "mhz": "megahertz",
    "khz": "kilohertz", "hz": "hertz", "mph": "mile an hour",
}  # fmt: skip
MAX_NUMBER_DIGITS = 15  # digits; longer ones are said digit by digit
MAX_FRACTION_DIGITS = 15  # digits after the point that are said

_AMOUNT = re.compile(
    rf"""
    (?P<hour>\d{{1,2}}):(?P<minute>[0-5]\d)(?!\d) (?:\s*+(?P<half>[ap])\.?m\b\.?)?
    | (?:(?P<before>[$€£¥])\s*+)?
      (?P<number>
          \d++(?:\.\d++){{2,}}+               # 192.168.0.1
        | \d{{1,3}}(?:,\d{{3}}(?!\d))++(?:\.\d++)?
        | \d++(?:\.\d++)?
        | \.\d++
      )
      (?:
          (?P<ordinal>st|nd|rd|th)\b
        | (?P<many>'?s)\b
        | \s*+(?P<clock>[ap])\.?m\b\.?
        | \s*+(?P<unit>{"|".join(UNITS)})\b
        | \s*+(?P<scale>thousand|million|billion|trillion)\b
        | \s*+(?P<after>[$€£¥])(?!\s*+\d)
      )?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def expand_numbers(text: str) -> str:
    """Replace every number of ``text`` by words; everything else is unchanged."""
    # Any script's digits are digits.
    text = re.sub(r"[^\D0-9]", lambda m: str(int(m[0])), text)
    text = re.sub(r"(?<=\d)\s*+[*\u00d7]\s*+(?=\d)", " times ", text)
    text = re.sub(r"(?<![\w.])-(?=[$€£¥]?\.?\d)", " minus ", text)
    return _AMOUNT.sub(_expand, text)


def _expand(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["hour"]:
        spoken = _clock(found["hour"], found["minute"], found["half"])
    elif found["before"] or found["after"]:
        currency = CURRENCIES[found["before"] or found["after"]]
        spoken = _money(found["number"], found["scale"], currency)
        spoken += _rest(found, "ordinal", "many", "clock", "unit")
    elif found["ordinal"]:
        spoken = _ordinal(found["number"], found["ordinal"])
    elif found["many"]:
        spoken = _plural(_number(found["number"]))
    elif found["clock"]:
        spoken = f"{_number(found['number'])} {_half(found['clock'])}"
    elif found["unit"]:
        spoken = f"{_number(found['number'])} {_unit(found['number'], found['unit'])}"
    else:
        spoken = f"{_number(found['number'])} {found['scale'] or ''}"
    return f" {spoken} "


def _rest(found: dict[str, str | None], *names: str) -> str:
    """Return the endings after an amount of money that do not belong to it, as written."""
    return "".join(f" {found[name]}" for name in names if found[name])


def _words(number: int, to: str = "cardinal") -> str:
    # Imported on first use: benchmarks of the decoder run without num2words.
    from num2words import num2words  # noqa: PLC0415

    # Its commas and hyphens would be pauses and letters.
    return re.sub(r"[-,\s]+", " ", str(num2words(number, to=to)))


def _digits(digits: str) -> str:
    return " ".join(_words(int(digit)) for digit in digits)


def _number(written: str) -> str:
    plain = written.replace(",", "")
    if plain.count(".") > 1:
        return " point ".join(_number(part) for part in plain.split("."))
    whole, _, part = plain.partition(".")
    if len(whole) > MAX_NUMBER_DIGITS or (len(whole) > 1 and whole[0] == "0"):
        spoken = _digits(whole)
    elif plain == written and not part and len(whole) == 4 and 1100 <= int(whole) < 2000:
        spoken = _words(int(whole), to="year")
    else:
        spoken = _words(int(whole or "0"))
    return f"{spoken} point {_digits(part[:MAX_FRACTION_DIGITS])}" if part else spoken


def _money(written: str, scale: str | None, currency: tuple[str, str]) -> str:
    name, small = currency
    whole, _, part = written.replace(",", "").partition(".")
    if scale or (part and (len(part) != 2 or not small)) or "." in part:
        return f"{_number(written)} {scale or ''} {_many(name)}"
    cents = ""
    if part and int(part):
        cents = f"{_number(part.lstrip('0'))} {small if int(part) == 1 else _many(small)}"
        if not whole.strip("0"):
            return cents
    one = whole.lstrip("0") == "1"
    spoken = f"{_number(whole or '0')} {name if one else _many(name)}"
    return f"{spoken} and {cents}" if cents else spoken


def _many(noun: str) -> str:
    first, space, rest = noun.partition(" ")
    invariable = first in {"yen", "pence"} or first.endswith("hertz")
    return noun if invariable else f"{first}s{space}{rest}"


def _unit(written: str, unit: str) -> str:
    noun = UNITS[unit.lower()]
    return noun if written == "1" else _many(noun)


def _ordinal(written: str, ending: str) -> str:
    plain = written.replace(",", "")
    if len(plain) > MAX_NUMBER_DIGITS or "." in plain:
        return f"{_number(written)} {ending}"
    return _words(int(plain), to="ordinal")


def _plural(spoken: str) -> str:
    if spoken.endswith("y"):
        return f"{spoken[:-1]}ies"
    return f"{spoken}es" if spoken.endswith("x") else f"{spoken}s"


def _half(letter: str) -> str:
    # "a" alone would be said like the article.
    return "ay m" if letter.lower() == "a" else "p m"


def _clock(hour: str, minute: str, half: str | None) -> str:
    spoken = _words(int(hour))
    if int(minute):
        spoken += f" oh {_words(int(minute))}" if minute[0] == "0" else f" {_words(int(minute))}"
    elif not half:
        spoken += " o'clock"
    return f"{spoken} {_half(half)}" if half else spoken
