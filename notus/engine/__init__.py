"""What runs the loop: ranks, optimiser, measurement, checkpoints.

rendezvous    how restarted ranks find each other
distributed   ranks, meshes and sharding
optim         optimisers and learning-rate schedules
flops         FLOPs of a step, and the GPUs that are known
metrics       what a run measures
log           where it is written: metrics.jsonl, TensorBoard, the console
evaluation    the held-out metrics
signals       SIGTERM and SIGUSR1 end or save at the end of a step
lock          one run per output_dir
resume        what a run must have in common with the one it resumes
history       the starts and ends of a run
host_memory   how much memory a save may take
checkpoint    saving, finding and loading checkpoints
profiling     a trace of some steps
"""
