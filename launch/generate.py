r"""Continues a prompt with a trained model, its extra predictors drafting ahead.

  mtp-jax generate --workdir=runs/seq2 --prompt="def "
  mtp-jax generate --workdir=runs/seq2 --prompt_file=start.py --stream
  mtp-jax generate --workdir=runs/seq2 --prompt="class " --temperature=0.8
  mtp-jax generate --workdir=RUN --prompt="def " --tree=RUN/tree.json
  mtp-jax generate --workdir=RUN --prompt="def " --stop="class " --stop=@

The model's own next-token predictor decides every token: extra predictors make it
faster, not different. Greedy text and text of rule `match` equal plain decoding token
for token (checked here, unless --nocompare); rules `leviathan` and `block` equal plain
sampling in distribution.

The text goes to stdout, coloured by who proposed each token if that is a terminal; what
was accepted, and the time against plain decoding, to stderr.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli, decoding
from launch.comparison import compare, describe
from mtp_jax.config import ConfigError
from mtp_jax.decode import trees
from mtp_jax.decode.provenance import Generation, visible

_WORKDIR = cli.define_workdir("run folder")
_STEP = cli.define_step()
_PROMPT = flags.DEFINE_string("prompt", None, "text to continue")
_PROMPT_FILE = flags.DEFINE_string(
  "prompt_file", None, "file with the text to continue (UTF-8)"
)
_BOS = flags.DEFINE_bool(
  "bos", True, "the prompt begins a document; --nobos: it is from amid one"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "longest continuation; an end token of the model ends it too",
  lower_bound=1,
)
_DECODING = decoding.define(temperature=None)
_TREE = flags.DEFINE_string(
  "tree", None, "verify a tree of drafts instead of a chain, with rule greedy or "
  "match: a file of launch.tree, or dynamic:DEPTH,WIDTH,NODES, grown by a drafter that "
  "reads its own output (EAGLE, or one sequential module)"
)
_STOP = flags.DEFINE_multi_string(
  "stop", None, "what ends the continuation beside the model's own end tokens: a text, "
  "before which it ends, or the name of a special token (<|eot_id|>); may be repeated"
)
_SEED = flags.DEFINE_integer("seed", 0, "of sampling", 0, 2**32 - 1)
_STREAM = flags.DEFINE_bool(
  "stream", False, "print the text round by round, without colours"
)
_IS_COLORED = decoding.define_color()
_COMPARE = flags.DEFINE_bool(
  "compare", True, "decode without drafts too: same text? how much slower?"
)
_COMPILATION_CACHE = cli.define_compilation_cache()


def main() -> int:
  text, how = _prompt(), _DECODING() | {"tree": _tree()}
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  model = cli.load_model(_WORKDIR.value, _STEP.value)
  prompt = model.encode(text, bos=_BOS.value)
  limits = {
    "max_new_tokens": _MAX_NEW_TOKENS.value, "seed": _SEED.value, "stop": _STOP.value
  }

  def complete(**how: Any) -> Generation:
    return model.generate(prompt, **limits, **how)

  with cli.as_bad_input():
    if _STREAM.value:
      generation = _show_stream(complete(stream=True, **how))
    else:
      generation = complete(**how)
      _show(generation)
  report = [describe(generation)]
  if not generation.acceptance["num_drafts"]:
    report.append("plain decoding: nothing was drafted")
  elif _COMPARE.value:
    report.append(compare(complete, how).words())
  print("\n".join(report), file=sys.stderr, flush=True)
  return 0


def _show(generation: Generation) -> None:
  if _IS_COLORED():
    print(generation.to_ansi(), flush=True)
  else:
    print(_printed(generation.prompt + generation.text), flush=True)


def _show_stream(so_far: Iterator[Generation]) -> Generation:
  """Prints what is new after every round; returns the whole generation."""
  shown = ""
  for generation in so_far:
    # A character of which tokens are missing waits for them.
    text = (generation.prompt + generation.text).rstrip("\ufffd")
    print(_printed(text[len(shown) :]), end="", flush=True)
    shown = text
  text = generation.prompt + generation.text
  print(_printed(text[len(shown) :]), flush=True)
  return generation


def _printed(text: str) -> str:
  """A model of bytes may say anything: no control characters to a terminal."""
  return visible(text) if sys.stdout.isatty() else text


def _tree() -> trees.Tree | None:
  """Returns the tree of --tree, None without the flag."""
  if _TREE.value is None:
    return None
  try:
    return trees.read(_TREE.value)
  except ValueError as error:
    raise ConfigError(f"--tree: {error}") from error


def _prompt() -> str:
  """Returns the text of --prompt or --prompt_file.

  Raises:
    ConfigError: both or neither, a file that cannot be read, or no text.
  """
  text, path = _PROMPT.value, _PROMPT_FILE.value
  if text is None and path is None:
    raise ConfigError("one of --prompt and --prompt_file is required.")
  if text is not None and path is not None:
    raise ConfigError(
      f"one of --prompt and --prompt_file is required, got both ({text!r:.40} and "
      f"{path!r})."
    )
  name = "--prompt" if path is None else "--prompt_file"
  if path is not None:
    try:
      # A byte order mark is no text.
      text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
      raise ConfigError(
        f"--prompt_file must be a readable text file, got {path!r} ({error})."
      ) from error
  try:
    text.encode()
  except UnicodeEncodeError as error:  # Bytes of the command line that are no text.
    raise ConfigError(f"{name} must be UTF-8, got {text!r:.80}.") from error
  if not text:
    got = "''" if path is None else f"{path!r}, which is empty"
    raise ConfigError(f"{name} must have at least one character, got {got}.")
  return text


if __name__ == "__main__":
  cli.run(main)
