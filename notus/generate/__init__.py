"""Prompts and a model's answers to them: the part that both training and evaluation need.

prompts    prompt files, the benchmarks' prompt sets, and their token ids
decoding   batched sampling, independent of batches and ranks, by transformers or vLLM
answering  conversations -> responses of a saved model
samples    a few answers of the policy during training
result     the end of a run, printed: metrics and answers before and after
"""
