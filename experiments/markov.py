r"""Does a Markov head cure the drafts of parallel heads, and what does it cost?

  python -m launch.sweep --config=experiments/markov.py:cpu --workdir=runs/markov_cpu \
      --parallel=1

Parallel heads n = 4 that learn with their trunk draft 1.4 tokens a round when sampled,
modules 2.8 (`experiments/drafters.py`): a head does not know what was drafted before
it. The Markov head of DSpark (arXiv 2607.05147, there on a frozen trunk) is the
cheapest known cure: a table of the token before, of low rank, added to the logits of
each extra head (`mtp.markov_rank`). Arms: next-token prediction (NTP), n = 4 without
the table, with rank 16 and with the published rank 256, which for bytes (vocabulary
264) is nearly a whole table.

Text, sizes and steps come from `experiments/drafters.py`. For one seed all arms of a
size read the same data in the same order and start from the same trunk. Scores in
eval.json: `sampled_tokens_per_round` (temperature 1), `decoded_tokens_per_round`
(greedy), `main_loss`; parameters and FLOPs per token are in the report. Every arm is
measured with drafts that are drawn (`sample_proposal_tokens_per_round`) and with the
most likely tokens (`argmax_proposal_tokens_per_round`).

Presets: `cpu`: widths 32 and 64 of gains_with_scale:cpu; `gpu`: widths 256 and 384 of
gains_with_scale:gpu. Five seeds. What was expected and the rules that decide stand in
the log, written before any run.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import drafters, gains_with_scale
from experiments.gains_with_scale import PARALLEL

_SEEDS = 5
_DEPTH = 3
_RANKS = (0, 256, 16)


def get_config(preset: str = "cpu") -> ConfigDict:
  if preset not in drafters.SIZES:
    names = ", ".join(drafters.SIZES)
    raise ValueError(f"preset must be one of {names}, got {preset!r}.")
  config = drafters.get_config(f"{preset}_trunks")
  config.name = f"markov_{preset}"
  config.eval.both_proposals = True
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  for seed in range(_SEEDS):
    for size in drafters.SIZES[preset]:
      model = gains_with_scale.rung(preset, size) | {"seed": seed}
      width = f"embed_dim={size.embed_dim}"
      ntp = {"mtp.kind": "none", "mtp.depth": 0}
      yield model | ntp | {"name": f"{width},kind=none,seed={seed}"}
      for rank in _RANKS:
        arm = PARALLEL | {"mtp.depth": _DEPTH, "mtp.markov_rank": rank}
        name = f"{width},kind=parallel,markov_rank={rank},seed={seed}"
        yield model | arm | {"name": name}
