"""Averaging weights during training (Motif §3.2.2): how much of a decay's gain does it give for free?"""
import collections
import statistics
from dataclasses import replace

import train
from notes import _note
from parallel import Mesh

STEPS, PERIOD, OF = 600, 60, 6
SPACINGS = 2, 5, 10, 20                      # steps between an offline average's snapshots, back from the end
APART = "constant, fed back, snapshots a period apart"


def configs():
    """{arm: configuration}: `shakespeare`'s network and optimizer on 460,800 bytes of the default text."""
    base = train.RECIPES["shakespeare"]
    base = replace(base, data=replace(train.RECIPES["laptop"].data, tokenizer="bytes"),
                   tokens=STEPS * base.step_tokens, eval_every=PERIOD, eval_windows=256, save_every=10 ** 9)
    lr = lambda start: dict(optim=replace(base.optim, decay_start=start))
    back = dict(average_every=PERIOD * base.step_tokens, average_of=OF)
    return {"constant": replace(base, **lr(1.0)),
            "decayed": replace(base, **lr(0.7)),
            "constant, fed back": replace(base, **lr(1.0), **back, average_from=0.4),
            "constant, fed back, moments reset": replace(base, **lr(1.0), **back, average_from=0.4,
                                                         average_reset=True),
            APART: replace(base, **lr(1.0)),
            "decayed, fed back in the decay": replace(base, **lr(0.7), **back)}


def cells(quick):
    return [(arm, seed, _note.toy(config) if quick else config)
            for seed in range(1 if quick else 3) for arm, config in configs().items()]


def run(arm, seed, config):
    """Bits/byte of the live weights during training; at the end, of averaged snapshots by spacing."""
    last, ends, weights = {}, collections.deque(maxlen=OF), {}
    last_step = config.total_steps

    def watch(step, model):
        weights["model"] = model
        if any((last_step - step) % s == 0 and (last_step - step) // s < OF for s in SPACINGS):
            last[step] = {name: w.clone() for name, w in model.state_dict().items()}
        if arm == APART and step % PERIOD == 0:                    # the other way to read the report
            ends.append({name: w.clone() for name, w in model.state_dict().items()})
            if len(ends) == OF:
                train.put_back_(model.state_dict(), mean_of(ends))
    for row in _note.trained(config, seed, watch):
        bits = [v for k, v in row.items() if k.startswith("bpb_")]
        if bits:
            yield dict(tokens=row["tokens"], bpb=statistics.mean(bits))
    batches = train.Batches(train.prepare(config.data, config.model.vocab_size),
                            replace(config.data, horizon=config.tokens), seed, config.batch,
                            config.model.context)
    for spacing in SPACINGS:
        steps = [step for step in range(last_step, 0, -spacing) if step in last][:OF]
        train.put_back_(weights["model"].state_dict(), mean_of([last[step] for step in steps]))
        bits = [bits for _, bits in train.evaluate({0: weights["model"]}, batches, config, Mesh()).values()]
        yield dict(spacing=spacing, bpb=statistics.mean(bits))


def mean_of(snapshots):
    mean = {}
    for snapshot in snapshots:
        train.add_snapshot_(mean, snapshot, len(snapshots))
    return mean


def show(rows):
    arms = list(configs())
    live = {arm: [[row["bpb"] for row in some if "tokens" in row][-1]
                  for some in _note.of_arm(rows, arm).values()] for arm in arms}
    mean = {(arm, s): [row["bpb"] for of_seed in _note.of_arm(rows, arm).values() for row in of_seed
                       if row.get("spacing") == s] for arm in arms for s in SPACINGS}
    figure, [(curves, spacing)] = _note.panels(1, 2, width=11, height=4)
    for arm, colour in zip(arms, _note.COLOURS):
        _note.band(curves, [row for row in rows if row.get("tokens")], arm, "tokens", "bpb", color=colour)
        _note.band(spacing, [row for row in rows if "spacing" in row], arm, "spacing", "bpb", color=colour,
                   label=None, marker="o", ms=4)
        spacing.plot([0] * len(live[arm]), live[arm], "x", color=colour)
    curves.set(xlabel="tokens", ylabel="bits/byte, mean of 3 domains", title="live weights",
               ylim=(None, 1.35 * min(min(v) for v in live.values())))
    spacing.set(xlabel="steps between the 6 snapshots (0: live weights)",
                title="their offline average, at the end")
    curves.legend(fontsize=8)
    base, gain = live["constant"], [a - b for a, b in zip(live["constant"], live["decayed"])]
    part = lambda values: _note.spread([(a - b) / g for a, b, g in zip(base, values, gain)], 2)
    return figure, _note.table(
        ("arm", "live, bits/byte", "part of the decay's gain", *(f"average, {s} apart" for s in SPACINGS),
         f"its part of the gain, {SPACINGS[2]} apart"),
        *((arm, _note.spread(live[arm]), part(live[arm]), *(_note.spread(mean[arm, s]) for s in SPACINGS),
           part(mean[arm, SPACINGS[2]])) for arm in arms))


if __name__ == "__main__":
    _note.main("wsd_sma", cells, run, show)
