"""Operations that have a fast path: the definition first, then the closed form or kernel that is tested against it.

  poly_norm             Motif's activation: a cubic of its input, each power normalised       [Motif §2.1, PolyCom]
  attention             softmax(q·kᵀ) v, causal, grouped keys; and its differential form      [2410.05258 eq. 1-3]
  max_logits            largest q·k·scale of every head, without a T×T matrix                 [Kimi K2 §2.1]
  cross_entropy         loss and gradient in chunks of tokens, so that all logits never exist at once

Shapes:  B batch  T time  S keys  H heads  d head width  D features  N tokens  V vocabulary
`*_ref` is the definition: short, slow, the oracle of test_all.py.
"""
import torch
import torch.nn.functional as F


def wide(dtype):
    """The dtype sums are kept in: float32 for bfloat16 and float16; float32 and float64 stay what they are."""
    return torch.promote_types(dtype, torch.float32)


# ---- PolyNorm -----------------------------------------------------------------------------------------------------

def poly_norm_ref(x, w, b, eps=1e-6):
    """y = b + Σ_p w[3-p]·N(x^p), p = 1..3,  N(z) = z / √(mean z² + eps).   [Motif §2.1]

    x (..., D); w (3,), where w[0] belongs to x³ as in the released weights; b (1,)."""
    norm = lambda z: z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return b + sum(w[3 - p] * norm(x.pow(p)) for p in (1, 2, 3))


class PolyNorm(torch.autograd.Function):
    """The closed form: saves x alone, and recomputes the three r_p in the backward.

        r_p = (mean x^2p + eps)^-½,  n_p = r_p·x^p,  g = ∂L/∂y,  c_p = mean(g·n_p)
        ∂L/∂x = Σ_p w_p·r_p·p·x^(p-1)·(g − n_p·c_p);   ∂L/∂w_p = Σ g·n_p;   ∂L/∂b = Σ g

    Products by Horner's rule, powers by multiplication: `pow` alone would cost more than everything else here."""

    @staticmethod
    def scales(x, eps):
        """x (..., D) → x² and [r_1, r_2, r_3], each (..., 1)."""
        x2 = x * x
        x4 = x2 * x2
        means = x2.mean(-1, keepdim=True), x4.mean(-1, keepdim=True), (x4 * x2).mean(-1, keepdim=True)
        return x2, [torch.rsqrt(m + eps) for m in means]

    @staticmethod
    def forward(ctx, x, w, b, eps):
        ctx.save_for_backward(x, w)
        ctx.eps, ctx.dtype, x = eps, x.dtype, x.to(wide(x.dtype))
        _, (r1, r2, r3) = PolyNorm.scales(x, eps)
        y = (((w[0] * r3) * x + w[1] * r2) * x + w[2] * r1) * x + b
        return y.to(ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        x, g = x.to(wide(x.dtype)), g.to(wide(g.dtype))
        x2, (r1, r2, r3) = PolyNorm.scales(x, ctx.eps)
        D = x.shape[-1]
        gx = g * x
        s1, s2, s3 = (r * z.sum(-1, keepdim=True) for r, z in ((r1, gx), (r2, gx * x), (r3, gx * x2)))    # D·c_p
        a1, a2, a3 = w[2] * r1, w[1] * r2, w[0] * r3
        # Σ_p a_p·p·x^(p-1)·g  −  Σ_p a_p·p·r_p·c_p·x^(2p-1), both by Horner's rule
        dx = ((3 * a3 * x + 2 * a2) * x + a1) * g
        dx -= ((3 * a3 * r3 * s3 / D * x2 + 2 * a2 * r2 * s2 / D) * x2 + a1 * r1 * s1 / D) * x
        return dx.to(ctx.dtype), torch.stack([s3.sum(), s2.sum(), s1.sum()]).to(w.dtype), g.sum().view(1), None


def poly_norm(x, w, b, eps=1e-6):
    """poly_norm_ref by the closed form. Statistics are computed in float32 or wider: x⁶ overflows float16."""
    return PolyNorm.apply(x, w, b, eps)


# ---- attention ----------------------------------------------------------------------------------------------------

def causal_mask(T, S, doc_start=None, device=None):
    """True where a query may look: key j for query i, which stands at position S - T + i. (T, S), or (B, 1, T, S).

    doc_start (B, S) is the position at which each token's document begins; earlier keys are out of sight."""
    query, key = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    mask = key <= query
    return mask if doc_start is None else mask & (key >= doc_start[:, None, -T:, None])


def attention_ref(q, k, v, mask=None):
    """softmax(q·kᵀ/√d) v.  q (B, H, T, d), k (B, Hk, S, d), v (B, Hk, S, dv).

    mask: True where a query may look, as from causal_mask; None is causal."""
    groups = q.shape[1] // k.shape[1]
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5                          # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)     # (B, H, T, dv)


def attention(q, k, v, mask=None):
    """attention_ref by torch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


def diff_attention_ref(q, k, v, lam, mask=None):
    """(softmax(q1·k1ᵀ/√d) − λ·softmax(q2·k2ᵀ/√d)) v, per pair of adjacent sub-heads.   [2410.05258 eq. 1]

    q (B, 2H, T, d), k (B, 2Hk, S, d): sub-heads 2h and 2h+1 form head h; v (B, Hk, S, dv); λ a scalar tensor.
    Queries of head h use the pair of keys h // (H/Hk), first with first. → (B, H, T, dv)"""
    first, second = (attention_ref(q[:, i::2], k[:, i::2], v, mask) for i in (0, 1))
    return first - lam * second                       # linear in the maps: (A1 − λ·A2) v = A1 v − λ·A2 v


def diff_attention(q, k, v, lam, mask=None):
    """diff_attention_ref by two calls of the fused kernel."""
    first, second = (attention(q[:, i::2], k[:, i::2], v, mask) for i in (0, 1))
    return first - lam * second


# ---- largest logits -----------------------------------------------------------------------------------------------

def max_logits_ref(q, k, mask=None):
    """S^h = max over batch, queries i and keys j that i may see of q_i·k_j/√d → (H,).   [Kimi K2 §2.1, signed]"""
    mask = causal_mask(q.shape[2], k.shape[2], device=q.device) if mask is None else mask
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5        # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).amax((0, 2, 3))


@torch.no_grad()
def max_logits(q, k, mask=None, block=128):
    """max_logits_ref in blocks of queries, each against the keys up to its own end: no T×T matrix."""
    (B, H, T, d), S = q.shape, k.shape[2]
    k = k.repeat_interleave(H // k.shape[1], 1) if H != k.shape[1] else k
    largest = q.new_full((H,), -torch.inf)
    for start in range(0, T, block):
        stop = min(start + block, T)
        seen = S - T + stop                                                # keys that the block's last query sees
        sight = (causal_mask(stop - start, seen, device=q.device) if mask is None else mask[..., start:stop, :seen])
        scores = q[:, :, start:stop] @ k[:, :, :seen].mT                   # (B, H, block, seen)
        largest = torch.maximum(largest, scores.masked_fill_(~sight, -torch.inf).amax((0, 2, 3)))
    return largest * d ** -0.5


# ---- cross-entropy ------------------------------------------------------------------------------------------------

def cross_entropy_ref(h, w, targets):
    """Mean over tokens of −log softmax(h·wᵀ)[target], and the N terms.  h (N, D), w (V, D), targets (N,) int64."""
    nll = F.cross_entropy(h @ w.mT, targets, reduction="none")
    return nll.mean(), nll


class CrossEntropy(torch.autograd.Function):
    """Chunks of tokens: the logits of one chunk live, become its gradient in place, and are gone.

    Both gradients are finished in the forward (the loss is a scalar: the backward only scales them), so that the
    product h·wᵀ is not computed twice."""

    @staticmethod
    def forward(ctx, h, w, targets, chunk):
        N, wide_t = len(h), wide(h.dtype)
        weight = w.to(h.dtype)
        nll = h.new_empty(N, dtype=wide_t)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w, dtype=wide_t) if ctx.needs_input_grad[1] else None
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            logits, target = (h[part] @ weight.mT).to(wide_t), targets[part, None]                # (chunk, V)
            lse = logits.logsumexp(-1, keepdim=True)
            nll[part] = (lse - logits.gather(1, target)).squeeze(1)
            if dh is None and dw is None:
                continue
            grad = logits.sub_(lse).exp_()                                                        # softmax
            grad = grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0)).div_(N).to(h.dtype)
            if dh is not None:
                dh[part] = grad @ weight
            if dw is not None:
                dw.addmm_(grad.mT, h[part]) if dw.dtype == h.dtype else dw.add_(grad.mT @ h[part])
        ctx.save_for_backward(dh, dw)
        ctx.w_dtype = w.dtype
        ctx.mark_non_differentiable(nll)
        return nll.mean(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        dh, dw = ctx.saved_tensors
        dh = None if dh is None else dh * g.to(dh.dtype)
        return dh, None if dw is None else (dw * g).to(ctx.w_dtype), None, None


def cross_entropy(h, w, targets, chunk=1024):
    """cross_entropy_ref with at most chunk × V logits alive: (mean, (N,) terms). The terms carry no gradient."""
    return CrossEntropy.apply(h, w, targets, chunk)
