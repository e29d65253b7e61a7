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
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import base
from launch import paths
from launch.huge_pages import start_with_huge_pages
from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, from_config_dict, with_overrides
from mtp_jax.predictors import tokens_after_row
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
# A pack of N trials takes an Nth of the steps of a turn, but at least so many.
_LEAST_STEPS = 3


class Failed(RuntimeError):
  """A contestant could not be built or run; the message is its error's first line."""


# Returns a step and the facts about it, for the JSON record. `hardware` is one of them,
# and `trials` where a step is one of several trials at once. A step that does not wait
# for its work returns the arrays to wait for.
Built = tuple[Callable[[], Any], dict[str, Any]]
Build = Callable[[], Built]


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


class _List(flags.ArgumentParser):
  """Parses values separated by commas: numbers from `least`, or some of `choices`."""

  def __init__(self, least: int, choices: Iterable[str] | None):
    super().__init__()
    self._least, self._choices = least, choices

  def parse(self, argument: Any) -> list[Any]:
    if isinstance(argument, list):
      return argument
    texts = argument.split(",")
    if self._choices is not None:
      if not set(texts) <= set(self._choices):
        raise ValueError(f"must be of {', '.join(self._choices)}")
      return texts
    if not all(text.isdecimal() and int(text) >= self._least for text in texts):
      raise ValueError(f"must be numbers from {self._least} up, separated by commas")
    return [int(text) for text in texts]


def define_settings(
  presets: Mapping[str, Mapping[str, Any]],
  choices: Mapping[str, Iterable[str]] = MappingProxyType({}),
  **explained: str,
) -> None:
  """Defines a flag for every key of a benchmark's presets.

  Args:
    presets: values by key, for each value of `--preset`.
    choices: by key, of which names a list consists; lists of other keys are numbers.
    explained: the help of the keys that `_EXPLAINED` does not have.
  """
  explained = _EXPLAINED | explained
  for flag in (_PRESET, OUTPUT, NAME):
    flags.declare_key_flag(flag.name)
  for key, value in presets["cpu"].items():
    text = f"{explained[key]}; {_text(value)} (cpu), {_text(presets['gpu'][key])} (gpu)"
    least = 0 if key in _MAY_BE_ZERO else 1
    if isinstance(value, list):
      parser = _List(least, choices.get(key))
      flags.DEFINE(parser, key, None, text, allow_override=True)
    elif isinstance(value, bool):
      flags.DEFINE_bool(key, None, text, allow_override=True)
    elif isinstance(value, int):
      flags.DEFINE_integer(key, None, text, lower_bound=least, allow_override=True)
    else:
      flags.DEFINE_float(key, None, text, lower_bound=1e-6, allow_override=True)


def read_settings(
  presets: Mapping[str, Mapping[str, Any]], *others: flags.FlagHolder[Any]
) -> SimpleNamespace:
  """Returns the flags that were given, and for the others the values of the preset.

  Args:
    presets: see `define_settings`.
    others: further flags, which no preset sets.

  Raises:
    ConfigError: the figures cannot be written where the flags name.
  """
  found = dict(presets[_PRESET.value])
  given = {key: flags.FLAGS[key].value for key in found}
  paths.check_folder("output", OUTPUT.value)
  if NAME.value is not None and not re.fullmatch(r"[\w.,=+-]{1,200}", NAME.value):
    raise ConfigError(
      f"--name must be 1 to 200 letters, digits or any of '=,._+-', got {NAME.value!r}."
    )
  found |= {key: value for key, value in given.items() if value is not None}
  found |= {flag.name: flag.value for flag in others}
  return SimpleNamespace(**found, preset=_PRESET.value)


def _text(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def make_config(
  model: str, trunk: str, vocab: int, kind: str, depth: int, length: int, rows: int
) -> Config:
  """Returns the config of one of `MODELS`; Llama has half as many kv heads as heads.

  `kind` is the kind of the predictors if `depth` is not 0.
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
  extra = tokens_after_row(config.mtp)
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
    self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with start_with_huge_pages() if huge_pages else contextlib.nullcontext():
      self._facts = self._pool.submit(_build, build)

  def wait_ready(self) -> dict[str, Any]:
    """Returns the facts about the step once it is compiled and warm.

    Raises:
      Failed: it could not be built.
    """
    return _result(self._facts)

  def run(self, num_steps: int) -> list[float]:
    """Returns the seconds of each of `num_steps` steps, after one that is not timed."""
    return _result(self._pool.submit(_run, num_steps))

  def __enter__(self) -> "Contestant":
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown()


def _result(future: Future[Any]) -> Any:
  try:
    return future.result()
  except BrokenProcessPool:
    raise Failed("its process was killed") from None


_built: list[Callable[[], Any]] = []  # In the process of a contestant, its step.


def _build(build: Build) -> dict[str, Any]:
  try:
    step, facts = build()
  except Exception as error:
    message = (str(error).strip() or "no message").splitlines()[0]
    raise Failed(f"{type(error).__name__}: {message}") from None
  _built.append(step)
  return facts


def _run(num_steps: int) -> list[float]:
  (step,) = _built
  # With huge pages, a JAX step after seconds of waiting takes up to a second longer
  # than the next. Steps of a training run do not wait: this one is not timed.
  step()
  seconds = []
  for _ in range(num_steps):
    start = time.perf_counter()
    started = step()
    seconds.append(time.perf_counter() - start)
  jax.block_until_ready(started)  # Or the work would continue in the next one's turn.
  return seconds


def take_turns(
  timers: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[Any]]:
  """Calls every timer once per round; returns the answers of each timer.

  Every other round is backwards, so that no timer always follows the same one.
  """
  answers: dict[str, list[Any]] = {name: [] for name in timers}
  for number in range(rounds):
    for name in list(timers)[:: 1 if number % 2 == 0 else -1]:
      answers[name].append(timers[name]())
  return answers


def measure(
  builds: Mapping[str, Build], settings: SimpleNamespace
) -> dict[str, dict[str, Any]]:
  """Lets contestants take turns; returns by name their facts and seconds, or an error.

  `seconds` is one list per round with the seconds of every step.

  Args:
    builds: by name, which is printed.
    settings: with `rounds` and `steps_per_round`; with `apart`, every contestant ends
      before the next is built, where memory does not hold all of them. To be fair, the
      machine must have nothing else to do then.
  """
  found: dict[str, dict[str, Any]] = {}
  apart = getattr(settings, "apart", False)
  for names in [[name] for name in builds] if apart else [list(builds)]:
    with contextlib.ExitStack() as processes:
      timers = {}
      # One after the other: a compilation would slow the first steps of others.
      for name in names:
        contestant = processes.enter_context(Contestant(builds[name]))
        start = time.perf_counter()
        try:
          found[name] = contestant.wait_ready()
        except Failed as error:
          found[name] = {"error": str(error)}
          print(f"{name}: {error}", flush=True)
          continue
        seconds = time.perf_counter() - start
        found[name]["build_seconds"] = seconds
        print(f"{name}: ready after {seconds:.1f} s", flush=True)
        steps, trials = settings.steps_per_round, found[name].get("trials", 1)
        if trials > 1:
          steps = max(_LEAST_STEPS, steps // trials)
        timers[name] = functools.partial(contestant.run, steps)
      for name, taken in take_turns(timers, settings.rounds).items():
        found[name]["seconds"] = taken
  return found


def measure_all(
  cases: Iterable[Any], measured: Callable[[Any], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
  """Returns the rows of all cases; shows how many are measured."""
  cases, rows = list(cases), []
  progress = Progress("cases")
  for number, case in enumerate(cases):
    progress("measured", number, len(cases))
    rows += measured(case)
  progress.close()
  return rows
