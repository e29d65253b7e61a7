"""Eight CPU devices and quick compilation, set before JAX starts; shared fixtures."""

import os
import signal
from pathlib import Path

import pytest
from absl import flags

from tests.quick_xla import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(num_devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept for the next run of the tests, and for their subprocesses.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "mtp_jax" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks as slow what runs commands: `make test` starts hardly any processes."""
  for item in items:
    if "command" in getattr(item, "fixturenames", ()):
      item.add_marker(pytest.mark.slow)


_define_flag = flags.FlagValues.__setitem__


def _replace_flag(self: flags.FlagValues, name: str, flag: flags.Flag) -> None:
  """Defines a flag again: tests import several commands, and each has a --config."""
  flag.allow_override = True
  _define_flag(self, name, flag)


flags.FlagValues.__setitem__ = _replace_flag
_MAPPINGS = Path("/proc/self/maps")
_MANY = 20_000


@pytest.fixture
def sigint_raises():
  """A shell starts what runs in the background with SIGINT ignored; this undoes it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def forgets_programs():
  """Forgets the compiled programs after a file, where they have become many.

  Each of them has mappings of memory of its own, of which Linux gives a process 65,530
  (`vm.max_map_count`): XLA crashes when it compiles the next one. The largest files
  need half of that.
  """
  yield
  import jax  # Not above, where it would come before the flags.

  from mtp_jax.executables import forget_compiled

  if _MAPPINGS.exists() and len(_MAPPINGS.read_bytes().splitlines()) > _MANY:
    jax.clear_caches()
    forget_compiled()
