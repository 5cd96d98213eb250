"""Agreement, judges, constitution, labels and training: what the pages show is what the commands
say."""

from __future__ import annotations

import html
import os
import re

import duckdb
import pytest

from prefab import agreement
from prefab.factory import svg as charts
from prefab.factory.stats import clustered_share, clustered_share_of_sums
from prefab.judges.kinds import human
from prefab.pipelines.quality.labeling import tasks
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.labels import recorded
from prefab.pipelines.view.analysis import curves
from prefab.pipelines.view.jobs import written
from prefab.pipelines.view.label import _SESSIONS
from tests.pipelines.view.conftest import OWN, client_of, ready


def test_agreement_shows_what_prefab_agreement_measures(client, made):
    shown = ready(client, "/agreement?format=json&run=world").json()
    found = agreement(made, "world", resamples=0)
    for row, expected in zip(shown["judges"], found["judges"], strict=True):
        for name in ("position_consistency", "first_slot_share", "accuracy"):
            for end in ("value", "low", "high"):
                assert row[name][end] == pytest.approx(getattr(expected[name], end))
    page = html.unescape(client.get("/agreement?run=world").text)
    consistency = found["principles"][0]["position_consistency"]
    assert f"{100 * consistency.value:.1f}%" in page
    assert f"{100 * consistency.low:.1f}–{100 * consistency.high:.1f}" in page


def test_agreement_of_a_sample_takes_whole_groups_and_all_labels_of_people(made):
    whole, some = (agreement(made, "world", resamples=0, sample=n) for n in (0, 9))
    assert whole["sampled"] is None and some["sampled"] == 4
    sql = (
        "SELECT DISTINCT prompt, a, b FROM verdicts WHERE run = 1 AND prompt IN (SELECT prompt FROM prompts "
        """WHERE hash(coalesce(nullif("group", ''), prompt)) % 4 = 0)"""
    )
    assert 0 < some["comparisons"] == query(made, sql).height < whole["comparisons"]
    assert some["accuracy"] == whole["accuracy"] and some["calibration"] == whole["calibration"]
    for row, expected in zip(some["judges"], whole["judges"], strict=True):
        assert row["readings"] < expected["readings"] and row["accuracy"] == expected["accuracy"]
    known = {row["name"]: row["accuracy"] for row in whole["principles"]}
    assert all(row["accuracy"].value == known[row["name"]].value for row in some["principles"])


def test_each_cell_of_agreement_opens_the_preferences_behind_it(client):
    page = html.unescape(ready(client, "/agreement?run=world").text)
    links = set(re.findall(r'href="((?:preferences|preference)\?[^"]+)"', page))
    assert any("judges=" in link for link in links) and any("p_min=" in link for link in links)
    for link in sorted(links)[:: max(1, len(links) // 5)]:
        assert client.get(f"/{link}").status_code == 200, link


def test_principles_that_prefer_the_same_answer_are_counted_with_intervals_over_prompts(
    client, made
):
    shown = ready(client, "/agreement?format=json&run=world").json()["principles_apart"]
    sql = """
    WITH r AS (SELECT prompt, a, b, principle, avg(p_a) AS p FROM verdicts WHERE run = 1 GROUP BY ALL)
    SELECT x.prompt, (x.p > .5) = (y.p > .5) AS same FROM r x JOIN r y USING (prompt, a, b)
    WHERE x.principle = ? AND y.principle = ? AND abs(x.p - .5) > .02 AND abs(y.p - .5) > .02"""
    assert shown
    for row in shown[:5]:
        rows = query(made, sql, [row["one"], row["other"]])
        expected = clustered_share(rows["same"].to_numpy(), rows["prompt"].to_numpy())
        assert row["n"] == rows.height
        assert row["share"]["value"] == pytest.approx(expected.value)
        if expected.low is not None:
            assert row["share"]["low"] == pytest.approx(expected.low)
            assert row["share"]["high"] == pytest.approx(expected.high)


def test_a_share_of_sums_is_the_share_of_the_items():
    hits, groups = [1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 2, 2]
    k = [sum(h for h, g in zip(hits, groups, strict=True) if g == c) for c in range(3)]
    n = [groups.count(c) for c in range(3)]
    sums = (
        sum(n),
        sum(k),
        3,
        sum(x * x for x in k),
        sum(x * y for x, y in zip(k, n, strict=True)),
        sum(y * y for y in n),
    )
    found, expected = clustered_share_of_sums(*map(float, sums)), clustered_share(hits, groups)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert clustered_share_of_sums(0, 0, 0, 0, 0, 0).undefined


def test_judges_beside_people(client, made):
    table = ready(client, "/judges?format=json&run=world").json()["confusion"]
    counted = {
        judge: sum(n for row in rows.values() for n in row.values())
        for judge, rows in table.items()
    }
    labels = human.latest(recorded(made))
    assert set(counted) == {"careful", "hasty", "drawn"}
    assert set(counted.values()) == {
        len({label.place for label in labels if label.winner != "skip"})
    }


def test_the_effect_of_a_principle(client, made):
    shown = {
        p["principle"]: p for p in client.get("/constitution?format=json").json()["principles"]
    }
    rows = query(
        made,
        "SELECT principle, count(DISTINCT (prompt, a, b)), avg((abs(p_a - .5) > .02)::INT), "
        "avg((winner_ab = winner_ba)::INT) FROM readings WHERE run = 1 GROUP BY 1",
    ).rows()
    for principle, n, decisive, same in rows:
        assert shown[principle]["comparisons"] == n
        assert shown[principle]["decisive"]["value"] == pytest.approx(decisive)
        assert shown[principle]["consistent"]["value"] == pytest.approx(same)


@pytest.mark.slow
def test_an_edit_is_checked_as_prefab_check_does(client):
    source = client.get("/constitution?format=json").json()["source"]
    fields = {"run": "world", "do": "check", "text": source.replace("compare:", "compair:", 1)}
    page = ready(client, "/constitution", "POST", data=fields, headers=OWN).text
    told = html.unescape(re.search(r'id="tried".*?</main>', page, re.S)[0])
    assert re.search(r"line:\d+:\d+ principles\[0\].compair: unknown field", told), told
    fields["text"] = source
    page = ready(client, "/constitution", "POST", data=fields, headers=OWN).text
    told = html.unescape(re.search(r'id="tried".*?</main>', page, re.S)[0])
    assert "No problems." in told, told


def test_the_file_of_a_check_that_runs_is_not_written_again(tmp_path):
    """A page asks again twice a second while the check reads the file."""
    file = written(tmp_path, "id: one", "edited-1.yaml")
    assert file.read_text() == "id: one" and os.listdir(tmp_path) == [file.name]
    os.utime(file, (1, 1))
    written(tmp_path, "id: one", "edited-1.yaml")
    assert file.stat().st_mtime == 1


@pytest.mark.slow
def test_an_edit_is_tried_on_comparisons_and_saved_as_a_file(store):
    with client_of(store) as client:
        source = ready(client, "/constitution?format=json").json()["source"]
        fields = {"run": "world", "do": "try", "sample": "6", "text": source}
        page = ready(client, "/constitution", "POST", data=fields, headers=OWN).text
        assert "0 of 6 preferences flip" in page or "cannot be used" in page, page
        saved = client.post(
            "/constitution", data={**fields, "do": "save", "name": "../a b"}, headers=OWN
        )
        assert saved.text == source
        assert saved.headers["content-disposition"] == 'attachment; filename="ab.yaml"'
        wrong = {**fields, "text": "id: [", "sample": "x"}
        assert (
            "notice error" in ready(client, "/constitution", "POST", data=wrong, headers=OWN).text
        )


def test_labels_are_those_of_prefab_label(store):
    """The same task first, the same order of its answers, the same record; undo takes it back."""
    todo = tasks(store, "world", "eve")
    _SESSIONS.clear()
    with client_of(store) as client:
        address = "/label?run=world&annotator=eve&format=json"
        page = ready(client, address).json()
        assert (
            page["task"]["name"] == todo[0].name() and tuple(page["task"]["shown"]) == todo[0].shown
        )
        text = client.get("/label?run=world&annotator=eve").text
        assert "p_chosen" not in text and "careful" not in text
        fields = {"run": "world", "annotator": "eve", "task": todo[0].name(), "said": "a"}
        client.post("/label", data=fields, headers=OWN)
        mine = [x for x in human.latest(recorded(store)) if x.annotator == "eve"]
        assert [(x.place, x.winner) for x in mine] == [
            (todo[0].place, "a" if todo[0].order == "ab" else "b")
        ]
        again = client.post("/label", data=fields, headers=OWN)  # the same form sent twice
        assert again.status_code == 200
        assert len([x for x in human.latest(recorded(store)) if x.annotator == "eve"]) == 1
        client.post("/label", data={**fields, "said": "undo"}, headers=OWN)
        assert not [x for x in human.latest(recorded(store)) if x.annotator == "eve"]
        assert client.get(address).json()["task"]["name"] == todo[0].name()
        bad = client.post("/label", data={**fields, "said": "both"}, headers=OWN)
        assert bad.status_code == 404 and "is none of a, b, tie, skip, undo" in html.unescape(
            bad.text
        )


def test_people_are_asked_from_a_sample_of_a_large_run_in_the_same_order(store):
    prompt = query(store, "SELECT max(prompt) FROM human_labels").item()
    with duckdb.connect(str(store / "prefab.duckdb")) as con:
        con.execute("DELETE FROM human_labels WHERE prompt <> ?", [prompt])
    whole, some = (tasks(store, "world", "eve", sample=n) for n in (0, 3))
    names = {task.name() for task in some}
    assert len(some) < len(whole) and len({task.prompt for task in some}) > 1
    assert [task.name() for task in whole if task.name() in names] == [t.name() for t in some]
    assert all(task in some for task in whole if task.prompt == prompt)


def test_agreement_with_others_and_with_oneself():
    from prefab.pipelines.view.label import again_of, agreement_of

    def row(who, said, at, a="x", b="y"):
        return human.row("p", a, b, "", said, "ab", who, at)

    rows = [
        row("ann", "a", 1.0),
        row("ben", "a", 2.0),
        row("cy", "b", 3.0),
        row("ann", "b", 4.0, "y", "x"),
    ]
    assert [(o["who"], o["n"], o["share"]["value"]) for o in agreement_of(rows, "ann")] == [
        ("ben", 1, 1.0),
        ("cy", 1, 0.0),
    ]
    again = again_of(rows, "ann")  # b of (y, x) is x, which is a of (x, y)
    assert again and again["n"] == 1 and again["share"]["value"] == 1.0
    undone = [*rows, human.undo(human.name_of(rows[3]), "ann", 5.0)]
    assert again_of(undone, "ann") is None


def test_training_shows_each_curve_and_policy(client):
    page = client.get("/training").text
    for words in (
        "Reward model&#39;s score and ground truth",
        "KL from the reference",
        "Validation loss",
        "sft-0",
        "win rate",
        "Answers side by side",
        "sft-0 says yes",
        "It is there, at step 4.",
        "It is there, at step 40.",
    ):
        assert words in page, words
    assert page.index("at step 4.") < page.index("at step 40.") and "<script>window" not in page


def test_judges_show_the_bias_probes(client):
    page = ready(client, "/judges?run=world").text
    assert "authority" in page and "12.5%" in page and "(again 6.2%)" in page
    assert "30.0%" not in page  # of an earlier audit


def test_a_curve_is_drawn_over_kl_in_the_order_of_steps():
    rows = [
        {"step": s, "eval/kl": float(s), "eval/proxy": s / 10, "eval/gold": 0.5, "kl": 1.0}
        for s in (4, 0, 8)
    ]
    found = curves([*rows, {"step": 9, "stopped": "KL too large"}])
    first = found["charts"][0]
    assert [s.name for s in first.series] == ["reward model (proxy)", "ground truth"]
    assert [p.x for p in first.series[0].points] == [0.0, 4.0, 8.0]
    assert found["notes"] == ["KL too large"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.5, 1, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (3, 3, [3.0]),
        (-400, 400, [-400, -200, 0, 200, 400]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)
