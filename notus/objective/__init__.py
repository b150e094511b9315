"""From hidden states to the loss of a pair.

losses           the pairwise losses, one function each; what a loss may read
logprobs         log-probs of response tokens, summed per response
loss             the configured loss: options, weighted sums, coupling over a step
rounding         how far two honest computations of one log-prob may differ
reference        the frozen model's log-probs: looked up, or computed in every step
turns            the first of several runs that need the same file computes it, the others wait
cache_files      the files of one cache of log-probs, and of an unfinished pass
reference_cache  the reference's log-probs on disk: identity, one pass, audit
"""
