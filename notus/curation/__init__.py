"""Rated responses become preference pairs: `python -m notus.curation`.

rows             reading rows from files, folders and the Hub
rated_rows       rows of rated responses, in the published schemas
ratings          ratings of responses, and the rules that pick a pair
decontamination  prompts of benchmarks and repeated prompts
marks            marks that a person set on rows, and the rows they belong to
report           counts and figures of a curated set
records          the rows that a curation writes
curate           the rules applied to a set, and the command
"""
