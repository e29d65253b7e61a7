"""Programs for GPUs and TPUs, lowered on a machine that has neither, or compiled.

Lowering runs everywhere, in seconds: it shows which kernels a program calls. The slow
tests compile for an H200 where XLA's compiler for GPUs is installed.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import plan
from launch.planning import hlo, roofline, steps, topologies
from launch.planning.chips import CHIPS
from launch.states import Trial
from mtp_jax import layouts, losses, pack_program, sharding
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.decode import loop
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.decode.target import unstack
from mtp_jax.evaluate import row_sums_program
from mtp_jax.kernels import attention as kernels
from mtp_jax.lm import zeros_batch
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh, make_trial_mesh
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import programs
from tests.common import EXPERTS, GPT2, KINDS, LATENT, mostly_slow, tiny_config

pytest_plugins = ("tests.commands",)

VOCAB, WIDTH = 1160, 32  # No other dimension is equal to one of them.
H200 = CHIPS["h200"]
# As small as kernels of GPUs allow: heads of 8, rows of even length.
SMALL = {
  "trunk.num_layers": 2,
  "trunk.embed_dim": WIDTH,
  "trunk.mlp_dim": 48,
  "tokenizer.vocab_size": VOCAB,
  "loss.block_tokens": 64,
  "trunk.scan_layers": "on",
  "trunk.remat": "names",
}


def latent(nope, rope, value):
  return LATENT | {
    "trunk.latent.nope_dim": nope, "trunk.latent.rope_dim": rope,
    "trunk.latent.value_dim": value,
  }


FORWARD, BACKWARD = (
  re.compile(rf"custom_call @__cudnn\$fmha\w*{end}\(")
  for end in ("Softmax", "SoftmaxBackward")
)
has_compiler = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None,
  reason="jax-cuda12-plugin is not installed: pip install -r requirements-plan.txt",
)


@contextlib.contextmanager
def compiled_for(name):
  """Makes the package choose what it chooses on that platform."""
  answers = {"platform": name, "device_kind": H200.device_kind}
  asked = {key: getattr(sharding, key) for key in answers}
  with pytest.MonkeyPatch.context() as patch, topologies.kernels_of(H200):
    for module, key in itertools.product(list(sys.modules.values()), answers):
      if getattr(module, key, None) is asked[key]:
        patch.setattr(module, key, functools.partial(str, answers[key]))
    yield


def lowered(config, name="gpu", part="step"):
  """Returns the text of a program of a config, lowered for a platform."""
  program = program_config(config)
  mesh = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for(name), jax.set_mesh(mesh):
    made = programs.__wrapped__(program, mesh)
    inputs = layouts.abstract_inputs(program, mesh)
    if part == "diagnostics":
      state, batch, hyper, _ = inputs
      inputs = state.params, batch, hyper, state.step
    traced = getattr(made, part).trace(*inputs)
    return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(name, name),)).as_text()


def calls(text):
  return len(FORWARD.findall(text)), len(BACKWARD.findall(text))


def whole_logits(text, tokens):
  """Returns the float32 arrays with a vocabulary and at least so many tokens."""
  shapes = set(re.findall(r"tensor<([\dx]+)xf32>", text))
  arrays = [tuple(map(int, dims.split("x"))) for dims in shapes]
  arrays = [x for x in arrays if VOCAB in x and WIDTH not in x]
  return [x for x in arrays if math.prod(x) >= tokens * VOCAB]


@pytest.mark.parametrize(("kind", "depth"), mostly_slow(KINDS, ("sequential", 3)))
def test_every_kind_attends_once_in_each_direction(kind, depth):
  """One call per stack of layers: nothing is computed again in the backward pass."""
  text = lowered(tiny_config(kind, depth, SMALL))
  # The trunk's, and one of the predictors that attend; DFlash's blocks do so in plain
  # products, as later steps of EAGLE.
  stacks = 1 if kind in ("none", "linear", "medusa", "dflash") else 2
  assert calls(text) == (stacks, stacks)
  assert not whole_logits(text, 8 * 16)
  assert "bf16" in text


# One layer: whether equal layers are one function of the text depends on the version.
UNROLLED = {"trunk.scan_layers": "off", "trunk.num_layers": 1}
VARIED = {
  "gpt2": (GPT2, 1),
  "unrolled": (UNROLLED | {"trunk.remat": "none"}, 1),
  "unrolled-names": (UNROLLED, 1),
  "accumulation": ({"train.accumulation_steps": 2}, 1),
  "muon": ({"optimizer.kind": "muon"}, 1),
  "latent": (latent(8, 8, 8), 1),
  "latent of DeepSeek-V3": (latent(128, 64, 128), 1),  # Keys of 192.
  "latent of odd sizes": (latent(5, 4, 12), 1),
  "experts": (EXPERTS, 2),  # The first layer is dense: two stacks.
}


@pytest.mark.parametrize("name", mostly_slow(VARIED, "unrolled-names"))
def test_variants_of_the_step_attend_once(name):
  values, stacks = VARIED[name]
  text = lowered(tiny_config("none", 0, SMALL | values))
  assert calls(text) == (stacks, stacks)


@pytest.mark.parametrize("values", [
  pytest.param({}, id="grouped"),
  pytest.param(latent(5, 4, 12), id="latent", marks=pytest.mark.slow),
])
def test_places_of_documents_take_the_place_of_the_mask(values, monkeypatch):
  """One call each way as well, which reads no array of T x T."""
  monkeypatch.setattr(kernels, "places_keys", lambda: True)  # In any version of JAX.
  config = tiny_config("sequential", 1, SMALL | values | {
    "trunk.attention": "cudnn_packed", "data.seq_len": 24
  })
  text = lowered(config)
  assert calls(text) == (2, 2)
  found = [x for x in text.splitlines() if "custom_call @__cudnn$fmha" in x]
  for line in found:
    assert "PADDING_CAUSAL" in line and '\\22max_seg_per_batch\\22: 32' in line
    assert "24x24x" not in line and "tensor<8x33xi32>" in line
  with_mask = lowered(with_overrides(config, {"trunk.attention": "cudnn"}))
  assert with_mask.count("x1x24x24xbf16") > text.count("x1x24x24xbf16") == 0


def test_experts_of_many_tokens_are_grouped_products():
  """Three forward, and two for the gradients of each; few tokens are `blocked`."""
  api = pytest.importorskip("tokamax._src.ops.ragged_dot.api")
  if "triton" not in api.IMPLEMENTATIONS:
    pytest.skip("this tokamax has kernels for the GPUs alone that it runs on")
  many = EXPERTS | {"trunk.moe.experts_per_token": 4, "data.seq_len": 32}
  for values, expected in ((many, 9), (EXPERTS, 0)):
    text = lowered(tiny_config("none", 0, SMALL | values))
    assert text.count("custom_call @__gpu$xla.gpu.triton") == expected
    assert "ragged_dot" not in text


def test_full_rematerialisation_attends_again():
  """So the tests above can fail."""
  text = lowered(tiny_config("none", 0, SMALL | {"trunk.remat": "full"}))
  assert calls(text) == (2, 1)


def test_logits_of_all_tokens_would_be_found():
  text = lowered(tiny_config("none", 0, SMALL | {"loss.block_tokens": 128}))
  assert whole_logits(text, 8 * 16)


def test_blocks_of_the_loss_have_a_gigabyte():
  with compiled_for("gpu"):
    assert losses.tokens_per_block(0, 50304) == 5336
    assert losses.tokens_per_block(0, 264) > 1_000_000
    assert losses.tokens_per_block(0, 264, trials=8) == (1 << 30) // (4 * 264 * 8)
    assert losses.tokens_per_block(77, 264) == 77
  assert losses.tokens_per_block(0, 264) == 1024


def test_one_pass_over_logits_finds_the_same():
  """On a GPU the largest logit and the sum come from one reduction."""
  logits = 30 * jax.random.normal(jax.random.key(0), (7, 301))
  expected = losses._top_and_sum(logits)
  with compiled_for("gpu"):
    program = jax.jit(lambda x: losses._top_and_sum(x))
    found = program(logits)
    text = program.lower(logits).as_text()
    lost = losses._top_and_sum(logits.at[2, 5].set(jnp.nan).at[3, 1].set(jnp.inf))
  assert text.count("stablehlo.reduce") == 1
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert [bool(x) for x in np.isfinite(lost[1][:, 0])] == [True] * 2 + [False] * 2 + (
    [True] * 3
  )


@pytest.mark.parametrize("part", ["diagnostics", "init"])
def test_other_programs_of_training_lower(part):
  config = tiny_config("sequential", 2, SMALL)
  if part == "diagnostics":
    assert calls(lowered(config, part=part)) == (2, 2)
  else:
    program = program_config(config)
    mesh = make_mesh(program.mesh, jax.devices()[:1])
    with compiled_for("gpu"), jax.set_mesh(mesh):
      made = programs.__wrapped__(program, mesh)
      traced = made.init.trace(np.int32(0))
      assert traced.lower(lowering_platforms=("cuda",)).as_text()


def test_evaluation_attends_once():
  config = tiny_config("sequential", 2, SMALL)
  program = program_config(config)
  mesh = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for("gpu"), jax.set_mesh(mesh):
    state = layouts.abstract_state(program, mesh)
    batch = jax.eval_shape(lambda: zeros_batch(config, 8))
    table = jax.ShapeDtypeStruct((VOCAB,), np.int32)
    traced = row_sums_program.__wrapped__(program, mesh).trace(
      state.params, batch, table
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert calls(text) == (2, 0) and not whole_logits(text, 8 * 16)


@pytest.mark.parametrize(("kind", "depth", "values"), mostly_slow(
  [("none", 0, {}), ("sequential", 2, {}), ("sequential", 1, EXPERTS)],
  ("sequential", 2, {}),
))
def test_decoding_lowers(kind, depth, values):
  assert all(decoding(tiny_config(kind, depth, SMALL | values), rows=2))


def decoding(config, rows):
  """Returns the texts of prefill and rounds of decoding, lowered for a GPU."""
  plan = make_plan(config, Decoding())
  with compiled_for("gpu"):
    program = program_config(config)
    mesh = make_mesh(program.mesh, jax.devices()[:1])
    params = layouts.abstract_state(program, mesh).params
    weights = jax.eval_shape(lambda p: unstack.__wrapped__(p, config), params)
    inputs = loop.Inputs(weights, weights, None, np.zeros(1, np.int32))
    slots = loop.slots_for(24, plan.drafter.num_drafted)
    row = jax.ShapeDtypeStruct((rows,), np.int32)
    tokens = jax.ShapeDtypeStruct((rows, slots), np.int32)
    seed = jax.ShapeDtypeStruct((), np.uint32)
    arguments = (inputs, tokens, row, row, seed, row)
    prefill = jax.jit(functools.partial(loop.prefill.__wrapped__, plan, 16))
    state = jax.eval_shape(prefill, *arguments)
    finish = jax.jit(functools.partial(loop.finish.__wrapped__, plan))
    return [
      traced.lower(lowering_platforms=("cuda",)).as_text()
      for traced in (prefill.trace(*arguments), finish.trace(inputs, state))
    ]


def test_a_single_token_has_products_of_two_rows():
  """A GPU would multiply one row elementwise; slots are updated in place."""
  _, text = decoding(tiny_config("none", 0, SMALL), rows=1)
  products = re.findall(r"dot_general.*: \(tensor<([\dx]+)xbf16>, tensor<(\w+)>", text)
  by_weights = [x for x, w in products if w.startswith((f"{WIDTH}x", "48x"))]
  assert len(by_weights) >= 8 and not [
    x for x in by_weights if math.prod(map(int, x.split("x")[:-1])) == 1
  ]
  assert "scatter" not in "".join(x for x in text.splitlines() if "bf16" in x)


def stacked(config, trials):
  """Returns the text of the step of a pack, lowered for a GPU."""
  program, mesh = program_config(config), make_trial_mesh(jax.devices()[:1])
  one = make_mesh(program.mesh, jax.devices()[:1])
  with compiled_for("gpu"):
    state, batch, _, _ = layouts.abstract_inputs(program, one)
    trial = state, hyperparameters(config), np.bool_(True), np.bool_(True)
    states, *others = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((trials, *np.shape(x)), x.dtype), trial
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with jax.set_mesh(mesh):
      step = pack_program.stacked_step.__wrapped__(program, mesh, True)
      traced = step.trace(states, batch, *others)
      return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_pack_has_no_kernel_that_cannot_be_stacked():
  text = stacked(tiny_config("none", 0, SMALL | {"trunk.attention": "auto"}), 2)
  assert "bf16" in text and "cudnn" not in text


@pytest.mark.parametrize("name", kernels.IMPLEMENTATIONS)
def test_a_pack_computes_attention_in_plain_jax(name):
  trunk = tiny_config("none", 0, {"trunk.attention": name}).trunk
  found = pack_program._stackable(trunk).attention
  assert found == (name if name == "blocked" else "xla")


def test_trials_of_a_pack_share_the_bytes_of_a_block(monkeypatch):
  """In a pack a block has as many logits as in a lone run."""
  monkeypatch.setattr(sharding, "_BLOCK_BYTES", 64 * 4 * VOCAB)
  text = stacked(tiny_config("none", 0, SMALL | {"loss.block_tokens": 0}), 4)
  assert not whole_logits(text, 65) and whole_logits(text, 64)


@pytest.mark.parametrize(("kind", "depth", "values"), mostly_slow(
  [*((kind, depth, {}) for kind, depth in KINDS), ("none", 0, EXPERTS)],
  ("sequential", 3, {}),
))
def test_every_kind_lowers_for_tpus(kind, depth, values):
  text = lowered(tiny_config(kind, depth, SMALL | values), "tpu")
  assert "bf16" in text and "cudnn" not in text and not whole_logits(text, 8 * 16)
  assert ("ragged_dot" in text) == bool(values)


# How the layers run, and flags.


def test_layouts_keep_what_is_named_and_never_all_in_a_loop():
  def ways(**given):
    trunk = dataclasses.replace(tiny_config().trunk, **given)
    return [(x.scan_layers, x.remat) for x in trunk.layouts]

  everything = [("off", "none"), ("off", "names"), ("on", "names"), ("on", "full")]
  assert ways() == everything
  assert ways(scan_layers="on") == everything[2:]
  assert ways(remat="none") == [("off", "none"), ("on", "none")]
  assert ways(remat="full") == [("off", "full"), ("on", "full")]
  assert ways(scan_layers="on", remat="none") == [("on", "none")]


@pytest.mark.parametrize(("share", "expected", "num_compiled"), [
  (1.0, ("off", "none"), 1), (0.5, ("off", "names"), 2), (0.01, ("on", "full"), 3),
])
def test_the_first_layout_that_fits_is_chosen(
  share, expected, num_compiled, monkeypatch
):
  needs = {("off", "none"): 100, ("off", "names"): 40, ("on", "names"): 30}
  seen = []

  def peak(way):
    seen.append((way.trunk.scan_layers, way.trunk.remat))
    return needs[seen[-1]] << 20

  gpu = types.SimpleNamespace(platform="gpu")
  mesh = types.SimpleNamespace(devices=np.array([gpu]))
  monkeypatch.setattr(layouts.jax, "set_mesh", lambda _: contextlib.nullcontext())
  monkeypatch.setattr(layouts, "abstract_inputs", lambda *_: ())
  monkeypatch.setattr(layouts, "max_over_processes", lambda x: x)
  memory = share * (100 << 20) / layouts.LARGEST_SHARE
  monkeypatch.setattr(layouts, "device_memory", lambda: int(memory) + (1 << 20))
  monkeypatch.setattr(
    layouts, "programs", lambda way, _: types.SimpleNamespace(step=way)
  )
  monkeypatch.setattr(layouts, "compiled", lambda step: step)
  monkeypatch.setattr(layouts, "peak_bytes", peak)
  choose = layouts.fastest_that_fits.__wrapped__
  program = program_config(tiny_config())
  found = choose(program, mesh).trunk
  assert (found.scan_layers, found.remat) == expected and len(seen) == num_compiled
  # What is named, and what runs on a CPU, stays as it is.
  named = program_config(tiny_config("none", 0, SMALL))
  assert choose(named, mesh) == named
  assert choose(program, make_mesh(program.mesh, jax.devices()[:1])) == program


def test_truth_values_of_older_configs_still_work():
  for given, meant in ((True, "on"), (False, "off"), ("auto", "auto")):
    config = tiny_config("none", 0, {"trunk.scan_layers": given})
    assert config.trunk.scan_layers == meant
  with pytest.raises(ConfigError, match="scan_layers must be one of 'auto', 'on', 'o"):
    tiny_config("none", 0, {"trunk.scan_layers": "False"})


def test_collectives_overlap_on_several_gpus_unless_flags_say_otherwise(monkeypatch):
  def options(count, platform="gpu"):
    device = types.SimpleNamespace(platform=platform)
    return sharding.compiler_options(
      types.SimpleNamespace(devices=np.array([device] * count), size=count)
    )

  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
  name = "xla_gpu_enable_latency_hiding_scheduler"
  assert options(8)[name] and options(1) is None and options(8, "tpu") is None
  monkeypatch.setenv("XLA_FLAGS", f"--{name}=false")
  assert name not in options(8) and len(options(8)) == 4


def test_ragged_products_are_refused_on_gpus():
  values = SMALL | EXPERTS | {
    "trunk.moe.grouped_matmul": "ragged", "eval.max_new_tokens": 1,
  }
  validate(tiny_config("none", 0, values), 1, "tpu")
  with pytest.raises(ConfigError, match="grouped_matmul must be 'auto', 'tokamax' or "):
    validate(tiny_config("none", 0, values), 1, "gpu")


# Compiled for an H200.

COMPILED = {
  "dense": ("sequential", 2, {}),
  "experts": ("none", 0, EXPERTS),
  "mesh": ("sequential", 1, {"mesh.data": 2, "mesh.fsdp": 2}),
  "packed": ("sequential", 1, {
    "mesh.data": 2, "mesh.fsdp": 2, "trunk.attention": "cudnn_packed"
  }),
}
# Per layer, trunk and modules; in a loop every turn counts.
MOST_KERNELS = {"dense": 150, "experts": 160, "mesh": 185, "packed": 185}


@pytest.mark.slow
@pytest.mark.timeout(600)
@has_compiler
@pytest.mark.parametrize("name", COMPILED)
def test_the_step_compiles_for_an_h200(name, tmp_path):
  kind, depth, values = COMPILED[name]
  if name == "packed" and not kernels.places_keys():
    pytest.skip("this JAX misplaces the keys of documents")
  config = tiny_config(kind, depth, SMALL | {"loss.block_tokens": 0} | values)
  program = program_config(config)
  count = config.mesh.data * config.mesh.fsdp
  devices = list(topologies.devices(topologies.parse(f"h200:{count}")))
  mesh = make_mesh(program.mesh, devices)
  with jax.set_mesh(mesh):
    assert sharding.platform() == "gpu"
  found = steps.compile_step(program, mesh, H200, tmp_path)
  assert steps.compile_step(program, mesh, H200, tmp_path) == found  # Read.
  with topologies.kernels_of(H200):
    inputs = layouts.abstract_inputs(program, mesh)
  assert found["arguments"] == pytest.approx(steps.tree_bytes(inputs), rel=0.02)
  assert found["peak"] >= found["arguments"] + found["temporaries"]
  # Float32 logits, and gradients: the largest arrays of a model this small.
  logits = 4 * VOCAB * 8 * 16 * (1 + depth) / count
  assert found["temporaries"] < 4 * logits + 8 * steps.tree_bytes(inputs)
  kinds = found["kernels"]
  assert kinds["products"]["count"] and kinds["attention"]["count"] >= 4
  assert not found["unknown_loops"] or name == "experts"
  per_layer = sum(x["count"] for x in kinds.values()) / (2 + depth)
  assert per_layer <= MOST_KERNELS[name]
  moved = {k: x["count"] for k, x in found["collectives"].items()}
  assert bool(sum(moved.values())) == (count > 1)


def test_packs_and_rounds_are_planned_on_one_gpu(monkeypatch):
  """Compiled for a CPU in place of a GPU, whatever the mesh of the trials."""
  monkeypatch.setattr(topologies, "devices", lambda _: tuple(jax.devices()[:2]))
  step = {"peak": 1.0}
  monkeypatch.setattr(steps, "fitting_step", lambda config, *_: (config, step))
  config = tiny_config("none", 0, SMALL | {
    "trunk.num_layers": 1, "trunk.scan_layers": "off", "mesh.data": 2
  })
  row = plan.plan(
    topologies.parse("h200:2"), [Trial(config, config, Path("x"))], None, 0.4,
    {"packs": [3], "decode": [4]},
  )
  [(trials, pack)], [(texts, turn)] = row["packs"].items(), row["decode"].items()
  assert (trials, texts) == (3, 4)
  state = row["params_bytes"] + row["optimizer_bytes"]
  # And a batch, which they share.
  assert 3 * state < pack["arguments"] < 3.1 * state
  # Weights are in the compute dtype of a CPU, float32; a lookup does not read all.
  assert turn["read"] == row["params_bytes"] - 4 * VOCAB * WIDTH
  caches = 4 * 192 * 2 * config.trunk.num_kv_heads * 8 * 4
  assert turn["arguments"] - row["params_bytes"] == pytest.approx(caches, rel=0.1)
  assert all(x["kernels"]["products"]["count"] for x in (pack, turn))


def test_a_plan_has_a_line_for_each_pack_and_each_round():
  kernels = roofline.summary(roofline.kernels(hlo.parse(HLO)), H200)
  report = {"kernels": kernels, "peak": 3e9, "unknown_loops": 0}
  row = {"program": "x", "chips": 1, "model_flops": 1.0, "unknown_loops": 0} | {
    "kernels": kernels,
    "packs": {2: report, 4: report}, "decode": {8: report | {"read": 48e9}},
  }
  parts = plan.gpu_parts(H200, [row])
  assert [x for x in parts if x.startswith("#")] == [
    "## Roofline: a model, not a measurement",
    "## Packs: trials side by side on one GPU", "## Decoding: one round on one GPU",
  ]
  packs, rounds = (
    [re.split(r" *\| *", line)[1:-1] for line in parts[i].splitlines()] for i in (5, 8)
  )
  # 16 kernels of 3 us.
  assert packs[0] == [
    "program", "trials", "peak GB", "kernels", *packs[0][4:-2], "roofline ms",
    "ms/trial",
  ]
  assert [(x[1], x[2], x[3], *x[-2:]) for x in packs[2:]] == [
    ("2", "3.00", "16", "0.05", "0.024"), ("4", "3.00", "16", "0.05", "0.012")
  ]
  assert rounds[0][-3:] == ["ms/text", "weights GB", "floor ms"]
  assert rounds[2][-3:] == ["0.006", "48.00", "10"] and "4.8e+12 bytes/s" in parts[7]
  nothing = row | {"packs": {}, "decode": {}}
  assert len(plan.gpu_parts(H200, [nothing])) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@has_compiler
def test_the_command_plans_packs_and_rounds_for_an_h200(command, tmp_path):
  result = command(
    "launch.plan", "--config=experiments/smoke.py", "--topology=h200:1", "--packs=2",
    "--decode=1,4", f"--output={tmp_path}", "--compilation_cache=",
    "trunk.num_layers=1", "data.batch_size=2",
  )
  assert result.code == 0, result.output
  [row] = json.loads((tmp_path / "smoke-h200-1.json").read_text())["rows"]
  [pack], rounds = row["packs"].values(), row["decode"]
  # A pack has attention of XLA, a lone trial cuDNN's.
  assert row["kernels"]["attention"]["count"] >= 4
  assert not pack["kernels"]["attention"]["count"]
  assert pack["arguments"] == pytest.approx(2 * row["arguments"], rel=0.02)
  assert list(rounds) == ["1", "4"] and rounds["4"]["peak"] > rounds["1"]["peak"]
  for report in rounds.values():  # Every weight is read.
    products = report["kernels"]["products"]
    assert report["read"] / 2 < products["bytes"] < 10 * report["read"]
  page = (tmp_path / "smoke-h200-1.md").read_text()
  assert "## Packs: trials side by side" in page and "## Decoding: one round" in page


HLO = """HloModule jit_step, is_scheduled=true

%fused_update (p0: f32[8,64], p1: f32[1,64], p2: s32[]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = f32[1,64]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[8,64]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%fused_slice (p0: bf16[8,64], p1: s32[]) -> bf16[1,64] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%fused_dot (p0: bf16[16,64], p1: bf16[64,32]) -> f32[16,32] {
  %p0 = bf16[16,64]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  ROOT %dot = f32[16,32]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_exp (p0: f32[16,32]) -> f32[16,32] {
  %p0 = f32[16,32]{1,0} parameter(0)
  ROOT %exp = f32[16,32]{1,0} exponential(%p0)
}

%body (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = f32[8,64]{1,0} get-tuple-element(%p), index=1
  %row = f32[1,64]{1,0} custom-call(%stack), custom_call_target="other"
  %new = f32[8,64]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%fused_update
  ROOT %out = (s32[], f32[8,64]{1,0}) tuple(%i, %new)
}

%condition (p: (s32[], f32[8,64])) -> pred[] {
  %p = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: bf16[16,64], b: bf16[64,32]) -> f32[16,32] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %loop = (s32[], f32[8,64]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %gemm = (bf16[16,32]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %dots = f32[16,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot
  %cut = bf16[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%fused_slice
  %flash = (bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type":"CAUSAL","intermediate_tensor_shape":{"dimensions":["2","4","16","16"]}}}
  %sum-start = f32[16,32]{1,0} all-reduce-start(%dots), to_apply=%add
  %sum = f32[16,32]{1,0} all-reduce-done(%sum-start)
  ROOT %exps = f32[16,32]{1,0} fusion(%sum), kind=kLoop, calls=%fused_exp
}
"""  # noqa: E501


def test_the_roofline_reads_kernels_bytes_and_flops():
  found = roofline.kernels(hlo.parse(HLO))
  kinds = [(x.name, x.kind, x.times, x.flops, x.num_bytes) for x in found]
  assert kinds == [
    ("row", "elementwise", 5, 0, 8 * 64 * 4 + 64 * 4),
    ("new", "copies", 5, 0, 2 * 64 * 4 + 4),  # In place: the row in and out.
    ("gemm", "products", 1, 2 * 16 * 32 * 64, 2 * (16 * 64 + 64 * 32 + 16 * 32) + 1024),
    ("dots", "products", 1, 2 * 16 * 32 * 64, 2 * (16 * 64 + 64 * 32) + 4 * 16 * 32),
    ("cut", "copies", 1, 0, 2 * 64 * 2 + 4),
    ("flash", "attention", 1, 4 * 8 * (2 * 4 * 16 * 16) / 2, 3 * 2048 + 2 * 1024),
    ("sum-start", "collectives", 1, 0, 4 * 16 * 32),
    ("exps", "elementwise", 1, 0, 2 * 4 * 16 * 32),
  ]
  total = roofline.summary(found, H200)
  assert total["copies"]["count"] == 6 and total["elementwise"]["count"] == 6
  # All of them are tiny: each takes the least that a kernel takes.
  assert total["products"]["seconds"] == pytest.approx(6e-6)
  large = found[2]._replace(flops=989e12 * 0.68)
  assert large.seconds(H200) == pytest.approx(1.0)
  assert large._replace(is_wide=True).seconds(H200) == pytest.approx(2.0)
  copy = found[1]._replace(num_bytes=4.8e12 * 0.83)
  assert copy.seconds(H200) == pytest.approx(1.0)


def test_a_loop_of_unknown_length_makes_the_time_a_bound():
  found = roofline.kernels(hlo.parse(HLO))
  row = {
    "program": "x", "chips": 1, "model_flops": 989e12 * 12e-6, "unknown_loops": 0,
    "kernels": roofline.summary(found, H200),
  }
  for loops, time, share in ((0, "| 0.05 ", "| 25.0% "), (
    1, "| > 0.05 ", "| < 25.0% "
  )):
    title, text, table = plan.roofline_parts(H200, [row | {"unknown_loops": loops}])
    assert "not a measurement" in title and "68% of the peak" in text
    assert time in table and share in table


def test_the_compiler_for_gpus_is_asked_for_by_name(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  topologies.devices.cache_clear()
  message = "no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0}".format(
    importlib.metadata.version("jaxlib")
  )
  with pytest.raises(ConfigError, match=message):
    topologies.devices(topologies.parse("h200:8"))
