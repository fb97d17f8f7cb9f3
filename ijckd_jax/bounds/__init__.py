"""The bound on a student's error: statements, limits, measurement.

`measure` goes from a pair of networks (`pairs`) and images to a report.
`statements` lists the bounds, each a number for every example, from the rows of
`evaluation.pointwise`; `limits` has confidence limits of means, `certify` joins
the two, and `shift` limits the error on images without labels. See
docs/theory.md.

  ijckd bounds --bundle STUDENT --teacher TEACHER --dataset NAME
"""
