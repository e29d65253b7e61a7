"""The work that floors are made of is as much as it says."""

import pytest

from launch.benchmarks import limits
from tests import common


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
  monkeypatch.setattr(limits, "_SIZES", {"other": (128, 1 << 20)})


def test_products_are_as_many_operations_as_the_compiler_counts():
  work = limits.products("float32")
  assert work.amount == 8 * 2 * 128**3
  assert work.program.cost_analysis()["flops"] == pytest.approx(work.amount, rel=0.01)
  assert work.seconds() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_touch_as_many_bytes_as_they_say(dtype):
  work = limits.reads(dtype)
  assert work.amount == work.array.nbytes == 1 << 20
  assert work.program.cost_analysis()["bytes accessed"] >= work.amount


def test_the_floor_of_a_model_is_in_its_compute_dtype():
  config = common.tiny_config("none", 0, {"trunk.compute_dtype": "bfloat16"})
  step, ready = limits.build_products(config, "floor")
  step()
  assert ready.flops == 8 * 2 * 128**3
