"""A small PPO, GRPO or RLOO in two processes (gloo), forks of one so that a try costs little.

`python two_ppo_driver.py FOLDER JOBS`, a JSON list of `{out, changes}`, one after the other.
`changes` are those of the configuration (with `method`: of GRPO's); `fault` among them is what
happens at the third step: process 1 does nan, die or raise, or the main process is killed once, and
the training is begun again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from prefab.factory.errors import PrefabError
from prefab.trainers import distributed
from prefab.trainers.rl import batches, grpo, loop, ppo, rewards
from tests.support import kill_ppo_driver
from tests.support.killer import fork_in_two, until_done

PROMPTS = list(kill_ppo_driver.WORLD.prompts) * 5


def train(folder: Path, out: str, changes: dict) -> None:
    """One try; goes on from the last checkpoint."""
    fault = changes.get("fault", "")
    rest = {name: value for name, value in changes.items() if name != "fault"}
    if fault and distributed.is_main() == (fault == "killed"):
        loop.estimate = broken(loop.estimate, fault, folder / f"{out}.killed")
    batches.CALL_CPU = 0 if changes.get("method") else 64  # so that short prompts are shared
    if changes.get("method"):
        config = grpo_config(folder, out, **rest)
        grpo.run(config, PROMPTS, rewards.single(kill_ppo_driver.WORLD.reward))
        return
    config = kill_ppo_driver.config(folder, out, **rest)
    gold = rewards.Source("gold", (kill_ppo_driver.WORLD.reward,))
    ppo.run(config, PROMPTS, rewards.single(kill_ppo_driver.noisy), gold, PROMPTS)


def grpo_config(folder: Path, out: str, **changes) -> grpo.GrpoConfig:
    """GRPO or RLOO of a few tokens, by `method`."""
    settings = {
        "model": str(folder / "policy"),
        "out": str(folder / out),
        "steps": 3,
        "batch_size": 16,
        "micro_batch": 4,
        "group": 4,
        "max_new_tokens": 3,
        "learning_rate": 5e-3,
        "reference_samples": 16,
        "save_every": 2,
        "threads": 1,
    }
    return grpo.GrpoConfig(**(settings | changes))


def broken(estimate, fault: str, killed: Path):
    """`loop.estimate` with a fault from the third step on; `killed` is made by the first kill."""

    def estimated(t, *rest):
        if fault == "killed":
            if t.state.step >= 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return estimate(t, *rest)
        batch, kl = estimate(t, *rest)
        if t.state.step >= 2 and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if t.state.step >= 2 and fault == "raise":
            raise MemoryError("out of memory")
        if t.state.step >= 2:
            batch.advantages[:] = float("nan")
        return batch, kl

    return estimated


def in_two(folder: Path, out: str, changes: dict) -> None:
    """One try in two processes."""
    second = fork_in_two()
    code = 0
    try:
        train(folder, out, changes)
    except PrefabError as error:
        print(f"process {os.environ['RANK']}: {error}", flush=True)
        code = 1
    if second == 0:
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
    print(f"ended with {code} and {status}", flush=True)
    sys.exit(code or status)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from prefab.trainers import model_card  # noqa: F401

    for job in json.loads(sys.argv[2]):
        print(f"job {job['out']}", flush=True)
        once = partial(in_two, Path(sys.argv[1]), job["out"], job.get("changes", {}))
        if job.get("changes", {}).get("fault", "killed") == "killed":
            until_done(once)
        elif os.fork() == 0:
            once()
        else:
            os.wait()
