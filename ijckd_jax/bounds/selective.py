"""Selective prediction: the share of images that can be answered reliably."""

from typing import Any

import numpy as np

from ijckd_jax.bounds import limits

# Shares of the images that are tried, fixed before any image is seen.
SHARES = tuple(number / 20 for number in range(20, 0, -1))
TARGETS = (0.05, 0.10)  # Largest error of the answers.


def answer(
  wrong: np.ndarray, confidence: np.ndarray, delta: float
) -> list[dict[str, Any]]:
  """Returns for each target error the most that can be answered, as JSON.

  A network answers where its confidence is above a threshold. Thresholds are
  confidences of the given examples: given the threshold, the examples above it
  are independent draws of the answered ones, so that Clopper-Pearson limits
  their error. Each of SHARES takes its part of delta, and the best one may
  therefore be chosen on the same examples.

  Source: Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural
  Networks", https://arxiv.org/abs/1705.08500, with a union over SHARES.

  Args:
    wrong: (N,) 0 or 1.
    confidence: (N,), such as the largest probability.
    delta: probability that the error of any chosen answers is above its limit.

  Returns:
    For each of TARGETS 'target', 'answered' (share of the examples),
    'threshold', 'error' of the answers and its 'upper' limit; the last three
    are None where no share is within the target.
  """
  ranked = np.sort(confidence)[::-1]
  share = limits.shared(delta, len(SHARES))
  tried = []
  for part in SHARES:
    num = round(part * len(ranked))
    threshold = float(ranked[num]) if num < len(ranked) else None
    chosen = np.ones(len(ranked), bool)
    if threshold is not None:
      chosen = confidence > threshold
    if chosen.any():
      count, total = int(wrong[chosen].sum()), int(chosen.sum())
      tried.append(
        {
          'answered': total / len(ranked),
          'threshold': threshold or 0.0,
          'error': count / total,
          'upper': limits.clopper_pearson_upper(count, total, share),
        }
      )
  nothing = dict(answered=0.0, threshold=None, error=None, upper=None)
  found = []
  for target in TARGETS:
    within = [one for one in tried if one['upper'] <= target]
    best = max(within, key=lambda one: one['answered'], default=nothing)
    found.append({'target': target, **best})
  return found
