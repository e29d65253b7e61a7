"""Runs `python -m MODULE ...` many times for the price of one import.

A server process imports what takes long, and forks for every command. Nothing has
started a JAX backend by then, so that a command can also be asked whether it did.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags
from absl.testing import flagsaver

from tests.quick_xla import xla_flags

ROOT = Path(__file__).resolve().parent.parent

_SERVER = textwrap.dedent("""
  import importlib, json, os, runpy, sys, traceback
  for name in sys.argv[1:]:
    importlib.import_module(name)
  from jax._src import xla_bridge

  def command(module, arguments):
    sys.argv = [module, *arguments]
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
      return end.code or 0
    except BaseException:
      traceback.print_exc()
      return 1

  for line in sys.stdin:
    output, to_output = os.pipe()
    touched, to_touched = os.pipe()
    if not (child := os.fork()):
      os.dup2(to_output, 1), os.dup2(to_output, 2)
      folder, environment, module, arguments = json.loads(line)
      os.environ.clear()
      os.environ.update(environment)
      os.chdir(folder)
      sys.path[0] = folder
      code = command(module, arguments)
      sys.stdout.flush(), sys.stderr.flush()
      os.write(to_touched, b"01"[xla_bridge.backends_are_initialized():][:1])
      os._exit(code)
    os.close(to_output), os.close(to_touched)
    text = os.fdopen(output).read()
    has_touched = os.fdopen(touched).read() == "1"
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, text, has_touched]), flush=True)
""")


class Result(NamedTuple):
  """How a command ended; `output` is stdout and stderr together."""

  code: int
  output: str
  touched_backend: bool


class Commands:
  """A server of commands that imports `modules` first; a context manager."""

  def __init__(
    self, modules: Iterable[str] = ("launch.engines.local",), num_devices: int = 1
  ):
    self._modules, self._flags = modules, xla_flags(num_devices)

  def __enter__(self) -> "Commands":
    self._server = subprocess.Popen(
      [sys.executable, "-c", _SERVER, *self._modules],
      cwd=ROOT,
      env=self._environment(),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    return self

  def __exit__(self, *_: object) -> None:
    self._server.stdin.close()
    self._server.wait()

  def _environment(self) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": self._flags, "JAX_PLATFORMS": "cpu"}

  def __call__(self, module: str, *arguments: str, folder: Path = ROOT) -> Result:
    """Runs `python -m module arguments...` in the folder and waits for it.

    Its environment is what the test has now: the server may have begun in another test.
    """
    line = json.dumps([str(folder), self._environment(), module, arguments])
    print(line, file=self._server.stdin, flush=True)
    return Result(*json.loads(self._server.stdout.readline()))


def run_report(**values: object) -> int:
  """Runs launch.report in this process with these values of its flags."""
  from launch import report  # Here, because it imports what takes long.

  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**values):
    return report.main()


@pytest.fixture(scope="session")
def command() -> Iterator[Commands]:
  with Commands() as commands:
    yield commands
