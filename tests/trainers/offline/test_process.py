"""A process reward model: its loss by hand, the places of its steps, what it learns, from files and
from a store, and its rewards of steps."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
import torch

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.pipelines.store.fill import fill
from prefab.trainers.common import TrainError, last_checkpoint, load_tokenizer
from prefab.trainers.offline import process
from prefab.trainers.registry import STAGES
from prefab.trainers.rl import evaluation, rewards
from prefab.trainers.rl.rewards import RewardConfig, StepRewards
from prefab.trainers.steps import step_tokens
from tests.pipelines.run import test_process as labels
from tests.support import project, trained

DRIVER = Path(__file__).resolve().parents[2] / "support/train_driver.py"


def test_the_loss_is_that_of_two_classes_at_the_ends_of_steps():
    """As TRL's PRMTrainer had it: cross-entropy over the logits of wrong and right."""
    scores = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4, 1.1])
    targets = torch.tensor([1, 0, 1, 1, 0, 0])
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    logits = torch.stack([torch.zeros(6), scores], dim=1)
    theirs = torch.nn.functional.cross_entropy(logits, targets)
    ours = process.process_loss(scores, targets.float(), rows, 2)
    assert float(ours.mean()) == pytest.approx(float(theirs))
    soft = process.process_loss(scores[:1], torch.tensor([0.25]), rows[:1], 2)
    p = torch.sigmoid(scores[0])
    assert soft.tolist() == pytest.approx([float(-(0.25 * p.log() + 0.75 * (1 - p).log())), 0.0])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.set_num_threads(1)
    return str(trained.make_model(tmp_path_factory.mktemp("process") / "model"))


def test_a_step_ends_at_the_token_that_completes_it(model):
    tokenizer = load_tokenizer(model)
    text = "A quick brown fox é.\n\nThe lazy dog."
    ids = [*tokenizer(text)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ends = [20, len(text)]
    places = step_tokens(tokenizer, ids, ends)
    for end, place in zip(ends, places, strict=True):
        assert tokenizer.decode(ids[: place + 1], skip_special_tokens=True).startswith(text[:end])
        assert len(tokenizer.decode(ids[:place], skip_special_tokens=True)) < end
    assert places[-1] == len(ids) - 2  # not the end-of-turn token


def rows(n: int = 48) -> list[dict]:
    """A step is right where it says garden."""
    made = []
    for k in range(n):
        steps = [f"The {'garden' if (k >> i) % 2 else 'clinic'} answers." for i in range(3)]
        made.append(
            {
                "prompt": f"Question {k}?",
                "completions": steps,
                "labels": ["garden" in step for step in steps],
                "split": "val" if k % 6 == 0 else "train",
            }
        )
    return made


def config(model, out, source, **more):
    value = {
        "model": model,
        "out": str(out),
        "data": {"sources": [source]},
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 30,
    }
    return STAGES["process"].config.model_validate({**value, **more})


def written(folder, made):
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return {"files": str(folder / "steps.jsonl")}


def test_it_learns_which_steps_are_right_and_rewards_each(model, tmp_path):
    settings = config(model, tmp_path / "out", written(tmp_path, rows()))
    done = process.run(settings, quiet=True)
    assert done["metrics"]["accuracy"] > 0.9
    assert process.run(settings, quiet=True) == done  # not trained again
    prompt, text = "Question 5?", "The clinic answers.\nThe garden answers."
    (steps,) = process.step_scorer(tmp_path / "out")(
        [[{"role": "user", "content": prompt}]], [text]
    )
    assert [end for end, _ in steps] == [19, len(text)]
    assert steps[0][1] < 0.5 < steps[1][1]
    (source,) = rewards.build(
        [RewardConfig(name="p", kind="process", paths=[str(tmp_path / "out")], weight=2.0)]
    )
    (total, nothing) = rewards.score([source], [prompt] * 2, [text, "\n"]).total
    assert isinstance(total, StepRewards) and nothing is None
    assert total.steps == tuple((end, pytest.approx(2 * p - 1)) for end, p in steps)
    assert total == pytest.approx(sum(v for _, v in total.steps))


def test_a_store_gives_the_labels_of_its_steps(model, tmp_path):
    value = labels.recipe(tmp_path, [{"name": "judge", "kind": "rubric"}])
    assert run(value, engines={"local": Scripted(ScriptedConfig(), labels.answer)}).state == "done"
    fill(tmp_path / "store")
    source = {"store": str(tmp_path / "store")}
    settings = config(model, tmp_path / "out", source, max_steps=1, batch_size=1)
    _, found, _ = process.prepare(settings)
    made = {row["completion"]: row["steps"] for row in (*found.train, *found.val)}
    first = "so 3\n\nso x0\nso 4."
    assert made[first] == [
        [4, pytest.approx(0.8)],
        [11, pytest.approx(0.1)],
        [17, pytest.approx(0.1)],
    ]
    assert len(made["so 3\n\nso x1\nso 4?"]) == 2  # the third could not be read
    with pytest.raises(ConfigError, match="labels by line; write by: line"):
        process.prepare(config(model, tmp_path / "out", source, by="paragraph", batch_size=1))


def test_a_store_without_labels_of_steps_says_how_to_make_them(model, tmp_path):
    engines = {"local": Scripted(ScriptedConfig(), labels.answer)}
    assert (
        run(
            project.pipeline(tmp_path, prompts=2, name="pairs"),
            engines={"local": Scripted(ScriptedConfig(), project.answer)},
        ).state
        == "done"
    )
    fill(tmp_path / "store")
    source = {"store": str(tmp_path / "store")}
    words = "pairs@1 is a run of the recipe rlaif.*`prefab run process` .*data.sources.0.store"
    with pytest.raises(ConfigError, match=words):
        process.prepare(config(model, tmp_path / "out", source))
    value = labels.recipe(tmp_path, [labels.VERIFIER], steps={"shows": "step"}, name="steps")
    assert run(value, engines=engines).state == "done"
    fill(tmp_path / "store")
    named = {**source, "run": "pairs"}
    with pytest.raises(ConfigError, match="set data.sources.0.run to steps@1"):
        process.prepare(config(model, tmp_path / "out", named))


def saved(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_stopped_at_a_checkpoint_it_goes_on_to_the_same_bits(model, tmp_path, monkeypatch):
    """The head, the optimiser, the order of rows and random numbers are all in the checkpoint."""
    source = written(tmp_path, rows())
    settings = {"max_steps": 7, "eval_every": 2, "batch_size": 4, "micro_batch": 2}
    process.run(config(model, tmp_path / "whole", source, **settings), quiet=True)
    kind = process.trainer_class()
    inner, steps = kind.losses, []

    def stops(self, *args):
        steps.append(self.state.global_step)
        if self.model.training and self.state.global_step == 5:
            raise TrainError("stopped")
        return inner(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "losses", stops)
        patched.setattr(process, "trainer_class", lambda: kind)
        with pytest.raises(TrainError, match="stopped"):
            process.run(config(model, tmp_path / "cut", source, **settings), quiet=True)
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-4"
    process.run(config(model, tmp_path / "cut", source, **settings), quiet=True)
    assert saved(tmp_path / "whole") == saved(tmp_path / "cut")
    assert saved(tmp_path / "whole/checkpoint-6") != saved(tmp_path / "whole")  # each step counts


@pytest.mark.slow
def test_killed_and_run_again_the_weights_are_the_same_to_the_bit(model, tmp_path, training_forks):
    source = written(tmp_path, rows())
    for name in ("whole", "cut"):
        settings = config(model, tmp_path / name, source, max_steps=12, eval_every=2)
        (tmp_path / f"{name}.json").write_text(settings.model_dump_json())
    cut = f"{tmp_path / 'cut.json'}:2,8"  # killed once the checkpoint of these steps is begun
    done = training_forks.run([DRIVER, "process", tmp_path / "whole.json", cut], timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2 killed"
    assert saved(tmp_path / "whole") == saved(tmp_path / "cut")
    assert (tmp_path / "cut" / process.FILE).is_file()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "is no process row"),
        ({"prompt": "p", "completions": ["a", " "], "labels": [1, 0]}, "is no process row"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [1]}, "one for each step"),
        ({"prompt": "p", "completions": ["a"], "labels": [2]}, "or a probability"),
        ({"prompt": "p", "completions": ["a"], "labels": ["yes"]}, "or a probability"),
    ],
)
def test_rows_that_are_none(model, tmp_path, row, words):
    with pytest.raises(ConfigError, match=words):
        process.prepare(config(model, tmp_path / "out", written(tmp_path, [row])))


def test_a_reward_model_is_no_process_reward_model(model):
    with pytest.raises(ConfigError, match="no process reward model here"):
        process.step_scorer(model)


def test_rewards_of_steps_beside_others():
    """A whole reward stays at the end; those of steps have their scale, and survive a process."""
    steps = rewards.Source(
        "steps", (lambda p, c: [StepRewards([(1, 0.5), (2, 1.5)])] * len(c),), 2.0
    )
    whole = rewards.Source("whole", (lambda p, c: [1.0] * len(c),))
    scales = {"steps": [(1.0, 4.0), (0.0, 1.0)]}
    (total,) = rewards.score([steps, whole], ["p"], ["ab"], scales).total
    assert total == pytest.approx(2 * (2 - 1) / 4 + 1)
    assert total.steps == ((1, 0.25), (2, 0.75))
    again = pickle.loads(pickle.dumps(total))
    assert again == total and again.steps == total.steps
    wrong = rewards.single(lambda p, c: [StepRewards([(9, 0.5)])])
    with pytest.raises(TrainError, match="outside of the answer"):
        rewards.score(wrong, ["p"], ["ab"])


def test_an_evaluation_keeps_rewards_of_steps_as_numbers_that_json_has(monkeypatch):
    scored = iter([[1.0, 1.0], [StepRewards([(1, 0.5), (2, 1.5)]), None]])  # gold, then rewards
    monkeypatch.setattr(evaluation, "texts_of", lambda t, answers: ["x"] * len(answers))
    monkeypatch.setattr(evaluation, "reference_logps", lambda t, answers: [-1.0] * len(answers))
    monkeypatch.setattr(evaluation.rewards, "score", lambda *a: SimpleNamespace(total=next(scored)))
    t = SimpleNamespace(state=SimpleNamespace(seen=[], scales=None), sources=[])
    answers = [SimpleNamespace(ids=[1]), SimpleNamespace(ids=[2])]
    seen = evaluation._scored(t, SimpleNamespace(name="gold"), [None, None], answers)
    assert orjson.loads(orjson.dumps([one.proxy for one in seen])) == [2.0, None]
