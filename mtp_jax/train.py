"""Training: the loop of one run, from its config to its evaluation.

    fit -> _train -> programs(config).step -> train_step -> batch_loss -> loss_sums

`run` has the parts of a run, `run_log` what happens between two steps. Several runs of
one program side by side are trained by `pack`.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtp_jax import accounting, records, run_folder, trackers
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import Config, ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.data.pipeline import TrainLoader
from mtp_jax.data.tokenizers import Tokenizer
from mtp_jax.files import plain
from mtp_jax.interrupt import Interrupt
from mtp_jax.progress import Progress
from mtp_jax.run import Run, admit, check_folder
from mtp_jax.run_log import NO_PROGRESS, Clock, Observer, RunLog
from mtp_jax.saved_model import SOURCES
from mtp_jax.sharding import make_mesh
from mtp_jax.stopwatch import Stopwatch
from mtp_jax.trace import Trace
from mtp_jax.train_state import TrainState


def fit(
  config: Config,
  workdir: Path,
  *,
  progress: bool = True,
  observer: Observer | None = None,
  startup: Stopwatch | None = None,
  holding: Callable[[Path], contextlib.AbstractContextManager] | None = None,
  profile: tuple[int, int] | None = None,
  track: Sequence[str] = (),
) -> dict[str, Any]:
  """Trains, evaluates and fills the run folder; continues whatever it finds there.

  A run that is done is left as it is, unless a value differs that may (`finished`).

  Several processes that called `jax.distributed.initialize` train together: all call
  this with the same config and a folder that they share.

  Args:
    config: see `config_rules.validate`; arm `flops` is resolved here.
    workdir: the run folder (its contract is in docs/reference).
    progress: show a bar or lines.
    observer: receives how far training is.
    startup: what a command has measured before; by default, time begins here.
    holding: keeps other processes out of the run folder; raises ConfigError where
      another one has it.
    profile: first and last step that a trace in the run folder has; see `trace`.
    track: trackers that get the records too, now and at later starts; see `trackers`.

  Returns:
    What is in eval.json.

  Raises:
    ConfigError: the config cannot work, or the folder holds another run.
    DataError: the corpus cannot be used, or is not the run's.
    CheckpointError: no checkpoint of the folder is whole, or none of the run that this
      one is to begin with; or one cannot be written.
    Diverged: see `train.max_nonfinite_steps`.
    Interrupted: on SIGTERM or SIGINT, after a checkpoint was saved; in all processes if
      one had a signal. Until the first step is compiled nothing could be saved: the
      handlers of the caller act.
  """
  workdir, startup = Path(workdir), startup or Stopwatch()
  observer = observer or Observer()
  resolved = admit(config, workdir, jax.device_count())
  trackers.check(track)
  with contextlib.ExitStack() as stack:
    if holding is not None:
      stack.enter_context(holding(workdir))
    trace = stack.enter_context(Trace(workdir / run_folder.PROFILE, profile))
    if result := run_folder.finished(workdir, config):
      trace.skip("the run is done")
      loss, where = result["main_loss"]["mean"], workdir / run_folder.EVAL
      Progress("steps", progress and jax.process_index() == 0).say(
        f"{config.name}: done before: main loss {loss:.4f} nats per token, see {where}"
      )
      return result
    interrupt = stack.enter_context(Interrupt())
    observer.begins(resolved.train.num_steps)
    observer.pauses("starting")
    check_folder(config, workdir)
    startup.ends("devices")

    run = stack.enter_context(Run(resolved, workdir))
    loader = stack.enter_context(contextlib.closing(run.loader()))
    startup.ends("data")
    with jax.set_mesh(run.mesh):
      run.compile_step_ahead(loader.has_unscored)
      start = run.start(loader)
      # Nothing is left that can refuse the run: the folder becomes its own.
      run.claim(config, start.origin)
      if track and jax.process_index() == 0:
        trackers.want(workdir, track)
      log = stack.enter_context(RunLog(run, start, observer, Clock(), progress))
      startup.ends("state")
      log.make_up(start.state, loader.get_state(), interrupt)
      state = _train(log, start.state, loader, startup, interrupt, trace)
    return log.finish(state, interrupt)


def _train(
  log: RunLog,
  state: TrainState,
  loader: TrainLoader,
  startup: Stopwatch,
  interrupt: Interrupt,
  trace: Trace,
) -> TrainState:
  """Takes the steps that are left; returns the state after the last one."""
  run = log.run
  log.stop(interrupt)
  if log.has_steps_left:
    log.observer.pauses("compiling")
    batch = run.put(run.split(next(loader)))
    step = trace.of(run.compiled_step(state, batch), log.step)
    startup.ends("compile")
  # From here on there is work to save.
  interrupt.catch()
  log.start()
  previous = None
  while log.has_steps_left:
    if log.diagnostics_are_due:
      log.diagnose(state, batch)
      if previous is None:
        startup.ends("diagnostics")
    starts_interval = np.bool_(log.starts_interval)
    state, report = step(state, batch, run.hyperparameters, starts_interval)
    data_state = loader.get_state()
    # The device works on this step while the host prepares the next batch.
    if log.step + 1 < log.num_steps:
      batch = run.put(run.split(next(loader)))
    if previous is None:
      jax.block_until_ready(report)
      startup.ends("first step")
      log.began(startup)
      records.compile_ahead(run, state, batch)
    # Waiting for the step before bounds the queue: a signal is answered soon.
    jax.block_until_ready(previous)
    previous = report["loss_total"]
    log.stepped()

    # A signal may cut the validation short; the next start makes up for the records.
    is_measured = not log.validation_is_due or log.validate(state, report, interrupt)
    if is_measured and log.log_is_due:
      log.log(jax.device_get(report))
    signum = interrupt.received()
    if log.save_is_due(signum):
      log.save(state, data_state, signum)
  log.pause()
  return state


def start_run(
  config: Config,
  workdir: Path,
  load_params: Callable[[jax.sharding.Mesh], Any],
  tokenizer: Tokenizer | None = None,
  model_folder: dict[str, Any] | None = None,
) -> None:
  """Fills a new run folder with a checkpoint of step 0 that has given parameters.

  `fit` continues from it. Subtrees that are not given are initialised as always.

  Args:
    config: of the run, see `fit`.
    workdir: a folder without a run.
    load_params: mesh -> the given subtrees of the parameters by top-level name, in the
      layout of the mesh.
    tokenizer: takes the place of what `tokenizer.path` names.
    model_folder: what the model had besides weights; see `interop.model_files`.

  Raises:
    ConfigError: the config cannot work, or the folder holds a run.
    DataError: the corpus cannot be used.
    CheckpointError: the checkpoint could not be written.
  """
  for name in SOURCES:
    if value := getattr(config.train, name):
      raise ConfigError(
        f"train.{name} must be '' where the weights come from elsewhere, got {value!r}."
      )
  workdir = Path(workdir)
  resolved = admit(config, workdir, jax.device_count())
  if (workdir / run_folder.CONFIG).exists():
    raise ConfigError(f"{workdir} holds a run already; name a new folder.")
  given = load_params(make_mesh(config.mesh))  # Nothing is written if this fails.
  with contextlib.ExitStack() as stack:
    run = stack.enter_context(Run(resolved, workdir, tokenizer=tokenizer))
    run.model_folder = model_folder
    loader = stack.enter_context(contextlib.closing(run.loader()))
    with jax.set_mesh(run.mesh):
      run.save(run.initial_state(given), loader.get_state(), NO_PROGRESS)
    run.checkpointer.wait()
    run.claim(config, dict.fromkeys(SOURCES))


def evaluate_run(
  config: Config, workdir: Path, step: int | None = None
) -> dict[str, Any]:
  """Evaluates a checkpoint of a run folder, as `fit` does at its end.

  Writes nothing. `config` may differ from the run's own where
  `checkpoint.RESUMABLE` allows: what is evaluated, and on which mesh. The rows of
  training need not divide over the mesh, the rows of the evaluation must. `step` names
  the checkpoint; None is the newest whole one.

  Raises:
    ConfigError: the config cannot work, or the folder holds another run.
    CheckpointError: the folder has no such whole checkpoint.
    DataError: the corpus or tokenizer here is not the run's.
  """
  validate(config, platform=jax.default_backend())
  with Run(accounting.resolve(config), Path(workdir), read_only=True) as run:
    with jax.set_mesh(run.mesh):
      restored = run.restore(step)
    if restored is None:
      raise CheckpointError(f"no checkpoint in {run.checkpointer.directory}.")
    run.loader().set_state(restored.data)  # Refuses another corpus.
    return plain(records.final_evaluation(run, restored.state, restored.progress))
