"""A reward model: Bradley-Terry with a probability a pair, ensembles, and scores on which the
reference has mean 0.

What is written is an ordinary sequence classifier with one label, for transformers and for vLLM's
pooling runner; its raw output is the logit. `reward.json` beside it holds what a score needs
besides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefab.factory.errors import ConfigError
from prefab.trainers import collate, data, distributed
from prefab.trainers.chat import Turns, conversation_ids, shown
from prefab.trainers.common import (
    Precision,
    autocast_for,
    load_reward,
    load_tokenizer,
    record_eval,
    write_json,
)
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.registry import Stage

if TYPE_CHECKING:
    import numpy as np

FILE = "reward.json"
Combine = Literal["mean", "min", "mean_minus_sd"]


class RewardTrainingConfig(StageConfig):
    """As every stage. Stops by validation accuracy: training on makes a reward model surer, not
    better (docs/training.md).
    """

    learning_rate: float = Field(2e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    patience: int | None = Field(3, ge=1)
    keep: Literal["best", "last"] = "best"
    margin: float = Field(
        0.0,
        ge=0,
        description="Ask surer pairs to be that much further apart: margin (2 p_chosen - 1).",
    )
    centre: float = Field(
        0.01, ge=0, description="Weight of (chosen + rejected)^2, which holds rewards near zero."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Of attention, while training.")
    members: int = Field(
        1, ge=1, le=64, description="Models in the ensemble, seeds from `seed` on."
    )
    combine: Combine = "mean"
    lam: float = Field(
        1.0, ge=0, description="Of mean_minus_sd: how many deviations between the members."
    )


def trainer_class() -> Any:
    """TRL's reward trainer with our loss, our batches and nothing to prepare."""
    from trl import RewardTrainer

    class Trainer(loop.Loop, RewardTrainer):
        """See `loop.Loop`."""

        stage: RewardTrainingConfig

        def losses(self, model: Any, batch: Any, _: Any) -> tuple[Any, dict[str, Any]]:
            """Cross-entropy with each pair's target, and the centring term."""
            import torch

            chosen, rejected = collate.answer_scores(
                model, batch, next(model.parameters()).dtype
            ).chunk(2)
            margin = self.stage.margin * (2 * batch["p"] - 1)
            loss_B = losses.bradley_terry(chosen, rejected, batch["target"], margin)
            whole_B = loss_B + self.stage.centre * losses.centring(chosen, rejected)
            implied_B = torch.sigmoid(chosen - rejected)
            return losses.weighted_mean(whole_B, batch["weight"]), {
                "loss": whole_B * batch["weight"],
                "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
                "margin": chosen - rejected,
                "reward": torch.cat([chosen, rejected]),
                "implied_off": (implied_B - batch["target"]).abs(),
                "cross_entropy": loss_B,
            }

    return Trainer


def run(config: RewardTrainingConfig, quiet: bool = False) -> dict[str, Any]:
    """Train every member; give the result. What has ended is not run again.

    Raises: ConfigError, TrainError, StoreError.
    """
    if config.members == 1:
        return _member(config, quiet)
    out, results = Path(config.out), []
    for k in range(config.members):
        changes = {"out": str(out / f"member-{k}"), "seed": config.seed + k, "members": 1}
        results.append(_member(config.model_copy(update=changes), quiet))
    names = [f"member-{k}" for k in range(config.members)]
    settings = {
        "members": names,
        "combine": config.combine,
        "lam": config.lam,
        "mean": 0.0,
        "deviation": 1.0,
    }
    accuracies = [r["metrics"]["accuracy"] for r in results]
    result = {
        "stage": "reward",
        "model": str(out),
        "members": results,
        "steps": results[-1]["steps"],
        "train": results[-1]["train"],
        "val": results[-1]["val"],
        "seconds": sum(r["seconds"] for r in results),
        "metrics": {
            "accuracy": sum(accuracies) / len(accuracies),
            "accuracy_worst": min(accuracies),
        },
    }
    if distributed.is_main():
        write_json(out / FILE, settings)
        record_eval(
            loop.result_store(config),
            "train reward ensemble",
            str(out),
            result["metrics"],
            members=len(results),
        )
    return result


def _member(config: RewardTrainingConfig, quiet: bool) -> dict[str, Any]:
    if (done := loop.finished(config, "reward")) is not None:
        return done
    made, found, tokenizer = prepare(config)

    def finish(model: Any) -> dict[str, Any]:
        rows, pad = config.batch_size, tokenizer.pad_token_id
        mean, deviation = normalisation(model, made.train_dataset, pad, rows, config.precision)
        write_json(Path(config.out) / FILE, {"mean": mean, "deviation": deviation})
        return {"reward_mean": mean, "reward_deviation": deviation}

    return loop.fit(made, config, "reward", found, tokenizer, quiet, finish)


STAGE = Stage(RewardTrainingConfig, run, "reward", writes=(FILE,))


def scoring_trainer(
    kind: Any,
    config: StageConfig,
    found: data.Rows,
    tokenizer: Any,
    encode: data.Encoder,
    collator: Callable[[bool], collate.Collator],
    metric: str,
    greater: bool,
    dropout: float | None = None,
) -> Any:
    """A trainer of a model with a new head of one score, ready to train.

    Args:
        kind: The class of the trainer.
        config: The configuration of the stage.
        found: The rows.
        tokenizer: The tokenizer of the model.
        encode: Makes token rows of a row.
        collator: Given whether answers to one prompt share it, makes batches.
        metric: Which validation metric chooses the best checkpoint.
        greater: Whether a greater one is better.
        dropout: Of the head.
    """
    from trl import RewardConfig

    train, val = loop.token_rows(config, found, encode)
    fixed = {"max_length": None, "disable_dropout": False, "center_rewards_coefficient": None}
    args = loop.arguments(config, RewardConfig, metric, greater, **fixed)
    loaded = load_reward(
        config.model,
        config.attention,
        loop.weights_dtype(config),
        new_head=True,
        dropout=dropout,
        lora=config.lora,
    )
    loaded.config.pad_token_id = tokenizer.pad_token_id
    model, share = loop.ready_model(loaded, config)
    return loop.make_trainer(
        kind,
        config,
        "SEQ_CLS",
        found,
        tokenizer,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collator(share),
    )


def prepare(config: RewardTrainingConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    tokenizer, found = loop.read_data(config, "reward")
    encode = data.encoder("reward", tokenizer, found, config.data)
    trainer = scoring_trainer(
        trainer_class(),
        config,
        found,
        tokenizer,
        encode,
        lambda share: collate.reward_collator(
            tokenizer.pad_token_id, share, **loop.padding(config)
        ),
        metric="eval_accuracy",
        greater=True,
        dropout=config.dropout,
    )
    return trainer, found, tokenizer


def normalisation(
    model: Any, dataset: Any, pad: int, batch: int, precision: Precision = "fp32"
) -> tuple[float, float]:
    """(mean, deviation) of the model's scores over the distinct answers of the training pairs,
    which are samples of the reference policy: taken off and divided by, the reference scores mean 0
    and deviation 1.
    """
    import numpy as np

    texts = {tuple(ids) for side in ("chosen_ids", "rejected_ids") for ids in dataset[side]}
    scores = np.asarray(raw_scores(model, [list(t) for t in sorted(texts)], pad, batch, precision))
    return float(scores.mean()), float(max(scores.std(), 1e-6))


def raw_scores(
    model: Any, rows: Sequence[list[int]], pad: int, batch: int, precision: Precision = "fp32"
) -> list[float]:
    """The logit of each conversation's tokens, in order. They are read from the device at the
    end.
    """
    import torch

    if not rows:
        return []
    parameter, was = next(model.parameters()), model.training
    order, found = sorted(range(len(rows)), key=lambda i: -len(rows[i])), []
    model.eval()
    with torch.no_grad(), autocast_for(precision, parameter.device):
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            laid = collate.lay_out(
                [[([], [(k, rows[i])])] for k, i in enumerate(some)], pad, ends=True
            )
            laid = collate.to_device(laid, parameter.device)
            found.append(collate.answer_scores(model, laid, parameter.dtype))
        values = torch.cat(found).tolist()
    model.train(was)
    by_row = dict(zip(order, values, strict=True))
    return [by_row[i] for i in range(len(rows))]


def combine(members: Sequence[float | None], how: Combine, lam: float = 1.0) -> float | None:
    """One score from an ensemble's: the mean, the worst, or the mean minus `lam` deviations (of the
    population).

    None where a member has none. Source: Coste et al. 2024 (2310.02743), worst-case and
    uncertainty-weighted.
    """
    known = [x for x in members if x is not None]
    if len(known) < len(members):
        return None
    if how == "mean":
        return fmean(known)
    if how == "min":
        return min(known)
    return fmean(known) - lam * pstdev(known)


def scorer(
    folder: str | Path,
    batch: int = 32,
    device: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Sequence[Turns]], np.ndarray]:
    """A function from finished conversations to normalised scores, by one model or an ensemble.

    Raises: ConfigError where the folder holds no reward model.
    """
    import numpy as np

    folder = Path(folder)
    told: dict[str, Any] = (
        json.loads((folder / FILE).read_text())
        if (folder / FILE).exists()
        else {"mean": 0.0, "deviation": 1.0}
    )
    if members := told.get("members"):
        each = [scorer(folder / name, batch, device, kwargs) for name in members]
        return lambda talks: np.array(
            [
                combine(column, told["combine"], told["lam"])
                for column in zip(*(score(talks) for score in each), strict=True)
            ]
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no reward model here; train one with `prefab train reward`")
    model, tokenizer = load_reward(str(folder), device=device), load_tokenizer(str(folder))
    collate.add_scored_forward(model)

    def score(talks: Sequence[Turns]) -> np.ndarray:
        rows = [
            conversation_ids(tokenizer, shown(tokenizer, talk, kwargs), kwargs) for talk in talks
        ]
        result: np.ndarray = (
            np.asarray(raw_scores(model, rows, tokenizer.pad_token_id, batch)) - told["mean"]
        ) / told["deviation"]
        return result

    return score
