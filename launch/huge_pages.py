"""Huge pages for the processes that train: they make a step on CPU cores faster.

XLA allocates the temporaries of a step anew every time, and the kernel clears them page
by page. glibc reads the setting when a process starts, so a process cannot give it to
itself: it comes from the shell or from the parent process.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


@contextlib.contextmanager
def start_with_huge_pages() -> Iterator[None]:
  """Gives huge pages to the processes that are started inside.

  Does nothing where the system is not Linux or the variable is set: the user's wish.
  """
  name, value = HUGE_PAGES
  if sys.platform != "linux" or name in os.environ:
    yield
    return
  os.environ[name] = value
  try:
    yield
  finally:
    del os.environ[name]
