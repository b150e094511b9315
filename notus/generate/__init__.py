"""Answers of a model: what training and evaluation both need.

prompts   prompt files
decoding  batched sampling, independent of batches and ranks
samples   a few answers of the policy during training
"""
