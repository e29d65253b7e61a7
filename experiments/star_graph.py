"""Does predicting more tokens teach a model to look ahead? The path of a star graph.

  python -m launch.sweep --config=experiments/star_graph.py:cpu \
      --workdir=runs/star_graph --parallel=2

Claim: next-token prediction (NTP) stays at chance, 1/d for d arms, because all steps of
the path but the first can be copied from the edges; predicting more tokens at once does
not (Bachmann and Nagarajan 2024, arXiv 2403.06963; "TOP", arXiv 2508.19228, table 5:
exact path on G(3,3) in %: NTP 33.8, parallel n = 2 and 4 100, DeepSeek's modules 100).
Score: `task_accuracy` of eval.json, the exact path, greedy and free-running.

Presets: `cpu`: G(2,3) of 12 labels, 4 layers of width 64, endless graphs, 400 steps of
128; ten seeds of five methods and three of NTP on reversed paths; about an hour on one
core. `gpu` and `cluster`: the graphs and sizes of that table (30 labels, 300,000
graphs, 8 layers of width 384, 7,300 steps of 4,096), with n = 5 and 6 on G(5,5), which
it does not have; five and ten seeds. Neither was run; minutes to half an hour a trial
on one H100 is a guess from the FLOPs. Every extra predictor has weight 1, as there;
parallel heads deploy as many layers as NTP.

`cpu_8_labels` was added after `cpu` had left n = 2 undecided: 8 labels in place of 12,
800 steps; ten seeds of NTP and n = 2; about 30 minutes on one core. Expected, before
its run: NTP at chance and n = 2 solving it, each for at least 8 of 10 seeds.

Found (experiments/README.md): with 12 labels NTP is at chance on 9 of 10 seeds, n = 2
solves it on 4, n = 4 and sequential modules on none; with 8 labels and more steps n = 2
solves it on 8, and NTP, later, on 6.

`gpu` and `cluster` add sequential D = 3 that is fed no token (`fed=none`) or its own
(`fed=own`). Hypothesis: a module that is fed the true token can copy the next edge, as
NTP can, and parallel heads cannot; so modules without the true token help as much as
parallel heads.

Expected, before the run of `cpu` and after a few single runs that chose its size: NTP
within 0.1 of 1/2 for at least 8 of 10 seeds; parallel n = 2 solves it (at least 0.95)
for at least 8 of 10; n = 4 and sequential D = 1 and 3 for at least half; reversed paths
are solved by NTP.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from experiments.task_setup import check_preset, task_config

PRESETS = ("cpu", "cpu_8_labels", "gpu", "cluster")
_GRAPHS = {  # (arms, length)
  "cpu": ((2, 3),),
  "cpu_8_labels": ((2, 3),),
  "gpu": ((3, 3), (5, 3), (3, 5), (5, 5)),
  "cluster": ((3, 3), (5, 3), (3, 5), (5, 5)),
}
_SEEDS = {"cpu": 10, "cpu_8_labels": 10, "gpu": 5, "cluster": 10}
_CONTROL_SEEDS = {"cpu": 3, "cpu_8_labels": 0, "gpu": 3, "cluster": 3}
_METHODS = (
  ("none", 0), ("parallel", 1), ("parallel", 3), ("sequential", 1), ("sequential", 3)
)
_FED = ("none", "own")  # What sequential D = 3 sees instead of the true tokens.
# Heads that reach past the first step of G(5,5).
_LONG = (("parallel", 4), ("parallel", 5))


def get_config(preset: str = "cpu") -> ConfigDict:
  check_preset(preset, PRESETS)
  is_cpu = preset.startswith("cpu")
  config = task_config("star_graph", "cpu" if is_cpu else preset)
  config.name = f"star_graph_{preset}"
  (_cpu if is_cpu else _gpu)(config)
  if preset == "cpu_8_labels":
    config.task.star_graph.num_labels = 8
    config.train.num_steps = 800
  return config


def sweep(preset: str = "cpu") -> Iterator[dict]:
  """Yields the trials seed by seed, so that a sweep cut short still compares."""
  for seed in range(_SEEDS[preset]):
    for arms, length in _GRAPHS[preset]:
      graph = _graph(arms, length)
      methods = _METHODS[:2] if preset == "cpu_8_labels" else _METHODS
      methods += _LONG if (arms, length) == (5, 5) else ()
      for kind, depth in methods:
        yield _trial(graph, kind, depth, seed)
      for fed in () if preset.startswith("cpu") else _FED:
        yield _trial(graph, "sequential", 3, seed, fed=fed)
      if seed < _CONTROL_SEEDS[preset]:
        yield _trial(graph, "none", 0, seed, is_reversed=True)


def _trial(
  graph: dict,
  kind: str,
  depth: int,
  seed: int,
  is_reversed: bool = False,
  fed: str = "true",
) -> dict:
  arms, length = graph["task.star_graph.arms"], graph["task.star_graph.length"]
  method = f"kind={kind},depth={depth}" + (f",fed={fed}" if fed != "true" else "")
  name = f"arms={arms},length={length},{method},seed={seed}"
  return graph | {
    "name": name + (",reversed" if is_reversed else ""),
    "mtp.kind": kind,
    "mtp.depth": depth,
    "mtp.fed": fed,
    "seed": seed,
    "data.seed": seed,
    "task.star_graph.reversed": is_reversed,
  }


def _graph(arms: int, length: int) -> dict:
  edges = arms * (length - 1)
  return {
    "task.star_graph.arms": arms,
    "task.star_graph.length": length,
    # Edges, question, path, and a begin and an end.
    "data.seq_len": 3 * edges + 3 + length + 2,
  }


def _cpu(config: ConfigDict) -> None:
  config.tokenizer.vocab_size = 17
  config.task.star_graph.update(arms=2, length=3, num_labels=12)
  config.data.update(seq_len=20, batch_size=128)
  config.train.update(num_steps=400, log_every=50, eval_every=50)


def _gpu(config: ConfigDict) -> None:
  config.trunk.update(
    num_layers=8, embed_dim=384, mlp_dim=1024, num_heads=6, num_kv_heads=6
  )
  config.tokenizer.vocab_size = 40
  config.task.num_train = 300_000
  config.task.star_graph.update(arms=3, length=3, num_labels=30)
  config.data.update(seq_len=26, batch_size=4096)
  config.optimizer.update(
    base_width=384, learning_rate=3e-3, warmup_fraction=1500 / 7300,
    final_fraction=1 / 3,
  )
  config.train.update(num_steps=7300, log_every=100, eval_every=500)
