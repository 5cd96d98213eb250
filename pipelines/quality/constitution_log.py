"""The versions of constitutions that the runs of a store were made under.

A version is told apart by its semantic digest: another title, comment, or YAML style is no other
version. The ledger keeps the full text of each, and the text of every file that it extends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.ledger import db, records
from prefab.factory.spec.constitution import (
    constitution_digest,
    parse_constitution,
    principle_digest,
)
from prefab.factory.types import Constitution
from prefab.pipelines.run.plan import constitution_changes

TEXT = "constitution"  # the name under which a run's texts hold it; its files follow by name


@dataclass(slots=True)
class ConstitutionVersion:
    """One version of a constitution.

    Attributes:
        id: The constitution's id.
        digest: Its semantic digest.
        first_used: When a run with it was first started, as seconds since 1970.
        runs: The runs made under it, NAME@VERSION.
        principles: The semantic digest of each principle in use, by id.
        changes: What differs in meaning from the version of this id before it; empty for the first.
        text: Its full text, with everything that it extends resolved.
        files: The text of each file, by name, where it is made of several.
    """

    id: str
    digest: str
    first_used: float
    runs: list[str] = field(default_factory=list)
    principles: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    text: str = ""
    files: dict[str, str] = field(default_factory=dict)

    @property
    def date(self) -> str:
        """When it was first used, in UTC."""
        return datetime.fromtimestamp(self.first_used, UTC).strftime("%Y-%m-%d %H:%M")

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"date": self.date}


def constitution_log(store: str | Path, id: str = "") -> list[ConstitutionVersion]:
    """List the versions of constitutions in a store, the oldest first.

    Args:
        store: The folder of the store.
        id: Only the constitution with this id; default: all.

    Raises:
        ConfigError: There is no run with a constitution, or none with this id.
        StoreError: The store is damaged.
    """
    with db.connect(Path(store) / db.FILE, readonly=True) as con:
        found = _versions(records.runs(con))
    known = sorted({version.id for version in found})
    if id and id not in known:
        raise ConfigError(f"{store}: no run was made under {id!r}; there are {', '.join(known)}")
    if not found:
        raise ConfigError(f"{store}: no run with a constitution; make one with `prefab run`")
    return [version for version in found if id in ("", version.id)]


def constitution_version(store: str | Path, digest: str) -> ConstitutionVersion:
    """One version of a constitution, with its full text.

    Args:
        store: The folder of the store.
        digest: Its digest, or the beginning of it.

    Raises:
        ConfigError: No version or several have this digest.
    """
    found = [one for one in constitution_log(store) if digest and one.digest.startswith(digest)]
    if len({one.digest for one in found}) == 1:
        return found[-1]  # under several ids: the last
    what = "several versions begin with" if found else "no version of a constitution has the digest"
    raise ConfigError(f"{store}: {what} {digest!r}; `prefab constitution log` lists them")


def _versions(runs: Iterable[records.RunRecord]) -> list[ConstitutionVersion]:
    found: dict[tuple[str, str], ConstitutionVersion] = {}
    latest: dict[str, Constitution] = {}
    for run in runs:
        text = run.texts.get(TEXT)
        if not text:
            continue
        try:
            constitution = parse_constitution(text, f"the constitution of {run.name}@{run.version}")
        except ConfigError:
            continue  # of another version of Prefab
        version = constitution.id, constitution_digest(constitution)
        if version not in found:
            found[version] = _version(run, version[1], constitution, latest.get(constitution.id))
        latest[constitution.id] = constitution
        found[version].runs.append(f"{run.name}@{run.version}")
    return list(found.values())


def _version(
    run: records.RunRecord, digest: str, constitution: Constitution, before: Constitution | None
) -> ConstitutionVersion:
    changes = constitution_changes(before, constitution) if before else []
    prefix = f"{TEXT} file "
    return ConstitutionVersion(
        constitution.id,
        digest,
        run.at,
        principles={p.id: principle_digest(p) for p in constitution.principles if p.enabled},
        changes=[words for _, _, words in changes],
        text=run.texts[TEXT],
        files={
            name.removeprefix(prefix): text
            for name, text in run.texts.items()
            if name.startswith(prefix)
        },
    )
