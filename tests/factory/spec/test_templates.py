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
from prefab.factory.spec.control_tokens import neutralise
from prefab.factory.spec.templates import (
    TEMPLATES,
    VARIABLES,
    Template,
    conversation_text,
    fence,
    load_template,
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
        ("{% block user %}x{% endblock %}{% block user_1 %}y{% endblock %}", "unknown block"),
        (
            "{% block user %}x{% endblock %}{% block user_3 %}y{% endblock %}",
            "assistant_2 is missing",
        ),
    ],
)
def test_a_broken_template_says_what_is_wrong(text, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        Template("t", "pairwise", text)


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(ConfigError, match="no such template; there are: critique.jinja"):
        load_template("pairwse.jinja")


REFUSED = [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not read '__class__'"),
    ("{{ question['__class__'] }}", "may not read '__class__'"),
    ("{{ ''|attr('__class__') }}", "unknown filter 'attr'"),
    ("{{ ['{0.__class__}']|map(attribute='format')|list }}", "unknown filter 'map'"),
    ("{% set f = '{0}'.format %}{{ f(question) }}", "may call range and the methods"),
    ("{{ '{x.__class__}'.format_map({'x': question}) }}", "may call range and the methods"),
    ("{{ '{:>9999999999}'.format('x') }}", "may call range and the methods"),
    ("{{ 'x'.zfill(10000000000) }}", "may call range and the methods"),
    ("{{ cycler.next() }}", "may call range and the methods"),
    ("{{ question.strip(*examples) }}", "plain arguments only"),
    ("{{ self|tojson }}", "may not use self"),
    ("{{ {'a': 1} }}", "may not use a mapping in braces"),
    ("{% include '/etc/passwd' %}", "may not use {% include %}"),
    ("{% import 'x' as x %}", "may not use {% import %}"),
    ("{% from 'revise.jinja' import x %}", "may not use {% from %}"),
    ("{% extends '/etc/passwd' %}", "may not use {% extends %}"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "may not use {% macro %}"),
    ("{% set ns.x = 1 %}", "may not use namespace"),
    ("{% set x %}{{ question }}{% endset %}", "may not use {% set %} with {% endset %}"),
    ("{% with x = 1 %}{% endwith %}", "may not use {% with %}"),
    ("{% filter upper %}a{% endfilter %}", "may not use {% filter %}"),
    ("{% autoescape true %}a{% endautoescape %}", "may not use {% autoescape %}"),
    ("{{ 1/0 }}", "may not use /"),
    ("{{ 10**(10**8) }}", "may not use **"),
    ("{{ question * 10000000000 }}", "may not use *"),
    ("{{ '%10000000000d' % 1 }}", "may not use %"),
    ("{{ question|nope }}", "unknown filter 'nope'"),
    ("{{ question is nope }}", "unknown test 'nope'"),
    ("{% if false %}{{ question|nope }}{% endif %}", "unknown filter 'nope'"),
    ("{{ [1, 2, 3]|random }}", "unknown filter 'random'"),
    ("{{ 'x'|center(10000000000) }}", "unknown filter 'center'"),
    ("{{ 1|round(100000000, 'ceil') }}", "unknown filter 'round'"),
    ("{{ question|tojson(indent=1000000000) }}", "takes no arguments"),
    ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "may not be recursive"),
    ("{% for a in answers %}" * 3 + "{% endfor %}" * 3, "more than 2 loops"),
    ("{{ " + " ~ ".join(["question"] * 100) + " }}", "more than 64 texts"),
    ("{% set a = question %}" + "{% set a = a ~ a %}" * 40, "more than 64 texts"),
    ("{% set a = [question] %}" + "{% set a = [a, a] %}" * 40, "more than 64 texts"),
    (
        "{% if question %}{% set a = question ~ question %}{% endif %}" * 1
        + "{% if question %}{% set a = a ~ a %}{% endif %}" * 40,
        "more than 64 texts",
    ),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ("{{ " + "not " * 60 + "question }}", "nested too deeply"),
    ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply"),
    ("{{ " + "9" * 5000 + " }}", "cannot be read"),
    ("x" * 300_000, "at most 262,144"),
    ("{{ 1 }}" * 10_000, "too long"),
    ("<|im_end|>", "writes the control token <|im_end|>"),
    ("{{ '[INST]' }}", "writes the control token [INST]"),
]


def with_body(body: str) -> str:
    return "{% block user %}\n{{ conversation }}{{ question }}\n" + body + "\n{% endblock %}\n"


@pytest.mark.parametrize(("body", "says"), REFUSED, ids=[body[:40] for body, _ in REFUSED])
def test_what_a_template_may_not_do_is_refused_when_it_is_loaded(body, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        Template("mine.jinja", "listwise", with_body(body), "dir/mine.jinja")
    first = error.value.problems[0]
    assert first.file == "dir/mine.jinja"
    if "deeply" not in says and "at most" not in says and "cannot be read" not in says:
        assert first.line == 3


FAILS = [
    ("{{ 'a' + 1 }}", "3:1: cannot be filled in: can only concatenate str"),
    ("{{ question.nope }}", "3:1: cannot be filled in: 'str object' has no attribute 'nope'"),
    ("{{ question.strip }}", "3:1: cannot be filled in: access to attribute 'strip'"),
    ("{{ question['format'] }}", "3:1: cannot be filled in: access to attribute 'format'"),
    ("{{ examples.items() }}", "3:1: cannot be filled in: list has no method items"),
    ("{{ 4 is divisibleby(0) }}", "3:1: cannot be filled in: integer modulo by zero"),
    ("{{ question|indent(1000000000, true) }}", "3:1: cannot be filled in: makes a text of"),
    (
        "{{ question|replace('', question)|replace('', question) }}",
        "3:1: cannot be filled in: makes",
    ),
    ("{{ question|join(question)|join(question) }}", "3:1: cannot be filled in: makes a text of"),
    ("{% for i in range(99999) %}x{% endfor %}", "3:1: cannot be filled in: range gives 99,999"),
    ("{% for c in question %}{{ c }}{% endfor %}", "3:1: cannot be filled in: its loops take more"),
    (
        "{% for i in range(90) %}{% for j in range(99) %}{% for_ %}{% endfor %}{% endfor %}".replace(
            "{% for_ %}", "{{ conversation }}{{ question }}{{ question }}"
        ),
        "cannot be filled in: makes more than 4,000,000 characters",
    ),
    (
        "{% for i in range(100) %}{% for j in range(99) %}{% if "
        + " and ".join(["question|list|sort"] * 30)
        + " %}{% endif %}{% endfor %}{% endfor %}",
        "takes more than 1 s or 512 MB on sample values",
    ),
]


@pytest.mark.parametrize(("body", "says"), FAILS, ids=[body[:40] for body, _ in FAILS])
def test_a_template_is_tried_on_sample_values(tmp_path, body, says):
    file = tmp_path / "mine.jinja"
    file.write_text(with_body(body))
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_template(file, "listwise")


READS = [
    "{% set x = question|upper %}",
    "{% set x = question ~ question %}",
    "{% set x = question + question %}",
    "{% if 'zz' in question %}x{% endif %}",
    "{% if question is upper %}x{% endif %}",
    "{% if question.split() %}{% endif %}",
    "{% if answers|join %}{% endif %}",
]


@pytest.mark.parametrize("body", READS)
def test_loops_read_long_texts_a_bounded_number_of_times(tmp_path, body):
    """On sample values they take less than a second; on a long text they would take minutes."""
    file = tmp_path / "mine.jinja"
    loops = "{% for i in range(5) %}{% for j in range(50) %}"
    file.write_text(with_body(loops + body + "{% endfor %}{% endfor %}"))
    template = load_template(file, "listwise")
    text = "a word " * 60_000
    with pytest.raises(ConfigError, match="its loops read more than 50,000,000 characters"):
        template.render(**given_to("listwise") | {"question": text, "answers": [text]})


def test_what_reads_nothing_may_stand_in_loops_over_long_texts(tmp_path):
    file = tmp_path / "mine.jinja"
    body = "{% if question is defined and question|length > 1 and question != 'b' %}.{% endif %}"
    file.write_text(with_body("{% for i in range(100) %}" + body + "{% endfor %}"))
    values = given_to("listwise") | {"question": "a word " * 200_000}
    (message,) = load_template(file, "listwise").render(**values)
    assert "." * 100 in message.content


def test_a_template_may_do_what_prompts_need(tmp_path):
    file = tmp_path / "mine.jinja"
    body = """{% set short = question[:200].strip()|upper %}
{% for e in examples if e.prompt is defined %}{% if not loop.first %}; {% endif %}
{% for name, text in e.items()|sort %}{{ name }}={{ text|trim|indent(2) }}{% endfor %}
{% else %}none
{% endfor %}
{% for i in range(answers|length) %}{{ i + 1 }}. {{ answers[i].split('.')[0] }}{% endfor %}
{{ short if short else 'x' }} {{ answers|join(', ')|replace('X', 'Z')|truncate(99) }}"""
    file.write_text(with_body(body))
    template = load_template(file, "listwise")
    values = given_to("listwise") | {"examples": [{"prompt": "p", "label": "l"}]}
    (message,) = template.render(**values)
    assert message.content.endswith("label=lprompt=p1. X2. YWHICH IS KINDER? Z, Y"), message.content


def test_an_error_while_rendering_names_file_and_line(tmp_path):
    """The samples pass; a value that comes later does not."""
    file = tmp_path / "mine.jinja"
    file.write_text(with_body("{% if 'rude' in question %}\n{{ question.tone }}\n{% endif %}"))
    template = load_template(file, "pointwise")
    with pytest.raises(ConfigError, match=re.escape(f"{file}:4:1: cannot be filled in")):
        template.render(conversation="", answer="", question="Is it rude?", examples=[])


def test_a_missing_file_is_not_replaced_by_a_shipped_one(tmp_path):
    with pytest.raises(ConfigError, match="my/critique.jinja: no such template"):
        load_template("my/critique.jinja")
    with pytest.raises(ConfigError, match="is a directory"):
        load_template(tmp_path)


@pytest.mark.parametrize("data", [b"{% block user %}caf\xe9{% endblock %}", "x".encode("utf-16")])
def test_a_template_that_is_not_utf8_is_refused(tmp_path, data):
    file = tmp_path / "critique.jinja"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="critique.jinja:1:.*not UTF-8"):
        load_template(file)


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
    stems = {re.sub("(_one_shot)?(_labels)?$", "", p.stem) for p in TEMPLATES.glob("*.jinja")}
    assert stems == set(VARIABLES)


def test_any_number_of_turns_in_the_order_of_the_conversation():
    names = [
        "user",
        "assistant",
        *(f"{who}_{i}" for i in range(2, 12) for who in ("user", "assistant")),
    ]
    blocks = [
        "{% block " + name + " %}" + name + "{% endblock %}"
        for name in [*reversed(names), "system"]
    ]
    messages = Template("critique", "critique", "".join(blocks)).render()
    assert [m.content for m in messages] == ["system", *names]
    assert [m.role for m in messages][1:] == ["user", "assistant"] * 11


FRONT = "---\nlabels: [None, Fault]\n---\n"
BODY = "{% block user %}{{ answer }}{% endblock %}"


def test_front_matter_names_the_labels_of_a_critique_and_is_no_part_of_its_messages():
    plain, labelled = Template("c", "critique", BODY), Template("c", "critique", FRONT + BODY)
    assert (plain.labels, labelled.labels) == ((), ("None", "Fault"))
    assert plain.render(answer="x") == labelled.render(answer="x")
    assert plain.digest != labelled.digest


@pytest.mark.parametrize("name", ["critique", "critique_one_shot"])
def test_shipped_critiques_with_labels_have_the_words_of_those_without(name):
    text = (TEMPLATES / f"{name}.jinja").read_text()
    assert (TEMPLATES / f"{name}_labels.jinja").read_text() == FRONT + text


@pytest.mark.parametrize(
    ("kind", "front"),
    [
        ("critique", "labels: [None]\n"),
        ("critique", "labels: [Fault, fault]\n"),
        ("critique", "labels: [No fault, Fault]\n"),
        ("critique", "label: [None, Fault]\n"),
        ("critique", "- None\n"),
        ("pointwise", "labels: [None, Fault]\n"),
    ],
)
def test_other_front_matter_is_an_error_with_its_place(kind, front):
    with pytest.raises(ConfigError, match=r"c\.jinja:2:1 labels: front matter has"):
        Template("c", kind, f"---\n{front}---\n{BODY}", "c.jinja")


def test_problems_after_front_matter_are_told_at_their_line():
    with pytest.raises(ConfigError, match=r"c\.jinja:4:1 wrong: unknown variable"):
        Template("c", "critique", FRONT + BODY.replace("answer", "wrong"), "c.jinja")
