"""Rated responses become preference pairs: `python -m notus.curation`.

text_files       reading rows of JSON and CSV
rows             reading rows from files, folders and the Hub
rated_rows       rows of rated responses, in the published schemas
ratings          ratings of responses, and the rules that pick a pair
decontamination  prompts of benchmarks and repeated prompts
marks            marks that a person set on rows, and the rows they belong to
report           counts and figures of a curated set
curate           the settings, and the rules for a row
records          the rows that a curation writes
command          the command, which curates a set
"""
