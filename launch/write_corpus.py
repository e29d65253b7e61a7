r"""Lets a trained model write text, for other predictors to be trained on.

  mtp-jax write_corpus --workdir=runs/ntp --documents=20000 \
      --output=data/ntp_writes.jsonl
  mtp-jax train --config=experiments/base.py --workdir=runs/medusa \
      --config.mtp.kind=medusa --config.mtp.depth=3 --config.train.freeze_trunk=True \
      --config.train.trunk_from=runs/ntp --config.data.train_on=data/ntp_writes.jsonl

Every text begins with an excerpt of a training document, never of a held-out one, and
is continued by the run's own next-token predictor up to the row length of its training
(`data.seq_len`) or the end of the document. Extra predictors that the run has draft,
which changes neither text (rules greedy, match) nor distribution (leviathan, block).

A line has `text`, `bos` and `eos` (it begins, it ends a document) and where it is from:
`number` (with --seed, what was drawn), `document` (content hash), `begin` and
`excerpt_tokens` (of the document, in tokens). Texts that are none are left out: a model
of bytes may write bytes that are no UTF-8. Beside FILE.jsonl, FILE.about.json tells how
it was made: command, commit, run, all that the texts depend on, how many were left out.

FILE.jsonl appears once it is whole; until then the same command continues.
"""

import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch import cli, decoding, paths
from mtp_jax import files, self_distillation
from mtp_jax.checkpoint import fingerprint
from mtp_jax.config import TASKS, Config, ConfigError
from mtp_jax.data.pipeline import Corpus, load_corpus
from mtp_jax.environment import code_commit
from mtp_jax.files import write_json
from mtp_jax.progress import Progress
from mtp_jax.trained_model import TrainedModel

_WORKDIR = cli.define_workdir("run folder of the model that writes")
_STEP = cli.define_step()
_OUTPUT = flags.DEFINE_string("output", None, "file to write, FILE.jsonl")
_DOCUMENTS = flags.DEFINE_integer(
  "documents", None, "texts to write, one for each training document in the shuffled "
  "order of the run; where there are more than documents, these come again, cut at "
  "other places",
  lower_bound=1,
)
_EXCERPT_TOKENS = flags.DEFINE_integer(
  "excerpt_tokens", None, "tokens of the document that a text begins with; by default "
  "a quarter of a row",
  lower_bound=1,
)
_AT = flags.DEFINE_integer(
  "at", None, "token of the document at which its excerpt begins; by default anywhere",
  lower_bound=0,
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "texts written at once", lower_bound=1
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "random seed of the excerpts' places and of sampling", 0, 2**32 - 1
)
_DECODING = decoding.define(temperature=1.0)
_COMPILATION_CACHE = cli.define_compilation_cache()
flags.mark_flags_as_required(["output", "documents"])


def main() -> int:
  paths.check_file("output", _OUTPUT.value, ".jsonl")
  output, how = Path(_OUTPUT.value), _DECODING()
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  model = cli.load_model(_WORKDIR.value, _STEP.value)
  excerpt_tokens = _excerpt_tokens(model.config)
  corpus = _corpus(model)
  settings = _settings(model, corpus, excerpt_tokens, how)
  _check_begun(output, settings)
  if output.exists():
    print(f"{output} is whole already: {_words(_count(output))}")
    return 0
  with cli.as_bad_input():
    _write(output, model, corpus, settings, how)
  counts = _count(_unfinished(output))
  if not counts["texts"]:
    return cli.fail(f"{_words(counts)}: there is nothing to train on.", 1)
  _write_about(output, settings, counts)
  files.commit(_unfinished(output), output)
  print(f"{output}: {_words(counts)}")
  return 0


def _excerpt_tokens(config: Config) -> int:
  length, most = _EXCERPT_TOKENS.value, config.data.seq_len - 1
  if length is None:
    return max(1, config.data.seq_len // 4)
  if length > most:
    raise ConfigError(
      f"--excerpt_tokens must leave room in a row (data.seq_len) of {1 + most} tokens, "
      f"got {length}."
    )
  return length


def _corpus(model: TrainedModel) -> Corpus:
  """Returns the corpus that the model was trained on."""
  source = model.config.data.source
  if source in TASKS:
    raise ConfigError(
      f"--workdir must be a run on text, got one of data.source {source!r}."
    )
  corpus = load_corpus(model.config, model.tokenizer)
  if corpus.tokenizer.to_json() != model.tokenizer.to_json():
    raise ConfigError(
      "--workdir must be a run whose corpus is still there: what is now at data.source "
      f"{source!r} gives another tokenizer."
    )
  return corpus


def _settings(
  model: TrainedModel, corpus: Corpus, excerpt_tokens: int, how: dict[str, Any]
) -> dict[str, Any]:
  """Returns everything that the texts depend on."""
  return {
    "step": model.step,
    "parameters": hashlib.sha256(np.asarray(fingerprint(model.params))).hexdigest(),
    "corpus": corpus.store.identity,
    "documents": _DOCUMENTS.value,
    "row_tokens": model.config.data.seq_len,
    "excerpt_tokens": excerpt_tokens,
    "at": _AT.value,
    "seed": _SEED.value,
    "batch_size": _BATCH_SIZE.value,
  } | how


def _check_begun(output: Path, settings: dict[str, Any]) -> None:
  """Checks that an unfinished file was written with the same settings."""
  if not output.exists() and not _unfinished(output).exists():
    return
  about = _about(output)
  try:
    begun = files.read_json(about)["settings"]
    differing = files.changed_settings(begun, settings)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"--output must be a new file or one of this command, {str(output)!r} exists "
      f"without a {about.name} of this command."
    ) from error
  if differing:
    raise ConfigError(
      f"--output {str(output)!r} was begun with other settings: {differing}. Use "
      "these settings, or another file."
    )


def _write(
  output: Path,
  model: TrainedModel,
  corpus: Corpus,
  settings: dict[str, Any],
  how: dict[str, Any],
) -> None:
  """Writes the lines that are not there yet, batch by batch."""
  size, total, seed = _BATCH_SIZE.value, _DOCUMENTS.value, _SEED.value
  length = settings["excerpt_tokens"]
  excerpts = self_distillation.Excerpts(corpus, length, _AT.value, seed)
  part = _unfinished(output)
  progress = Progress("texts")
  try:
    for first in range(_resume(part, size), total, size):
      # Too many in the last batch: it has the shape of the others, compiled once.
      batch = [excerpts[number] for number in range(first, first + size)]
      room = model.config.data.seq_len - length
      found = self_distillation.write(model, batch, room, seed, **how)
      if not part.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_about(output, settings, None)
      lines = [json.dumps(line) + "\n" for line in found if line["number"] < total]
      with part.open("a") as handle:
        handle.write("".join(lines))
      progress("writing", min(first + size, total), total)
  finally:
    progress.close()


def _resume(part: Path, size: int) -> int:
  """Cuts the file after its last whole batch; returns the number of the next text.

  So the texts equal, to the last bit, the texts of a command that was never stopped:
  how sums are rounded may depend on what else is in a batch.
  """
  lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
  numbers = [json.loads(line)["number"] for line in lines if line.endswith(b"\n")]
  begin = numbers[-1] // size * size if numbers else 0
  kept = [line for line, n in zip(lines, numbers, strict=False) if n < begin]
  if lines:
    files.write_whole(part, b"".join(kept))
  return begin


def _unfinished(output: Path) -> Path:
  return output.with_suffix(".jsonl.part")


def _about(output: Path) -> Path:
  return output.with_suffix(".about.json")


def _count(path: Path) -> dict[str, int]:
  texts = len(path.read_bytes().splitlines())
  return {"texts": texts, "left_out": _DOCUMENTS.value - texts}


def _words(counts: dict[str, int]) -> str:
  return (
    f"{counts['texts']:,} texts; {counts['left_out']:,} left out, with broken "
    "characters or tokens that no text has"
  )


def _write_about(
  output: Path, settings: dict[str, Any], counts: dict[str, int] | None
) -> None:
  values = {
    "command": "python -m launch.write_corpus " + shlex.join(sys.argv[1:]),
    "commit": code_commit(),
    "workdir": _WORKDIR.value,
    "settings": settings,
    "counts": counts,
  }
  write_json(_about(output), values)


if __name__ == "__main__":
  cli.run(main)
