"""Plans: what is read from compiled programs, the formula for GPUs, nothing replicated.

One small train step is compiled for a mesh of eight CPU devices, and held against the
formula; what only other meshes show, and real TPU topologies, are slow tests.
"""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.planning import estimate, hlo, programs, rows, topologies
from mtp_jax import accounting
from mtp_jax.config import ConfigError, MeshConfig
from mtp_jax.sharding import abstract_mesh, make_mesh, platform
from mtp_jax.train_step import programs as train_programs
from mtp_jax.train_step import shape_of
from tests.common import quick_options, tiny_config

pytest_plugins = ("tests.commands",)

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
TENSOR = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
CONTEXT = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.context": 2}
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
  return shape_of(tiny_config("sequential", 2, MODEL | overrides))




def compile_on_cpu(shape, options=None):
  """Returns the compiled step of eight CPU devices."""
  mesh = make_mesh(shape.mesh, jax.devices())
  step, inputs = train_programs(shape, mesh).step, programs.abstract_inputs(shape, mesh)
  with jax.set_mesh(mesh):
    return step.trace(*inputs).lower().compile(compiler_options=options)


@pytest.fixture(scope="module")
def shape():
  return make_shape()


@pytest.fixture(scope="module")
def compiled(shape):
  return compile_on_cpu(shape, quick_options())


def check_formula(shape, compiled, memory=(0.75, 1.35), all_gather=0.05, sums=0.2):
  """Holds the formula against XLA's numbers; XLA on CPU scatters nothing, it sums."""
  guess = estimate.estimate(shape, abstract_mesh(shape.mesh))
  found = programs.analyse(compiled)
  low, high = memory
  assert low * found.temporaries < guess.temporaries < high * found.temporaries
  assert guess.sent["all-gather"] == pytest.approx(found.sent["all-gather"], all_gather)
  total = lambda sent: sent["all-reduce"] + 2 * sent["reduce-scatter"]  # noqa: E731
  assert total(guess.sent) == pytest.approx(total(found.sent), sums)


def full_logits(program, tokens):
  """Returns the arrays with logits of so many tokens, made or sent."""
  arrays = list(program.arrays())
  arrays += [a for c in program.collectives for a in (*c.operands, *c.results)]
  return {
    (dtype, dims)
    for dtype, dims in arrays
    if VOCAB in dims and np.prod(dims) >= tokens * VOCAB
  }


def check_nothing_is_replicated(shape, mesh, program):
  state = programs.abstract_state(shape, mesh)
  assert programs.unsharded((state.params, state.opt_state), LARGE) == []
  rows_per_step = shape.data.batch_size // shape.train.accumulation_steps
  assert not full_logits(program, rows_per_step * shape.data.seq_len)


# The compiled program.


def test_formula_agrees_with_the_compiled_program(shape, compiled):
  check_formula(shape, compiled)


def test_state_is_what_xla_counts_as_arguments(shape, compiled):
  mesh = make_mesh(shape.mesh, jax.devices())
  inputs = programs.abstract_inputs(shape, mesh)
  found = programs.analyse(compiled)
  assert found.arguments == programs.tree_bytes(inputs)
  assert found.peak >= found.arguments + found.temporaries
  state = programs.state_bytes(shape, mesh)
  assert state.optimizer == pytest.approx(2 * state.params, rel=1e-3)
  whole = 4 * accounting.count(shape).total
  assert whole / 4 <= state.params < 1.01 * whole / 4  # Norms are on every device.


def test_nothing_large_is_replicated_on_an_fsdp_mesh(shape, compiled):
  mesh = make_mesh(shape.mesh, jax.devices())
  check_nothing_is_replicated(shape, mesh, hlo.Program(compiled.as_text()))
  # What the compiler made of it: arguments and results are as asked for.
  state, report = compiled.output_shardings
  before = compiled.input_shardings[0][0]
  wanted = programs.abstract_state(shape, mesh)
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
  state = programs.abstract_state(shape, abstract_mesh(shape.mesh))
  assert programs.unsharded((state.params, state.opt_state), LARGE) == []


def test_replicated_parameters_and_gathered_logits_would_be_found():
  shape = make_shape(**{"mesh.data": 8, "mesh.fsdp": 1})
  params = programs.abstract_state(shape, abstract_mesh(shape.mesh)).params
  found = programs.unsharded(params, LARGE)
  assert any("unembed" in path for path in found)

  mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  split = jax.sharding.NamedSharding(mesh, spec("rows"))
  whole = jax.sharding.NamedSharding(mesh, spec())
  program = jax.jit(lambda h, w: h @ w, out_shardings=whole).lower(
    jax.ShapeDtypeStruct((64, 16), np.float32, sharding=split),
    jax.ShapeDtypeStruct((16, VOCAB), np.float32, sharding=whole),
  )
  program = hlo.Program(program.compile().as_text())
  assert full_logits(program, 64)
  assert not full_logits(program, 65)


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
  (collective,) = hlo.Program(text).collectives
  assert (collective.kind, collective.times, collective.group) == ("all-reduce", 15, 8)
  assert collective.sent_bytes == 15 * 400 * 2 * 7 / 8


LOOP = """HloModule step, num_partitions=8

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %send = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], /*index=3*/u32[]) STARTED
  %y = f32[4,8]{1,0} collective-permute-done(%send)
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %y)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[32,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %start = s32[] constant(2)
  %init = (s32[], f32[4,8]{1,0}) tuple(%start, %x)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %all = bf16[32,8]{1,0} all-gather(%y), GROUPS, dimensions={0}
}
""".replace(
  "STARTED", "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}"
)


@pytest.mark.parametrize("groups, size", [
  ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
  ("replica_groups=[4,2]<=[8]", 2),
  ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
  ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
  ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
  ("replica_groups={}", 8),
  ("channel_id=1", 8),
])
def test_loops_without_a_noted_length_and_groups_in_every_notation(groups, size):
  permute, gather = hlo.Program(LOOP.replace("GROUPS", groups)).collectives
  assert (permute.kind, permute.times) == ("collective-permute", 5)  # 2, 4, ..., 10.
  assert permute.sent_bytes == 5 * 4 * 8 * 4
  assert (gather.kind, gather.times, gather.group) == ("all-gather", 1, size)
  assert gather.sent_bytes == 4 * 8 * 4 * (size - 1)


def test_groups_in_an_unknown_notation_are_an_error():
  program = hlo.Program(LOOP.replace("GROUPS", "replica_groups=<8>"))
  with pytest.raises(ValueError, match="unknown form"):
    _ = program.collectives


# Work.


@pytest.mark.parametrize("kind", ["parallel", "linear", "medusa", "eagle", "eagle3"])
def test_products_without_recomputation_are_the_model_flops(kind):
  """In the loss every device has its own tokens: products on all devices count."""
  config = tiny_config(
    kind, 2, MODEL | {"trunk.remat": "none", "train.accumulation_steps": 1}
  )
  model = accounting.train_flops_per_token(config, "full")
  model *= config.data.batch_size * config.data.seq_len
  assert programs.matmul_flops(config, abstract_mesh(config.mesh)) == pytest.approx(
    model, rel=0.01
  )


def test_recomputation_and_accumulation_count():
  config = tiny_config("none", 0, MODEL)
  trunk = dataclasses.replace(config.trunk, remat="none")
  none = dataclasses.replace(config, trunk=trunk)
  ratio = programs.matmul_flops(config, abstract_mesh(config.mesh))
  ratio /= programs.matmul_flops(none, abstract_mesh(config.mesh))
  assert 1.2 < ratio < 4 / 3  # All but the loss and the last product of a layer.


# Other meshes, and the compiler for TPUs.


@pytest.mark.slow
@pytest.mark.parametrize("overrides, limits", [
  (TENSOR, {"sums": 0.35}),
  # XLA may gather what keys and values are made of, too.
  (CONTEXT, {"all_gather": 0.2, "sums": 0.5}),
  (EXPERTS, {"sums": 0.2}),
  ({"trunk.remat": "names"}, {}),
  ({"trunk.remat": "none"}, {}),
  ({"train.accumulation_steps": 1}, {}),
  ({"trunk.attention": "blocked"}, {"memory": (0.5, 1.35)}),
], ids=["tensor", "context", "experts", "names", "none", "whole", "blocked"])
def test_formula_agrees_on_other_meshes(overrides, limits):
  shape = make_shape(**overrides)
  check_formula(shape, compile_on_cpu(shape, quick_options()), **limits)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_libtpu
def test_step_compiles_for_a_tpu_topology(tmp_path):
  """On a slice of eight chips, where nothing is replicated either."""
  shape = make_shape(**{"trunk.compute_dtype": "auto"})
  devices = list(topologies.tpu_devices(topologies.parse("v5p:2x2x2")))
  mesh = make_mesh(shape.mesh, devices)
  found, _ = programs.compile_step(shape, mesh, tmp_path)
  again, _ = programs.compile_step(shape, mesh, tmp_path)  # Read, not compiled.
  assert dataclasses.replace(found, program=None) == dataclasses.replace(
    again, program=None
  )
  check_nothing_is_replicated(shape, mesh, found.program)
  assert any(dtype == "bf16" for dtype, _ in found.program.arrays())
  weights = 4 * sum(
    np.prod(leaf.shape)
    for leaf in jax.tree.leaves(programs.abstract_state(shape, mesh).params)
  )
  sent = sum(found.sent.values())
  assert 2 * weights < sent < 10 * weights  # In bfloat16, twice, and the gradients.


@needs_libtpu
def test_every_chip_has_the_devices_that_its_shape_says():
  for text in ("v4:2x2x2", "v5e:4x4", "v5p:2x2x2", "v6e:2x4"):
    topology = topologies.parse(text)
    devices = topologies.tpu_devices(topology)
    assert len(devices) == topology.num_chips
    assert {device.device_kind for device in devices} == {topology.chip.device_kind}


@needs_libtpu
def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_slice():
  devices = list(topologies.tpu_devices(topologies.parse("v5p:4x4x4")))
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
  ("h100", 2, "h100:2"),
  ("h100", 128, "h100:8x16"),
])
def test_a_bare_name_takes_the_chips_of_the_mesh(name, chips, shape):
  mesh = MeshConfig(data=chips // 2, fsdp=2, expert=1, tensor=1, context=1)
  assert str(topologies.fit_to_mesh(topologies.parse(name), mesh)) == shape


def test_libtpu_is_asked_for_before_anything_is_compiled(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"needs the package libtpu.*requirements-plan"):
    rows.check([], topologies.parse("v5p:2x2x1"))


LADDER = (
  "--config=experiments/gains_with_scale.py:cluster",
  "--only=embed_dim=1024,kind=none,seed=1,arm=added",
)
BAD = {
  "unknown": (
    (*LADDER, "--topology=v7:2x2x1"),
    "--topology must name one of v4, v5e, v5p, v6e, a100, h100, h200, got 'v7:2x2x1'",
  ),
  "axes": (
    (*LADDER, "--topology=v5p:4x2"),
    "--topology must have 3 axes for v5p, as in v5p:4x4x4, got 'v5p:4x2'.",
  ),
  "mesh": (
    (*LADDER, "--topology=h100:8x2"),
    "mesh must be such that data * fsdp * expert * tensor * context equals the number "
    "of devices (16)",
  ),
  "node": ((*LADDER, "--topology=h100:16"), "(at most 8)"),
  "rest": (
    ("--config=experiments/smoke.py", "--topology=h100"), "mesh.data is -1 (the rest)"
  ),
  "mfu": (
    (*LADDER, "--topology=h100", "--mfu=40"), "--mfu must be in (0, 1], got 40.0."
  ),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_at_the_door(command, arguments, message):
  result = command("launch.plan", *arguments)
  assert result.code == 2
  assert message in result.output
  assert "Traceback" not in result.output


def test_plan_for_gpus_says_what_fits_and_what_depth_costs(command, tmp_path):
  arguments = (
    "--config=experiments/gains_with_scale.py:cluster", "--topology=h100",
    "--only=embed_dim=1024,kind=[ns]*,depth=[03],arm=added,seed=1",
    f"--output={tmp_path}",
  )
  result = command("launch.plan", *arguments)
  assert result.code == 0, result.output
  assert "Whole sweep: 204 trial(s)" in result.output
  record = json.loads((tmp_path / "gains_with_scale-cluster-h100.json").read_text())
  plain, sequential = record["rows"]
  assert plain["fits"] and plain["topology"] == "h100:8"
  assert plain["peak"] < sequential["peak"]
  flops = plain["model_flops"]
  assert plain["seconds_per_step"] == pytest.approx(flops / (0.4 * 989e12 * 8))
  assert (tmp_path / "gains_with_scale-cluster-h100.md").read_text() in result.output


def test_what_does_not_fit_is_said_and_the_exit_code_is_1(command):
  result = command(
    "launch.plan", *LADDER, "--topology=h100:1", "--config.mesh.fsdp=1",
    "--config.mesh.data=1", "--config.train.accumulation_steps=1",
  )
  assert result.code == 1
  assert "| NO |" in result.output
