"""From written text to phones: what is said, what is refused, and that nothing hangs or crashes."""

# ruff: noqa: RUF001  (characters that look like others are what is tested)

from __future__ import annotations

import random
import re

import pytest

from workers.model.contract import InvalidRequest
from workers.models.voice.phones import NO_WORD, NUM_SYMBOLS, PAUSE, PHONE_ID, SIGNS
from workers.models.voice.text import (
    MAX_SENTENCE_LETTERS,
    MAX_WORD_LETTERS,
    Sentence,
    lexicon,
    normalise,
    sentences,
    word_phones,
)


def by_letter(word: str) -> list[str]:
    """A stand-in for the network: a phone a letter, none where there is no letter."""
    return ["ax"] * sum(letter.isalpha() for letter in word)


def nothing(word: str) -> list[str]:
    raise AssertionError(f"{word} is in the lexicon")


def spoken(sentence: Sentence) -> list[str]:
    return [phone.name for phone in sentence.phones if phone.name != PAUSE]


def words(text: str) -> str:
    """What ``normalise`` makes of it, spaces evened out."""
    return re.sub(r"\s+([,.?!])", r"\1", " ".join(normalise(text).split()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Mr. and Mrs. Smith", "mister and missus smith"),
        ("Dr. No", "doctor no"),
        ("St. John", "saint john"),
        ("on Main St. in town", "on main street in town"),
        ("cats, dogs, etc.", "cats, dogs, et cetera"),
        ("e.g. this", "for example this"),
        ("(i.e. that)", ", that is that,"),
        ("No. 5", "number five"),
        ("I said no. Then I left.", "i said no. then i left."),
    ],
)
def test_abbreviations(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the U.S. army", "the u s army"),
        ("The U.S.", "the u s"),
        ("made in the U.S.A.", "made in the u s ay"),
        ("HTTP", "h t t p"),
        ("two DVDs", "two d v d's"),
        ("NASA", "nasa"),
        ("HELLO", "hello"),
    ],
)
def test_acronyms(text: str, said: str) -> None:
    assert "dvds" not in lexicon()
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://www.example.com/a_b", "example dot com slash a b"),
        ("mail me@example.org", "mail me at example dot org"),
        ("R&D", "r and d"),
        ("50%, 20°, ½, x²", "fifty percent, twenty degrees, one over two, x two"),
        ("5-3", "five three"),
        ("C#", "c number"),
        ("**bold**", "bold"),
        ("one\ntwo", "one,two"),
        ("Hello…world", "hello...world"),
        ("wait — what", "wait, what"),
    ],
)
def test_addresses_and_symbols(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("café naïve Ångström", "cafe naive angstrom"),
        ("cafe\u0301", "cafe"),
        ("Straße, Øre, Łódź", "strasse, ore, lodz"),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        ("don’t", "don't"),
        ("‘quoted’", "'quoted'"),
        ("I 🎉 parties 👩\u200d🚀!", "i parties!"),
    ],
)
def test_unicode(text: str, said: str) -> None:
    assert words(text) == said


@pytest.mark.parametrize(
    "text",
    ["", " ", "🎉🎉👩\u200d🚀", "...?!", "你好", "'", "''' ''", "$", "\n" * 10_000, "\u0301"],
)
def test_what_has_no_sound_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="letters or digits"):
        sentences(text, by_letter)


def test_digits_only_are_spoken() -> None:
    (sentence,) = sentences("42", nothing)
    forty, two = lexicon()["forty"], lexicon()["two"]
    assert spoken(sentence) == [phone.rstrip("1") for phone in (*forty, *two)]


@pytest.mark.parametrize(
    ("text", "signs"),
    [
        ("One. Two? Three!", ".?!"),
        ("no sign at the end", "."),
        ("What?! No...", "!."),
        ("Wait... what?", ".?"),
        ("a, b, c", "."),
        ("a,.", "."),
        (". . hello", "."),
        ("hello ,?", "?"),
    ],
)
def test_sentences_end_with_their_signs(text: str, signs: str) -> None:
    assert "".join(s.sign for s in sentences(text, by_letter)) == signs


def test_clauses_are_parted_by_pauses() -> None:
    (sentence,) = sentences("one, two", nothing)
    phones = sentence.phones
    pauses = [at for at, phone in enumerate(phones) if phone.name == PAUSE]
    assert pauses == [0, 1 + len(lexicon()["one"]), len(phones) - 1]
    assert all(phones[at].place == NO_WORD for at in pauses)


def test_long_text_is_split_and_nothing_of_it_is_lost() -> None:
    text = "the quick brown fox jumps over the lazy dog " * 228
    found = sentences(text[:10_000], nothing)
    assert len(found) > 40
    complete = [
        p.rstrip("1") for word in text[:10_000].split() for p in word_phones(word, by_letter)
    ]
    assert [phone for sentence in found for phone in spoken(sentence)] == complete


@pytest.mark.parametrize("longest", [20, 45, 90, MAX_SENTENCE_LETTERS])
def test_no_sentence_is_longer_than_asked_for(longest: int) -> None:
    """A phone a letter, counted through a stand-in that knows no word."""
    rng = random.Random(longest)
    nonsense = " ".join(
        "q" * rng.randint(1, MAX_WORD_LETTERS) + rng.choice(["", "", ",", "."]) for _ in range(400)
    )
    for sentence in sentences(nonsense, by_letter, longest):
        assert 0 < len(spoken(sentence)) <= max(longest, MAX_WORD_LETTERS)


def test_a_word_of_4_kb_is_said_in_pieces() -> None:
    said: list[str] = []

    def g2p(word: str) -> list[str]:
        said.append(word)
        return by_letter(word)

    found = sentences("q" * 4096, g2p)
    assert sum(len(spoken(sentence)) for sentence in found) == 4096
    assert {len(word) for word in said} == {MAX_WORD_LETTERS, 4096 % MAX_WORD_LETTERS}


def test_pieces_without_a_letter_are_no_words() -> None:
    for sentence in sentences("a" + "'" * 500 + "b" + "'" * 23 + "c", by_letter, longest=20):
        assert spoken(sentence)


@pytest.mark.parametrize(
    ("word", "ending"), [("dog's", ["z"]), ("cat's", ["s"]), ("boss's", ["ax", "z"])]
)
def test_a_possessive_sounds_like_its_stem(word: str, ending: list[str]) -> None:
    stem = lexicon()[word[:-2]]
    assert [p.rstrip("1") for p in word_phones(word, nothing)] == [
        p.rstrip("1") for p in (*stem, *ending)
    ]


def test_words_outside_the_lexicon_are_spelt_without_apostrophes() -> None:
    said: list[str] = []
    word_phones("qzx'qq", lambda word: said.append(word) or ["ax"])  # type: ignore[func-returns-value]
    assert said == ["qzxqq"]


def test_every_phone_of_the_lexicon_is_known() -> None:
    known = {f"{phone}{stress}" for phone in PHONE_ID for stress in ("", "1")}
    assert {phone for phones in lexicon().values() for phone in phones} <= known
    assert all(lexicon().values())


ALPHABET = [
    *"abcXYZ0123456789",
    *" \t\n\r'’\".,?!;:()[]{}-–—…$€£¥%&@#/\\*+=<>_~|°×÷^`",
    *"éßØıİſﬁ½²①٣४𝟗ⅷ你Ж\u0301\u200d\u00ad\u202e\ufeff\x00\x1b\u2028🎉🇺",
    *("1st", "st", "th", "pm", "a.m.", "km", "e.g.", "U.S.", "No.", "St.", "www.", "https://"),
    *(
        "million",
        "'s",
        "0s",
        "1,000",
        "$1.",
        "..",
        "--",
        "10:",
        ":30",
        "\U0001f469\u200d\U0001f680",
    ),
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.timeout(60)
def test_any_text_is_spoken_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        alphabet = rng.sample(ALPHABET, rng.randint(1, len(ALPHABET)))
        text = "".join(rng.choices(alphabet, k=rng.choice([1, 3, 10, 40, 200])))
        longest = rng.choice([1, 20, 45, MAX_SENTENCE_LETTERS])
        try:
            found = sentences(text, by_letter, longest)
        except InvalidRequest:
            continue
        assert found
        for sentence in found:
            assert sentence.sign in SIGNS
            assert spoken(sentence), text
            assert all(0 <= phone.symbol < NUM_SYMBOLS for phone in sentence.phones)


@pytest.mark.parametrize(
    "unit",
    [
        "7",
        "1,",
        "1,111,",
        "1.",
        "1:",
        "1 ",
        "$1",
        "$ ",
        "-1",
        "1st",
        "'",
        "a.",
        "A",
        "1'",
        ".",
        " ",
    ],
)
@pytest.mark.timeout(60)
def test_the_time_is_linear_in_the_length(unit: str) -> None:
    """What repeats is where patterns go back and forth: 100,000 characters would take minutes."""
    text = "1" + unit * (100_000 // len(unit)) + "b"
    assert normalise(text)
