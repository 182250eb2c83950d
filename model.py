"""The decoder: every variant of it in one file. What is not a vanilla Transformer:

  Motif-2.6B   differential attention (one softmax map subtracted from another) · gated PolyNorm ·
               tied embedding
  Kimi K2      multi-head latent attention (keys and values made from one short vector per token) ·
               sparse mixture of experts
  candidates   also tried in Motif's report: QK-Norm; keys and values shared by adjacent layers; nGPT,
               with weights and activations on the unit sphere. From Motif's successor: grouped
               differential attention, one noise map shared by several signal maps
  the control  GPT-2's block: LayerNorm, learned positions, GELU

Two seams let other files spread the model over devices. The model is handed its operations (`Ops`), so
that another file decides how a matmul's input is stored and where a token's expert runs; and a model can be
built from a range of layers, with the same parameter names.

Shapes:  B batch  T time  C width  H softmax maps (n_head)  d head width  V vocabulary  N = B·T tokens
Try:     python model.py         # every preset: parameters, FLOPs/token, KV cache; and who calls whom
         python model.py --sample out/laptop --prompt "def "
                         [--tokens 200 --temperature 0.8 --top-p 0.95 --seed 0]
         python model.py --chat out/sft  # a conversation; the same options, and --system "You are ..."
         python model.py --sample out/laptop-k2 --export FOLDER   # as Hugging Face's DeepseekV3ForCausalLM
"""
import argparse
import codecs
import functools
import importlib
import io
import json
import math
import mmap
import os
import re
import sys
import zlib
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kernels


# ---- configuration -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model. ValueError: a check in `refusals` fails."""

    # sizes
    n_layer: int = 4
    n_head: int = 4              # softmax maps; differential: two maps a head, with values of 2·d_head
    n_kv_head: int = 4           # key heads, counted like n_head; fewer than n_head = grouped queries
    d_model: int = 128           # width of the residual stream
    d_head: int = 32             # width of a query or key; latent attention: of the part without positions
    d_ff: int = 384              # hidden width of a dense feed-forward layer
    vocab_size: int = 4096
    context: int = 256           # tokens

    # differential attention
    differential: bool = True
    n_noise: int = 0             # noise maps, each shared by a group of signal maps; 0 = pairs  [2510.06949]
    lam_delay: int = 0           # layers by which λ_init lags; Motif's released code and weights have 1

    # the candidates
    qk_norm: bool = False        # RMSNorm with gains on each head's queries and keys    [2010.04245]
    share_kv: int = 1            # adjacent layers that share keys and values            [2405.12981]
    ngpt: bool = False           # all vectors of width d_model on the unit sphere       [2410.01131]

    # feed-forward layers
    act: str = "polynorm"        # polynorm | silu | gelu | relu2
    compile_act: bool = False    # PolyNorm through torch.compile: half a minute to start, then faster
    gated: bool = True           # down(act(gate) · up); with silu this is SwiGLU

    # latent attention
    q_rank: int = 0              # width of the queries' latent vector, 0 = none
    kv_rank: int = 0             # width of the latent vector of keys and values, 0 = no latent attention
    d_rope: int = 0              # width of the rotary part; all heads share one rotary key
    d_value: int = 0             # width of a value

    # experts
    n_expert: int = 0            # routed experts of a layer, 0 = no mixture of experts
    n_dense: int = 0             # leading layers that stay dense, of width d_ff
    n_active: int = 0            # routed experts that a token is sent to
    n_shared: int = 1            # shared experts, which process every token
    d_expert: int = 0            # hidden width of one expert
    n_group: int = 1             # groups that the routed experts are divided into
    top_group: int = 1           # groups that the experts of one token may come from
    route_scale: float = 1.0     # sum of the routing weights of a token
    balance_rate: float = 1e-3   # step size of the router's bias                      [DeepSeek-V3 §4.2]
    balance_loss: float = 0.0    # weight of the sequence balance loss   [DeepSeek-V3: 1e-4; K2 is silent]

    # normalisation
    norm: str = "rms"            # rms | layer
    norm_eps: float = 1e-6       # [Motif config]

    # positions
    position: str = "rope"       # rope | learned
    rope_theta: float = 10_000.0   # [Motif §3.2.2]

    # YaRN: rotary frequencies for a longer context; turns are counted over the original context
    # [2309.00071 §3.2]
    yarn: float = 0.0            # context extension factor s, 0 = no YaRN
    yarn_from: int = 4096        # original context, tokens
    yarn_fast: float = 32.0      # frequencies with more turns than this are kept
    yarn_slow: float = 1.0       # frequencies with fewer turns are divided by s, those between interpolated

    # embedding, initial values, loss
    tie: bool = True             # one matrix for embedding and head
    zero_out: bool = True        # matrices that write to the residual stream start at zero  [ours]
    init_std: float = 0.02       # standard deviation of every other matrix                  [guess]
    loss_chunk: int = 1024       # tokens whose logits are in memory at once

    def __post_init__(self):
        for holds, message in refusals(self):
            if not holds:
                raise ValueError(message)

    @property
    def rotary(self):
        """Width of the rotary part of a head."""
        return self.d_rope if self.kv_rank else self.d_head

    @property
    def maps(self):
        """Softmax maps of a group: its signal maps and their noise map; 1 in plain attention."""
        if not self.differential:
            return 1
        return self.n_head // self.n_noise if self.n_noise else 2

    @property
    def sharpness(self):
        """YaRN's factor on the logits: (0.1·ln s + 1)².   [2309.00071 eq. 22]"""
        return (0.1 * math.log(self.yarn) + 1) ** 2 if self.yarn else 1.0


ACTIVATIONS = dict(polynorm=None, silu=F.silu, gelu=F.gelu, relu2=lambda x: F.relu(x).square())

# The presets: name → the fields in which it differs from the defaults of ModelConfig
PRESET_FIELDS = {
    # Motif's block, small. Its matrices are tied, so at first each token predicts itself, by a logit of width
    # · init_std = 12.8, and the loss starts at 12.7, not at ln V = 8.3. To start there, fill the gains of the
    # final norm with 0.3 in Transformer: half a run ends 0.008 bits/byte lower, the whole one 0.005 higher
    # (means of 3 seeds).
    "laptop": dict(init_std=0.1),                                                           # [ours]
    "gpt2": dict(differential=False, act="gelu", gated=False, norm="layer", norm_eps=1e-5,
                 position="learned", d_ff=512, zero_out=False),       # the control  [GPT-2, without biases]
    "shakespeare": dict(d_ff=256, context=64, vocab_size=261,
                        init_std=0.1),                                # bytes, five special tokens  [ours]
    "laptop-k2": dict(differential=False, act="silu", d_head=24, d_rope=8, d_value=32, q_rank=64,
                      kv_rank=32, n_expert=16, n_dense=1, n_active=2, d_expert=128, route_scale=1.412,
                      balance_rate=1e-2, tie=False, init_std=0.1),    # K2's block, small       [ours]
    "motif-2.6b": dict(n_layer=32, n_head=16, n_kv_head=16, d_model=2048, d_head=128, d_ff=8192,
                       vocab_size=219_520, context=4096),             # [Motif Table 1; theta by §3.2.2]
}
PRESET_FIELDS["motif-2.6b-lc"] = PRESET_FIELDS["motif-2.6b"] | dict(  # [Motif §3.2.3]
    context=16_384, rope_theta=500_000.0)
PRESET_FIELDS["deepseek-v3"] = dict(                                  # [its config.json; DeepSeek-V3 §4.2]
    n_layer=61, n_head=128, n_kv_head=128, d_model=7168, d_head=128, d_rope=64, d_value=128, q_rank=1536,
    kv_rank=512, d_ff=18_432, vocab_size=129_280, context=4096, differential=False, act="silu", tie=False,
    zero_out=False, init_std=0.006, n_expert=256, n_dense=3, n_active=8, d_expert=2048, n_group=8,
    top_group=4, route_scale=2.5, balance_loss=1e-4)
PRESET_FIELDS["kimi-k2"] = PRESET_FIELDS["deepseek-v3"] | dict(       # [Kimi K2 Table 2; its config.json]
    n_head=64, n_kv_head=64, vocab_size=163_840, n_expert=384, n_dense=1, n_group=1, top_group=1,
    route_scale=2.827, rope_theta=50_000.0, balance_loss=0.0)

# Fields that may be 0; every other number has to be positive
MAY_BE_ZERO = ("q_rank", "kv_rank", "d_rope", "d_value", "n_expert", "n_dense", "n_active", "n_shared",
               "d_expert", "balance_rate", "balance_loss", "yarn", "lam_delay", "n_noise")


def refusals(c):
    """The checks of a ModelConfig c, as rows (holds, message); the first that fails is its ValueError.

    A generator, because a row may rely on those before it: a divisor is known to be positive."""
    # Choices by name
    choices_of = dict(act=ACTIVATIONS, norm=("rms", "layer"), position=("rope", "learned"))
    for name, choices in choices_of.items():
        value = getattr(c, name)
        yield value in choices, f"model.{name}={value!r}: have {', '.join(choices)}"

    # Ranges of numbers
    for name, value in vars(c).items():
        least = int(name not in MAY_BE_ZERO)
        if type(value) is int:
            yield value >= least, f"model.{name}={value}: must be at least {least}"
        if type(value) is float:
            holds = 0 < value < math.inf or value == 0 and name in MAY_BE_ZERO
            yield holds, f"model.{name}={value}: must be positive"

    # Latent attention
    if c.kv_rank:
        yield (not c.differential and c.position == "rope" and c.d_rope and c.d_value
               and c.n_kv_head == c.n_head,
               f"model.kv_rank={c.kv_rank}: latent attention needs differential=false, position=rope, "
               f"n_kv_head=n_head, and d_rope={c.d_rope}, d_value={c.d_value} above 0")
        for name, used in dict(qk_norm=c.qk_norm, ngpt=c.ngpt, share_kv=c.share_kv > 1).items():
            yield (not used,
                   f"model.{name}: not with latent attention (kv_rank={c.kv_rank}), which keeps one "
                   "short vector for all heads, normalises it, and makes no keys when it decodes")

    # nGPT
    if c.ngpt:
        yield (not c.qk_norm and not c.n_expert and c.gated and c.norm == "rms" and c.position == "rope",
               "model.ngpt normalises weights, queries, keys and the residual stream itself, and is "
               f"defined for dense gated layers: not with qk_norm={c.qk_norm}, n_expert="
               f"{c.n_expert}, gated={c.gated}, norm={c.norm}, position={c.position}")

    # Experts
    if c.n_expert:
        yield (c.n_active and c.d_expert and c.gated and c.n_expert % c.n_group == 0
               and c.n_active <= c.n_expert // c.n_group * c.top_group
               and c.top_group <= c.n_group and c.n_dense <= c.n_layer,
               f"model.n_expert={c.n_expert}: needs gated=true, d_expert={c.d_expert} above 0, "
               f"groups of equal size (n_group={c.n_group}), and n_active={c.n_active} experts in "
               f"top_group={c.top_group} of them")

    # Numbers of heads: plain or in pairs, or in groups with one noise map each
    if not c.n_noise:
        yield (c.n_head % c.n_kv_head == 0,
               f"model.n_head={c.n_head} is not a multiple of n_kv_head={c.n_kv_head}")
        yield (not c.differential or c.n_head % 2 == 0 and c.n_kv_head % 2 == 0,
               f"differential attention pairs heads: n_head={c.n_head} and "
               f"n_kv_head={c.n_kv_head} must be even")
    else:
        yield (c.differential and c.n_head % c.n_noise == 0 and c.n_head >= 2 * c.n_noise
               and 2 * c.n_noise % c.n_kv_head == 0 and c.n_kv_head % 2 == 0,
               f"model.n_noise={c.n_noise}: needs differential=true, n_head={c.n_head} a multiple "
               f"of it and at least twice it, and an even n_kv_head={c.n_kv_head} that divides "
               f"{2 * c.n_noise}: a pair of keys, signal's and noise's, for so many groups")

    # Rotary positions
    if c.position == "rope":
        width = "d_rope" if c.kv_rank else "d_head"
        yield c.rotary % 2 == 0, f"model.{width}={c.rotary}: rotary positions need an even width"


# Only here, below `refusals`: constructing a ModelConfig calls it
PRESETS = {name: ModelConfig(**changed) for name, changed in PRESET_FIELDS.items()}


# ---- the operations a model is handed ----------------------------------------------------------------------

def linear(name, weights, pre, params, *x, ends=None):
    """h = pre(*x), computed once → the tuple of h·wᵀ for each w in weights.

    name: which matmul of the layer this is.
    params: the parameters that `pre` uses; a replacement that recomputes h returns their gradients.
    ends (E,): each w is then a stack (E, out, in), and w[e] multiplies rows ends[e-1] to ends[e] of h.

    Nobody else uses h: a replacement for this function may recompute it in the backward, or store it in a
    smaller dtype or in host memory."""
    return kernels.linears(pre(*x), weights, ends)


def identity(x):
    """x itself: the `pre` of a matmul whose input needs no preparation."""
    return x


def widened(x):
    """x in float32 or wider."""
    return x.to(kernels.accumulation_dtype(x.dtype))


def parameters_of(*modules):
    """The parameters of those arguments that are modules; an activation may be a plain function."""
    return tuple(p for module in modules if isinstance(module, nn.Module) for p in module.parameters())


def attention(attend, make, params, *latents):
    """attend(q, k, v), where (q, k, v) = make(*latents) are large and the latents are small: a replacement
    may keep these alone. params: the parameters that `make` uses."""
    return attend(*make(*latents))


def recompute(kind, f, params, *x):
    """f(*x), which is cheap to compute: a replacement may drop the result after the forward, and compute it
    again in the backward. kind: of the computation. params: the parameters that f uses."""
    return f(*x)


class Local:
    """The way of tokens to their experts and back, on one device, where nothing moves.

    Tokens are sorted by expert; counts (E,) says how many go to each. A replacement may start a transfer in
    each of the first three steps; the step after it has to wait for that."""

    def __init__(self, counts):
        """counts: how many tokens go to each expert."""
        self.counts = counts

    def dispatch(self, rows, weight):
        """Tokens (M, C) and their weights (M, 1) leave → one tensor, under way."""
        self.weight = weight               # not passed at the yield: with one device nothing is cut there
        return rows

    def arrive(self, moving):
        """→ tokens (N, C), weights (N, 1) and counts of the experts held here."""
        return moving, self.weight, self.counts

    def combine(self, rows):
        """The experts' outputs (N, C) leave → one tensor, under way."""
        return rows

    def home(self, moving):
        """→ the outputs (M, C), in the order in which the tokens left."""
        return moving


class Ops(NamedTuple):
    """The operations a Transformer is handed; these defaults are those of one device."""
    linear: Callable = linear
    attention: Callable = attention
    recompute: Callable = recompute
    exchange: Callable = Local


def whole(parts):
    """Run a generator of parts from its first to its last, with the graph in one piece → what it returns."""
    live = None
    while True:
        try:
            _, live = parts.send(live)
        except StopIteration as end:
            return end.value


# ---- parts -------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """w·x / √(mean x² + eps) over the last dimension, with gains w (width,) initialised to 1."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """F.layer_norm with gains, and without a bias."""

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), None, self.eps)


def make_norm(config):
    """The norm of the residual stream that config.norm names."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.d_model, config.norm_eps)


class PolyNorm(nn.Module):
    """kernels.poly_norm with its weights (3,), for x³, x² and x, and its bias (1,).   [Motif §2.1]"""

    def __init__(self, compiled=False):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))
        self.compiled = compiled

    def forward(self, x, gate=None):
        """gate: a factor of the result, of the shape of x."""
        return kernels.poly_norm(x, self.weight, self.bias, compiled=self.compiled and self.training,
                                 gate=gate)


def gated(act, gate, up):
    """act(gate)·up; on a GPU PolyNorm does both in one kernel, in which `up` is the factor."""
    if isinstance(act, PolyNorm):
        return act(gate, up)
    return act(gate) * up


def rope_frequencies(config, device=None):
    """Radians per token of each rotary pair, (rotary/2,) float64: θ_i = theta^(-2i/d).

    YaRN divides θ_i by s where the pair makes fewer than yarn_slow turns in yarn_from tokens, keeps it
    where it makes more than yarn_fast, and interpolates linearly in i between them."""
    c = config
    d = c.rotary
    i = torch.arange(d // 2, device=device, dtype=torch.float64)
    theta = c.rope_theta ** -(2 * i / d)
    if not c.yarn:
        return theta

    # Index, as a real number, of the pair that makes `turns` turns in the original context
    def pair(turns):
        return d * math.log(c.yarn_from / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    # Share of the slowed frequency: 0 up to pair `low`, 1 from pair `high` on. Linear in i, as in YaRN's
    # code; the paper's ramp γ = 1 − slowed is linear in the number of turns (eq. 18-20).
    low = max(math.floor(pair(c.yarn_fast)), 0)
    high = min(math.ceil(pair(c.yarn_slow)), d - 1)
    slowed = ((i - low) / max(high - low, 1e-3)).clamp(0, 1)
    return theta * (1 - slowed) + theta / c.yarn * slowed


def rope_table(config, start, stop, device, dtype):
    """cos(position · θ_i) for both halves of a head, and ∓sin, both (T, d), for positions start to stop.

    Computed in float64 and then rounded: angles grow with the position."""
    position = torch.arange(start, stop, device=device, dtype=torch.float64)
    angle = position[:, None] * rope_frequencies(config, device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) → (a·cos − b·sin, b·cos + a·sin) for each pair (x_i, x_i+d/2) of x (B, H, T, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def matrix(rows, columns):
    """A parameter (rows, columns) without values: Transformer.reset fills it."""
    return nn.Parameter(torch.empty(rows, columns))


class Heads(nn.Module):
    """The heads of one attention layer, as QK-Clip sees them: `max_logits` (H,), the largest q·k·scale of
    each, and `qk_heads`, the weights to shrink. QK-Clip multiplies a head's logits by γ ≤ 1 (muonclip.py).

    Training forwards record the maximum over micro-batches until `clear_logits`. With a threshold `tau`,
    a head whose logits provably do not exceed it may record an upper bound (≤ tau) instead of its largest
    logit; `max_logits_exact` is then False."""

    def __init__(self, config, layer, ops):
        super().__init__()
        self.config = config
        self.layer = layer
        self.ops = ops
        largest = torch.full((config.n_head,), -torch.inf)
        self.register_buffer("max_logits", largest, persistent=False)       # (H,)
        self.max_logits_exact = True
        self.tau = None
        self.counts = True                                     # False while a forward is recomputed

    def clear_logits(self, tau=None):
        """Start a new maximum. tau: threshold up to which bounds suffice; None asks for exact values."""
        self.max_logits.fill_(-torch.inf)
        self.max_logits_exact = True
        self.tau = tau

    def asks(self):
        """The `tau` that attention is called with: OFF in a forward whose logits are not recorded."""
        if self.training and self.counts:
            return self.tau
        return kernels.OFF

    def record(self, logits):
        """Take in the (largest (H,), exact) of one forward; None if it was not asked for."""
        if logits is not None:
            largest, exact = logits
            self.max_logits.copy_(torch.maximum(self.max_logits, largest))
            self.max_logits_exact &= exact


class Attention(Heads):
    """Multi-head or grouped-query attention, plain or differential.

    share_kv: of each group of adjacent layers, the first makes keys and values and the others read them
    (cross-layer attention, 2405.12981). The cache shrinks; each layer still has its own softmax maps.
    LiSA [2408.01890], which Motif cites, shares the maps instead: layers of a trained model take over a
    neighbour's maps, with heads aligned by a small network and a correction from low-rank queries and
    keys. LiSA is fitted to an existing model; the sharing here is trained from the start."""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        H, Hk, d, C = config.n_head, config.n_kv_head, config.d_head, config.d_model
        self.norm = make_norm(config)

        # Projections; only signal maps have an output, of width 2d
        out = H * d
        if config.maps > 1:
            out = (H - H // config.maps) * 2 * d
        self.wq = matrix(H * d, C)
        self.wo = matrix(C, out)
        self.leads = layer % config.share_kv == 0              # makes the keys and values of its group
        if self.leads:
            self.wk = matrix(Hk * d, C)
            self.wv = matrix(Hk * d, C)

        # QK-Norm
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.norm_eps)
            self.k_norm = RMSNorm(d, config.norm_eps) if self.leads else None

        # Differential attention: λ_init = 0.8 − 0.6·exp(−0.3·(l − 1)), where the paper's l is layer + 1
        if config.differential:
            self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * (layer - config.lam_delay))
            self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(torch.empty(d)) for _ in range(4))
            self.head_norm = RMSNorm(2 * d, eps=1e-5)   # one gain vector for all heads   [Motif config]

    def lam(self):
        """λ = exp(λq1·λk1) − exp(λq2·λk2) + λ_init, one number for all heads.   [2410.05258 eq. 2]"""
        return (self.lq1 @ self.lk1).exp() - (self.lq2 @ self.lk2).exp() + self.lam_init

    def qk_heads(self):
        """What QK-Clip scales by γ: [(parameter, function to its (H, rows, inputs) view, power of γ)].

        Keys that several heads or layers use stay as they are; the head's query rows take all of γ."""
        def by_head(w):
            return w.unflatten(0, (-1, self.config.d_head))
        if self.config.n_kv_head < self.config.n_head or self.config.share_kv > 1:
            return [(self.wq, by_head, 1.0)]
        return [(self.wq, by_head, 0.5), (self.wk, by_head, 0.5)]

    def join(self, y):
        """Concatenate heads: (B, heads, T, width) → (B, T, heads·width). Differential: a head for each signal
        map, of width 2d, first normalised and multiplied by (1 − λ_init)."""
        if self.config.differential:
            y = self.head_norm(y) * (1 - self.lam_init)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, rope=None, sees=None, cache=None, kv=None):
        """x (B, T, C) → (B, T, C), and the keys and values used here.

        rope: (cos, sin) of rope_table, or None.
        sees: which keys each query may attend to (kernels.sight); None: plain causal attention.
        kv: the leader's keys and values, if this layer reads them."""
        c = self.config

        def heads(t, width):
            return t.unflatten(-1, (-1, width)).transpose(1, 2)             # (B, H, T, width)

        # Queries, keys and values
        gains = parameters_of(self.norm)
        if self.leads:
            q, k, v = self.ops.linear("qkv", (self.wq, self.wk, self.wv), self.norm, gains, x)
            # Differential: Hk keys of width d, but Hk/2 values of width 2d, one for each pair of keys
            v_width = 2 * c.d_head if c.differential else c.d_head
            kv = self.key(heads(k, c.d_head), rope), heads(v, v_width)
            if cache is not None:
                kv = cache.put(self.layer, *kv)
        else:
            q, = self.ops.linear("q", (self.wq,), self.norm, gains, x)
        q = self.query(heads(q, c.d_head), rope)
        k, v = kv

        # Attention
        if c.differential:
            lam = self.lam().to(q.dtype)
            y, logits = kernels.diff_attention(q, k, v, lam, sees, c.maps, self.asks())
            gains = parameters_of(self.head_norm)
        else:
            y, logits = kernels.attention(q, k, v, sees, tau=self.asks())
            gains = ()
        self.record(logits)

        # Back into the residual stream
        out, = self.ops.linear("out", (self.wo,), self.join, gains, y)
        return out, kv

    def key(self, k, rope):
        """k (B, Hk, T, d) → normalised under QK-Norm, then rotated."""
        if self.config.qk_norm:
            k = self.k_norm(k)
        return k if rope is None else rotate(k, *rope)

    def query(self, q, rope):
        """q (B, H, T, d) → as `key`; YaRN's factor on the logits is applied to the query."""
        if self.config.qk_norm:
            q = self.q_norm(q)
        if rope is not None:
            q = rotate(q, *rope)
        return q * self.config.sharpness if self.config.yarn else q


class LatentAttention(Heads):
    """Multi-head latent attention: queries, keys, values from short vectors.   [DeepSeek-V3 §2.1.1]

        h = norm(x),  a = W_dq h,  [b; k_rope] = W_dkv h,  c_q = norm(a),  c_kv = norm(b)          (1)
        q_i = [W_uq c_q ; rope(W_qr c_q)],  k_i = [W_uk c_kv ; rope(k_rope)],  v_i = W_uv c_kv     (2)

    `wuq` stacks W_uq and W_qr; c_q and c_kv are normalised as the inputs of the up-projections. All heads
    share the rotary key. Training computes (2) in full. Decoding caches only c_kv and k_rope, kv_rank +
    d_rope numbers a token, and absorbs W_uk into the query and W_uv into the output:

        q_i·k_i = (W_ukᵀ q_nope)·c_kv + q_rope·k_rope,  Σ p·v_i = W_uv (Σ p·c_kv)                  (3)"""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        c = config
        H = c.n_head
        self.norm = make_norm(c)
        self.kv_norm = RMSNorm(c.kv_rank, c.norm_eps)

        # Down to the latents, and up to the heads; without a query latent, wuq reads the residual stream
        if c.q_rank:
            self.wdq = matrix(c.q_rank, c.d_model)
            self.q_norm = RMSNorm(c.q_rank, c.norm_eps)
        self.wuq = matrix(H * (c.d_head + c.d_rope), c.q_rank or c.d_model)    # each head: W_uq, then W_qr
        self.wdkv = matrix(c.kv_rank + c.d_rope, c.d_model)
        self.wuk = matrix(H * c.d_head, c.kv_rank)
        self.wuv = matrix(H * c.d_value, c.kv_rank)
        self.wo = matrix(c.d_model, H * c.d_value)

    def qk_heads(self):
        """As Attention.qk_heads. The rotary key is shared: the head's own rotary query takes all of γ."""
        d = self.config.d_head

        def by_head(w):
            return w.unflatten(0, (self.config.n_head, -1))
        return [(self.wuq, lambda w: by_head(w)[:, :d], 0.5),
                (self.wuq, lambda w: by_head(w)[:, d:], 1.0),
                (self.wuk, by_head, 0.5)]

    def forward(self, x, rope, sees=None, cache=None, kv=None):
        """x (B, T, C) → (B, T, C), and None: layers do not share latents."""
        c = self.config
        H = c.n_head

        def heads(t):
            return t.unflatten(-1, (H, -1)).transpose(1, 2)                 # (B, H, T, width)

        # Latents; without one for the queries, the queries
        down = self.wdq if c.q_rank else self.wuq
        gains = parameters_of(self.norm)
        cq, ckv = self.ops.linear("latents", (down, self.wdkv), self.norm, gains, x)                  # (1)
        ckv, k_rope = ckv.split((c.kv_rank, c.d_rope), -1)
        scale = (c.d_head + c.d_rope) ** -0.5

        def queries(q):
            if c.q_rank:
                gains = parameters_of(self.q_norm)
                q, = self.ops.linear("q_up", (self.wuq,), self.q_norm, gains, q)                      # (2)
            q = q * c.sharpness if c.yarn else q
            q_nope, q_rope = heads(q).split((c.d_head, c.d_rope), -1)
            return q_nope, rotate(q_rope, *rope)                            # (B, H, T, d_head or d_rope)

        def make(cq, ckv, k_rope):
            """Queries, keys and values of each head."""
            gains = parameters_of(self.kv_norm)
            k, v = self.ops.linear("kv_up", (self.wuk, self.wuv), self.kv_norm, gains, ckv)           # (2)
            k_rope = rotate(k_rope[:, None], *rope).expand(-1, H, -1, -1)   # (B, H, T, d_rope)
            return torch.cat(queries(cq), -1), torch.cat((heads(k), k_rope), -1), heads(v)

        def attend(q, k, v):
            y, logits = kernels.attention(q, k, v, sees, scale, self.asks())
            self.record(logits)
            return y

        if cache is not None:
            # With a cache: one key [c_kv; k_rope] for all heads, whose value is c_kv                 (3)
            q_nope, q_rope = queries(cq)
            ckv = self.kv_norm(ckv)[:, None]
            k_rope = rotate(k_rope[:, None], *rope)                         # (B, 1, T, d_rope)
            ckv, k_rope = cache.put(self.layer, ckv, k_rope)                # (B, 1, S, kv_rank or d_rope)
            wuk = self.wuk.to(ckv.dtype).unflatten(0, (H, -1))              # (H, d_head, kv_rank)
            wuv = self.wuv.to(ckv.dtype).unflatten(0, (H, -1))              # (H, d_value, kv_rank)
            q = torch.cat((q_nope @ wuk, q_rope), -1)                       # (B, H, T, kv_rank + d_rope)
            k = torch.cat((ckv, k_rope), -1)
            y, _ = kernels.attention(q, k, ckv, sees, scale)
            y = y @ wuv.mT
        else:
            # Without a cache: queries, keys and values of each head
            y = self.ops.attention(attend, make, self.ups(), cq, ckv, k_rope)

        # Back into the residual stream
        out, = self.ops.linear("out", (self.wo,), self.join, (), y)
        return out, None

    def ups(self):
        """The parameters that lead from the latents to the heads."""
        of_queries = (self.wuq, *parameters_of(self.q_norm)) if self.config.q_rank else ()
        return (*of_queries, self.wuk, self.wuv, *parameters_of(self.kv_norm))

    def join(self, y):
        """Concatenate heads: (B, H, T, d_value) → (B, T, H·d_value)."""
        return y.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate.

    shared: this is the shared expert of a mixture, whose input is normalised already."""

    def __init__(self, config, ops, shared=False):
        super().__init__()
        self.ops = ops
        self.gated = config.gated

        # The shared expert is n_shared experts side by side
        if shared:
            self.prefix = "shared_"
            d_ff = config.n_shared * config.d_expert
            self.norm = nn.Identity()
        else:
            self.prefix = ""
            d_ff = config.d_ff
            self.norm = make_norm(config)

        # Activation and matrices
        self.act = PolyNorm(config.compile_act) if config.act == "polynorm" else ACTIVATIONS[config.act]
        if config.gated:
            self.gate = matrix(d_ff, config.d_model)
        self.up = matrix(d_ff, config.d_model)
        self.down = matrix(config.d_model, d_ff)

    def inner(self, gate, up):
        """The input of `down`."""
        return gated(self.act, gate, up)

    def inside(self):
        """The parameters that `inner` uses."""
        return parameters_of(self.act)

    def forward(self, x):
        """x (B, T, C) → (B, T, C)"""
        gains = parameters_of(self.norm)
        inside = self.inside()
        if self.gated:
            gate, up = self.ops.linear(self.prefix + "up", (self.gate, self.up), self.norm, gains, x)
            out, = self.ops.linear(self.prefix + "down", (self.down,), self.inner, inside, gate, up)
        else:
            h, = self.ops.linear("up", (self.up,), self.norm, gains, x)
            out, = self.ops.linear("down", (self.down,), self.act, inside, h)
        return out


def sum_rows(rows, token, N):
    """The sum of the rows of each token, which has k of them: rows (N·k, C), token (N·k,) → (N, C).

    On a GPU torch's index_add adds in a random order, rounding every time. Sorting the rows by token first is
    4 times as fast (8 rows of 7,168 numbers for each of 4,096 tokens, H200), and always gives the same."""
    if rows.device.type == "cpu":
        return rows.new_zeros(N, rows.shape[1]).index_add_(0, token, rows)
    return rows.index_select(0, token.argsort(stable=True)).view(N, -1, rows.shape[1]).sum(1)


class Spread(torch.autograd.Function):
    """A row for each pair (token, expert): h (N, C), token (N·k,) → (N·k, C). Backward: sum_rows."""

    @staticmethod
    def forward(ctx, h, token):
        ctx.save_for_backward(token)
        ctx.N = len(h)
        return h.index_select(0, token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return sum_rows(g, *ctx.saved_tensors, ctx.N), None


class Collect(torch.autograd.Function):
    """sum_rows, keeping only the tokens for its backward. index_add also keeps the rows, of which it needs no
    more than the shape: a third of what a layer of Kimi K2 keeps with all the savings of parallel.py."""

    @staticmethod
    def forward(ctx, rows, token, N):
        ctx.save_for_backward(token)
        return sum_rows(rows, token, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g.index_select(0, *ctx.saved_tensors), None, None


class MoE(nn.Module):
    """Sparse mixture of experts: route → dispatch → experts → combine, functions that pass tensors.
    [DeepSeek-V3 §2.1.2]

    No token is dropped and none is padded. `load` (E,) counts the tokens of each expert over training
    forwards; after each step `balance_` moves `bias` (E,), which affects the choice of experts but not
    their weights.

    here: the range of experts whose matrices this instance holds."""

    def __init__(self, config, ops, here):
        super().__init__()
        c = config
        E, n = c.n_expert, len(here)
        self.config = c
        self.ops = ops
        self.norm = make_norm(c)

        # The router knows all experts; the matrices are stacks of those held here
        self.router = matrix(E, c.d_model)
        self.gate = nn.Parameter(torch.empty(n, c.d_expert, c.d_model))
        self.up = nn.Parameter(torch.empty(n, c.d_expert, c.d_model))
        self.down = nn.Parameter(torch.empty(n, c.d_model, c.d_expert))
        self.act = PolyNorm(c.compile_act) if c.act == "polynorm" else ACTIVATIONS[c.act]
        if c.n_shared:
            self.shared = FeedForward(c, ops, shared=True)

        # Balance
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)
        self.counts = True                                     # False while a forward is recomputed

    def route(self, h):
        """h (B, T, C) → the experts of each token (N, k), their weights (N, k), and the balance loss.

        A token's weights are the scores of its experts divided by their sum, times route_scale. Scores
        are computed in float32 or wider: the rounding step of bfloat16 is larger than the bias's step, and
        with hundreds of experts one token in ten would have a tie for its last expert."""
        c = self.config

        # Scores, and the biased scores that decide the choice
        s, = self.ops.linear("router", (self.router,), widened, (), h)
        s = s.sigmoid().flatten(0, 1)                                                      # (N, E)
        choice = s.detach() + self.bias

        # Only the groups whose best two experts have the largest sum stay eligible
        if c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))                                 # (N, G, E/G)
            group_score = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)         # (N, G)
            best = group_score.topk(c.top_group, -1).indices
            chosen = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
            choice = groups.masked_fill(~chosen[..., None], -torch.inf).flatten(1)

        # Weights; a single active expert keeps its score, since s/s = 1 has no gradient
        index = choice.topk(c.n_active, -1).indices
        weight = s.gather(1, index)
        if c.n_active > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)       # no 0/0 if all scores are zero

        # Balance loss
        balance = 0.0
        if self.training and c.balance_loss:
            balance = c.balance_loss * self.imbalance(s, h.shape[0])
        return index, weight * c.route_scale, balance

    def imbalance(self, s, B):
        """Scores s (N, E) → Σ_i f_i·P_i, a mean over the B sequences; 1 if all experts score alike.

        f_i = E/k × the share of a sequence's tokens that have expert i among their k best scores; bias and
        groups are ignored, since they affect only the dispatch. P_i = the mean over its tokens of
        s_i / Σ_j s_j.   [DeepSeek-V3 eq. 17-20]"""
        E, k = self.config.n_expert, self.config.n_active
        best = s.topk(k, -1).indices
        f = torch.zeros_like(s).scatter(1, best, 1.0)                                      # (N, E)
        f = f.unflatten(0, (B, -1)).mean(1) * E / k                                        # (B, E)
        p = (s / s.sum(-1, keepdim=True)).unflatten(0, (B, -1)).mean(1)
        return (f * p).sum(-1).mean()

    def sort(self, index):
        """The experts of each token, index (N, k) → the order that sorts the N·k pairs (token, expert) by
        expert, and the tokens of each expert (E,)."""
        order = index.flatten().argsort(stable=True)                           # keeps tokens in order

        # bincount would make a GPU's host wait for the largest index
        ones = torch.ones_like(index).flatten()
        counts = ones.new_zeros(self.config.n_expert).scatter_add(0, index.flatten(), ones)
        if self.training and self.counts:
            self.load += counts
        return order, counts

    def experts(self, rows, weight, counts):
        """Rows (M, C) with weights (M, 1), sorted by expert, and the counts of the experts held here →
        the weighted outputs of the experts (M, C)."""
        ends = counts.cumsum(0)
        inside = parameters_of(self.act)
        gate, up = self.ops.linear("expert_up", (self.gate, self.up), identity, (), rows, ends=ends)
        out, = self.ops.linear("expert_down", (self.down,), self.inner, inside,
                               gate, up, weight, ends=ends)
        return out

    def inner(self, gate, up, weight):
        """The input of `down`, which is linear: so the routing weight may come before it. After it, on the
        rank that sent the token, its gradient would need the expert's output, kept for the backward."""
        return gated(self.act, gate, up) * weight

    def combine(self, rows, token, N):
        """Sum the rows of each token: rows (N·k, C), token (N·k,) → (N, C)."""
        return Collect.apply(rows, token, N)

    def parts(self, x, *also):
        """`forward`, cut where tokens are under way: a generator of the parts of a layer.

        x (B, T, C) → (B, T, C), balance loss, *also. It yields the name of an exchange that has begun and is
        waited for when the generator goes on, and the tensors that live on: those with a gradient have to
        pass here, and `also` passes what the caller keeps. The driver returns them, or others that are equal.
        No grad-mode or autocast context may be open across a yield."""
        # Route, and tell the other ranks how many tokens they will get
        h = self.ops.recompute("norm", self.norm, parameters_of(self.norm), x)
        index, weight, balance = self.route(h)
        order, counts = self.sort(index)
        trip = self.ops.exchange(counts)
        token = order // index.shape[1]                                        # of each row: (N·k,)
        weight = weight.flatten()[order, None].to(h.dtype)                     # (N·k, 1)
        h, weight, balance, *also = yield "counts", (h, weight, balance, *also)

        # A row for each pair leaves; the shared expert, while they travel
        moving = trip.dispatch(Spread.apply(h.flatten(0, 1), token), weight)
        shared = self.shared(h) if self.config.n_shared else 0.0
        moving, shared, balance, *also = yield "dispatch", (moving, shared, balance, *also)

        # Experts
        moving = trip.combine(self.experts(*trip.arrive(moving)))
        moving, shared, balance, *also = yield "combine", (moving, shared, balance, *also)

        # Combine
        y = self.combine(trip.home(moving), token, len(index))
        return y.view_as(x) + shared, balance, *also

    def forward(self, x):
        """x (B, T, C) → (B, T, C), balance loss

        Example: N = 2 tokens, k = 2 active experts of E = 4. The router returns index [[3, 0], [0, 1]]
        and weight [[a, b], [c, d]]: token 0 goes to experts 3 and 0, token 1 to experts 0 and 1.
        Dispatch sends four rows, sorted by expert:

            row      0  1  2  3
            expert   0  0  1  3      counts [2, 1, 0, 1]: no token was routed to expert 2
            token    0  1  1  0      the rows of h that are sent
            weight   b  c  d  a

        Each row returns as its expert's output times its weight. Combine sums the rows of each token:

            y[0] = row 0 + row 3 = b·expert_0(h[0]) + a·expert_3(h[0])
            y[1] = row 1 + row 2 = c·expert_0(h[1]) + d·expert_1(h[1])"""
        return whole(self.parts(x))

    @torch.no_grad()
    def balance_(self, load):
        """b_i += u if expert i had fewer tokens than the mean of load (E,), −= u if it had more."""
        self.bias += self.config.balance_rate * (load.mean() - load).sign().to(self.bias.dtype)


class Layer(nn.Module):
    """Pre-norm block: x + attention(x), then x + ffn(x); the norms are inside the two parts."""

    def __init__(self, config, layer, ops, experts):
        super().__init__()
        attention = LatentAttention if config.kv_rank else Attention
        self.attention = attention(config, layer, ops)
        self.sparse = bool(config.n_expert) and layer >= config.n_dense
        if self.sparse:
            self.ffn = MoE(config, ops, experts)
        else:
            self.ffn = FeedForward(config, ops)

    def parts(self, x, rope=None, sees=None, cache=None, kv=None, total=0.0):
        """`forward` as a generator, which yields while tokens are under way to experts and back: see
        MoE.parts. A dense layer yields nothing."""
        y, kv = self.attention(x, rope, sees, cache, kv)
        x = x + y
        if not self.sparse:
            return x + self.ffn(x), kv, total
        y, balance, x, total, *kv = yield from self.ffn.parts(x, x, total, *(kv or ()))
        return x + y, kv, total + balance

    def forward(self, x, rope=None, sees=None, cache=None, kv=None, total=0.0):
        """x (B, T, C) → (B, T, C), keys and values for layers that share them, the sum `total` of balance
        losses with that of this layer"""
        return whole(self.parts(x, rope, sees, cache, kv, total))

    def compile_parts(self, on=True):
        """torch.compile the matmuls and what belongs to them, which lie between the yields of `parts`, or
        undo that. A generator cannot be compiled."""
        pieces = [(self.attention, "forward")]
        if self.sparse:
            pieces += [(self.ffn, "route"), (self.ffn, "experts")]
            if hasattr(self.ffn, "shared"):
                pieces.append((self.ffn.shared, "forward"))
        else:
            pieces.append((self.ffn, "forward"))
        for module, name in pieces:
            if on:
                setattr(module, name, torch.compile(getattr(module, name)))
            else:
                delattr(module, name)


# ---- a candidate: nGPT, the network on the unit sphere [2410.01131] ----------------------------------------
# All vectors of width C = d_model have norm 1: embeddings, rows of matrices that read the residual
# stream, columns of matrices that write to it, and the stream itself, so that no other norm is needed.
# The scales of queries and keys, and of logits, are stored as s/√C, the size of an entry of a unit vector,
# so that one learning rate suits scales and matrices (§2.5). α is stored as α·n_layer/√C, so that it starts
# at 1/n_layer. The scales of feed-forward layers are stored as s.

def unit(x, dim=-1):
    """x / ‖x‖ along `dim`."""
    return F.normalize(x, dim=dim)


def scales(width, d_model):
    """A parameter (width,) that stores scales of 1 as 1/√d_model."""
    return nn.Parameter(torch.full((width,), d_model ** -0.5))


@torch.no_grad()
def renormalise_(tensors):
    """{name: weight}: scale all vectors of width d_model to norm 1. Called after each step of an nGPT."""
    for name, w in tensors.items():
        if w.ndim > 1:
            writes = name.endswith(("wo", "down"))             # to the residual stream, with its columns
            w.copy_(unit(w, -2 if writes else -1))


class SphereAttention(Attention):
    """Attention between unit queries and keys, with learned scales `s_qk` (H·d,).   [eq. 15, 16]"""

    def __init__(self, config, layer, ops):
        super().__init__(config, layer, ops)
        self.norm = nn.Identity()
        self.s_qk = scales(config.n_head * config.d_head, config.d_model)

    def key(self, k, rope):
        """k (B, Hk, T, d) → unit vectors, rotated."""
        return super().key(unit(k), rope)

    def query(self, q, rope):
        """q (B, H, T, d) → unit vectors, scaled, rotated.

        nGPT's logit is (s·q)·(s·k)·√d, and kernels.attention divides by √d. So the query takes everything:
        (s²·d·q)·k/√d, with s² = s_qk²·C. The scale comes before the rotation, so that logits depend only on
        distances; in nGPT's own code it comes after.   [eq. 15, 16]"""
        d = self.config.d_head
        scale = self.s_qk.unflatten(0, (-1, 1, d)).square() * self.config.d_model * d      # (H, 1, d)
        return super().query(unit(q) * scale.to(q.dtype), rope)


class SphereFeedForward(FeedForward):
    """FeedForward without a norm, with learned scales `s_gate` and `s_up` (d_ff,)."""

    def __init__(self, config, ops):
        super().__init__(config, ops)
        self.norm = nn.Identity()
        self.root = config.d_model ** 0.5
        self.s_gate = scales(config.d_ff, 1)
        self.s_up = scales(config.d_ff, 1)

    def inner(self, gate, up):
        """act(s_gate·√C·gate)·(s_up·up): the paper's s_v is s_gate, its s_u is s_up.   [eq. 20, 21]"""
        gate = gate * (self.s_gate * self.root).to(gate.dtype)
        up = up * self.s_up.to(up.dtype)
        return super().inner(gate, up)

    def inside(self):
        """The parameters that `inner` uses."""
        return (*super().inside(), self.s_gate, self.s_up)


class SphereLayer(Layer):
    """Steps along the sphere in place of residual sums: entry j moves the fraction α_j of the way."""

    def __init__(self, config, layer, ops, experts):
        nn.Module.__init__(self)
        self.sparse = False
        self.attention = SphereAttention(config, layer, ops)
        self.ffn = SphereFeedForward(config, ops)
        self.rate = config.d_model ** 0.5 / config.n_layer     # α starts at 1/n_layer
        self.a_attention = scales(config.d_model, config.d_model)
        self.a_ffn = scales(config.d_model, config.d_model)

    def parts(self, x, rope=None, sees=None, cache=None, kv=None, total=0.0):
        """As Layer.parts."""
        yield from ()
        y, kv = self.attention(x, rope, sees, cache, kv)
        alpha = (self.a_attention * self.rate).to(x.dtype)
        x = unit(x + alpha * (unit(y) - x))                                                # [eq. 10]
        alpha = (self.a_ffn * self.rate).to(x.dtype)
        x = unit(x + alpha * (unit(self.ffn(x)) - x))                                      # [eq. 11]
        return x, kv, total


def sharpened(head, s_logits):
    """The head (V, C) with its rows scaled: logits are cosines times a learned sharpness.   [eq. 3]"""
    return head * (s_logits * head.shape[1] ** 0.5)[:, None]


# ---- the network -------------------------------------------------------------------------------------------

class Cache:
    """Keys and values so far, by layer. The first `put` allocates room for `context` tokens."""

    def __init__(self, context):
        self.context = context
        self.length = 0                                        # tokens; Transformer.forward advances it
        self.store = {}

    def put(self, layer, *new):
        """Append tensors (B, H, T, width) to the `length` tokens stored → (B, H, length + T, width) each."""
        if layer not in self.store:
            self.store[layer] = [t.new_empty(*t.shape[:2], self.context, t.shape[3]) for t in new]
        stop = self.length + new[0].shape[2]
        for old, t in zip(self.store[layer], new):
            old[:, :, self.length:stop] = t
        return [t[:, :, :stop] for t in self.store[layer]]


class Transformer(nn.Module):
    """The whole model, or only the layers in `layers` (a range): the range from 0 on has the embedding, and
    `last` (by default the one to the last layer) the head; it may be empty. ValueError: the range starts
    within a group of layers that share keys and values.

    Parameter names do not depend on the range; neither do initial values, since each parameter is drawn
    from a random stream seeded with its name. The same holds for `experts`, the range of experts held here
    (all by default); with fewer, ops.exchange has to bring them their tokens.

    restart: whether learned positions begin at 0 in each document, as after pre-training."""

    def __init__(self, config, ops=Ops(), layers=None, seed=0, experts=None, last=None, restart=False):
        super().__init__()
        self.config = config
        self.restart = restart
        self.width = config.d_model

        # The part of the model that is held here
        if layers is None:
            layers = range(config.n_layer)
        if len(layers) and layers.start % config.share_kv:
            raise ValueError(f"layers from {layers.start} on: their keys and values are made in another "
                             f"range (share_kv={config.share_kv})")
        self.experts = range(config.n_expert) if experts is None else experts
        self.first = layers.start == 0
        self.last = layers.stop == config.n_layer if last is None else last

        # Embedding; a last range with tied matrices needs it for the head
        if self.first or self.last and config.tie:
            self.embed = matrix(config.vocab_size, config.d_model)
        if self.first and config.position == "learned":
            self.position = matrix(config.context, config.d_model)

        # Layers
        layer = SphereLayer if config.ngpt else Layer
        self.layers = nn.ModuleDict({str(i): layer(config, i, ops, self.experts) for i in layers})

        # Final norm and head
        if self.last:
            self.norm = nn.Identity() if config.ngpt else make_norm(config)
            if not config.tie:
                self.head = matrix(config.vocab_size, config.d_model)
            if config.ngpt:
                self.s_logits = scales(config.vocab_size, config.d_model)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed):
        """Draw all matrices and λ vectors. Gains and PolyNorm keep the values of their constructors."""
        for name, p in self.named_parameters():
            if p.is_meta:
                continue

            # Standard deviation
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("lq1", "lk1", "lq2", "lk2"):
                std = 0.1                                                                  # [2410.05258]
            elif p.ndim < 2:
                continue
            elif leaf in ("wo", "down"):
                std = self.config.init_std / math.sqrt(2 * self.config.n_layer)
                if self.config.zero_out and not self.config.ngpt:
                    std = 0.0
            else:
                std = self.config.init_std

            # Each matrix of a stack is drawn from the name of its expert, wherever that is held
            units = [(name, p)]
            if p.ndim == 3:
                units = [(f"{name}.{e}", p[i]) for i, e in enumerate(self.experts)]
            for unit_name, w in units:
                random = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{unit_name}".encode()))
                values = torch.empty(w.shape, dtype=torch.float32).normal_(0, 1, generator=random)
                w.copy_(values * std)

        if self.config.ngpt:
            renormalise_(dict(self.named_parameters()))

    def attentions(self):
        """name → Attention or LatentAttention, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Heads)}

    def mixtures(self):
        """name → MoE, in order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MoE)}

    def forward(self, x, targets=None, doc_start=None, weight=None, cache=None, dtype=None):
        """x (B, T) int64 tokens → logits (B, T, V). With targets (B, T): (mean loss in nats/token, its (N,)
        terms, balance loss); with `weight` (B, T), the loss is the sum of weight × term.

        doc_start, cache, dtype and ValueError: see `body`."""
        h, balance = self.body(x, doc_start, cache, dtype)
        if targets is None:
            return F.linear(h, self.output().to(h.dtype))
        loss, nll = self.loss(h, targets, weight)
        return loss, nll, balance

    def body(self, x, doc_start=None, cache=None, dtype=None):
        """x (B, T) int64 tokens, or (B, T, C) from the range of layers before → what the layers of this range
        make of it, (B, T, C), normalised for the head after the last one; and their balance loss.

        doc_start (B, T): position at which each token's document begins; None: attention crosses them.
        dtype: that of the computation, by default the dtype of the weights.
        ValueError: there are more tokens than learned positions."""
        x, rope, sees = self.enter(x, doc_start, cache, dtype)
        kv = None
        balance = 0.0
        for layer in self.layers.values():
            x, kv, balance = layer(x, rope, sees, cache, kv, balance)
        if cache:
            cache.length += x.shape[1]
        return self.leave(x), balance

    def parts(self, x, doc_start=None, dtype=None):
        """`body` as a generator, which yields where tokens are under way: see MoE.parts, `count_parts`."""
        x, rope, sees = self.enter(x, doc_start, None, dtype)
        kv = None
        balance = 0.0
        for layer in self.layers.values():
            x, kv, balance = yield from layer.parts(x, rope, sees, None, kv, balance)
        return self.leave(x), balance

    def enter(self, x, doc_start, cache, dtype):
        """What all layers get: x, embedded if it is tokens; the rotations of the positions; and what each
        token may attend to."""
        past = cache.length if cache else 0
        T = x.shape[1]
        if past + T > self.config.context and self.config.position == "learned":
            raise ValueError(f"{past + T} tokens, but there are learned positions for {self.config.context}")

        # Embedding
        if self.first:
            x = F.embedding(x, self.embed)
            if self.config.position == "learned":
                if doc_start is not None and self.restart:
                    x = x + self.position[torch.arange(T, device=x.device) - doc_start]
                else:
                    x = x + self.position[past:past + T]
            if dtype is not None:
                x = x.to(dtype)

        # Positions and masks
        rope = None
        if self.config.position == "rope":
            rope = rope_table(self.config, past, past + T, x.device, kernels.accumulation_dtype(x.dtype))
        return x, rope, kernels.sight(T, past + T, doc_start, x.device)

    def leave(self, x):
        """x after the last layer, normalised if the head follows."""
        return self.norm(x) if self.last else x

    def output(self):
        """The matrix (V, C) that makes logits."""
        head = self.embed if self.config.tie else self.head
        if self.config.ngpt:
            head = sharpened(head, self.s_logits)
        return head

    def loss(self, h, targets, weight=None):
        """h (B, T, C) from `body`, targets and weight (B, T) → (loss, its (N,) terms): see `forward`."""
        if weight is not None:
            weight = weight.flatten()
        h = h.flatten(0, 1)                                                                # (N, C)
        return kernels.cross_entropy(h, self.output(), targets.flatten(), weight, self.config.loss_chunk)

    def count(self, on):
        """Turn the recording of loads and largest logits on or off: recomputed forwards are not recorded."""
        for module in (*self.attentions().values(), *self.mixtures().values()):
            module.counts = on


# ---- counting ----------------------------------------------------------------------------------------------

@functools.cache
def count_parameters(config):
    """Parameter counts, from a model without storage:

    total       all of them
    active      those used for one token: n_active routed experts, the head; not embedding or positions
    embedding   those of embedding, head and learned positions
    matmul      the matrices among the active ones, without vectors (gains, λ)"""
    with torch.device("meta"):
        named = dict(Transformer(config).named_parameters())

    # A token uses n_active of the n_expert matrices of a stack
    tables = 0
    used = {}
    for name, p in named.items():
        if name in ("embed", "head", "position"):
            tables += p.numel()
        elif p.ndim == 3:
            used[name] = p.numel() * config.n_active // config.n_expert
        else:
            used[name] = p.numel()

    # The head's matrix counts once, whether or not it is also the embedding
    head = config.vocab_size * config.d_model
    matrices = sum(n for name, n in used.items() if named[name].ndim > 1)
    return dict(total=sum(p.numel() for p in named.values()), active=sum(used.values()) + head,
                embedding=tables, matmul=matrices + head)


def head_width(config):
    """Multiply-adds of one head for a pair of tokens: the width of q·k, and that of the values."""
    if config.kv_rank:
        return config.d_head + config.d_rope + config.d_value
    return config.d_head * (3 if config.differential else 2)


def flops_per_token(config, context=None, training=True):
    """FLOPs of one token: 2 per multiply-add of every matmul, and 3 times the forward's when training.

    Attention is counted against the full context, as PaLM does (a causal kernel needs half).
    Differential attention multiplies each of its maps with values of width 2d."""
    attention = config.n_layer * (context or config.context) * config.n_head * head_width(config)
    return (6 if training else 2) * (count_parameters(config)["matmul"] + attention)


def layer_costs(config):
    """Multiply-adds of one token, as `flops_per_token` counts them: [layer 0, layer 1, ..., head]. The
    embedding adds its C numbers to layer 0."""
    with torch.device("meta"):
        named = dict(Transformer(config).named_parameters())

    # Attention against the context, then the matrices that a token meets
    costs = [config.context * config.n_head * head_width(config)] * config.n_layer
    for name, p in named.items():
        if name.startswith("layers.") and p.ndim > 1:
            used = p.numel()
            if p.ndim == 3:
                used = used * config.n_active // config.n_expert
            costs[int(name.split(".")[1])] += used
    costs[0] += config.d_model
    return [*costs, config.vocab_size * config.d_model]


def count_parts(config, layers):
    """The number of parts in which a range of layers is run: an exchange of tokens ends each but the last."""
    sparse = [layer for layer in layers if config.n_expert and layer >= config.n_dense]
    return 1 + 3 * len(sparse)


def cache_per_token(config):
    """How many numbers the KV cache keeps for one token."""
    if config.kv_rank:
        return config.n_layer * (config.kv_rank + config.d_rope)
    return math.ceil(config.n_layer / config.share_kv) * 2 * config.n_kv_head * config.d_head


# ---- tensor files: the safetensors format ------------------------------------------------------------------
# 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, the raw bytes.
# Reading a file runs no code.

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U64=torch.uint64, U32=torch.uint32,
              U16=torch.uint16, U8=torch.uint8, BOOL=torch.bool, C64=torch.complex64,
              F8_E4M3=torch.float8_e4m3fn, F8_E5M2=torch.float8_e5m2, F8_E8M0=torch.float8_e8m0fnu,
              F8_E4M3FNUZ=torch.float8_e4m3fnuz, F8_E5M2FNUZ=torch.float8_e5m2fnuz)
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_tensors(path, tensors):
    """Write {name: tensor} to a safetensors file and force it to disk. Tensors move to the CPU one by one."""
    # Header
    header = {}
    offset = 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = dict(dtype=CODES[t.dtype], shape=list(t.shape), data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                            # the data begins aligned

    # Length, header, data
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def json_object(raw, where):
    """Parse bytes as one JSON object. ValueError, in one line that begins with `where`: they are
    something else, repeat a key, are not UTF-8, or nest deeper than Python's recursion limit."""
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        "".join(found).encode()                                # raises for half a surrogate pair
        return found

    # Python raises RecursionError where JSON nests too deep
    try:
        found = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not good JSON: {str(error):.80}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not a JSON object")
    return found


def read_entry(entry):
    """A header entry → (dtype, shape, start, stop); None if it is malformed or contradicts itself."""
    def sizes(numbers):
        return type(numbers) is list and all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers)

    # Types of the three fields
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code not in list(DTYPES) or not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        return None

    # The size, without multiplying numbers of unlimited length
    count = 1
    for n in shape:
        count *= n
        if count >= 2 ** 63:
            return None
    if offsets[1] - offsets[0] != count * DTYPES[code].itemsize:
        return None
    return DTYPES[code], shape, *offsets


def read_tensors(path):
    """{name: tensor} of a safetensors file, memory-mapped: bytes are read when they are used, and writes
    to the tensors do not reach the file. ValueError: the file contradicts its header, or its tensors do
    not cover the data exactly, one after the other."""
    # Header
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):    # the format's own limit on headers
            raise ValueError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        header = json_object(file.read(length), f"{path}: its header")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    # Its metadata, which nothing here uses
    about = header.pop("__metadata__", None)
    if about is not None and not (type(about) is dict and all(type(text) is str for text in about.values())):
        raise ValueError(f"{path}: its __metadata__ is not text by name: {about!r:.80}")

    # All entries are checked before any tensor is made
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

    # Tensors
    tensors = {}
    for name, (dtype, shape, start, stop) in entries.items():
        flat = torch.empty(0, dtype=dtype)
        if stop > start:
            count = (stop - start) // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + start)
        tensors[name] = flat.view(shape)
    return tensors


# ---- sampling ----------------------------------------------------------------------------------------------

def pick(logits, temperature, top_p, random):
    """Draw one token for each row of logits (B, V) → (B, 1). Temperature 0 takes the most probable one;
    top_p draws from the smallest set of most probable tokens whose mass reaches it."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    dropped = probs.cumsum(-1) - probs >= top_p
    dropped[..., 0] = False                                    # the most probable token always stays
    probs[dropped] = 0
    return order.gather(-1, torch.multinomial(probs, 1, generator=random))


@torch.no_grad()
def generate(model, tokens, n, temperature=1.0, top_p=1.0, seed=0):
    """tokens (B, T) int64 → (B, T + n). A full cache starts again from the last half of the context."""
    was_training = model.training
    context = model.config.context
    model.eval()
    random = torch.Generator(tokens.device).manual_seed(seed)

    # The prompt first, then one token at a time
    cache = Cache(context)
    new = tokens[:, -context:]
    for _ in range(n):
        if cache.length + new.shape[1] > context:
            cache = Cache(context)
            new = tokens[:, -max(1, context // 2):]
        new = pick(model(new, cache=cache)[:, -1], temperature, top_p, random)
        tokens = torch.cat((tokens, new), 1)
    model.train(was_training)
    return tokens


def load(folder, args):
    """(model, tokenizer) of a folder. ValueError: an option is out of range, or the folder has no model or no
    tokenizer."""
    from train import is_hf, load_run

    # Options
    ranges = dict(tokens=(0, 10 ** 9), temperature=(0, 1000), top_p=(0, 1), seed=(0, 2 ** 63 - 1),
                  average=(1, 10 ** 9))
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be from {least} to {most}")
    for name in ("prompt", "system"):
        try:
            getattr(args, name).encode()
        except UnicodeEncodeError:
            raise ValueError(f"--{name}={getattr(args, name)!r:.80}: is not UTF-8") from None

    # The model; what a folder lacks is reported before its weights are read
    folder = Path(folder)
    if is_hf(folder) and not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no tokenizer.json, and nothing else is read as its tokenizer")
    if is_hf(folder) and args.average > 1:
        raise ValueError(f"--average={args.average}: {folder} is no run, and has no checkpoints")
    return load_run(folder, args.average)


def known_to(model, tokens, folder):
    """Tokens that all have a row in the embedding; else ValueError."""
    size = model.config.vocab_size
    if max(tokens) >= size:
        raise ValueError(f"{folder}: its tokenizer has a token {max(tokens)}, its model {size} of them")
    return tokens


def steady(temperature):
    """The temperature, or 0 for one so small that logits divided by it would overflow."""
    return temperature if temperature >= 1e-6 else 0.0


def sample(args):
    """Print what the model in folder args.sample writes after args.prompt, or export it to args.export.
    ValueError: as `load`, or a token of the prompt is unknown to the model."""
    model, tokenizer = load(args.sample, args)
    if args.export:
        from notes.huggingface import save_hf
        return save_hf(model, args.export, tokenizer)

    # The prompt and its continuation
    prompt = known_to(model, [tokenizer.eot, *tokenizer.encode(args.prompt).tolist()], args.sample)
    temperature = steady(args.temperature)
    out = generate(model, torch.tensor([prompt]), args.tokens, temperature, args.top_p, args.seed)
    print(tokenizer.decode(out[0, 1:].tolist()))


# ---- chat --------------------------------------------------------------------------------------------------

class Chat:
    """A conversation with a model, in the template of data.chat_ids.

    turns: the tokens of each message: a system message or none, then questions and answers in turn. Each ends
    with <|end|>, also an answer to which tokens are still added before it. The cache holds the first
    `cache.length` tokens, so that a turn computes its own only. Ctrl-C may come between any two lines.
    limit: tokens of an answer, at most."""

    def __init__(self, model, tokenizer, system="", limit=200, temperature=1.0, top_p=1.0, seed=0):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.context = model.config.context
        self.limit = limit
        self.pick = functools.partial(pick, temperature=temperature, top_p=top_p,
                                      random=torch.Generator().manual_seed(seed))
        self.system = [self.message("system", system)] if system else []
        self.reset()

    def message(self, role, content):
        """The tokens of a message."""
        from data import chat_ids
        return chat_ids([dict(role=role, content=content)], self.tokenizer)[0].tolist()

    def reset(self):
        """Forget everything but the system message."""
        self.cache = Cache(self.context)
        self.turns = [*self.system]

    def size(self):
        """Tokens of the conversation."""
        return sum(map(len, self.turns))

    def forget(self, room):
        """Drop the oldest questions and their answers until `room` tokens are free, but never the last → how
        many questions went. What stays has other positions, so it is computed again."""
        first = len(self.system)
        kept = [*self.turns]
        while sum(map(len, kept)) - 1 + room > self.context and len(kept) > first + 2:
            del kept[first:first + 2]
        gone = (len(self.turns) - len(kept)) // 2
        if gone:
            self.cache = Cache(self.context)                   # first: Ctrl-C may come in between
            self.turns = kept
        return gone

    def answer(self, question):
        """Yield the answer as text, piece by piece, and lines in brackets about the window. An answer that is
        left early, by close() or Ctrl-C, stays in the conversation as far as it got."""
        specials = self.tokenizer.specials
        asked = self.message("user", question)
        given = [specials["<|assistant|>"], specials["<|end|>"]]
        most = self.context - sum(map(len, self.system)) - 2   # for the answer: its first two tokens
        if len(asked) > most:
            yield f"[{len(asked)} tokens, but the window has room for {most}: not read]"
            return

        # Room for an answer: half the window, or as much as the question leaves
        self.turns += [asked, given]
        gone = self.forget(min(self.limit, self.context // 2))
        if gone:
            yield f"[the window of {self.context} tokens is full: the oldest questions and their answers, " \
                  f"{gone} of each, are forgotten]\n"

        # One token at a time; a character of several tokens waits until it is complete
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        cut = ""
        while not cut:
            if len(given) - 1 > self.limit:
                cut = f" [--tokens={self.limit}: cut]"
            elif self.size() - 1 > self.context:
                cut = f" [the window of {self.context} tokens is full: cut]"
            else:
                token = self.next()
                if token in specials.values():
                    break
                given.insert(-1, token)
                yield utf8.decode(self.tokenizer.bytes_of([token]))
        yield utf8.decode(b"", True) + cut

    @torch.no_grad()
    def next(self):
        """The next token of the conversation, before the <|end|>. Computes what the cache lacks."""
        new = [token for turn in self.turns for token in turn][self.cache.length:-1]
        return self.pick(self.model(torch.tensor([new]), cache=self.cache)[:, -1]).item()


def chat(args):
    """A conversation in the terminal with the model in folder args.chat. ValueError: as `load`, or it lacks
    the tokens of the template."""
    from data import SPECIALS
    from train import is_hf, kept_config

    # The model
    model, tokenizer = load(args.chat, args)
    lacking = [name for name in SPECIALS[1:] if name not in tokenizer.specials]
    if lacking:
        raise ValueError(f"{args.chat}: its tokenizer has no {', '.join(lacking)}, the tokens of a "
                         "conversation: --sample continues a text")
    known_to(model, [tokenizer.n_vocab - 1], args.chat)
    told = Chat(model, tokenizer, args.system, args.tokens, steady(args.temperature), args.top_p, args.seed)
    if told.size() > told.context // 2:
        raise ValueError(f"--system: {told.size()} tokens are more than half of the window, which has "
                         f"{told.context}")

    # Where to go from here; where Python has readline, input() has the arrow keys
    with suppress(ImportError):
        importlib.import_module("readline")
    print(f"{args.chat}: Ctrl-C stops an answer, /reset begins anew, Ctrl-D ends.")
    if not is_hf(args.chat) and kept_config(args.chat).objective == "pretrain":
        print("This run has seen no conversations, so it goes on writing rather than answers: torchrun "
              f"train.py sft --init={args.chat} teaches it.")

    # Questions and answers; a transcript shows the questions that came through a pipe
    while True:
        try:
            question = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        if not sys.stdin.isatty():
            print(question)
        word = question.strip()
        if word == "/reset":
            told.reset()
        elif re.fullmatch(r"/\w+", word):
            print(f"there is no {word}, only /reset")
        elif word:
            try:
                with closing(told.answer(question)) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            print()


ROOMS = """
The files, and which of the others each imports:

  kernels.py   operations: definition, fast path   -
  data.py      files, text, tokens, batches        -
  model.py     the network                         kernels
  muonclip.py  Muon, AdamW, QK-Clip                kernels
  parallel.py  pipeline, experts, ZeRO-1           kernels
  train.py     recipes, checkpoints, the loop      data, kernels, model, muonclip, parallel
  notes/       claims of the reports, rerun        any

One step, train.train_step, in the order of its calls:

  muonclip.learning_rate(tokens)              a pure function of the tokens seen
  data.Batches(step)                          this rank's windows, a pure function of (seed, step)
  parallel.execute(plan)                      forwards and backwards of micro-batches, chunk by chunk
    model.Transformer.body, .loss             a chunk's layers; the loss, in the last one
      kernels.attention, kernels.poly_norm    and the other operations
    parallel.Zero1.accumulate                 gradients into buckets, as they appear
  train.share_what_was_seen                   losses, largest logits, expert loads: of all ranks
  parallel.Zero1.reduce, .clip_norm_          gradients to their owners, one norm
  train.update
    parallel.Zero1.step                       owners update, then everybody gets the weights
      muonclip.MuonClip.step                  Muon, AdamW
      muonclip.qk_clip_, .add_snapshot_       on the owner's float32 masters
  train.finish                                checkpoint, evaluation, log
"""


def count_presets():
    """Print one line for each preset: parameters, FLOPs and cache."""
    print(f"{'preset':<14}{'parameters':>18}{'active':>16}{'embedding':>15}{'training FLOPs/token at 4k':>28}"
          f"{'at 128k':>10}{'KV cache, numbers/token':>25}")
    for name, config in PRESETS.items():
        counts = count_parameters(config)
        print(f"{name:<14}{counts['total']:>18,}{counts['active']:>16,}{counts['embedding']:>15,}"
              f"{flops_per_token(config, 4096):>28.2e}{flops_per_token(config, 131_072):>10.2e}"
              f"{cache_per_token(config):>25,}")
    print(ROOMS, end="")


def main(argv):
    """The command line: count presets, sample from a model, talk to it or export it. Errors: SystemExit, in
    one line."""
    # Options
    parser = argparse.ArgumentParser(description="Count every preset, or sample from a trained run.")
    parser.add_argument("--sample", metavar="RUN", help="folder of a run, or a Hugging Face folder")
    parser.add_argument("--chat", metavar="RUN", help="the same folders: a conversation in the terminal")
    parser.add_argument("--system", default="", help="--chat: the message before the conversation")
    parser.add_argument("--average", type=int, default=1, metavar="N",
                        help="the mean of its newest N checkpoints")
    parser.add_argument("--export", metavar="FOLDER",
                        help="write --sample's model there in the Hugging Face layout")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.sample is None and (args.export or args.prompt):
        parser.error("--export and --prompt need --sample")
    if args.system and args.chat is None or args.chat is not None and args.sample is not None:
        parser.error("--system needs --chat, and --chat goes without --sample")

    # A terminal that lacks some characters gets replacements, and so does what is typed there
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    # Run
    try:
        if args.chat is not None:
            return chat(args)
        return count_presets() if args.sample is None else sample(args)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise SystemExit(f"model.py: {lines[0]}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
