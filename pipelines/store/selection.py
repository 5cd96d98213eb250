"""Select a run's verdicts by principle, judge and tag, and query the store for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.store.store import Read

if TYPE_CHECKING:
    import polars

# Limits to one of so many groups of prompts, always the same ones.
IN_SAMPLE = """($of_groups::INTEGER = 1 OR prompt IN (
    SELECT prompt FROM prompts WHERE hash(coalesce(nullif("group", ''), prompt)) % $of_groups::INTEGER = 0))"""
WHERE = f"""run = $run
  AND (len($principles::VARCHAR[]) = 0 OR list_contains($principles::VARCHAR[], principle))
  AND (len($judges::VARCHAR[]) = 0 OR list_contains($judges::VARCHAR[], judge))
  AND (len($tags::VARCHAR[]) = 0
       OR prompt IN (SELECT prompt FROM prompts WHERE list_has_any(tags, $tags::VARCHAR[]))
       OR principle IN (SELECT principle FROM principles
                        WHERE constitution = $constitution AND list_has_any(tags, $tags::VARCHAR[])))
  AND {IN_SAMPLE}
  AND (NOT $labelled::BOOLEAN OR prompt IN (SELECT prompt FROM human_labels))"""

_UNSCORED = f"""
SELECT principle, judge, reason, count(*) AS n FROM verdicts WHERE {WHERE} GROUP BY ALL ORDER BY ALL"""

_MASS = f"""
SELECT judge, count(*) AS verdicts, count(mass) AS n, avg(mass) AS mean, quantile_cont(mass, 0.05) AS low,
  count(*) FILTER (WHERE exactness <> 'exact' AND p_a IS NOT NULL) AS inexact,
  count(*) FILTER (WHERE exactness = 'hard' AND p_a IS NOT NULL) AS hard, bool_or("order" = '-') AS unordered,
  count(DISTINCT repeat) AS repeats
FROM verdicts WHERE {WHERE} GROUP BY ALL ORDER BY judge"""

_CRITIQUES = """
SELECT principle, count(*) AS critiques, count(*) FILTER (WHERE fault) AS faults, avg(p_fault) AS p_fault,
  count(*) FILTER (WHERE p_fault BETWEEN 0.2 AND 0.8) AS unsure,
  count(*) FILTER (WHERE fault IS NOT NULL AND p_fault IS NULL) AS hard, count(reason) AS unscored
FROM critiques WHERE run = $run
  AND (len($principles::VARCHAR[]) = 0 OR list_contains($principles::VARCHAR[], principle))
GROUP BY ALL ORDER BY faults DESC, principle"""

_AGAIN = f"""
WITH v AS (SELECT * FROM verdicts WHERE {WHERE})
SELECT x.judge, x.prompt, coalesce(nullif(q."group", ''), x.prompt) AS "group", x.winner AS first,
  y.winner AS again FROM v x
JOIN v y USING (prompt, a, b, principle, judge, "order") LEFT JOIN prompts q ON q.prompt = x.prompt
WHERE x.repeat = 0 AND y.repeat > 0 AND x.winner IS NOT NULL AND y.winner IS NOT NULL"""


@dataclass(frozen=True, slots=True)
class Selection:
    """A run's verdicts, limited to these principles, judges and tags (an empty tuple: all), to one
    of so many groups of prompts, and to prompts that people labelled. `read`: of an open store
    (see `fill.read_filled`); left out, each query opens the store.
    """

    folder: Path
    run: dict[str, Any]
    principles: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    of_groups: int = 1
    labelled: bool = False
    read: Read | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """NAME@VERSION."""
        return f"{self.run['name']}@{self.run['version']}"

    @property
    def config(self) -> dict[str, Any]:
        """The run's resolved configuration."""
        config: dict[str, Any] = json.loads(self.run["config"])
        return config

    def query(self, sql: str, more: dict[str, Any] = {}) -> polars.DataFrame:  # noqa: B006
        """The rows of a query with named parameters: those of the selection, and `more`."""
        from prefab.pipelines.store.fill import query

        values = {
            **more,
            "run": self.run["run"],
            "constitution": self.run["constitution"] or "",
            "principles": list(self.principles),
            "judges": list(self.judges),
            "tags": list(self.tags),
            "of_groups": self.of_groups,
            "labelled": self.labelled,
        }
        return self.read(sql, values) if self.read else query(self.folder, sql, values)

    def sampled(self, prompts: int) -> Selection:
        """The selection, of a run with more prompts limited to about so many in whole groups."""
        sql = "SELECT count(DISTINCT prompt) AS n FROM preferences WHERE run = $run"
        return replace(self, of_groups=max(1, -(-self.query(sql)["n"][0] // prompts)))

    def unscored(self) -> polars.DataFrame:
        """Verdicts by principle, judge and reason (None: scored)."""
        return self.query(_UNSCORED)

    def masses(self) -> polars.DataFrame:
        """By judge: verdicts, label mass, how many were read inexactly, repeats."""
        return self.query(_MASS)

    def critiques(self) -> polars.DataFrame:
        """By principle: critiques, faults named, the mean probability of a fault, how many are
        unsure (between 0.2 and 0.8), hard labels, and unscored.
        """
        return self.query(_CRITIQUES)

    def again(self) -> polars.DataFrame:
        """Pairs of verdicts of one judge on one question in one order, asked more than once."""
        return self.query(_AGAIN)


def select(
    folder: Path,
    run: str = "",
    principles: Sequence[str] = (),
    judges: Sequence[str] = (),
    tags: Sequence[str] = (),
    read: Read | None = None,
) -> Selection:
    """The selection, checked. `read`: as in `Selection`.

    Raises: ConfigError when there is no such run, or a name matches none of the run's verdicts; for
    a run that has none.
    """
    from functools import partial

    from prefab.factory.store.datasets import find_run
    from prefab.pipelines.store.fill import query

    whole = Selection(folder, find_run(folder, read or partial(query, folder), run), read=read)
    rows = whole.unscored()
    if rows.is_empty():
        raise ConfigError(
            f"{folder}: the run {whole.name} has no verdicts: it compared nothing, or nothing was answered "
            "yet; name another with --run NAME, or run a pipeline with a panel"
        )
    for what, given, known in (
        ("principle", principles, set(rows["principle"])),
        ("judge", judges, set(rows["judge"])),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"--{what} {name}: {whole.name} has no verdicts of it; {did_you_mean(name, known)}"
                )
    found = replace(whole, principles=tuple(principles), judges=tuple(judges), tags=tuple(tags))
    if (tags or (principles and judges)) and found.unscored().is_empty():
        known = set(
            whole.query(
                "SELECT DISTINCT unnest(tags) AS tag FROM prompts UNION SELECT DISTINCT unnest(tags) "
                "FROM principles WHERE constitution = $constitution"
            )["tag"]
        )
        told = "; ".join(
            f"--tag {tag}: {did_you_mean(tag, known)}" for tag in tags if tag not in known
        )
        raise ConfigError(
            f"{whole.name} has no verdicts that match all of these options"
            + (f" ({told})" if told else "")
        )
    return found
