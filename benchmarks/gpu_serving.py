"""Label reads a second that one GPU serves, by the number of vLLM's API server processes and by how
it is asked, and what `prefab run` reaches of them.

    python -m benchmarks.gpu_serving             # needs a GPU and vLLM; under 8 minutes
    python -m benchmarks.gpu_serving --quick     # a few reads, on a CPU too: does it work?

For each number of processes Prefab starts a server (seconds told; only the first start compiles).
Then the same label reads are asked with an empty prefix cache by `prefab run`, by a pool that POSTs
one read at a time and keeps nothing, and by one that POSTs 32. Last, vLLM's engine in the asking
process has all of them at once. Each case is a process of its own with a time of its own; what
fails or takes too long is named. Results are written after each case, to the folder that $OUT names
as well where it is set.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks import vllm_load
from benchmarks.common import NEEDS_GPU, table, write
from benchmarks.gpu_ppo import TELL, GpuUse, in_a_process
from prefab.factory.engines.vllm_process import has_gpu

IN_PROCESS = "vLLM in the asking process"
FIRST_S, EACH_S, LAST_S = 160, 105, 100  # a case may take; the first one compiles


def server_case(options: argparse.Namespace, folder: Path, processes: int, tell: TELL) -> None:
    """One server: its start, `prefab run` on it, and the two pools."""
    from prefab import run

    several = ["--api-server-count", str(processes)] if processes > 1 else []
    began = time.perf_counter()
    with vllm_load.served(options.model, [*several, *options.vllm_args]) as url:
        tell({"start_s": time.perf_counter() - began})
        drafts = folder / "drafts"
        run(vllm_load.pipeline(options, drafts, url, {"engine": "scripted"}))
        vllm_load.empty_cache(url)
        figures, seen = vllm_load.run_prefab(options, drafts, folder, url)
        tell({"prefab": figures})
        ids = vllm_load.label_ids(url, options.model, seen[0].labels)
        bodies = [vllm_load.body(options.model, request, ids) for request in seen]
        (folder / "bodies.pickle").write_bytes(pickle.dumps(bodies))
        for name, batch in (("one a POST", 1), ("32 a POST", vllm_load.BATCH)):
            vllm_load.empty_cache(url)
            tell({name: asyncio.run(vllm_load.bare(url, bodies, batch, options.in_flight))})


def as_fields(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of a command line as those of `vllm.LLM`; one without a value is true."""
    fields: dict[str, Any] = {}
    for word in (part for given in words for part in given.split("=", 1)):
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            fields[name] = True
        else:
            fields[name] = yaml.safe_load(word)
    return fields


def in_process_case(options: argparse.Namespace, folder: Path, tell: TELL) -> None:
    """The same reads by vLLM's engine in this process, without HTTP."""
    from prefab.factory.engines.base import resolve_model
    from prefab.factory.engines.vllm_process import default_dtype

    if not has_gpu():  # as Prefab starts a server on a CPU
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    kept = folder / "bodies.pickle"
    if not kept.exists():
        raise RuntimeError("no server was asked, so there are no reads to repeat")
    bodies = pickle.loads(kept.read_bytes())
    fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    params = SamplingParams(
        **{name: bodies[0][name] for name in fields},
        logprob_token_ids=bodies[0]["logprob_token_ids"],
    )
    began = time.perf_counter()
    cpu: dict[str, Any] = {} if has_gpu() else {"enable_chunked_prefill": False, "block_size": 32}
    llm = LLM(
        model=resolve_model(options.model),
        dtype=default_dtype(),
        generation_config="vllm",
        **cpu | as_fields(options.vllm_args),
    )
    tell({"start_s": time.perf_counter() - began})
    llm.chat([b["messages"] for b in bodies[:8]], params, use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    answers = llm.chat([b["messages"] for b in bodies], params, use_tqdm=False)
    window_s = time.perf_counter() - began
    read = sum(len(a.outputs[0].logprobs[0]) >= len(params.logprob_token_ids) for a in answers)
    if read != len(bodies):
        raise RuntimeError(f"{len(bodies) - read} of {len(bodies)} reads have not every label")
    tell({"all at once": {"n": read, "window_s": window_s, "per_s": read / window_s}})
    llm.llm_engine.engine_core.shutdown()  # else this process waits for the engine's for ever


def report(cases: dict[str, dict[str, Any]]) -> None:
    """The table, and what `prefab run` reached of the best."""
    names = ("one a POST", "32 a POST", "all at once", "prefab")
    rows = []
    for case, found in cases.items():
        speeds = [found.get(name, {}).get("per_s", "") for name in names]
        errors = re.findall(r"^[\w.]+(?:Error|Exit): .*", found.get("error", ""), re.M)
        rows.append(
            [
                case,
                found.get("start_s", ""),
                *speeds,
                errors[-1] if errors else found.get("late", ""),
            ]
        )
    table(["label reads a second", "start, s", *names, ""], rows)
    per_s = {
        name: [found[name]["per_s"] for found in cases.values() if name in found] for name in names
    }
    if per_s["prefab"]:
        best, ours = max(map(max, filter(None, per_s.values()))), max(per_s["prefab"])
        print(
            f"\nbest {best:,.0f} a second (goal 2,500); prefab run {ours:,.0f}, "
            f"{ours / best:.2f} of it (goal .95)"
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--api-servers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument(
        "--vllm-args",
        type=shlex.split,
        default=[],
        help='Of vLLM, as one text: --vllm-args="--attention-backend TRITON_ATTN".',
    )
    parser.add_argument("--quick", action="store_true", help="Few reads; figures mean nothing.")
    options = parser.parse_args()
    if not options.quick and not has_gpu():
        parser.error(NEEDS_GPU)
    options.n_prompts = 10 if options.quick else 800
    options.prompts = "microworld"
    options.constitution = str(Path(__file__).parents[1] / "constitutions" / "microworld.yaml")
    return options


def main() -> None:
    """Measure case after case, print the table, write gpu_serving.json."""
    options = arguments()
    use = GpuUse()
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        works = {
            f"{n} API server process{'es' if n > 1 else ''}": partial(
                server_case, options, folder, n
            )
            for n in options.api_servers
        }
        works[IN_PROCESS] = partial(in_process_case, options, folder)
        for case, work in works.items():
            limit_s = LAST_S if case == IN_PROCESS else EACH_S if cases else FIRST_S
            found = in_a_process(work, limit_s * (4 if options.quick else 1), use)
            told = {name: value for some in found.pop("told") for name, value in some.items()}
            cases[case] = told | found
            write("gpu_serving", options.quick, in_flight=options.in_flight, cases=cases)
    report(cases)


if __name__ == "__main__":
    main()
