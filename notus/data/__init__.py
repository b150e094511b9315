"""Preference data: from files to packed token rows.

formats         rows of many formats become pairs
preferences     sources are mixed, split and cleaned
tokenizer       the tokenizer of a model folder
special_tokens  special tokens that a row's text spells out
token_arrays    a data set as token ids, in flat arrays
tokenization    pairs become token ids through the chat template
planning        which pairs a step trains on, and how ranks and microbatches share them
packing         pairs become rows of token slots, a prompt shared by its two responses
dataset         sources become the data sets of a run, shared by training and evaluation
"""
