"""The bound on a student's error, measured: statements, limits, estimates.

`measure` goes from a pair of networks and images to a report; the rest is
arrays in, numbers out. `statements` say what follows for the student's error
from what `evaluation.pointwise` says of each example, `limits` how surely
means are known, `certify` puts these together; `divergence` estimates how
differently two representations can be told and read. See docs/theory.md.

  ijckd bounds --bundle STUDENT --teacher TEACHER --dataset NAME
"""
