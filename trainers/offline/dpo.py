"""Direct preference optimisation (Rafailov et al. 2023) on pairs with a probability each, and its
relatives by name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from prefab.trainers import collate, data
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.offline.reference import cache_folder, reference_logps, weights_of
from prefab.trainers.registry import Stage

Loss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "simpo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


class DpoConfig(StageConfig):
    """As every stage; the reference is the model as it was, or another."""

    learning_rate: float = Field(1e-5, gt=0)
    loss: Loss = "sigmoid"
    beta: float = Field(0.1, gt=0, description="How strongly the policy is held to the reference.")
    extra: float | None = Field(
        None,
        description="Share of flipped labels (robust), margin (simpo), smoothing (exo_pair), "
        "temperature (discopop).",
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Of the chosen answer's own log-likelihood, a token (RPO)."
    )
    length_penalty: float = Field(
        0.0,
        exclude_if=lambda value: value == 0.0,
        ge=0,
        allow_inf_nan=False,
        description="What a token costs in implied reward (R-DPO): pairs whose chosen answer is "
        "longer teach less. Not with simpo, whose reward is a mean over tokens.",
    )
    reference: str | None = Field(None, description="Left out: `model`.")
    reference_cache: str | None = Field(
        None, description="A folder; left out: reference/ beside the output folder's runs."
    )

    @model_validator(mode="after")
    def _penalty_has_effect(self) -> DpoConfig:
        if self.length_penalty and self.loss == "simpo":
            raise ValueError("length_penalty has no effect on simpo, which has no reference")
        return self


def trainer_class() -> Any:
    """TRL's DPO trainer with our loss, our batches and nothing to prepare."""
    from trl import DPOTrainer

    class Trainer(loop.Loop, DPOTrainer):
        """See `loop.Loop`."""

        stage: DpoConfig

        def losses(self, model: Any, batch: Any, _: Any) -> tuple[Any, dict[str, Any]]:
            """The pair loss by name, expected under each pair's target."""
            logps, tokens = collate.answer_logps(model, batch, next(model.parameters()).dtype)
            B, rate = len(batch["rows"]), self.stage.length_penalty / self.stage.beta
            refs = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
            chosen, rejected = (
                losses.Side(logps[s], losses.penalised(ref, tokens[s], rate), tokens[s])
                for s, ref in zip((slice(0, B), slice(B, 2 * B)), refs, strict=True)
            )
            c = self.stage
            loss_B = losses.preference(c.loss, chosen, rejected, c.beta, batch["target"], c.extra)
            if c.sft_weight:
                loss_B = loss_B - c.sft_weight * chosen.logps_B / chosen.tokens_B
            implied_B = losses.implied_probability(chosen, rejected, c.beta)
            return losses.weighted_mean(loss_B, batch["weight"]), {
                "loss": loss_B * batch["weight"],
                "accuracy": (implied_B > 0.5).float() + 0.5 * (implied_B == 0.5).float(),
                "margin": c.beta * (chosen.ratio_B - rejected.ratio_B),
                "implied_off": (implied_B - batch["target"]).abs(),
                "logps_chosen": chosen.logps_B,
                "logps_rejected": rejected.logps_B,
            }

    return Trainer


def run(config: DpoConfig, quiet: bool = False) -> dict[str, Any]:
    """Train; give the result (metrics of the validation split, steps, seconds): see `loop.run`."""
    return loop.run(config, "dpo", prepare, quiet)


STAGE = Stage(DpoConfig, run, "preference")


def prepare(config: DpoConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    from trl import DPOConfig

    tokenizer, found = loop.read_data(config, "preference")
    encode = data.encoder("preference", tokenizer, found, config.data)
    train, val = loop.token_rows(config, found, encode)
    fixed = {"precompute_ref_log_probs": True, "max_length": None, "beta": config.beta}
    args = loop.arguments(config, DPOConfig, "eval_loss", False, **fixed)
    model, share = loop.ready_model(loop.load_policy_for(config), config)
    pad = tokenizer.pad_token_id
    with args.main_process_first(local=False):  # the others read what it cached
        train, val = (
            with_reference(config, model, pad, part, found.notes) for part in (train, val)
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
        data_collator=collate.pair_collator(pad, share, **loop.padding(config)),
    )
    return trainer, found, tokenizer


def with_reference(
    config: DpoConfig, model: Any, pad: int, dataset: Any, notes: list[str] | None = None
) -> Any:
    """The dataset with the reference's log-probabilities of both answers; zeros for simpo, which
    has no reference. `notes`: see `reference_logps`.
    """
    n, sides = len(dataset), ("chosen", "rejected")
    if config.loss == "simpo":
        logps = [0.0] * 2 * n
    else:
        name = config.reference or config.model
        if config.reference:
            model = loop.load_policy_for(config, config.reference)
            collate.add_scored_forward(model)
        pairs = [
            pair
            for side in sides
            for pair in zip(dataset["prompt_ids"], dataset[f"{side}_ids"], strict=True)
        ]
        batch = 2 * loop.rows_at_once(config)
        cache, precision = cache_folder(config.reference_cache, config.out), config.precision
        identity = weights_of(model, name, precision)
        logps = reference_logps(model, identity, pairs, cache, batch, pad, precision, notes)
    for k, side in enumerate(sides):
        dataset = dataset.add_column(f"ref_{side}_logps", logps[k * n : (k + 1) * n])
    return dataset
