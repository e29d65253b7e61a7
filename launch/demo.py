r"""Shows a small trained model that drafts its own text: by whom, and how fast.

  mtp-jax demo
  mtp-jax demo --prompt="def main(" --seed=3

The model ships with the package: Python source, three sequential modules (D = 3). Each
token of the text is marked by what proposed it: the next-token prediction, or a draft
that the next-token prediction accepted. `mtp-jax generate` does the same with a run of
your own.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

import mtp_jax
from launch import cli, decoding
from launch.comparison import compare, describe
from mtp_jax import accounting, run_folder
from mtp_jax.config import ConfigError
from mtp_jax.decode.provenance import Generation

_PROMPT = flags.DEFINE_string(
  "prompt",
  "class QueueTest(unittest.TestCase):\n\n    def setUp(self):\n        self.queue =",
  "text to continue",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 96, "length of a continuation", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.5, "of the sampled continuation", lower_bound=1e-3
)
_SEED = flags.DEFINE_integer("seed", 0, "of the sampled continuation", 0, 2**32 - 1)
_IS_COLORED = decoding.define_color()
_COMPILATION_CACHE = cli.define_compilation_cache()
_SHIP = flags.DEFINE_string(
  "ship", None, "for maintainers: write the shipped checkpoint anew from this run of "
  "experiment `demo`, and show nothing"
)
_MADE = "made.json"
# experiments/self_speculation.py, as experiments/results/benchmarks has it.
_DRAFTS_PAY = """\
At this size four tokens at once cost a CPU more than drafts save. Drafts pay where
weights take longer to read than to use: 1.94 times as fast at width 512 on two cores
(mtp-jax train self_speculation, 6 minutes; mtp-jax generate runs/self_speculation \\
--prompt="def ")."""


def main() -> int:
  folder = mtp_jax.demo_checkpoint()
  if _SHIP.value is not None:
    _ship(Path(_SHIP.value), folder)
    return 0
  cli.use_compilation_cache(_COMPILATION_CACHE.value)
  model = cli.load_model(str(folder), None)
  made = json.loads((folder / _MADE).read_text())
  size = accounting.count(model.config)
  print(
    f"A model of {size.total:,} parameters, {size.total - size.deployed:,} of them in "
    f"{model.config.mtp.depth} modules that draft.\nTrained on {made['tokens']:,} "
    f"tokens of Python source; how: {folder / _MADE}\n",
    flush=True,
  )
  prompt = model.encode(_PROMPT.value)

  def complete(**how: Any) -> Generation:
    return model.generate(prompt, _MAX_NEW_TOKENS.value, seed=_SEED.value, **how)

  greedy = {"rule": "greedy"}
  _show("Greedy", complete(**greedy))
  found = compare(complete, greedy)
  print(f"{found.words()}\n", flush=True)
  sampled = complete(rule="match", temperature=_TEMPERATURE.value)
  _show(f"Sampled at temperature {_TEMPERATURE.value:g}", sampled)
  if found.speed_up < 1:
    print(f"\n{_DRAFTS_PAY}")
  return 0


def _show(title: str, generation: Generation) -> None:
  text = generation.to_ansi() if _IS_COLORED() else generation.to_marked()
  print(f"--- {title}\n{text}\n{describe(generation)}", flush=True)


def _ship(run: Path, folder: Path) -> None:
  """Writes the checkpoint of a run, and how it was made, into `folder`."""
  from mtp_jax.checkpoint import save_params  # Here, because it imports Orbax.

  model = cli.load_model(str(run), None)
  if not run_folder.is_done(run):
    raise ConfigError(f"--ship must be a finished run, got {str(run)!r}.")
  save_params(
    folder, model.step, model.params, model.config, model.tokenizer.to_json()
  )
  facts = run_folder.read(run, run_folder.RUN)
  result = run_folder.read(run, run_folder.EVAL)
  made = {
    "command": f"mtp-jax train {model.config.name}; "
    f"python -m launch.demo --ship=RUN",
    "seed": model.config.seed,
    **{key: facts[key] for key in ("commit", "hardware", "versions", "parameters")},
    **{key: result[key] for key in ("step", "tokens", "train_seconds", "main_loss")},
  }
  (folder / _MADE).write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main)
