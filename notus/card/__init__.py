"""The model card that is written when a run ends: `python -m notus.card`.

curves  figures of a run's metrics
card    the page
"""
