"""For all tests."""

from hypothesis import HealthCheck, settings

# How long one example takes says how busy the machine is, not whether what it tries is right.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
