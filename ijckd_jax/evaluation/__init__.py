"""What networks do on whole splits: `evaluator` and `feature_extraction`.

`evaluator` counts every example once, beside a teacher if there is one;
`feature_extraction` gathers what a network makes of images, `logistic` fits
linear heads on it, and `probes` says what it is worth. `metrics` are sums over
examples, `pointwise` is what a teacher and a student do on each, and `cost` a
network's multiply-adds, bytes and time. Nothing here trains a network, or
writes a file.
"""
