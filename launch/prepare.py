r"""Tokenizes text into a folder of ArrayRecord shards, once, for many runs.

  python -m launch.prepare --config=experiments/base.py --output=data/stdlib
  python -m launch.prepare --config=experiments/base.py --output=data/code_bpe \
      --config.data.source=jsonl --config.data.path='corpus/*.jsonl.zst' \
      --config.data.text_field=content --workers=32 \
      --config.tokenizer.kind=bpe --config.tokenizer.vocab_size=32768

Training then reads the folder; rows and their order are those of the text itself:

  python -m launch.train --config=experiments/base.py --workdir=runs/prepared \
      --config.data.source=array_record --config.data.path=data/stdlib

Of the config, `data.source`, `data.path`, `data.text_field` and `tokenizer` count, and
for a BPE tokenizer, which learns from the train split alone, `data.validation_fraction`
and `data.test_fraction`. Seeds, splits and row lengths are chosen by each run.

The same command again continues after Ctrl-C, a kill or a full disk; finished shards
are kept. The result depends neither on that nor on the number of workers. A folder that
was begun with other settings, or from other texts, is refused (exit code 2).
"""

import os
import sys
import time

from absl import flags
from tqdm import tqdm

from launch import cli
from mtp_jax.config import validate
from mtp_jax.data import prepare, sources

cli.define_config()
_OUTPUT = flags.DEFINE_string(
  "output", None, "folder to write; continued if it was begun by the same command"
)
_WORKERS = flags.DEFINE_integer(
  "workers",
  len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  "processes that tokenize and write; by default, one for each CPU core",
  lower_bound=1,
)
_SHARD_SIZE = flags.DEFINE_integer(
  "shard_size",
  64 << 20,
  "bytes of text in a shard; about two shards for each worker are held in memory",
  lower_bound=1,
)
flags.mark_flag_as_required("output")
_SECONDS_BETWEEN_LINES = 5.0


def main() -> int:
  config = cli.load_config()
  validate(config)
  progress = _Progress()
  try:
    folder = prepare.prepare_folder(
      config,
      _OUTPUT.value,
      num_workers=_WORKERS.value,
      shard_size=_SHARD_SIZE.value,
      progress=progress,
    )
  except OSError as error:
    return cli.fail(f"{error} The same command continues.", 1)
  except KeyboardInterrupt:
    return cli.fail("interrupted; the same command continues.", 130)
  finally:
    progress.close()
  print(sources.describe(folder.source))
  print(
    f"{folder.path}: {int(folder.index_N['num_tokens'].sum()):,} tokens in "
    f"{len(folder.shards)} shard(s)"
  )
  return 0


class _Progress:
  """A bar for each phase on a terminal, elsewhere a line every few seconds."""

  def __init__(self):
    self._bar: tqdm | None = None
    self._phase = ""
    self._began = self._begun_at = self._last_line = 0.0

  def __call__(self, phase: str, done: int, total: int) -> None:
    """Shows that `done` of `total` bytes of input are done; called often."""
    now = time.monotonic()
    if phase != self._phase:
      self.close()
      self._phase, self._began, self._begun_at = phase, now, done
      self._last_line = now
      if sys.stderr.isatty():
        self._bar = tqdm(
          desc=phase, total=total, initial=done, unit="B", unit_scale=True
        )
    if self._bar is not None:
      self._bar.update(done - self._bar.n)
    elif now - self._last_line >= _SECONDS_BETWEEN_LINES and done > self._begun_at:
      self._last_line = now
      left = (now - self._began) / (done - self._begun_at) * (total - done)
      print(
        f"{phase}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {left:,.0f} s left",
        flush=True,
      )

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
      self._bar = None


if __name__ == "__main__":
  cli.run(main)
