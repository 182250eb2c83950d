"""The decoder, every variant of it in one file. What is not a vanilla Transformer:

  Motif-2.6B   differential attention (two softmax maps, one subtracted) · gated PolyNorm · tied embedding
  Kimi K2      multi-head latent attention (keys and values from one short vector) · sparse mixture of experts
  candidates   what Motif tried beside it: QK-Norm, keys and values shared by layers, nGPT; and what its successor
               took up, fewer maps that are subtracted than those they are subtracted from
  the control  GPT-2's block: LayerNorm, learned positions, GELU

Two seams carry what comes with many devices. The model is handed its operations (`Ops`), so that what happens to
a matmul's input or to a token's expert is decided outside; and it can be built as a range of layers, same names.

Shapes:  B batch  T time  C width  H softmax maps (n_head)  d head width  V vocabulary  N = B·T tokens
Try:     python model.py                                             # every preset: parameters, FLOPs/token, KV cache
         python model.py --sample out/laptop --prompt "def " [--tokens 200 --temperature 0.8 --top-p 0.95 --seed 0]
         python model.py --sample out/laptop-k2 --export FOLDER      # as Hugging Face's DeepseekV3ForCausalLM
"""
import argparse
import functools
import io
import json
import math
import mmap
import os
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels


# ---- configuration ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 4
    n_head: int = 4              # softmax maps; differential attention pairs them: n_head/2 heads, values 2·d_head
    n_kv_head: int = 4           # as n_head; fewer = grouped queries
    d_model: int = 128
    d_head: int = 32
    d_ff: int = 384
    vocab_size: int = 4096
    context: int = 256           # tokens
    differential: bool = True
    n_noise: int = 0             # maps that are subtracted: half of them (0), or fewer, each from a group  [2510.06949]
    lam_delay: int = 0           # layers by which λ_init lags; 1 in Motif's own code, for which its weights were made
    qk_norm: bool = False        # queries and keys of a head normalised, with gains                [2010.04245]
    share_kv: int = 1            # adjacent layers that use the keys and values of the first of them   [2405.12981]
    ngpt: bool = False           # everything of width d_model lives on the unit sphere             [2410.01131]
    act: str = "polynorm"        # polynorm | silu | gelu | relu2
    compile_act: bool = False    # PolyNorm through torch.compile: half a minute to start, then faster
    gated: bool = True           # down(act(gate) · up); with silu this is SwiGLU
    q_rank: int = 0              # multi-head latent attention: width of the queries' latent, 0 = none
    kv_rank: int = 0             # that of keys and values, 0 = no MLA; d_head is then the part without positions,
    d_rope: int = 0              # this the part with them, whose key all heads share,
    d_value: int = 0             # and this the width of a value
    n_expert: int = 0            # mixture of experts, 0 = none; in all layers but
    n_dense: int = 0             # the first ones, which are dense with d_ff
    n_active: int = 0            # experts a token goes to
    n_shared: int = 1            # experts that every token goes to
    d_expert: int = 0            # width of an expert
    n_group: int = 1             # groups of experts; a token's experts come
    top_group: int = 1           # from so many of them
    route_scale: float = 1.0     # sum of the weights of a token's experts
    balance_rate: float = 1e-3   # step of the router's bias                                      [DeepSeek-V3 §4.2]
    balance_loss: float = 0.0    # weight of the balance loss of each sequence      [DeepSeek-V3: 1e-4; K2 is silent]
    norm: str = "rms"            # rms | layer
    norm_eps: float = 1e-6       # [Motif config]
    position: str = "rope"       # rope | learned
    rope_theta: float = 10_000.0   # [Motif §3.2.2]
    yarn: float = 0.0            # YaRN: contexts so many times as long as the first one of
    yarn_from: int = 4096        # so many tokens; frequencies that turn in it more often than
    yarn_fast: float = 32.0      # this stay as they are, those that turn less often than
    yarn_slow: float = 1.0       # this become `yarn` times as slow                          [2309.00071 §3.2]
    tie: bool = True             # one matrix for embedding and head
    zero_out: bool = True        # projections back into the residual stream start at zero   [ours]
    init_std: float = 0.02       # of every other matrix                                     [guess]
    loss_chunk: int = 1024       # tokens whose logits exist at once

    def __post_init__(self):
        for name, choices in dict(act=ACTIVATIONS, norm=("rms", "layer"), position=("rope", "learned")).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)!r}: have {', '.join(choices)}")
        zero = ("q_rank", "kv_rank", "d_rope", "d_value", "n_expert", "n_dense", "n_active", "n_shared", "d_expert",
                "balance_rate", "balance_loss", "yarn", "lam_delay", "n_noise")
        for name, value in vars(self).items():
            if type(value) is int and value < (name not in zero):
                raise ValueError(f"model.{name}={value}: must be at least {int(name not in zero)}")
            if type(value) is float and not (0 < value < math.inf or value == 0 and name in zero):
                raise ValueError(f"model.{name}={value}: must be positive")
        if self.kv_rank and (self.differential or self.position != "rope" or not self.d_rope or not self.d_value
                             or self.n_kv_head != self.n_head):
            raise ValueError(f"model.kv_rank={self.kv_rank}: latent attention needs differential=false, position=rope, "
                             f"n_kv_head=n_head, and d_rope={self.d_rope}, d_value={self.d_value} above 0")
        extra = [name for name in ("qk_norm", "ngpt") if getattr(self, name)] + ["share_kv"] * (self.share_kv > 1)
        if self.kv_rank and extra:
            raise ValueError(f"model.{extra[0]}: not with latent attention (kv_rank={self.kv_rank}), which keeps one "
                             "short vector for all heads, normalises it, and makes no keys when it decodes")
        if self.ngpt and (self.qk_norm or self.n_expert or not self.gated or self.norm != "rms"
                          or self.position != "rope"):
            raise ValueError("model.ngpt normalises weights, queries, keys and the residual stream itself, and is "
                             f"defined for dense gated layers: not with qk_norm={self.qk_norm}, n_expert="
                             f"{self.n_expert}, gated={self.gated}, norm={self.norm}, position={self.position}")
        if self.n_expert and not (self.n_active and self.d_expert and self.gated and self.n_expert % self.n_group == 0
                                  and self.n_active <= self.n_expert // self.n_group * self.top_group
                                  and self.top_group <= self.n_group and self.n_dense <= self.n_layer):
            raise ValueError(f"model.n_expert={self.n_expert}: needs gated=true, d_expert={self.d_expert} above 0, "
                             f"groups of equal size (n_group={self.n_group}), and n_active={self.n_active} experts in "
                             f"top_group={self.top_group} of them")
        if self.n_head % self.n_kv_head and not self.n_noise:
            raise ValueError(f"model.n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.differential and not self.n_noise and (self.n_head % 2 or self.n_kv_head % 2):
            raise ValueError(f"differential attention pairs heads: n_head={self.n_head} and "
                             f"n_kv_head={self.n_kv_head} must be even")
        if self.n_noise and (not self.differential or self.n_head % self.n_noise or self.n_head < 2 * self.n_noise
                             or 2 * self.n_noise % self.n_kv_head or self.n_kv_head % 2):
            raise ValueError(f"model.n_noise={self.n_noise}: needs differential=true, n_head={self.n_head} a multiple "
                             f"of it and at least twice it, and an even n_kv_head={self.n_kv_head} that divides "
                             f"{2 * self.n_noise}: a pair of keys, signal's and noise's, for so many groups")
        if self.position == "rope" and self.rotary % 2:
            raise ValueError(f"model.d_{'rope' if self.kv_rank else 'head'}={self.rotary}: rotary positions need an "
                             "even width")

    @property
    def rotary(self):
        """The width of a head that is rotated."""
        return self.d_rope if self.kv_rank else self.d_head

    @property
    def maps(self):
        """Softmax maps of a group: those from which one is subtracted, and that one. 1 where none is."""
        return (self.n_head // self.n_noise if self.n_noise else 2) if self.differential else 1

    @property
    def sharpness(self):
        """What YaRN multiplies logits by: (0.1·ln s + 1)².   [2309.00071 eq. 22]"""
        return (0.1 * math.log(self.yarn) + 1) ** 2 if self.yarn else 1.0


ACTIVATIONS = dict(polynorm=None, silu=F.silu, gelu=F.gelu, relu2=lambda x: F.relu(x).square())

PRESETS = {
    "laptop": ModelConfig(init_std=0.1),                                         # Motif's block, small    [ours]
    "gpt2": ModelConfig(differential=False, act="gelu", gated=False, norm="layer", norm_eps=1e-5, position="learned",
                        d_ff=512, zero_out=False),                        # the control   [GPT-2, without biases]
    "shakespeare": ModelConfig(d_ff=256, context=64, vocab_size=261, init_std=0.1),   # bytes, five specials  [ours]
    "laptop-k2": ModelConfig(differential=False, act="silu", d_head=24, d_rope=8, d_value=32, q_rank=64, kv_rank=32,
                             n_expert=16, n_dense=1, n_active=2, d_expert=128, route_scale=1.412, balance_rate=1e-2,
                             tie=False, init_std=0.1),                           # K2's block, small        [ours]
    "motif-2.6b": ModelConfig(n_layer=32, n_head=16, n_kv_head=16, d_model=2048, d_head=128, d_ff=8192,
                              vocab_size=219_520, context=4096),                 # [Motif Table 1; theta by §3.2.2]
}
PRESETS["motif-2.6b-lc"] = replace(PRESETS["motif-2.6b"], context=16_384, rope_theta=500_000.0)       # [Motif §3.2.3]
PRESETS["deepseek-v3"] = ModelConfig(                                            # [its config.json; DeepSeek-V3 §4.2]
    n_layer=61, n_head=128, n_kv_head=128, d_model=7168, d_head=128, d_rope=64, d_value=128, q_rank=1536, kv_rank=512,
    d_ff=18_432, vocab_size=129_280, context=4096, differential=False, act="silu", tie=False, zero_out=False,
    init_std=0.006, n_expert=256, n_dense=3, n_active=8, d_expert=2048, n_group=8, top_group=4, route_scale=2.5,
    balance_loss=1e-4)
PRESETS["kimi-k2"] = replace(                                                    # [Kimi K2 Table 2; its config.json]
    PRESETS["deepseek-v3"], n_head=64, n_kv_head=64, vocab_size=163_840, n_expert=384, n_dense=1, n_group=1,
    top_group=1, route_scale=2.827, rope_theta=50_000.0, balance_loss=0.0)


# ---- the operations a model is handed -----------------------------------------------------------------------------

def linear(name, weights, pre, params, *x, ends=None):
    """h = pre(*x), once; (h·wᵀ for w in weights).  `name` says which matmul of a layer this is; `params` are the
    parameters that pre uses. With `ends` (E,) weights are stacks (E, out, in): w[e] meets rows ends[e-1] to ends[e].

    h belongs to the matmul: whoever replaces this function may recompute it, store it smaller or elsewhere."""
    h = pre(*x)
    if ends is None:
        return tuple(F.linear(h, w.to(h.dtype)) for w in weights)
    return tuple(kernels.grouped_linear(h, w, ends) for w in weights)


def identity(x):
    return x


def parameters_of(*modules):
    """Of what `pre` consists of; an activation may be a plain function, which has none."""
    return tuple(p for module in modules if isinstance(module, nn.Module) for p in module.parameters())


def local_exchange(tokens, weight, counts):
    """Send tokens (M, C) and their weights (M, 1), sorted by expert, `counts` (E,) of each, to where their experts are.

    → arrive() → tokens and weights for the experts here, their counts, and the way back for what they become. What is
    computed before `arrive` is computed while they travel. On one device they are there already."""
    return lambda: (tokens, weight, counts, identity)


class Ops(NamedTuple):
    linear: Callable = linear
    exchange: Callable = local_exchange


# ---- parts --------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)


def make_norm(config):
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.d_model, config.norm_eps)


class PolyNorm(nn.Module):
    def __init__(self, compiled=False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.zeros(1))
        self.compiled = compiled

    def forward(self, x):
        return kernels.poly_norm(x, self.weight, self.bias, compiled=self.compiled and self.training)


def rope_frequencies(config, device=None):
    """Radians a token of each pair, (rotary/2,) float64: θ_i = theta^(-2i/d). With YaRN, those that turn fewer than
    yarn_slow times in yarn_from tokens are divided by s, those above yarn_fast are not, linear in i between."""
    d, c = config.rotary, config
    i = torch.arange(d // 2, device=device, dtype=torch.float64)
    theta = c.rope_theta ** -(2 * i / d)
    if not c.yarn:
        return theta
    where = lambda turns: d * math.log(c.yarn_from / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))
    low, high = max(math.floor(where(c.yarn_fast)), 0), min(math.ceil(where(c.yarn_slow)), d - 1)
    slowed = ((i - low) / max(high - low, 1e-3)).clamp(0, 1)                                # γ = 1 − slowed, eq. 18-20
    return theta * (1 - slowed) + theta / c.yarn * slowed


def rope_table(config, start, stop, device, dtype):
    """cos(position · theta^(-2i/d)) for both halves, and ∓sin, both (T, d). In float64 first: angles grow large."""
    position = torch.arange(start, stop, device=device, dtype=torch.float64)
    angle = position[:, None] * rope_frequencies(config, device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) → (a·cos − b·sin, b·cos + a·sin) for the pairs (x_i, x_i+d/2) of x (B, H, T, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def matrix(rows, columns):
    return nn.Parameter(torch.empty(rows, columns))


class Heads(nn.Module):
    """What every attention knows of its own heads: `max_logits`, and `qk_heads`, which weights make them.

    Recorded in training forwards, over micro-batches, until `clear_logits`. With a threshold `tau`, a head that
    provably stays below it may record an upper bound (≤ tau) in place of its largest logit: then not exact."""

    def __init__(self, config, layer, ops):
        super().__init__()
        self.config, self.layer, self.ops = config, layer, ops
        self.register_buffer("max_logits", torch.full((config.n_head,), -torch.inf), persistent=False)            # (H,)
        self.max_logits_exact, self.tau = True, None
        self.counts = True                                             # False while a forward is computed again

    def clear_logits(self, tau=None):
        self.max_logits.fill_(-torch.inf)
        self.max_logits_exact, self.tau = True, tau

    def asks(self):
        """The `tau` that attention is called with: OFF where this forward does not count."""
        return self.tau if self.training and self.counts else kernels.OFF

    def record(self, logits):
        """(largest (H,), whether they are exact) of this forward, or None."""
        if logits is not None:
            largest, exact = logits
            self.max_logits.copy_(torch.maximum(self.max_logits, largest))
            self.max_logits_exact &= exact


class Attention(Heads):
    """Multi-head or grouped attention, plain or differential.

    share_kv: the first of so many adjacent layers makes keys and values, the others read them (CLA, 2405.12981): the
    cache shrinks, each layer still has maps of its own. LiSA [2408.01890], which Motif cites, shares the maps instead:
    a trained model's layers take over the attention of a neighbour, its heads aligned by a small network and corrected
    by queries and keys of low rank. That is fitted to a model that exists; this one is trained as it is."""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        H, Hk, d, C = config.n_head, config.n_kv_head, config.d_head, config.d_model
        self.norm = make_norm(config)
        out = H * d if config.maps == 1 else (H - H // config.maps) * 2 * d            # a noise map puts nothing out
        self.wq, self.wo, self.leads = matrix(H * d, C), matrix(C, out), layer % config.share_kv == 0
        if self.leads:
            self.wk, self.wv = matrix(Hk * d, C), matrix(Hk * d, C)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config.norm_eps), RMSNorm(d, config.norm_eps) if self.leads else None
        if config.differential:
            self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * (layer - config.lam_delay))       # l = layer + 1 in the paper
            self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(torch.empty(d)) for _ in range(4))
            self.head_norm = RMSNorm(2 * d, eps=1e-5)              # one vector for all heads    [Motif config]

    def lam(self):
        """λ = exp(λq1·λk1) − exp(λq2·λk2) + λ_init, one number a layer, shared by its heads.   [2410.05258 eq. 2]"""
        return (self.lq1 @ self.lk1).exp() - (self.lq2 @ self.lk2).exp() + self.lam_init

    def qk_heads(self):
        """What makes up each head's logits: (parameter, view of it as (H, rows, inputs), power of γ).

        A key that other heads or layers use too stays as it is: all of γ goes to the head's own query rows."""
        by_head = lambda w: w.unflatten(0, (-1, self.config.d_head))
        if self.config.n_kv_head < self.config.n_head or self.config.share_kv > 1:
            return [(self.wq, by_head, 1.0)]
        return [(self.wq, by_head, 0.5), (self.wk, by_head, 0.5)]

    def join(self, y):
        """Heads side by side (B, H, T, d) → (B, T, H·d); differential ones normalised each, × (1 − λ_init)."""
        if self.config.differential:
            y = self.head_norm(y) * (1 - self.lam_init)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, rope=None, sees=None, cache=None, kv=None):
        """x (B, T, C), and the leader's keys and values where layers share them → (B, T, C), keys and values."""
        c, heads = self.config, lambda t, width: t.unflatten(-1, (-1, width)).transpose(1, 2)    # (B, H, T, width)
        if self.leads:
            q, k, v = self.ops.linear("qkv", (self.wq, self.wk, self.wv), self.norm, parameters_of(self.norm), x)
            kv = self.key(heads(k, c.d_head), rope), heads(v, 2 * c.d_head if c.differential else c.d_head)
            kv = kv if cache is None else cache.put(self.layer, *kv)
        else:
            q, = self.ops.linear("q", (self.wq,), self.norm, parameters_of(self.norm), x)
        q, (k, v) = self.query(heads(q, c.d_head), rope), kv
        if c.differential:
            y, logits = kernels.diff_attention(q, k, v, self.lam().to(q.dtype), sees, c.maps, self.asks())
            gains = parameters_of(self.head_norm)
        else:
            y, logits = kernels.attention(q, k, v, sees, tau=self.asks())
            gains = ()
        self.record(logits)
        return self.ops.linear("out", (self.wo,), self.join, gains, y)[0], kv

    def key(self, k, rope):
        """k (B, Hk, T, d), normalised if it is to be, then rotated."""
        k = self.k_norm(k) if self.config.qk_norm else k
        return k if rope is None else rotate(k, *rope)

    def query(self, q, rope):
        """q (B, H, T, d), as key; with YaRN the logits' sharper scale is the query's."""
        q = self.q_norm(q) if self.config.qk_norm else q
        q = q if rope is None else rotate(q, *rope)
        return q * self.config.sharpness if self.config.yarn else q


class LatentAttention(Heads):
    """Multi-head latent attention: queries, keys and values are made from short vectors.   [DeepSeek-V3 §2.1.1]

        c_q = norm(W_dq h),  [c_kv; k_rope] = W_dkv h,  c_kv = norm(c_kv)               (1)
        q_i = [W_uq c_q ; rope(W_qr c_q)],  k_i = [W_uk c_kv ; rope(k_rope)],  v_i = W_uv c_kv     (2)

    Heads share the rotary key. Training multiplies (2) out. Decoding keeps c_kv and k_rope alone, kv_rank + d_rope
    numbers a token, and absorbs W_uk into the query and W_uv into the output: q_i·k_i = (W_ukᵀ q_nope)·c_kv + ..."""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        c, H = config, config.n_head
        self.norm, self.kv_norm = make_norm(c), RMSNorm(c.kv_rank, c.norm_eps)
        if c.q_rank:
            self.wdq, self.q_norm = matrix(c.q_rank, c.d_model), RMSNorm(c.q_rank, c.norm_eps)
        self.wuq = matrix(H * (c.d_head + c.d_rope), c.q_rank or c.d_model)    # of each head: W_uq's rows, then W_qr's
        self.wdkv = matrix(c.kv_rank + c.d_rope, c.d_model)
        self.wuk, self.wuv = matrix(H * c.d_head, c.kv_rank), matrix(H * c.d_value, c.kv_rank)
        self.wo = matrix(c.d_model, H * c.d_value)

    def qk_heads(self):
        """As Attention.qk_heads. The rotary key is everybody's: all of γ goes to the head's own rotary query."""
        d, by_head = self.config.d_head, lambda w: w.unflatten(0, (self.config.n_head, -1))
        return [(self.wuq, lambda w: by_head(w)[:, :d], 0.5), (self.wuq, lambda w: by_head(w)[:, d:], 1.0),
                (self.wuk, by_head, 0.5)]

    def forward(self, x, rope, sees=None, cache=None, kv=None):
        c, H = self.config, self.config.n_head
        heads = lambda t: t.unflatten(-1, (H, -1)).transpose(1, 2)                               # (B, H, T, width)
        if c.q_rank:
            cq, ckv = self.ops.linear("latents", (self.wdq, self.wdkv), self.norm, parameters_of(self.norm), x)  # (1)
            q, = self.ops.linear("q_up", (self.wuq,), self.q_norm, parameters_of(self.q_norm), cq)
        else:
            q, ckv = self.ops.linear("latents", (self.wuq, self.wdkv), self.norm, parameters_of(self.norm), x)
        q = q * c.sharpness if c.yarn else q
        q_nope, q_rope = heads(q).split((c.d_head, c.d_rope), -1)
        ckv, k_rope = ckv.split((c.kv_rank, c.d_rope), -1)
        q_rope, k_rope = rotate(q_rope, *rope), rotate(k_rope[:, None], *rope)                   # (B, 1, T, d_rope)
        scale = (c.d_head + c.d_rope) ** -0.5
        if cache is not None:
            ckv, k_rope = cache.put(self.layer, self.kv_norm(ckv)[:, None], k_rope)              # (B, 1, S, kv_rank)
            wuk, wuv = (w.to(q.dtype).unflatten(0, (H, -1)) for w in (self.wuk, self.wuv))       # (H, width, kv_rank)
            q, k = torch.cat((q_nope @ wuk, q_rope), -1), torch.cat((ckv, k_rope), -1)
            y = kernels.attention(q, k, ckv, sees, scale)[0] @ wuv.mT
        else:
            gains = parameters_of(self.kv_norm)
            k, v = self.ops.linear("kv_up", (self.wuk, self.wuv), self.kv_norm, gains, ckv)                  # (2)
            q, k = torch.cat((q_nope, q_rope), -1), torch.cat((heads(k), k_rope.expand(-1, H, -1, -1)), -1)
            y, logits = kernels.attention(q, k, heads(v), sees, scale, self.asks())
            self.record(logits)
        return self.ops.linear("out", (self.wo,), self.join, (), y)[0], None

    def join(self, y):
        """Heads side by side: (B, H, T, d_value) → (B, T, H·d_value)."""
        return y.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) where not gated. `shared`: the expert that every token goes to,
    whose input is normalised already."""

    def __init__(self, config, ops, shared=False):
        super().__init__()
        self.ops, self.gated, self.prefix = ops, config.gated, "shared_" if shared else ""
        d_ff = config.n_shared * config.d_expert if shared else config.d_ff
        self.norm = nn.Identity() if shared else make_norm(config)
        self.act = PolyNorm(config.compile_act) if config.act == "polynorm" else ACTIVATIONS[config.act]
        if config.gated:
            self.gate = matrix(d_ff, config.d_model)
        self.up, self.down = matrix(d_ff, config.d_model), matrix(config.d_model, d_ff)

    def inner(self, gate, up):
        """What `down` multiplies."""
        return self.act(gate) * up

    def inside(self):
        """The parameters that `inner` uses."""
        return parameters_of(self.act)

    def forward(self, x):
        """x (B, T, C) → (B, T, C)"""
        gains, inside = parameters_of(self.norm), self.inside()
        if not self.gated:
            h = self.ops.linear("up", (self.up,), self.norm, gains, x)
            return self.ops.linear("down", (self.down,), self.act, inside, *h)[0]
        gate, up = self.ops.linear(self.prefix + "up", (self.gate, self.up), self.norm, gains, x)
        return self.ops.linear(self.prefix + "down", (self.down,), self.inner, inside, gate, up)[0]


class MoE(nn.Module):
    """Sparse mixture of experts: route → dispatch → experts → combine, functions that pass tensors.   [DeepSeek-V3
    §2.1.2]

    No token is dropped and none padded. `load` (E,) counts the tokens of each expert over training forwards; after the
    step, `balance_` moves `bias`, which has a say in the choice of experts and none in their weights."""

    def __init__(self, config, ops, here):
        super().__init__()
        c, E = config, config.n_expert
        self.config, self.ops, self.norm = c, ops, make_norm(c)
        self.router = matrix(E, c.d_model)
        self.gate, self.up = (nn.Parameter(torch.empty(len(here), c.d_expert, c.d_model)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(len(here), c.d_model, c.d_expert))
        self.act = PolyNorm(c.compile_act) if c.act == "polynorm" else ACTIVATIONS[c.act]
        if c.n_shared:
            self.shared = FeedForward(c, ops, shared=True)
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)
        self.counts = True                                             # False while a forward is computed again

    def route(self, h):
        """h (B, T, C) → a token's experts (N, k); their weights (N, k), its scores in parts of their sum; balance loss.

        Scores are computed in float32 whatever h is: one step of bfloat16 is larger than the bias's, and among hundreds
        of experts every tenth token would have a tie at its last place."""
        c = self.config
        exact = kernels.accumulation_dtype(h.dtype)
        s = F.linear(h.to(exact), self.router.to(exact)).sigmoid().flatten(0, 1)                              # (N, E)
        choice = s.detach() + self.bias
        if c.n_group > 1:                                              # the groups whose best two sum up highest
            groups = choice.unflatten(-1, (c.n_group, -1))                                       # (N, G, E/G)
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(c.top_group, -1).indices
            chosen = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice = groups.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
        index = choice.topk(c.n_active, -1).indices
        weight = s.gather(1, index)
        if c.n_active > 1:                                             # one alone would be s/s = 1, and learn nothing
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)       # not 0/0 where all scores are zero
        balance = 0.0
        if self.training and c.balance_loss:
            balance = c.balance_loss * self.imbalance(s, h.shape[0])
        return index, weight * c.route_scale, balance

    def imbalance(self, s, B):
        """Scores s (N, E) of B sequences → mean over sequences of Σ_i f_i·P_i, 1 where every expert is scored alike.
        f counts each token's k best scores, without bias and groups, which have a say in the dispatch alone.
        [DeepSeek-V3 eq. 17-20]"""
        E, k = self.config.n_expert, self.config.n_active
        best = s.topk(k, -1).indices
        f = torch.zeros_like(s).scatter(1, best, 1.0).unflatten(0, (B, -1)).mean(1) * E / k                  # (B, E)
        p = (s / s.sum(-1, keepdim=True)).unflatten(0, (B, -1)).mean(1)
        return (f * p).sum(-1).mean()

    def dispatch(self, h, index, weight):
        """Send every token to its experts. h (N, C), index and weight (N, k) → (token of each row sent, `arrive`).

        Rows are sorted by expert, once: with N = 2 tokens and k = 2, index [[3, 0], [0, 1]] makes the rows of tokens
        0, 1, 1, 0, for the experts 0, 0, 1, 3. The weight of each goes with it."""
        order = index.flatten().argsort(stable=True)                   # (N·k,)
        counts = index.flatten().bincount(minlength=self.config.n_expert)
        if self.training and self.counts:
            self.load += counts
        token = order // index.shape[1]
        rows = h.index_select(0, token)
        return token, self.ops.exchange(rows, weight.flatten()[order, None].to(h.dtype), counts)

    def experts(self, rows, weight, counts):
        """rows (M, C) and their weights (M, 1), sorted by expert, and how many each one here has → what the experts
        make of them (M, C)."""
        ends = counts.cumsum(0)
        gate, up = self.ops.linear("expert_up", (self.gate, self.up), identity, (), rows, ends=ends)
        return self.ops.linear("expert_down", (self.down,), self.inner, parameters_of(self.act), gate, up, weight,
                               ends=ends)[0]

    def inner(self, gate, up, weight):
        """What `down` multiplies: weighted here, so that nothing has to be kept for it where the token came from."""
        return self.act(gate) * up * weight

    def combine(self, rows, token, N):
        """Sum what came back for each token: rows (N·k, C) → (N, C)."""
        return torch.zeros(N, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, token, rows)

    def forward(self, x):
        """x (B, T, C) → (B, T, C), balance loss"""
        h = self.norm(x)
        index, weight, balance = self.route(h)
        token, arrive = self.dispatch(h.flatten(0, 1), index, weight)
        shared = self.shared(h) if self.config.n_shared else 0.0       # while tokens travel
        rows, weight, counts, back = arrive()
        y = back(self.experts(rows, weight, counts))
        return self.combine(y, token, len(index)).view_as(h) + shared, balance

    @torch.no_grad()
    def balance_(self, load):
        """b_i += u where expert i had fewer tokens than the mean of load (E,), −= u where more."""
        self.bias += self.config.balance_rate * (load.mean() - load).sign().to(self.bias.dtype)


class Layer(nn.Module):
    def __init__(self, config, layer, ops, experts):
        super().__init__()
        self.attention = (LatentAttention if config.kv_rank else Attention)(config, layer, ops)
        self.sparse = bool(config.n_expert) and layer >= config.n_dense
        self.ffn = MoE(config, ops, experts) if self.sparse else FeedForward(config, ops)

    def forward(self, x, rope=None, sees=None, cache=None, kv=None):
        """x (B, T, C) → (B, T, C), the keys and values that the layers behind it share, if they do, balance loss."""
        y, kv = self.attention(x, rope, sees, cache, kv)
        x = x + y
        if self.sparse:
            y, balance = self.ffn(x)
            return x + y, kv, balance
        return x + self.ffn(x), kv, 0.0


# ---- a candidate: nGPT, the network on the unit sphere [2410.01131] -----------------------------------------------
# Vectors of width C = d_model have norm 1: embeddings, rows of matrices that read the residual stream, columns of those
# that write to it, and the stream itself, so that no other norm is needed. Scales are kept as s/√C, the size of a unit
# vector's entries, so that the optimizer's steps suit both (§2.5); only those inside feed-forward layers as s.

def unit(x, dim=-1):
    return F.normalize(x, dim=dim)


def scales(width, d_model):
    return nn.Parameter(torch.full((width,), d_model ** -0.5))


@torch.no_grad()
def renormalise_(tensors):
    """{name: weight}: every vector of width d_model gets norm 1. Called after each step of an nGPT."""
    for name, w in tensors.items():
        if w.ndim > 1:
            w.copy_(unit(w, -2 if name.endswith(("wo", "down")) else -1))


class SphereAttention(Attention):
    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        self.norm = nn.Identity()
        self.s_qk = scales(config.n_head * config.d_head, config.d_model)

    def key(self, k, rope):
        return super().key(unit(k), rope)

    def query(self, q, rope):
        """Keys have norm 1, and both scales are the query's: (s·q)·(s·k)·√d = (s²·d·q)·k/√d. They come before the
        rotation, so that logits depend on distances alone; in nGPT's own code they follow it.   [eq. 15, 16]"""
        d = self.config.d_head
        scale = self.s_qk.unflatten(0, (-1, 1, d)).square() * self.config.d_model * d                   # (H, 1, d)
        return super().query(unit(q) * scale.to(q.dtype), rope)


class SphereFeedForward(FeedForward):
    def __init__(self, config, ops):
        super().__init__(config, ops)
        self.norm, self.root = nn.Identity(), config.d_model ** 0.5
        self.s_gate, self.s_up = scales(config.d_ff, 1), scales(config.d_ff, 1)

    def inner(self, gate, up):
        """act(s_v·√C·gate)·(s_u·up)   [eq. 20, 21]"""
        return super().inner(gate * (self.s_gate * self.root).to(gate.dtype), up * self.s_up.to(up.dtype))

    def inside(self):
        return (*super().inside(), self.s_gate, self.s_up)


class SphereLayer(nn.Module):
    """A step along the sphere, in place of a sum: each entry goes its own part α of the way."""

    def __init__(self, config, layer, ops, experts):
        super().__init__()
        self.attention, self.ffn = SphereAttention(config, layer, ops), SphereFeedForward(config, ops)
        self.rate = config.d_model ** 0.5 / config.n_layer             # α is born as 1/n_layer
        self.a_attention, self.a_ffn = (scales(config.d_model, config.d_model) for _ in range(2))

    def forward(self, x, rope=None, sees=None, cache=None, kv=None):
        """As Layer's."""
        y, kv = self.attention(x, rope, sees, cache, kv)
        x = unit(x + (self.a_attention * self.rate).to(x.dtype) * (unit(y) - x))                             # [eq. 10]
        return unit(x + (self.a_ffn * self.rate).to(x.dtype) * (unit(self.ffn(x)) - x)), kv, 0.0             # [eq. 11]


def sharpened(head, s_logits):
    """Logits are cosines times a learned sharpness.   [eq. 3]"""
    return head * (s_logits * head.shape[1] ** 0.5)[:, None]


# ---- the network --------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of the tokens seen so far, by layer. Room for `context` tokens is taken at the first `put`."""

    def __init__(self, context):
        self.context, self.length, self.store = context, 0, {}

    def put(self, layer, *new):
        """Append tensors (B, H, T, width) after `length` tokens; → all of them so far, (B, H, length + T, width)."""
        if layer not in self.store:
            self.store[layer] = [t.new_empty(*t.shape[:2], self.context, t.shape[3]) for t in new]
        stop = self.length + new[0].shape[2]
        for old, t in zip(self.store[layer], new):
            old[:, :, self.length:stop] = t
        return [t[:, :, :stop] for t in self.store[layer]]


class Transformer(nn.Module):
    """The whole model, or the layers of `layers` (a range): the first holds the embedding, the last the head.

    Parameters have the same names in both, and the same first values for a seed: each is drawn from its own name. The
    same holds for `experts`, the range of them that is here (all by default): ops.exchange has to bring the tokens."""

    def __init__(self, config, ops=Ops(), layers=None, seed=0, experts=None):
        super().__init__()
        self.config, layers = config, range(config.n_layer) if layers is None else layers
        if layers.start % config.share_kv:
            raise ValueError(f"layers from {layers.start} on: their keys and values are made in another range "
                             f"(share_kv={config.share_kv})")
        self.experts = range(config.n_expert) if experts is None else experts
        self.first, self.last = layers.start == 0, layers.stop == config.n_layer
        if self.first or self.last and config.tie:
            self.embed = matrix(config.vocab_size, config.d_model)
        if self.first and config.position == "learned":
            self.position = matrix(config.context, config.d_model)
        layer = SphereLayer if config.ngpt else Layer
        self.layers = nn.ModuleDict({str(i): layer(config, i, ops, self.experts) for i in layers})
        if self.last:
            self.norm = nn.Identity() if config.ngpt else make_norm(config)
            if not config.tie:
                self.head = matrix(config.vocab_size, config.d_model)
            if config.ngpt:
                self.s_logits = scales(config.vocab_size, config.d_model)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed):
        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("lq1", "lk1", "lq2", "lk2"):
                std = 0.1                                                                        # [2410.05258]
            elif p.ndim < 2:
                continue                                               # gains and PolyNorm are born with their values
            elif leaf in ("wo", "down"):
                std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
                std = 0.0 if self.config.zero_out and not self.config.ngpt else std
            else:
                std = self.config.init_std
            units = [(name, p)] if p.ndim < 3 else [(f"{name}.{e}", p[i]) for i, e in enumerate(self.experts)]
            for unit_name, w in [] if p.is_meta else units:
                random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{unit_name}".encode()))
                w.copy_(torch.empty(w.shape, dtype=torch.float32).normal_(0, 1, generator=random) * std)
        if self.config.ngpt:
            renormalise_(dict(self.named_parameters()))

    def attentions(self):
        """name → Attention, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Heads)}

    def mixtures(self):
        """name → MoE, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MoE)}

    def forward(self, x, targets=None, doc_start=None, weight=None, cache=None, dtype=None):
        """x (B, T) int64 tokens (or (B, T, C), where an earlier range ends) → logits (B, T, V).

        With targets (B, T): (mean loss in nats/token, its (N,) terms, balance loss); with `weight` (B, T), the loss is
        the sum of weight × term. A range without the last layer → ((B, T, C), the balance loss of its layers).
        doc_start (B, T): where each token's document begins, or None: attention crosses documents.
        dtype: what is computed in (the weights' own by default)."""
        past, T = cache.length if cache else 0, x.shape[1]
        if past + T > self.config.context and self.config.position == "learned":
            raise ValueError(f"{past + T} tokens, but there are learned positions for {self.config.context}")
        if self.first:
            x = F.embedding(x, self.embed)
            x = x + self.position[past:past + T] if self.config.position == "learned" else x
            x = x if dtype is None else x.to(dtype)
        rope = None
        if self.config.position == "rope":
            rope = rope_table(self.config, past, past + T, x.device, kernels.accumulation_dtype(x.dtype))
        sees, kv, balance = kernels.sight(T, past + T, doc_start, x.device), None, 0.0
        for layer in self.layers.values():
            x, kv, of_layer = layer(x, rope, sees, cache, kv)
            balance = balance + of_layer
        if cache:
            cache.length += T
        if not self.last:
            return x, balance
        head, x = self.embed if self.config.tie else self.head, self.norm(x)
        head = sharpened(head, self.s_logits) if self.config.ngpt else head
        if targets is None:
            return F.linear(x, head.to(x.dtype))
        weight = None if weight is None else weight.flatten()
        loss, nll = kernels.cross_entropy(x.flatten(0, 1), head, targets.flatten(), weight, self.config.loss_chunk)
        return loss, nll, balance

    def count(self, on):
        """Whether forwards from here on are counted, in loads and largest logits: one that is computed again is not."""
        for module in (*self.attentions().values(), *self.mixtures().values()):
            module.counts = on


# ---- counting -----------------------------------------------------------------------------------------------------

@functools.cache
def count_parameters(config):
    """Parameters, counted on a model without storage: total; active (those that a token meets: its own experts, and of
    the look-up tables the head alone); embedding (head and positions too); matmul (those that a token is multiplied
    with: every matrix but the look-up tables, the head once, its own experts)."""
    with torch.device("meta"):
        named = dict(Transformer(config).named_parameters())
    outside = sum(p.numel() for name, p in named.items() if name in ("embed", "head", "position"))
    met = {name: p.numel() * config.n_active // config.n_expert if p.ndim == 3 else p.numel()
           for name, p in named.items() if name not in ("embed", "head", "position")}
    head = config.vocab_size * config.d_model
    return dict(total=sum(p.numel() for p in named.values()), active=sum(met.values()) + head, embedding=outside,
                matmul=sum(n for name, n in met.items() if named[name].ndim > 1) + head)


def flops_per_token(config, context=None, training=True):
    """FLOPs of one token: 2 per multiply-add of every matmul, and 3 times the forward's when training.

    Attention is counted against the full context, as PaLM does (a causal kernel needs half). Differential attention
    multiplies each of its maps with values twice as wide."""
    width = config.d_head * (3 if config.differential else 2)                            # of q·k, and of what follows
    width = config.d_head + config.d_rope + config.d_value if config.kv_rank else width
    attention = config.n_layer * (context or config.context) * config.n_head * width
    return (6 if training else 2) * (count_parameters(config)["matmul"] + attention)


def cache_per_token(config):
    """Numbers that the KV cache keeps for one token."""
    if config.kv_rank:
        return config.n_layer * (config.kv_rank + config.d_rope)
    return math.ceil(config.n_layer / config.share_kv) * 2 * config.n_kv_head * config.d_head


# ---- tensor files: the safetensors format -------------------------------------------------------------------------
# 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the raw bytes. No code is run.

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U64=torch.uint64, U32=torch.uint32,
              U16=torch.uint16, U8=torch.uint8, BOOL=torch.bool, C64=torch.complex64,
              F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2, F8_E8M0=torch.float8_e8m0fnu,
              F8_E4M3FNUZ=torch.float8_e4m3fnuz, F8_E5M2FNUZ=torch.float8_e5m2fnuz)
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_tensors(path, tensors):
    """Write {name: tensor} to a safetensors file and force it to the disk; tensors come to the CPU one at a time."""
    header, offset = {}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = dict(dtype=CODES[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                    # the data begins aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def json_object(raw, where):
    """bytes → the JSON object that they are. ValueError, one line that begins with `where`: they are
    something else, say a key twice, are not UTF-8, or nest deeper than Python follows."""
    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        "".join(found).encode()                                        # half a surrogate pair is no text
        return found
    try:
        found = json.loads(raw.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not good JSON: {str(error):.80}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not a JSON object")
    return found


def read_entry(entry):
    """A header's entry → (dtype, shape, start, stop), or None: it is not one, or of another size."""
    def sizes(numbers):
        return type(numbers) is list and all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers)
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in list(DTYPES) or not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        return None
    count = 1
    for n in shape:
        count *= n
        if count >= 2 ** 63:
            return None
    fits = offsets[1] - offsets[0] == count * DTYPES[code].itemsize
    return (DTYPES[code], shape, *offsets) if fits else None


def read_tensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: bytes are read where they are used, and writes do
    not reach the file. ValueError: the file is not what its header says, or tensors are not all of its data,
    one after the other."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):            # the format's own limit on headers
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        header = json_object(file.read(length), f"{path}: its header")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    about = header.pop("__metadata__", None)
    if about is not None and not (type(about) is dict and all(type(text) is str for text in about.values())):
        raise ValueError(f"{path}: its __metadata__ is not text by name: {about!r:.80}")

    # All entries before any tensor
    entries = {name: read_entry(entry) for name, entry in header.items()}
    for name, entry in entries.items():
        if entry is None:
            raise ValueError(f"{path}: bad header entry for {name!r:.80}: {header[name]!r:.120}")
    end = 0
    for name, (_, _, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise ValueError(f"{path}: {name!r:.80} begins at byte {start} of the data, not at {end}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{path}: {size - 8 - length} bytes of data, but its tensors have {end}")

    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        flat = torch.empty(0, dtype=dtype)
        if stop > start:
            count = (stop - start) // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start)
        tensors[name] = flat.view(shape)
    return tensors


# ---- sampling -----------------------------------------------------------------------------------------------------

def pick(logits, temperature, top_p, random):
    """One token a row of logits (B, V). Temperature 0 takes the largest; top_p keeps the smallest set of that mass."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    dropped = probs.cumsum(-1) - probs >= top_p
    dropped[..., 0] = False                                            # the first token always stays
    probs[dropped] = 0
    return order.gather(-1, torch.multinomial(probs, 1, generator=random))


@torch.no_grad()
def generate(model, tokens, n, temperature=1.0, top_p=1.0, seed=0):
    """tokens (B, T) int64 → (B, T + n). A full cache starts again from the last half of the context."""
    was_training, context = model.training, model.config.context
    model.eval()
    random = torch.Generator(tokens.device).manual_seed(seed)
    cache, new = Cache(context), tokens[:, -context:]
    for _ in range(n):
        if cache.length + new.shape[1] > context:
            cache, new = Cache(context), tokens[:, -max(1, context // 2):]
        new = pick(model(new, cache=cache)[:, -1], temperature, top_p, random)
        tokens = torch.cat((tokens, new), 1)
    model.train(was_training)
    return tokens


def sample(args):
    """Print what the model of the folder args.sample writes after args.prompt, or write it to args.export.
    ValueError: an option is out of its range, or the folder has no model or no tokenizer."""
    from train import is_hf, load_run
    ranges = dict(tokens=(0, 10 ** 9), temperature=(0, 1000), top_p=(0, 1), seed=(0, 2 ** 63 - 1),
                  average=(1, 10 ** 9))
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be from {least} to {most}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--prompt={args.prompt!r:.80}: is not UTF-8") from None
    folder = Path(args.sample)
    if is_hf(folder) and not (folder / "tokenizer.json").exists():     # said before its weights are read
        raise ValueError(f"{folder} has no tokenizer.json, and nothing else is read as its tokenizer")
    if is_hf(folder) and args.average > 1:
        raise ValueError(f"--average={args.average}: {folder} is no run, and has no checkpoints")
    model, tokenizer = load_run(folder, args.average)
    if args.export:
        from notes.huggingface import save_hf
        return save_hf(model, args.export, tokenizer)

    prompt, size = [tokenizer.eot, *tokenizer.encode(args.prompt).tolist()], model.config.vocab_size
    if max(prompt) >= size:
        raise ValueError(f"{folder}: its tokenizer has a token {max(prompt)}, its model {size} of them")
    cold = args.temperature < 1e-6                                     # logits divided by it would overflow
    temperature = 0.0 if cold else args.temperature
    out = generate(model, torch.tensor([prompt]), args.tokens, temperature, args.top_p, args.seed)
    print(tokenizer.decode(out[0, 1:].tolist()))


def count_presets():
    print(f"{'preset':<14}{'parameters':>18}{'active':>16}{'embedding':>15}{'training FLOPs/token at 4k':>28}"
          f"{'at 128k':>10}{'KV cache, numbers/token':>25}")
    for name, config in PRESETS.items():
        counts = count_parameters(config)
        print(f"{name:<14}{counts['total']:>18,}{counts['active']:>16,}{counts['embedding']:>15,}"
              f"{flops_per_token(config, 4096):>28.2e}{flops_per_token(config, 131_072):>10.2e}"
              f"{cache_per_token(config):>25,}")


def main(argv):
    parser = argparse.ArgumentParser(description="Count every preset, or sample from a trained run.")
    parser.add_argument("--sample", metavar="RUN", help="folder of a run, or a Hugging Face folder")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="the mean of its newest N checkpoints")
    parser.add_argument("--export", metavar="FOLDER", help="write --sample's model there in the Hugging Face layout")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.sample is None and (args.export or args.prompt):
        parser.error("--export and --prompt need --sample")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")                       # a terminal may lack some characters
    try:
        return count_presets() if args.sample is None else sample(args)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise SystemExit(f"model.py: {lines[0]}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
