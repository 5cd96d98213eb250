"""Prefab itself on the peers' workload: `pipelines.run`, everything durable. Variants: "" (a POST a
judgment) · batch (32 label reads a POST, by vLLM's batch endpoint) · drafts (ask for the drafts
alone, into `--store`).

Eight drafts a prompt from the mock policy, all 28 pairs in both orders under one principle as long
as the peers' rules. The peers are given their answers, so `drafts` goes before the run that is
measured, which then asks judgments alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import workload

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
DRAFTS = 8
PER_PROMPT = DRAFTS * (DRAFTS - 1)


def write_pipeline(folder: Path, url: str, n: int, in_flight: int, variant: str) -> Path:
    """A project in `folder` that asks `n` judgments, rounded up to whole prompts."""
    recipe, batch = "cai" if variant == "drafts" else "rlaif", 32 if variant == "batch" else 1
    rules = json.dumps("Which answer is better by these rules?\n" + workload.RULES)
    (folder / "constitution.yaml").write_text(
        "id: peers\ntitle: The peers' rules\nlicence: CC0-1.0\nselection: sample_one\nprinciples:\n"
        f"  - id: rules\n    title: The rules\n    compare: {rules}\n    critique: Name a fault.\n"
        "    revise: Mend the fault.\n    criterion: The answer breaks a rule.\n"
    )
    prompts = (
        json.dumps({"prompt": row["instruction"]}) for row in workload.rows(-(-n // PER_PROMPT))
    )
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    engine = {
        "engine": "openai",
        "base_url": url,
        "api_key_env": None,
        "max_in_flight": in_flight,
        "batch": batch,
    }
    (folder / "pipeline.yaml").write_text(
        json.dumps(
            {
                "recipe": recipe,
                "name": recipe,
                "store": str(folder / "store"),
                "constitution": str(folder / "constitution.yaml"),
                "prompts": {"source": str(folder / "prompts.jsonl")},
                "engines": {
                    "policy": {**engine, "model": "mock-policy", "batch": 1},
                    "judge": {**engine, "model": "mock-ab"},
                },
                "policy": {
                    "engine": "policy",
                    "samples": DRAFTS,
                    "temperature": 1.0,
                    "max_tokens": 128,
                },
                "revise": {"rounds": 0},
                "panel": {
                    "judges": [
                        {
                            "name": "judge",
                            "kind": "pairwise",
                            "engine": "judge",
                            "template": "pairwise.jinja",
                        }
                    ]
                },
                "budget": {"unscored": None, "failed": None},
            },
            indent=1,
        )
    )
    return folder / "pipeline.yaml"


def memory_mb() -> float:
    """Resident memory of this process now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:8399/v1")
    parser.add_argument("-n", type=int, default=2000)
    parser.add_argument("-c", "--concurrency", type=int, default=64)
    parser.add_argument("--variant", default="", choices=["", "batch", "drafts"])
    parser.add_argument("--store", type=Path, help="a folder to keep; left out: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = write_pipeline(
            folder, options.base_url, options.n, options.concurrency, options.variant
        )
        from prefab import run

        started = time.perf_counter()
        result = run(path)
        work_s = time.perf_counter() - started
        import duckdb

        with duckdb.connect(str(folder / "store" / "prefab.duckdb"), read_only=True) as con:
            n, scored = con.execute(
                "SELECT count(*), count(*) FILTER (reason IS NULL) FROM verdicts"
            ).fetchone()
    print(
        "RESULT "
        + json.dumps(
            {
                "n": n,
                "ok": scored,
                "work_s": work_s,
                "rss_mb": memory_mb(),
                "stats": {k: v for k, v in result.summary().items() if isinstance(v, int | float)},
            }
        )
    )


if __name__ == "__main__":
    main()
