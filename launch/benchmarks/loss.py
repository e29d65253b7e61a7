"""`launch.benchmark loss`: our loss against all logits at once, PyTorch and tokamax.

A step is the value and the gradient of the training loss alone, with respect to the
hidden states of every depth and the output matrix, from given hidden states; every
position counts. The contestants of one row take turns for several rounds, with large
products whose rate is the floor's; every ratio is formed within a round, so that a
machine that is busy for a while slows both of its sides.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import base
from launch.benchmarks import limits
from launch.benchmarks.contestants import (
  Contestant,
  Turns,
  peak_of_jax,
  peak_of_torch,
  resident,
)
from launch.benchmarks.records import (
  PACKAGES,
  Progress,
  add_huge_pages,
  add_output,
  add_trace,
  apply_preset,
  floor_seconds,
  header,
  heading,
  new_parser,
  ratios,
  rounds_of,
  slug,
  spread,
  table,
  write,
)
from mtp_jax.config import Config, ConfigError, from_config_dict, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.losses import loss_sums
from mtp_jax.model.attention_ops import import_tokamax
from mtp_jax.model.layers import compute_dtype

OURS, PLAIN, TOKAMAX = "ours", "plain JAX", "tokamax"
TORCH = ("torch eager", "torch.compile")
NAMES = (OURS, PLAIN, *TORCH, TOKAMAX)
_FLOOR = "floor"
_PRESETS = {
  "cpu": {
    "vocabs": [264, 50304], "depths": [0, 1, 3], "embed_dims": [256], "seq_len": 256,
    "batch_size": 16, "rounds": 5, "steps_per_round": 2,
  },
  "gpu": {
    "vocabs": [264, 50304], "depths": [0, 1, 3], "embed_dims": [1024, 2048],
    "seq_len": 2048, "batch_size": 8, "rounds": 7, "steps_per_round": 10,
  },
}
_QUICK = {
  "vocabs": [264], "depths": [0, 1], "embed_dims": [64], "seq_len": 64,
  "batch_size": 4, "rounds": 2, "steps_per_round": 2,
  "contestants": [OURS, PLAIN, "torch eager", TOKAMAX],
}


@dataclasses.dataclass(frozen=True)
class Ready:
  """What a contestant says once it is compiled and warm; sizes in bytes.

  least_memory: of the states, the matrix and their gradients.
  peak_memory: what one warm step needs at most, these included: allocator peak on a
    GPU, growth of the resident set on a CPU; None if unknown.
  temporaries: of the program, by XLA's own analysis; None for torch.
  """

  hardware: str
  least_memory: int
  peak_memory: int | None
  temporaries: int | None


class Inputs(NamedTuple):
  """What a loss is computed from, in numpy; float32 where not integers.

  hidden_MBTD: hidden states of M depths.
  coefficients_M: what each depth's sum over tokens counts.
  """

  hidden_MBTD: np.ndarray
  unembed_DV: np.ndarray
  targets_MBT: np.ndarray
  coefficients_M: np.ndarray


def add_parser(commands: Any) -> None:
  """Adds the `loss` subcommand to the subparsers of `launch.benchmark`."""
  parser = new_parser(
    commands, "loss", _PRESETS, __doc__,
    "our loss and its gradient against all logits at once, PyTorch and tokamax",
    (
      "  python -m launch.benchmark loss --quick         a check that takes a minute\n"
      "  python -m launch.benchmark loss                 the published table of a CPU\n"
      "  python -m launch.benchmark loss --preset gpu    that of a GPU\n"
      "  python -m launch.benchmark loss --vocabs 264 --depths 3 --block_tokens 4096\n"
    ),
  )
  add = parser.add_argument
  add("--vocabs", nargs="+", type=int, metavar="V")
  add("--depths", nargs="+", type=int, metavar="D")
  add("--embed_dims", nargs="+", type=int, metavar="d", help="widths of the states")
  add("--seq_len", type=int)
  add("--batch_size", type=int)
  add("--rounds", type=int, help="turns of every contestant")
  add("--steps_per_round", type=int)
  add(
    "--block_tokens", type=int,
    help="positions per block of logits in our loss; by default as in training",
  )
  add(
    "--contestants", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME",
    help=f"of {', '.join(map(repr, NAMES))}",
  )
  add_huge_pages(parser)
  add_trace(parser)
  add_output(parser, "tiny sizes, two rounds, no torch.compile")
  parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
  """Measures, prints the table, writes it and its figures.

  Raises:
    ConfigError: no rounds or steps, ours left out, or sizes that no model has.
  """
  apply_preset(args, _PRESETS, _QUICK)
  if OURS not in args.contestants:
    raise ConfigError(f"--contestants must have {OURS!r}, got {args.contestants}.")
  configs = [
    _config(args, vocab, dim, depth)
    for dim in args.embed_dims
    for vocab in args.vocabs
    for depth in args.depths
  ]
  for config in configs:
    validate(config, 1)
  say = Progress(len(configs) * (1 + len(args.contestants)), args.rounds)
  rows = [_measure(args, config, say) for config in configs]
  record = header(args, (*PACKAGES, TOKAMAX)) | {"rows": rows}
  name = "loss-quick" if args.quick else f"loss-{slug(rows[0]['hardware'])}"
  write(args.output, name, record, markdown(record))


def _config(args: argparse.Namespace, vocab: int, dim: int, depth: int) -> Config:
  """Returns a small model with such states; only its loss is computed."""
  sizes = {
    "trunk.embed_dim": dim,
    "trunk.num_layers": 1,
    "trunk.num_heads": 1,
    "trunk.num_kv_heads": 1,
    "mtp.kind": "sequential" if depth else "none",
    "mtp.depth": depth,
    "tokenizer.vocab_size": vocab,
    "data.seq_len": args.seq_len,
    "data.batch_size": args.batch_size,
    "mesh.data": 1,
    "eval.max_new_tokens": 1,  # Not measured; must be less than `seq_len`.
  }
  if args.block_tokens is not None:
    sizes["loss.block_tokens"] = args.block_tokens
  return with_overrides(from_config_dict(base.get_config()), sizes)


def _measure(
  args: argparse.Namespace, config: Config, say: Progress
) -> dict[str, Any]:
  """Returns one row, its contestants and the products of its floor in turns."""
  row: dict[str, Any] = {
    "vocab": config.tokenizer.vocab_size,
    "depth": config.mtp.depth,
    "embed_dim": config.trunk.embed_dim,
    "block_tokens": config.loss.block_tokens,
    "flops": needed_flops(config),
    "hardware": "unknown",
    "contestants": {},
  }
  builds = {_FLOOR: limits.build_products} | dict.fromkeys(args.contestants, build_step)
  with Turns(args.rounds, args.steps_per_round, say, trace=args.trace) as turns:
    for name, build in builds.items():
      label = f"V={row['vocab']} d={row['embed_dim']} D={row['depth']} {name}"
      turns.enter(label, Contestant(name, config, args.huge_pages, build), row)
    turns.take()
  return row


def needed_flops(config: Config) -> float:
  """Returns those of the products that no implementation can leave out.

  Three per depth, each of 2 N d V with N = B T: the logits, their gradient times the
  output matrix, and times the states.
  """
  tokens = config.data.batch_size * config.data.seq_len
  product = 2.0 * tokens * config.trunk.embed_dim * config.tokenizer.vocab_size
  return 3 * product * (1 + config.mtp.depth)


def make_inputs(config: Config, seed: int = 0) -> Inputs:
  """Returns random inputs; the logits have a variance of 1, as before training."""
  rng = np.random.default_rng(seed)
  width, vocab = config.trunk.embed_dim, config.tokenizer.vocab_size
  tokens = (1 + config.mtp.depth, config.data.batch_size, config.data.seq_len)
  # Numpy's: in a PyTorch contestant, JAX does not start. Every position counts.
  weights_M = np.full(tokens[0], config.mtp.weight / max(config.mtp.depth, 1))
  weights_M[0] = 1
  return Inputs(
    rng.standard_normal((*tokens, width), np.float32),
    rng.standard_normal((width, vocab), np.float32) * np.float32(width**-0.5),
    rng.integers(0, vocab, tokens, np.int32),
    np.float32(weights_M / (tokens[1] * tokens[2])),
  )


def build_step(config: Config, name: str) -> tuple[Callable[[], Any], Ready]:
  """Returns the step of one of `NAMES`, compiled and warm, and what it says.

  A step returns `(total, (d_hidden, d_unembed_DV))`; `d_hidden` is a list of the
  depths' where the depths are computed one after the other.
  """
  build = _build_torch if name in TORCH else _build_jax
  return build(config, name)


def _build_jax(config: Config, name: str) -> tuple[Callable[[], Any], Ready]:
  jax.block_until_ready(jnp.ones(()) + 1)  # Loads what any program needs.
  before = resident()
  dtype = compute_dtype(config.trunk)
  inputs = make_inputs(config)
  unembed_DV = jnp.asarray(inputs.unembed_DV, dtype)
  if name == OURS:
    loss = functools.partial(_our_loss, config.loss.block_tokens)
    hidden = jnp.asarray(inputs.hidden_MBTD, dtype)
    mask = np.ones(inputs.targets_MBT.shape, bool)
    targets = jnp.asarray(inputs.targets_MBT), jnp.asarray(mask)
  else:
    loss = {PLAIN: plain_loss, TOKAMAX: tokamax_loss}[name]
    # As a model has them that never stacks its depths.
    hidden = [jnp.asarray(h_BTD, dtype) for h_BTD in inputs.hidden_MBTD]
    targets = [jnp.asarray(t_BT) for t_BT in inputs.targets_MBT]
  arguments = (hidden, unembed_DV, targets, jnp.asarray(inputs.coefficients_M))
  del inputs
  program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()

  def step() -> Any:
    return jax.block_until_ready(program(*arguments))

  step()
  return step, Ready(
    hardware=jax.devices()[0].device_kind,
    least_memory=2 * sum(x.nbytes for x in jax.tree.leaves(arguments[:2])),
    peak_memory=peak_of_jax(step, before),
    temporaries=program.memory_analysis().temp_size_in_bytes,
  )


def _our_loss(block_tokens, hidden_MBTD, unembed_DV, targets, coefficients_M):
  targets_MBT, mask_MBT = targets
  return loss_sums(
    hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M, block_tokens
  ).total


def plain_loss(
  hidden: list[jax.Array],
  unembed_DV: jax.Array,
  targets: list[jax.Array],
  coefficients_M: jax.Array,
) -> jax.Array:
  """Returns the total; depth by depth from [B, T, D] states and [B, T] ids."""
  total = jnp.float32(0)
  for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients_M, strict=True):
    logits_BTV = (h_BTD @ unembed_DV).astype(jnp.float32)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, t_BT)
    total += coefficient * jnp.sum(nll_BT)
  return total


def tokamax_loss(
  hidden: list[jax.Array],
  unembed_DV: jax.Array,
  targets: list[jax.Array],
  coefficients_M: jax.Array,
) -> jax.Array:
  """Returns the same of tokamax's fused product and cross-entropy."""
  tokamax, total = import_tokamax(), jnp.float32(0)
  for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients_M, strict=True):
    total += coefficient * tokamax.linear_softmax_cross_entropy_loss(
      h_BTD.reshape(-1, h_BTD.shape[-1]), t_BT.reshape(-1), unembed_DV, reduction="sum"
    )
  return total


def _build_torch(config: Config, name: str) -> tuple[Callable[[], Any], Ready]:
  # Torch is optional, and only this process needs it.
  from launch.benchmarks.torch_step import start_torch

  torch, device = start_torch()
  functional, cuda = torch.nn.functional, device.type == "cuda"
  before = resident()
  dtype = torch.bfloat16 if cuda else torch.float32
  inputs = make_inputs(config)

  def leaf(x: np.ndarray) -> Any:
    return torch.tensor(x).to(device, dtype).requires_grad_()

  hidden = [leaf(h_BTD) for h_BTD in inputs.hidden_MBTD]
  unembed_VD = leaf(inputs.unembed_DV.T)
  targets = torch.tensor(inputs.targets_MBT, dtype=torch.int64).to(device)
  coefficients = [float(c) for c in inputs.coefficients_M]
  del inputs

  def loss() -> Any:
    total = 0.0
    for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients, strict=True):
      logits_BTV = functional.linear(h_BTD, unembed_VD).float()
      total = total + coefficient * functional.cross_entropy(
        logits_BTV.flatten(0, 1), t_BT.flatten(), reduction="sum"
      )
    return total

  forward = torch.compile(loss) if name == "torch.compile" else loss

  def step() -> Any:
    for x in (*hidden, unembed_VD):
      x.grad = None
    total = forward()
    total.backward()
    if cuda:
      torch.cuda.synchronize()
    return total.detach(), ([h_BTD.grad for h_BTD in hidden], unembed_VD.grad.T)

  step()
  return step, Ready(
    hardware=torch.cuda.get_device_name() if cuda else "cpu",
    least_memory=2 * sum(x.nbytes for x in (*hidden, unembed_VD)),
    peak_memory=peak_of_torch(step, before),
    temporaries=None,
  )


def markdown(record: dict[str, Any]) -> str:
  """Returns the tables of a benchmark record, with what is needed to read them."""
  rows, settings = record["rows"], record["settings"]
  peers = [n for n in settings["contestants"] if n != OURS]
  parts = [
    *heading(
      "The loss and its gradient: ours against all logits at once, PyTorch, tokamax",
      record, rows[0]["hardware"],
    ),
    f"N = {settings['batch_size']} x {settings['seq_len']} positions per depth, all "
    "of which count; V is the vocabulary, d the width of the states, D the extra "
    "depths. A step is the value of the training loss and its gradient with respect to "
    "the states of all depths and the output matrix, in the compute dtype of the "
    "device (float32 on a CPU, else bfloat16), from given states; softmax and sums are "
    f"float32. {settings['rounds']} interleaved rounds of "
    f"{settings['steps_per_round']} steps. Times: median over rounds. Ratios: median "
    "over rounds [least, greatest]; below 1 our step is the faster.",
    "",
    "- floor: the three products that nothing can leave out, 3 x 2 N d V operations "
    "per depth, at the rate of products of large square matrices of that dtype, timed "
    "in the same rounds",
    f"- {OURS}: `mtp_jax.losses.loss_sums` as training calls it, with masks and "
    f"counts, `loss.block_tokens` = {rows[0]['block_tokens']} (0: as suits the device)",
    f"- {PLAIN}: `h @ w` and optax's cross-entropy, one depth after the other, "
    "differentiated by JAX; logits are rounded to the compute dtype",
    f"- {', '.join(TORCH)}: `F.linear` and `F.cross_entropy`, one depth after the "
    "other, then `backward`; logits are rounded to the compute dtype",
    f"- {TOKAMAX}: its `linear_softmax_cross_entropy_loss`, one depth after the other, "
    "by the implementation that it picks; where it has no kernel for the device, as on "
    "a CPU, that is all logits at once",
    "",
  ]
  parts += table(
    (
      "V", "d", "D", "floor ms", *(f"{n} ms" for n in (OURS, *peers)), "ours / floor",
      *(f"ours / {n}" for n in peers),
    ),
    [
      (
        *_sizes(r), _milliseconds(_floor(r)),
        *(_milliseconds(rounds_of(r, n)) for n in (OURS, *peers)),
        spread(ratios(rounds_of(r, OURS), _floor(r))),
        *(spread(ratios(rounds_of(r, OURS), rounds_of(r, n))) for n in peers),
      )
      for r in rows
    ],
  )
  parts += [
    "",
    "Peak memory of one warm step in MB: on a CPU the growth of the resident set since "
    "before the inputs, on a GPU the allocator's peak. Its floor: the states, the "
    "matrix and their gradients. Last: the temporaries of the compiled programs, by "
    "XLA's own analysis.",
    "",
  ]
  programs = [n for n in (OURS, PLAIN, TOKAMAX) if n in settings["contestants"]]
  pairs = [("peak_memory", n) for n in peers]
  pairs += [("temporaries", n) for n in programs if n != OURS]
  parts += table(
    (
      "V", "d", "D", "floor", OURS, *peers, *(f"{n} (XLA)" for n in programs),
      "ours / floor",
      *(f"ours / {n}{' (XLA)' * (key == 'temporaries')}" for key, n in pairs),
    ),
    [
      (
        *_sizes(r), _megabytes(r, OURS, "least_memory"),
        *(_megabytes(r, n, "peak_memory") for n in (OURS, *peers)),
        *(_megabytes(r, n, "temporaries") for n in programs),
        _quotient(_figure(r, OURS, "peak_memory"), _figure(r, OURS, "least_memory")),
        *(_quotient(_figure(r, OURS, key), _figure(r, n, key)) for key, n in pairs),
      )
      for r in rows
    ],
  )
  failures = [
    f"- V={r['vocab']}, d={r['embed_dim']}, D={r['depth']}, {name}: {c['error']}"
    for r in rows
    for name, c in r["contestants"].items()
    if "error" in c
  ]
  if failures:
    parts += ["", "Without figures:", "", *failures]
  return "\n".join(parts) + "\n"


def _sizes(row: dict[str, Any]) -> tuple[int, int, int]:
  return row["vocab"], row["embed_dim"], row["depth"]


def _figure(row: dict[str, Any], name: str, key: str) -> Any:
  """What a contestant said; None where it could not be built or does not know."""
  return row["contestants"].get(name, {}).get(key)


def _floor(row: dict[str, Any]) -> list[float]:
  """Per round: the seconds of the needed products at the rate of large ones."""
  return floor_seconds(row["contestants"].get(_FLOOR, {}), row["flops"])


def _milliseconds(seconds: list[float]) -> str:
  return f"{statistics.median(seconds) * 1e3:.1f}" if seconds else "-"


def _megabytes(row: dict[str, Any], name: str, key: str) -> str:
  size = _figure(row, name, key)
  return "-" if size is None else f"{size / 1e6:.0f}"


def _quotient(above: int | None, below: int | None) -> str:
  return f"{above / below:.2f}" if above is not None and below else "-"
