"""Operations that have a fast path: the definition, then the closed form or kernel tested against it.

  rms_norm         x / √(mean x²), with gains
  poly_norm        Motif's activation: a cubic of its input, each power normalised  [Motif §2.1, PolyCom]
  grouped_linear   the experts' matmul: rows sorted by expert, each times its expert's matrix
  attention        softmax(q·kᵀ) v, causal, grouped keys; and its differential forms [2410.05258 eq. 1-3]
  max_logits       largest q·k·scale of every head, without a T×T matrix             [Kimi K2 §2.1]
  cross_entropy    loss and gradient in chunks of tokens: only one chunk's logits exist at a time

Shapes:  B batch  T time  S keys  H heads  d head width  D features  N tokens  V vocabulary
`*_ref` is the definition: short, slow, the oracle of test_all.py.
"""
import functools
import math
import os
import shutil
from typing import NamedTuple

import torch
import torch.nn.functional as F

OFF = "off"                      # as `tau`: attention does not compute its largest logits


def accumulation_dtype(dtype):
    """The dtype sums are kept in: float32 for bfloat16 and float16, otherwise the same."""
    return torch.promote_types(dtype, torch.float32)


def listed(things, most=8):
    """The first `most` things on one line, and how many were left out.

    Each is escaped and cut at 160 characters, since it may be a name read from a file."""
    things = [str(thing).encode("unicode_escape").decode() for thing in things]
    line = "; ".join(thing[:160] for thing in things[:most])
    if len(things) > most:
        line += f"; and {len(things) - most} more"
    return line


# ---- RMSNorm ------------------------------------------------------------------------------------------

def rms_norm_ref(x, w, eps):
    """w·x / √(mean x² + eps) over the last dimension.  x (..., D), w (D,)"""
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class RMSNormFunction(torch.autograd.Function):
    """The closed form, with n = r·x and r = (mean x² + eps)^-½:

        ∂L/∂x = r·(gw − n·mean(gw·n)),   ∂L/∂w = Σ g·n"""

    @staticmethod
    def forward(ctx, x, w, eps):
        r = torch.rsqrt(torch.linalg.vecdot(x, x) / x.shape[-1] + eps).unsqueeze(-1)
        n = x * r
        ctx.save_for_backward(n, w, r)
        return n * w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        n, w, r = ctx.saved_tensors
        gw = g * w
        c = (torch.linalg.vecdot(gw, n) / n.shape[-1]).unsqueeze(-1)
        return gw.addcmul_(n, c, value=-1).mul_(r), (g * n).flatten(0, -2).sum(0), None


def rms_norm(x, w, eps):
    """rms_norm_ref, fast.  x (..., D), w (D,)

    On a GPU torch's fused kernel; on a CPU, where torch has none, the closed form (2 to 3× faster)."""
    # Mixed dtypes (bfloat16 activations, float32 gains) go to torch, with gains cast to the dtype of x
    if x.is_cuda or x.dtype != w.dtype:
        return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), eps)
    return RMSNormFunction.apply(x, w, eps)


# ---- PolyNorm -----------------------------------------------------------------------------------------

def poly_norm_ref(x, w, b, eps=1e-6):
    """y = b + Σ_p w[3-p]·N(x^p), p = 1..3,  N(z) = z / √(mean z² + eps).   [Motif §2.1]

    x (..., D); w (3,), where w[0] belongs to x³ as in the released weights; b (1,)."""
    def norm(z):
        return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)

    return b + sum(w[3 - p] * norm(x.pow(p)) for p in (1, 2, 3))


class PolyNormFunction(torch.autograd.Function):
    """The closed form: saves x alone, and recomputes the three r_p in the backward.

        r_p = (mean x^2p + eps)^-½,  n_p = r_p·x^p,  g = ∂L/∂y,  c_p = mean(g·n_p)
        ∂L/∂x = Σ_p w_p·r_p·p·x^(p-1)·(g − n_p·c_p);   ∂L/∂w_p = Σ g·n_p;   ∂L/∂b = Σ g

    Polynomials by Horner's rule, powers by multiplication: `pow` alone would cost more than all else."""

    @staticmethod
    def inverse_rms(x, eps):
        """x (..., D) → x² and [r_1, r_2, r_3], each (..., 1)."""
        dot = torch.linalg.vecdot
        x2 = x * x
        sums = x2.sum(-1), dot(x2, x2), dot(x2 * x, x2 * x)
        return x2, [torch.rsqrt(s / x.shape[-1] + eps).unsqueeze(-1) for s in sums]

    @staticmethod
    def forward(ctx, x, w, b, eps):
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        ctx.dtype = x.dtype
        x = x.to(accumulation_dtype(x.dtype))
        _, (r1, r2, r3) = PolyNormFunction.inverse_rms(x, eps)

        # b + Σ_p w_p·r_p·x^p by Horner's rule
        y = (x * (w[0] * r3)).add_(w[1] * r2).mul_(x).add_(w[2] * r1).mul_(x).add_(b)
        return y.to(ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        # Recompute the r_p in the accumulation dtype
        x, w = ctx.saved_tensors
        x = x.to(accumulation_dtype(x.dtype))
        g = g.to(accumulation_dtype(g.dtype))
        x2, (r1, r2, r3) = PolyNormFunction.inverse_rms(x, ctx.eps)

        # s_p = Σ g·n_p = D·c_p, and a_p = w_p·r_p
        dot = torch.linalg.vecdot
        D = x.shape[-1]
        gx = g * x
        s1 = r1 * gx.sum(-1, True)
        s2 = r2 * dot(gx, x).unsqueeze(-1)
        s3 = r3 * dot(gx, x2).unsqueeze(-1)
        a1, a2, a3 = w[2] * r1, w[1] * r2, w[0] * r3

        # ∂L/∂x = Σ_p a_p·p·x^(p-1)·g  −  x·Σ_p a_p·p·r_p·c_p·x^(2p-2), both by Horner's rule
        dx = (x * (3 * a3)).add_(2 * a2).mul_(x).add_(a1).mul_(g)
        c = (x2 * (3 / D * a3 * r3 * s3)).add_(2 / D * a2 * r2 * s2).mul_(x2).add_(a1 * r1 * s1 / D)
        dx = dx.addcmul_(c, x, value=-1).to(ctx.dtype)

        # ∂L/∂w, in the order of w, and ∂L/∂b
        dw = torch.stack([s3.sum(), s2.sum(), s1.sum()]).to(w.dtype)
        db = g.sum().view(1).to(w.dtype)
        return dx, dw, db, None


@functools.cache
def compiled_poly_norm():
    """poly_norm_ref under torch.compile: one pass forward, one backward.

    None, after printing one line, where there is no C++ compiler."""
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++", "c++"
    if any(shutil.which(compiler) for compiler in compilers):
        return torch.compile(poly_norm_ref)
    print("poly_norm: no C++ compiler found; going on with the closed form, which is slower", flush=True)
    return None


def poly_norm(x, w, b, eps=1e-6, compiled=False):
    """poly_norm_ref by the closed form, with statistics in float32 or wider (x⁶ overflows float16).

    x (..., D), w (3,), b (1,) → (..., D) in the dtype of x.
    compiled: torch.compile fuses the definition instead: half a minute to compile, then about
    3× faster."""
    if compiled:
        fused = compiled_poly_norm()
        if fused is not None:
            return fused(x.to(accumulation_dtype(x.dtype)), w, b, eps).to(x.dtype)
    return PolyNormFunction.apply(x, w, b, eps)


# ---- the experts' matmul ------------------------------------------------------------------------------

def grouped_linear_ref(x, w, ends):
    """Rows ends[e-1]:ends[e] of x times w[e]ᵀ, for every expert e.

    x (M, D), sorted by expert; w (E, O, D); ends (E,) int64, the last of them M. → (M, O)"""
    rows = x.tensor_split(ends[:-1].cpu())
    return torch.cat([some @ matrix.mT for some, matrix in zip(rows, w)])


class GroupedLinear(torch.autograd.Function):
    """The closed form:  ∂L/∂x = g·w[e],  ∂L/∂w[e] = gᵀ·x  over the rows of expert e.

    Each matmul writes into its slice of the result, which saves the definition's concatenations."""

    @staticmethod
    def spans(ends):
        """[(expert, slice of its rows)], without the experts that received no rows."""
        ends = [0, *ends.tolist()]
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(ends, ends[1:])) if b > a]

    @staticmethod
    def forward(ctx, x, w, ends):
        ctx.save_for_backward(x, w)
        ctx.spans = GroupedLinear.spans(ends)
        y = x.new_empty(len(x), w.shape[1])
        for e, rows in ctx.spans:
            torch.mm(x[rows], w[e].to(x.dtype).mT, out=y[rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return GroupedLinear.by_input(g, w, ctx.spans), GroupedLinear.by_weight(g, x, w, ctx.spans), None

    @staticmethod
    def by_input(g, w, spans):
        """∂L/∂x (M, D), from g = ∂L/∂y (M, O)."""
        dx = g.new_empty(len(g), w.shape[2])
        for e, rows in spans:
            torch.mm(g[rows], w[e].to(g.dtype), out=dx[rows])
        return dx

    @staticmethod
    def by_weight(g, x, w, spans):
        """∂L/∂w (E, O, D); zero for an expert with no token routed to it."""
        dw = torch.zeros_like(w)
        for e, rows in spans:
            dw[e] = g[rows].mT @ x[rows]
        return dw


def grouped_linear(x, w, ends):
    """grouped_linear_ref by the closed form.  x (M, D), w (E, O, D), ends (E,) → (M, O)"""
    return GroupedLinear.apply(x, w, ends)


# ---- attention ----------------------------------------------------------------------------------------

def causal_mask(T, S, doc_start=None, device=None):
    """True where query i, at position S - T + i, may attend to key j. → (T, S)

    doc_start (B, S): where each token's document begins; earlier keys are masked too. → (B, 1, T, S)"""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    mask = key <= query
    if doc_start is None:
        return mask
    return mask & (key >= doc_start[:, None, -T:, None])


def repeat_heads(k, H, maps=1):
    """Key or value heads for H query heads: (B, Hk, S, d) → (B, H, S, d). Head h uses h // (H/Hk).

    maps > 1, for the keys of differential attention: query heads come in groups of `maps`, signal maps
    first and one noise map last; key heads come in pairs, one for signals and one for noise. Consecutive
    groups share a pair.

    H = 6, Hk = 2      query head   0  1  2  3  4  5
        maps = 1       head used    0  0  0  1  1  1
        maps = 3       role         s  s  n  s  s  n     two groups, which share the only pair of keys;
                       head used    0  0  1  0  0  1     their four signal maps share one value head"""
    if k.shape[1] == H:
        return k
    if maps == 1:
        return k.repeat_interleave(H // k.shape[1], 1)

    # Pair of keys of each query head, then the signal or the noise key of that pair
    head = torch.arange(H, device=k.device)
    group = head // maps
    groups_per_pair = H // maps * 2 // k.shape[1]
    is_noise = head % maps == maps - 1
    return k[:, group // groups_per_pair * 2 + is_noise]


def attention_ref(q, k, v, mask=None, scale=None):
    """softmax(scale·q·kᵀ) v, by default with scale 1/√d.

    q (B, H, T, d), k (B, Hk, S, d), v (B, Hk, S, dv) → (B, H, T, dv)
    mask: True where a query may attend, as from causal_mask; None is causal."""
    H = q.shape[1]
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], device=q.device)
    scores = q @ repeat_heads(k, H).mT * (scale or q.shape[-1] ** -0.5)       # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ repeat_heads(v, H)  # (B, H, T, dv)


class Sight(NamedTuple):
    """What queries may attend to, where a square causal mask does not say it: see `sight`."""
    doc_start: torch.Tensor      # (B, S) position at which each token's document begins, or None
    mask: torch.Tensor           # the same as a dense causal_mask, built once a forward for all layers


def sight(T, S, doc_start=None, device=None):
    """The Sight of T queries over S keys, or None where plain causal attention will do.

    None means a full window (no keys from a cache: T = S) without document boundaries."""
    if T == S and doc_start is None:
        return None
    return Sight(doc_start, causal_mask(T, S, doc_start, device))


def attention(q, k, v, sees=None, scale=None, tau=OFF):
    """attention_ref by torch's fused kernel → (y, logits).

    q (B, H, T, d), k (B, Hk, S, d), v (B, Hk, S, dv) → y (B, H, T, dv). sees: a Sight, or None.
    logits: the result of max_logits for `tau`, or None if `tau` is OFF."""
    mask = None if sees is None else sees.mask
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                       enable_gqa=q.shape[1] != k.shape[1])
    if tau is OFF:
        return y, None

    # Detached: the logits are watched, not trained on
    return y, max_logits(q.detach(), repeat_heads(k.detach(), q.shape[1]), mask, tau)


def diff_attention_ref(q, k, v, lam, mask=None, maps=2, attend=attention_ref):
    """(softmax(q1·k1ᵀ/√d) − λ·softmax(q2·k2ᵀ/√d)) v, per pair of adjacent sub-heads.  [2410.05258 eq. 1]

    q (B, 2H, T, d), k (B, 2Hk, S, d): sub-heads 2h and 2h+1 form head h; v (B, Hk, S, dv); λ a scalar.
    Head h uses the pair of keys h // (H/Hk), q1 with k1 and q2 with k2. → (B, H, T, dv)

    maps = g + 1: grouped, one noise map shared by g signal maps.   [2510.06949]
    q (B, n·(g+1), T, d) holds n groups, the noise map last in each. → (B, n·g, T, dv). g = 1 is the pair."""
    groups = q.unflatten(1, (-1, maps))                                       # (B, n, g+1, T, d)
    signal = attend(groups[:, :, :-1].flatten(1, 2), k[:, 0::2], v, mask)     # (B, n·g, T, dv)
    noise = attend(groups[:, :, -1], k[:, 1::2], v, mask)                     # (B, n, T, dv)

    # Linear in the maps: (A1 − λ·A2) v = A1 v − λ·A2 v
    return signal - lam * repeat_heads(noise, signal.shape[1])


def diff_attention(q, k, v, lam, sees=None, maps=2, tau=OFF, block=128):
    """diff_attention_ref → (y, logits), with its shapes; sees, tau and logits as in `attention`.

    On a GPU: two calls of torch's fused kernel, which never writes its maps to memory. On a CPU: explicit
    maps for one block of queries at a time, against the keys up to the end of that block. Blocks of 128
    beat every other form at 64, 256 and 1,024 tokens (two fused calls, values halved or padded to the width
    that torch's CPU kernel wants, whole maps): 1.1 to 1.5 times plain attention with as many maps."""
    mask = None if sees is None else sees.mask
    logits = None
    if tau is not OFF:
        logits = max_logits(q.detach(), repeat_heads(k.detach(), q.shape[1], maps), mask, tau)

    # GPU: the definition over the fused kernel
    if q.device.type != "cpu":
        def fused(*args):
            return attention(*args)[0]

        return diff_attention_ref(q, k, v, lam, sees, maps, fused), logits

    # CPU: every query head gets its own keys, every signal map its own values
    B, H, T, d = q.shape
    S = k.shape[2]
    n = H // maps
    q = q.flatten(0, 1)                                                       # (B·H, T, d)
    k = repeat_heads(k, H, maps).flatten(0, 1)                                # (B·H, S, d)
    v = repeat_heads(v, H - n)                                                # (B, n·g, S, dv)
    out = []
    for start in range(0, T, block):
        # Mask of this block, against the keys that its last query may attend to
        stop = min(start + block, T)
        seen = S - T + stop
        block_mask = None if mask is None else mask[..., start:stop, :seen]
        bias = mask_bias(q, stop - start, seen, block_mask)
        if bias.ndim == 4:
            bias = bias.expand(B, H, -1, -1).flatten(0, 1)                    # (B·H, block, seen)

        # Maps, their difference, and its product with the values
        probs = torch.baddbmm(bias, q[:, start:stop], k[:, :seen].mT, alpha=d ** -0.5).softmax(-1)
        signal, noise = probs.view(B, n, maps, stop - start, seen).split((maps - 1, 1), 2)
        out.append((signal - lam * noise).flatten(1, 2) @ v[:, :, :seen])     # (B, n·g, block, dv)
    return torch.cat(out, 2), logits


# ---- largest logits -----------------------------------------------------------------------------------

def mask_bias(like, T, S, mask=None):
    """The mask as an additive bias: 0 where a query may attend, −∞ elsewhere.

    Causal (T, S), or the shape of `mask`. Dtype and device are those of `like`."""
    if mask is None:
        return like.new_full((T, S), -torch.inf).triu_(S - T + 1)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


def max_logits_ref(q, k, mask=None):
    """S^h = max over batch, queries i and keys j seen by i of q_i·k_j/√d → (H,).   [Kimi K2 §2.1, signed]

    q (B, H, T, d), k (B, H, S, d): one key head for each query head, as from `repeat_heads`."""
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], device=q.device)
    scores = q @ k.mT * q.shape[-1] ** -0.5                                   # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).amax((0, 2, 3))


def exact_max_logits(q, k, mask=None, block=128):
    """max_logits_ref in blocks of queries, each against the keys up to its own end: no T×T matrix."""
    _, H, T, d = q.shape
    S = k.shape[2]
    largest = q.new_full((H,), -torch.inf)

    # Running maximum over blocks of queries; 1/√d once at the end
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop
        block_mask = None if mask is None else mask[..., start:stop, :seen]
        bias = mask_bias(q, stop - start, seen, block_mask)
        scores = q[:, :, start:stop] @ k[:, :, :seen].mT                      # (B, H, block, seen)
        largest = torch.maximum(largest, scores.add_(bias).amax((0, 2, 3)))
    return largest * d ** -0.5


def bound_max_logits(q, k, block=16):
    """Yields two upper bounds on max_logits_ref, each (H,): by norms, by centres. Masks are ignored.

        q·k ≤ ‖q‖·‖k‖                                                                        (1)
        q·k = q·c + q·(k − c) ≤ q·c + ‖q‖·max‖k − c‖,  c the centre of a block of keys        (2)

    (2) costs 1/block of the exact pass. It also settles a head that (1) cannot: one whose queries and keys
    grow along one direction with opposite signs."""
    # (1) norms
    scale = q.shape[-1] ** -0.5
    norm = q.norm(dim=-1)                                                     # (B, H, T)
    yield (norm.amax(2) * k.norm(dim=-1).amax(2)).amax(0) * scale

    # Centre and radius of each block; a key left over at the end is its own centre, with radius 0
    S = k.shape[2] // block * block
    blocks = k[:, :, :S].unflatten(2, (-1, block))                            # (B, H, S/block, block, d)
    centre = torch.cat((blocks.mean(3), k[:, :, S:]), 2)                      # (B, H, centres, d)
    radius = (blocks - centre[:, :, :S // block, None]).norm(dim=-1).amax(3)
    radius = F.pad(radius, (0, k.shape[2] - S))                               # (B, H, centres)

    # (2) centres
    spread = (norm[..., None] * radius[:, :, None]).flatten(0, 1)             # (B·H, T, centres)
    bound = torch.baddbmm(spread, q.flatten(0, 1), centre.flatten(0, 1).mT)
    yield bound.unflatten(0, q.shape[:2]).amax((0, 2, 3)) * scale


@torch.no_grad()
def max_logits(q, k, mask=None, tau=None):
    """(largest (H,), exact): max_logits_ref; for a head that a bound proves to be at most `tau`, the bound.

    exact is False if any head got a bound. Bounds are used on a CPU only: on a GPU the branch would wait for
    the device. tau = None: exact for every head. tau = ∞: nothing is computed."""
    H = q.shape[1]
    if tau == math.inf:
        return q.new_full((H,), math.inf), False
    if tau is None or q.device.type != "cpu":
        return exact_max_logits(q, k, mask), True

    # Settle heads by the bounds, the cheaper one first
    largest = q.new_empty(H)
    unsettled = torch.arange(H)
    for bound in bound_max_logits(q, k):
        largest[unsettled] = bound[unsettled]
        unsettled = unsettled[bound[unsettled] > tau]
        if not len(unsettled):
            return largest, False

    # The exact pass, for the other heads only
    largest[unsettled] = exact_max_logits(q[:, unsettled], k[:, unsettled], mask)
    return largest, len(unsettled) == H


# ---- cross-entropy ------------------------------------------------------------------------------------

def cross_entropy_ref(h, w, targets, weight=None):
    """Mean over tokens of −log softmax(h·wᵀ)[target], and its N terms, in nats.

    h (N, D), w (V, D), targets (N,) int64 → (scalar, (N,))
    weight (N,): Σ weight·term instead of the mean; any normalisation is part of the weights."""
    nll = F.cross_entropy(h @ w.mT, targets, reduction="none")
    if weight is None:
        return nll.mean(), nll
    return (weight * nll).sum(), nll


class CrossEntropy(torch.autograd.Function):
    """Chunks of tokens: a chunk's logits become its gradient in place; the next chunk reuses their memory.

    Both gradients are finished in the forward (the loss is a scalar: the backward only scales them), so that
    the product h·wᵀ is not computed twice."""

    @staticmethod
    def forward(ctx, h, w, targets, weight, chunk):
        # Results, and one buffer for the logits of every chunk: fresh pages cost page faults
        N = len(h)
        wide = accumulation_dtype(h.dtype)
        matrix = w.to(h.dtype)
        nll = h.new_empty(N, dtype=wide)
        buffer = h.new_empty(min(chunk, N), len(w))
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=wide) if ctx.needs_input_grad[1] else None

        for start in range(0, N, chunk):
            # Logits and loss terms of this chunk
            part = slice(start, start + chunk)
            target = targets[part, None]
            logits = torch.mm(h[part], matrix.mT, out=buffer[:len(target)]).to(wide)   # (chunk, V)
            lse = logits.logsumexp(-1, keepdim=True)
            nll[part] = (lse - logits.gather(1, target)).squeeze(1)
            if dh is None and dw is None:
                continue

            # Gradient of the logits: (softmax − one-hot of the target) × the token's weight
            grad = logits.sub_(lse).exp_()
            grad = grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.div_(N) if weight is None else grad.mul_(weight[part, None])
            grad = grad.to(h.dtype)

            # Gradients of h and w
            if dh is not None:
                dh[part] = grad @ matrix
            if dw is not None and dw.dtype == h.dtype:
                dw.addmm_(grad.mT, h[part])
            elif dw is not None:
                dw.add_(grad.mT @ h[part])

        # The gradients wait for the backward; the terms carry none
        ctx.save_for_backward(dh, dw)
        ctx.w_dtype = w.dtype
        ctx.mark_non_differentiable(nll)
        if weight is None:
            return nll.mean(), nll
        return (weight * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        dh, dw = ctx.saved_tensors
        if dh is not None:
            dh = (dh * g).to(dh.dtype)
        if dw is not None:
            dw = (dw * g).to(ctx.w_dtype)
        return dh, dw, None, None, None


def cross_entropy(h, w, targets, weight=None, chunk=1024):
    """cross_entropy_ref with at most chunk × V logits alive. Only the loss carries gradients, to h and w."""
    # The forward would compute gradients for inputs that require them, even under no_grad
    if not torch.is_grad_enabled():
        h, w = h.detach(), w.detach()
    return CrossEntropy.apply(h, w, targets, weight, chunk)
