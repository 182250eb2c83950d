"""PolyNorm, gated and not, against ReLU², GELU and SwiGLU: loss, coefficients, spectra of the weights, cost.
"""
import statistics

import torch

from notes import _note
from notes.appendix_e import svd_entropy
from notes.candidates import BASE, config, hidden, like

RATE = 3e-3
CHANGES = {"SwiGLU": {}, "PolyNorm, gated": dict(act="polynorm"),
           "PolyNorm": dict(act="polynorm", gated=False), "GELU": dict(act="gelu", gated=False),
           "ReLU²": dict(act="relu2", gated=False)}


def cells(quick):
    configs = {arm: config(change, RATE) for arm, change in CHANGES.items()}
    runs = [(arm, seed, c) for seed in range(5) for arm, c in configs.items()] + _note.speed_cells(configs)
    return [(arm, seed, _note.toy(c)) for arm, seed, c in runs if not seed] if quick else runs


@torch.no_grad()
def layers(model):
    """One row per layer: the entropy of its matrices' singular values, and PolyNorm's coefficients."""
    for i, layer in enumerate(model.layers.values()):
        of, inward = layer.ffn, [w for w in ("gate", "up") if hasattr(layer.ffn, w)]
        row = dict(layer=i + 1, inward=statistics.mean(svd_entropy(torch.linalg.svdvals(getattr(of, w)))
                                                       for w in inward),
                   outward=svd_entropy(torch.linalg.svdvals(of.down)))
        if hasattr(of.act, "bias"):
            row |= dict(zip(("cube", "square", "linear"), of.act.weight.tolist()), bias=of.act.bias.item())
        yield row


def run(arm, seed, config):
    if arm.startswith(_note.SPEED):
        yield from _note.timed(arm, seed, config)
        return
    ends = []
    yield from _note.history(arm, seed, config, lambda step, model: step < config.total_steps
                             or ends.extend(layers(model)))
    yield from ends


def show(rows):
    ends = {arm: {seed: [row for row in some if "bpb" in row][-1]["bpb"]
                  for seed, some in _note.of_arm(rows, arm).items()} for arm in CHANGES}
    base = ends["SwiGLU"]
    more = {arm: [100 * (bits / base[seed] - 1) for seed, bits in of_seed.items()]
            for arm, of_seed in ends.items()}
    figure, [(loss, learned, rank)] = _note.panels(1, 3, width=13, height=3.8)
    for i, (arm, colour) in enumerate(zip(CHANGES, _note.COLOURS)):
        loss.plot(more[arm], [-i] * len(more[arm]), "o", ms=5, color=colour, alpha=0.8)
        _note.band(rank, rows, arm, "layer", "inward", color=colour)
        _note.band(rank, rows, arm, "layer", "outward", color=colour, ls="--", label=None)
    for arm, style in (("PolyNorm, gated", "-"), ("PolyNorm", "--")):
        for what, colour in zip(("cube", "square", "linear", "bias"), _note.COLOURS):
            _note.band(learned, rows, arm, "layer", what, color=colour, ls=style,
                       label=what if style == "-" else None)
    _note.reported(learned, 1 / 3, None)
    loss.axvline(0, color="0.4", lw=0.8)
    loss.set(title="bits/byte beside SwiGLU, %, each seed", yticks=[-i for i in range(len(CHANGES))],
             yticklabels=list(CHANGES))
    layers = sorted({row["layer"] for row in rows if "layer" in row})
    learned.set(title="coefficients (dashed: not gated; dotted: at birth)", xlabel="layer", xticks=layers)
    rank.set(title="SVD entropy of gate, up (dashed: down)", xlabel="layer", xticks=layers)
    learned.legend(ncols=2)
    rank.legend(fontsize=7)
    of = lambda arm, what, layer: [row[what] for row in rows
                                   if row["arm"] == arm and row.get("layer") == layer]
    mean = lambda arm, what: [statistics.mean(values) for values in zip(*(of(arm, what, i) for i in layers))]
    lines = _note.table(
        ("arm", "width", "hidden parameters", "bits/byte", "beside SwiGLU, %, same seeds",
         "entropy of gate, up", "of down", "tokens/s, beside"),
        *((arm, model.d_ff, f"{hidden(model):,}", _note.spread(list(ends[arm].values())),
           "–" if arm == "SwiGLU" else _note.spread(more[arm], 2), _note.spread(mean(arm, "inward")),
           _note.spread(mean(arm, "outward")), _note.pace(rows, arm, "SwiGLU"))
          for arm, change in CHANGES.items() for model in (like(BASE, **change),)))
    lines += ["", *_note.table(
        ("learned coefficients", *(f"layer {i:.0f}" for i in layers)),
        *((f"{arm}: {what}", *(_note.spread(of(arm, what, i), 2) for i in layers))
          for arm in ("PolyNorm, gated", "PolyNorm") for what in ("cube", "square", "linear", "bias")))]
    return figure, lines


if __name__ == "__main__":
    _note.main("polynorm", cells, run, show)
