"""The model card that is written when a run ends: `python -m notus.card`.

record  a finished run as its folder describes it
curves  figures of a run's metrics
card    the page
"""
