"""Answers sampled from a policy by transformers, and their log-probabilities from the forward that
training uses.

The sampler's own log-probabilities are kept only to measure how far they are from training's
(`sampler_gap`): with other kernels or another precision they differ, and a ratio built on them
would be wrong from the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from prefab.factory.console import say
from prefab.factory.errors import ConfigError
from prefab.trainers import collate, data
from prefab.trainers.chat import Turn, chat_text, check_tools, dialect, ids_of, shown
from prefab.trainers.data import DataConfig
from prefab.trainers.rl import decoding, noise, processes
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.batches import (
    Packed,
    default_call,
    in_batches,
    left,
    left_padded,
    numbered,
    pack,
    to_device,
)
from prefab.trainers.tiled_head import can_tile, tiled_entropy, tiled_logps

if TYPE_CHECKING:
    from torch import Tensor

# Tokens after which the compiled sampler looks whether all rows have ended.
LOOK = 16

# One user turn, or a conversation that waits for the assistant.
Prompt = str | Sequence[Turn]


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One sampled answer: `ids` up to and with its end token, which is there exactly when it
    `ended`.
    """

    prompt: list[int]
    ids: list[int]
    sampler_logps: list[float]
    ended: bool


# Waits for answers that are being sampled; None where that failed, and they must be asked anew.
Ahead = Callable[[], "list[SampledAnswer] | None"]


class Sampler(Protocol):
    """What samples the answers to train on: transformers in this process, or a server."""

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[SampledAnswer]:
        """One answer to each prompt by the policy as it is now, in the order of the prompts."""

    def ahead(self, prompts: Sequence[list[int]], seed: int) -> Ahead:
        """As `sample`, by the policy as it is now even if it changes while this goes on."""

    def check(self, gap: float) -> None:
        """Raises: TrainError for a mean gap (nats a token, see `sampler_gap`) that rounding does
        not explain.
        """


@dataclass(frozen=True, slots=True)
class TransformersSampler:
    """Samples with transformers, in this process; the policy is always the current one.

    `batch` prompts are answered together, and `micro_batch` former answers checked together.
    `compiled`: with a cache of fixed size and a compiled forward, where the model has them.
    """

    model: Any
    max_new_tokens: int
    temperature: float
    ends: Sequence[int]
    batch: int
    micro_batch: int
    autocast: Callable[[], AbstractContextManager[None]]
    compiled: bool = False

    def sample(
        self, prompts: Sequence[list[int]], seed: int, former: Sequence[list[int]] = ()
    ) -> list[SampledAnswer]:
        """See `Sampler.sample`; `former` as in the function `sample`."""
        mine = processes.share(prompts), processes.share(row_seeds(seed, len(prompts)))
        return processes.gather(self.sample_rows(*mine, processes.share(former)))

    def sample_rows(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        former: Sequence[list[int]] = (),
    ) -> list[SampledAnswer]:
        """One answer to each prompt, drawn with its own seed, in this process alone. In evaluation
        mode: layers with gradient checkpointing drop the cache while they train.
        """
        training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                return _sample(
                    self.model,
                    prompts,
                    self.max_new_tokens,
                    self.temperature,
                    self.ends,
                    seeds,
                    self.batch,
                    former,
                    self.micro_batch,
                    decoding.decoder_of(self.model) if self.compiled else None,
                )
        finally:
            self.model.train(training)

    def ahead(self, prompts: Sequence[list[int]], seed: int) -> Ahead:
        """See `Sampler.ahead`. Sampled at once: these are the weights that change."""
        answers = self.sample(prompts, seed)
        return lambda: answers

    def check(self, gap: float) -> None:
        """Nothing to check: these are the weights that train."""


def prompts_of(config: DataConfig | None, watched: int) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to answer, of the train split; at most `watched` prompts of the validation split).

    Raises: ConfigError where no data is named, or it has no prompts.
    """
    if config is None:
        raise ConfigError(
            "data: no prompts are named. Name a store's run, or files: data: {sources: [{store: store}]}"
        )
    found = data.read_rows("prompts", config)
    train: list[Prompt] = [data.prompt_of(row) for row in found.train]
    return train, [data.prompt_of(row) for row in found.val[:watched]]


def encode(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    room: int | None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The tokens of each prompt through the chat template. A prompt's own text never becomes a
    control token.

    Raises: ConfigError for a prompt of more than `room` tokens, with how many there are, or one
    whose tool calls the template does not write.
    """
    rows = []
    for prompt in prompts:
        text = chat_text(tokenizer, turns := turns_of(prompt, tokenizer), True, kwargs)
        check_tools(turns, text)
        rows.append(ids_of(tokenizer, text))
    if [] in rows:
        raise ConfigError(
            f"prompt {rows.index([])} has no tokens at all: the chat template writes nothing for it"
        )
    long = [i for i, row in enumerate(rows) if room is not None and len(row) > room]
    if long:
        raise ConfigError(
            f"{len(long)} of {len(rows)} prompts leave no room to answer: prompt {long[0]} has "
            f"{len(rows[long[0]])} tokens, {room} fit before the answer. Leave them out, or lower "
            "max_new_tokens"
        )
    return rows


def turns_of(prompt: Prompt, tokenizer: Any) -> list[Turn]:
    """A prompt as a conversation whose texts hold no control token of the tokenizer."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return shown(tokenizer, turns)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the chat template's end of turn, the tokenizer's EOS, and
    those of the model's generation configuration.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = found if isinstance(found, list) else [found]
    return sorted({*known, tokenizer.eos_token_id, dialect(tokenizer).end} - {None})


def sample(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    seed: int,
    batch: int = 64,
    former: Sequence[list[int]] = (),
    micro_batch: int = 16,
) -> list[SampledAnswer]:
    """One answer to each prompt, in the order of the prompts, drawn from the whole distribution at
    `temperature`.

    Prompts of like length are answered together; rows that have ended leave the batch as soon as
    half of them have. The random numbers are a function of seed and place alone: similar policies
    give most prompts the same answer, so that a difference between them is seen with fewer prompts.
    `former` are answers drawn with the same seed, by a policy like this one: those that come again
    are found by one forward, `micro_batch` at a time, and the others alone drawn token by token.
    """
    seeds = row_seeds(seed, len(prompts))
    return _sample(
        model, prompts, max_new_tokens, temperature, ends, seeds, batch, former, micro_batch
    )


def row_seeds(seed: int, n: int) -> list[int]:
    """A seed for each of n rows, a function of the seed and the row's place."""
    import torch

    drawn: list[int] = torch.randint(
        2**62, (n,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return drawn


def _sample(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    ends: Sequence[int],
    seeds: Sequence[int],
    batch: int,
    former: Sequence[list[int]],
    micro_batch: int,
    decoder: decoding.StaticDecoder | None = None,
) -> list[SampledAnswer]:
    """As `sample`, with a seed for each prompt, and with `decoder` where there is one."""
    import torch

    answers: list[Any] = [None] * len(prompts)
    with torch.no_grad():
        for i, answer in (
            _drawn_again(model, prompts, former, temperature, ends, seeds, micro_batch)
            if former
            else ()
        ):
            answers[i] = answer
        order = sorted(
            (i for i, a in enumerate(answers) if a is None), key=lambda i: len(prompts[i])
        )
        if decoder and order:
            longest = len(prompts[order[-1]]) + max_new_tokens
            decoder.reserve(model, min(batch, len(order)), longest)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            done = _answer_rows(
                model,
                decoder,
                [prompts[i] for i in rows],
                [seeds[i] for i in rows],
                max_new_tokens,
                temperature,
                list(ends),
            )
            for i, answer in zip(rows, done, strict=True):
                answers[i] = answer
    return answers


def _drawn_again(
    model: Any,
    prompts: Sequence[list[int]],
    former: Sequence[list[int]],
    temperature: float,
    ends: Sequence[int],
    seeds: Sequence[int],
    batch: int,
) -> Iterator[tuple[int, SampledAnswer]]:
    """Those of the `former` answers that this model draws too, with their places."""
    import torch

    device = next(model.parameters()).device
    answers = [
        SampledAnswer(prompt, ids, [], ids[-1] in ends)
        for prompt, ids in zip(prompts, former, strict=True)
    ]
    for rows in in_batches(answers, range(len(answers)), batch, default_call(device)):
        all_BTV, _ = _predicted(model, pack([answers[i] for i in rows], device), temperature)
        for i, padded_TV in zip(rows, all_BTV, strict=True):
            ids_T = torch.tensor(former[i], device=device)
            all_TV, draws = padded_TV[-len(ids_T) :], noise.noise_for([seeds[i]], device)
            noise_TV = torch.cat([draws.rows(all_TV.shape[1]) for _ in ids_T])
            if torch.equal(noise.drawn(all_TV, noise_TV), ids_T):
                logps = all_TV.gather(1, ids_T[:, None])[:, 0].tolist()
                yield i, SampledAnswer(prompts[i], former[i], logps, answers[i].ended)


def _answer_rows(
    model: Any,
    decoder: decoding.StaticDecoder | None,
    prompts: list[list[int]],
    seeds: Sequence[int],
    most: int,
    temperature: float,
    ends: list[int],
) -> list[SampledAnswer]:
    """Answers to one batch of prompts, by the decoder where there is one that works."""
    if decoder and not decoder.failed:
        try:
            return _sample_static(model, decoder, prompts, seeds, most, temperature, ends)
        except decoding.CannotCompile as error:
            decoder.give_up(error)
    return _sample_batch(model, prompts, seeds, most, temperature, ends)


def _sample_batch(
    model: Any,
    prompts: list[list[int]],
    seeds: Sequence[int],
    most: int,
    temperature: float,
    ends: list[int],
) -> list[SampledAnswer]:
    """Token by token with a cache. `alive` are the rows still in the batch, by their place in
    `prompts`.
    """
    import torch

    device, cache = next(model.parameters()).device, None
    draws = noise.noise_for(seeds, device)
    distinct, of_B = _once_each(model, prompts, device)
    ids, attention, positions = left_padded(distinct, device)
    stops, alive = torch.tensor(ends, device=device), torch.arange(len(prompts), device=device)
    new_BT = torch.zeros(len(prompts), most, dtype=torch.long, device=device)
    logps_BT = torch.zeros(len(prompts), most, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(most):
        out = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        if t == 0 and of_B is not None:
            cache.reorder_cache(of_B)
            logits, attention, positions = (
                x.index_select(0, of_B) for x in (logits, attention, positions)
            )
        tokens, logps = noise.next_tokens(logits, draws.rows(logits.shape[1]), temperature)
        new_BT[alive, t], logps_BT[alive, t] = tokens, logps
        ended_B[alive] |= torch.isin(tokens, stops)
        keep = (~ended_B[alive]).nonzero()[:, 0]
        if len(keep) == 0 or t + 1 == most:
            break
        if len(keep) <= len(alive) // 2:
            cache.reorder_cache(keep)  # which layers with a state have too
            alive, tokens, attention, positions = (
                alive[keep],
                tokens[keep],
                attention[keep],
                positions[keep],
            )
            draws.keep(keep.tolist())
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
    return _answers(prompts, new_BT[:, : t + 1], logps_BT, ends)


def _sample_static(
    model: Any,
    decoder: decoding.StaticDecoder,
    prompts: list[list[int]],
    seeds: Sequence[int],
    most: int,
    temperature: float,
    ends: list[int],
) -> list[SampledAnswer]:
    """As `_sample_batch`, with the decoder's cache and its number of rows. Rows that have ended
    stay in the batch; whether all have is asked now and then, since it waits for the device.

    Raises: CannotCompile.
    """
    import torch

    device, more = next(model.parameters()).device, decoder.rows - len(prompts)
    draws = noise.noise_for([*seeds, *[0] * more], device)
    distinct, of_B = _once_each(model, [*prompts, *[prompts[0]] * more], device)
    ids, attention, positions = left_padded(distinct, device)
    stops, before = torch.tensor(ends, device=device), ids.shape[1]
    new_BT = torch.zeros(decoder.rows, most, dtype=torch.long, device=device)
    logps_BT = torch.zeros(decoder.rows, most, device=device)
    ended_B = torch.arange(decoder.rows, device=device) >= len(prompts)
    logits_BV, mask = decoder.prefill(model, ids, attention, positions, of_B)
    positions = positions if of_B is None else positions.index_select(0, of_B)
    for t in range(most):
        tokens, logps_BT[:, t] = decoder.next_tokens(logits_BV, draws, temperature)
        new_BT[:, t] = tokens
        ended_B |= torch.isin(tokens, stops)
        if t + 1 == most or (t % LOOK == LOOK - 1 and bool(ended_B.all())):
            break
        positions = positions[:, -1:] + 1
        logits_BV = decoder.decode(model, tokens[:, None], mask, positions, before + t)
    return _answers(prompts, new_BT[:, : t + 1], logps_BT, ends)


def _once_each(
    model: Any, prompts: list[list[int]], device: Any
) -> tuple[list[list[int]], Tensor | None]:
    """(the prompts to compute; the number of each row's prompt among them, None where that is its
    own place).
    """
    distinct, of = numbered(prompts)
    if len(distinct) == len(prompts) or not can_share(model):
        return prompts, None
    return distinct, to_device(of, device)


def _answers(
    prompts: list[list[int]], new_BT: Tensor, logps_BT: Tensor, ends: list[int]
) -> list[SampledAnswer]:
    """The drawn tokens of each prompt's row up to their first end."""
    mask_BT, ended_B = pg.answer_mask(new_BT, ends)
    lengths, new, logps = mask_BT.sum(-1).tolist(), new_BT.tolist(), logps_BT.tolist()
    return [
        SampledAnswer(prompt, new[b][: lengths[b]], logps[b][: lengths[b]], ended)
        for b, (prompt, ended) in enumerate(zip(prompts, ended_B.tolist(), strict=False))
    ]


def forward(
    model: Any,
    packed: Packed,
    temperature: float,
    hidden: bool = False,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log-probability B T, entropy B T or None, last hidden state B T D or None) at each token of
    the answers, left-aligned.

    The state at a token is the one that predicts it: the token itself is not in it yet.
    """
    T = packed.mask_BT.shape[1]
    if _in_tiles(model, packed):
        return _forward_in_tiles(model, packed, temperature, hidden, entropy)
    all_BTV, states = _predicted(model, packed, temperature, hidden)
    logps_BT = all_BTV.gather(-1, packed.ids_BL[:, -T:, None])[..., 0]
    entropy_BT = left(pg.entropy(all_BTV), packed) if entropy else None
    return left(logps_BT, packed), entropy_BT, left(states, packed) if hidden else None


def _in_tiles(model: Any, packed: Packed) -> bool:
    """Whether all logits of a batch would be too many to be in memory together."""
    head = model.get_output_embeddings()
    return (
        can_tile(head)
        and packed.mask_BT.numel() * head.weight.shape[0] > collate.LOGITS_AT_ONCE
        and collate.is_head_alone(model)
    )


def _forward_in_tiles(
    model: Any, packed: Packed, temperature: float, hidden: bool, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `forward`, without all logits in memory, and none for padding."""
    T, head = packed.mask_BT.shape[1], model.get_output_embeddings()
    states_BTD = _run(model, packed, 1, True)[1]
    packed_N, left_N = packed.places()
    states_ND = states_BTD.flatten(0, 1).index_select(0, packed_N) / temperature
    token_N = packed.ids_BL[:, -T:].flatten().index_select(0, packed_N)
    bias = None if head.bias is None else head.bias / temperature
    arguments = states_ND, head.weight, bias, token_N, collate.LOGITS_AT_ONCE
    found = tiled_entropy(*arguments) if entropy else (tiled_logps(*arguments),)
    logps_BT, *entropies = (
        x_N.new_zeros(packed.mask_BT.numel()).index_copy(0, left_N, x_N).view_as(packed.mask_BT)
        for x_N in found
    )
    states = left(states_BTD, packed) if hidden else None
    return logps_BT, entropies[0] if entropies else None, states


def _predicted(
    model: Any, packed: Packed, temperature: float, hidden: bool = False
) -> tuple[Tensor, Any]:
    """(log-probabilities of all tokens at each of the last T columns, B T V; their last hidden
    states where asked).
    """
    logits_BTV, states_BTD = _run(model, packed, packed.mask_BT.shape[1], hidden)
    return (logits_BTV.float() / temperature).log_softmax(-1), states_BTD


def _run(model: Any, packed: Packed, keep: int, hidden: bool) -> tuple[Tensor, Any]:
    """(logits that predict the last `keep` tokens; where asked, the last hidden states that predict
    the last T, B T D).
    """
    import torch

    T, shared = packed.mask_BT.shape[1], packed.prompts
    if shared is None:
        out = model(**packed.inputs(), logits_to_keep=keep, output_hidden_states=hidden)
        return out.logits, out.hidden_states[-1][:, -T:] if hidden else None
    out = model(**shared.inputs(), output_hidden_states=hidden)
    logits = [out.logits[:, -1:].index_select(0, shared.of_B)]
    states = [out.hidden_states[-1][:, -1:].index_select(0, shared.of_B)] if hidden else []
    if T > 1:
        # its gradient adds up in a fixed order; that of `batch_select_indices` need not
        out.past_key_values.reorder_cache(shared.of_B)
        rest = model(
            **packed.inputs(),
            past_key_values=out.past_key_values,
            logits_to_keep=min(keep, T - 1),
            output_hidden_states=hidden,
        )
        logits.append(rest.logits)
        states += [rest.hidden_states[-1]] if hidden else []
    return torch.cat(logits, 1)[:, -keep:], torch.cat(states, 1) if hidden else None


_can_share: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def can_share(model: Any) -> bool:
    """Whether answers to one prompt can share its keys and values: with layers that attend to all
    tokens or to a window, where a trial on a few tokens gives what separate rows give. Tried once a
    model.
    """
    if model not in _can_share:
        _can_share[model] = _shares_in_trial(model)
        if not _can_share[model]:
            name = type(model).__name__
            say(
                f"a prompt is computed for each of its answers: {name} cannot share it", stderr=True
            )
    return _can_share[model]


def _shares_in_trial(model: Any) -> bool:
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config, weight = model.config.get_text_config(), next(model.parameters())
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return False
    ids = [[(7 * i + j) % config.vocab_size for j in range(2 + i)] for i in range(4)]
    answers = [
        SampledAnswer(prompt, answer, [], True) for prompt in ids[1:3] for answer in ids[::3] * 2
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            apart, together = (
                forward(model, pack(answers, weight.device, call), 1.0)[0] for call in (None, 0)
            )
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.train(training)
    mask, atol = (
        pack(answers, weight.device).mask_BT,
        1e-3 if weight.dtype == torch.float32 else 0.1,
    )
    return torch.allclose(apart[mask], together[mask], atol=atol, rtol=1e-2)


def sampler_gap(
    answers: Sequence[SampledAnswer], logps_BT: Tensor, mask_BT: Tensor
) -> tuple[float, float]:
    """(mean, largest) absolute difference of the sampler's log-probabilities from training's, a
    token.
    """
    gap = (sampler_logps(answers, mask_BT) - logps_BT)[mask_BT].abs()
    return float(gap.mean()), float(gap.max())


def sampler_logps(answers: Sequence[SampledAnswer], mask_BT: Tensor) -> Tensor:
    """The sampler's log-probabilities in float64, B T left-aligned; 0 outside the mask."""
    import torch

    found_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=mask_BT.device)
    found_BT[mask_BT] = torch.tensor(
        [x for a in answers for x in a.sampler_logps], dtype=torch.float64
    ).to(found_BT)
    return found_BT
