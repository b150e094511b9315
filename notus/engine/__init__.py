"""What runs the loop: ranks, optimiser, measurement, checkpoints.

hardware      GPUs: peak speed and memory
progress      a progress bar or lines
rendezvous    how restarted ranks find each other
distributed   ranks, meshes and sharding
optim         optimisers and learning-rate schedules
metrics       what a run reports
evaluation    the held-out metrics
signals       SIGTERM and SIGUSR1 end or save at the end of a step
lock          one run per output_dir
resume        what a run must have in common with the one it resumes
history       the starts and ends of a run
host_memory   how much memory a save may take
checkpoint    saving, finding and loading checkpoints
profiling     a trace of some steps
"""
