"""A judge that `prefab judge serve` serves, as a reward function of TRL's GRPOTrainer.

    from trl_reward import judge_reward
    trainer = GRPOTrainer(model=..., reward_funcs=[judge_reward], ...)

It needs no package beside Python's own. PREFAB_JUDGE_KEY holds the server's key, PREFAB_JUDGE_URL
its address.
"""

import json
import os
from urllib.request import Request, urlopen


def judge_reward(prompts, completions, **columns):
    """One score from -1 to 1 for each completion; None for an answer that the judge could not
    score. TRL counts None as no reward of this function, which is 0 where it is the only one.
    """
    items = [
        {"prompt": prompt, "answer": completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    request = Request(
        os.environ.get("PREFAB_JUDGE_URL", "http://127.0.0.1:8100") + "/score",
        json.dumps({"items": items}).encode(),
        {"Authorization": f"Bearer {os.environ['PREFAB_JUDGE_KEY']}"},
    )
    with urlopen(request, timeout=600) as response:
        return [one["score"] for one in json.load(response)["scores"]]
