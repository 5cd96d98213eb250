"""The offline stages end to end on a tiny model: what they reach, exact resume, and every kind of
bad input."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shutil
import sqlite3
import threading
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from prefab.factory.errors import ConfigError, StoreError
from prefab.trainers import chat, collate, common, trackers
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline import reward as reward_stage
from prefab.trainers.offline import sft as sft_stage
from prefab.trainers.registry import STAGES
from tests.support import trained

OFFLINE = ("sft", "reward", "dpo", "kto")
DRIVER = Path(__file__).resolve().parents[2] / "support/train_driver.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, a model, and how to configure and run a stage over them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("stages")
    store, model = trained.make_store(root), trained.make_model(root / "model")

    class World:
        folder, base = root, str(model)

        def config(self, stage, out, **more):
            data = more.pop("data", None) or trained.data(store)
            return STAGES[stage].config.model_validate(
                {
                    "model": more.pop("model", str(model)),
                    "out": str(out),
                    "data": data,
                    "batch_size": 12,
                    "learning_rate": 2e-3,
                    "max_steps": 12,
                    "eval_every": 4,
                    **more,
                }
            )

        def run(self, stage, out, **more):
            module = STAGES[stage]
            return module.run(self.config(stage, out, **more), quiet=True)

    World.store = store
    return World()


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.slow_but("sft", "dpo")
@pytest.mark.parametrize("stage", OFFLINE)
def test_a_stage_learns_records_and_tells(world, tmp_path, stage):
    first = world.run(stage, tmp_path / "short", max_steps=1)
    result = world.run(stage, tmp_path / "out", max_steps=24)
    trained_at = tmp_path / "out" / STAGES[stage].model
    assert all((tmp_path / "out" / name).exists() for name in STAGES[stage].writes)
    assert (trained_at / "config.json").exists()
    assert result["metrics"]["loss"] < first["metrics"]["loss"]
    if stage in ("reward", "dpo"):
        assert result["metrics"]["accuracy"] == 1.0
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "small@1" in card and "What it is not for" in card and json.dumps(str(world.store)) in card
    )
    assert 'datasets: ["small@1"]' in card and f'base_model: "{Path(world.base).name}"' in card
    assert "license: other" in card and "Fill in `license`" in card
    assert "![Validation loss](training.svg)" in card
    drawn = ElementTree.fromstring((tmp_path / "out/training.svg").read_text())
    assert (
        next(e.text for e in drawn.iter("{http://www.w3.org/2000/svg}title")) == "Validation loss"
    )
    assert ("Not yet: `prefab eval policy`" in card) == (stage != "reward")
    rows = [
        json.loads(v)
        for (v,) in sqlite3.connect(world.store / "ledger.sqlite").execute(
            "SELECT value FROM evals"
        )
    ]
    mine = [row for row in rows if row["subject"] == str(tmp_path / "out")]
    assert (
        len(mine) == 1
        and mine[0]["metrics"]["loss"] == result["metrics"]["loss"]
        and len(mine[0]["history"]) >= 6
    )
    stamp = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert world.run(stage, tmp_path / "out", max_steps=24) == result  # ended: not run again
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="another training .other learning_rate"):
        world.run(stage, tmp_path / "out", max_steps=24, learning_rate=1e-3)


@pytest.mark.parametrize(
    "stage,more",
    [
        ("reward", {"dropout": 0.3, "patience": None}),
        pytest.param("dpo", {"lora": {"rank": 4}}, marks=pytest.mark.slow),
        pytest.param("sft", {"micro_batch": 6}, marks=pytest.mark.slow),
        pytest.param("kto", {}, marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_the_weights_are_the_same_to_the_bit(
    world, stage, more, training_forks
):
    root = world.folder / f"kill-{stage}"
    root.mkdir()
    for name in ("whole", "cut"):
        config = world.config(stage, root / name, max_steps=8, eval_every=2, keep="last", **more)
        (root / f"{name}.json").write_text(config.model_dump_json())
    cut = f"{root / 'cut.json'}:2,4"  # killed once the checkpoint of these steps is begun
    done = training_forks.run([DRIVER, stage, root / "whole.json", cut], timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2 killed"
    one, other = weights(root / "whole"), weights(root / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(
        not torch.equal(one[n], w) for n, w in weights(world.base).items() if n in one
    )  # and it did train


def test_a_loss_that_is_no_number_names_the_batch_and_keeps_the_checkpoint(world, tmp_path):
    from prefab.trainers.offline import dpo

    config = world.config("dpo", tmp_path / "out", max_steps=None, eval_every=2, epochs=2)
    trainer, found, tokenizer = dpo.prepare(config)
    order = list(collate.buckets(trainer.train_dataset["length"], 12, 0, 0))
    bad = order[3 * 12 + 5]  # in the fourth batch
    targets = [math.nan if i == bad else t for i, t in enumerate(trainer.train_dataset["target"])]
    trainer.train_dataset = trainer.train_dataset.remove_columns("target").add_column(
        "target", targets
    )
    with pytest.raises(common.TrainError, match="the loss is nan at step 4") as caught:
        loop.fit(trainer, config, "dpo", found, tokenizer, True)
    named = str(caught.value)
    batch = {found.train[trainer.train_dataset["row"][i]]["preference"] for i in order[36:48]}
    assert sum(name[:40] in named for name in batch) == 8
    kept = common.last_checkpoint(tmp_path / "out")
    assert kept.name == "checkpoint-2" and all(
        torch.isfinite(w).all() for w in weights(kept).values()
    )


def test_the_first_dpo_loss_is_log_two_and_equals_trls(world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from prefab.pipelines.store.export.base import export
    from prefab.trainers.offline import dpo

    data = trained.data(world.store, labels="hard")
    trainer, *_ = dpo.prepare(world.config("dpo", tmp_path / "ours", data=data))
    export(world.store, tmp_path / "export")
    import datasets

    rows = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "export/preference/train.parquet"),
        cache_dir=str(tmp_path / "cache"),
    )["train"]
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=12,
        max_length=None,
    )
    theirs = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(world.base, dtype="float32"),
        AutoModelForCausalLM.from_pretrained(world.base, dtype="float32"),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    for model in (
        trainer.model,
        theirs.model,
    ):  # another policy than the reference, the same in both
        torch.manual_seed(5)
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn_like(p))
    some = list(range(12))
    ours = trainer.compute_loss(
        trainer.model.eval(), trainer.data_collator([trainer.train_dataset[i] for i in some])
    )
    # TRL trains on the line break that the template writes behind the end of turn; nothing is ever
    # sampled there
    cut = [
        {
            **theirs.train_dataset[i],
            **{
                f"{s}_ids": theirs.train_dataset[i][f"{s}_ids"][:-1] for s in ("chosen", "rejected")
            },
        }
        for i in some
    ]
    assert cut[0]["chosen_ids"] == trainer.train_dataset[0]["chosen_ids"]
    assert cut[0]["prompt_ids"] == trainer.train_dataset[0]["prompt_ids"]
    wanted = theirs.compute_loss(theirs.model.eval(), theirs.data_collator(cut))
    assert (
        ours.item() == pytest.approx(wanted.item(), abs=1e-5)
        and abs(ours.item() - math.log(2)) > 1e-3
    )


def moved_batch(module, config):
    """A prepared trainer whose policy is not its reference, twelve of its rows, and their batch."""
    trainer, *_ = module.prepare(config)
    torch.manual_seed(5)
    for p in trainer.model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    rows = [trainer.train_dataset[i] for i in range(12)]
    return trainer, rows, trainer.data_collator(rows)


def plain_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The summed log-probability of an answer after its prompt, one row at a time."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def test_dpo_with_sft_weight_also_raises_the_chosen_answer(world, tmp_path):
    """The loss is DPO's plus `sft_weight` times the chosen answer's mean negative log-probability,
    as `rpo_alpha` of Pang et al. 2024, and it is what is trained on. With a length penalty each
    answer's implied reward has it for each of its tokens (Park et al. 2024)."""
    from prefab.trainers.offline import dpo

    more = {"sft_weight": 0.7, "length_penalty": 0.03}
    trainer, rows, batch = moved_batch(dpo, world.config("dpo", tmp_path / "a", **more))
    assert any(len(row["chosen_ids"]) != len(row["rejected_ids"]) for row in rows)
    with torch.no_grad():
        loss, _ = trainer.losses(trainer.model.eval(), batch, None)
        total = 0.0
        for row in rows:
            won, lost = (
                plain_logps(trainer.model, row["prompt_ids"], row[f"{side}_ids"])
                for side in ("chosen", "rejected")
            )
            apart = 0.1 * (won - row["ref_chosen_logps"] - lost + row["ref_rejected_logps"])
            apart += 0.03 * (len(row["chosen_ids"]) - len(row["rejected_ids"]))
            p = row["target"]
            dpo_loss = -p * apart.sigmoid().log() - (1 - p) * (-apart).sigmoid().log()
            total += row["weight"] * (dpo_loss - 0.7 * won / len(row["chosen_ids"]))
    assert loss.item() == pytest.approx(float(total) / 12, abs=1e-4)


def test_a_reward_models_margin_asks_more_of_surer_pairs(world, tmp_path):
    """Cross-entropy of sigmoid(chosen - rejected - margin (2 p_chosen - 1))."""
    from prefab.trainers.offline import reward

    trainer, rows, batch = moved_batch(reward, world.config("reward", tmp_path / "a", margin=0.8))
    with torch.no_grad():
        loss, _ = trainer.losses(trainer.model.eval(), batch, None)
        total = 0.0
        for row in rows:
            ids = [row[f"{side}_ids"] for side in ("chosen", "rejected")]
            won, lost = (
                trainer.model(input_ids=torch.tensor([x])).logits.reshape(-1)[-1] for x in ids
            )
            apart = won - lost - 0.8 * (2 * row["p"] - 1)
            p = row["target"]
            total += -p * apart.sigmoid().log() - (1 - p) * (-apart).sigmoid().log()
            total += trainer.stage.centre * (won + lost) ** 2
    assert len({row["p"] for row in rows}) > 1
    assert loss.item() == pytest.approx(float(total) / 12, abs=1e-4)


def test_kto_reads_its_reference_point_from_answers_to_other_prompts(world, tmp_path):
    from prefab.trainers.offline import kto

    config = world.config("kto", tmp_path / "a", desirable=1.5, undesirable=0.6)
    trainer, rows, batch = moved_batch(kto, config)
    assert all(row["kl_ids"] != row["completion_ids"] for row in rows)
    with torch.no_grad():
        loss, values = trainer.losses(trainer.model.eval(), batch, None)
        ratios = [
            plain_logps(trainer.model, row["prompt_ids"], row[name]) - row[reference]
            for name, reference in (("completion_ids", "ref_logps"), ("kl_ids", "ref_kl_logps"))
            for row in rows
        ]
        mine, other = torch.stack(ratios[:12]), torch.stack(ratios[12:])
        assert abs(mine.mean() - other.mean()) > 1e-2
        point = other.mean().clamp(min=0)
        total = 0.0
        for row, ratio in zip(rows, mine, strict=True):
            gain = 0.1 * (ratio - point) * (1 if row["label"] else -1)
            total += row["weight"] * (1.5 if row["label"] else 0.6) * (1 - gain.sigmoid())
    assert float(values["kl_reference"][0]) == pytest.approx(float(point), abs=1e-4)
    assert loss.item() == pytest.approx(float(total) / 12, abs=1e-4)


def test_kto_weighs_the_rarer_label_up():
    from prefab.trainers.offline.kto import KtoConfig, balance

    config = KtoConfig(model="m", out="o", data={"sources": [{"store": "s"}]})
    assert balance(config, [True] * 2 + [False] * 6) == (3.0, 1.0)
    assert balance(config, [True] * 6 + [False] * 2) == (1.0, 3.0)
    told = config.model_copy(update={"desirable": 0.5, "undesirable": 0.25})
    assert balance(told, [True] * 6 + [False] * 2) == (0.5, 0.25)


# --- exact optimum

ANSWERS = {"word1": 0.0, "word2": 1.0, "word3": 1.6, "word4": -0.7}  # with their known rewards
BETA = 0.5


def world_file(folder: Path) -> Path:
    """All pairs of the answers, with the Bradley-Terry probability of their rewards, for six
    prompts."""
    rows = [
        {
            "prompt": f"Question {k}?",
            "chosen": a,
            "rejected": b,
            "p_chosen": 1 / (1 + math.exp(ANSWERS[b] - ANSWERS[a])),
        }
        for k in range(6)
        for a, b in itertools.combinations(ANSWERS, 2)
    ]
    demos = [{"prompt": f"Question {k}?", "completion": a} for k in range(6) for a in ANSWERS]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def policy_over_answers(folder: str) -> np.ndarray:
    """The policy's probabilities of the four answers after a training prompt, among themselves."""
    model, tokenizer = common.load_policy(folder), common.load_tokenizer(folder)
    collate.add_scored_forward(model)
    turns = [{"role": "user", "content": "Question 0?"}]
    made = [chat.answered(tokenizer, turns, text) for text in ANSWERS]
    batch = collate.lay_out([[(made[0].prompt, [(i, m.answer) for i, m in enumerate(made)])]], 0)
    logps = collate.answer_logps(model, batch, torch.float32)[0].detach().double().numpy()
    return np.exp(logps - logps.max()) / np.exp(logps - logps.max()).sum()


@pytest.mark.slow
def test_dpo_ends_at_its_exact_optimum(world, tmp_path):
    """A real model through the whole stage: among the answers it ends at pi_ref exp(r / beta) / Z.
    (Where its mass outside of them goes is not said by pairs, so probabilities are compared among
    the answers.)"""
    data = {"sources": [{"files": str(world_file(tmp_path))}], "val_share": 0.2}
    world.run(
        "sft",
        tmp_path / "sft",
        data={"sources": [{"files": str(tmp_path / "demos.jsonl")}]},
        batch_size=24,
        max_steps=60,
        eval_every=60,
        learning_rate=1e-2,
    )  # a reference that gives these answers, about evenly
    base = str(tmp_path / "sft")
    before = policy_over_answers(base)
    assert before.min() > 0.1 and before.max() < 0.5
    world.run(
        "dpo",
        tmp_path / "out",
        model=base,
        data=data,
        beta=BETA,
        batch_size=36,
        max_steps=300,
        eval_every=300,
        schedule="cosine",
        learning_rate=1e-2,
    )
    wanted = before * np.exp(np.array(list(ANSWERS.values())) / BETA)
    wanted /= wanted.sum()
    found = policy_over_answers(str(tmp_path / "out"))
    assert 0.5 * np.abs(found - wanted).sum() < 0.02
    assert 0.5 * np.abs(before - wanted).sum() > 0.2  # it had somewhere to go


@pytest.mark.slow
def test_the_reward_model_recovers_the_reward_up_to_a_constant(world, tmp_path):
    data = {"sources": [{"files": str(world_file(tmp_path))}], "val_share": 0.2}
    world.run(
        "reward",
        tmp_path / "out",
        data=data,
        batch_size=36,
        max_steps=300,
        eval_every=300,
        schedule="cosine",
        learning_rate=1e-2,
        centre=0.0,
        weight_decay=0.0,
        patience=None,
        keep="last",
    )
    told = json.loads((tmp_path / "out/reward.json").read_text())
    talks = [
        [{"role": "user", "content": "Question 0?"}, {"role": "assistant", "content": text}]
        for text in ANSWERS
    ]
    found = reward_stage.scorer(tmp_path / "out")(talks) * told["deviation"]
    wanted = np.array(list(ANSWERS.values()))
    assert np.abs((found - found.mean()) - (wanted - wanted.mean())).max() < 0.05


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_a_table_of_probabilities_ends_at_the_optimum_to_four_digits(name):
    """No model at all: a softmax over the answers through the same loss, so that nothing but the
    loss is tested."""
    r = torch.tensor(list(ANSWERS.values()), dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    table = reference.clone().requires_grad_()
    a, b = (torch.tensor(i) for i in zip(*itertools.combinations(range(4), 2), strict=True))
    target = torch.sigmoid(r[a] - r[b])
    optimiser = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )
    one = torch.ones(len(a))

    def loss():
        optimiser.zero_grad()
        logps = table.log_softmax(-1)
        sides = [losses.Side(logps[i], reference.log_softmax(-1)[i], one) for i in (a, b)]
        value = losses.preference(name, *sides, BETA, target).mean()
        value.backward()
        return value

    optimiser.step(loss)
    shift = (table.log_softmax(-1) - reference).detach()
    if name == "sigmoid":
        assert torch.allclose(shift - shift.mean(), (r - r.mean()) / BETA, atol=1e-4)
    else:  # least squares through (2 target - 1) / (2 beta) over all pairs
        wanted = torch.zeros(4, dtype=torch.float64)
        for i, j, p in zip(a, b, target, strict=True):
            wanted[i] += (2 * p - 1) / (2 * BETA) / 4
            wanted[j] -= (2 * p - 1) / (2 * BETA) / 4
        assert torch.allclose(shift - shift.mean(), wanted, atol=1e-4)


# --- reward models


def test_an_ensemble_and_its_scores(world, tmp_path):
    world.run("reward", tmp_path / "out", members=2, combine="min", seed=3)
    from transformers import AutoModelForSequenceClassification

    members = [tmp_path / "out" / f"member-{k}" for k in range(2)]
    one, two = (weights(m) for m in members)
    assert any(not torch.equal(one[n], two[n]) for n in one)
    from prefab.trainers import data

    found = data.read_rows("preference", data.DataConfig.model_validate(trained.data(world.store)))
    answers = {
        (row["prompt"][0]["content"], row[s]) for row in found.train for s in ("chosen", "rejected")
    }
    talks = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in sorted(answers)
    ]
    each = [reward_stage.scorer(m)(talks) for m in members]
    for scores in each:
        assert scores.mean() == pytest.approx(0, abs=1e-3) and scores.std() == pytest.approx(
            1, abs=1e-3
        )
    both = reward_stage.scorer(tmp_path / "out")(talks)
    assert np.allclose(both, np.minimum(*each), atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(
        members[0]
    )  # an ordinary classifier, no code of ours
    tokenizer = common.load_tokenizer(str(members[0]))
    batch = tokenizer(
        [tokenizer.apply_chat_template(t, tokenize=False) for t in talks[:4]],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    )
    told = json.loads((members[0] / "reward.json").read_text())
    with torch.no_grad():
        logits = plain.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, 0]
    assert np.allclose((logits.numpy() - told["mean"]) / told["deviation"], each[0][:4], atol=1e-4)


@pytest.mark.slow
def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(world, tmp_path):
    result = world.run(
        "reward", tmp_path / "out", max_steps=200, eval_every=4, patience=2, learning_rate=5e-3
    )
    assert result["steps"] < 100  # accuracy 1 is soon reached
    history = json.loads(
        sqlite3.connect(world.store / "ledger.sqlite")
        .execute("SELECT value FROM evals ORDER BY rowid DESC")
        .fetchone()[0]
    )["history"]
    assert result["metrics"]["accuracy"] == max(h["eval_accuracy"] for h in history)


def test_lora_is_written_as_one_model(world, tmp_path):
    world.run("dpo", tmp_path / "out", lora={"rank": 4}, learning_rate=3e-2)
    merged, base = weights(tmp_path / "out"), weights(world.base)
    assert merged.keys() == base.keys() and not (tmp_path / "out/adapter_config.json").exists()
    changed = {n for n in base if not torch.equal(base[n], merged[n])}
    assert changed and all("proj" in n for n in changed)
    assert (
        np.abs(policy_over_answers(str(tmp_path / "out")) - policy_over_answers(world.base)).max()
        > 1e-4
    )


# --- bad input


@pytest.mark.slow
def test_the_trained_model_ends_its_turns_where_the_template_does(world, tmp_path):
    """Though the model it was trained from ended elsewhere, as base models do."""
    from transformers import GenerationConfig

    shutil.copytree(world.base, tmp_path / "base")
    elsewhere = GenerationConfig.from_pretrained(world.base)
    elsewhere.eos_token_id = elsewhere.pad_token_id
    elsewhere.save_pretrained(tmp_path / "base")
    world.run("sft", tmp_path / "out", model=str(tmp_path / "base"), max_steps=1)
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    end = common.load_tokenizer(str(tmp_path / "out")).convert_tokens_to_ids("<|im_end|>")
    assert found.eos_token_id == [end, found.pad_token_id]


def test_what_cannot_be_trained_is_told(world, tmp_path):
    with pytest.raises(ConfigError, match="is there already and holds no training"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").write_text("years")
        world.run("dpo", tmp_path / "mine")
    with pytest.raises(ConfigError, match="micro_batch: 5 does not divide"):
        world.run("dpo", tmp_path / "a", micro_batch=5)
    rows = [{"prompt": f"Ask {i}?", "completion": "Yes.", "label": True} for i in range(40)]
    (tmp_path / "up.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="thumb up: KTO needs both"):
        world.run("kto", tmp_path / "b", data={"sources": [{"files": str(tmp_path / "up.jsonl")}]})
    with pytest.raises(ConfigError, match="p_chosen is the number nan"):
        pairs = [
            {"prompt": f"Ask {i}?", "chosen": "a", "rejected": "b", "p_chosen": math.nan}
            for i in range(9)
        ]
        import polars as pl

        pl.DataFrame(pairs).write_parquet(tmp_path / "nan.parquet")
        world.run(
            "dpo", tmp_path / "c", data={"sources": [{"files": str(tmp_path / "nan.parquet")}]}
        )
    with pytest.raises(ConfigError, match="flash-attn"):
        world.run("dpo", tmp_path / "d", attention="flash_attention_2")
    with pytest.raises(ConfigError, match="flex_attention needs a GPU"):
        common.check_precision("fp32", "flex_attention", "cpu")
    with pytest.raises(ConfigError, match="liger: true needs a GPU and the package"):
        loop.use_liger(None, "cpu")
    with pytest.raises(ConfigError, match="lora.bits: 4 needs the package bitsandbytes"):
        common.quantised(common.Lora(bits=4), "cpu")
    with pytest.raises(ConfigError, match="report: wandb is not installed: pip install wandb"):
        trackers.check_trackers(["wandb"])


@pytest.mark.slow
def test_memory_that_runs_out_names_the_setting_and_what_to_write(world, tmp_path, monkeypatch):
    from prefab.trainers.offline import sft

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    kind = sft.trainer_class()
    monkeypatch.setattr(kind, "losses", runs_out)
    monkeypatch.setattr(sft, "trainer_class", lambda: kind)
    with pytest.raises(
        common.TrainError, match="12 rows were in memory at once. Try micro_batch: 6"
    ):
        world.run("sft", tmp_path / "out")


@pytest.mark.slow
def test_a_training_that_ran_out_of_memory_goes_on_with_a_smaller_micro_batch(
    world, tmp_path, monkeypatch
):
    """The rows of each step stay the same, so that the weights are those of a whole training."""
    from prefab.trainers.offline import dpo

    more = {"max_steps": 4, "eval_every": 2, "micro_batch": 6}
    world.run("dpo", tmp_path / "whole", **more)
    kind = dpo.trainer_class()
    inner = kind.losses

    def runs_out(self, *args):
        if self.model.training and self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, *args)

    monkeypatch.setattr(kind, "losses", runs_out)
    with monkeypatch.context() as m:
        m.setattr(dpo, "trainer_class", lambda: kind)
        with pytest.raises(common.TrainError, match="Try micro_batch: 3 .* run the command again"):
            world.run("dpo", tmp_path / "cut", **more)
    world.run("dpo", tmp_path / "cut", **more | {"micro_batch": 3})
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.allclose(whole[n], cut[n], atol=1e-5) for n in whole)
    record = json.loads((tmp_path / "cut/training.json").read_text())
    assert record["bucket"] == 6 and record["result"]["steps"] == 4


def test_a_measured_micro_batch_is_halved_where_memory_runs_out(tmp_path):
    class Trainer:
        class args:
            per_device_train_batch_size, device = 12, torch.device("cpu")

        stage = sft_stage.SftConfig.model_validate(
            {
                "model": "m",
                "out": str(tmp_path),
                "micro_batch": "auto",
                "data": {"sources": [{"files": "x"}]},
            }
        )

        def is_world_process_zero():
            return True

    record = {"fitted": {"micro_batch": 12, "gradient_checkpointing": False}}
    told = loop._smaller_next_time(Trainer, Trainer.stage, record)
    assert told.startswith("Run the same command again: it goes on with micro_batch 6.")
    assert json.loads((tmp_path / "training.json").read_text())["fitted"]["micro_batch"] == 6


def test_trackers_get_every_log_of_a_stage(world, tmp_path, monkeypatch):
    sent = []

    class Sink:
        def __init__(self, out, config, step):
            sent.append((out.name, config["seed"], step))

        def log(self, step, metrics):
            sent.append((step, metrics))

        def close(self):
            sent.append("closed")

    monkeypatch.setattr(trackers, "_TensorBoard", Sink)
    world.run("sft", tmp_path / "out", max_steps=2, report=["tensorboard"])
    assert sent[0] == ("out", 0, 0) and sent[-1] == "closed"
    logs = dict(sent[1:3])
    assert {1, 2} == set(logs) and logs[1]["loss"] > 0 and logs[1]["tokens_per_second"] > 0
    assert any("eval_loss" in metrics for _, metrics in sent[1:-1])


def test_training_goes_on_while_a_checkpoint_is_written(world, tmp_path, monkeypatch):
    """The first checkpoint is held until a later step was taken, which it must not see."""
    from prefab.trainers.offline import sft

    later, mark = threading.Event(), loop.mark_complete
    taken: list[bool] = []

    def held(folder):
        if folder.name == "checkpoint-1":
            taken.append(later.wait(300))
        mark(folder)

    monkeypatch.setattr(loop, "mark_complete", held)
    config = world.config("sft", tmp_path / "out", max_steps=3, eval_every=1, keep_checkpoints=3)
    trainer, found, tokenizer = sft.prepare(config)
    trainer.args.eval_strategy = "no"  # an evaluation waits for the writer
    step = type(trainer).training_step

    def watched(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 1:
            later.set()
        return loss

    monkeypatch.setattr(type(trainer), "training_step", watched)
    loop.fit(trainer, config, "sft", found, tokenizer, True)
    assert taken == [True] and len(common.checkpoints(tmp_path / "out")) == 3
    first, last = weights(tmp_path / "out/checkpoint-1"), weights(tmp_path / "out")
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_a_disk_that_fills_while_a_thread_writes_is_told(world, tmp_path, monkeypatch):
    def full(folder):
        if folder.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, "No space left on device")
        mark(folder)

    mark = loop.mark_complete
    monkeypatch.setattr(loop, "mark_complete", full)
    with pytest.raises(StoreError, match="the disk is full. The last whole checkpoint is kept"):
        world.run("sft", tmp_path / "out", max_steps=8, eval_every=2)
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_micro_batch_is_measured_without_a_trace(world, tmp_path, monkeypatch):
    """By the GPU's own path, with another measure of memory: 100 bytes a row, 10 with
    checkpointing."""
    from prefab.trainers.offline import fitting, sft

    config = world.config("sft", tmp_path / "out", max_steps=2, micro_batch="auto")
    trainer, found, tokenizer = sft.prepare(config)
    assert trainer.args.per_device_train_batch_size == 6  # on a CPU at most 8
    rows, collate_rows = [], trainer.data_collator

    def peak(_):
        return rows[-1] * (10 if trainer.model.is_gradient_checkpointing else 100)

    monkeypatch.setattr(
        trainer, "data_collator", lambda items: rows.append(len(items)) or collate_rows(items)
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    state = torch.get_rng_state()
    for budget, size, twice in ((700, 6, False), (90, 6, True)):
        monkeypatch.setattr(fitting, "_budget", lambda *_, b=budget: b)
        fitted = fitting.fitted(trainer, "auto", "auto")
        assert fitted == {"micro_batch": size, "gradient_checkpointing": twice}
    monkeypatch.setattr(fitting, "_budget", lambda *_: 5)
    with pytest.raises(common.TrainError, match="not even 1 of the longest rows fit on the GPU"):
        fitting.fitted(trainer, "auto", "auto")
    assert torch.equal(state, torch.get_rng_state()) and trainer.places == 0
    assert not trainer.sums["train"] and all(p.grad is None for p in trainer.model.parameters())
    trainer.model.gradient_checkpointing_disable()
    loop.set_micro_batch(trainer, 4)
    rows.clear()
    assert loop.fit(trainer, config, "sft", found, tokenizer, True)["steps"] == 2
    assert rows[:6] == [4] * 6  # two steps of 12 rows


@pytest.mark.slow
def test_options_that_change_speed_change_nothing_that_is_learnt(world, tmp_path):
    world.run("sft", tmp_path / "plain", max_steps=3)
    options = {"loader_workers": 1, "log_every": 2, "gradient_checkpointing": True}
    world.run("sft", tmp_path / "fast", max_steps=3, **options)
    plain, fast = weights(tmp_path / "plain"), weights(tmp_path / "fast")
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
    # and they may be changed for a training that has begun
    assert world.run("sft", tmp_path / "plain", max_steps=3, **options)["steps"] == 3


@pytest.mark.slow
def test_weights_in_bf16_have_a_copy_in_fp32_in_the_checkpoint(world, tmp_path):
    result = world.run("dpo", tmp_path / "out", max_steps=4, precision="bf16_weights")
    assert math.isfinite(result["metrics"]["loss"])
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.bfloat16}
    last = common.last_checkpoint(tmp_path / "out")
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    assert {s["master"].dtype for s in state.values()} == {torch.float32}


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_another_training(world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world.base, model)
    world.run("sft", tmp_path / "out", model=str(model), max_steps=2)
    trained.make_model(model, seed=9)
    with pytest.raises(ConfigError, match="another training .other weights"):
        world.run("sft", tmp_path / "out", model=str(model), max_steps=2)


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(world, tmp_path, training_forks):
    """A file system of 3 MB would need root; a limit on the size of a file makes the same call fail
    in the same place."""
    config = world.config("sft", tmp_path / "out", max_steps=8, eval_every=2)
    (tmp_path / "c.json").write_text(config.model_dump_json())
    code = (
        "import resource, runpy, sys; sys.dont_write_bytecode = True; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (61440, 61440)); "
        f"runpy.run_path({str(DRIVER)!r}, run_name='__main__')"
    )
    done = training_forks.run(["-c", code, "sft", tmp_path / "c.json"])
    assert done.returncode != 0 and "File too large" in done.stderr
    assert (
        common.last_checkpoint(tmp_path / "out") is None
        and not (tmp_path / "out/model.safetensors").exists()
    )
    with pytest.raises(StoreError, match="disk is full"), common.translate_errors(tmp_path):
        raise RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
