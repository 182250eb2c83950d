"""Why does Muon make attention logits explode? AdamW against Muon: same start, same data, same update RMS.

  python muonclip.py        # or python -m notes.appendix_e: three minutes on two cores
"""
import math
import statistics
from dataclasses import dataclass, replace

import torch

import muonclip
import train
from data import Batches, prepare
from model import ModelConfig, Transformer
from notes import _note

ARMS = "AdamW", "Muon"
HIGH = {arm: f"{arm}, lr 0.01" for arm in ARMS}
TOP = 8                          # leading singular pairs of a weight that are tracked


@dataclass(frozen=True)
class Setting:
    model: ModelConfig = ModelConfig(differential=False, d_ff=256, context=64, vocab_size=261, act="silu",
                                     init_std=0.05, zero_out=False)
    data: train.DataConfig = train.DataConfig(tokenizer="bytes", horizon=10 ** 9)
    lr: float = 3e-3
    rms: float = 0.2
    batch: int = 12
    steps: int = 300
    every: int = 10


def cells(quick):
    setting = Setting()
    if quick:
        toy = _note.toy(replace(train.RECIPES["laptop"], model=setting.model))
        setting = replace(setting, model=toy.model, data=replace(toy.data, horizon=10 ** 9), batch=4,
                          steps=12, every=4)
    return [(arm, seed, setting) for seed in range(1 if quick else 3) for arm in ARMS] + [
        (HIGH[arm], 0, replace(setting, lr=1e-2)) for arm in ARMS]


# ---- what is measured --------------------------------------------------------------------------------------

def svd_entropy(s):
    """H = −(1/log n)·Σ pᵢ log pᵢ with pᵢ = sᵢ²/Σs²; 1 where all s (n,) are equal.   [Moonlight §3.4]"""
    p = s.square() / s.square().sum()
    return torch.special.entr(p).sum().item() / math.log(len(s))


@torch.no_grad()
def measure(model, updates, by_head):
    """Spectra of weights and updates, averaged over matrices or heads.  updates: {name: −ΔW at RMS 0.2}"""
    weights = dict(model.named_parameters())
    spectra = {name: torch.linalg.svd(weights[name].detach(), full_matrices=False) for name in updates}
    of_update = {name: torch.linalg.svdvals(update) for name, update in updates.items()}
    row = dict(weight_entropy=statistics.mean(svd_entropy(s) for _, s, _ in spectra.values()),
               update_entropy=statistics.mean(svd_entropy(s) for s in of_update.values()),
               update_norm=statistics.mean(s[0].item() for s in of_update.values()))
    for leaf in ("wq", "wk"):
        row[f"norm_{leaf}"] = statistics.mean(s[0].item() for name, (_, s, _) in spectra.items()
                                              if name.endswith(leaf))
    # (heads, C, C)
    products = torch.cat([by_head(a.wq).mT @ by_head(a.wk) for a in model.attentions().values()])
    row["norm_qk"] = torch.linalg.matrix_norm(products, 2).mean().item()

    # How much one step adds to the weight's own largest singular values:  uᵢᵀ(−ΔW)vᵢ
    added = [torch.einsum("mi,mn,in->i", u[:, :TOP], updates[name], vt[:TOP])
             for name, (u, _, vt) in spectra.items() if name.endswith(("wq", "wk"))]
    added = torch.stack(added)                                                              # (matrices, TOP)
    largest = torch.stack([s[0] for name, s in of_update.items() if name.endswith(("wq", "wk"))])
    return row | dict(added_first=added[:, 0].mean().item(), added_top=added.mean().item(),
                      aligned=(added[:, 0] / largest).mean().item())


def run(arm, seed, setting):
    corpus = prepare(setting.data, setting.model.vocab_size)
    batches = Batches(corpus, setting.data, seed, setting.batch, setting.model.context)
    model = Transformer(setting.model, seed=seed)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")}
    others = [p for p in model.parameters() if not any(p is q for q in matrices.values())]
    hidden, attentions = list(matrices.values()), list(model.attentions().values())
    ms, vs = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    index = {id(p): i for i, p in enumerate(model.parameters())}
    state = lambda tensors, some: [tensors[index[id(p)]] for p in some]
    for step in range(1, setting.steps + 1):
        for a in attentions:
            a.clear_logits()
        model.zero_grad()
        batch = batches(step - 1)
        loss = model(batch.x, batch.y)[0]
        loss.backward()
        with torch.no_grad():
            gs = [p.grad for p in hidden]
            if arm.startswith("Muon"):
                updates = [muonclip.muon_update([g], [m])[0] for g, m in zip(gs, state(ms, hidden))]
            else:
                updates = muonclip.adamw_update(gs, state(ms, hidden), state(vs, hidden), step)
            # Rescale every update to the same RMS
            updates = [u * (-setting.rms / u.square().mean().sqrt().clamp_min(1e-20)) for u in updates]
            if step % setting.every == 0 or step == 1:
                max_logit = max(a.max_logits.max().item() for a in attentions)
                yield dict(step=step, loss=loss.item(), max_logit=max_logit,
                           **measure(model, dict(zip(matrices, updates)), attentions[0].qk_heads()[0][1]))
            if step == setting.steps // 2:
                s = torch.linalg.svdvals(dict(zip(matrices, updates))["layers.1.attention.wq"])
                yield from (dict(index=i, singular=value) for i, value in enumerate(s.tolist(), 1))
            torch._foreach_add_(hidden, updates, alpha=setting.lr)
            rest = muonclip.adamw_update([p.grad for p in others], state(ms, others), state(vs, others), step)
            torch._foreach_add_(others, rest, alpha=-setting.lr)


# ---- figure and table --------------------------------------------------------------------------------------

def show(rows):
    figure, axes = _note.panels(2, 3, width=12)
    (spectrum, entropy, logit), (norms, added, loss) = axes
    for arm, colour in zip(ARMS, _note.COLOURS):
        draw = lambda axis, y, **style: _note.band(axis, rows, arm, "step", y, **dict(color=colour) | style)
        _note.band(spectrum, rows, arm, "index", "singular", color=colour)
        draw(entropy, "update_entropy", label=f"{arm}: updates")
        draw(entropy, "weight_entropy", label="weights", ls="--")
        draw(norms, "norm_qk", label=f"{arm}: WqᵀWk")
        draw(norms, "norm_wq", label="Wq", ls="--")
        draw(norms, "norm_wk", label="Wk", ls=":")
        draw(added, "added_first", label=f"{arm}: first pair")
        draw(added, "added_top", label=f"first {TOP} pairs", ls="--")
        draw(logit, "max_logit")
        draw(loss, "loss")
    spectrum.set(title="one update: singular values", xlabel="index", ylabel="at RMS 0.2", ylim=(1e-2, None))
    entropy.set(title="SVD entropy, mean of hidden matrices", xlabel="step")
    norms.set(title="spectral norm (WqᵀWk: of a head)", xlabel="step", ylim=(0, 5.5))
    added.set(title="added to Wq's, Wk's own singular values", xlabel="step",
              ylabel="uᵀ(−ΔW)v, one step, lr 1")
    logit.set(title="largest logit", xlabel="step")
    loss.set(title="training loss", xlabel="step", ylabel="nats/byte")
    for axis in axes.flat:
        axis.legend(fontsize=8, ncols=2 if axis is norms else 1)
    _note.log_y(spectrum)
    _note.log_y(logit)

    def end(arm, key):                                             # means of each seed's last fifth
        last = max(row.get("step", 0) for row in rows)
        return [statistics.mean(row[key] for row in of_seed if row.get("step", 0) > 0.8 * last and key in row)
                for of_seed in _note.of_arm(rows, arm).values()]
    columns = *ARMS, *HIGH.values()
    what = {"largest singular value of an update (RMS 0.2)": "update_norm",
            "SVD entropy of updates": "update_entropy", "SVD entropy of weights": "weight_entropy",
            "uᵀ(−ΔW)v, the weight's first pair": "added_first",
            "the same, as a part of the update's largest singular value": "aligned",
            f"uᵀ(−ΔW)v, mean of its first {TOP}": "added_top", "spectral norm of Wq": "norm_wq",
            "spectral norm of Wk": "norm_wk", "spectral norm of a head's WqᵀWk": "norm_qk",
            "largest logit": "max_logit", "training loss": "loss"}
    lines = _note.table(("mean of the last fifth; median of seeds (range)", *columns),
                        *((label, *(_note.spread(end(arm, key)) for arm in columns))
                          for label, key in what.items()))
    return figure, lines


def main(argv=None):
    _note.main("appendix_e", cells, run, show, argv)


if __name__ == "__main__":
    main()
