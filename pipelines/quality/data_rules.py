"""Rules that find defects in preference pairs; each rule is a function that returns marks.

A mark is the id of a preference and a short detail. Nothing is deleted: `prefab export --without
RULE` leaves marked pairs out. The rules work on `Data`, where every text is a number, so that a
million pairs take about a minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from prefab.pipelines.quality import near_duplicates

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

NGRAM, SHORTEST = 13, 8
LEAST_WORDS_APART = 20
SPLITS = ("train", "val", "test")
OPENING = 300  # a refusal is recognised in this many characters at the beginning


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule.

    Attributes:
        name: Its name, which is also the name of its function.
        what: Which pairs it marks.
        threshold: Its default threshold, if it has one.
        source: Where the threshold, or the rule, comes from.
        limit: The share of pairs that may be marked before the audit fails; None: it never fails.
        of_prompt: Whether a mark concerns the prompt, with all of its pairs.
    """

    name: str
    what: str
    threshold: float | None
    source: str
    limit: float | None = None
    of_prompt: bool = False


RULES = (
    Rule(
        "low_margin",
        "calibrated p_chosen below the threshold; a share of the vote is not a probability, and is compared only with a "
        "threshold that is set for it",
        0.6,
        "at least 40% of such labels are wrong, the upper end of the noise found in preference data (20-40%; Gao et "
        "al. 2024)",
    ),
    Rule(
        "near_duplicate",
        "prompt and both answers are almost those of an earlier pair (Jaccard similarity of word pairs)",
        0.8,
        "Lee et al. 2022, with 5-word shingles of web pages; word pairs here, because answers are short",
    ),
    Rule(
        "identical",
        "the answers differ at most in white space",
        None,
        "one of two equal texts cannot be better",
    ),
    Rule(
        "length",
        f"one answer is this many times as long as the other, and at least {LEAST_WORDS_APART} words longer",
        3.0,
        "our choice: from such pairs a model can learn to prefer length (Singhal et al. 2023: length explains most of "
        "the gain in reward of RLHF)",
    ),
    Rule(
        "contradiction",
        "another pair prefers the same two answers to the prompt the other way round",
        None,
        "one of the two labels is wrong",
    ),
    Rule(
        "cycle",
        "preferences between answers to a prompt form a cycle of three or more",
        None,
        "no reward can order a cycle: at least one label in it is wrong",
    ),
    Rule(
        "contamination",
        f"{NGRAM} consecutive words are also in an evaluation text (or a whole shorter text)",
        float(NGRAM),
        "Brown et al. 2020 (GPT-3), appendix C: 13-grams of lower-case words, at least 8",
        0.0,
        True,
    ),
    Rule(
        "both_refuse",
        "both answers begin with a refusal",
        None,
        "such a pair teaches how to refuse, but not when (Röttger et al. 2024 on exaggerated safety)",
    ),
    Rule(
        "leakage",
        "the prompt's group, or the same prompt, is also in a split held out from this one",
        None,
        "an evaluation on texts that were trained on measures memory",
        0.0,
        True,
    ),
    Rule(
        "near_leakage",
        "an almost identical prompt (Jaccard similarity of word pairs) is in a split held out from this one",
        0.8,
        "as near_duplicate; it never fails, because it also marks prompts from one pattern that ask for different things",
        None,
        True,
    ),
    Rule(
        "unscored",
        "comparisons without a verdict; the threshold is their share of all comparisons",
        0.05,
        "the pipeline's own budget.unscored",
        0.05,
    ),
)
NAMES = tuple(rule.name for rule in RULES)

# Beginnings of refusals (our own list): "I + cannot / will not / must refuse ... + help / ...".
_CANNOT = (
    r"(?:can(?:no|['’]?)t|can not|could(?: not|n['’]t)|will not|won['’]?t|would rather not|do not|don['’]t|must not|"
    r"am (?:not able|unable|not going|not comfortable|not willing)(?: to)?|"
    r"['’]m (?:not able|unable|not going|not comfortable|not willing)(?: to)?|"
    r"(?:must |have to |need to |will )?(?:refuse|decline)(?: to)?)"
)
_DOING = (
    r"(?:help|assist|provid|support|answer|discuss|explain|compl|fulfil|engag|creat|generat|writ|giv|offer|shar|"
    r"participat|respond|talk|advis|tell|teach|recommend|condone|promot|encourag|facilitat|do (?:that|this|so)|"
    r"with (?:that|this)|that\b|this\b)"
)
REFUSAL = (
    rf"(?i)\bI ?{_CANNOT}\b[^.!?\n]{{0,60}}?\b{_DOING}|"
    r"\b(?:not|isn['’]t) (?:something|a thing) (?:that )?I (?:can|could|will|am able to)\b|"
    r"\bsomething (?:that )?I (?:decline|refuse|cannot|can['’]t|won['’]t|will not)\b|"
    r"\bI(?:['’]m| am) (?:very |really |so )?sorry,? but (?:I|that|this|as an)\b|"
    r"\b(?:against|violates?) my (?:guidelines|programming|principles|values|policy|policies)\b"
)


@dataclass(slots=True)
class Data:
    """Preference pairs with each text stored once, as a number.

    Attributes:
        texts: All texts; a text's number is its row.
        words: The words of each text.
        same: For each text the number of the first text that is equal except for white space.
        pairs: Columns preference, prompt, p_chosen, calibrated, group, split, and question, chosen
            and rejected, which are numbers of texts.
        unscored: Ids of comparisons without a verdict.
        comparisons: The number of all comparisons, with ties.
        notes: What a rule could not check completely.
    """

    texts: pl.Series
    words: near_duplicates.Words
    same: np.ndarray
    pairs: pl.DataFrame
    unscored: list[str]
    comparisons: int
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> np.ndarray:
        """The numbers of each pair's question, chosen and rejected text. Shapes: pairs x 3."""
        return self.pairs.select("question", "chosen", "rejected").to_numpy()


def make(rows: pl.DataFrame, unscored: Iterable[str] = (), comparisons: int | None = None) -> Data:
    """Data from plain rows: preference, prompt, text, chosen, rejected (texts), p_chosen,
    calibrated, group, split.
    """
    import polars as pl

    texts = pl.concat([rows["text"], rows["chosen"], rows["rejected"]]).unique(maintain_order=True)
    number = pl.DataFrame({"it": texts, "n": range(len(texts))}, schema_overrides={"n": pl.Int64})
    pairs = rows.select(
        "preference",
        "prompt",
        "p_chosen",
        "calibrated",
        "group",
        "split",
        *(
            rows.select(pl.col(column).alias("it"))
            .join(number, on="it", how="left", maintain_order="left")["n"]
            .alias(name)
            for column, name in (
                ("text", "question"),
                ("chosen", "chosen"),
                ("rejected", "rejected"),
            )
        ),
    )
    unscored = list(unscored)
    return indexed(
        texts, pairs, unscored, rows.height + len(unscored) if comparisons is None else comparisons
    )


def indexed(texts: pl.Series, pairs: pl.DataFrame, unscored: list[str], comparisons: int) -> Data:
    """Data from pairs that name their texts by number already."""
    import polars as pl

    spaced = texts.str.normalize("NFC").str.replace_all(r"\s+", " ").str.strip_chars()
    first = pl.DataFrame({"it": spaced, "n": range(len(texts))}, schema_overrides={"n": pl.Int64})
    same = first.select(pl.col("n").min().over("it"))["n"].to_numpy()
    return Data(texts, near_duplicates.words(texts), same, pairs, unscored, comparisons)


def low_margin(data: Data, threshold: float, shares: bool = False) -> pl.DataFrame:
    """Pairs whose label is hardly better than chance.

    Args:
        data: The pairs.
        threshold: Pairs with a smaller `p_chosen` are marked.
        shares: Also mark pairs whose `p_chosen` is a share of the vote. One share is right more
            often in one panel than in another, so no threshold fits all panels.
    """
    import polars as pl

    known = pl.col("calibrated")
    n = data.pairs.filter(~known).height
    if n and not shares:
        data.notes.append(
            f"low_margin: p_chosen of {n:,} pairs is a share of the vote, not a probability, so they "
            "were not checked: `prefab calibrate` makes it one, or --threshold low_margin=VALUE sets "
            "a threshold for the share"
        )
    return _marks(
        data.pairs.filter((pl.col("p_chosen") < threshold) & (known | shares)),
        pl.format(
            "{} {}",
            pl.when(known).then(pl.lit("p_chosen")).otherwise(pl.lit("share of the vote")),
            pl.col("p_chosen").round(4),
        ),
    )


def near_duplicate(data: Data, threshold: float) -> pl.DataFrame:
    """Pairs that are almost equal to an earlier one. Without them no near-duplicates are left."""
    found = near_duplicates.near_duplicates(data.words, data.columns, threshold)
    _tell_crowds(data, "near_duplicate", found.cut_short)
    ids = data.pairs["preference"].to_list()
    return _frame([(ids[i], f"of {ids[j]}") for i, j in found.of.items()])


def _tell_crowds(data: Data, rule: str, n: int) -> None:
    if n:
        data.notes.append(
            f"{rule}: {n:,} texts resemble very many others and were not compared with all of them; "
            "a few near-duplicates may be left"
        )


def identical(data: Data) -> pl.DataFrame:
    """Pairs whose answers differ at most in white space."""
    import polars as pl

    _, chosen, rejected = data.same[data.columns].T
    return _marks(
        data.pairs.filter(pl.Series(chosen == rejected)), pl.lit("differ at most in white space")
    )


def length(data: Data, threshold: float) -> pl.DataFrame:
    """Pairs of a long and a short answer."""
    import numpy as np
    import polars as pl

    _, chosen, rejected = data.words.counts[data.columns].T
    longer, shorter = np.maximum(chosen, rejected), np.minimum(chosen, rejected)
    far = (longer >= threshold * shorter) & (longer - shorter >= LEAST_WORDS_APART)
    with_counts = data.pairs.with_columns(pl.Series("c", chosen), pl.Series("r", rejected))
    return _marks(with_counts.filter(pl.Series(far)), pl.format("{} against {} words", "c", "r"))


def contradiction(data: Data) -> pl.DataFrame:
    """Pairs that another pair of the same prompt contradicts."""
    import polars as pl

    edges = _edges(data)
    back = edges.select(
        "question",
        pl.col("rejected").alias("chosen"),
        pl.col("chosen").alias("rejected"),
        pl.col("preference").alias("other"),
    )
    both = edges.join(back, on=["question", "chosen", "rejected"]).group_by(
        "preference", maintain_order=True
    )
    return _marks(both.agg(pl.col("other").min()), pl.format("against {}", "other"))


def cycle(data: Data) -> pl.DataFrame:
    """Pairs in a cycle of three or more answers. A cycle of two is a contradiction."""
    import polars as pl

    edges, before = _edges(data), -1
    while edges.height != before:  # an answer without a win or without a loss is in no cycle
        before = edges.height
        edges = edges.join(
            edges.select("question", pl.col("rejected").alias("chosen")).unique(),
            on=["question", "chosen"],
            how="semi",
        )
        edges = edges.join(
            edges.select("question", pl.col("chosen").alias("rejected")).unique(),
            on=["question", "rejected"],
            how="semi",
        )
    found = []
    for _, group in groupby(
        edges.sort("question", maintain_order=True).iter_rows(named=True), itemgetter("question")
    ):
        rows = [(row["chosen"], row["rejected"], row["preference"]) for row in group]
        knots = circles((a, b) for a, b, _ in rows)
        sizes = Counter(knots.values())
        found += [
            (preference, f"in a cycle of {sizes[knots[a]]} answers")
            for a, b, preference in rows
            if a in knots and knots[a] == knots.get(b)
        ]
    return _frame(found)


def _edges(data: Data) -> pl.DataFrame:
    """Which text is preferred to which, among texts that differ in more than white space."""
    import polars as pl

    question, chosen, rejected = data.same[data.columns].T
    edges = pl.DataFrame(
        {
            "preference": data.pairs["preference"],
            "question": question,
            "chosen": chosen,
            "rejected": rejected,
        }
    )
    return edges.filter(pl.col("chosen") != pl.col("rejected"))


def circles(edges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The nodes of strongly connected components of three and more, each with its component's name.

    Source: Tarjan 1972, without recursion.
    """
    follows: dict[int, list[int]] = {}
    for a, b in edges:
        follows.setdefault(a, []).append(b)
        follows.setdefault(b, [])
    seen: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    knots: dict[int, int] = {}
    for start in follows:
        work: list[tuple[int, Iterator[int]]] = (
            [] if start in seen else [(start, iter(follows[start]))]
        )
        while work:
            node, rest = work[-1]
            if node not in seen:
                seen[node] = low[node] = len(seen)
                stack.append(node)
            after = next((n for n in rest if n not in seen or n in low), None)
            if after is not None:
                if after in seen:
                    low[node] = min(low[node], seen[after])
                else:
                    work.append((after, iter(follows[after])))
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == seen[node]:
                _close(node, stack, low, knots)
    return knots


def _close(root: int, stack: list[int], low: dict[int, int], knots: dict[int, int]) -> None:
    """Take a finished component off the stack. A node that is off it is no longer in `low`."""
    members = stack[stack.index(root) :]
    del stack[len(stack) - len(members) :]
    for member in members:
        if member != root:
            del low[member]
        if len(members) > 2:
            knots[member] = root
    del low[root]


def both_refuse(data: Data) -> pl.DataFrame:
    """Pairs of two refusals."""
    import numpy as np
    import polars as pl

    refuses = data.texts.str.slice(0, OPENING).str.contains(REFUSAL).to_numpy()
    _, chosen, rejected = data.columns.T
    return _marks(
        data.pairs.filter(pl.Series(np.asarray(refuses[chosen] & refuses[rejected], bool))),
        pl.lit("two refusals"),
    )


def contamination(
    data: Data, evaluation: Sequence[tuple[str, str]], n: int = NGRAM
) -> pl.DataFrame:
    """Pairs that contain `n` consecutive words of an evaluation text.

    A text with fewer words counts if all of it is contained and it has at least `SHORTEST` words; a
    still shorter one if it is the whole prompt.

    Args:
        data: The pairs.
        evaluation: (place, text) of each evaluation text.
        n: The number of consecutive words.
    """
    import numpy as np
    import polars as pl

    wanted = near_duplicates.words(pl.Series([text for _, text in evaluation], dtype=pl.String))
    sizes = wanted.counts
    touched: dict[int, int] = {}  # text -> the evaluation text in it
    for size in sorted({n, *(int(s) for s in sizes if SHORTEST <= s < n)}):
        fitting = sizes >= n if size == n else sizes == size
        grams, of = near_duplicates.ngrams(wanted, size)
        keep = fitting[of]
        for text, source in _holding(data.words, size, grams[keep], of[keep]):
            touched.setdefault(text, source)
    whole = near_duplicates.wholes(wanted)
    short = {int(whole[i]): i for i in np.flatnonzero((sizes > 0) & (sizes < SHORTEST)).tolist()}
    asked = near_duplicates.wholes(data.words)
    found = []
    for preference, (question, *answers) in zip(
        data.pairs["preference"].to_list(), data.columns.tolist(), strict=True
    ):
        held = next((touched[text] for text in (question, *answers) if text in touched), None)
        held = short.get(int(asked[question])) if held is None and short else held
        if held is not None:
            found.append((preference, f"{evaluation[held][0]}: {evaluation[held][1][:80]}"))
    return _frame(found)


def _holding(
    words: near_duplicates.Words, size: int, grams: np.ndarray, of: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield (text, source) for each text with one of these n-grams; `of` has the sources."""
    import numpy as np

    if not len(grams):
        return
    order = np.argsort(grams, kind="stable")
    grams, of = grams[order], of[order]
    maybe = np.zeros(1 << 24, bool)  # 24 bits of the hash exclude most n-grams
    maybe[grams >> np.uint64(40)] = True
    for start, some in words.parts():
        there, text = near_duplicates.ngrams(some, size)
        close = maybe[there >> np.uint64(40)]
        there, text = there[close], text[close]
        at = np.minimum(np.searchsorted(grams, there), len(grams) - 1)
        hit = grams[at] == there
        for t, source in zip(text[hit].tolist(), of[at[hit]].tolist(), strict=True):
            yield start + t, source


def leakage(data: Data) -> pl.DataFrame:
    """Pairs whose prompt's group, or the same prompt, is also in a split held out from theirs."""
    import polars as pl

    whole = pl.Series("words", near_duplicates.wholes(data.words)[data.columns[:, 0]])
    pairs = _ranked(data.pairs.with_columns(whole))
    last = pl.col("rank").max()
    crossing = pairs.filter(pl.col("group").is_not_null() & (pl.col("rank") < last.over("group")))
    same = pairs.filter((pl.col("words") != 0) & (pl.col("rank") < last.over("words")))
    found = [
        _marks(crossing, pl.format("group {} crosses splits", "group")),
        _marks(same, pl.format("the same prompt is held out, and here in {}", "split")),
    ]
    return pl.concat(found).unique("preference", keep="first", maintain_order=True)


def near_leakage(data: Data, threshold: float) -> pl.DataFrame:
    """Pairs whose prompt is almost, but not exactly, one of a split held out from theirs."""
    import polars as pl

    pairs = _ranked(data.pairs).join(
        leakage(data), on="preference", how="anti", maintain_order="left"
    )
    prompts = _ranked(data.pairs).select("question", "rank").unique(maintain_order=True)
    near: dict[tuple[int, int], str] = {}
    for held in (1, 2):  # train against val and test, then val against test
        some = prompts.filter((pl.col("rank") == held - 1) | (pl.col("rank") >= held))
        held_out, texts = (some["rank"] >= held).to_list(), some["question"].to_numpy()
        across = near_duplicates.near_across(data.words, texts, held_out, threshold)
        _tell_crowds(data, "near_leakage", across.cut_short)
        for row, other in across.of.items():
            near[int(texts[row]), held - 1] = (
                f"{SPLITS[some['rank'][other]]}: {_head(data, texts[other])}"
            )
    asks = zip(*(pairs[name].to_list() for name in ("preference", "question", "rank")), strict=True)
    return _frame(
        [
            (preference, near[question, rank])
            for preference, question, rank in asks
            if (question, rank) in near
        ]
    )


def _ranked(pairs: pl.DataFrame) -> pl.DataFrame:
    """Pairs with the rank of their split: train 0, val 1, test 2."""
    import polars as pl

    rank = pl.col("split").replace_strict(
        SPLITS, range(len(SPLITS)), default=None, return_dtype=pl.Int8
    )
    return pairs.with_columns(rank.alias("rank")).filter(pl.col("rank").is_not_null())


def _head(data: Data, text: Any) -> str:
    result: str = data.texts[int(text)][:80]
    return result


def unscored(data: Data) -> pl.DataFrame:
    """Comparisons without a verdict. They are never exported; their share matters."""
    return _frame([(preference, "unscored") for preference in data.unscored])


def _marks(pairs: pl.DataFrame, detail: Any) -> pl.DataFrame:
    return pairs.select("preference", detail.alias("detail"))


def _frame(rows: list[tuple[str, str]]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(rows, schema={"preference": pl.String, "detail": pl.String}, orient="row")
