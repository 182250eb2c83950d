"""Sparsity: more experts at the same number of active ones. How many FLOPs does it save, and at what price?
"""
import math
import statistics
from dataclasses import replace

import train
from model import PRESETS, count_parameters, flops_per_token
from notes import _note

SPARSITY = 2, 8, 32                                                # experts / active ones, as in the report
BUDGETS = (48, 300), (64, 600), (96, 1000)                         # width, steps of 4,096 bytes
REPORTED = {8: 1.69, 16: 1.39, 32: 1.15}                           # FLOPs at loss 1.5 over those at S = 48


def config(width, steps, sparsity, n_dense=1, lr=1e-2):
    """Four layers; a token uses two experts and a shared one, each as wide as the model."""
    base = train.RECIPES["laptop-k2"]
    model = replace(base.model, d_model=width, n_head=width // 16, n_kv_head=width // 16, d_head=16, q_rank=0,
                    kv_rank=0, d_rope=0, d_value=0, d_ff=3 * width, d_expert=width, n_expert=2 * sparsity,
                    n_active=2, n_dense=n_dense, vocab_size=261, context=128)
    return replace(base, model=model, batch=32, micro=32, tokens=steps * 32 * 128, eval_every=10 ** 9,
                   eval_windows=512, data=replace(base.data, domains="code:1:1", tokenizer="bytes"),
                   optim=replace(base.optim, lr=lr))


def cells(quick):
    middle = BUDGETS[1]
    runs = [(f"S = {s}", seed, config(*middle, s)) for s in SPARSITY for seed in range(5 if s == 8 else 3)]
    runs += [(f"S = {s}, width {budget[0]}", 0, config(*budget, s)) for budget in (BUDGETS[0], BUDGETS[2])
             for s in SPARSITY]
    runs += [("S = 8, three dense", seed, config(*middle, 8, n_dense=3)) for seed in range(3)]
    runs += [(f"S = {s}, rate {lr:g}", 0, config(*middle, s, lr=lr)) for s in (2, 32) for lr in (5e-3, 2e-2)]
    if not quick:
        return runs + [(f"speed, S = {s}", 0, replace(config(*BUDGETS[2], s), tokens=12 * 4096))
                       for s in SPARSITY]
    small = dict(d_model=16, n_head=2, n_kv_head=2, d_head=8, d_expert=8, context=32)
    return [(arm, seed, replace(c, model=replace(c.model, **small), batch=4, micro=4, tokens=6 * 128,
                                eval_windows=2)) for arm, seed, c in runs if seed == 0]


def run(arm, seed, config):
    rows = _note.trained(config, seed)
    last = rows[-1]
    counts, late = count_parameters(config.model), rows[1:][len(rows) // 2:]
    yield dict(sparsity=config.model.n_expert / config.model.n_active, width=config.model.d_model,
               lr=config.optim.lr, flops=flops_per_token(config.model) * config.tokens, tokens=config.tokens,
               parameters=counts["total"], val=last["val_code"],
               load=statistics.mean(row["load"] for row in late),
               tokens_per_s=statistics.median(row["tokens_per_s"] for row in rows[2:]))


def flops_at(points, loss):
    """FLOPs to reach a loss: ln C as a parabola in ln L through the three budgets' points [(C, L)]. A power
    law, which is a straight line there, misses the middle point by 0.03 nats."""
    x = math.log(loss)
    xs, ys = zip(*((math.log(l), math.log(c)) for c, l in points))
    return math.exp(sum(y * math.prod((x - other) / (at - other) for other in xs if other != at)
                        for at, y in zip(xs, ys)))


def cost(sparsity):
    """Kimi K2 with 8·sparsity experts, 8 of them active → (parameters, active parameters, GB per GPU of bf16
    weights and float32 gradients on 256 GPUs: 16 stages of 16 expert ranks that replicate all non-experts)"""
    c = replace(PRESETS["kimi-k2"], n_expert=8 * sparsity)
    counts = count_parameters(c)
    experts = (c.n_layer - c.n_dense) * c.n_expert * 3 * c.d_model * c.d_expert
    return counts["total"], counts["active"], 6 * (experts / 256 + (counts["total"] - experts) / 16) / 1e9


def show(rows):
    of = lambda arm: [row for row in rows if row["arm"] == arm]
    curves = {s: [(statistics.mean(row["flops"] for row in some), statistics.mean(row["val"] for row in some))
                  for some in (of(f"S = {s}, width {BUDGETS[0][0]}"), of(f"S = {s}"),
                               of(f"S = {s}, width {BUDGETS[2][0]}"))]
              for s in SPARSITY}
    loss = curves[8][1][1]                                         # that of the middle budget at S = 8
    need = {s: flops_at(points, loss) for s, points in curves.items()}
    figure, [(law, balance)] = _note.panels(1, 2, width=11, height=3.8)
    for s, colour in zip(SPARSITY, _note.COLOURS):
        for row in rows:
            if row["arm"] in (f"S = {s}", *(f"S = {s}, width {w}" for w, _ in BUDGETS)):
                law.plot(row["flops"], row["val"], "o", ms=4, color=colour)
        low, high = curves[s][-1][1], curves[s][0][1]
        losses = [low + (high - low) * i / 50 for i in range(51)]
        law.plot([flops_at(curves[s], l) for l in losses], losses, color=colour, label=f"sparsity {s}")
        some = [row for row in rows
                if row["arm"] in (f"S = {s}", *(f"S = {s}, width {w}" for w, _ in BUDGETS))]
        balance.plot([row["width"] for row in some], [row["load"] for row in some], "o", color=colour,
                     label=f"sparsity {s}")
    _note.reported(law, loss, None)
    law.set(xscale="log", title="validation loss (nats/byte), interpolated", xlabel="training FLOPs",
            xticks=[1e12, 2e12, 5e12, 1e13], xticklabels=["1e12", "2e12", "5e12", "1e13"])
    law.minorticks_off()
    law.legend()
    balance.set(title="busiest expert's load over the mean, second half", xlabel="width", ylim=(0, None),
                xticks=[width for width, _ in BUDGETS])
    balance.legend()
    take = lambda arm, name, digits=3: _note.spread([row[name] for row in of(arm)], digits)
    lines = _note.table(
        ("sparsity", "experts", *(f"loss, width {w}" for w, _ in BUDGETS), "parameters at the middle", "load",
         f"FLOPs for a loss of {loss:.3f}, over those of 32", "tokens/s, width 96"),
        *((s, 2 * s, take(f"S = {s}, width {BUDGETS[0][0]}", "val"), take(f"S = {s}", "val"),
           take(f"S = {s}, width {BUDGETS[2][0]}", "val"), f"{of(f'S = {s}')[0]['parameters']:,.0f}",
           take(f"S = {s}", "load", 1), f"{need[s] / need[32]:.2f}",
           f"{speed[0]['tokens_per_s']:,.0f}" if (speed := of(f"speed, S = {s}")) else "not yet measured")
          for s in SPARSITY))
    lines += ["", *_note.table(("at width 64", "loss"), ("one dense layer, S = 8", take("S = 8", "val")),
                               ("three dense layers, S = 8", take("S = 8, three dense", "val")),
                               *((f"rate {lr:g}, S = {s}", take(f"S = {s}, rate {lr:g}", "val"))
                                 for s in (2, 32) for lr in (5e-3, 2e-2)))]
    lines += ["", *_note.table(("Kimi K2 with sparsity", "experts", "parameters", "active",
                                "GB a GPU: weights, gradients", "the report's FLOPs, over those of 48"),
                               *((s, 8 * s, f"{total / 1e9:,.0f}B", f"{active / 1e9:.1f}B", f"{size:.1f}",
                                  REPORTED.get(s, "1" if s == 48 else "–"))
                                 for s in (8, 16, 32, 48, 64) for total, active, size in (cost(s),)))]
    return figure, lines


if __name__ == "__main__":
    _note.main("sparsity", cells, run, show)
