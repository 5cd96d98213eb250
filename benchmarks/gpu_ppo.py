"""PPO and GRPO with each sampler against TRL's GRPO on a GPU: tokens a second of whole steps, the
share of sampling, peak memory, and how busy the GPU was.

    python -m benchmarks.gpu_ppo                 # needs a GPU; under 8 minutes
    python -m benchmarks.gpu_ppo --quick         # a tiny model, on a CPU too: does it work?

A Llama of random weights in the shape of Qwen2.5 0.5B, bf16 autocast, 512 answers of 256 tokens a
step (random weights all but never end one), updated once, against a reference, with a reward that
costs nothing. TRL samples as many answers at once, without gradient checkpointing, and with vLLM in
its own process (colocate); our vLLM is a server beside the trainer. The first step of each, which
compiles and starts servers, is left out.

Each measurement is a process of its own with a time of its own, forked from this one, which has
imported what takes long and never touches the GPU. What fails, takes too long or is not installed
is named in the table that the script ends with. Results are written after each, to the folder that
$OUT names as well where it is set.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import NEEDS_GPU, table, write
from benchmarks.gpu_training import make_model
from prefab.factory.engines.vllm_process import has_gpu

TELL = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement: who trains how, what samples, and the seconds that it may take."""

    who: str  # ours or trl
    method: str
    sampler: str  # static (transformers, compiled), dynamic (transformers) or vllm
    budget_s: float

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.who}, {self.method}, {self.sampler}"


# The most telling first. A step was estimated at 5 to 25 s, a start at 15 to 75 s.
CASES = [
    Case("ours", "grpo", "static", 90),
    Case("trl", "grpo", "dynamic", 100),
    Case("ours", "grpo", "vllm", 120),
    Case("trl", "grpo", "vllm", 120),
    Case("ours", "ppo", "static", 90),
    Case("ours", "ppo", "vllm", 120),
    Case("ours", "grpo", "dynamic", 90),
    Case("ours", "ppo", "dynamic", 90),
]


class Enough(Exception):
    """All steps that are measured are done."""


def prepare(folder: Path, shape: str, n: int, tell: TELL) -> None:
    """The model, and `n` prompts of the embedded world; tells the GPU's name."""
    import torch

    from prefab.factory.microworld import grammar

    make_model(folder, shape)
    turns = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", n, 3)
    ]
    (folder / "turns.json").write_text(json.dumps(turns))
    tell({"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None})


def reward(prompts: Any, completions: Sequence[Any], **_: Any) -> list[float]:
    """A number that depends on the text alone and costs nothing to compute."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]


class Watch:
    """Tells each step's figures, and ends the run when there are enough."""

    def __init__(self, steps: int, tell: TELL) -> None:
        self.left, self.tell, self.began = steps, tell, time.perf_counter()
        self.generation_s, self.tokens = 0.0, 0

    def timed(self, sample: Callable[..., Any], lengths: Callable[[Any], list[int]]) -> Any:
        """`sample` with its seconds, and the tokens that it made, added up."""

        def wrapped(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            found = sample(*args, **more)  # lists of numbers: the device is done
            self.generation_s += time.perf_counter() - began
            self.tokens += sum(lengths(found))
            return found

        return wrapped

    def step(self, losses: Any = None) -> None:
        """A step is done. Raises: Enough."""
        import torch

        now, gpu = time.perf_counter(), torch.cuda.is_available()
        self.tell(
            {
                "s": now - self.began,
                "generation_s": self.generation_s,
                "tokens": self.tokens,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
                "loss": losses,
            }
        )
        self.began, self.generation_s, self.tokens = now, 0.0, 0
        self.left -= 1
        if not self.left:
            raise Enough


def ours(case: Case, folder: Path, s: argparse.Namespace, tell: TELL) -> None:
    """Our PPO or GRPO."""
    from prefab.trainers.rl import decoding, grpo, ppo, rewards, sampling

    if s.quick:
        decoding.BACKEND = "eager"  # traced, and then run by torch: nothing is compiled to C++
    watch = Watch(s.steps, tell)
    sampling.step_answers = watch.timed(
        sampling.step_answers, lambda answers: [len(a.ids) for a in answers]
    )
    settings = {
        "model": str(folder / s.shape),
        "out": str(folder / case.name),
        "steps": 100,
        "batch_size": s.batch,
        "epochs": 1,
        "micro_batch": s.micro,
        "sample_batch": s.batch,
        "max_new_tokens": s.max_new_tokens,
        "sampler": "vllm" if case.sampler == "vllm" else "transformers",
        "compile_sampling": case.sampler == "static",
        "learning_rate": 1e-6,
        "kl_stop": None,
        "normalise": "none",
        "unfinished_score": None,
        "precision": "fp32" if s.quick else "bf16",
        "save_every": 10**6,
    }
    turns = json.loads((folder / "turns.json").read_text())
    if case.method == "ppo":
        more = {"minibatches": 1, "unfinished_stop": 1.0, "value_learning_rate": 1e-6}
        config: Any = ppo.PpoConfig(**settings, **more)
        ppo.run(
            config, turns, rewards.single(reward), on_step=lambda m: watch.step(m["policy_loss"])
        )
    else:
        config = grpo.GrpoConfig(**settings, group=s.group)
        grpo.run(config, turns, rewards.single(reward), on_step=lambda m: watch.step(m["loss"]))


def trl(case: Case, folder: Path, s: argparse.Namespace, tell: TELL) -> None:
    """TRL's GRPO with the same model, prompts, reward and batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from prefab.trainers.common import default_device

    watch = Watch(s.steps, tell)

    class Steps(TrainerCallback):
        """Tells when a step is done."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                watch.step(logs["loss"])

    args = GRPOConfig(
        output_dir=str(folder / case.name),
        max_steps=100,
        per_device_train_batch_size=s.micro,
        gradient_accumulation_steps=s.batch // s.micro,
        num_generations=s.group,
        max_completion_length=s.max_new_tokens,
        temperature=1.0,
        learning_rate=1e-6,
        beta=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        bf16=not s.quick,
        use_cpu=default_device() == "cpu",
        gradient_checkpointing=False,
        use_vllm=case.sampler == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
    )
    turns = json.loads((folder / "turns.json").read_text())
    trainer = GRPOTrainer(
        model=str(folder / s.shape),
        reward_funcs=reward,
        args=args,
        callbacks=[Steps()],
        train_dataset=Dataset.from_list([{"prompt": row} for row in turns]),
    )
    trainer._generate_single_turn = watch.timed(
        trainer._generate_single_turn,
        lambda found: [len(ids) for ids in found[0]],
    )
    trainer.train()


class GpuUse:
    """What nvidia-smi says of the GPU, asked now and then; nothing where there is none."""

    def __init__(self) -> None:
        self.program = shutil.which("nvidia-smi")
        self.seen: list[tuple[float, float]] = []  # (utilisation in percent, GiB in use)
        self.asked = 0.0

    def look(self) -> None:
        """Ask, at most once a second."""
        if self.program is None or time.monotonic() - self.asked < 1:
            return
        self.asked = time.monotonic()
        query = "--query-gpu=utilization.gpu,memory.used"
        done = subprocess.run(
            [self.program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and done.stdout.strip():
            busy, used = done.stdout.splitlines()[0].split(",")
            self.seen.append((float(busy), float(used) / 1024))


def _child(work: Callable[[TELL], None], pipe: Any) -> None:
    """What a measurement's process does; its error goes to the pipe too."""
    try:
        work(pipe.send)
    except Enough:
        pass
    except BaseException as error:
        pipe.send({"error": "".join(traceback.format_exception(error))[-1500:]})
    gc.collect()


def in_a_process(work: Callable[[TELL], None], budget_s: float, use: GpuUse) -> dict[str, Any]:
    """What `work` told in a process of its own, and why it ended early where it did."""
    import torch

    # a fork of a process that holds a GPU cannot use it; to import all again takes half a minute
    processes = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    here, there = processes.Pipe(duplex=False)
    process: Any = processes.Process(target=_child, args=(work, there))
    process.start()
    there.close()
    found: dict[str, Any] = {"told": []}
    until = time.monotonic() + budget_s
    while (left := until - time.monotonic()) > 0:
        if not here.poll(min(left, 1.0)):
            use.look()
            continue
        try:
            told = here.recv()
        except EOFError:
            break
        if "error" in told:
            found["error"] = told["error"]
        else:
            use.look()
            if not found["told"]:
                use.seen.clear()  # what was before the first step is not measured
            found["told"].append(told)
    else:
        found["late"] = f"not done within {budget_s:.0f} s"
        process.terminate()
    process.join(20)
    process.kill()
    process.join()
    return found


def figures(steps: list[dict[str, Any]], use: GpuUse) -> dict[str, Any]:
    """What follows from all steps but the first: tokens a second, sampling's share, memory, use."""
    kept = steps[1:]
    if not kept:
        return {}
    seconds, tokens = sum(s["s"] for s in kept), sum(s["tokens"] for s in kept)
    peaks = [s["peak_gib"] for s in steps if s["peak_gib"] is not None]
    return {
        "tokens_per_s": tokens / seconds,
        "sampling_share": sum(s["generation_s"] for s in kept) / seconds,
        "sampled_tokens_per_s": tokens / sum(s["generation_s"] for s in kept),
        "step_s": seconds / len(kept),
        "tokens_a_step": tokens / len(kept),
        "peak_gib_of_torch": max(peaks, default=None),
        "peak_gib_of_the_gpu": max((used for _, used in use.seen), default=None),
        "gpu_busy": sum(busy for busy, _ in use.seen) / len(use.seen) / 100 if use.seen else None,
    }


def why_left_out(case: Case, s: argparse.Namespace) -> str | None:
    """Why a case cannot be measured here; None where it can."""
    if case.sampler != "vllm":
        return None
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    return "--quick starts no vLLM" if s.quick else None


def measure(case: Case, folder: Path, s: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """One case: its figures and steps, and why it was not measured where it was not."""
    found: dict[str, Any] = {"case": case.name}
    if why := why_left_out(case, s):
        return found | {"not_measured": why}
    budget_s = min(case.budget_s * (10 if s.quick else 1), left_s)
    if budget_s < 20:
        return found | {"not_measured": "no time was left"}
    use, began = GpuUse(), time.monotonic()
    work = partial({"ours": ours, "trl": trl}[case.who], case, folder, s)
    done = in_a_process(work, budget_s, use)
    found |= {"steps": done["told"], "took_s": round(time.monotonic() - began, 1)}
    found |= figures(done["told"], use)
    if "tokens_per_s" not in found:
        found["not_measured"] = done.get("late") or done.get("error", "it ended without a step")
    elif "late" in done or "error" in done:
        found["note"] = done.get("late") or done["error"]
    shutil.rmtree(folder / case.name, ignore_errors=True)
    return found


def last_line(text: str) -> str:
    """The last line of an error, for a table."""
    return (text.strip().splitlines() or [""])[-1][:100]


def show(results: list[dict[str, Any]]) -> None:
    """The table of what was measured, and of what was not and why."""
    base = next(
        (r["tokens_per_s"] for r in results if r["case"].startswith("trl") and "step_s" in r), None
    )
    rows = []
    for r in results:
        if "not_measured" in r:
            rows.append([r["case"], *["-"] * 6, last_line(r["not_measured"])])
            continue
        names = ("tokens_per_s", "sampling_share", "step_s", "peak_gib_of_the_gpu", "gpu_busy")
        values = ["-" if r[name] is None else r[name] for name in names]
        times = r["tokens_per_s"] / base if base else "-"
        rows.append([r["case"], values[0], times, *values[1:], last_line(r.get("note", ""))])
    columns = ["", "tokens/s", "times TRL", "sampling's share", "step, s", "GPU GiB", "GPU busy"]
    table([*columns, "note"], rows)


def _settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.5B", help="As benchmarks/gpu_training.py names them.")
    parser.add_argument("--steps", type=int, default=3, help="The first is left out.")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=440, help="What begins later is left out.")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="Only cases whose name holds one of these texts."
    )
    parser.add_argument(
        "--quick", action="store_true", help="A tiny model, on the CPU as well: 2 steps of 8."
    )
    s = parser.parse_args(arguments)
    if s.quick:
        s.shape, s.steps, s.batch, s.micro, s.group = "tiny", 2, 8, 4, 4
        s.max_new_tokens, s.seconds = 6, 3600
    elif not has_gpu():
        parser.error(NEEDS_GPU)
    return s


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare, print, and write; the results."""
    s, began = _settings(arguments), time.monotonic()
    # a process that has asked CUDA itself what devices there are cannot be forked
    os.environ.update(PYTORCH_NVML_BASED_CUDA_CHECK="1", HF_HUB_OFFLINE="1")
    import torch._dynamo
    from trl import GRPOTrainer  # noqa: F401  (imported once, for all processes)

    from prefab.trainers.rl import grpo, ppo  # noqa: F401

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gpu-ppo-") as place:
        folder = Path(place)
        ready = in_a_process(partial(prepare, folder, s.shape, 4 * s.batch), s.seconds, GpuUse())
        if not ready["told"]:
            raise SystemExit(f"the model was not made: {ready.get('late') or ready.get('error')}")
        gpu = ready["told"][0]["gpu"]
        for case in CASES:
            if not any(text in case.name for text in s.only):
                continue
            results.append(measure(case, folder, s, s.seconds - (time.monotonic() - began)))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "steps"}), flush=True)
            write("gpu_ppo", s.quick, gpu=gpu, torch=torch.__version__, results=results)
    show(results)
    return results


if __name__ == "__main__":
    main()
