"""The slow, obvious way to ask a model: one sequence at a time, all logits."""

import torch


def one_by_one(model, context, continuation):
    """The definition: one plain forward pass, all logits, log-softmax in double precision."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    chosen = logits[list(places)]
    value = chosen.gather(1, torch.tensor(continuation)[:, None]).sum().item()
    return value, chosen.argmax(-1).tolist() == continuation


def greedy(model, context, count, end):
    made = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([context + made])).logits[0, -1].argmax())
        if token == end:
            break
        made.append(token)
    return made


def attends(row, prefix):
    """Boolean [q, prefix + q]: by going from each token of a packed row to its parent, and on."""
    seen = torch.zeros(len(row.tokens), prefix + len(row.tokens), dtype=torch.bool)
    seen[:, :prefix] = True
    for place in range(len(row.tokens)):
        ancestor = place
        while ancestor >= 0:
            seen[place, prefix + ancestor] = True
            ancestor = row.parent[ancestor]
    return seen


def ask(lm, pairs):
    return lm._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in pairs])
