"""Which label an answer's form names, and which answers name none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.factory.label_text import find_label, opening_label

ABT = ("A", "B", "T", " A", " B", " T")
GRADES = tuple(str(i) for i in range(1, 10))


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("**A**", "A"),
        ("A.", "A"),
        ("(B)", "B"),
        ("[[A]]", "A"),
        ("My final verdict is: [[B]]", "B"),
        (r"\boxed{A}", "A"),
        (r"$\boxed{\text{B}}$", "B"),
        (r"The answer is $\boxed{T}$.", "T"),
        ("Answer: A", "A"),
        ("Answer: **A**", "A"),
        ("**Answer:** A", "A"),
        ("**Answer**: B", "B"),
        ("Answer： B", "B"),
        ("Final answer: [[A]]\n\nIt is kinder.", "A"),
        ("The better choice is B.", "B"),
        ("A is short.\nB asks for more.\n\nVerdict: A", "A"),
        ("A is short. B asks for more.\n\n**B**", "B"),
        ("A\n\nBecause it is kinder than B.", "A"),
        ("<answer>T</answer>", "T"),
        ("Answer: A\n\n[[A]]", "A"),
        ("Winner = B", "B"),
        ('{"winner": "A"}', "A"),
    ],
)
def test_a_form_names_a_label(answer, label):
    found = find_label(answer, ABT)
    assert found.label == label == answer[found.offset]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "a",
        "C",
        "AB",
        "A or B",
        "A and B",
        "A/B",
        "Answer: A or B",
        "Answer: A/B",
        "Answer: neither",
        "Answer: C",
        "Answer: Apple",
        "A is kinder than B.",
        "Answer A is better.",
        "[[A]] is better than [[B]]",
        "Answer: A\nAnswer: B",
        "A\nB",
        "Reply with [[A]] or [[B]].",
        'winner": "A"T',
        r"\boxed{A, B}",
        "I cannot choose.",
        "Answer: " + "A" * 10_000,
    ],
)
def test_without_one_clear_form_there_is_none(answer):
    assert find_label(answer, ABT) is None


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("7", "7"),
        ("Rating: [[7]]", "7"),
        ("Score: **7**", "7"),
        ("**Rating: 7**", "7"),
        ("Score: 7.", "7"),
        ("7/9", None),
        ("Score: 7/9", None),
        ("Score: 7.5", None),
        ("Score: 10", None),
        ("10", None),
        ("-7", None),
        ("Score: 7 to 8", None),
        ("Score: 1,000", None),
    ],
)
def test_a_grade_is_a_whole_number(answer, label):
    found = find_label(answer, GRADES)
    assert (found and found.label) == label


def test_words_are_found_in_any_case():
    assert find_label("Answer: yes", ("Yes", "No")).label == "Yes"
    assert find_label("**NO**", ("Yes", "No")).label == "No"
    assert find_label("Nobody", ("Yes", "No")) is None
    assert find_label("Yes and no", ("Yes", "No")) is None


@given(st.text(alphabet="AB *[]:.\nanswer(){}\\boxed$", max_size=60))
def test_what_is_found_stands_in_the_answer(answer):
    found = find_label(answer, ABT)
    assert found is None or answer[found.offset] == found.label in "ABT"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Fault: it is rude.", ("Fault", 0)),
        ("None.", ("None", 0)),
        ("- **Fault:** it is rude.", ("Fault", 4)),
        ("FAULT\nrude", ("Fault", 0)),
        ("Fault：rude", ("Fault", 0)),
        ("None of it is kind.", None),
        ("No fault: none.", None),
        ("It has a Fault: rude.", None),
    ],
)
def test_the_label_that_a_text_begins_with(answer, found):
    assert opening_label(answer, ("None", "Fault", " None", " Fault")) == found


def test_a_letter_that_a_text_begins_with_is_no_label():
    assert opening_label("A: it is rude.", ABT) is None


@pytest.mark.parametrize(
    "text",
    [
        "\n",
        " \n",
        "```\n",
        "\n- ",
        "Answer{}",
        "Answer is{}",
        "\\boxed{{{}",
        "Answer is ",
        "[[",
        "(",
    ],
)
def test_a_long_text_takes_time_in_proportion(text):
    """40,000 characters at each of which a pattern may begin."""
    long = text.format(" " * 40_000) if "{}" in text else text * (40_000 // len(text))
    began = time.process_time()
    for answer in (long, f"{long}x"):
        assert find_label(answer, ABT) is None and opening_label(answer, ("Fault", "None")) is None
    assert time.process_time() - began < 1
