"""A judge that `prefab judge serve` serves, as a custom reward function of verl.

    reward.custom_reward_function.path=verl_reward.py
    reward.custom_reward_function.name=compute_score

`prefab export --format verl` writes this file beside the rows, which carry the prompt in
`extra_info`. It needs no package beside Python's own. PREFAB_JUDGE_KEY holds the server's key,
PREFAB_JUDGE_URL its address.
"""

import json
import os
from typing import Any
from urllib.request import Request, urlopen

UNSCORED = -1.0  # the reward of an answer that the judge could not score


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **options: Any
) -> dict[str, Any]:
    """The reward of one answer, and what verl logs beside it."""
    prompt = [dict(turn) for turn in extra_info["prompt"]]
    request = Request(
        os.environ.get("PREFAB_JUDGE_URL", "http://127.0.0.1:8100") + "/score",
        json.dumps({"prompt": prompt, "answer": solution_str}).encode(),
        {"Authorization": f"Bearer {os.environ['PREFAB_JUDGE_KEY']}"},
    )
    with urlopen(request, timeout=600) as response:
        score = json.load(response)["score"]
    return {"score": UNSCORED if score is None else score, "unscored": score is None}
