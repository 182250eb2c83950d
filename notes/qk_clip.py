"""QK-Clip: do logits explode, does the clip contain them, does it become inactive, does it cost anything?"""
import statistics
from dataclasses import replace

import torch

import train
from notes import _note

TAUS = 30.0, 15.0, 5.0


def configs():
    """{arm: configuration}: bytes of the default text, plain attention, a rate at which logits explode."""
    base = train.RECIPES["shakespeare"]
    base = replace(base, data=replace(train.RECIPES["laptop"].data, tokenizer="bytes"),
                   model=replace(base.model, differential=False), tokens=400 * base.step_tokens,
                   eval_every=400, eval_windows=256, save_every=10 ** 9)
    muon = replace(base, optim=replace(base.optim, lr=2e-2, momentum=0.95, decay_start=0.5, weight_decay=0.1,
                                       tau=0, exact_logits=True))
    adamw = replace(muon, optim=replace(muon.optim, name="adamw", lr=3e-3, warmup=0.05))
    return {"AdamW": adamw, "Muon": muon} | {
        f"MuonClip, τ = {tau:g}": replace(muon, optim=replace(muon.optim, tau=tau)) for tau in TAUS}


def cells(quick):
    return [(arm, seed, _note.toy(config) if quick else config)
            for seed in range(1 if quick else 3) for arm, config in configs().items()]


def run(arm, seed, config):
    """The largest logit of each head every 8th step; at the end, validation loss and clip statistics."""
    heads = []
    history = _note.trained(config, seed, watch=lambda step, model: heads.append(
        torch.cat([attention.max_logits for attention in model.attentions().values()])))
    largest, tau = torch.stack(heads), config.optim.tau                                    # (steps, heads)
    for step in range(0, len(largest), 8):
        yield dict(step=step + 1, loss=history[step + 1]["loss"],
                   **{f"head_{i}": v for i, v in enumerate(largest[step].tolist())})
    last = history[-1]
    over = largest > tau if tau else torch.zeros_like(largest, dtype=torch.bool)
    yield dict(peak=largest.max().item(), ever=over.any(0).double().mean().item(), clips=over.sum().item(),
               last_clip=(over.any(1).nonzero().max().item() + 1 if over.any() else 0) / len(largest),
               val=statistics.mean(v for k, v in last.items() if k.startswith("val_")),
               train_end=statistics.mean(row["loss"] for row in history[1:][-20:]))


def show(rows):
    heads = [key for key in rows[0] if key.startswith("head_")]
    rows = [row | dict(largest=max(row[h] for h in heads), calm=statistics.median(row[h] for h in heads))
            if "step" in row else row for row in rows]
    arms = list(configs())
    figure, [(logits, each, loss)] = _note.panels(1, 3, width=13, height=3.8)
    for arm, colour in zip(arms, _note.COLOURS):
        _note.band(logits, rows, arm, "step", "largest", color=colour)
        _note.band(logits, rows, arm, "step", "calm", color=colour, ls=":", label=None)
        _note.band(loss, rows, arm, "step", "loss", color=colour)
    for arm, colour in ((arms[1], _note.COLOURS[1]), (arms[-1], _note.COLOURS[len(arms) - 1])):
        some = [row for row in _note.of_arm(rows, arm)[0] if "step" in row]
        for h in heads:
            each.plot([row["step"] for row in some], [row[h] for row in some], color=colour, lw=0.8,
                      label=arm if h == heads[0] else None)
    for tau in TAUS:
        logits.axhline(tau, color="0.4", ls="--", lw=0.8)
    each.axhline(TAUS[-1], color="0.4", ls="--", lw=0.8)
    logits.set(title="largest logit (dotted: median head)", xlabel="step")
    each.set(title="each head, seed 0", xlabel="step", ylim=(2, None))
    _note.log_y(logits)
    _note.log_y(each)
    loss.set(title="training loss", xlabel="step", ylabel="nats/byte", ylim=(1, 3.5))
    loss.legend()
    each.legend()
    ends = {arm: [of_seed[-1] for of_seed in _note.of_arm(rows, arm).values()] for arm in arms}
    take = lambda arm, key, digits=3: _note.spread([row[key] for row in ends[arm]], digits)
    return figure, _note.table(
        ("arm", "largest logit of the run", "heads ever clipped", "last clip, part of the run",
         "validation, nats/byte", "training, last 20 steps"),
        *((arm, take(arm, "peak", 1), take(arm, "ever", 2), take(arm, "last_clip", 2), take(arm, "val"),
           take(arm, "train_end")) for arm in arms))


if __name__ == "__main__":
    _note.main("qk_clip", cells, run, show)
