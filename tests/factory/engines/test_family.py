"""Servers that behave as model families and providers do: what the probe finds, what is asked
otherwise, and that nothing is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from prefab.factory.engines.base import make
from prefab.factory.engines.family import Family, learned, without_system
from prefab.factory.errors import EngineError, RequestRefused
from prefab.factory.keys import request_key
from prefab.factory.thinking import split_thinking
from prefab.factory.types import Completion, Message, Request, Sampling
from prefab.judges.kinds.critique import parse_critique
from tests.support.family_server import THOUGHTS, family_server

LABELS = ("A", "B", " A", " B")
OFF = (("enable_thinking", False),)


def engine(url: str, **config):
    settings = {"engine": "openai", "model": "mock", "base_url": f"{url}/v1", "canary_every": 0}
    found = make({**settings, **config}, "api")
    found.mute()
    return found


def read(text: str = "Which is better, A or B?", system: str = "", kwargs=OFF) -> Request:
    turns = [Message("system", system)] if system else []
    return Request("m", (*turns, Message("user", text)), Sampling(1), LABELS, kwargs)


def draft(text: str = "Can I come?", kwargs=(), **sampling) -> Request:
    return Request("m", (Message("user", text),), Sampling(64, **sampling), (), kwargs)


def answers(one, *requests: Request, probe: bool = True) -> list[Completion | Exception]:
    async def work():
        await one.start()
        try:
            if probe:
                await one.probe()
            asks = (one.complete(request_key(r), r) for r in requests)
            return await asyncio.gather(*asks, return_exceptions=True)
        finally:
            await one.stop()

    return asyncio.run(work())


def test_a_usual_model_has_nothing_unusual_and_is_probed_once():
    with family_server() as server:
        one = engine(server.url)
        (label,) = answers(one, read())
        assert Family.of(one.findings) == Family() and Family().notes() == []
        assert len(server.bodies) == 2 and label.exactness == "bounds"
        assert server.bodies[1]["max_tokens"] == 1 and server.bodies[1]["temperature"] == 0.0


@pytest.mark.parametrize("probe", [True, False])
def test_a_model_without_a_system_turn_gets_its_text_in_the_first_user_turn(probe):
    with family_server(system="refused") as server:
        one = engine(server.url)
        found = answers(one, read(system="Be strict."), read(system="Be kind."), probe=probe)
        assert all(set(a.label_logps) == {"A", "B"} for a in found)
        assert server.bodies[-1]["messages"] in [
            [{"role": "user", "content": f"{words}\n\nWhich is better, A or B?"}]
            for words in ("Be strict.", "Be kind.")
        ]
        if probe:
            assert server.counts["400"] == 1 and one.findings["system_role"] is False


@pytest.mark.parametrize("probe", [True, False])
def test_gpt5_takes_other_fields_one_temperature_and_gives_hard_labels(probe):
    with family_server(gpt5=True, refuses=("top_p", "presence_penalty")) as server:
        one = engine(server.url)
        label, text = answers(one, read(), draft(temperature=1.0, seed=0), probe=probe)
        assert (label.label_logps, label.exactness, label.text) == (None, "hard", "A")
        assert text.text == "Yes, you can come."
        body = server.bodies[-1]
        assert "max_completion_tokens" in body and "max_tokens" not in body
        assert "temperature" not in body and "logprobs" not in body and "top_p" not in body
        if probe:  # nothing is refused after the probe
            assert [b for b in server.bodies if "max_tokens" in b] == server.bodies[:1]
            notes = Family.of(one.findings).notes()
            assert len(notes) == 4 and any("labels are hard" in note for note in notes)


@pytest.mark.parametrize("logprobs", ["refused", "absent"])
def test_without_log_probabilities_labels_are_hard(logprobs):
    with family_server(logprobs=logprobs) as server:
        one = engine(server.url)
        (label,) = answers(one, read())
        assert (label.text, label.exactness, one.findings["logprobs"]) == ("A", "hard", False)
        assert "logprobs" not in server.bodies[-1]


@pytest.mark.parametrize("think", ["open", "close", "apart"])
def test_thinking_that_can_be_stopped_is_stopped_at_label_reads(think):
    with family_server(think=think) as server:
        one = engine(server.url)
        label, text = answers(one, read(), draft())
        assert one.findings["thinking"] == "unless_told"
        assert set(label.label_logps) == {"A", "B"}
        assert server.bodies[-1]["max_tokens"] in (1, 64 + 2048)
        assert THOUGHTS in text.text and text.text.endswith("Yes, you can come.")


@pytest.mark.parametrize("think", ["open", "close", "apart"])
def test_a_model_that_always_thinks_is_read_at_its_verdict(think):
    with family_server(think=think, deaf=True) as server:
        one = engine(server.url)
        (label,) = answers(one, read())
        assert one.findings["thinking"] == "always"
        assert server.bodies[-1]["max_tokens"] == 1 + 2048
        assert label.text.endswith("</think>\n\nA") or label.text.endswith("</think>\n\n A")
        assert label.label_logps["A"] > label.label_logps["B"]


FORMS = [
    ("Answer: {}", "bounds"),
    ("Answer: ** {} **", "bounds"),
    ("A is short and B is long.\n\nAnswer: {} . It is kinder than A .", "bounds"),
    # a token with more than the label in it: which token is whose is not known
    ("Answer: {} \n\nB is kinder than A", "hard"),
    ("**{}**", "hard"),  # one token with its marks: its probability is not among the labels'
    ("[[{}]]", "hard"),
]


@pytest.mark.parametrize(("form", "exactness"), FORMS)
@pytest.mark.parametrize("think", [None, "open", "close", "apart"])
def test_a_label_in_a_form_is_read_at_its_own_token(form, exactness, think):
    with family_server(think=think, deaf=True, form=form, label="B") as server:
        asked = replace(read(), sampling=Sampling(64))
        (found,) = answers(engine(server.url), asked)
        if exactness == "bounds":
            assert found.exactness == "bounds"
            assert found.label_logps["B"] > found.label_logps["A"] > -2
        else:
            assert (found.label_logps, found.exactness) == (None, "hard")


CRITIQUE_LABELS = ("None", "Fault", " None", " Fault")


@pytest.mark.parametrize(
    ("said", "p_fault"),
    [
        ("Fault: None of it is kind. A Fault.", 0.75),
        ("None.", 0.25),
        ("- **Fault**: it is rude.", 0.75),
        ("It is rude.", None),
        ("None of it is kind.", None),
        ("Fault: it is rude.\nVerdict: None", None),  # it names both
    ],
)
@pytest.mark.parametrize("think", [None, "open", "close", "apart"])
def test_the_first_word_of_a_critique_is_read_at_its_own_token(said, p_fault, think):
    with family_server(think=think, deaf=True, critique=said) as server:
        asked = Request(
            "m", (Message("user", "Reply with None."),), Sampling(64), CRITIQUE_LABELS, OFF
        )
        (found,) = answers(engine(server.url), asked)
        body = server.bodies[-1]
    read = parse_critique(found, labels=("None", "Fault"))
    assert read.p_fault == (p_fault and pytest.approx(p_fault))
    assert (found.exactness == "hard") == (p_fault is None) and body["top_logprobs"] == 5


def test_the_thoughts_labels_are_not_the_critiques(monkeypatch):
    monkeypatch.setattr("tests.support.family_server.THOUGHTS", "Is it None or a Fault? I think")
    with family_server(think="open", deaf=True, critique="Fault: it is rude.") as server:
        asked = Request(
            "m", (Message("user", "Reply with None."),), Sampling(64), CRITIQUE_LABELS, OFF
        )
        (found,) = answers(engine(server.url), asked)
    assert parse_critique(found, labels=("None", "Fault")).p_fault == pytest.approx(0.75)


def test_a_thought_that_the_template_opened_and_the_length_cut_off_is_known_as_one():
    with family_server(think="close", deaf=True) as server:
        one = engine(server.url, thinking_tokens=4)
        asked = replace(draft(), sampling=Sampling(4))
        (found,) = answers(one, asked)
        assert one.findings["opens_thinking"] is True and found.finish == "length"
        assert not split_thinking(found.text).finished
    with family_server() as server:  # another model's answer that is cut off is an answer
        (found,) = answers(engine(server.url), replace(draft(), sampling=Sampling(2)))
        assert (found.text, found.finish) == ("Yes, you", "length")


@pytest.mark.parametrize("think", [None, "apart"])
def test_log_probabilities_of_another_token_than_the_answers_are_not_the_labels(think):
    with family_server(think=think, logprobs="of_thoughts") as server:
        (found,) = answers(engine(server.url), read())
        assert (found.text, found.label_logps, found.exactness) == ("A", None, "hard")


def test_hidden_thinking_gets_room():
    with family_server(think="hidden", deaf=True) as server:
        one = engine(server.url)
        label, text = answers(one, read(), draft())
        assert one.findings["thinking"] == "always" and set(label.label_logps) == {"A", "B"}
        assert text.text == "Yes, you can come."


def test_an_unfinished_thought_is_no_label():
    with family_server(think="open", deaf=True) as server:
        (label,) = answers(engine(server.url, thinking_tokens=4), read())
        assert (label.label_logps, label.exactness, label.finish) == (None, "hard", "length")


def test_a_field_of_the_users_that_is_refused_is_told_and_not_left_out():
    with family_server(refuses=("top_p",)) as server:
        (found,) = answers(engine(server.url), draft(top_p=0.9))
        assert type(found) is RequestRefused and "'top_p' is not supported" in str(found)


def test_a_wrong_key_or_model_is_told_by_the_probe():
    with family_server() as server, pytest.raises(EngineError, match="OpenAI-compatible"):
        answers(engine(f"{server.url}/nothing"))


@pytest.mark.parametrize(
    ("message", "param", "body", "change"),
    [
        ("System role not supported", "", {}, {"system_role": False}),
        (
            "Conversation roles must alternate user/assistant/user/assistant/...",
            "",
            {},
            {"system_role": False},
        ),
        ("Developer instruction is not enabled for models/gemma", "", {}, {"system_role": False}),
        (
            "Unrecognized request argument supplied: chat_template_kwargs",
            "",
            {"chat_template_kwargs": {}},
            {"left_out": ("chat_template_kwargs",)},
        ),
        (
            "Invalid value: 'top_logprobs' must be less than or equal to 5.",
            "",
            {},
            {"top_logprobs": 5},
        ),
        ("Log probabilities are not supported with reasoning models", "", {}, {"logprobs": False}),
        ("seed: Extra inputs are not permitted", "", {}, {"left_out": ("seed",)}),
        ("max_tokens must be at most 4096", "max_tokens", {}, None),
        ("temperature must be between 0 and 2", "temperature", {}, None),
        ("Invalid prompt: your prompt was flagged", "", {}, None),
        ("frequency_penalty is not supported", "", {"frequency_penalty": 0.5}, None),
    ],
)
def test_what_a_refusal_teaches(message, param, body, change):
    sent = {"max_tokens": 9, "temperature": 0.0, "logprobs": True, "top_logprobs": 20, **body}
    found = learned(Family(), message, param, sent, has_system=True)
    assert found == (None if change is None else Family(**change))


def test_system_text_joins_the_first_user_turn():
    system, user, reply = (Message(r, r) for r in ("system", "user", "assistant"))
    assert without_system((system, user, reply, user)) == (
        Message("user", "system\n\nuser"),
        reply,
        user,
    )
    assert without_system((user, reply)) == (user, reply)
    assert without_system((system,)) == (Message("user", "system"),)
