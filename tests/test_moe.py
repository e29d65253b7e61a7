"""The mixture of experts: an oracle of loops, every grouped product, every mesh."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mtp_jax
from mtp_jax import accounting, train
from mtp_jax.decode.target import unstack
from mtp_jax.kernels import grouped_matmul as grouped_matmul_lib
from mtp_jax.kernels.grouped_matmul import (
  Plan,
  block_size,
  choose_implementation,
  from_rows,
  grouped_matmul,
  make_plan,
  num_computed,
  sort_by_expert,
  to_rows,
)
from mtp_jax.lm import MtpLm
from mtp_jax.model import moe as moe_lib
from mtp_jax.model.moe import Moe, choose, gates
from mtp_jax.predictors import routed_layers
from mtp_jax.sharding import (
  logical_axes,
  make_mesh,
  put_batch,
  tree_shardings,
)
from tests.common import (
  COUNTABLE,
  EXPERTS,
  KINDS,
  SHARED,
  assert_trees_close,
  flops_counted_by_xla,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_layer_params,
  random_params,
  tiny_config,
)
from tests.tiny_runs import read_metrics, run_config, write_texts

MOE = EXPERTS | {
  "trunk.num_layers": 2,
  "trunk.num_kv_heads": 4,
  "trunk.remat": "none",
  "trunk.moe.expert_dim": 12,
  "trunk.moe.num_shared": 2,
  "trunk.moe.balance_weight": 0.3,
}
WEIGHTS_M = np.float32([1, 0.5, 0.7])
# Of 11 tokens with two choices each and three experts: packed rows, blocks of 4, the
# same in chunks that are skipped when no row of theirs is in use.
PLANS = [
  Plan("ragged", 4, 7, 7),
  Plan("ragged", 1, 22, 2),
  Plan("blocked", 1, 22, 22),
  Plan("blocked", 4, 8, 2),
  Plan("blocked", 4, 7, 1),
]
if importlib.util.find_spec("tokamax"):  # On a CPU it computes what `ragged` does.
  PLANS.append(Plan("tokamax", 1, 22, 1))


def best(scores, count):
  return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def oracle(params, x_BTD, segments_BT, moe):
  """Equations 12 to 20 over tokens and experts: out_BTD, load_E, balance."""
  E, k, groups = moe.num_experts, moe.experts_per_token, moe.num_groups
  silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
  expert = lambda w, x: (silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]  # noqa: E731
  out_BTD, load_E, balance = np.zeros_like(x_BTD), np.zeros(E), 0.0
  for x_TD, segments_T, out_TD in zip(x_BTD, segments_BT, out_BTD, strict=True):
    f_E, P_E = np.zeros(E), np.zeros(E)
    for x, segment, out in zip(x_TD, segments_T, out_TD, strict=True):
      affinity = 1 / (1 + np.exp(-x @ params["router"]))
      scores = affinity + params["bias"]
      if groups > 1:
        members = np.split(np.arange(E), groups)
        of_group = [sum(sorted(scores[m])[-2:]) for m in members]
        kept = best(of_group, moe.groups_per_token)
        outside = [e for g, m in enumerate(members) if g not in kept for e in m]
        scores[outside] = -np.inf
      chosen = best(scores, k)
      for e in chosen:
        gate = moe.route_scale * affinity[e] / sum(affinity[chosen])
        of_e = {name: w[e] for name, w in params["experts"].items()}
        out += gate * expert(of_e, x)
      if moe.num_shared:
        out += expert(params["shared"], x)
      if segment:
        load_E[chosen] += 1
        f_E[best(affinity, k)] += E / k
        P_E += affinity / sum(affinity)
    length = max(1, np.count_nonzero(segments_T))
    balance += (f_E / length) @ (P_E / length)
  return out_BTD, load_E, balance


@pytest.mark.parametrize(
  "overrides",
  [
    {"trunk.moe.grouped_matmul": "ragged"},
    {"trunk.moe.grouped_matmul": "blocked"},
    {"trunk.moe.num_groups": 1, "trunk.moe.groups_per_token": 1,
     "trunk.moe.num_shared": 0},
  ],
  ids=["ragged", "blocked", "no groups, none shared"],
)
def test_layer_and_gradients_equal_loops_over_tokens_and_experts(overrides):
  values = MOE | {"trunk.compute_dtype": "float64", "data.batch_size": 3} | overrides
  config = tiny_config(overrides=values)
  trunk = config.trunk
  segments_BT = np.array(packed_batch(config, padding=True).segment_ids)
  segments_BT[2] = 0  # A row without tokens.
  rng = np.random.default_rng(1)
  x_BTD, d_out_BTD = rng.normal(size=(2, *segments_BT.shape, trunk.embed_dim))

  def total(params, x_BTD):
    out_BTD, routing = Moe(trunk).apply({"params": params}, x_BTD, segments_BT)
    return jnp.sum(out_BTD * d_out_BTD) + routing.balance, (out_BTD, routing)

  with jax.enable_x64(True):
    params = {
      "router": rng.normal(size=(trunk.embed_dim, 8)),
      "bias": 0.2 * rng.normal(size=8),
      "experts": {
        name: 0.4 * rng.normal(size=shape)
        for name, shape in (
          ("gate", (8, 16, 12)), ("up", (8, 16, 12)), ("down", (8, 12, 16))
        )
      },
    }
    if trunk.moe.num_shared:
      params["shared"] = {
        name: 0.4 * rng.normal(size=shape)
        for name, shape in (("gate", (16, 24)), ("up", (16, 24)), ("down", (24, 16)))
      }
    program = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, (out_BTD, routing)), grads = jax.device_get(program(params, x_BTD))
  expected = oracle(params, x_BTD, segments_BT, trunk.moe)
  assert out_BTD.dtype == np.float64 and routing.load_E.dtype == np.float32
  np.testing.assert_allclose(out_BTD, expected[0], rtol=0, atol=1e-12)
  np.testing.assert_array_equal(routing.load_E, expected[1])
  np.testing.assert_allclose(routing.balance, expected[2], rtol=1e-12)
  assert routing.dropped == 0

  np.testing.assert_array_equal(grads[0]["bias"], 0)
  leaves, treedef = jax.tree.flatten((params, x_BTD))
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
    direction = rng.normal(size=leaf.shape)

    def moved(step, i=i, direction=direction):
      changed = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
      p, x_BTD = jax.tree.unflatten(treedef, changed)
      out_BTD, _, balance = oracle(p, x_BTD, segments_BT, trunk.moe)
      return np.sum(out_BTD * d_out_BTD) + balance

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(grad * direction), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_groups, kept", [(8, 4), (1, 1)])
def test_choices_and_gates_are_those_of_transformers_on_ten_thousand_tokens(
  num_groups, kept
):
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  from transformers import DeepseekV3Config
  from transformers.models.deepseek_v3 import modeling_deepseek_v3

  rng = np.random.default_rng(0)
  x_ND = rng.standard_normal((10_000, 64)).astype(np.float32)
  router_DE = (rng.standard_normal((64, 32)) / 8).astype(np.float32)
  bias_E = (0.1 * rng.standard_normal(32)).astype(np.float32)
  theirs = modeling_deepseek_v3.DeepseekV3TopkRouter(
    DeepseekV3Config(
      hidden_size=64, n_routed_experts=32, num_experts_per_tok=6, n_group=num_groups,
      topk_group=kept, routed_scaling_factor=2.5, norm_topk_prob=True,
    )
  )
  theirs.weight.data = torch.tensor(router_DE.T)
  theirs.e_score_correction_bias = torch.tensor(bias_E)
  with torch.no_grad():
    _, their_gates, their_choices = (a.numpy() for a in theirs(torch.tensor(x_ND)))

  moe = tiny_config(
    overrides={
      "trunk.moe.num_experts": 32,
      "trunk.moe.experts_per_token": 6,
      "trunk.moe.num_groups": num_groups,
      "trunk.moe.groups_per_token": kept,
    }
  ).trunk.moe

  @jax.jit
  def route(x_ND):
    affinity_NE = moe_lib.affinities(x_ND[None], router_DE)[0]
    choices_Nk = choose(affinity_NE, bias_E, moe)
    return choices_Nk, gates(affinity_NE, choices_Nk, 2.5)

  choices, weights = jax.device_get(route(x_ND))
  order, their_order = np.argsort(choices), np.argsort(their_choices)
  np.testing.assert_array_equal(
    np.take_along_axis(choices, order, 1),
    np.take_along_axis(their_choices, their_order, 1),
  )
  np.testing.assert_allclose(
    np.take_along_axis(weights, order, 1),
    np.take_along_axis(their_gates, their_order, 1),
    rtol=2e-6,
  )


@functools.cache
def grouped_program(plan):
  """Sum over a token's choices of its product with each chosen expert's matrix."""

  def run(expert_Nk, x_ND, w_EDF, d_out_NF):
    def product(x_ND, w_EDF):
      rows = sort_by_expert(expert_Nk, w_EDF.shape[0], plan)
      out_RF = grouped_matmul(to_rows(x_ND, rows), w_EDF, rows.expert_G, plan)
      return from_rows(out_RF, rows), num_computed(rows)

    out_NF, pullback, count = jax.vjp(product, x_ND, w_EDF, has_aux=True)
    return out_NF, count, pullback(d_out_NF)

  return jax.jit(run)


# Three experts are here, two of the five elsewhere: on another device.
_ALL_ON_0 = [(0, 1 + i % 4) for i in range(11)]
_NONE_HERE = [(3, 4)] * 11
_ONE_ALONE = [(2, 4)] + [(4, 3)] * 10


@settings(max_examples=30, deadline=None)
@given(
  st.lists(
    st.permutations(range(5)).map(lambda p: tuple(p[:2])), min_size=11, max_size=11
  )
)
@example(_ALL_ON_0)
@example(_NONE_HERE)
@example(_ONE_ALONE)
def test_grouped_products_equal_loops_whatever_the_load(choices):
  rng = np.random.default_rng(0)
  x_ND, d_out_NF = rng.standard_normal((11, 6)), rng.standard_normal((11, 7))
  w_EDF = rng.standard_normal((3, 6, 7))
  out_NF, d_x, d_w = np.zeros((11, 7)), np.zeros((11, 6)), np.zeros((3, 6, 7))
  here = [(n, e) for n, chosen in enumerate(choices) for e in chosen if e < 3]
  for n, e in here:
    out_NF[n] += x_ND[n] @ w_EDF[e]
    d_x[n] += w_EDF[e] @ d_out_NF[n]
    d_w[e] += np.outer(x_ND[n], d_out_NF[n])
  arrays = (np.int32(choices), *map(np.float32, (x_ND, w_EDF, d_out_NF)))
  for plan in PLANS:
    out, count, grads = grouped_program(plan)(*arrays)
    assert count == len(here)
    for found, expected in zip((out, *grads), (out_NF, d_x, d_w), strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_plans_have_room_for_any_load_and_skip_what_is_elsewhere(monkeypatch):
  assert [block_size(m) for m in (0.25, 1, 8, 128, 512, 2**15)] == [
    1, 1, 16, 64, 128, 256
  ]
  # 16 tokens, 2 of 8 experts: blocks of 8; 32 rows and 7 more per expert.
  assert make_plan("blocked", (16, 2), 8, 8, 100) == Plan("blocked", 8, 11, 11)
  # Two experts here: 32 rows at most, a quarter of the blocks in use on average.
  assert make_plan("blocked", (16, 2), 8, 2, 100) == Plan("blocked", 8, 5, 1)
  # One token.
  assert make_plan("blocked", (1, 2), 8, 8, 100) == Plan("blocked", 1, 2, 2)
  # Matrices so large that a few are gathered at once.
  assert make_plan("ragged", (16, 2), 8, 8, 2**23) == Plan("ragged", 8, 12, 4)
  # Kernels take what fills them, without whole blocks.
  assert make_plan("tokamax", (64, 2), 2, 2, 100) == Plan("tokamax", 1, 128, 1)
  assert make_plan("tokamax", (64, 2), 4, 1, 100) == Plan("blocked", 32, 2, 1)
  # A GPU copies little and gathers all matrices at once.
  monkeypatch.setattr(grouped_matmul_lib, "platform", lambda: "gpu")
  sizes = (16384, 4), 16, 16, 1024 * 704
  assert make_plan("blocked", *sizes) == Plan("blocked", 1024, 79, 79)
  for is_there, chosen in ((True, "tokamax"), (None, "blocked")):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _, x=is_there: x)
    assert choose_implementation("auto", "gpu") == chosen
  assert choose_implementation("auto", "cpu") == "blocked"
  assert choose_implementation("auto", "tpu") == "ragged"
  assert choose_implementation("ragged", "cpu") == "ragged"


def mesh_run(axes, overrides=None):
  """Returns sums, counts and gradients with everything laid out on a mesh."""
  values = MOE | {f"mesh.{axis}": size for axis, size in axes.items()}
  config = tiny_config("sequential", 2, values | (overrides or {}))
  mesh = make_mesh(config.mesh, jax.devices()[: np.prod([*axes.values(), 1])])
  layout = tree_shardings(mesh, logical_axes(accounting.abstract_params(config)))
  with jax.set_mesh(mesh):
    params = jax.device_put(random_params(config), layout)
    rows = packed_batch(config, padding=True)
    batch = put_batch(mesh, microbatches(rows), ("microbatch",))
    return jax.device_get(gradient_program(config)(params, batch, WEIGHTS_M))


one_device = functools.cache(lambda: mesh_run({}))
MIXED = {"expert": 2, "tensor": 2, "fsdp": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
  "axes",
  [
    {"expert": 8},
    {"expert": 4, "data": 2},
    MIXED,
    {"expert": 2, "context": 2, "data": 2},
  ],
  ids=lambda axes: "-".join(axes),
)
def test_every_mesh_gives_loss_gradients_and_load_of_one_device(axes):
  found, expected = mesh_run(axes), one_device()
  np.testing.assert_array_equal(found[0].dropped, 0)
  for part, load_LE in expected[0].load.items():
    np.testing.assert_array_equal(found[0].load[part], load_LE)
  assert_trees_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ragged_products_and_dense_modules_on_a_mesh():
  ragged = {"trunk.moe.grouped_matmul": "ragged"}
  assert_trees_close(mesh_run(MIXED, ragged), one_device(), rtol=1e-4, atol=1e-5)
  dense = {"mtp.dense_blocks": True}
  found, expected = mesh_run(MIXED, dense), mesh_run({}, dense)
  assert set(found[0].load) == {"trunk"}
  assert "moe" not in found[2]["mtp"]["modules"]["block"]
  assert_trees_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_mesh_comparison_sees_every_expert_and_padding():
  sums, _, grads = one_device()
  tokens = np.count_nonzero(
    packed_batch(tiny_config("sequential", 2, MOE), padding=True).segment_ids
  )
  assert tokens < 8 * 16
  assert {k: v.shape for k, v in sums.load.items()} == {"trunk": (1, 8), "mtp": (2, 8)}
  for load_LE in sums.load.values():
    np.testing.assert_array_equal(np.sum(load_LE, axis=1), 3 * tokens)
  assert sums.balance > 0.1
  for name in ("gate", "up", "down"):
    experts = grads["mtp"]["modules"]["block"]["moe"]["experts"][name]
    assert np.all(np.abs(experts).max(axis=(0, 2, 3)) > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
  "overrides",
  [{"trunk.remat": "names", "trunk.scan_layers": False}, {"trunk.remat": "full"}],
  ids=["names, unrolled", "full"],
)
def test_how_a_program_runs_changes_nothing(overrides):
  found = mesh_run({}, overrides)
  assert_trees_close(found, one_device(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_accumulation_changes_neither_load_nor_balance_nor_gradients():
  one_layer = {"trunk.num_layers": 1, "trunk.moe.dense_layers": 0}
  config = tiny_config(overrides=MOE | one_layer)
  rows = packed_batch(config, padding=True)
  segments = rows.segment_ids.copy()
  segments[-1] = 0  # Microbatches with unequal numbers of rows that have tokens.
  rows = rows._replace(segment_ids=segments)
  program = gradient_program(config)
  whole, halves = (
    jax.device_get(program(random_params(config), microbatches(rows, a), WEIGHTS_M[:1]))
    for a in (1, 2)
  )
  assert whole[0].balance > 0.1
  assert_trees_close(halves, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, depth, overrides", mostly_slow(
  [*((*k, {}) for k in KINDS), ("sequential", 3, SHARED)],
  ("parallel", 3, {}), ("sequential", 3, {}),
))
def test_every_kind_reports_the_routing_of_all_its_layers(kind, depth, overrides):
  config = tiny_config(kind, depth, MOE | {"trunk.num_layers": 3} | overrides)
  apply = lambda params, batch: MtpLm(config).apply(  # noqa: E731
    {"params": params}, batch, method="with_routing"
  )
  hidden, routing = jax.jit(apply)(random_params(config), packed_batch(config))
  assert np.isfinite(hidden).all()
  found = {part: r.load_E.shape for part, r in routing.items()}
  expected = routed_layers(config)
  assert found == {part: (layers, 8) for part, layers in expected.items()}
  for part, r in routing.items():
    np.testing.assert_array_equal(np.sum(r.load_E, axis=-1), 3 * 8 * 16)
    np.testing.assert_array_equal(r.dropped, 0)
    assert r.balance.shape == (expected[part],)


def test_choices_that_no_expert_computes_are_counted(monkeypatch):
  def forgetful(expert_Nk, num_experts, plan):
    return sort_by_expert(expert_Nk.at[:5, 0].set(-1), num_experts, plan)

  monkeypatch.setattr(moe_lib, "sort_by_expert", forgetful)
  trunk = tiny_config(overrides=MOE).trunk
  x_BTD, segments_BT = jnp.ones((2, 8, 16)), jnp.ones((2, 8), int)
  params = random_layer_params(_Layer(trunk), trunk)
  apply = jax.jit(lambda p: Moe(trunk).apply({"params": p}, x_BTD, segments_BT)[1])
  routing = apply(params)
  assert routing.dropped == 5


class _Layer(Moe):
  """With the call signature of a block."""

  def __call__(self, x_BTD, positions_BT, segment_ids_BT):
    del positions_BT
    return super().__call__(x_BTD, segment_ids_BT)


def test_active_parameters_are_those_of_a_model_with_so_many_experts():
  for kind, depth in (("parallel", 1), ("sequential", 1)):
    config = tiny_config(kind, depth, MOE | {"trunk.num_layers": 5})
    found = accounting.count(config)
    only = {"trunk.moe.num_experts": 3, "trunk.moe.num_groups": 1}
    few = tiny_config(
      kind, depth, MOE | {"trunk.num_layers": 5, "trunk.moe.groups_per_token": 1} | only
    )
    # Each of the 4 layers with experts has 5 more rows of the router and biases.
    assert found.active - accounting.count(few).deployed == 4 * 5 * (16 + 1)
    experts = 4 * 5 * 3 * 16 * 12
    assert found.deployed - found.active == experts


@pytest.mark.parametrize(
  "kind, depth, overrides",
  mostly_slow(
    [
      ("parallel", 1, {}),
      ("sequential", 1, {}),
      ("sequential", 2, {"mtp.dense_blocks": True}),
    ],
    ("sequential", 1, {}),
  ),
)
def test_training_flops_are_within_5_percent_of_the_count_of_xla(
  kind, depth, overrides, monkeypatch
):
  # Where every token chooses every expert, and no row is padded, XLA multiplies what
  # the formula counts. Loops are unrolled, as XLA counts the body of a loop once.
  monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
  monkeypatch.setattr(moe_lib, "make_plan", lambda *_: Plan("blocked", 256, 3, 3))
  values = {
    "trunk.num_layers": 2 + (kind == "parallel"),
    "trunk.moe.num_experts": 3,
    "trunk.moe.experts_per_token": 3,
    "trunk.moe.expert_dim": 128,
    "trunk.moe.num_shared": 2,
  }
  config = tiny_config(kind, depth, COUNTABLE | values | overrides)
  counted = flops_counted_by_xla(config)
  found = accounting.train_flops_per_token(config, attention_pairs="full")
  assert found == pytest.approx(counted, rel=0.05)


def test_decoding_routes_with_the_width_of_training():
  config = tiny_config("sequential", 2, MOE | {"trunk.compute_dtype": "bfloat16"})
  weights = unstack(random_params(config), config)
  for block in (weights.blocks[-1], weights.predictors[0]["block"]):
    dtypes = jax.tree.map(lambda x: x.dtype, block["moe"])
    assert dtypes["router"] == dtypes["bias"] == jnp.float32
    assert dtypes["experts"]["down"] == jnp.bfloat16


@pytest.mark.slow
def test_a_run_logs_its_experts_and_saves_their_biases(tmp_path, monkeypatch):
  on_two = lambda sizes, _: make_mesh(sizes, jax.devices()[:2])  # noqa: E731
  monkeypatch.setattr(train, "make_mesh", on_two)
  texts = write_texts(tmp_path / "texts")
  values = {key: MOE[key] for key in MOE if key.startswith("trunk.moe")} | {
    "mesh.expert": 2,
    "mtp.kind": "none",
    "mtp.depth": 0,
    "trunk.moe.dense_layers": 0,
    "trunk.moe.bias_rate": 0.01,
    "trunk.moe.bias_until": 1.0,
    "train.diagnostics_every": 0,
    "train.eval_every": 0,
    "eval.line_prompts": 0,
    "eval.function_prompts": 0,
  }
  config = run_config(texts, values)
  train.fit(config, tmp_path / "run", progress=False)
  records = read_metrics(tmp_path / "run", "train")
  assert len(records) == 4
  for record in records:
    assert record["dropped"] == 0
    assert record["balance_loss"] > 0
    load_LE = np.array(record["load"]["trunk"])
    assert load_LE.shape == (2, 8)
    np.testing.assert_allclose(load_LE.sum(axis=1), 1, rtol=1e-5)
    largest = np.mean(8 * load_LE.max(axis=1) - 1)
    np.testing.assert_allclose(record["violation"]["trunk"], largest, rtol=1e-4)
  params = mtp_jax.load(tmp_path / "run").params
  steps = np.asarray(params["trunk"]["blocks"]["moe"]["bias"]) / 0.01
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
  assert 1 <= np.abs(steps).max() <= 12


def test_shared_experts_are_one_mlp_of_their_joint_width():
  trunk = tiny_config(overrides=MOE).trunk
  params = random_layer_params(_Layer(trunk), trunk)
  assert jax.tree.map(np.shape, params["shared"]) == {
    "gate": (16, 24), "up": (16, 24), "down": (24, 16)
  }
  none = dataclasses.replace(trunk, moe=dataclasses.replace(trunk.moe, num_shared=0))
  assert "shared" not in random_layer_params(_Layer(none), none)
