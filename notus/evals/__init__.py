"""The commands of eval.py: measure a model as Notus was measured.

preferences  loss, accuracy and margins on held-out pairs
answers      answers to the prompts of MT-Bench and AlpacaEval
scores       results that other tools wrote
leaderboard  results of the Open LLM Leaderboard
harness      runs of lm-evaluation-harness
comparison   runs next to published ones
published    the published numbers
tables       tables of results
"""
