"""The training loop: the only place where the parts meet.

    fit -> programs(shape).step -> train_step -> batch_loss -> losses.loss_sums
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import accounting, checkpoint, evaluate
from mtp_jax.checkpoint import Checkpointer
from mtp_jax.config import Config, from_config_dict, to_dict, validate
from mtp_jax.data.pipeline import Corpus, TrainLoader, load_corpus
from mtp_jax.data.tokenizers import save_tokenizer
from mtp_jax.metrics import (
  MetricsWriter,
  Progress,
  model_flop_utilisation,
  write_json,
)
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import Hyperparameters, TrainState
from mtp_jax.train_step import Programs, programs, shape_of


class Interrupted(Exception):
  """SIGTERM or SIGINT arrived; everything is saved. `signum` says which."""

  def __init__(self, signum: int, step: int):
    super().__init__(f"{signal.Signals(signum).name} at step {step}; checkpoint saved")
    self.signum = signum


class Diverged(RuntimeError):
  """Too many steps in a row had a loss or gradient that was not finite."""


def fit(config: Config, workdir: Path, *, progress: bool = True) -> dict[str, Any]:
  """Trains, evaluates and fills the run folder; continues whatever it finds there.

  Args:
    config: see `config.validate`; arm `flops` is resolved here.
    workdir: the run folder (its contract is in launch/README.md).
    progress: show a bar or lines.

  Returns:
    What is in eval.json.

  Raises:
    ConfigError: the config cannot work, or the folder holds another run.
    Diverged: see `train.max_nonfinite_steps`.
    Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved.
  """
  validate(config, jax.device_count())
  workdir = Path(workdir)
  _claim(workdir, config)
  resolved = accounting.resolve(config)
  mesh = make_mesh(resolved.mesh)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    corpus = load_corpus(resolved)
    run = _Run(config, resolved, workdir, mesh, corpus)
    stack.callback(run.checkpointer.close)
    loader, state, seconds = run.start()
    _write_run_json(run)
    writer = stack.enter_context(MetricsWriter(workdir, int(state.step)))
    bar = Progress(
      config.name, resolved.train.num_steps, int(state.step), enabled=progress
    )
    stack.callback(bar.close)
    interrupt = stack.enter_context(_catch_signals())
    if int(state.step):
      bar.say(f"resumed at step {int(state.step)}")
    state, seconds = _train(run, loader, state, seconds, writer, bar, interrupt)
    result = _final_evaluation(run, state, seconds)
    bar.say(
      f"done: main loss {result['main_loss']['mean']:.4f} "
      f"+- {result['main_loss']['stderr']:.4f} nats per token"
    )
  if jax.process_index() == 0:
    write_json(workdir / "eval.json", result)
    (workdir / "DONE").write_text("")
  return result


@dataclasses.dataclass
class _Run:
  """The parts of one run, built once."""

  config: Config
  resolved: Config
  workdir: Path
  mesh: jax.sharding.Mesh
  corpus: Corpus

  def __post_init__(self):
    self.checkpointer = Checkpointer(self.workdir, self.resolved.checkpoint.keep)
    self.flops_per_token = accounting.train_flops_per_token(self.resolved)

  @functools.cached_property
  def programs(self) -> Programs:
    return programs(shape_of(self.resolved), self.mesh)

  @property
  def hyperparameters(self) -> Hyperparameters:
    c = self.resolved
    values = (c.optimizer.learning_rate, c.mtp.weight, c.train.num_steps)
    return Hyperparameters(*(jnp.float32(x) for x in values))

  @property
  def tokens_per_step(self) -> int:
    return self.resolved.data.batch_size * self.resolved.data.seq_len

  def start(self) -> tuple[TrainLoader, TrainState, float]:
    """Returns loader, state and training seconds so far: restored, or fresh."""
    c = self.resolved
    loader = TrainLoader(
      self.corpus.train_rows(1 + c.mtp.depth),
      batch_size=c.data.batch_size,
      seed=c.data.seed,
      host_index=jax.process_index(),
      num_hosts=jax.process_count(),
      num_workers=c.data.num_workers,
    )
    seed = jnp.int32(c.seed)
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      jax.eval_shape(self.programs.init, seed),
      self.programs.shardings,
    )
    restored = self.checkpointer.restore(abstract, c)
    if restored is None:
      return loader, self.programs.init(seed), 0.0
    loader.set_state(restored.data)
    return loader, restored.state, restored.progress["seconds"]

  def save(self, state: TrainState, loader: TrainLoader, seconds: float) -> None:
    self.checkpointer.save(
      state,
      self.resolved,
      self.corpus.tokenizer.to_json(),
      loader.get_state(),
      {"seconds": seconds},
    )

  def put(self, batch: Any) -> Any:
    """Returns rows as global arrays [A, B / A, ...] for A microbatches."""
    microbatches = self.resolved.train.accumulation_steps
    split = lambda x: x.reshape(microbatches, -1, x.shape[-1])  # noqa: E731
    return put_batch(self.mesh, jax.tree.map(split, batch), ("microbatch",))

  def eval_sums(self, params: Any) -> dict[str, np.ndarray]:
    c = self.resolved
    return evaluate.document_sums(
      shape_of(c),
      params,
      self.corpus.eval_batches(1 + c.mtp.depth),
      self.corpus.tokenizer.token_bytes_V,
      self.mesh,
    )


def _train(
  run: _Run,
  loader: TrainLoader,
  state: TrainState,
  seconds: float,
  writer: MetricsWriter,
  bar: Progress,
  interrupt: list[int],
) -> tuple[TrainState, float]:
  """Runs the remaining steps; returns the final state and the training seconds."""
  c, hyper = run.resolved.train, run.hyperparameters
  depth = run.resolved.mtp.depth
  step, last_saved = int(state.step), int(state.step)
  if step >= c.num_steps:
    return state, seconds
  batch = run.put(next(loader))
  step_program = _compiled(run.programs.step, state, batch, hyper, jnp.bool_(True))
  clock, seconds_at_log, step_at_log = time.monotonic(), seconds, step
  previous = None
  while step < c.num_steps:
    if depth and c.diagnostics_every and step % c.diagnostics_every == 0:
      seconds += time.monotonic() - clock
      measured = run.programs.diagnostics(state.params, batch, hyper, state.step)
      writer.write({"kind": "diagnostics", "step": step} | jax.device_get(measured))
      clock = time.monotonic()
    starts_interval = jnp.bool_(step % c.log_every == 0)
    state, report = step_program(state, batch, hyper, starts_interval)
    step += 1
    # The device works on this step while the host prepares the next batch; waiting for
    # the step before it bounds the queue, so that a signal is answered at once.
    data_state = loader.get_state()
    is_last = step == c.num_steps
    if not is_last:
      batch = run.put(next(loader))
    if previous is not None:
      jax.block_until_ready(previous)
    previous = report["loss_total"]
    bar.advance(step)

    if step % c.log_every == 0 or is_last:
      report = jax.device_get(report)
      now = time.monotonic()
      seconds, clock = seconds + now - clock, now
      rate = (step - step_at_log) * run.tokens_per_step / (seconds - seconds_at_log)
      step_at_log, seconds_at_log = step, seconds
      record = _train_record(run, step, seconds, rate, report)
      writer.write(record)
      bar.report(step, record["loss_total"], rate)
      _stop_if_diverged(run, report, step, last_saved)
    is_due = step % run.resolved.checkpoint.every_steps == 0 or is_last
    if is_due or interrupt or (c.eval_every and step % c.eval_every == 0):
      jax.block_until_ready(state)
      seconds += time.monotonic() - clock
      if c.eval_every and step % c.eval_every == 0:
        writer.write(_validation_record(run, state, step, seconds))
      if is_due or interrupt:
        run.save(state, _At(data_state), seconds)
        last_saved = step
      if interrupt:
        run.checkpointer.wait()
        raise Interrupted(interrupt[0], step)
      clock = time.monotonic()
  return state, seconds


@dataclasses.dataclass
class _At:
  """An iterator position taken before the next batch was fetched ahead."""

  state: dict[str, Any]

  def get_state(self) -> dict[str, Any]:
    return self.state


_executables: dict[Any, Any] = {}


def _compiled(program: Any, *args: Any) -> Any:
  """Compiles before the clock starts; trials of one shape share the executable."""
  if program not in _executables:
    _executables[program] = program.lower(*args).compile()
  return _executables[program]


def _train_record(
  run: _Run, step: int, seconds: float, rate: float, report: dict[str, Any]
) -> dict[str, Any]:
  """Returns the log line of the interval that ended at `step`: means over its steps.

  `loss_total` is the sum of `weighted_loss`, whose entries are w_k L_k of each step,
  averaged; the averages of w and L themselves stand beside it.
  """
  steps = max(int(report["steps"]), 1)
  with np.errstate(invalid="ignore", divide="ignore"):
    accuracy = report["correct_M"] / report["count_M"]
  return {
    "kind": "train",
    "step": step,
    "tokens": step * run.tokens_per_step,
    "seconds": seconds,
    "loss_total": report["loss_total"] / steps,
    "loss": report["loss_M"] / steps,
    "weighted_loss": report["weighted_loss_M"] / steps,
    "weight": report["weight_M"] / steps,
    "accuracy": np.nan_to_num(accuracy),
    "count": report["count_M"],
    "lambda": report["lambda"],
    "learning_rate": report["learning_rate"],
    "grad_norm": report["grad_norm"] / steps,
    "tokens_per_second": rate,
    "mfu": model_flop_utilisation(run.flops_per_token, rate),
    "nonfinite_steps": report["nonfinite_total"],
  }


def _validation_record(
  run: _Run, state: TrainState, step: int, seconds: float
) -> dict[str, Any]:
  summary = evaluate.summarize(run.eval_sums(state.params))
  return {
    "kind": "validation",
    "step": step,
    "tokens": step * run.tokens_per_step,
    "seconds": seconds,
    "loss": [x["mean"] for x in summary["depth_loss"]],
    "bits_per_byte": summary["bits_per_byte"]["mean"],
  }


def _stop_if_diverged(
  run: _Run, report: dict[str, Any], step: int, last_saved: int
) -> None:
  limit = run.resolved.train.max_nonfinite_steps
  if report["longest_nonfinite_run"] < limit:
    return
  run.checkpointer.wait()
  saved = run.checkpointer.steps()
  where = run.checkpointer.directory / str(saved[-1]) if saved else "none was saved yet"
  raise Diverged(
    f"loss or gradient was not finite for {int(report['longest_nonfinite_run'])} steps "
    f"in a row (train.max_nonfinite_steps = {limit}) before step {step}. Their updates "
    f"were skipped. Last good checkpoint: {where}. Lower optimizer.learning_rate "
    f"({run.resolved.optimizer.learning_rate}) or look at the data."
  )


def _final_evaluation(run: _Run, state: TrainState, seconds: float) -> dict[str, Any]:
  """Returns eval.json: see `evaluate` for the definitions."""
  step = int(state.step)
  tokens = step * run.tokens_per_step
  run.checkpointer.wait()
  texts = run.corpus.texts(run.resolved.eval.split)
  return {
    "step": step,
    "tokens": tokens,
    "train_seconds": seconds,
    "train_flops": tokens * run.flops_per_token,
    "split": run.resolved.eval.split,
    **evaluate.summarize(run.eval_sums(state.params)),
    **evaluate.generative_metrics(
      run.resolved, state.params, run.corpus.tokenizer, texts
    ),
  }


def _claim(workdir: Path, config: Config) -> None:
  """Creates the run folder, or checks that it holds this very run."""
  path = workdir / "config.json"
  if path.exists():
    checkpoint.check_resumable(from_config_dict(json.loads(path.read_text())), config)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config))


def _write_run_json(run: _Run) -> None:
  if jax.process_index() != 0:
    return
  counts = dataclasses.asdict(accounting.count(run.resolved))
  flops = counts.pop("train_flops_per_token")
  save_tokenizer(run.corpus.tokenizer, run.workdir / "tokenizer.json")
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  write_json(
    run.workdir / "run.json",
    {
      "parameters": counts,
      "train_flops_per_token": flops,
      "tokens_per_step": run.tokens_per_step,
      "num_steps": run.resolved.train.num_steps,
      "seq_len": run.resolved.data.seq_len,
      "hardware": _hardware(),
      "versions": {"python": platform.python_version()}
      | {name: importlib.metadata.version(name) for name in packages},
      "commit": _commit(),
      "data": run.corpus.stats,
    },
  )


def _hardware() -> str:
  device = jax.devices()[0]
  name = f"{jax.device_count()} x {device.device_kind}"
  if device.platform == "cpu":
    name += f", {len(os.sched_getaffinity(0))} core(s) {platform.machine()}"
  return name


@functools.cache
def _commit() -> str:
  """The commit of the code, with a mark if the tree has changes; '' outside git."""
  here = Path(__file__).parent
  try:
    run = functools.partial(
      subprocess.run, cwd=here, capture_output=True, text=True, check=True
    )
    commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
    dirty = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
  except (OSError, subprocess.CalledProcessError):
    return ""
  return commit + ("+changes" if dirty.strip() else "")


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
  """Yields a list that receives the first SIGTERM or SIGINT; a second one kills.

  Outside the main thread nothing can be caught, and nothing is.
  """
  received: list[int] = []

  def handle(signum: int, frame: Any) -> None:
    received.append(signum)
    signal.signal(signum, old[signum])

  old: dict[int, Any] = {}
  try:
    for signum in (signal.SIGTERM, signal.SIGINT):
      old[signum] = signal.signal(signum, handle)
  except ValueError:  # Not the main thread.
    pass
  try:
    yield received
  finally:
    for signum, handler in old.items():
      signal.signal(signum, handler)
