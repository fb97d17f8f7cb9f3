"""The bound on a student's error: statements, limits, measurement.

`measure` goes from a pair of networks (`pairs`) and images to a report.
`statements` lists the bounds, each a number for every example, from the rows of
`evaluation.pointwise`; `limits` has confidence limits of means, and `certify`
joins the two. `held_out` says whether images were held out, `selective` how
many can be answered with few errors; `shift` limits the error on images without
labels, and `calibration` estimates it from known shifts. See docs/theory.md.

  ijckd bounds --bundle STUDENT --teacher TEACHER --dataset NAME
"""
