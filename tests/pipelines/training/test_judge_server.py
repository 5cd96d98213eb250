"""A judge as a server: what it says, whom it answers, what it asks once, and the clients for other
trainers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
from collections.abc import Iterator
from math import log
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from prefab import resolve_pipeline
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.types import Completion
from prefab.factory.types import Request as ModelRequest
from prefab.pipelines.training import judge_server
from prefab.pipelines.training.judge_server import serve_judge
from tests.support import project

ROOT = Path(__file__).resolve().parents[3]
KEY = "secret-key"


def grades(request: ModelRequest) -> Completion:
    """Grade 9 with probability 0.75, else 1; 0.25 for answers that say `bad`; no label for those
    that say `odd`."""
    text = request.messages[-1].content
    p, mass = 0.25 if "bad" in text else 0.75, 1e-3 if "odd" in text else 1.0
    logps = {label: log(1e-9) for label in request.labels}
    logps |= {"9": log(p * mass), "1": log((1 - p) * mass)}
    return Completion("9", "length", logps, "exact", 20, 1)


class Served:
    """A judge server on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.engine = Scripted(ScriptedConfig(), grades)
        value = project.pipeline(folder, panel={"judges": [{"name": "p", "kind": "pointwise"}]})
        self.loaded = resolve_pipeline(value)
        self.address, self._started = "", threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        def tell(address: str) -> None:
            self.address = address
            self._started.set()

        serve = judge_server._serve(self.loaded, "", 0, KEY, {"local": self.engine}, tell)
        self._task = self._loop.create_task(serve)
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._started.set()

    def __enter__(self) -> Served:
        self._thread.start()
        self._started.wait()
        assert self.address
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()

    def post(self, path: str, body: Any, key: str = KEY) -> Any:
        """The status and the reply."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = Request(self.address + path, data if body is not None else None, headers)
        try:
            with urlopen(request) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("judge")) as server:
        yield server


def test_a_score_comes_with_probability_and_principles_and_is_asked_once(served: Served) -> None:
    status, reply = served.post("/score", {"prompt": "Why?", "answer": "Because."})
    assert status == 200 and reply["score"] == pytest.approx(0.5, abs=1e-6)  # 2 * 0.75 - 1
    assert reply["probability"] == pytest.approx(0.75, abs=1e-6)
    assert [p["principle"] for p in reply["principles"]] == ["kind", "brief"]
    first = reply["principles"][0]
    assert first["value"] == pytest.approx(7.0, abs=1e-5) and len(first["probabilities"]) == 9
    asked = served.engine.total
    turns = [{"role": "user", "content": "Why?"}]
    answer = [{"role": "assistant", "content": "Because."}]
    again = {"items": [{"prompt": turns, "answer": answer}] * 3}
    assert served.post("/score", again) == (200, {"scores": [reply] * 3})
    assert served.engine.total == asked
    health = served.post("/health", None)[1]
    assert health["judge"] == "p" and health["constitution"] == "small"


def test_an_unscored_answer_is_null_or_the_clients_own_number(served: Served) -> None:
    reply = served.post("/score", {"prompt": "Why?", "answer": "odd"})[1]
    assert reply["score"] is None and reply["probability"] is None
    assert reply["principles"][0]["reason"] == "low_label_mass"
    texts = {"text_1": "Why?", "text_2": ["Because.", "odd"]}
    status, refused = served.post("/v1/score", texts)
    assert status == 422 and "low_label_mass" in refused["error"]
    data = served.post("/v1/score?unscored=0.1", texts)[1]["data"]
    assert [one["score"] for one in data] == [pytest.approx(0.75, abs=1e-6), 0.1]


def test_a_conversation_is_classified(served: Served) -> None:
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "bad"}]
    (found,) = served.post("/v1/classify", {"messages": talk})[1]["data"]
    assert found["label"] == "bad" and found["probs"] == pytest.approx([0.75, 0.25], abs=1e-6)
    assert len(served.post("/v1/classify", {"input": [talk, talk]})[1]["data"]) == 2


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/score", b"{", "not JSON"),
        ("/score", [], "not a JSON object"),
        ("/score", {"prompt": "Why?"}, "answer is missing"),
        ("/score", {"prompt": 3, "answer": "x"}, "a prompt is a text"),
        ("/score", {"prompt": [{"role": "u"}], "answer": "x"}, "a prompt is a text"),
        ("/score", {"prompt": "Why?", "answer": {}}, "an answer is a text"),
        ("/score", {"items": []}, "nothing to score"),
        ("/score", {"prompt": "\ud800", "answer": "x"}, "not JSON"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, ""),
        ("/v1/score?unscored=none", {"text_1": "a", "text_2": "c"}, "none"),
        ("/v1/classify", {"messages": []}, "ends with the answer"),
        ("/get_reward", {"prompts": ["a", "b"], "query": ["a"]}, "2 prompts and 1 texts"),
    ],
)
def test_a_wrong_request_is_refused_in_words(
    served: Served, path: str, body: Any, words: str
) -> None:
    status, reply = served.post(path, body)
    assert status == 422 and words in reply["error"]


@pytest.mark.parametrize("key", ["", "other", "é"])
def test_without_the_key_nothing_is_answered(served: Served, key: str) -> None:
    asked = served.engine.total
    status, reply = served.post(
        "/score", {"prompt": "New?", "answer": "x"}, key.encode().decode("latin-1")
    )
    assert status == 401 and "Bearer" in reply["error"] and served.engine.total == asked
    assert served.post(f"/score?key={KEY}", {"prompt": "Why?", "answer": "y"}, "")[0] == 200


def test_no_judge_of_single_answers_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of its judges is pointwise"):
        serve_judge(project.write(tmp_path, project.pipeline(tmp_path)), key=KEY)
    with pytest.raises(ConfigError, match="needs a key"):
        serve_judge(tmp_path / "pipeline.yaml")


# ---- clients ----


def client(name: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file with a client, told where the server is."""
    monkeypatch.setenv("PREFAB_JUDGE_URL", served.address)
    monkeypatch.setenv("PREFAB_JUDGE_KEY", KEY)
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_client_for_trl(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = client("examples/rewards/trl_reward.py", served, monkeypatch).judge_reward
    turns = [[{"role": "user", "content": "Why?"}]] * 3
    answers = [[{"role": "assistant", "content": text}] for text in ("Because.", "bad", "odd")]
    found = reward(prompts=turns, completions=answers, completion_ids=[[1]] * 3, trainer_state=None)
    assert found == [pytest.approx(0.5, abs=1e-6), pytest.approx(-0.5, abs=1e-6), None]
    assert reward(prompts=["Why?"], completions=["Because."]) == found[:1]


def test_the_client_for_verl(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    score = client("pipelines/store/export/verl_reward.py", served, monkeypatch).compute_score
    # Parquet gives lists of structs as arrays of dictionaries
    prompt = np.array([{"role": "user", "content": "Why?"}], dtype=object)
    row = {"data_source": "prefab/x", "ground_truth": "", "extra_info": {"prompt": prompt}}
    assert score(solution_str="bad", **row)["score"] == pytest.approx(-0.5, abs=1e-6)
    assert score(solution_str="odd", **row) == {"score": -1.0, "unscored": True}


def test_openrlhf_is_answered_as_it_asks(served: Served) -> None:
    """The body that `remote_rm_fn` of OpenRLHF 0.11.2 posts, and the fields that it reads."""
    body = {"query": ["Q: Why?\nBecause.", "Q: Why?\nbad", "odd"], "prompts": ["Q: Why?\n"] * 3}
    body["labels"] = ["", "", ""]
    status, reply = served.post(f"/get_reward?key={KEY}&unscored=-1", body, "")
    assert status == 200 and reply["extra_logs"] == {"unscored": pytest.approx(1 / 3)}
    assert reply["rewards"] == reply["scores"] == pytest.approx([0.5, -0.5, -1], abs=1e-6)
