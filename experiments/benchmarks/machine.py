"""What a benchmark runs on: the processor, its cores, installed versions."""

import os
import pathlib
import subprocess


def processor() -> str:
  """Returns the name of the processor, and how many cores may be used."""
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  name = next(line for line in lines if line.startswith('model name'))
  return f'{name.partition(": ")[2]}, {num_cores()} of its cores'


def num_cores() -> int:
  """Returns how many cores this process and its children may use."""
  return len(os.sched_getaffinity(0))


def version(python: str, package: str) -> str:
  """Returns the version of a package that an interpreter has."""
  code = f'import importlib.metadata as m; print(m.version({package!r}))'
  return subprocess.check_output([python, '-c', code], text=True).strip()
