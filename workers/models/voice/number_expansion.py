"""Everything with digits in it, spelt out: numbers, money, ordinals, times, years, measures.

One pattern consumes each amount whole, with what belongs to it on both sides, so the time is
linear in the text's length whatever the text.
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
LONGEST_NUMBER = 15  # digits; longer ones are said digit by digit
LONGEST_FRACTION = 15  # digits after the point that are said

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


def spell_amounts(text: str) -> str:
    """Every digit of ``text`` in words; what is not an amount stays as it is."""
    # Any script's digits are digits.
    text = re.sub(r"[^\D0-9]", lambda m: str(int(m[0])), text)
    text = re.sub(r"(?<=\d)\s*+[*\u00d7]\s*+(?=\d)", " times ", text)
    text = re.sub(r"(?<![\w.])-(?=[$€£¥]?\.?\d)", " minus ", text)
    return _AMOUNT.sub(_spell, text)


def _spell(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["hour"]:
        said = _clock(found["hour"], found["minute"], found["half"])
    elif found["before"] or found["after"]:
        currency = CURRENCIES[found["before"] or found["after"]]
        said = _money(found["number"], found["scale"], currency)
        said += _rest(found, "ordinal", "many", "clock", "unit")
    elif found["ordinal"]:
        said = _ordinal(found["number"], found["ordinal"])
    elif found["many"]:
        said = _plural(_number(found["number"]))
    elif found["clock"]:
        said = f"{_number(found['number'])} {_half(found['clock'])}"
    elif found["unit"]:
        said = f"{_number(found['number'])} {_unit(found['number'], found['unit'])}"
    else:
        said = f"{_number(found['number'])} {found['scale'] or ''}"
    return f" {said} "


def _rest(found: dict[str, str | None], *names: str) -> str:
    """What followed an amount of money and is no part of it: said as it was written."""
    return "".join(f" {found[name]}" for name in names if found[name])


def _words(number: int, to: str = "cardinal") -> str:
    # Imported when first needed: a machine that only measures the decoder needs no num2words.
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
    if len(whole) > LONGEST_NUMBER or (len(whole) > 1 and whole[0] == "0"):
        said = _digits(whole)
    elif plain == written and not part and len(whole) == 4 and 1100 <= int(whole) < 2000:
        said = _words(int(whole), to="year")
    else:
        said = _words(int(whole or "0"))
    return f"{said} point {_digits(part[:LONGEST_FRACTION])}" if part else said


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
    said = f"{_number(whole or '0')} {name if one else _many(name)}"
    return f"{said} and {cents}" if cents else said


def _many(noun: str) -> str:
    first, space, rest = noun.partition(" ")
    invariable = first in {"yen", "pence"} or first.endswith("hertz")
    return noun if invariable else f"{first}s{space}{rest}"


def _unit(written: str, unit: str) -> str:
    noun = UNITS[unit.lower()]
    return noun if written == "1" else _many(noun)


def _ordinal(written: str, ending: str) -> str:
    plain = written.replace(",", "")
    if len(plain) > LONGEST_NUMBER or "." in plain:
        return f"{_number(written)} {ending}"
    return _words(int(plain), to="ordinal")


def _plural(said: str) -> str:
    if said.endswith("y"):
        return f"{said[:-1]}ies"
    return f"{said}es" if said.endswith("x") else f"{said}s"


def _half(letter: str) -> str:
    # "a" alone would be said like the article.
    return "ay m" if letter.lower() == "a" else "p m"


def _clock(hour: str, minute: str, half: str | None) -> str:
    said = _words(int(hour))
    if int(minute):
        said += f" oh {_words(int(minute))}" if minute[0] == "0" else f" {_words(int(minute))}"
    elif not half:
        said += " o'clock"
    return f"{said} {_half(half)}" if half else said
