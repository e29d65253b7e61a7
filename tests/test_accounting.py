"""Parameters by formulas worked out by hand, FLOPs by XLA's count, fair arms."""

import functools

import jax
import pytest

from mtp_jax import accounting
from tests.common import (
  COUNTABLE,
  GPT2,
  INPUTS,
  KINDS,
  MINIMAL,
  SHARED,
  TRUNKS,
  flops_counted_by_xla,
  mostly_slow,
  tiny_config,
)

L, D, F, V, T = 5, 16, 24, 40, 16  # Layers, widths, vocabulary, length.
FROZEN = {"train.freeze_trunk": True}
# Kinds that have whole layers.
LAYERS = ("parallel", "sequential", "eagle", "eagle3", "peagle", "dflash")
CASES = [(kind, depth, {}) for kind, depth in KINDS] + [("sequential", 3, SHARED)]


def by_hand(kind, trunk, layers, modules, depth):
  """Returns `(total, trunk, deployed)` for `layers` trunk layers below the heads."""
  if trunk == "llama":  # 4 query heads, 2 kv heads of size 4; no biases; untied.
    norm, around, reads = D, 2 * V * D, 16 + 2 * 8
    block = D * 16 + 2 * D * 8 + 16 * D + 3 * D * F + 2 * norm
  else:  # Biases everywhere, norms with two vectors, positions; tied.
    norm, around, reads = 2 * D, V * D + T * D, 3 * D
    block = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * norm
  around += norm
  if kind == "parallel":
    extra, head = depth * block, block
  elif kind == "sequential":
    extra, head = modules * (2 * D * D + block + 3 * norm), 0
  elif kind == "eagle":
    extra, head = block - norm + 2 * D * D + D, 0
  elif kind == "eagle3":
    extra, head = block + D * reads + 2 * norm + 3 * D * D, 0
  elif kind == "peagle":
    extra, head = block + D * reads + 2 * norm + 3 * D * D + 4 * D, 0
  elif kind == "dflash":
    extra, head = 2 * block + 2 * norm + 3 * D * D + depth * D, 0
  else:
    extra, head = depth * (D * D + (D if kind == "medusa" else 0)), 0
  deployed = around + layers * block + head
  return deployed + extra, layers * block, deployed


@pytest.mark.parametrize(
  "kind, depth, options, arm",
  [(*case, "added") for case in CASES]
  + [(*case, "shortened") for case in CASES if case[0] in LAYERS],
)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_parameters_equal_the_formulas(kind, depth, options, arm, trunk):
  values = TRUNKS[trunk] | options | {"trunk.num_layers": L, "mtp.arm": arm}
  found = accounting.count(tiny_config(kind, depth, values))
  modules = 1 if options or "eagle" in kind else depth
  modules = 2 if kind == "dflash" else modules
  layers = L - (kind == "parallel") - (modules if arm == "shortened" else 0)
  expected = by_hand(kind, trunk, layers, modules, depth)
  assert (found.total, found.trunk, found.deployed) == expected


@pytest.mark.parametrize("trunk", TRUNKS)
def test_shortened_models_have_the_parameters_of_the_baseline(trunk):
  layers = {"trunk.num_layers": L}
  baseline = accounting.count(tiny_config("none", 0, TRUNKS[trunk] | layers)).total

  def excess(kind, options):
    values = TRUNKS[trunk] | layers | options | {"mtp.arm": "shortened"}
    return accounting.count(tiny_config(kind, 3, values)).total - baseline

  # A sequential module is a block plus its projection 2d -> d and three norms.
  norm = D if trunk == "llama" else 2 * D
  assert excess("parallel", {}) == 0
  assert excess("sequential", {}) == 3 * (2 * D * D + 3 * norm)
  assert excess("sequential", SHARED) == 2 * D * D + 3 * norm


@pytest.mark.parametrize(
  "kind, depth, options",
  mostly_slow(
    [
      *((*k, {}) for k in KINDS),
      ("sequential", 3, GPT2),
      ("sequential", 3, FROZEN),
      ("sequential", 1, {"mtp.objective": "kl", "mtp.mlp_dim": 640}),
      ("medusa", 3, FROZEN | {"mtp.unembed": "own"}),
      ("parallel", 3, {"mtp.markov_rank": 256}),
      ("medusa", 3, FROZEN | {"mtp.objective": "tv"}),
    ],
    ("none", 0, {}), ("sequential", 3, {}),
  ),
)
def test_training_flops_are_within_5_percent_of_the_count_of_xla(
  kind, depth, options, monkeypatch
):
  # XLA counts the body of a loop once, so every loop is unrolled here. The sizes are
  # those where matrix products dominate: XLA counts the rest too.
  monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
  config = tiny_config(
    kind,
    depth,
    options | COUNTABLE | {"trunk.num_layers": 2},
  )
  counted = flops_counted_by_xla(config)
  found = accounting.train_flops_per_token(config, attention_pairs="full")
  assert found == pytest.approx(counted, rel=0.05)
  # A causal mask leaves (T + 1) / 2 of T keys: forward, scores and values take 4 FLOPs
  # per key and embedding coordinate in each of the blocks, and three times that with
  # the backward pass.
  trunk = 1 if kind == "parallel" else 2
  blocks = {"parallel": 4, "dflash": 2 * 4}.get(kind, depth) if kind in LAYERS else 0
  passes = (1 if FROZEN.items() <= options.items() else 3) * trunk + 3 * blocks
  skipped = passes * 4 * 128 * (64 - 65 / 2)
  assert accounting.train_flops_per_token(config) == pytest.approx(found - skipped)


def test_own_tokens_add_a_forward_pass_of_the_unembedding_per_module():
  plain, own, none = (
    tiny_config("sequential", 3, o) for o in ({}, INPUTS["own"], INPUTS["none"])
  )
  flops = accounting.train_flops_per_token
  assert flops(own) - flops(plain) == 3 * 2 * D * V
  assert flops(none) == flops(plain)
  totals = {accounting.count(config).total for config in (plain, own, none)}
  assert len(totals) == 1


def test_sizes_of_own_parts_of_predictors():
  total = lambda *args: accounting.count(tiny_config(*args)).total  # noqa: E731
  own = total("medusa", 3, {"mtp.unembed": "own"}) - total("medusa", 3)
  assert own == 3 * D * V
  assert total("eagle3", 3, {"mtp.unembed": "own"}) - total("eagle3", 3) == D * V
  for kind, layers in (("sequential", 2), ("eagle", 1), ("eagle3", 1)):
    wide = total(kind, 2, {"mtp.mlp_dim": 30}) - total(kind, 2)
    assert wide == layers * 3 * D * (30 - F)


def test_norms_of_modules_are_parameters_and_no_flops():
  def total(options):
    return accounting.count(tiny_config("sequential", 3, GPT2 | options)).total

  # Each of three modules has three norms, of a scale and a bias on this trunk.
  assert total({}) - total(INPUTS["bare"]) == 3 * 2 * D
  assert total({}) - total({"mtp.norm": "rms"}) == 3 * 3 * D
  assert total({}) - total(MINIMAL) == 3 * (2 + 2) * D
  flops = accounting.train_flops_per_token
  for options in ({}, GPT2):
    plain, minimal = (tiny_config("sequential", 3, options | o) for o in ({}, MINIMAL))
    assert flops(minimal) == flops(plain)


def test_sharing_modules_saves_parameters_but_no_flops():
  own, shared = (tiny_config("sequential", 3, o) for o in ({}, SHARED))
  assert accounting.count(shared).total < accounting.count(own).total
  flops = accounting.train_flops_per_token
  assert flops(shared) == flops(own)


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS if kind != "none"])
def test_flops_arm_trains_plain_ntp_for_the_same_flops(kind):
  steps = {"train.num_steps": 1000}
  added = tiny_config(kind, 3, steps)
  resolved = accounting.resolve(tiny_config(kind, 3, steps | {"mtp.arm": "flops"}))
  assert (resolved.mtp.kind, resolved.mtp.depth) == ("none", 0)
  per_step = accounting.train_flops_per_token(resolved)
  budget = 1000 * accounting.train_flops_per_token(added)
  assert abs(resolved.train.num_steps * per_step - budget) <= per_step / 2
  assert resolved.train.num_steps > 1000


def test_other_arms_resolve_to_themselves():
  config = tiny_config("sequential", 2)
  assert accounting.resolve(config) is config
