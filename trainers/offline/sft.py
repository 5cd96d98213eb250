"""Supervised fine-tuning on revisions, on chosen answers or on demonstrations; loss on the
assistant's tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from prefab.factory.keys import digest
from prefab.trainers import collate, data
from prefab.trainers.offline import loop
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.registry import Stage
from prefab.trainers.row_file import Row, StoredRows


class SftConfig(StageConfig):
    """As every stage. Which revisions is said by each source (`revisions: all | last`)."""

    learning_rate: float = Field(2e-5, gt=0)
    on: Literal["demonstrations", "chosen"] = Field(
        "demonstrations",
        description="Revisions and files of demonstrations, or the chosen answers of preferences.",
    )
    every_turn: bool = Field(
        True, description="Of files of whole conversations: learn all of the assistant's turns."
    )
    packing: bool = Field(
        False,
        description="Several conversations in one row of max_length, without attention to each other.",
    )


def trainer_class() -> Any:
    """TRL's SFT trainer with our batches; the head runs on the assistant's tokens alone."""
    from trl import SFTTrainer

    class Trainer(loop.Loop, SFTTrainer):
        """See `loop.Loop`."""

        def losses(self, model: Any, batch: Any, num_items: Any) -> tuple[Any, dict[str, Any]]:
            """Mean negative log-likelihood of the assistant's tokens over the whole step, however
            it is cut up.
            """
            dtype = next(model.parameters()).dtype
            logps_N = model(
                **collate.inputs_of(batch, dtype),
                scored=(batch["row"], batch["place"], batch["token"]),
            )
            weight_N = batch["weight"][batch["answer"]]
            total = (-logps_N * weight_N).sum()
            if self.model.training and num_items is not None:
                # DDP averages gradients over processes, and num_items counts the tokens of all of
                # them
                return total / num_items * self.accelerator.num_processes, {
                    "loss": -logps_N * weight_N,
                    "nll": -logps_N,
                }
            return total / max(len(logps_N), 1), {"loss": -logps_N * weight_N, "nll": -logps_N}

    return Trainer


def run(config: SftConfig, quiet: bool = False) -> dict[str, Any]:
    """Train; give the result: see `loop.run`."""
    return loop.run(config, "sft", prepare, quiet)


STAGE = Stage(SftConfig, run, "sft")


def prepare(config: SftConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    from trl import SFTConfig

    tokenizer, found = loop.read_data(
        config, "sft" if config.on == "demonstrations" else "preference"
    )
    if config.on == "chosen":
        found.train, found.val = distinct(found.train), distinct(found.val)
    encode = data.encoder("sft", tokenizer, found, config.data, every_turn=config.every_turn)
    train, val = loop.token_rows(config, found, encode)
    model, can_pack = loop.ready_model(loop.load_policy_for(config), config, config.packing)
    padding = loop.padding(config)
    if config.packing and (can_pack or padding["flat"]):
        train = pack(train, config.data.max_length)
    elif config.packing:
        found.notes.append(
            "not packed: this attention takes no mask that keeps conversations apart"
        )
    fixed = {
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    args = loop.arguments(config, SFTConfig, "eval_loss", False, **fixed)
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
        data_collator=collate.sft_collator(tokenizer.pad_token_id, **padding),
    )
    return trainer, found, tokenizer


def distinct(rows: Sequence[Row]) -> Sequence[Row]:
    """Each chosen answer of a prompt once, though it won several comparisons."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(digest("chosen", row["prompt"], row["chosen"]), i)
    places = list(first.values())
    return rows.take(places) if isinstance(rows, StoredRows) else [rows[i] for i in places]


def pack(dataset: Any, longest: int) -> Any:
    """Conversations together in rows of at most `longest` tokens; each column becomes a list of
    lists.
    """
    from datasets import Dataset

    items = list(dataset)
    made = []
    for members in collate.packed(items, longest):
        some = [items[i] for i in members]
        made.append(
            {
                **{
                    name: [item[name] for item in some]
                    for name in ("input_ids", "labels", "weight")
                },
                "length": sum(item["length"] for item in some),
                "row": some[0]["row"],
                "packed": True,
            }
        )
    return Dataset.from_list(made)
