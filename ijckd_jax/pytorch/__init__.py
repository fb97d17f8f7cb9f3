"""PyTorch in and out: weights both ways, and any network as teacher or start.

`importer` reads published weights into bundles, `named_models` builds PyTorch's
networks by name, `converter` makes a bundle of any PyTorch classifier,
`published_names` writes a student's arrays, and `student_source` the module
that runs them; `state_dicts` are the files, and `hub` fetches them. The other
modules are parts of these. PyTorch is imported where it is used, and never
needed to train.
"""
