"""What must a sequential module start from: which hidden state, and which token?

  python -m launch.sweep --config=experiments/hidden_source.py:cpu \
      --workdir=runs/hidden_source --parallel=2

Module k of DeepSeek-V3 joins the state of module k - 1 with the embedding of token
i + k. Neither choice has a published comparison that we know of. Seven arms, the last
one for the losses without MTP:

- `hidden=chained`, `norm=after`, `fed=true`: the published modules;
- `norm=before`: the trunk's state without its final norm (the module norms it anyway,
  so that with RMSNorm only the scales of the final norm make a difference);
- `hidden=trunk`, with both norms: every module starts from the trunk's state at i;
- `hidden=trunk_shifted`: from the trunk's state at i + k - 1, which in drafting does
  not exist: module k then starts from the output of module k - 1;
- `fed=none`: no token, as parallel heads, but one after the other;
- `kind=none`: plain next-token prediction.

D = 2, lambda 0.3, `mean`. Three seeds of the parameters; all trials see the same data
in the same order. Read in eval.json: `main_loss`, `depth_loss`, and of the drafts that
were accepted `sampled_tokens_per_round` and `sampled_acceptance`; the simulated figures
see the states that drafting with `trunk_shifted` does not have.

Presets: `cpu`: 4 layers of width 32, 600 steps of 512 bytes; 6 minutes on one core.
`gpu` and `cluster`: widths 256 and 1024 of the same presets of gains_with_scale.py.
Neither was run.

Expected, written before any run, for `cpu`: the main losses of all arms with D = 2 lie
within 0.02 nats of each other, and `before` does not differ from `after`. Depth 1 is
alike in `chained` and `trunk`, whose first modules are the same; depth 2 is at most
0.05 nats worse with `trunk`. Depth 2 of `trunk_shifted` is the best of all and close to
its depth 1, which has the same input, yet fewer of its second drafts are accepted than
of `chained`'s. With `fed=none` both depths are at least 0.3 nats worse, and the fewest
drafts are accepted.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments import gains_with_scale

SIZES = {
  "cpu": gains_with_scale.CPU[1]._replace(num_steps=600),
  "gpu": gains_with_scale.GPU[1],
  "cluster": gains_with_scale.CLUSTER[0],
}
SEEDS = (0, 1, 2)
_INPUTS = (  # (hidden, norm, fed)
  ("chained", "after", "true"),
  ("chained", "before", "true"),
  ("trunk", "after", "true"),
  ("trunk", "before", "true"),
  ("trunk_shifted", "after", "true"),
  ("chained", "after", "none"),
)


def get_config(preset: str = "cpu") -> ConfigDict:
  config = gains_with_scale.get_config(preset)
  config.name = f"hidden_source_{preset}"
  config.update_from_flattened_dict(
    gains_with_scale.rung(preset, SIZES[preset])
  )
  if preset == "cpu":
    config.data.batch_size = 4
    config.eval.update(
      num_rows=256, line_prompts=16, function_prompts=0, middle_prompts=64,
      max_new_tokens=32,
    )
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  del preset  # The arms are the same at every size.
  for seed in SEEDS:
    for hidden, norm, fed in _INPUTS:
      yield gains_with_scale.SEQUENTIAL | {
        "name": f"hidden={hidden},norm={norm},fed={fed},depth=2,seed={seed}",
        "mtp.depth": 2,
        "mtp.hidden": hidden,
        "mtp.hidden_norm": norm,
        "mtp.fed": fed,
        "seed": seed,
      }
    yield {
      "name": f"kind=none,depth=0,seed={seed}",
      "mtp.kind": "none",
      "mtp.depth": 0,
      "seed": seed,
    }
