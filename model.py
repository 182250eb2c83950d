"""The decoder, every variant of it in one file. What is not a vanilla Transformer:

  Motif-2.6B   differential attention (two softmax maps, one subtracted) · gated PolyNorm · tied embedding
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
from dataclasses import dataclass
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
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
            if type(value) is float and not 0 < value < math.inf:
                raise ValueError(f"model.{name}={value}: must be positive")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"model.n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.differential and (self.n_head % 2 or self.n_kv_head % 2):
            raise ValueError(f"differential attention pairs heads: n_head={self.n_head} and "
                             f"n_kv_head={self.n_kv_head} must be even")
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(f"model.d_head={self.d_head}: rotary positions need an even width")


ACTIVATIONS = dict(polynorm=None, silu=F.silu, gelu=F.gelu, relu2=lambda x: F.relu(x).square())

PRESETS = {
    "laptop": ModelConfig(init_std=0.1),                                         # Motif's block, small    [ours]
    "gpt2": ModelConfig(differential=False, act="gelu", gated=False, norm="layer", norm_eps=1e-5, position="learned",
                        d_ff=512, zero_out=False),                        # the control   [GPT-2, without biases]
    "shakespeare": ModelConfig(d_ff=256, context=64, vocab_size=261, init_std=0.1),   # bytes, five specials  [ours]
    "motif-2.6b": ModelConfig(n_layer=32, n_head=16, n_kv_head=16, d_model=2048, d_head=128, d_ff=8192,
                              vocab_size=219_520, context=4096),                 # [Motif Table 1; theta by §3.2.2]
}


# ---- the operations a model is handed -----------------------------------------------------------------------------

def linear(name, weights, pre, *x):
    """h = pre(*x), once; (h·wᵀ for w in weights).  `name` says which matmul this is.

    h belongs to the matmul: whoever replaces this function may recompute it, store it smaller or elsewhere."""
    h = pre(*x)
    return tuple(F.linear(h, w.to(h.dtype)) for w in weights)


def local_exchange(tokens, counts):
    """Carry tokens to their experts: on one device they are there already."""
    return tokens, counts


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
    pair = torch.arange(0, config.d_head, 2, device=device, dtype=torch.float64)                 # 2i
    angle = position[:, None] * config.rope_theta ** -(pair / config.d_head)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) → (a·cos − b·sin, b·cos + a·sin) for the pairs (x_i, x_i+d/2) of x (B, H, T, d)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def matrix(rows, columns):
    return nn.Parameter(torch.empty(rows, columns))


class Attention(nn.Module):
    """Multi-head or grouped attention, plain or differential. It knows its own heads: `max_logits`, `qk_heads`."""

    def __init__(self, config, layer, ops):
        super().__init__()
        self.config, self.layer, self.ops = config, layer, ops
        H, Hk, d, C = config.n_head, config.n_kv_head, config.d_head, config.d_model
        self.norm = make_norm(config)
        self.wq, self.wk, self.wv, self.wo = matrix(H * d, C), matrix(Hk * d, C), matrix(Hk * d, C), matrix(C, H * d)
        if config.differential:
            self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)     # layer from 0 here, l = layer + 1 in the paper
            self.lq1, self.lk1, self.lq2, self.lk2 = (nn.Parameter(torch.empty(d)) for _ in range(4))
            self.head_norm = RMSNorm(2 * d, eps=1e-5)              # one vector for all heads    [Motif config]
        # Recorded in training forwards, over micro-batches, until `clear_logits`. With a threshold `tau`, a head that
        # provably stays below it may record an upper bound (≤ tau) in place of its largest logit: then not exact.
        self.register_buffer("max_logits", torch.full((H,), -torch.inf), persistent=False)                        # (H,)
        self.max_logits_exact, self.tau = True, None

    def clear_logits(self, tau=None):
        self.max_logits.fill_(-torch.inf)
        self.max_logits_exact, self.tau = True, tau

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
            keys = kernels.spread(k.detach(), self.config.n_head, 2 if self.config.differential else 1)
            largest, exact = kernels.max_logits(q.detach(), keys, mask, self.tau)
            self.max_logits.copy_(torch.maximum(self.max_logits, largest))
            self.max_logits_exact &= exact
        if self.config.differential:
            y = kernels.diff_attention(q, k, v, self.lam().to(q.dtype), mask)
        else:
            y = kernels.attention(q, k, v, mask)
        return self.ops.linear("out", (self.wo,), self.join, y)[0]


class FeedForward(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) where not gated."""

    def __init__(self, config, ops):
        super().__init__()
        self.ops, self.gated = ops, config.gated
        self.norm = make_norm(config)
        self.act = PolyNorm(config.compile_act) if config.act == "polynorm" else ACTIVATIONS[config.act]
        if config.gated:
            self.gate = matrix(config.d_ff, config.d_model)
        self.up, self.down = matrix(config.d_ff, config.d_model), matrix(config.d_model, config.d_ff)

    def forward(self, x):
        if not self.gated:
            h = self.ops.linear("up", (self.up,), self.norm, x)
            return self.ops.linear("down", (self.down,), self.act, *h)[0]
        gate, up = self.ops.linear("up", (self.gate, self.up), self.norm, x)
        return self.ops.linear("down", (self.down,), lambda gate, up: self.act(gate) * up, gate, up)[0]


class Layer(nn.Module):
    def __init__(self, config, layer, ops):
        super().__init__()
        self.attention, self.ffn = Attention(config, layer, ops), FeedForward(config, ops)

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
        return {name: m for name, m in self.named_modules() if isinstance(m, Attention)}

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
        return kernels.cross_entropy(x.flatten(0, 1), head, targets.flatten(), self.config.loss_chunk)


# ---- counting -----------------------------------------------------------------------------------------------------

def count_parameters(config):
    """Parameters, counted on a model without storage: total; embedding (head and positions too); matmul (those that a
    token is multiplied with: every matrix but the look-up tables, the head once)."""
    with torch.device("meta"):
        named = dict(Transformer(config).named_parameters())
    outside = sum(p.numel() for name, p in named.items() if name in ("embed", "head", "position"))
    hidden = sum(p.numel() for name, p in named.items() if p.ndim > 1) - outside
    return dict(total=sum(p.numel() for p in named.values()), embedding=outside,
                matmul=hidden + config.vocab_size * config.d_model)


def flops_per_token(config, context=None, training=True):
    """FLOPs of one token: 2 per multiply-add of every matmul, and 3 times the forward's when training.

    Attention is counted against the full context, as PaLM does (a causal kernel needs half). Differential attention
    multiplies each of its maps with values twice as wide."""
    width = config.d_head * (3 if config.differential else 2)                            # of q·k, and of what follows
    attention = config.n_layer * (context or config.context) * config.n_head * width
    return (6 if training else 2) * (count_parameters(config)["matmul"] + attention)


def cache_per_token(config):
    """Numbers that the KV cache keeps for one token."""
    return 2 * config.n_layer * config.n_kv_head * config.d_head


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
    print(f"{'preset':<14}{'parameters':>15}{'embedding':>14}{'context':>9}{'training FLOPs/token':>22}{'at 4k':>10}"
          f"{'KV cache, numbers/token':>25}")
    for name, config in PRESETS.items():
        counts = count_parameters(config)
        print(f"{name:<14}{counts['total']:>15,}{counts['embedding']:>14,}{config.context:>9,}"
              f"{flops_per_token(config):>22.3e}{flops_per_token(config, 4096):>10.2e}{cache_per_token(config):>25,}")


if __name__ == "__main__":
    main(sys.argv[1:])
