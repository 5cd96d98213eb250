"""Worlds of a few answers in which the best policy is known in closed form, for policies of a few
thousand weights.

The vocabulary is a pad token, an end token and letters; a prompt is one letter; answers are all
sequences up to a length, cut off or ended. Rewards are read from the text, so the trainers run as
they are: tokenizer, template, sampling, decoding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

PAD, END, LETTERS = 0, 1, "abc"
VOCABULARY = {"<pad>": PAD, "<eos>": END} | {letter: i + 2 for i, letter in enumerate(LETTERS)}
Prefix = tuple[int, ...]
Table = dict[
    Prefix, list[float]
]  # of each state (prompt and answer so far), the probability of each token


@dataclass(frozen=True, slots=True)
class World:
    """Prompts, the longest answer in tokens, the scale of rewards, and which draw of them."""

    prompts: tuple[str, ...] = ("a", "b")
    length: int = 1
    scale: float = 1.0
    draw: int = 0

    def reward(self, prompts: Any, completions: Any, **_: Any) -> list[float]:
        """The reward of texts, uniform in +-scale, drawn once for ever from the words of prompt and
        answer."""
        return [
            self.scale * _uniform(f"{self.draw}|{_text(p)}|{c}")
            for p, c in zip(prompts, completions, strict=True)
        ]

    def roots(self) -> list[Prefix]:
        """The prompts as tokens. Without a first token that differs, a model of relative positions
        that keeps only what it averages would take `a` and `a a` for the same state."""
        return [(END, VOCABULARY[p]) for p in self.prompts]

    def states(self) -> list[Prefix]:
        """All states in which a token is chosen, shortest first."""
        found = self.roots()
        for state in found:
            if len(state) - 1 < self.length:
                found += [(*state, v) for v in range(len(VOCABULARY)) if v != END]
        return found

    def final(self, state: Prefix, token: int) -> float | None:
        """The reward where the answer ends with this token, else None."""
        ids = (*state[2:], token)
        if token != END and len(ids) < self.length:
            return None
        text = " ".join(LETTERS[v - 2] for v in ids if v > END)
        return self.reward([LETTERS[state[1] - 2]], [text])[0]


class StepWorld(World):
    """The same world with a reward, as large as that of the whole answer, for each letter of it.
    The answer's reward stays what it is, and so does the optimum."""

    def reward(self, prompts: Any, completions: Any, **_: Any) -> list[float]:
        """The rewards of `World`, with steps: each ends with a letter."""
        from prefab.trainers.rl.rewards import StepRewards

        return [
            StepRewards(
                [
                    (end, self.scale * _uniform(f"step|{self.draw}|{_text(p)}|{c[:end]}"))
                    for end in range(1, len(c) + 1, 2)
                ],
                total,
            )
            for p, c, total in zip(
                prompts, completions, World.reward(self, prompts, completions), strict=True
            )
        ]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**47 - 1


def reverse_optimum(world: World, reference: Table, beta: float) -> Table:
    """pi(y) ~ pi_ref(y) exp(r(y) / beta), state by state: what PPO and RLOO maximise, KL counted to
    the answer's end."""
    return _backwards(world, reference, beta, future_kl=True, forward=False)


def token_optimum(world: World, reference: Table, beta: float, forward: bool) -> Table:
    """What GRPO's loss term settles at: no token answers for the KL of later ones, so Q is the
    final reward alone.

    `forward`: k3 without the importance ratio, pi = beta pi_ref / (lambda - Q); else pi ~ pi_ref
    exp(Q / beta)."""
    return _backwards(world, reference, beta, future_kl=False, forward=forward)


def _backwards(
    world: World, reference: Table, beta: float, future_kl: bool, forward: bool
) -> Table:
    policy: Table = {}
    value: dict[Prefix, float] = {}
    for state in reversed(world.states()):
        ends = [world.final(state, v) for v in range(len(VOCABULARY))]
        q = [value[(*state, v)] if end is None else end for v, end in enumerate(ends)]
        p_ref = reference[state]
        policy[state] = _forward_tilt(p_ref, q, beta) if forward else _tilt(p_ref, q, beta)
        value[state] = (
            beta * log(sum(p * exp(x / beta) for p, x in zip(p_ref, q, strict=True)))
            if future_kl
            else sum(p * x for p, x in zip(policy[state], q, strict=True))
        )
    return policy


def _tilt(p_ref: list[float], q: list[float], beta: float) -> list[float]:
    weights = [p * exp((x - max(q)) / beta) for p, x in zip(p_ref, q, strict=True)]
    return [w / sum(weights) for w in weights]


def _forward_tilt(p_ref: list[float], q: list[float], beta: float) -> list[float]:
    """beta p_ref / (lambda - q), lambda above every q such that it sums to 1, by bisection."""
    low, high = max(q), max(q) + beta
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        total = sum(beta * p / max(middle - x, 1e-300) for p, x in zip(p_ref, q, strict=True))
        low, high = (middle, high) if total > 1 else (low, middle)
    weights = [beta * p / (high - x) for p, x in zip(p_ref, q, strict=True)]
    return [w / sum(weights) for w in weights]


def table(world: World, model: Any) -> Table:
    """A model's policy in every state, by a plain forward."""
    import torch

    with torch.no_grad():
        return {
            s: model(torch.tensor([s])).logits[0, -1].double().softmax(-1).tolist()
            for s in world.states()
        }


def total_variation(p: Table, q: Table) -> dict[Prefix, float]:
    """The total variation between two policies, state by state."""
    return {s: sum(abs(a - b) for a, b in zip(p[s], q[s], strict=True)) / 2 for s in p}


def visits(world: World, policy: Table) -> dict[Prefix, float]:
    """How often each state is come to, prompts equally likely."""
    found: dict[Prefix, float] = {}
    for s in world.states():
        found[s] = 1 / len(world.prompts) if len(s) == 2 else found[s[:-1]] * policy[s[:-1]][s[-1]]
    return found


def answers(world: World, policy: Mapping[Prefix, list[float]]) -> dict[Prefix, float]:
    """The probability of every whole answer (with its prompt's tokens first), prompts equally
    likely."""
    found: dict[Prefix, float] = {}
    todo = [(root, 1 / len(world.prompts)) for root in world.roots()]
    for state, weight in todo:
        for v, p in enumerate(policy[state]):
            step = ((*state, v), weight * p)
            if world.final(state, v) is None:
                todo.append(step)
            else:
                found[step[0]] = step[1]
    return found


def build(folder: Path, seed: int, hidden: int = 16, spread: float = 0.4) -> Path:
    """A random one-layer Llama over the vocabulary with an ordinary tokenizer and a template that
    puts an end token first."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{{ '<eos> ' + messages[-1]['content'] }}",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
