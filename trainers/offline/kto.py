"""KTO (Ethayarajh et al. 2024): single answers with a thumb up or down, no pairs needed."""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from prefab.factory.errors import ConfigError
from prefab.trainers import collate, data
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.offline.reference import cache_folder, reference_logps, weights_of
from prefab.trainers.registry import Stage


class KtoConfig(StageConfig):
    """As every stage. Weights left out: the rarer label is weighted up until both weigh the
    same.
    """

    learning_rate: float = Field(1e-5, gt=0)
    beta: float = Field(0.1, gt=0)
    desirable: float | None = Field(None, gt=0)
    undesirable: float | None = Field(None, gt=0)
    reference_cache: str | None = None


def trainer_class() -> Any:
    """TRL's KTO trainer with our loss, our batches and nothing to prepare."""
    from trl import KTOTrainer

    class Trainer(loop.Loop, KTOTrainer):
        """See `loop.Loop`. `weights` are those of desirable and undesirable answers."""

        stage: KtoConfig
        weights: tuple[float, float]

        def losses(self, model: Any, batch: Any, _: Any) -> tuple[Any, dict[str, Any]]:
            """The KTO loss; the reference point is read from answers to other prompts, without
            gradient.
            """
            import torch

            B, dtype = len(batch["rows"]), next(model.parameters()).dtype
            other = {n.removeprefix("kl_"): x for n, x in batch.items() if n.startswith("kl_")}
            logps, _tokens = collate.answer_logps(model, batch, dtype)
            with torch.no_grad():
                kl_logps, _tokens = collate.answer_logps(model, other, dtype)
            kept_B = self.accelerator.gather(batch["weight"]) > 0
            kl = losses.kto_reference(
                self.accelerator.gather(kl_logps)[kept_B],
                self.accelerator.gather(batch["ref_kl_logps"])[kept_B],
            )
            ratio_B = logps - batch["ref_logps"]
            loss_B = losses.kto(ratio_B, batch["label"], kl, self.stage.beta, *self.weights)
            right_B = (ratio_B > kl) == (batch["label"] > 0.5)
            return losses.weighted_mean(loss_B, batch["weight"]), {
                "loss": loss_B * batch["weight"],
                "accuracy": right_B,
                "kl_reference": kl.expand(B),
                "reward": self.stage.beta * ratio_B,
            }

    return Trainer


def run(config: KtoConfig, quiet: bool = False) -> dict[str, Any]:
    """Train; give the result: see `loop.run`."""
    return loop.run(config, "kto", prepare, quiet)


STAGE = Stage(KtoConfig, run, "unpaired")


def prepare(config: KtoConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    from trl import KTOConfig

    tokenizer, found = loop.read_data(config, "unpaired")
    encode = data.encoder("unpaired", tokenizer, found, config.data)
    train, val = loop.token_rows(config, found, encode)
    weights = balance(config, train["label"])
    fixed = {"precompute_ref_log_probs": True, "max_length": None, "beta": config.beta}
    args = loop.arguments(config, KTOConfig, "eval_loss", False, **fixed)
    model, _ = loop.ready_model(loop.load_policy_for(config), config)
    pad = tokenizer.pad_token_id
    with args.main_process_first(local=False):  # the others read what it cached
        train, val = (
            with_reference(config, model, pad, mismatched(part, config.seed), found.notes)
            for part in (train, val)
        )
    trainer = loop.make_trainer(
        trainer_class(),
        config,
        "CAUSAL_LM",
        found,
        tokenizer,
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collate.single_collator(pad, **loop.padding(config)),
    )
    trainer.weights = weights
    return trainer, found, tokenizer


def balance(config: KtoConfig, labels: list[bool]) -> tuple[float, float]:
    """(desirable, undesirable) weights: as told, else such that both labels weigh the same in all.

    Raises: ConfigError where there is only one label. Source: Ethayarajh et al. 2024, eq. 8.
    """
    up = sum(labels)
    down = len(labels) - up
    if not up or not down:
        raise ConfigError(
            f"all {len(labels):,} answers have the thumb {'up' if up else 'down'}: KTO needs both"
        )
    return config.desirable or max(1.0, down / up), config.undesirable or max(1.0, up / down)


def mismatched(dataset: Any, seed: int) -> Any:
    """Each row with the answer of another row, by a seeded cycle: the sample that the reference
    point is read from.
    """
    order = list(range(len(dataset)))
    random.Random(f"kto {seed}").shuffle(order)
    other = dict(zip(order, [*order[1:], order[0]], strict=True))
    answers = dataset["completion_ids"]
    return dataset.add_column("kl_ids", [answers[other[i]] for i in range(len(dataset))])


def with_reference(
    config: KtoConfig, model: Any, pad: int, dataset: Any, notes: list[str] | None = None
) -> Any:
    """The dataset with the reference's log-probabilities of its own answers and of the others'.
    `notes`: see `reference_logps`.
    """
    precision = config.precision
    identity = weights_of(model, config.model, precision)
    cache, batch = cache_folder(config.reference_cache, config.out), loop.rows_at_once(config)
    for name, column in (("ref_logps", "completion_ids"), ("ref_kl_logps", "kl_ids")):
        pairs = list(zip(dataset["prompt_ids"], dataset[column], strict=True))
        logps = reference_logps(model, identity, pairs, cache, batch, pad, precision, notes)
        notes = None  # told once
        dataset = dataset.add_column(name, logps)
    return dataset
