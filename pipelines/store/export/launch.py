"""Scripts that start another trainer on an export's prompts, rewarded by a judge that `prefab judge
serve` serves.
"""

from __future__ import annotations

HEAD = """#!/usr/bin/env bash
# GRPO by {trainer} on the prompts of this export, one machine; written for {trainer} {version}.
# The reward is a judge of a pipeline, which another terminal serves:
#
#     prefab judge serve PIPELINE.yaml --port 8100
#     MODEL=FOLDER GPUS=8 ./{script} [more settings of {trainer}]
#
# MODEL: the policy to begin with. GPUS: of this machine. BATCH: prompts a step, at most as many as
# there are. PREFAB_JUDGE_KEY: the key that the command prints; left out: read from its file.{more}
set -euo pipefail
cd "$(dirname "$0")"
: "${{MODEL:?the policy to begin with, a folder or a name on the hub}}"
GPUS=${{GPUS:-1}} BATCH=${{BATCH:-64}}
"""
KEY = """key=${PREFAB_JUDGE_KEY:-$(cat ~/.cache/prefab/keys/judge-8100.key)}
"""


def launch_script(
    trainer: str, version: str, script: str, command: str, before: str = KEY, more: str = ""
) -> str:
    """The text of a script that runs `command`.

    Args:
        trainer: Its name.
        version: The version whose settings the command has.
        script: The script's own file name.
        command: The last part of the script.
        before: Lines that set what the command uses.
        more: Comment lines about further variables.
    """
    head = HEAD.format(trainer=trainer, version=version, script=script, more=more)
    return head + before + command
