"""Warnings about a valid constitution: principles that judges will probably misread.

The checks read English; in texts of other languages they find nothing. Each has a code that
`prefab explain CODE` explains. A code is silenced for a principle (or the whole file) with
`lint: {ignore: [C101]}`, or in one place with a comment `# prefab: ignore C101` on the same line or
the line above.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher, get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.spec import yamlio
from prefab.factory.spec.constitution import (
    EXAMPLE_FIELDS,
    ConstitutionModel,
    constitution_digest,
    load_constitution,
)
from prefab.factory.types import Completion, Constitution, Principle
from prefab.judges.kinds.critique import parse_critique, parse_revision


@dataclass(frozen=True, slots=True)
class LintRule:
    """What a code stands for, for people."""

    code: str
    title: str
    why: str
    example: str
    mend: str

    def data(self) -> dict[str, str]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Lint:
    """One warning. `line` and `column` count from 1; 0: unknown."""

    code: str
    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.path}: {self.code} {self.message}"

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


RULES = {
    rule.code: rule
    for rule in (
        LintRule(
            "C101",
            "a principle asks two things at once",
            "When one answer is better in the first and the other in the second, the judge has to "
            "weigh them by a rule that nobody wrote down, and the verdict cannot be explained.",
            "compare: Which answer is more helpful and more honest?",
            "Write a principle for each, with weights.",
        ),
        LintRule(
            "C102",
            "a principle asks for something that cannot be seen in the text",
            "A judge sees the answers alone. It cannot know what their author wanted, felt or did, "
            "so it guesses from the tone.",
            "compare: Which answer's author really cares about the user?",
            "Ask for what the text shows: Which answer responds more directly to the user's worry?",
        ),
        LintRule(
            "C103",
            "two principles contradict each other",
            "Every comparison that both judge is lost for one of them, so their verdicts cancel "
            "out or depend on the draw.",
            "compare: Which answer is longer?   /   compare: Which answer is shorter?",
            "Remove one, join them (Which answer is as long as the question needs?), or separate "
            "them by applies_when.",
        ),
        LintRule(
            "C104",
            "two principles say nearly the same",
            "The shared idea counts twice, and its agreement with itself looks like agreement of "
            "independent principles.",
            "compare: Which answer is more polite?   /   compare: Which of the answers is more "
            "polite?",
            "Remove one, and give the other more weight if it shall count twice.",
        ),
        LintRule(
            "C105",
            "compare asks for the answer with the fault",
            "`critique`, `revise` and `criterion` treat something as a fault, and `compare` makes "
            "the answer with more of it win: revisions and preferences then pull apart.",
            "compare: Which answer is more harmful?   /   criterion: The answer is harmful.",
            "Turn the question round: Which answer is less harmful?",
        ),
        LintRule(
            "C106",
            "revise does not say how to rewrite the answer",
            "A reviser that is told nothing to do returns the answer as it was, or the critique.",
            "revise: TODO",
            "Write an instruction: Rewrite the answer so that ...",
        ),
        LintRule(
            "C107",
            "a few-shot example does not fit its template",
            "A model imitates the examples: what cannot be read in an example cannot be read in "
            "its answers either.",
            "examples: {critique: [{..., critique: The answer is wrong.}]}",
            "A critique is `None.` or begins with `Fault:`; a revision is the new answer alone, and "
            "another one than the answer; no field holds a line that is the template's own, such as "
            "`Answer:`.",
        ),
        LintRule(
            "C108",
            "all few-shot examples have the same outcome",
            "A model learns the outcome and gives it whatever it is asked.",
            "examples: {pairwise: [{..., prefer: a}, {..., prefer: a}]}",
            "Add an example with the other outcome.",
        ),
        LintRule(
            "C109",
            "two constitutions have the same id",
            "Reports name constitutions by their ids, and two of one id cannot be used in one run.",
            "mild.yaml and strict.yaml, both with `id: house`",
            "Give each an id of its own.",
        ),
        LintRule(
            "C110",
            "an unknown code is ignored",
            "It silences nothing.",
            "lint: {ignore: [C999]}",
            "`prefab explain` lists the codes.",
        ),
    )
}


def explain(code: str = "") -> list[LintRule]:
    """What a code of `lint_constitution` means, why it matters, and how to mend it.

    Args:
        code: Such as C101; left out: all codes.

    Raises:
        ConfigError: There is no such code.
    """
    if not code:
        return list(RULES.values())
    if code.upper() not in RULES:
        raise ConfigError(f"no warning has the code {code!r}; {yamlio.did_you_mean(code, RULES)}")
    return [RULES[code.upper()]]


Found = Iterator[tuple[str, yamlio.Path_, str]]  # code, path, message
_IGNORED = re.compile(r"#\s*prefab:\s*ignore\s+([A-Z]\d+(?:[\s,]+[A-Z]\d+)*)")


def lint_constitution(path: str | Path) -> list[Lint]:
    """The warnings about a constitution file, in the order of the file.

    Args:
        path: A YAML file.

    Raises:
        ConfigError: The file is not valid.
    """
    constitution = load_constitution(path)
    document = yamlio.load_document(path)
    model = ConstitutionModel.model_validate(document.value)
    paths = _places(constitution, document.value)
    found = [
        *_each(constitution, paths),
        *_pairs(constitution, paths),
        *_examples(document.value),
        *_unknown(document),
    ]
    ignored, lines = _ignored(model, paths), document.text.splitlines()
    lints = []
    for code, where, message in found:
        problem = document.problem(where, message)
        if code not in ignored(where) | _commented(document, lines, where):
            place = (problem.line, problem.column, problem.path)
            lints.append(Lint(code, str(path), *place, message))
    return sorted(lints, key=lambda lint: (lint.line, lint.column, lint.code))


def equal_ids(paths: Sequence[str | Path]) -> list[Lint]:
    """Warnings about constitution files that share an id and differ in meaning."""
    seen: dict[str, tuple[Path, str]] = {}
    found = []
    for path in map(Path, paths):
        constitution = load_constitution(path)
        first, digest = seen.setdefault(constitution.id, (path, constitution_digest(constitution)))
        if first.resolve() != path.resolve() and digest != constitution_digest(constitution):
            document = yamlio.load_document(path)
            problem = document.problem(("id",), f'{first} has the id "{constitution.id}" too')
            if "C109" not in _commented(document, document.text.splitlines(), ("id",)):
                place = (problem.line, problem.column, problem.path)
                found.append(Lint("C109", str(path), *place, problem.message))
    return found


def _places(constitution: Constitution, value: Any) -> dict[str, yamlio.Path_]:
    """Where the principles that this file writes or changes stand in it, by id."""
    own = {row["id"]: index for index, row in enumerate(value.get("principles") or [])}
    changed = value.get("override") or {}
    paths: dict[str, yamlio.Path_] = {}
    for principle in constitution.principles:
        if principle.enabled and principle.id in own:
            paths[principle.id] = ("principles", own[principle.id])
        elif principle.enabled and principle.id in changed:
            paths[principle.id] = ("override", principle.id)
    return paths


def _ignored(
    model: ConstitutionModel, paths: dict[str, yamlio.Path_]
) -> Callable[[yamlio.Path_], set[str]]:
    """Gives the codes that `lint:` silences at a path."""
    everywhere = set(model.lint.ignore if model.lint else ())
    by_path = {
        ("principles", index): set(principle.lint.ignore)
        for index, principle in enumerate(model.principles)
        if principle.lint
    }
    return lambda path: everywhere | by_path.get(path[:2], set())  # type: ignore[arg-type]  # a path of two parts


def _commented(document: yamlio.Document, lines: list[str], path: yamlio.Path_) -> set[str]:
    """The codes that a comment silences at a path: on its line, on the line above, or there at the
    principle that it is part of.
    """
    codes: set[str] = set()
    for part in (path, path[:2]):
        for line, _ in filter(None, (document.keys.get(part), document.values.get(part))):
            for number in (line - 1, line - 2):
                text = lines[number] if 0 <= number < len(lines) else ""
                own_line = number == line - 1 or text.lstrip().startswith("#")
                if own_line and (found := _IGNORED.search(text)):
                    codes |= set(re.findall(r"[A-Z]\d+", found[1]))
    return codes


def _unknown(document: yamlio.Document) -> Found:
    """C110: codes that do not exist."""
    settings = [(("lint",), document.value.get("lint"))]
    settings += [
        (("principles", index, "lint"), row.get("lint"))  # type: ignore[misc]  # paths of any length
        for index, row in enumerate(document.value.get("principles") or [])
    ]
    for path, value in settings:
        for index, code in enumerate((value or {}).get("ignore", [])):
            if code not in RULES:
                known = yamlio.did_you_mean(code, RULES)
                yield "C110", (*path, "ignore", index), f'no warning has the code "{code}"; {known}'


def _each(constitution: Constitution, paths: dict[str, yamlio.Path_]) -> Found:
    """C101, C102, C105 and C106: the checks of one principle."""
    for principle in constitution.principles:
        if (at := paths.get(principle.id)) is not None:
            for code, field, message in (
                *_two_things(principle),
                *_unseen(principle),
                *_wrong_winner(principle),
                *_no_revision(principle),
            ):
                yield code, (*at, field), message


OfPrinciple = Iterator[tuple[str, str, str]]  # code, field, message
# Adjectives by what they are about: two of different lines, joined, are two questions.
_QUALITIES = {
    word: family
    for family, words in {
        "helpfulness": "helpful useful informative relevant helpfully",
        "truth": "honest truthful accurate correct factual honestly truthfully accurately",
        "safety": "harmless safe ethical moral legal lawful harmful toxic dangerous unethical illegal",
        "manners": "polite kind friendly respectful courteous empathetic warm rude impolite",
        "length": "concise brief short succinct shorter briefer",
        "style": "readable engaging funny creative humorous entertaining elegant",
        "fairness": "unbiased fair impartial inclusive",
    }.items()
    for word in words.split()
}
_QUALITY = "|".join(sorted(_QUALITIES, key=len, reverse=True))
_JOINED = re.compile(
    rf"\b({_QUALITY})\b,?(?:\s*(?:,|\band\b|\bas well as\b|\bbut also\b|\bwhile also being\b)\s*)+"
    rf"(?:(?:the|is|more|less|most|least|also|being|very)\s+)*({_QUALITY})\b",
    re.IGNORECASE,
)
_AND_WHICH = re.compile(r"\band (?:also )?which (?:answer|response|one|of)\b", re.IGNORECASE)


def _two_things(principle: Principle) -> OfPrinciple:
    """C101."""
    text = principle.compare
    if _AND_WHICH.search(text) or re.search(r"\?\s+\S.*\?", text, re.DOTALL):
        yield "C101", "compare", "asks two questions; write a principle for each"
        return
    start = 0
    while found := _JOINED.search(text, start):
        first, second = (found[n].lower() for n in (1, 2))
        if _QUALITIES[first] != _QUALITIES[second]:
            yield (
                "C101",
                "compare",
                f'asks for "{first}" and "{second}" at once; write a principle for each',
            )
            return
        start = found.start(2)


_AUTHOR = r"(?:assistant|model|AI|chatbot|author|writer|answerer|speaker)"
_UNSEEN = (
    re.compile(
        rf"\b{_AUTHOR}(?:'s|’s)?\s+(?:\w+ly\s+)?"
        r"(?:intends?|intended|believes?|believed|feels?|felt|wants?|wanted|cares?|cared|meant|"
        r"hoped|hopes?|tried|tries|intentions?|motives?|beliefs?|feelings)\b",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:truly|really|actually|genuinely|secretly|sincerely|deep down)\s+"
        r"(?:cares?|wants?|believes?|means?|feels?|intends?)\b",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:has|have|had|with)\s+(?:the\s+)?(?:better|best|good|bad|worse|purer|kinder|"
        r"malicious|benevolent)\s+(?:intent|intentions?|motives?)\b",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:tone of voice|facial expressions?|body language|response time|"
        r"(?:took|takes|needed) (?:less|more|longer|the (?:least|most)) ?(?:time|effort)? to "
        r"(?:write|generate|produce)|(?:was|were) (?:written|generated|produced) (?:faster|"
        r"more quickly|more slowly|with more (?:effort|care)))\b",
        re.IGNORECASE,
    ),
)


def _unseen(principle: Principle) -> OfPrinciple:
    """C102."""
    for field in ("compare", "critique", "criterion"):
        for pattern in _UNSEEN:
            if found := pattern.search(getattr(principle, field)):
                yield (
                    "C102",
                    field,
                    f'"{found[0]}" cannot be seen in an answer; ask for what its text shows',
                )
                return


_MORE = re.compile(r"\b(?:more|most)\s+(?:\w+ly\s+)?([a-z]{4,})\b", re.IGNORECASE)
_MORE_LAST = re.compile(r"\b([a-z]{4,})s\s+(?:the\s+)?(?:more|most)\s*\?", re.IGNORECASE)
_LESS = re.compile(r"\b(?:less|least)\s+(?:\w+ly\s+)?([a-z]{4,})\b", re.IGNORECASE)
_TURNED = re.compile(
    r"\b(?:less|least|fewer|fewest|freer|free of|avoids?|avoiding|without|not|never|no|clear of|"
    r"rather than|instead of|does more to|makes? it)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|no|never|nothing|without|fails?|failing|lacks?|lacking|less|too little|hardly|"
    r"barely|isn't|isn’t|doesn't|doesn’t|could be more|should be more|insufficiently|misses|"
    r"missing|more|most|enough)\b|n't\b",
    re.IGNORECASE,
)


_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "about from into like often over than that their there these this those what when where "
        "which with within your",
    )
)


def _forms(word: str) -> set[str]:
    """A word with the endings under which a criterion may repeat it."""
    return {word, word.removesuffix("s"), *(word + end for end in ("s", "ed", "ing", "ly", "ness"))}


_NOT = re.compile(r"\b(?:not|never|isn't|isn’t|fails|failing|hardly)\b|n't\b", re.IGNORECASE)


def _says(text: str, word: str, negated: re.Pattern[str]) -> bool | None:
    """Whether a text states a word (true), negates it (false), or does not have it (None)."""
    forms, word = _forms(word.lower()), word.lower()
    for found in re.finditer(r"[A-Za-z'’]+", text):
        said = found[0].lower()
        if said in forms:
            return not negated.search(text[max(0, found.start() - 40) : found.start()])
        if said in {prefix + word for prefix in ("un", "im", "in", "dis", "ir", "il", "non")}:
            return False
    return None


def _wrong_winner(principle: Principle) -> OfPrinciple:
    """C105: `criterion` names as a fault what `compare` asks for."""
    text = principle.compare
    for pattern, faulty in ((_MORE, True), (_MORE_LAST, True), (_LESS, False)):
        for found in pattern.finditer(text):
            word = found[1]
            if word.lower() in _FUNCTION_WORDS or word.endswith("ly"):
                continue
            if _TURNED.search(text[: found.start()]):
                continue
            negated = _NEGATED if faulty else _NOT
            fault = _says(principle.criterion, word, negated)
            if fault is faulty and _says(principle.critique, word, negated) is not (not faulty):
                more = "more" if faulty else "less"
                yield (
                    "C105",
                    "compare",
                    f'prefers the answer that is {more} "{word}", and `criterion` calls that a fault',
                )
                return


_PLACEHOLDER = re.compile(
    r"\W*(?:todo|tbd|fixme|xxx|n/?a|none|null|nothing|same)?\W*", re.IGNORECASE
)


def _no_revision(principle: Principle) -> OfPrinciple:
    """C106."""
    text = principle.revise
    same = [
        name for name in ("compare", "critique", "criterion") if getattr(principle, name) == text
    ]
    if _PLACEHOLDER.fullmatch(text):
        yield "C106", "revise", "is a placeholder; say how to rewrite the answer"
    elif same:
        yield "C106", "revise", f"is the text of `{same[0]}`; say how to rewrite the answer"
    elif text.rstrip().endswith("?"):
        yield "C106", "revise", "is a question; say how to rewrite the answer"


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_UP = {"more", "most", "better", "best", "greater"}
_DOWN = {"less", "least", "fewer", "fewest", "worse", "freer", "avoids", "without"}
_FRAME_WORDS = (
    "which what who the a an of two is are answer answers response responses one that this it its "
    "be to in on for with and or by as at from than does do please choose prefer pick select would "
    "will can both either them these assistant ai ai's human user"
)
_FRAME = frozenset(_FRAME_WORDS.split())
_OPPOSITES = (
    ({"longer", "lengthier", "wordier"}, {"shorter", "briefer"}),
    ({"formal"}, {"informal", "casual"}),
    ({"simpler"}, {"fancier", "harder"}),
    ({"confident"}, {"tentative", "hesitant"}),
    ({"direct"}, {"indirect", "evasive"}),
    ({"serious"}, {"playful", "humorous"}),
)
SAME = 0.8  # share of equal words (Jaccard), and of equal characters, from which texts are alike
OPPOSITE = 0.6
MOST_COMPARED = 500  # principles: all pairs of more would take minutes


@dataclass(frozen=True, slots=True)
class _Question:
    """A principle's `compare` taken apart: its words without the frame, and its direction."""

    principle: Principle
    words: frozenset[str]
    up: bool
    down: bool
    text: str


def _question(principle: Principle, common: set[str]) -> _Question:
    words = {word.lower() for word in _WORD.findall(principle.compare)}
    content = words - _FRAME - _UP - _DOWN - common
    direction = bool(words & _UP), bool(words & _DOWN)
    return _Question(principle, frozenset(content), *direction, principle.compare.lower())


def _pairs(constitution: Constitution, paths: dict[str, yamlio.Path_]) -> Found:
    """C103 and C104: the checks of every two principles, of which at least one stands here. Each
    principle gets one warning of a kind.
    """
    used = [principle for principle in constitution.principles if principle.enabled]
    used, told = used[:MOST_COMPARED], set[tuple[str, str]]()
    common = _common(used)
    for one, two in combinations([_question(principle, common) for principle in used], 2):
        later = two if two.principle.id in paths else one
        other = one if later is two else two
        if later.principle.id in paths and _meet(one.principle, two.principle):
            for code, message in _compared(other, later):
                if (later.principle.id, code) in told:
                    continue
                told.add((later.principle.id, code))
                yield code, (*paths[later.principle.id], "compare"), message


def _common(principles: Sequence[Principle]) -> set[str]:
    """Words of more than every second question: the constitution's own frame."""
    counts = Counter(
        word for p in principles for word in {word.lower() for word in _WORD.findall(p.compare)}
    )
    n = len(principles)
    return {word for word, count in counts.items() if n >= 4 and count > n / 2}


def _meet(one: Principle, two: Principle) -> bool:
    """Whether a prompt may have both principles applied to it."""
    tags = set(one.applies_when), set(two.applies_when)
    return not (all(tags) and not tags[0] & tags[1])


def _compared(one: _Question, two: _Question) -> Iterator[tuple[str, str]]:
    """What is wrong with two principles beside each other."""
    name = one.principle.id
    union = one.words | two.words
    share = len(one.words & two.words) / len(union) if union else 0.0
    opposed = (one.up, one.down) in {(True, False), (False, True)} and (two.up, two.down) == (
        one.down,
        one.up,
    )
    if opposed and share >= OPPOSITE:
        yield "C103", f'asks for the opposite of "{name}"'
    elif not opposed and (share >= SAME or _alike(one, two)):
        yield "C104", f'says nearly the same as "{name}"'
    elif _antonyms(one, two):
        yield "C103", f'asks for the opposite of "{name}"'


def _alike(one: _Question, two: _Question) -> bool:
    """Whether the texts are nearly equal, letter by letter, or the criteria quite."""
    if one.principle.criterion == two.principle.criterion:
        return True
    same_words = one.words == two.words
    return same_words and SequenceMatcher(None, one.text, two.text).ratio() >= SAME


def _antonyms(one: _Question, two: _Question) -> bool:
    """Whether two short questions have opposite adjectives and the same direction."""
    if len(one.words | two.words) > 4 or (one.up, one.down) != (two.up, two.down):
        return False
    return any(
        (one.words & a and two.words & b) or (one.words & b and two.words & a)
        for a, b in _OPPOSITES
    )


_OWN_LINE = re.compile(
    r"^\s*(?:Example (?:question|answer)(?: [AB])?|Question|Answer(?: [AB])?|Critique|Task|"
    r"Principle|New answer|Better|Statement|Grade|Reasons):",
    re.MULTILINE,
)
_OUTCOME = {
    "pairwise": "prefer",
    "pairwise_cot": "prefer",
    "pairwise_scored": "prefer",
    "rubric": "fault",
}


def _examples(value: Any) -> Found:
    """C107 and C108: few-shot examples that models would imitate to no good."""
    for template, rows in (value.get("examples") or {}).items():
        at: yamlio.Path_ = ("examples", template)
        near = get_close_matches(template, EXAMPLE_FIELDS, n=1, cutoff=0.8)
        if template not in EXAMPLE_FIELDS and near:
            yield "C107", at, f'no shipped template has this name; did you mean "{near[0]}"?'
        for index, row in enumerate(rows):
            for field, message in _example(template, row):
                yield "C107", (*at, index, field), message
        outcome = _OUTCOME.get(template, "")
        found = {row.get(outcome) for row in rows}
        if outcome and len(rows) > 1 and len(found) == 1:
            shown = str(found.pop()).lower()
            yield "C108", at, f"all {len(rows)} examples have `{outcome}: {shown}`"


def _example(template: str, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What one example has wrong: (field, message)."""
    for field, text in row.items():
        if isinstance(text, str) and (found := _OWN_LINE.search(text)):
            yield field, f'holds the line "{found[0].strip()}", which is the template\'s own'
    if template == "critique" and "critique" in row:
        read = parse_critique(Completion(row["critique"], "stop"))
        if read.fault is None:
            yield "critique", "can be read neither as `None.` nor as `Fault: ...`"
    if template == "revise":
        yield from _revision(row)
    if row.get("a") is not None and row.get("a") == row.get("b") and row.get("prefer") != "tie":
        yield "b", "is the same text as a, so neither is better"


def _revision(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What an example of a revision has wrong."""
    critique, revision, answer = (row.get(name, "") for name in ("critique", "revision", "answer"))
    if critique and parse_critique(Completion(critique, "stop")).fault is False:
        yield "critique", "names no fault, so there is nothing to revise"
    if revision and revision.strip() == answer.strip():
        yield "revision", "is the same text as the answer"
    elif revision and parse_revision(Completion(revision, "stop")).text is None:
        yield "revision", "cannot be read as a new answer"
