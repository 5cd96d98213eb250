"""`prefab eval policy`: checkpoints on the same held-out prompts, against a baseline, recorded and
tabulated.

In the embedded world the oracle gives the gold score; elsewhere there is none, and the proxy stands
alone and is called so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from prefab.factory import charts
from prefab.factory.console import Progress
from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest
from prefab.factory.numbers import counted
from prefab.factory.spec import yamlio
from prefab.factory.types import Prompt
from prefab.pipelines.config.checks import MICROWORLD, locate
from prefab.pipelines.config.schema import PromptsConfig
from prefab.pipelines.evaluation import policy_metrics
from prefab.pipelines.evaluation.policy_metrics import Against, PolicyAnswer
from prefab.pipelines.evaluation.sycophancy import Probe, load_items
from prefab.trainers.common import (
    Strict,
    load_policy,
    load_tokenizer,
    model_folder,
    record_eval,
    seed_everything,
)


class HeldOut(PromptsConfig):
    """Prompts as of a pipeline; left out: 500 of the embedded world's test split."""

    source: str = MICROWORLD
    split: Literal["train", "val", "test"] | None = "test"
    limit: int | None = Field(500, ge=1)


class PolicyEvalConfig(Strict):
    """Which policies answer which prompts."""

    policies: dict[str, str] = Field(
        min_length=1, description="By name: a folder, an embedded model or a hub name."
    )
    baseline: str = Field(
        "",
        description="The name of the policy that the others are set against; left out: the first.",
    )
    reference: str | None = Field(
        None, description="The model that KL is measured from; left out: the baseline's."
    )
    prompts: HeldOut = HeldOut()
    sampler: Literal["transformers", "vllm"] = Field(
        "transformers", description="vllm: each policy is served in turn."
    )
    vllm: dict[str, Any] = Field(
        {}, description="More of the engine's fields for sampler: vllm, such as tensor_parallel."
    )
    samples: int = Field(4, ge=1, le=64)
    max_new_tokens: int = Field(96, ge=1)
    seed: int = 0
    batch: int = Field(64, ge=1)
    threads: int | None = Field(None, ge=1)
    reward: str | None = Field(
        None, description="A reward model's folder, for the proxy score and best-of-n."
    )
    best_of: list[int] = Field(
        [], description="Also the best of so many of the baseline's answers, by the reward model."
    )
    judge: str | None = Field(
        None,
        description="A pipeline file whose first judge also compares, under all its principles; "
        "its model must not have labelled the training data.",
    )
    judge_samples: int = Field(
        1, ge=1, description="Answers to each prompt that the judge compares."
    )
    constitution: str | None = Field(
        None, description="Whose weights the gold score takes; left out: all weigh the same."
    )
    store: str | None = Field(None, description="Where the results are recorded.")
    out: str | None = Field(
        None, description="A folder for answers.jsonl, report.html and report.png."
    )
    template_kwargs: dict[str, Any] = {}
    sycophancy: str | None = Field(
        None,
        description="A file of questions with two choices (prompts/sycophancy.jsonl), asked "
        "plainly and with an opinion before them.",
    )

    @model_validator(mode="after")
    def _names(self) -> PolicyEvalConfig:
        if self.baseline and self.baseline not in self.policies:
            raise ValueError(
                f"the baseline {self.baseline!r} is none of the policies; "
                f"{yamlio.did_you_mean(self.baseline, self.policies)}"
            )
        if self.best_of and (self.reward is None or max(self.best_of) > self.samples):
            raise ValueError(
                "best_of needs a reward model, and as many samples as the largest of its numbers"
            )
        if self.vllm and self.sampler != "vllm":
            raise ValueError("vllm: says how policies are served, which needs sampler: vllm")
        return self


@dataclass(slots=True)
class Report:
    """Figures of each policy (`Estimate`s by name), and each policy against the baseline."""

    baseline: str
    prompts: int
    groups: int
    samples: int
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: dict[str, Against] = field(default_factory=dict)
    value: str = "gold"
    notes: list[str] = field(default_factory=list)
    store: str | None = None

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def run(path: str | Path | None = None, sets: Iterable[str] = (), quiet: bool = False) -> Report:
    """Evaluate policies on held-out prompts, against a baseline.

    Args:
        path: A configuration file; default: none, with all fields in `sets`.
        sets: Overrides of fields, for example `["policies={base: prefab-tiny, sft: trained/sft}"]`.
        quiet: Do not show progress.

    Raises:
        ConfigError: Every mistake in the configuration.
    """
    from prefab.pipelines.config.schema import _override as override

    document = yamlio.load_document(Path(path)) if path else yamlio.Document("--set", "", {})
    for text in sets:
        override(document, text)
    return evaluate_policies(yamlio.validate(document, PolicyEvalConfig), quiet)


def evaluate_policies(config: PolicyEvalConfig, quiet: bool = False) -> Report:
    """Sample, measure, compare, record."""
    if config.out:
        charts.ready("the report (without `out` there is none)")
    prompts = held_out(config)
    baseline = config.baseline or next(iter(config.policies))
    report = Report(
        baseline,
        len(prompts),
        len({p.group or p.id for p in prompts}),
        config.samples,
        notes=_split_notes(config, prompts),
    )
    probe = Probe(load_items(locate(config.sycophancy, Path.cwd()))) if config.sycophancy else None
    found = sample_all(config, prompts, quiet, probe)
    for n in config.best_of:
        chosen, most = policy_metrics.best_of(found[baseline], n)
        found[f"{baseline}, best of {n}"] = chosen
        report.notes.append(f"best of {n}: at most {most:.2f} nats from {baseline}")
    _measure(config, report, prompts, found)
    if probe:
        for name in config.policies:
            report.policies[name] |= probe.figures(name, baseline, config.seed)
            report.notes += probe.notes(name)
    if config.judge:
        _by_judge(config, report, prompts, found, quiet)
    report.store = config.store
    _record(config, report, prompts, found)
    if probe and config.out:
        probe.write(Path(config.out) / "sycophancy.jsonl")
    return report


def _split_notes(config: PolicyEvalConfig, prompts: Sequence[Prompt]) -> list[str]:
    """A note on prompts of unknown split, where the configuration asks for no split."""
    loose = sum(p.split is None for p in prompts)
    return (
        [
            f"{counted(loose, 'prompt has', 'prompts have')} no split: whether a policy was trained on them is not known"
        ]
        if loose and not config.prompts.split
        else []
    )


def _measure(
    config: PolicyEvalConfig,
    report: Report,
    prompts: Sequence[Prompt],
    found: Mapping[str, Sequence[PolicyAnswer]],
) -> None:
    """Into the report: the figures of each policy, and its comparison with the baseline by gold,
    or by proxy where there is no gold.
    """
    if all(a.gold is not None for some in found.values() for a in some):
        report.value = "gold"
    elif config.reward:
        report.value = "proxy"
        report.notes.append("no gold score: proxy is a reward model's score, not the truth")
    else:
        report.value = ""
        report.notes.append("no gold score: name a reward model to compare by")
    tagged = ["harmful" in p.tags for p in prompts]
    for name, some in found.items():
        report.policies[name] = policy_metrics.figures(
            some, tagged if any(tagged) else None, config.seed
        )
        if report.value and name != report.baseline:
            base = found[report.baseline]
            if len(some) < len(base):  # best of n: one answer to each prompt
                base = base[:: config.samples]
            report.against[name] = policy_metrics.against(
                some, base, value_of(report.value), config.seed
            )


def _by_judge(
    config: PolicyEvalConfig,
    report: Report,
    prompts: Sequence[Prompt],
    found: Mapping[str, Sequence[PolicyAnswer]],
    quiet: bool,
) -> None:
    """Into the report: each policy's first answers against the baseline's, compared by a judge."""
    from prefab.pipelines.evaluation.win_rate import judge_pairs, own_answers_note

    report.notes += own_answers_note(str(config.judge), config.policies)
    folder = Path(config.store or tempfile.mkdtemp(prefix="prefab-")) / "eval"
    labelled = [i for path in config.policies.values() for i in labelled_by(model_folder(path))]

    def first(name: str) -> list[PolicyAnswer]:
        return [a for i, a in enumerate(found[name]) if i % config.samples < config.judge_samples]

    for name in config.policies:
        if name == report.baseline:
            continue
        pairs = policy_metrics.paired(first(name), first(report.baseline))
        asked = [(prompts[a.prompt], a.text, b.text) for a, b in pairs]
        judge, verdicts = judge_pairs(str(config.judge), asked, folder, labelled, quiet)
        gaps = {k: verdict.gap for k, verdict in enumerate(verdicts) if verdict.gap is not None}
        report.against[f"{name}, by {judge}"] = policy_metrics.compared(
            [pairs[k] for k in gaps], list(gaps.values()), config.seed
        )
        if unscored := len(pairs) - len(gaps):
            report.notes.append(
                f"{unscored:,} of {len(pairs):,} pairs of {name} are unscored by {judge}"
            )


def labelled_by(folder: str) -> list[str]:
    """The identities of the models whose labels a policy was trained on, from the record beside its
    weights.
    """
    file = Path(folder) / "training.json"
    lineage = json.loads(file.read_text()).get("lineage", []) if file.is_file() else []
    return [identity for line in lineage for identity in line.get("labelled_by", ())]


def value_of(name: str) -> Any:
    """The number that answers are compared by: the oracle's score, or the reward model's."""
    return (lambda a: a.gold["gold"]) if name == "gold" else (lambda a: a.proxy)


def held_out(config: PolicyEvalConfig) -> list[Prompt]:
    """The prompts. Raises: ConfigError where there are none, or some belong to training."""
    from prefab.pipelines.config.prompts import Prompts

    prompts = list(Prompts(config.prompts))
    train = [p for p in prompts if p.split == "train"]
    if train:
        raise ConfigError(
            f"prompts: {len(train):,} of {len(prompts):,} are of the train split, where policies have been "
            "trained. Write prompts.split: test (or val)"
        )
    if n := sum(any(m.more for m in p.messages) for p in prompts):
        raise ConfigError(
            f"prompts: {n:,} of {len(prompts):,} have tools or tool calls, which an evaluation does not "
            "pass on. Leave them out"
        )
    return prompts


def sample_all(
    config: PolicyEvalConfig,
    prompts: Sequence[Prompt],
    quiet: bool = False,
    probe: Probe | None = None,
) -> dict[str, list[PolicyAnswer]]:
    """Every policy's answers to every prompt, with gold where the oracle knows the world and proxy
    where there is one.

    A `probe` is given each policy's answers to its own questions.
    """
    from prefab.trainers import collate
    from prefab.trainers.offline.reward import scorer

    seed_everything(config.seed, config.threads)
    turns = [[{"role": m.role, "content": m.content} for m in p.messages] for p in prompts]
    questions: list[Sequence[Sequence[Mapping[str, str]]]] = [turns]
    if probe:
        questions.append(probe.turns)
    drawn: dict[str, Any] = {}
    if (
        config.sampler == "vllm"
    ):  # before any model is loaded here: one accelerator holds one thing at a time
        from prefab.pipelines.evaluation.vllm_sampling import draw_all

        drawn = draw_all(config, questions, quiet)
    reference = load_policy(
        config.reference or config.policies[config.baseline or next(iter(config.policies))]
    )
    collate.add_scored_forward(reference.eval())
    score = scorer(config.reward, config.batch) if config.reward else None
    found: dict[str, list[PolicyAnswer]] = {}
    with Progress("answering", len(config.policies), quiet, "policies") as progress:
        for name, folder in config.policies.items():
            tokenizer, model = load_tokenizer(folder), load_policy(folder)
            collate.add_scored_forward(model)
            policy_metrics.same_vocabulary(
                name, model.config.vocab_size, reference.config.vocab_size
            )
            mine = drawn.pop(name, None) or [
                policy_metrics.draw(
                    model,
                    tokenizer,
                    some,
                    config.samples,
                    config.max_new_tokens,
                    policy_seed(config.seed, name),
                    config.batch,
                    config.template_kwargs,
                )
                for some in questions
            ]
            some = policy_metrics.measured(
                model, tokenizer, mine[0], config.samples, reference, config.batch
            )
            found[name] = with_truth(some, prompts, turns, score, config)
            if probe:
                probe.add(
                    name,
                    [(tokenizer.decode(a.ids, skip_special_tokens=True), a.ended) for a in mine[1]],
                    config.samples,
                )
            progress.advance()
    return found


def policy_seed(seed: int, policy: str) -> int:
    """The sampling seed of one policy, a function of the run's seed and the policy's name.

    With one seed for all, policies that are alike would give equal answers, and a win rate over the
    decided pairs would be higher than between answers drawn independently.
    """
    return int(digest(f"{seed}/{policy}")[:15], 16)


def with_truth(
    found: Sequence[PolicyAnswer],
    prompts: Sequence[Prompt],
    turns: Any,
    score: Any,
    config: PolicyEvalConfig,
) -> list[PolicyAnswer]:
    """The answers with the oracle's reading and the reward model's score."""
    from dataclasses import replace

    gold: Sequence[dict[str, float] | None] = [None] * len(found)
    if config.prompts.source == MICROWORLD:
        gold = [gold_of(prompts[a.prompt], a.text, weights_of(config.constitution)) for a in found]
    proxy = (
        score([[*turns[a.prompt], {"role": "assistant", "content": a.text}] for a in found])
        if score
        else [None] * len(found)
    )
    return [
        replace(
            a, gold=g, proxy=None if p is None else float(p), group=prompts[a.prompt].group or ""
        )
        for a, g, p in zip(found, gold, proxy, strict=True)
    ]


def gold_of(prompt: Prompt, text: str, weights: Any = None) -> dict[str, float]:
    """What the oracle reads in an answer, as numbers."""
    from prefab.factory.microworld import oracle

    read = oracle.assess(prompt.messages, text, weights)
    return {
        "gold": read.score,
        "broken": float(read.faulty),
        "faults": float(len(read.broken)),
        "helps": float(read.helps),
        "coherent": float(read.coherent),
        "refuses": float("refusal" in read.broken),
        "complies": float("harm" in read.broken),
        "flatters": float("flattery" in read.broken),
    }


def weights_of(constitution: str | None) -> dict[str, float] | None:
    """The weights of a constitution's principles, for the gold score."""
    if constitution is None:
        return None
    from prefab.factory.spec.constitution import load_constitution

    loaded = load_constitution(locate(constitution, Path.cwd()))
    return {p.id: p.weight for p in loaded.principles if p.enabled}


def _record(
    config: PolicyEvalConfig,
    report: Report,
    prompts: Sequence[Prompt],
    found: dict[str, list[PolicyAnswer]],
) -> None:
    from prefab.factory.keys import model_identity
    from prefab.pipelines.evaluation.report import examples, write_cards, write_report

    shown = examples(report, prompts, found)
    for name, figures in report.policies.items():
        metrics = {
            k: {
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "n": e.n_items,
                "groups": e.n_groups,
            }
            for k, e in figures.items()
        }
        for what, compared in report.against.items():
            if what == name or what.startswith(f"{name}, by "):
                by = what.removeprefix(name)
                metrics |= {
                    f"against {report.baseline}{by}: {k}": _bounds(getattr(compared, k))
                    for k in Against.__dataclass_fields__
                }
        folder = config.policies.get(name)
        record_eval(
            config.store,
            "eval policy",
            folder or name,
            metrics,
            policy=name,
            prompts=len(prompts),
            samples=report.samples,
            seed=config.seed,
            sampler=config.sampler,
            weights=model_identity(model_folder(folder)) if folder else None,
            examples=[
                {"turns": row["turns"], "text": text, "score": score}
                for row in shown
                for policy, text, score in row["answers"]
                if policy == name
            ],
        )
    if config.out:
        write_report(Path(config.out), report, prompts, found)
    write_cards(config.policies, report, shown)


def _bounds(value: Any) -> Any:
    return (
        value
        if isinstance(value, float)
        else {
            "value": value.value,
            "low": value.low,
            "high": value.high,
            "groups": value.n_groups,
        }
    )
