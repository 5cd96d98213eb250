"""Nothing that is printed can act on a terminal."""

from __future__ import annotations

import io
import json
import re
import unicodedata

import pytest

from prefab.factory import console
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.printable import PrintableStream, printable

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x1b\\",
    "clear": "\x1b[2J\x1b[1;1H",
    "conceal": "\x1b[8mhidden\x1b[0m",
    "c1": "\x9b2J\x85\x90q\x9c",
    "return": "real\rfake",
    "backspace": "ab\x08\x7f",
    "bidi": "\u202egnp.exe\u2066x\u2069\u200f\u061c",
    "invisible": "a\u200b\u2060\ufeff\xad\u034fb",
    "tags": "\U000e0041\U000e0001",
    "surrogate": "\ud800x\udfff",
    "lines": "a\u2028b\u2029c\x0b\x0cd",
}
MARKUP = "[/red] [bold]x[/] [link=http://evil]y[/link] constitution.yaml:100:5 :boom: [/nothing]"


def unsafe(text: str) -> list[str]:
    """The characters of the text that must not reach a terminal."""
    kept = "\n\u200c\u200d"
    return [
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in kept
    ]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_no_control_character_is_left_and_json_stays_the_same(attack: str) -> None:
    assert unsafe(attack)
    assert not unsafe(printable(attack))
    if attack != ATTACKS["surrogate"]:
        assert json.loads(printable(json.dumps([attack], ensure_ascii=False))) == [attack]


def test_ordinary_text_of_many_scripts_stays_as_it_is() -> None:
    text = "Grüße, мир, 你好\nمرحبا שלום नमस्ते 👩‍👩‍👧 می‌خواهم é ❤️ line\n"
    assert printable(text) == text


@pytest.mark.parametrize("attack", [*ATTACKS.values(), MARKUP], ids=[*ATTACKS, "markup"])
@pytest.mark.parametrize("colour", [False, True])
def test_every_way_to_print_is_safe_and_markup_means_nothing(
    attack: str, colour: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    consoles = console.PrintableConsole(
        file=out, force_terminal=colour, color_system="truecolor" if colour else None, width=400,
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    monkeypatch.setattr(console, "console", lambda stderr=False: consoles)
    console.say(attack, attack, "red")
    console.warn(attack)
    console.hint(attack)
    console.fail(ConfigError([Problem(attack, 1, 2, attack, attack)]), attack)
    console.table(attack, (attack, "b"), [(attack, 1), (ValueError(attack), None)], attack)
    consoles.print(attack)
    consoles.out(attack)
    with console.Progress(attack, 2) as progress:
        progress.advance(2, **{attack: attack})
    text = out.getvalue()
    assert not unsafe(re.sub(r"\x1b\[[\d;]*m", "", text))
    assert "\x1b[8m" not in text
    if attack == MARKUP:
        assert text.count(MARKUP) >= 9


def test_a_guarded_stream_keeps_colours_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, kept in ((Terminal(), "\x1b[1;38;5;208mred\x1b[0m"), (io.StringIO(), "")):
        guarded = PrintableStream(stream)
        for attack in ATTACKS.values():
            guarded.write(attack)
        guarded.write("\r50% \x1b[1;38;5;208mred\x1b[0m")
        text = stream.getvalue()
        assert "\r50%" in text and kept in text
        text = text.replace("\r50%", "50%")
        assert not unsafe(re.sub(r"\x1b\[[\d;]*m", "", text) if kept else text)
        assert "\x1b[8m" not in text


def test_nothing_prints_past_the_console() -> None:
    """Product code prints by `prefab.factory.console` alone."""
    raw = re.compile(
        r"(?<![\w.])print\(|\becho\(|sys\.std(?:out|err)\.(?:write|buffer)|\bConsole\(|os\.write\([12],"
    )
    allowed = {
        "factory/console.py",
        "factory/printable.py",
        "factory/spec/constitution.py",  # writes its schema, `python -m`
        "pipelines/config/schema.py",  # writes its schema, `python -m`
        "factory/engines/scripted.py",  # a server for tests: prints its own address
        "pipelines/cli/options.py",  # JSON, made printable
        "factory/engines/server_keeper.py",  # its stdout is a pipe to the command that started it
        "pipelines/view/label_tasks.py",  # its stdout is a pipe to the pages' server
        "judges/sandbox/timeout_worker.py",  # its stdout is a pipe to its parent
        "judges/sandbox/candidate.py",
        "judges/sandbox/test_runner.py",
    }
    found = {
        f"{path.relative_to(PACKAGE)}:{n}"
        for folder in ("factory", "judges", "pipelines", "trainers")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if str(path.relative_to(PACKAGE)) not in allowed and "builder" not in path.parts
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if raw.search(line) and "import datasets" not in line
    }
    assert not found
