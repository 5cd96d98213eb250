"""A run's verdicts as arrays: comparisons under a principle by judges, with what is known of the
truth beside them.

A reading is one judge's word on one comparison under one principle: the mean of its orders and
repeats, unscored when any of them is. Verdicts that were asked in no order (scores, rankings) are
readings too, without a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefab.factory.store.store import Read, each_shard
from prefab.pipelines.store.fill import read_filled
from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.selection import WHERE, Selection

if TYPE_CHECKING:
    import numpy as np
    import polars

RATINGS = (0.0, 0.5, 1.0)  # b, tie, a
# Shards that are read together: their readings are put together in a hash table that is small.
SHARDS = 16
_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class RatingMatrix:
    """Shapes (N comparisons under a principle, J judges): `p` the probability that a is better,
    `tie` the share of the mass on tie, NaN where unscored or not asked (`asked` tells them apart);
    by order `won_ab` and `won_ba` the winner (1 a, 0 b, 0.5 neither) and `p_ab` and `p_ba` the
    probability that a is better, NaN where there is none;
    `gold` N as a winner; `prompts` and `groups` N, as numbers. `items` has the columns prompt, a,
    b, principle, tags (the prompt's and the principle's), the names as categories: a number for
    each comparison, and each name once; it is sorted by all but the tags. `reasons`: the whole
    selection's verdicts by principle, judge and reason (as `Selection.unscored`).
    """

    items: polars.DataFrame
    reasons: polars.DataFrame
    judges: tuple[str, ...]
    weights: np.ndarray
    p: np.ndarray
    tie: np.ndarray
    asked: np.ndarray
    won_ab: np.ndarray
    won_ba: np.ndarray
    p_ab: np.ndarray
    p_ba: np.ndarray
    prompts: np.ndarray
    groups: np.ndarray
    gold: np.ndarray
    tie_margin: float

    def comparisons(self) -> int:
        """How many there are, one under several principles counted once."""
        return int(changed(self.items.select("prompt", "a", "b")).sum())

    def ratings(self) -> np.ndarray:
        """Each reading as a label, 1 for a, 0 for b, 0.5 for a tie (by the panel's rule), NaN for
        unscored.
        """
        import numpy as np

        side = np.where(self.p > 0.5, 1.0, 0.0)
        even = (np.abs(self.p - 0.5) <= self.tie_margin + _EPS) | (self.tie > 0.5)
        return np.where(np.isnan(self.p), np.nan, np.where(even, 0.5, side))

    def take(self, kept: np.ndarray) -> RatingMatrix:
        """Some of the comparisons, by a mask."""
        import polars as pl

        some = {
            name: getattr(self, name)[kept]
            for name in (
                "p",
                "tie",
                "asked",
                "won_ab",
                "won_ba",
                "p_ab",
                "p_ba",
                "prompts",
                "groups",
                "gold",
            )
        }
        return replace(self, items=self.items.filter(pl.Series(kept)), **some)


def changed(rows: polars.DataFrame) -> np.ndarray:
    """Whether each row is unlike the one before it. Shapes: as many as rows."""
    import numpy as np
    import polars as pl

    new = np.ones(rows.height, dtype=bool)
    new[1:] = rows.select(pl.any_horizontal(pl.all() != pl.all().shift())).to_series()[1:]
    return new


def _won(order: str) -> str:
    """The winner in an order as a number, in SQL."""
    winner = f"max(winner) FILTER (WHERE \"order\" = '{order}' AND repeat = 0)"
    return f"CASE {winner} WHEN 'a' THEN 1 WHEN 'tie' THEN 0.5 WHEN 'b' THEN 0 END::FLOAT"


_PROMPTS = f"""
SELECT prompt, first(p.tags) AS tags, coalesce(first(nullif(p."group", '')), prompt) AS "group"
FROM (SELECT DISTINCT prompt FROM verdicts WHERE {WHERE}) LEFT JOIN prompts p USING (prompt)
GROUP BY prompt ORDER BY prompt"""

# Names as their place in the order of all: texts would take most of the time and memory.
_READINGS = f"""
WITH v AS (SELECT * FROM verdicts WHERE {WHERE} AND NOT list_contains($people::VARCHAR[], judge)),
  place AS (SELECT prompt, row_number() OVER (ORDER BY prompt) - 1 AS place
            FROM (SELECT DISTINCT prompt FROM verdicts WHERE {WHERE}))
SELECT place::UINTEGER AS prompt, a, b,
  (list_position($of_principles::VARCHAR[], principle) - 1)::UINTEGER AS principle,
  (list_position($of_judges::VARCHAR[], judge) - 1)::UINTEGER AS judge,
  CASE WHEN count(*) = count(p_a) THEN avg(p_a) END AS p,
  CASE WHEN count(*) = count(p_a) THEN avg(coalesce(CASE WHEN mass > 0 THEN tie_mass / mass ELSE tie_mass END, 0)) END
    AS tie,
  {_won("ab")} AS won_ab, {_won("ba")} AS won_ba,
  max(p_a) FILTER (WHERE "order" = 'ab' AND repeat = 0) AS p_ab,
  max(p_a) FILTER (WHERE "order" = 'ba' AND repeat = 0) AS p_ba
FROM v JOIN place USING (prompt) GROUP BY ALL ORDER BY 1, 2, 3, 4, 5"""


def load_matrix(selection: Selection, gold: str = "auto") -> tuple[RatingMatrix, str]:
    """The readings of a selection, and in words where their gold comes from.

    `gold`: human, oracle, none, or auto: people's labels where there are some, else the oracle
    where the prompts are the embedded world's.
    """
    import numpy as np
    import polars as pl

    panel = selection.config.get("panel") or {}
    people = [
        judge["name"] for judge in panel.get("judges", ()) if judge.get("kind") == "human"
    ]  # they are gold
    reasons, prompts, rows = read_filled(
        selection.folder, lambda read: _read(read, replace(selection, read=read), people)
    )
    names = reasons.filter(~pl.col("judge").is_in(people))
    judges = tuple(names["judge"].unique().sort())
    place = rows.select("prompt", "a", "b", "principle")
    new = changed(place)
    place = place.filter(pl.Series(new))
    # sorted within shards that are read together, and so by prompt alone over all
    order = np.argsort(place["prompt"].to_numpy(), kind="stable").astype(np.int32)
    place, at = place[order], np.empty_like(order)
    at[order] = np.arange(len(order), dtype=np.int32)
    i, j = at[new.cumsum(dtype=np.int32) - 1], rows["judge"].to_numpy()
    shape = place.height, len(judges)

    def matrix(name: str) -> np.ndarray:
        column = rows[name]
        found = np.full(shape, np.nan, dtype=np.float32 if name.startswith("won") else float)
        found[i, j] = column.fill_null(np.nan).to_numpy()
        return found

    asked = np.zeros(shape, dtype=bool)
    asked[i, j] = True
    of_prompt = place["prompt"].to_numpy()
    groups = prompts["group"].rank("dense").to_numpy() - 1
    items = _items(place, prompts, names, selection)
    weight = {judge["name"]: float(judge.get("weight", 1.0)) for judge in panel.get("judges", ())}
    known, source = find_gold(selection, items, gold)
    readings = RatingMatrix(
        items,
        reasons,
        judges,
        np.array([weight.get(name, 1.0) for name in judges]),
        matrix("p"),
        matrix("tie"),
        asked,
        matrix("won_ab"),
        matrix("won_ba"),
        matrix("p_ab"),
        matrix("p_ba"),
        _numbered(of_prompt),
        _numbered(groups[of_prompt]),
        known,
        float(panel.get("tie_margin", 0.02)),
    )
    return readings, source


def _read(
    read: Read, selection: Selection, people: Sequence[str]
) -> tuple[polars.DataFrame, polars.DataFrame, polars.DataFrame]:
    """The selection's verdicts by reason, prompts with tags and group, and readings, which name
    prompt, principle and judge by their place in the order of names. Readings are sorted within the
    shards that are read together.
    """
    import polars as pl

    reasons = selection.unscored()
    names = reasons.filter(~pl.col("judge").is_in(people))
    known = {f"of_{name}s": sorted(set(names[name])) for name in ("principle", "judge")}
    prompts, rows, n = [], [], 0
    for _ in each_shard(read, SHARDS):
        prompts.append(selection.query(_PROMPTS))
        some = selection.query(_READINGS, {"people": people, **known})
        rows.append(some.with_columns(pl.col("prompt") + pl.lit(n, pl.UInt32)))
        n += prompts[-1].height
    if len(rows) == 1:
        return reasons, prompts[0], rows[0]
    of_all, found = pl.concat(prompts), pl.concat(rows)
    place = of_all["prompt"].rank("ordinal") - 1  # among the prompts of all shards
    return (
        reasons,
        of_all.sort("prompt"),
        found.with_columns(place.gather(found["prompt"]).alias("prompt")),
    )


def _numbered(codes: np.ndarray) -> np.ndarray:
    """Numbers from 0 without gaps, in the order of the given ones."""
    import numpy as np

    there = np.zeros(int(codes.max(initial=0)) + 1, dtype=np.int32)
    there[codes] = 1
    result: np.ndarray = (there.cumsum(dtype=np.int32) - 1)[codes]
    return result


def _items(
    place: polars.DataFrame,
    prompts: polars.DataFrame,
    names: polars.DataFrame,
    selection: Selection,
) -> polars.DataFrame:
    """The comparisons with names in the place of numbers, and the tags of prompt and principle
    together.
    """
    import polars as pl

    tags = selection.query(
        "SELECT principle, tags FROM principles WHERE constitution = $constitution"
    )
    principles = names.select(pl.col("principle").unique().sort()).join(
        tags, on="principle", how="left", maintain_order="left"
    )
    empty = pl.lit([], dtype=pl.List(pl.String))
    of = {
        name: known.select(pl.col(name).cast(pl.Categorical), pl.col("tags").fill_null(empty))[
            place[name]
        ]
        for name, known in (("prompt", prompts), ("principle", principles))
    }
    both = pl.DataFrame([of[name]["tags"].alias(name) for name in of])
    return place.select(
        of["prompt"]["prompt"],
        "a",
        "b",
        of["principle"]["principle"],
        both.select(pl.concat_list(pl.all()).list.unique()).to_series().alias("tags"),
    )
