"""Plans: what is read from compiled programs; nothing large is replicated.

One small train step is compiled for a mesh of eight CPU devices; a real TPU topology is
a slow test.
"""

import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from launch import plan
from launch.planning import hlo, steps, topologies
from launch.planning.chips import CHIPS
from launch.states import Trial
from mtp_jax import accounting, layouts
from mtp_jax import config as config_lib
from mtp_jax.config import ConfigError, MeshConfig, with_overrides
from mtp_jax.kernels import attention as kernels
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, platform
from mtp_jax.train_step import programs
from tests.common import tiny_config

pytest_plugins = ("tests.commands",)

CHIP = CHIPS["v5p"]
VOCAB = 1160  # No other dimension is equal to it.
LARGE = 1 << 12  # Bytes; the norms of the models below are smaller.
MODEL = {
  "trunk.num_layers": 6,
  "trunk.embed_dim": 128,
  "trunk.mlp_dim": 384,
  "trunk.num_heads": 4,
  "trunk.num_kv_heads": 2,
  "trunk.compute_dtype": "float32",
  "trunk.attention": "xla",
  "trunk.remat": "full",
  "tokenizer.vocab_size": VOCAB,
  "data.seq_len": 256,
  "data.batch_size": 32,
  "train.accumulation_steps": 2,
  "loss.block_tokens": 256,
  "mesh.data": 2,
  "mesh.fsdp": 4,
}
EXPERTS = {
  "mesh.data": 1,
  "mesh.fsdp": 4,
  "mesh.expert": 2,
  "trunk.moe.num_experts": 8,
  "trunk.moe.expert_dim": 128,
  "trunk.moe.grouped_matmul": "blocked",
}
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -r requirements-plan.txt",
)


def make_shape(**overrides):
  return program_config(tiny_config("sequential", 2, MODEL | overrides))


def cpu_mesh(shape):
  return make_mesh(shape.mesh, jax.devices())


@pytest.fixture(scope="module")
def shape():
  return make_shape()


@pytest.fixture(scope="module")
def compiled(shape):
  mesh = cpu_mesh(shape)
  inputs = layouts.abstract_inputs(shape, mesh)
  with jax.set_mesh(mesh):
    lowered = programs(shape, mesh).step.trace(*inputs).lower()
    return lowered.compile()


def unsharded(state):
  """Returns the paths of large parameters and moments that every device has whole."""
  tree = (state.params, state.opt_state)
  return [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if math.prod(leaf.shape) * leaf.dtype.itemsize >= LARGE
    and leaf.sharding.is_fully_replicated
  ]


def full_logits(text, tokens):
  """Returns the arrays with logits of so many tokens that a program makes."""
  found = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
  arrays = [tuple(map(int, dims.split(","))) for dims in found]
  return [x for x in arrays if VOCAB in x and math.prod(x) >= tokens * VOCAB]


def check_nothing_is_replicated(shape, mesh, text):
  assert unsharded(layouts.abstract_state(shape, mesh)) == []
  rows_per_step = shape.data.batch_size // shape.train.accumulation_steps
  assert not full_logits(text, rows_per_step * shape.data.seq_len)


# The compiled program.


def test_state_is_what_xla_counts_as_arguments(shape, compiled):
  mesh = cpu_mesh(shape)
  found = steps.analyse(compiled, CHIP)
  assert found["arguments"] == steps.tree_bytes(layouts.abstract_inputs(shape, mesh))
  assert found["peak"] >= found["arguments"] + found["temporaries"]
  state = layouts.abstract_state(shape, mesh)
  params = steps.tree_bytes(state.params)
  assert steps.tree_bytes(state.opt_state) == pytest.approx(2 * params, rel=1e-3)
  whole = 4 * accounting.count(shape).total
  assert whole / 4 <= params < 1.01 * whole / 4  # Norms are on every device.


def test_nothing_large_is_replicated_on_an_fsdp_mesh(shape, compiled):
  mesh = cpu_mesh(shape)
  check_nothing_is_replicated(shape, mesh, compiled.as_text())
  # What the compiler made of it: arguments and results are as asked for.
  state, report = compiled.output_shardings
  before = compiled.input_shardings[0][0]
  wanted = layouts.abstract_state(shape, mesh)
  for tree in (state, before):
    for leaf, sharding in zip(
      jax.tree.leaves(wanted), jax.tree.leaves(tree), strict=True
    ):
      assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
  assert report["loss_total"].is_fully_replicated


def test_no_parameter_of_latent_attention_or_experts_is_on_every_device():
  latent = {
    "trunk.num_kv_heads": 4,
    "trunk.attention_kind": "latent",
    "trunk.latent.query_rank": 32,
    "trunk.latent.kv_rank": 16,
  }
  shape = make_shape(**EXPERTS, **latent)
  assert unsharded(layouts.abstract_state(shape, cpu_mesh(shape))) == []


def test_replicated_parameters_and_gathered_logits_would_be_found():
  shape = make_shape(**{"mesh.data": 8, "mesh.fsdp": 1})
  found = unsharded(layouts.abstract_state(shape, cpu_mesh(shape)))
  assert any("unembed" in path for path in found)

  mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  split = jax.sharding.NamedSharding(mesh, spec("rows"))
  whole = jax.sharding.NamedSharding(mesh, spec())
  program = jax.jit(lambda h, w: h @ w, out_shardings=whole).lower(
    jax.ShapeDtypeStruct((64, 16), np.float32, sharding=split),
    jax.ShapeDtypeStruct((16, VOCAB), np.float32, sharding=whole),
  )
  text = program.compile().as_text()
  assert full_logits(text, 64)
  assert not full_logits(text, 65)


# Collectives.


def test_collectives_of_the_step_gather_all_weights_and_sum_all_gradients(
  shape, compiled
):
  """In float32: weights are gathered in both passes, gradients summed over rows."""
  module = hlo.parse(compiled.as_text())
  found = hlo.collectives(module)
  assert hlo.unknown_loops(module) == 0
  weights = 4 * accounting.count(shape).total
  gathers, microbatches = found["all-gather"], shape.train.accumulation_steps
  assert gathers["bytes"] == pytest.approx(2 * microbatches * weights, rel=0.25)
  assert found["all-reduce"]["bytes"] > microbatches * weights / 4
  assert all(x["count"] <= x["bytes"] for x in found.values())


def test_collectives_in_loops_count_as_often_as_they_run():
  mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

  def sums(x):
    step = lambda c, _: (jax.lax.psum(jnp.sin(c), "d"), None)  # noqa: E731
    nested = lambda c, _: jax.lax.scan(step, c, None, length=3)  # noqa: E731
    return jax.lax.scan(nested, x, None, length=5)[0]

  spec = jax.sharding.PartitionSpec("d")
  mapped = jax.shard_map(
    sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  text = jax.jit(mapped).lower(jnp.ones((8, 100))).compile().as_text()
  module = hlo.parse(text)
  assert hlo.collectives(module)["all-reduce"] == {"count": 15, "bytes": 15 * 400}
  assert hlo.unknown_loops(module) == 0


LOOP = """HloModule step, num_partitions=8

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %send = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) collective-permute-start(%x)
  %y = f32[4,8]{1,0} collective-permute-done(%send)
  %part = f32[1,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (x: f32[4,8]) -> f32[1,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %sum = f32[4,8]{1,0} all-reduce(%x), to_apply=%add
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%sum)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x: f32[4,8]) -> bf16[32,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %all = (bf16[32,8]{1,0}, /*index=1*/pred[32]{0}) all-gather(%y, %z), dims={0}
}
"""


def test_loops_and_collectives_as_the_compiler_for_tpus_writes_them():
  module = hlo.parse(LOOP)
  found = hlo.collectives(module)
  times = 6  # 0, 2, ..., 10.
  assert found == {
    "all-gather": {"count": 1, "bytes": 32 * 8 * 2 + 32},
    "all-reduce": {"count": 0, "bytes": 0},
    "reduce-scatter": {"count": times, "bytes": times * 128},
    "all-to-all": {"count": 0, "bytes": 0},
    "collective-permute": {"count": times, "bytes": times * 128},
  }
  assert hlo.unknown_loops(module) == 0
  module = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
  found = hlo.collectives(module)
  assert (found["collective-permute"]["count"], hlo.unknown_loops(module)) == (1, 1)


# Rows.


def test_rows_hold_what_fits_how_long_it_takes_and_what_depth_costs(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(topologies, "devices", lambda _: tuple(jax.devices()))
  topology = topologies.parse("v5p:2x2x2")
  small = MODEL | {"trunk.num_layers": 1, "train.num_steps": 100}
  rows = {}
  for kind, depth in (("none", 0), ("sequential", 1)):
    config = tiny_config(kind, depth, small)
    trial = Trial(config, config, Path("x"))
    rows[trial.program] = plan.plan(topology, [trial], tmp_path, 0.4)
    # The report is kept: the second time it is read, its seconds of compilation too.
    assert plan.plan(topology, [trial], tmp_path, 0.4) == rows[trial.program]
  (plain_shape, deep_shape), (plain, deep) = rows, rows.values()
  flops = plain["model_flops"]
  assert flops == accounting.train_flops_per_token(plain_shape) * 32 * 256
  assert plain["seconds_per_step"] == pytest.approx(flops / (0.4 * 459e12 * 8))
  assert plain["fits"] and plain["peak"] < deep["peak"]
  assert plan.cells(plain)["steps"] == "100"
  assert plan.depth_cells(plain_shape, plain, rows) is None
  cost = plan.depth_cells(deep_shape, deep, rows)
  assert cost["time"] == f"x{deep['model_flops'] / flops:.3f}"
  assert float(cost["collectives"][1:]) > 1
  assert plan.cells(deep | {"fits": False})["fits"] == "NO"
  parts = plan.page(topology, rows, [], [], 0.4)
  assert len(parts) == 6 and "v5p:2x2x2" in parts[1] and "x1." in parts[-1]


@pytest.mark.parametrize(("message", "peak"), [
  ("RESOURCE_EXHAUSTED: Used 100.5G of 95.7G hbm. Exceeded by 4.8G.", 100.5 * 2**30),
  ("RESOURCE_EXHAUSTED: no more is known", None),
])
def test_a_step_that_the_compiler_refuses_does_not_fit(message, peak, monkeypatch):
  def refuse(compiled, chip, *_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(topologies, "devices", lambda _: tuple(jax.devices()))
  monkeypatch.setattr(steps, "analyse", refuse)
  config = tiny_config("none", 0, {"mesh.data": 8})
  row = plan.plan(
    topologies.parse("v5p:2x2x2"), [Trial(config, config, Path("x"))], None, 0.4
  )
  assert row["peak"] == peak and not row["fits"]
  shown = "107.91" if peak else "-"
  assert plan.cells(row)["peak GB"] == shown
  assert plan.cells(row)["XLA TFLOPs"] == "-"


def test_attention_by_places_is_planned_for_hopper_and_not_before(monkeypatch):
  monkeypatch.setattr(kernels, "places_keys", lambda: True)  # In any version of JAX.
  monkeypatch.setattr(topologies, "devices", lambda _: ())
  config = config_lib.from_config_dict(base.get_config())
  config = with_overrides(config, {"trunk.attention": "cudnn_packed"})
  trials = [Trial(config, config, Path("x"))]
  assert plan.check(trials, topologies.parse("h200:1"))
  with pytest.raises(ConfigError, match=r"a100:1: trunk\.attention .* before Hopper"):
    plan.check(trials, topologies.parse("a100:1"))


# The compiler for TPUs.


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_libtpu
def test_step_compiles_for_a_tpu_topology(tmp_path):
  """On a slice of eight chips, where nothing is replicated either."""
  shape = make_shape(**{"trunk.compute_dtype": "auto"})
  devices = list(topologies.devices(topologies.parse("v5p:2x2x2")))
  mesh = make_mesh(shape.mesh, devices)
  found = steps.compile_step(shape, mesh, CHIP, tmp_path)
  assert steps.compile_step(shape, mesh, CHIP, tmp_path) == found  # Read, not compiled.
  assert unsharded(layouts.abstract_state(shape, mesh)) == []
  assert found["arguments"] > 0 and found["xla_flops"] > 0
  assert found["unknown_loops"] == 0
  weights = 4 * accounting.count(shape).total
  moved = sum(x["bytes"] for x in found["collectives"].values())
  assert 2 * weights < moved < 10 * weights  # In bfloat16, twice, and the gradients.


@needs_libtpu
def test_every_chip_has_the_devices_that_its_shape_says():
  for text in ("v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"):
    topology = topologies.parse(text)
    devices = topologies.devices(topology)
    assert len(devices) == topology.num_chips
    assert {device.device_kind for device in devices} == {topology.chip.device_kind}


@needs_libtpu
def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_slice():
  devices = list(topologies.devices(topologies.parse("v5p:4x4x4")))
  sizes = MeshConfig(data=8, fsdp=8, expert=1, tensor=1, context=1)
  mesh = make_mesh(sizes, devices)
  assert len(set(mesh.devices.flat)) == 64
  with jax.set_mesh(mesh):
    assert platform() == "tpu"
  assert platform() == "cpu"


# Topologies, and the command.


@pytest.mark.parametrize("name, chips, shape", [
  ("v5p", 8, "v5p:2x2x2"),
  ("v5p", 4, "v5p:2x2x1"),
  ("v5p", 128, "v5p:4x4x8"),
  ("v6e", 128, "v6e:8x16"),
])
def test_a_bare_name_takes_the_chips_of_the_mesh(name, chips, shape):
  mesh = MeshConfig(data=chips // 2, fsdp=2, expert=1, tensor=1, context=1)
  assert str(topologies.fit_to_mesh(topologies.parse(name), mesh)) == shape


def test_libtpu_is_asked_for_before_anything_is_compiled(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"needs the package libtpu.*requirements-plan"):
    topologies.devices(topologies.parse("v5p:2x2x4"))


LADDER = (
  "--config=experiments/gains_with_scale.py:cluster",
  "--only=embed_dim=1024,kind=none,seed=1,arm=added",
)
BAD = {
  "unknown": (
    (*LADDER, "--topology=v7:2x2x1"),
    "--topology must name one of v4, v5e, v5p, v6e, a100, h100, h200, b200, got "
    "'v7:2x2x1'",
  ),
  "gpu": (
    (*LADDER, "--topology=v5p,h100:12"),
    "--topology must have up to 8 GPUs or whole nodes of 8 for h100, got 12 in "
    "'h100:12'.",
  ),
  "axes": (
    (*LADDER, "--topology=v5p:4x2"),
    "--topology must have 3 axes for v5p, as in v5p:4x4x4, got 'v5p:4x2'.",
  ),
  "mesh": (
    (*LADDER, "--topology=v5p:2x2x4"),
    "mesh must be such that data * fsdp * expert * tensor * context equals the number "
    "of devices (16)",
  ),
  "rest": (
    ("--config=experiments/smoke.py", "--topology=v5p"), "mesh.data is -1 (the rest)"
  ),
  "numbers": (
    (*LADDER, "--topology=h200:8", "--packs=8,0"),
    "--packs must be numbers of at least 1, got 8,0.",
  ),
  "not of GPUs": (
    (*LADDER, "--topology=v5p,h200", "--decode=1"),
    "--decode must have GPUs in --topology alone, got v5p.",
  ),
  "mfu": (
    (*LADDER, "--topology=v5p", "--mfu=40"), "--mfu must be in (0, 1], got 40.0."
  ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_at_the_door(command, arguments, message):
  result = command("launch.plan", *arguments)
  assert result.code == 2
  assert message in result.output
  assert "Traceback" not in result.output
