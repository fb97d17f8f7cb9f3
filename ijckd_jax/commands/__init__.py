"""The commands of `ijckd`, one file each: flags in, calls out.

A module here reads flags, calls what the folders below offer, and prints. What
several of them share is in `bundle_flags` (a bundle on a data set),
`pytorch_flags` and `output_flags`; `sweep_flags` reads those of `sweep`.
Nothing imports this folder but `ijckd_jax.__main__`.
"""
