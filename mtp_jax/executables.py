"""Executables of jitted functions: each is compiled once, and may be compiled ahead.

While one thread reads text or trains, `compile_ahead` compiles in another what will be
called later. JAX keeps what is compiled, so that the call finds it; `awaited` waits for
it, where a call would compile it a second time.
"""

import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

Program = TypeVar("Program", bound=Hashable)

# By program, then by what it is called with; forgotten with the program.
_executables: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = (
  weakref.WeakKeyDictionary()
)
_ahead: dict[Hashable, Future] = {}
# A compilation is mostly one thread's work.
_threads = ThreadPoolExecutor(2, thread_name_prefix="compile-ahead")


def compiled(program: Any, *arguments: Any) -> Any:
  """Returns a jitted function compiled for such arguments, once for each kind of them.

  So compilation is over before a clock starts, and trials of one program share it.
  """
  executables = _executables.setdefault(program, {})
  leaves, structure = jax.tree.flatten(arguments)
  kind = structure, tuple(leaf.shape for leaf in leaves)
  if kind not in executables:
    executables[kind] = awaited(program).lower(*arguments).compile()
  return executables[kind]


def compile_ahead(program: Any, *arguments: Any) -> None:
  """Begins to compile a jitted function, which is called through `awaited`.

  `arguments`: shapes of what it will be called with, and the same shardings.
  """
  mesh = jax.sharding.get_mesh()  # It will be called in the mesh of this caller.

  def compile_it() -> None:
    with jax.set_mesh(mesh):
      program.lower(*arguments).compile()

  if program not in _executables:
    ahead(program, compile_it)


def ahead(program: Hashable, work: Callable[[], Any]) -> None:
  """Begins to compile what `program` calls.

  It does nothing where several processes train: they must compile in one order.
  """
  if program not in _ahead and jax.process_count() == 1:
    _ahead[program] = _threads.submit(work)


def awaited(program: Program) -> Program:
  """Returns the program when nothing compiles it any more; an error is left to it."""
  future = _ahead.pop(program, None)
  if future is not None and not future.cancel():
    future.exception()
  return program


def results(program: Any, *arguments: Any) -> Any:
  """Compiles a jitted function; returns its results as shapes with shardings."""
  lowered = program.lower(*arguments)
  shardings = lowered.compile().output_shardings
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    lowered.out_info,
    shardings,
  )


def is_compiling() -> bool:
  """Returns whether something is being compiled ahead; Python's exit waits for it."""
  return not all(future.done() for future in _ahead.values())


def stop_ahead() -> None:
  """Drops what has not begun to be compiled."""
  for program, future in list(_ahead.items()):
    if future.cancel():
      del _ahead[program]


def forget_compiled() -> None:
  """Frees all executables of `compiled`; the next calls compile again."""
  _executables.clear()
