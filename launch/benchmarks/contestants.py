"""What the benchmarks compare: each contestant is a process of its own.

A process per contestant keeps thread pools, allocators and failures apart, and makes
its memory its own. Only one works at a time; the others wait at their pipe.
"""

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch.benchmarks.records import slug
from launch.benchmarks.rows import one_document_batch
from launch.huge_pages import start_with_huge_pages
from mtp_jax.config import Config
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import Hyperparameters
from mtp_jax.train_step import programs, shape_of

NAMES = ("jax", "torch eager", "torch.compile")
_TRACED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Ready:
  """What a contestant says once it is compiled and warm; sizes in bytes.

  peak_memory: what one warm step needs at most, model and optimizer state included:
    allocator peak on a GPU, growth of the resident set on a CPU; None if unknown.
  xla_memory: arguments and temporaries by XLA's own analysis; None for torch.
  """

  hardware: str
  threads: int
  build_seconds: float
  peak_memory: int | None
  xla_memory: int | None


class Failed(RuntimeError):
  """A contestant could not be built or run; the message is the first line it gave."""


# (config, name) -> (step, what `Contestant.wait_ready` returns). A step that does not
# wait for what it starts returns what to wait for.
Build = Callable[[Config, str], tuple[Callable[[], Any], Any]]


class Contestant:
  """A step that runs in another process, one at a time."""

  def __init__(
    self, name: str, config: Config, huge_pages: bool, build: Build | None = None
  ):
    """Args: `build(config, name)` runs in the process; by default a train step."""
    self.name = name
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    build = build or build_train_step
    self._process = context.Process(target=_serve, args=(theirs, build, name, config))
    with start_with_huge_pages() if huge_pages else contextlib.nullcontext():
      self._process.start()
    theirs.close()

  def wait_ready(self) -> Any:
    """Returns when the step is compiled and warm; a `Ready` for a train step.

    Raises:
      Failed: it could not be built.
    """
    return self._receive()

  def run(self, num_steps: int, trace: Path | None = None) -> list[float]:
    """Returns the seconds of each of `num_steps` steps, after one that is not timed.

    With `trace`, JAX's profiler writes there what these steps do, and slows them.
    """
    self._pipe.send((num_steps, trace))
    return self._receive()

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(OSError):
      self._pipe.send(None)
    self._process.join(timeout=10)
    if self._process.is_alive():
      self._process.kill()

  def _receive(self) -> Any:
    try:
      result = self._pipe.recv()
    except EOFError:
      self._process.join()
      raise Failed(f"process ended with code {self._process.exitcode}") from None
    if isinstance(result, Exception):
      raise result
    return result


class Turns:
  """Contestants that take turns; a context that ends their processes."""

  def __init__(
    self,
    rounds: int,
    steps_per_round: int,
    say: Callable[..., None],
    apart: bool = False,
    trace: Path | None = None,
  ):
    """Prepares turns for everyone who enters.

    Args:
      rounds: turns of every contestant.
      steps_per_round: that are timed in a turn, where `enter` says nothing else.
      say: `say(text, count)` shows progress, of a turn unless `count` says more.
      apart: everyone takes all turns on entering and ends then, where memory does not
        hold all of them. To be fair, the machine must have nothing else to do.
      trace: folder for a profile of everyone but PyTorch, of steps after the last turn.
    """
    self._rounds, self._steps, self._say = rounds, steps_per_round, say
    self._apart, self._trace = apart, trace
    self._running: list[tuple[str, Contestant, dict[str, Any], int]] = []

  def __enter__(self) -> "Turns":
    return self

  def __exit__(self, *_: object) -> None:
    for _, contestant, *_ in self._running:
      contestant.close()

  def enter(
    self,
    label: str,
    contestant: Contestant,
    row: dict[str, Any],
    steps: int | None = None,
  ) -> None:
    """Waits until a contestant is ready; notes in its row what it says, or its error.

    The seconds of its steps, a list a turn, are added there as `seconds`. `steps` are
    timed in a turn of this one.
    """
    try:
      ready = contestant.wait_ready()
    except Failed as error:
      self._say(f"{label}: {error}", self._rounds + 1)
      row["contestants"][contestant.name] = {"error": str(error)}
      contestant.close()
      return
    row["hardware"] = ready.hardware
    figures = dataclasses.asdict(ready) | {"seconds": []}
    row["contestants"][contestant.name] = figures
    self._running.append((label, contestant, figures, steps or self._steps))
    self._say(f"{label}: ready")
    if self._apart:
      self.take()
      contestant.close()
      self._running.clear()

  def take(self) -> None:
    """Gives everyone as many turns as there are rounds."""
    for number in range(self._rounds):
      # Every other round backwards, so that no contestant always follows the same one.
      order = 1 if number % 2 == 0 else -1
      for label, contestant, figures, steps in self._running[::order]:
        figures["seconds"].append(contestant.run(steps))
        step = min(figures["seconds"][-1])
        self._say(f"{label}: round {number + 1}, {step * 1e3:.1f} ms")
    if self._trace is None:
      return
    for label, contestant, *_ in self._running:
      if not contestant.name.startswith("torch"):
        folder = self._trace / slug(label)
        contestant.run(_TRACED_STEPS, folder)
        self._say(f"{label}: profile in {folder}", 0)


def build_train_step(
  config: Config, name: str, xla_flags: str | None = None
) -> tuple[Callable[[], None], Ready]:
  """Returns the train step of one of `NAMES`, compiled and warm.

  `xla_flags` are added to those of the environment; names of JAX steps begin with jax.
  """
  if xla_flags is not None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
  if name.startswith("jax"):
    return _build_jax(config)
  return _build_torch(config, compiled=name == "torch.compile")


def _serve(pipe: Any, build: Build, name: str, config: Config) -> None:
  """Builds the contestant, then runs as many steps as each message asks for."""
  try:
    step, ready = build(config, name)
    pipe.send(ready)
    while (message := pipe.recv()) is not None:
      num_steps, trace = message
      # With huge pages, a JAX step after seconds of waiting takes up to a second longer
      # than the next. Steps of a training run do not wait: this one is not timed.
      step()
      seconds = []
      with jax.profiler.trace(trace) if trace else contextlib.nullcontext():
        for _ in range(num_steps):
          start = time.perf_counter()
          started = step()
          seconds.append(time.perf_counter() - start)
        jax.block_until_ready(started)  # Or it would run on in the next one's turn.
      pipe.send(seconds)
  except EOFError:  # The benchmark has gone.
    return
  except Exception as error:
    message = (str(error).strip() or "no message").splitlines()[0]
    pipe.send(Failed(f"{type(error).__name__}: {message}"))


def _build_jax(config: Config) -> tuple[Callable[[], None], Ready]:
  start = time.perf_counter()
  device = jax.devices()[0]
  jax.block_until_ready(jnp.ones(()) + 1)  # Loads what any program needs.
  before = resident()
  mesh = make_mesh(config.mesh, [device])
  jax.set_mesh(mesh)
  train = programs(shape_of(config), mesh)
  state = train.init(jnp.int32(0))
  batch = jax.tree.map(lambda x: x[None], one_document_batch(config))
  batch = put_batch(mesh, batch, ("microbatch",))
  hyper = Hyperparameters(*(jnp.float32(x) for x in (1e-3, config.mtp.weight, 1e4)))
  arguments = (batch, hyper, jnp.bool_(True))
  program = train.step.lower(state, *arguments).compile()

  def step() -> None:
    nonlocal state
    state, report = program(state, *arguments)
    jax.block_until_ready((state, report))

  step()
  seconds = time.perf_counter() - start
  analysis = program.memory_analysis()
  return step, Ready(
    hardware=device.device_kind,
    threads=len(os.sched_getaffinity(0)),
    build_seconds=seconds,
    peak_memory=peak_of_jax(step, before),
    xla_memory=analysis.temp_size_in_bytes + analysis.argument_size_in_bytes,
  )


def _build_torch(config: Config, compiled: bool) -> tuple[Callable[[], None], Ready]:
  # Torch is optional, and only this process needs it.
  from launch.benchmarks.torch_step import make_torch_step, start_torch

  start = time.perf_counter()
  torch, device = start_torch()
  before = resident()
  *_, step = make_torch_step(config, device, compiled)
  step()
  seconds = time.perf_counter() - start
  return step, Ready(
    hardware=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    threads=torch.get_num_threads(),
    build_seconds=seconds,
    peak_memory=peak_of_torch(step, before),
    xla_memory=None,
  )


def peak_of_jax(step: Callable[[], Any], before: int | None) -> int | None:
  """Returns the bytes that a warm JAX step needs at most, see `Ready`.

  `before` is what was `resident` before the arrays of the step existed.
  """
  device = jax.devices()[0]
  if device.platform == "cpu":
    return _peak_growth(step, before)
  return (device.memory_stats() or {}).get("peak_bytes_in_use")


def peak_of_torch(step: Callable[[], Any], before: int | None) -> int | None:
  """The same of a PyTorch step."""
  import torch

  if not torch.cuda.is_available():
    return _peak_growth(step, before)
  torch.cuda.reset_peak_memory_stats()
  step()
  return torch.cuda.max_memory_allocated()


def resident() -> int | None:
  """Returns the bytes of this process's resident set, None where that is unknown."""
  return _status_bytes("VmRSS")


def _peak_growth(step: Callable[[], Any], before: int | None) -> int | None:
  """Peak resident set of one warm step, over what was resident before the model.

  What compilation needed and freed does not count: it is returned to the kernel and
  the kernel's high-water mark is set back. None where the system offers neither.
  """
  gc.collect()
  try:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
  except (AttributeError, OSError):
    return None
  step()
  peak = _status_bytes("VmHWM")
  return None if peak is None or before is None else peak - before


def _status_bytes(key: str) -> int | None:
  """A size from /proc/self/status; None where the system has no such file."""
  try:
    lines = Path("/proc/self/status").read_text().splitlines()
  except OSError:
    return None
  kilobytes = next(line for line in lines if line.startswith(key)).split()[1]
  return int(kilobytes) * 1024
