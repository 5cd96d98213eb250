"""Benchmarks of judges: small hand-made files, metric values derived by hand, and the scripted
engine end to end."""

from __future__ import annotations

import asyncio
import json
from math import log

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion, Verdict
from prefab.judges.benchmarks import adapters, metrics
from prefab.judges.benchmarks.adapters import Judged
from prefab.pipelines.cli.main import app
from prefab.pipelines.config.loader import resolve_pipeline
from prefab.pipelines.quality import judge_benchmark
from prefab.pipelines.store.fill import query
from tests.support import project

WINS, LOSES, TIE, MIXED = (
    (1.0, 1.0),
    (0.0, 0.0),
    (0.5, 0.5),
    (1.0, 0.0),
)  # P that answer a is better, in each order


def bench(tmp_path, name, rows, file="rows.jsonl"):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return judge_benchmark.read_benchmark(name, [tmp_path / file])


def verdict(p):
    return (
        Verdict(None, None, "parse")
        if p is None
        else Verdict(p, "a" if p > 0.5 else "b" if p < 0.5 else "tie")
    )


def judged(**pairs):
    """By item id: the probability in each order of the pair 0, 1."""
    found = Judged()
    for name, (ab, ba) in pairs.items():
        found.verdicts[name.replace("__", ":"), 0, 1] = {"ab": verdict(ab), "ba": verdict(ba)}
    return found


def scored(made, said):
    report = metrics.score(made.name, list(made.items.values()), said)
    return report, {line.name: line for line in (*report.own, *report.ours)}


# --- RewardBench ---


def rewardbench(subset, number):
    return {
        "prompt": f"q {subset} {number}",
        "chosen": "good",
        "chosen_model": "x",
        "rejected": "bad",
        "rejected_model": "y",
        "subset": subset,
        "id": number,
    }


def test_rewardbench_weighs_subsets_and_means_sections(tmp_path):
    made = bench(
        tmp_path,
        "rewardbench",
        [
            *(rewardbench("alpacaeval-easy", i) for i in range(2)),
            rewardbench("mt-bench-med", 0),
            rewardbench("donotanswer", 1),
            *(rewardbench("hep-cpp", i) for i in range(2)),
            rewardbench("math-prm", 0),
        ],
    )
    report, lines = scored(
        made,
        judged(
            **{
                "alpacaeval-easy__0": WINS,
                "alpacaeval-easy__1": TIE,
                "mt-bench-med__0": (0.9, 0.4),
                "donotanswer__1": MIXED,
                "hep-cpp__0": WINS,
                "hep-cpp__1": (None, 1.0),
                "math-prm__0": LOSES,
            }
        ),
    )
    assert lines["Chat"].value == pytest.approx((0.5 * 100 + 1 * 40) / 140)  # a tie is not right
    assert lines["Safety"].value == 0.0  # nor what the order changes
    assert lines["Reasoning"].value == pytest.approx(164 / (164 + 984))  # math-prm weighs 984
    assert report.own[0].name == "RewardBench"
    assert report.own[0].value == pytest.approx((90 / 140 + 0 + 164 / 1148) / 3)
    assert (lines["hep-cpp"].value, lines["hep-cpp"].worst, lines["hep-cpp"].best) == (
        1.0,
        0.5,
        1.0,
    )
    assert lines["Reasoning"].worst == pytest.approx(0.5 * 164 / 1148) and report.unscored == {
        "parse": 1
    }
    assert (
        lines["right, mean of both orders"].value == pytest.approx(3 / 6)
        and lines["... which are ties"].value == 2 / 6
    )
    assert lines["right, as they stand"].value == pytest.approx(
        4 / 6
    )  # won: easy 0, med, donotanswer, cpp 0
    assert lines["right, swapped"].value == pytest.approx(
        3 / 7
    )  # easy 0, cpp 0, and cpp 1, which is read there
    assert lines["both orders agree"].value == pytest.approx(4 / 6)  # not med, not donotanswer
    assert any("Chat Hard without" in note for note in report.notes)


def test_a_conversation_and_messages_are_read_too(tmp_path):
    row = {
        **rewardbench("x", 1),
        "prompt": [{"role": "user", "content": "hi"}],
        "subset": "new-one",
        "chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}],
    }
    made = bench(tmp_path, "rewardbench", [row])
    (item,) = made.items.values()
    assert item.answers == ("good", "bad") and item.prompt[0].content == "hi"
    report, _ = scored(made, judged(**{"new-one__1": WINS}))
    assert report.own[0].value is None and "new-one" in report.notes[0]


# --- RewardBench 2 ---


def rewardbench2(subset, name, right, wrong):
    return {
        "id": name,
        "prompt": f"q {name}",
        "chosen": [f"good {i}" for i in range(right)],
        "rejected": [f"bad {i}" for i in range(wrong)],
        "num_correct": right,
        "total_completions": right + wrong,
        "subset": subset,
    }


def scores(made, **given):
    found = Judged()
    for name, values in given.items():
        item = made.items[name.replace("__", ":")]
        found.scores.update({(item.id, i): value for i, value in enumerate(values)})
    return found


TIES = [
    rewardbench2("Ties", "ref:1", 1, 2),
    rewardbench2("Ties", "tied:1", 2, 1),
    rewardbench2("Ties", "ref:2", 1, 1),
    rewardbench2("Ties", "tied:2", 2, 1),
]
TIES_SCORES = {
    "Ties__ref__1": (5, 3, 1),
    "Ties__tied__1": (6, 5, 4),
    "Ties__ref__2": (2, 3),
    "Ties__tied__2": (9, 9, 1),
}


def test_best_of_four_shares_the_first_place_as_theirs_does(tmp_path):
    made = bench(tmp_path, "rewardbench-2", [rewardbench2("Math", str(i), 1, 3) for i in range(4)])
    _, lines = scored(
        made,
        scores(
            made,
            Math__0=(4, 4, 1, 0),
            Math__1=(5, 4, 4, 4),
            Math__2=(3, 4, 0, 0),
            Math__3=(1, 1, 1, 1),
        ),
    )
    assert lines["Math"].value == pytest.approx((1 / 2 + 1 + 0 + 1 / 4) / 4)


def test_ties_by_hand(tmp_path):
    """Gaps 2, 1, -1, 8 and spreads -, 1, -, 0: accuracy 1/2 of ref and all of tied; the gap is
    wider than the spread for one of two prompts, with the ref prompt's for none; tanh terms 0 and
    -1."""
    made = bench(tmp_path, "rewardbench-2", [*TIES, rewardbench2("Math", "7", 1, 3)])
    _, lines = scored(made, scores(made, **TIES_SCORES, Math__7=(2, 1, 1, 1)))
    assert lines["Ties"].value == pytest.approx(
        0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * -0.5
    )
    assert lines["RewardBench 2"].value == pytest.approx((0.545 + 1) / 2)


def test_what_is_unscored_in_ties_has_bounds(tmp_path):
    made = bench(tmp_path, "rewardbench-2", TIES)
    _, lines = scored(made, scores(made, **{**TIES_SCORES, "Ties__ref__2": (None, 3)}))
    assert lines["Ties"].value == pytest.approx(
        0.3 + 0.3 + 0.01 * 0
    )  # of the one pair of prompts that is left
    assert lines["Ties"].worst == pytest.approx(0.3 + 0.3 * 0.5 + 0.01 * (0 - 1) / 2)
    assert lines["Ties"].best == pytest.approx(
        0.3 + 0.3 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * (0 + 1) / 2
    )


def test_a_judge_of_pairs_is_right_when_it_wins_each_and_wrong_when_it_loses_one(tmp_path):
    made = bench(tmp_path, "rewardbench-2", [rewardbench2("Math", str(i), 1, 3) for i in range(5)])
    said = Judged()
    for i, chances in enumerate(
        [(1, 1, 1), (1, 0.5, 1), (0, None, None), (1, None, 1), (0.5, 0.5, 0.5)]
    ):
        for j, p in enumerate(chances, 1):
            said.verdicts[f"Math:{i}", 0, j] = {"ab": verdict(p), "ba": verdict(p)}
    _, lines = scored(made, said)
    assert (
        lines["Math"].value == pytest.approx((1 + 1 / 2 + 0 + 1 / 4) / 4)
        and lines["Math"].scored == 4
    )


def test_ties_of_a_judge_of_pairs_are_scored_by_win_rates(tmp_path):
    made = bench(tmp_path, "rewardbench-2", TIES[:2])
    said = Judged()
    for name in ("Ties:ref:1", "Ties:tied:1"):
        assert made.items[name].comparisons() == [
            (0, 1),
            (0, 2),
            (1, 2),
        ]  # every two, right ones among them
        for i, j in made.items[name].comparisons():
            p = 0.5 if (i, j) == (0, 1) and "tied" in name else 1.0
            said.verdicts[name, i, j] = {"ab": verdict(p), "ba": verdict(p)}
    _, lines = scored(
        made, said
    )  # win rates: ref 1, .5, 0 (gap .5); tied .75, .75, 0 (gap .75, spread 0)
    assert lines["Ties"].value == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01)


# --- JudgeBench, LLMBar, MT-Bench, HHH ---


def judgebench(i, label="A>B", source="mmlu-pro-law"):
    return {
        "pair_id": f"p{i}",
        "source": source,
        "question": f"q{i}",
        "response_A": "one",
        "response_B": "two",
        "label": label,
    }


def test_judgebench_asks_both_orders_to_speak_for_it(tmp_path):
    made = bench(
        tmp_path,
        "judgebench",
        [
            *(judgebench(i) for i in range(5)),
            judgebench(5, "B>A", "livecodebench"),
            judgebench(6, source="livebench-math"),
        ],
    )
    report, lines = scored(
        made,
        judged(p0=WINS, p1=(1.0, 0.5), p2=MIXED, p3=TIE, p4=(0.5, 0.0), p5=LOSES, p6=(1.0, None)),
    )
    assert lines["JudgeBench"].value == pytest.approx(3 / 6)
    assert (lines["JudgeBench"].worst, lines["JudgeBench"].best) == (
        pytest.approx(3 / 7),
        pytest.approx(4 / 7),
    )
    assert lines["Knowledge"].value == pytest.approx(2 / 5) and lines["Coding"].value == 1.0
    assert (
        lines["Math"].value is None and lines["Math"].undefined and report.unscored == {"parse": 1}
    )


def llmbar(label):
    return {"input": "do it", "output_1": "one", "output_2": "two", "label": label}


def test_llmbar_means_orders_then_subsets(tmp_path):
    (tmp_path / "Natural").mkdir()
    (tmp_path / "Neighbor").mkdir()
    (tmp_path / "Natural/dataset.json").write_text(json.dumps([llmbar(1), llmbar(2)]))
    (tmp_path / "Neighbor/dataset.json").write_text(json.dumps([llmbar(1)]))
    made = judge_benchmark.read_benchmark(
        "llmbar", [tmp_path / "Natural/dataset.json", tmp_path / "Neighbor/dataset.json"]
    )
    report, lines = scored(made, judged(Natural__1=WINS, Natural__2=MIXED, Neighbor__1=LOSES))
    assert (
        lines["Natural"].value == 0.75 and lines["agreement of both orders: Natural"].value == 0.5
    )
    assert lines["LLMBar, average accuracy"].value == pytest.approx(0.375) == report.own[0].value
    assert lines["agreement of both orders"].value == pytest.approx(0.75)
    # one of two and one of one: Wilson's 0.095 .. 0.905 around 0.5, and 0.207 .. 1 around 1, put
    # together
    below = ((0.5 - 0.0945312) ** 2 + (1 - 0.2065433) ** 2) ** 0.5 / 2
    assert lines["agreement of both orders"].low == pytest.approx(0.75 - below, abs=1e-5)
    assert lines["agreement of both orders"].high == pytest.approx(
        0.75 + (0.9054688 - 0.5) / 2, abs=1e-5
    )
    assert lines["mean of the Adversarial subsets"].value == 0.0


def mt_bench(question, winner, who="expert_1", a="x", b="y", turn=1, **changes):
    def talk(model):
        return [
            {"role": r, "content": c}
            for r, c in (
                ("user", f"q{question}"),
                ("assistant", f"{model} one"),
                ("user", "and then?"),
                ("assistant", f"{model} two"),
            )
        ]

    return {
        "question_id": question,
        "model_a": a,
        "model_b": b,
        "winner": winner,
        "judge": who,
        "conversation_a": talk(a),
        "conversation_b": talk(b),
        "turn": turn,
        **changes,
    }


def test_mt_bench_agreement_by_votes(tmp_path):
    """Question 1: votes a, a, b; 2: tie, b, and the judge is swayed by the order; 3: b; 4: the
    authors' vote."""
    made = bench(
        tmp_path,
        "mt-bench-human",
        [
            mt_bench(1, "model_a"),
            mt_bench(1, "model_b", "expert_2", a="y", b="x"),
            mt_bench(1, "model_b", "expert_3"),
            mt_bench(2, "tie (inconsistent)"),
            mt_bench(2, "model_b", "expert_2"),
            mt_bench(3, "model_b"),
            mt_bench(4, "model_a", "author_0"),
        ],
    )
    assert made.items["1:x:y:1:experts"].votes == ("a", "a", "b") and not made.problems
    said = judged(
        **{
            "1__x__y__1__experts": WINS,
            "2__x__y__1__experts": MIXED,
            "3__x__y__1__experts": LOSES,
            "4__x__y__1__authors": WINS,
        }
    )
    report, lines = scored(made, said)
    assert report.own[0].name == "experts, turn 1, S1, ties too" and report.own[
        0
    ].value == pytest.approx(4 / 6)
    assert lines["experts, turn 1, S2, without ties"].value == pytest.approx(3 / 4)
    people = "people among themselves: experts, turn 1, "
    assert lines[people + "S1, ties too"].value == pytest.approx(1 / 4)
    assert lines[people + "S2, without ties"].value == pytest.approx(1 / 3)
    assert lines["authors, turn 1, S1, ties too"].value == 1.0 and "authors" in report.notes[0]
    assert report.own[0].low < 4 / 6 < report.own[0].high
    assert lines["right, mean of both orders"].value == pytest.approx(
        3 / 4
    )  # 1, 3 and 4; for 2 people prefer b


def test_mt_bench_second_turns_hold_the_whole_conversation(tmp_path):
    made = bench(tmp_path, "mt-bench-human", [mt_bench(1, "tie", turn=2)])
    (item,) = made.items.values()
    assert (
        item.prompt[0].content == "q1"
        and item.answers[0] == "x one\n\nUser: and then?\n\nAssistant: x two"
    )


def hhh(labels, **changes):
    return {
        "input": "q",
        "targets": {"choices": [f"c{i}" for i in range(len(labels))], "labels": labels},
        **changes,
    }


def test_hhh_means_categories(tmp_path):
    for name, rows in (("harmless", [hhh([1, 0]), hhh([0, 1])]), ("helpful", [hhh([0, 1, 0])])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = judge_benchmark.read_benchmark(
        "hhh", [tmp_path / "harmless.jsonl", tmp_path / "helpful.jsonl"]
    )
    said = judged(harmless__1=WINS, harmless__2=WINS, helpful__1=LOSES)
    said.verdicts["helpful:1", 1, 2] = {"ab": verdict(1.0), "ba": verdict(1.0)}
    report, lines = scored(made, said)
    assert lines["HHH"].value == pytest.approx(0.75) == report.own[0].value
    assert lines["over all items"].value == pytest.approx(2 / 3)


# --- rows and verdicts that cannot be read ---

GOOD = {
    "rewardbench": rewardbench("math-prm", 1),
    "rewardbench-2": rewardbench2("Math", "1", 1, 3),
    "judgebench": judgebench(1),
    "llmbar": llmbar(1),
    "mt-bench-human": mt_bench(1, "tie"),
    "hhh": hhh([1, 0]),
}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("rewardbench", {"chosen": None}, "has no chosen"),
        ("rewardbench", {"prompt": 7}, "the prompt is the number 7"),
        ("rewardbench-2", {"num_correct": 2}, "num_correct is 2, but there are 1"),
        ("rewardbench-2", {"subset": "Ties"}, "ref:N or tied:N"),
        (
            "rewardbench-2",
            {"chosen": ["a", "b"], "num_correct": 2, "total_completions": 5},
            "2 right answers",
        ),
        ("rewardbench-2", {"rejected": []}, "total_completions is 4"),
        ("judgebench", {"label": "A=B"}, "must be A>B or B>A"),
        ("llmbar", {"label": 0}, "must be 1 or 2"),
        ("mt-bench-human", {"winner": "model_c"}, "winner is 'model_c'"),
        ("mt-bench-human", {"judge": ["gpt-4", "pair-v2"]}, "a model and no person"),
        ("mt-bench-human", {"turn": 3}, "must be 1 or 2"),
        ("mt-bench-human", {"conversation_b": []}, "has 0 messages"),
        ("hhh", {"targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "one is 1, the others 0"),
        ("hhh", {"targets": "x"}, "choices"),
    ],
)
def test_bad_rows_are_told_with_their_line_and_counted(tmp_path, name, change, said):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(GOOD[name]) + "\n\n" + json.dumps({**GOOD[name], **change}) + "\nnot json\n[]\n"
    )
    made = judge_benchmark.read_benchmark(name, [tmp_path / "rows.jsonl"])
    assert made.rows == 4 and len(made.items) == 1 and len(made.problems) == 3
    first, second, third = map(str, made.problems)
    assert first.startswith(f"{tmp_path / 'rows.jsonl'}:3:1 row 2: ") and said in first
    assert ":4:1 row 3: not JSON" in second and ":5:1 row 4: is no object" in third


def test_an_id_that_stands_for_two_rows_is_told(tmp_path):
    made = bench(tmp_path, "judgebench", [judgebench(1), judgebench(1)])
    assert len(made.items) == 1 and "already names another row" in str(made.problems[0])


def test_every_format_gives_the_same_items(tmp_path):
    rows = [judgebench(i) for i in range(3)]
    bench(tmp_path, "judgebench", rows, "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pl.DataFrame(rows).write_csv(tmp_path / "c.csv")
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    assert (
        len(
            {
                str(judge_benchmark.read_benchmark("judgebench", [file]).items)
                for file in tmp_path.iterdir()
            }
        )
        == 1
    )
    nested = [TIES[1], rewardbench2("Math", "1", 1, 3)]
    bench(tmp_path, "rewardbench-2", nested, "e.jsonl")
    pl.DataFrame(nested).write_parquet(tmp_path / "f.parquet")
    pl.DataFrame(
        [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in nested]
    ).write_csv(tmp_path / "g.csv")
    assert (
        len(
            {
                str(judge_benchmark.read_benchmark("rewardbench-2", [tmp_path / name]).items)
                for name in ("e.jsonl", "f.parquet", "g.csv")
            }
        )
        == 1
    )


def test_files_that_are_none_say_so(tmp_path):
    with pytest.raises(ConfigError, match="did you mean.*llmbar"):
        judge_benchmark.read_benchmark("llmbarr", [])
    with pytest.raises(ConfigError, match="no such file"):
        judge_benchmark.read_benchmark("llmbar", [tmp_path / "x.jsonl"])
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="x.jsonl:1:1 row 1: has no label; its fields are: a"):
        judge_benchmark.read_benchmark("llmbar", [tmp_path / "x.jsonl"])


def test_saved_verdicts_are_scored_without_a_model(tmp_path):
    made = bench(tmp_path, "judgebench", [judgebench(i) for i in range(4)])
    rows = [
        {"id": "p0", "a": 0, "b": 1, "order": "ab", "p_a": 0.9},
        {"id": "p0", "a": 0, "b": 1, "order": "ba", "winner": "a"},
        {
            "id": "p1",
            "a": 1,
            "b": 0,
            "order": "ab",
            "winner": "a",
        },  # told the other way round: answer 1 wins
        {"id": "p1", "a": 1, "b": 0, "order": "ba", "p_a": 0.8},
        {"id": "p2", "answer": 0, "score": 3},
        {"id": "p2", "answer": 1, "score": 1},
        {"id": "p9", "a": 0, "b": 1, "order": "ab", "p_a": 1},
        {"id": "p3", "a": 0, "b": 2, "order": "ab", "p_a": 1},
        {"id": "p0", "a": 0, "b": 1, "order": "ab", "p_a": 1},
        {"id": "p3", "a": 0, "b": 1, "order": "ab", "p_a": 1.5},
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = judge_benchmark.score_saved(made, tmp_path / "said.jsonl")
    assert found.report.own[0].value == pytest.approx(2 / 3) and found.report.unscored == {
        "missing": 1
    }
    told = [str(problem) for problem in found.problems]
    assert [
        "said.jsonl:7:" in told[0],
        "answers 0 to 1" in told[1],
        "already" in told[2],
        "from 0 to 1" in told[3],
    ] == [True] * 4


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 0.9, None])] * 2), min_size=1, max_size=12)
)
def test_bounds_hold_whatever_the_unscored_would_have_said(chances):
    """Every completion of the unscored lies between worst and best; without any, all three are
    one."""
    items = [adapters.adapt("judgebench", judgebench(i)) for i in range(len(chances))]

    def line(said, index=0):
        return metrics.score(
            "judgebench", items, judged(**{f"p{i}": pair for i, pair in enumerate(said)})
        ).own[index]

    found = line(chances)
    for fill in (0.0, 1.0):
        whole = line([tuple(fill if None in pair else p for p in pair) for pair in chances])
        assert found.worst - 1e-12 <= whole.value <= found.best + 1e-12
        assert whole.worst == whole.value == whole.best
    assert found.scored == sum(None not in pair for pair in chances)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=10)
)
def test_which_answer_stands_first_in_the_file_changes_nothing(rows):
    def value(flip):
        items = [
            adapters.adapt("judgebench", judgebench(i, "B>A" if good != flip else "A>B"))
            for i, (*_, good) in enumerate(rows)
        ]
        said = judged(
            **{f"p{i}": (1 - p, 1 - q) if flip else (p, q) for i, (p, q, _) in enumerate(rows)}
        )
        return [line.value for line in metrics.judgebench(items, said, [])]

    assert value(False) == pytest.approx(value(True))


# --- a judge, end to end ---


def better_is_lower(request):
    """Prefers the answer of the lower number, a little more in the first slot; grades 9 less the
    number."""
    text = request.messages[-1].content
    numbers = [int(part[0]) for part in text.split("number ")[1:3]]
    if "9" in request.labels:
        return Completion(
            "9",
            "length",
            {
                label: log(0.98 if label == str(9 - numbers[0]) else 1e-4)
                for label in request.labels
            },
            "exact",
            9,
            1,
        )
    if 7 in numbers:
        return Completion(
            "I cannot", "stop", {label: log(1e-3) for label in request.labels}, "exact", 9, 1
        )
    a = 0.8 if numbers[0] < numbers[1] else 0.3
    return Completion(
        "A",
        "length",
        {**dict.fromkeys(request.labels, log(1e-4)), "A": log(a), "B": log(0.98 - a)},
        "exact",
        9,
        1,
    )


def pipeline(tmp_path, **judge):
    value = project.pipeline(tmp_path)
    value["panel"] = {"judges": [{"name": "judge", "kind": "pairwise", **judge}], "orders": "first"}
    return value


def rows_of(n):
    rows = [judgebench(i, "A>B" if i % 2 else "B>A") for i in range(n)]
    for i, row in enumerate(rows):
        row["response_A"], row["response_B"] = (
            ("number 1", "number 2") if i % 2 else ("number 3", "number 2")
        )
    return rows


def test_a_judge_is_asked_in_both_orders_once(tmp_path):
    made = bench(
        tmp_path,
        "judgebench",
        [
            *rows_of(6),
            {**judgebench(8), "response_A": "number 1", "response_B": "number 7"},
            {**judgebench(9), "response_A": "number 4", "response_B": "number 4"},
        ],
    )
    engine = Scripted(ScriptedConfig(), better_is_lower)
    out = tmp_path / "said.jsonl"
    found = judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path)), made, out=out, engines={"local": engine}
    )
    assert engine.total == 14 and found.asked == 14  # equal answers are not asked about
    line = found.report.own[0]
    assert (
        line.value == pytest.approx(6 / 7) and line.n == 8
    )  # the equal pair is a tie, which is not right
    assert found.report.unscored == {"low_label_mass": 1} and line.best == pytest.approx(7 / 8)
    assert {line.name: line.value for line in found.report.ours}["both orders agree"] == 1.0
    again = judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path)), made, engines={"local": engine}
    )
    assert again.asked == 0 and again.report.own == found.report.own
    saved = judge_benchmark.score_saved(made, out)
    assert saved.report.own == found.report.own and saved.report.ours == found.report.ours
    assert saved.report.unscored == found.report.unscored and not saved.problems
    assert (tmp_path / "store/eval/ledger.sqlite").exists() and not (
        tmp_path / "store/ledger.sqlite"
    ).exists()


def test_failures_of_transport_are_unscored(tmp_path):
    made = bench(tmp_path, "judgebench", rows_of(4))
    engine = Scripted(ScriptedConfig(fail_every=4), better_is_lower)
    found = judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path)), made, engines={"local": engine}
    )
    assert sum(found.report.unscored.values()) == 2 == found.report.unscored["transport"]
    assert found.report.own[0].scored == 2 and found.report.own[0].value == 1.0


@pytest.mark.parametrize("kind", ["pointwise", "rubric"])
def test_judges_of_single_answers(tmp_path, kind):
    def answer(request):
        if kind == "pointwise":
            return better_is_lower(request)
        number = int(
            request.messages[-1].content.split("number ")[1][0]
        )  # the more, the likelier a fault
        return Completion(
            "Yes",
            "length",
            {
                **dict.fromkeys(request.labels, log(1e-6)),
                "Yes": log(0.2 * number),
                "No": log(1 - 0.2 * number),
            },
            "exact",
            9,
            1,
        )

    rows = [
        {
            **rewardbench2("Math", str(i), 1, 3),
            "chosen": ["number 1"],
            "rejected": ["number 2", "number 3", "number 4"],
        }
        for i in range(3)
    ]
    rows[2]["chosen"], rows[2]["rejected"] = ["number 2"], ["number 1", "number 3", "number 4"]
    made = bench(tmp_path, "rewardbench-2", rows)
    engine = Scripted(ScriptedConfig(), answer)
    found = judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path, kind=kind)),
        made,
        out=tmp_path / "said.jsonl",
        engines={"local": engine},
    )
    assert found.asked == 12  # each answer once, however many pairs it stands in
    assert found.report.own[0].value == pytest.approx(2 / 3)
    assert "both orders agree" not in [
        line.name for line in found.report.ours
    ]  # nothing was asked in an order
    assert judge_benchmark.score_saved(made, tmp_path / "said.jsonl").report == found.report


def test_a_principle_of_the_constitution_can_be_asked(tmp_path):
    made = bench(tmp_path, "judgebench", rows_of(2))
    seen = []

    def answer(request):
        seen.append(request.messages[-1].content)
        return better_is_lower(request)

    judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path)),
        made,
        principle="brief",
        engines={"local": Scripted(ScriptedConfig(), answer)},
    )
    assert all("Which answer is briefer?" in text for text in seen)
    asyncio.run(Ledger.open(tmp_path / "store").close())  # from now on there is a store
    found = judge_benchmark.evaluate(
        resolve_pipeline(pipeline(tmp_path)),
        made,
        principle="brief",
        engines={"local": Scripted(ScriptedConfig(), answer)},
    )
    assert found.asked == 0
    (value,) = query(tmp_path / "store", "SELECT value FROM evals")["value"]
    assert json.loads(value)["name"] == "judge on judgebench"
    with pytest.raises(ConfigError, match='no principle "brie"'):
        judge_benchmark.evaluate(resolve_pipeline(pipeline(tmp_path)), made, principle="brie")
    with pytest.raises(ConfigError, match='no judge is named "jud"'):
        judge_benchmark.evaluate(resolve_pipeline(pipeline(tmp_path)), made, "jud")


def test_the_command(tmp_path):
    bench(tmp_path, "judgebench", rows_of(4))
    file = project.write(tmp_path, project.pipeline(tmp_path))
    ask = ["eval", "judge", "--benchmark", "judgebench", "--data", str(tmp_path / "rows.jsonl")]
    done = CliRunner().invoke(
        app, [*ask, str(file), "--out", str(tmp_path / "said.jsonl"), "--json"]
    )
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)
    assert first["items"] == 4 and first["asked"] == 8 and first["own"][0]["name"] == "JudgeBench"
    done = CliRunner().invoke(app, [*ask, "--verdicts", str(tmp_path / "said.jsonl"), "--json"])
    assert json.loads(done.stdout)["own"] == first["own"]
    done = CliRunner().invoke(app, [*ask, "--verdicts", str(tmp_path / "said.jsonl")])
    assert done.exit_code == 0 and "JudgeBench" in done.output
    done = CliRunner().invoke(app, ask)
    assert isinstance(done.exception, ConfigError) and "either a PIPELINE.yaml" in str(
        done.exception
    )


def test_a_verdict_that_could_not_be_read_is_told_both_ways():
    """Counted as wrong, as benchmarks do, and left out."""
    from prefab.judges.benchmarks.adapters import BenchmarkLine
    from prefab.pipelines.quality.judge_benchmark import shown

    some = BenchmarkLine("some", 0.525, 100, 95, 0.4, 0.6, worst=0.5, best=0.55)
    every = BenchmarkLine("every", 0.5, 100, 100, 0.4, 0.6, worst=0.5, best=0.5)
    (_, wrong, read, n, scored, right), (_, value, *rest) = shown([some, every])
    assert (wrong, read.value, n, scored, right) == (0.5, 0.525, 100, 95, 0.55)
    assert value.value == 0.5 and rest == [None, 100, 100, None]
