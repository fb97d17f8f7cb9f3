"""Memory that a process keeps between the steps that it makes on a CPU."""

import ctypes

# <malloc.h>, see mallopt(3).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed() -> None:
  """Lets glibc's malloc keep what is freed; does nothing with another malloc.

  XLA asks for the memory of a whole step at each step, and glibc hands blocks
  of that size back to the kernel, which clears them again page by page: a fifth
  to a third of a step's time. It holds for the whole process, so that commands
  do it and libraries do not.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)
