"""Preference data: from files to packed token rows.

messages        a row's messages, tools and dialogues, checked
pairs           the preference pair, its scores and labels
pair_formats    rows of a chosen and a rejected response become pairs
answer_formats  rows of one response each
formats         the table of formats, and how each is recognised
columns         columns besides a format's own: renamed, left out, added or refused
sources         one source's rows become pairs
preferences     sources are mixed, split and cleaned
oddities        warnings of rows that may not be meant as they are read
tokenizer       the tokenizer of a model folder
special_tokens  added tokens that a row's text spells out
token_arrays    a data set as token ids, in flat arrays
template        conversations become text, and nothing of a row is lost
tokenization    pairs become token ids through the chat template
planning        which pairs a step trains on, and how ranks and microbatches share them
packing         pairs become rows of token slots, a prompt shared by its two responses
dataset         sources become the data sets of a run, shared by training and evaluation
"""
