"""Rated responses become preference pairs: `python -m notus.curation`.

rows             reading rows from files, folders and the Hub
ratings          what raters gave, and which responses a rule picks
decontamination  prompts of benchmarks and repeated prompts
report           counts and figures of a curated set
curate           the rules applied to a set, and the command
"""
