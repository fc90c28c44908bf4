"""Tokens, running text and numbers for people: what is invisible or reorders text is escaped."""

from __future__ import annotations

import json
import math
import unicodedata

__all__ = [
    "bytes_text",
    "first_sentences",
    "hides",
    "json_printable",
    "printable",
    "readable",
    "seconds_text",
    "signed",
    "visible",
]

_MARKS = str.maketrans(
    {" ": "␣", "Ġ": "␣", "▁": "␣", "\n": "↵", "Ċ": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "␣"}
)


def visible(text: str, longest: int | None = None) -> str:
    r"""A token's text with a sign for each invisible character.

    Spaces (also the mark Ġ of byte-level BPE and ▁ of SentencePiece) become ␣, newlines ↵, tabs ⇥.
    Control characters, and characters that reorder or join text, become escapes. Empty text is ∅.

    Args:
        text: The token's text.
        longest: Most characters; a longer text ends in "…". None: no limit.

    Example:
        >>> from lddyn.text import visible
        >>> visible("Ġthe"), visible(" a\n"), visible("a\u202eb")
        ('␣the', '␣a↵', 'a\\u202eb')
    """
    shown = printable(text.translate(_MARKS))
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return shown or "∅"


# Characters without a width, or blank, whose category is that of letters, marks or signs: Unicode's
# Default_Ignorable_Code_Point, and an empty Braille cell. U+FE0F makes a sign an emoji, and stays.
_BLANK = frozenset(
    map(
        chr,
        (
            *(0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *range(0x180B, 0x1810),
            *range(0xFE00, 0xFE0F),
            *range(0xE0100, 0xE01F0),
        ),
    )
)


def hides(character: str) -> bool:
    r"""Whether a character has no width, reorders or joins others, or controls a terminal.

    Line breaks and tabs are such characters; spaces of every width are none.

    Example:
        >>> from lddyn.text import hides
        >>> [hides(c) for c in "a\u202e\u200b\u3164 "]
        [False, True, True, True, False]
    """
    kind = unicodedata.category(character)
    return kind[0] == "C" or kind in ("Zl", "Zp", "Me") or character in _BLANK


def printable(text: str) -> str:
    """The text with escapes for control characters and for those that reorder, join or hide text.

    A terminal shows the result without moving its cursor. Letters, signs and the space stay; line
    breaks, tabs and other spaces are escaped too (`readable` keeps line breaks).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\\u{ord(c):04x}" if hides(c) or (c != " " and unicodedata.category(c) == "Zs") else c
        for c in text
    )


def json_printable(text: str) -> str:
    r"""The same JSON, with escapes in the place of characters that `hides` names.

    Args:
        text: A JSON text; line breaks between its values stay.

    Example:
        >>> from lddyn.text import json_printable
        >>> json_printable('["a\u202e"]')
        '["a\\u202e"]'
    """
    return "".join(json.dumps(c)[1:-1] if c != "\n" and hides(c) else c for c in text)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign and a few significant digits; the minus sign is U+2212.

    Args:
        value: The number, for example of nats.
        digits: Significant digits.

    Example:
        >>> from lddyn.text import signed
        >>> signed(0.41999), signed(-0.0731), signed(0.0), signed(-1234.5), signed(2.5e-7)
        ('+0.42', '−0.0731', '0', '−1234', '+2.5e−7')
    """
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 10**digits:
        text = f"{size:.0f}"
    elif size >= 1e-4:
        text = f"{size:.{digits}g}"
    else:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa}e−{-int(exponent)}"
    return ("−" if value < 0 else "+") + text


def readable(text: str, longest: int | None = None) -> str:
    r"""Running text: `printable`, but line breaks stay and a tab is four spaces.

    Args:
        text: Any text.
        longest: Most characters; a longer text ends in "…". None: no limit.

    Example:
        >>> from lddyn.text import readable
        >>> readable("a\n\u202eb\0")
        'a\n\\u202eb\\u0000'
    """
    shown = "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def first_sentences(text: str, longest: int = 240) -> str:
    r"""The first line of a text in one line, with the next ones where it says nothing by itself.

    Lines are added while the text ends in a colon, or while they fit.

    Args:
        text: Such as that of an exception of another library.
        longest: Most characters, unless the first line alone is longer.

    Example:
        >>> from lddyn.text import first_sentences
        >>> first_sentences("Couldn't make it from one of:\n (1) a file\n\n (2) a name")
        "Couldn't make it from one of: (1) a file (2) a name"
    """
    shown = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if shown and not shown.endswith(":") and len(shown) + len(line) >= longest:
            break
        shown = f"{shown} {line}".strip()
    return shown


def bytes_text(count: float) -> str:
    """A number of bytes with three digits and a binary unit.

    Example:
        >>> from lddyn.text import bytes_text
        >>> bytes_text(640), bytes_text(3 * 2**20), bytes_text(2**40 * 5)
        ('640 B', '3 MiB', '5 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def seconds_text(value: float) -> str:
    """A time in seconds, minutes or hours.

    Example:
        >>> from lddyn.text import seconds_text
        >>> seconds_text(0.0312), seconds_text(600), seconds_text(9000)
        ('0.031 s', '10 min', '2.5 h')
    """
    if value < 120:
        return f"{value:.2g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"
