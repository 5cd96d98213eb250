"""The transformers engine against transformers itself, on a random tiny model."""

from __future__ import annotations

import asyncio
import shutil
import sys
from dataclasses import replace
from math import exp
from types import ModuleType
from typing import Any

import pytest

from prefab.factory.engines import hf
from prefab.factory.engines.base import make
from prefab.factory.engines.hf import Job
from prefab.factory.errors import EngineError, RequestRefused
from prefab.factory.keys import model_identity, request_key
from prefab.factory.types import Completion, Message, Request, Sampling
from tests.support.tinymodel import SPECIALS, build

torch = pytest.importorskip("torch")
LABELS = ("A", "B", "T", " A", " B", " T")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(folder, runner):
    engine = make({"engine": "hf", "model": str(folder)}, "hf")
    runner.run(engine.start())
    yield engine
    runner.run(engine.stop())


def request(text: str, labels=(), repeat=(), **sampling) -> Request:
    return Request(
        "m", (Message("user", text),), Sampling(**{"max_tokens": 1, **sampling}), labels, (), repeat
    )


async def ask(engine, *requests):
    asks = (engine.complete(request_key(r), r) for r in requests)
    return await asyncio.gather(*asks, return_exceptions=True)


def test_identity_and_control_tokens(engine, folder):
    assert engine.identity == model_identity(str(folder), "float32")
    assert set(engine.special_tokens) == set(SPECIALS) and engine.max_model_len == 512


def test_transformers_is_imported_by_one_engine_at_a_time(folder, runner, monkeypatch):
    """Its first import fails in one of two threads that begin it together."""
    locked = []

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("Auto"):
                locked.append(hf._LOADING.locked())
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "transformers", Lazy("transformers"))
    with pytest.raises(EngineError, match="needs"):
        runner.run(make({"engine": "hf", "model": str(folder)}, "hf").start())
    assert locked and all(locked)


def test_label_reads_equal_the_models_own_logits(engine, runner):
    texts = [
        "Which answer?",
        "Which answer asks the caller for less private information? Answer A, B or T.",
    ]
    answers = runner.run(ask(engine, *[request(t, LABELS) for t in texts]))
    for text, answer in zip(texts, answers, strict=True):
        turns = [{"role": "user", "content": text}]
        written = engine.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        ids = engine.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logps = engine.model(ids).logits[0, -1].log_softmax(-1)
        for label in LABELS:
            (token,) = engine.tokenizer(label, add_special_tokens=False)["input_ids"]
            assert answer.label_logps[label] == pytest.approx(float(logps[token]), abs=1e-4)
        assert answer.exactness == "exact" and answer.prompt_tokens == ids.shape[1]
        assert sum(map(exp, answer.label_logps.values())) < 1


def reads(engine, job, drawn):
    """The labels' log-probabilities at each of the drawn tokens."""
    with torch.inference_mode():
        logits_TV = engine.model(torch.tensor([job.ids + drawn])).logits[0]
    logps_TV = logits_TV[len(job.ids) - 1 : -1].float().log_softmax(-1)
    return [engine._labels_of(logps_V, job.request.labels) for logps_V in logps_TV]


def test_a_label_in_a_form_is_read_at_its_own_token(engine, runner):
    said, asked = "<think>A or B?</think>Answer:", request("Which answer?", LABELS, max_tokens=64)
    new = engine.tokenizer(said, add_special_tokens=False)["input_ids"]
    ids = engine._chat_ids(asked.messages, {})
    with torch.inference_mode():
        logps = engine.model(torch.tensor([ids + new])).logits[0, -1].log_softmax(-1)
    token_of = {x: engine.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in LABELS}
    best = max("ABT", key=lambda x: max(float(logps[token_of[x]]), float(logps[token_of[" " + x]])))
    for label in "ABT":
        drawn = [*new, token_of[" " + label], *engine.tokenizer("\n\nIt is.")["input_ids"]]
        text = engine.tokenizer.decode(drawn)
        job = Job(ids, 0, asked, None)
        found = engine._with_labels(job, Completion(text, "stop"), drawn, reads(engine, job, drawn))
        if label == best:
            assert found.exactness == "exact"
            for name, token in token_of.items():
                assert found.label_logps[name] == pytest.approx(float(logps[token]), abs=1e-4)
        else:  # the model would rather say another label: no probability is invented for this one
            assert (found.label_logps, found.exactness) == (None, "hard")
    (free,) = runner.run(ask(engine, asked))
    assert free.completion_tokens > 1 and (free.label_logps is None) == (free.exactness == "hard")


def test_the_first_word_of_a_text_is_read_at_its_first_token(engine, runner):
    asked = request("Which fault?", ("None", "Fault", " None", " Fault"), max_tokens=64)
    runner.run(ask(engine, asked))
    ids = engine._chat_ids(asked.messages, {})
    job, said = Job(ids, 0, asked, None), "- Fault: none is named. Fault"
    drawn = engine.tokenizer(said, add_special_tokens=False)["input_ids"]
    at_each = reads(engine, job, drawn)
    found = engine._with_labels(job, Completion(said, "stop"), drawn, at_each)
    before = len(engine.tokenizer("-", add_special_tokens=False)["input_ids"])
    assert found.label_logps == at_each[before][0] and found.exactness == "exact"
    other = engine._with_labels(job, Completion("It is rude.", "stop"), drawn, at_each)
    assert (other.label_logps, other.exactness) == (None, "hard")


DROPS = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize("template", [DROPS, REFUSES])
def test_a_template_without_a_system_turn_gets_its_text_in_the_first_user_turn(
    folder, tmp_path, runner, template, capsys
):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    engine = make({"engine": "hf", "model": str(tmp_path / "model")}, "odd")
    runner.run(engine.start())
    try:
        assert runner.run(engine.probe())["system_role"] is False
        assert "engines.odd: takes no system turn" in capsys.readouterr().err
        user = Message("user", "Hello")
        both = engine._chat_ids((Message("system", "Be strict."), user), {})
        assert engine.tokenizer.decode(both).startswith("<|im_start|>user\nBe strict.\n\nHello<")
        if template is REFUSES:
            (found,) = runner.run(ask(engine, replace(request("x"), messages=(user, user))))
            assert isinstance(found, RequestRefused) and "must alternate" in str(found)
    finally:
        runner.run(engine.stop())


def test_greedy_text_equals_generate(engine, runner):
    requests = [
        request(t, max_tokens=12) for t in ("hello", "Please tell me your name, and I will look.")
    ]
    answers = runner.run(ask(engine, *requests))
    for asked, answer in zip(requests, answers, strict=True):
        written = engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked.messages[0].content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        ids = engine.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = engine.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert answer.text == engine.tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True
        )


def test_a_drawn_answer_depends_on_its_key_alone(engine, runner):
    draws = [request("go", (), (i,), max_tokens=8, temperature=1.0, seed=0) for i in range(4)]
    together = runner.run(ask(engine, *draws))
    (alone,) = runner.run(ask(engine, draws[2]))
    assert alone.text == together[2].text
    assert len({a.text for a in together}) == 4


def test_stop_strings_length_and_context(engine, runner):
    long = request("hello", max_tokens=8)
    whole, cut, over = runner.run(
        ask(
            engine,
            long,
            replace(long, sampling=Sampling(8, top_k=1, temperature=1.0, seed=0)),
            request("fox " * 600),
        )
    )
    assert whole.finish == "length" and whole.completion_tokens == 8 and cut.text == whole.text
    assert over.finish == "context" and over.limit == 512 and over.text == ""
    stop = whole.text[len(whole.text) // 2]
    (stopped,) = runner.run(ask(engine, replace(long, sampling=Sampling(8, stop=(stop,)))))
    assert stopped.finish == "stop" and stopped.text == whole.text.split(stop)[0]


def test_a_label_of_several_tokens_is_refused(engine, runner):
    (answer,) = runner.run(ask(engine, request("q", ("A", "12345", " 12345"))))
    assert isinstance(answer, EngineError) and "'12345'" in str(answer)


def test_choose_follows_its_filters():
    from prefab.factory.engines.hf import choose

    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    hot = Sampling(1, temperature=1.0, seed=0)

    def drawn(sampling, new=()):
        return {
            choose(logits, sampling, [0], list(new), torch.Generator().manual_seed(i))
            for i in range(200)
        }

    assert drawn(hot) == {0, 1, 2, 3}
    assert drawn(replace(hot, top_k=2)) == {0, 1}
    assert drawn(replace(hot, top_p=0.6)) == {0}  # softmax: .644 .237 .087 .032
    assert drawn(replace(hot, top_p=0.7)) == {0, 1}
    assert drawn(replace(hot, min_p=0.3)) == {0, 1}  # of the best: 1, .37, .14, .05
    assert drawn(Sampling(1, frequency_penalty=0.6), (0, 0)) == {1}
    assert drawn(Sampling(1, presence_penalty=1.5), (0,)) == {1}
    assert drawn(Sampling(1, repetition_penalty=2.0)) == {1}


def test_no_such_model_says_so():
    engine = make({"engine": "hf", "model": "/nowhere/at-all"}, "hf")
    with pytest.raises(EngineError, match="/nowhere/at-all"):
        asyncio.run(engine.start())
