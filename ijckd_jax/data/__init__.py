"""Images, from files to augmented batches.

`datasets` are the data sets by name, `datasets.prepared` those that tfds
stores; `input_pipeline` makes batches of one, `augment`, `transforms`,
`randaugment` and `mixing` change images within the training step. `images`
reads pictures, `duplicates` finds copies, and `classes` compares the names of
classes. Networks are not known here.
"""
