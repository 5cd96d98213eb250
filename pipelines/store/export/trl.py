"""The format `trl`: datasets that `datasets.load_dataset` and TRL's trainers take.

Rows of the test split never stand in a train file. Ties and unscored comparisons are no pairs;
answers that were cut off by length are left out unless asked for. Everything that is left out is
counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefab.pipelines.store.export.base import ExportSource

if TYPE_CHECKING:
    import polars


class TrlFormat:
    """Preference, unpaired, prompt-only and SFT datasets."""

    by_split = True

    def datasets(self, source: ExportSource) -> Iterator[dict[str, polars.DataFrame]]:
        """The datasets that this run has rows for."""
        return source.parts()


TRL = TrlFormat()
