"""Muon, and the clip that keeps its attention logits in bounds: MuonClip, the optimizer of Kimi K2.

  newton_schulz   the nearest (semi-)orthogonal matrix, nearly, by matmuls alone            [Moonlight §2.1]
  muon_update     momentum, orthogonalised, scaled to the RMS of an AdamW update            [Kimi K2 Algorithm 1]
  adamw_update    for what is not a hidden matrix: embeddings, head, vectors                [Moonlight §2.2]
  qk_clip_        after the step: shrink the query and key weights of heads that exploded   [Kimi K2 Algorithm 1]
  learning_rate   warm-up, plateau, decay, in the forms of both reports          [Kimi K2 §2.5, Motif §3.2.2]
  averaging       when snapshots of the weights are taken, and their mean put back              [Motif §3.2.2]

Pure functions first; `MuonClip` is the thin torch.optim.Optimizer that holds their state.

  python muonclip.py      Appendix E: does Muon make logits grow, and why? Trains both, draws notes/appendix_e.png
"""
import math
import sys
from dataclasses import dataclass

import torch

from kernels import listed


@dataclass(frozen=True)
class OptimConfig:
    name: str = "muonclip"       # muonclip | adamw
    lr: float = 6e-3             # peak; one rate for every group, as in K2           [ours, for a laptop]
    warmup: float = 0.0          # linear warm-up, as a part of the run's tokens
    decay: str = "linear"        # shape after the plateau: linear | cosine [Kimi K2 §2.5] | rsqrt [Motif §3.2.2]
    decay_start: float = 0.0     # where the plateau ends, as a part of the run's tokens
    floor: float = 0.1           # last rate / peak
    weight_decay: float = 0.1    # [both reports]
    beta1: float = 0.9           # AdamW
    beta2: float = 0.95          # AdamW                                                             [both reports]
    eps: float = 1e-8
    momentum: float = 0.95       # Muon's μ   [Moonlight; K2 is silent]
    nesterov: bool = True        # orthogonalise G + μM rather than M   [Moonlight; K2 is silent]
    ns: str = "jordan"           # Newton–Schulz coefficients, by name   [Moonlight's; K2 is silent]
    ns_steps: int = 5            # and iterations                        [Moonlight; K2 is silent]
    rms: float = 0.2             # RMS of Muon's update, that of AdamW's   [Kimi K2 Algorithm 1]
    tau: float = 100.0           # largest logit that QK-Clip allows; 0 = no clip                    [Kimi K2 §2.5]
    exact_logits: bool = False   # measure every head's largest logit in every step, not only where τ is in reach
    clip_norm: float = 1.0       # of the whole gradient                                             [guess]

    def __post_init__(self):
        for name, choices in dict(name=("muonclip", "adamw"), decay=("linear", "cosine", "rsqrt"),
                                  ns=COEFFICIENTS).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"optim.{name}={getattr(self, name)!r}: have {', '.join(choices)}")
        for name in ("lr", "clip_norm", "eps", "rms", "ns_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be positive")
        for name in ("weight_decay", "tau"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must not be negative")
        for name in ("warmup", "floor", "decay_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must lie in 0..1")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must be at least 0 and less than 1")


# ---- pure functions -----------------------------------------------------------------------------------------------

# Published coefficients (a, b, c) of the iteration, a triple for each step, the last one repeated. Five steps take
# singular values that start in [low, 1]·‖g‖_F to these bands (`convergence_band`):
#                low = 0.001     low = 0.01
#   classical    0.03 – 1.00     0.31 – 1.00    Taylor's series: slow where s is small, exact in the end
#   jordan       0.47 – 1.20     0.68 – 1.13    steep at zero, and never converges          [Moonlight §2.1]
#   you          0.47 – 1.15     0.98 – 1.03    tuned step by step            [You Jiacheng, modded-nanoGPT]
#   polar        0.85 – 1.12     0.87 – 1.12    minimax from 0.001 on, with a safety of 1.01    [2505.16932]
COEFFICIENTS = {
    "classical": ((2.0, -1.5, 0.5),),
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "you": ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)),
    "polar": (*((a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248))), (1.875, -1.25, 0.375)),
}


def coefficients(name="jordan", steps=5):
    """[(a, b, c)] of each step."""
    return [COEFFICIENTS[name][min(i, len(COEFFICIENTS[name]) - 1)] for i in range(steps)]


JORDAN = coefficients()


def convergence_band(triples, low=0.01, high=1.0):
    """Least and largest singular value after the iteration, of those that start in [low, high]: each goes its own way,
    s ← as + bs³ + cs⁵."""
    s = torch.logspace(math.log10(low), math.log10(high), 100_001, dtype=torch.float64)
    for a, b, c in triples:
        s = a * s + b * s ** 3 + c * s ** 5
    return s.min().item(), s.max().item()


def msign(g):
    """U·Vᵀ of the singular value decomposition g = U·S·Vᵀ (..., m, n), in float64: what the iteration is after.
    Directions in which g is zero up to rounding stay zero."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    return (u * (s > s[..., :1] * max(g.shape[-2:]) * torch.finfo(g.dtype).eps)[..., None, :]) @ vt


def newton_schulz_ref(g, triples=JORDAN):
    """Push every singular value of g (..., m, n) towards 1:  X ← aX + b(XXᵀ)X + c(XXᵀ)²X,  X₀ = g/‖g‖_F.

    The scale puts the start inside the iteration's basin. Zero stays zero."""
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)          # below, squares underflow: no direction left
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def symmetric(x, y, out, parts):
    """out (B, m, m) = x·y, known to be symmetric: what is above the `parts` diagonal blocks is copied from below."""
    m = out.shape[-1]
    size = -(-m // parts)
    for i in range(0, m, size):
        out[:, i:, i:i + size] = x[:, i:] @ y[:, :, i:i + size]
        out[:, i:i + size, i + size:] = out[:, i + size:, i:i + size].mT
    return out


def newton_schulz(g, triples=JORDAN, restart=3):
    """newton_schulz_ref of g (m, n) or a stack (B, m, n), with fewer operations.

    Symmetric products are computed once. Wide matrices iterate on the small Gram matrix: X_k = Q_k·X₀ with Q_k a
    polynomial of A₀ = X₀X₀ᵀ, so that
        P_k = aI + bA_k + cA_k²,   Q_k+1 = P_k·Q_k,   A_k+1 = P_k·A_k·P_k        (all symmetric, m×m)
    and X is touched at the ends only. Rounding errors in A grow with every step in the directions where g is small
    (2e-2 for a matrix of rank 1, after five steps in float32): after `restart` steps X and A are computed anew, which
    holds the error below 1e-3 of the float64 iteration. In bfloat16 they grow too fast: X itself is iterated there."""
    if g.ndim == 2:
        return newton_schulz(g[None], triples, restart)[0]
    if g.shape[-2] > g.shape[-1]:
        return newton_schulz(g.mT, triples, restart).mT
    (m, n), parts = g.shape[-2:], 1 if g.is_cuda else min(4, max(1, g.shape[-2] // 128))
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    gram = symmetric(x, x.mT, x.new_empty(len(x), m, m), parts)
    p, q, spare = torch.empty_like(gram), None, torch.empty_like(gram)
    wide = n >= 1.25 * m and g.dtype in (torch.float32, torch.float64)
    for k, (a, b, c) in enumerate(triples):
        if k and (not wide or k % restart == 0):
            x, q = x if q is None else q @ x, None
            symmetric(x, x.mT, gram, parts)
        symmetric(gram, gram, p, parts).mul_(c).add_(gram, alpha=b)              # P − aI
        if not wide:
            x = torch.baddbmm(x, p, x, beta=a)
            continue
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        q = p.clone() if q is None else symmetric(p, q, torch.empty_like(q), parts)
        if k + 1 < len(triples) and (k + 1) % restart:
            symmetric(symmetric(p, gram, spare, parts), p, gram, parts)
    return x if q is None else q @ x


def muon_update(gs, ms, momentum=0.95, nesterov=True, triples=JORDAN, rms=0.2):
    """The directions ΔW of one Muon step. gs, ms: lists of matrices (n, k), or stacks (E, n, k) of them, all of one
    shape up to a turn; ms are updated in place. They go through Newton–Schulz together.   [Kimi K2 Algorithm 1]

        M ← μM + G                          (1)
        O = NewtonSchulz(G + μM)            (2)   without Nesterov: of M
        ΔW = 0.2·√max(n, k)·O               (3)   O has RMS 1/√max(n, k) at full rank: ΔW has AdamW's"""
    torch._foreach_mul_(ms, momentum)
    torch._foreach_add_(ms, gs)                                                  # (1)
    inputs = torch._foreach_add(gs, ms, alpha=momentum) if nesterov else ms
    tall = [x.shape[-2] > x.shape[-1] for x in inputs]
    stack = torch.cat([(x.mT if t else x).reshape(-1, *sorted(x.shape[-2:])) for x, t in zip(inputs, tall)])
    o = newton_schulz(stack.bfloat16() if stack.is_cuda else stack, triples).to(stack.dtype)        # (2)
    o *= rms * max(stack.shape[-2:]) ** 0.5                                      # (3)
    parts = o.split([g.shape[:-2].numel() for g in gs])
    return [(x.mT if t else x).reshape(g.shape) for x, t, g in zip(parts, tall, gs)]


def adamw_update(gs, ms, vs, step, beta1=0.9, beta2=0.95, eps=1e-8):
    """The directions of AdamW's step-th update (from 1): m̂/(√v̂ + eps), with m̂ = m/(1 − β1ᵗ) and v̂ = v/(1 − β2ᵗ).

    gs, ms, vs: lists of tensors of any shapes; ms and vs are updated in place."""
    torch._foreach_lerp_(ms, gs, 1 - beta1)                                      # m ← β1·m + (1 − β1)·g
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)                               # v ← β2·v + (1 − β2)·g²
    roots = torch._foreach_sqrt(vs)
    torch._foreach_div_(roots, (1 - beta2 ** step) ** 0.5)
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(ms, roots)
    torch._foreach_div_(updates, 1 - beta1 ** step)
    return updates


@torch.no_grad()
def qk_clip_(attentions, tau, master=lambda weight: weight):
    """Shrink the heads whose logits exploded; calm heads keep their weights bit for bit.   [Kimi K2 Algorithm 1]

    Each attention says in `max_logits` (H,) how large its logits got, and in `qk_heads` which weights make them.
    `master(weight)` is what is to be shrunk in its place, or None: somebody else's.
    → how many heads are above tau, a tensor: nothing here waits for the device."""
    clipped = torch.zeros((), dtype=torch.int64)
    for attention in attentions:
        s = attention.max_logits                                                 # (H,) S^h
        gamma = torch.where(s > tau, tau / s, 1.0)                       # (H,) 1 for a calm head, also where S ≤ 0
        for weight, by_head, power in attention.qk_heads():                      # by_head(w): (H, rows, inputs)
            if (w := master(weight)) is not None:
                by_head(w).mul_(gamma.pow(power).to(w.dtype)[:, None, None])
        clipped = clipped.to(s.device) + (s > tau).sum()
    return clipped


# ---- over a run: rate and averages, functions of the tokens seen ---------------------------------------------------
# `config` is the run's: its tokens, step_tokens, average_* and optim.

def learning_rate(tokens, config):
    """Warm-up, plateau, decay (WSD) after `tokens` tokens; the last step uses the rate just before the end.

    u runs from 0 to 1 over the decay, from 1 to `floor` of the peak:
        cosine  f + (1 − f)(1 + cos πu)/2                  [Kimi K2 §2.5]
        rsqrt   1/√(1 + (f⁻² − 1)u)      [Motif §3.2.2 says "inverse square root" and 25%; this form is a guess]
        linear  1 − (1 − f)u"""
    c, done = config.optim, tokens / config.tokens
    start = max(c.warmup, c.decay_start)
    if done < c.warmup:
        return c.lr * (tokens + config.step_tokens) / (c.warmup * config.tokens + config.step_tokens)
    u = 0.0 if done <= start else min(1.0, (done - start) / (1 - start))
    shape = dict(cosine=lambda: c.floor + (1 - c.floor) * (1 + math.cos(math.pi * u)) / 2,
                 rsqrt=lambda: 1 / math.sqrt(1 + (max(c.floor, 1e-3) ** -2 - 1) * u),
                 linear=lambda: 1 - (1 - c.floor) * u)
    return c.lr * shape[c.decay]()


def averaging(step, config):
    """What follows the update of `step` (from 1): (a snapshot is taken, the mean of its period's is put back).

    A period is `average_every` tokens, counted from where averaging begins; its i-th of n snapshots is due after i/n
    of it, the last at its end. Averaging weights from several periods back would undo most of a period's progress."""
    c, n = config, config.average_of
    begin = max(c.optim.warmup, c.optim.decay_start) if c.average_from == -1 else c.average_from
    period, done = c.average_every // c.step_tokens, step - math.ceil(begin * c.tokens / c.step_tokens)
    if done <= 0:
        return False, False
    inside = (done - 1) % period + 1                               # 1 .. period
    return inside * n // period > (inside - 1) * n // period, inside == period


@torch.no_grad()
def add_snapshot_(mean, weights, of):
    """mean += weights / of, by name; a running mean, so that one copy of the weights is kept instead of `of`."""
    for name, w in weights.items():
        mean[name] = mean[name].add_(w, alpha=1 / of) if name in mean else w / of


@torch.no_grad()
def put_back_(weights, mean):
    """The weights become their mean, which is then spent: the next period begins with none."""
    for name, w in weights.items():
        w.copy_(mean.pop(name))


# ---- the optimizer ------------------------------------------------------------------------------------------------

def kind_of(name, p):
    if p.ndim >= 2:
        return "embedding and head" if name.partition("[")[0] in ("embed", "head", "position") else "hidden matrices"
    return "gains" if "norm.weight" in name else "coefficients"


def parameter_groups(named, config):
    """Who is updated how:  hidden matrices → Muon;  embedding, head, positions → AdamW;  vectors → AdamW.

    Weight decay: every matrix; the gains of norms too under Muon (Moonlight found it to matter), not under AdamW, as
    is the custom there; never λ or PolyNorm's coefficients, which mean something as they are."""
    muon = config.name == "muonclip"
    kinds = {}
    for name, p in named:
        kinds.setdefault(kind_of(name, p), []).append((name, p))
    rows = []
    for kind, pairs in kinds.items():
        decays = kind in ("hidden matrices", "embedding and head") or kind == "gains" and muon
        rows.append(dict(kind=kind, names=[name for name, _ in pairs], params=[p for _, p in pairs],
                         rule="muon" if muon and kind == "hidden matrices" else "adamw",
                         weight_decay=config.weight_decay if decays else 0.0))
    return rows


def weigh(name, p, config):
    """(bytes of a parameter's optimizer state, operations of its update): what it costs to own it. 0 operations: it is
    updated element by element, and may be cut. Hidden matrices may not, not under AdamW: QK-Clip wants whole heads."""
    muon = config.name == "muonclip"
    if kind_of(name, p) != "hidden matrices":
        return 8 * p.numel(), 0
    if not muon:
        return 8 * p.numel(), p.numel()
    small, large = sorted(p.shape[-2:])
    return 4 * p.numel(), p.shape[:-2].numel() * config.ns_steps * (4 * small ** 2 * large + 2 * small ** 3)


def same_shapes(parameters):
    """Lists of parameters whose matrices have one shape up to a turn, to be updated together: few calls for many small
    matrices, yet no more bytes than stay in a CPU's cache (0.6 instead of 0.7 of the plain loop's time)."""
    lists, room = {}, {}
    for p in parameters:
        limit = 256 << 20 if p.is_cuda else 8 << 20
        shape = tuple(sorted(p.shape[-2:]))
        if room.get(shape, -1) < p.nbytes:
            lists.setdefault(shape, []).append([])
            room[shape] = limit
        lists[shape][-1].append(p)
        room[shape] -= p.nbytes
    return [some for of_shape in lists.values() for some in of_shape]


def describe(named, config):
    """One line a group."""
    for g in parameter_groups(named, config):
        size = sum(p.numel() for p in g["params"])
        yield (f"{g['rule']:<6} {g['kind']:<19} {len(g['params']):>4} tensors {size:>12,} parameters  "
               f"weight decay {g['weight_decay']:g}")


class MuonClip(torch.optim.Optimizer):
    """Muon for the groups whose rule is "muon", AdamW for the others; decoupled weight decay in both.

    W ← W − lr·(ΔW + weight_decay·W).  `step()` → how many matrices were orthogonalised. The clip is not in here:
    it needs the largest logits of all ranks, and comes after the step (`qk_clip_`)."""

    def __init__(self, named, config):
        self.config = config
        super().__init__(parameter_groups(named, config), dict(lr=config.lr))

    @torch.no_grad()
    def step(self):
        c, orthogonalised = self.config, 0
        triples = coefficients(c.ns, c.ns_steps)
        for group in self.param_groups:
            if group["rule"] == "muon":
                for some in same_shapes(group["params"]):
                    for p in some:
                        if not self.state[p]:
                            self.state[p]["momentum"] = torch.zeros_like(p)
                    ms = [self.state[p]["momentum"] for p in some]
                    updates = muon_update([p.grad for p in some], ms, c.momentum, c.nesterov, triples, c.rms)
                    orthogonalised += sum(p.shape[:-2].numel() for p in some)
                    self.apply(some, updates, group)
                continue
            states = [self.state[p] for p in group["params"]]
            for state, p in zip(states, group["params"]):
                if not state:
                    state |= dict(m=torch.zeros_like(p), v=torch.zeros_like(p), step=torch.zeros((), dtype=torch.int64))
                state["step"] += 1
            gs, ms, vs = [p.grad for p in group["params"]], [s["m"] for s in states], [s["v"] for s in states]
            updates = adamw_update(gs, ms, vs, int(states[0]["step"]), c.beta1, c.beta2, c.eps)
            self.apply(group["params"], updates, group)
        return orthogonalised

    def apply(self, parameters, updates, group):
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def tensors(self):
        """{"NAME:KEY": state tensor}: what a checkpoint keeps of the optimizer."""
        return {f"{name}:{key}": t for group in self.param_groups for name, p in zip(group["names"], group["params"])
                for key, t in self.state[p].items()}

    def load(self, tensors):
        """The inverse of `tensors`: copies of what they hold, each in its own dtype. Other shapes are refused, by name;
        a parameter of which nothing was saved (before the first step) starts with none."""
        state, wrong, left = {}, [], {name for name in tensors if ":" in name}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                shapes = dict(momentum=p.shape) if group["rule"] == "muon" else dict(m=p.shape, v=p.shape, step=())
                found = {key: tensors[f"{name}:{key}"] for key in shapes if f"{name}:{key}" in left}
                left -= {f"{name}:{key}" for key in found}
                wrong += [f"{name}:{key} {tuple(found[key].shape) if key in found else 'missing'} for {tuple(shape)}"
                          for key, shape in shapes.items() if found and (key not in found or found[key].shape != shape)]
                state[p] = {key: t.clone().to("cpu" if key == "step" else p.device) for key, t in found.items()}
        wrong += [f"{name} unknown" for name in sorted(left)]
        if wrong:
            raise ValueError(f"the optimizer state is of another model or optimizer: {listed(wrong)}")
        self.state.update(state)


def main(argv):
    try:
        from notes import appendix_e                   # the long way: a grid of runs, a figure, a page
    except ImportError as error:
        raise SystemExit(f"muonclip.py: {error}") from None
    appendix_e.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
