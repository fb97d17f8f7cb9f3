"""Students as they are shipped: as one function, in files that run alone.

`deployed` is that function, `onnx_files`, `stablehlo_files` and
`safetensors_files` write and run it, `checks` compares what was written with
what was trained. `exports` makes a checked file of a bundle, `sessions` opens a
file or a bundle, `pictures` shows it pictures, and `web` writes a page.
"""
