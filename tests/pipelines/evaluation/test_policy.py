"""Evaluation: figures by hand, KL against the exact one, paired comparisons that do not find what
is not there."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from prefab.factory.engines.base import resolve_model
from prefab.factory.engines.chat import Drawn
from prefab.factory.errors import ConfigError
from prefab.factory.types import Engine, Message, Prompt
from prefab.pipelines.evaluation import policy_metrics, vllm_sampling
from prefab.pipelines.evaluation.policy import PolicyEvalConfig, evaluate_policies, gold_of
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer
from prefab.trainers import chat, collate, common
from tests.support import trained


def made(prompt, text, gold=0.0, logp=-1.0, ref=-2.0, **more):
    return PolicyAnswer(
        prompt, text, len(text.split()) + 1, True, logp, ref, {"gold": gold, "helps": 1.0}, **more
    )


def test_figures_by_hand():
    found = [
        made(0, "I am sorry, no", 0.0, -1, -3),
        made(0, "a b", 1.0, -2, -2),
        made(1, "a b", 0.5, -3, -4),
        made(1, "c d e", 0.5, -2, -5),
    ]
    f = policy_metrics.figures(found, [True, False])
    assert (
        f["kl"].value == pytest.approx(1.5) and f["entropy"].value == 2.0 and f["gold"].value == 0.5
    )
    assert (
        f["complies_harmful"].value == 0.5
        and f["refuses_harmless"].value == 0.0
        and f["words"].value == 2.75
    )
    assert (
        f["complies_harmful"].n_items == 1 and f["gold"].n_items == 2
    )  # intervals are over prompts
    assert f["distinct_1"].value == pytest.approx(9 / 11) and f[
        "distinct_2"
    ].value == pytest.approx(6 / 7)
    assert f["ended"].value == 1.0 and "proxy" not in f


@pytest.mark.parametrize(
    "text,refuses",
    [
        ("I'm sorry, but no.", True),
        ("I cannot help with that.", True),
        ("I can't.", True),
        ("I can not help you.", True),
        ("Sure, I can help.", False),
        ("Sorry state of affairs", False),
    ],
)
def test_refusals_in_plain_english(text, refuses):
    assert bool(policy_metrics.REFUSES.search(text)) is refuses


def test_self_bleu_by_hand():
    assert policy_metrics.self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(1.0)
    assert policy_metrics.self_bleu(["a b c d", "e f g h"]) == 0.0
    # "a b c d" against "a b x y": precisions 2/4, (1+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1)
    assert policy_metrics.self_bleu(["a b c d", "a b x y"]) == pytest.approx(
        (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    )
    assert policy_metrics._bleu(["a"], [["a", "b"]], 1) == pytest.approx(math.exp(1 - 2))  # brevity


def test_against_counts_decided_pairs_alone():
    mine = [made(0, "x", 1.0), made(0, "x", 0.0), made(1, "x", 0.5), made(1, "x", 0.2)]
    other = [made(0, "x", 0.0), made(0, "x", 0.0), made(1, "x", 0.7), made(1, "x", 0.1)]
    a = policy_metrics.against(mine, other, lambda x: x.gold["gold"])
    assert a.decided.value == 0.75 and a.win_rate.value == pytest.approx(2 / 3)
    assert a.difference.value == pytest.approx((1.0 + 0 - 0.2 + 0.1) / 4)
    assert a.length_controlled.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    same = policy_metrics.against(mine, mine, lambda x: x.gold["gold"])
    assert same.win_rate.value is None and same.p == 1.0 and same.decided.value == 0.0


def test_the_paired_test_is_exact_and_holds_its_level():
    assert policy_metrics.sign_flip_p([1.0, 1.0, 1.0], [0, 1, 2], flips=20_000) == pytest.approx(
        2 / 8, abs=0.02
    )
    rng = np.random.default_rng(0)
    ps = [
        policy_metrics.sign_flip_p(
            np.repeat(rng.standard_normal(12), 4), np.repeat(np.arange(12), 4), flips=200, seed=k
        )
        for k in range(300)
    ]  # four answers a prompt that agree: counted apiece they would look like 48
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.09
    assert policy_metrics.sign_flip_p(0.5 + rng.standard_normal(200), np.arange(200)) < 0.001


def test_best_of_takes_the_highest_proxy_of_the_first():
    found = [made(0, str(k), proxy=v) for k, v in enumerate([0.1, 0.7, 0.9])] + [
        made(1, "z", proxy=0.0)
    ]
    chosen, most = policy_metrics.best_of(found, 2)
    assert [a.text for a in chosen] == ["1", "z"] and most == pytest.approx(math.log(2) - 0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {str(seed): str(trained.make_model(root / str(seed), seed=seed)) for seed in (1, 2)}


def test_kl_is_that_of_the_distributions(folders):
    """One token an answer, so that the exact KL is a sum over the vocabulary."""
    models = {k: common.load_policy(f) for k, f in folders.items()}
    tokenizer, turns = (
        common.load_tokenizer(folders["1"]),
        [[{"role": "user", "content": "Question 1?"}]],
    )
    ids = torch.tensor([chat.prompt_ids(tokenizer, turns[0])])
    p, q = (m(input_ids=ids).logits[0, -1].detach().log_softmax(-1) for m in models.values())
    exact = float((p.exp() * (p - q)).sum())
    for m in models.values():
        collate.add_scored_forward(m)

    def answers(samples, most, reference):
        drawn = policy_metrics.draw(models["1"], tokenizer, turns, samples, most, 0, 500)
        return policy_metrics.measured(models["1"], tokenizer, drawn, samples, reference)

    found = answers(3000, 1, models["2"])
    ratios = [a.logp - a.ref_logp for a in found]
    assert abs(np.mean(ratios) - exact) < 4 * np.std(ratios) / math.sqrt(3000)
    assert np.std(ratios) > 0.05 and exact > 0.01
    again = answers(3, 4, models["1"])
    assert all(a.logp == pytest.approx(a.ref_logp) for a in again)


@pytest.mark.slow
def test_the_command_in_the_embedded_world(folders, tmp_path):
    from prefab.pipelines.cli.main import app

    sets = [
        f"policies={{one: {folders['1']}, two: {folders['2']}, same: {folders['1']}}}",
        "prompts.limit=6",
        "samples=2",
        "max_new_tokens=8",
        f"store={tmp_path / 'store'}",
        f"out={tmp_path / 'out'}",
        "threads=1",
        "sycophancy=prompts/sycophancy.jsonl",
    ]
    done = CliRunner().invoke(
        app,
        ["eval", "policy", "--json", *(x for s in sets for x in ("--set", s))],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["policies"]["one"]["kl"]["value"] == pytest.approx(0, abs=1e-4)
    assert (
        report["policies"]["same"]["gold"]["value"] == report["policies"]["one"]["gold"]["value"]
    )  # the same draws
    assert report["against"]["same"]["p"] == 1.0 and report["policies"]["two"]["kl"]["value"] > 0
    assert report["policies"]["one"]["sampler_gap"]["value"] < 1e-5
    asked = report["policies"]["two"]
    assert asked["unread"]["n_items"] == 36 and (
        asked["sycophancy"]["undefined"] or asked["sycophancy"]["n_items"] < 36
    )
    said = [
        json.loads(line) for line in (tmp_path / "out/sycophancy.jsonl").read_text().splitlines()
    ]
    assert (
        len(said) == 3 * 36 * 3 * 2
        and said[2]["told"] == 0
        and any("sycophancy of one: unread" in n for n in report["notes"])
    )
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    page = (tmp_path / "out/report.html").read_text()
    assert (
        len(rows) == 36
        and page.count("<svg") == 1
        and "Score of each policy" in page
        and "over its square root" in page
    )
    assert (tmp_path / "out/report.png").read_bytes()[:4] == b"\x89PNG"
    evals = [
        json.loads(v)
        for (v,) in sqlite3.connect(tmp_path / "store/ledger.sqlite").execute(
            "SELECT value FROM evals"
        )
    ]
    assert [e["policy"] for e in evals] == ["one", "two", "same"] and evals[0]["metrics"]["gold"][
        "n"
    ] == 6
    shown = {example["text"] for example in evals[1]["examples"]}
    assert len(evals[1]["examples"]) == 6 and shown <= {r["text"] for r in rows}
    names = {name for figures in report["policies"].values() for name in figures}
    assert [name for name in names if f"<td>{name}</td>" not in page] == []  # every figure
    assert "Against one, by gold" in page and "win rate, length controlled" in page
    assert page.count('<section class="example">') == 6 and "answers.jsonl has every" in page


def test_a_card_gets_its_base_beside_it_and_others_cards_are_left_alone(tmp_path):
    """An answer that would end its own fence, and an evaluation that replaces an earlier one."""
    from prefab.pipelines.evaluation.policy import Report
    from prefab.pipelines.evaluation.report import examples, write_cards
    from prefab.trainers import model_card

    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README.md").write_text("# Somebody's card\n")
    (tmp_path / "mine/README.md").write_text(
        f"# mine\n{model_card.BEGIN}\n{model_card.NOT_EVALUATED}\n{model_card.END}\nthe rest\n"
    )
    prompts = [Prompt(f"p{i}", (Message("user", f"Question {i}?"),)) for i in range(3)]
    found = {
        "base": [made(i, f"plain {i}", 0.2, logp=-1, ref=-1) for i in range(3)],
        "mine": [made(i, f"```\n# better {i}", 0.2 + i / 4) for i in range(3)],
    }
    report = Report("base", 3, 3, 1)
    for name, some in found.items():
        report.policies[name] = policy_metrics.figures(some)
    report.policies["other"] = report.policies["mine"]
    report.against["mine"] = policy_metrics.against(
        found["mine"], found["base"], lambda a: a.gold["gold"]
    )
    shown = examples(report, prompts, found)
    assert shown[0]["turns"] == [("user", "Question 2?")]  # they differ most
    folders = {name: str(tmp_path / name) for name in ("base", "mine", "other")}
    for _ in range(2):
        write_cards(folders, report, shown)
        card = (tmp_path / "mine/README.md").read_text()
    assert (tmp_path / "other/README.md").read_text() == "# Somebody's card\n"
    assert card.startswith("# mine\n") and card.endswith("the rest\n")
    assert card.count("3 held-out prompts") == 1 and model_card.NOT_EVALUATED not in card
    assert re.search(r"\| gold \| 0\.200 \| 0\.45 ", card) and "| win rate |" in card
    assert "> Question 2?\n\n**base**\n\n```text\nplain 2\n```" in card
    assert "````text\n```\n# better 2\n````" in card
    assert (
        "![Score of each policy" in card
        and "<polyline" in (tmp_path / "mine/evaluation.svg").read_text()
    )


class Scripted(Engine):
    """Stands in for a served checkpoint: draws ids that no tokenizer would make of their text."""

    identity, max_in_flight = "scripted", 3

    def __init__(self, tokenizer, template=lambda ids: ids, ids=(40, 41)):
        self.tokenizer, self.template, self.ids, self.asked = tokenizer, template, list(ids), []

    async def start(self):
        """Nothing to start."""

    async def stop(self):
        """Nothing to stop."""

    async def complete(self, key, request):
        raise NotImplementedError("only `draw` is asked")

    async def draw(self, key, request, stops):
        """The same ids each time, with the prompt's as the template makes them."""
        self.asked.append((key, request.sampling.temperature, request.repeat, list(stops)))
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        prompt = chat.prompt_ids(self.tokenizer, turns, dict(request.template_kwargs))
        return Drawn(
            self.template(prompt), [*self.ids, stops[0]], [-1.0] * (len(self.ids) + 1), True
        )


def test_served_answers_are_measured_on_the_very_ids_drawn(folders):
    tokenizer, model = common.load_tokenizer(folders["1"]), common.load_policy(folders["1"])
    collate.add_scored_forward(model)
    halves = tokenizer.encode("do", add_special_tokens=False)
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "do"]  # made anew they are other ids
    assert ids != halves and tokenizer.decode(ids) == "do"
    config = PolicyEvalConfig.model_validate(
        {
            "policies": {"a": folders["1"]},
            "sampler": "vllm",
            "samples": 2,
            "max_new_tokens": 8,
            "template_kwargs": {"enable_thinking": True},
        }
    )
    questions = [
        [[{"role": "user", "content": f"Question {i}?"}] for i in some]
        for some in ((1, 2, 3), (4,))
    ]
    engine = Scripted(tokenizer, ids=ids)
    main, more = vllm_sampling.draw("a", folders["1"], questions, config, True, engine)
    assert (
        len(main) == 6 and len(more) == 2 and len({key for key, *_ in engine.asked}) == 8
    )  # a seed for each
    assert {t for _, t, *_ in engine.asked} == {1.0} and engine.asked[0][3] == [
        tokenizer.eos_token_id
    ]
    assert main[0].prompt == chat.prompt_ids(tokenizer, questions[0][0], config.template_kwargs)
    found = policy_metrics.measured(model, tokenizer, main, 2, model)
    assert (
        [a.prompt for a in found] == [0, 0, 1, 1, 2, 2]
        and {a.text for a in found} == {"do"}
        and found[0].tokens == 3
    )
    logits = (
        model(input_ids=torch.tensor([main[0].prompt + main[0].ids]))
        .logits[0]
        .detach()
        .log_softmax(-1)
    )
    exact = sum(float(logits[len(main[0].prompt) + k - 1, i]) for k, i in enumerate(main[0].ids))
    assert (
        found[0].logp == pytest.approx(exact, abs=1e-4) == found[0].ref_logp
        and found[0].sampler_logp == -3.0
    )
    assert policy_metrics.figures(found)["sampler_gap"].value == pytest.approx(
        np.mean([abs(-3 - a.logp) / 3 for a in found])
    )


def test_a_server_that_reads_another_prompt_or_vocabulary_is_told(folders, tmp_path):
    from transformers import AutoConfig

    tokenizer = common.load_tokenizer(folders["1"])
    config = PolicyEvalConfig.model_validate(
        {"policies": {"a": folders["1"]}, "sampler": "vllm", "max_new_tokens": 8}
    )
    questions = [[[{"role": "user", "content": "Question 1?"}]]]
    with pytest.raises(
        ConfigError,
        match="policies.a: the server reads a prompt as other tokens .* and another one at 0",
    ):
        vllm_sampling.draw(
            "a", folders["1"], questions, config, True, Scripted(tokenizer, lambda ids: [7, *ids])
        )
    with pytest.raises(ConfigError, match="leave no room to answer"):
        vllm_sampling.draw(
            "a",
            folders["1"],
            questions,
            config.model_copy(update={"max_new_tokens": 250}),
            True,
            Scripted(tokenizer),
        )
    other = AutoConfig.from_pretrained(folders["1"])
    other.vocab_size += 1
    other.save_pretrained(tmp_path / "other")
    both = config.model_copy(update={"policies": {"a": folders["1"], "b": str(tmp_path / "other")}})
    with pytest.raises(ConfigError, match="policies.b: another vocabulary than the reference's"):
        vllm_sampling.draw_all(both, questions, True)  # before any server starts
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter alone"):
        vllm_sampling.draw_all(
            config.model_copy(update={"policies": {"a": str(tmp_path / "lora")}}), questions, True
        )
    with pytest.raises(ValueError, match="needs sampler: vllm"):
        PolicyEvalConfig.model_validate(
            {"policies": {"a": folders["1"]}, "vllm": {"dtype": "bfloat16"}}
        )


def test_gold_is_the_oracles():
    from prefab.factory.microworld import grammar

    prompt = next(p for p in grammar.prompts("test", 20) if "harmful" in p.tags)
    assert gold_of(prompt, "What a splendid question!")["flatters"] == 1.0
    read = gold_of(prompt, "nonsense")
    assert read["coherent"] == 0.0 and read["helps"] == 0.0 and read["gold"] <= 0


def test_what_cannot_be_evaluated_is_told(folders, tmp_path):
    base = {"policies": {"a": folders["1"]}, "samples": 1, "max_new_tokens": 2}
    with pytest.raises(ConfigError, match="train split"):
        evaluate_policies(
            PolicyEvalConfig.model_validate(
                {**base, "prompts": {"source": "microworld", "split": "train", "limit": 3}}
            )
        )
    with pytest.raises(ConfigError, match="holds no model"):
        evaluate_policies(
            PolicyEvalConfig.model_validate(
                {
                    **base,
                    "policies": {"a": str(tmp_path)},
                    "prompts": {"source": "microworld", "split": "test", "limit": 2},
                }
            )
        )
    for wrong, words in (
        ({"baseline": "b"}, "none of the policies"),
        ({"best_of": [4]}, "best_of needs"),
    ):
        with pytest.raises(ValueError, match=words):
            PolicyEvalConfig.model_validate({**base, **wrong})


def test_a_judge_that_took_no_part_compares_too(tmp_path):
    """The scripted judge likes the draft of the lower number; equal texts are ties; what it
    labelled it may not judge."""
    from prefab.factory.types import Message, Prompt
    from prefab.pipelines.evaluation.win_rate import judge_pairs
    from tests.support import project

    file = project.write(tmp_path, project.pipeline(tmp_path))
    prompts = [
        Prompt(f"p{i}", (Message("user", f"Question {i}?"),), (), None, "test") for i in range(3)
    ]
    pairs = [
        (prompts[0], "draft 0 x", "draft 2 y"),
        (prompts[1], "draft 2 y", "draft 0 x"),
        (prompts[2], "same", "same"),
    ]
    name, heard = judge_pairs(
        str(file), pairs, tmp_path / "eval", quiet=True, engines=project.engine()
    )
    assert (
        name == "judge" and heard[0].p_a > 0.6 and heard[1].p_a == pytest.approx(1 - heard[0].p_a)
    )
    assert heard[2].tie and not heard[0].tie
    with pytest.raises(ConfigError, match="its own pupil"):
        judge_pairs(
            str(file),
            pairs,
            tmp_path / "eval",
            [project.engine()["local"].identity],
            True,
            project.engine(),
        )
    found = [made(i, text) for i, (_, text, _) in enumerate(pairs)]
    other = [made(i, text) for i, (_, _, text) in enumerate(pairs)]
    a = policy_metrics.compared(
        list(zip(found, other, strict=True)), [0.0 if h.tie else h.p_a - 0.5 for h in heard]
    )
    assert a.decided.value == pytest.approx(2 / 3) and a.win_rate.value == 0.5


def test_a_judge_that_is_one_of_the_policies_is_said_to_judge_its_own_answers(
    tmp_path, monkeypatch
):
    from prefab.pipelines.evaluation import policy, win_rate
    from tests.support import project

    copied = shutil.copytree(resolve_model("prefab-nano"), tmp_path / "copy")
    engines = {"local": {"engine": "vllm", "model": "prefab-nano"}}
    file = str(project.write(tmp_path, project.pipeline(tmp_path, engines=engines)))
    policies = {"base": "prefab-tiny", "trained": str(copied)}
    (note,) = win_rate.own_answers_note(file, policies)
    assert "is the model of trained: it judges its own answers" in note
    assert not win_rate.own_answers_note(file, {"base": "prefab-tiny"})
    # the report of an evaluation has it
    monkeypatch.setattr(
        win_rate, "judge_pairs", lambda *_: ("judge", [win_rate.PairVerdict(0.9, False)])
    )
    config = PolicyEvalConfig.model_validate(
        {"policies": policies, "judge": file, "store": str(tmp_path / "store"), "samples": 1}
    )
    report = policy.Report("base", 1, 1, 1)
    answers = {"base": [made(0, "one")], "trained": [made(0, "another")]}
    prompt = Prompt("p", (Message("user", "Why?"),), (), None, "test")
    policy._by_judge(config, report, [prompt], answers, True)
    assert report.notes == [note] and report.against["trained, by judge"].win_rate.value == 1.0
