"""What a PPO run consists of: policy, reference, value function, optimizer, and forwards through
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError
from prefab.trainers.common import Lora, load_policy, load_tokenizer, with_lora
from prefab.trainers.rl import checkpoint, rewards, rollout
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Packed, Prompt, SampledAnswer

if TYPE_CHECKING:
    from torch import Tensor

    from prefab.trainers.rl.ppo import PpoConfig
    from prefab.trainers.rl.rollout_vllm import Sampler


@dataclass(slots=True)
class State:
    """What a run knows beside weights and optimizer; saved with them."""

    step: int = 0
    beta: float = 0.0
    scales: rewards.Scales = field(default_factory=dict)
    bad_in_a_row: int = 0
    bad: int = 0
    unfinished_in_a_row: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    seen: list[CachedEval] = field(default_factory=list)
    stopped: str = ""


@dataclass(slots=True)
class Run:
    """A run's models and data; `reference` None means the policy with its adapter off."""

    config: PpoConfig
    policy: Any
    critic: Any
    reference: Any
    tokenizer: Any
    optimizer: Any
    accelerator: Any
    ends: list[int]
    room: int
    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]
    sources: Sequence[Source]
    state: State
    sampler: Sampler | None = None  # vLLM's; None: transformers samples


def prepare_run(config: PpoConfig, prompts: Sequence[Prompt], sources: Sequence[Source]) -> Run:
    """Models, optimizer and encoded prompts, with nothing trained yet."""
    import torch
    from accelerate import Accelerator

    if not prompts or not sources:
        raise ConfigError(
            "PPO needs at least one prompt"
            if not prompts
            else "PPO needs a reward: name one under rewards"
        )
    checkpoint.seed_step(config.seed, 0, "load", config.threads)
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    if accelerator.num_processes > 1:
        raise ConfigError(
            "PPO runs in one process; start it with `prefab train ppo`, not with accelerate launch"
        )
    device = accelerator.device.type
    tokenizer = load_tokenizer(config.model, config.chat_template, config.pad_token)

    def model(name: str, lora: Lora | None) -> Any:
        return _quiet(
            with_lora(load_policy(name, config.attention, device=device), lora, "CAUSAL_LM")
        )

    policy, reference, trunk = model(config.model, config.lora), None, None
    if config.lora is None or config.reference:
        reference = model(config.reference or config.model, None).requires_grad_(False)
    if config.value == "separate":
        trunk = model(config.value_model or config.model, config.lora)
    critic = _critic(trunk, policy.config.hidden_size).to(accelerator.device)
    for checkpointed in (policy, trunk) if config.gradient_checkpointing else ():
        if checkpointed is not None:  # it takes effect in training mode alone, that is in updates
            checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
            checkpointed.enable_input_require_grads()
    groups = [
        {"params": [p for p in policy.parameters() if p.requires_grad], "lr": config.learning_rate},
        {
            "params": [p for p in critic.parameters() if p.requires_grad],
            "lr": config.value_learning_rate,
        },
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=config.weight_decay, fused=True)
    room = (
        getattr(policy.config, "max_position_embeddings", None) or 2**31
    ) - config.max_new_tokens
    ids = rollout.encode(tokenizer, prompts, room, config.template_kwargs)
    ends = rollout.end_ids(policy, tokenizer)
    return Run(
        config,
        policy,
        critic,
        reference,
        tokenizer,
        optimizer,
        accelerator,
        ends,
        room,
        prompts,
        ids,
        sources,
        State(beta=config.beta),
    )


def _quiet(model: Any) -> Any:
    """The model in evaluation mode with every dropout at zero: a ratio must not differ by
    chance.
    """
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def _critic(trunk: Any, hidden: int) -> Any:
    """The value function: a linear head, begun at zero, on states of a trunk of its own or on the
    policy's.
    """
    import torch

    head = torch.nn.Linear(hidden, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return torch.nn.ModuleDict({"head": head} | ({"trunk": trunk} if trunk is not None else {}))


def values_of(t: Run, packed: Packed, states_BTD: Tensor | None) -> Tensor:
    """The value before each token of the answers, B T."""
    if "trunk" in t.critic:
        T = packed.mask_BT.shape[1]
        out = t.critic["trunk"](**packed.inputs(), logits_to_keep=1, output_hidden_states=True)
        states_BTD = rollout.left(out.hidden_states[-1][:, -T:], packed)
    return t.critic["head"](states_BTD).float()[..., 0]


@contextmanager
def as_reference(t: Run) -> Iterator[Any]:
    """The model that KL is charged to."""
    with nullcontext() if t.reference is not None else t.policy.disable_adapter():
        yield t.policy if t.reference is None else t.reference


def policy_kl(
    t: Run, answers: list[SampledAnswer]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask, log-probabilities, reference's, entropies, values) of answers, each B T, by the
    forward that trains.
    """
    import torch

    T = max(len(a.ids) for a in answers)
    mask = torch.zeros(len(answers), T, dtype=torch.bool, device=t.accelerator.device)
    logps, reference_logps, entropy, values = (
        torch.zeros_like(mask, dtype=torch.float32) for _ in range(4)
    )
    with torch.no_grad(), t.accelerator.autocast():
        for rows in rollout.in_batches(
            answers, range(len(answers)), t.config.micro_batch, t.accelerator.device
        ):
            packed = rollout.pack([answers[b] for b in rows], t.accelerator.device)
            n = packed.mask_BT.shape[1]
            mask[rows, :n] = packed.mask_BT
            logps[rows, :n], entropy[rows, :n], states = rollout.forward(
                t.policy, packed, t.config.temperature, "trunk" not in t.critic, entropy=True
            )
            values[rows, :n] = values_of(t, packed, states)
            with as_reference(t) as reference:
                reference_logps[rows, :n] = rollout.forward(
                    reference, packed, t.config.temperature
                )[0]
    return mask, logps, reference_logps, entropy, values


def reference_logps(t: Run, answers: Sequence[SampledAnswer]) -> list[float]:
    """Log-probability of each whole answer to the model that KL is charged to, in nats."""
    import torch

    found = [0.0] * len(answers)
    with torch.no_grad(), t.accelerator.autocast(), as_reference(t) as reference:
        for rows in rollout.in_batches(
            answers, range(len(answers)), t.config.micro_batch, t.accelerator.device
        ):
            packed = rollout.pack([answers[b] for b in rows], t.accelerator.device)
            logps = rollout.forward(reference, packed, t.config.temperature)[0].double()
            for b, sum_ in zip(rows, (logps * packed.mask_BT).sum(-1).tolist(), strict=True):
                found[b] = sum_
    return found
