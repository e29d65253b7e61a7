"""The order in which one machine trains the trials of a sweep, alone or in packs."""

from collections.abc import Iterable

from launch.engines.workers import Worker
from launch.states import State, Trial
from mtp_jax.config import Config

# Of `--pack=auto`: the most that `launch.benchmark pack` measures. What a pack has
# trained since its last checkpoints is lost together.
MOST_PACKED = 32


def next_trial(waiting: list[Trial], worker: Worker, busy: Iterable[Worker]) -> Trial:
  """Returns what a free worker trains next.

  First a trial of the program that it has compiled; then one of a program that no other
  worker has; among these the program with the most work left. Long trials come before
  short ones, so that the sweep does not end with one worker busy and the others idle.
  """
  taken = {other.program for other in busy}
  choice = [trial for trial in waiting if trial.program == worker.program]
  if not choice:
    choice = [trial for trial in waiting if trial.program not in taken] or waiting
  work: dict[Config, float] = {}
  for trial in choice:
    work[trial.program] = work.get(trial.program, 0.0) + trial.flops
  return max(choice, key=lambda trial: (work[trial.program], trial.flops))


def pack_size(num_trials: int, most: int, num_workers: float) -> int:
  """Returns the size of packs of trials of one program, at most `most`, that are even.

  13 trials, of which 8 fit, are two packs of up to 7: one program serves both, and one
  of its places stays empty. `num_workers` are to have a pack each.
  """
  num_packs = max(-(-num_trials // most), min(num_trials, int(num_workers)), 1)
  return -(-num_trials // num_packs)


def in_packs(
  mates: list[Trial], found: dict[str, State], size: int
) -> list[list[Trial]]:
  """Returns trials of one program as packs of at most `size`, those alike together.

  Trials at one step can share their batches, and trials of one length end together. The
  longest come first, else in the order of the sweep.
  """
  alike = sorted(mates, key=lambda trial: (found[trial.name].step, -trial.num_steps))
  return [alike[i : i + size] for i in range(0, len(alike), size)]


def preview_packs(
  waiting: list[Trial], found: dict[str, State], most: int | None, num_workers: int
) -> str:
  """Returns a line for each pack of at most `most` trials (None: as many as fit)."""
  mates: dict[Config, list[Trial]] = {}
  for trial in waiting:
    mates.setdefault(trial.program, []).append(trial)
  lines = []
  if most is None:
    lines.append(f"packs of at most {MOST_PACKED}, if as many fit the memory:")
  for number, alike in enumerate(mates.values(), start=1):
    size = pack_size(len(alike), most or MOST_PACKED, num_workers / len(mates))
    for pack in in_packs(alike, found, size):
      names = " ".join(trial.name for trial in pack)
      lines.append(f"program {number}, {len(pack)} trial(s): {names}")
  return "\n".join(lines)
