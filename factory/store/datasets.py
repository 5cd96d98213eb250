"""The rows of a run that are trained on: decided pairs, single answers labelled good or bad,
prompts, demonstrations.

Used by `prefab export` and by the trainers. Ties and unscored comparisons give no pairs; answers
that were cut off by length are left out unless asked for; everything that is left out is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import orjson

from prefab.factory import decision
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.factory.steps import step_spans
from prefab.factory.store.store import Read, each_shard
from prefab.factory.tool_calls import (
    answer_turn,
    as_text,
    message_turn,
    stored_messages,
    tools_of,
)
from prefab.factory.types import Message, Preference, Verdict

if TYPE_CHECKING:
    import polars

FITS = ("bradley_terry", "davidson")  # ways to choose pairs that need answers' strengths
# a mean win probability within this of a half gives no label (as the panel's tie_margin)
WIN_MARGIN = 0.02
# of a row of the table `verdicts`
_VERDICT = ("p_a", "winner", "reason", "mass", "tie_mass", "exactness")


# recipes of runs that a user means only by name
ASKED_FOR = ("import", "rejudge")


def check_store(folder: Path) -> None:
    """Raises: ConfigError where there is no store."""
    if not (folder / "ledger.sqlite").exists():
        raise ConfigError(
            f"{folder}: there is no store here (no ledger.sqlite); name one with --store DIR, or make one "
            "with `prefab run`"
        )


def find_run(folder: Path, read: Read, run: str = "") -> dict[str, Any]:
    """The run that NAME, NAME@VERSION or nothing (the last) stands for, as a row of the table
    `runs`.

    Raises: ConfigError with the runs there are.
    """
    check_store(folder)
    rows = list(read("SELECT * FROM runs ORDER BY last_start", ()).iter_rows(named=True))
    name, at, version = run.partition("@")
    rows = rows if name else [r for r in rows if r["recipe"] not in ASKED_FOR] or rows
    found = [
        r for r in rows if name in ("", r["name"]) and (not at or str(r["version"]) == version)
    ]
    if not found:
        there = ", ".join(f"{r['name']}@{r['version']}" for r in rows) or "none"
        raise ConfigError(f"{folder} has no run {run!r}; there are: {there}")
    return found[-1]


Weights = Literal["none", "prompt", "confidence"]


@dataclass(frozen=True, slots=True)
class PairSelection:
    """Which of a run's decided comparisons become pairs, and their weights.

    Args:
        method: compared, best_worst, bradley_terry or davidson; empty: as the run's `choose` says.
        margin: p_chosen must be above a half by at least this; None: as the run's `choose` says.
        per_prompt: The most pairs of one prompt; those with the highest p_chosen are kept. 0: all.
        balance_length: Leave out pairs, those with the greatest difference in length first, until
            the chosen answer is the longer one in as many pairs as the rejected answer is. This is
            done for each split, and in a large run for each part of it (up to 4,096 prompts).
        weights: A column `weight`: one over the number of the prompt's pairs (prompt), or
            2 p_chosen - 1 (confidence).
    """

    method: str = ""
    margin: float | None = None
    per_prompt: int = 0
    balance_length: bool = False
    weights: Weights = "none"


ALL_PAIRS = PairSelection()


@dataclass(slots=True)
class _LeftOut:
    """What gives no row of training data, counted over all parts of a run."""

    cut_off: int = 0
    marked: dict[str, int] = field(default_factory=dict)
    audited: int = 0  # comparisons before any was left out by a mark
    conversations: int = 0  # pairs whose answers have contexts of their own
    comparisons: int = 0
    scored: int = 0
    hard: int = 0
    ties: int = 0
    unscored: int = 0
    unconfirmed: int = 0
    within_margin: int = 0
    below_score: int = 0
    over_cap: int = 0
    unbalanced: int = 0

    def notes(self, label: str, config: dict[str, Any], pairs: PairSelection) -> list[str]:
        """One line for each kind that occurs, and what else a reader of the data must know."""
        lines = []
        if self.cut_off:
            lines.append(
                f"{counted(self.cut_off, 'answer')} cut off by length left out (`truncated` "
                "keeps such answers)"
            )
        if self.conversations:
            lines.append(
                f"{self.conversations:,} pairs have answers that follow different turns (a context "
                "of its own for each side). They are in `conversations`, not in `preference`: a "
                "reward model can be trained on them; DPO needs one prompt for both answers"
            )
        for rule, n in self.marked.items():
            lines.append(f"{n:,} of {self.audited:,} comparisons are left out as {rule}")
        if origin := config.get("origin"):
            lines.append(
                f"{label} is imported from {origin['file']} ({origin['format']}, {origin['by']}, "
                f"SHA-256 {origin['sha256'][:16]}); its labels are the file's, no judge's of this "
                "store"
            )
        return lines + self._of_comparisons(config, pairs) if self.comparisons else lines

    def _of_comparisons(self, config: dict[str, Any], pairs: PairSelection) -> list[str]:
        (method, margin), lines = choice(config, pairs), []
        orders = (config.get("panel") or {}).get("orders", "both")
        if orders != "both":
            lines.append(
                f"pairs were judged in one order only ({orders}): position bias is in them"
            )
        if self.hard and not config.get("origin"):
            lines.append(
                f"{self.hard:,} of {self.scored:,} comparisons stand on hard labels: a judge's "
                "server gave no log-probabilities (or the judge answers in words), so `p_chosen` "
                "is a share of votes"
            )
        for n, words in ((self.ties, "are ties"), (self.unscored, "are unscored")):
            if n:
                lines.append(f"{n:,} of {self.comparisons:,} comparisons {words} and give no pair")
        if self.unconfirmed:
            lines.append(
                f"{self.unconfirmed:,} decided comparisons are not confirmed by the {method} fit of "
                "their prompt, or it has none: they give no pair"
            )
        if config.get("recipe") == "best_of_n":
            lines += self._of_best(config)
        if self.within_margin:
            lines.append(
                f"{self.within_margin:,} decided comparisons are within {margin} of a half and give "
                "no pair"
            )
        if self.over_cap:
            lines.append(
                f"{self.over_cap:,} pairs are left out: at most {pairs.per_prompt} of each prompt "
                "are kept, those with the highest p_chosen"
            )
        if self.unbalanced:
            lines.append(
                f"{self.unbalanced:,} pairs are left out, so that the chosen answer is the longer "
                "one as often as the rejected answer"
            )
        if method != "compared":
            lines.append(f"pairs were chosen by {method}")
        return lines

    def _of_best(self, config: dict[str, Any]) -> list[str]:
        from prefab.factory.stats import bon_kl

        n = config["policy"]["samples"]
        lines = [
            f"demonstrations are the best of {n} answers to each prompt: choosing them moves at "
            f"most {bon_kl(n):.2f} nats an answer from the policy that wrote them "
            "(log n - (n - 1) / n)"
        ]
        choose = config.get("choose") or {}
        if choose.get("demonstrations") == "accepted":
            lines = [f"demonstrations are all answers scored at least {choose['min_score']:g}"]
        if self.below_score:
            lines.append(
                f"{self.below_score:,} answers are scored below {choose['min_score']:g} and are no "
                "demonstrations"
            )
        return lines


PART_BYTES = 8 << 20  # of the texts of answers in one part
PART_PROMPTS = 4_096


def dataset_parts(
    read: Read,
    record: dict[str, Any],
    notes: list[str],
    truncated: bool = False,
    without: Sequence[str] = (),
    judges: Sequence[str] = (),
    principles: Sequence[str] = (),
    select: str = "",
    pairs: PairSelection = ALL_PAIRS,
) -> Iterator[dict[str, polars.DataFrame]]:
    """TRL's four kinds of data for a run, conversational, in its column names, in parts that fit
    into memory whatever the size of the run. A prompt is whole in one part; prompts come in the
    order in which the store holds them, and sorted within a part. What is left out, and why, is
    appended to `notes` after the last part.

    Args:
        read: Of one open connection, so that all parts come from the same state of the store.
        record: The run, as a row of the table `runs`.
        notes: Takes the lines about what is left out.
        truncated: Keep answers that were cut off by length.
        without: Rules of the data gate: pairs that `prefab audit data` marked by them are left out,
            and where the mark concerns the prompt, all that the prompt has.
        judges: Keep the readings of these alone: the preference is then decided anew from them.
        principles: Likewise.
        select: Which demonstrations: draw (every revision) or sweep (the last text of each draft);
            empty: as the run did.
        pairs: Which decided comparisons become pairs.

    Raises:
        ConfigError: No audit has checked a rule of `without`; a judge or principle read nothing;
            the run has no fit of the method that `pairs` names.
    """
    run = record["run"]
    part = _Part(read, record, truncated, select, without, _has_tools(read, run), pairs)
    part.check_method()
    if without:
        _check_audit(read, record, without)
    if judges or principles:
        _check_readers(read, record, judges, principles)
    tables = ["prompts", "preferences", "critiques", "strengths", "scores"]
    tables += ["verdicts"] if judges or principles else []
    for _ in each_shard(read):
        for prompts, rows in _prompts_in_parts(read, run, tables):
            yield part.frames(prompts, rows, judges, principles)
    notes += part.left_out.notes(part.label, part.config, pairs)


# The steps of a run's answers that have a label, in their order; each label is the mean over judges
# and principles.
_STEPS = """
WITH labelled AS (
    SELECT prompt, "index", step, avg(p_right) AS p FROM steps
    WHERE run = $run AND p_right IS NOT NULL
        AND (len($judges::VARCHAR[]) = 0 OR list_contains($judges::VARCHAR[], judge))
        AND (len($principles::VARCHAR[]) = 0 OR list_contains($principles::VARCHAR[], principle))
    GROUP BY ALL)
SELECT q.messages, s.text, s.sample, s.finish, s.prompt, q.split, list(l.step ORDER BY l.step) AS steps,
    list(l.p ORDER BY l.step) AS labels
FROM labelled l JOIN prompts q ON q.prompt = l.prompt
JOIN samples s ON s.run = $run AND s.prompt = l.prompt AND s."index" = l."index"
WHERE s.text IS NOT NULL GROUP BY ALL ORDER BY s.prompt, s.sample"""


def step_rows(
    read: Read,
    record: dict[str, Any],
    notes: list[str],
    truncated: bool = False,
    judges: Sequence[str] = (),
    principles: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """The answers of a run of the recipe process, each with its steps as [end in characters,
    P(right)]. Steps that could not be read have no label.

    Args:
        read: Of one open connection.
        record: The run, as a row of the table `runs`.
        notes: Takes a line about answers that are left out.
        truncated: Keep answers that were cut off by length.
        judges: Labels of these alone.
        principles: Likewise.
    """
    by = (json.loads(record["config"]).get("steps") or {}).get("by", "line")
    values = {"run": record["run"], "judges": list(judges), "principles": list(principles)}
    cut_off = 0
    for row in read(_STEPS, values).iter_rows(named=True):
        if row["finish"] == "length" and not truncated:
            cut_off += 1
            continue
        ends = [end for _, end in step_spans(row["text"], by)]
        yield {
            "prompt": [message_turn(m) for m in stored_messages(row["messages"])],
            "completion": row["text"],
            "steps": [
                [ends[step], p]
                for step, p in zip(row["steps"], row["labels"], strict=True)
                if step < len(ends)
            ],
            "sample": row["sample"],
            "prompt_id": row["prompt"],
            "split": row["split"],
        }
    if cut_off:
        notes.append(
            f"{counted(cut_off, 'answer')} cut off by length left out (`truncated` keeps such answers)"
        )


Range = tuple[int, int]


def _prompts_in_parts(
    read: Read, run: int, tables: Sequence[str]
) -> Iterator[tuple[list[str], dict[str, Range]]]:
    """The prompts of a run in parts of PART_BYTES, and by table the first and the last row that
    belong to a part. All rows of a prompt are inserted together, so these ranges are short.

    The parts are made within DuckDB, from hashes of the prompts' ids: the ids of a million prompts
    are 64 MB of text, and joins of them take several times as much.
    """
    import polars as pl

    rows_of = "md5_number(prompt) AS prompt, min(rowid) AS first, max(rowid) AS last"
    samples = f"FROM samples WHERE run = {run} AND text IS NOT NULL GROUP BY 1"
    number = (
        f"(sum(size) OVER before)::BIGINT // {PART_BYTES} + (row_number() OVER before) // "
        f"{PART_PROMPTS}"
    )
    parts = read(
        f"WITH places AS (SELECT {rows_of}, sum(strlen(text))::BIGINT AS size {samples}), "
        f"numbered AS (SELECT first, last, {number} AS part FROM places WINDOW before AS "
        "(ORDER BY first ROWS UNBOUNDED PRECEDING)) SELECT min(first) AS first, max(last) AS last "
        "FROM numbered GROUP BY part ORDER BY 1",
        (),
    ).rows()
    starts = [first for first, _ in parts]
    ranges: dict[str, dict[int, Range]] = {}
    for table in tables:
        where = "" if table == "prompts" else f"WHERE run = {run}"
        found = read(
            f"WITH places AS (SELECT {rows_of} {samples}), "
            f"others AS (SELECT {rows_of} FROM {table} {where} GROUP BY 1) "
            "SELECT start, min(o.first), max(o.last) FROM others o JOIN places p USING (prompt) "
            "ASOF JOIN (SELECT unnest(?) AS start) s ON p.first >= s.start GROUP BY start",
            [starts],
        )
        ranges[table] = {start: (first, last) for start, first, last in found.iter_rows()}
    later: dict[str, int] = {}  # of parts before: prompts with rows among those of the next ones
    for (start, last), end in zip(
        parts, [*starts[1:], parts[-1][1] + 1] if parts else (), strict=True
    ):
        rows = read(
            f"SELECT prompt, max(rowid) AS last FROM samples WHERE run = {run} AND text IS NOT NULL "
            f"AND rowid BETWEEN {start} AND {last} GROUP BY prompt HAVING min(rowid) < {end}",
            (),
        ).filter(~pl.col("prompt").is_in(list(later)))
        of_tables = {table: found.get(start, (0, -1)) for table, found in ranges.items()}
        yield rows["prompt"].to_list(), {"samples": (start, last), **of_tables}
        later |= dict(rows.iter_rows())
        later = {prompt: at for prompt, at in later.items() if at >= end}


def _has_tools(read: Read, run: int) -> bool:
    """Whether any prompt of a run has tools or calls: then all its data have the columns for it."""
    found = read(
        "SELECT count(*) AS n FROM prompts WHERE len(json_extract(messages, '$[*][2]')) > 0 "
        f"AND prompt IN (SELECT prompt FROM samples WHERE run = {run})",
        (),
    )
    return bool(found["n"][0])


class _Part:
    """The datasets of a run, or of some of its prompts at a time. What was left out is counted over
    all of them.
    """

    def __init__(
        self,
        read: Read,
        record: dict[str, Any],
        truncated: bool,
        select: str,
        without: Sequence[str],
        tools: bool,
        pairs: PairSelection,
    ) -> None:
        self.label = f"{record['name']}@{record['version']}"
        self.config = json.loads(record["config"])
        self.left_out = _LeftOut()
        self._pairs = pairs
        self._read, self._record, self._truncated, self._tools = read, record, truncated, tools
        self._without = list(without)
        self._select = select or (self.config.get("revise") or {}).get("select", "sweep")
        self._revised = bool(self.config.get("revise")) or record["recipe"] == "cai"

    def check_method(self) -> None:
        """Raises: ConfigError where the pairs are to be chosen by a fit that the run does not
        have.
        """
        method, fitted = choice(self.config, self._pairs)[0], choice(self.config)[0]
        if method in FITS and method != fitted:
            raise ConfigError(
                f"{self.label} has no {method} fit. Set `choose: {{method: {method}}}` in its "
                "pipeline file, and run it again: no question is asked for it"
            )

    def frames(
        self,
        prompts: list[str],
        rows: dict[str, Range],
        judges: Sequence[str],
        principles: Sequence[str],
    ) -> dict[str, polars.DataFrame]:
        """The datasets of these prompts, which have `rows` of each table."""
        import polars as pl

        of_run = f"run = {self._record['run']}"

        def table(name: str, where: str = of_run, columns: str = "*") -> polars.DataFrame:
            first, last = rows[name]
            of_part = f"rowid BETWEEN {first} AND {last} AND prompt IN (SELECT unnest(?))"
            return self._read(
                f"SELECT {columns} FROM {name} WHERE {where} AND {of_part}", [prompts]
            )

        # joined and sorted by DuckDB, the texts would have to fit its memory
        talks = table("prompts", "true", "prompt, messages, split")
        samples = table("samples", f"{of_run} AND text IS NOT NULL").join(talks, on="prompt")
        samples = samples.sort("prompt", "index").with_columns(pl.lit(self.label).alias("run"))
        samples = _with_turns(samples, self._tools)
        if not self._truncated:
            whole = samples.filter(pl.col("finish") != "length")
            self.left_out.cut_off += samples.height - whole.height
            samples = whole
        preferences = table("preferences").sort("prompt", "a", "b")
        if self._without:
            samples, preferences = self._unmarked(samples, preferences)
        if (judges or principles) and preferences.height:
            verdicts = table("verdicts")
            for column, names in (("judge", judges), ("principle", principles)):
                verdicts = verdicts.filter(pl.col(column).is_in(list(names))) if names else verdicts
            preferences = _decided_by(self._read, self._record, preferences, verdicts)
        frames = {}
        if preferences.height:
            self._count(preferences)
            wins = _win_rates(preferences)
            method, margin = choice(self.config, self._pairs)
            strengths = table("strengths") if method in FITS else None
            chosen = _chosen(preferences, wins, strengths, method, margin, self.left_out)
            chosen = _selected(chosen, samples, self._pairs, self.left_out)
            frames["preference"] = _preference(chosen, samples)
            if samples["context"].is_not_null().any():
                conversations = _conversations(chosen, samples)
                self.left_out.conversations += conversations.height
                if conversations.height:
                    frames["conversations"] = conversations
            frames["unpaired"] = _unpaired(samples, wins)
        frames["prompts"] = samples.unique("prompt", keep="first", maintain_order=True).select(
            pl.col("prompt_turns").alias("prompt"),
            *_tools(samples),
            pl.col("prompt").alias("prompt_id"),
            "split",
            "run",
        )
        if self._revised:
            frames["sft"] = _sft(samples, table("critiques"), self._select)
        elif self._record["recipe"] == "best_of_n" and preferences.height:
            kept = self._demonstrations(samples, preferences, table("scores"))
            frames["sft"] = _demonstration_rows(kept)
        return frames

    def _demonstrations(
        self, samples: polars.DataFrame, preferences: polars.DataFrame, scores: polars.DataFrame
    ) -> polars.DataFrame:
        """The samples that a run of best-of-n keeps for SFT: of each prompt the best, or all that
        are accepted. Of two answers that the panel calls equal, the one with the larger share.
        """
        import polars as pl

        choose = self.config.get("choose") or {}
        kept = samples
        if choose.get("demonstrations") != "accepted":
            first = pl.col("p_a").fill_null(0.5) >= 0.5
            best = preferences.filter(pl.col("outcome") != "unscored").select(
                "prompt", pl.when(first).then("a").otherwise("b").alias("index")
            )
            kept = kept.join(best, on=["prompt", "index"], how="semi", maintain_order="left")
        if (least := choose.get("min_score")) is not None:
            means = scores.group_by("prompt", "index").agg(pl.col("value").mean())
            enough = means.filter(pl.col("value") >= least)
            n = kept.height
            kept = kept.join(enough, on=["prompt", "index"], how="semi", maintain_order="left")
            self.left_out.below_score += n - kept.height
        return kept

    def _count(self, preferences: polars.DataFrame) -> None:
        import polars as pl

        counts, scored = self.left_out, preferences.filter(pl.col("p_a").is_not_null())
        outcomes = dict(preferences["outcome"].value_counts().iter_rows())
        counts.comparisons += preferences.height
        counts.scored += scored.height
        counts.hard += scored.filter(pl.col("exactness") == "hard").height
        counts.ties += outcomes.get("tie", 0)
        counts.unscored += outcomes.get("unscored", 0)

    def _unmarked(
        self, samples: polars.DataFrame, preferences: polars.DataFrame
    ) -> tuple[polars.DataFrame, polars.DataFrame]:
        """Samples and preferences without those that the latest audit marked by the rules."""
        import polars as pl

        run = self._record["run"]
        marks = self._read(
            f"SELECT * FROM marks WHERE run = {run} AND list_contains(?, rule) "
            "AND preference IN (SELECT unnest(?))",
            (self._without, preferences["preference"].to_list()),
        ).join(preferences.select("preference", "prompt"), on="preference")
        self.left_out.audited += preferences.height
        for rule in self._without:
            n = marks.filter(pl.col("rule") == rule)["preference"].n_unique()
            self.left_out.marked[rule] = self.left_out.marked.get(rule, 0) + n
        prompts = marks.filter("of_prompt").select("prompt")
        preferences = preferences.join(marks, on="preference", how="anti", maintain_order="left")
        return (
            samples.join(prompts, on="prompt", how="anti", maintain_order="left"),
            preferences.join(prompts, on="prompt", how="anti", maintain_order="left"),
        )


def audited(preferences: polars.DataFrame) -> str:
    """What tells one set of preferences from another: how many there are, and their ids
    together.
    """
    together = 0
    for name in preferences["preference"]:
        together ^= int(name[:16], 16)
    return f"{preferences.height} {together:016x}"


def _check_audit(read: Read, record: dict[str, Any], rules: Sequence[str]) -> None:
    """Raises: ConfigError where no audit has seen just these preferences, or it did not look by one
    of the rules.
    """
    run, label = record["run"], f"{record['name']}@{record['version']}"
    found = read(
        "SELECT value FROM evals WHERE name = 'audit data' AND (value->>'$.run')::INTEGER = ? "
        "ORDER BY evaluated_at DESC LIMIT 1",
        (run,),
    )
    audit = json.loads(found["value"][0]) if found.height else {}
    now = read(
        "SELECT count(*) AS n, coalesce(bit_xor(('0x' || preference[:16])::UBIGINT), 0) AS ids "
        f"FROM preferences WHERE run = {run}",
        (),
    )
    if audit.get("audited") != f"{now['n'][0]} {now['ids'][0]:016x}":
        raise ConfigError(
            f"{label} has {'changed since it was audited' if audit else 'not been audited'}: "
            f"`prefab audit data --run {label}` first, then leave out what it marks"
        )
    missing = [rule for rule in rules if rule not in audit["rules"]]
    if missing:
        there = ", ".join(audit["rules"])
        raise ConfigError(
            f"the audit of {label} did not look for {', '.join(missing)}; it looked for: {there}"
        )


def _with_turns(samples: polars.DataFrame, with_tools: bool) -> polars.DataFrame:
    """The samples with `prompt_turns`, `context_turns` (of an answer that has a context of its own)
    and `answer` (the assistant's turn in a list) as TRL's conversational formats have them.
    `with_tools`: with `tool_calls`, whose arguments are JSON text, and a column `tools`, which is
    JSON text too.
    """
    import polars as pl

    talks = {text: stored_messages(text) for text in samples["messages"].unique()}
    contexts = [_messages_of_context(text) for text in samples["context"]]
    turn: dict[str, Any] = {"role": pl.String, "content": pl.String}
    if not with_tools:
        turns = [list(map(message_turn, talks[text])) for text in samples["messages"]]
        own = [one and list(map(message_turn, one)) for one in contexts]
        answers = pl.concat_list(
            pl.struct(pl.lit("assistant").alias("role"), pl.col("text").alias("content"))
        )
        table = pl.List(pl.Struct(turn))
        return samples.with_columns(
            pl.Series("prompt_turns", turns, table),
            pl.Series("context_turns", own, table),
            answers.alias("answer"),
        )
    function = pl.Struct({"name": pl.String, "arguments": pl.String})
    call = pl.Struct({"id": pl.String, "type": pl.String, "function": function})
    turn |= {"tool_calls": pl.List(call), "tool_call_id": pl.String, "name": pl.String}
    table = pl.List(pl.Struct(turn))
    tools = [orjson.dumps(tools_of(talks[text])).decode() for text in samples["messages"]]

    def row_of(message: Message) -> dict[str, Any]:
        return _row_of(message_turn(message), turn)

    turns = [list(map(row_of, talks[text])) for text in samples["messages"]]
    own = [one and list(map(row_of, one)) for one in contexts]
    made = [[_row_of(answer_turn(text), turn)] for text in samples["text"]]
    return samples.with_columns(
        pl.Series("prompt_turns", turns, table),
        pl.Series("context_turns", own, table),
        pl.Series("answer", made, table),
        pl.Series("tools", [None if text == "[]" else text for text in tools], pl.String),
    )


def _messages_of_context(text: str | None) -> tuple[Message, ...] | None:
    return stored_messages(text) if text else None


def _asked(context: str = "context_turns") -> polars.Expr:
    """The prompt with the answer's own context."""
    import polars as pl

    turns = pl.col("prompt_turns")
    return pl.when(pl.col(context).is_null()).then(turns).otherwise(pl.concat_list(turns, context))


def _row_of(turn: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    calls = [
        {"id": call.get("id"), "type": "function", "function": as_text(call["function"])}
        for call in turn.get("tool_calls", ())
    ]
    return {**dict.fromkeys(columns), **turn, "tool_calls": calls or None}


def _tools(rows: polars.DataFrame) -> list[str]:
    return ["tools"] if "tools" in rows.columns else []


def _weight(rows: polars.DataFrame) -> list[str]:
    return ["weight"] if "weight" in rows.columns else []


def _check_readers(
    read: Read, record: dict[str, Any], judges: Sequence[str], principles: Sequence[str]
) -> None:
    """Raises: ConfigError for a judge or principle that read nothing in this run."""
    for column, names in (("judge", judges), ("principle", principles)):
        sql = f"SELECT DISTINCT {column} FROM verdicts WHERE run = {record['run']} ORDER BY 1"
        there = read(sql, ())[column].to_list() if names else []
        if missing := [name for name in names if name not in there]:
            raise ConfigError(
                f"no {column} {missing[0]!r} in {record['name']}@{record['version']}; there are: "
                f"{', '.join(there)}"
            )


def _decided_by(
    read: Read,
    record: dict[str, Any],
    preferences: polars.DataFrame,
    verdicts: polars.DataFrame,
) -> polars.DataFrame:
    """The preferences as these verdicts alone decide them, by the run's own rule. What was
    calibrated on the whole panel is no calibration of these: `p_chosen` is their share of the vote.
    """
    import polars as pl

    columns = ("outcome", "p_a", "p_chosen", "spread", "n_scored", "n_readings", "exactness")
    decided = [
        (p.prompt, p.a, p.b, *(getattr(p, name) for name in columns))
        for p in _decisions(read, record, verdicts)
    ]
    pair = ("prompt", "a", "b")
    types = {name: preferences.schema[name] for name in (*pair, *columns)}
    rows = preferences.drop(columns).join(
        pl.DataFrame(decided, types, orient="row"), on=pair, how="inner", maintain_order="left"
    )
    first = pl.col("outcome") == "a"
    return rows.with_columns(
        pl.when(first).then("a").otherwise("b").alias("chosen"),
        pl.when(first).then("b").otherwise("a").alias("rejected"),
        pl.col("p_chosen").alias("vote_share"),
        pl.lit(None, preferences.schema["calibrated"]).alias("calibrated"),
    )


def _decisions(
    read: Read, record: dict[str, Any], verdicts: polars.DataFrame
) -> Iterator[Preference]:
    """What these verdicts say of each comparison, by the run's rule and weights."""
    import polars as pl

    panel = json.loads(record["config"]).get("panel") or {}
    name = (record["constitution"] or "",)
    found = read("SELECT selection FROM constitutions WHERE constitution = ?", name)
    rule = decision.rule_of(panel, found["selection"][0] if found.height else "all")
    sql = "SELECT principle, position, weight FROM principles WHERE constitution = ?"
    places = {principle: rest for principle, *rest in read(sql, name).iter_rows()}
    by_judge = {judge["name"]: judge.get("weight", 1.0) for judge in panel.get("judges", [])}
    # what needs no principle first, then the constitution's order: the first that decides counts
    position = {principle: at for principle, (at, _) in places.items()}
    order = pl.col("principle").replace_strict(position, default=-1, return_dtype=pl.Int64)
    ordered = verdicts.sort("prompt", "a", "b", order, "principle", "judge", "repeat", "order")
    by_pair = itemgetter("prompt", "a", "b")
    for (prompt, a, b), rows in groupby(ordered.iter_rows(named=True), by_pair):
        readings = []
        for (principle, judge), some in groupby(rows, itemgetter("principle", "judge")):
            weight = places.get(principle, (0, 1.0))[1] * by_judge.get(judge, 1.0)
            said = [Verdict(**{of: row[of] for of in _VERDICT}) for row in some]
            readings.append(decision.combine_orders(said, weight, principle, judge))
        yield decision.decide(readings, rule, prompt, a, b)


def _win_rates(preferences: polars.DataFrame) -> polars.DataFrame:
    """Each sample's mean probability of winning its scored comparisons, and how many those are."""
    import polars as pl

    scored = preferences.filter(pl.col("p_a").is_not_null())
    sides = pl.concat(
        [
            scored.select("prompt", pl.col("a").alias("index"), pl.col("p_a").alias("p")),
            scored.select("prompt", pl.col("b").alias("index"), (1 - pl.col("p_a")).alias("p")),
        ]
    )
    return sides.group_by("prompt", "index").agg(
        pl.col("p").mean().alias("p_win"), pl.len().alias("n_comparisons")
    )


def choice(config: dict[str, Any], pairs: PairSelection = ALL_PAIRS) -> tuple[str, float]:
    """How a run's decided comparisons become pairs, and by how much the chosen one must win."""
    choose = config.get("choose") or {}
    usual = "best_worst" if config.get("pairs") == "best_worst" else "compared"
    method = pairs.method or choose.get("method") or usual
    return method, choose.get("margin", 0.0) if pairs.margin is None else pairs.margin


def _chosen(
    preferences: polars.DataFrame,
    wins: polars.DataFrame,
    strengths: polars.DataFrame | None,
    method: str,
    margin: float,
    left_out: _LeftOut,
) -> polars.DataFrame:
    """The decided comparisons that become pairs, with the `method` that chose them. `best_worst`
    keeps of each prompt the pair of its best and its worst sample, if it is decided; a fit keeps
    what it confirms, with its own probability.
    """
    import polars as pl

    decided = preferences.filter(pl.col("outcome").is_in(["a", "b"])).with_columns(
        pl.lit(method).alias("method")
    )
    if method == "best_worst":
        ranked = wins.sort("prompt", "p_win", "index", descending=[False, True, False])
        ends = ranked.group_by("prompt", maintain_order=True).agg(
            pl.col("index").first().alias("best"), pl.col("index").last().alias("worst")
        )
        decided = decided.join(ends, on="prompt").filter(
            (pl.min_horizontal("a", "b") == pl.min_horizontal("best", "worst"))
            & (pl.max_horizontal("a", "b") == pl.max_horizontal("best", "worst"))
        )
    n = decided.height
    if strengths is not None:
        side = strengths.select("prompt", "index", "strength")
        decided = decided.join(
            side.rename({"index": "chosen", "strength": "of_chosen"}), on=["prompt", "chosen"]
        ).join(
            side.rename({"index": "rejected", "strength": "of_rejected"}), on=["prompt", "rejected"]
        )
        p = 1 / (1 + (pl.col("of_rejected") - pl.col("of_chosen")).exp())
        decided = decided.with_columns(p.alias("p_chosen")).filter(pl.col("p_chosen") > 0.5)
        left_out.unconfirmed += n - decided.height
    above = decided.filter(pl.col("p_chosen") >= 0.5 + margin)
    left_out.within_margin += decided.height - above.height
    return above


def _selected(
    decided: polars.DataFrame,
    samples: polars.DataFrame,
    pairs: PairSelection,
    left_out: _LeftOut,
) -> polars.DataFrame:
    """The pairs that the caps and the balance of lengths keep, with a column `weight` where one
    is asked for.
    """
    import polars as pl

    if pairs.per_prompt:
        ranked = decided.sort("p_chosen", "a", "b", descending=[True, False, False])
        capped = ranked.filter(pl.int_range(pl.len()).over("prompt") < pairs.per_prompt)
        left_out.over_cap += decided.height - capped.height
        decided = capped
    if pairs.balance_length:
        balanced = _balanced(decided, samples)
        left_out.unbalanced += decided.height - balanced.height
        decided = balanced
    if pairs.weights == "prompt":
        return decided.with_columns((1 / pl.len().over("prompt")).alias("weight"))
    if pairs.weights == "confidence":
        return decided.with_columns((2 * pl.col("p_chosen") - 1).alias("weight"))
    return decided


def _balanced(decided: polars.DataFrame, samples: polars.DataFrame) -> polars.DataFrame:
    """The pairs without as many as it takes for the chosen answer to be the longer one in half of
    the pairs of each split whose answers differ in length.
    """
    import polars as pl

    size = samples.select(
        "prompt", "index", "split", pl.col("text").str.len_chars().cast(pl.Int64).alias("size")
    )
    sized = decided.join(
        size.rename({"index": "chosen", "size": "size_chosen"}), on=["prompt", "chosen"]
    ).join(
        size.drop("split").rename({"index": "rejected", "size": "size_rejected"}),
        on=["prompt", "rejected"],
    )
    more = pl.col("size_chosen") - pl.col("size_rejected")
    sized = sized.with_columns(more.sign().alias("longer"), more.abs().alias("difference"))
    sized = sized.sort("difference", "preference")
    kept = pl.min_horizontal((pl.col("longer") == sign).sum().over("split") for sign in (1, -1))
    place = pl.int_range(pl.len()).over("split", "longer")
    return sized.filter((pl.col("longer") == 0) | (place < kept)).select(decided.columns)


_OF_PAIR = (
    "p_chosen",
    "vote_share",
    "calibrated",
    "spread",
    "n_scored",
    "n_readings",
    "exactness",
    "method",
    "preference",
    "prompt_id",
    "chosen_sample",
    "rejected_sample",
    "split",
    "run",
)


def _preference(decided: polars.DataFrame, samples: polars.DataFrame) -> polars.DataFrame:
    """Pairs of answers to one prompt as TRL has them, with what leads back to the store."""
    import polars as pl

    rows = _with_sides(decided, samples).filter(
        pl.col("chosen_context_turns").is_null() & pl.col("rejected_context_turns").is_null()
    )
    return rows.select(
        pl.col("prompt_turns").alias("prompt"),
        pl.col("chosen_answer").alias("chosen"),
        pl.col("rejected_answer").alias("rejected"),
        *_tools(rows),
        *_OF_PAIR,
        *_weight(rows),
    )


def _conversations(decided: polars.DataFrame, samples: polars.DataFrame) -> polars.DataFrame:
    """Pairs of answers that follow different turns, each side a whole conversation: TRL's format
    without a `prompt`.
    """
    import polars as pl

    rows = _with_sides(decided, samples).filter(
        pl.col("chosen_context_turns").is_not_null()
        | pl.col("rejected_context_turns").is_not_null()
    )
    return rows.select(
        *(
            pl.concat_list(_asked(f"{side}_context_turns"), f"{side}_answer").alias(side)
            for side in ("chosen", "rejected")
        ),
        pl.lit(True).alias("two_contexts"),
        *_tools(rows),
        *_OF_PAIR,
        *_weight(rows),
    )


def _with_sides(decided: polars.DataFrame, samples: polars.DataFrame) -> polars.DataFrame:
    """The decided comparisons with both answers and their prompt."""
    import polars as pl

    of_side = ("answer", "sample", "context_turns")
    side = samples.select("prompt", "index", *of_side)
    first = samples.unique("prompt", keep="first").select(
        "prompt", "prompt_turns", *_tools(samples), "split", pl.col("run").alias("run_name")
    )
    for name in ("chosen", "rejected"):
        columns = {"index": name} | {column: f"{name}_{column}" for column in of_side}
        decided = decided.join(side.rename(columns), on=["prompt", name])
    return (
        decided.join(first, on="prompt")
        .sort("prompt", "a", "b")
        .rename({"prompt": "prompt_id", "run": "run_number", "run_name": "run"})
    )


def _unpaired(samples: polars.DataFrame, wins: polars.DataFrame) -> polars.DataFrame:
    """Drafts labelled good or bad (KTO): whether they win more than half of their comparisons."""
    import polars as pl

    rows = samples.join(wins, on=["prompt", "index"]).filter(
        (pl.col("p_win") - 0.5).abs() > WIN_MARGIN
    )
    return rows.sort("prompt", "index").select(
        _asked().alias("prompt"),
        pl.col("answer").alias("completion"),
        *_tools(rows),
        (pl.col("p_win") > 0.5).alias("label"),
        "p_win",
        "n_comparisons",
        "sample",
        pl.col("prompt").alias("prompt_id"),
        "split",
        "run",
    )


def _sft(samples: polars.DataFrame, critiques: polars.DataFrame, select: str) -> polars.DataFrame:
    """Demonstrations. After a sweep: the last text of each draft that the critic could be read on,
    revised or found without fault. After draws: every revision, as in the paper (Bai et al. 2022).
    """
    import polars as pl

    revisions = samples.filter(pl.col("parent") >= 0)
    if select == "draw":
        rows = revisions
    else:
        superseded = revisions.select("prompt", pl.col("parent").alias("index"))
        unread = critiques.filter(pl.col("fault").is_null()).select("prompt", "index").unique()
        asked = critiques.select("prompt", "index").unique()
        last = samples.join(superseded, on=["prompt", "index"], how="anti")
        clean = (
            last.filter(pl.col("parent") < 0)
            .join(asked, on=["prompt", "index"], how="semi")
            .join(unread, on=["prompt", "index"], how="anti")
        )
        faulty = critiques.filter(pl.col("fault")).select("prompt", "index").unique()
        clean = clean.join(
            faulty, on=["prompt", "index"], how="anti"
        )  # its revision could not be read
        rows = pl.concat([clean, last.filter(pl.col("parent") >= 0)])
    return _demonstration_rows(rows)


def _demonstration_rows(samples: polars.DataFrame) -> polars.DataFrame:
    """Samples as rows for SFT; equal texts of a prompt stand once."""
    import polars as pl

    rows = samples.sort("prompt", "index").unique(
        ["prompt", "text"], keep="first", maintain_order=True
    )
    return rows.select(
        pl.col("prompt_turns").alias("prompt"),
        pl.col("answer").alias("completion"),
        *_tools(rows),
        (pl.col("parent") >= 0).alias("revised"),
        "round",
        "principle",
        "sample",
        pl.col("prompt").alias("prompt_id"),
        "split",
        "run",
    )
