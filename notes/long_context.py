"""Long context: four times the trained length with a larger RoPE base or YaRN, before and after tuning."""
import statistics
import tempfile
from dataclasses import replace

import torch

import train
from data import Batches, prepare
from model import Transformer
from notes import _note

SHORT, LONG, BIN = 128, 512, 32                                    # bytes
CHANGES = {"unchanged": {}, "base 500,000": dict(rope_theta=500_000.0),                    # [Motif §3.2.3]
           "YaRN": dict(yarn=LONG / SHORT, yarn_from=SHORT, yarn_fast=1.0)}    # K2: yarn_fast = yarn_slow = 1


def cells(quick):
    base = train.RECIPES["shakespeare"]
    base = replace(base, model=replace(base.model, context=SHORT), batch=32, micro=32,
                   tokens=800 * 32 * SHORT, eval_every=10 ** 9, eval_windows=1, save_every=10 ** 9, keep=1,
                   data=replace(base.data, domains="code:1:1"), optim=replace(base.optim, weight_decay=0.1))
    if quick:
        base = replace(base, batch=4, micro=4, tokens=40 * 4 * SHORT, model=replace(base.model, n_layer=1))
    return [("base", seed, base) for seed in range(1 if quick else 3)]


@torch.no_grad()
def by_position(model, config):
    """Mean nats/byte on fixed validation windows of LONG bytes, for each bin of BIN positions."""
    corpus = prepare(config.data, config.model.vocab_size)
    batches = Batches(corpus, replace(config.data, horizon=1), 0, 1, LONG)
    x, y, *_ = batches.val("code", min(384, config.tokens // 8192))
    model.eval()
    # (windows, LONG)
    nll = torch.cat([model(a, b)[1].view(a.shape) for a, b in zip(x.split(32), y.split(32))])
    return nll.double().mean(0).unflatten(0, (-1, BIN)).mean(1).tolist()


def run(arm, seed, config):
    """One base model, then each change to it, before and after a tenth of its steps at the new length."""
    with tempfile.TemporaryDirectory() as folder:
        first = replace(config, seed=seed, out=f"{folder}/base")
        history, model = train.train(first, quiet=True)
        if history[-1]["step"] < first.total_steps:
            raise KeyboardInterrupt
        for name, change in CHANGES.items():
            longer = replace(config.model, context=LONG, **change)
            fresh = Transformer(longer)
            fresh.load_state_dict(model.state_dict())
            tuned = replace(first, init=first.out, out=f"{folder}/{name}", model=longer,
                            tokens=config.tokens // 10, batch=config.batch * SHORT // LONG,
                            optim=replace(config.optim, lr=config.optim.lr / 3, decay_start=0.0))
            after = train.train(tuned, quiet=True)[1]
            for when, measured in (("before", fresh), ("after", after)):
                for i, nats in enumerate(by_position(measured, config)):
                    yield {"change": list(CHANGES).index(name), "trained": float(when == "after"),
                           "position": (i + 0.5) * BIN, "nats": nats}


def show(rows):
    figure, axes = _note.panels(1, 2, width=11, height=3.8)
    table = [("", f"positions 0–{SHORT}: before", "after", f"{SHORT}–{LONG}: before", "after")]
    for i, (name, colour) in enumerate(zip(CHANGES, _note.COLOURS)):
        some = [row | dict(arm=name) for row in rows if row["change"] == i]
        for axis, trained in zip(axes[0], (0, 1)):
            shown = [row for row in some if row["trained"] == trained]
            _note.band(axis, shown, name, "position", "nats", color=colour)
        line = [name]
        for inside in (True, False):
            for trained in (0, 1):
                seeds = {}
                for row in some:
                    if row["trained"] == trained and (row["position"] < SHORT) == inside:
                        seeds.setdefault(row["seed"], []).append(row["nats"])
                line.append(_note.spread([statistics.mean(v) for v in seeds.values()]))
        table.append(tuple(line))
    titles = "before: no training at the new length", "after a tenth of the steps at 512"
    for axis, title in zip(axes[0], titles):
        axis.axvline(SHORT, color="0.4", ls="--", lw=0.8)
        axis.set(title=title, xlabel="position (trained up to the dashed line)", ylabel="nats/byte")
        axis.legend()
    return figure, _note.table(*table)


if __name__ == "__main__":
    _note.main("long_context", cells, run, show)
