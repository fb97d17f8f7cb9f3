"""The bound on a student's error, measured: statements, limits, estimates.

Arrays in, numbers out. `pointwise` says what teacher and student do on each
example, `statements` what follows for the student's error, `limits` how surely
means are known, `certify` puts these together; `divergence` estimates how
differently two representations can be told and read. See docs/theory.md.

  ijckd bounds --bundle STUDENT --teacher TEACHER --dataset NAME
"""
