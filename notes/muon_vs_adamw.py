"""Muon against AdamW: tokens, FLOPs and time to the same loss, with both rates tuned on the same grid."""
import statistics
from dataclasses import replace

import train
from model import flops_per_token
from notes import _note

RATES = 1e-3, 3e-3, 1e-2, 3e-2
STEPS = 400
SHORTER = 300, 200, 150, 100     # shorter complete runs of Muon at its best rate


def config(rule, lr, steps=STEPS):
    """The same network (`shakespeare`'s), schedule and weight decay for both, on bytes of the default
    text."""
    base = train.RECIPES["shakespeare"]
    return replace(base, data=replace(train.RECIPES["laptop"].data, tokenizer="bytes"),
                   tokens=steps * base.step_tokens, eval_every=100, eval_windows=256, save_every=10 ** 9,
                   optim=replace(base.optim, name=rule, lr=lr, momentum=0.95, weight_decay=0.1, warmup=0.05,
                                 decay_start=0.3, tau=0))


def name(rule, lr, steps=STEPS):
    shorter = f", {steps} steps" if steps != STEPS else ""
    return f"{dict(adamw='AdamW', muonclip='Muon')[rule]}, lr {lr:g}{shorter}"


BEST = 1e-2                      # Muon's best rate by the grid, which the shorter arms need in advance
ARMS = {name(rule, lr): config(rule, lr) for lr in RATES for rule in ("adamw", "muonclip")} | {
    name("muonclip", BEST, steps): config("muonclip", BEST, steps) for steps in SHORTER}


SEEDED = [name("adamw", 1e-3), name("adamw", 3e-3), name("adamw", 1e-2), name("muonclip", BEST),
          *(name("muonclip", BEST, steps) for steps in SHORTER)]


def cells(quick):
    return [(arm, seed, _note.toy(c) if quick else c)
            for seed in range(1 if quick else 3) for arm, c in ARMS.items() if not seed or arm in SEEDED]


def show(rows):
    ends = {arm: [of_seed[-1] for of_seed in _note.of_arm(rows, arm).values()] for arm in ARMS}
    bits = {arm: statistics.median(row["bpb"] for row in found) for arm, found in ends.items()}
    whole = [arm for arm in ARMS if "steps" not in arm]
    best = {rule: min((arm for arm in whole if arm.startswith(rule)), key=bits.get)
            for rule in ("AdamW", "Muon")}
    figure, [(rates, curves)] = _note.panels(1, 2)
    for rule, colour in zip(best, _note.COLOURS):
        some = [row | dict(arm=rule, lr=ARMS[arm].optim.lr) for arm in whole if arm.startswith(rule)
                for row in ends[arm]]
        _note.band(rates, some, rule, "lr", "bpb", color=colour, marker="o", ms=4)
        _note.band(curves, [row for row in rows if row["tokens"]], best[rule], "tokens", "bpb", color=colour)
    budgets = [row | dict(arm="Muon, decayed in so many")
               for arm in ARMS if "steps" in arm or arm == best["Muon"] for row in ends[arm]]
    _note.band(curves, budgets, "Muon, decayed in so many", "tokens", "bpb", color=_note.COLOURS[2],
               marker="o", ms=4)
    _note.reported(curves, bits[best["AdamW"]], "where AdamW ends")
    rates.set(xscale="log", xlabel="learning rate", ylabel="bits/byte at the end")
    curves.set(xlabel="tokens", ylabel="bits/byte, mean of 3 domains")
    rates.legend()
    curves.legend()
    flops = {arm: found[0]["tokens"] * flops_per_token(ARMS[arm].model) for arm, found in ends.items()}
    time = {arm: min(row["seconds"] for row in found) for arm, found in ends.items()}      # least disturbed
    base = best["AdamW"]
    path = sorted((flops[arm], bits[arm]) for arm in ARMS if "steps" in arm or arm == best["Muon"])
    for (x0, y0), (x1, y1) in zip(path, path[1:]):                 # where decayed Muon reaches AdamW's end
        if y1 <= bits[base] <= y0:
            need = (x0 + (y0 - bits[base]) / (y0 - y1) * (x1 - x0)) / flops[base]
            curves.annotate(f"{need:.2f} of the tokens\n(Moonlight: 0.52)", xytext=(0.03, 0.06),
                            xy=(need * ends[base][0]["tokens"], bits[base]), textcoords="axes fraction",
                            arrowprops=dict(arrowstyle="->"))
    return figure, _note.table(
        ("arm", "bits/byte", "FLOPs, beside", "seconds, best of seeds", "time, beside"),
        *((f"**{arm}**" if arm in best.values() else arm, _note.spread([row["bpb"] for row in ends[arm]]),
           f"{flops[arm] / flops[base]:.2f}", f"{time[arm]:.1f}", f"{time[arm] / time[base]:.2f}")
          for arm in ARMS))


if __name__ == "__main__":
    _note.main("muon_vs_adamw", cells, _note.history, show)
