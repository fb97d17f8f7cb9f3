"""Freed memory stays with a process that asks for it."""

import subprocess
import sys

import pytest

# Prints the pages that a block of 64 MiB takes from the kernel the second time.
PROGRAM = """
import resource
import numpy as np
from ijckd_jax.runtime import cpu_memory
if {keep}:
  cpu_memory.keep_freed()
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**23)
  pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""


def pages(keep):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM.format(keep=keep)],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(done.stdout)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc is of Linux')
def test_freed_memory_is_kept():
  # A page has 2 MiB where the kernel gives huge ones: 32 in place of 16,384.
  assert pages(keep=True) < 10 < pages(keep=False)
