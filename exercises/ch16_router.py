"""Chapter 16: a router whose bias only chooses.

The bias decides which experts a token passes. It must not change how much their outputs count.
"""

import torch


def route(scores, bias, chosen):
    """The ids [T, chosen] and weights [T, chosen] of each token's experts; scores [T, experts]."""
    biased = scores + bias
    weights, ids = biased.topk(chosen, dim=-1)  # TODO: these weights contain the bias
    return ids, weights / weights.sum(-1, keepdim=True)


def balance(bias, load, rate):
    """The bias of the next step: up for experts below their share of the load, down for others."""
    return bias + rate * torch.sign(load - load.mean())  # TODO: which way?
