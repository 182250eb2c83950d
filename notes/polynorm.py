"""PolyNorm, gated and not, beside ReLU², GELU and SwiGLU: loss, coefficients, the weights it leaves behind, cost."""
import statistics

import torch

from notes import _note
from notes.appendix_e import svd_entropy
from notes.candidates import config

RATE = 3e-3
CHANGES = {"SwiGLU": {}, "PolyNorm, gated": dict(act="polynorm"), "PolyNorm": dict(act="polynorm", gated=False),
           "GELU": dict(act="gelu", gated=False), "ReLU²": dict(act="relu2", gated=False)}


def cells(quick):
    runs = [(arm, seed, config(change, RATE)) for seed in range(5) for arm, change in CHANGES.items()]
    return [(arm, seed, _note.toy(c)) for arm, seed, c in runs if not seed] if quick else runs


@torch.no_grad()
def layers(model):
    """A row a layer: the entropy of its matrices' singular values, and PolyNorm's coefficients."""
    for i, layer in enumerate(model.layers.values()):
        of, inward = layer.ffn, [w for w in ("gate", "up") if hasattr(layer.ffn, w)]
        row = dict(layer=i + 1, inward=statistics.mean(svd_entropy(torch.linalg.svdvals(getattr(of, w)))
                                                       for w in inward),
                   outward=svd_entropy(torch.linalg.svdvals(of.down)))
        if hasattr(of.act, "bias"):
            row |= dict(zip(("cube", "square", "linear"), of.act.weight.tolist()), bias=of.act.bias.item())
        yield row


def run(arm, seed, config):
    ends = []
    yield from _note.history(arm, seed, config, lambda step, model: step < config.total_steps
                             or ends.extend(layers(model)))
    yield from ends


def show(rows):
    raise SystemExit("not yet")


if __name__ == "__main__":
    _note.main("polynorm", cells, run, show)
