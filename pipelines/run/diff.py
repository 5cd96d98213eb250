"""What an edit of a constitution changes: the same comparisons under two versions, side by side.

A version is a constitution file, a git revision of one (`HEAD~1:constitution.yaml`), or a run.
Files are judged as runs of their own in the store (`rejudge`), so only questions that nobody asked
before are asked; two runs are compared as they stand.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prefab.factory.errors import ConfigError
from prefab.factory.spec.composition import bundled_names, read_parent
from prefab.factory.spec.constitution import (
    constitution_digest,
    load_constitution,
    parse_constitution,
    renamed,
)
from prefab.factory.stats import Estimate, clustered_share
from prefab.factory.store.store import Read
from prefab.factory.types import Constitution, Engine
from prefab.judges.stats.agreement import PANEL, panel_coefficients
from prefab.pipelines.config.loader import ResolvedPipeline
from prefab.pipelines.run.plan import Change, constitution_changes
from prefab.pipelines.run.rejudge import Panel, panel_of, pipeline_of, rejudge
from prefab.pipelines.run.runner import RunResult
from prefab.pipelines.store.export.base import find_run
from prefab.pipelines.store.fill import query, read_filled
from prefab.pipelines.store.imports import import_files

OUTCOMES = ("a", "b", "tie", "unscored")
MOVED = 0.05  # a probability that moved by more counts as moved


@dataclass(slots=True)
class Version:
    """One side of a diff: its name for people, its constitution, and its run once it is judged."""

    name: str
    constitution: Constitution | None
    run: int = 0
    asked: int = 0
    reused: int = 0
    failed: int = 0
    record: str = ""  # the run's NAME@VERSION

    def judged(self, done: RunResult) -> None:
        """Keep what judging this version did."""
        self.run, self.record = done.run, f"{done.name}@{done.version}"
        self.asked, self.reused, self.failed = done.asked, done.reused, done.failed

    @property
    def digest(self) -> str:
        """What tells the constitution's meaning apart from another's, short."""
        return constitution_digest(self.constitution)[:8] if self.constitution else ""


@dataclass(slots=True)
class Moved:
    """One comparison under both versions. `p_old` and `p_new` are P(a is better); `principles` has
    (id, P(a) before, P(a) after) of those that moved, the most first. `preference` is its id in the
    new version's run.
    """

    preference: str
    prompt: str
    text: str
    a: int
    b: int
    answer_a: str
    answer_b: str
    old: str
    new: str
    p_old: float | None
    p_new: float | None
    principles: list[tuple[str, float | None, float | None]] = field(default_factory=list)

    @property
    def flipped(self) -> bool:
        """Whether the other answer is preferred now."""
        return {self.old, self.new} == {"a", "b"}

    @property
    def changed(self) -> bool:
        """Whether the outcome is another one."""
        return self.old != self.new

    @property
    def distance(self) -> float:
        """How far the probability moved; 0 where a side is unscored."""
        known = self.p_old is not None and self.p_new is not None
        return abs(self.p_new - self.p_old) if known else 0.0  # type: ignore[operator]  # both known


@dataclass(slots=True)
class PrincipleMoved:
    """What one principle says before and after, over the comparisons that it judged in both.

    `flips` counts verdicts that changed sides, `mean_move` is the mean distance of P(a); `why` says
    what was edited.
    """

    principle: str
    compared: int
    moved: int
    flips: int
    mean_move: float
    only_old: int
    only_new: int
    why: list[str]


@dataclass(slots=True)
class Diff:
    """The difference between two versions. Intervals are over groups of prompts."""

    old: Version
    new: Version
    source: str
    comparisons: int
    flip_rate: Estimate
    change_rate: Estimate
    alpha: Estimate
    ac1: Estimate
    table: dict[str, dict[str, int]]  # outcome before -> outcome after -> comparisons
    principles: list[PrincipleMoved]
    changes: list[str]
    moved: list[Moved]  # whose outcome or probability is another one, the most telling first

    @property
    def flips(self) -> list[Moved]:
        """The comparisons whose preferred answer is the other one now."""
        return [one for one in self.moved if one.flipped]

    def data(self, only: str = "") -> dict[str, Any]:
        """As plain data; a version is told by its name, digest and run. With `only` flips, `moved`
        has nothing else.
        """
        moved = self.flips if only else self.moved
        return {
            "old": _version_data(self.old),
            "new": _version_data(self.new),
            "source": self.source,
            "comparisons": self.comparisons,
            "flips": len(self.flips),
            **{
                name: asdict(getattr(self, name))
                for name in ("flip_rate", "change_rate", "alpha", "ac1")
            },
            "outcomes": self.table,
            "principles": [asdict(one) for one in self.principles],
            "changes": self.changes,
            "moved": [asdict(one) | {"flipped": one.flipped} for one in moved],
        }


def _version_data(version: Version) -> dict[str, Any]:
    names = ("name", "digest", "run", "record", "asked", "reused", "failed")
    return {name: getattr(version, name) for name in names}


def diff(
    old: str,
    new: str = "",
    store: str | Path = "store",
    run: str = "",
    pipeline: str | Path | None = None,
    sets: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    quiet: bool = True,
    engines: dict[str, Engine] | None = None,
    pairs: str | Path | None = None,
) -> Diff:
    """Compare the preferences of two versions of a constitution on the same comparisons.

    Args:
        old: A constitution file, a git revision of one (`HEAD~1:constitution.yaml`), or a run
            (NAME or NAME@VERSION). With `new` left out, this is the new version, and the
            constitution with which the run was made is the old one; for imported pairs, their
            labels are.
        new: The same, of the new version.
        store: The store whose comparisons are judged.
        run: The run whose comparisons are judged, NAME or NAME@VERSION; default: the latest.
        pipeline: A pipeline file whose judges are asked; default: as the run was configured.
        sets: Overrides of the pipeline's fields.
        sample: Only so many comparisons, chosen at random.
        seed: Seed of the choice.
        quiet: Do not show progress.
        engines: Engines to use in place of those that the pipeline would start, by name.
        pairs: A data file or folder of pairs, in any layout of `import_files`. It is imported into
            the store, and its pairs are the comparisons that are judged. The default for
            `pipeline` is then `pipeline.yaml` beside the constitution.

    Raises:
        ConfigError: A version does not exist or is invalid, the versions have no comparison in
            common, or the pairs cannot be read.
        EngineError: An engine does not start or fails.
    """
    store = Path(store)
    run = _imported(store, pairs, run)
    sides = [read_version(name, store) for name in filter(None, (old, new))]
    if new and all(side.run for side in sides):
        return compare(store, sides[0], sides[1])
    panel = panel_of(store, run, sample, seed)
    # the run as it stands
    own = panel.run["run"] if panel.imported or not (pipeline or sets) else 0
    if not new:
        before = None if panel.imported else panel.constitution
        sides = [Version(panel.source, before, own, record=panel.source), *sides]
    to_judge = [one for one in sides if own == 0 or one.run != own]
    latest = [(one.name, _judged_by(one)) for one in to_judge][-1:]
    loaded = pipeline_of(panel, pipeline, sets, *latest)
    for side in to_judge:
        side.judged(rejudge(panel, _judged_by(side), loaded, quiet, engines))
    return compare(store, sides[0], sides[1], panel, fields_read(loaded))


def _imported(store: Path, pairs: str | Path | None, run: str) -> str:
    """The run of a file of pairs, which is imported where it is new; without a file, `run`."""
    if pairs is None:
        return run
    if run:
        raise ConfigError("give --pairs or --run, not both: each names the comparisons")
    return import_files(store, [pairs])[0].run


def _judged_by(version: Version) -> Constitution:
    if version.constitution is None:
        raise ConfigError(f"{version.name} has no constitution to judge by")
    return version.constitution


def read_version(name: str, store: Path) -> Version:
    """A version of a constitution by its name: a file, a file in a git revision, or a run.

    Raises: ConfigError when it is none of them, or the file is invalid.
    """
    path = Path(name)
    if path.is_file():
        return Version(name, load_constitution(path))
    revision, colon, file = name.partition(":")
    if colon and file:
        read = partial(_parent_at, revision)
        return Version(name, parse_constitution(_at_revision(revision, file), name, read))
    if path.suffix in (".yaml", ".yml") or not (store / "ledger.sqlite").exists():
        raise ConfigError(
            f"{name}: no such file. Give a constitution file, one in a git revision "
            "(HEAD~1:constitution.yaml), or a run of the store (NAME or NAME@VERSION)"
        )
    record = find_run(store, name)
    sql = "SELECT source FROM constitutions WHERE constitution = $name"
    rows = query(store, sql, {"name": record["constitution"]})
    text = rows["source"][0] if rows.height else None
    shown = f"{record['name']}@{record['version']}"
    constitution = parse_constitution(text, shown) if text else None
    return Version(shown, constitution, record["run"], record=shown)


def _parent_at(revision: str, name: str, file: str) -> tuple[str, str]:
    """What a file of a git revision extends, in the same revision: its name, and its text."""
    beside = os.path.normpath(Path(file.removeprefix(f"{revision}:")).parent / name)
    try:
        return f"{revision}:{beside}", _at_revision(revision, beside)
    except ConfigError:
        if name in bundled_names():
            return read_parent(name, "")
        raise


def _at_revision(revision: str, file: str) -> str:
    """The text of a file in a git revision; the file's path is as seen from here."""
    shown = file if file.startswith(("/", "./", "../")) else f"./{file}"
    command = ["git", "show", f"{revision}:{shown}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{revision}:{file} is a git revision, and git is not installed"
        ) from error
    if done.returncode:
        said = done.stderr.strip().removeprefix("fatal: ")
        raise ConfigError(f"{revision}:{file}: git says: {said}")
    return done.stdout


_BETWEEN_VERSIONS = {name: PANEL[name] for name in ("krippendorff_alpha nominal", "gwet_ac1")}
_COMPARED = """
SELECT n.preference, o.prompt, o.a, o.b, o.outcome, n.outcome, o.p_a, n.p_a, q.messages, x.text, y.text, q."group"
FROM preferences o
JOIN preferences n ON n.run = $new AND n.prompt = o.prompt AND n.a = o.a AND n.b = o.b
JOIN samples x ON x.run = o.run AND x.prompt = o.prompt AND x."index" = o.a
JOIN samples y ON y.run = o.run AND y.prompt = o.prompt AND y."index" = o.b
JOIN samples u ON u.run = n.run AND u.prompt = n.prompt AND u."index" = n.a AND u.text = x.text
JOIN samples v ON v.run = n.run AND v.prompt = n.prompt AND v."index" = n.b AND v.text = y.text
LEFT JOIN prompts q ON q.prompt = o.prompt
WHERE o.run = $old AND NOT o.identical ORDER BY o.prompt, o.a, o.b"""
_READ = """
SELECT prompt, a, b, principle, avg(p_a) FROM verdicts WHERE run = $run AND p_a IS NOT NULL
GROUP BY ALL"""
Place = tuple[str, int, int]


def fields_read(loaded: ResolvedPipeline) -> frozenset[str]:
    """The roles (of `Change`) of the fields of a principle that a pipeline's judges read."""
    return frozenset("score" if judge.shows == "one" else "compare" for judge in loaded.judges)


def compare(
    store: Path,
    old: Version,
    new: Version,
    panel: Panel | None = None,
    read: frozenset[str] = frozenset(),
) -> Diff:
    """The difference between two runs that are in the store.

    Args:
        store: The store.
        old: The version before.
        new: The version after.
        panel: The comparisons, where both versions were judged on them.
        read: The roles of the fields that the judges read, from `fields_read`; default: unknown.

    Raises:
        ConfigError: They have no comparison in common.
    """
    return read_filled(store, partial(differing, old, new, panel, read))


def differing(
    old: Version, new: Version, panel: Panel | None, roles: frozenset[str], read: Read
) -> Diff:
    """As `compare`, by the queries of an open store (`read`); `roles` are those that the judges
    read.
    """
    rows = read(_COMPARED, {"old": old.run, "new": new.run}).rows()
    if not rows:
        raise ConfigError(
            f"{old.name} and {new.name} have no comparison in common: none has the same prompt and "
            "the same two answers. Compare two constitutions on one run with "
            "`prefab diff OLD.yaml NEW.yaml --run NAME`"
        )
    names, changes = _edits(old.constitution, new.constitution, roles)
    read_old = _by_place(read, old.run, names)
    read_new = _by_place(read, new.run, {})
    moved = [_moved(row, read_old, read_new) for row in rows]
    groups = [row[-1] or row[1] for row in rows]
    codes = np.array([[OUTCOMES.index(one.old), OUTCOMES.index(one.new)] for one in moved], float)
    scored = np.where(codes == OUTCOMES.index("unscored"), np.nan, codes)
    alpha, ac1 = panel_coefficients(
        scored, categories=[0.0, 1.0, 2.0], clusters=np.array(groups), kinds=_BETWEEN_VERSIONS
    ).values()
    return Diff(
        old,
        new,
        panel.source if panel else f"{old.name} and {new.name}",
        len(moved),
        clustered_share([one.flipped for one in moved], groups),
        clustered_share([one.changed for one in moved], groups),
        alpha,
        ac1,
        _outcomes(moved),
        _by_principle(moved, read_old, read_new, changes),
        [text for _, _, text in changes],
        sorted((one for one in moved if one.changed or one.distance > 0), key=_telling),
    )


def _edits(
    old: Constitution | None, new: Constitution | None, read: frozenset[str]
) -> tuple[dict[str, str], list[Change]]:
    """The new ids of renamed principles, and what differs in meaning; nothing where a version has
    no constitution.
    """
    if old is None or new is None:
        return {}, []
    changes = [_explained(change, read) for change in constitution_changes(old, new)]
    return renamed(old, new), changes


def _explained(change: Change, read: frozenset[str]) -> Change:
    """The change, with a word where no judge reads the field, so that nothing is asked for it."""
    role, principle, text = change
    if not read or role in ("", "judge", *read):
        return change
    return role, principle, f"{text}, which these judges do not read: nothing is asked for it"


def _moved(
    row: tuple[Any, ...],
    old: dict[Place, dict[str, float]],
    new: dict[Place, dict[str, float]],
) -> Moved:
    """A comparison, from a row of `_COMPARED` and the principles' readings."""
    name, prompt, a, b, was, now, p_old, p_new, messages, text_a, text_b, _ = row
    place, text = (prompt, a, b), json.loads(messages)[-1][1] if messages else ""
    principles = _principles_moved(old.get(place, {}), new.get(place, {}))
    return Moved(name, prompt, text, a, b, text_a, text_b, was, now, p_old, p_new, principles)


def _outcomes(rows: Sequence[Moved]) -> dict[str, dict[str, int]]:
    """How many comparisons have each outcome before and after."""
    counts: dict[str, dict[str, int]] = {}
    for one in rows:
        after = counts.setdefault(one.old, {})
        after[one.new] = after.get(one.new, 0) + 1
    return counts


def _telling(one: Moved) -> tuple[bool, bool, float]:
    """Flips first, then other outcomes, then by how far the probability moved."""
    return not one.flipped, not one.changed, -one.distance


def _by_place(read: Read, run: int, names: dict[str, str]) -> dict[Place, dict[str, float]]:
    """P(a) of each comparison by principle: the mean over judges, orders and repeats."""
    found: dict[Place, dict[str, float]] = {}
    for prompt, a, b, principle, p in read(_READ, {"run": run}).rows():
        found.setdefault((prompt, a, b), {})[names.get(principle, principle)] = p
    return found


def _principles_moved(
    old: dict[str, float], new: dict[str, float]
) -> list[tuple[str, float | None, float | None]]:
    lines = [(name, old.get(name), new.get(name)) for name in {**old, **new}]
    moved = [line for line in lines if line[1] != line[2]]
    return sorted(moved, key=lambda line: -_distance(line[1], line[2]))


def _distance(p: float | None, q: float | None) -> float:
    """How far a probability moved; a principle that appears or goes moves from or to a half."""
    return abs((0.5 if p is None else p) - (0.5 if q is None else q))


def _by_principle(
    rows: Sequence[Moved],
    old: dict[Place, dict[str, float]],
    new: dict[Place, dict[str, float]],
    changes: Sequence[Change],
) -> list[PrincipleMoved]:
    """A line for each principle, those whose verdicts moved most first."""
    counted: dict[str, PrincipleMoved] = {}
    total: dict[str, float] = {}
    for one in rows:
        place = (one.prompt, one.a, one.b)
        was, now = old.get(place, {}), new.get(place, {})
        for name in {**was, **now}:
            why = [text for _, principle, text in changes if principle == name]
            line = counted.setdefault(name, PrincipleMoved(name, 0, 0, 0, 0.0, 0, 0, why))
            if name not in now:
                line.only_old += 1
            elif name not in was:
                line.only_new += 1
            else:
                line.compared += 1
                distance = abs(was[name] - now[name])
                line.moved += distance > MOVED
                line.flips += (was[name] - 0.5) * (now[name] - 0.5) < 0
                total[name] = total.get(name, 0.0) + distance
    found = [
        replace(line, mean_move=total.get(name, 0.0) / line.compared if line.compared else 0.0)
        for name, line in counted.items()
    ]
    return sorted(found, key=lambda line: (not line.why, -line.mean_move, line.principle))
