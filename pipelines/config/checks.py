"""What no field's type can say of a pipeline: names that point to nothing, kinds that do not exist,
files that are not there. Each check gives the place and the words of every mistake it finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefab.factory.extras import install_command
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import data_files, yamlio
from prefab.factory.spec.remote import is_remote
from prefab.judges import registry

MICROWORLD = "microworld"
FITS = ("bradley_terry", "davidson")
EMBEDDED = ("prefab-tiny", "prefab-nano")
WORLD = "world.json"  # lies beside the weights of models that were made for the embedded world
Found = Iterator[tuple[yamlio.Path_, str]]


def locate(name: str, base: Path) -> Path:
    """The first that exists of: the name as it stands, beside the pipeline file, above it, in the
    project. A pattern (`shards/*.parquet`) exists where data files match it.

    A file that exists nowhere is given as it stands.
    """
    places = [Path(name), base / name, base.parent / name, PACKAGE / name]
    return next((p for p in places if p.exists() or data_files.matching(p)), Path(name))


def mapping(value: Any, key: str) -> dict[str, Any]:
    """The mapping under a key of a raw value of any shape; an empty one where there is none."""
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def judges(value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The panel's judges that are mappings, with their indices."""
    rows = mapping(value, "panel").get("judges")
    for index, judge in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(judge, dict):
            yield index, judge


def names_of_judges(value: Any) -> Found:
    """Every judge has a name of its own, the weights name judges, and people judge only what is
    escalated.
    """
    names: dict[str, int] = {}
    strong = mapping(mapping(value, "panel"), "escalate").get("to")
    for index, judge in judges(value):
        stronger = strong if isinstance(strong, list) else ()
        if judge.get("kind") == "human" and judge.get("name") not in stronger:
            yield (
                ("panel", "judges", index, "kind"),
                "people label apart from runs (`prefab label`), what others are in doubt about: "
                "name it in panel.escalate.to",
            )
        name = judge.get("name")
        if isinstance(name, str) and names.setdefault(name, index) != index:
            yield (
                ("panel", "judges", index, "name"),
                f'the name "{name}" is already taken by judges[{names[name]}]',
            )
    for name in mapping(mapping(value, "panel"), "weights"):
        if name not in names:
            yield (
                ("panel", "weights", name),
                f'no judge is named "{name}"; {yamlio.did_you_mean(name, names)}',
            )


def escalation(value: Any) -> Found:
    """The stronger judges are in the panel, and others are too."""
    names = [judge.get("name") for _, judge in judges(value)]
    to = mapping(mapping(value, "panel"), "escalate").get("to")
    for index, name in enumerate(to if isinstance(to, list) else []):
        if name not in names:
            known = [str(known) for known in names]
            yield (
                ("panel", "escalate", "to", index),
                f'no judge is named "{name}"; {yamlio.did_you_mean(str(name), known)}',
            )
    if isinstance(to, list) and names and all(name in to for name in names):
        yield (
            ("panel", "escalate", "to"),
            "names every judge of the panel: leave one out, whose doubt calls for them",
        )


def engine_names(value: Any) -> Found:
    """Every role names an engine that is defined."""
    known = list(mapping(value, "engines"))
    roles: list[tuple[yamlio.Path_, dict[str, Any]]] = [
        (("policy", "engine"), mapping(value, "policy")),
        (("critic", "engine"), mapping(value, "critic")),
    ]
    roles += [(("panel", "judges", index, "engine"), judge) for index, judge in judges(value)]
    for path, role in roles:
        name = role.get("engine")
        if isinstance(name, str) and name not in known:
            yield path, f'no engine is named "{name}"; {yamlio.did_you_mean(name, known)}'


def rankings(value: Any) -> Found:
    """Nobody asks the embedded models to rank: they were not trained for it, and their answers
    would be noise.
    """
    for index, judge in judges(value):
        name = judge.get("engine", mapping(value, "policy").get("engine"))
        model = mapping(mapping(value, "engines"), str(name)).get("model")
        if judge.get("kind") == "listwise" and isinstance(model, str) and _embedded(model):
            yield (
                ("panel", "judges", index, "kind"),
                (
                    f"{model} was not trained to rank answers (listwise); it compares two (pairwise) and reads one "
                    "(pointwise, rubric). Name an engine with another model"
                ),
            )


def _embedded(model: str) -> bool:
    return model in EMBEDDED or (Path(model) / WORLD).exists()


def fits(value: Any) -> Found:
    """The library that fits strengths is there when a fit is asked for."""
    method = mapping(value, "choose").get("method")
    if method in FITS and find_spec("evalica") is None:
        yield ("choose", "method"), f"{method} needs evalica: {install_command('stats')}"


def best_of_n(value: Any) -> Found:
    """Best-of-n needs several answers and judges that score one at a time."""
    recipe = value.get("recipe") if isinstance(value, dict) else None
    if recipe != "best_of_n":
        for field in ("demonstrations", "min_score"):
            if mapping(value, "choose").get(field) is not None:
                yield ("choose", field), "is for the recipe best_of_n alone"
        return
    found = list(judges(value))
    if not found:
        yield ("panel",), "best_of_n needs judges that score answers: name one under panel.judges"
    yield from _score_one(found, recipe)
    if mapping(value, "policy").get("samples") == 1:
        yield ("policy", "samples"), "best_of_n chooses among several answers: at least 2"
    unused: list[yamlio.Path_] = [
        (name,) for name in ("revise", "pairs") if value.get(name) is not None
    ]
    if mapping(value, "panel").get("escalate") is not None:
        unused.append(("panel", "escalate"))
    for path in unused:
        yield path, "has no meaning in best_of_n, which compares the best answer with the worst"
    yield from _least_score(mapping(value, "choose"), [judge.get("kind") for _, judge in found])


def _score_one(
    found: Iterable[tuple[int, dict[str, Any]]],
    recipe: str,
    kinds: str = "pointwise, rubric, verifier and reward_model",
) -> Found:
    """Judges of a recipe that asks about one answer at a time."""
    for index, judge in found:
        kind = str(judge.get("kind"))
        if kind in registry.JUDGES and registry.JUDGES[kind].shows != "one":
            yield (
                ("panel", "judges", index, "kind"),
                f"{recipe} asks about one answer at a time, and {kind} judges do not score one; "
                f"{kinds} do",
            )


def process(value: Any) -> Found:
    """The steps of answers need judges that score one text at a time."""
    recipe = value.get("recipe") if isinstance(value, dict) else None
    if recipe != "process":
        if isinstance(value, dict) and value.get("steps") is not None:
            yield ("steps",), "is for the recipe process alone"
        return
    found = list(judges(value))
    if not found:
        yield ("panel",), "process needs judges that score steps: name one under panel.judges"
    for index, judge in found:
        if judge.get("kind") == "reward_model":
            yield (
                ("panel", "judges", index, "kind"),
                "a reward is no probability that a step is right",
            )
    yield from _score_one(found, "process", "pointwise, rubric and verifier")
    unused: list[yamlio.Path_] = [
        (name,) for name in ("revise", "pairs", "choose") if value.get(name) is not None
    ]
    if mapping(value, "panel").get("escalate") is not None:
        unused.append(("panel", "escalate"))
    for path in unused:
        yield path, "has no meaning in process, which compares no answers"


def _least_score(choose: dict[str, Any], kinds: list[Any]) -> Found:
    """A least score is on the scale of one judge, where more is better."""
    if choose.get("min_score") is None:
        if choose.get("demonstrations") == "accepted":
            yield ("choose", "demonstrations"), "accepted by which score? Set choose.min_score"
    elif len(kinds) > 1 or "rubric" in kinds:
        yield (
            ("choose", "min_score"),
            "needs one judge of kind pointwise, verifier or reward_model, whose scale it is on",
        )


def _is_elsewhere(path: yamlio.Path_, name: str) -> bool:
    """Whether these are prompts at an address, which are fetched when they are first read."""
    return path == ("prompts", "source") and is_remote(name)


def files(value: Any, base: Path) -> Found:
    """Files that are named exist."""
    constitution = value.get("constitution") if isinstance(value, dict) else None
    named: list[tuple[yamlio.Path_, Any]] = [
        (("constitution",), constitution),
        (("prompts", "source"), mapping(value, "prompts").get("source")),
    ]
    if isinstance(constitution, list):
        named += [(("constitution", index), name) for index, name in enumerate(constitution)]
    named += [
        (("panel", "judges", index, field), judge.get(field))
        for index, judge in judges(value)
        if judge.get("kind") in registry.JUDGES
        for field in registry.JUDGES[judge["kind"]].FILES
    ]
    for path, name in named:
        if not isinstance(name, str) or name == MICROWORLD or _is_elsewhere(path, name):
            continue
        place = locate(name, base)
        if not place.exists() and not data_files.matching(place):
            yield path, f"no such file: {name}"
