"""From a config to a finished run.

`experiment` builds what a config describes, `train` runs it: `distill` and
`train_and_evaluate` are for everybody. They call `one_run` for the teacher and
for the student. `loop` makes the steps, `checkpoints`, `metric_writer`,
`run_record` and `results` keep what must outlive a kill, `teacher_loading` and
`head_fitting` make the teachers ready. Of stored teacher outputs,
`output_recorder` knows when a run fills and reads them, `output_store` whose
they are, and `output_files` how they lie in files. `cost_estimate` says what a
step would cost on a TPU.
"""
