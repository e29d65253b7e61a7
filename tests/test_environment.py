"""What runs, benchmarks and plans record about hardware, versions and code."""

import importlib.metadata
import re

import jax

from mtp_jax import environment


def test_hardware_names_devices_and_for_cpu_devices_the_cpu():
  pattern = rf"{jax.device_count()} x cpu, {len(environment.cpu_cores())} core\(s\) \S"
  assert re.match(pattern, environment.hardware())
  assert environment.hardware().endswith(environment.cpu())


def test_versions_name_what_is_missing():
  found = environment.versions(["jax", "no-such-package"])
  assert found["jax"] == importlib.metadata.version("jax")
  assert found["no-such-package"] == "missing" and found["python"].startswith("3.")


def test_the_commit_is_marked_if_the_tree_has_changes():
  assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", environment.code_commit())
