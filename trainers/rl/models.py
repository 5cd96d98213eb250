"""The models of a run: policy, reference, value function, optimizer, and forwards through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from prefab.factory.console import say
from prefab.factory.errors import ConfigError
from prefab.trainers import distributed
from prefab.trainers.common import Lora, load_policy, load_tokenizer, with_lora
from prefab.trainers.rl import batches, checkpoint, processes, rewards, rollout
from prefab.trainers.rl.batches import Packed
from prefab.trainers.rl.config import PpoConfig, RlConfig
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer, TransformersSampler
from prefab.trainers.rl.state import Method, Run, State

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R", bound=Run)


def prepare_run(
    kind: type[R],
    method: Method,
    config: RlConfig,
    prompts: Sequence[Prompt],
    sources: Sequence[Source],
) -> R:
    """A run of this kind: models, optimizer and encoded prompts, with nothing trained yet.

    Raises: ConfigError for no prompts, no rewards, sharded models, a model that does not load.
    """
    check_inputs(method.name.upper(), prompts, sources)
    checkpoint.seed_step(config.seed, 0, "load", config.threads)
    accelerator = distributed.accelerator_for(config.precision)
    processes.check_kind(accelerator)
    tokenizer = load_tokenizer(config.model, config.chat_template, config.pad_token)
    policy, reference, critic = _load_models(config, accelerator.device)
    room = room_for_prompt(policy, config)
    ends = rollout.end_ids(policy, tokenizer)
    return kind(
        method=method,
        config=config,
        policy=policy,
        reference=reference,
        critic=critic,
        optimizer=_optimizer(config, policy, critic),
        tokenizer=tokenizer,
        accelerator=accelerator,
        ends=ends,
        room=room,
        prompts=prompts,
        prompt_ids=rollout.encode(tokenizer, prompts, room, config.template_kwargs),
        sources=rewards.asked_once(sources),
        state=State(beta=config.beta),
        sampler=transformers_sampler(config, policy, ends, accelerator),
    )


def prompts_for(
    config: RlConfig, prompts: Sequence[Prompt] | None, eval_prompts: Sequence[Prompt]
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """(prompts to train on, prompts to evaluate on): those given, else the configuration's."""
    if prompts is not None:
        return prompts, eval_prompts
    return rollout.prompts_of(config.data, config.eval_prompts)


def rewards_for(
    config: RlConfig, sources: Sequence[Source] | None, gold: Source | None
) -> tuple[Sequence[Source], Source | None]:
    """(rewards, gold): those given, else the configuration's."""
    if sources is None:
        sources = rewards.build(config.rewards)
    if gold is None and config.gold:
        gold = rewards.build([config.gold])[0]
    return sources, rewards.asked_once([gold])[0] if gold else None


def encoded_for_gold(t: Run, gold: Source | None, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The tokens of the prompts to evaluate on; none where there is no gold score."""
    return rollout.encode(t.tokenizer, prompts, t.room, t.config.template_kwargs) if gold else []


def check_inputs(method: str, prompts: Sequence[Prompt], sources: Sequence[Source]) -> None:
    """Raises: ConfigError where there is no prompt, or no reward."""
    if not prompts:
        raise ConfigError(f"{method} needs at least one prompt")
    if not sources:
        raise ConfigError(f"{method} needs a reward: name one under rewards")


def room_for_prompt(policy: Any, config: RlConfig) -> int:
    """The tokens that a prompt may have, so that the longest answer still fits."""
    longest: int = getattr(policy.config, "max_position_embeddings", None) or 2**31
    return longest - config.max_new_tokens


def _load_models(config: RlConfig, device: Any) -> tuple[Any, Any, Any]:
    """(policy, reference or None, value function or None)."""

    def model(name: str, lora: Lora | None) -> Any:
        return _without_dropout(
            with_lora(load_policy(name, config.attention, device=device.type), lora, "CAUSAL_LM")
        )

    policy, reference, trunk = model(config.model, config.lora), None, None
    if config.lora is None or config.reference:
        reference = model(config.reference or config.model, None).requires_grad_(False)
    if isinstance(config, PpoConfig) and config.value == "separate":
        trunk = model(config.value_model or config.model, config.lora)
    for checkpointed in (policy, trunk) if config.gradient_checkpointing else ():
        if checkpointed is not None:  # it takes effect in training mode alone, that is in updates
            checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
            checkpointed.enable_input_require_grads()
    if not isinstance(config, PpoConfig):
        return policy, reference, None
    return policy, reference, _critic(trunk, policy.config.hidden_size).to(device)


def learning_rates(config: RlConfig) -> list[float]:
    """At the first step: of the policy, then of the value function where there is one."""
    critics = [config.value_learning_rate] if isinstance(config, PpoConfig) else []
    return [config.learning_rate, *critics]


def _optimizer(config: RlConfig, policy: Any, critic: Any) -> Any:
    import torch

    models = [policy] if critic is None else [policy, critic]
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in zip(models, learning_rates(config), strict=True)
    ]
    return torch.optim.AdamW(groups, eps=1e-5, weight_decay=config.weight_decay, fused=True)


def policy_sampler(t: Run, model: Any) -> TransformersSampler:
    """What samples answers of this model in the run's way."""
    return transformers_sampler(t.config, model, t.ends, t.accelerator)


def transformers_sampler(
    config: RlConfig, model: Any, ends: list[int], accelerator: Any
) -> TransformersSampler:
    """What samples a model's answers in the way of this configuration; `ends` end an answer."""
    return TransformersSampler(
        model,
        config.max_new_tokens,
        config.temperature,
        ends,
        config.sample_batch,
        config.micro_batch,
        accelerator.autocast,
        config.compiles_sampling(accelerator.device.type),
    )


def _without_dropout(model: Any) -> Any:
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


def values_from_policy(t: Run) -> bool:
    """Whether the value function reads the policy's last hidden states."""
    return t.critic is not None and "trunk" not in t.critic


def values_of(t: Run, packed: Packed, states_BTD: Tensor | None) -> Tensor:
    """The value before each token of the answers, B T."""
    if "trunk" in t.critic:
        T = packed.mask_BT.shape[1]
        out = t.critic["trunk"](**packed.inputs(), logits_to_keep=1, output_hidden_states=True)
        states_BTD = batches.left(out.hidden_states[-1][:, -T:], packed)
    values_BT: Tensor = t.critic["head"](states_BTD).float()[..., 0]
    return values_BT


def measure_call(t: Run) -> None:
    """Measure once in a run what a forward's overhead is worth on a GPU. A run that goes on from a
    checkpoint has the value of it, and so the same batches.
    """
    device = t.accelerator.device
    if device.type == "cuda" and not t.state.call:
        t.state.call = processes.on_main(lambda: batches.measured_call(t.policy, device))
        say(f"a forward's overhead is worth {t.state.call:,} columns (measured)", stderr=True)


def call_of(t: Run) -> int:
    """The columns that a forward's overhead is worth in this run."""
    return t.state.call or batches.default_call(t.accelerator.device)


def packed_batches(
    t: Run, answers: Sequence[SampledAnswer], rows: Sequence[int], training: bool = False
) -> Iterator[tuple[Tensor, Packed]]:
    """(rows, packed) of each micro-batch, for policy and reference. Answers share their prompts
    where no value function reads them; models in `training` mode with gradient checkpointing keep
    no cache.
    """
    share = t.critic is None and not (training and t.config.gradient_checkpointing)
    models = [model for model in (t.policy, t.reference) if model is not None]
    share = share and all(map(rollout.can_share, models))
    most, device = t.config.micro_batch, t.accelerator.device
    return batches.packed_batches(answers, rows, most, call_of(t), device, share)


@contextmanager
def as_reference(t: Run) -> Iterator[Any]:
    """The model that KL is charged to."""
    with nullcontext() if t.reference is not None else t.policy.disable_adapter():
        yield t.policy if t.reference is None else t.reference


def policy_kl(
    t: Run, answers: list[SampledAnswer], with_policy: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask, log-probabilities, reference's, entropies, values) of answers, each B T, by the
    forward that trains; values are 0 where there is no value function, and so is all but the
    reference's without `with_policy`.
    """
    import torch

    T = max(len(a.ids) for a in answers)
    lengths = torch.tensor([len(a.ids) for a in answers], device=t.accelerator.device)
    mask = torch.arange(T, device=t.accelerator.device)[None] < lengths[:, None]
    logps, reference_logps, entropy, values = (
        torch.zeros_like(mask, dtype=torch.float32) for _ in range(4)
    )
    with torch.no_grad(), t.accelerator.autocast():
        for rows, packed in packed_batches(t, answers, processes.share(range(len(answers)))):
            n = packed.mask_BT.shape[1]
            if with_policy:
                logps[rows, :n], entropy_BT, states = rollout.forward(
                    t.policy, packed, t.config.temperature, values_from_policy(t), entropy=True
                )
                assert entropy_BT is not None  # it was asked for
                entropy[rows, :n] = entropy_BT
                if t.critic is not None:
                    values[rows, :n] = values_of(t, packed, states)
            with as_reference(t) as reference:
                reference_logps[rows, :n] = rollout.forward(
                    reference, packed, t.config.temperature
                )[0]
    processes.add_up(logps, reference_logps, entropy, values)
    return mask, logps, reference_logps, entropy, values


def reference_logps(t: Run, answers: Sequence[SampledAnswer]) -> list[float]:
    """Log-probability of each whole answer to the model that KL is charged to, in nats."""
    import torch

    found_B = torch.zeros(len(answers), dtype=torch.float64, device=t.accelerator.device)
    with torch.no_grad(), t.accelerator.autocast(), as_reference(t) as reference:
        for rows, packed in packed_batches(t, answers, processes.share(range(len(answers)))):
            logps = rollout.forward(reference, packed, t.config.temperature)[0].double()
            found_B[rows] = (logps * packed.mask_BT).sum(-1)
    processes.add_up(found_B)
    found: list[float] = found_B.tolist()
    return found
