"""Operations that have a fast path: the definition first, then the closed form or kernel that is tested against it.

  rms_norm              x / √(mean x²), with gains
  poly_norm             Motif's activation: a cubic of its input, each power normalised       [Motif §2.1, PolyCom]
  grouped_linear        the experts' matmul: each row of its input meets the matrix of its expert
  attention             softmax(q·kᵀ) v, causal, grouped keys; and its differential forms     [2410.05258 eq. 1-3]
  max_logits            largest q·k·scale of every head, without a T×T matrix                 [Kimi K2 §2.1]
  cross_entropy         loss and gradient in chunks of tokens, so that all logits never exist at once

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

OFF = "off"                      # for `tau`: nobody asks for the largest logits


def accumulation_dtype(dtype):
    """The dtype sums are kept in: float32 for bfloat16 and float16; float32 and float64 stay what they are."""
    return torch.promote_types(dtype, torch.float32)


def listed(things, most=8):
    """The first of many things in one line, and how many more there are."""
    things = [str(thing).encode("unicode_escape").decode() for thing in things]
    more = f"; and {len(things) - most} more" if len(things) > most else ""
    return "; ".join(thing[:160] for thing in things[:most]) + more


# ---- RMSNorm ------------------------------------------------------------------------------------------------------

def rms_norm_ref(x, w, eps):
    """w·x / √(mean x² + eps) over the last dimension.  x (..., D), w (D,)"""
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class RMSNormFunction(torch.autograd.Function):
    """The closed form, with n = r·x and r = (mean x² + eps)^-½:   ∂L/∂x = r·(gw − n·mean(gw·n)),   ∂L/∂w = Σ g·n"""

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
    """rms_norm_ref: torch's fused kernel on a GPU; on a CPU, where torch has none, the closed form (2 to 3× faster)."""
    if x.is_cuda or x.dtype != w.dtype:
        return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), eps)
    return RMSNormFunction.apply(x, w, eps)


# ---- PolyNorm -----------------------------------------------------------------------------------------------------

def poly_norm_ref(x, w, b, eps=1e-6):
    """y = b + Σ_p w[3-p]·N(x^p), p = 1..3,  N(z) = z / √(mean z² + eps).   [Motif §2.1]

    x (..., D); w (3,), where w[0] belongs to x³ as in the released weights; b (1,)."""
    norm = lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return b + sum(w[3 - p] * norm(x.pow(p)) for p in (1, 2, 3))


class PolyNormFunction(torch.autograd.Function):
    """The closed form: saves x alone, and recomputes the three r_p in the backward.

        r_p = (mean x^2p + eps)^-½,  n_p = r_p·x^p,  g = ∂L/∂y,  c_p = mean(g·n_p)
        ∂L/∂x = Σ_p w_p·r_p·p·x^(p-1)·(g − n_p·c_p);   ∂L/∂w_p = Σ g·n_p;   ∂L/∂b = Σ g

    Products by Horner's rule, powers by multiplication: `pow` alone would cost more than everything else here."""

    @staticmethod
    def inverse_rms(x, eps):
        """x (..., D) → x² and [r_1, r_2, r_3], each (..., 1)."""
        x2, dot = x * x, torch.linalg.vecdot
        sums = x2.sum(-1), dot(x2, x2), dot(x2 * x, x2 * x)
        return x2, [torch.rsqrt(s / x.shape[-1] + eps).unsqueeze(-1) for s in sums]

    @staticmethod
    def forward(ctx, x, w, b, eps):
        ctx.save_for_backward(x, w)
        ctx.eps, ctx.dtype, x = eps, x.dtype, x.to(accumulation_dtype(x.dtype))
        _, (r1, r2, r3) = PolyNormFunction.inverse_rms(x, eps)
        y = (x * (w[0] * r3)).add_(w[1] * r2).mul_(x).add_(w[2] * r1).mul_(x).add_(b)
        return y.to(ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        x, g, dot = x.to(accumulation_dtype(x.dtype)), g.to(accumulation_dtype(g.dtype)), torch.linalg.vecdot
        x2, (r1, r2, r3) = PolyNormFunction.inverse_rms(x, ctx.eps)
        gx, D = g * x, x.shape[-1]
        s1, s2, s3 = r1 * gx.sum(-1, True), r2 * dot(gx, x).unsqueeze(-1), r3 * dot(gx, x2).unsqueeze(-1)      # D·c_p
        a1, a2, a3 = w[2] * r1, w[1] * r2, w[0] * r3
        # Σ_p a_p·p·x^(p-1)·g  −  x·Σ_p a_p·p·r_p·c_p·x^(2p-2), both by Horner's rule
        dx = (x * (3 * a3)).add_(2 * a2).mul_(x).add_(a1).mul_(g)
        c = (x2 * (3 / D * a3 * r3 * s3)).add_(2 / D * a2 * r2 * s2).mul_(x2).add_(a1 * r1 * s1 / D)
        dw = torch.stack([s3.sum(), s2.sum(), s1.sum()])
        return dx.addcmul_(c, x, value=-1).to(ctx.dtype), dw.to(w.dtype), g.sum().view(1).to(w.dtype), None


@functools.cache
def compiled_poly_norm():
    """The definition through torch.compile: one pass forward, one backward. None where there is no C++ compiler."""
    if any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))):
        return torch.compile(poly_norm_ref)
    print("poly_norm: no C++ compiler found; going on with the closed form, which is slower", flush=True)


def poly_norm(x, w, b, eps=1e-6, compiled=False):
    """poly_norm_ref by the closed form, with statistics in float32 or wider (x⁶ overflows float16).

    compiled: let torch.compile fuse the definition instead. It starts up for half a minute, then is some 3× faster."""
    fused = compiled_poly_norm() if compiled else None
    if fused is None:
        return PolyNormFunction.apply(x, w, b, eps)
    return fused(x.to(accumulation_dtype(x.dtype)), w, b, eps).to(x.dtype)


# ---- the experts' matmul ------------------------------------------------------------------------------------------

def grouped_linear_ref(x, w, ends):
    """Rows ends[e-1] to ends[e] of x (M, D) times w[e]ᵀ.  w (E, O, D), ends (E,) int64, the last of them M → (M, O)"""
    rows = x.tensor_split(ends[:-1].cpu())
    return torch.cat([some @ matrix.mT for some, matrix in zip(rows, w)])


class GroupedLinear(torch.autograd.Function):
    """The closed form:  ∂L/∂x = g·w[e],  ∂L/∂w[e] = gᵀ·x  over the rows of expert e. Results are written where they
    belong: the definition's pieces would be put together again and again."""

    @staticmethod
    def spans(ends):
        """[(expert, its rows)] where there are any."""
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
        dx, dw = torch.empty_like(x), torch.zeros_like(w)              # zero: no token was routed there
        for e, rows in ctx.spans:
            torch.mm(g[rows], w[e].to(g.dtype), out=dx[rows])
            dw[e] = g[rows].mT @ x[rows]
        return dx, dw, None


def grouped_linear(x, w, ends):
    """grouped_linear_ref by the closed form."""
    return GroupedLinear.apply(x, w, ends)


# ---- attention ----------------------------------------------------------------------------------------------------

def causal_mask(T, S, doc_start=None, device=None):
    """True where a query may look: key j for query i, which stands at position S - T + i. (T, S), or (B, 1, T, S).

    doc_start (B, S) is the position at which each token's document begins; earlier keys are out of sight."""
    query, key = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    mask = key <= query
    return mask if doc_start is None else mask & (key >= doc_start[:, None, -T:, None])


def repeat_heads(k, H, maps=1):
    """Key or value heads repeated for H query heads: head h meets h // (H/Hk). (B, Hk, S, d) → (B, H, S, d).

    maps > 1: keys come in pairs for groups of so many query heads, as differential attention needs; the last one of a
    group meets the second key of its pair, all others the first."""
    if k.shape[1] == H:
        return k
    if maps == 1:
        return k.repeat_interleave(H // k.shape[1], 1)
    h = torch.arange(H, device=k.device)
    return k[:, h // maps // (H // maps * 2 // k.shape[1]) * 2 + (h % maps == maps - 1)]


def attention_ref(q, k, v, mask=None, scale=None):
    """softmax(scale·q·kᵀ) v, by default 1/√d.  q (B, H, T, d), k (B, Hk, S, d), v (B, Hk, S, dv).

    mask: True where a query may look, as from causal_mask; None is causal."""
    H = q.shape[1]
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ repeat_heads(k, H).mT * (scale or q.shape[-1] ** -0.5)                                 # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ repeat_heads(v, H)                       # (B, H, T, dv)


class Sight(NamedTuple):
    """What queries may see beyond the rule that none sees the future."""
    doc_start: torch.Tensor      # (B, S) position where each token's document begins, or None
    mask: torch.Tensor           # the same as a dense causal_mask, made once a forward


def sight(T, S, doc_start=None, device=None):
    """None where causality says all: a whole window, whose documents may see each other."""
    if T == S and doc_start is None:
        return None
    return Sight(doc_start, causal_mask(T, S, doc_start, device))


def attention(q, k, v, sees=None, scale=None, tau=OFF):
    """attention_ref by torch's fused kernel → (y, what max_logits says of its logits with `tau`; None if it is OFF)"""
    mask = None if sees is None else sees.mask
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y, None if tau is OFF else max_logits(q.detach(), repeat_heads(k.detach(), q.shape[1]), mask, tau)


def diff_attention_ref(q, k, v, lam, mask=None, maps=2, attend=attention_ref):
    """(softmax(q1·k1ᵀ/√d) − λ·softmax(q2·k2ᵀ/√d)) v, per pair of adjacent sub-heads.   [2410.05258 eq. 1]

    q (B, 2H, T, d), k (B, 2Hk, S, d): sub-heads 2h and 2h+1 form head h; v (B, Hk, S, dv); λ a scalar tensor.
    Queries of head h use the pair of keys h // (H/Hk), first with first. → (B, H, T, dv)

    maps = g + 1: grouped, g signal maps for each noise map that is subtracted from all of them.   [2510.06949]
    q (B, n·(g+1), T, d) holds n groups, the noise last in each; g = 1 is the pair above. → (B, n·g, T, dv)"""
    groups = q.unflatten(1, (-1, maps))                                                           # (B, n, g+1, T, d)
    first = attend(groups[:, :, :-1].flatten(1, 2), k[:, 0::2], v, mask)
    second = attend(groups[:, :, -1], k[:, 1::2], v, mask)
    return first - lam * repeat_heads(second, first.shape[1])      # linear in the maps: (A1 − λ·A2) v = A1 v − λ·A2 v


def diff_attention(q, k, v, lam, sees=None, maps=2, tau=OFF, block=128):
    """diff_attention_ref → (y, logits) as `attention` gives them. On a CPU: explicit maps for a block of queries at a
    time, against the keys they can see; on a GPU: two calls of torch's fused kernel, whose maps are never written.

    Blocks of 128 beat every other form at 64, 256 and 1,024 tokens (two fused calls, values halved or padded to the
    width that torch's CPU kernel wants, whole maps): 1.1 to 1.5 times plain attention with as many maps."""
    mask = None if sees is None else sees.mask
    logits = None
    if tau is not OFF:
        logits = max_logits(q.detach(), repeat_heads(k.detach(), q.shape[1], maps), mask, tau)
    if q.device.type != "cpu":
        return diff_attention_ref(q, k, v, lam, sees, maps, lambda *qkv: attention(*qkv)[0]), logits
    (B, H, T, d), S = q.shape, k.shape[2]
    n = H // maps
    q, k, v = q.flatten(0, 1), repeat_heads(k, H, maps).flatten(0, 1), repeat_heads(v, H - n)     # (B·H, T, d)
    out = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop                                        # keys that the block's last query sees
        bias = mask_bias(q, stop - start, seen, None if mask is None else mask[..., start:stop, :seen])
        if bias.ndim == 4:
            bias = bias.expand(B, H, -1, -1).flatten(0, 1)
        probs = torch.baddbmm(bias, q[:, start:stop], k[:, :seen].mT, alpha=d ** -0.5).softmax(-1)
        signal, noise = probs.view(B, n, maps, stop - start, seen).split((maps - 1, 1), 2)
        out.append((signal - lam * noise).flatten(1, 2) @ v[:, :, :seen])              # (B, n·g, block, dv)
    return torch.cat(out, 2), logits


# ---- largest logits -----------------------------------------------------------------------------------------------

def mask_bias(like, T, S, mask=None):
    """0 where a query may look, −∞ elsewhere: causal (T, S), or as `mask` says."""
    if mask is None:
        return like.new_full((T, S), -torch.inf).triu_(S - T + 1)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


def max_logits_ref(q, k, mask=None):
    """S^h = max over batch, queries i and keys j that i may see of q_i·k_j/√d → (H,).   [Kimi K2 §2.1, signed]

    q (B, H, T, d), k (B, H, S, d): see `repeat_heads`."""
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ k.mT * q.shape[-1] ** -0.5                                                       # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).amax((0, 2, 3))


def exact_max_logits(q, k, mask=None, block=128):
    """max_logits_ref in blocks of queries, each against the keys up to its own end: no T×T matrix."""
    (_, H, T, d), S = q.shape, k.shape[2]
    largest = q.new_full((H,), -torch.inf)
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop
        bias = mask_bias(q, stop - start, seen, None if mask is None else mask[..., start:stop, :seen])
        scores = q[:, :, start:stop] @ k[:, :, :seen].mT           # (B, H, block, seen)
        largest = torch.maximum(largest, scores.add_(bias).amax((0, 2, 3)))
    return largest * d ** -0.5


def bound_max_logits(q, k, block=16):
    """Upper bounds (norms, centres) on max_logits_ref, both (H,): q·k ≤ ‖q‖·‖k‖, and tighter, with c the centre of a
    block of keys, q·k = q·c + q·(k − c) ≤ q·c + ‖q‖·max‖k − c‖. The second costs 1/block of the exact pass; it
    holds a head whose queries and keys grow along one direction with opposite signs. Masks are ignored."""
    scale, norm = q.shape[-1] ** -0.5, q.norm(dim=-1)                                             # (B, H, T)
    yield (norm.amax(2) * k.norm(dim=-1).amax(2)).amax(0) * scale
    S = k.shape[2] // block * block
    blocks = k[:, :, :S].unflatten(2, (-1, block))                                       # (B, H, S/block, block, d)
    centre = torch.cat((blocks.mean(3), k[:, :, S:]), 2)                 # what is left over: each its own centre
    radius = (blocks - centre[:, :, :S // block, None]).norm(dim=-1).amax(3)
    radius = F.pad(radius, (0, k.shape[2] - S))
    yield torch.baddbmm((norm[..., None] * radius[:, :, None]).flatten(0, 1), q.flatten(0, 1),
                        centre.flatten(0, 1).mT).unflatten(0, q.shape[:2]).amax((0, 2, 3)) * scale


@torch.no_grad()
def max_logits(q, k, mask=None, tau=None):
    """(largest (H,), exact): max_logits_ref, or for heads that a bound keeps from passing `tau`, that bound.

    Bounds are tried on a CPU alone: on a GPU the branch would wait for the device. exact is False if any was used.
    Nothing is computed for τ = ∞."""
    H = q.shape[1]
    if tau == math.inf:
        return q.new_full((H,), math.inf), False
    if tau is None or q.device.type != "cpu":
        return exact_max_logits(q, k, mask), True
    largest, left = q.new_empty(H), torch.arange(H)                # heads that no bound has settled
    for bound in bound_max_logits(q, k):
        largest[left] = bound[left]
        left = left[bound[left] > tau]
        if not len(left):
            return largest, False
    largest[left] = exact_max_logits(q[:, left], k[:, left], mask)
    return largest, len(left) == H


# ---- cross-entropy ------------------------------------------------------------------------------------------------

def cross_entropy_ref(h, w, targets, weight=None):
    """Mean over tokens of −log softmax(h·wᵀ)[target], and the N terms.  h (N, D), w (V, D), targets (N,) int64.

    weight (N,): the sum of weight × term in the place of the mean: whatever normalises it is in the weights."""
    nll = F.cross_entropy(h @ w.mT, targets, reduction="none")
    return nll.mean() if weight is None else (weight * nll).sum(), nll


class CrossEntropy(torch.autograd.Function):
    """Chunks of tokens: the logits of one chunk live, become its gradient in place, and are gone.

    Both gradients are finished in the forward (the loss is a scalar: the backward only scales them), so that the
    product h·wᵀ is not computed twice."""

    @staticmethod
    def forward(ctx, h, w, targets, weight, chunk):
        N, wide_t = len(h), accumulation_dtype(h.dtype)
        matrix = w.to(h.dtype)
        nll = h.new_empty(N, dtype=wide_t)
        buffer = h.new_empty(min(chunk, N), len(w))                # one for all chunks: fresh pages cost page faults
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=wide_t) if ctx.needs_input_grad[1] else None
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            target = targets[part, None]
            logits = torch.mm(h[part], matrix.mT, out=buffer[:len(target)]).to(wide_t)            # (chunk, V)
            lse = logits.logsumexp(-1, keepdim=True)
            nll[part] = (lse - logits.gather(1, target)).squeeze(1)
            if dh is None and dw is None:
                continue
            grad = logits.sub_(lse).exp_()                                                        # softmax
            grad = grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.div_(N) if weight is None else grad.mul_(weight[part, None])
            grad = grad.to(h.dtype)
            if dh is not None:
                dh[part] = grad @ matrix
            if dw is not None:
                dw.addmm_(grad.mT, h[part]) if dw.dtype == h.dtype else dw.add_(grad.mT @ h[part])
        ctx.save_for_backward(dh, dw)
        ctx.w_dtype = w.dtype
        ctx.mark_non_differentiable(nll)
        return nll.mean() if weight is None else (weight * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        dh, dw = ctx.saved_tensors
        dh = None if dh is None else (dh * g).to(dh.dtype)
        return dh, None if dw is None else (dw * g).to(ctx.w_dtype), None, None, None


def cross_entropy(h, w, targets, weight=None, chunk=1024):
    """cross_entropy_ref with at most chunk × V logits alive. The terms carry no gradient, and the weights get none."""
    if not torch.is_grad_enabled():
        h, w = h.detach(), w.detach()                              # or the forward would make gradients nobody wants
    return CrossEntropy.apply(h, w, targets, weight, chunk)
