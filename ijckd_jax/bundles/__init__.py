"""A network on the disk, self-contained.

`bundles` reads and writes one (`bundles.load` is for everybody),
`specification` is its JSON, `model_card` its page for people, and `pretrained`
starts a backbone from one. What a run leaves beside its bundle is `training`'s.
"""

from ijckd_jax.runtime import moved

__getattr__ = moved.contents('bundles', 'bundles.bundles')
