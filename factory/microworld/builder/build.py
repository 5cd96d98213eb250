"""Build the embedded models from nothing: `python -m prefab.factory.microworld.builder.build
[tiny|nano|both]`.

Seeded, resumable (every batch is a function of the seed and its step; state is saved every few
minutes), float32, two threads. Writes tokenizer, chat template and weights to
`factory/microworld/weights/prefab-{tiny,nano}`.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.microworld import grammar, tasks
from prefab.factory.microworld.builder.batch import Batch, chat_text, make_batch
from prefab.factory.spec.templates import templates_digest

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from prefab.factory.microworld.builder.model import Llama

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model is trained. `noise_share` of its judge labels are random; `tokens` is what a
    step holds, about.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    inner: int
    steps: int
    lr: float
    noise_share: float = 0.0
    rows: int = 9
    width: int = 512
    warmup: int = 80
    late: int = 1 << 30  # from this step on, more grades of answers as a whole
    writing: int = 0  # more steps, after a warm restart of the rate, of mostly writing
    settling: int = 0  # and after them, likewise, of grades again beside writing
    decay: float = 0.9  # the share of the steps over which the rate falls to zero
    seed: int = 1

    @property
    def last(self) -> int:
        """How many steps there are."""
        return self.steps + self.writing + self.settling

    def phase(self, step: int) -> int:
        """Which of `tasks.PHASES` a step belongs to."""
        return (step >= self.late) + (step >= self.steps) + (step >= self.steps + self.writing)


PLANS = {
    "tiny": Plan("prefab-tiny", 256, 5, 4, 640, 1800, 1.5e-3, late=1220, writing=700, settling=200),
    "nano": Plan("prefab-nano", 128, 4, 4, 336, 400, 2.5e-3, noise_share=0.25),
}
HELPS = {"faults": 6.0, "asked": 0.5, "look": 0.5, "match": 0.5, "count": 0.5}


def train_tokenizer(vocab: int = 1600) -> Tokenizer:
    """A byte-level BPE over the world's own chats, a `tokenizers.Tokenizer`; any other text falls
    back to bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random("tokenizer")
    texts = []
    for _ in range(3000):
        unit = tasks.unit(rng, "all")
        texts += [chat_text(b.messages) + b.reply for b in unit.branches]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"<\|[a-z_]+\|>|</?| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9<]+|\n+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template as transformers and vLLM
    read them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "pad_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def rate(plan: Plan, step: int) -> float:
    """The learning rate at a step: a short warm-up, a plateau, then a line to zero; in each later
    phase a lower line.
    """
    if step >= plan.steps + plan.writing:
        return 0.25 * plan.lr * (plan.last - step) / plan.settling
    if step >= plan.steps:
        return 0.4 * plan.lr * (plan.steps + plan.writing - step) / plan.writing
    start = plan.steps * (1 - plan.decay)
    fall = 1.0 if step < start else (plan.steps - step) / (plan.steps - start)
    return plan.lr * min(1.0, (step + 1) / plan.warmup) * fall


def optimizer_for(model: Llama, lr: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def batches(plan: Plan, tokenizer: Tokenizer, first: int) -> Iterator[Batch]:
    """The batches from step `first` on, made one ahead in a thread."""
    ready: queue.Queue[Batch] = queue.Queue(maxsize=4)

    def work() -> None:
        for step in range(first, plan.last):
            ready.put(
                make_batch(
                    f"{plan.seed} {step}",
                    tokenizer,
                    plan.rows,
                    plan.width,
                    0.1,
                    plan.noise_share,
                    plan.phase(step),
                )
            )

    threading.Thread(target=work, daemon=True).start()
    for _ in range(first, plan.last):
        yield ready.get()


def train(
    plan: Plan,
    state_dir: Path,
    log: Callable[[str], None] = print,
    minutes: float = 1e9,
    tokenizer: Tokenizer | None = None,
) -> tuple[Llama, Tokenizer]:
    """Train by the plan, resuming from `state_dir` where a state lies; returns the model. `minutes`
    bounds a trial.
    """
    import torch

    from prefab.factory.microworld.builder.model import Llama, Shape, losses

    tokenizer = tokenizer or train_tokenizer()
    torch.manual_seed(plan.seed)
    shape = Shape(
        tokenizer.get_vocab_size(),
        plan.hidden,
        plan.layers,
        plan.heads,
        plan.inner,
        plan.layers - 2,
    )
    model = Llama(shape, len(grammar.PRINCIPLES), len(tasks.ASKED))
    optimizer = optimizer_for(model, plan.lr)
    state_dir.mkdir(parents=True, exist_ok=True)
    state_file, first = state_dir / f"{plan.name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    last = plan.last
    log(
        f"{plan.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {last} steps, from step {first}"
    )
    started = saved = time.time()
    sums: dict[str, float] = {}
    tokens, told = 0, first
    for step, batch in enumerate(batches(plan, tokenizer, first), first):
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step)
        parts = losses(model, batch)
        total = parts["text"] + sum(w * parts[k] for k, w in HELPS.items())
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if math.isfinite(norm):
            optimizer.step()
        tokens += int((batch.tree_BT >= 0).sum())
        sums = {k: sums.get(k, 0.0) + float(v.detach()) for k, v in parts.items()}
        done = step + 1
        if done % 20 == 0 or done == last:
            left = (time.time() - started) / (done - first) * (last - done)
            said = "  ".join(f"{k} {v / (done - told):.3f}" for k, v in sums.items())
            log(
                f"{plan.name} {done}/{last}  {said}  {tokens / (time.time() - started):.0f} tokens/s  {left / 60:.0f} min left"
            )
            sums, told = {}, done
        if time.time() - saved > 180 or done == last:
            _save(
                state_file,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done},
            )
            saved = time.time()
        if time.time() - started > minutes * 60:
            _save(
                state_file,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done},
            )
            break
    return model, tokenizer


def _save(path: Path, state: dict[str, Any]) -> None:
    import torch

    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def write(model: Llama, tokenizer: Tokenizer, plan: Plan, folder: Path) -> None:
    """Write the finished model with the digests of the templates it saw."""
    from prefab.factory.microworld.builder.model import export

    if folder.exists():
        shutil.rmtree(folder)
    ids = {
        k: number
        for k, t in (
            ("pad_token_id", SPECIALS[0]),
            ("bos_token_id", SPECIALS[1]),
            ("eos_token_id", SPECIALS[2]),
        )
        if (number := tokenizer.token_to_id(t)) is not None
    }
    save_tokenizer(tokenizer, folder)
    export(
        model,
        folder,
        ids,
        {"templates": templates_digest(), "name": plan.name, "steps": str(plan.last)},
    )


def main() -> None:
    """The command line of the builder."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="?", default="both", choices=("tiny", "nano", "both"))
    parser.add_argument(
        "--state", type=Path, default=Path("build/microworld"), help="where progress is kept"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, help="fewer steps, for a trial")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after this long (run again to go on)"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in ("tiny", "nano") if args.which == "both" else (args.which,):
        plan = replace(PLANS[name], steps=args.steps) if args.steps else PLANS[name]
        model, tokenizer = train(
            plan, args.state, lambda text: print(text, flush=True), args.minutes
        )
        write(model, tokenizer, plan, args.out / plan.name)


if __name__ == "__main__":
    main()
