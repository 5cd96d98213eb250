"""Answers sampled from a policy by transformers, and their log-probabilities from the forward that
training uses.

The sampler's own log-probabilities are kept only to measure how far they are from training's
(`sampler_gap`): with other kernels or another precision they differ, and a ratio built on them
would be wrong from the first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prefab.factory.errors import ConfigError
from prefab.trainers import collate, data
from prefab.trainers.chat import Turn, chat_text, check_tools, dialect, ids_of, shown
from prefab.trainers.data import DataConfig
from prefab.trainers.rl import decoding, noise, processes
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.tiled_head import can_tile, tiled_entropy, tiled_logps

if TYPE_CHECKING:
    from torch import Tensor

# Columns that the overhead of a forward is worth. On a CPU a constant, so that a run has the same
# bits every time; on a GPU, which computes thousands of columns in the time that launching a small
# model's kernels takes, it is measured (`measured_call`), and MOST_CALL bounds it.
CALL_CPU, CALL, MOST_CALL = 64, 2048, 65_536

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


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts and answers as one batch that ends at the right edge, so that short rows cost no
    columns.

    Shapes: ids, attention and positions B L; the answers are the last T columns, an answer shorter
    than T at their end. `mask_BT` is True on real tokens of answers aligned at the left, and
    `shift_B` the columns that aligning skips.
    """

    ids_BL: Tensor
    attention_BL: Tensor
    positions_BL: Tensor
    mask_BT: Tensor
    shift_B: Tensor

    def inputs(self) -> dict[str, Any]:
        """What a model is called with, B L-1: each token is predicted from those before it, the
        last predicts none.
        """
        return {
            "input_ids": self.ids_BL[:, :-1],
            "attention_mask": self.attention_BL[:, :-1],
            "position_ids": self.positions_BL[:, :-1],
            "use_cache": False,
        }


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
    ids, attention, positions = _left_padded(prompts, device)
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
        cache = out.past_key_values
        logits = out.logits[:, -1]
        tokens, logps = noise.next_tokens(logits, draws.rows(logits.shape[1]), temperature)
        new_BT[alive, t], logps_BT[alive, t] = tokens, logps
        ended_B[alive] |= torch.isin(tokens, stops)
        keep = (~ended_B[alive]).nonzero()[:, 0]
        if len(keep) == 0 or t + 1 == most:
            break
        if len(keep) <= len(alive) // 2:
            cache.batch_select_indices(keep)
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
    ids, attention, positions = _left_padded([*prompts, *[prompts[0]] * more], device)
    stops, before = torch.tensor(ends, device=device), ids.shape[1]
    new_BT = torch.zeros(decoder.rows, most, dtype=torch.long, device=device)
    logps_BT = torch.zeros(decoder.rows, most, device=device)
    ended_B = torch.arange(decoder.rows, device=device) >= len(prompts)
    logits_BV, mask = decoder.prefill(model, ids, attention, positions)
    for t in range(most):
        tokens, logps_BT[:, t] = decoder.next_tokens(logits_BV, draws, temperature)
        new_BT[:, t] = tokens
        ended_B |= torch.isin(tokens, stops)
        if t + 1 == most or (t % LOOK == LOOK - 1 and bool(ended_B.all())):
            break
        positions = positions[:, -1:] + 1
        logits_BV = decoder.decode(model, tokens[:, None], mask, positions, before + t)
    return _answers(prompts, new_BT[:, : t + 1], logps_BT, ends)


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


def _left_padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, positions), each B L: every row ends at the right edge and counts positions
    from its own start.

    The padding's id is 0: nothing attends to it.
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    attention = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, attention, (attention.cumsum(-1) - 1).clamp(min=0)


def pack(answers: Sequence[SampledAnswer], device: Any) -> Packed:
    """Answers with their prompts as one batch for `forward`."""
    import torch

    ids, attention, positions = _left_padded([a.prompt + a.ids for a in answers], device)
    lengths = [len(a.ids) for a in answers]
    lengths_B, T = torch.tensor(lengths, device=device), max(lengths)
    return Packed(
        ids,
        attention,
        positions,
        torch.arange(T, device=device)[None] < lengths_B[:, None],
        T - lengths_B,
    )


def left(x_BT: Tensor, packed: Packed) -> Tensor:
    """The last T columns, aligned at the left (B T or B T D); what then stands outside the mask is
    arbitrary.
    """
    import torch

    T = packed.mask_BT.shape[1]
    columns_BT = (torch.arange(T, device=x_BT.device)[None] + packed.shift_B[:, None]).clamp(
        max=T - 1
    )
    return x_BT[torch.arange(len(x_BT), device=x_BT.device)[:, None], columns_BT]


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
    return left(logps_BT, packed), entropy_BT, left(states[-1][:, -T:], packed) if hidden else None


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
    import torch

    T, head = packed.mask_BT.shape[1], model.get_output_embeddings()
    out = model(**packed.inputs(), logits_to_keep=1, output_hidden_states=True)
    states_BTD = out.hidden_states[-1][:, -T:]
    real_BT = torch.arange(T, device=states_BTD.device)[None] >= packed.shift_B[:, None]
    states_ND, token_N = states_BTD[real_BT] / temperature, packed.ids_BL[:, -T:][real_BT]
    bias = None if head.bias is None else head.bias / temperature
    arguments = states_ND, head.weight, bias, token_N, collate.LOGITS_AT_ONCE
    found = tiled_entropy(*arguments) if entropy else (tiled_logps(*arguments),)
    logps_BT, *entropies = (
        left(torch.zeros_like(real_BT, dtype=x_N.dtype).masked_scatter(real_BT, x_N), packed)
        for x_N in found
    )
    states = left(states_BTD, packed) if hidden else None
    return logps_BT, entropies[0] if entropies else None, states


def _predicted(
    model: Any, packed: Packed, temperature: float, hidden: bool = False
) -> tuple[Tensor, Any]:
    """(log-probabilities of all tokens at each of the last T columns, B T V; hidden states where
    asked).
    """
    out = model(
        **packed.inputs(), logits_to_keep=packed.mask_BT.shape[1], output_hidden_states=hidden
    )
    return (out.logits.float() / temperature).log_softmax(-1), out.hidden_states


def default_call(device: Any) -> int:
    """The columns that a forward's overhead is worth where nothing was measured."""
    return CALL_CPU if device.type == "cpu" else CALL


def measured_call(model: Any, device: Any) -> int:
    """The columns that a forward's overhead is worth for this model on this GPU."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(rows: int, columns: int) -> float:
        ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        took = []
        for _ in range(4):  # the first one warms up
            wait()
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            wait()
            took.append(time.perf_counter() - began)
        return min(took[1:])

    with torch.no_grad():
        return call_of_times(seconds(1, 16), seconds(32, 256), seconds(64, 256), 32 * 256)


def call_of_times(least_s: float, some_s: float, more_s: float, columns: int) -> int:
    """The columns that take as long as the overhead: `least_s` of a forward of hardly any columns,
    `more_s` of one with `columns` more than that of `some_s`.
    """
    a_column_s = (more_s - some_s) / columns
    if a_column_s * MOST_CALL <= least_s:  # also where it is not positive
        return MOST_CALL
    return max(CALL_CPU, round(least_s / a_column_s))


def in_batches(
    answers: Sequence[SampledAnswer], rows: Sequence[int], batch: int, call: int
) -> list[list[int]]:
    """`rows` (places in `answers`) in batches of at most `batch`, the longest first: what does not
    fit fails at once.

    Rows of like length are together, cut where all is cheapest: columns, padding too, and the
    overhead of each forward, worth `call` columns.
    """
    order = sorted(rows, key=lambda i: -len(answers[i].prompt) - len(answers[i].ids))
    length = [len(answers[i].prompt) + len(answers[i].ids) for i in order]
    cheapest = [
        (0, 0)
    ]  # for the first n rows: (their cost, where the last of their batches begins)
    for n in range(1, len(order) + 1):
        cheapest.append(
            min(
                (cheapest[k][0] + call + length[k] * (n - k), k)
                for k in range(max(0, n - batch), n)
            )
        )
    found, n = [], len(order)
    while n:
        found.append(order[cheapest[n][1] : n])
        n = cheapest[n][1]
    return found[::-1]


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
