"""Starts JAX's backend, and explains why it does not start."""

import os

import jax

from ijckd_jax.runtime import config_utils

EXTRAS = {
  'cuda': "'ijckd_jax[cuda12]' (or cuda13)",
  'gpu': "'ijckd_jax[cuda12]' (or cuda13)",
  'tpu': "'ijckd_jax[tpu]'",
}


def start() -> None:
  """Starts JAX on the platforms that JAX_PLATFORMS names.

  Call it before a `try` that would blame a file for JAX's errors.

  Raises:
    config_utils.UserError: this install lacks one, or finds no such device.
  """
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:  # JAX's, of a GPU and others.
    asked, why = jax.config.jax_platforms, ''
    if str(error):
      why = f' ({config_utils.short(str(error).partition(" (set ")[0])})'
    if not asked:
      raise config_utils.UserError(
        f'JAX does not start{why}: mend its install, or set JAX_PLATFORMS=cpu '
        'to compute on the CPU'
      ) from error
    wanted = [EXTRAS[name] for name in asked.split(',') if name in EXTRAS]
    install = f', or pip install {wanted[0]}' if wanted else ''
    raise config_utils.UserError(
      f'JAX_PLATFORMS={asked}: this install of JAX lacks it, or finds no such '
      f'device here{why}; unset JAX_PLATFORMS to take what is there{install}'
    ) from error


def memory_limit(device: jax.Device) -> int | None:
  """Returns how many bytes of a device's memory JAX may use.

  For a CPU that is the machine's memory. None where it is not known.
  """
  found = (device.memory_stats() or {}).get('bytes_limit')
  if found is None and device.platform == 'cpu' and hasattr(os, 'sysconf'):
    found = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return found
