"""Training data from the store: datasets that `datasets.load_dataset` and TRL's trainers take, with a card.

Rows of the test split never stand in a train file. Ties and unscored comparisons are no pairs; answers that were cut
off by length are left out unless asked for. Everything that is left out is counted. Written with polars alone.
"""
from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import ConfigError

if TYPE_CHECKING:
    import polars

FORMATS = ("trl", "parquet")
SPLITS = ("train", "val", "test")
HUB_SPLIT = {"train": "train", "val": "validation", "test": "test"}  # as `datasets` users expect them
MARK = "<!-- written by prefab export -->"
WIN_MARGIN = 0.02  # a mean win probability this close to a half labels nothing (as the panel's tie_margin)


@dataclass(slots=True)
class ExportReport:
    """What was written: rows by dataset and split, and what was left out and why."""

    run: str
    format: str
    out: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str, int]]:
        """One row a file."""
        return [(name, split, n) for name, splits in self.counts.items() for split, n in splits.items()]

    def first(self) -> str:
        """A dataset that there is."""
        return next(iter(self.counts), "")

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "out": str(self.out)}


def export(folder: str | Path, out: str | Path, format: str = "trl", run: str = "", truncated: bool = False
           ) -> ExportReport:
    """Write one run of a store to `out`; `run` is NAME or NAME@VERSION, left out: the run that ran last.

    Raises: ConfigError for an unknown format or run, a folder that holds something else, or nothing to write.
    """
    folder, out = Path(folder), Path(out)
    if format not in FORMATS:
        raise ConfigError(f"there is no export format {format!r} yet; there are: {', '.join(FORMATS)}")
    record = find_run(folder, run)
    _make_room(out)
    report = ExportReport(f"{record['name']}@{record['version']}", format, out)
    frames = _tables(folder, record) if format == "parquet" else _datasets(folder, record, truncated, report)
    for name, frame in frames.items():
        _write(out, name, frame, report)
    if not report.counts:
        raise ConfigError(f"{report.run} has nothing to export yet: {'; '.join(report.notes) or 'no rows'}")
    (out / "README.md").write_text(_card(record, report, folder), encoding="utf-8")
    return report


def find_run(folder: Path, run: str = "") -> dict[str, Any]:
    """The run that NAME, NAME@VERSION or nothing (the last) stands for, as a row of the table `runs`.

    Raises: ConfigError with the runs there are.
    """
    from pipelines.fill import query

    if not (folder / "ledger.sqlite").exists():
        raise ConfigError(f"{folder}: there is no store here (no ledger.sqlite); name one with --store DIR, or make one "
                          "with `prefab run`")
    rows = list(query(folder, "SELECT * FROM runs ORDER BY last_start").iter_rows(named=True))
    name, at, version = run.partition("@")
    found = [r for r in rows if name in ("", r["name"]) and (not at or str(r["version"]) == version)]
    if not found:
        there = ", ".join(f"{r['name']}@{r['version']}" for r in rows) or "none"
        raise ConfigError(f"{folder} has no run {run!r}; there are: {there}")
    return found[-1]


def _make_room(out: Path) -> None:
    """An earlier export is replaced; anything else that stands there is left alone."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        card = out / "README.md"
        if not (card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")):
            raise ConfigError(f"{out} is there already and no earlier export; name a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def _write(out: Path, name: str, frame: polars.DataFrame, report: ExportReport) -> None:
    """One file a split; tables without a split are one file."""
    import polars as pl

    if frame.is_empty():
        return
    parts = {split: frame.filter(pl.col("split") == split) for split in SPLITS} if "split" in frame.columns else {}
    if name == "prompts" and report.format == "parquet" or not parts:
        parts = {"train": frame}
    (out / name).mkdir()
    for split, part in parts.items():
        if not part.is_empty():
            part.write_parquet(out / name / f"{HUB_SPLIT[split]}.parquet")
            report.counts.setdefault(name, {})[HUB_SPLIT[split]] = part.height


def _tables(folder: Path, record: dict[str, Any]) -> dict[str, polars.DataFrame]:
    """The store's own tables, for other tools."""
    from pipelines.fill import query

    frames = {name: query(folder, f"SELECT * FROM {name} WHERE run = {record['run']}")
              for name in ("samples", "critiques", "verdicts", "preferences")}
    frames["prompts"] = query(folder, "SELECT * FROM prompts WHERE prompt IN "
                                      f"(SELECT prompt FROM samples WHERE run = {record['run']})")
    return frames


def _datasets(folder: Path, record: dict[str, Any], truncated: bool, report: ExportReport
              ) -> dict[str, polars.DataFrame]:
    """TRL's four kinds of data, conversational, in its column names."""
    import polars as pl

    from pipelines.fill import query

    run, label = record["run"], report.run
    config = json.loads(record["config"])
    samples = query(folder, f'SELECT s.*, q.messages, q.split FROM samples s JOIN prompts q USING (prompt) '
                            f'WHERE s.run = {run} AND s.text IS NOT NULL ORDER BY s.prompt, s."index"')
    samples = samples.with_columns(
        pl.col("messages").map_elements(_turns, return_dtype=_TURNS(pl)).alias("prompt_turns"), pl.lit(label).alias("run"))
    cut = samples.filter(pl.col("finish") == "length").height
    if cut and not truncated:
        report.notes.append(f"{cut:,} answers were cut off by length and are left out (--truncated keeps them)")
        samples = samples.filter(pl.col("finish") != "length")
    preferences = query(folder, f"SELECT * FROM preferences WHERE run = {run} ORDER BY prompt, a, b")
    frames = {}
    if preferences.height:
        _tell_left_out(preferences, report)
        wins = _win_rates(preferences)
        frames["preference"] = _preference(preferences, samples, wins, config.get("pairs", "all"))
        frames["unpaired"] = _unpaired(samples, wins)
    if (config.get("panel") or {}).get("orders", "both") != "both" and preferences.height:
        report.notes.append(f"pairs were judged in one order only ({config['panel']['orders']}): position bias is in them")
    frames["prompts"] = samples.unique("prompt", keep="first", maintain_order=True).select(
        pl.col("prompt_turns").alias("prompt"), pl.col("prompt").alias("prompt_id"), "split", "run")
    select = (config.get("revise") or {}).get("select", "sweep")
    if config.get("revise") or record["recipe"] == "cai":
        frames["sft"] = _sft(samples, query(folder, f"SELECT * FROM critiques WHERE run = {run}"), select)
    return frames


def _TURNS(pl: Any) -> Any:  # noqa: N802
    return pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def _turns(messages: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in json.loads(messages)]


def _answer(column: str) -> Any:
    """One assistant's turn, as TRL's conversational formats have it."""
    import polars as pl

    return pl.concat_list(pl.struct(pl.lit("assistant").alias("role"), pl.col(column).alias("content")))


def _tell_left_out(preferences: polars.DataFrame, report: ExportReport) -> None:
    counts = dict(preferences["outcome"].value_counts().iter_rows())
    for outcome, words in (("tie", "are ties"), ("unscored", "are unscored")):
        if counts.get(outcome):
            report.notes.append(f"{counts[outcome]:,} of {preferences.height:,} comparisons {words} and give no pair")


def _win_rates(preferences: polars.DataFrame) -> polars.DataFrame:
    """Each sample's mean probability of winning its scored comparisons, and how many those are."""
    import polars as pl

    scored = preferences.filter(pl.col("p_a").is_not_null())
    sides = pl.concat([scored.select("prompt", pl.col("a").alias("index"), pl.col("p_a").alias("p")),
                       scored.select("prompt", pl.col("b").alias("index"), (1 - pl.col("p_a")).alias("p"))])
    return sides.group_by("prompt", "index").agg(pl.col("p").mean().alias("p_win"), pl.len().alias("n_comparisons"))


def _preference(preferences: polars.DataFrame, samples: polars.DataFrame, wins: polars.DataFrame, shape: str
                ) -> polars.DataFrame:
    """Decided pairs. `best_worst` keeps of each prompt the pair of its best and its worst sample, if it is decided."""
    import polars as pl

    decided = preferences.filter(pl.col("outcome").is_in(["a", "b"]))
    if shape == "best_worst":
        ranked = wins.sort("prompt", "p_win", "index", descending=[False, True, False])
        ends = ranked.group_by("prompt", maintain_order=True).agg(
            pl.col("index").first().alias("best"), pl.col("index").last().alias("worst"))
        decided = decided.join(ends, on="prompt").filter(
            (pl.min_horizontal("a", "b") == pl.min_horizontal("best", "worst"))
            & (pl.max_horizontal("a", "b") == pl.max_horizontal("best", "worst")))
    side = samples.select("prompt", "index", "text", "sample", "finish")
    first = samples.unique("prompt", keep="first").select("prompt", "prompt_turns", "split", pl.col("run").alias("run_name"))
    rows = (decided.join(side.rename({"index": "chosen", "text": "chosen_text", "sample": "chosen_sample",
                                      "finish": "chosen_finish"}), on=["prompt", "chosen"])
            .join(side.rename({"index": "rejected", "text": "rejected_text", "sample": "rejected_sample",
                               "finish": "rejected_finish"}), on=["prompt", "rejected"])
            .join(first, on="prompt").sort("prompt", "a", "b"))
    return rows.select(
        pl.col("prompt_turns").alias("prompt"), _answer("chosen_text").alias("chosen"),
        _answer("rejected_text").alias("rejected"), "p_chosen", "spread", "n_scored", "n_readings", "exactness",
        "preference", pl.col("prompt").alias("prompt_id"), "chosen_sample", "rejected_sample", "split",
        pl.col("run_name").alias("run"))


def _unpaired(samples: polars.DataFrame, wins: polars.DataFrame) -> polars.DataFrame:
    """Drafts with a thumb up or down: whether they win more than half of their comparisons (KTO)."""
    import polars as pl

    rows = samples.join(wins, on=["prompt", "index"]).filter((pl.col("p_win") - 0.5).abs() > WIN_MARGIN)
    return rows.sort("prompt", "index").select(
        pl.col("prompt_turns").alias("prompt"), _answer("text").alias("completion"),
        (pl.col("p_win") > 0.5).alias("label"), "p_win", "n_comparisons", "sample",
        pl.col("prompt").alias("prompt_id"), "split", "run")


def _sft(samples: polars.DataFrame, critiques: polars.DataFrame, select: str) -> polars.DataFrame:
    """Demonstrations. After a sweep: the last text of each draft that the critic could be read on, revised or found
    without fault. After draws: every revision, as in the paper (Bai et al. 2022). Equal texts of a prompt stand once."""
    import polars as pl

    revisions = samples.filter(pl.col("parent") >= 0)
    if select == "draw":
        rows = revisions
    else:
        superseded = revisions.select("prompt", pl.col("parent").alias("index"))
        unread = critiques.filter(pl.col("fault").is_null()).select("prompt", "index").unique()
        asked = critiques.select("prompt", "index").unique()
        last = samples.join(superseded, on=["prompt", "index"], how="anti")
        clean = (last.filter(pl.col("parent") < 0).join(asked, on=["prompt", "index"], how="semi")
                 .join(unread, on=["prompt", "index"], how="anti"))
        faulty = critiques.filter(pl.col("fault")).select("prompt", "index").unique()
        clean = clean.join(faulty, on=["prompt", "index"], how="anti")  # its revision could not be read
        rows = pl.concat([clean, last.filter(pl.col("parent") >= 0)])
    rows = rows.sort("prompt", "index").unique(["prompt", "text"], keep="first", maintain_order=True)
    return rows.select(
        pl.col("prompt_turns").alias("prompt"), _answer("text").alias("completion"),
        (pl.col("parent") >= 0).alias("revised"), "round", "principle", "sample", pl.col("prompt").alias("prompt_id"),
        "split", "run")


_WHAT = {
    "preference": "decided pairs (DPO, reward models): `prompt`, `chosen`, `rejected`, `p_chosen`",
    "unpaired": "single answers with a thumb up or down (KTO): `prompt`, `completion`, `label`, `p_win`",
    "prompts": "prompts alone (GRPO, PPO): `prompt`",
    "sft": "demonstrations (SFT): `prompt`, `completion`; `revised` says whether the text was rewritten",
}


def _card(record: dict[str, Any], report: ExportReport, folder: Path) -> str:
    """A dataset card: the configurations that `datasets` reads, then what a person should know."""
    from pipelines.fill import query

    config = json.loads(record["config"])
    principles = query(folder, "SELECT principle, title, digest FROM principles WHERE constitution = ? AND enabled "
                               "ORDER BY position", [record["constitution"] or ""])
    models = query(folder, "SELECT model, name FROM models")
    lines = ["---", "configs:"]
    for name, splits in report.counts.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {name}/{split}.parquet")]
    lines += ["tags: [prefab, rlaif, preference]", "---", MARK, "", f"# {report.run}", "",
              f"Made by Prefab's recipe `{record['recipe']}` under the constitution `{config.get('constitution')}`. "
              "The answers, critiques and judgments are a model's, not people's.", "",
              "| dataset | split | rows |", "|---|---|---|"]
    lines += [f"| {name} | {split} | {n:,} |" for name, split, n in report.rows()]
    lines += ["", *(f"- `{name}`: {_WHAT.get(name, 'a table of the store')}" for name in report.counts), ""]
    lines += ["```python", "from datasets import load_dataset",
              f'data = load_dataset("{report.out.name}", "{report.first()}", split="train")', "```", "",
              "`p_chosen` is the judges' probability that `chosen` is better, the mean of both orders unless a line below "
              "says otherwise. `prompt_id`, `preference`, `chosen_sample`, `rejected_sample`, `sample` and `run` lead "
              "back to the store. Rows that share a group never stand in two splits.", ""]
    lines += [f"- {note}" for note in report.notes]
    lines += ["", "Models in the store: " + ", ".join(f"`{name}`" for _, name in models.iter_rows()), "",
              "| principle | title | digest |", "|---|---|---|"]
    lines += [f"| {name} | {title} | {digest[:12]} |" for name, title, digest in principles.iter_rows()]
    return "\n".join(lines) + "\n"
