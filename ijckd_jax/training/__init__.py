"""From a config to a finished run.

`experiment` builds what a config describes, `train` runs it: `distill` and
`train_and_evaluate` are for everybody. `loop` makes the steps, `checkpoints`,
`metric_writer`, `run_record` and `results` keep what must outlive a kill,
`teacher_loading` and `head_fitting` make the teachers ready. Of stored teacher
outputs, `teacher_outputs` knows when a run fills and reads them,
`teacher_store` whose they are, and `record_files` how they lie in files.
"""
