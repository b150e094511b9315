"""`train.py --dry-run`: what a run would need, before it starts.

preflight  the checks and the report
estimate   what a run takes: memory, FLOPs, hours
memory     the peak memory of a rank, by formula
tokens     the data as the model sees them
"""
