"""Direct preference optimisation (Rafailov et al. 2023) on pairs with a probability each, and its
relatives by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from prefab.trainers import collate, data
from prefab.trainers.common import (
    load_policy,
    load_tokenizer,
    lora_config,
    model_folder,
    seed_everything,
)
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.offline.reference import reference_logps

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
    reference: str | None = Field(None, description="Left out: `model`.")
    reference_cache: str | None = Field(
        None, description="A folder; left out: reference/ beside the output folder's runs."
    )


def trainer_class() -> Any:
    """TRL's DPO trainer with our loss, our batches and nothing to prepare."""
    from trl import DPOTrainer

    class Trainer(loop.Loop, DPOTrainer):
        """See `loop.Loop`."""

        stage: DpoConfig

        def losses(self, model: Any, batch: Any, _: Any) -> tuple[Any, dict[str, Any]]:
            """The pair loss by name, expected under each pair's target."""
            logps, tokens = collate.answer_logps(model, batch, model_dtype(model))
            B = len(batch["rows"])
            refs = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
            chosen, rejected = (
                losses.Side(logps[s], ref, tokens[s])
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


def model_dtype(model: Any) -> Any:
    """Of the weights, below any wrapper."""
    return next(model.parameters()).dtype


def run(config: DpoConfig, quiet: bool = False) -> dict[str, Any]:
    """Train; give the result (metrics of the validation split, steps, seconds). A run that has
    ended is not run again.

    Raises: ConfigError, TrainError, StoreError.
    """
    if (done := loop.finished(config, "dpo")) is not None:
        return done
    made, found, tokenizer = prepare(config)
    return loop.fit(made, config, "dpo", found, tokenizer, quiet)


def prepare(config: DpoConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    from trl import DPOConfig

    seed_everything(config.seed, config.threads)
    tokenizer = load_tokenizer(config.model, config.chat_template, config.pad_token)
    found = data.read_rows("preference", config.data)
    encode = data.encoder("preference", tokenizer, found, config.data)
    train, val = (
        data.tokenised(rows, encode, config.data, found.notes, what)
        for rows, what in ((found.train, "train"), (found.val, "validation"))
    )
    args = loop.arguments(
        config,
        DPOConfig,
        "eval_loss",
        False,
        precompute_ref_log_probs=True,
        max_length=None,
        beta=config.beta,
    )
    model, share = loop.ready_model(load_policy(config.model, config.attention), config)
    with args.main_process_first(local=False):  # the others read what it cached
        train, val = (
            with_reference(config, model, tokenizer, train),
            with_reference(config, model, tokenizer, val),
        )
    trainer = trainer_class()(
        model=model,
        peft_config=lora_config(config.lora, "CAUSAL_LM"),
        args=args,
        train_dataset=train,
        eval_dataset=val,
        processing_class=tokenizer,
        data_collator=collate.pair_collator(tokenizer.pad_token_id, share),
    )
    trainer.stage, trainer.names = config, loop.row_names(found)
    return trainer, found, tokenizer


def with_reference(config: DpoConfig, model: Any, tokenizer: Any, dataset: Any) -> Any:
    """The dataset with the reference's log-probabilities of both answers; zeros for simpo, which
    has none.
    """
    if config.loss == "simpo":
        zeros = [0.0] * len(dataset)
        return dataset.add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)
    from prefab.factory.keys import model_identity

    name = config.reference or config.model
    if config.reference:
        model = load_policy(config.reference, config.attention)
        collate.add_scored_forward(model)
    identity = model_identity(model_folder(name), str(model_dtype(model)))
    cache = (
        Path(config.reference_cache)
        if config.reference_cache
        else Path(config.out).parent / "reference"
    )
    pairs = [
        pair
        for side in ("chosen_ids", "rejected_ids")
        for pair in zip(dataset["prompt_ids"], dataset[side], strict=True)
    ]
    logps = reference_logps(
        model,
        identity,
        pairs,
        cache,
        2 * (config.micro_batch or config.batch_size),
        tokenizer.pad_token_id,
    )
    n = len(dataset)
    return dataset.add_column("ref_chosen_logps", logps[:n]).add_column(
        "ref_rejected_logps", logps[n:]
    )
