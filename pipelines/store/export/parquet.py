"""The format `parquet`: the store's own tables of one run, for other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefab.factory.errors import ConfigError
from prefab.pipelines.store.export.base import ExportSource

if TYPE_CHECKING:
    import polars

TABLES = ("samples", "critiques", "scores", "rankings", "verdicts", "preferences", "marks")


class ParquetFormat:
    """One dataset a table, every row of the run in it."""

    by_split = False

    def datasets(self, source: ExportSource) -> dict[str, polars.DataFrame]:
        """The tables as they are.

        Raises: ConfigError when rows are to be left out.
        """
        if source.without:
            raise ConfigError(
                "parquet has the store's tables as they are, `marks` among them: leave rows out "
                "by joining that"
            )
        run = source.record["run"]
        frames = {name: source.query(f"SELECT * FROM {name} WHERE run = {run}") for name in TABLES}
        frames["prompts"] = source.query(
            f"SELECT * FROM prompts WHERE prompt IN (SELECT prompt FROM samples WHERE run = {run})"
        )
        return frames


PARQUET = ParquetFormat()
