"""Motif's block with MuonClip against GPT-2's block with AdamW: tokens to the same bits/byte."""
import statistics
from dataclasses import replace

import train
from model import count_parameters, flops_per_token
from notes import _note

BUDGET = 950_000
RATES = 3e-4, 1e-3, 3e-3
PARTS = 1.0, 0.5, 0.35, 0.25
SEEDED = "gpt2, lr 0.001", "laptop, 50%", "laptop, 35%", "laptop, 25%"


def configs():
    """{arm: configuration}. The control has as many hidden parameters (d_ff 576), three learning rates and
    the whole budget; `laptop` gets fractions of the budget, with its schedules shortened to match."""
    gpt2, laptop = train.RECIPES["gpt2"], train.RECIPES["laptop"]
    gpt2 = replace(gpt2, model=replace(gpt2.model, d_ff=576), tokens=BUDGET)
    arms = {f"gpt2, lr {lr:g}": replace(gpt2, optim=replace(gpt2.optim, lr=lr)) for lr in RATES}
    arms |= {f"laptop, {part:.0%}": replace(laptop, tokens=round(part * BUDGET)) for part in PARTS}
    return {arm: replace(c, eval_every=60, eval_windows=64, save_every=10 ** 9) for arm, c in arms.items()}


def cells(quick):
    return [(arm, seed, _note.toy(config) if quick else config) for seed in range(1 if quick else 3)
            for arm, config in configs().items() if not seed or arm in SEEDED]


def hidden(config):
    counts = count_parameters(config.model)
    return counts["total"] - counts["embedding"]


def pace(ends, network):
    """Seconds of training per token in the least disturbed of all runs with this network."""
    return min(row["seconds"] / row["tokens"] for arm, found in ends.items() if arm.startswith(network)
               for row in found)


def show(rows):
    arms = configs()
    ends = {arm: [of_seed[-1] for of_seed in _note.of_arm(rows, arm).values()] for arm in arms}
    ends = {arm: found for arm, found in ends.items() if found}
    bits = {arm: statistics.median(row["bpb"] for row in found) for arm, found in ends.items()}
    control = min((arm for arm in bits if arm.startswith("gpt2")), key=bits.get)
    figure, [(axis, bars)] = _note.panels(1, 2)
    for arm in (control, *(arm for arm in ends if arm.startswith("laptop"))):
        _note.band(axis, [row for row in rows if row["tokens"]], arm, "tokens", "bpb")
    _note.reported(axis, bits[control], "where the control ends")
    axis.set(xlabel="tokens", ylabel="bits/byte, mean of 3 domains", ylim=(None, 1.3 * bits[control]))
    axis.legend()

    tokens = {arm: found[0]["tokens"] for arm, found in ends.items()}
    costs = {"tokens": tokens,
             "FLOPs": {arm: n * flops_per_token(arms[arm].model) for arm, n in tokens.items()},
             "time": {arm: n * pace(ends, arm.split(",")[0]) for arm, n in tokens.items()}}
    for i, arm in enumerate(arm for arm in ends if arm.startswith("laptop")):
        bars.bar([j + 0.2 * (i - 1.5) for j in range(3)], [of[arm] / of[control] for of in costs.values()],
                 0.18, color=_note.COLOURS[i + 1], label=f"{arm}: {bits[arm]:.3f} bits/byte")
    bars.axhline(0.5, color="0.4", ls=":", lw=1.5)
    bars.set(xticks=range(3), xticklabels=costs, ylabel=f"beside {control}: {bits[control]:.3f}",
             ylim=(0, 1.75))
    bars.legend()
    return figure, _note.table(
        ("arm", "hidden parameters", "bits/byte", *(f"{what}, beside" for what in costs),
         "seconds at its best pace"),
        *((arm, f"{hidden(arms[arm]):,}", _note.spread([row["bpb"] for row in found]),
           *(f"{of[arm] / of[control]:.2f}" for of in costs.values()), f"{costs['time'][arm]:.0f}")
          for arm, found in ends.items()))


if __name__ == "__main__":
    _note.main("recipe", cells, _note.history, show)
