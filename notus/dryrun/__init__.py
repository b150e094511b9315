"""`train.py --dry-run`: what a run would need, before it starts.

memory     the peak memory of a rank by formula
preflight  the report: does it fit, how long, what would help
tokens     what the pairs look like as tokens
"""
