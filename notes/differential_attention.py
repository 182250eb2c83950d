"""Differential against plain attention: loss, needles, largest logits and activations, λ, no head norm."""
import contextlib
import statistics
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F

import kernels
from data import Batches, prepare
from model import Attention, Transformer
from muonclip import MuonClip, learning_rate
from notes import _note
from notes.candidates import BASE, config, hidden, like

RATE = 3e-3
NO_NORM = "differential, no head norm"
CHANGES = {"plain": {}, "differential": dict(differential=True), NO_NORM: dict(differential=True),
           "grouped, 2 to 1": dict(differential=True, n_head=6, n_noise=2)}
NEEDLES = 6                      # per window at evaluation, as in the paper
KEYS, ITEMS, STRAW = 16, 16, 16 + 16 * 16
SIZE = 128                       # tokens of a training window


def cells(quick):
    runs = [(arm, seed, config(change, RATE)) for seed in range(3) for arm, change in CHANGES.items()]
    runs += [(f"needles: {arm}", seed, needle_config(CHANGES[arm])) for seed in range(3)
             for arm in ("plain", "differential")]
    if not quick:
        return runs
    toys = [(arm, _note.toy(c)) for arm, seed, c in runs if not seed]
    return [(arm, 0, replace(c, model=replace(c.model, vocab_size=STRAW + 64))) for arm, c in toys]


def run(arm, seed, config):
    with contextlib.ExitStack() as stack:
        if arm == NO_NORM:       # the gains stay; 1 − λ_init is dropped, as it only compensates for the norm
            gains = lambda self, y: (y * self.head_norm.weight).transpose(1, 2).flatten(2)
            stack.enter_context(mock.patch.object(Attention, "join", gains))
        yield from (find if arm.startswith("needles") else language)(arm, seed, config)


# ---- a language model --------------------------------------------------------------------------------------

def language(arm, seed, config):
    """Bits/byte and each layer's λ over the run; at the end, the largest logit and activation."""
    lams, end = [], {}

    def watch(step, model):
        if config.model.differential and step % config.eval_every == 0:
            of_layer = enumerate(model.attentions().values(), 1)
            lams.append(dict(step=step, **{f"lam_{i}": a.lam().item() for i, a in of_layer}))
        if step == config.total_steps:
            end.update(outliers(model, config))
    yield from _note.history(arm, seed, config, watch)
    yield from lams
    yield end


@torch.no_grad()
def outliers(model, config):
    """On the run's validation windows: the largest logit of any head, and the largest entry and the kurtosis
    E[h⁴]/E[h²]² (3 for a Gaussian) of the residual stream after each layer, both maximised over layers."""
    batches = Batches(prepare(config.data, config.model.vocab_size), replace(config.data, horizon=1), 0, 1,
                      config.model.context)
    largest, kurtosis = [], []

    def look(module, inputs, outputs):
        h = outputs[0].double()
        largest.append(h.abs().max().item())
        kurtosis.append((h.pow(4).mean() / h.square().mean().square()).item())
    hooks = [layer.register_forward_hook(look) for layer in model.layers.values()]
    for a in model.attentions().values():
        a.clear_logits()
    model(batches.val("code", config.eval_windows)[0])
    for hook in hooks:
        hook.remove()
    return dict(max_logit=max(a.max_logits.max().item() for a in model.attentions().values()),
                max_activation=max(largest), kurtosis=max(kurtosis))


# ---- needles in a haystack ---------------------------------------------------------------------------------

def needle_config(change, steps=400):
    """The language model's configuration, adapted to windows of `needles`."""
    base = replace(BASE, vocab_size=STRAW + 64, context=SIZE)
    c = config(change, RATE, base=base, steps=steps)
    return replace(c, batch=32, micro=32, tokens=steps * 32 * SIZE)


def needles(B, n, size, random):
    """B windows of straw with n needles at random places. A needle is a token that encodes one of 16 keys and
    one of 16 items; the last 2n tokens ask for every needle, in another order: key, needle, key, needle.

    → x (B, size), and the position of each question's needle (B, n)"""
    first = size - 2 * n
    x = torch.randint(STRAW, STRAW + 64, (B, size), generator=random)
    shuffled = lambda m: torch.rand(B, m, generator=random).argsort(1)[:, :n]
    key, at = shuffled(KEYS), shuffled(first)
    x[:, first::2] = key
    x[:, first + 1::2] = KEYS + key * ITEMS + torch.randint(ITEMS, (B, n), generator=random)
    return x.scatter_(1, at, x[:, first + 1::2]), at       # places are unsorted, so questions are too


@contextlib.contextmanager
def watched(maps):
    """In this context attention appends its map (B, heads, T, T) to `maps`; differential: A1 − λ·A2."""
    def plain(q, k, v, sees=None, tau=None):
        bias = kernels.mask_bias(q, q.shape[2], k.shape[2])
        maps.append((q @ kernels.repeat_heads(k, q.shape[1]).mT * q.shape[-1] ** -0.5 + bias).softmax(-1))
        return maps[-1] @ v, None

    def differential(q, k, v, lam, sees=None, group=2, tau=None):
        bias = kernels.mask_bias(q, q.shape[2], k.shape[2])
        a = (q @ kernels.repeat_heads(k, q.shape[1], group).mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        a = a.unflatten(1, (-1, group))
        maps.append((a[:, :, :-1] - lam * a[:, :, -1:]).flatten(1, 2))
        return maps[-1] @ kernels.repeat_heads(v, maps[-1].shape[1]), None
    with mock.patch.multiple(kernels, attention=plain, diff_attention=differential):
        yield


def find(arm, seed, config):
    """Accuracy over the run. At the end, and also in longer windows, what the questions attend to: shares of
    Σ|attention|, averaged over layers and heads, and for the head that attends most to the answer."""
    model = Transformer(config.model, seed=seed)
    optimizer = MuonClip(model.named_parameters(), config.optim)
    random = torch.Generator().manual_seed(seed)
    size = config.model.context
    for step in range(1, config.total_steps + 1):
        n = int(torch.randint(1, min(2 * NEEDLES, size // 4) + 1, (), generator=random))
        x, _ = needles(config.batch, n, size, random)
        model.zero_grad()
        F.cross_entropy(model(x)[:, -2 * n::2].flatten(0, 1), x[:, 1 - 2 * n::2].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step - 1) * config.step_tokens, config)
        optimizer.step()
        if step % (config.total_steps // 12) == 0:
            yield dict(step=step, right=asked(model, size)["right"])
    yield from (dict(size=times * size) | asked(model, times * size, look=True) for times in (1, 2, 4))


@torch.no_grad()
def asked(model, size, look=False, B=64, n=NEEDLES):
    """The share of right answers on B new windows and, with `look`, what the questions attend to."""
    x, answer = needles(B, n, size, torch.Generator().manual_seed(size))
    maps, model = [], model.eval()
    with watched(maps) if look else contextlib.nullcontext():
        logits = model(x)[:, -2 * n::2]
    model.train()
    found = dict(right=(logits.argmax(-1) == x[:, 1 - 2 * n::2]).double().mean().item())
    if not look:
        return found
    a = torch.stack([m[:, :, -2 * n::2] for m in maps], 1).abs()           # (B, L, H, n questions, T)
    a = a / a.sum(-1, keepdim=True)
    right = a.gather(-1, answer[:, None, None, :, None].expand(*a.shape[:4], 1)).squeeze(-1)
    straw = (a * (x >= STRAW)[:, None, None, None]).sum(-1)
    others = a[..., :size - 2 * n].sum(-1) - straw - right                 # the rest is on earlier questions
    best = right.mean((0, 3)).flatten().argmax()
    of_head = lambda share: share.mean((0, 3)).flatten()[best].item()
    return found | dict(on_answer=right.mean().item(), on_others=others.mean().item(),
                        on_straw=straw.mean().item(), best_answer=of_head(right),
                        best_others=of_head(others), best_straw=of_head(straw))


# ---- figure and table --------------------------------------------------------------------------------------

def show(rows):
    bits = {arm: {seed: [row for row in some if "bpb" in row][-1]["bpb"]
                  for seed, some in _note.of_arm(rows, arm).items()} for arm in CHANGES}
    more = {arm: [100 * (b / bits["plain"][seed] - 1) for seed, b in of_seed.items()]
            for arm, of_seed in bits.items()}
    of = lambda arm, what, **where: [row[what] for row in rows if row["arm"] == arm and what in row
                                     and all(row.get(k) == v for k, v in where.items())]
    figure, [(loss, largest, lam), (learning, longer, looks)] = _note.panels(2, 3, width=13, height=3.6)
    for i, (arm, colour) in enumerate(zip(CHANGES, _note.COLOURS)):
        loss.plot(more[arm], [-i] * len(more[arm]), "o", ms=5, color=colour, alpha=0.8)
        for j, what in enumerate(("max_logit", "max_activation", "kurtosis")):
            values = [v / statistics.mean(of("plain", what)) for v in of(arm, what)]
            largest.plot([j + 0.15 * (i - 1.5)] * len(values), values, "o", ms=5, color=colour, alpha=0.8,
                         label=None if j else arm)
    for i, colour in zip(range(1, BASE.n_layer + 1), _note.COLOURS):
        _note.band(lam, rows, "differential", "step", f"lam_{i}", color=colour, label=f"layer {i}")
    needle_arms = {arm: f"needles: {arm}" for arm in ("plain", "differential")}
    sizes = sorted({row["size"] for row in rows if "size" in row})
    for (label, arm), colour in zip(needle_arms.items(), _note.COLOURS):
        style = dict(color=colour, marker="o", ms=4)
        _note.band(learning, rows, arm, "step", "right", color=colour, label=label)
        _note.band(longer, rows, arm, "size", "right", label=label, **style)
        _note.band(looks, rows, arm, "size", "best_answer", label=f"{label}, best head", **style)
        _note.band(looks, rows, arm, "size", "on_answer", ls="--", label="mean of heads", **style)
    loss.axvline(0, color="0.4", lw=0.8)
    loss.set(title="bits/byte beside plain, %, each seed", yticks=[-i for i in range(len(CHANGES))],
             yticklabels=list(CHANGES))
    largest.set(title="outliers beside plain", xticks=range(3),
                xticklabels=("logit", "activation", "kurtosis"), ylim=(0, None))
    lam.set(title="λ of the differential arm", xlabel="step", ylim=(0, 1.3))
    learning.set(title="needles found", xlabel="step", ylim=(0, 1.02))
    longer.set(title="needles found, at the end", xlabel="tokens of a window (trained on the shortest)",
               ylim=(0, 1.02))
    looks.set(title="share of attention on the answer", xlabel="tokens of a window", ylim=(0, None))
    for axis in (longer, looks):
        axis.set(xscale="log", xticks=sizes, xticklabels=[f"{size:.0f}" for size in sizes])
        axis.minorticks_off()
    lam.legend(fontsize=8, ncols=2, loc="upper left")
    for axis in (largest, learning, longer, looks):
        axis.legend(fontsize=8)

    take = lambda arm, what, digits=2, **where: _note.spread(of(arm, what, **where), digits)
    lines = _note.table(
        ("arm", "hidden parameters", "bits/byte", "beside plain, %, same seeds", "largest logit",
         "largest activation", "kurtosis"),
        *((arm, f"{hidden(like(BASE, **change)):,}", _note.spread(list(bits[arm].values())),
           "–" if arm == "plain" else _note.spread(more[arm], 2), take(arm, "max_logit", 1),
           take(arm, "max_activation", 1), take(arm, "kurtosis", 1)) for arm, change in CHANGES.items()))
    lines += ["", *_note.table(
        ("needles", "tokens", "found", "attention on the answer", "on other needles", "on straw",
         "best head: answer", "others", "straw"),
        *((label, f"{size:.0f}", *(take(arm, what, size=size) for what in (
            "right", "on_answer", "on_others", "on_straw", "best_answer", "best_others", "best_straw")))
          for size in sizes for label, arm in needle_arms.items()))]
    return figure, lines


if __name__ == "__main__":
    _note.main("differential_attention", cells, run, show)
