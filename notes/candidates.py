"""Motif's choices: every candidate against the same base, with AdamW as in Motif, some also with MuonClip."""
import statistics
from dataclasses import replace

import train
from model import ModelConfig, cache_per_token, count_parameters
from notes import _note

STEPS = 800                                                        # of 2,048 bytes
RATES = dict(adamw=(1e-3, 3e-3, 1e-2, 3e-2), muonclip=(3e-3, 1e-2, 3e-2))    # AdamW's last is for nGPT only
BASE = ModelConfig(n_layer=4, n_head=4, n_kv_head=4, d_model=64, d_head=16, d_ff=192, vocab_size=261,
                   context=128, differential=False, act="silu", init_std=0.1)
CHANGES = {"base": {}, "QK-Norm": dict(qk_norm=True), "differential": dict(differential=True),
           "shared K/V": dict(share_kv=2), "nGPT": dict(ngpt=True), "PolyNorm": dict(act="polynorm"),
           "differential + PolyNorm": dict(differential=True, act="polynorm")}
BOTH = "differential + PolyNorm"                                   # what Motif chose
SEEDS = {("base", "adamw"): 5, ("QK-Norm", "adamw"): 3, ("PolyNorm", "adamw"): 5, (BOTH, "adamw"): 3,
         ("differential", "adamw"): 3, ("base", "muonclip"): 3, ("QK-Norm", "muonclip"): 3,
         ("PolyNorm", "muonclip"): 3, (BOTH, "muonclip"): 3}       # MuonClip runs for these arms only
BEST = {"adamw": 3e-3, "muonclip": 1e-2}                           # best rate of every arm with several seeds


def hidden(model):
    counts = count_parameters(model)
    return counts["total"] - counts["embedding"]


def like(base, **changes):
    """`base` with the changes, its feed-forward width adjusted to keep the number of hidden parameters."""
    model = replace(base, **changes)
    a_column = (hidden(replace(model, d_ff=200)) - hidden(replace(model, d_ff=100))) / 100
    return replace(model, d_ff=4 * round((model.d_ff + (hidden(base) - hidden(model)) / a_column) / 4))


def config(changes, lr, rule="adamw", base=BASE, steps=STEPS):
    """Trains on bytes of Python sources. AdamW with the settings of Motif §3.2.2, where the rate is constant
    for the first four fifths of the run. nGPT has no weight decay and no warm-up, and like QK-Norm no
    QK-Clip."""
    model, recipe = like(base, **changes), train.RECIPES["laptop"]
    optim = replace(recipe.optim, name=rule, lr=lr, momentum=0.95, decay="rsqrt", decay_start=0.8, floor=0.25,
                    warmup=0.0 if model.ngpt else 0.02, weight_decay=0.0 if model.ngpt else 0.1,
                    tau=0.0 if rule == "adamw" or model.ngpt or model.qk_norm else 100.0)
    return replace(recipe, model=model, optim=optim, batch=16, micro=16, tokens=steps * 16 * model.context,
                   eval_every=100, eval_windows=512, save_every=10 ** 9,
                   data=replace(recipe.data, domains="code:1:1", tokenizer="bytes"))


def name(arm, rule, lr):
    return f"{arm}, {dict(adamw='AdamW', muonclip='MuonClip')[rule]}, {lr:g}"


def cells(quick):
    grid = [(arm, rule, lr, 0) for rule in RATES for lr in RATES[rule] for arm in CHANGES
            if (arm == "nGPT" or lr < 3e-2 if rule == "adamw" else (arm, rule) in SEEDS)]
    if quick:
        return [(name(arm, rule, lr), 0, _note.toy(config(CHANGES[arm], lr, rule)))
                for arm, rule, lr, _ in grid if lr == BEST[rule]]
    grid += [(arm, rule, BEST[rule], seed) for (arm, rule), n in SEEDS.items() for seed in range(1, n)]
    runs = [(name(arm, rule, lr), seed, config(CHANGES[arm], lr, rule)) for arm, rule, lr, seed in grid]
    return runs + _note.speed_cells({
        name(arm, rule, 3e-3): config(CHANGES[arm], 3e-3, rule) for arm in CHANGES
        for rule in RATES if rule == "adamw" or (arm, rule) in SEEDS})


def run(arm, seed, config):
    yield from (_note.timed if arm.startswith(_note.SPEED) else _note.history)(arm, seed, config)


def show(rows):
    ends = {}                                                      # {(arm, rule): {rate: {seed: bits/byte}}}
    for arm in CHANGES:
        for rule in RATES:
            for lr in RATES[rule]:
                seeds = _note.of_arm(rows, name(arm, rule, lr))
                found = {seed: some[-1]["bpb"] for seed, some in seeds.items()}
                if found:
                    ends.setdefault((arm, rule), {})[lr] = found
    best = {cell: min(of_rate, key=lambda lr: of_rate[lr][0]) for cell, of_rate in ends.items()}
    more = {cell: [100 * (bits / ends["base", cell[1]][best["base", cell[1]]][seed] - 1)
                   for seed, bits in ends[cell][best[cell]].items()] for cell in ends}

    figure, [(rates, beside)] = _note.panels(1, 2, width=12, height=4.2)
    for (arm, rule), colour in zip([cell for cell in ends if cell[1] == "adamw"], _note.COLOURS):
        rates.plot(list(ends[arm, rule]), [of_seed[0] for of_seed in ends[arm, rule].values()], "o-", ms=4,
                   color=colour, label=arm)
    rates.set(xscale="log", xlabel="learning rate", title="AdamW, seed 0: bits/byte", xticks=RATES["adamw"],
              xticklabels=[f"{lr:g}" for lr in RATES["adamw"]])
    rates.minorticks_off()
    rates.legend()
    for i, arm in enumerate(CHANGES):
        for j, rule in enumerate(RATES):
            if (arm, rule) in more and arm != "base":
                beside.plot(more[arm, rule], [-i + 0.15 - 0.3 * j] * len(more[arm, rule]), "os"[j], ms=5,
                            color=_note.COLOURS[j], alpha=0.8)
    for j, label in enumerate(("AdamW", "MuonClip")):
        beside.plot([], [], "os"[j], color=_note.COLOURS[j], label=label)
    beside.axvline(0, color="0.4", lw=0.8)
    beside.set(title="bits/byte beside base, %, each seed", yticks=[-i for i in range(1, len(CHANGES))],
               yticklabels=list(CHANGES)[1:])
    beside.legend()

    base = config({}, 1e-3).model
    lines = []
    for rule, label in (("adamw", "AdamW"), ("muonclip", "MuonClip")):
        lines += ["", *_note.table(
            (label, *(f"seed 0, rate {lr:g}" for lr in RATES[rule]), "at the best, all seeds",
             "beside base, %, same seeds", "hidden parameters", "KV cache", "tokens/s, beside"),
            *((arm, *(f"{of_rate[lr][0]:.3f}" if lr in of_rate else "–" for lr in RATES[rule]),
               _note.spread(list(of_rate[best[arm, rule]].values())),
               "–" if arm == "base" else _note.spread(more[arm, rule], 2), f"{hidden(model):,}",
               f"{cache_per_token(model) / cache_per_token(base):.2f}",
               _note.pace(rows, name(arm, rule, 3e-3), name("base", "adamw", 3e-3)))
              for (arm, r), of_rate in ends.items() if r == rule
              for model in (like(base, **CHANGES[arm]),)))]
    of_base = list(ends["base", "adamw"][best["base", "adamw"]].values())
    deviation = 100 * statistics.stdev(of_base) / statistics.mean(of_base) if len(of_base) > 1 else 0.0
    pairs = [values for (arm, _), values in more.items() if arm != "base" and len(values) > 1]
    pooled = (sum((len(v) - 1) * statistics.variance(v) for v in pairs)
              / max(1, sum(len(v) - 1 for v in pairs))) ** 0.5
    lines += ["", f"Standard deviation of base with AdamW over {len(of_base)} seeds: {deviation:.2f}%; "
              f"of differences at the same seed, pooled over all arms: {pooled:.2f}%, so that two standard "
              f"errors of a mean of three seeds are {2 * pooled / 3 ** 0.5:.1f}%, "
              f"of five {2 * pooled / 5 ** 0.5:.1f}%."]
    return figure, lines[1:]


if __name__ == "__main__":
    _note.main("candidates", cells, run, show)
