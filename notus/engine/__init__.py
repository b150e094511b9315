"""Everything around the step: ranks, optimiser, measurement, checkpoints.

compilation   settings of torch.compile under which a run repeats
rendezvous    how restarted ranks find each other
distributed   ranks, meshes and sharding
optim         optimisers and learning-rate schedules
flops         FLOPs of a step, the known GPUs, speed
metrics       what a run measures, in training and on held-out pairs
step_tokens   a step's response tokens from all ranks, for a log
sinks         W&B and Trackio, names and settings in TensorBoard
log           metrics.jsonl, TensorBoard, progress on the console
pair_records  the result of each held-out pair
signals       SIGTERM and SIGUSR1 end or save at the end of a step
lock          one run per output_dir
host_memory   the host's memory
checkpoint    the files of a checkpoint: finding, checking, loading
best          the best checkpoint, by a metric of held-out pairs
saver         saving in the background
history       the starts and ends of a run
profiling     a trace of some steps
warmup        the first row, which compiles and shows whether memory is enough
"""
