"""The data gate: each rule finds every planted defect, and what it says of clean data is
counted."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.microworld import grammar, oracle
from prefab.factory.types import Completion
from prefab.pipelines.quality import data_rules, near_duplicates
from prefab.pipelines.quality.data_audit import audit
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query, rebuild
from tests.support import project

VOCABULARY = [
    a + b
    for a in ("ba", "co", "du", "fi", "ga", "he", "ju", "ka", "lo", "mu")
    for b in (
        "rn",
        "st",
        "lk",
        "mp",
        "nd",
        "ft",
        "sk",
        "lt",
        "rd",
        "nt",
        "rk",
        "lm",
        "sp",
        "pt",
        "ck",
        "ng",
    )
]


def sentence(rng, n):
    """n words that stand in no other sentence in this order."""
    return " ".join(rng.choices(VOCABULARY, k=n))


def row(rng, i, **changes):
    """A pair with nothing wrong with it."""
    return {
        "preference": f"p{i:05d}",
        "prompt": f"q{i}",
        "text": sentence(rng, 15),
        "chosen": sentence(rng, 40),
        "rejected": sentence(rng, 45),
        "p_chosen": 0.9,
        "calibrated": True,
        "group": f"g{i}",
        "split": "train",
        **changes,
    }


def clean(rng, n):
    return [row(rng, i) for i in range(n)]


def data(rows, **more):
    return data_rules.make(pl.DataFrame(rows, schema_overrides={"group": pl.String}), **more)


def marked(frame):
    return set(frame["preference"])


def changed(rng, text, words):
    """The text with some words replaced, capitals and punctuation put in."""
    parts = text.split()
    for place in rng.sample(range(len(parts)), words):
        parts[place] = "Otherwise"
    return ", ".join([" ".join(parts[:5]), " ".join(parts[5:])]).capitalize() + "."


def swapped_in(rows, i, **changes):
    rows[i] = {**rows[i], **changes}


# --- near duplicates ---


def test_near_duplicates_planted_among_a_thousand_are_all_found_and_nothing_else():
    rng = random.Random(0)
    rows = clean(rng, 1000)
    for i in range(
        100
    ):  # some exact copies; some with one word of each side changed: 37 of 41 shared pairs and more
        words = i % 2
        swapped_in(
            rows,
            500 + i,
            **{name: changed(rng, rows[i][name], words) for name in ("chosen", "rejected")},
            text=rows[i]["text"],
        )
    found = data_rules.near_duplicate(data(rows), 0.8)
    assert marked(found) == {f"p{500 + i:05d}" for i in range(100)}
    assert dict(found.iter_rows())["p00500"] == "of p00000"


def test_pairs_that_share_a_prompt_and_one_answer_are_no_duplicates():
    rng = random.Random(1)
    texts = [
        sentence(rng, 300),
        *(sentence(rng, 8) for _ in range(3)),
    ]  # one long answer, three short ones
    rows = [
        row(rng, i, prompt="q", text="the same prompt", chosen=texts[a], rejected=texts[b])
        for i, (a, b) in enumerate(combinations(range(4), 2))
    ]
    assert data_rules.near_duplicate(data(rows), 0.8).is_empty()


def jaccard(a, b):
    a, b = ({*pairwise(w)} or {*w} for w in (a.split(), b.split()))
    return len(a & b) / len(a | b) if a | b else 1.0


def test_a_near_duplicate_is_found_among_many_that_are_only_alike():
    """Twelve texts of about 0.72 similarity to one another, all kept, and one of 0.85 to the sixth:
    signatures are compared first, and their estimate must not lose it."""
    base = [f"w{i}" for i in range(100)]

    def changed(words, places, mark):
        return [f"{mark}{i}" if i in places else word for i, word in enumerate(words)]

    texts = [
        changed(base, {2 + 8 * k, 35 + 2 * k, 60 + k, 97 - 3 * k}, f"x{k}_") for k in range(12)
    ]
    texts.append(changed(texts[5], {6, 20, 28, 90}, "y"))
    words = near_duplicates.words(pl.Series([" ".join(text) for text in texts]))
    shares = [words.similarity(12, k) for k in range(12)]
    assert shares[5] > 0.8 and max(shares[:5] + shares[6:]) < 0.8
    found = near_duplicates.near_duplicates(words, np.arange(13).reshape(-1, 1), 0.8)
    assert found.of == {12: 5}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.7, 0.8, 0.9]))
def test_what_is_left_holds_no_two_near_duplicates_and_nothing_was_marked_without_one(
    seed, threshold
):
    """Against brute force over every two, on texts of few words, where similarity is everywhere."""
    rng = random.Random(seed)
    few = VOCABULARY[:6]
    base = [" ".join(rng.choices(few, k=rng.randint(1, 12))) for _ in range(6)]

    def text():
        parts = rng.choice(base).split()
        if rng.random() < 0.5:
            parts[rng.randrange(len(parts))] = rng.choice(few)
        return " ".join(parts)

    rows = [row(rng, i, text=text(), chosen=text(), rejected=text()) for i in range(60)]
    dup = marked(data_rules.near_duplicate(data(rows), threshold))

    def near(x, y):
        return all(
            jaccard(x[name], y[name]) >= threshold for name in ("text", "chosen", "rejected")
        )

    kept = [r for r in rows if r["preference"] not in dup]
    if threshold >= 0.8:  # where LSH is all but sure to propose them; below, it proposes fewer
        assert not [
            (x["preference"], y["preference"]) for x, y in combinations(kept, 2) if near(x, y)
        ]
    assert all(any(near(x, y) for y in kept) for x in rows if x["preference"] in dup)


def test_a_crowd_of_similar_texts_is_told_and_does_not_take_for_ever():
    """400 answers from one pattern, a fifth of it their own words: similar, none a near-duplicate
    but the copies."""
    rng = random.Random(12)
    pattern = sentence(rng, 120).split()

    def filled():
        words = list(pattern)
        for place in rng.sample(range(120), 12):
            words[place] = rng.choice(VOCABULARY)
        return " ".join(words)

    rows = [row(rng, i, text="the same", chosen=filled(), rejected=filled()) for i in range(400)]
    for i in range(380, 400):
        swapped_in(rows, i, chosen=rows[i - 380]["chosen"], rejected=rows[i - 380]["rejected"])
    made = data(rows)
    assert marked(data_rules.near_duplicate(made, 0.8)) == {f"p{i:05d}" for i in range(380, 400)}
    assert len(made.notes) == 1 and "may be left" in made.notes[0]


def test_letters_beyond_ascii_are_letters():
    found = near_duplicates.normalised(pl.Series(["ÀB-c,  d\n", "日本 語!", "_x_", "??", "ﬁne"]))
    assert found.to_list() == ["àb c d", "日本 語", "x", "", "fine"]


def test_words_are_the_same_in_any_batch():
    rng = random.Random(2)
    texts = [sentence(rng, rng.randint(0, 9)) for _ in range(50)]
    together = near_duplicates.words(pl.Series(texts))
    for i, text in enumerate(texts):
        alone = near_duplicates.words(pl.Series([text]))
        assert (
            alone.flat.tolist()
            == together.flat[together.offsets[i] : together.offsets[i + 1]].tolist()
        )
        assert near_duplicates.wholes(alone)[0] == near_duplicates.wholes(together)[i]


def test_ngrams_stay_within_a_text():
    words = near_duplicates.words(pl.Series(["a b c", "d e", "", "a b c d"]))
    hashes, of = near_duplicates.ngrams(words, 3)
    assert of.tolist() == [0, 3, 3] and hashes[0] == hashes[1] != hashes[2]


# --- the other rules ---


def test_low_margin_by_hand():
    rng = random.Random(3)
    rows = [row(rng, i, p_chosen=p) for i, p in enumerate((0.5201, 0.5999, 0.6, 0.61, 1.0))]
    found = data_rules.low_margin(data(rows), 0.6)
    assert list(found.iter_rows()) == [("p00000", "p_chosen 0.5201"), ("p00001", "p_chosen 0.5999")]


def test_a_share_of_the_vote_is_marked_only_by_a_threshold_set_for_it():
    rng = random.Random(3)
    rows = [row(rng, i, p_chosen=0.55, calibrated=i == 1) for i in range(3)]
    made = data(rows)
    assert list(data_rules.low_margin(made, 0.6).iter_rows()) == [("p00001", "p_chosen 0.55")]
    assert made.notes == [made.notes[0]] and "2 pairs is a share of the vote" in made.notes[0]
    made.notes.clear()
    found = data_rules.low_margin(made, 0.6, shares=True)
    assert found["detail"].to_list() == [
        "share of the vote 0.55",
        "p_chosen 0.55",
        "share of the vote 0.55",
    ]
    assert not made.notes


def test_identical_sides_are_those_that_differ_in_white_space_alone():
    rng = random.Random(4)
    rows = clean(rng, 60)
    planted = [
        ("one two", "one  two"),
        ("one two", " one\ntwo "),
        ("x + y", "x + y"),
        ("", "  \t"),
        ("é", "é"),
    ]
    for i, (a, b) in enumerate(planted):
        swapped_in(rows, 10 + i, chosen=a, rejected=b)
    for i, (a, b) in enumerate(
        [("x + y", "x - y"), ("Yes", "yes"), ("👍", "👎")]
    ):  # a reader sees these differ
        swapped_in(rows, 40 + i, chosen=a, rejected=b)
    assert marked(data_rules.identical(data(rows))) == {
        f"p{10 + i:05d}" for i in range(len(planted))
    }


def test_length_is_told_in_both_directions():
    rng = random.Random(5)
    rows = clean(rng, 50)
    for i, (a, b) in enumerate([(90, 30), (30, 90), (500, 1), (21, 0)]):
        swapped_in(rows, i, chosen=sentence(rng, a), rejected=sentence(rng, b))
    for i, (a, b) in enumerate(
        [(89, 30), (20, 5), (19, 1)], 10
    ):  # less than three times; fewer than 20 words apart
        swapped_in(rows, i, chosen=sentence(rng, a), rejected=sentence(rng, b))
    found = dict(data_rules.length(data(rows), 3.0).iter_rows())
    assert found == {
        "p00000": "90 against 30 words",
        "p00001": "30 against 90 words",
        "p00002": "500 against 1 words",
        "p00003": "21 against 0 words",
    }


def pair(rng, i, question, a, b):
    return row(rng, i, prompt=question, text=f"question {question}", chosen=a, rejected=b)


def test_contradictions_are_told_on_both_sides_and_only_within_a_prompt():
    rng = random.Random(6)
    rows = [
        *clean(rng, 40),
        pair(rng, 100, "x", "one", "two"),
        pair(rng, 101, "x", " two", "one"),
        pair(rng, 102, "y", "two", "one"),
        pair(rng, 103, "x", "one", "three"),
    ]
    found = dict(data_rules.contradiction(data(rows)).iter_rows())
    assert found == {"p00100": "against p00101", "p00101": "against p00100"}
    assert data_rules.cycle(data(rows)).is_empty()


def test_circles_are_told_and_what_hangs_on_them_is_not():
    rng = random.Random(7)
    edges = [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),  # a circle of three
        ("d", "a"),
        ("c", "e"),
        ("e", "f"),
        ("d", "f"),  # in and out of it, and past it
        ("g", "h"),
        ("h", "i"),
        ("i", "j"),
        ("j", "g"),
        ("e", "g"),
    ]  # one of four, behind it
    rows = [*clean(rng, 20), *(pair(rng, 100 + i, "x", a, b) for i, (a, b) in enumerate(edges))]
    found = dict(data_rules.cycle(data(rows)).iter_rows())
    assert set(found) == {f"p{100 + i:05d}" for i in (0, 1, 2, 7, 8, 9, 10)}
    assert (
        found["p00100"] == "in a cycle of 3 answers"
        and found["p00107"] == "in a cycle of 4 answers"
    )


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_circles_against_reachability(edges):
    edges = [(a, b) for a, b in edges if a != b]
    follows = {a: {b for x, b in edges if x == a} for a in range(7)}

    def reached(a):
        seen, todo = set(), [a]
        while todo:
            for b in follows[todo.pop()] - seen:
                seen.add(b)
                todo.append(b)
        return seen

    of = {a: {b for b in reached(a) if a in reached(b)} for a in range(7)}
    expected = {(a, b) for a, b in edges if b in of[a] and len(of[a]) > 2}
    knots = data_rules.circles(edges)
    assert {(a, b) for a, b in edges if a in knots and knots[a] == knots.get(b)} == expected


def test_contamination_by_thirteen_words_or_by_all_of_a_shorter_text():
    rng = random.Random(8)
    rows = clean(rng, 300)
    long, middle, short = sentence(rng, 40), sentence(rng, 10), "What is love"
    evaluation = [
        ("bench.jsonl:1", long),
        ("bench.jsonl:2", middle),
        ("bench.jsonl:3", short),
        *((f"bench.jsonl:{i}", sentence(rng, 30)) for i in range(4, 50)),
    ]
    words = long.split()
    swapped_in(
        rows, 0, text=f"Hello! {' '.join(words[5:18]).upper()}, please."
    )  # 13 of its words, dressed up
    swapped_in(rows, 1, chosen=f"{sentence(rng, 9)} {' '.join(words[27:])}")
    swapped_in(rows, 2, rejected=f"so: {middle}!")
    swapped_in(rows, 3, text="What is LOVE?")
    swapped_in(rows, 10, text=" ".join(words[5:17]))  # 12 words
    swapped_in(rows, 11, chosen=" ".join(words[5:17] + words[:12]))  # 12 and 12
    swapped_in(rows, 12, chosen="What is love")  # short, and an answer
    swapped_in(rows, 13, text="What is love if not this", rejected=" ".join(middle.split()[1:]))
    found = dict(data_rules.contamination(data(rows), evaluation).iter_rows())
    assert set(found) == {"p00000", "p00001", "p00002", "p00003"}
    assert (
        found["p00001"].startswith("bench.jsonl:1: ")
        and found["p00003"] == "bench.jsonl:3: What is love"
    )


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I can’t provide instructions for that.",
    "Sorry, I won't do that.",
    "I am unable to answer this question.",
    "I'm not able to discuss that topic.",
    "I must decline to write this.",
    "I will not participate in planning it.",
    "I do not feel comfortable, so I won't help.",
    "As an AI language model, I cannot create such content.",
    "That goes against my guidelines.",
    "Unfortunately, I can not comply with your request.",
    "This is not something I can help you with.",
    "I refuse to explain how.",
    "No. I would rather not share that.",
    "I'm not going to tell you how to do it.",
    "I'm really sorry, but this request is harmful.",
    "I have to decline to answer.",
    *grammar.REFUSE,
)
ANSWERS = (
    "You can help yourself to more.",
    "I can help with that! First, open the lid.",
    "Sorry for the wait: here is the recipe.",
    "He could not find the door. Then he answered.",
    "If the pump cannot provide pressure, replace it.",
    "I think you should write to them.",
    "Do not refuse help when it is offered.",
    "Certainly. To decline an invitation, say so.",
    "I like this song.",
    "The guard would not let them in.",
)


def test_two_refusals_are_told_and_a_refusal_beside_an_answer_is_not():
    rng = random.Random(9)
    rows = [
        row(rng, i, chosen=text, rejected=rng.choice(REFUSALS)) for i, text in enumerate(REFUSALS)
    ]
    rows += [row(rng, 100 + i, chosen=text, rejected=REFUSALS[0]) for i, text in enumerate(ANSWERS)]
    rows += [
        row(rng, 200, chosen=f"{sentence(rng, 80)}. I cannot help with that.", rejected=REFUSALS[0])
    ]  # much later
    assert marked(data_rules.both_refuse(data(rows))) == {f"p{i:05d}" for i in range(len(REFUSALS))}


def test_leakage_by_group_by_copy_and_by_near_copy():
    rng = random.Random(10)
    rows = clean(rng, 200)
    for i in range(100, 150):
        swapped_in(rows, i, split="val" if i % 2 else "test")
    swapped_in(rows, 0, group="g100")  # its group is in test
    swapped_in(
        rows, 1, text=f"{rows[102]['text'].capitalize()}!"
    )  # its prompt too, of another group
    swapped_in(rows, 2, text=rows[103]["text"] + " and so on")
    swapped_in(rows, 103, text=rows[103]["text"] + " and so on then")  # one word more, in val
    swapped_in(rows, 105, text=rows[106]["text"])  # val against test
    swapped_in(rows, 107, text="so " + rows[108]["text"])
    swapped_in(
        rows, 3, text=" ".join(rows[109]["text"].split()[:8] + sentence(rng, 7).split())
    )  # half of it: another
    found = dict(data_rules.leakage(data(rows)).iter_rows())
    assert found == {
        "p00000": "group g100 crosses splits",
        **dict.fromkeys(["p00001"], "the same prompt is held out, and here in train"),
        "p00105": "the same prompt is held out, and here in val",
    }
    near = dict(data_rules.near_leakage(data(rows), 0.8).iter_rows())
    assert (
        set(near) == {"p00002", "p00107"}
        and near["p00002"].startswith("val: ")
        and near["p00107"].startswith("test: ")
    )


def test_unscored_is_counted():
    rng = random.Random(11)
    made = data(clean(rng, 18), unscored=["u1", "u2"], comparisons=25)
    assert marked(data_rules.unscored(made)) == {"u1", "u2"} and made.comparisons == 25


# --- clean data ---


def world(n, seed=0):
    """Pairs of the embedded world with the oracle's own labels: nothing is wrong with them but what
    a small world says twice. Gives the rows, and which answers are refusals by the oracle's
    reading."""
    rng, rows, refusing = random.Random(seed), [], []
    for i in range(n):
        s = grammar.situation(rng, rng.choice(("train", "train", "train", "val", "test")))
        talk = s.prompt.messages
        answers = sorted({grammar.answer(rng, s).text for _ in range(4)} - {""})
        scores = {text: oracle.assess(talk, text).score for text in answers}
        for a, b in combinations(answers, 2):
            if scores[a] != scores[b]:
                good, bad = (a, b) if scores[a] > scores[b] else (b, a)
                rows.append(
                    {
                        "preference": f"p{len(rows):05d}",
                        "prompt": f"q{i}",
                        "chosen": good,
                        "rejected": bad,
                        "text": "\n".join(m.content for m in talk),
                        "p_chosen": 0.9,
                        "calibrated": True,
                        "group": s.prompt.group,
                        "split": s.prompt.split,
                    }
                )
                refusing.append(
                    all(
                        any(text in grammar.REFUSE for text in oracle.sentences(x))
                        for x in (good, bad)
                    )
                )
    return rows, refusing


def test_false_alarms_on_clean_data(capsys):
    """Marks that are not so, by rule, over the embedded world's own pairs: there the truth is known
    or brute-forced."""
    rows, refusing = world(300)
    made = data(rows)
    evaluation = [(f"prompts:{i}", line) for i, line in enumerate(english())]
    words = {r["preference"]: (len(r["chosen"].split()), len(r["rejected"].split())) for r in rows}
    near = marked(data_rules.near_duplicate(made, 0.8))
    seen = {
        name: near_duplicates.normalised(pl.Series([r[name] for r in rows]))
        for name in ("text", "chosen", "rejected")
    }

    def twice(i):
        return any(
            all(jaccard(seen[name][i], seen[name][j]) >= 0.8 for name in seen) for j in range(i)
        )

    false = {
        "low_margin": len(marked(data_rules.low_margin(made, 0.6))),
        "identical": len(marked(data_rules.identical(made))),
        "near_duplicate": sum(not twice(int(name[1:])) for name in near),
        "length": sum(
            max(words[name]) < 3 * min(words[name]) for name in marked(data_rules.length(made, 3.0))
        ),
        "contradiction": len(marked(data_rules.contradiction(made))),
        "cycle": len(marked(data_rules.cycle(made))),
        "contamination": len(marked(data_rules.contamination(made, evaluation))),
        "both_refuse": sum(
            not refusing[int(name[1:])] for name in marked(data_rules.both_refuse(made))
        ),
        "leakage": len(marked(data_rules.leakage(made))),
        "near_leakage": len(marked(data_rules.near_leakage(made, 0.8))),
        "unscored": len(marked(data_rules.unscored(made))),
    }
    with capsys.disabled():
        print(
            f"\nfalse alarms on {len(rows):,} clean pairs: {false}; true: {len(near)} near-duplicates, "
            f"{sum(refusing)} pairs of refusals"
        )
    # The world's prompts are made from patterns: at the end of a long one another object makes a
    # similar prompt, which is nonetheless another question.
    assert (
        set(false) == set(data_rules.NAMES)
        and false.pop("near_leakage") <= 0.1 * len(rows)
        and not any(false.values())
    )
    assert marked(data_rules.both_refuse(made)) == {
        f"p{i:05d}" for i, is_so in enumerate(refusing) if is_so
    }


def english():
    """Real questions, ours, from the project's prompts."""
    from pathlib import Path

    files = (Path(__file__).resolve().parents[3] / "prompts").glob("*.jsonl")
    return [
        value
        for file in sorted(files)
        for line in pl.read_ndjson(file).to_dicts()
        for value in line.values()
        if isinstance(value, str)
    ]


@pytest.mark.parametrize("n", [0, 1])
def test_no_rule_falls_over_little_data(n):
    rows = pl.DataFrame(clean(random.Random(0), 1), schema_overrides={"group": pl.String}).head(n)
    made = data_rules.make(rows)
    for found in (
        data_rules.low_margin(made, 0.6),
        data_rules.near_duplicate(made, 0.8),
        data_rules.identical(made),
        data_rules.length(made, 3.0),
        data_rules.contradiction(made),
        data_rules.cycle(made),
        data_rules.both_refuse(made),
        data_rules.contamination(made, []),
        data_rules.contamination(made, [("f:1", "x")]),
        data_rules.leakage(made),
        data_rules.near_leakage(made, 0.8),
    ):
        assert found.is_empty() and found.columns == ["preference", "detail"]
    assert isinstance(made.same, np.ndarray)


# --- in the store ---


def planted(folder):
    """A run of 24 prompts of three drafts with one of each defect in it; gives its ids by what is
    wrong with them."""
    value = project.pipeline(folder, prompts=24)
    rows = [
        {
            "id": f"p{i}",
            "prompt": sentence(random.Random(i), 16),
            "group": f"g{i}",
            "split": "train",
        }
        for i in range(24)
    ]
    rows[1]["prompt"] = "Please say: " + " ".join(
        sentence(random.Random("bench"), 30).split()[4:20]
    )
    rows[2] |= {"split": "test"}
    rows[3] |= {"prompt": f"{rows[2]['prompt']}."}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(request):
        found = project.answer(request)
        if project.asked(request) == "sample":
            rng = random.Random(f"{request.repeat[0]} {request.messages[-1].content}")
            text = f"{found.text.split(' of ')[0]} {sentence(rng, 30)}"
            if rows[4]["prompt"] in request.messages[-1].content:
                text = (
                    f"{found.text.split(' of ')[0]}: I cannot help with that. {sentence(rng, 20)}"
                )
            if rows[5]["prompt"] in request.messages[-1].content and request.repeat[0] == 0:
                text += " " + sentence(rng, 90)
            return Completion(text, "stop", None, "exact", 5, 4)
        return found

    result = run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    assert result.state == "done"
    bench = folder / "bench.jsonl"
    bench.write_text(json.dumps({"question": sentence(random.Random("bench"), 30), "id": 7}) + "\n")
    return folder / "store", bench


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("gate"))


def by_rule(found):
    return {finding.rule.name: finding for finding in found.findings}


def test_marks_are_kept_come_back_after_a_rebuild_and_take_nothing_away(store):
    folder, bench = store
    found = audit(folder, evaluation=[bench])
    rules = by_rule(found)
    assert set(rules) == set(data_rules.NAMES) and found.pairs == 72
    assert {name: rules[name].marks.height for name in rules} == {
        "low_margin": 0,
        "near_duplicate": 0,
        "identical": 0,
        "length": 2,
        "contradiction": 0,
        "cycle": 0,
        "contamination": 3,
        "both_refuse": 3,
        "leakage": 3,
        "near_leakage": 0,
        "unscored": 0,
    }
    assert (
        found.clean == 72 - 11
        and found.fails
        and rules["leakage"].fails
        and rules["contamination"].fails
    )
    example = rules["contamination"].examples[0]
    assert example["detail"].startswith("bench.jsonl:1: ") and example["prompt"].startswith(
        "Please say"
    )
    marks = query(folder, "SELECT * FROM marks ORDER BY ALL")
    assert marks.height == 11 and marks.filter("of_prompt")["rule"].unique().sort().to_list() == [
        "contamination",
        "leakage",
    ]
    bench_text = bench.read_text()
    bench.unlink()  # the file need not be there for the marks to come back
    rebuild(folder)
    assert query(folder, "SELECT * FROM marks ORDER BY ALL").equals(marks)
    assert query(folder, "SELECT count(*) AS n FROM preferences")["n"][0] == 72
    bench.write_text(bench_text)
    assert "marks" not in json.loads(
        query(folder, "SELECT value FROM evals WHERE name = 'audit data'")["value"][0]
    )


@pytest.mark.slow
def test_the_same_audit_is_recorded_once_and_another_one_replaces_it(store):
    folder, bench = store

    def recorded():
        return query(folder, "SELECT count(*) AS n FROM evals WHERE name = 'audit data'")["n"][0]

    audit(folder, evaluation=[bench])
    before = recorded()
    audit(folder, evaluation=[bench])
    assert recorded() == before
    narrow = audit(folder, thresholds={"low_margin": 0.99})
    assert by_rule(narrow)["low_margin"].marks.height == 72 and "contamination" not in by_rule(
        narrow
    )
    assert query(folder, "SELECT DISTINCT rule FROM marks ORDER BY 1")["rule"].to_list() == [
        "both_refuse",
        "leakage",
        "length",
        "low_margin",
    ]
    audit(folder, evaluation=[bench])
    assert (
        recorded() == before + 2 and query(folder, "SELECT count(*) AS n FROM marks")["n"][0] == 11
    )


@pytest.mark.slow
def test_an_export_leaves_out_what_it_is_told_to(store, tmp_path):
    folder, bench = store
    audit(folder, evaluation=[bench])

    def pairs(*without):
        report = export(folder, tmp_path / "-".join(["out", *without]), without=without)
        frames = {
            name: pl.concat(
                [pl.read_parquet(file) for file in sorted((report.out / name).glob("*.parquet"))]
            )
            for name in report.counts
        }
        return frames, report

    everything, _ = pairs()
    assert everything["preference"].height == 72 and everything["prompts"].height == 24
    short, report = pairs("length", "both_refuse")
    assert short["preference"].height == 72 - 5 and short["prompts"].height == 24
    assert any("2 of 72 comparisons are left out as length" in note for note in report.notes)
    clean, _ = pairs("contamination", "leakage")
    assert set(everything["prompts"]["prompt_id"]) - set(clean["prompts"]["prompt_id"]) == {
        "p1",
        "p3",
    }
    assert clean["preference"].height == 72 - 6 and not {"p1", "p3"} & set(
        clean["unpaired"]["prompt_id"]
    )
    again, _ = pairs()
    assert again["preference"].equals(everything["preference"])  # nothing was deleted


@pytest.mark.slow
def test_refusals_of_the_gate_say_how_to_go_on(store, tmp_path):
    folder, _bench = store
    with pytest.raises(ConfigError, match="low_marg.*rules with one: low_margin"):
        audit(folder, thresholds={"low_marg": 0.5})
    with pytest.raises(ConfigError, match="at least 8"):
        audit(folder, thresholds={"contamination": 3})
    with pytest.raises(ConfigError, match="no such file"):
        audit(folder, evaluation=[tmp_path / "none.jsonl"])
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{"a": \n')
    with pytest.raises(ConfigError, match="bad.jsonl:2: not JSON"):
        audit(folder, evaluation=[tmp_path / "bad.jsonl"])
    audit(folder)
    with pytest.raises(
        ConfigError, match="did not look for contamination; it looked for: both_refuse, "
    ):
        export(folder, tmp_path / "out", without=["contamination"])
    with pytest.raises(ConfigError, match="joining that"):
        export(folder, tmp_path / "out", format="parquet", without=["length"])


@pytest.mark.slow
def test_marks_of_a_run_that_has_grown_are_not_taken_for_its_own(tmp_path):
    value = project.pipeline(tmp_path, prompts=3)
    run(value, engines=project.engine())
    with pytest.raises(
        ConfigError, match="has not been audited: `prefab audit data --run small@1`"
    ):
        export(tmp_path / "store", tmp_path / "out", without=["length"])
    audit(tmp_path / "store")
    assert export(tmp_path / "store", tmp_path / "out", without=["length"]).counts
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "p9", "prompt": "Question nine?"}) + "\n")
    run(value, engines=project.engine())
    with pytest.raises(ConfigError, match="changed since it was audited"):
        export(tmp_path / "store", tmp_path / "out", without=["length"])
    assert (tmp_path / "out" / "README.md").exists()  # the earlier export stands


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '[{"x": ["deep words"]}]'),
        ("a.csv", 'question,answer\n"one, two",three\n"a\nb",c\n'),
        ("a.txt", "line one\nline two\n"),
    ],
)
def test_evaluation_files_of_every_kind_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    from prefab.pipelines.quality.data_audit import _evaluation

    texts, files = _evaluation([tmp_path / name])
    expected = {
        "a.json": [("a.json row 1", "deep words")],
        "a.txt": [("a.txt:1", "line one"), ("a.txt:2", "line two")],
        "a.csv": [
            ("a.csv:2", "one, two"),
            ("a.csv:2", "three"),
            ("a.csv:4", "a\nb"),
            ("a.csv:4", "c"),
        ],
    }
    assert texts == expected[name] and files[0]["texts"] == len(texts)


def test_the_command(store):
    from typer.testing import CliRunner

    from prefab.pipelines.cli.main import app

    folder, bench = store
    done = CliRunner().invoke(
        app, ["audit", "data", "--store", str(folder), "--eval", str(bench), "--json"]
    )
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["fails"] and found["clean"] == 61
    assert all(rule["source"] and rule["what"] for rule in found["rules"])
    done = CliRunner().invoke(app, ["audit", "data", "--store", str(folder), "--eval", str(bench)])
    assert (
        done.exit_code == 1
        and "--without length,contamination,both_refuse,leakage" in done.output.replace("\n", "")
    )
