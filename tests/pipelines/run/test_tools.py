"""Tools, calls and their results go through a whole run: to the policy, to judges, into the store
and out of it."""

from __future__ import annotations

import json

import polars as pl
import pytest

from prefab.pipelines.run.diff import diff
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query
from tests.support import project
from tests.support.family_server import CHOOSE, family_server

TOOL = {
    "type": "function",
    "function": {
        "name": "find_slot",
        "description": "Free slots of a day",
        "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_9",
    "type": "function",
    "function": {"name": "find_slot", "arguments": '{"day": "Tuesday"}'},
}
TALK = [
    {"role": "system", "content": "You book appointments."},
    {"role": "user", "content": "Have you anything on Tuesday?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_9", "name": "find_slot", "content": '["[call] 10:30"]'},
]


def made(folder, server):
    local = {"engine": "openai", "model": "mock", "base_url": f"{server.url}/v1"}
    source = project.pipeline(folder, engines={"local": local})
    row = {"messages": TALK, "tools": [TOOL], "split": "train"}
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    return source


@pytest.mark.slow_but("taken-called", "refused-written")
@pytest.mark.parametrize("tools", ["called", "written", "refused"])
@pytest.mark.parametrize("system", ["taken", "refused"])
def test_a_policy_that_calls_tools_is_judged_on_its_calls(tmp_path, tools, system, capsys):
    with family_server(tools=tools, system=system) as server:
        source = made(tmp_path, server)
        first, second = run(source, quiet=False), run(source)
        again = diff(str(tmp_path / "small.yaml"), store=tmp_path / "store", sample=2)
    assert (first.failed, first.unscored, second.asked) == (0, {}, 0)
    assert (again.comparisons, again.new.asked, again.moved) == (2, 0, [])
    assert ("no parser for tool calls" in capsys.readouterr().err) == (tools == "refused")
    asked = [body for body in server.bodies if body.get("tools")]
    sent = asked[-1]["messages"]
    assert asked[-1]["tools"] == [TOOL]
    assert (asked[-1].get("tool_choice") == "none") == (tools == "refused")
    assert sent[-2]["tool_calls"] == [CALL] and sent[-2]["content"] is None
    assert sent[-1] == TALK[-1]
    shown = [b["messages"][-1]["content"] for b in server.bodies if "You book" in str(b)]
    judged = next(text for text in shown if CHOOSE in text)
    assert "Tool find_slot(day): Free slots of a day" in judged
    assert 'Assistant: [call] find_slot({"day": "Tuesday"})' in judged
    assert 'Tool find_slot: ["[ call] 10:30"]' in judged
    assert judged.count('\n[call] find_slot({"day": "day ') == 2
    texts = query(tmp_path / "store", "SELECT text FROM samples WHERE run = 1")["text"].to_list()
    assert len(texts) == 3 and all(text.startswith("<tool_call>\n{") for text in texts)


def test_an_export_has_calls_as_trl_takes_them(tmp_path):
    with family_server() as server:
        run(made(tmp_path, server))
    export(tmp_path / "store", tmp_path / "out")
    (row,) = pl.read_parquet(tmp_path / "out/prompts/train.parquet").to_dicts()
    assert json.loads(row["tools"]) == [TOOL]
    assert row["prompt"][2]["tool_calls"][0]["function"] == CALL["function"]
    assert row["prompt"][1]["tool_calls"] is None
