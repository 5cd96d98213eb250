"""What a model is asked, as its chat template writes it; and every step of a few prompts."""

from __future__ import annotations

import json

import pytest

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.pipelines.run.preview import preview
from prefab.pipelines.run.rendering import render_calls, split_control
from prefab.pipelines.run.runner import run
from tests.support import project


def embedded(folder, **changes):
    value = project.pipeline(folder, **changes)
    return {**value, "engines": {"local": {"engine": "vllm", "model": "prefab-tiny"}}}


def test_the_text_of_the_chat_template_with_its_control_tokens_and_length(tmp_path):
    (call,) = render_calls("pairwise", embedded(tmp_path))
    assert call.text.startswith("<|im_start|>system\nYou judge")
    assert call.text.endswith("<|im_start|>assistant\n")
    assert call.control_tokens == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert len(call.text) / 8 < call.tokens < len(call.text) / 2
    assert call.waits and not call.answered and call.text.count("(not written yet)") == 2
    assert call.labels == ["A", "B", "T", " A", " B", " T"] and call.max_tokens == 1
    assert "".join(part for part, _ in split_control(call.text, call.control_tokens)) == call.text


def test_it_is_what_a_run_asks(tmp_path):
    value = project.pipeline(tmp_path, revise={"rounds": 1})
    asked = {}

    def note(request):
        asked[tuple((m.role, m.content) for m in request.messages)] = request
        return project.answer(request)

    run(value, engines={"local": Scripted(ScriptedConfig(), note)})
    for name in ("policy", "critique", "revise", "pairwise.jinja", "judge"):
        found = render_calls(name, value, sample=3)
        assert len({call.prompt for call in found}) == 3
        for call in found:
            assert tuple(call.messages) in asked and call.answered and not call.waits
            assert call.text is None and call.tokens > 0  # nobody has this model's tokenizer


def test_a_name_that_is_not_used(tmp_path):
    with pytest.raises(ConfigError, match=r'pairwize.*did you mean "pairwise'):
        render_calls("pairwize", project.pipeline(tmp_path))
    with pytest.raises(ConfigError, match="asks nothing with it"):
        render_calls("critique", project.pipeline(tmp_path))  # it does not revise


def test_a_preview_shows_every_step_and_leaves_the_store_alone(tmp_path):
    value = project.pipeline(tmp_path, revise={"rounds": 1})
    found = preview(value, 2, engines=project.engine())
    assert len(found.prompts) == 2 and not (tmp_path / "store" / "ledger.sqlite").exists()
    titles = [step.title for step in found.prompts[0].steps]
    assert titles[:3] == ["draft 0", "draft 1", "draft 2"]
    assert "critique of 0 under kind: a fault" in titles
    revised = next(title for title in titles if title.startswith("revision"))
    assert titles.index("critique of 0 under kind: a fault") < titles.index(revised)
    verdicts = [title for title in titles if title.startswith("judge on")]
    assert len(verdicts) == 12  # three pairs, two orders, two principles
    assert "judge on 0 and 1 under kind, first shown first: 0" in verdicts
    assert titles[-1] == "preference between 1 and 2: 1"
    assert all(step.text for step in found.prompts[0].steps[:3])
    again = preview(value, 2, engines=project.engine())
    assert (again.asked, again.run) == (0, found.run)
    assert json.dumps(again.data())
    assert preview(value, 2, seed=1, engines=project.engine()).run != found.run
