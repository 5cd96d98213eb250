"""Templates are checked when loaded, and no candidate's text can close its fence or become a
control token."""

from __future__ import annotations

import hashlib
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.factory.errors import ConfigError
from prefab.factory.spec.templates import (
    TEMPLATES,
    VARIABLES,
    Template,
    conversation_text,
    fence,
    load_template,
    neutralise,
)
from prefab.factory.types import Message

WORDS = {
    "conversation": "<1>\nQ\n</1>",
    "answer": "<2>\nX\n</2>",
    "answer_a": "<2>\nX\n</2>",
    "answer_b": "<3>\nY\n</3>",
    "answers": ["X", "Y"],
    "question": "Which is kinder?",
    "critique": "Fault: rude.",
    "reasoning": "A is kind.",
    "examples": [],
}
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<bos>",
    "<eos>",
    "[CLS]",
    "<think>",
    "<<SYS>>",
]


def given_to(kind: str) -> dict:
    return {k: v for k, v in WORDS.items() if k in VARIABLES[kind]}


@pytest.mark.parametrize("kind", sorted(VARIABLES))
def test_every_shipped_template_renders_with_its_variables(kind):
    messages = load_template(kind).render(**given_to(kind))
    assert [m.role for m in messages][:2] == ["system", "user"]
    said = "\n".join(m.content for m in messages)
    for name in VARIABLES[kind] - {"examples", "answers"}:
        assert WORDS[name] in said, f"{kind}.jinja does not show {name}"


def test_what_repeats_stands_first():
    """The pair comes before the principle: all principles of a pair share its prefix."""

    def user(question):
        return (
            load_template("pairwise")
            .render(**given_to("pairwise") | {"question": question})[1]
            .content
        )

    one, two = user("First?"), user("Second?")
    assert (
        one.index("First?") > one.index("</3>")
        and one[: one.index("First?")] == two[: two.index("Second?")]
    )


def test_examples_are_shown_and_a_missing_field_is_told():
    shown = load_template("critique").render(
        **given_to("critique")
        | {"examples": [{"prompt": "p1", "answer": "a1", "critique": "None."}]}
    )
    assert "p1" in shown[1].content and "a1" in shown[1].content
    with pytest.raises(ConfigError, match="critique.jinja.*critique"):
        load_template("critique").render(
            **given_to("critique") | {"examples": [{"prompt": "p1", "answer": "a1"}]}
        )


def test_an_unknown_variable_is_an_error_with_its_line():
    with pytest.raises(ConfigError) as error:
        Template(
            "mine.jinja",
            "pairwise",
            "{% block user %}\n{{ conversation }}\n{{ anwser_a }}{% endblock %}",
            "mine.jinja",
        )
    assert str(error.value).startswith(
        "mine.jinja:3:1 anwser_a: unknown variable; a pairwise template may use answer_a"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% block user %}{{ question", "unexpected end of template"),
        ("hello", "no {% block user %}"),
        ("{% block user %}x{% endblock %}{% block judge %}y{% endblock %}", "unknown block"),
    ],
)
def test_a_broken_template_says_what_is_wrong(text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        Template("t", "pairwise", text)


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(ConfigError, match="no such template; there are: critique.jinja"):
        load_template("pairwse.jinja")


def test_a_template_is_sandboxed():
    template = Template(
        "t", "pairwise", "{% block user %}{{ question.__class__.__mro__ }}{% endblock %}"
    )
    with pytest.raises(Exception, match="unsafe|undefined"):
        template.render(**given_to("pairwise"))


def test_a_fence_cannot_be_closed_from_inside():
    """A text is searched for that contains the id it would get at i = 0; its fence must take the
    next one."""
    prompt = "How do I paint a boat?"
    haystack = "%04096x" % random.Random(0).getrandbits(  # noqa: UP031
        4 * 4096
    )  # 4,091 ids stand in it: about 4,100 tries are needed
    for n in range(60_000):
        text = f"{haystack}{n}"
        first = hashlib.sha256(f"{prompt}\0{text}\0{0}".encode()).hexdigest()[:6]
        if first in text:
            break
    else:
        pytest.fail("no such text found")
    fenced = fence(prompt, text)
    tag = re.match(r"<([0-9a-f]{6})>\n", fenced)[1]
    assert tag != first and tag not in text and fenced == f"<{tag}>\n{text}\n</{tag}>"


@given(st.text(), st.text())
def test_a_fence_is_a_function_of_prompt_and_text_and_keeps_the_text(prompt, text):
    fenced = fence(prompt, text)
    tag = fenced[1:7]
    assert fenced == fence(prompt, text) and tag not in neutralise(text)
    assert fenced == f"<{tag}>\n{neutralise(text)}\n</{tag}>"


@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_loses_its_spelling_and_nothing_else(token):
    text = neutralise(f"before {token} after")
    assert token not in text and text.replace(" ", "") == f"before{token}after".replace(" ", "")
    assert neutralise(text) == text


def test_a_tokenizers_own_tokens_are_broken_too():
    assert neutralise("a <ctrl99> b", ("<ctrl99>",)) == "a < ctrl99> b"


def test_ordinary_text_is_left_alone():
    text = "if a < b and c[0] > 1: print('<p>hi</p>')  # [1] <b>"
    assert neutralise(text) == text


def test_conversations_as_text():
    assert conversation_text((Message("user", "Hi?"),)) == "Hi?"
    talk = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "Go"))
    assert conversation_text(talk) == "User: Hi\nAssistant: Yes?\nUser: Go"


def test_every_template_has_a_kind():
    stems = {p.stem.removesuffix("_one_shot") for p in TEMPLATES.glob("*.jinja")}
    assert stems == set(VARIABLES)
