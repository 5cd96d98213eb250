"""Text made safe to print: no character of it can move the cursor, change the terminal's state,
reverse the direction of other text, or hide.

Threat: ids, names, model answers and server errors are written by others. A terminal obeys escape
sequences in them: it can be told to change its title, to write to the clipboard, to overwrite lines
that were printed before.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

from prefab.factory.redaction import redact

# C0 controls but newline, DEL, C1 controls; soft hyphen; marks of direction; zero-width characters
# but the two joiners, which scripts and emoji need; line and paragraph separators; interlinear
# marks; halves of surrogate pairs; variation selectors and tags, which can carry hidden text.
_UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b"
    "\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0e\ufeff\uffa0"
    "\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_COLOUR = re.compile(r"(\x1b\[(?:[0-79;]|8(?!m|;)|(?<=\d)8)*m)")  # not 8, which hides text


def printable(text: str) -> str:
    r"""The text without known secrets, and with each character that a terminal would act on, or not
    show, written as `\u001b`. A tab becomes four spaces. JSON stays the same JSON.
    """
    text = redact(text)
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code == 9:
        return "    "
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


class PrintableStream:
    """A text stream whose `write` makes everything printable: output of libraries and tracebacks
    too. Colours pass where the stream is a terminal; so does a carriage return that begins a write
    (progress bars).

    `direct` is the stream itself, for the project's own console, which makes its text printable
    before it adds colours and cursor movements.
    """

    def __init__(self, stream: TextIO) -> None:
        self.direct = stream

    def write(self, text: str) -> int:
        """Write the text, made printable; return the number of characters that were given."""
        start = "\r" if text.startswith("\r") else ""
        parts = _COLOUR.split(text[len(start) :]) if self.direct.isatty() else [text[len(start) :]]
        kept = (part if i % 2 else printable(part) for i, part in enumerate(parts))
        self.direct.write(start + "".join(kept))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.direct, name)


def guard_standard_streams() -> None:
    """Make everything printable that this process writes to stdout and stderr as text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PrintableStream):
            setattr(sys, name, PrintableStream(stream))
