"""Sampled responses become rated rows, which curation turns into pairs: the judges of a round.

responses  reading sampled responses, writing rated ones
check      judging by checking against a known answer
reward     judging by a reward model on this project's decoder
judge      judging by a language model, in the shape of UltraFeedback
rubric     what a language model is asked, and how its answer is read
server     a server with OpenAI's interface, asked until it answers or is clearly gone
record     the answers and scores so far, kept so that nothing is asked or computed twice
"""
