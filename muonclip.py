"""Muon, and the clip that keeps its attention logits in bounds: MuonClip, the optimizer of Kimi K2.

  newton_schulz   approximates the nearest (semi-)orthogonal matrix, by matmuls    [Moonlight §2.1]
  muon_update     momentum, orthogonalised, scaled to the RMS of AdamW's update    [Kimi K2 Algorithm 1]
  adamw_update    for everything but hidden matrices: embeddings, head, vectors    [Moonlight §2.2]
  qk_clip_        after the step: shrink the query and key weights of hot heads    [Kimi K2 Algorithm 1]
  learning_rate   warm-up, plateau, decay, as in both reports             [Kimi K2 §2.5, Motif §3.2.2]
  averaging       when snapshots are taken, when their mean replaces the weights   [Motif §3.2.2]

Pure functions first; `MuonClip` is the thin torch.optim.Optimizer that holds their state.

  python muonclip.py      Appendix E: does Muon make logits grow, and why?
                          Trains with Muon and with AdamW, draws notes/appendix_e.png
"""
import math
import sys
from dataclasses import dataclass

import torch

from kernels import listed, symmetric_product, symmetric_square


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and its clips. ValueError, naming the field, if a value is bad."""

    # Optimizer
    name: str = "muonclip"       # muonclip | adamw

    # Learning rate over the run
    lr: float = 6e-3             # peak; one rate for every group, as in K2        [ours, for a laptop]
    warmup: float = 0.0          # linear warm-up, as a fraction of the run's tokens
    decay: str = "linear"        # its shape: linear | cosine [Kimi K2 §2.5] | rsqrt [Motif §3.2.2]
    decay_start: float = 0.0     # end of the plateau, as a fraction of the run's tokens
    floor: float = 0.1           # last rate / peak

    # Weight decay, and AdamW
    weight_decay: float = 0.1    # decoupled, in both optimizers                   [both reports]
    beta1: float = 0.9           # of AdamW's first moment
    beta2: float = 0.95          # of AdamW's second moment                        [both reports]
    eps: float = 1e-8            # added to AdamW's root

    # Muon
    momentum: float = 0.95       # μ                                         [Moonlight; K2 is silent]
    nesterov: bool = True        # orthogonalise G + μM rather than M        [Moonlight; K2 is silent]
    ns: str = "jordan"           # Newton–Schulz coefficients, by name       [Moonlight's; K2 is silent]
    ns_steps: int = 5            # Newton–Schulz iterations                  [Moonlight; K2 is silent]
    rms: float = 0.2             # RMS of the update, to match AdamW's       [Kimi K2 Algorithm 1]

    # QK-Clip, and the clip of the gradient
    tau: float = 100.0           # largest logit that QK-Clip allows; 0: no clip   [Kimi K2 §2.5]
    exact_logits: bool = False   # measure every head at every step, even where a bound proves it below τ
    clip_norm: float = 1.0       # of the whole gradient                           [guess]

    def __post_init__(self):
        # Names of variants
        choices = dict(name=("muonclip", "adamw"), decay=("linear", "cosine", "rsqrt"), ns=COEFFICIENTS)
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"optim.{name}={value!r}: have {', '.join(known)}")

        # Ranges of numbers; NaN satisfies none of them
        ranges = (
            ("lr clip_norm eps rms ns_steps", lambda x: 0 < x < math.inf, "must be positive"),
            ("weight_decay tau", lambda x: 0 <= x < math.inf, "must not be negative"),
            ("warmup floor decay_start", lambda x: 0 <= x <= 1, "must lie in 0..1"),
            ("beta1 beta2 momentum", lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
        )
        for names, holds, message in ranges:
            for name in names.split():
                value = getattr(self, name)
                if not holds(value):
                    raise ValueError(f"optim.{name}={value}: {message}")


# ---- pure functions -----------------------------------------------------------------------------------

# Published coefficients (a, b, c) of the iteration: a triple for each step, the last one repeated. Five
# steps take singular values that start in [low, 1]·‖g‖_F to these bands (`convergence_band`):
#                low = 0.001     low = 0.01
#   classical    0.03 – 1.00     0.31 – 1.00    Taylor series: slow where s is small, exact in the limit
#   jordan       0.47 – 1.20     0.68 – 1.13    steep at zero, never converges          [Moonlight §2.1]
#   you          0.47 – 1.15     0.98 – 1.03    tuned step by step        [You Jiacheng, modded-nanoGPT]
#   polar        0.85 – 1.12     0.87 – 1.12    minimax on [0.001, 1], safety factor 1.01   [2505.16932]
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
    """[(a, b, c)] of each step, from the published coefficients called `name`."""
    published = COEFFICIENTS[name]
    return [published[min(i, len(published) - 1)] for i in range(steps)]


JORDAN = coefficients()


def convergence_band(triples, low=0.01, high=1.0):
    """(smallest, largest) singular value after the iteration, over all that start in [low, high].

    The iteration acts on each singular value separately: s ← as + bs³ + cs⁵."""
    s = torch.logspace(math.log10(low), math.log10(high), 100_001, dtype=torch.float64)
    for a, b, c in triples:
        s = a * s + b * s ** 3 + c * s ** 5
    return s.min().item(), s.max().item()


def msign(g):
    """U·Vᵀ of the singular value decomposition g = U·S·Vᵀ (..., m, n), in float64: Newton–Schulz's target.

    Singular values that are zero up to rounding stay zero."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    rounding = s[..., :1] * max(g.shape[-2:]) * torch.finfo(g.dtype).eps
    return (u * (s > rounding)[..., None, :]) @ vt


def newton_schulz_ref(g, triples=JORDAN):
    """Push every singular value of g (..., m, n) towards 1:  X ← aX + b(XXᵀ)X + c(XXᵀ)²X,  X₀ = g/‖g‖_F.

    Dividing by ‖g‖_F puts singular values into [0, 1], inside the iteration's basin. Zero stays zero."""
    # Below 1e-20 squares underflow, and no direction is left
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def symmetric(x, y, out, parts):
    """out = x·y (B, m, m), which the caller knows to be symmetric; x (B, m, n), y (B, n, m). → out

    Each of `parts` blocks of columns is computed from the diagonal down; what is above it is copied,
    transposed."""
    m = out.shape[-1]
    size = -(-m // parts)
    for i in range(0, m, size):
        out[:, i:, i:i + size] = x[:, i:] @ y[:, :, i:i + size]
        out[:, i:i + size, i + size:] = out[:, i + size:, i:i + size].mT
    return out


def iterate(x, triples):
    """The loop of newton_schulz_ref on a stack x (B, m, n), m ≤ n and ‖x‖_F ≤ 1, in three products a step.

    On a GPU the two symmetric ones take half the operations, and bA + cA² is rounded once."""
    for a, b, c in triples:
        p = symmetric_square(symmetric_product(x), b, c)                           # (B, m, m)
        x = torch.baddbmm(x, p, x, beta=a)
    return x


def newton_schulz(g, triples=JORDAN, restart=3):
    """newton_schulz_ref of g (m, n) or a stack (B, m, n), with fewer operations.

    Symmetric products are computed once. Wide matrices iterate on the small Gram matrix: X_k = Q_k·X₀ with
    Q_k a polynomial of A₀ = X₀X₀ᵀ, so that
        P_k = aI + bA_k + cA_k²,   Q_k+1 = P_k·Q_k,   A_k+1 = P_k·A_k·P_k        (all symmetric, m×m)
    and X is multiplied only at the start and at the end. Rounding errors in A grow with every step in the
    directions where g is small (2e-2 for a matrix of rank 1, after five steps in float32): after `restart`
    steps X and A are computed anew, which holds the error below 1e-3 of the float64 iteration. In bfloat16
    they grow too fast: there X itself is iterated, on a GPU by `iterate`."""
    # One form for all: a stack of wide (or square) matrices
    if g.ndim == 2:
        return newton_schulz(g[None], triples, restart)[0]
    if g.shape[-2] > g.shape[-1]:
        return newton_schulz(g.mT, triples, restart).mT

    # X₀
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return iterate(x, triples)

    # A₀; on a CPU symmetric products in up to 4 parts
    m, n = g.shape[-2:]
    parts = 1 if g.is_cuda else min(4, max(1, m // 128))
    gram = symmetric(x, x.mT, x.new_empty(len(x), m, m), parts)
    p = torch.empty_like(gram)
    spare = torch.empty_like(gram)

    # Q₀ = I is None: no product is spent on it
    q = None
    wide = n >= 1.25 * m and g.dtype in (torch.float32, torch.float64)
    for k, (a, b, c) in enumerate(triples):
        # X and A anew: at every step where X is iterated, otherwise at a restart
        if k and (not wide or k % restart == 0):
            if q is not None:
                x = q @ x
                q = None
            symmetric(x, x.mT, gram, parts)

        # P − aI, then X ← PX, or Q ← PQ
        symmetric(gram, gram, p, parts).mul_(c).add_(gram, alpha=b)
        if not wide:
            x = torch.baddbmm(x, p, x, beta=a)
            continue
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        if q is None:
            q = p.clone()
        else:
            q = symmetric(p, q, torch.empty_like(q), parts)

        # A ← PAP, unless this is the last step or the next one computes A anew
        if k + 1 < len(triples) and (k + 1) % restart:
            symmetric(symmetric(p, gram, spare, parts), p, gram, parts)
    if q is None:
        return x
    return q @ x


def muon_update(gs, ms, momentum=0.95, nesterov=True, triples=JORDAN, rms=0.2):
    """The directions ΔW of one Muon step, a list in the shapes of gs.   [Kimi K2 Algorithm 1]

    gs, ms: lists of matrices (n, k), or stacks (E, n, k) of them, all of one shape up to transposition; ms
    are updated in place. All matrices go through Newton–Schulz as one stack.

        M ← μM + G                          (1)
        O = NewtonSchulz(G + μM)            (2)   without Nesterov: of M
        ΔW = 0.2·√max(n, k)·O               (3)   O has RMS 1/√max(n, k) at full rank: ΔW has AdamW's"""
    # Momentum (1), and the input of (2)
    torch._foreach_mul_(ms, momentum)
    torch._foreach_add_(ms, gs)
    inputs = torch._foreach_add(gs, ms, alpha=momentum) if nesterov else ms

    # One stack (B, m, n), m ≤ n: tall matrices are transposed
    tall = [x.shape[-2] > x.shape[-1] for x in inputs]
    wide = [x.mT if t else x for x, t in zip(inputs, tall)]
    stack = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in wide])

    # (2) in bfloat16 on a GPU, and (3)
    x = stack.bfloat16() if stack.is_cuda else stack
    o = newton_schulz(x, triples).to(stack.dtype)
    o *= rms * stack.shape[-1] ** 0.5

    # Back to the shapes of gs
    parts = o.split([g.shape[:-2].numel() for g in gs])
    return [(x.mT if t else x).reshape(g.shape) for x, t, g in zip(parts, tall, gs)]


def adamw_update(gs, ms, vs, step, beta1=0.9, beta2=0.95, eps=1e-8):
    """The directions of AdamW's update t = `step` (from 1): m̂/(√v̂ + eps), a list in the shapes of gs.

    m̂ = m/(1 − β1ᵗ) and v̂ = v/(1 − β2ᵗ). gs, ms, vs: lists of tensors of any shapes; ms and vs are updated
    in place."""
    # m ← β1·m + (1 − β1)·g,  v ← β2·v + (1 − β2)·g²
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)

    # √v̂ + eps, then m̂ over it
    roots = torch._foreach_sqrt(vs)
    torch._foreach_div_(roots, (1 - beta2 ** step) ** 0.5)
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(ms, roots)
    torch._foreach_div_(updates, 1 - beta1 ** step)
    return updates


@torch.no_grad()
def qk_clip_(attentions, tau, master=lambda weight: weight):
    """Shrink the heads whose logits exceed tau; calm heads keep their bits.   [Kimi K2 Algorithm 1]

    Each attention has its largest logits in `max_logits` (H,), and lists in `qk_heads` their weights.
    `master(weight)`: the tensor to shrink instead, or None if another rank owns it (ZeRO-1).
    → the number of heads above tau, as a tensor: nothing here waits for the device."""
    clipped = torch.zeros((), dtype=torch.int64)
    for attention in attentions:
        # γ (H,): 1 for a calm head, also where S^h ≤ 0
        s = attention.max_logits
        gamma = torch.where(s > tau, tau / s, 1.0)

        # Each weight takes its power of γ, so that their product scales the logits by γ
        for weight, by_head, power in attention.qk_heads():
            own = master(weight)
            if own is not None:
                by_head(own).mul_(gamma.pow(power).to(own.dtype)[:, None, None])   # (H, rows, inputs)
        clipped = clipped.to(s.device) + (s > tau).sum()
    return clipped


# ---- over a run: rate and averages, functions of the tokens seen --------------------------------------
# `config` is the run's (train.Config). Used here: tokens, step_tokens, average_* and optim.

def learning_rate(tokens, config):
    """Warm-up, plateau, decay (WSD): the rate of the step that begins after `tokens` tokens.

    u runs from 0 to 1 over the decay, which goes from 1 to f = `floor` of the peak:
        cosine  f + (1 − f)(1 + cos πu)/2                  [Kimi K2 §2.5]
        rsqrt   1/√(1 + (f⁻² − 1)u), f ≥ 1e-3
                [Motif §3.2.2 says "inverse square root" and 25%; this form is a guess]
        linear  1 − (1 − f)u"""
    # Warm-up: linear, its first step already above 0
    c = config.optim
    done = tokens / config.tokens
    if done < c.warmup:
        return c.lr * (tokens + config.step_tokens) / (c.warmup * config.tokens + config.step_tokens)

    # u stays 0 on the plateau; a plateau up to the end has no decay to divide by
    start = max(c.warmup, c.decay_start)
    u = 0.0
    if done > start:
        u = min(1.0, (done - start) / (1 - start))

    # Decay
    if c.decay == "cosine":
        shape = c.floor + (1 - c.floor) * (1 + math.cos(math.pi * u)) / 2
    elif c.decay == "rsqrt":
        shape = 1 / math.sqrt(1 + (max(c.floor, 1e-3) ** -2 - 1) * u)
    else:
        shape = 1 - (1 - c.floor) * u
    return c.lr * shape


def averaging(step, config):
    """Two booleans about the update of `step` (from 1): a snapshot is due; the mean replaces the weights.

    A period is `average_every` tokens, counted from where averaging begins; its i-th of n snapshots is due
    after i/n of it, the last at its end. Averaging weights from several periods back would undo most of a
    period's progress."""
    # Averaging begins at `average_from` of the run's tokens, or with the decay
    c = config
    begin = c.average_from
    if begin == -1:
        begin = max(c.optim.warmup, c.optim.decay_start)

    # Steps: since then, of a period, and inside the current period (1 .. period)
    done = step - math.ceil(begin * c.tokens / c.step_tokens)
    period = c.average_every // c.step_tokens
    if done <= 0:
        return False, False
    inside = (done - 1) % period + 1

    # Snapshot i is due in the step where inside/period reaches i/n
    n = c.average_of
    return inside * n // period > (inside - 1) * n // period, inside == period


@torch.no_grad()
def add_snapshot_(mean, weights, of):
    """mean += weights / of, both {name: tensor}; `of` snapshots make the mean, in the memory of one."""
    for name, w in weights.items():
        if name in mean:
            mean[name].add_(w, alpha=1 / of)
        else:
            mean[name] = w / of


@torch.no_grad()
def put_back_(weights, mean):
    """Replace the weights by their mean, both {name: tensor}; mean is emptied for the next period."""
    for name, w in weights.items():
        w.copy_(mean.pop(name))


# ---- the optimizer ------------------------------------------------------------------------------------

def kind_of(name, p):
    """A parameter's kind: "hidden matrices", "embedding and head", "gains" (of norms) or "coefficients".

    name: of the parameter, or of a piece of it, as in embed[0:100]."""
    if p.ndim >= 2:
        if name.partition("[")[0] in ("embed", "head", "position"):
            return "embedding and head"
        return "hidden matrices"
    if "norm.weight" in name:
        return "gains"
    return "coefficients"


def parameter_groups(named, config):
    """Parameter groups for torch.optim from [(name, parameter)]: one per kind, with names and rule.

    hidden matrices → Muon;  embedding, head, positions → AdamW;  vectors → AdamW.
    Weight decay: every matrix; the gains of norms too under Muon (Moonlight found it to matter), not under
    AdamW, as is the custom there; never λ or PolyNorm's coefficients, whose size has its own meaning."""
    # Parameters by kind, in order of appearance
    muon = config.name == "muonclip"
    kinds = {}
    for name, p in named:
        kinds.setdefault(kind_of(name, p), []).append((name, p))

    # One group per kind
    groups = []
    for kind, pairs in kinds.items():
        group = dict(kind=kind, names=[name for name, _ in pairs], params=[p for _, p in pairs])
        group["rule"] = "muon" if muon and kind == "hidden matrices" else "adamw"
        decays = kind in ("hidden matrices", "embedding and head") or kind == "gains" and muon
        group["weight_decay"] = config.weight_decay if decays else 0.0
        groups.append(group)
    return groups


def weigh(name, p, config):
    """(bytes of a parameter's optimizer state, operations of its update): the cost of owning it.

    0 operations mark an elementwise update, whose tensor may be cut by rows. A hidden matrix is never cut:
    Muon needs the whole matrix, and under AdamW QK-Clip still needs whole heads."""
    muon = config.name == "muonclip"
    if kind_of(name, p) != "hidden matrices":
        return 8 * p.numel(), 0
    if not muon:
        return 8 * p.numel(), p.numel()
    small, large = sorted(p.shape[-2:])
    matrices = p.shape[:-2].numel()
    return 4 * p.numel(), matrices * config.ns_steps * (4 * small ** 2 * large + 2 * small ** 3)


def same_shapes(parameters):
    """Lists of parameters whose matrices have one shape up to transposition, to be updated together.

    Few calls for many small matrices, yet no list larger than stays in a CPU's cache (0.6 instead of 0.7 of
    the plain loop's time)."""
    lists = {}                                                     # {shape: its lists}
    room = {}                                                      # {shape: bytes left in its last list}
    for p in parameters:
        # A new list where the last one has no room for p
        shape = tuple(sorted(p.shape[-2:]))
        if room.get(shape, -1) < p.nbytes:
            lists.setdefault(shape, []).append([])
            room[shape] = 256 << 20 if p.is_cuda else 8 << 20
        lists[shape][-1].append(p)
        room[shape] -= p.nbytes
    return [some for of_shape in lists.values() for some in of_shape]


def describe(named, config):
    """Yields a line of text for each group of `parameter_groups`: rule, kind, sizes and weight decay."""
    for g in parameter_groups(named, config):
        size = sum(p.numel() for p in g["params"])
        yield (f"{g['rule']:<6} {g['kind']:<19} {len(g['params']):>4} tensors {size:>12,} parameters  "
               f"weight decay {g['weight_decay']:g}")


class MuonClip(torch.optim.Optimizer):
    """Muon for the groups whose rule is "muon", AdamW for the others; decoupled weight decay in both.

    W ← W − lr·(ΔW + weight_decay·W).  `qk_clip_` is not part of it: it needs the largest logits of all
    ranks, and comes after the step."""

    def __init__(self, named, config):
        self.config = config
        super().__init__(parameter_groups(named, config), dict(lr=config.lr))

    @torch.no_grad()
    def step(self):
        """Update every parameter from its .grad. → the number of matrices that were orthogonalised"""
        c = self.config
        orthogonalised = 0
        triples = coefficients(c.ns, c.ns_steps)
        for group in self.param_groups:
            # Muon: matrices of one shape together
            if group["rule"] == "muon":
                for some in same_shapes(group["params"]):
                    for p in some:
                        if not self.state[p]:
                            self.state[p]["momentum"] = torch.zeros_like(p)
                    gs = [p.grad for p in some]
                    ms = [self.state[p]["momentum"] for p in some]
                    updates = muon_update(gs, ms, c.momentum, c.nesterov, triples, c.rms)
                    orthogonalised += sum(p.shape[:-2].numel() for p in some)
                    self.apply(some, updates, group)
                continue

            # AdamW: the whole group together, with the step of its first parameter
            states = [self.state[p] for p in group["params"]]
            for state, p in zip(states, group["params"]):
                if not state:
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p)
                    state["step"] = torch.zeros((), dtype=torch.int64)
                state["step"] += 1
            gs = [p.grad for p in group["params"]]
            ms = [state["m"] for state in states]
            vs = [state["v"] for state in states]
            updates = adamw_update(gs, ms, vs, int(states[0]["step"]), c.beta1, c.beta2, c.eps)
            self.apply(group["params"], updates, group)
        return orthogonalised

    def apply(self, parameters, updates, group):
        """W ← (1 − lr·weight_decay)·W − lr·ΔW, in place."""
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def tensors(self):
        """{"NAME:KEY": state tensor}: the optimizer's part of a checkpoint."""
        kept = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                for key, t in self.state[p].items():
                    kept[f"{name}:{key}"] = t
        return kept

    def load(self, tensors):
        """The inverse of `tensors`: copies of its values, each in its own dtype.

        ValueError, listing the names, for missing or unknown tensors and other shapes. A parameter of which
        nothing was saved (before the first step) starts without state. Names without ":" are ignored."""
        state = {}
        wrong = []
        left = {name for name in tensors if ":" in name}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"]):
                # The tensors of this parameter
                shapes = dict(m=p.shape, v=p.shape, step=())
                if group["rule"] == "muon":
                    shapes = dict(momentum=p.shape)
                found = {key: tensors[f"{name}:{key}"] for key in shapes if f"{name}:{key}" in left}
                left -= {f"{name}:{key}" for key in found}

                # All of them or none, in their shapes
                for key, shape in shapes.items():
                    if found and key not in found:
                        wrong.append(f"{name}:{key} missing for {tuple(shape)}")
                    elif found and found[key].shape != shape:
                        wrong.append(f"{name}:{key} {tuple(found[key].shape)} for {tuple(shape)}")

                # The step counter stays on the CPU: it is read at every step
                state[p] = {}
                for key, t in found.items():
                    device = "cpu" if key == "step" else p.device
                    state[p][key] = t.clone().to(device)

        # Only sound state is taken over
        wrong += [f"{name} unknown" for name in sorted(left)]
        if wrong:
            raise ValueError(f"the optimizer state is of another model or optimizer: {listed(wrong)}")
        self.state.update(state)


def main(argv):
    """Run the note on Appendix E with its options: a grid of runs, a figure, a page."""
    try:
        from notes import appendix_e
    except ImportError as error:
        raise SystemExit(f"muonclip.py: {error}") from None
    appendix_e.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
