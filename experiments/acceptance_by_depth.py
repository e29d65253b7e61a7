"""How many drafts of each depth are accepted, by kind, size and text?

  python -m launch.sweep --config=experiments/acceptance_by_depth.py:cpu \
      --workdir=runs/acceptance_by_depth --parallel=2

Claims: of the drafts whose predecessors were accepted, fewer are at depth 2 than at
depth 1; modules that are fed the drafted tokens (sequential) are accepted more often
than parallel heads at the same depth; acceptance rises with the size of the model
("TOP", arXiv 2508.19228; the tokens per round of Gloeckle et al. 2024, arXiv
2404.19737, table S2, imply 0.94, 0.89 and 0.86 at depths 1 to 3 on code and 0.88, 0.78
and 0.80 on Wikipedia at 7B, greedy). Score: `sampled_acceptance` of eval.json, by rule
`leviathan` at temperature 1, on continuations of held-out documents.

D = 3 on code (`stdlib`), prose (`language_reference`) and made-up text (`stories`), all
bytes; parallel heads at weight 1 each, sequential modules at 0.3 together.

Presets: `cpu`: the two larger models of gains_with_scale:cpu, 600 steps of 512 bytes,
three seeds. `gpu`, `cluster`: the first four and five sizes of gains_with_scale:gpu,
and code of the installed packages in place of the standard library. Neither was run.

Expected, before the run of `cpu`: all three claims on code; on stories acceptance is
highest, for most of their bytes follow from the words.

`cpu` took 18 minutes on one core, beside other programs; found: experiments/README.md.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale
from experiments.gains_with_scale import PARALLEL, SEQUENTIAL
from experiments.text_setup import model, text_config

_SIZES = {
  "cpu": gains_with_scale.CPU[1:],
  "gpu": gains_with_scale.GPU[:4],
  "cluster": gains_with_scale.GPU,
}
_SEEDS = 3
_DEPTH = 3


def get_config(preset: str = "cpu") -> ConfigDict:
  config = text_config("acceptance_by_depth", preset)
  if preset == "cpu":
    config.eval.update(num_rows=256, line_prompts=16, max_new_tokens=32)
  # There are few documents of prose.
  config.data.update(validation_fraction=0.1, test_fraction=0.1)
  # Functions are in code alone.
  config.eval.update(function_prompts=0, middle_prompts=64 if preset == "cpu" else 512)
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  code = "stdlib" if preset == "cpu" else "site_packages"
  for seed in range(_SEEDS):
    for text in (code, "language_reference", "stories"):
      for size in _SIZES[preset]:
        shared = model(preset, size)
        if preset == "cpu":
          shared["train.num_steps"] = 600
        for kind in (PARALLEL, SEQUENTIAL):
          yield shared | kind | {
            "name": f"text={text},embed_dim={size.embed_dim},"
            f"kind={kind['mtp.kind']},seed={seed}",
            "data.source": text,
            "mtp.depth": _DEPTH,
            "seed": seed,
          }
