"""Eight CPU devices for every test, set before JAX starts; shared fixtures."""

import os
import signal

import pytest

_FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture
def sigint_raises():
  """A shell starts what runs in the background with SIGINT ignored; this undoes it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
