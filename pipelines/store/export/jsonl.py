"""The format `jsonl`: the datasets of `trl` as JSON lines, which most tools take as they are."""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import Layout, LayoutFormat

NAMES = ("preference", "conversations", "unpaired", "prompts", "sft")
JSONL = LayoutFormat({name: Layout(name, lambda row: row) for name in NAMES})
