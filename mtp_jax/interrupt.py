"""SIGTERM and SIGINT: a flag that the training loop reads between its steps."""

import signal
import threading
import time
from typing import Any

import jax

from mtp_jax.sharding import max_over_processes

_ONE_SIGNAL_SECONDS = 5.0


class Interrupted(Exception):
  """SIGTERM or SIGINT arrived, and all work is saved. `signum` is the signal."""

  def __init__(self, signum: int, step: int):
    where = f"at step {step}; checkpoint saved" if step else "before the first step"
    super().__init__(f"{signal.Signals(signum).name} {where}")
    self.signum = signum


class Interrupt:
  """Notes SIGTERM and SIGINT; a second one acts as it always did; a context manager.

  The handler only sets a flag, which is read between batches. An exception would be
  lost where the signal arrives during a callback, such as JAX's callback to the garbage
  collector. A cluster may send SIGTERM by several ways at once: that is one signal.
  Outside the main thread no signal can be caught, and none is.

  A lone process has its own handlers until `catch` is called: before the first step
  nothing can be saved, so that it may end at once, while it loads data or compiles.

  Processes that train together catch signals from the start, and share them: all
  must call `received` at the same places, and all get the same answer. A signal of one
  process reaches the others with the answer after the next, so that no process waits
  for it. (JAX's own preemption service is not used: Orbax reports the steps of its
  saves to that service from another thread, and then processes may stop at different
  steps. The service must be off, or SIGTERM would not reach Python.)
  """

  def __init__(self):
    self._received: int | None = None
    self._received_at = 0.0
    self._told: jax.Array | None = None
    self._old: dict[int, Any] = {}

  def received(self) -> int | None:
    """Returns the signal that asks for an end, None if there was none."""
    if jax.process_count() == 1:
      return self._received
    told, self._told = self._told, max_over_processes(self._received or 0)
    return None if told is None else int(told) or None

  def catch(self) -> None:
    """Notes signals from here on."""
    if self._old or threading.current_thread() is not threading.main_thread():
      return
    for signum in (signal.SIGTERM, signal.SIGINT):
      # None stands for a handler that is not Python's.
      self._old[signum] = signal.signal(signum, self._handle) or signal.SIG_DFL

  def __enter__(self) -> "Interrupt":
    if jax.process_count() > 1:
      self.catch()
    return self

  def __exit__(self, *_: object) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)

  def _handle(self, signum: int, _: Any) -> None:
    now = time.monotonic()
    if self._received is None:
      self._received, self._received_at = signum, now
    elif signum == signal.SIGINT or now - self._received_at > _ONE_SIGNAL_SECONDS:
      signal.signal(signum, self._old[signum])
      signal.raise_signal(signum)
