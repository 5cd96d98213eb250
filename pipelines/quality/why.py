"""`prefab why`: how one preference came about, from its prompt to each model call that it stands
on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.keys import sampling_object
from prefab.factory.ledger import db, records
from prefab.factory.store.store import one_connection
from prefab.factory.types import Sampling
from prefab.pipelines.store.fill import query


@dataclass(slots=True)
class CallMade:
    """A model call: its key, the messages that were sent, how it was sampled, how it ended, and
    what was answered: the text, and the log-probability of each label's spelling where labels were
    read.
    """

    key: str
    model: str
    messages: list[tuple[str, str]]
    sampling: dict[str, Any]
    labels: list[str]
    finish: str
    text: str = ""
    label_logps: dict[str, float] | None = None


@dataclass(slots=True)
class Node:
    """One step of the descent. `facts` are shown beside its title, `text` below it."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    call: CallMade | None = None
    below: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Why:
    """A preference and its descent."""

    preference: str
    run: str
    outcome: str
    root: Node

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


# sampling at temperature 0 without penalties, which is not worth a word
PLAIN = sampling_object(Sampling(max_tokens=0))

_PREFERENCE = """
SELECT p.*, r.name, r.version, r.config, r.constitution, q.messages, q.text AS question, q.tags
FROM preferences p JOIN runs r ON r.run = p.run LEFT JOIN prompts q ON q.prompt = p.prompt
WHERE p.preference IN (SELECT preference FROM preferences WHERE starts_with(preference, $name))
ORDER BY p.preference, r.last_start DESC LIMIT 1000"""
_SAMPLES = """
SELECT * FROM samples WHERE run = $run AND prompt = $prompt ORDER BY "index" """
_VERDICTS = """
SELECT v.*, m.name AS model_name FROM verdicts v
LEFT JOIN calls c ON c.call = v.call LEFT JOIN models m ON m.model = c.model
WHERE v.run = $run AND v.prompt = $prompt AND v.a = $a AND v.b = $b
ORDER BY v.principle, v.judge, v.repeat, v."order" """
_CRITIQUES = """
SELECT * FROM critiques WHERE run = $run AND prompt = $prompt AND "index" = $index
AND principle = $principle AND round = $round"""
_SCORES = """
SELECT * FROM scores WHERE run = $run AND prompt = $prompt AND principle = $principle
AND judge = $judge AND "index" IN ($a, $b) ORDER BY "index", repeat"""
_CONSTITUTION = "SELECT * FROM constitutions WHERE constitution = $name"
_PRINCIPLES = "SELECT principle, title, digest FROM principles WHERE constitution = $name"


Read = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]


@one_connection()
def why(store: str | Path, preference: str, run: str = "", read: Read | None = None) -> Why:
    """How a preference came about.

    Args:
        store: The store.
        preference: The preference's id, or the beginning of it.
        run: NAME or NAME@VERSION, where runs share the preference; default: the latest of them.
        read: A function that gives the rows of a query of the store, for a program that has it
            open; default: `query`.

    Raises:
        ConfigError: There is no such preference, or several begin so.
    """
    folder = Path(store)
    read = read or (lambda sql, values: query(folder, sql, values).to_dicts())
    return explain(folder, find_preference(folder, preference, run, read), read)


def explain(folder: Path, row: dict[str, Any], read: Read) -> Why:
    """How the preference that `find_preference` gave came about."""
    with closing(db.connect(folder / db.FILE, readonly=True)) as ledger:
        return _Descent(read, ledger, row).why()


def find_preference(folder: Path, preference: str, run: str, read: Read) -> dict[str, Any]:
    """A row of the table `preferences` by its id, or the beginning of it, with its run and prompt.

    Raises: ConfigError when there is no such preference in the run, or several begin so.
    """
    rows = read(_PREFERENCE, {"name": preference}) if preference else []
    name, _, version = run.partition("@")
    found = [
        row for row in rows if name in ("", row["name"]) and version in ("", str(row["version"]))
    ]
    if not found:
        raise ConfigError(
            f"{folder} has no preference {preference!r}{f' in {run}' if run else ''}. `prefab sql "
            '"SELECT preference, outcome, p_chosen FROM preferences"` shows their ids'
        )
    if len({row["preference"] for row in found}) > 1:
        raise ConfigError(f"several preferences begin with {preference!r}; give more of the id")
    return found[0]


class _Descent:
    """Reads what one preference stands on."""

    def __init__(self, read: Read, ledger: Any, row: dict[str, Any]) -> None:
        self.read, self.ledger, self.row = read, ledger, row
        self.config = json.loads(row["config"])
        self.at = {name: row[name] for name in ("run", "prompt", "a", "b")}
        self.samples = {s["index"]: s for s in self._rows(_SAMPLES)}
        known = self._rows(_PRINCIPLES, name=row["constitution"])
        self.principles = {p["principle"]: p for p in known}
        self.run = next(one for one in records.runs(ledger) if one.id == row["run"])
        self.models = self._models()

    def why(self) -> Why:
        row = self.row
        named = f"{row['name']}@{row['version']}"
        facts = {"p_chosen": row["p_chosen"], "run": named, "preference": row["preference"]}
        root = Node(self._headline(), facts)
        prompt = Node(f"prompt {row['prompt']}")
        prompt.text = _conversation(json.loads(row["messages"] or "[]"))
        root.below = [prompt, *(self._answer(side) for side in "ab"), self._aggregate()]
        root.below += [*self._judged(), self._made_by()]
        return Why(row["preference"], named, row["outcome"], root)

    def _rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        return self.read(sql, self.at | values)

    def _headline(self) -> str:
        row, shown = self.row, {"a": "A", "b": "B"}
        if row["identical"]:
            return "a tie: both answers are the same text"
        if row["outcome"] in shown:
            return f"{shown[row['outcome']]} is preferred"
        return "a tie" if row["outcome"] == "tie" else "unscored: too few readings"

    def _answer(self, side: str) -> Node:
        """An answer, with the answers that it was revised from below it."""
        sample = self.samples[self.row[side]]
        node = self._sample(sample)
        node.title = f"answer {side.upper()}: {node.title}"
        return node

    def _sample(self, sample: Mapping[str, Any]) -> Node:
        parent = sample["parent"]
        title = f"draft {sample['index']}" if parent < 0 else f"revision {sample['index']}"
        call = self._call(sample["call"])
        facts = {"finish": sample["finish"], "model": call.model if call else None}
        facts |= call.sampling if call else {}
        node = Node(title, facts, sample["text"] or "", call)
        if sample["context"]:
            context = Node("the turns before this answer")
            context.text = _conversation(json.loads(sample["context"]))
            node.below.append(context)
        if parent >= 0:
            at = {name: sample[name] for name in ("principle", "round")}
            facts["principle"] = sample["principle"]
            for critique in self._rows(_CRITIQUES, index=parent, **at):
                said = {name: critique[name] for name in ("principle", "fault", "p_fault")}
                call = self._call(critique["call"])
                node.below.append(Node("critique", said, critique["text"] or "", call))
            if parent in self.samples:
                node.below.append(self._sample(self.samples[parent]))
        return node

    def _aggregate(self) -> Node:
        """The rule by which the readings became a preference."""
        row, settings = self.row, self.config.get("panel") or {}
        rule = settings.get("combine", "mean")
        words = {
            "mean": "weighted mean of the readings",
            "log_odds": "sum of the principles' log-odds",
        }
        facts = {
            "p_a": row["p_a"],
            "share of the vote": row["vote_share"],
            "spread": row["spread"],
            "scored": f"{row['n_scored']} of {row['n_readings']} readings",
            "tie within": settings.get("tie_margin", 0.02),
            "calibrated": row["calibrated"],
            "escalation": row["escalation"],
        }
        return Node(
            f"rule: {words.get(rule, rule)}", {k: v for k, v in facts.items() if v is not None}
        )

    def _judged(self) -> list[Node]:
        """What each judge said under each principle, in each order."""
        groups: dict[str, Node] = {}
        for v in self._rows(_VERDICTS):
            known = self.principles.get(v["principle"], {})
            node = groups.setdefault(
                v["principle"],
                Node(
                    f"principle {v['principle']}" if v["principle"] else "no principle",
                    {
                        "title": known.get("title"),
                        "digest": (known.get("digest") or "")[:8] or None,
                    },
                ),
            )
            node.below.append(self._verdict(v))
        return list(groups.values())

    def _models(self) -> dict[str, str]:
        """What the configuration calls each model, by its identity without its kind."""
        engines = self.config.get("engines") or {}
        return {
            identity.partition(":")[2]: engines[name.removeprefix("model ")]["model"]
            for name, identity in self.run.texts.items()
            if (engines.get(name.removeprefix("model ")) or {}).get("model")
        }

    def _made_by(self) -> Node:
        """The run, and the versions of the constitution, the templates and the models."""
        run = self.run
        version = self._rows(_CONSTITUTION, name=self.row["constitution"])
        node = Node(
            f"run {run.name}@{run.version}",
            {
                "recipe": run.config.get("recipe"),
                "started": f"{datetime.fromtimestamp(run.at):%Y-%m-%d %H:%M}",
                "seed": run.config.get("seed"),
                **(run.config.get("source") or {}),
            },
        )
        for row in version:
            facts = {"title": row["title"], "selection": row["selection"]}
            digest = (row["constitution"] or "")[:8]
            node.below.append(Node(f"constitution {row['id']}", {"digest": digest, **facts}))
        for name, text in sorted(run.texts.items()):
            kind = name.partition(" ")[0]
            if kind == "model":
                node.below.append(Node(name, {"identity": text}))
            elif kind == "template":
                digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
                node.below.append(Node(name, {"digest": digest[:8]}))
        return node

    def _verdict(self, v: Mapping[str, Any]) -> Node:
        order = {"ab": "A first", "ba": "B first"}.get(v["order"], "no order")
        winner = {"a": "A", "b": "B", "tie": "tie"}.get(v["winner"], f"unscored ({v['reason']})")
        names = ("p_a", "mass", "tie_mass", "exactness")
        model = self.models.get(v["model_name"], v["model_name"])
        facts = {**{n: v[n] for n in names}, "judge": v["judge"], "model": model}
        node = Node(f"{order}: {winner}", {k: f for k, f in facts.items() if f is not None})
        node.call = self._call(v["call"])
        if v["call"] is None:
            at = {"principle": v["principle"], "judge": v["judge"]}
            for s in self._rows(_SCORES, **at):
                side = "A" if s["index"] == self.row["a"] else "B"
                said = {"value": s["value"], "reason": s["reason"], "criterion": s["criterion"]}
                shown = {k: f for k, f in said.items() if f}
                node.below.append(Node(f"score of {side}", shown, "", self._call(s["call"])))
        return node

    def _call(self, key: str | None) -> CallMade | None:
        """The call under a key, with the messages that were sent."""
        if not key:
            return None
        asked = records.request_json(self.ledger, bytes.fromhex(key))
        rows = self._rows(
            "SELECT m.name, c.finish FROM calls c LEFT JOIN models m ON m.model = c.model "
            "WHERE c.call = $key",
            key=key,
        )
        if asked is None or not rows:
            return None
        messages = [
            (m["role"], m["content"]) if isinstance(m, dict) else tuple(m)
            for m in asked["messages"]
        ]
        sampling = {k: v for k, v in asked["sampling"].items() if v != PLAIN.get(k)}
        answer = db.lookup(self.ledger, [bytes.fromhex(key)]).get(bytes.fromhex(key))
        return CallMade(
            key,
            self.models.get(rows[0]["name"], rows[0]["name"] or ""),
            messages,
            sampling,
            list(asked["labels"]),
            rows[0]["finish"],
            answer.text if answer else "",
            dict(answer.label_logps) if answer and answer.label_logps else None,
        )


def _conversation(messages: list[Any]) -> str:
    turns = [(turn[0], turn[1]) for turn in messages]
    if len(turns) == 1:
        return str(turns[0][1])
    return "\n".join(f"{role}: {text}" for role, text in turns)
