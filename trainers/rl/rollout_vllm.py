"""Answers sampled by a vLLM server of our own, to which the policy's weights are pushed after each
update.

The policy is written to OUT/served (adapters merged) and read again by the server, in place: the
same on a CPU and on a GPU, and it needs no process group (TRL's vLLM client sends weights by NCCL,
which a CPU does not have). Log-probabilities that train come from training's own forward; the
server's tell how far the two are apart. Stale weights are the threat: a gap beyond what rounding
explains stops the run.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import orjson

from prefab.factory.console import say
from prefab.factory.engines import vllm
from prefab.factory.engines.http import HttpClient as Http
from prefab.factory.engines.http import Rejected
from prefab.factory.engines.supervisor import GRACE_S
from prefab.factory.engines.vllm_process import VllmProcess, free_port, has_gpu
from prefab.factory.errors import EngineError, TransportError
from prefab.factory.numbers import counted
from prefab.trainers.common import TrainError
from prefab.trainers.rl import checkpoint
from prefab.trainers.rl.config import RlConfig
from prefab.trainers.rl.rollout import Ahead, SampledAnswer
from prefab.trainers.rl.state import Run

# Nats a token, mean of a step. In fp32 on a CPU a server with the right weights was 3e-7 away
# (prefab-tiny); weights one update old were 0.03 away at a learning rate of 1e-4 and 0.004 at 1e-5,
# a head alone that was left behind 0.007 (docs/ppo.md). Nothing is measured on a GPU, whose kernels
# may be TF32, nor with bf16, whose rounding is 2^-8 of logits of about 10.
GAP_CPU, GAP_GPU, GAP_BF16 = 0.001, 0.01, 0.1


class VllmSampler:
    """A vLLM server that serves the policy of a run as it stands. The first `sample` starts it;
    `stop` ends it.

    One that dies is started once more, with the weights of the moment. When that does not help, the
    run is saved and stops.
    """

    def __init__(self, t: Run, launch: Callable[..., Any] = VllmProcess) -> None:
        self.t, self.launch = t, launch
        self.folder = Path(t.config.out) / "served"
        self.process: Any = None
        self.ran, self.failures = False, 0
        self.patience_s = GRACE_S + 4.0
        self.served_step = -1  # whose weights the server has
        self.asleep = False
        exact = t.config.precision == "fp32"
        self.config = engine_config(t.config, self.folder, max(map(len, t.prompt_ids)), exact)
        self.most_gap = (GAP_GPU if has_gpu() else GAP_CPU) if exact else GAP_BF16

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[SampledAnswer]:
        """One answer to each prompt by the policy as it is now, in the order of the prompts, drawn
        from the whole distribution at the run's temperature. Each row has a seed of its own, so an
        answer is a function of weights, prompt, seed and place, as far as the server's rounding is
        the same in every batch.

        Raises: EngineError where the server does not start at all, TrainError where it fails for
        good.
        """
        while True:
            try:
                return asyncio.run(self._sample(prompts, seed))
            except EngineError as error:
                if not self.ran:
                    raise
                self.failures += 1
                why = self._why_dead() or error
                self.stop()
                if self.failures > 1:
                    self.give_up(f"vLLM failed twice, the second time {_at(self.t)}: {why}")
                say(
                    f"vLLM failed {_at(self.t)} and is started once more: {why}",
                    stderr=True,
                )

    def ahead(self, prompts: Sequence[list[int]], seed: int) -> Ahead:
        """As `sample`, in a thread, once the server has the weights of now. A failure gives None;
        `sample` then starts the server again.
        """
        found: list[list[SampledAnswer]] = []
        try:
            asyncio.run(self._sample([], seed))  # the weights of now, before they change
        except EngineError:
            return lambda: None

        def ask() -> None:
            with suppress(EngineError):
                found.append(asyncio.run(self._sample(prompts, seed, self.served_step)))

        thread = Thread(target=ask, name="sample ahead", daemon=True)
        thread.start()

        def wait() -> list[SampledAnswer] | None:
            thread.join()
            return found[0] if found else None

        return wait

    def check(self, gap: float) -> None:
        """Raises: TrainError for a mean gap (nats a token, see `rollout.sampler_gap`) that rounding
        does not explain.
        """
        if gap > self.most_gap:
            self.give_up(
                f"the sampler's log-probabilities are {gap:.3g} nats a token from training's {_at(self.t)}, and "
                f"rounding makes less than {self.most_gap:g}: vLLM does not serve the weights that were pushed to it, "
                "or computes this model in another way"
            )

    def give_up(self, reason: str) -> NoReturn:
        """Save the run, then Raises: TrainError."""
        saved = checkpoint.save(self.t)
        raise TrainError(
            f"{reason}\nThe run is saved in {saved}; the same command goes on from there. "
            "`sampler: transformers` needs no server, in another folder"
        )

    def stop(self) -> None:
        """End the server. Safe to call twice."""
        process, self.process = self.process, None
        if process is not None:
            asyncio.run(process.stop())

    def _why_dead(self) -> str | None:
        """The server's own reason, from its log, which then stays. Its supervisor takes a while to
        end what is left of it; None when it lives on.
        """
        process, patient_until = self.process, time.monotonic() + self.patience_s
        while process is not None and time.monotonic() < patient_until:
            why: str | None = process.why_dead()
            if why:
                return why
            time.sleep(0.1)
        return None

    async def _sample(
        self, prompts: Sequence[list[int]], seed: int, step: int | None = None
    ) -> list[SampledAnswer]:
        """Answers by the weights of `step`, which the server has; without it, by those of now."""
        fresh = step is None and self.served_step != self.t.state.step
        if fresh:
            checkpoint.write_policy(self.t, self.folder)
        if started := self.process is None:
            await self._start()
        server = Http(f"http://127.0.0.1:{self.process.port}", self.config, key=self.process.key)
        server.why_down = self.process.why_dead
        try:
            if (fresh or self.asleep) and not started:
                await push(server, self.asleep)
                self.asleep = False
            if step is None:
                self.served_step = self.t.state.step
            draw = random.Random(seed)
            bodies = [
                body_of(
                    ids, self.t.config, str(self.config.model), self.t.ends, draw.getrandbits(31)
                )
                for ids in prompts
            ]
            replies = await asyncio.gather(
                *(server.post("/v1/completions", body) for body in bodies)
            )
            if self.t.config.vllm.sleep and bodies:
                await server.post("/sleep?level=2", b"")  # the weights are read again anyway
                self.asleep = True
        except Rejected as error:
            self.give_up(f"vLLM refused {_at(self.t)}: HTTP {error.status} {error.message}")
        finally:
            await server.close()
        try:
            return [
                answer_of(*pair, self.t.config.max_new_tokens, self.t.ends)
                for pair in zip(prompts, replies, strict=True)
            ]
        except ValueError as error:
            self.give_up(f"what vLLM answered {_at(self.t)} cannot be read: {error}")

    async def _start(self) -> None:
        name = "again" if self.failures else "policy"  # the log of the one that died stays
        logs = Path(self.t.config.out) / "logs"
        process = self.launch(self.config, str(self.folder), free_port(), name, None, logs)
        try:
            await process.start()
        except BaseException:
            await process.stop()
            raise
        self.process, self.ran, self.asleep = process, True, False


def engine_config(config: RlConfig, folder: Path, longest: int, exact: bool) -> vllm.VllmConfig:
    """The server's settings. `longest`: tokens of the longest prompt. `exact`: training is in
    float32.
    """
    s, gpu = config.vllm, has_gpu()
    args = [
        "--logprobs-mode",
        "processed_logprobs",  # those at the sampling temperature
        "--worker-extension-cls",
        "prefab.trainers.rl.vllm_worker.Extension",
    ]
    if s.sleep:
        args.append("--enable-sleep-mode")
    if not gpu:
        args.append(
            "--enforce-eager"
        )  # compiled code may hold on to packed weights that a push replaces
    return vllm.VllmConfig(
        model=str(folder),
        dtype="bfloat16" if gpu and not exact else "float32",
        max_model_len=longest + config.max_new_tokens,
        gpu_memory_utilization=s.gpu_memory_utilization if gpu else None,
        tensor_parallel=s.tensor_parallel,
        kv_cache_gib=s.kv_cache_gib,
        max_in_flight=config.batch_size,
        args=[*args, *s.args],
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )  # dev mode: /collective_rpc and /reset_prefix_cache


async def push(server: Http, asleep: bool = False) -> None:
    """Have the server read the policy's folder again, and forget what it computed with the old
    weights. One that is asleep is woken: first room for the weights, then for the cache.

    Raises: TransportError, Rejected.
    """
    if asleep:
        await server.post("/wake_up?tags=weights", b"")
    await server.post("/collective_rpc", orjson.dumps({"method": "take_policy"}))
    if asleep:
        await server.post("/wake_up?tags=kv_cache", b"")
    done = await server.post("/reset_prefix_cache", b"")
    if not done.get("success"):
        raise TransportError(
            "vLLM did not empty its prefix cache, which holds what the old weights computed"
        )


def body_of(
    prompt: list[int], config: RlConfig, model: str, ends: Sequence[int], seed: int
) -> bytes:
    """The request for one answer. Its ends are ours alone: what the model's configuration ends with
    may be another token.
    """
    return orjson.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(ends),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
    )


def answer_of(
    prompt: list[int], reply: Mapping[str, Any], most: int, ends: Sequence[int]
) -> SampledAnswer:
    """The answer in a server's reply.

    Raises: ValueError for a reply that holds no answer, TransportError for one that was cut off (a
    server that is being ended).
    """
    ids, logps, reason = _tokens_of(reply)
    ended = bool(ids) and ids[-1] in ends
    if not ended and len(ids) < most:
        raise TransportError(
            f"an answer was broken off after {counted(len(ids), 'token')} ({reason})"
        )
    if len(ids) > most or any(i in ends for i in ids[:-1]):
        raise ValueError(f"{len(ids)} tokens, of {most} at most, or tokens after the end")
    return SampledAnswer(prompt, ids, logps, ended)


def _tokens_of(reply: Mapping[str, Any]) -> tuple[list[int], list[float], str]:
    """(token ids, their log-probabilities, the finish reason) of a completion's one choice.

    Raises: ValueError where they are missing, of unequal number, or not finite.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise ValueError(
            f"{len(choices) if isinstance(choices, list) else 'no'} answers to one prompt"
        )
    ids = choices[0].get("token_ids")
    logps = (choices[0].get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list) or not isinstance(logps, list) or len(ids) != len(logps):
        raise ValueError("tokens without their log-probabilities; is it another version of vLLM?")
    if not all(isinstance(x, float) and isfinite(x) for x in logps):
        raise ValueError(
            "a log-probability is not a finite number: the weights are not finite, or half precision overflows"
        )
    return ids, logps, str(choices[0].get("finish_reason"))


def _at(t: Run) -> str:
    return f"at step {t.state.step + 1}"
