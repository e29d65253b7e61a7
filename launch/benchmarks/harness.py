"""The harness of all benchmarks: settings, contestants, turns.

A contestant is a process of its own, so that thread pools, allocators, failures and
memory stay apart. Contestants take turns (A B B A ...) for several rounds, and every
ratio is formed within one round, so that a busy machine slows both of its sides.
"""

import contextlib
import functools
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import base
from launch import paths
from launch.huge_pages import start_with_huge_pages
from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, from_config_dict, with_overrides
from mtp_jax.progress import Progress

flags.disclaim_key_flags()

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "benchmarks"
OURS, FLOOR = "ours", "floor"
TORCH = ("torch eager", "torch.compile")
# Width, layers, heads. The models of 124M and more are GPT-2's and GPT-3's (Brown et
# al. 2020, table 2.1), the largest with heads of 128.
MODELS = {
  "tiny": (64, 2, 4),
  "0.3M": (64, 4, 4),
  "1M": (128, 4, 4),
  "3M": (192, 6, 4),
  "5M": (256, 6, 4),
  "10M": (384, 4, 4),
  "25M": (512, 8, 8),
  "124M": (768, 12, 12),
  "350M": (1024, 24, 16),
  "1.3B": (2048, 24, 16),
}
TRUNKS = ("gpt2", "llama")
_EXPLAINED = {
  "models": f"by number of parameters: {', '.join(MODELS)}",
  "trunks": ", ".join(TRUNKS),
  "vocabs": "sizes of the vocabulary",
  "depths": "extra predictors; 0 is plain next-token prediction",
  "seq_len": "tokens of a row",
  "batch_size": "rows of a step",
  "rounds": "turns of every contestant",
  "steps_per_round": "steps that are timed in a turn",
}
_MAY_BE_ZERO = ("depths", "block_tokens")
_TRACED_STEPS = 3


class Failed(RuntimeError):
  """A contestant could not be built or run; the message is its error's first line."""


# Returns a step and the facts about it, for the JSON record; `hardware` is one of them.
# A step that does not wait for its work returns the arrays to wait for.
Build = Callable[[], tuple[Callable[[], Any], dict[str, Any]]]


class Entrant(NamedTuple):
  """A contestant to be: how to build it, and how many steps it takes in a turn."""

  build: Build
  steps: int


# Settings.

_PRESET = flags.DEFINE_enum(
  "preset", "cpu", ["cpu", "gpu", "quick"],
  "values of the flags that are not given; quick shows that it works, not how fast",
)
OUTPUT = flags.DEFINE_string(
  "output", str(RESULTS), "folder for the page (.md) and the figures (.json)",
  allow_override=True,
)
NAME = flags.DEFINE_string(
  "name", None, "name of the two files; by default the benchmark and the device",
  allow_override=True,
)
_TRACE = flags.DEFINE_string(
  "trace", None, "folder for a profile of each JAX contestant, taken after its turns; "
  "for XProf (`xprof FOLDER`) or TensorBoard",
)
_SHARED = (_PRESET, OUTPUT, NAME, _TRACE)


class _Numbers(flags.ArgumentParser):
  """Whole numbers separated by commas."""

  def parse(self, argument: Any) -> list[int]:
    if isinstance(argument, list):
      return argument
    try:
      return [int(text) for text in argument.split(",")]
    except ValueError:
      raise ValueError("must be whole numbers separated by commas") from None


def define_settings(
  presets: Mapping[str, Mapping[str, Any]], **explained: str
) -> None:
  """Defines a flag for every key of a benchmark's presets.

  Args:
    presets: values by key, for each value of `--preset`.
    explained: the help of the keys that `_EXPLAINED` does not have.
  """
  explained = _EXPLAINED | explained
  for flag in _SHARED:
    flags.declare_key_flag(flag.name)
  for key, value in presets["cpu"].items():
    text = f"{explained[key]}; {_text(value)} (cpu), {_text(presets['gpu'][key])} (gpu)"
    if isinstance(value, list) and isinstance(value[0], int):
      flags.DEFINE(_Numbers(), key, None, text, allow_override=True)
    else:
      define = {
        list: flags.DEFINE_list, bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
      }[type(value)]
      define(key, None, text, allow_override=True)


def read_settings(
  presets: Mapping[str, Mapping[str, Any]],
  choices: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> SimpleNamespace:
  """Returns the flags that were given, and for the others the values of the preset.

  Raises:
    ConfigError: a name that is not among its `choices`, or a number that is too small.
  """
  found = dict(presets[_PRESET.value])
  given = {key: flags.FLAGS[key].value for key in found}
  found |= {key: value for key, value in given.items() if value is not None}
  for key, value in found.items():
    values = value if isinstance(value, list) else [value]
    unknown = [x for x in values if key in choices and x not in choices[key]]
    if unknown:
      raise ConfigError(
        f"--{key} must be of {', '.join(choices[key])}, got {_text(value)}."
      )
    least = 0 if key in _MAY_BE_ZERO else 1
    too_small = [x for x in values if type(x) is int and x < least]
    if too_small or any(type(x) is float and x <= 0 for x in values):
      least = "more than 0" if not too_small else f"at least {least}"
      raise ConfigError(f"--{key} must be {least}, got {_text(value)}.")
  for flag in (OUTPUT, _TRACE):
    if flag.value is not None:
      paths.check_folder(flag.name, flag.value)
  if NAME.value is not None and not re.fullmatch(r"[\w.,=+-]{1,200}", NAME.value):
    raise ConfigError(
      f"--name must be 1 to 200 letters, digits or any of '=,._+-', got {NAME.value!r}."
    )
  return SimpleNamespace(**found, preset=_PRESET.value)


def _text(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def make_config(
  model: str, trunk: str, vocab: int, kind: str, depth: int, length: int, rows: int
) -> Config:
  """Returns the config of one of `MODELS`; Llama has half as many kv heads as heads.

  `kind` is that of the predictors if `depth` is not 0.
  """
  dim, layers, heads = MODELS[model]
  is_gpt2 = trunk == "gpt2"
  # 8/3 of the width (Touvron et al. 2023), rounded up to a multiple of 64.
  narrow = -(-8 * dim // 3 // 64) * 64
  return with_overrides(
    from_config_dict(base.get_config()),
    {
      "trunk.kind": trunk,
      "trunk.tie_embeddings": is_gpt2,
      "trunk.embed_dim": dim,
      "trunk.num_layers": layers,
      "trunk.num_heads": heads,
      "trunk.num_kv_heads": heads if is_gpt2 else max(1, heads // 2),
      "trunk.mlp_dim": 4 * dim if is_gpt2 else narrow,
      "mtp.kind": kind if depth else "none",
      "mtp.depth": depth,
      "tokenizer.vocab_size": vocab,
      "data.seq_len": length,
      "data.batch_size": rows,
      "mesh.data": 1,
      "eval.max_new_tokens": 1,  # Not measured; must be less than `seq_len`.
    },
  )


def one_document_batch(config: Config, seed: int = 0) -> Batch:
  """Returns rows [B, ...] of random tokens; a row is one document without an end."""
  rng = np.random.default_rng(seed)
  rows, length = config.data.batch_size, config.data.seq_len
  extra = 1 + config.mtp.depth
  ids = rng.integers(0, config.tokenizer.vocab_size, (rows, length + extra), np.int32)
  ones = np.ones_like(ids)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  return Batch(
    ids[:, :length], ones[:, :length], positions, ids[:, length:], ones[:, length:]
  )


# Contestants.


class Contestant:
  """A step that runs in another process; a context that ends the process."""

  def __init__(self, build: Build, huge_pages: bool = True):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, build))
    with start_with_huge_pages() if huge_pages else contextlib.nullcontext():
      self._process.start()
    theirs.close()

  def wait_ready(self) -> dict[str, Any]:
    """Returns the facts about the step once it is compiled and warm.

    Raises:
      Failed: it could not be built.
    """
    return self._receive()

  def run(self, num_steps: int, trace: Path | None = None) -> list[float]:
    """Returns the seconds of each of `num_steps` steps, after one that is not timed.

    With `trace`, JAX's profiler writes what these steps do there, and slows them.
    """
    self._pipe.send((num_steps, trace))
    return self._receive()

  def __enter__(self) -> "Contestant":
    return self

  def __exit__(self, *_: object) -> None:
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


def _serve(pipe: Any, build: Build) -> None:
  """Builds the contestant, then runs as many steps as each message asks for."""
  try:
    step, facts = build()
    pipe.send(facts)
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


def count_turns(total: int) -> Callable[[int], None]:
  """Returns a function that shows progress: how many more of `total` turns are done."""
  progress, done = Progress("turns"), 0

  def advance(count: int) -> None:
    nonlocal done
    done += count
    progress("measured", done, total)
    if done >= total:
      progress.close()

  advance(0)
  return advance


def take_turns(
  timers: Mapping[str, Callable[[], Any]], rounds: int, advance: Callable[[int], None]
) -> dict[str, list[Any]]:
  """Calls every timer once per round; returns the answers of each timer.

  Every other round is backwards, so that no timer always follows the same one.
  """
  answers: dict[str, list[Any]] = {name: [] for name in timers}
  for number in range(rounds):
    for name in list(timers)[:: 1 if number % 2 == 0 else -1]:
      answers[name].append(timers[name]())
      advance(1)
  return answers


def measure(
  entrants: Mapping[str, Entrant],
  settings: SimpleNamespace,
  advance: Callable[[int], None],
) -> dict[str, dict[str, Any]]:
  """Lets contestants take turns; returns by name their facts and seconds, or an error.

  `seconds` is one list per round with the seconds of every step.

  Args:
    entrants: by name, which is shown.
    settings: with `rounds`; with `apart`, every contestant ends before
      the next is built, where memory does not hold all of them. To be fair, the machine
      must have nothing else to do then.
    advance: from `count_turns`; building counts as a turn.
  """
  found: dict[str, dict[str, Any]] = {}
  apart = getattr(settings, "apart", False)
  for names in [[name] for name in entrants] if apart else [list(entrants)]:
    with contextlib.ExitStack() as processes:
      running: dict[str, Contestant] = {}
      for name in names:
        start = time.perf_counter()
        contestant = Contestant(entrants[name].build)
        processes.enter_context(contestant)
        try:
          found[name] = contestant.wait_ready()
        except Failed as error:
          found[name] = {"error": str(error)}
          print(f"{name}: {error}", flush=True)
          advance(1 + settings.rounds)
        else:
          seconds = time.perf_counter() - start
          found[name]["build_seconds"] = seconds
          print(f"{name}: ready after {seconds:.1f} s", flush=True)
          running[name] = contestant
          advance(1)
      timers = {
        name: functools.partial(contestant.run, entrants[name].steps)
        for name, contestant in running.items()
      }
      for name, taken in take_turns(timers, settings.rounds, advance).items():
        found[name]["seconds"] = taken
      for name, contestant in running.items() if _TRACE.value else ():
        if not any(peer in name for peer in TORCH):
          folder = Path(_TRACE.value) / slug(name)
          contestant.run(_TRACED_STEPS, folder)
          print(f"{name}: profile in {folder}", flush=True)
  return found


def slug(name: str) -> str:
  """Returns a name for files."""
  return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
