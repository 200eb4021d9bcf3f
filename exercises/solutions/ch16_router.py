"""Chapter 16: a router whose bias only chooses."""

import torch


def route(scores, bias, chosen):
    """The ids [T, chosen] and weights [T, chosen] of each token's experts; scores [T, experts]."""
    ids = (scores + bias).topk(chosen, dim=-1).indices
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True)


def balance(bias, load, rate):
    """The bias of the next step: up for experts below their share of the load, down for others."""
    return bias + rate * torch.sign(load.mean() - load)
