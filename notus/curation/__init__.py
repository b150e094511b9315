"""Rated responses become preference pairs: `python -m notus.curation`.

rows             reading rows from files, folders and the Hub
ratings          ratings of responses, and the rules that pick a pair
decontamination  prompts of benchmarks and repeated prompts
marks            marks that a person set on rows, and the rows they belong to
report           counts and figures of a curated set
curate           the rules applied to a set, and the command
"""
