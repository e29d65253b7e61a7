r"""Tokenizes text into a folder of ArrayRecord shards, once, for many runs.

  mtp-jax prepare base --output=data/mine data.source=files data.path=input.txt
  mtp-jax prepare base --output=data/code_bpe --workers=32 \
      data.source=jsonl data.path='corpus/*.jsonl.zst' data.text_field=content \
      tokenizer.kind=bpe tokenizer.vocab_size=32768

Training then reads the folder; rows and their order equal the text's:

  mtp-jax train base data.source=array_record data.path=data/mine

Of the config, `data.source`, `data.path`, `data.text_field` and `tokenizer` count.
Seeds, splits and row lengths are chosen by each run. A BPE tokenizer learns from the
train split alone, and where there are too few documents to be split whole (one file is
enough) the folder holds the parts of each: then `data.validation_fraction` and
`data.test_fraction` count too.

The same command again continues after Ctrl-C, a kill or a full disk; finished shards
are kept. The result depends neither on that nor on the number of workers. A folder that
was begun with other settings, or from other texts, is refused (exit code 2).
"""

import os

from absl import flags

from launch import cli, exits, paths
from mtp_jax import files
from mtp_jax.config import DataConfig
from mtp_jax.config_rules import validate
from mtp_jax.data import prepare, prepared, sources
from mtp_jax.progress import Progress

cli.define_config()
_OUTPUT = flags.DEFINE_string(
  "output", None, "folder to write; continued if it was begun by the same command"
)
_WORKERS = flags.DEFINE_integer(
  "workers",
  len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  "processes that tokenize and write; by default, one for each CPU core",
  lower_bound=1, upper_bound=4096,
)
_SHARD_SIZE = flags.DEFINE_integer(
  "shard_size",
  64 << 20,
  "bytes of text in a shard; about two shards for each worker are held in memory",
  lower_bound=1,
)
cli.require("output")


def main() -> int:
  paths.check_folder("output", _OUTPUT.value)
  config = cli.load_config()
  validate(config)
  progress = Progress("B")
  try:
    folder = prepare.prepare_folder(
      config,
      _OUTPUT.value,
      num_workers=_WORKERS.value,
      shard_size=_SHARD_SIZE.value,
      progress=progress,
    )
  except OSError as error:
    if files.is_bad_path(error):
      raise
    return cli.fail(f"{error} The same command continues.", exits.FAILED)
  finally:
    progress.close()
  print(sources.describe(folder.source))
  print(
    f"{folder.path}: {int(folder.index_N['num_tokens'].sum()):,} tokens in "
    f"{len(folder.shards)} shard(s)"
  )
  print(_describe_splits(folder, config.data))
  return 0


def _describe_splits(folder: prepared.PreparedFolder, data: DataConfig) -> str:
  """Returns how the texts are split, and what is missing with these fractions."""
  if folder.split_N is not None:
    return (
      f"There are too few documents to be split whole: the end of each is held out "
      f"({data.validation_fraction:.3g} of the text for validation, "
      f"{data.test_fraction:.3g} for test), and training leaves a gap of a row "
      "(data.seq_len) before it."
    )
  split_N = sources.split_of(
    folder.index_N["hash"], data.validation_fraction, data.test_fraction
  )
  missing = [name for i, name in enumerate(sources.SPLITS) if i not in split_N]
  none = f"; none of them is in: {', '.join(missing)}" if missing else ""
  return f"{len(split_N):,} document(s) are split whole{none}."


if __name__ == "__main__":
  cli.run(main)
