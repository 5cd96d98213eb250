"""Settings of all tests."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "prefab", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # machines are noisy
settings.load_profile("prefab")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two policies of the answer world, as `policy` and `reference` in a folder."""
    from benchmarks import answer_world

    folder = tmp_path_factory.mktemp("models")
    answer_world.build(folder / "policy", 1)
    answer_world.build(folder / "reference", 2)
    return folder
