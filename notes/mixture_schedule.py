"""A data mixture that shifts during training (Motif §3.2.1) against a fixed and an abrupt one, at equal
totals.
"""
import statistics
from dataclasses import replace

import numpy as np

import data
import train
from notes import _note

NAMES = "prose", "code", "math"
START, END = (0.70, 0.20, 0.10), (0.20, 0.50, 0.30)
MEAN = tuple((a + b) / 2 for a, b in zip(START, END))


class Abrupt(data.Mixture):
    """The start weights for the first half of the horizon, then the end weights."""

    def integral(self, t):
        t = np.asarray(t, np.float64)[..., None]
        early = np.minimum(t, self.horizon / 2)
        return self.start * early + self.end * (t - early)

    def due(self, j):
        whole = self.start * self.horizon / 2
        late = self.horizon / 2 + (j + 0.5 - whole) / self.end
        return np.where(j + 0.5 <= whole, (j + 0.5) / self.start, late)


def configs():
    """{arm: configuration}: in total each sees 45% prose, 35% code and 20% math; only the timing differs."""
    base = train.RECIPES["shakespeare"]
    base = replace(base, tokens=500 * base.step_tokens, eval_every=50, eval_windows=256, save_every=10 ** 9)
    mix = lambda start, end: replace(base, data=replace(
        train.RECIPES["laptop"].data, tokenizer="bytes", horizon=base.tokens,
        domains=",".join(f"{name}:{a:g}:{b:g}" for name, a, b in zip(NAMES, start, end))))
    return {"fixed": mix(MEAN, MEAN), "linear": mix(START, END), "abrupt": mix(START, END),
            "linear, the other way": mix(END, START)}


def cells(quick):
    return [(arm, seed, _note.toy(config) if quick else config)
            for seed in range(1 if quick else 3) for arm, config in configs().items()]


def run(arm, seed, config):
    plain = data.Mixture
    data.Mixture = Abrupt if arm == "abrupt" else plain
    try:
        yield from list(_note.history(arm, seed, config))
    finally:
        data.Mixture = plain


def show(rows):
    arms, keys = list(configs()), ("bpb", *(f"bpb_{name}" for name in NAMES))
    figure, axes = _note.panels(1, 4, width=13, height=3.4)
    for axis, key, title in zip(axes[0], keys, ("mean of the domains", *NAMES)):
        for arm, colour in zip(arms, _note.COLOURS):
            _note.band(axis, [row for row in rows if row["tokens"]], arm, "tokens", key, color=colour)
        last = [of_seed[-1][key] for arm in arms for of_seed in _note.of_arm(rows, arm).values()]
        axis.set(title=title, xlabel="tokens", ylim=(0.97 * min(last), 1.6 * max(last)))
    axes[0, 0].set(ylabel="bits/byte")
    axes[0, 0].legend(fontsize=8)
    ends = {arm: [of_seed[-1] for of_seed in _note.of_arm(rows, arm).values()] for arm in arms}
    weighted = lambda row, weights: sum(w * row[f"bpb_{name}"] for w, name in zip(weights, NAMES))
    return figure, _note.table(
        ("arm", *NAMES, "mean of the domains", "in the mean mixture"),
        *((arm, *(_note.spread([row[f"bpb_{name}"] for row in ends[arm]]) for name in NAMES),
           _note.spread([statistics.mean(row[f"bpb_{name}"] for name in NAMES) for row in ends[arm]]),
           _note.spread([weighted(row, MEAN) for row in ends[arm]])) for arm in arms))


if __name__ == "__main__":
    _note.main("mixture_schedule", cells, run, show)
