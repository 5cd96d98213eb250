"""What the offline stages share around TRL's trainers: settings, order of batches, checkpoints, and
how a run ends.

A run is its configuration, its model and its data. The same command again goes on from the last
whole checkpoint, with the same batches, optimiser state and random numbers; a run that has ended is
not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field

from prefab.factory.console import Progress, warn
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.trainers import collate, distributed
from prefab.trainers.background import BackgroundWriter, snapshot
from prefab.trainers.common import (
    FLASH,
    NEW,
    Attention,
    Lora,
    Precision,
    Strict,
    TrainError,
    attention_for,
    check_precision,
    default_device,
    last_checkpoint,
    load_policy,
    load_tokenizer,
    lora_config,
    mark_complete,
    model_folder,
    record_eval,
    remove_old,
    seed_everything,
    translate_errors,
    unused_gpu,
    write_ends,
    write_json,
)
from prefab.trainers.data import DataConfig, Encoder, Kind, Rows, read_rows, tokenised
from prefab.trainers.model_card import loss_chart, write_card
from prefab.trainers.offline.fitting import (
    divisors,
    first_micro_batch,
    fitted,
    memory_advice,
)
from prefab.trainers.trackers import Tracker, Trackers, check_trackers, open_trackers

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a stage mixes `Loop` with a trainer, which is imported only when it is used

MicroBatch = Annotated[int, Field(ge=1)]
RECORD = "training.json"  # in the output folder: what is trained, and how it ended
WAIT_S = 86_400  # for the main process, which computes reference log-probabilities alone
SCHEDULES = {"constant": "constant_with_warmup"}
NOT_IDENTITY = {  # fields that change nothing that is learnt
    "out",
    "threads",
    "report_to",  # as `report` was called
    "report",
    "store",
    "keep_checkpoints",
    "gradient_checkpointing",
    "compile",
    "liger",
    "loader_workers",
    "log_every",
    "micro_batch",  # the order of rows is that of the first start (see `fit_to_memory`)
}


class StageConfig(Strict):
    """What every stage can be told. The learning rate and the schedule's other numbers have a
    default in each stage.
    """

    model: str = Field(description="What is trained: a folder, an embedded model or a hub name.")
    out: str = Field(
        description="The folder that the trained model is written to; checkpoints stand below it."
    )
    data: DataConfig
    store: str | None = Field(
        None, description="Where results are recorded; left out: the first source that is a store."
    )
    seed: int = Field(0, ge=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="Overrides epochs.")
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_size: int = Field(32, ge=1, description="Rows a step, over all processes.")
    micro_batch: MicroBatch | Literal["auto"] | None = Field(
        None,
        description="Rows in memory at once; left out: all of a process's; auto: as many as fit on "
        "a GPU, by measurement, and 8 on a CPU.",
    )
    precision: Precision = Field(
        "fp32",
        description="tf32: fp32 with products in TF32 on a GPU; bf16: mixed precision, weights stay "
        "fp32; bf16_weights: weights in bf16, with a copy in fp32 in the optimiser.",
    )
    attention: Attention = "auto"
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Compute activations twice instead of keeping them; auto: where not even one row "
        "fits on the GPU otherwise.",
    )
    compile: bool = Field(
        False, description="Compile each layer with torch.compile: faster steps, a slower start."
    )
    liger: bool = Field(
        False, description="Use the kernels of the package liger-kernel (needs a GPU)."
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="Processes that prepare batches ahead; left out: 2 on a GPU, none on a CPU.",
    )
    log_every: int | None = Field(
        None, ge=1, description="Steps between logs; left out: 10 on a GPU, 1 on a CPU."
    )
    share_prompt: bool = Field(
        True, description="Answers to one prompt read it once, where the model can."
    )
    lora: Lora | None = None
    merge_lora: bool = Field(True, description="Write one whole model; else the adapter alone.")
    eval_every: int | None = Field(
        None, ge=1, description="Steps between validations (and checkpoints); left out: five a run."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after so many validations without a better one."
    )
    keep: Literal["best", "last"] = Field("last", description="Which checkpoint becomes the model.")
    keep_checkpoints: int = Field(2, ge=1)
    report: list[Tracker] = Field(
        [], description="Where metrics are also sent; nothing is sent anywhere unless named here."
    )
    threads: int | None = Field(
        None, ge=1, description="Of torch on a CPU; left out: as torch chooses."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file, for a tokenizer without one."
    )
    pad_token: str | None = None


Config = TypeVar("Config", bound=StageConfig)


def result_store(config: StageConfig) -> str | None:
    """The store that results go to."""
    return config.store or next((s.store for s in config.data.sources if s.store), None)


def arguments(config: StageConfig, kind: Any, metric: str, greater: bool, **more: Any) -> Any:
    """The stage's settings as the arguments of a TRL trainer; `kind` is its configuration class."""
    distributed.forget_earlier_runs()
    world = distributed.world_size()
    if config.batch_size % world:
        raise ConfigError(
            f"batch_size: {config.batch_size} rows cannot be shared by {world} processes"
        )
    mine = config.batch_size // world
    device = default_device()
    check_precision(config.precision, config.attention, device)
    check_trackers(config.report)
    micro = first_micro_batch(config.micro_batch, mine, device)
    if mine % micro:
        raise ConfigError(f"micro_batch: {micro} does not divide the {mine} rows of a process")
    steps = config.eval_every if config.eval_every else 0.2
    on_gpu = device != "cpu"
    workers = config.loader_workers if config.loader_workers is not None else 2 * on_gpu
    return kind(
        output_dir=config.out,
        seed=config.seed,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES.get(config.schedule, config.schedule),
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=mine // micro,
        bf16=config.precision == "bf16",
        fp16=False,
        tf32=config.precision == "tf32" if on_gpu else None,  # None: transformers turns it on
        use_cpu=not on_gpu,
        gradient_checkpointing=config.gradient_checkpointing is True,
        eval_strategy="steps",
        eval_steps=steps,
        save_strategy="steps",
        save_steps=steps,
        load_best_model_at_end=config.keep == "best" or config.patience is not None,
        metric_for_best_model=metric,
        greater_is_better=greater,
        report_to="none",
        ddp_timeout=WAIT_S,
        logging_steps=config.log_every or (10 if on_gpu else 1),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        dataloader_persistent_workers=bool(workers),
        **more,
    )


def weights_dtype(config: StageConfig) -> str:
    """The precision of the weights in memory."""
    return "bfloat16" if config.precision == "bf16_weights" else "float32"


def load_policy_for(config: StageConfig, model: str | None = None) -> Any:
    """The stage's model, or another one, as the stage's settings say."""
    return load_policy(
        model or config.model, config.attention, weights_dtype(config), lora=config.lora
    )


def padding(config: StageConfig) -> dict[str, Any]:
    """How the stage's rows are laid out (see `collate.lay_out`): without padding for flash
    attention, and to a multiple of 8 on a GPU, whose kernels want that.
    """
    return {
        "flat": config.attention in FLASH,
        "multiple": 1 if default_device() == "cpu" else 8,
    }


def rows_at_once(config: StageConfig) -> int:
    """The micro-batch, as far as it is known before the training."""
    return first_micro_batch(config.micro_batch, config.batch_size, default_device())


class Order:
    """A sampler whose order is a function of seed and epoch alone (see `layout.buckets`)."""

    def __init__(self, lengths: list[int], batch: int, seed: int, extra: int = 0) -> None:
        self.lengths, self.batch, self.seed, self.epoch, self.extra = lengths, batch, seed, 0, extra

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, and after a resume."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        yield from collate.buckets(self.lengths, self.batch, self.seed, self.epoch)
        yield from range(len(self.lengths), len(self))  # after the last, smaller batch

    def __len__(self) -> int:
        return len(self.lengths) + self.extra


class Loop(_Trainer):
    """Mixed into a TRL trainer: tokens come ready, batches in buckets, checkpoints are marked, a
    NaN stops it.

    A class, because transformers' Trainer is extended by overriding; it holds nothing but what
    those hooks need. A stage gives `losses(model, batch) -> (loss, {name: values a row})`, among
    which `loss`, the rows' own losses.
    """

    stage: StageConfig
    names: list[str] = []  # of the rows of train, for messages
    kept: int = 2  # checkpoints
    places: int = 0  # tokens that were computed since the start, with padding
    bucket: int | None = None  # rows of like length that stand together; None: the micro-batch
    deferred: list[Callable[[], Any]] | None = None  # parts of a checkpoint that a thread writes

    @cached_property
    def writer(self) -> BackgroundWriter:
        """What writes checkpoints."""
        return BackgroundWriter()

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = train_dataset if train_dataset is not None else self.train_dataset
        plain, extra = (
            (data.dataset, data.extra) if isinstance(data, distributed.Padded) else (data, 0)
        )
        return Order(
            plain["length"],
            (self.bucket or self.args.per_device_train_batch_size) * self.args.world_size,
            self.args.seed,
            extra,
        )

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        world = self.args.world_size
        even = distributed.Padded(dataset, batch_size * world) if world > 1 else dataset
        return super()._get_dataloader(even, description, batch_size, *args, **kwargs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is written at the end, with lineage."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """AdamW as the Trainer makes it, with a copy in fp32 of weights in bf16."""
        from prefab.trainers.offline.master_weights import master_adamw

        made, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return (master_adamw() if self.stage.precision == "bf16_weights" else made), kwargs

    def note(self, kept_B: Tensor, values: dict[str, Tensor]) -> None:
        """Metrics a row, summed over rows, so that a smaller last batch does not count as a whole
        one. Rows that are not `kept_B` stand for nothing; values of other length than B or 2 B
        (tokens) have none of those. The sums stay on the device until they are logged.
        """
        import torch

        B, sums = len(kept_B), self.sums["train" if self.model.training else "eval"]
        by_length: dict[int, list[str]] = defaultdict(list)
        for name, found in values.items():
            by_length[len(found)].append(name)
        for n, names in by_length.items():
            found_MN = torch.stack([values[name].detach().float() for name in names])
            count: Tensor | int = n
            if n in (B, 2 * B):
                mask = kept_B.repeat(n // B)
                found_MN, count = found_MN.masked_fill(~mask, 0.0), mask.sum()
            for name, total in zip(names, found_MN.sum(1, dtype=torch.float64), strict=True):
                before, counted = sums.get(name, (0.0, 0))
                sums[name] = (before + total, counted + count)

    @cached_property
    def sums(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        """Sums and counts since the last log, by mode and metric; on the device."""
        return {"train": {}, "eval": {}}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss, with its metrics noted."""
        import torch

        self.rows_now, kept_B = inputs["rows"], inputs["weight"] > 0
        self.places += inputs["input_ids"].numel()
        loss, values = self.losses(model, inputs, num_items_in_batch)
        rows_loss = values.pop("loss")
        self.note(kept_B, values if self.model.training else {**values, "loss": rows_loss})
        if (
            self.args.world_size > 1 and num_items_in_batch is None
        ):  # a mean over the rows that are kept, wherever they are
            loss = (
                loss
                * torch.numel(kept_B)
                / self.accelerator.reduce(kept_B.sum().float(), "mean").clamp(min=1e-9)
            )
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, *_: Any, **__: Any
    ) -> tuple[Any, None, None]:
        """A validation batch gives its loss; predictions are not kept."""
        import torch

        with torch.no_grad(), self.compute_loss_context_manager():
            return (
                self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean(),
                None,
                None,
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but a loss that is not finite stops before the optimiser has seen its
        gradient. Losses are read once a step, when all its parts are on their way.
        """
        import torch

        self.writer.check()
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append((self.rows_now, loss))
        if self.accelerator.sync_gradients or not loss.is_cuda:
            losses = torch.stack([one for _, one in self.step_losses]).tolist()
            for (rows, _), value in zip(self.step_losses, losses, strict=True):
                if not math.isfinite(value):
                    raise self._not_finite(value, rows.tolist())
            self.step_losses.clear()
        return loss

    def _not_finite(self, value: float, rows_now: list[int]) -> TrainError:
        rows = ", ".join(self.names[i] if i < len(self.names) else str(i) for i in rows_now[:8])
        return TrainError(
            f"the loss is {value} at step {self.state.global_step + 1}, in the batch of rows "
            f"{rows}{' ...' if len(rows_now) > 8 else ''}. The last whole checkpoint is kept: look at "
            "these rows, lower learning_rate, or use precision: fp32"
        )

    @cached_property
    def step_losses(self) -> list[tuple[Tensor, Tensor]]:
        """(rows, loss) of each part of this step."""
        return []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was noted, over all processes. `eval_loss` is a mean over rows
        (SFT: tokens).
        """
        import torch

        mode = "train" if self.model.training else "eval"
        prefix, names = "" if mode == "train" else "eval_", list(self.sums[mode])
        if names:
            columns = zip(*self.sums[mode].values(), strict=True)
            sums = torch.stack(
                [torch.stack([torch.as_tensor(x).double() for x in column]) for column in columns]
            ).T
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
            logs.update(
                {
                    prefix + name: total / n
                    for name, (total, n) in zip(names, sums.tolist(), strict=True)
                    if n
                }
            )
        self.sums[mode].clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        import torch

        if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
            raise TrainError(
                f"weights that are not finite at step {self.state.global_step}; the last whole checkpoint is "
                "kept. Lower learning_rate, or use precision: fp32"
            )
        out = Path(self.args.output_dir)
        folder = out / f"checkpoint-{self.state.global_step}"
        alone = self.args.world_size == 1 and not _is_sharded(self)
        self.writer.wait()
        self.deferred = [] if alone else None
        super()._save_checkpoint(model, trial)
        parts, self.deferred = self.deferred or [], None
        self.accelerator.wait_for_everyone()
        best = Path(self.state.best_model_checkpoint or "").name

        def write() -> None:
            try:
                for part in parts:
                    part()
                mark_complete(folder)
            except Exception:
                shutil.rmtree(folder, ignore_errors=True)  # half of it only takes space
                raise
            remove_old(out, self.kept, best)

        if alone:
            self.writer.submit(write)
        elif self.is_world_process_zero():
            write()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> Any:
        """As the Trainer's; within a checkpoint of one process, from a copy and in a thread."""
        if self.deferred is None:
            return super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        copied = snapshot(self.model.state_dict() if state_dict is None else state_dict)
        self.deferred.append(partial(super()._save, output_dir, copied))
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> Any:
        """As the Trainer's; within a checkpoint of one process, from a copy and in a thread."""
        if self.deferred is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        import torch
        from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

        for part, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            copied = snapshot(part.state_dict())
            self.deferred.append(partial(torch.save, copied, Path(output_dir) / name))
        return None

    def _load_best_model(self) -> None:
        self.writer.wait()
        super()._load_best_model()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which may start processes: not while a thread is writing."""
        self.writer.wait()
        return super().evaluate(*args, **kwargs)


def read_data(config: StageConfig, kind: Kind) -> tuple[Any, Rows]:
    """Seed, then load the tokenizer and the rows of both splits."""
    seed_everything(config.seed, config.threads)
    tokenizer = load_tokenizer(config.model, config.chat_template, config.pad_token)
    return tokenizer, read_rows(kind, config.data)


def token_rows(config: StageConfig, found: Rows, encode: Encoder) -> tuple[Dataset, Dataset]:
    """The train and the validation rows as tokens."""
    train, val = (
        tokenised(rows, encode, config.data, found.notes, what)
        for rows, what in ((found.train, "train"), (found.val, "validation"))
    )
    return train, val


def make_trainer(
    kind: Any,
    config: StageConfig,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    found: Rows,
    tokenizer: Any,
    **parts: Any,
) -> Any:
    """A trainer of class `kind` from its `parts` (model, args, data sets, collator)."""
    trainer = kind(peft_config=lora_config(config.lora, task), processing_class=tokenizer, **parts)
    trainer.stage, trainer.names = config, row_names(found)
    return trainer


def run(
    config: Config,
    stage: str,
    prepare: Callable[[Config], tuple[Any, Rows, Any]],
    quiet: bool = False,
) -> dict[str, Any]:
    """Train what `prepare` gives (trainer, rows, tokenizer). A run that has ended is not run again.

    Raises: ConfigError, TrainError, StoreError.
    """
    if (done := finished(config, stage)) is not None:
        return done
    trainer, found, tokenizer = prepare(config)
    return fit(trainer, config, stage, found, tokenizer, quiet)


def finished(config: StageConfig, stage: str) -> dict[str, Any] | None:
    """The result of this very training, where it has ended before; None where it has not.

    Raises: ConfigError where the output folder holds something else.
    """
    out = Path(config.out)
    file = out / RECORD
    if not file.exists():
        if out.exists() and any(
            p for p in out.iterdir() if p.name not in ("reference", "README.md", RECORD + NEW)
        ):
            raise ConfigError(
                f"out: {out} is there already and holds no training; name a new folder"
            )
        return None
    record = json.loads(file.read_text())
    wanted, was = _identity(config, stage), record["identity"]
    names = {*wanted, *was} - NOT_IDENTITY
    if changed := sorted(name for name in names if wanted.get(name) != was.get(name)):
        raise ConfigError(
            f"out: {out} holds another training (other {', '.join(changed)}). Name a new folder, or delete it"
        )
    result: dict[str, Any] | None = record.get("result")
    return result


def _identity(config: StageConfig, stage: str) -> dict[str, Any]:
    from prefab.factory.keys import model_identity

    plain = {k: v for k, v in config.model_dump(mode="json").items() if k not in NOT_IDENTITY}
    return {"stage": stage, **plain, "weights": model_identity(model_folder(config.model))}


def data_digest(dataset: Any) -> str:
    """A digest of the token rows, in their order."""
    sha = hashlib.sha256()
    for item in dataset:
        sha.update(repr(sorted(item.items())).encode())
    return sha.hexdigest()[:32]


def fit(
    trainer: Any,
    config: StageConfig,
    stage: str,
    found: Rows,
    tokenizer: Any,
    quiet: bool = False,
    finish: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train, from the last whole checkpoint where there is one; write model, card and record.

    Args:
        trainer: A TRL trainer with `Loop`, ready to train.
        config: The stage's configuration.
        stage: Its name.
        found: The rows, for lineage and notes.
        tokenizer: Written beside the model.
        quiet: No progress.
        finish: Given the model before it is written, may add to the result (a reward model's
            normalisation).

    Returns:
        The result: metrics of the validation split, steps, rows, seconds, and the model's folder.

    Raises:
        TrainError: Training cannot go on.
        StoreError: The disk is full.
        ConfigError: The data changed under an unfinished training.
    """
    out, main = Path(config.out), trainer.is_world_process_zero()
    record = _begin(trainer, config, stage, found)
    trainer.kept = config.keep_checkpoints
    last = last_checkpoint(out)
    begun = int(last.name.rpartition("-")[2]) if last else 0
    began = time.monotonic()
    with (
        translate_errors(out, advice=lambda: _smaller_next_time(trainer, config, record)),
        _trackers(config, main, begun) as trackers,
    ):
        fit_to_memory(trainer, config, record)
        for note in [*found.notes, *unused_gpu()] if main and not quiet else ():
            warn(note)
        _callbacks(trainer, config, stage, quiet or not main, trackers)
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            trainer.writer.join()
        trainer.writer.check()
        result = _result(trainer, stage, out, trainer.evaluate(), time.monotonic() - began)
        result |= {"notes": found.notes, "base": config.model, "store": result_store(config)}
        sharded = _is_sharded(trainer)
        if sharded:
            write_ends(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
            trainer.save_model(str(out))
        if main:
            model = _written(trainer, out) if sharded else trainer.model
            result |= finish(model) if finish else {}
            _write(trainer, config, tokenizer, out, sharded)
            _record(trainer, config, stage, record, result)
        trainer.accelerator.wait_for_everyone()
    return result


def _trackers(config: StageConfig, main: bool, step: int) -> Trackers:
    """The trackers that the main process sends to; none in the others."""
    names = config.report if main else []
    return open_trackers(names, Path(config.out), config.model_dump(mode="json"), step)


def fit_to_memory(trainer: Any, config: StageConfig, record: dict[str, Any]) -> None:
    """On a GPU, choose the micro-batch and gradient checkpointing by measurement, where they are
    `auto`. A training that goes on takes what it began with, and the rows in the same order,
    whatever its micro-batch is now.

    Raises: TrainError where not even one row fits.
    """
    automatic = config.micro_batch == "auto" or config.gradient_checkpointing == "auto"
    if trainer.args.device.type != "cpu" and automatic and not _is_sharded(trainer):
        if "fitted" not in record:
            record["fitted"] = fitted(trainer, config.micro_batch, config.gradient_checkpointing)
        if config.micro_batch == "auto":
            set_micro_batch(trainer, record["fitted"]["micro_batch"])
        trainer.args.gradient_checkpointing = record["fitted"]["gradient_checkpointing"]
    trainer.bucket = record.setdefault("bucket", trainer.args.per_device_train_batch_size)
    if trainer.is_world_process_zero():
        write_json(Path(config.out) / RECORD, record)


def _smaller_next_time(trainer: Any, config: StageConfig, record: dict[str, Any]) -> str:
    """What to do where memory ran out. A measured micro-batch is halved for the next start."""
    rows = trainer.args.per_device_train_batch_size
    told = memory_advice(trainer)
    if config.micro_batch != "auto" or "fitted" not in record or rows == 1:
        return f"{told}; then run the command again"
    half = max(n for n in divisors(rows) if n <= rows // 2)
    record["fitted"]["micro_batch"] = half
    if trainer.is_world_process_zero():
        write_json(Path(config.out) / RECORD, record)
    return f"Run the same command again: it goes on with micro_batch {half}. If that is too much: {told}"


def set_micro_batch(trainer: Any, rows: int) -> None:
    """Have a trainer take so many rows at once, and as many times as its step needs."""
    args = trainer.args
    mine = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.per_device_train_batch_size = args.per_device_eval_batch_size = rows
    args.gradient_accumulation_steps = mine // rows
    trainer._train_batch_size = rows


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _begin(trainer: Any, config: StageConfig, stage: str, found: Rows) -> dict[str, Any]:
    """The record of a training that begins or goes on, written by the main process.

    Raises: ConfigError where the folder holds an unfinished training on other data, or the
    configuration cannot be carried out on several devices.
    """
    out = Path(config.out)
    record: dict[str, Any] = {
        "identity": _identity(config, stage),
        "data": data_digest(trainer.train_dataset),
        "lineage": found.lineage,
        "notes": found.notes,
    }
    file = out / RECORD
    if config.lora and config.lora.bits and config.merge_lora:
        raise ConfigError(
            "merge_lora: adapters cannot be merged into weights of few bits; write merge_lora: false"
        )
    if _is_sharded(trainer) and config.lora and config.merge_lora:
        raise ConfigError(
            "merge_lora: adapters cannot be merged into weights that lie on several devices; write merge_lora: false"
        )
    before = json.loads(file.read_text()) if file.exists() else None
    if before and before["data"] != record["data"]:
        raise ConfigError(
            f"out: {out} holds an unfinished training on other data. Name a new folder, or delete it"
        )
    if before:
        record |= {name: before[name] for name in ("fitted", "bucket") if name in before}
        if isinstance(old := before["identity"].get("micro_batch"), int):
            record.setdefault("bucket", old)  # of an earlier version
    trainer.accelerator.wait_for_everyone()  # all have read the file before it is written
    if trainer.is_world_process_zero():
        write_json(file, record)
    return record


def _result(
    trainer: Any, stage: str, out: Path, metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "stage": stage,
        "model": str(out),
        "steps": trainer.state.global_step,
        "train": len(trainer.train_dataset),
        "val": len(trainer.eval_dataset),
        "seconds": round(seconds, 1),
        "metrics": {
            k.removeprefix("eval_"): v
            for k, v in metrics.items()
            if k.startswith("eval_") and not k.endswith(("runtime", "per_second"))
        },
    }


def _record(
    trainer: Any, config: StageConfig, stage: str, record: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write the card, the finished record and the store's evaluation."""
    out, history = Path(config.out), trainer.state.log_history
    record["result"] = result
    told = (
        f"{counted(result['steps'], 'step')} on {counted(result['train'], 'row')}, validated on {result['val']:,}. "
        f"Weights of the start: `{record['identity']['weights'][:16]}`; token rows: `{record['data']}`."
    )
    metrics, chart = result["metrics"], loss_chart(history)
    write_card(out, stage, config, told, metrics, chart, record["lineage"], record["notes"])
    write_json(out / RECORD, record)
    record_eval(
        result_store(config),
        f"train {stage}",
        str(out),
        result["metrics"],
        steps=result["steps"],
        data=record["data"],
        weights=record["identity"]["weights"],
        seed=config.seed,
        history=[h for h in history if "eval_loss" in h],
    )


def _written(trainer: Any, out: Path) -> Any:
    """A sharded model as it was saved, whole, on this process's device."""
    model = (
        type(trainer.accelerator.unwrap_model(trainer.model))
        .from_pretrained(out)
        .to(trainer.accelerator.device)
    )
    collate.add_scored_forward(model)
    return model


def _write(
    trainer: Any, config: StageConfig, tokenizer: Any, out: Path, sharded: bool = False
) -> None:
    tokenizer.save_pretrained(out)
    if sharded:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora and config.merge_lora:
        model = model.merge_and_unload()
    model.config.pad_token_id = tokenizer.pad_token_id
    write_ends(model, tokenizer)
    model.save_pretrained(out)


def _callbacks(
    trainer: Any, config: StageConfig, stage: str, quiet: bool, trackers: Trackers
) -> None:
    """Progress as everywhere in Prefab, trackers, early stopping, and none of the Trainer's own
    printing.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

    class Shown(TrainerCallback):
        """A line, or a bar, with the last loss and the last validation."""

        progress: Progress | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.facts: dict[str, Any] = {}
            self.speed = Speed(trainer)
            self.progress = Progress(f"training {stage}", state.max_steps, quiet, "steps")
            self.progress.__enter__()
            self.progress.done = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if self.progress is not None:
                kept = ("loss", "accuracy", "eval_loss", "eval_accuracy")
                self.facts |= {k: float(v) for k, v in (logs or {}).items() if k in kept}
                speed = self.speed.since_last()
                trackers.log(state.global_step, {**(logs or {}), **speed})
                self.facts |= speed
                self.progress.advance(state.global_step - self.progress.done, **self.facts)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.progress is not None:
                self.progress.__exit__(None, None, None)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Shown())
    if config.patience:
        trainer.add_callback(EarlyStoppingCallback(config.patience))


class Speed:
    """Tokens a second of a training since it was last asked; on a GPU memory and utilisation."""

    def __init__(self, trainer: Any) -> None:
        from prefab.trainers.offline.gpus import peak_flops

        self.trainer, self.places, self.at = trainer, trainer.places, time.monotonic()
        device = trainer.args.device
        self.device = None if device.type == "cpu" else device
        self.peak = peak_flops(device, trainer.stage.precision)
        self.weights = sum(p.numel() for p in trainer.model.parameters())

    def since_last(self) -> dict[str, Any]:
        """`tokens_per_second` (padding included); on a GPU `gpu_memory_gib` (the peak) and, where
        its data sheet is known, `model_flop_utilisation` (6 FLOPs a weight and token).
        """
        now, places = time.monotonic(), self.trainer.places
        rate = (places - self.places) / max(now - self.at, 1e-9)
        self.places, self.at = places, now
        if not rate:
            return {}
        found: dict[str, Any] = {"tokens_per_second": round(rate)}
        if self.device is not None:
            import torch

            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.peak:
            found["model_flop_utilisation"] = 6 * self.weights * rate / self.peak
        return found


def ready_model(model: Any, config: StageConfig, wanted: bool | None = None) -> tuple[Any, bool]:
    """The model with the scored forward (before any adapter is put around it), with other kernels
    and compiled where that is asked for, and whether rows may hold trees: where `wanted` (left out:
    `share_prompt`) and the model can.

    Raises: ConfigError where a package is missing.
    """
    device = next(model.parameters()).device
    if config.liger:
        use_liger(model, device.type)
    collate.add_scored_forward(model)
    wanted = config.share_prompt if wanted is None else wanted
    share = wanted and collate.can_share(
        model, attention_for(config.attention, device.type), device
    )
    if config.compile:
        compile_layers(model)
    return model, share


def use_liger(model: Any, device: str) -> None:
    """Replace norms, rotations and activations by the kernels of liger-kernel; the head is ours.

    Raises: ConfigError without a GPU or the package.
    """
    from importlib.util import find_spec

    if device == "cpu" or find_spec("liger_kernel") is None:
        raise ConfigError("liger: true needs a GPU and the package: pip install liger-kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def compile_layers(model: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer by itself, for rows of any length, and what a head in tiles does between
    its products. All layers share what is compiled, and compiling takes as long as for one.
    """
    names = set(model._no_split_modules or ())
    for layer in [m for m in model.modules() if type(m).__name__ in names]:
        layer.compile(dynamic=True, backend=backend)
    if (head := model.get_output_embeddings()) is not None:
        head.compiled_tiles = True


def row_names(found: Rows) -> list[str]:
    """What each train row is called in messages: its preference, sample or prompt id, or the start
    of its prompt.
    """
    return [
        str(
            row.get("preference")
            or row.get("sample")
            or row.get("prompt_id")
            or (row.get("prompt") or [{"content": i}])[-1]["content"]
        )[:40]
        for i, row in enumerate(found.train)
    ]
