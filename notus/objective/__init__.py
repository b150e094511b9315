"""From hidden states to the loss of a pair.

losses     the pairwise losses, one function each
logprobs   log-probs of response tokens, summed per response
reference  the frozen model's log-probs: cached, or computed in every step
"""
