"""The commands of eval.py: measure a model as Notus was measured.

preferences   loss, accuracy and margins on held-out pairs
accuracy      accuracies of groups of pairs, with intervals
answers       answers to the prompts of MT-Bench and AlpacaEval
benchmarks    the two benchmarks' own temperatures, lengths, seeds, file formats
side_by_side  answers of a model and its reference on one page
scores        the command eval.py score, for the files of each evaluator
alpaca_eval   win rates from AlpacaEval's annotations
mt_bench      MT-Bench scores from FastChat's judgments
leaderboard   results of lm-evaluation-harness and the Open LLM Leaderboard
harness       runs of lm-evaluation-harness
comparison    a run compared with a published one
paired        runs compared with each other on the same pairs
arms          runs that differ only by seed, and their results on shared pairs
runs          runs as comparisons read them
statistics    Wilson's interval, McNemar's exact test and the paired bootstrap
published     the published numbers
options       options that commands share: numbers, new files, decoding, --json
"""
