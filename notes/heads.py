"""Heads: what does doubling their number cost at long context, and what does it buy?"""
import statistics
from dataclasses import replace

import train
from model import PRESETS, count_parameters, flops_per_token
from notes import _note

CONTEXTS = 4096, 8192, 16_384, 32_768, 65_536, 131_072
STEPS = 400, 1000
K2 = PRESETS["kimi-k2"]


def projections(c):
    """Attention parameters that scale with the number of heads."""
    return c.n_layer * c.n_head * (c.q_rank * (c.d_head + c.d_rope) + c.kv_rank * (c.d_head + c.d_value)
                                   + c.d_value * c.d_model)


def accountings(c, T):
    """FLOPs of a token at context T under several ways of counting. The report does not say which it used."""
    N = count_parameters(c)["matmul"]
    base = 32.6e9 + projections(c) - projections(K2)               # reported active parameters, with 64 heads
    per = c.n_layer * T * c.n_head
    exact, absorbed = c.d_head + c.d_rope + c.d_value, 2 * c.kv_rank + c.d_rope
    return {"A: 2·N + 4·L·T·H·128, N = 32.6B and the projections of more heads": 2 * base + 4 * per * 128,
            "B: 2·32.6B + 2·L·T·H·320, projections not counted": 2 * 32.6e9 + 2 * per * exact,
            "C: 2·N + 4·L·T·H·128, N counted from the configuration": 2 * N + 4 * per * 128,
            "D: 2·N + 2·L·T·H·320, every multiplication, decoding at T":
                flops_per_token(c, T, training=False),
            "E: as D, the mean over a causal prefill": 2 * N + per * exact,
            "F: absorbed decoding at T, 2·L·T·H·1088": 2 * N + 2 * per * absorbed,
            "G: as F, the mean over T": 2 * N + per * absorbed}


def more(how, T):
    """The extra cost of 128 heads over 64, in percent, by that way of counting."""
    few, many = (accountings(replace(K2, n_head=h, n_kv_head=h), T)[how] for h in (64, 128))
    return 100 * (many / few - 1)


def config(heads, steps):
    """laptop-k2's block at width 64, four layers, on bytes."""
    base = train.RECIPES["laptop-k2"]
    model = replace(base.model, d_model=64, n_head=heads, n_kv_head=heads, d_head=12, d_rope=4, d_value=16,
                    q_rank=32, kv_rank=16, d_ff=192, d_expert=64, vocab_size=261, context=128)
    return replace(base, model=model, batch=32, micro=32, tokens=steps * 32 * 128, eval_every=10 ** 9,
                   eval_windows=512, data=replace(base.data, domains="code:1:1", tokenizer="bytes"))


def cells(quick):
    runs = [(f"4 heads, {STEPS[0]} steps", seed, config(4, STEPS[0])) for seed in range(3, 5)]
    runs += [(f"{heads} heads, {steps} steps", seed, config(heads, steps))
             for seed in range(3) for steps in STEPS for heads in (4, 8)]
    runs = runs[2:6] if quick else runs
    return [(arm, seed, replace(c, model=replace(c.model, n_layer=2, context=32), batch=4, micro=4,
                                tokens=4 * 128, eval_windows=2)) for arm, seed, c in runs] if quick else runs


def run(arm, seed, config):
    last = _note.trained(config, seed)[-1]
    yield dict(heads=config.model.n_head, tokens=config.tokens, val=last["val_code"],
               flops=flops_per_token(config.model), parameters=count_parameters(config.model)["total"])


def show(rows):
    figure, [(costs, gain)] = _note.panels(1, 2, width=11, height=3.8)
    hows = list(accountings(K2, 4096))
    for how, colour in zip(hows, _note.COLOURS):
        costs.plot(CONTEXTS, [more(how, T) for T in CONTEXTS], label=how.split(",")[0], color=colour)
    _note.reported(costs, 83, "reported at 128k")
    costs.set(xscale="log", title="128 heads over 64, Kimi K2: FLOPs, +%", xlabel="context", ylim=(0, 100),
              xticks=CONTEXTS, xticklabels=[f"{T // 1024}k" for T in CONTEXTS])
    costs.minorticks_off()
    costs.legend(fontsize=7)
    gains = {}
    for i, steps in enumerate(STEPS):
        few, many = ({row["seed"]: row["val"] for row in rows if row["arm"] == f"{h} heads, {steps} steps"}
                     for h in (4, 8))
        gains[steps] = [100 * (few[seed] - many[seed]) / few[seed] for seed in few if seed in many]
        gain.plot([i] * len(gains[steps]), gains[steps], "o", color=_note.COLOURS[i])
    gain.axhspan(0.5, 1.2, color="0.85", label="reported: 0.5–1.2%")
    gain.axhline(0, color="0.4", lw=0.8)
    gain.set(title="loss lower with twice the heads, %, each seed", xticks=range(len(STEPS)),
             xlim=(-0.5, 1.5), xticklabels=[f"{steps * 4096 / 1e6:.1f}M bytes" for steps in STEPS])
    gain.legend()
    of = lambda arm, name: [row[name] for row in rows if row["arm"] == arm]
    lines = _note.table(("how FLOPs are counted", *(f"{T // 1024}k" for T in CONTEXTS), "128,000"),
                        *((how, *(f"{more(how, T):.0f}%" for T in CONTEXTS), f"{more(how, 128_000):.2f}%")
                          for how in hows))
    few, many = (accountings(replace(K2, n_head=h, n_kv_head=h), 131_072)[hows[0]] for h in (64, 128))
    lines += ["", f"By A, a token at 131,072 costs {few / 1e9:.0f} GFLOP with 64 heads and "
              f"{many / 1e9:.0f} with 128.", ""]
    table = [("bytes", "4 heads: nats/byte", "8 heads", "lower by, %, median (all seeds)",
              "standard deviation of 4 heads, %", "parameters")]
    for steps in STEPS:
        few, many = (of(f"{h} heads, {steps} steps", "val") for h in (4, 8))
        sizes = (of(f"{h} heads, {steps} steps", "parameters")[0] for h in (4, 8))
        table.append((f"{steps * 4096 / 1e6:.1f}M", _note.spread(few, 4), _note.spread(many, 4),
                      _note.spread(gains[steps], 2),
                      f"{100 * statistics.pstdev(few) / statistics.mean(few):.2f}",
                      " / ".join(f"{size:,.0f}" for size in sizes)))
    lines += _note.table(*table)
    return figure, lines


if __name__ == "__main__":
    _note.main("heads", cells, run, show)
