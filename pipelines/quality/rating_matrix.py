"""A run's verdicts as arrays: comparisons under a principle by judges, with what is known of the
truth beside them.

A reading is one judge's word on one comparison under one principle: the mean of its orders and
repeats, unscored when any of them is. Verdicts that were asked in no order (scores, rankings) are
readings too, without a position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.selection import WHERE, Selection

if TYPE_CHECKING:
    import numpy as np
    import polars

RATINGS = (0.0, 0.5, 1.0)  # b, tie, a
_SIDE = {"a": 1.0, "b": 0.0, "tie": 0.5}
_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class RatingMatrix:
    """Shapes (N comparisons under a principle, J judges): `p` the probability that a is better,
    `tie` the share of the mass on tie, NaN where unscored or not asked (`asked` tells them apart);
    by order `won_ab` and `won_ba` the winner (1 a, 0 b, 0.5 neither) and `p_ab` and `p_ba` the
    probability, NaN where there is none; `gold` N as a winner; `prompts` and `groups` N, as
    numbers. `items` has the columns prompt, a, b, principle, tags (the prompt's and the
    principle's).
    """

    items: polars.DataFrame
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


_READINGS = f"""
SELECT prompt, a, b, principle, judge,
  CASE WHEN count(*) = count(p_a) THEN avg(p_a) END AS p,
  CASE WHEN count(*) = count(p_a) THEN avg(coalesce(CASE WHEN mass > 0 THEN tie_mass / mass ELSE tie_mass END, 0)) END
    AS tie,
  max(winner) FILTER (WHERE "order" = 'ab' AND repeat = 0) AS won_ab,
  max(winner) FILTER (WHERE "order" = 'ba' AND repeat = 0) AS won_ba,
  max(p_a) FILTER (WHERE "order" = 'ab' AND repeat = 0) AS p_ab,
  max(p_a) FILTER (WHERE "order" = 'ba' AND repeat = 0) AS p_ba
FROM verdicts WHERE {WHERE} GROUP BY ALL ORDER BY prompt, a, b, principle, judge"""


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
    rows = selection.query(_READINGS).filter(~pl.col("judge").is_in(people))
    place = ["prompt", "a", "b", "principle"]
    items = rows.select(place).unique(maintain_order=True).with_row_index("i")
    judges = tuple(rows["judge"].unique().sort())
    rows = rows.join(items, on=place).with_columns(
        pl.col("judge")
        .replace_strict(list(judges), list(range(len(judges))), return_dtype=pl.Int32)
        .alias("j")
    )
    i, j = rows["i"].to_numpy(), rows["j"].to_numpy()

    def matrix(column: pl.Series) -> np.ndarray:
        found = np.full((items.height, len(judges)), np.nan)
        found[i, j] = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
        return found

    asked = np.zeros((items.height, len(judges)), dtype=bool)
    asked[i, j] = True
    won = {
        name: rows[name].replace_strict(
            list(_SIDE), list(_SIDE.values()), default=None, return_dtype=pl.Float64
        )
        for name in ("won_ab", "won_ba")
    }
    items = _tagged(items.drop("i"), selection)
    weight = {judge["name"]: float(judge.get("weight", 1.0)) for judge in panel.get("judges", ())}
    known, source = find_gold(selection, items, gold)
    readings = RatingMatrix(
        items.drop("group"),
        judges,
        np.array([weight.get(name, 1.0) for name in judges]),
        matrix(rows["p"]),
        matrix(rows["tie"]),
        asked,
        matrix(won["won_ab"]),
        matrix(won["won_ba"]),
        matrix(rows["p_ab"]),
        matrix(rows["p_ba"]),
        np.unique(items["prompt"].to_numpy(), return_inverse=True)[1],
        np.unique(items["group"].to_numpy(), return_inverse=True)[1],
        known,
        float(panel.get("tie_margin", 0.02)),
    )
    return readings, source


def _tagged(items: polars.DataFrame, selection: Selection) -> polars.DataFrame:
    """With the tags of prompt and principle together, and the prompt's group (its own where it has
    none).
    """
    import polars as pl

    prompts = selection.query(
        'SELECT prompt, tags AS ptags, coalesce(nullif("group", \'\'), prompt) AS "group" FROM prompts'
    )
    principles = selection.query(
        "SELECT principle, tags AS qtags FROM principles WHERE constitution = $constitution"
    )
    empty = pl.lit([], dtype=pl.List(pl.String))
    joined = items.join(prompts, on="prompt", how="left", maintain_order="left").join(
        principles, on="principle", how="left", maintain_order="left"
    )
    tags = pl.concat_list(
        pl.col("ptags").fill_null(empty), pl.col("qtags").fill_null(empty)
    ).list.unique()
    return joined.select(
        *items.columns, tags.alias("tags"), pl.col("group").fill_null(pl.col("prompt"))
    )
