"""Operations that have a fast path: the definition, then the closed form or kernel tested against it.

  rms_norm         x / √(mean x²), with gains
  poly_norm        Motif's activation: a cubic of its input, each power normalised  [Motif §2.1, PolyCom]
  symmetric_product, symmetric_square   x·xᵀ and alpha·a + beta·a·a, by half the operations   [Muon]
  grouped_linear   the experts' matmul: rows sorted by expert, each times its expert's matrix
  attention        softmax(q·kᵀ) v, causal, grouped keys; and its differential forms [2410.05258 eq. 1-3]
  flash_forward    attention on a GPU, and every head's largest logit with it       [FlashAttention 2]
  max_logits       largest q·k·scale of every head, without a T×T matrix             [Kimi K2 §2.1]
  cross_entropy    loss and gradient in chunks of tokens: only one chunk's logits exist at a time
  fp8_pack         storage in one byte an element, with a scale for every 128       [Kimi K2 §2.4.3]

Shapes:  B batch  T time  S keys  H heads  d head width  D features  N tokens  V vocabulary
`*_ref` is the definition: short, slow, the oracle of test_all.py. `launch_*` calls a Triton kernel, for GPUs.
`python kernels.py` compares every operation with its definition, and on a GPU measures its speed.
"""
from __future__ import annotations    # without triton, nothing looks up what tl.constexpr is

import functools
import math
import os
import shutil
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:                   # on a Mac: everything runs, by torch's operations
    triton = None

OFF = "off"                      # as `tau`: attention does not compute its largest logits


def jit(kernel):
    """triton.jit; without triton the kernel stays a function that nobody calls."""
    return triton.jit(kernel) if triton else kernel


def takes_kernels(x):
    """Whether Triton's kernels do the work on x: on a GPU, and on the meta device, which stands for one."""
    if x.dtype == torch.float64:
        return False
    return x.is_meta or x.is_cuda and triton is not None


def fits_descriptors(*tensors):
    """Whether descriptors, by which kernels load tiles, take their memory, in the dtype of the first: numbers
    begin, and so does every row, at a multiple of 16 bytes. On the meta device there is no memory."""
    size = tensors[0].element_size()
    if any(x.is_meta for x in tensors):
        return False
    return all(x.numel() and x.data_ptr() % 16 == 0 and x.shape[-1] * size % 16 == 0 for x in tensors)


def copies_tiles(device):
    """Whether the GPU has an engine that copies whole tiles to shared memory: NVIDIA's, from the H100 on."""
    return (device.type == "cuda" and not torch.version.hip
            and torch.cuda.get_device_capability(device)[0] >= 9)


def tiled(x, tile):
    """The argument of a kernel that loads x by tiles. Where an engine copies them, it is x's descriptor.
    Elsewhere Triton turns descriptors into pointers, and has to see in the kernel that rows are aligned:
    there it is x itself, of which `described` makes the descriptor."""
    return TensorDescriptor.from_tensor(x, tile) if copies_tiles(x.device) else x


@jit
def described(x, shape, strides, tile):
    """The descriptor of x, an argument by `tiled`. What it loads from outside the shape is zero."""
    if isinstance(x, tl.tensor_descriptor):
        descriptor = x
    else:
        descriptor = tl.make_tensor_descriptor(x, shape, strides, tile)
    return descriptor


def stages_of(stages):
    """The stages of a matmul's pipeline; AMD's GPUs have shared memory for two."""
    return 2 if torch.version.hip else stages


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
        ctx.save_for_backward(x, w, r)
        return x * r * w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        n = x * r
        gw = g * w
        c = (torch.linalg.vecdot(gw, n) / n.shape[-1]).unsqueeze(-1)
        return gw.addcmul_(n, c, value=-1).mul_(r), (g * n).flatten(0, -2).sum(0), None


def rms_norm(x, w, eps):
    """rms_norm_ref, fast.  x (..., D), w (D,)

    On a GPU torch's fused kernel; on a CPU, where torch has none, the closed form (2 to 3× faster), which
    stands for the kernel on the meta device, since both keep x and r."""
    # Mixed dtypes (bfloat16 activations, float32 gains) go to torch, with gains cast to the dtype of x
    if x.is_cuda or x.dtype != w.dtype and not x.is_meta:
        return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), eps)
    return RMSNormFunction.apply(x, w.to(x.dtype), eps)


# ---- PolyNorm -----------------------------------------------------------------------------------------

def poly_norm_ref(x, w, b, eps=1e-6, gate=None):
    """y = b + Σ_p w[3-p]·N(x^p), p = 1..3,  N(z) = z / √(mean z² + eps); times the gate.   [Motif §2.1]

    x, gate (..., D); w (3,), where w[0] belongs to x³ as in the released weights; b (1,).

    Operation by operation, a GPU reads or writes 40 values for each element of x. In one pass over memory it
    is 3: x and gate in, y out; backward 5: x, gate and ∂L/∂y in, two gradients out. Some 20 FLOPs an element
    forward and 40 backward are nothing beside that."""
    def norm(z):
        return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)

    y = b + sum(w[3 - p] * norm(x.pow(p)) for p in (1, 2, 3))
    return y if gate is None else y * gate


class PolyNormFunction(torch.autograd.Function):
    """The closed form: saves x and w, and recomputes the three r_p in the backward. w_p is w[3-p].

        r_p = (mean x^2p + eps)^-½,  n_p = r_p·x^p,  g = ∂L/∂y,  c_p = mean(g·n_p)
        ∂L/∂x = Σ_p w_p·r_p·p·x^(p-1)·(g − n_p·c_p);   ∂L/∂w_p = Σ g·n_p;   ∂L/∂b = Σ g

    since n = r·z moves by dn = r·(dz − n·mean(n·dz)), so that Σ g·dn = r·Σ (g − n·c)·dz with c = mean(g·n);
    and dz = p·x^(p-1)·dx for z = x^p.
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


# The same as a kernel, with the gate u: y = P(x)·u, where P(x) = b + Σ_p a_p·x^p and a_p = w_p·r_p. From
# g = ∂L/∂y follow ∂L/∂u = g·P(x), for which P(x) is recomputed rather than saved, and h = ∂L/∂P = g·u. From
# there on it is the closed form above, with h in place of g and s_p = Σ h·n_p = D·c_p.
#
# A kernel is the code of one program; here a program does one row, and many of them run at once. It goes
# over the row twice, BLOCK columns at a time: once for sums, once for results. Memory is read once all the
# same: the second time, the row (in the backward those of x, u and g) still lies in the cache, which is told
# to keep it until then, and no longer. Kept in registers, it would leave too few for other programs, which
# compute while this one waits for memory.
#
# Tensors arrive as addresses, which count elements. `column` is a vector, and so is all that is made from
# it: an operation acts on BLOCK columns at once. tl.load(addresses, mask, 0.0) gives zeros where the mask
# is False, past the end of the row: these add nothing to a sum, and are never stored. What is a
# tl.constexpr, and whether there is a gate, is decided when the kernel is compiled.
#
# Each program writes its share of ∂L/∂w and ∂L/∂b to a row of its own, and torch adds the rows, always in
# the same order, as tl.sum does within a program. If programs added to one number, the order would change
# from run to run, and with it the result.

@jit
def poly_norm_forward_kernel(x_ptr, u_ptr, w_ptr, b_ptr, y_ptr, r_ptr, D, eps, BLOCK: tl.constexpr):
    """y (N, D) and r (N, 3) from x and u (N, D), w (3,), b (1,). u_ptr is None if there is no gate."""
    # Where this program's row begins; in 64 bits, since N·D may exceed 2³¹
    row = tl.program_id(0).to(tl.int64)
    begin = row * D
    column = tl.arange(0, BLOCK)

    # First time over the row: Σ x^2p. sum1[j] adds columns j, j + BLOCK, ...; tl.sum adds up the rest
    sum1 = tl.zeros((BLOCK,), tl.float32)
    sum2 = tl.zeros((BLOCK,), tl.float32)
    sum3 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + column < D
        x = tl.load(x_ptr + begin + start + column, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
        x2 = x * x
        sum1 += x2
        sum2 += x2 * x2
        sum3 += x2 * x2 * x2

    # r_p = (mean x^2p + eps)^-½, kept for the backward
    r1 = tl.rsqrt(tl.sum(sum1) / D + eps)
    r2 = tl.rsqrt(tl.sum(sum2) / D + eps)
    r3 = tl.rsqrt(tl.sum(sum3) / D + eps)
    tl.store(r_ptr + 3 * row, r1)
    tl.store(r_ptr + 3 * row + 1, r2)
    tl.store(r_ptr + 3 * row + 2, r3)

    # Second time: b + Σ_p a_p·x^p by Horner's rule, times the gate; storing rounds to the dtype of y
    a1 = tl.load(w_ptr + 2).to(tl.float32) * r1
    a2 = tl.load(w_ptr + 1).to(tl.float32) * r2
    a3 = tl.load(w_ptr).to(tl.float32) * r3
    b = tl.load(b_ptr).to(tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + column < D
        at = begin + start + column
        x = tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        y = ((a3 * x + a2) * x + a1) * x + b
        if u_ptr is not None:
            y *= tl.load(u_ptr + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(y_ptr + at, y, inside)


@jit
def poly_norm_backward_kernel(g_ptr, x_ptr, u_ptr, w_ptr, b_ptr, r_ptr, dx_ptr, du_ptr, sums_ptr, D,
                              BLOCK: tl.constexpr):
    """dx and du (N, D) from g = ∂L/∂y, and sums (N, 4), the share of each row in ∂L/∂w and ∂L/∂b."""
    row = tl.program_id(0).to(tl.int64)
    begin = row * D
    column = tl.arange(0, BLOCK)

    # First time over the row: Σ h·x^p, p = 0..3
    sum0 = tl.zeros((BLOCK,), tl.float32)
    sum1 = tl.zeros((BLOCK,), tl.float32)
    sum2 = tl.zeros((BLOCK,), tl.float32)
    sum3 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + column < D
        at = begin + start + column
        x = tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
        h = tl.load(g_ptr + at, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
        if u_ptr is not None:
            h *= tl.load(u_ptr + at, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
        sum0 += h
        sum1 += h * x
        sum2 += h * x * x
        sum3 += h * x * x * x

    # s_p = Σ h·n_p, this row's share of ∂L/∂w in the order of w, then that of ∂L/∂b
    r1 = tl.load(r_ptr + 3 * row)
    r2 = tl.load(r_ptr + 3 * row + 1)
    r3 = tl.load(r_ptr + 3 * row + 2)
    s1 = tl.sum(sum1) * r1
    s2 = tl.sum(sum2) * r2
    s3 = tl.sum(sum3) * r3
    tl.store(sums_ptr + 4 * row, s3)
    tl.store(sums_ptr + 4 * row + 1, s2)
    tl.store(sums_ptr + 4 * row + 2, s1)
    tl.store(sums_ptr + 4 * row + 3, tl.sum(sum0))

    # a_p, the coefficients of P(x), and t_p = p·a_p·r_p·c_p with c_p = s_p/D
    a1 = tl.load(w_ptr + 2).to(tl.float32) * r1
    a2 = tl.load(w_ptr + 1).to(tl.float32) * r2
    a3 = tl.load(w_ptr).to(tl.float32) * r3
    b = tl.load(b_ptr).to(tl.float32)
    t1 = a1 * r1 * s1 / D
    t2 = 2 * a2 * r2 * s2 / D
    t3 = 3 * a3 * r3 * s3 / D

    # Second time: ∂L/∂u = g·P(x), and ∂L/∂x = h·P'(x) − Σ_p t_p·x^(2p-1): the slope of P with the r_p held
    # fixed, and what the r_p's own dependence on x takes back
    for start in range(0, D, BLOCK):
        inside = start + column < D
        at = begin + start + column
        x = tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        h = tl.load(g_ptr + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        if u_ptr is not None:
            poly = ((a3 * x + a2) * x + a1) * x + b
            tl.store(du_ptr + at, h * poly, inside)                # h is g still
            h *= tl.load(u_ptr + at, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
        x2 = x * x
        slope = (3 * a3 * x + 2 * a2) * x + a1
        back = ((t3 * x2 + t2) * x2 + t1) * x
        tl.store(dx_ptr + at, h * slope - back, inside)


def poly_norm_block(D):
    """The columns that a program takes at a time, and its warps (groups of 32 threads): 8 columns a thread,
    or 16 bytes of bfloat16. tl.arange needs a power of two."""
    block = min(triton.next_power_of_2(D), 2048)
    return dict(BLOCK=block, num_warps=max(block // 256, 1))


def launch_poly_norm(x, gate, w, b, eps):
    """x and gate (..., D), the gate may be None → y (..., D), and r (N, 3) for the backward.

    kernel[N,](...) runs N programs. Tensors on the meta device have no numbers: nothing runs."""
    D = x.shape[-1]
    N = x.numel() // D
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r = x.new_empty(N, 3, dtype=torch.float32)
    u = None if gate is None else gate.contiguous()
    if not x.is_meta:
        poly_norm_forward_kernel[N,](x.contiguous(), u, w, b, y, r, D, eps,
                                     **poly_norm_block(D), enable_fp_fusion=True)
    return y, r


def launch_poly_norm_backward(g, x, gate, w, b, r):
    """∂L/∂y, the forward's x, gate, w and b, and its r → dx, dgate (or None), dw (3,), db (1,)."""
    D = x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = r.new_empty(len(r), 4)
    u = du = None
    if gate is not None:
        u = gate.contiguous()
        du = torch.empty_like(u)
    if not x.is_meta:
        poly_norm_backward_kernel[len(r),](g.contiguous(), x.contiguous(), u, w, b, r, dx, du, sums, D,
                                           **poly_norm_block(D), enable_fp_fusion=True)
    dw, db = sums.sum(0).split((3, 1))
    return dx, du, dw.to(w.dtype), db.to(b.dtype)


class PolyNormKernel(torch.autograd.Function):
    """Saves x, the gate, w, b and three numbers a row."""

    @staticmethod
    def forward(ctx, x, w, b, eps, gate):
        if gate is not None and gate.shape != x.shape:
            raise ValueError(f"poly_norm: a gate of shape {tuple(gate.shape)} for x of {tuple(x.shape)}")
        w, b = w.contiguous(), b.contiguous()
        y, r = launch_poly_norm(x, gate, w, b, eps)
        ctx.save_for_backward(x, gate, w, b, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dgate, dw, db = launch_poly_norm_backward(g, *ctx.saved_tensors)
        return dx, dw, db, None, dgate


@functools.cache
def compiled_poly_norm():
    """poly_norm_ref under torch.compile: one pass forward, one backward.

    None, after printing one line, where there is no C++ compiler."""
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++", "c++"
    if any(shutil.which(compiler) for compiler in compilers):
        return torch.compile(poly_norm_ref)
    print("poly_norm: no C++ compiler found; going on with the closed form, which is slower", flush=True)
    return None


def poly_norm(x, w, b, eps=1e-6, compiled=False, gate=None):
    """poly_norm_ref, fast, with statistics in float32 or wider (x⁶ overflows float16).

    x (..., D), w (3,), b (1,) → (..., D) in the dtype of x. gate: a factor of the result, of x's shape and
    dtype.

    On a GPU the kernel. On a CPU the closed form, and the gate after it: a closed form with the gate inside
    would have to recompute P(x) in its backward, and is no faster.
    compiled: on a CPU, torch.compile fuses the definition instead: half a minute to compile, then about
    3× faster."""
    if takes_kernels(x):
        return PolyNormKernel.apply(x, w, b, eps, gate)
    fused = compiled_poly_norm() if compiled else None
    if fused is not None:
        return fused(x.to(accumulation_dtype(x.dtype)), w, b, eps, gate).to(x.dtype)
    y = PolyNormFunction.apply(x, w, b, eps)
    return y if gate is None else y * gate


# ---- symmetric products -------------------------------------------------------------------------------

def symmetric_product_ref(x):
    """x·xᵀ  (..., m, n) → (..., m, m)

    2m²n operations on mn numbers read and m² written. Only m(m+1)/2 of the results differ: m²n operations
    would do. Muon alone uses it, and its update is not differentiated: there is no backward."""
    return x @ x.mT


def symmetric_square_ref(a, alpha, beta):
    """alpha·a + beta·a·a of symmetric a (..., m, m). Since a = aᵀ, the product is a·aᵀ."""
    return alpha * a + beta * (a @ a)


@jit
def block_of(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program among rows × columns blocks, which are walked through in bands of GROUP
    rows, each band column by column.

    So programs that run at the same time read few rows and columns between them: the L2 cache keeps these.

    rows = 4, columns = 3, GROUP = 2      0  2  4
                                          1  3  5
                                          6  8 10
                                          7  9 11"""
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@jit
def symmetric_kernel(rows, x, c, B, m, n, ratio, beta, SQUARE: tl.constexpr,
                     BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr):
    """c = beta·x·xᵀ, or beta·(x·xᵀ + ratio·x) if SQUARE (then n = m, x = xᵀ): one block on or below the
    diagonal per program, which is stored a second time where its transpose belongs.

    x (B, m, n), c (B, m, m); rows: x again, as (B·m, n), by tiles. Of these, rows of the next matrix only
    reach results that are not stored."""
    # Matrix and block. Above the diagonal there is nothing to do.
    blocks = tl.cdiv(m, BLOCK)
    matrix = tl.program_id(0) // (blocks * blocks)
    row, column = block_of(tl.program_id(0) % (blocks * blocks), blocks, blocks, GROUP)
    if column > row:
        return
    top = matrix * m
    row *= BLOCK
    column *= BLOCK

    # What may exceed 2³¹ is added to the pointers in 64 bits
    x += matrix.to(tl.int64) * m * n
    c += matrix.to(tl.int64) * m * m
    i = tl.arange(0, BLOCK)[:, None]                                               # (BLOCK, 1)
    j = tl.arange(0, BLOCK)[None, :]                                               # (1, BLOCK)
    inside = (i < m - row) & (j < m - column)

    # Sum over n, STEP columns of x at a time. To begin with the matrix itself takes the fewest registers.
    if SQUARE:
        old = tl.load(x + row.to(tl.int64) * m + column + i * m + j, mask=inside, other=0.0)
        sums = ratio * old.to(tl.float32)
    else:
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    rows = described(rows, [B * m, n], [n, 1], [BLOCK, STEP])
    for start in range(0, n, STEP):
        a = rows.load([top + row, start])                                          # (BLOCK, STEP)
        b = rows.load([top + column, start])
        sums = tl.dot(a, b.T, sums, input_precision="ieee")

    # In blocks on the diagonal, (i, j) and (j, i) may be rounded differently: what is below it counts
    block = (beta * sums).to(c.dtype.element_ty)
    if row == column:
        block = tl.where(i >= j, block, tl.trans(block))

    # The block, and its mirror image
    tl.store(c + row.to(tl.int64) * m + column + i * m + j, block, mask=inside)
    tl.store(c + column.to(tl.int64) * m + row + j * m + i, block, mask=inside)


# By bytes of a number: BLOCK, STEP, warps, stages of the pipeline
SYMMETRIC_TILES = {2: (128, 64, 4, 3), 4: (64, 32, 8, 2)}


def launch_symmetric(x, alpha=0.0, beta=1.0, square=False):
    """The kernel for x (..., m, n), or (..., m, m) if square → (..., m, m), exactly symmetric. beta ≠ 0."""
    x = x.contiguous()
    m, n = x.shape[-2:]
    B = x.shape[:-2].numel()
    block, step, warps, stages = SYMMETRIC_TILES[x.element_size()]
    rows = tiled(x.view(B * m, n), [block, step])
    c = x.new_empty(*x.shape[:-1], m)
    symmetric_kernel[(B * triton.cdiv(m, block) ** 2,)](
        rows, x, c, B, m, n, alpha / beta, float(beta), square, block, step, 8,
        num_warps=warps, num_stages=stages_of(stages), enable_fp_fusion=True)
    return c


def takes_symmetric(x):
    """Whether the kernel is to compute x·xᵀ: where it has blocks enough for all of a GPU, twice or more.

    Its speed over cuBLAS's on an H200, in bfloat16: 1.54 for (4096, 4096) with 528 blocks, 1.18 for
    (4, 2048, 2048) with 544, 1.51 for (16, 2048, 2048); but 1.06 for (3072, 3072) with 300, and 0.52 for
    (2048, 2048) with 136."""
    blocks = -(-x.shape[-2] // 128)
    many = x.shape[:-2].numel() * blocks * (blocks + 1) // 2 >= 500
    return takes_kernels(x) and many and fits_descriptors(x)


def symmetric_product(x):
    """symmetric_product_ref; of large x on a GPU by half the operations.  x (..., m, n) → (..., m, m)"""
    if takes_symmetric(x):
        return launch_symmetric(x)
    return symmetric_product_ref(x)


def symmetric_square(a, alpha, beta):
    """symmetric_square_ref, rounded once; of large a on a GPU by half the operations.

    a (..., m, m), symmetric → (..., m, m)"""
    if takes_symmetric(a):
        return launch_symmetric(a, alpha, beta, square=True)
    stack = a.reshape(-1, *a.shape[-2:])
    return torch.baddbmm(stack, stack, stack, beta=alpha, alpha=beta).view_as(a)


# ---- the experts' matmul ------------------------------------------------------------------------------

def grouped_linear_ref(x, w, ends):
    """Rows ends[e-1]:ends[e] of x times w[e]ᵀ, for every expert e.

    x (M, D), sorted by expert; w (E, O, D); ends (E,) int64, the last of them M. → (M, O)
    2·M·D·O operations; M·D + E·D·O numbers read, M·O written."""
    rows = x.tensor_split(ends[:-1].cpu())
    return torch.cat([some @ matrix.mT for some, matrix in zip(rows, w)])


# y = x·w[e]ᵀ for the rows of expert e. With g = ∂L/∂y, for y_mo = Σ_d x_md·w_eod:
#     ∂L/∂x_md = Σ_o g_mo·w_eod               g·w[e], the same product with w read the other way
#     ∂L/∂w_eod = Σ_m g_mo·x_md               gᵀ·x over the rows m of expert e; zero if it has none
# A kernel's grid is fixed before the device knows where experts end. With BLOCK rows a block, expert e with
# rows a to b gets the slots from a // BLOCK + e up to those of the next, which begin at b // BLOCK + e + 1.
# These are b // BLOCK − a // BLOCK + 1 slots, never fewer than the ⌈(b − a) / BLOCK⌉ blocks that e needs, and
# M // BLOCK + E in all. At most one slot of each expert is left over; it returns at once.

@jit
def rows_of(ends, e):
    """The first row of expert e, and the row after its last."""
    return tl.load(ends + e - 1, mask=e > 0, other=0), tl.load(ends + e)


@jit
def expert_of(ends, slot, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The expert of a slot: the last one whose slots begin there or before. EXPERTS: a power of two ≥ E."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0) // BLOCK + e
    return tl.sum(((begin <= slot) & (e < E)).to(tl.int32)) - 1


@jit
def tile_of(w, e, row, column):
    """A tile of w[e], by a descriptor of all of w or of w[e] alone."""
    if len(w.block_shape) == 3:
        tile = w.load([e, row, column]).reshape(w.block_shape[1], w.block_shape[2])
    else:
        tile = w.load([row, column])
    return tile


@jit
def grouped_kernel(x, w, y, ends, M, E, n, width, INNER: tl.constexpr, EXPERTS: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr):
    """y = x·w[e]ᵀ over each expert's rows, or x·w[e] where INNER, the dimension of w that is summed over, is
    1 and not 2; one block of y per program.

    x (M, n) and w (E, O, D) by tiles, y (M, width). Tiles are zero beyond n; rows of the next expert, and
    what lies beyond the width, only reach results that are not stored."""
    # The block's expert and rows; slots left over return
    slots = M // BLOCK_M + E
    slot, column = block_of(tl.program_id(0), slots, tl.cdiv(width, BLOCK_N), GROUP)
    e = expert_of(ends, slot, E, EXPERTS, BLOCK_M)
    first, last = rows_of(ends, e)
    first += (slot - (first // BLOCK_M + e)) * BLOCK_M
    if first >= last:
        return
    row = first.to(tl.int32)
    column *= BLOCK_N

    # Sum over n, STEP at a time
    x = described(x, [M, n], [n, 1], [BLOCK_M, STEP])
    if not isinstance(w, tl.tensor_descriptor):
        w += e.to(tl.int64) * n * width
    if INNER == 2:
        w = described(w, [width, n], [n, 1], [BLOCK_N, STEP])
    else:
        w = described(w, [n, width], [width, 1], [STEP, BLOCK_N])
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, STEP):
        a = x.load([row, start])                                                   # (BLOCK_M, STEP)
        if INNER == 2:
            b = tile_of(w, e, column, start).T                                     # (STEP, BLOCK_N)
        else:
            b = tile_of(w, e, start, column)
        sums = tl.dot(a, b, sums, input_precision="ieee")

    # What may exceed 2³¹ is added to the pointer in 64 bits
    i = tl.arange(0, BLOCK_M)[:, None]                                             # (BLOCK_M, 1)
    j = tl.arange(0, BLOCK_N)[None, :]                                             # (1, BLOCK_N)
    inside = (i < (last - first).to(tl.int32)) & (j < width - column)
    tl.store(y + first * width + column + i * width + j, sums.to(y.dtype.element_ty), mask=inside)


@jit
def grouped_weight_kernel(g, x, dw, ends, M, O, D, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
                          STEP: tl.constexpr, GROUP: tl.constexpr):
    """dw[e] = gᵀ·x over the rows of expert e; one block of one expert per program.

    g (M, O) and x (M, D) by tiles, dw (E, O, D). One program sums all rows of its block: the same bits every
    time."""
    # Expert and block
    rows, columns = tl.cdiv(O, BLOCK_O), tl.cdiv(D, BLOCK_D)
    e = tl.program_id(0) // (rows * columns)
    row, column = block_of(tl.program_id(0) % (rows * columns), rows, columns, GROUP)
    row *= BLOCK_O
    column *= BLOCK_D

    # Sum over the expert's rows, STEP at a time
    first, last = rows_of(ends, e)
    first, last = first.to(tl.int32), last.to(tl.int32)
    rest = last - (last - first) % STEP
    g = described(g, [M, O], [O, 1], [STEP, BLOCK_O])
    x = described(x, [M, D], [D, 1], [STEP, BLOCK_D])
    sums = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    for start in range(first, rest, STEP):
        a = g.load([start, row])                                                   # (STEP, BLOCK_O)
        b = x.load([start, column])                                                # (STEP, BLOCK_D)
        sums = tl.dot(a.T, b, sums, input_precision="ieee")

    # The rest, without rows of the next expert
    if rest < last:
        mine = (tl.arange(0, STEP) < last - rest)[:, None]                         # (STEP, 1)
        a = tl.where(mine, g.load([rest, row]), 0.0)
        b = tl.where(mine, x.load([rest, column]), 0.0)
        sums = tl.dot(a.T, b, sums, input_precision="ieee")
    o = row + tl.arange(0, BLOCK_O)[:, None]                                       # (BLOCK_O, 1)
    d = column + tl.arange(0, BLOCK_D)[None, :]                                    # (1, BLOCK_D)
    inside = (o < O) & (d < D)
    tl.store(dw + (e.to(tl.int64) * O + o) * D + d, sums.to(dw.dtype.element_ty), mask=inside)


# By bytes of a number: rows and columns of a block, STEP, warps, stages of the pipeline. Large, as is fastest
# on an H200; small; and large for GPUs without an engine that copies tiles, where it spills no registers
GROUPED_TILES = {2: ((256, 128, 64, 8, 3), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3)),
                 4: ((64, 64, 32, 8, 2),) * 3}


def grouped_tiles(x, E, rows, columns):
    """Tiles for E results of rows × columns numbers, in the dtype of x: small ones where large ones would be
    half empty, or too few for a GPU of 132 multiprocessors."""
    large, small, without_engine = GROUPED_TILES[x.element_size()]
    blocks = E * -(-rows // 256) * -(-columns // 128)
    if rows <= 64 or columns <= 128 or blocks < 132:
        return small
    return large if copies_tiles(x.device) else without_engine


def launch_grouped(x, w, ends, inner):
    """The kernel for x (M, n) times w (E, O, D), summed over dimension `inner` of w: 2 is D, 1 is O."""
    x, w = x.contiguous(), w.to(x.dtype).contiguous()
    M, n = x.shape
    E, width = len(w), w.shape[3 - inner]
    block_m, block_n, step, warps, stages = grouped_tiles(x, E, M // E, width)
    tile = [1, block_n, step] if inner == 2 else [1, step, block_n]
    slots = M // block_m + E
    y = x.new_empty(M, width)
    grouped_kernel[(slots * triton.cdiv(width, block_n),)](
        tiled(x, [block_m, step]), tiled(w, tile), y, ends, M, E, n, width, inner,
        triton.next_power_of_2(E), block_m, block_n, step, 8,
        num_warps=warps, num_stages=stages_of(stages), enable_fp_fusion=True)
    return y


def grouped_forward(x, w, ends):
    """y (M, O) of grouped_linear_ref, by the kernel."""
    return launch_grouped(x, w, ends, inner=2)


def grouped_by_input(g, w, ends):
    """∂L/∂x (M, D) from g = ∂L/∂y (M, O), by the kernel."""
    return launch_grouped(g, w, ends, inner=1)


def grouped_by_weight(g, x, w, ends):
    """∂L/∂w (E, O, D) in the dtype of w, by the kernel."""
    g, x = g.contiguous(), x.contiguous()
    E, O, D = w.shape
    block_o, block_d, step, warps, stages = grouped_tiles(g, E, O, D)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    grouped_weight_kernel[(E * triton.cdiv(O, block_o) * triton.cdiv(D, block_d),)](
        tiled(g, [step, block_o]), tiled(x, [step, block_d]), dw, ends, len(g), O, D,
        block_o, block_d, step, 8,
        num_warps=warps, num_stages=stages_of(stages), enable_fp_fusion=True)
    return dw


def fits_grouped_mm(x, w, ends):
    """Whether torch's grouped_mm takes them on a CPU: not in float64, and rows must fill units of 16 bytes.

    A layer of 16 experts of width 128 takes 1.62× a dense one's time with it, 1.75× with a loop of mm. Where
    memory is only predicted, `ends` is no tensor (train.activations)."""
    sizes = w.shape[1] * x.element_size(), w.shape[2] * x.element_size()
    return (x.device.type == "cpu" and x.dtype != torch.float64 and isinstance(ends, torch.Tensor)
            and len(x) > 0 and all(size % 16 == 0 for size in sizes))


class GroupedLinear(torch.autograd.Function):
    """grouped_linear_ref with the closed form of its gradients: by the kernels where they run and rows fit,
    on a CPU by torch's grouped_mm, otherwise by a matmul for each expert, into its slice of the result."""

    @staticmethod
    def forward(ctx, x, w, ends):
        ctx.save_for_backward(x, w)
        ctx.ends = ends
        if takes_kernels(x) and fits_descriptors(x, w):
            return grouped_forward(x, w, ends)
        return GroupedLinear.by_expert(x, w.mT, ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return GroupedLinear.by_input(g, w, ctx.ends), GroupedLinear.by_weight(g, x, w, ctx.ends), None

    @staticmethod
    def by_input(g, w, ends):
        """∂L/∂x (M, D), from g = ∂L/∂y (M, O)."""
        if takes_kernels(g) and fits_descriptors(g, w):
            return grouped_by_input(g, w, ends)
        return GroupedLinear.by_expert(g, w, ends)

    @staticmethod
    def by_weight(g, x, w, ends):
        """∂L/∂w (E, O, D); zero for an expert with no token routed to it."""
        if takes_kernels(g) and fits_descriptors(g, x):
            return grouped_by_weight(g, x, w, ends)
        if fits_grouped_mm(g, w, ends):
            return F.grouped_mm(g.contiguous().mT, x, offs=ends.int()).to(w.dtype)
        dw = torch.zeros_like(w)
        for e, rows in GroupedLinear.spans(ends):
            dw[e] = g[rows].mT @ x[rows]
        return dw

    @staticmethod
    def by_expert(x, w, ends):
        """x (M, n) times w[e] (n, width) over the rows of each expert → (M, width), by torch."""
        if fits_grouped_mm(x, w, ends):
            return F.grouped_mm(x.contiguous(), w.to(x.dtype), offs=ends.int())
        y = x.new_empty(len(x), w.shape[2])
        for e, rows in GroupedLinear.spans(ends):
            torch.mm(x[rows], w[e].to(x.dtype), out=y[rows])
        return y

    @staticmethod
    def spans(ends):
        """[(expert, slice of its rows)], without the experts that received no rows."""
        ends = [0, *ends.tolist()]
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(ends, ends[1:])) if b > a]


def grouped_linear(x, w, ends):
    """grouped_linear_ref, fast.  x (M, D), w (E, O, D), ends (E,) → (M, O)"""
    return GroupedLinear.apply(x, w, ends)


def linears(h, weights, ends=None):
    """h·wᵀ for each w in weights, in the dtype of h; with `ends`, each w is a stack, as in grouped_linear."""
    if ends is None:
        return tuple(F.linear(h, w.to(h.dtype)) for w in weights)
    return tuple(grouped_linear(h, w, ends) for w in weights)


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


class Sight:
    """What T queries may attend to, where a square causal mask does not say it: see `sight`."""

    def __init__(self, T, S, doc_start=None, device=None):
        self.T = T
        self.S = S
        self.doc_start = doc_start         # (B, S) position at which each token's document begins, or None
        self.device = device

    @functools.cached_property
    def mask(self):
        """The same as a dense causal_mask, built for the first layer that needs it, and kept for all."""
        return causal_mask(self.T, self.S, self.doc_start, self.device)


def sight(T, S, doc_start=None, device=None):
    """The Sight of T queries over S keys, or None where plain causal attention will do.

    None means a full window (no keys from a cache: T = S) without document boundaries."""
    if T == S and doc_start is None:
        return None
    return Sight(T, S, doc_start, device)


def attention(q, k, v, sees=None, scale=None, tau=OFF):
    """attention_ref by Flash or by torch's fused kernel → (y, logits).

    q (B, H, T, d), k (B, Hk, S, d), v (B, Hk, S, dv) → y (B, H, T, dv). sees: a Sight, or None.
    logits: the result of max_logits for `tau`, or None if `tau` is OFF."""
    if is_for_flash(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        return flash(q, k, v, sees, scale, tau)
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

    On a GPU: Flash, or two calls of torch's fused kernel, which never write their maps to memory. On a CPU:
    explicit maps for one block of queries at a time, against the keys up to the end of that block. Blocks of
    128 beat every other form at 64, 256 and 1,024 tokens (two fused calls, values halved or padded to the
    width that torch's CPU kernel wants, whole maps): 1.1 to 1.5 times plain attention with as many maps."""
    # Flash: each map on its own, as in plain attention. Both maps of a head in one program would read V once,
    # but keep two sums (M, 256) in float32: at M = 128 all registers of a multiprocessor. At M = 64 they
    # would read 2·(128 + 128 + 256) numbers of each key for 128 queries, instead of 2·(128 + 256).
    if is_for_flash(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        y, logits = flash(q, k, v, sees, None, tau, maps)
        signal, noise = y.unflatten(1, (-1, maps)).split((maps - 1, 1), 2)    # (B, n, g or 1, T, dv)
        return (signal - lam * noise).flatten(1, 2), logits

    mask = None if sees is None else sees.mask
    logits = None
    if tau is not OFF:
        logits = max_logits(q.detach(), repeat_heads(k.detach(), q.shape[1], maps), mask, tau)

    # GPU: the definition over torch's fused kernel
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


# ---- attention on a GPU: tiles ------------------------------------------------------------------------
#
# attention_ref in tiles, whose scores never leave the chip. Multiply-adds for each visible pair of query and
# key: d + dv forward, 5·d + 3·dv backward, which forms the scores twice. Memory: q, k, v, y and their
# gradients, and two numbers a row; the definition moves T·S scores four times.
#
# Tensors (B, H, T, width) arrive as descriptors of their tiles, from which Hopper's copy engine loads, or as
# (pointer, strides of B, H and T, T). Queries and keys come in two parts of D1 and D2 columns, so that a
# width of 192 is 128 + 64 and not padded to 256. D2 = 0: there is one part, and the second of each pair is
# not used.

@jit
def tile_at(x, b, h, start, column: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of head h that begins at row `start`, and which of its rows exist."""
    row = tl.arange(0, ROWS)[:, None]
    tile = row * x[3] + column + tl.arange(0, COLUMNS)[None, :]
    head = x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(h, tl.int64) * x[2]   # may be over 2³¹ elements away
    return head + tl.cast(start, tl.int64) * x[3] + tile, row < x[4] - start


@jit
def load_tile(x, b, h, start, column: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """→ (ROWS, COLUMNS); rows that do not exist are 0."""
    if isinstance(x, tl.tensor_descriptor):
        tile = x.load([b, h, start, column]).reshape(ROWS, COLUMNS)
    else:
        at, exists = tile_at(x, b, h, start, column, ROWS, COLUMNS)
        tile = tl.load(at, mask=exists, other=0.0)
    return tile


@jit
def store_tile(x, tile, b, h, start, column: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    if isinstance(x, tl.tensor_descriptor):
        x.store([b, h, start, column], tile.to(x.dtype).reshape(1, 1, ROWS, COLUMNS))
    else:
        at, exists = tile_at(x, b, h, start, column, ROWS, COLUMNS)
        tl.store(at, tile.to(x[0].dtype.element_ty), mask=exists)


@jit
def load_parts(x1, x2, b, h, start, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    tile1 = load_tile(x1, b, h, start, 0, ROWS, D1)
    tile2 = tile1
    if D2 > 0:
        tile2 = load_tile(x2, b, h, start, D1, ROWS, D2)
    return tile1, tile2


@jit
def store_parts(x1, x2, tile1, tile2, b, h, start, ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    store_tile(x1, tile1, b, h, start, 0, ROWS, D1)
    if D2 > 0:
        store_tile(x2, tile2, b, h, start, D1, ROWS, D2)


@jit
def scores(a1, a2, b1, b2, D2):
    """a·bᵀ, summed over both parts."""
    s = tl.dot(a1, b1.T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(a2, b2.T, s, input_precision="ieee")
    return s


@jit
def add_product(sum1, sum2, ds, b1, b2, D2):
    """The parts of a gradient plus ds·b."""
    sum1 = tl.dot(ds, b1, sum1, input_precision="ieee")
    if D2 > 0:
        sum2 = tl.dot(ds, b2, sum2, input_precision="ieee")
    return sum1, sum2


@jit
def heads_read(h, H, Hv, MAPS: tl.constexpr):
    """The key head and the value head that query head h reads: see repeat_heads."""
    value = h // MAPS // (H // MAPS // Hv)
    key = value
    if MAPS > 1:
        key = 2 * value + h % MAPS // (MAPS - 1)
    return key, value


@jit
def visible(i, j, starts, past, DOCS: tl.constexpr):
    """Whether query i, at position past + i, sees key j."""
    seen = j <= past + i
    if DOCS:
        seen = seen & (j >= starts)
    return seen


# (M, N, warps, stages) of each kernel, for queries and values up to the widths of a row. ∂L/∂k and ∂L/∂v
# take a pass each ("keys" and "values") where registers cannot hold the sums of both ("both"). For Hopper,
# the fastest on an H200; for others, and with documents, whose masks take registers too, tiles that do not
# spill registers, by the compiler's count.
FLASH_TILES = {
    "hopper": {
        (128, 128): dict(forward=(64, 64, 4, 3), queries=(64, 64, 4, 2), both=(64, 64, 4, 2),
                         documents=dict(both=(64, 64, 4, 1))),
        (256, 128): dict(forward=(64, 64, 4, 2), queries=(128, 64, 8, 2), both=(32, 64, 4, 2)),
        (128, 256): dict(forward=(64, 64, 4, 2), queries=(128, 64, 8, 2),
                         keys=(64, 128, 8, 2), values=(64, 64, 4, 2),
                         documents=dict(keys=(32, 128, 8, 2), values=(32, 64, 4, 2))),
        (256, 256): dict(forward=(128, 32, 8, 2), queries=(64, 64, 8, 2),
                         keys=(32, 64, 4, 2), values=(64, 64, 8, 2))},
    "blackwell": {
        (128, 128): dict(forward=(64, 64, 4, 3), queries=(128, 64, 8, 2), both=(64, 64, 8, 2)),
        (256, 128): dict(forward=(128, 64, 8, 2), queries=(128, 64, 8, 2), both=(32, 64, 4, 2)),
        (128, 256): dict(forward=(128, 64, 8, 2), queries=(128, 64, 8, 2),
                         keys=(32, 128, 8, 1), values=(64, 64, 8, 2)),
        (256, 256): dict(forward=(128, 32, 8, 2), queries=(64, 64, 8, 2),
                         keys=(32, 64, 4, 2), values=(64, 64, 8, 2))},
    "cuda": {
        (128, 128): dict(forward=(128, 64, 8, 2), queries=(128, 32, 8, 2), both=(64, 64, 8, 2)),
        (256, 128): dict(forward=(128, 64, 8, 2), queries=(64, 32, 4, 2), both=(32, 32, 4, 2)),
        (128, 256): dict(forward=(64, 32, 8, 2), queries=(64, 32, 4, 2),
                         keys=(32, 64, 4, 2), values=(32, 64, 8, 2)),
        (256, 256): dict(forward=(64, 32, 8, 2), queries=(32, 32, 4, 2),
                         keys=(32, 32, 4, 2), values=(32, 64, 8, 2))},
    "hip": {
        (128, 128): dict(forward=(128, 64, 8, 2), queries=(64, 32, 4, 2), both=(32, 32, 4, 2)),
        (256, 128): dict(forward=(64, 32, 4, 2), queries=(64, 32, 4, 2), both=(16, 32, 4, 2)),
        (128, 256): dict(forward=(64, 32, 4, 2), queries=(64, 32, 4, 2),
                         keys=(16, 64, 4, 2), values=(16, 32, 4, 2)),
        (256, 256): dict(forward=(64, 32, 4, 2), queries=(32, 32, 4, 2),
                         keys=(16, 32, 4, 2), values=(16, 32, 4, 2))}}


def flash_target(device):
    """The row of FLASH_TILES for a device. H100 and B200 ("hopper", "blackwell") have an engine that copies
    tiles."""
    if torch.version.hip:
        return "hip"
    if device.type == "meta":
        return "hopper"
    if device.type == "cuda":
        return {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(device)[0], "cuda")
    return "cuda"


def power_of_two(width):
    """The smallest power of two that is at least `width`, and 16, the least that a tile may have."""
    return max(16, 2 ** math.ceil(math.log2(width)))


def flash_plan(target, d, dv, documents):
    """{kernel: (constants, launch options)} for queries of width d and values of width dv, with documents or
    without."""
    # Two parts where that is narrower than one
    D1 = power_of_two(d)
    D2 = 0
    if D1 // 2 + power_of_two(max(d - D1 // 2, 1)) < D1:
        D1 = D1 // 2
        D2 = power_of_two(d - D1)
    V = power_of_two(dv)

    rows = FLASH_TILES[target]
    tiles = next(rows[widths] for widths in rows if D1 + D2 <= widths[0] and V <= widths[1])
    with_documents = tiles.get("documents", {})
    tiles = {kernel: tile for kernel, tile in tiles.items() if kernel != "documents"}
    if documents:
        tiles |= with_documents
    plan = {}
    for kernel, (M, N, warps, stages) in tiles.items():
        constants = dict(D1=D1, D2=D2, V=V, M=M, N=N)
        if kernel in ("both", "keys", "values"):
            constants.update(FOR_K=kernel != "values", FOR_V=kernel != "keys")
        plan[kernel] = constants, dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    return plan


def readable(x, width):
    """x as a kernel can read it: padded with zeros to that width, and copied where rows are not adjacent
    numbers that begin at multiples of 16 bytes."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    unit = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(n > 0 and n % unit == 0 for n in x.stride()[:-1])
    if x.stride(-1) == 1 and aligned:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def in_tiles(target, rows, *tensors_and_columns):
    """Arguments of a kernel for tensors (B, H, T, width), in tiles of so many rows. After each tensor the
    columns of its parts; 0: a part that is not used."""
    arguments = []
    for x, *columns in tensors_and_columns:
        for width in columns:
            if target in ("hopper", "blackwell"):
                x_in = TensorDescriptor.from_tensor(x, [1, 1, rows, width or columns[0]])
            else:
                x_in = (x, *x.stride()[:3], x.shape[2])
            arguments.append(x_in)
    return arguments


# ---- attention on a GPU: forward ----------------------------------------------------------------------

@jit
def keys_of_phase(phase, i0, starts_ptr, T, S, DOCS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The keys, in tiles of N, that queries i0 … i0 + M − 1 visit in one phase: from, to.

    Phase 0: tiles in which documents begin; 1: tiles that are seen whole, by far the most, which need no
    mask; 2: the diagonal."""
    past = S - T
    last = tl.minimum(i0 + M, T) - 1
    whole_to = (past + i0 + 1) // N * N
    whole_from = 0
    if DOCS:
        whole_from = tl.cdiv(tl.load(starts_ptr + last), N) * N
        whole_from = tl.minimum(whole_from, whole_to)
    if phase == 0:
        return tl.load(starts_ptr + i0) // N * N, whole_from
    elif phase == 1:
        return whole_from, whole_to
    else:
        return whole_to, past + last + 1


@jit
def flash_forward_kernel(
        q1_in, q2_in, k1_in, k2_in, v_in, y_out, lse_ptr, largest_ptr, starts_ptr, starts_b,
        H, Hv, T, S, scale, scale2, MAPS: tl.constexpr, DOCS: tl.constexpr, WANT_MAX: tl.constexpr,
        D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """One program: M queries of one head, over tiles of N keys. p = 2^(scale2·q·k), scale2 = scale·log2(e)"""
    # The last queries first, since they take longest
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    key, value = heads_read(h, H, Hv, MAPS)
    starts_ptr += tl.cast(b, tl.int64) * starts_b
    i0 = block * M
    i = i0 + tl.arange(0, M)
    starts = tl.load(starts_ptr + i, mask=i < T, other=0)[:, None] if DOCS else 0
    q1, q2 = load_parts(q1_in, q2_in, b, h, i0, M, D1, D2)

    # Running maximum m of q·k, and the sums of p and of p·v, both divided by 2^(scale2·m)
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    y = tl.zeros((M, V), tl.float32)
    for phase in tl.static_range(0 if DOCS else 1, 3):
        first, stop = keys_of_phase(phase, i0, starts_ptr, T, S, DOCS, M, N)
        for j0 in range(first, stop, N):
            # q·k. No query sees a key after the last
            k1, k2 = load_parts(k1_in, k2_in, b, key, j0, N, D1, D2)
            s = scores(q1, q2, k1, k2, D2)                                    # (M, N)
            if phase != 1:
                j = j0 + tl.arange(0, N)
                s = tl.where(visible(i[:, None], j[None, :], starts, S - T, DOCS), s, float("-inf"))

            # The maximum. A row that has seen nothing yet keeps −∞; subtracting 0 avoids −∞ + ∞
            old = m
            m = tl.maximum(old, tl.max(s, 1))
            base = m * scale2
            if DOCS:
                base = tl.where(m == float("-inf"), 0.0, base)
            p = tl.exp2(s * scale2 - base[:, None])

            # Both sums, the old ones relative to the new maximum
            keep = tl.exp2(old * scale2 - base)
            total = total * keep + tl.sum(p, 1)
            v = load_tile(v_in, b, value, j0, 0, N, V)                        # (N, V)
            y = tl.dot(p.to(v.dtype), v, y * keep[:, None], input_precision="ieee")

    # Results; m has seen every logit
    store_tile(y_out, y / total[:, None], b, h, i0, 0, M, V)
    head = tl.cast(b, tl.int64) * H + h
    tl.store(lse_ptr + head * T + i, m * scale2 + tl.log2(total), mask=i < T)
    if WANT_MAX:
        largest = tl.max(tl.where(i < T, m, float("-inf")), 0) * scale
        tl.store(largest_ptr + head * tl.num_programs(0) + block, largest)


def flash_forward(q, k, v, doc_start=None, scale=None, want_max=True, maps=1):
    """attention_ref → y (B, H, T, dv), lse (B, H, T) to base 2, and the largest logits (H,) or None.

    q (B, H, T, d), k (B, Hk, S, d), v (B, Hv, S, dv); doc_start (B, S), not decreasing, or None; scale > 0.
    maps: as in repeat_heads."""
    B, H, T, d = q.shape
    Hv, S, dv = v.shape[1:]
    target = flash_target(q.device)
    constants, options = flash_plan(target, d, dv, doc_start is not None)["forward"]
    D1, D2, V, M, N = constants.values()
    q, k, v = readable(q, D1 + D2), readable(k, D1 + D2), readable(v, V)
    starts = q if doc_start is None else doc_start[:, -T:].to(torch.int32).contiguous()

    y = q.new_empty(B, T, H, V).transpose(1, 2)                               # heads of a token are adjacent
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    largest = q.new_empty(B, H, -(-T // M), dtype=torch.float32)
    if not q.is_meta:
        flash_forward_kernel[triton.cdiv(T, M), H, B](
            *in_tiles(target, M, (q, D1, D2)), *in_tiles(target, N, (k, D1, D2), (v, V)),
            *in_tiles(target, M, (y, V)), lse, largest, starts,
            starts.stride(0), H, Hv, T, S, scale, scale * math.log2(math.e),
            MAPS=maps, DOCS=doc_start is not None, WANT_MAX=want_max, **constants, **options)
    return y[..., :dv], lse, largest.amax((0, 2)) if want_max else None


# ---- attention on a GPU: backward ---------------------------------------------------------------------
#
# With s_ij = scale·q_i·k_j, p_ij = exp(s_ij − lse_i), lse_i = log Σ_j exp s_ij and y_i = Σ_j p_ij·v_j, the
# gradients for g_i = ∂L/∂y_i are
#
#     ∂L/∂v_j  = Σ_i p_ij·g_i                                                                          (1)
#     ∂L/∂s_ij = p_ij·(g_i·v_j − Σ_l p_il·g_i·v_l) = p_ij·(g_i·v_j − δ_i),  δ_i = g_i·y_i              (2)
#     ∂L/∂q_i  = scale·Σ_j ∂L/∂s_ij·k_j                                                                (3)
#     ∂L/∂k_j  = scale·Σ_i ∂L/∂s_ij·q_i                                                                (4)
#
# (3) sums over keys, (1) and (4) over queries: a kernel for each kind, with a fixed order of summation, so
# that the bits are the same every time.

@jit
def queries_of_phase(phase, j0, until_ptr, T, S, DOCS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The queries, in tiles of M, that keys j0 … j0 + N − 1 visit in one phase, as above: from, to.

    until (S,): for each key, how many queries belong to a document that begins no later."""
    past = S - T
    to = T
    whole_to = T
    if DOCS:
        to = tl.load(until_ptr + tl.minimum(j0 + N, S) - 1)
        whole_to = tl.load(until_ptr + j0) // M * M
    whole_from = tl.cdiv(tl.maximum(j0 + N - 1 - past, 0), M) * M
    if phase == 0:
        return tl.maximum(whole_from, whole_to), to
    elif phase == 1:
        return whole_from, whole_to
    else:
        return tl.maximum(j0 - past, 0) // M * M, tl.minimum(whole_from, to)


@jit
def flash_queries_kernel(
        q1_in, q2_in, k1_in, k2_in, v_in, y_in, g_in, dq1_out, dq2_out, lse_ptr, delta_ptr,
        starts_ptr, starts_b, H, Hv, T, S, scale, scale2, MAPS: tl.constexpr, DOCS: tl.constexpr,
        D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """∂L/∂q. One program: M queries of one head, as in the forward. It also writes δ."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    key, value = heads_read(h, H, Hv, MAPS)
    starts_ptr += tl.cast(b, tl.int64) * starts_b
    i0 = block * M
    i = i0 + tl.arange(0, M)
    starts = tl.load(starts_ptr + i, mask=i < T, other=0)[:, None] if DOCS else 0
    q1, q2 = load_parts(q1_in, q2_in, b, h, i0, M, D1, D2)

    # lse, +∞ for rows after the last query, so that their p is 0; and δ
    row = (tl.cast(b, tl.int64) * H + h) * T + i
    lse = tl.load(lse_ptr + row, mask=i < T, other=float("inf"))
    y = load_tile(y_in, b, h, i0, 0, M, V)                                    # (M, V)
    g = load_tile(g_in, b, h, i0, 0, M, V)
    delta = tl.sum(y.to(tl.float32) * g.to(tl.float32), 1)                    # (M,)
    tl.store(delta_ptr + row, delta, mask=i < T)

    dq1 = tl.zeros((M, D1), tl.float32)
    dq2 = tl.zeros((M, D2 if D2 > 0 else D1), tl.float32)
    for phase in tl.static_range(0 if DOCS else 1, 3):
        first, stop = keys_of_phase(phase, i0, starts_ptr, T, S, DOCS, M, N)
        for j0 in range(first, stop, N):
            # p
            k1, k2 = load_parts(k1_in, k2_in, b, key, j0, N, D1, D2)
            p = tl.exp2(scores(q1, q2, k1, k2, D2) * scale2 - lse[:, None])   # (M, N)
            if phase != 1:
                j = j0 + tl.arange(0, N)
                p = tl.where(visible(i[:, None], j[None, :], starts, S - T, DOCS), p, 0.0)

            # (2) and (3)
            v = load_tile(v_in, b, value, j0, 0, N, V)                        # (N, V)
            dp = tl.dot(g, v.T, input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq1, dq2 = add_product(dq1, dq2, ds.to(k1.dtype), k1, k2, D2)
    store_parts(dq1_out, dq2_out, dq1 * scale, dq2 * scale, b, h, i0, M, D1, D2)


@jit
def flash_keys_kernel(
        q1_in, q2_in, k1_in, k2_in, v_in, g_in, dk1_out, dk2_out, dv_out, lse_ptr, delta_ptr,
        starts_ptr, until_ptr, starts_b, H, Hv, T, S, scale, scale2, MAPS: tl.constexpr, DOCS: tl.constexpr,
        D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
        FOR_K: tl.constexpr, FOR_V: tl.constexpr):
    """∂L/∂k, ∂L/∂v or both. One program: N keys of one value head, over tiles of M queries."""
    # The first keys first, since they are seen most
    j0 = tl.program_id(0) * N
    value = tl.program_id(1)
    b = tl.program_id(2)
    starts_ptr += tl.cast(b, tl.int64) * starts_b
    until_ptr += tl.cast(b, tl.int64) * S
    j = j0 + tl.arange(0, N)
    v = load_tile(v_in, b, value, j0, 0, N, V)                                # (N, V)
    dv = tl.zeros((N, V), tl.float32)

    # The key heads with these values: one, or that of the signals and that of the noise
    PAIR: tl.constexpr = 1 if MAPS == 1 else 2
    groups = H // MAPS // Hv
    for role in range(PAIR):
        key = value * PAIR + role
        k1, k2 = load_parts(k1_in, k2_in, b, key, j0, N, D1, D2)
        dk1 = tl.zeros((N, D1), tl.float32)
        dk2 = tl.zeros((N, D2 if D2 > 0 else D1), tl.float32)

        # The query heads with these keys: from each group the signals, or the noise
        each = 1
        if MAPS > 2:
            each = tl.where(role == 0, MAPS - 1, 1)
        heads = groups * each
        for phase in tl.static_range(0 if DOCS else 1, 3):
            first, stop = queries_of_phase(phase, j0, until_ptr, T, S, DOCS, M, N)
            tiles = tl.cdiv(tl.maximum(stop - first, 0), M)
            for step in range(heads * tiles):
                member = step // tiles
                h = (value * groups + member // each) * MAPS + role * (MAPS - 1) + member % each
                i0 = first + step % tiles * M
                i = i0 + tl.arange(0, M)
                row = (tl.cast(b, tl.int64) * H + h) * T + i

                # p, transposed; 0 for rows after the last query
                q1, q2 = load_parts(q1_in, q2_in, b, h, i0, M, D1, D2)
                lse = tl.load(lse_ptr + row, mask=i < T, other=float("inf"))
                p = tl.exp2(scores(k1, k2, q1, q2, D2) * scale2 - lse[None, :])      # (N, M)
                if phase != 1:
                    starts = tl.load(starts_ptr + i, mask=i < T, other=0) if DOCS else i
                    p = tl.where(visible(i[None, :], j[:, None], starts[None, :], S - T, DOCS), p, 0.0)

                # (1), (2) and (4)
                g = load_tile(g_in, b, h, i0, 0, M, V)                        # (M, V)
                if FOR_V:
                    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
                if FOR_K:
                    delta = tl.load(delta_ptr + row, mask=i < T, other=0.0)
                    dp = tl.dot(v, g.T, input_precision="ieee")
                    ds = p * (dp - delta[None, :])
                    dk1, dk2 = add_product(dk1, dk2, ds.to(q1.dtype), q1, q2, D2)
        if FOR_K:
            store_parts(dk1_out, dk2_out, dk1 * scale, dk2 * scale, b, key, j0, N, D1, D2)
    if FOR_V:
        store_tile(dv_out, dv, b, value, j0, 0, N, V)


def flash_backward(q, k, v, y, lse, g, doc_start=None, scale=None, maps=1):
    """From g = ∂L/∂y: ∂L/∂q, ∂L/∂k, ∂L/∂v.  y and lse: of flash_forward, whose other arguments these are."""
    B, H, T, d = q.shape
    Hv, S, dv = v.shape[1:]
    target = flash_target(q.device)
    plan = flash_plan(target, d, dv, doc_start is not None)
    plan.pop("forward")
    constants, options = plan.pop("queries")
    D1, D2, V, M, N = constants.values()
    q, k = readable(q, D1 + D2), readable(k, D1 + D2)
    v, y, g = readable(v, V), readable(y, V), readable(g, V)
    gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    if q.is_meta:
        return gq[..., :d], gk[..., :d], gv[..., :dv]

    # Where documents begin, for queries; and for keys, how many queries belong to a document that has begun
    starts = until = q
    if doc_start is not None:
        starts = doc_start[:, -T:].to(torch.int32).contiguous()               # (B, T)
        positions = torch.arange(S, device=q.device, dtype=torch.int32).repeat(B, 1)
        until = torch.searchsorted(starts, positions, right=True, out_int32=True)   # (B, S)
    numbers = starts.stride(0), H, Hv, T, S, scale, scale * math.log2(math.e)
    flags = dict(MAPS=maps, DOCS=doc_start is not None)

    # (3), and δ
    flash_queries_kernel[triton.cdiv(T, M), H, B](
        *in_tiles(target, M, (q, D1, D2)), *in_tiles(target, N, (k, D1, D2), (v, V)),
        *in_tiles(target, M, (y, V), (g, V), (gq, D1, D2)),
        lse, delta, starts, *numbers, **flags, **constants, **options)

    # (1) and (4), in one pass or two
    for kernel, (constants, options) in plan.items():
        M, N = constants["M"], constants["N"]
        flash_keys_kernel[triton.cdiv(S, N), Hv, B](
            *in_tiles(target, M, (q, D1, D2)), *in_tiles(target, N, (k, D1, D2), (v, V)),
            *in_tiles(target, M, (g, V)), *in_tiles(target, N, (gk, D1, D2), (gv, V)),
            lse, delta, starts, until, *numbers, **flags, **constants, **options)
    return gq[..., :d], gk[..., :d], gv[..., :dv]


class Flash(torch.autograd.Function):
    """flash_forward and flash_backward, of which the forward keeps q, k, v, y and lse."""

    @staticmethod
    def forward(ctx, q, k, v, doc_start, scale, want_max, maps):
        y, lse, largest = flash_forward(q, k, v, doc_start, scale, want_max, maps)
        ctx.save_for_backward(q, k, v, y, lse, doc_start)
        ctx.scale = scale
        ctx.maps = maps
        if want_max:
            ctx.mark_non_differentiable(largest)
        return y, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        q, k, v, y, lse, doc_start = ctx.saved_tensors
        grads = flash_backward(q, k, v, y, lse, g, doc_start, ctx.scale, ctx.maps)
        return *grads, None, None, None, None


def is_for_flash(device, dtype, d, dv):
    """Whether Flash computes attention: in 16 bits, since tensor cores have no float32; on a GPU that Triton
    knows; where a tile as wide as a head fits."""
    if dtype not in (torch.bfloat16, torch.float16) or min(d, dv) < 16 or max(d, dv) > 256:
        return False
    if device.type == "cuda" and triton and not torch.version.hip:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "meta" or device.type == "cuda" and triton is not None


def attention_path(device, dtype, d, dv):
    """How attention is computed, in words."""
    if is_for_flash(device, dtype, d, dv):
        return f"attention by kernels.Flash (tiles for {flash_target(device)}), largest logits included"
    return "attention by torch's kernel, largest logits in a second pass"


def flash(q, k, v, sees, scale, tau, maps=1):
    """Flash → (y, logits): see `attention`, and of `maps` repeat_heads."""
    doc_start = None if sees is None else sees.doc_start
    scale = scale or q.shape[-1] ** -0.5
    wanted = tau is not OFF and tau != math.inf
    y, largest = Flash.apply(q, k, v, doc_start, scale, wanted, maps)
    if wanted:
        return y, (largest, True)
    return y, None if tau is OFF else max_logits(q, k, tau=tau)


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


# ---- FP8 tiles ----------------------------------------------------------------------------------------

TILE = 128                       # neighbouring values that share a scale
E4M3_MAX = 448.0                 # largest value of E4M3: 4 bits of exponent, 3 of mantissa, no infinities
E4M3_NAN = 0x7F


def fp8_pack_ref(x):
    """x (..., D) in E4M3, with a scale for every 128 values.

        scale = max|x| / 448,   code = E4M3(x / scale)        over each tile; the last may be shorter

    → codes (..., D) uint8, scale (..., ⌈D/128⌉) float32

    1 + 4/128 bytes an element, where bfloat16 has 2. Packing reads x and writes these, unpacking the reverse:
    3.03 bytes of memory for an element and some 15 operations.

    A tile of zeros has scale 0 and unpacks to zeros, as does one so small that its scale rounds to 0. A tile
    with an infinity or NaN has no scale that would save the others: all its codes are NaN."""
    D = x.shape[-1]
    tiles = F.pad(x.float(), (0, -D % TILE)).unflatten(-1, (-1, TILE))                # (..., tiles, 128)

    # Divide by a tensor: by a number, a GPU multiplies by the rounded 1/448
    top = tiles.abs().amax(-1, keepdim=True)
    scale = top / torch.full_like(top, E4M3_MAX)                                      # (..., tiles, 1)
    usable = (scale > 0) & scale.isfinite()
    scaled = tiles / scale.where(usable, 1.0)

    # Clamp first: x / scale exceeds 448 where scale is subnormal, and not every torch casts that to 448
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(~scale.isfinite(), E4M3_NAN)
    return codes.flatten(-2)[..., :D].contiguous(), scale.squeeze(-1)


def fp8_unpack_ref(codes, scale, dtype):
    """The values that fp8_pack_ref stored, in `dtype`: each code's value times its tile's scale."""
    values = codes.view(torch.float8_e4m3fn).float()
    return (values * scale.repeat_interleave(TILE, -1)[..., :codes.shape[-1]]).to(dtype)


# The kernels convert between float32 and E4M3 as integers: that needs no FP8 instructions, and gives the same
# bits on every chip. Both formats are sign, exponent, mantissa. Rounding 20 of float32's 23 bits of mantissa
# off the integer leaves E4M3's 3; a carry goes to the exponent, as it should. Exponents are stored with 127
# added in float32 and with 7 in E4M3, hence the 120, moved to the place of the exponent. Below 2^-6 E4M3 has
# no smaller exponents: codes 0 to 7 are multiples of 2^-9.

@jit
def fp8_pack_kernel(x_ptr, codes_ptr, scale_ptr, N, D, tiles, ROWS: tl.constexpr, TILE: tl.constexpr):
    """codes (N, D) and scale (N, tiles) of x (N, D); a program does one tile in each of ROWS rows."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]        # (ROWS, 1)
    column = tile * TILE + tl.arange(0, TILE)[None, :]                                # (1, TILE)
    inside = (row < N) & (column < D)
    x = tl.load(x_ptr + row * D + column, inside, 0.0).to(tl.float32)                 # (ROWS, TILE)

    # max|x|, as integers: bits without the sign grow with the value, through infinity to NaN (a maximum of
    # floats would ignore NaN)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    top = tl.max(size, 1, keep_dims=True).to(tl.float32, bitcast=True)                # (ROWS, 1)
    scale = tl.div_rn(top, 448.0)
    tl.store(scale_ptr + row * tiles + tile, scale, row < N)

    # |x| / scale, at most 448
    finite = scale < float("inf")
    divisor = tl.where((scale > 0) & finite, scale, 1.0)
    scaled = tl.minimum(tl.div_rn(size.to(tl.float32, bitcast=True), divisor), 448.0)

    # Round 20 bits off, half-way cases to even: add a half, less the last unit unless the bit kept is odd
    pattern = scaled.to(tl.int32, bitcast=True)
    odd = (pattern >> 20) & 1
    code = ((pattern + 0x7FFFF + odd) >> 20) - (120 << 3)

    # Below 2^-6, adding 2^14 rounds to multiples of 2^-9, since that is the last place of floats up to 2^15
    multiple = (scaled + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(scaled < 0.015625, multiple, code)

    # The sign, and NaN for the whole tile
    code = tl.where(finite, code | ((bits >> 24) & 0x80), 0x7F)
    tl.store(codes_ptr + row * D + column, code.to(tl.uint8), inside)


@jit
def fp8_unpack_kernel(codes_ptr, scale_ptr, x_ptr, N, D, tiles, ROWS: tl.constexpr, TILE: tl.constexpr):
    """x (N, D) of codes (N, D) and scale (N, tiles), in the dtype of x_ptr."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]        # (ROWS, 1)
    column = tile * TILE + tl.arange(0, TILE)[None, :]                                # (1, TILE)
    inside = (row < N) & (column < D)
    code = tl.load(codes_ptr + row * D + column, inside, 0).to(tl.int32)              # (ROWS, TILE)
    scale = tl.load(scale_ptr + row * tiles + tile, row < N, 0.0)                     # (ROWS, 1)

    # |value|: the bits in their place in float32; codes 0 to 7 count 2^-9; 127 is NaN
    size = code & 0x7F
    value = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, value)
    value = tl.where(size == 127, float("nan"), value)

    # The sign, as a bit: Triton's -value is 0 - value, which loses that of zero
    sign = (code & 0x80) << 24
    value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    tl.store(x_ptr + row * D + column, value * scale, inside)


FP8_ROWS = dict(ROWS=16, num_warps=4)         # rows of a program, and its warps


def launch_fp8_pack(x):
    """x (..., D) → codes (..., D), scale (..., ⌈D/128⌉)"""
    D = x.shape[-1]
    N = x.numel() // D
    tiles = -(-D // TILE)
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
    scale = x.new_empty(*x.shape[:-1], tiles, dtype=torch.float32)
    if not x.is_meta:
        programs = triton.cdiv(N, FP8_ROWS["ROWS"]) * tiles
        fp8_pack_kernel[programs,](x.contiguous(), codes, scale, N, D, tiles, **FP8_ROWS, TILE=TILE,
                                   enable_fp_fusion=False)
    return codes, scale


def launch_fp8_unpack(codes, scale, dtype):
    """codes (..., D), scale (..., ⌈D/128⌉) → x (..., D) in `dtype`"""
    D = codes.shape[-1]
    N = codes.numel() // D
    tiles = scale.shape[-1]
    x = torch.empty_like(codes, dtype=dtype)
    if not codes.is_meta:
        programs = triton.cdiv(N, FP8_ROWS["ROWS"]) * tiles
        fp8_unpack_kernel[programs,](codes, scale, x, N, D, tiles, **FP8_ROWS, TILE=TILE,
                                     enable_fp_fusion=False)
    return x


@torch.no_grad()
def fp8_pack(x):
    """fp8_pack_ref, on a GPU in one kernel. Without gradients: what it makes is for storage."""
    return launch_fp8_pack(x) if takes_kernels(x) else fp8_pack_ref(x)


@torch.no_grad()
def fp8_unpack(codes, scale, dtype):
    """fp8_unpack_ref, on a GPU in one kernel."""
    if takes_kernels(codes):
        return launch_fp8_unpack(codes, scale, dtype)
    return fp8_unpack_ref(codes, scale, dtype)


# ---- python kernels.py --------------------------------------------------------------------------------

class Operation(NamedTuple):
    """A row of the table. work: bytes or FLOPs in bfloat16 of a forward, and of forward and backward."""
    name: str
    ours: Callable
    exact: Callable                  # the definition
    tensors: tuple                   # what both take
    unit: str
    work: tuple
    beside: dict = {}                # name → another function that does the same


def operations(device, large):
    """All rows; large: as in a model of some billion parameters."""
    def randn(*shape):
        return torch.randn(shape, device=device)

    # What memory limits: N tokens of width D
    N, D = (16_384, 8192) if large else (24, 1100)
    ND = N * D
    x, gate = randn(N, D), randn(N, D)
    w, b = randn(3), randn(1)
    rows = [
        Operation("RMSNorm", lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_ref(x, w, 1e-6),
                  (x, randn(D)), "GB/s", (4 * ND, 10 * ND)),
        Operation("PolyNorm", poly_norm, poly_norm_ref, (x, w, b), "GB/s", (4 * ND, 10 * ND)),
        Operation("PolyNorm, gated", lambda x, w, b, u: poly_norm(x, w, b, gate=u),
                  lambda x, w, b, u: poly_norm_ref(x, w, b, gate=u), (x, w, b, gate), "GB/s",
                  (6 * ND, 16 * ND)),
        Operation("FP8, there and back", lambda x: fp8_unpack(*fp8_pack(x), x.dtype),
                  lambda x: fp8_unpack_ref(*fp8_pack_ref(x.detach()), x.dtype), (x,), "GB/s",
                  (2 * (3 + 4 / TILE) * ND,))]

    # What multiplications limit: experts, a vocabulary, causal attention
    N, D, E, V = (16_384, 2048, 16, 32_768) if large else (60, 40, 4, 50)
    H, T, d = (16, 4096, 128) if large else (4, 50, 16)
    ends = torch.arange(1, E + 1, device=device) * (N // E)
    target = torch.zeros(N, dtype=torch.int64, device=device)
    x = randn(N, D)
    q, k, v, wide = randn(1, H, T, d), randn(1, H, T, d), randn(1, H, T, d), randn(1, H // 2, T, 2 * d)
    linear, vocabulary, pairs = 2 * N * D * D, 2 * N * D * V, 2 * H * T * T * d
    square = randn(2 * D, 2 * D)
    return rows + [
        Operation("symmetric product", symmetric_product, symmetric_product_ref, (square,), "TFLOP/s",
                  (16 * D ** 3,), {"cuBLAS": lambda x: x @ x.mT}),
        Operation("experts' matmul", lambda x, w: grouped_linear(x, w, ends),
                  lambda x, w: grouped_linear_ref(x, w, ends), (x, randn(E, D, D)), "TFLOP/s",
                  (linear, 3 * linear),
                  {"grouped_mm": lambda x, w: F.grouped_mm(x, w.mT, offs=ends.int())}),
        Operation("cross-entropy", lambda h, w: cross_entropy(h, w, target)[0],
                  lambda h, w: cross_entropy_ref(h, w, target)[0], (x, randn(V, D)), "TFLOP/s",
                  (3 * vocabulary, 3 * vocabulary)),
        Operation("attention", lambda q, k, v: attention(q, k, v)[0], attention_ref, (q, k, v), "TFLOP/s",
                  (pairs, 3.5 * pairs),
                  {"torch's": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}),
        Operation("attention and largest logits", lambda q, k, v: attention(q, k, v, tau=None)[0],
                  attention_ref, (q, k, v), "TFLOP/s", (pairs, 3.5 * pairs)),
        Operation("differential attention", lambda q, k, v: diff_attention(q, k, v, 0.3)[0],
                  lambda q, k, v: diff_attention_ref(q, k, v, 0.3), (q, k, wide), "TFLOP/s",
                  (1.5 * pairs, 5 * pairs))]


def outcome(f, tensors, dtype):
    """f's result and its gradients in `dtype`, for a given gradient of the result."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    y = f(*leaves)
    if not y.requires_grad:
        return [y]
    g = torch.linspace(-1, 1, y.numel(), device=y.device).bfloat16().to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def error(row, dtype):
    """The largest relative error of result and gradients, to the definition in float64."""
    rounded = [t.to(dtype) for t in row.tensors]
    pairs = zip(outcome(row.ours, rounded, dtype), outcome(row.exact, rounded, torch.float64))
    return max(((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs)


def milliseconds(f, tensors):
    """Median times on a GPU in bfloat16 of f's forward, and of forward and backward."""
    bench = functools.partial(triton.testing.do_bench, return_mode="median")
    leaves = [t.detach().bfloat16().requires_grad_() for t in tensors]
    y = f(*leaves)
    if not y.requires_grad:
        return [bench(lambda: f(*leaves))]
    g = torch.ones_like(y)
    return bench(lambda: f(*leaves)), bench(lambda: torch.autograd.grad(f(*leaves), leaves, g))


def ceilings():
    """This GPU's limits, measured: {"GB/s": of a large copy, "TFLOP/s": of a product of large matrices}."""
    big = torch.zeros(1 << 30, device="cuda", dtype=torch.bfloat16)
    square = torch.zeros(8192, 8192, device="cuda").normal_()
    return {"GB/s": 2 * big.nbytes / milliseconds(torch.clone, (big,))[0] / 1e6,
            "TFLOP/s": 2 * 8192 ** 3 / milliseconds(torch.mm, (square, square))[0] / 1e9}


def timed(row, ceiling):
    """One operation on a GPU → for the forward, and for forward and backward: milliseconds, speed in its
    unit, share of the ceiling, {other form: its time over ours}."""
    forms = {"torch.compile": torch.compile(row.exact), **row.beside}
    theirs = {name: milliseconds(f, row.tensors) for name, f in forms.items()}
    for i, (ms, work) in enumerate(zip(milliseconds(row.ours, row.tensors), row.work)):
        speed = work / ms / (1e6 if row.unit == "GB/s" else 1e9)
        ratios = {name: times[i] / ms for name, times in theirs.items()}
        yield ms, speed, speed / ceiling[row.unit], ratios


def main():
    """Print the errors of all operations on this machine; on a GPU their speed too."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    print(f"{'relative error, forward and backward':<38}", *(f"{name:>10}" for name in dtypes))
    for row in operations(device, large=False):
        print(f"{row.name:<38}", *(f"{error(row, dtype):>10.1e}" for dtype in dtypes.values()), flush=True)
    if device == "cpu" or triton is None:
        return

    # Speed
    ceiling = ceilings()
    print(f"\n{torch.cuda.get_device_name()}:", *(f"{value:.0f} {unit}" for unit, value in ceiling.items()))
    print(f"{'bfloat16':<38}{'ms':>10}{'speed':>10}{'of ceiling':>19}  times as fast as")
    for row in operations(device, large=True):
        for what, (ms, speed, share, ratios) in zip(("", ", and backward"), timed(row, ceiling)):
            others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"{row.name + what:<38}{ms:>10.3f}{speed:>10.0f} {row.unit:<8}{share:>10.2f}  {others}",
                  flush=True)


if __name__ == "__main__":
    main()
