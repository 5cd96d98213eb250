"""A process reward model: the probability that each step of an answer is right, read at the step's
last token.

It is a sequence classifier with one label, as a reward model is; the head is read at the end of
each step instead of the end of the conversation. `process.json` beside it says what a step is.
Source: Lightman et al. 2023. The loss of a step is that of a classifier of two classes whose logits
are 0 and the model's, as TRL's PRMTrainer had it, with a probability as the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from prefab.factory.errors import ConfigError
from prefab.factory.steps import Separator, step_spans
from prefab.trainers import collate, data, distributed
from prefab.trainers.chat import Turns, answered, shown, turn_of
from prefab.trainers.common import FLASH, load_reward, load_tokenizer, write_json
from prefab.trainers.offline import loop, losses
from prefab.trainers.offline.loop import StageConfig
from prefab.trainers.offline.reward import scoring_trainer
from prefab.trainers.registry import Stage
from prefab.trainers.steps import step_tokens

if TYPE_CHECKING:
    from torch import Tensor

FILE = "process.json"


class ProcessTrainingConfig(StageConfig):
    """As every stage. Its rows are answers whose steps have labels: of a run of the recipe process,
    or of files with the columns prompt, completions (the steps) and labels.
    """

    learning_rate: float = Field(2e-5, gt=0)
    by: Separator = Field(
        "line", description="What a step is where the model scores answers; as in the data."
    )


def process_loss(scores_N: Tensor, target_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Of each row, the mean over its steps of the cross-entropy of sigmoid(score) with the target.

    Shapes: N steps to B rows; `row_N` says whose step it is.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    loss_N = cross_entropy(scores_N, target_N, reduction="none")
    return mean_by_row(loss_N, row_N, torch.zeros(rows, device=loss_N.device))


def mean_by_row(values_N: Tensor, row_N: Tensor, zeros_B: Tensor) -> Tensor:
    """The mean of each row's values; 0 for a row without any. Shapes: N to B."""
    import torch

    count_B = torch.zeros_like(zeros_B).index_add_(0, row_N, torch.ones_like(values_N))
    return torch.zeros_like(zeros_B).index_add_(0, row_N, values_N) / count_B.clamp(min=1)


def trainer_class() -> Any:
    """TRL's reward trainer with our loss at the ends of steps, and our batches."""
    from trl import RewardTrainer

    class Trainer(loop.Loop, RewardTrainer):
        """See `loop.Loop`."""

        def losses(self, model: Any, batch: Any, _: Any) -> tuple[Any, dict[str, Any]]:
            """The mean over answers of the mean over their steps."""
            scores_N = step_scores(model, batch, next(model.parameters()).dtype)
            rows_N, zeros_B = batch["answer"], batch["weight"] * 0.0
            loss_B = process_loss(scores_N, batch["step_target"], rows_N, len(zeros_B))
            right_N = ((scores_N > 0) == (batch["step_target"] > 0.5)).float()
            return losses.weighted_mean(loss_B, batch["weight"]), {
                "loss": loss_B * batch["weight"],
                "cross_entropy": loss_B,
                "accuracy": mean_by_row(right_N, rows_N, zeros_B),
            }

    return Trainer


def step_scores(model: Any, batch: Mapping[str, Any], dtype: Any) -> Tensor:
    """The logit at the end of each step of a batch. Shapes: N."""
    found: Tensor = model(
        **collate.inputs_of(dict(batch), dtype),
        scored=(batch["row"], batch["place"], batch["token"]),
    )
    return found


def process_collator(pad: int, multiple: int = 1) -> collate.Collator:
    """Answers (`input_ids`, `places` of step ends, `targets`) to a batch that scores these places.
    Beside the names of `collate.lay_out`: `step_target`, N.
    """

    def make_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = collate.rows_with_places(
            [item["input_ids"] for item in items], [item["places"] for item in items], pad, multiple
        )
        return {
            **batch,
            "step_target": torch.tensor([p for item in items for p in item["targets"]]).float(),
            "weight": torch.tensor([float(item["weight"]) for item in items]),
            "rows": torch.tensor([item["row"] for item in items]),
        }

    return make_batch


def encoded(
    tokenizer: Any, prompt: Turns, text: str, ends: Sequence[int], kwargs: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """(tokens of a conversation that ends with the answer, places of the ends of its steps)."""
    turns = shown(tokenizer, prompt, kwargs)
    (turn,) = shown(tokenizer, [turn_of(text)], kwargs)
    both = answered(tokenizer, turns, turn, kwargs)
    places = step_tokens(tokenizer, both.answer, ends)
    return [*both.prompt, *both.answer], [len(both.prompt) + k for k in places]


def prepare(config: ProcessTrainingConfig) -> tuple[Any, data.Rows, Any]:
    """The trainer, ready to train, with its rows and its tokenizer."""
    if config.attention in FLASH:
        raise ConfigError("attention: this stage has padded rows; write sdpa or eager")
    tokenizer, found = loop.read_data(config, "process")
    _check_steps(config, found)

    def encode(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        ends = [end for end, _ in row["steps"]]
        ids, places = encoded(
            tokenizer, row["prompt"], row["completion"], ends, found.template_kwargs
        )
        yield {
            "input_ids": ids,
            "places": places,
            "targets": [
                float(p) if config.data.labels == "soft" else float(p > 0.5)
                for _, p in row["steps"]
            ],
            "weight": row["weight"],
            "length": len(ids),
        }

    collator = process_collator(tokenizer.pad_token_id, loop.padding(config)["multiple"])
    trainer = scoring_trainer(
        trainer_class(),
        config,
        found,
        tokenizer,
        encode,
        lambda _: collator,
        metric="eval_loss",
        greater=False,
    )
    return trainer, found, tokenizer


def _check_steps(config: ProcessTrainingConfig, found: data.Rows) -> None:
    """Raises: ConfigError where a run's answers were split otherwise."""
    for line in found.lineage:
        by = (line["config"].get("steps") or {}).get("by", "line")
        if by != config.by:
            raise ConfigError(f"by: {line['run']} has labels by {by}; write by: {by}")


def run(config: ProcessTrainingConfig, quiet: bool = False) -> dict[str, Any]:
    """Train; give the result: see `loop.run`."""
    done = loop.run(config, "process", prepare, quiet)
    if distributed.is_main():
        write_json(Path(config.out) / FILE, {"by": config.by})
    return done


STAGE = Stage(ProcessTrainingConfig, run, "process", writes=(FILE,))

# Of prompts and texts: each answer's steps, as (end in characters, P(right)).
StepScorer = Callable[[Sequence[Turns], Sequence[str]], list[list[tuple[int, float]]]]


def step_scorer(folder: str | Path, batch: int = 32, device: str | None = None) -> StepScorer:
    """A function from answers to the probability that each of their steps is right.

    Raises: ConfigError where the folder holds no process reward model.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder}: no process reward model here; train one with `prefab train process`"
        )
    by: Separator = json.loads(file.read_text())["by"]
    model, tokenizer = load_reward(str(folder), device=device), load_tokenizer(str(folder))
    collate.add_scored_forward(model.eval())

    def score(prompts: Sequence[Turns], texts: Sequence[str]) -> list[list[tuple[int, float]]]:
        import torch

        ends = [[end for _, end in step_spans(text, by)] for text in texts]
        rows = [
            encoded(tokenizer, prompt, text, of_text, {}) if of_text else ([], [])
            for prompt, text, of_text in zip(prompts, texts, ends, strict=True)
        ]
        found: list[list[tuple[int, float]]] = [[] for _ in texts]
        order = sorted(
            (i for i, of_text in enumerate(ends) if of_text), key=lambda i: len(rows[i][0])
        )
        parameter = next(model.parameters())
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            laid = collate.rows_with_places(
                [rows[i][0] for i in some], [rows[i][1] for i in some], tokenizer.pad_token_id
            )
            with torch.no_grad():
                laid = collate.to_device(laid, parameter.device)
                right = torch.sigmoid(step_scores(model, laid, parameter.dtype)).tolist()
            at = iter(right)
            for i in some:
                found[i] = [(end, next(at)) for end in ends[i]]
        return found

    return score
