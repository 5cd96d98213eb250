"""Rollouts by vLLM: against a scripted server that answers, dies and lies, and once against the
real one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from prefab.factory.engines.vllm_process import VllmProcess, command_line, environment
from prefab.factory.errors import EngineError, TransportError
from prefab.trainers.common import Lora, TrainError, checkpoints, load_policy
from prefab.trainers.rl import (
    batches,
    checkpoint,
    grpo,
    loop,
    ppo,
    rewards,
    rollout,
    rollout_vllm,
    sampling,
)
from tests.support import answer_world as aw
from tests.support import kill_ppo_driver, two_ppo_driver

torch.set_num_threads(1)
WORLD = aw.World(length=3)
IDS = [[1, 2], [1, 3], [1, 2, 3]]


class Script:
    """What servers do, one after the other: `calls` they answer before they die (None: they live).
    Keeps what it heard."""

    def __init__(self, *lives: int | None, reply=None, status=200, emptied=True) -> None:
        self.lives, self.started, self.stopped = list(lives), 0, 0
        self.reply, self.status, self.emptied = reply or answer, status, emptied
        self.heard: list[tuple[str, dict]] = []

    def __call__(self, config, folder, port, name, progress, logs):
        return Scripted(self, port)

    def asked(self, path="/v1/completions"):
        return [body for at, body in self.heard if at == path]


class Scripted:
    """One server of a script, in the place of `prefab.factory.engines.vllm_process.Process`."""

    def __init__(self, script: Script, port: int) -> None:
        self.script, self.port, self.left, self.server = script, port, None, None
        self.key = "key-of-this-server-1"

    async def start(self) -> None:
        if not self.script.lives:
            raise EngineError("no memory for it")
        self.left = self.script.lives.pop(0)
        self.script.started += 1
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, found = scripted.answer(self.path, json.loads(body or b"{}"))
                if status == 0:  # dead
                    self.close_connection = True
                    return
                raw = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                return 0, {}
        self.script.heard.append((path, body))
        if path == "/collective_rpc" or path.startswith(("/sleep", "/wake_up")):
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": self.script.emptied}
        return self.script.status, self.script.reply(body)

    def why_dead(self):
        return "vLLM ended (status 137)" if self.left is not None and self.left < 0 else None

    async def stop(self) -> None:
        self.script.stopped += 1
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()


def answer(body, ids=None, logps=None):
    """As vLLM answers: the prompt's last token, then the end."""
    ids = [body["prompt"][-1], aw.END] if ids is None else ids
    return {
        "choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps or [-1.0] * len(ids)}}]
    }


@pytest.fixture
def make(models, tmp_path):
    """A run, and what samples for it by a script."""

    def made(script: Script | None = None, **changes):
        config = kill_ppo_driver.config(
            models, tmp_path / "out", sampler="vllm", **{"reference": None, **changes}
        )
        t = ppo.prepare_run(config, list(WORLD.prompts) * 5, rewards.single(WORLD.reward))
        checkpoint.restore(t)
        if script is not None:
            t.sampler = rollout_vllm.VllmSampler(t, script)
            t.sampler.patience_s = 0.5
        return t

    return made


def same_weights(model, folder):
    served = dict(load_policy(str(folder)).named_parameters())
    return all(torch.equal(p, served[n]) for n, p in model.named_parameters())


def shift(t, by=0.1):
    """An update of a sort: other weights, the next step."""
    with torch.no_grad():
        for p in t.policy.parameters():
            p.add_(by)
    t.state.step += 1


def test_answers_come_in_the_order_of_their_prompts_each_with_a_seed_of_its_own(make):
    script = Script(None)
    t = make(script, temperature=0.7)
    done = t.sampler.sample(IDS, 5)
    assert [a.prompt for a in done] == IDS and [a.ids for a in done] == [
        [p[-1], aw.END] for p in IDS
    ]
    assert all(a.ended and a.sampler_logps == [-1.0, -1.0] for a in done)
    again, other = t.sampler.sample(IDS, 5), t.sampler.sample(IDS, 6)
    assert again == done == other
    seeds = [{tuple(b["prompt"]): b["seed"] for b in script.asked()[k : k + 3]} for k in (0, 3, 6)]
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0].values())) == 3
    body = script.asked()[0]
    assert (
        body["temperature"],
        body["max_tokens"],
        body["stop_token_ids"],
        body["ignore_eos"],
    ) == (0.7, 3, [aw.END], True)
    t.sampler.stop()


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_weights_are_pushed_once_after_each_update(make, lora):
    script = Script(None)
    t = make(script, lora=lora)
    t.sampler.sample(IDS, 0)
    served = t.sampler.folder
    assert not script.asked("/collective_rpc"), "it starts from the policy as it is"
    for _ in range(2):
        shift(t)
        t.sampler.sample(IDS, 0)
        t.sampler.sample(IDS, 1)
    assert script.asked("/collective_rpc") == [{"method": "take_policy"}] * 2
    assert [path for path, _ in script.heard[3:6]] == [
        "/collective_rpc",
        "/reset_prefix_cache",
        "/v1/completions",
    ]
    whole = t.policy.merge_and_unload() if lora else t.policy
    assert same_weights(whole, served)
    t.sampler.stop()


def test_one_that_dies_is_started_again_with_the_weights_of_the_moment(make, capsys):
    script = Script(7, None)  # three answers, a push of two calls, two answers
    t = make(script)
    t.sampler.sample(IDS, 0)
    shift(t)
    done = t.sampler.sample(IDS, 1)
    assert len(done) == 3 and (script.started, script.stopped) == (2, 1)
    assert same_weights(t.policy, t.sampler.folder) and len(script.asked("/collective_rpc")) == 1
    assert (
        "vLLM failed at step 2 and is started once more: vLLM ended (status 137)"
        in capsys.readouterr().err
    )
    t.sampler.stop()


@pytest.mark.parametrize("lives", [(4, 2), (4,)])  # it dies again; it does not start again
def test_one_that_dies_twice_stops_the_run_with_all_of_it_saved(make, lives):
    script = Script(*lives)
    t = make(script)
    t.sampler.sample(IDS, 0)
    shift(t)
    with pytest.raises(
        TrainError, match="failed twice, the second time at step 2(.|\n)*is saved in .*checkpoint-1"
    ):
        t.sampler.sample(IDS, 1)
    assert script.stopped == 2 and t.sampler.process is None
    found = make()
    assert found.state.step == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.policy.parameters(), t.policy.parameters(), strict=True)
    )


def test_one_that_does_not_start_at_all_is_told_as_it_is(make):
    with pytest.raises(EngineError, match="^no memory for it$"):
        make(Script()).sampler.sample(IDS, 0)


def test_a_refusal_stops_the_run_and_no_server_is_started_for_it(make):
    script = Script(
        None, status=400, reply=lambda body: {"error": {"message": "the prompt is too long"}}
    )
    t = make(script)
    with pytest.raises(
        TrainError, match="refused at step 1: HTTP 400 the prompt is too long(.|\n)*checkpoint-0"
    ):
        t.sampler.sample(IDS, 0)
    assert script.started == 1
    t.sampler.stop()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": []}, "0 answers to one prompt"),
        ({"choices": [{}, {}]}, "2 answers to one prompt"),
        ({}, "no answers to one prompt"),
        ({"choices": [{"text": "a b"}]}, "tokens without their log-probabilities"),
        (
            {"choices": [{"token_ids": [2, 1], "logprobs": {"token_logprobs": [-1.0]}}]},
            "without their log-prob",
        ),
        (
            {"choices": [{"token_ids": [2, 1], "logprobs": {"token_logprobs": [-1.0, None]}}]},
            "not a finite number",
        ),
        (
            {
                "choices": [
                    {"token_ids": [2, 1], "logprobs": {"token_logprobs": [-1.0, float("nan")]}}
                ]
            },
            "not a finite number",
        ),
        (
            {"choices": [{"token_ids": [1, 2, 1], "logprobs": {"token_logprobs": [-1.0] * 3}}]},
            "after the end",
        ),
        (
            {"choices": [{"token_ids": [2] * 4, "logprobs": {"token_logprobs": [-1.0] * 4}}]},
            "4 tokens, of 3 at most",
        ),
    ],
)
def test_what_is_no_answer_is_told(make, reply, words):
    t = make(Script(None, reply=lambda body: reply))
    with pytest.raises(TrainError, match=f"cannot be read: .*{words}"):
        t.sampler.sample(IDS[:1], 0)
    t.sampler.stop()


def test_an_answer_that_is_broken_off_is_no_short_answer():
    with pytest.raises(TransportError, match="broken off after 1 token "):
        rollout_vllm.answer_of([1], answer({}, [2]), 3, [aw.END])
    assert not rollout_vllm.answer_of([1], answer({}, [2, 2, 2]), 3, [aw.END]).ended


def test_a_cache_that_is_not_emptied_is_a_failure(make):
    t = make(
        Script(None, 3, emptied=False)
    )  # the second one dies in the push after its own first step
    t.sampler.sample(IDS, 0)
    shift(t)
    assert len(t.sampler.sample(IDS, 0)) == 3 and t.sampler.failures == 1
    t.sampler.stop()


def test_stale_weights_show_in_the_gap_and_stop_the_run(make):
    t = make(Script(None))  # a log-probability of -1 whatever the token: some other policy's
    with pytest.raises(
        TrainError,
        match="nats a token from training's at step 1, and rounding makes less than 0.001",
    ):
        loop.step(t)
    assert [p.name for p in checkpoints(t.sampler.folder.parent)] == ["checkpoint-0"]
    t.sampler.check(0.0009)
    t.sampler.stop()


def test_the_server_is_told_what_sampling_for_training_needs(make, models):
    t = make(Script(), vllm={"args": ["--seed", "3"], "kv_cache_gib": 0.5})
    process = VllmProcess(t.sampler.config, str(models / "policy"), 1, "policy", None)
    words = command_line(process)
    assert (
        words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    )  # at the sampling temperature
    assert words[words.index("--max-model-len") + 1] == str(2 + 3) and words[-2:] == ["--seed", "3"]
    assert environment(process)["VLLM_SERVER_DEV_MODE"] == "1"


def test_server_and_weights_go_with_the_run(make):
    t = make()
    with pytest.raises(KeyboardInterrupt), sampling.running_sampler(t):
        found = t.sampler
        found.launch = script = Script(None)
        found.sample(IDS, 0)
        assert found.folder.is_dir()
        raise KeyboardInterrupt
    assert script.stopped == 1 and not found.folder.exists()


class Served:
    """GRPO whose answers come from a script that tells their log-probabilities truly."""

    def __init__(self, models, folder, script: Script) -> None:
        self.script, self.seen, self.lock, self.loaded = script, [], threading.Lock(), {}
        script.reply = self.reply
        changes = {"steps": 4, "batch_size": 8, "normalise": "none", "save_every": 100}
        config = two_ppo_driver.grpo_config(
            models, folder, method="grpo", sampler="vllm", **changes
        )
        self.t = grpo.prepare_run(config, two_ppo_driver.PROMPTS, rewards.single(WORLD.reward))
        checkpoint.restore(self.t)

    def reply(self, body):
        """One or two words, drawn by the seed, then the end."""
        words = [2 + body["seed"] // 7 % 3, 2 + body["seed"] // 3 % 3][: 1 + body["seed"] % 2]
        one = rollout.SampledAnswer(body["prompt"], [*words, aw.END], [], True)
        with torch.no_grad():
            logps, *_ = rollout.forward(self.policy(), batches.pack([one], "cpu"), 1.0)
        return answer(body, one.ids, logps[0].tolist())

    def policy(self):
        """The weights that the server was last told to read."""
        reads = self.script.started, len(self.script.asked("/collective_rpc"))
        with self.lock:
            if reads not in self.loaded:
                self.loaded = {reads: load_policy(str(self.t.sampler.folder)).eval()}
            return self.loaded[reads]

    def train(self):
        with sampling.running_sampler(self.t):
            self.t.sampler.launch, self.t.sampler.patience_s = self.script, 0.5
            loop._steps(self.t, None, [], [], self.seen.append)
        checkpoint.finish(self.t)
        return {m["step"]: m for m in self.seen}


def same_policies(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(
            load_policy(str(a / "policy")).parameters(),
            load_policy(str(b / "policy")).parameters(),
            strict=True,
        )
    )


def test_grpo_has_the_same_sampler_and_goes_on_where_its_server_failed(models, tmp_path):
    script = Script(None)
    seen = Served(models, tmp_path / "whole", script).train()
    assert list(seen) == [1, 2, 3, 4]
    assert max(m["sampler_gap"] for m in seen.values()) < 1e-6 and "importance" not in seen[2]
    assert len(script.asked("/collective_rpc")) == 3 and len(script.asked()) == 4 * 8
    assert script.stopped == 1 and not (tmp_path / "whole/served").exists()
    dies = Script(2 * 8 + 2 + 3, 4)  # in the third step, and again at once
    with pytest.raises(TrainError, match="failed twice(.|\n)*at step 3(.|\n)*checkpoint-2"):
        Served(models, tmp_path / "cut", dies).train()
    rest = Served(models, tmp_path / "cut", Script(None))
    assert rest.t.state.step == 2 and list(rest.train()) == [3, 4]
    assert same_policies(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("lora", [None, Lora(rank=8)])
def test_the_served_policy_is_the_trained_one(tmp_path, lora):
    """Two updates so large that nobody could take one policy for the next, on a model whose head is
    tied to its embedding."""
    pytest.importorskip("vllm")
    from prefab.factory.microworld import grammar

    prompts = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", 16, 3)
    ]
    config = ppo.PpoConfig(
        model="prefab-nano",
        out=str(tmp_path / "out"),
        sampler="vllm",
        steps=2,
        batch_size=16,
        epochs=1,
        max_new_tokens=24,
        temperature=0.8,
        learning_rate=3e-2 if lora else 3e-3,
        value_learning_rate=1e-3,
        kl_stop=None,
        lora=lora,
        normalise="none",
        threads=1,
        vllm={"kv_cache_gib": 0.1, "args": ["--enforce-eager"]},
    )
    t = ppo.prepare_run(
        config, prompts, rewards.single(lambda prompts, texts: [float(len(text)) for text in texts])
    )
    policies, gaps = [], []
    with sampling.running_sampler(t):
        for _ in range(2):
            policies.append({n: p.detach().clone() for n, p in t.policy.named_parameters()})
            gaps.append(loop.step(t)["sampler_gap"])
        answers = t.sampler.sample(t.prompt_ids, 9)
        again = t.sampler.sample(t.prompt_ids, 9)
    assert max(gaps) < 1e-3 and sum(a == b for a, b in zip(answers, again, strict=True)) > 12

    def gap():
        with torch.no_grad():
            packed = batches.pack(answers, "cpu")
            logps, *_ = rollout.forward(t.policy, packed, config.temperature)
        return rollout.sampler_gap(answers, logps, packed.mask_BT)[0]

    assert gap() < 1e-3
    for old in policies:
        with torch.no_grad():
            for name, p in t.policy.named_parameters():
                p.copy_(old[name])
        assert gap() > 0.05


@pytest.mark.slow
@pytest.mark.vllm
def test_grpo_is_served_by_vllm_with_the_weights_that_train(tmp_path):
    """Updates so large that the gap of one policy before (.05 and more) would stop the run."""
    pytest.importorskip("vllm")
    from prefab.factory.microworld import grammar

    prompts = [
        [{"role": m.role, "content": m.content} for m in p.messages]
        for p in grammar.prompts("train", 16, 3)
    ]
    config = grpo.GrpoConfig(
        model="prefab-nano",
        out=str(tmp_path / "out"),
        sampler="vllm",
        sample_ahead=True,
        save_every=2,
        steps=4,
        batch_size=16,
        group=4,
        max_new_tokens=24,
        temperature=0.8,
        learning_rate=3e-3,
        schedule="constant",
        kl_stop=None,
        normalise="none",
        threads=1,
        vllm={"kv_cache_gib": 0.1, "args": ["--enforce-eager"]},
    )
    seen = []
    length = rewards.single(lambda prompts, texts: [float(len(text)) for text in texts])
    grpo.run(config, prompts, length, on_step=seen.append)
    gaps = [m["sampler_gap"] for m in seen]
    assert ["importance" in m for m in seen] == [False, True, False, True]
    assert max(gaps[0], gaps[2]) < 1e-3 and min(gaps[1], gaps[3]) > 0.01


def test_answers_are_sampled_ahead_by_the_weights_before_the_update(make):
    """The weights are pushed before anything is asked, and are not pushed again for the answers."""
    script = Script(None)
    t = make(script)
    t.sampler.sample(IDS, 0)
    shift(t)
    wait = t.sampler.ahead(IDS, 5)
    served = t.sampler.folder
    assert same_weights(t.policy, served)
    shift(t)  # the update, at once: the server keeps what it has
    found = wait()
    assert found is not None and [a.prompt for a in found] == IDS
    assert not same_weights(t.policy, served)
    paths = [path for path, _ in script.heard]
    asked = paths.index("/collective_rpc"), paths.index("/reset_prefix_cache")
    assert paths.count("/collective_rpc") == 1 and asked == (3, 4) and len(paths) == 8
    t.sampler.sample(IDS, 6)
    assert same_weights(t.policy, served)
    t.sampler.stop()


def test_a_server_that_dies_while_it_samples_ahead_is_begun_again_by_the_next_sample(make):
    script = Script(5, None)  # three answers, then the two requests of a push
    t = make(script)
    t.sampler.sample(IDS, 0)
    shift(t)
    assert t.sampler.ahead(IDS, 5)() is None and script.started == 1
    assert [a.prompt for a in t.sampler.sample(IDS, 5)] == IDS and script.started == 2
    t.sampler.stop()


def test_a_server_sleeps_while_the_policy_is_updated(make):
    script = Script(None)
    t = make(script, vllm={"sleep": True})
    assert "--enable-sleep-mode" in t.sampler.config.args
    t.sampler.sample(IDS, 0)
    shift(t)
    t.sampler.sample(IDS, 1)
    paths = [path for path, _ in script.heard if path != "/v1/completions"]
    assert paths == [
        "/sleep?level=2",
        "/wake_up?tags=weights",
        "/collective_rpc",
        "/wake_up?tags=kv_cache",
        "/reset_prefix_cache",
        "/sleep?level=2",
    ]
    t.sampler.stop()
