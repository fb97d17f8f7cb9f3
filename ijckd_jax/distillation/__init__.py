"""The core: how a student learns from a teacher.

`methods` are the objectives, `connectors` bring the student to the teacher's
representation, `distiller` puts a student, its teachers and a method together,
as `binding` does for a config, and `steps` makes an update. `network` is a
backbone with its pool and head, `teachers` what a student learns from,
`stored_outputs` which of their outputs can be stored, `unlabelled` which
methods do without classes, and `train_state` what a checkpoint holds. No files
and no flags: arrays in, arrays out.
"""
