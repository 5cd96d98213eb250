"""`prefab eval judge`: one judge of a pipeline on a benchmark of judges, or verdicts that were
saved before.

What is asked is kept in a ledger of its own, `STORE/eval`: a second evaluation asks nothing, and no
statistic or export of the store's own runs ever meets a benchmark's answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefab.factory.console import Progress
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.numbers import Measured
from prefab.factory.spec import bounded, data_files
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.types import Comparison, Engine, Principle, Prompt, Sample, Verdict
from prefab.judges.base import Judge, Score
from prefab.judges.benchmarks import adapters, metrics
from prefab.judges.benchmarks.adapters import Item, Judged
from prefab.judges.registry import judge_of
from prefab.pipelines.config.loader import ResolvedPipeline, find_judge
from prefab.pipelines.run import judging
from prefab.pipelines.run.asking import (
    asking_session,
    engine_for,
    kinds_with_engine,
    record_evaluation,
)
from prefab.pipelines.run.context import Context

AT_WORK = 128  # items in work at once: bounds what waits in memory
NAMELESS = (
    "dataset",
    "data",
    "task",
    "test",
    "train",
    "validation",
    "filtered",
)  # files named after nothing


@dataclass(slots=True)
class Bench:
    """A benchmark's items, and the rows that are none. `files` have their digests, for the
    record.
    """

    name: str
    items: dict[str, Item]
    rows: int
    problems: list[Problem]
    files: list[dict[str, Any]]


@dataclass(slots=True)
class Result:
    """A judge's report on a benchmark. `asked` and `reused` count calls; of saved verdicts there
    are none.
    """

    judge: str
    model: str
    bench: Bench
    report: adapters.Report
    problems: list[Problem]
    asked: int = 0
    reused: int = 0

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "judge": self.judge,
            "model": self.model,
            "benchmark": self.bench.name,
            "items": len(self.bench.items),
            "rows": self.bench.rows,
            "bad_rows": len(self.problems),
            "problems": [str(p) for p in self.problems[:20]],
            "files": self.bench.files,
            **asdict(self.report),
            "asked": self.asked,
            "reused": self.reused,
        }


def read_benchmark(name: str, files: Sequence[str | Path]) -> Bench:
    """Read a benchmark of judges from local files. Rows that cannot be read are listed in
    `problems`.

    Args:
        name: `rewardbench`, `rewardbench-2`, `judgebench`, `llmbar`, `mt-bench-human` or `hhh`.
        files: Its files: JSONL, JSON, CSV or Parquet.

    Raises:
        ConfigError: The benchmark is unknown, a file cannot be read, or no row can be used.
    """
    if name not in adapters.BENCHMARKS:
        raise ConfigError(
            f"there is no benchmark {name!r}; {did_you_mean(name, adapters.BENCHMARKS)}"
        )
    bench = Bench(name, {}, 0, [], [])
    for file in map(Path, files):
        for number, line, value in data_files.rows(file):
            bench.rows += 1
            try:
                if isinstance(value, ValueError):
                    raise value
                nested = _nested(value, name) if file.suffix.lower() in (".csv", ".tsv") else value
                item = adapters.adapt(name, nested, _subset(file), number)
                bench.items[item.id] = adapters.collect(bench.items, item)
            except (ValueError, TypeError) as error:
                bench.problems.append(_problem(file, number, line, error))
        with bounded.open_regular(file) as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        bench.files.append({"file": file.name, "sha256": digest})
    if not bench.items:
        raise ConfigError(bench.problems[:20] or f"{', '.join(map(str, files))}: holds no rows")
    return bench


def _problem(file: Path, number: int, line: int, error: Exception) -> Problem:
    return Problem(str(file), line, 1 if line else 0, f"row {number}", str(error))


def _subset(file: Path) -> str:
    """What a file is called: where its name says nothing, its folder's."""
    return (
        file.parent.name
        if file.stem in NAMELESS or file.stem.startswith(("test-", "train-"))
        else file.stem
    )


def _nested(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Lists and objects, which a CSV file holds as JSON."""
    columns = {
        "rewardbench-2": ("chosen", "rejected"),
        "mt-bench-human": ("conversation_a", "conversation_b"),
        "hhh": ("targets",),
    }.get(name, ())
    return {
        column: bounded.read_json(value) if column in columns and isinstance(value, str) else value
        for column, value in row.items()
    }


def score_saved(bench: Bench, file: str | Path) -> Result:
    """Score verdicts that were saved in a file; no model is called.

    Args:
        bench: The benchmark.
        file: The verdicts, as `prefab eval judge --out FILE` writes them.

    Raises:
        ConfigError: The file cannot be read, or has no verdict on this benchmark.
    """
    judged, problems, n = Judged(), list(bench.problems), 0
    for number, line, value in data_files.rows(Path(file)):
        try:
            if isinstance(value, ValueError):
                raise value
            adapters.saved(value, bench.items, judged)
            n += 1
        except (ValueError, TypeError) as error:
            problems.append(_problem(Path(file), number, line, error))
    if not n:
        raise ConfigError(problems[len(bench.problems) :][:20] or f"{file}: holds no verdicts")
    report = metrics.score(bench.name, list(bench.items.values()), judged)
    return Result(Path(file).name, "", bench, report, problems)


def evaluate(
    loaded: ResolvedPipeline,
    bench: Bench,
    judge: str = "",
    principle: str = "",
    store: str | Path | None = None,
    out: str | Path | None = None,
    engines: Mapping[str, Engine] | None = None,
    quiet: bool = True,
) -> Result:
    """Evaluate a judge on a benchmark. Pairs are judged in both orders; answers are kept and
    reused.

    Args:
        loaded: The pipeline of the judge.
        bench: The benchmark, from `read_benchmark`.
        judge: Its name in `panel.judges`; default: the first.
        principle: A principle of the constitution; default: which answer is better overall.
        store: The store whose folder `eval/` keeps the calls; default: the pipeline's.
        out: A file to save the verdicts in.
        engines: Engines to use in place of those that the pipeline would start, by name.
        quiet: Do not show progress.

    Raises:
        ConfigError: The judge or the principle does not exist.
        EngineError: An engine does not start or fails.
        StoreError: The store is damaged.
    """
    config = find_judge(loaded, judge, kinds_with_engine("pair", "one"))
    config = judge_of(config.config.model_copy(update={"repeats": 1}))
    under = _principle(loaded, principle)
    engine, folder = engine_for(loaded, config, engines), Path(store or loaded.config.store)
    return asyncio.run(
        _evaluate(loaded, bench, config, under, folder, Path(out) if out else None, engine, quiet)
    )


def _principle(loaded: ResolvedPipeline, name: str) -> Principle:
    known = {principle.id: principle for principle in loaded.constitution.principles}
    if name and name not in known:
        raise ConfigError(
            f'the constitution has no principle "{name}"; {did_you_mean(name, known)}'
        )
    return known[name] if name else adapters.OVERALL


async def _evaluate(
    loaded: ResolvedPipeline,
    bench: Bench,
    judge: Judge[Any],
    principle: Principle,
    folder: Path,
    out: Path | None,
    engine: Engine,
    quiet: bool,
) -> Result:
    described = {"recipe": "eval", "benchmark": bench.name, "principle": principle.id}
    prompts = [Prompt(f"{bench.name}:{item.id}", item.prompt) for item in bench.items.values()]
    name, folder = f"eval-{bench.name}", folder / "eval"
    async with asking_session(
        loaded, judge, engine, folder, name, described, prompts, quiet=quiet
    ) as session:
        judged = await _judged(bench, judge, principle, session.ctx, quiet)
        report = metrics.score(bench.name, list(bench.items.values()), judged)
        value = {
            "name": f"judge on {bench.name}",
            "subject": judge.name,
            "run": session.ctx.run,
            "model": engine.identity,
            "files": bench.files,
            "metrics": _metrics(report),
        }
        session.ledger.add_eval(value)
    await record_evaluation(folder.parent, value)
    if out is not None:
        write(judged, out)
    return Result(
        judge.name,
        engine.identity,
        bench,
        report,
        bench.problems,
        session.asked,
        session.reused,
    )


def _metrics(report: adapters.Report) -> dict[str, Any]:
    return {line.name: line.value for line in (*report.own, *report.ours)} | {
        "unscored": sum(report.unscored.values())
    }


async def _judged(
    bench: Bench, judge: Judge[Any], principle: Principle, ctx: Context, quiet: bool
) -> Judged:
    """Every item's pairs to the judge, some items at once."""
    judged = Judged()
    with Progress(f"{judge.name} on {bench.name}", len(bench.items), quiet, "items") as progress:
        await progress.over(
            bench.items.values(),
            lambda item: _ask(item, bench.name, judge, principle, ctx, judged),
            AT_WORK,
        )
    return judged


async def _ask(
    item: Item, bench: str, judge: Judge[Any], principle: Principle, ctx: Context, judged: Judged
) -> None:
    prompt = Prompt(f"{bench}:{item.id}", item.prompt)
    samples = [Sample(prompt.id, i, text) for i, text in enumerate(item.answers)]
    pairs = []
    for i, j in item.comparisons():
        if samples[i].text == samples[j].text:  # nobody is asked which of two equal texts is better
            judged.verdicts[item.id, i, j] = dict.fromkeys(("ab", "ba"), Verdict(0.5, "tie"))
        else:
            pairs.append((i, j))
    heard = await judging.judge(
        judge, [(Comparison(prompt, samples[i], samples[j]), [principle]) for i, j in pairs], ctx
    )
    for i, j in pairs:
        question = (Comparison(prompt, samples[i], samples[j]), [principle])
        ab, ba = judging.verdicts_by_order(judge, heard, question, principle)
        if judge.ordered:
            judged.verdicts[item.id, i, j] = {"ab": ab, "ba": ba}
        elif ab.reason != "transport":  # one verdict, which has no order
            judged.verdicts[item.id, i, j] = {"ab": ab}
    if not judge.ordered:
        _note_scores(item, {k for pair in pairs for k in pair}, judge, heard, judged)


def _note_scores(
    item: Item, compared: set[int], judge: Judge[Any], heard: judging.Responses, judged: Judged
) -> None:
    """Each answer's score, greater for the better answer, or why there is none."""
    scores = {one.use.sample: one.value for one in heard if isinstance(one.value, Score)}
    for i in range(len(item.answers)):
        score = scores.get(i, Score(None, reason="transport"))
        if i in compared:
            judged.scores[item.id, i] = judge.merit(score)
        if score.reason:
            judged.reasons[item.id, i] = score.reason


def write(judged: Judged, out: Path) -> None:
    """Verdicts and scores as `--verdicts` reads them again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for (name, a, b), orders in judged.verdicts.items():
            for order, verdict in orders.items():
                row = {
                    "id": name,
                    "a": a,
                    "b": b,
                    "order": order,
                    "p_a": verdict.p_a,
                    "winner": verdict.winner,
                    "reason": verdict.reason,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for (name, answer), score in judged.scores.items():
            row = {
                "id": name,
                "answer": answer,
                "score": score,
                "reason": judged.reasons.get((name, answer)),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


COLUMNS = (
    "metric",
    "unread counted as wrong",
    "of those read",
    "of",
    "read",
    "unread counted as right",
)


def shown(lines: Sequence[adapters.BenchmarkLine]) -> list[tuple[Any, ...]]:
    """Metrics as rows of a table. Benchmarks count a verdict that could not be read as wrong, so
    that comes first; then the value of those that were read.
    """
    rows: list[tuple[Any, ...]] = []
    for line in lines:
        value = line.undefined if line.value is None else Measured(line.value, line.low, line.high)
        unread = line.scored < line.n
        told = (line.worst if unread else value, value if unread else None)
        rows.append((line.name, *told, line.n, line.scored, line.best if unread else None))
    return rows
