"""The format `parquet`: the store's own tables of one run, for other tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefab.factory.errors import ConfigError
from prefab.factory.store.store import Read, each_shard
from prefab.pipelines.store.export.base import ExportOptions, ExportSource

if TYPE_CHECKING:
    import polars

TABLES = ("samples", "critiques", "scores", "steps", "rankings", "verdicts", "preferences")
PAGE_BYTES = 16 << 20
FIRST_ROWS, MOST_ROWS = 256, 1 << 17


class ParquetFormat:
    """One dataset a table, every row of the run in it."""

    by_split = False

    def datasets(self, source: ExportSource) -> Iterator[dict[str, polars.DataFrame]]:
        """The tables as they are, some rows at a time.

        Raises: ConfigError when rows are to be left out.
        """
        if source.options != ExportOptions(truncated=source.options.truncated):
            raise ConfigError(
                "parquet has the store's tables as they are, `marks` among them: leave rows out "
                "by joining that, or choose another format"
            )
        run = source.record["run"]
        for page in _pages(source.query, "marks", f"run = {run}"):
            yield {"marks": page}
        for _ in each_shard(source.query):
            for name in TABLES:
                for page in _pages(source.query, name, f"run = {run}"):
                    yield {name: page}
            prompts = source.query(f"SELECT DISTINCT prompt FROM samples WHERE run = {run}")
            for page in _pages(source.query, "prompts", "true"):
                yield {"prompts": page.join(prompts, on="prompt", how="semi")}


def _pages(read: Read, table: str, where: str) -> Iterator[polars.DataFrame]:
    """The rows of a table in their order, as many at a time as have about PAGE_BYTES."""
    last = read(f"SELECT coalesce(max(rowid), -1) AS last FROM {table} WHERE {where}")["last"][0]
    start, rows = 0, FIRST_ROWS
    while start <= last:
        page = read(
            f"SELECT * FROM {table} WHERE {where} AND rowid BETWEEN {start} AND {start + rows - 1}"
        )
        yield page
        start += rows
        rows = max(
            1, min(MOST_ROWS, 8 * rows, rows * PAGE_BYTES // max(1, int(page.estimated_size())))
        )


PARQUET = ParquetFormat()
