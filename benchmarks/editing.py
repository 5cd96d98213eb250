"""What an edit of a constitution asks, whether the flips are the right ones, and how long it takes.

    prefab serve prefab-tiny --keep --idle-minutes 600
    python -m benchmarks.editing --store editing-store    # half an hour on two cores; goes on
    python -m benchmarks.editing --quick                  # the machinery, on few prompts

Every comparison of the embedded world is judged under twelve principles: its eleven, and one of
them in other words, since its judge knows eleven faults and no others. Then

- one principle's `compare` is put in other words: only its questions may be asked, and reverting
  the edit may ask nothing;
- single principles are reversed ("Which answer is more guilty of ...?"), and the share of flips is
  compared with what the oracle says. The embedded judge was never taught such a question and reads
  it as the usual one, so an engine in between asks it the usual one and exchanges the two labels;
- the flips of the first reversal must be those of judging all comparisons (or `--anew` of them)
  from nothing under the edited constitution, in a copy of the store that has forgotten every
  verdict;
- `prefab watch` follows a file of sixteen principles, one of which changes at each save."""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import asked, write
from prefab.factory.engines.base import make
from prefab.factory.microworld import grammar, oracle
from prefab.factory.types import Completion, Engine, Request
from prefab.pipelines.run.diff import Diff, diff
from prefab.pipelines.run.rejudge import panel_of, pipeline_of, rejudge
from prefab.pipelines.run.runner import RunResult, run
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.forget import AnswerFilter, forget

WORLD = Path(__file__).resolve().parents[1] / "constitutions" / "microworld.yaml"
AGAIN = ("respect", "flattery", "overclaim", "padding", "privacy")
REVERSED = "Which answer is more guilty of {g}?"
TIE_MARGIN = 0.02  # of the panel
ENGINE = {"engine": "vllm", "model": "prefab-tiny", "max_in_flight": 128}  # of the demo
Constitution = dict[str, Any]


def constitution(principles: int) -> Constitution:
    """The embedded world's constitution; principles beyond its eleven repeat some of them in other
    words.
    """
    value: Constitution = yaml.safe_load(WORLD.read_text())
    value |= {"id": f"world-{principles}", "tests": []}
    for name in AGAIN[: principles - len(value["principles"])]:
        words = {"t": grammar.FAULTS[name][2][0], "g": grammar.FAULTS[name][2][1]}
        fields = {field: frames[0].format(**words) for field, frames in grammar.FRAMES.items()}
        value["principles"].append({"id": f"{name}-again", "title": name, **fields})
    return value


def edited(value: Constitution, principle: str, compare: str) -> Constitution:
    """The constitution with another `compare` of one principle."""
    value = copy.deepcopy(value)
    next(p for p in value["principles"] if p["id"] == principle)["compare"] = compare
    return value


def other_words(principle: str) -> Iterator[str]:
    """Ways to put the question of a principle that its judge was trained on."""
    for frame in grammar.FRAMES["compare"]:
        for _, gerund in grammar.FAULTS[principle][:-1]:
            yield frame.format(g=gerund)


def save(folder: Path, name: str, value: Constitution) -> str:
    """Write a constitution; gives its path."""
    (folder / name).write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    return str(folder / name)


class Contrary(Engine):
    """An engine that is asked reversed questions: it asks the usual one and exchanges the labels A
    and B of the answer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.max_in_flight = engine, engine.max_in_flight
        self.identity, self.special_tokens = engine.identity, engine.special_tokens

    async def start(self) -> None:
        """Start the engine."""
        await self.engine.start()

    async def prepare(self, labels: tuple[str, ...]) -> None:
        """As the engine's."""
        await self.engine.prepare(labels)

    async def stop(self) -> None:
        """Stop the engine."""
        await self.engine.stop()

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The answer to the question, or to its contrary."""
        before, after = REVERSED.split("{g}")
        *others, last = request.messages
        if before not in last.content:
            return await self.engine.complete(key, request)
        head, _, rest = last.content.partition(before)
        fault, _, tail = rest.partition(after)
        usual = head + grammar.FRAMES["compare"][0].format(g=fault) + tail
        messages = (*others, replace(last, content=usual))
        said = await self.engine.complete(key, replace(request, messages=messages))
        logps = {_exchanged(label): logp for label, logp in (said.label_logps or {}).items()}
        return replace(said, text=_exchanged(said.text), label_logps=logps)


def _exchanged(label: str) -> str:
    return label.translate({ord("A"): "B", ord("B"): "A"})


def judged_world(
    folder: Path, prompts: int, engines: dict[str, Engine] | None = None
) -> tuple[RunResult, Constitution]:
    """A store of comparisons under twelve principles: all pairs of four drafts a prompt."""
    value = constitution(12)
    settings = {
        "store": str(folder / "store"),
        "name": "editing",
        "constitution": save(folder, "world.yaml", value),
        "pairs": "all",
    }
    sets = [f"{name}={text}" for name, text in settings.items()]
    sets += ["revise=null", "prompts.split=test", f"prompts.limit={prompts}"]
    return run("demo", sets, quiet=engines is not None, engines=engines), value


def one_principle(
    folder: Path, value: Constitution, engines: dict[str, Engine] | None = None
) -> tuple[dict[str, Any], Diff]:
    """Edit one principle, and take the edit back."""
    store, question = folder / "store", list(other_words("padding"))[1]
    new = save(folder, "edited.yaml", edited(value, "padding", question))
    found = diff(str(folder / "world.yaml"), new, store, "editing", engines=engines)
    back = diff(new, str(folder / "world.yaml"), store, "editing", engines=engines)
    return {
        "comparisons": found.comparisons,
        "asked": found.new.asked,
        "reused": found.new.reused,
        "asked_by_reverting": back.old.asked + back.new.asked,
        "flips": len(found.flips),
        "changes": found.changes,
    }, found


def judged_anew(
    folder: Path,
    found: Diff,
    engines: dict[str, Engine] | None = None,
    sample: int | None = None,
) -> dict[str, Any]:
    """The edited constitution of a diff, with every verdict asked again in a copy of the store."""
    store, copied = folder / "store", folder / "anew"
    if not copied.exists():
        copied.mkdir()
        shutil.copy(store / "ledger.sqlite", copied / "ledger.sqlite")
        forget(copied, AnswerFilter(role="judge"))
    panel = panel_of(store, "editing", sample)
    loaded = pipeline_of(panel, None, [])
    panel.path = copied
    assert found.new.constitution is not None
    done = rejudge(panel, found.new.constitution, loaded, engines is not None, engines)
    before, with_diff = outcomes(store, found.old.run), outcomes(store, found.new.run)
    from_nothing = outcomes(copied, done.run)
    flips = {place for place, now in from_nothing.items() if {before[place], now} == {"a", "b"}}
    shown = {(one.prompt, one.a, one.b) for one in found.flips} & from_nothing.keys()
    return {
        "comparisons": len(from_nothing),
        "asked": done.asked,
        "flips": len(flips),
        "flips_that_diff_found": len(flips & shown),
        "flips_that_only_diff_found": len(shown - flips),
        "same_outcomes": sum(with_diff[place] == now for place, now in from_nothing.items()),
    }


def outcomes(store: Path, number: int) -> dict[tuple[str, int, int], str]:
    """Each comparison's outcome in a run."""
    sql = "SELECT prompt, a, b, outcome FROM preferences WHERE run = $run AND NOT identical"
    return {row[:3]: row[3] for row in query(store, sql, {"run": number}).rows()}


def reversal(
    folder: Path, value: Constitution, principle: str, engines: dict[str, Engine]
) -> tuple[dict[str, Any], Diff]:
    """Reverse one principle; the flips against those that the oracle says."""
    fault = grammar.FAULTS[principle][0][1]
    new = edited(value, principle, REVERSED.format(g=fault))
    path, old = save(folder, f"no-{principle}.yaml", new), str(folder / "world.yaml")
    found = diff(old, path, folder / "store", "editing", engines=engines)
    flipped = {(one.prompt, one.a, one.b) for one in found.flips}
    told = {
        place: {_told(broken, value), _told(broken, value, principle)} == {"a", "b"}
        for place, broken in _broken(folder / "store").items()
    }
    return {
        "principle": principle,
        "asked": found.new.asked,
        "flip_rate": len(flipped) / found.comparisons,
        "by_the_oracle": sum(told.values()) / len(told),
        "agree": sum(said == (place in flipped) for place, said in told.items()) / len(told),
    }, found


def _broken(store: Path) -> dict[tuple[str, int, int], tuple[frozenset[str], frozenset[str]]]:
    """What both answers of each comparison break, by the oracle."""
    panel = panel_of(store, "editing")
    found = {}
    for prompt in panel:
        texts = {sample.index: sample.text for sample in prompt.samples}
        broken = {i: oracle.assess(prompt.messages, text or "").broken for i, text in texts.items()}
        found |= {(prompt.id, a, b): (broken[a], broken[b]) for a, b in prompt.pairs}
    return found


def _told(
    broken: tuple[frozenset[str], frozenset[str]], value: Constitution, reverse: str = ""
) -> str:
    """The outcome by the oracle's verdicts, with one principle reversed."""
    total = 0.0
    for principle in value["principles"]:
        fault = principle["id"].removesuffix("-again")
        better_a = (fault in broken[1]) - (fault in broken[0])  # 1, 0 or -1
        total += -better_a if principle["id"] == reverse else better_a
    mean = 0.5 + total / (2 * len(value["principles"]))
    return "tie" if abs(mean - 0.5) <= TIE_MARGIN else "a" if mean > 0.5 else "b"


def watched(folder: Path, saves: int, sample: int = 64) -> dict[str, Any]:
    """Seconds from a save to what `prefab watch` shows, through the command line."""
    value, rng = constitution(16), random.Random(time.time_ns())  # words that nobody asked before
    file = Path(save(folder, "watched.yaml", value))
    command = [sys.executable, "-m", "prefab.pipelines.cli.main", "watch", str(file)]
    command += ["--store", str(folder / "store"), "--run", "editing", "--sample", str(sample)]
    seconds = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            _until(process.stdout, "the comparisons are judged")
            for number in range(saves):
                name = AGAIN[number % len(AGAIN)]
                question = rng.choice(list(other_words(name)))
                value = edited(value, name, f"{question} Edit {rng.randrange(10**6)}.")
                began = time.monotonic()
                save(folder, "watched.yaml", value)
                _until(process.stdout, "since the start")
                seconds.append(time.monotonic() - began)
        finally:
            process.terminate()
    return {
        "comparisons": sample,
        "principles": 16,
        "saves": saves,
        "median_s": statistics.median(seconds),
        "worst_s": max(seconds),
        "seconds": [round(s, 2) for s in seconds],
    }


def _until(lines: Any, words: str) -> str:
    """Read lines up to one with these words. Raises: SystemExit when the command ends before."""
    for line in lines:
        if words in line:
            return str(line)
    raise SystemExit(f"prefab watch ended before it printed: {words}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything and write `results/editing.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("editing-store"), metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=350)
    parser.add_argument("--reverse", nargs="*", default=["flattery", "padding", "harm"])
    parser.add_argument("--anew", type=int, help="comparisons to judge from nothing (default: all)")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompts, args.saves, args.reverse = 8, 2, args.reverse[:1]
        args.store = args.store.with_name(args.store.name + "-quick")
    args.store.mkdir(parents=True, exist_ok=True)
    made, value = judged_world(args.store, args.prompts)
    results: dict[str, Any] = {
        "preferences": sum(made.outcomes.values()),
        "identical": made.identical,
        "outcomes": made.outcomes,
        "asked": made.asked,
        "reused": made.reused,
    }
    results["edit"] = one_principle(args.store, value)[0]
    print(results["edit"], flush=True)

    def contrary() -> dict[str, Engine]:
        return {"local": Contrary(make(ENGINE, "local"))}

    rows = [reversal(args.store, value, name, contrary()) for name in args.reverse]
    results["reverse"] = [row for row, _ in rows]
    print(results["reverse"], flush=True)
    results["watch"] = watched(args.store, args.saves)
    print(results["watch"], flush=True)
    results["anew"] = judged_anew(args.store, rows[0][1], contrary(), args.anew)
    print(results["anew"], flush=True)
    print(write("editing", args.quick, settings=asked(args), **results))


if __name__ == "__main__":
    main()
