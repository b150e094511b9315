"""Sampled responses become rated rows, which curation turns into pairs: the judges of a round.

responses  reading sampled responses, writing rated ones
check      judging by checking against a known answer
"""
