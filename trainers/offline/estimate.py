"""What a step of a training will take on a GPU: from its data sheet and the model's shapes.

Activations are counted, not guessed: the model's forward runs on tensors without data, under the
precision of the training, and what its backward would need is added up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prefab.factory.errors import ConfigError
from prefab.trainers.collate import LOGITS_AT_ONCE
from prefab.trainers.common import loading, model_folder
from prefab.trainers.offline.fitting import GIB, divisors, first_micro_batch, remedies
from prefab.trainers.offline.gpus import GPUS, OF_BF16, data_sheet

if TYPE_CHECKING:
    from prefab.trainers.offline.loop import StageConfig

# Sequences of max_length, for a row of the data
SEQUENCES = {"sft": 1, "reward": 2, "process": 1, "dpo": 2, "kto": 2}
SCORES = ("reward", "process")  # stages with a head of one score instead of the vocabulary's
RESERVE = 0.92  # of a GPU's memory: the rest is the CUDA context and fragments
REACHED = 0.35  # of the data sheet's FLOP/s; what large models and batches reach
LORA_SHARE = 0.01  # of a model's weights that adapters have, about


class Shapes(NamedTuple):
    """What a model's forward takes for rows of a length, by the shapes of its tensors."""

    weights: int  # numbers
    vocabulary: int
    activations: int  # bytes that the backward needs
    a_layer: int  # bytes of them in one layer
    layer_inputs: int  # bytes that are kept when activations are computed twice
    flops: int  # of the forward, without the head


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one step of a training takes, at most: every row as long as `max_length`."""

    stage: str
    model: str
    parameters: int
    gpu: str
    gpu_gib: float
    micro_batch: int
    gradient_checkpointing: bool
    weights_gib: float  # weights, gradients, optimiser
    activations_gib: float
    total_gib: float
    fits: bool
    largest_micro_batch: int | None  # that fits; None where not one row does
    step_s: float
    tokens_a_step: int
    remedy: str  # what takes less memory

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def estimate(config: StageConfig, stage: str, gpu: str) -> Estimate:
    """Memory and time of a step on a GPU, from the model's configuration; no weights are read.

    Args:
        config: The stage's configuration.
        stage: Its name.
        gpu: The name of a GPU, or a part of it: `H100`.

    Raises:
        ConfigError: The GPU is not known, or the model cannot be built from its configuration.
    """
    sheet = data_sheet(gpu)
    if sheet is None:
        raise ConfigError(f"--gpu: {gpu!r} is not known. Known are {', '.join(GPUS)}")
    tflops, gib = sheet
    sequences, length = SEQUENCES[stage], config.data.max_length
    one = shapes(config, sequences, length)
    fixed = _fixed_bytes(config, one.weights)
    budget = RESERVE * gib * GIB

    def total(rows: int, twice: bool) -> float:
        logits = 0 if stage in SCORES else rows * sequences * length * one.vocabulary
        kept = one.layer_inputs * rows + one.a_layer * rows if twice else one.activations * rows
        return fixed + kept + 12 * min(logits, LOGITS_AT_ONCE)

    wanted = config.gradient_checkpointing
    auto = [False, True] if wanted == "auto" else [bool(wanted)]
    fitting = [
        (rows, twice)
        for twice in auto
        for rows in divisors(config.batch_size)
        if total(rows, twice) <= budget
    ]
    twice = auto[-1] if not any(t == auto[0] for _, t in fitting) else auto[0]
    largest = max((rows for rows, t in fitting if t == twice), default=None)
    micro = first_micro_batch(config.micro_batch, config.batch_size, "cuda")
    if config.micro_batch == "auto":
        micro = largest or 1
    needed = total(micro, twice)
    flops = one.flops * config.batch_size * (4 if twice else 3)
    if stage not in SCORES:
        tokens = sequences * length * config.batch_size
        flops += 6 * tokens * one.vocabulary * _width(config)
    return Estimate(
        stage=stage,
        model=config.model,
        parameters=one.weights,
        gpu=gpu,
        gpu_gib=gib,
        micro_batch=micro,
        gradient_checkpointing=twice,
        weights_gib=fixed / GIB,
        activations_gib=(needed - fixed) / GIB,
        total_gib=needed / GIB,
        fits=needed <= budget,
        largest_micro_batch=largest,
        step_s=flops / (REACHED * tflops * 1e12 * OF_BF16[config.precision]),
        tokens_a_step=sequences * length * config.batch_size,
        remedy=remedies(config, largest or 1),
    )


def _fixed_bytes(config: StageConfig, weights: int) -> float:
    """Bytes of weights, gradients and the optimiser's state, whatever the batch."""
    if config.lora:
        frozen = {4: 0.55, 8: 1.05, None: 2.0 if config.precision == "bf16_weights" else 4.0}
        cast = 2.0 if config.precision == "bf16" and config.lora.bits is None else 0.0
        return weights * (frozen[config.lora.bits] + cast + 16 * LORA_SHARE)
    # fp32: 4 + 4 + 8; bf16: also a copy of the weights; bf16_weights: 2 + 2 + 12, 4 in a step
    return weights * {"fp32": 16, "tf32": 16, "bf16": 18, "bf16_weights": 20}[config.precision]


def _model_config(config: StageConfig) -> Any:
    from transformers import AutoConfig

    folder = model_folder(config.model)
    with loading(config.model):
        return AutoConfig.from_pretrained(folder)


def _width(config: StageConfig) -> int:
    return int(_model_config(config).get_text_config().hidden_size)


def shapes(config: StageConfig, rows: int, length: int) -> Shapes:
    """What a forward of so many rows takes; the model has no weights in memory.

    Raises: ConfigError where it cannot be built without its own code.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    plain = _model_config(config)
    plain._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
    low = config.precision.startswith("bf16")
    dtype = torch.bfloat16 if config.precision == "bf16_weights" else torch.float32
    saved: dict[int, tuple[Any, int]] = {}

    def count(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[id(storage)] = (storage, storage.nbytes())
        return tensor

    counter = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = AutoModelForCausalLM.from_config(plain, dtype=dtype)
            weights = {id(p.untyped_storage()) for p in model.parameters()}
            mask = torch.zeros(rows, 1, length, length, dtype=torch.bfloat16 if low else dtype)
            with (
                counter,
                torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
            ):
                model.base_model(
                    input_ids=torch.zeros(rows, length, dtype=torch.long),
                    attention_mask=mask,
                    position_ids=torch.arange(length).expand(rows, length),
                    use_cache=False,
                )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"model: {config.model} cannot be estimated: {error}") from error
    activations = sum(n for at, (_, n) in saved.items() if at not in weights)
    text = plain.get_text_config()
    return Shapes(
        weights=sum(p.numel() for p in model.parameters()),
        vocabulary=text.vocab_size,
        activations=activations,
        a_layer=activations // text.num_hidden_layers,
        layer_inputs=rows * length * text.hidden_size * text.num_hidden_layers * (2 if low else 4),
        flops=counter.get_total_flops(),
    )
