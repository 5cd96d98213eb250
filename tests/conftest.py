"""Settings of all tests."""
from hypothesis import HealthCheck, settings

settings.register_profile("prefab", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are noisy
settings.load_profile("prefab")
