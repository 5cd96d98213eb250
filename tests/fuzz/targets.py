"""What is fuzzed: for each target, how its inputs are made, and what must hold of every one.

An input is JSON data (text, or a list of texts and numbers), so that it can be kept in the corpus.
A target raises AssertionError where a promise is broken; any other exception is a finding too.
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from prefab.factory.errors import ConfigError
from prefab.factory.label_text import find_label
from prefab.factory.spec import data_files, layouts, yamlio
from prefab.factory.spec.constitution import constitution_digest, parse_constitution
from prefab.factory.spec.control_tokens import neutralise
from prefab.factory.spec.templates import VARIABLES, Template
from prefab.factory.thinking import split_thinking
from prefab.factory.types import Completion, Message
from prefab.judges.kinds import critique, listwise, pairwise, pointwise
from prefab.pipelines.config.prompts import parse_row
from prefab.pipelines.config.schema import PromptsConfig

CONSTITUTIONS = Path(__file__).parents[2] / "constitutions"
PAIRWISE = pairwise.PairwiseJudge(pairwise.PairwiseConfig(name="pairwise"))
FORMS = pairwise.PairwiseJudge(pairwise.PairwiseConfig(name="forms", answer_tokens=8))
POINTWISE = pointwise.PointwiseJudge(pointwise.PointwiseConfig(name="pointwise"))
PROMPTS = PromptsConfig(source="x.jsonl")


@dataclass(frozen=True)
class Target:
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]


# ---- texts of models


def pieces(*words: str) -> st.SearchStrategy[str]:
    """Texts that mix the words which a parser looks for with any others."""
    return st.lists(st.sampled_from(words) | st.text(max_size=12), max_size=30).map("".join)


THOUGHT = pieces(
    *("<think>", "</think>", "<thinking>", "</thinking>", "<|channel|>analysis", "<|message|>"),
    *(
        "A",
        " A",
        "B",
        "T",
        "Answer: ",
        "Better: ",
        "**",
        "`",
        "```",
        "\n",
        "\n\n",
        " ",
        "The answer is ",
    ),
    *("\\boxed{A}", '{"winner": "A"}', "[[A]]", "(B)", "A or B", "not ", "\u200b", "\u202e"),
)
CRITIQUES = pieces(
    *(
        "Fault: ",
        "None.",
        "None",
        "Fault",
        "fault",
        "No fault",
        "Critique:",
        "Here is the revised answer:",
    ),
    *(
        "Sure! ",
        "1. ",
        "- ",
        "> ",
        "# ",
        "**",
        "_",
        '"',
        "\u201c",
        "\u2019",
        "```",
        "```text\n",
        "\n",
        "\n\n",
        "---\n",
    ),
    *(
        "<answer>",
        "</answer>",
        "I have revised",
        "Note: ",
        "Changes:",
        "<think>",
        "</think>",
        "(",
        "[",
        "*" * 50,
    ),
)
RANKINGS = pieces(
    "1",
    "2",
    "3",
    "4",
    " > ",
    ", ",
    "\n",
    ".",
    "Answer ",
    "[",
    "]",
    "=",
    " ",
    "10",
    "\u0661",
    "\u00b2",
)
LOGP = (
    st.none() | st.floats() | st.integers(-(10**30), 10**30) | st.text(max_size=3) | st.booleans()
)
COMPLETIONS = st.tuples(
    THOUGHT,
    st.sampled_from(("stop", "length", "context", "refused")),
    st.none() | st.dictionaries(st.sampled_from(("A", "B", "T", " A", " B", " T", "C", "")), LOGP),
    st.sampled_from(("exact", "bounds", "hard")),
)


def as_completion(value: Any) -> Completion:
    text, finish, logps, exactness = value
    return Completion(text, finish, logps, exactness)


def check_verdict(value: Any) -> None:
    """A probability and a winner that agree, or a reason; never both; the other order mirrors."""
    completion = as_completion(value)
    for judge in (PAIRWISE, FORMS):
        one, other = judge.parse(completion, "ab"), judge.parse(completion, "ba")
        assert (one.p_a is None) == (one.winner is None) == (one.reason is not None)
        assert one.reason == other.reason
        if one.p_a is not None and other.p_a is not None:
            assert 0.0 <= one.p_a <= 1.0
            assert math.isclose(one.p_a, 1.0 - other.p_a, abs_tol=1e-9)
            mirrored = {"a": "b", "b": "a", "tie": "tie"}
            assert other.winner == mirrored[str(one.winner)]
            assert completion.finish not in ("context", "refused")
    score = POINTWISE.decode(None, completion)
    assert (score.value is None) == (score.reason is not None)
    assert score.value is None or 1 <= score.value <= 9


def check_texts(text: str) -> None:
    """Every parser of a text gives a value or a reason."""
    for finish in ("stop", "length"):
        completion = Completion(text, finish)  # type: ignore[arg-type]
        found = critique.parse_critique(completion)
        assert (found.fault is None) == (found.reason is not None)
        revision = critique.parse_revision(completion)
        assert bool(revision.text) != (revision.reason is not None)
        ranking = listwise.parse(completion, (2, 0, 1))
        assert (ranking.order is None) == (ranking.reason is not None)
        assert ranking.order is None or sorted(ranking.order) == [0, 1, 2]
    split = split_thinking(text)
    assert isinstance(split.answer, str)
    label = find_label(text, ("A", "B", "T"))
    assert label is None or label.label.strip() in ("A", "B", "T")


def check_neutralised(text: str) -> None:
    """No control token is left, and neutralising again changes nothing."""
    once = neutralise(text, ("<special>",))
    assert neutralise(once, ("<special>",)) == once
    for token in ("<|im_end|>", "</s>", "[INST]", "<special>", "</think>"):
        assert token not in once


# ---- people's files


def mutated(valid: list[str], *words: str) -> st.SearchStrategy[str]:
    """Valid documents with parts cut out, doubled, or replaced by other text."""

    @st.composite
    def make(draw: st.DrawFn) -> str:
        text = draw(st.sampled_from(valid))
        for _ in range(draw(st.integers(1, 5))):
            start = draw(st.integers(0, len(text)))
            end = min(len(text), start + draw(st.integers(0, 40)))
            new = draw(st.sampled_from(words) | st.text(max_size=8) | st.just(text[start:end] * 2))
            text = text[:start] + new + text[end:]
        return text

    return make() | pieces(*words) | st.text()


YAML_WORDS = (
    "\n",
    "  ",
    "- ",
    ": ",
    "&a ",
    "*a",
    "<<: *a",
    "!!python/object:x ",
    "!!binary ",
    "|",
    ">",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "# ",
    "---\n",
    "...\n",
    "? ",
    "~",
    "null",
    "no",
    "1:30",
    "0x1f",
    ".nan",
    ".inf",
    "1e999",
    "9" * 400,
    "\t",
    "\x00",
    "\x85",
    "\u2028",
    "\ufeff",
    "\\ud800",
    "id",
    "principles:\n",
    "tests:\n",
    "examples: {critique: [{}]}\n",
    "weight: -1\n",
)
CONSTITUTION_TEXTS = mutated(
    [file.read_text(encoding="utf-8")[:3000] for file in sorted(CONSTITUTIONS.glob("*.yaml"))],
    *YAML_WORDS,
)


def check_constitution(text: str) -> None:
    """A constitution whose digest can be made, or mistakes with their places."""
    try:
        constitution = parse_constitution(text, "c.yaml")
    except ConfigError as error:
        assert str(error)
        return
    assert constitution.principles
    assert len(constitution_digest(constitution)) >= 16
    assert all(math.isfinite(p.weight) for p in constitution.principles)


def check_yaml(text: str) -> None:
    """A document, a value (of `--set`), or a mistake in words."""
    try:
        yamlio.parse(text)
    except ConfigError as error:
        assert str(error)
    try:
        yamlio.scalar(text)
    except ValueError as error:  # a ConfigError is one
        assert str(error)


ROWS = [
    '{"prompt": "What?", "id": "a", "tags": ["x"], "group": "g", "split": "train"}\n{"prompt": "Why?"}\n',
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}\n',
    '{"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 7, "score_rejected": 2.5}\n',
    '{"prompt": [{"role": "user", "content": "Q"}], "completions": ["a", "b"], "rankings": [2, 1]}\n',
    '{"instruction": "Do", "input": "x", "output": "y", "rubric": [{"criterion": "c", "weight": 2}]}\n',
    '[{"prompt": "What?"}, {"conversations": [{"from": "human", "value": "x"}]}]',
    'prompt,chosen,rejected\n"What, now?",yes,no\n',
    "prompt\tsplit\nWhat?\ttest\n",
]
ROW_WORDS = (
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "\\ud800",
    "null",
    "NaN",
    "Infinity",
    "-1e999",
    "9" * 5000,
    "\n",
    "\t",
    "\x00",
    "\ufeff",
    '"role": ',
    '"content": ',
    '"tool_calls": [{}]',
    '"system"',
    '{"type": "image"}',
    "true",
    "0.5",
    "[[[[[[[[[[",
    '"prompt": ',
    '""',
)
FILES = st.tuples(
    st.sampled_from((".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet", ".txt", ".arrow")),
    mutated(ROWS, *ROW_WORDS),
)


def check_reader(value: Any) -> None:
    """Rows, each a value or a ValueError in its place; or a mistake that names the file. Each value
    is a record or a ValueError, and so is a prompt."""
    suffix, text = value
    data = text.encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"x{suffix}"
        file.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        try:
            rows = [row for _, row in _numbered(file)]
        except ConfigError as error:
            assert "x." in str(error)
            return
    for row in rows:
        if isinstance(row, ValueError):
            continue
        for parse in (layouts.parse, lambda row: parse_row(row, PROMPTS)):
            try:
                found = parse(row)
            except ValueError as error:
                assert str(error)
                continue
            json.dumps(repr(found))


def _numbered(file: Path) -> list[tuple[int, Any]]:
    """Rows whatever shape the reader yields them in: the value is the last part."""
    rows = data_files.rows(file, text=True)
    return [(n, row[-1] if isinstance(row, tuple) else row) for n, row in enumerate(rows)]


TEMPLATE_WORDS = (
    "{% block user %}",
    "{% endblock %}",
    "{% block system %}",
    "{{ ",
    " }}",
    "{% for e in examples %}",
    "{% endfor %}",
    "{% if ",
    "%}",
    "{% endif %}",
    "conversation",
    "answer_a",
    "answer_b",
    "question",
    "examples",
    "e.prompt",
    " | upper",
    " | random",
    " | length",
    " | attr('__class__')",
    ".__class__",
    "[0]",
    "('x')",
    " ~ ",
    " + ",
    " * 9",
    "**",
    "1/0",
    "range(9)",
    "{% set x = 1 %}",
    "{% include 'x' %}",
    "{% extends 'y' %}",
    "{% macro m() %}",
    "{% endmacro %}",
    "{# ",
    " #}",
    "{% raw %}",
    "loop.index",
    "cycler",
    "namespace()",
    "self.user()",
    "super()",
    "is defined",
    "not ",
    "'",
    '"',
    "-%}",
    "\x00",
)
TEMPLATES = mutated(
    [
        "{% block system %}Judge.{% endblock %}{% block user %}{{ conversation }} {{ answer_a }} {{ answer_b }} {{ question }}"
        "{% for e in examples %}{{ e.prompt }}{% endfor %}{% endblock %}"
    ],
    *TEMPLATE_WORDS,
)
VALUES = {
    "conversation": "Hi",
    "answer_a": "a",
    "answer_b": "b",
    "question": "Which?",
    "examples": [],
}


def check_template(text: str) -> None:
    """Messages, or a mistake, at loading or at rendering; the same twice."""
    try:
        template = Template("t.jinja", "pairwise", text, "t.jinja")
        values = {name: VALUES.get(name, "x") for name in VARIABLES["pairwise"]}
        first, second = template.render(**values), template.render(**values)
    except ConfigError as error:
        assert str(error)
        return
    assert first == second
    assert all(isinstance(message, Message) and message.content for message in first)


TARGETS = {
    "verdicts": Target(COMPLETIONS, check_verdict),
    "texts": Target(THOUGHT | CRITIQUES | RANKINGS | st.text(), check_texts),
    "control_tokens": Target(
        pieces(
            "<",
            "|",
            ">",
            "im_end",
            "<|im_end|>",
            "</s>",
            "[INST]",
            "<special>",
            " ",
            "/",
            "[",
            "]",
            "<|",
            "|>",
            "</think>",
        ),
        check_neutralised,
    ),
    "constitution": Target(CONSTITUTION_TEXTS, check_constitution),
    "yaml": Target(mutated(["a: [1, {b: c}]\n"], *YAML_WORDS), check_yaml),
    "readers": Target(FILES, check_reader),
    "templates": Target(TEMPLATES, check_template),
}
