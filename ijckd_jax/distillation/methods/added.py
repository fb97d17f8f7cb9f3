"""The sum of methods: one, and the terms of others beside its own."""

import dataclasses
from typing import Any

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.runtime import config_utils


class Modules(auxiliary.Auxiliary, kw_only=True):
  """The auxiliary modules of several methods, side by side.

  Attributes:
    modules: one for each method, or None.
  """

  modules: tuple[auxiliary.Auxiliary | None, ...]

  def setup(self):
    self.parts = [
      module
      and module.clone(
        axis_name=self.axis_name,
        dtype=self.dtype,
        unbiased_variance=self.unbiased_variance,
      )
      for module in self.modules
    ]

  def __call__(self, student, teacher, *, train):
    """Returns what each makes; None for a method without one."""
    return tuple(
      part and part(student, teacher, train=train) for part in self.parts
    )


@dataclasses.dataclass(frozen=True)
class Sum(base.Method):
  """A method whose loss has the terms of others added.

  The student has one connector, that of the first method that builds one. All
  methods see the student through it, and read the prediction that the first
  method makes. The student ends at the first method's tap.

  Attributes:
    first: the method that chooses head and tap.
    others: those that are added to it.
    labels: what the others' terms are called after.
  """

  first: Any
  others: tuple[Any, ...]
  labels: tuple[str, ...]

  @property
  def predicts_with(self) -> str:
    """The first method's."""
    return self.first.predicts_with

  @property
  def tap(self) -> str:
    """The first method's."""
    return self.first.tap

  @property
  def needs_teacher(self) -> bool:
    """Whether one of them does."""
    return any(m.needs_teacher for m in self._all)

  @property
  def second_view(self):
    """The one that there is, or None."""
    found = [m.second_view for m in self._all if m.second_view is not None]
    if any(view != found[0] for view in found):
      raise config_utils.UserError(
        'method.add: the methods need different second views '
        f'({" and ".join(map(str, found))}), and a run has one: give them '
        'the same fields'
      )
    return found[0] if found else None

  @property
  def adapts_teacher(self) -> bool:
    """Whether one of them does."""
    return any(m.adapts_teacher for m in self._all)

  @property
  def _all(self):
    return (self.first, *self.others)

  def build_connector(self, student, teacher):
    """Returns the connector of the first that has one, or None."""
    found = (m.build_connector(student, teacher) for m in self._all)
    return next((c for c in found if c is not None), None)

  def auxiliary(self, student, teacher):
    """Returns the modules of all; None where there is none."""
    modules = tuple(m.auxiliary(student, teacher) for m in self._all)
    return Modules(modules=modules) if any(modules) else None

  def loss(self, student, teacher, batch):
    """Returns the sum; the others' terms are called by their method too."""
    total, terms = 0.0, {}
    names = ('', *(f'{label}_' for label in self.labels))
    for number, (method, name) in enumerate(zip(self._all, names, strict=True)):
      seen, rows = self._of(number, student), self._rows(number, batch)
      value, found = method.loss(seen, teacher, rows)
      total += value
      for term, size in found.items():
        terms[f'{name}{term}'] = size
    return total, terms

  @property
  def remembers(self) -> bool:
    """Whether one of them does."""
    return bool(self._remembering)

  def memory(self, key, num_examples):
    """As a method's, of those that have one."""
    return tuple(
      self._all[number].memory(key, num_examples)
      for number in self._remembering
    )

  def notes(self, student, batch):
    """As a method's, of those that have one."""
    return tuple(
      self._all[number].notes(
        self._of(number, student), self._rows(number, batch)
      )
      for number in self._remembering
    )

  def remember(self, memory, notes):
    """As a method's, of those that have one."""
    return tuple(
      self._all[number].remember(*own)
      for number, *own in zip(self._remembering, memory, notes, strict=True)
    )

  @property
  def _remembering(self) -> list[int]:
    """The places of the methods that have a memory."""
    return [number for number, m in enumerate(self._all) if m.remembers]

  def _of(self, number: int, student):
    """Returns the student with one method's auxiliary results."""
    if student.auxiliary is None:
      return student
    return student.replace(auxiliary=student.auxiliary[number])

  def _rows(self, number: int, batch):
    """Returns the batch with one method's memory."""
    if number not in self._remembering:
      return batch
    place = self._remembering.index(number)
    return {**batch, 'memory': batch['memory'][place]}
