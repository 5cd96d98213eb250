"""Uses and the ledger's columns: the values that every ledger since the first has held, both
ways."""

import pytest

from prefab.factory.uses import (
    ComparisonUse,
    CritiqueUse,
    DraftUse,
    EscalationUse,
    IdenticalUse,
    PairUse,
    RankUse,
    RevisionUse,
    ScoreUse,
    StepUse,
    UseColumns,
    columns_of,
    use_of,
)

AT = (7, "prompt")
# role, sample, other, round, principle, judge, order, repeat
RECORDED = [
    (DraftUse(*AT, 3), ("sample", 3, -1, 0, "", "", "", 0)),
    (CritiqueUse(*AT, 3, "calm", 1), ("critique", 3, -1, 1, "calm", "", "", 0)),
    (RevisionUse(*AT, 9, 3, "calm", 1), ("revise", 9, 3, 1, "calm", "", "", 0)),
    (
        PairUse(*AT, "reason", 0, 2, "calm", "j", "ba", 1),
        ("reason", 0, 2, 0, "calm", "j", "ba", 1),
    ),
    (PairUse(*AT, "judge", 0, 2, "calm", "j", "-"), ("judge", 0, 2, 0, "calm", "j", "-", 0)),
    (ScoreUse(*AT, 3, "calm", "j", repeat=2), ("score", 3, -1, 0, "calm", "j", "", 2)),
    (ScoreUse(*AT, 3, "", "j", 4, "rubric"), ("score", 3, -1, 4, "", "j", "rubric", 0)),
    (StepUse(*AT, 3, 5, "calm", "j", 2), ("step", 3, 5, 0, "calm", "j", "", 2)),
    (RankUse(*AT, "calm", "j", 1, (2, 0, 1)), ("rank", -1, -1, 1, "calm", "j", "2,0,1", 0)),
    (IdenticalUse(*AT, 0, 2), ("identical", 0, 2, 0, "", "", "", 0)),
    (ComparisonUse(*AT, 0, 2, "calm"), ("pair", 0, 2, 0, "calm", "", "", 0)),
    (EscalationUse(*AT, 0, 2, "margin"), ("escalate", 0, 2, 0, "", "", "margin", 0)),
    (EscalationUse(*AT, 0, 2, "budget"), ("settle", 0, 2, 0, "", "", "budget", 0)),
    (EscalationUse(*AT, 0, 2, ""), ("settle", 0, 2, 0, "", "", "", 0)),
]


@pytest.mark.parametrize("use, columns", RECORDED)
def test_a_use_is_its_columns_and_back(use, columns):
    assert columns_of(use) == columns
    assert use_of(*AT, UseColumns(*columns)) == use
