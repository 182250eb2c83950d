"""The decoder, every variant of it in one file. What is not a vanilla Transformer:

  Motif-2.6B   differential attention (two softmax maps, one subtracted) · gated PolyNorm · tied embedding
  Kimi K2      multi-head latent attention (keys and values from one short vector) · sparse mixture of experts
  the control  GPT-2's block: LayerNorm, learned positions, GELU

Two seams carry what comes with many devices. The model is handed its operations (`Ops`), so that what happens to
a matmul's input or to a token's expert is decided outside; and it can be built as a range of layers, same names.

Shapes:  B batch  T time  C width  H softmax maps (n_head)  d head width  V vocabulary  N = B·T tokens
Try:     python model.py                                             # every preset: parameters, FLOPs/token, KV cache
         python model.py --sample out/laptop --prompt "def " [--tokens 200 --temperature 0.8 --top-p 0.95 --seed 0]
"""
import argparse
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
    tie: bool = True             # one matrix for embedding and head
    zero_out: bool = True        # projections back into the residual stream start at zero   [ours]
    init_std: float = 0.02       # of every other matrix                                     [guess]
    loss_chunk: int = 1024       # tokens whose logits exist at once

    def __post_init__(self):
        for name, choices in dict(act=ACTIVATIONS, norm=("rms", "layer"), position=("rope", "learned")).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)!r}: have {', '.join(choices)}")
        zero = ("q_rank", "kv_rank", "d_rope", "d_value", "n_expert", "n_dense", "n_active", "n_shared", "d_expert",
                "balance_rate", "balance_loss")
        for name, value in vars(self).items():
            if type(value) is int and value < (name not in zero):
                raise ValueError(f"model.{name}={value}: must be at least {int(name not in zero)}")
            if type(value) is float and not (0 < value < math.inf or value == 0 and name in zero):
                raise ValueError(f"model.{name}={value}: must be positive")
        if self.kv_rank and (self.differential or self.position != "rope" or not self.d_rope or not self.d_value
                             or self.n_kv_head != self.n_head):
            raise ValueError(f"model.kv_rank={self.kv_rank}: latent attention needs differential=false, position=rope, "
                             f"n_kv_head=n_head, and d_rope={self.d_rope}, d_value={self.d_value} above 0")
        if self.n_expert and not (self.n_active and self.d_expert and self.gated and self.n_expert % self.n_group == 0
                                  and self.n_active <= self.n_expert // self.n_group * self.top_group
                                  and self.top_group <= self.n_group and self.n_dense <= self.n_layer):
            raise ValueError(f"model.n_expert={self.n_expert}: needs gated=true, d_expert={self.d_expert} above 0, "
                             f"groups of equal size (n_group={self.n_group}), and n_active={self.n_active} experts in "
                             f"top_group={self.top_group} of them")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"model.n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.differential and (self.n_head % 2 or self.n_kv_head % 2):
            raise ValueError(f"differential attention pairs heads: n_head={self.n_head} and "
                             f"n_kv_head={self.n_kv_head} must be even")
        if self.position == "rope" and self.rotary % 2:
            raise ValueError(f"model.d_{'rope' if self.kv_rank else 'head'}={self.rotary}: rotary positions need an "
                             "even width")

    @property
    def rotary(self):
        """The width of a head that is rotated."""
        return self.d_rope if self.kv_rank else self.d_head


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

def linear(name, weights, pre, *x):
    """h = pre(*x), once; (h·wᵀ for w in weights).  `name` says which matmul this is.

    h belongs to the matmul: whoever replaces this function may recompute it, store it smaller or elsewhere."""
    h = pre(*x)
    return tuple(F.linear(h, w.to(h.dtype)) for w in weights)


def local_exchange(tokens, counts):
    """Carry tokens (M, C), sorted by expert, `counts` (E,) of each, to where their experts are.

    → tokens for the experts here, their counts, and the way back for what they become. On one device: they are here."""
    return tokens, counts, lambda y: y


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


def rope_table(config, start, stop, device, dtype):
    """cos(position · theta^(-2i/d)) for both halves, and ∓sin, both (T, d). In float64 first: angles grow large."""
    position = torch.arange(start, stop, device=device, dtype=torch.float64)
    pair = torch.arange(0, config.rotary, 2, device=device, dtype=torch.float64)                 # 2i
    angle = position[:, None] * config.rope_theta ** -(pair / config.rotary)
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

    def clear_logits(self, tau=None):
        self.max_logits.fill_(-torch.inf)
        self.max_logits_exact, self.tau = True, tau

    def record(self, q, k, mask):
        """q (B, H, T, d), k (B, H, T, d): what the logits of this forward are made of."""
        largest, exact = kernels.max_logits(q.detach(), k.detach(), mask, self.tau)
        self.max_logits.copy_(torch.maximum(self.max_logits, largest))
        self.max_logits_exact &= exact


class Attention(Heads):
    """Multi-head or grouped attention, plain or differential."""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        H, Hk, d, C = config.n_head, config.n_kv_head, config.d_head, config.d_model
        self.norm = make_norm(config)
        self.wq, self.wk, self.wv, self.wo = matrix(H * d, C), matrix(Hk * d, C), matrix(Hk * d, C), matrix(C, H * d)
        if config.differential:
            self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)     # layer from 0 here, l = layer + 1 in the paper
            self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(torch.empty(d)) for _ in range(4))
            self.head_norm = RMSNorm(2 * d, eps=1e-5)              # one vector for all heads    [Motif config]

    def lam(self):
        """λ = exp(λq1·λk1) − exp(λq2·λk2) + λ_init, one number a layer, shared by its heads.   [2410.05258 eq. 2]"""
        return (self.lq1 @ self.lk1).exp() - (self.lq2 @ self.lk2).exp() + self.lam_init

    def qk_heads(self):
        """What makes up each head's logits: (parameter, view of it as (H, rows, inputs), power of γ).

        Grouped queries share a key: it stays as it is, and all of γ goes to the head's own query rows."""
        by_head = lambda w: w.unflatten(0, (-1, self.config.d_head))
        if self.config.n_kv_head < self.config.n_head:
            return [(self.wq, by_head, 1.0)]
        return [(self.wq, by_head, 0.5), (self.wk, by_head, 0.5)]

    def join(self, y):
        """Heads side by side (B, H, T, d) → (B, T, H·d); differential ones normalised each, × (1 − λ_init)."""
        if self.config.differential:
            y = self.head_norm(y) * (1 - self.lam_init)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, rope=None, mask=None, cache=None):
        d = self.config.d_head
        q, k, v = self.ops.linear("qkv", (self.wq, self.wk, self.wv), self.norm, x)
        q, k = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k))                        # (B, H, T, d)
        v = v.unflatten(-1, (-1, 2 * d if self.config.differential else d)).transpose(1, 2)      # (B, H/2, T, 2d)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.put(self.layer, k, v)
        if self.training:
            self.record(q, kernels.spread(k.detach(), self.config.n_head, 2 if self.config.differential else 1), mask)
        if self.config.differential:
            y = kernels.diff_attention(q, k, v, self.lam().to(q.dtype), mask)
        else:
            y = kernels.attention(q, k, v, mask)
        return self.ops.linear("out", (self.wo,), self.join, y)[0]


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

    def forward(self, x, rope, mask=None, cache=None):
        c, H = self.config, self.config.n_head
        heads = lambda t: t.unflatten(-1, (H, -1)).transpose(1, 2)                               # (B, H, T, width)
        if c.q_rank:
            cq, ckv = self.ops.linear("down", (self.wdq, self.wdkv), self.norm, x)               # (1)
            q, = self.ops.linear("q_up", (self.wuq,), self.q_norm, cq)
        else:
            q, ckv = self.ops.linear("down", (self.wuq, self.wdkv), self.norm, x)
        q_nope, q_rope = heads(q).split((c.d_head, c.d_rope), -1)
        ckv, k_rope = ckv.split((c.kv_rank, c.d_rope), -1)
        q_rope, k_rope = rotate(q_rope, *rope), rotate(k_rope[:, None], *rope)                   # (B, 1, T, d_rope)
        scale = (c.d_head + c.d_rope) ** -0.5
        if cache is not None:
            ckv, k_rope = cache.put(self.layer, self.kv_norm(ckv)[:, None], k_rope)              # (B, 1, S, kv_rank)
            wuk, wuv = (w.to(q.dtype).unflatten(0, (H, -1)) for w in (self.wuk, self.wuv))       # (H, width, kv_rank)
            q, k = torch.cat((q_nope @ wuk, q_rope), -1), torch.cat((ckv, k_rope), -1)
            y = kernels.attention(q, k, ckv, mask, scale) @ wuv.mT
        else:
            k, v = map(heads, self.ops.linear("kv_up", (self.wuk, self.wuv), self.kv_norm, ckv))             # (2)
            q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k, k_rope.expand(-1, H, -1, -1)), -1)
            if self.training:
                self.record(q, k, mask)
            y = kernels.attention(q, k, v, mask, scale)
        return self.ops.linear("out", (self.wo,), lambda y: y.transpose(1, 2).flatten(2), y)[0]


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) where not gated. `shared`: the expert that every token goes to,
    whose input is normalised already."""

    def __init__(self, config, ops, shared=False):
        super().__init__()
        self.ops, self.gated = ops, config.gated
        d_ff = config.n_shared * config.d_expert if shared else config.d_ff
        self.norm = nn.Identity() if shared else make_norm(config)
        self.act = PolyNorm(config.compile_act) if config.act == "polynorm" else ACTIVATIONS[config.act]
        if config.gated:
            self.gate = matrix(d_ff, config.d_model)
        self.up, self.down = matrix(d_ff, config.d_model), matrix(config.d_model, d_ff)

    def forward(self, x):
        if not self.gated:
            h = self.ops.linear("up", (self.up,), self.norm, x)
            return self.ops.linear("down", (self.down,), self.act, *h)[0]
        gate, up = self.ops.linear("up", (self.gate, self.up), self.norm, x)
        return self.ops.linear("down", (self.down,), lambda gate, up: self.act(gate) * up, gate, up)[0]


class MoE(nn.Module):
    """Sparse mixture of experts: route → experts → combine, three functions that pass tensors.   [DeepSeek-V3 §2.1.2]

    No token is dropped and none padded. `load` (E,) counts the tokens of each expert over training forwards; after the
    step, `balance_` moves `bias`, which has a say in the choice of experts and none in their weights."""

    def __init__(self, config, ops):
        super().__init__()
        c, E = config, config.n_expert
        self.config, self.ops, self.norm = c, ops, make_norm(c)
        self.router = matrix(E, c.d_model)
        self.gate, self.up = (nn.Parameter(torch.empty(E, c.d_expert, c.d_model)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(E, c.d_model, c.d_expert))
        self.act = PolyNorm(c.compile_act) if c.act == "polynorm" else ACTIVATIONS[c.act]
        if c.n_shared:
            self.shared = FeedForward(c, ops, shared=True)
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)
        self.aux = 0.0                                                 # balance loss of the last training forward

    def route(self, h):
        """h (B, T, C) → a token's experts (N, k) and their weights (N, k)."""
        c = self.config
        s = F.linear(h, self.router.to(h.dtype)).to(kernels.wide(h.dtype)).sigmoid().flatten(0, 1)           # (N, E)
        choice = s.detach() + self.bias
        if c.n_group > 1:                                              # the groups whose best two sum up highest
            groups = choice.unflatten(-1, (c.n_group, -1))                                       # (N, G, E/G)
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1).topk(c.top_group, -1).indices
            chosen = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice = groups.masked_fill(~chosen[..., None], -torch.inf).flatten(1)
        index = choice.topk(c.n_active, -1).indices
        weight = s.gather(1, index)
        if self.training:
            self.load += index.flatten().bincount(minlength=c.n_expert)
            self.aux = c.balance_loss * self.imbalance(s, index, h.shape[0]) if c.balance_loss else 0.0
        return index, weight / weight.sum(-1, keepdim=True) * c.route_scale

    def imbalance(self, s, index, B):
        """Mean over sequences of Σ_i f_i·P_i: 1 where every expert is chosen alike.   [DeepSeek-V3 eq. 17-20]"""
        E, k = self.config.n_expert, self.config.n_active
        f = torch.zeros_like(s).scatter(1, index, 1.0).unflatten(0, (B, -1)).mean(1) * E / k                 # (B, E)
        p = (s / s.sum(-1, keepdim=True)).unflatten(0, (B, -1)).mean(1)
        return (f * p).sum(-1).mean()

    def experts(self, tokens, counts):
        """tokens (M, C), sorted by expert, and how many each has (E,) → what the experts make of them (M, C)."""
        out = []
        weights = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind())
        for x, (gate, up, down) in zip(tokens.split(counts.tolist()), weights):
            if len(x):
                a, b = self.ops.linear("expert_up", (gate, up), lambda x: x, x)
                out += self.ops.linear("expert_down", (down,), lambda a, b: self.act(a) * b, a, b)
        return torch.cat(out)

    def forward(self, x):
        k, h = self.config.n_active, self.norm(x)
        index, weight = self.route(h)
        order = index.flatten().argsort(stable=True)                   # (N·k,) sorted by expert, once
        counts = index.flatten().bincount(minlength=self.config.n_expert)
        tokens, counts, back = self.ops.exchange(h.flatten(0, 1)[order // k], counts)
        shared = self.shared(h) if self.config.n_shared else 0.0       # while tokens travel
        y = back(self.experts(tokens, counts)) * weight.flatten()[order, None].to(h.dtype)
        return torch.zeros_like(h.flatten(0, 1)).index_add(0, order // k, y).view_as(h) + shared

    @torch.no_grad()
    def balance_(self, load):
        """b_i += u where expert i had fewer tokens than the mean of load (E,), −= u where more."""
        self.bias += self.config.balance_rate * (load.mean() - load).sign().to(self.bias.dtype)


class Layer(nn.Module):
    def __init__(self, config, layer, ops):
        super().__init__()
        self.attention = (LatentAttention if config.kv_rank else Attention)(config, layer, ops)
        self.ffn = MoE(config, ops) if config.n_expert and layer >= config.n_dense else FeedForward(config, ops)

    def forward(self, x, rope, mask, cache):
        x = x + self.attention(x, rope, mask, cache)
        return x + self.ffn(x)


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

    Parameters have the same names in both, and the same first values for a seed: each is drawn from its own name."""

    def __init__(self, config, ops=Ops(), layers=None, seed=0):
        super().__init__()
        self.config, layers = config, range(config.n_layer) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.n_layer
        if self.first or self.last and config.tie:
            self.embed = matrix(config.vocab_size, config.d_model)
        if self.first and config.position == "learned":
            self.position = matrix(config.context, config.d_model)
        self.layers = nn.ModuleDict({str(i): Layer(config, i, ops) for i in layers})
        if self.last:
            self.norm = make_norm(config)
            if not config.tie:
                self.head = matrix(config.vocab_size, config.d_model)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed):
        for name, p in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            if leaf in ("lq1", "lk1", "lq2", "lk2"):
                std = 0.1                                                                        # [2410.05258]
            elif p.ndim < 2:
                continue                                               # gains and PolyNorm are born with their values
            elif leaf in ("wo", "down"):
                std = 0.0 if self.config.zero_out else self.config.init_std / math.sqrt(2 * self.config.n_layer)
            else:
                std = self.config.init_std
            if not p.is_meta:
                p.copy_(torch.empty(p.shape, dtype=torch.float32).normal_(0, 1, generator=random) * std)

    def attentions(self):
        """name → Attention, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Heads)}

    def mixtures(self):
        """name → MoE, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MoE)}

    def forward(self, x, targets=None, doc_start=None, cache=None, dtype=None):
        """x (B, T) int64 tokens (or (B, T, C), where an earlier range ends) → logits (B, T, V).

        With targets (B, T): (mean loss in nats/token, its (N,) terms). A range without the last layer → (B, T, C).
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
            rope = rope_table(self.config, past, past + T, x.device, kernels.wide(x.dtype))
        mask = kernels.causal_mask(T, past + T, doc_start, x.device) if past or doc_start is not None else None
        for layer in self.layers.values():
            x = layer(x, rope, mask, cache)
        if cache:
            cache.length += T
        if not self.last:
            return x
        head, x = self.embed if self.config.tie else self.head, self.norm(x)
        if targets is None:
            return F.linear(x, head.to(x.dtype))
        loss, nll = kernels.cross_entropy(x.flatten(0, 1), head, targets.flatten(), self.config.loss_chunk)
        return loss + sum(m.aux for m in self.mixtures().values() if self.training), nll


# ---- counting -----------------------------------------------------------------------------------------------------

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
    return config.n_layer * ((config.kv_rank + config.d_rope) or 2 * config.n_kv_head * config.d_head)


# ---- tensor files: the safetensors format -------------------------------------------------------------------------
# 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the raw bytes. No code is run.

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool,
              F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2)
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


def read_tensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: bytes are read where they are used, and writes do not
    reach the file. Raises ValueError where the file is not what its header says."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path}: its header is not JSON") from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: bad header entry for {name!r}: {entry!r}") from None
        count = math.prod(shape)
        if not 0 <= start <= stop <= size - 8 - length or stop - start != count * dtype.itemsize:
            raise ValueError(f"{path}: {name!r} claims bytes {start}..{stop} for {shape} of {dtype}")
        at = 8 + length + start
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=at) if count else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape)
    return tensors


# ---- weights of others: the Hugging Face layout of DeepSeek-V3 and Kimi K2 ----------------------------------------

HF_LAYER = {                                                           # ours in layers.N. ↔ theirs in model.layers.N.
    "attention.norm.weight": "input_layernorm.weight", "ffn.norm.weight": "post_attention_layernorm.weight",
    "attention.wdq": "self_attn.q_a_proj.weight", "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wuq": "self_attn.q_b_proj.weight", "attention.wdkv": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight", "attention.wo": "self_attn.o_proj.weight",
    "ffn.router": "mlp.gate.weight", "ffn.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn.{part}{ours}": f"mlp.{theirs}{ours}_proj.weight" for ours in ("gate", "up", "down")
       for part, theirs in (("", ""), ("shared.", "shared_experts."))}}


def turn_rotary(w, rows, rotary, back=False):
    """Their rotary pairs are neighbours, ours lie half a head apart. w (M·rows, inputs): the last `rotary` of each
    `rows` rows are put into our order, or back into theirs."""
    if not w.shape[0]:
        return w
    kept, turned = w.unflatten(0, (-1, rows)).split((rows - rotary, rotary), 1)
    pairs = turned.unflatten(1, (2, -1) if back else (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((kept, pairs), 1).flatten(0, 1)


def hf_map(config):
    """The map, both ways: (our names, their names, ours(*theirs) → our tensors, theirs(*ours) → theirs), a row for
    what has to be converted together."""
    c, same = config, lambda t: (t,)
    yield ("embed",), ("model.embed_tokens.weight",), same, same
    yield ("norm.weight",), ("model.norm.weight",), same, same
    if not c.tie:
        yield ("head",), ("lm_head.weight",), same, same
    rotary_rows = {"attention.wuq": c.d_head + c.d_rope, "attention.wdkv": c.kv_rank + c.d_rope}
    with torch.device("meta"):
        names = list(Transformer(c).state_dict())
    for name in names:
        number, _, leaf = name.removeprefix("layers.").partition(".")
        ours, theirs = (name,), f"model.layers.{number}.{HF_LAYER.get(leaf)}"
        if not name.startswith("layers."):
            continue
        if leaf in rotary_rows:
            turn = lambda w, back=False, rows=rotary_rows[leaf]: (turn_rotary(w, rows, c.d_rope, back),)
            yield ours, (theirs,), turn, lambda w, turn=turn: turn(w, True)
        elif leaf == "attention.wuk":                                  # theirs has both, a head after the other
            cut = lambda w: [t.flatten(0, 1) for t in w.unflatten(0, (c.n_head, -1)).split((c.d_head, c.d_value), 1)]
            join = lambda k, v: (torch.cat([t.unflatten(0, (c.n_head, -1)) for t in (k, v)], 1).flatten(0, 1),)
            yield (name, name[:-1] + "v"), (f"model.layers.{number}.self_attn.kv_b_proj.weight",), cut, join
        elif leaf in ("ffn.gate", "ffn.up", "ffn.down") and c.n_expert and int(number) >= c.n_dense:
            each = tuple(theirs.replace("mlp.", f"mlp.experts.{i}.") for i in range(c.n_expert))
            yield ours, each, lambda *ts: (torch.stack(ts),), lambda t: t.unbind()
        elif leaf != "attention.wuv":
            yield ours, (theirs,), same, same


def hf_config(folder):
    """config.json of DeepSeek-V3's kind → ModelConfig. ValueError: what this file cannot build."""
    found = json.loads((Path(folder) / "config.json").read_text())
    if found.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        raise ValueError(f"{folder}: model_type {found.get('model_type')!r}; have deepseek_v3, kimi_k2")
    rope = found.get("rope_parameters") or dict(found.get("rope_scaling") or {}, rope_theta=found.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or found["hidden_act"] != "silu" or not found.get("norm_topk_prob"):
        raise ValueError(f"{folder}: rope {kind!r}, hidden_act {found['hidden_act']!r}, norm_topk_prob "
                         f"{found.get('norm_topk_prob')}: have 'default', 'silu', true")
    names = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_attention_heads",
                 d_model="hidden_size", d_head="qk_nope_head_dim", d_rope="qk_rope_head_dim", d_value="v_head_dim",
                 kv_rank="kv_lora_rank", d_ff="intermediate_size", vocab_size="vocab_size", norm_eps="rms_norm_eps",
                 context="max_position_embeddings", n_expert="n_routed_experts", n_dense="first_k_dense_replace",
                 n_active="num_experts_per_tok", n_shared="n_shared_experts", d_expert="moe_intermediate_size",
                 n_group="n_group", top_group="topk_group", route_scale="routed_scaling_factor",
                 tie="tie_word_embeddings")
    return ModelConfig(differential=False, act="silu", rope_theta=float(rope["rope_theta"]),
                       q_rank=found.get("q_lora_rank") or 0, **{ours: found[theirs] for ours, theirs in names.items()})


def load_hf(folder, say=print):
    """Build a model from a folder of DeepSeek-V3's or Kimi K2's kind: config.json and safetensors files, one or many,
    tensor by tensor. FP8 weights are multiplied out by their scales, one for 128 × 128 numbers. Layers beyond the
    last (the extra prediction layer) are left out, and counted. ValueError: everything missing, extra or misshapen."""
    folder, config = Path(folder), hf_config(folder)
    files = {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in read_tensors(path).items()}
    beyond = {name for name in files if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.n_layer}
    scales = {name for name in files if name.endswith("_scale_inv")}
    rows, model = list(hf_map(config)), Transformer(config)
    own = model.state_dict()
    with torch.device("meta"):
        shapes = {name: t.shape for ours, theirs, _, out in rows
                  for name, t in zip(theirs, out(*(torch.empty(own[o].shape) for o in ours)))}
    wrong = [f"{name} missing" for name in shapes if name not in files]
    wrong += [f"{name} {tuple(files[name].shape)} for {tuple(shape)}" for name, shape in shapes.items()
              if name in files and files[name].shape != shape]
    wrong += [f"{name} unknown" for name in files if name not in shapes and name not in beyond | scales]
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit: {'; '.join(wrong)}")

    def read(name):
        t, scale = files[name], files.get(f"{name}_scale_inv")
        if scale is None:
            return t
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:t.shape[0], :t.shape[1]]
        return t.float() * scale
    with torch.no_grad():
        for ours, theirs, to_ours, _ in rows:
            for name, t in zip(ours, to_ours(*map(read, theirs))):
                own[name].copy_(t)
    if beyond:
        say(f"{folder}: {len(beyond)} tensors of layers beyond the last of {config.n_layer} left out")
    return model


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


def main(argv):
    parser = argparse.ArgumentParser(description="Count every preset, or sample from a trained run.")
    parser.add_argument("--sample", metavar="RUN", help="folder of a run, as written by train.py")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="the mean of its newest N checkpoints")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.sample:
        from train import load_run
        model, tokenizer = load_run(args.sample, args.average)
        prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode(args.prompt).tolist()]])
        out = generate(model, prompt, args.tokens, args.temperature, args.top_p, args.seed)
        return print(tokenizer.decode(out[0, 1:].tolist()))
    print(f"{'preset':<14}{'parameters':>18}{'active':>16}{'embedding':>15}{'training FLOPs/token at 4k':>28}"
          f"{'at 128k':>10}{'KV cache, numbers/token':>25}")
    for name, config in PRESETS.items():
        counts = count_parameters(config)
        print(f"{name:<14}{counts['total']:>18,}{counts['active']:>16,}{counts['embedding']:>15,}"
              f"{flops_per_token(config, 4096):>28.2e}{flops_per_token(config, 131_072):>10.2e}"
              f"{cache_per_token(config):>25,}")


if __name__ == "__main__":
    main(sys.argv[1:])
