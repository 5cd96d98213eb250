"""Run, audit, evaluate and reward with the kind `toy` in a process where its package is installed;
prints what was found."""

import json
import sys
from pathlib import Path

from prefab import run
from prefab.pipelines.config.schema import json_schema
from prefab.pipelines.quality import judge_audit, judge_benchmark
from prefab.pipelines.run.runner import resolve_pipeline
from prefab.pipelines.training.judge_reward import opened
from prefab.trainers.rl import ppo, rewards
from prefab.trainers.rl.rewards import RewardConfig
from tests.support import planted, project

folder = Path(sys.argv[1])
judge = {"name": "mine", "kind": "toy", "politely": True}
path = project.write(folder, project.pipeline(folder, prompts=4, panel={"judges": [judge]}))
done = run(path, engines=planted.engine())
loaded = resolve_pipeline(path)
audit = judge_audit.audit(loaded, n=4, engines=planted.engine())
row = {"chosen": "good answer", "chosen_model": "x", "rejected": "bad 2 answer"}
row |= {"prompt": "q", "rejected_model": "y", "subset": "alpacaeval-easy", "id": 1}
(folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
bench = judge_benchmark.read_benchmark("rewardbench", [folder / "rows.jsonl"])
right = judge_benchmark.evaluate(loaded, bench, engines=planted.engine()).report.own[0].value
source = RewardConfig(name="judge", kind="judge", paths=[str(path)])
config = ppo.PpoConfig(model="none", out="none", rewards=[source])
with opened(config, engines=planted.engine()) as (sources, _):
    texts = ["good answer to it", "bad 2 answer to it"]
    rewarded = rewards.score(sources, ["Question 1?"] * 2, texts).total
found = {
    "state": done.state,
    "scores": len(done.frame("scores")),
    "preferences": len(done.frame("preferences")),
    "audited": audit.pairs,
    "audit asked": audit.asked,
    "right": right,
    "rewards": rewarded,
    "in the schema": [
        "politely" in json.dumps(json_schema(bundled_only)) for bundled_only in (False, True)
    ],
}
print(json.dumps(found))
