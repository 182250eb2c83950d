"""Every claim the code makes, one section per file:  python -m pytest -q test_all.py

Each fast path is checked against its definition, and each definition against a property that follows from it.
Everything runs on CPU; multi-rank tests spawn processes that talk over gloo. Tolerances state their reason.
"""
import ast
import collections
import concurrent.futures
import contextlib
import copy
import csv
import fcntl
import functools
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels
import model as net
import muonclip
import parallel
import train
from notes import _figure, _note, datasets, faults, huggingface, measures
from notes import corpus as embedded
from notes import endpoint as asking
from notes.faults import LAYOUTS, PERIOD, command, log_of, tiny_run, weights_of, write_sentences

HERE = Path(__file__).parent
torch.set_num_threads(1)                                           # the other core is for what runs beside
TINY = net.ModelConfig(n_layer=3, n_head=4, n_kv_head=4, d_model=32, d_head=8, d_ff=48, vocab_size=61,
                       context=32)
MHA = replace(TINY, differential=False)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lively(config, seed=0, std=0.2, **kwargs):
    """A model in which nothing is an identity: every matrix is random and every vector is perturbed."""
    network = net.Transformer(config, seed=seed, **kwargs)
    with torch.no_grad():
        for name, p in network.named_parameters():
            seeded = torch.Generator().manual_seed(sum(name.encode()) + seed)
            noise = torch.empty(p.shape).normal_(0, 1, generator=seeded)
            p.copy_(noise * std if p.ndim > 1 else p + 0.1 * noise)
    return network


def tokens(*shape, high=TINY.vocab_size):
    return torch.randint(0, high, shape)


def gradients(f, *inputs):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    f(*inputs).backward()
    return [t.grad for t in inputs]


# ---- the repository ----------------------------------------------------------------------------------------

def test_files_can_be_read_on_one_screen_width():
    for path in (*HERE.glob("*.py"), *HERE.glob("notes/*.py")):
        wide = [i for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > 110]
        assert not wide, f"{path.name}: lines {wide} are wider than 110 columns"


def test_training_and_sampling_work_without_notes(tmp_path):
    """With notes/ removed, and without triton, as on a Mac, a run on your own text still trains, resumes and
    samples. What does need notes/, such as the default text or an export, is refused with one line."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    write_sentences(tmp_path)
    options = command(tmp_path / "mine.txt", "out")[2:]
    script = f"""
import sys
sys.modules["triton"] = None
import data, model, muonclip, train
train.main({options + ["--steps=4"]})
train.main({options + ["--resume", "--steps=8"]})
model.main(["--sample=out", "--prompt=The ", "--tokens=9"])
open("a.parquet", "w").write("PAR1")
for main, words in ((train.main, ["--steps=1", "--out=new"]), (data.main, ["stats"]), (muonclip.main, []),
                    (model.main, ["--sample=out", "--export=there"]), (data.main, ["sources"]),
                    *[(data.main, ["stats", "--files=x=" + path]) for path in ("dclm:.", "a.parquet")]):
    try:
        main(words)
    except SystemExit as leave:
        print("REFUSED", leave.code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=""))
    assert done.returncode == 0, done.stderr
    assert "step 4/30" in done.stdout and "resuming out at step 4" in done.stdout, done.stderr
    assert "\nThe " in done.stdout
    refused = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    asked = "--data.files=NAME=PATH: the default text is made by notes/corpus.py, which is not here"
    missing = "No module named 'notes'"
    sets = "data.py: published sets, tables, zstd and conditions need notes/datasets.py, which is not here"
    expected = asked, asked, missing, missing, sets, sets, sets
    assert [says in line for says, line in zip(expected, refused, strict=True)] == [True] * 7


def test_the_drawing_of_the_files_is_true():
    """`python model.py` says who imports whom, and who calls whom in a step: imports are those of the files;
    every function exists; those of train_step are called by it, in that order."""
    files = ("kernels", "data", "model", "muonclip", "parallel", "train")
    for name in files:
        tree = ast.parse((HERE / f"{name}.py").read_text("utf-8"))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        imported |= {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
        line = re.search(rf"^  {name}\.py .*   (\S.*)$", net.ROOMS, re.M)[1]
        assert line == (", ".join(sorted(imported & set(files))) or "-"), name
    modules = dict(kernels=kernels, data=data, model=net, muonclip=muonclip, parallel=parallel, train=train)
    called = re.findall(r"\b(kernels|data|model|muonclip|parallel|train)\.((?!py\b)\w+(?:\.\w+)?)", net.ROOMS)
    assert len(called) > 12
    for module, path in called:
        thing = functools.reduce(getattr, path.split("."), modules[module])
        assert callable(thing), path
    step = inspect.getsource(train.train_step)
    order = ["learning_rate(", "run.batches(", "execute(", "share_what_was_seen(", "reduce(", "clip_norm_(",
             "update("]
    places = [step.index(call) for call in order]
    assert places == sorted(places)


# ---- kernels.py --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("D", [64, 37])
def test_rms_norm_matches_its_definition_in_values_and_gradients(D, float64):
    x, w, weight = torch.randn(3, 5, D), torch.randn(D), torch.randn(3, 5, D)
    torch.testing.assert_close(kernels.rms_norm(x, w, 1e-6), kernels.rms_norm_ref(x, w, 1e-6))
    for ours, theirs in zip(*(gradients(lambda x, w: (f(x, w, 1e-6) * weight).sum(), x, w)
                              for f in (kernels.rms_norm, kernels.rms_norm_ref))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("D", [64, 37, 1])
def test_poly_norm_matches_its_definition_in_values_and_gradients(D, float64):
    x, w, b, gate = torch.randn(3, 5, D), torch.randn(3), torch.randn(1), torch.randn(3, 5, D)
    exact = kernels.poly_norm_ref(x, w, b)
    torch.testing.assert_close(kernels.poly_norm(x, w, b), exact)
    torch.testing.assert_close(kernels.poly_norm(x, w, b, gate=gate), exact * gate)
    torch.testing.assert_close(kernels.poly_norm_ref(x, w, b, gate=gate), exact * gate)
    weight = torch.randn(3, 5, D)
    for inputs in ((x, w, b), (x, w, b, gate)):
        def loss(f, x, w, b, gate=None):
            return (f(x, w, b, gate=gate) * weight).sum()
        for ours, theirs in zip(*(gradients(functools.partial(loss, f), *inputs)
                                  for f in (kernels.poly_norm, kernels.poly_norm_ref))):
            torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(kernels.poly_norm, tuple(t.requires_grad_() for t in (x, w, b)))


def test_poly_norm_in_bfloat16_is_as_accurate_as_its_rounding():
    """Statistics are kept in float32, so the error against float64 is that of rounding x and y, 2^-8 each."""
    x, w, b = torch.randn(64, 256).bfloat16(), torch.full((3,), 1 / 3), torch.zeros(1)
    exact = kernels.poly_norm_ref(x.double(), w.double(), b.double())
    ours = kernels.poly_norm(x, w, b)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() / exact.norm() < 2 ** -8


def test_poly_norm_works_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    kernels.compiled_poly_norm.cache_clear()
    x, w, b = torch.randn(4, 9), torch.randn(3), torch.randn(1)
    for _ in range(2):
        assert torch.equal(kernels.poly_norm(x, w, b, compiled=True), kernels.poly_norm(x, w, b))
    assert capsys.readouterr().out.count("no C++ compiler") == 1
    kernels.compiled_poly_norm.cache_clear()


def test_poly_norm_ignores_the_scale_of_its_input(float64):
    """y is invariant to x → s·x, so Σ x·∂L/∂x = 0 (up to eps)."""
    x, w, b = torch.randn(4, 50), torch.randn(3), torch.randn(1)
    scaled, plain = kernels.poly_norm(7 * x, w, b), kernels.poly_norm(x, w, b)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
    dx = gradients(lambda x: (kernels.poly_norm(x, w, b, 1e-20) ** 3).sum(), x)[0]
    assert (x * dx).sum(-1).abs().max() < 1e-9


def test_on_a_gpu_gated_poly_norm_keeps_its_inputs_and_three_numbers_a_row():
    """The meta device takes a GPU's path. Whoever calls PolyNorm with a gate has it in the same operation."""
    kept = []
    record = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.device("meta"), record:
        x, up = (torch.zeros(4, 6, 48, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        norm = net.PolyNorm()
        y = net.gated(norm, x, up)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and y.shape == x.grad.shape == up.grad.shape == (4, 6, 48)
    assert norm.weight.grad.shape == (3,) and norm.bias.grad.shape == (1,)
    assert sorted(t.nbytes for t in kept) == sorted([x.nbytes, up.nbytes, 4 * 6 * 3 * 4, 3 * 4, 4])


def explicit_maps(q, k, v, lam, mask, maps=2):
    """Differential attention as in its paper, one query at a time: a signal map minus λ times a noise map. In
    the grouped form, the last map of each group is the noise map of all the others."""
    B, H, T, d = q.shape
    signals, pair = maps - 1, lambda group: group * k.shape[1] // 2 // (H // maps)
    out = torch.zeros(B, H // maps * signals, T, v.shape[-1])
    for n, h, i in itertools.product(range(B), range(out.shape[1]), range(T)):
        group, see = h // signals, mask[n, 0, i].nonzero().flatten()
        a1, a2 = ((k[n, 2 * pair(group) + part, see] @ q[n, group * maps + at, i] / math.sqrt(d)).softmax(0)
                  for part, at in ((0, h % signals), (1, maps - 1)))
        out[n, h, i] = (a1 - lam * a2) @ v[n, pair(group), see]
    return out


@pytest.mark.parametrize("T, H, kv, maps, documents", [
    (9, 4, 4, 2, False), (17, 4, 2, 2, False), (13, 4, 4, 2, True), (9, 6, 4, 3, False), (11, 8, 2, 4, True)])
def test_differential_attention_matches_two_explicit_maps(T, H, kv, maps, documents, float64):
    q, k, v = torch.randn(2, H, T, 6), torch.randn(2, kv, T, 6), torch.randn(2, kv // 2, T, 12)
    lam = torch.tensor(0.3)
    starts = torch.where(torch.arange(T) < 5, 0, 5).expand(2, T)
    mask = kernels.causal_mask(T, T, starts if documents else torch.zeros(2, T, dtype=torch.int64))
    exact, given = explicit_maps(q, k, v, lam, mask, maps), mask if documents else None
    weight = torch.randn_like(exact)
    want = gradients(lambda *a: (explicit_maps(*a, mask, maps) * weight).sum(), q, k, v, lam)
    of_kernel = lambda *qkv: kernels.attention(*qkv)[0]
    fast = lambda *args, **kwargs: kernels.diff_attention(*args, **kwargs)[0]
    sees = kernels.sight(T, T, starts) if documents else None
    for f, given in ((kernels.diff_attention_ref, given), (functools.partial(fast, block=4), sees),
                     (fast, sees), (functools.partial(kernels.diff_attention_ref, attend=of_kernel), sees)):
        torch.testing.assert_close(f(q, k, v, lam, given, maps), exact)
        found = gradients(lambda *a: (f(*a, given, maps) * weight).sum(), q, k, v, lam)
        for ours, theirs in zip(found, want):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("T, S, block", [(33, 33, 8), (5, 40, 2), (64, 64, 64), (1, 7, 16)])
def test_largest_logits_are_exact_without_a_full_map(T, S, block, float64):
    q, k = torch.randn(3, 4, T, 6), torch.randn(3, 4, S, 6)
    torch.testing.assert_close(kernels.exact_max_logits(q, k, block=block), kernels.max_logits_ref(q, k))
    starts = torch.randint(0, 3, (3, S)).cummax(1).values
    mask = kernels.causal_mask(T, S, starts)
    exact = kernels.max_logits_ref(q, k, mask)
    torch.testing.assert_close(kernels.exact_max_logits(q, k, mask, block=block), exact)


@pytest.mark.parametrize("T", [5, 16, 70])
def test_bounds_on_the_largest_logits_hold_and_rule_heads_out(T):
    """Both bounds are at least the maximum. Every head that may exceed τ gets its exact maximum; every other
    head gets a value of at most τ. A head whose keys share a direction that its queries avoid needs the
    second bound."""
    q, k = torch.randn(2, 3, T, 8), torch.randn(2, 3, T, 8)
    q[:, 1], k[:, 1] = 6 * q[:, 1], 6 * k[:, 1]                    # loud
    q[:, 2, :, 0], k[:, 2, :, 0] = 40, -40                         # loud, but all logits are far below zero
    exact, (norms, centres) = kernels.max_logits_ref(q, k), list(kernels.bound_max_logits(q, k))
    assert (norms >= exact).all() and (centres >= exact - 1e-4).all()
    tau = norms[0].item() * 1.01
    assert exact[1] > tau and norms[2] > tau > exact[2]
    largest, is_exact = kernels.max_logits(q, k, tau=tau)
    assert not is_exact and largest[1] == exact[1]
    assert exact[0] <= largest[0] <= tau and exact[2] <= largest[2] + 1e-4
    assert T < 16 or centres[2] < tau, "the second bound rules the head out"
    largest, is_exact = kernels.max_logits(q, k, tau=None)
    assert is_exact and torch.allclose(largest, exact)
    largest, is_exact = kernels.max_logits(q, k, tau=-1e9)
    assert is_exact and torch.allclose(largest, exact), "no bound is low enough to be of use"


def test_bounds_on_the_largest_logits_are_tight(float64):
    """Both are attained by a query along the longest key, which is far from the centre of its block."""
    q, k = torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4)
    q[..., 0], k[0, 0, 3, 0] = 3.0, 16.0                           # the centre is 1, the key 15 away from it
    exact = kernels.max_logits_ref(q, k)
    assert exact == 3 * 16 / 2
    for bound in kernels.bound_max_logits(q, k):
        torch.testing.assert_close(bound, exact)


@pytest.mark.parametrize("N, chunk", [(50, 16), (7, 100), (48, 48)])
def test_cross_entropy_in_chunks_matches_its_definition(N, chunk, float64):
    h, w, target = torch.randn(N, 8), torch.randn(19, 8), torch.randint(0, 19, (N,))
    for weight in (None, torch.randn(N)):                          # weights of preferences may be negative
        ours = lambda h, w: kernels.cross_entropy(h, w, target, weight, chunk)
        exact = lambda h, w: kernels.cross_entropy_ref(h, w, target, weight)
        (loss, nll), (want, terms) = ours(h, w), exact(h, w)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(nll, terms)
        mine = gradients(lambda h, w: 3 * ours(h, w)[0], h, w)
        for a, b in zip(mine, gradients(lambda h, w: 3 * exact(h, w)[0], h, w)):
            torch.testing.assert_close(a, b)


def test_cross_entropy_never_materialises_all_logits():
    """All logits of Motif's vocabulary for 4,096 tokens take 3.6 GB; the largest tensor here is one chunk."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            sizes.extend(t.numel() for t in leaves if isinstance(t, torch.Tensor))
            return out
    h, w = torch.randn(256, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True)
    with Watch():
        kernels.cross_entropy(h, w, torch.randint(0, 5000, (256,)), chunk=32)[0].backward()
    assert max(sizes) == 32 * 5000


def every_e4m3():
    """All finite E4M3 values from 0 to 448, midpoints between neighbours, and the float32s beside them."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    above = torch.nextafter(middles, torch.tensor(500.0))
    below = torch.nextafter(middles, torch.tensor(-500.0))
    return torch.cat((values, middles, above, below))


def test_fp8_tiles_round_to_the_nearest_of_all_codes():
    """With scale 1 by a 448 in every tile. Of two neighbours that are equally near, the even code."""
    x = every_e4m3()
    x = torch.cat((x, -x))
    x = F.pad(x, (0, -len(x) % 127)).view(-1, 127)
    codes, scale = kernels.fp8_pack(F.pad(x, (1, 0), value=448.0))
    assert torch.equal(scale, torch.ones(len(x), 1)) and (codes[:, 0] == 0x7E).all()
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    distance = (x.double().abs()[..., None] - values).abs()                                # (N, 127, codes)
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(0x7F) % 2 == 0
    best = torch.where(nearest.sum(-1, keepdim=True) > 1, nearest & even, nearest).int().argmax(-1)
    assert torch.equal(codes[:, 1:] & 0x7F, best.byte())
    assert torch.equal(codes[:, 1:] >= 0x80, x.signbit())


@pytest.mark.parametrize("shape", [(3, 2, 300), (5, 128), (4, 37)])
def test_fp8_tiles_are_as_close_as_three_bits_of_mantissa(shape):
    """Half a unit in the last place is 2^-4 of the value, or 2^-10 of the scale where the exponent ends."""
    x = torch.randn(shape) * torch.logspace(-9, 9, shape[-1])
    codes, scale = kernels.fp8_pack(x)
    assert codes.dtype == torch.uint8 and codes.shape == shape
    assert scale.dtype == torch.float32 and scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    of_each = scale.repeat_interleave(128, -1)[..., :shape[-1]]
    back = kernels.fp8_unpack(codes, scale, torch.float32)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, of_each / 1024) * (1 + 1e-6)).all()
    assert torch.equal(kernels.fp8_unpack(codes, scale, torch.bfloat16), back.bfloat16())


def odd_tiles():
    """Rows of two tiles and a part of one: zeros of both signs, and values that are tiny, infinite or NaN."""
    x = torch.randn(7, 300)
    x[0, :128], x[1, 128:256] = 0.0, -0.0
    x[2] *= 3e-43                                                  # scale is 0 or 2^-149, its last bit
    x[3, 130], x[4, 299], x[5, 0], x[6] = torch.nan, torch.inf, -torch.nan, -torch.inf
    return x


def test_fp8_tiles_of_zeros_stay_zero_and_others_are_nan_where_a_value_is_not_finite():
    x = odd_tiles()
    codes, scale = kernels.fp8_pack(x)
    back = kernels.fp8_unpack(codes, scale, torch.float32)
    assert torch.equal(back[0, :128], x[0, :128]) and torch.equal(back[1, 128:256], x[1, 128:256])
    assert codes[0, :128].eq(0).all() and codes[1, 128:256].eq(0x80).all(), "a zero keeps its sign"
    sound = F.pad(x, (0, 84)).view(7, 3, 128).isfinite().all(-1)
    assert torch.equal(back.isnan(), ~sound.repeat_interleave(128, 1)[:, :300])
    assert (codes[2] & 0x7F).max() == 0x7E and (back[2] - x[2]).abs().max() < 448 * 2.0 ** -149


def test_the_table_of_kernels_has_no_large_error(capsys):
    """Rounding of the dtype, and sums in another order."""
    kernels.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(kernels.operations("cpu", False))
    for line in lines:
        errors = [float(word) for word in line.split()[-3:]]
        assert errors[0] < 1e-5 and errors[1] < 2 ** -7 and errors[2] < 2 ** -10, line


def near(ours, exact, dtype):
    """Whether the relative error of `ours` is that of sums in float32, rounded once to `dtype`."""
    exact = exact.double()
    error = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    return ours.dtype == dtype and ours.shape == exact.shape and error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts, D, O", [
    ([0, 5, 0, 15, 1, 0], 7, 3), ([0, 5, 0, 15, 1, 0], 24, 16), ([9], 4, 5), ([0, 0, 6, 0], 8, 8),
    ([0, 0], 8, 8), ([30, 2], 16, 8)])
def test_grouped_linear_matches_its_definition(counts, D, O, dtype):
    """Value and gradients, by all forms of a CPU: widths that grouped_mm takes and others, empty experts."""
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), D).to(dtype).requires_grad_()
    w = torch.randn(len(counts), O, D).to(dtype).to(kernels.accumulation_dtype(dtype)).requires_grad_()
    y = kernels.grouped_linear(x, w, ends)
    exact_y = kernels.grouped_linear_ref(x.double(), w.double(), ends)
    assert near(y, exact_y, dtype)

    # A gradient that is one number, repeated without memory of its own, and one that is not
    for g in (torch.ones((), dtype=dtype).expand_as(y), torch.randn_like(y)):
        dx, dw = torch.autograd.grad(y, (x, w), g, retain_graph=True)
        exact_dx, exact_dw = torch.autograd.grad(exact_y, (x, w), g.double(), retain_graph=True)
        assert near(dx, exact_dx, dtype) and near(dw.to(dtype), exact_dw, dtype)
        assert (dx.dtype, dw.dtype) == (x.dtype, w.dtype)


def test_the_form_of_newton_schulz_for_gpus_matches_its_definition():
    x = torch.randn(3, 20, 33, dtype=torch.float64)
    x /= x.norm(dim=(-2, -1), keepdim=True)
    for name in muonclip.COEFFICIENTS:
        triples = muonclip.coefficients(name, 5)
        torch.testing.assert_close(muonclip.iterate(x, triples), muonclip.newton_schulz_ref(x, triples))


# Triton's kernels, run by its interpreter on numpy. Whether to interpret is decided when a kernel is
# decorated: so the claims below run in a process of their own, which calls the kernels' launchers directly.
INTERPRETED = {}


def interpreted(claim):
    """Make `claim` a test under Triton's interpreter."""
    INTERPRETED[claim.__name__] = claim
    return claim


# Flash attention: batch rows, query heads, key heads, value heads, queries, keys, the two widths, maps
FLASH_CASES = [
    (2, 2, 2, 2, 17, 17, 16, 16, 1),
    (1, 4, 2, 2, 200, 200, 16, 32, 1),                             # grouped keys
    (1, 1, 1, 1, 1, 1, 32, 16, 1),
    (2, 4, 1, 1, 1, 90, 16, 16, 1),                                # one query against a longer cache
    (1, 2, 1, 1, 70, 128, 48, 24, 1),                              # queries in two parts, padded values
    (2, 4, 4, 2, 77, 77, 16, 32, 2),                               # differential
    (1, 6, 4, 2, 128, 128, 16, 16, 3),                             # two signals a noise map
    (1, 8, 2, 1, 40, 70, 16, 16, 4),                               # two groups with one pair of keys
    (1, 1, 1, 1, 130, 130, 192, 128, 1),                           # latent attention
    (1, 2, 2, 1, 130, 130, 128, 256, 2)]                           # two passes for keys and values


def flash_case(B, H, Hk, Hv, T, S, d, dv, maps, documents, dtype):
    """q, k, v, g, the documents' starts or None. The logits of the first key head are all below zero."""
    heads = [torch.randn(B, T, H, d).transpose(1, 2), torch.randn(B, S, Hk, d).transpose(1, 2),
             torch.randn(B, Hv, S, dv), torch.randn(B, H if maps == 1 else H - H // maps, T, dv)]
    q, k, v, g = (x.to(dtype) for x in heads)
    q[:, :, :, :d // 2] = q[:, :, :, :d // 2].abs() + 0.5
    k[:, 0] *= 0.05
    k[:, 0, :, :d // 2] = -torch.rand(B, S, d // 2).to(dtype) - 0.25
    starts = None
    if documents:
        begins = torch.rand(B, S) < 3 / S
        starts = torch.where(begins, torch.arange(S), 0).cummax(1).values
    return q, k, v, g, starts


def flash_by_definition(q, k, v, g, lam, starts, maps):
    """y, largest logits, and the gradients of q, k, v and, of a differential form, lam: in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v, lam)]
    q, k, v, lam = leaves
    mask = kernels.causal_mask(q.shape[2], k.shape[2], starts)
    if maps == 1:
        y = kernels.attention_ref(q, k, v, mask)
        leaves.pop()
    else:
        y = kernels.diff_attention_ref(q, k, v, lam, mask, maps)
    largest = kernels.max_logits_ref(q, kernels.repeat_heads(k, q.shape[1], maps), mask)
    return y, largest, torch.autograd.grad(y, leaves, g.double())


@contextlib.contextmanager
def flash_everywhere(target):
    """attention and diff_attention take Flash, with the tiles of a target, whatever the device."""
    kept = kernels.is_for_flash, kernels.flash_target
    kernels.is_for_flash, kernels.flash_target = lambda *_: True, lambda _: target
    yield
    kernels.is_for_flash, kernels.flash_target = kept


def flash_equals_its_definition(target, documents, dtype, cases):
    # One rounding of results; in float16 also of p and ∂L/∂s before their products
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for case in cases:
        maps = case[-1]
        q, k, v, g, starts = flash_case(*case, documents, dtype)
        lam = torch.tensor(0.4, dtype=dtype)
        want, largest, grads = flash_by_definition(q, k, v, g, lam, starts, maps)
        sees = kernels.sight(q.shape[2], k.shape[2], starts)
        leaves = [x.detach().requires_grad_() for x in (q, k, v, lam)][:len(grads)]
        with flash_everywhere(target):
            if maps == 1:
                y, logits = kernels.attention(*leaves, sees, tau=None)
            else:
                y, logits = kernels.diff_attention(*leaves, sees, maps, tau=None)
            found = torch.autograd.grad(y, leaves, g)
        assert y.dtype == dtype and logits[1] is True
        assert (largest[0] < 0) == (logits[0][0] < 0) and largest[0] < 0
        torch.testing.assert_close(logits[0].double(), largest, rtol=2e-6, atol=1e-6)
        for ours, exact in zip((y, *found), (want, *grads)):
            # With one key, ∂L/∂q and ∂L/∂k are 0; and ∂L/∂λ is one sum, whose terms may cancel
            size = exact.abs().max().clamp(min=0.1 if exact.ndim else g.numel() ** 0.5)
            error = (ours.double() - exact).abs().max() / size
            assert error < rtol, (case, error)


@interpreted
def flash_attention():
    flash_equals_its_definition("cuda", False, torch.float32, FLASH_CASES[1::2])


@interpreted
def flash_attention_within_documents():
    flash_equals_its_definition("cuda", True, torch.float32, FLASH_CASES)


@interpreted
def flash_attention_by_descriptors():
    flash_equals_its_definition("hopper", False, torch.float32, FLASH_CASES[4:7])
    flash_equals_its_definition("hopper", True, torch.float32, FLASH_CASES[1:2])


@interpreted
def flash_attention_in_float16():
    flash_equals_its_definition("cuda", True, torch.float16, [FLASH_CASES[i] for i in (0, 3, 4, 5, 9)])


@interpreted
def flash_attention_keeps_the_log_of_its_sums():
    q, k, v, _, _ = flash_case(2, 2, 1, 1, 70, 90, 16, 16, 1, False, torch.float32)
    _, lse, largest = kernels.flash_forward(q, k, v, None, 0.5, want_max=False)
    scores = 0.5 * q.double() @ k.double().mT
    scores = scores.masked_fill(~kernels.causal_mask(70, 90), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)
    assert largest is None


@interpreted
def flash_attention_asked_for_no_logits():
    q, k, v, _, _ = flash_case(1, 2, 2, 2, 5, 5, 16, 16, 1, False, torch.float32)
    with flash_everywhere("cuda"):
        assert kernels.attention(q, k, v)[1] is None
        largest, exact = kernels.attention(q, k, v, tau=math.inf)[1]
    assert largest.tolist() == [math.inf] * 2 and not exact


def by_kernels(engine, tiles=None):
    """Every choice in favour of a kernel, with an engine that copies tiles or without."""
    choices = dict(takes_kernels=lambda x: True, takes_symmetric=lambda x: True,
                   copies_tiles=lambda device: engine)
    if tiles:
        choices["grouped_tiles"] = lambda *_: tiles
    return mock.patch.multiple(kernels, **choices)


@interpreted
def symmetric_products_are_exact_and_symmetric_to_the_last_bit():
    for engine, dtype in itertools.product((True, False), (torch.float32, torch.float16)):
        for shape in ((1, 8), (24, 24), (136, 72), (2, 2, 40, 136)):
            x = torch.randn(shape).to(dtype)
            with by_kernels(engine):
                c = kernels.symmetric_product(x)
            assert torch.equal(c, c.mT) and near(c, kernels.symmetric_product_ref(x.double()), dtype)
        for shape in ((8, 8), (128, 128), (3, 136, 136)):
            a = torch.randn(shape).to(dtype)
            a = (a + a.mT) / shape[-1]
            with by_kernels(engine):
                square = kernels.symmetric_square(a, 0.7, 0.3)
            exact = kernels.symmetric_square_ref(a.double(), 0.7, 0.3)
            assert torch.equal(square, square.mT) and near(square, exact, dtype)
    transposed = torch.randn(40, 17).mT
    assert near(kernels.launch_symmetric(transposed), transposed @ transposed.mT, torch.float32)


@interpreted
def symmetric_products_keep_rows_apart():
    x = torch.randn(2, 70, 36)
    x[0, 5] = torch.nan
    x[1, 0] = torch.nan                                              # which the tiles of x[0] reach
    for engine in (True, False):
        with by_kernels(engine):
            c = kernels.symmetric_product(x)
        spoiled = torch.zeros_like(c, dtype=torch.bool)
        spoiled[0, 5] = spoiled[0, :, 5] = spoiled[1, 0] = spoiled[1, :, 0] = True
        assert torch.equal(c.isnan(), spoiled)


@interpreted
def newton_schulz_by_kernels_matches_its_definition():
    x = torch.randn(2, 20, 36)
    x /= x.norm(dim=(-2, -1), keepdim=True)
    with by_kernels(engine=True):
        ours = muonclip.iterate(x, muonclip.JORDAN)
    exact = muonclip.newton_schulz_ref(x.double())
    assert (ours - exact).norm() < 1e-4 * exact.norm()


# Rows of each expert, D and O: experts without rows first, in the middle and last; one with all rows
GROUPS = [([0, 5, 0, 150, 1, 0], 40, 72), ([130], 64, 32), ([0, 0, 130, 0], 72, 16), ([64, 64, 128], 16, 304),
          ([20] * 5, 136, 136), ([3, 0], 8, 8)]


@interpreted
def grouped_linear_by_kernels_matches_its_definition():
    large, small, _ = kernels.GROUPED_TILES[2]
    exact = kernels.GROUPED_TILES[4][0]
    for dtype, tiles, engine in ((torch.float32, exact, True), (torch.float32, exact, False),
                                 (torch.float16, large, True), (torch.float16, small, False)):
        for counts, D, O in GROUPS:
            ends = torch.tensor(counts).cumsum(0)
            x = torch.randn(sum(counts), D).to(dtype).requires_grad_()
            w = torch.randn(len(counts), O, D).to(dtype).float().requires_grad_()
            g = torch.randn(sum(counts), O).to(dtype)
            with by_kernels(engine, tiles):
                y = kernels.grouped_linear(x, w, ends)
                dx, dw = torch.autograd.grad(y, (x, w), g)
            exact_y = kernels.grouped_linear_ref(x.double(), w.double(), ends)
            exact_dx, exact_dw = torch.autograd.grad(exact_y, (x, w), g.double())
            assert near(y, exact_y, dtype) and near(dx, exact_dx, dtype)
            assert near(dw, exact_dw, torch.float32), "weights in float32 get gradients in float32"


@interpreted
def grouped_linear_by_kernels_keeps_experts_apart():
    counts = torch.tensor([30, 7, 0, 41])
    ends = counts.cumsum(0)
    spoiled = torch.repeat_interleave(torch.arange(4), counts) == 1
    for engine in (True, False):
        x, g, w = torch.randn(78, 36), torch.randn(78, 36), torch.randn(4, 36, 36)
        x[30:37] = g[30:37] = w[1] = torch.nan
        with by_kernels(engine):
            for y in (kernels.grouped_forward(x, w, ends), kernels.grouped_by_input(g, w, ends)):
                assert torch.equal(y.isnan(), spoiled[:, None].expand_as(y))

            # Of g and x one at a time: each is cut off at the end of expert 0
            for left, right in ((g, torch.ones(78, 36)), (torch.ones(78, 36), x)):
                dw = kernels.grouped_by_weight(left, right, w, ends)
                assert (dw.isnan() == (torch.arange(4) == 1)[:, None, None]).all() and (dw[2] == 0).all()

            # A row and columns of one expert
            x, w = torch.randn(78, 36), torch.randn(4, 36, 36)
            x[3] = torch.nan
            assert torch.equal(kernels.grouped_forward(x, w, ends).isnan().any(1), torch.arange(78) == 3)
            w[0, 3] = torch.nan
            y = kernels.grouped_forward(torch.ones(78, 36), w, ends)
            assert torch.equal(y[0].isnan(), torch.arange(36) == 3)


def test_kernels_get_what_their_descriptors_take_and_torch_the_rest(monkeypatch):
    """On a GPU; its kernels are played by functions that say that they were called."""
    called = []
    monkeypatch.setattr(kernels, "takes_kernels", lambda x: True)
    monkeypatch.setattr(kernels, "launch_symmetric", lambda *_, **__: called.append("symmetric"))
    for name in ("grouped_forward", "grouped_by_input", "grouped_by_weight"):
        monkeypatch.setattr(kernels, name, lambda *_, name=name: called.append(name))

    # 528 blocks of 128 × 128, but 496, and rows of 4097 numbers
    for shape in ((3969, 8), (3968, 8), (3969, 9), (14, 1024, 8), (13, 1024, 8), (0, 8)):
        kernels.symmetric_product(torch.zeros(shape, dtype=torch.bfloat16))
    assert called == ["symmetric"] * 2

    # Rows that are whole units of 16 bytes, from a multiple of 16 bytes on
    for D, O, says in ((8, 16, "forward by_input by_weight"), (7, 16, ""), (8, 3, "forward"), (3, 7, "")):
        called.clear()
        x, g, w = (torch.zeros(s, dtype=torch.bfloat16) for s in ((6, D), (6, O), (2, O, D)))
        ends = torch.tensor([2, 6])
        kernels.GroupedLinear.forward(mock.Mock(), x, w, ends)
        kernels.GroupedLinear.by_input(g, w, ends)
        kernels.GroupedLinear.by_weight(g, x, w, ends)
        assert called == ["grouped_" + word for word in says.split()]
    assert not kernels.fits_descriptors(torch.zeros(65)[1:].view(8, 8))
    assert not kernels.fits_descriptors(torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(8, 4))
    assert not kernels.fits_descriptors(torch.zeros(0, 8))


def test_tiles_of_experts_by_their_sizes(monkeypatch):
    """Small where large ones would be half empty, or too few."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    large, small, without_engine = kernels.GROUPED_TILES[2]
    for engine, expected in ((True, large), (False, without_engine)):
        monkeypatch.setattr(kernels, "copies_tiles", lambda device: engine)
        assert kernels.grouped_tiles(x, 24, 1365, 2048) == expected
        assert kernels.grouped_tiles(x, 64, 64, 1408) == small
        assert kernels.grouped_tiles(x, 64, 2048, 128) == small
        assert kernels.grouped_tiles(x, 16, 128, 384) == small
        assert kernels.grouped_tiles(x, 64, 1408, 2048) == expected


def try_interpreted(folder):
    """Try all claims in turn, and record the traceback of each that fails, or nothing."""
    for name, claim in INTERPRETED.items():
        torch.manual_seed(0)
        try:
            claim()
            said = ""
        except Exception:
            said = traceback.format_exc()
        Path(folder, name).write_text(said)


def close(ours, exact, dtype):
    """Within the rounding of `dtype`, and that of sums in float32, relative to the norm."""
    assert ours.dtype == dtype and ours.shape == exact.shape
    bound = {torch.float32: 1e-6, torch.float16: 2 ** -11}[dtype]
    assert (ours.double() - exact).norm() <= bound * exact.norm()


@interpreted
def poly_norm_and_its_gradients():
    """Widths below, at and above a block of columns; with and without a gate; a batch without rows."""
    for shape in ((2, 3, 37), (2, 2048), (3, 4101), (0, 8)):
        for dtype in (torch.float32, torch.float16):
            for gated in (True, False):
                x, gate, g = torch.randn(3, *shape).to(dtype)
                inputs = [x, torch.randn(3), torch.randn(1)] + [gate] * gated
                leaves = [t.clone().requires_grad_() for t in inputs]
                y = kernels.PolyNormKernel.apply(*leaves[:3], 1e-6, leaves[3] if gated else None)
                found = torch.autograd.grad(y, leaves, g)

                leaves = [t.double().requires_grad_() for t in inputs]
                exact = kernels.poly_norm_ref(*leaves[:3], 1e-6, *leaves[3:])
                want = torch.autograd.grad(exact, leaves, g.double())
                for ours, theirs, like in zip((y.detach(), *found), (exact.detach(), *want), (x, *inputs)):
                    close(ours, theirs, like.dtype)


@interpreted
def poly_norm_takes_tensors_that_are_not_contiguous():
    x, gate = torch.randn(37, 5).mT, torch.randn(37, 5).mT
    w, b, g = torch.randn(3), torch.randn(1), torch.randn(1).expand(5, 37)
    y, r = kernels.launch_poly_norm(x, gate, w, b, 1e-6)
    dx, dgate, *_ = kernels.launch_poly_norm_backward(g, x, gate, w, b, r)
    leaves = [t.double().requires_grad_() for t in (x, gate)]
    exact = kernels.poly_norm_ref(leaves[0], w.double(), b.double(), 1e-6, leaves[1])
    want = torch.autograd.grad(exact, leaves, g.double())
    for ours, theirs in zip((y, dx, dgate), (exact.detach(), *want)):
        close(ours, theirs, torch.float32)


@interpreted
def kernels_write_nothing_past_the_end():
    """A last row that ends within a block of columns is followed by numbers that must stay."""
    def guarded(rows, width, dtype=torch.float32):
        room = torch.full((rows * width + 4096,), 77).to(dtype)
        return room, lambda: torch.equal(room[rows * width:], torch.full((4096,), 77).to(dtype))
    x, w, b, r = torch.randn(3, 300), torch.randn(3), torch.randn(1), torch.randn(3, 3)
    (y, y_kept), (dx, dx_kept), (dgate, dgate_kept) = guarded(3, 300), guarded(3, 300), guarded(3, 300)
    (codes, codes_kept), (scale, scale_kept) = guarded(3, 300, torch.uint8), guarded(3, 3)
    (back, back_kept) = guarded(3, 300)
    kernels.poly_norm_forward_kernel[3,](x, x, w, b, y, r, 300, 1e-6, BLOCK=256)
    kernels.poly_norm_backward_kernel[3,](x, x, x, w, b, r, dx, dgate, torch.empty(3, 4), 300, BLOCK=256)
    kernels.fp8_pack_kernel[3,](x, codes, scale, 3, 300, 3, ROWS=4, TILE=128)
    kernels.fp8_unpack_kernel[3,](codes, scale, back, 3, 300, 3, ROWS=4, TILE=128)
    assert y_kept() and dx_kept() and dgate_kept() and codes_kept() and scale_kept() and back_kept()


def same_bits(ours, exact):
    """Equal to the last bit, except that any NaN equals any other."""
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    there = ~exact.isnan()
    assert torch.equal(ours.isnan(), exact.isnan())
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours[there].view(kind), exact[there].view(kind))


@interpreted
def fp8_tiles_have_the_bits_of_their_definition():
    """All E4M3 values and the midpoints between them, several scales, odd tiles, float16 and 37 rows."""
    x = every_e4m3()
    x = torch.cat((x, -x))
    x = F.pad(F.pad(x, (0, -len(x) % 127)).view(-1, 127), (1, 0), value=448.0)
    scaled = [factor * x for factor in (1, 0.37, 3e33, 1e-37)]
    for given in (*scaled, odd_tiles(), torch.randn(37, 130).half(), torch.randn(2, 3, 5)):
        codes, scale = kernels.launch_fp8_pack(given)
        exact_codes, exact_scale = kernels.fp8_pack_ref(given)
        same_bits(codes, exact_codes)
        same_bits(scale, exact_scale)
        for dtype in (torch.float32, torch.float16):
            with np.errstate(all="ignore"):                        # ∞·0, and more than float16's largest
                back = kernels.launch_fp8_unpack(codes, scale, dtype)
            same_bits(back, kernels.fp8_unpack_ref(codes, scale, dtype))


def begun(code, **env):
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, env=os.environ | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    """What a process of `begun` has printed."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == "", errors
    return said


def proving(code):
    """A process that prints the value of `code`, where `note` is notes/kernels.py: a compiler may crash."""
    return begun(f"import json; from notes import kernels as note; print(json.dumps({code}))")


def test_a_kernel_that_spills_or_lacks_matrix_instructions_is_a_fault():
    """With one warp for 2048 columns, each thread would hold 64 of them; and PolyNorm is no matmul."""
    pytest.importorskip("triton")
    spilling, wrong = json.loads(ended(proving(
        "[list(note.faults(row)) for row in note.prove([note.PROOFS[1]._replace(options=dict(num_warps=1)), "
        "note.PROOFS[0]._replace(matmul=True)], ['sm_80'])]")))
    assert len(spilling) == 1 and "bytes spilled" in spilling[0]
    assert wrong == ["no matrix instructions"]


def test_flash_attention_is_for_16_bits_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    for d, dv in (128, 128), (192, 128), (128, 256), (16, 16):
        assert kernels.is_for_flash(gpu, bf16, d, dv)
        assert "Flash" in kernels.attention_path(gpu, bf16, d, dv)
    for device, dtype, d, dv in ((torch.device("cpu"), bf16, 128, 128), (gpu, torch.float32, 128, 128),
                                 (gpu, bf16, 8, 16), (gpu, bf16, 576, 512)):
        assert not kernels.is_for_flash(device, dtype, d, dv)
        assert "torch" in kernels.attention_path(device, dtype, d, dv)


@pytest.mark.parametrize("d, dv, parts, values", [
    (192, 128, (128, 64), 128), (128, 256, (128, 0), 256), (24, 20, (32, 0), 32), (80, 64, (64, 16), 64),
    (16, 16, (16, 0), 16)])
def test_widths_of_queries_are_one_or_two_powers_of_two(d, dv, parts, values):
    for target in kernels.FLASH_TILES:
        for constants, _ in kernels.flash_plan(target, d, dv, False).values():
            assert (constants["D1"], constants["D2"], constants["V"]) == (*parts, values)


def test_a_dense_mask_is_built_when_it_is_needed():
    starts = torch.tensor([[0, 0, 2, 2]])
    sees = kernels.sight(4, 4, starts)
    assert "mask" not in vars(sees)
    assert torch.equal(sees.mask, kernels.causal_mask(4, 4, starts)) and sees.mask is sees.mask
    assert kernels.sight(4, 4) is None


# ---- data.py -----------------------------------------------------------------------------------------------

DOCUMENTED = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module
MOTIF_MIXTURE = ([.68, .07, .01, .06, .05, .10, .02, .01],         # [Motif Table 2]
                 [.33, 0, .30, .03, .01, .18, .10, .05])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The default corpus and its tokenizer, built once for all tests."""
    return data.prepare(data.DataConfig(cache=str(tmp_path_factory.mktemp("cache"))), 4096)


@pytest.mark.parametrize("options, says", [
    (dict(domains="prose:0.5:1,code:0.4:0"), "start weights sum to 0.9"),
    (dict(domains="prose:1.5:1,code:-0.5:0"), "'code:-0.5:0'"),
    (dict(domains="prose:nan:1"), "'prose:nan:1'"),
    (dict(domains="prose:one:1"), "'prose:one:1'"),
    (dict(domains="prose:1"), "'prose:1'"),
    (dict(domains=""), "sum to 0"),
    (dict(domains="prose:1:1,prose:0:0"), "'prose' is given twice"),
    (dict(domains="news:1:1"), "known: prose, code, math"),
    (dict(domains="shakespeare:1:1"), "--data.files=shakespeare=PATH"),
    (dict(files="a"), "'a' is not NAME=PATH"),
    (dict(files="a=x,a=y"), "'a' is given twice"),
    (dict(files="prose=x,b=y"), "'b' is not in domains"),
    (dict(files="a=/no/such"), "/no/such"),
    (dict(files="a=EMPTY"), "empty"),
    (dict(files="a=LATIN"), "not UTF-8 at byte 3"),
    (dict(files="a=GOOD", tokenizer="gpt9"), "gpt2"),
    (dict(files="a=GOOD", tokenizer="bytes"), "261"),
    (dict(files="a=GOOD"), "at least 261"),
])
def test_bad_input_raises_a_one_line_error(options, says, tmp_path):
    """Whatever a user gets wrong raises a ValueError whose single line names the value."""
    for name, raw in (("EMPTY", b" \n"), ("LATIN", b"abc\xe9t\xe9"), ("GOOD", b"some text\n" * 9)):
        (tmp_path / name).write_bytes(raw)
        options = {k: v.replace(name, str(tmp_path / name)) for k, v in options.items()}
    with pytest.raises(ValueError) as error:
        data.prepare(data.DataConfig(cache=str(tmp_path / "cache"), **options), 260)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bpe_refuses_text_that_is_too_small(tmp_path):
    """Text with too few pairs for the vocabulary is refused, with the number of tokens it is good for."""
    with pytest.raises(ValueError, match="only 26[0-9] tokens"):
        data.train_bpe(["abab"], 1000)


def test_docstrings_are_cut_exactly():
    """Every form of docstring is found under its name and is gone from the code; other strings stay."""
    source = '"""Mod é."""\nX = "é"; Y = """keep"""\n\ndef f(): "one"\n\n' \
             'class C:\n    """Two\n    lines."""\n\n' \
             '    def g(self):\n        "g"\n        return """keep me"""\n' \
             '    async def h(self): "h"; return 1\n' \
             'if X:\n    def k():\n        """é k"""  # note\n        return 2\n'
    docs, code = embedded.split_docstrings(source, "m")
    assert docs == [("m", "Mod é."), ("m.f", "one"), ("m.C", "Two\nlines."), ("m.C.g", "g"), ("m.C.h", "h"),
                    ("m.k", "é k")]
    assert not any(isinstance(n, DOCUMENTED) and ast.get_docstring(n) for n in ast.walk(ast.parse(code)))
    assert "keep me" in code and "# note" in code and "def f(): pass" in code and "return 1" in code


def test_prose_and_code_share_no_text():
    """No docstring is left in the code where it was one."""
    prose, code = embedded.library()
    for text in code[::5]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, DOCUMENTED):
                assert not (ast.get_docstring(node) or "").strip()
    lines = {line.strip() for text in code for line in text.split("\n")}
    long = {line.strip() for doc in prose for line in doc.split("\n") if len(line.strip()) > 60}
    shared = long & lines                                          # help and licence texts, also in strings
    assert len(long) > 10_000 and len(shared) < 0.01 * len(long)


def test_code_still_parses_and_compiles_to_the_same_statements():
    """Cutting docstrings removes nothing else: the syntax tree is the old one minus the docstrings."""
    class Strip(ast.NodeTransformer):
        def generic_visit(self, node):
            super().generic_visit(node)
            if isinstance(node, DOCUMENTED):
                if ast.get_docstring(node) is not None: node.body = node.body[1:]
                node.body = [n for n in node.body if not isinstance(n, ast.Pass)]
            return node
    for module, path in embedded.library_files()[::25]:
        raw = path.read_bytes()
        try: source = raw.decode()
        except UnicodeDecodeError: continue
        _, code = embedded.split_docstrings(source, module)
        assert ast.dump(Strip().visit(ast.parse(source))) == ast.dump(Strip().visit(ast.parse(code))), module


def test_split_is_disjoint_stable_and_deduplicated():
    """No document is on both sides; adding documents moves none; a single document is cut by position."""
    docs = [f"text {i}" for i in range(2000)]
    train, val = data.split_documents(docs + docs)
    assert sorted(train + val) == sorted(docs) and 60 < len(val) < 140
    more_train, more_val = data.split_documents(docs + [f"new {i}" for i in range(500)])
    assert set(train) <= set(more_train) and set(val) <= set(more_val)
    assert data.split_documents(["0123456789" * 10]) == (["0123456789" * 9], ["0123456789"])
    assert [len(part) for part in data.split_documents(["a", "b"])] == [1, 1]


@pytest.mark.parametrize("sizes", [
    (49_000, 630), (630, 49_000), (10, 10), (1,), (7, 100_000, 7, 7), (5_000,) * 5,
    (300_000, *[2_000] * 200), (90_000, 90_000, *[100] * 40)])
def test_few_or_uneven_documents_leave_most_bytes_to_training(sizes):
    """Validation gets 1% to 11% of the bytes, whatever the hashes; nothing is lost or on both sides."""
    rng = random.Random(sum(sizes))
    for _ in range(20):
        docs = ["".join(rng.choices(string.ascii_letters, k=size)) for size in sizes]
        train, val = data.split_documents(docs)
        held, total = sum(map(len, val)), sum(map(len, dict.fromkeys(docs)))
        assert total / 100 <= held <= (total * 0.11 if total > 100 else math.ceil(total / 2))
        assert sum(map(len, train)) + held == total and not set(train) & set(val)
        whole = [part for part in (*train, *val) if part in docs]
        assert len(whole) >= len(set(docs)) - 2, "a document is cut only where one has to be"


def test_adding_documents_of_any_size_moves_no_other_across_the_split():
    """Sizes span four decades; adding documents moves none of the others across the split."""
    rng, moved = random.Random(3), 0
    docs = [f"{i} " * int(10 ** rng.uniform(0, 4)) for i in range(1200)]
    sides = [[set(part) for part in data.split_documents(docs[:n])] for n in (1000, 1100, 1200)]
    moved = sum(len(a[0] & b[1]) + len(a[1] & b[0]) for a, b in zip(sides, sides[1:]))
    assert moved == 0


def test_every_arithmetic_statement_is_true():
    """In 9,000 problems every `=` between numbers holds in exact fractions, and every answer fits its
    question. A single changed digit is noticed."""
    problems, rng = embedded.worked_math(), random.Random(0)
    assert len(set(problems)) == len(problems) and sum(map(len, problems)) > 2_000_000
    checked, kinds = zip(*map(embedded.check, problems))
    kinds = {kind: kinds.count(kind) for kind in set(kinds) - {None}}
    assert sum(checked) > 40_000 and min(kinds.values()) > 300 and len(kinds) == 4, (sum(checked), kinds)

    noticed = 0
    for problem in problems[:400]:
        first, rest = problem.split("\n", 1)
        at = rng.choice([match.start() for match in re.finditer(r"\d", rest)])
        wrong = str((int(rest[at]) + 1) % 10)
        with contextlib.suppress(ValueError):
            embedded.check(f"{first}\n{rest[:at]}{wrong}{rest[at + 1:]}")
            continue
        noticed += 1
    assert noticed > 300


def brute_bpe(texts, n):
    words = [list(w.encode()) for t in texts for w in regex.findall(data.PATTERN, t)]
    pieces = [bytes([i]) for i in range(256)]
    while len(pieces) < n:
        count = {}
        for w in words:
            for p in zip(w, w[1:]): count[p] = count.get(p, 0) + 1
        pair = min(count, key=lambda p: (-count[p], p))
        words = [data.merge(w, *pair, len(pieces)) for w in words]
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
    return pieces


@pytest.mark.parametrize("seed", range(4))
def test_bpe_equals_brute_force(seed):
    """The incremental trainer learns the same merges as one that recounts everything after each merge."""
    rng = random.Random(seed)
    text = "".join(rng.choice("aab ab\n c1é"[:6 + seed]) for _ in range(1500))
    assert list(data.train_bpe([text], 300)) == brute_bpe([text], 295)


def naive_encode(text, ranks):
    ids = []
    for piece in regex.findall(data.PATTERN, text):
        word = [bytes([b]) for b in piece.encode()]
        while pairs := [ranks[a + b] for a, b in zip(word, word[1:]) if a + b in ranks]:
            i = next(i for i in range(len(word) - 1) if ranks.get(word[i] + word[i + 1]) == min(pairs))
            word[i:i + 2] = [word[i] + word[i + 1]]
        ids += [ranks[w] for w in word]
    return ids


def random_text(rng, n):
    kinds = (lambda: rng.randrange(32, 127), lambda: rng.randrange(0xD800),
             lambda: rng.randrange(0xE000, 0x110000), lambda: 32, lambda: 10)
    return "".join(chr(rng.choice(kinds)()) for _ in range(n))


def test_tokenizers_round_trip_and_match_the_definition(corpus):
    """decode(encode(text)) = text on random Unicode; tiktoken's ids equal those of merging step by step."""
    rng = random.Random(0)
    ranks = {p: i for i, p in enumerate(corpus.tokenizer.pieces[:-5])}
    plain = data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    texts = [random_text(rng, rng.randrange(200)) for _ in range(200)]
    for text in texts + ["", embedded.library()[1][3][:3000]]:
        ids = corpus.tokenizer.encode(text)
        assert corpus.tokenizer.decode(ids) == text and list(ids) == naive_encode(text, ranks)
        assert bytes(plain.encode(text).tolist()) == text.encode()
        assert plain.decode(plain.encode(text)) == text


def test_specials_come_last_and_are_never_parsed_from_text(corpus):
    """The five specials have the last ids and count as 0 bytes; text that spells one is ordinary text."""
    t = corpus.tokenizer
    assert list(t.specials.values()) == list(range(4091, 4096)) and t.n_vocab == 4096 and t.eot == 4091
    text = "".join(data.SPECIALS)
    assert max(t.encode(text)) < 4091 and t.decode(t.encode(text)) == text
    assert (t.token_bytes == 0).sum() == 5
    assert t.token_bytes[t.encode("déjà vu\n")].sum() == len("déjà vu\n".encode())
    assert t.decode([t.eot, 5000]) == "<|endoftext|>\ufffd"


def test_indentation_is_one_token(corpus):
    """A newline plus its indentation is one token, so code takes fewer tokens than with gpt2's pattern."""
    for depth in (4, 8, 12, 16): assert len(corpus.tokenizer.encode("\n" + " " * depth)) == 1


def test_shards_hold_the_text(corpus):
    """Tokens decode to the documents, each followed by eot, and byte counts match the text."""
    train, val = data.split_documents(data.documents("code"))
    for docs, ids, size in ((train, corpus.domains["code"].train, corpus.domains["code"].train_bytes),
                            (val, corpus.domains["code"].val, corpus.domains["code"].val_bytes)):
        assert (ids == corpus.tokenizer.eot).sum() == len(docs)
        assert corpus.tokenizer.token_bytes[ids].sum() == size
        assert corpus.tokenizer.decode(ids[:1 + list(ids).index(corpus.tokenizer.eot)]) == docs[0] + data.EOT


def own(tmp_path, tokenizer="bytes"):
    text = "".join(f"line {i * i} of the text\n" for i in range(600))
    (tmp_path / "a.txt").write_text(text)
    config = data.DataConfig(files=f"a={tmp_path}/a.txt", tokenizer=tokenizer, cache=str(tmp_path / "cache"))
    return config, text


def test_the_tokenizers_package_reads_our_bpe_and_we_read_its_files(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    text = "def f(x):\n    return x + 12345  # naïve, 你好 🙂\r\n\n\n\tend <|user|> of  it\u00a0all " * 3
    pieces = data.train_bpe([text, "the cat sat on the mat " * 9], 320)
    for ours in (data.Tokenizer("t", data.PATTERN, pieces),
                 data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})):
        folder = tmp_path / str(ours.n_vocab)
        folder.mkdir()
        huggingface.save_tokenizer(ours, folder)
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        plain = text.replace("<|user|>", "")
        assert theirs.encode(plain).ids == ours.encode(plain).tolist()
        assert theirs.decode(theirs.encode(plain).ids) == plain
        assert theirs.token_to_id("<|user|>") == ours.specials["<|user|>"]
        back = data.load_tokenizer(folder / "tokenizer.json")
        assert back.encode(text).tolist() == ours.encode(text).tolist()
        assert back.decode(back.encode(text)) == text
        assert (back.eot, back.n_vocab, back.specials) == (ours.eot, ours.n_vocab, ours.specials)
        assert back.token_bytes.tolist() == ours.token_bytes.tolist()
        back.save(tmp_path / "kept.json")
        again = data.load_tokenizer(tmp_path / "kept.json")
        assert again.fingerprint == back.fingerprint
        folder = folder.with_name(f"{folder.name}-again")
        folder.mkdir()
        huggingface.save_tokenizer(back, folder)
        assert data.load_tokenizer(folder / "tokenizer.json").fingerprint == back.fingerprint
        assert again.encode(text).tolist() == ours.encode(text).tolist()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="needs tokenizer_config.json"):
        data.load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_damaged_cache_files_are_reported_and_rebuilt(tmp_path, capsys, tokenizer):
    """Truncated, altered or missing files are detected, named and rebuilt, with the same fingerprint."""
    config, text = own(tmp_path, tokenizer)
    first = data.prepare(config, 300)
    files = sorted(p for p in (tmp_path / "cache").iterdir() if p.name != "lock")
    assert len(files) == 3 + (tokenizer == "bpe")
    assert first.tokenizer.decode(first.domains["a"].train).startswith("line 0")
    capsys.readouterr()
    data.prepare(config, 300)
    assert capsys.readouterr().out == ""
    for path in files:
        raw = path.read_bytes()
        for damage in (raw[:-2], raw[:-1] + b"\x07", b"", b"{}"):
            path.write_bytes(damage)
            again = data.prepare(config, 300)
            assert again.fingerprint == first.fingerprint and path.read_bytes() == raw
            out = capsys.readouterr().out
            assert path.name in out and "building it again" in out, (path, damage)
        path.unlink()
        assert data.prepare(config, 300).fingerprint == first.fingerprint and path.read_bytes() == raw
        capsys.readouterr()


def test_changed_text_changes_the_fingerprint(tmp_path):
    """Changed text is a different corpus; a single text file is cut by position, 10% for validation."""
    config, text = own(tmp_path)
    a = data.prepare(config, 261)
    assert a.domains["a"].val_bytes == len(text) - len(text) * 9 // 10 and list(a.start) == [1]
    (tmp_path / "a.txt").write_text(text + "x")
    assert data.prepare(config, 261).fingerprint != a.fingerprint


def write_own(tmp_path):
    """Your own text in every format. → {format: path}, its documents"""
    docs = [f"document {i}: {'é' * (i % 7)} {i * i}\n" for i in range(80)]
    lines = "\n\n".join(json.dumps(dict(id=i, text=doc)) for i, doc in enumerate(docs)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "folder/deep").mkdir(parents=True)
    for i, doc in enumerate(docs):
        folder = tmp_path / "folder" / ("deep" if i % 2 else "")
        (folder / f"{i:02d}.{'md' if i % 3 else 'txt'}").write_text(doc)
    (tmp_path / "folder/ignored.png").write_bytes(b"\xff\xd8")
    return dict(jsonl="a.jsonl", gz="b.jsonl.gz", folder="folder"), docs


def test_own_text_is_the_same_in_every_format(tmp_path):
    forms, docs = write_own(tmp_path)
    files = ",".join(f"{name}={tmp_path / path}" for name, path in forms.items())
    config = data.DataConfig(domains="jsonl:0.5:0.2,gz:0.5:0.2,folder:0:0.6", files=files, tokenizer="bytes",
                             horizon=99, cache=str(tmp_path / "cache"))
    found = data.prepare(config, 261)
    eot = found.tokenizer.eot
    for domain in found.domains.values():
        assert domain.documents == 80
        assert domain.train_bytes + domain.val_bytes == sum(len(d.encode()) for d in docs)
        pieces = [found.tokenizer.decode(part).split(data.EOT)[:-1] for part in (domain.train, domain.val)]
        assert sorted(pieces[0] + pieces[1]) == sorted(docs)
        assert pieces[1] and (domain.train == eot).sum() > 60
    assert found.start.tolist() == [0.5, 0.5, 0] and found.end.tolist() == [0.2, 0.2, 0.6]


@pytest.mark.parametrize("line, says", [
    (b'{"title": "no text"}', "line 4: no JSON object"), (b'{"text": 7}', "line 4"), (b'{"text"', "line 4"),
    (b'["text"]', "line 4"), (b'"text"', "line 4"), (b"[" * 100_000, "line 4"),
    (b'{"text": "\\ud800"}', "line 4: no text in UTF-8"), (b'{"text": "\xff"}', "line 4: no text in UTF-8")])
def test_a_bad_jsonl_line_is_reported_or_counted(line, says, tmp_path, capsys):
    forms, docs = write_own(tmp_path)
    path = tmp_path / forms["jsonl"]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    config = data.DataConfig(files=f"a={path}", tokenizer="bytes", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"a.jsonl, {says}") as error:
        data.prepare(config, 261)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    assert data.prepare(replace(config, skip_bad=True), 261).domains["a"].documents == 80
    assert "a.jsonl: 1 bad records of 81 left out" in capsys.readouterr().out


def test_files_without_text_are_reported(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 500)[:-9])
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": " "}\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "some").mkdir()
    (tmp_path / "some/x.txt").write_bytes(b"abc\xff")
    for path, says in (("a.jsonl.gz", "damaged gzip"), ("b.jsonl.gz", "damaged gzip"),
                       ("c.jsonl", "is empty"), ("none", "no .txt, .md, .jsonl"),
                       ("some", "x.txt is not UTF-8 at byte 3")):
        with pytest.raises(ValueError, match=says):
            data.prepare(data.DataConfig(files=f"a={tmp_path / path}", cache=str(tmp_path / "cache")), 300)


def test_the_cache_knows_how_a_file_was_read(tmp_path):
    """The same bytes under another name are read as that name says, and not taken from the old shards."""
    lines = "\n".join(json.dumps(dict(text=f"document number {i}")) for i in range(300)).encode()

    def documents(name, raw=lines):
        (tmp_path / name).write_bytes(raw)
        config = data.DataConfig(files=f"mine={tmp_path / name}", tokenizer="bytes",
                                 cache=str(tmp_path / "cache"))
        return data.prepare(config, 300).domains["mine"].documents
    assert documents("a.txt") == 2, "one document, whose last tenth is validation"
    assert documents("a.jsonl") == documents("a.json") == 300
    assert documents("b.jsonl.gz", gzip.compress(lines)) == 300
    assert documents("b.jsonl", gzip.compress(lines)) == 300, "what is packed is known by its first bytes"
    with pytest.raises(ValueError, match="c.jsonl.gz is a damaged gzip file"):
        documents("c.jsonl.gz", lines)


def test_reading_a_folder_reports_what_is_read_and_what_is_skipped(tmp_path, capsys):
    """In any case, gzipped or not; hidden files, other types and pipes are skipped, links are followed."""
    folder, records = tmp_path / "mine", [dict(text=f"record {i}") for i in range(3)]
    for path in ("dir.txt", ".git", ".ipynb_checkpoints", "deep"):
        (folder / path).mkdir(parents=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else/there.txt").write_text("elsewhere")
    (folder / "A.TXT").write_text("big letters")
    (folder / "deep/b.MD.GZ").write_bytes(gzip.compress(b"packed"))
    (folder / "c.JSONL").write_text("\n".join(map(json.dumps, records)))
    (folder / "d.json").write_text(json.dumps(records, indent=2))
    (folder / "dir.txt/e.json.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    (folder / "one.json").write_text(json.dumps(dict(text="only one"), indent=2))
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "none.txt").write_text(" \n")
    for path in (".git/x.txt", "._A.txt", ".ipynb_checkpoints/y-checkpoint.md", "picture.png"):
        (folder / path).write_text("not this")
    (folder / "link").symlink_to(tmp_path / "else")
    (folder / "up").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe.txt")
    found = data.documents("mine", str(folder))
    texts = [record["text"] for record in records]
    assert sorted(found) == sorted(["big letters", "packed", "elsewhere", "only one", *texts * 3])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"mine={folder}: 7 files, 13 documents, 106 bytes; left out: " in said
    for part in ("3 hidden (.git, .ipynb_checkpoints, ._A.txt)", "1 of another kind (picture.png)",
                 "1 empty (none.txt)", "2 neither file nor folder (gone.txt, pipe.txt)",
                 "1 read already (up)", "1 without a `text` (package.json)"):
        assert part in said, (part, said)
    with pytest.raises(ValueError, match="pipe.txt is a pipe or a device"):
        data.documents("mine", str(folder / "pipe.txt"))
    with pytest.raises(ValueError, match="package.json, record 1: no JSON object"):
        data.documents("mine", str(folder / "package.json"))
    config = data.DataConfig(files=f"mine={folder}", tokenizer="bytes", cache=str(tmp_path / "cache"))
    data.prepare(config, 300)
    assert "% are validation" in capsys.readouterr().out


def test_a_start_rereads_only_what_has_changed(tmp_path, monkeypatch):
    """Text with unchanged size and mtime is not read again, and later processes of a launch trust the first
    one. Changed text is read again, and the next launch finds damage."""
    path = tmp_path / "mine.txt"
    config = data.DataConfig(files=f"mine={tmp_path / 'mine.txt'}", domains="mine:1:1", tokenizer="bytes",
                             cache=str(tmp_path / "cache"))
    path.write_text("One line after another. " * 400)
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    read, hashed, sha256 = [], [], data.sha256
    watched_open = lambda p, *mode: read.append(str(p)) or open(p, *mode)
    watched_sha256 = lambda *p: hashed.extend(type(part) for part in p) or sha256(*p)
    monkeypatch.setattr(data, "open", watched_open, raising=False)
    monkeypatch.setattr(data, "sha256", watched_sha256)

    def start(launch):
        read.clear(), hashed.clear()
        fingerprint = data.prepare(config, 300, launch).fingerprint
        return fingerprint, str(path) in read, np.memmap in hashed
    first, *_ = start("a")
    assert start("a") == (first, False, False), "text is trusted by its mtime, shards by the first process"
    assert start("b") == (first, False, True) == start("")
    path.write_text("One line after another! " * 400)              # same size, less than two seconds old
    second, was_read, _ = start("b")
    assert was_read and second != first
    path.write_text("One line after another? " * 400)
    assert start("b")[0] not in (first, second), "same size and possibly the same mtime"

    shard = max(Path(config.cache).glob("*-train.bin"), key=lambda p: p.stat().st_mtime_ns)
    right, about = data.prepare(config, 300).fingerprint, shard.stat()
    raw = bytearray(shard.read_bytes())
    raw[0] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))     # bit rot: size and mtime do not show it
    assert data.prepare(config, 300, "c").fingerprint == right and shard.read_bytes() != bytes(raw)
    odd = json.dumps(dict(files={str(path): [1]}, launch="c"))
    contents = "[" * 10 ** 5, "[]", '{"files": 3}', odd
    for name, junk in itertools.product(("sources.json", "verified.json"), contents):
        Path(config.cache, name).write_text(junk)
        assert data.prepare(config, 300, "c").fingerprint == right, name


@pytest.mark.parametrize("blank", " \t\u3000\f\n")
def test_a_million_blanks_in_a_row_round_trip(blank, corpus):
    text = f"a{blank * 1_000_000}b"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).tolist()) == text


def test_bpe_bounds_the_length_of_a_word(monkeypatch, capsys):
    """Text without blanks is cut into pieces of a bounded length, and the merges are those of the pieces."""
    monkeypatch.setattr(data, "LONGEST", 8)
    text = "".join(random.choice("ACGT") for _ in range(4000))
    pieces = " ".join(text[i:i + 8] for i in range(0, 4000, 8))
    monkeypatch.setattr(data, "PATTERN", r"[^ ]+")
    assert data.train_bpe([text], 300) == data.train_bpe([pieces], 300)
    assert max(map(len, data.train_bpe([text * 3], 400))) <= 8


def test_settings_saved_in_a_tokenizer_change_no_text(tmp_path):
    """Truncation, padding and dropout are switched off; parts that alter the text are refused by name."""
    tokenizers = pytest.importorskip("tokenizers")
    config, text = own(tmp_path, "bpe")
    ours = data.prepare(config, 300).tokenizer
    huggingface.save_tokenizer(ours, tmp_path)
    kept = (tmp_path / "tokenizer.json").read_text()
    theirs = tokenizers.Tokenizer.from_str(kept)
    theirs.enable_truncation(16)
    theirs.enable_padding(length=9000)
    theirs.model.dropout = 0.5
    theirs.save(str(tmp_path / "tokenizer.json"))
    read = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert read.encode(text).tolist() == read.encode(text).tolist() == ours.encode(text).tolist()
    for key, value in (("normalizer", dict(type="Lowercase")), ("normalizer", dict(type="NFKC")),
                       ("pre_tokenizer", dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True,
                                              use_regex=True))):
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(kept) | {key: value}))
        with pytest.raises(ValueError, match="tokenizer.json changes text.*" + value["type"]):
            data.load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "-x", "a b", "x" * 65, "ä"])
def test_a_domain_name_cannot_escape_the_cache(name, tmp_path):
    (tmp_path / "mine.txt").write_text("text " * 500)
    for files, domains in ((f"{name}={tmp_path / 'mine.txt'}", "prose:1:1"), ("", f"{name}:1:1")):
        config = data.DataConfig(files=files, domains=domains, cache=str(tmp_path / "in" / "cache"))
        with pytest.raises(ValueError, match="is no name: letters, digits"):
            data.prepare(config, 300)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("text", [
    "[" * 100_000, "[1, 2]", "3", "null", '{"pieces": 3}', '{"pieces": ["zz"]}', '"x"',
    '{"pieces": ["61"], "name": "x", "pattern": "[", "fingerprint": ""}',
    '{"huggingface": 3, "eot": 1}', '{"huggingface": "{}", "eot": "x"}',
    '{"huggingface": "{}", "eot": true}', '{"pieces": [null, 1.5]}'])
def test_a_broken_tokenizer_file_raises_a_one_line_error(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    expected = "damaged|tokenizer_config.json|not a tokenizer|pip install"
    with pytest.raises(ValueError, match=expected) as error:
        data.load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def prepare_in_child(config, queue):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        queue.put((data.prepare(config, 300).fingerprint, out.getvalue()))
    queue.close()


def test_several_processes_can_prepare_at_once(tmp_path):
    """All processes get the same corpus, and exactly one of them builds it."""
    config, _ = own(tmp_path, "bpe")
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    children = [fork.Process(target=prepare_in_child, args=(config, queue)) for _ in range(3)]
    for child in children: child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children: child.join(60)
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert sorted(out == "" for _, out in found) == [False, True, True]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def write_rows(path, rows, **options):
    """Rows in the format that the name says. A test that needs a missing package is skipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        importlib.import_module("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, **options)
        return
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix in (".zst", ".zstd"):
        raw = pytest.importorskip("backports.zstd").compress(raw)
    path.write_bytes(raw)


def numbered(start, n=3, **fields):
    return [dict(fields, text=f"document {start + i}", number=start + i) for i in range(n)]


def texts_of(path, **options):
    found = data.rows("x", str(path), data.DataConfig(**options))
    return sorted(int(row.text.split()[-1]) for row in found)


@pytest.mark.parametrize("kind, kept, left_out", [
    ("fineweb2", "kor_Hang/train/1.parquet jpn_Jpan/train/1.parquet",
     "kor_Hang/test/1.parquet kor_Hang_removed/train/1.parquet kor_Hang_removed/test/1.parquet README.md"),
    ("finemath", "finemath-3plus/1.parquet infiwebmath-4plus/1.parquet", "finemath-4plus/1.parquet"),
    ("finemath", "finemath-4plus/1.parquet", ""),
    ("dclm", "global/local/1.jsonl.zstd global/local/2.jsonl.zst", "filtered/1.parquet sizes.json"),
    ("dclm", "filtered/1.parquet", ""),
    ("txt360", "data/common-crawl/d/1-1/1.jsonl.gz data/stackexchange/1-1/1.jsonl",
     "TxT360_BestOfWeb/1.jsonl.gz TxT360_QA/1.jsonl.gz a.parquet"),
    ("txt360", "TxT360_BestOfWeb/1.jsonl.gz", "TxT360_QA/1.jsonl.gz"),
    ("fineweb-edu", "data/CC-MAIN-2013-20/1.parquet", "sample/10BT/1.parquet"),
    ("fineweb-edu", "sample/350BT/1.parquet", "sample/10BT/1.parquet sample/100BT/1.parquet")])
def test_the_traps_of_published_sets_are_left_out(tmp_path, kind, kept, left_out):
    for path in (kept + " " + left_out).split():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    source, others = data.find_source("x", f"{kind}:{tmp_path}", data.DataConfig())
    below = lambda files: {os.path.relpath(file, tmp_path) for file in files}
    assert below(source.files) == set(kept.split())
    assert set().union(*map(below, others.values())) == set(left_out.split())


def test_fineweb2_is_read_without_its_rejects(tmp_path, capsys):
    rows = [dict(text=f"문서 {i}", id="<urn>", dump="CC-MAIN-2014-10", url="u", date="d", file_path="f",
                 language="kor", language_score=.9 + i / 100, language_script="Hang",
                 minhash_cluster_size=1 + i, top_langs='{"kor_Hang_score": 0.9}') for i in range(4)]
    root = tmp_path / "data"
    for i, folder in enumerate(("kor_Hang/train", "kor_Hang/test", "kor_Hang_removed/train")):
        write_rows(root / folder / "000_00000.parquet",
                   [dict(row, text=f"{i} {row['text']}") for row in rows])
    config = data.DataConfig(where="quality>=0.92,x:language_script=Hang")
    found = list(data.rows("x", f"fineweb2:{root}", config))
    assert [(row.text, row.number) for row in found] == [("0 문서 2", 3), ("0 문서 3", 4)]
    said = capsys.readouterr().out
    for part in ("1 of FineWeb2's test split", "1 rejected by FineWeb2's own filters (000_00000.parquet)",
                 "2 rows not quality>=0.92", "text from `text` (there are: text, id, dump, "):
        assert part in said, (part, said)
    for path in ("kor_Hang_removed", "kor_Hang_removed/train", "kor_Hang_removed/train/000_00000.parquet",
                 "kor_Hang/test"):
        with pytest.raises(ValueError, match="nothing but files (rejected|of FineWeb2's test)"):
            list(data.rows("x", f"fineweb2:{root / path}", data.DataConfig()))
    assert len(list(data.rows("x", str(root), data.DataConfig()))) == 12
    assert "this looks like fineweb2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no field 'int_score'; it has: text, id, .*top_langs"):
        list(data.rows("x", f"fineweb2:{root}", data.DataConfig(where="int_score>=4")))


def test_fineweb2_repeats_documents_by_the_size_of_their_cluster(tmp_path):
    often = {1: 1, 2: 2, 3: 3, 4: 3, 5: 5, 99: 5, 100: 8, 999: 8, 1000: 1, 10 ** 6: 1}
    rows = [dict(text=f"document {i} of {size}", minhash_cluster_size=size)
            for size in often for i in range(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    files = [str(tmp_path / "a.jsonl")]
    source = data.Source("x", str(tmp_path), files, "fineweb2", "", "text", False, True, True)
    counts = Counter()
    plan = data.Plan(source, [files], str(tmp_path), 2, "", "")
    found = list(data.chosen_documents(plan, files, None, counts, [0]))
    assert counts["rows"] == len(rows) and all(one != other for one, other in zip(found, found[1:]))
    times = Counter((side, text) for _, _, side, text in found)
    assert len(times) == len(rows) and len({side for side, _ in times}) == 2
    for (side, text), n in times.items():
        assert n == (1 if side else often[int(text.split()[-1])]), (side, text)
    for files, clean in (("x=dclm:a", False), ("x=fineweb2:a", True)):
        with pytest.raises(ValueError, match="rehydrate: needs --data.files=NAME=fineweb2:PATH"):
            data.parse_domains(data.DataConfig(files=files, clean=clean, rehydrate=True))


def test_finemath_does_not_count_its_best_documents_twice(tmp_path, capsys):
    """4plus is contained in 3plus. The two families differ in columns and widths."""
    pa = pytest.importorskip("pyarrow")
    wide = dict(url="u", fetch_time=1, content_mime_type="text/html", warc_filename="w", warc_record_offset=1,
                warc_record_length=2, token_count=3, char_count=4, metadata="{}", score=4.1, int_score=4,
                crawl="c", snapshot_type="s", language="en", language_score=.9)
    narrow = {name: wide[name] for name in ("url", "metadata", "score", "int_score", "token_count",
                                            "char_count")}
    for folder, rows in (("finemath-3plus", numbered(0, **wide)), ("finemath-4plus", numbered(0, 1, **wide)),
                         ("infiwebmath-4plus", numbered(10, **narrow))):
        path = tmp_path / folder / "train-00000-of-00064.parquet"
        write_rows(path, rows)
        if folder.startswith("fine"):
            table = importlib.import_module("pyarrow.parquet").read_table(path)
            at = table.schema.get_field_index("token_count")
            table = table.set_column(at, "token_count", table["token_count"].cast(pa.int32()))
            importlib.import_module("pyarrow.parquet").write_table(table, path)
    assert texts_of(f"finemath:{tmp_path}", where="int_score>=4") == [0, 1, 2, 10, 11, 12]
    assert "1 contained in 3plus" in capsys.readouterr().out
    assert texts_of(f"finemath:{tmp_path}/finemath-4plus") == [0]


def test_dclm_is_read_although_its_structs_do_not_unify(tmp_path, capsys):
    """Some rows have WARC fields that others lack; the suffix is .zstd; the parquet copy is left out."""
    prob = datasets.SETS["dclm"].quality
    rows = numbered(0, 6, language_id_whole_page_fasttext=dict(en=.9), warcinfo="a: b\r\nc: d",
                    previous_word_count=9, bff_contained_ngram_count_before_dedupe=0)
    for i, row in enumerate(rows):
        row |= {"metadata": {"WARC-Type": "response"}, prob: i / 10}
        if i % 2:
            row["metadata"] = dict(row["metadata"], **{"WARC-Truncated": "length"})
    shard = tmp_path / "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zstd"
    write_rows(shard, rows)
    (tmp_path / "filtered").mkdir()
    (tmp_path / "filtered/part.parquet").write_bytes(b"PAR1, not read")
    where = "quality>0.2,language_id_whole_page_fasttext.en>=0.9"
    assert texts_of(f"dclm:{tmp_path}", where=where) == [3, 4, 5]
    said = capsys.readouterr().out
    assert "3 rows not quality>0.2" in said and "1 a copy of the .jsonl.zstd (part.parquet)" in said
    assert texts_of(f"dclm:{shard}") == [*range(6)]
    raw = shard.read_bytes()
    for cut in (raw[:-1], raw[:len(raw) // 2], raw[:5]):
        shard.write_bytes(cut)
        with pytest.raises(ValueError, match="shard_00000000_processed.jsonl.zstd is a damaged zstd file"):
            texts_of(f"dclm:{tmp_path}")
    shard.write_bytes(raw + raw)
    assert texts_of(f"dclm:{tmp_path}") == sorted([*range(6)] * 2), "every frame is read"


def test_txt360_keeps_its_buckets_and_leaves_out_its_copies(tmp_path, capsys):
    web = tmp_path / "data/common-crawl/CC-MAIN-2013-20"
    for start, bucket in ((0, "1-1"), (10, "2-5"), (20, "101-1000")):
        rows = numbered(start, 2, meta={"dup_signals": {"dup_details": {f"2013-{start}": None}}})
        write_rows(web / bucket / "chunk_000_0000.jsonl.gz", rows)
    write_rows(tmp_path / "data/stackexchange/1-1/0_2289.jsonl", numbered(30, 2, meta={}))
    write_rows(tmp_path / "TxT360_BestOfWeb/1-1/chunk.jsonl.gz", numbered(0, 2, meta={}))
    write_rows(tmp_path / "TxT360_QA/1-1/chunk.jsonl.gz", numbered(0, 2, meta={}))
    (tmp_path / "README.md").write_text("not text to train on")
    assert texts_of(f"txt360:{tmp_path}") == [0, 1, 10, 11, 20, 21, 30, 31]
    said = capsys.readouterr().out
    assert "2 a copy of other documents here" in said and "1 of another kind (README.md)" in said
    assert texts_of(f"txt360:{tmp_path}", where="bucket!=1-1") == [10, 11, 20, 21]
    assert texts_of(f"txt360:{tmp_path}/TxT360_QA") == [0, 1], "a copy alone is no copy"


def test_the_name_of_the_folder_itself_is_no_trap(tmp_path, capsys):
    """Only the folders below say that a file is of a test split, or a sample of others."""
    for kind, path in (("fineweb2", "test/train/1.parquet"), ("fineweb-edu", "data/sample/10BT/1.parquet"),
                       ("fineweb-edu", "sample/10BT/1.parquet")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        root = tmp_path / path.partition("/")[0]
        source, others = data.find_source("x", f"{kind}:{root}", data.DataConfig())
        assert source.files == [f"{tmp_path}/{path}"] and not others


def test_two_domains_of_one_set_that_share_text_are_named(tmp_path):
    for path in ("finemath-3plus", "finemath-4plus", "infiwebmath-3plus"):
        (tmp_path / path).mkdir()
        (tmp_path / path / "1.parquet").write_bytes(b"PAR1")
    sources = [data.find_source(path[:3] + path[-5], f"finemath:{tmp_path}/{path}", data.DataConfig())[0]
               for path in ("finemath-3plus", "finemath-4plus", "infiwebmath-3plus")]
    assert list(data.datasets().twice(sources)) == ["warning: fin3 and fin4 share text: contained in 3plus"]
    same = [sources[2], sources[2]._replace(name="again")]
    assert list(data.datasets().twice(same)) == ["warning: inf3 and again share text: the same files"]


def test_the_cache_knows_the_buckets_of_txt360(tmp_path):
    """Folders that change their names change what a condition lets through, not the files."""
    for bucket in ("1-1", "2-5"):
        write_rows(tmp_path / f"x/{bucket}/a.jsonl", numbered(0, 60, meta={}) * (2 if bucket == "1-1" else 1))
    config = data.DataConfig(files=f"x=txt360:{tmp_path}/x", tokenizer="bytes", where="bucket=1-1",
                             cache=str(tmp_path / "cache"))
    assert data.prepare(config, 261).domains["x"].documents >= 60
    os.rename(tmp_path / "x/1-1", tmp_path / "x/1-10")
    with pytest.raises(ValueError, match="is empty"): data.prepare(config, 261)


def test_a_packed_file_is_known_by_its_first_line(tmp_path):
    (tmp_path / "shard.gz").write_bytes(gzip.compress(b'{"text": "document 5"}\n{"text": "document 6"}\n'))
    assert texts_of(tmp_path / "shard.gz") == [5, 6]
    (tmp_path / "shard.gz").write_bytes(gzip.compress(b"document 7"))
    assert texts_of(tmp_path / "shard.gz") == [7]


def test_fineweb_edu_reads_one_of_its_samples(tmp_path):
    for i, folder in enumerate(("sample/10BT", "sample/100BT", "data/CC-MAIN-2024-10")):
        write_rows(tmp_path / folder / "000_00000.parquet", numbered(10 * i, score=3.1, int_score=3))
    assert texts_of(f"fineweb-edu:{tmp_path}") == [20, 21, 22]
    assert texts_of(f"fineweb-edu:{tmp_path}/sample") == [10, 11, 12]
    assert texts_of(f"fineweb-edu:{tmp_path}/sample/10BT", where="int_score>=3,int_score<4") == [0, 1, 2]


@pytest.mark.parametrize("item, expected", [
    ("number>=2", [2, 3]), ("number>2", [3]), ("number<=1", [0, 1]), ("number<1", [0]), ("number=2", [2]),
    ("number==2", [2]), ("number!=2", [0, 1, 3]), ("a.b>1", [2, 3]), ("kind=even", [0, 2]), ("ok=TRUE", [0]),
    ("kind>even", [1, 3]), (" number >= 1 , number < 3 ", [1, 2]), ("x:number=1,other:number=2", [1]),
    ("maybe=1", [0])])
def test_conditions_choose_rows(tmp_path, item, expected):
    rows = [dict(text=f"document {i}", number=i, a=dict(b=i), kind=("even", "odd")[i % 2], ok=i == 0,
                 maybe=None if i else 1) for i in range(4)]
    write_rows(tmp_path / "a.jsonl", rows)
    assert texts_of(tmp_path / "a.jsonl", where=item) == expected


@pytest.mark.parametrize("item, says", [
    ("number", "'number' is not FIELD>=VALUE"), ("number>=", "'number>=' is not"), ("number=>1", "is not"),
    ("__import__('os')>1", "is not"), ("score>1", "no field 'score'; it has: text, number"),
    ("number>many", "'number' is a number in .*a.jsonl"), ("text.x=1", "no field 'text.x'"),
    ("number>=4,typo>=1", "no field 'typo'; it has: text, number, ok, more, late"),
    ("number>nan", "is a number"), ("ok=maybe", "'ok' is true or false in"),
    ("more.typo=1", "no field 'more.typo'; it has: x, text")])
def test_a_condition_that_makes_no_sense_is_refused(tmp_path, item, says):
    rows = [dict(text="document 1", number=1, ok=True, more=dict(x=1)), dict(text="document 2", late=2)]
    write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=says):
        texts_of(tmp_path / "a.jsonl", where=item)


@pytest.mark.parametrize("item, expected", [
    ("n>=4", [1, 4]), ("late>=1", [3]), ("late!=2", [3]), ("language=nan", [2, 4]), ("ok=1", [1]),
    ("ok=False", [2]), ("year<999", [3]), ("year=1000", [3])])
def test_a_string_is_no_number_and_a_missing_field_meets_nothing(tmp_path, item, expected):
    """The first row lacks a field; only in a .csv are strings of digits numbers."""
    rows = [dict(n=10, ok=True), dict(n=3, ok=False, language="nan"), dict(late=1, year="1000"),
            dict(n=4.5, language="nan", year="999")]
    write_rows(tmp_path / "a.jsonl", [dict(row, text=f"document {i}") for i, row in enumerate(rows, 1)])
    assert texts_of(tmp_path / "a.jsonl", where=item) == expected
    lines = b"text,n,language\ndocument 1,10,nan\ndocument 2,9,0x\ndocument 3,,7\n"
    (tmp_path / "a.csv").write_bytes(lines)
    for where in ("n>=9.5", "language=nan"):
        assert texts_of(tmp_path / "a.csv", where=where) == [1]


def csv_file(*rows):
    return "\n".join(["id,text", *rows, ""]).encode()


@pytest.mark.parametrize("name, raw, says", [
    ("a.csv", csv_file('1,"two\nlines, 1"', "2,document 2"), [1, 2]),
    ("a.csv", b"\xef\xbb\xbf" + csv_file("1,document 1"), [1]),
    ("a.csv.gz", gzip.compress(csv_file("1,document 1")), [1]),
    ("a.csv", csv_file("1,document 1", "2"), "a.csv, row 2: no string in the column `text`"),
    ("a.csv", csv_file("1,document 1", "2,b,c"), "a.csv, row 2: no string"),
    ("a.csv", csv_file("1,document 1") + b"2,\xe9\n", "a.csv, row 2: no text in UTF-8"),
    ("a.csv", csv_file("1,document 1", '2,"cut sho'), "a.csv, row 2: unexpected end of data"),
    ("a.csv", b"id,body\n1,x\n", "no column 'text'; it has: id, body; name one with --data.column"),
    ("a.csv", b"", "no column 'text'; it has: none"),
    ("a.jsonl", gzip.compress(b'{"text": "document 7"}\n'), [7]),
    ("a.jsonl", b'{"text": "document 1"}\n{"text": null}\n', "a.jsonl, line 2: no JSON object with a string"),
    ("a.jsonl", b'{"body": "x", "id": 3}\n', "line 1: no JSON object with a string `text`, only body, id;"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "document 1"}\n' * 999)[:-9], "a.jsonl.gz is a damaged gzip"),
    ("a.jsonl.gz", b"", "a.jsonl.gz is a damaged gzip file"),
    ("a.jsonl.zst", b'{"text": "x"}\n', "a.jsonl.zst is a damaged zstd file"),
    ("a.parquet", b"<html>404</html>", "a.parquet is a damaged parquet file")])
def test_tables_and_damaged_files(tmp_path, name, raw, says):
    """Either the numbers of the documents, or a line that names the file and the row."""
    (tmp_path / name).write_bytes(raw)
    if isinstance(says, list):
        assert texts_of(tmp_path / name) == says
        return
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        texts_of(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_rows_of_a_parquet_file_are_named_or_counted(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    parquet, path = importlib.import_module("pyarrow.parquet"), tmp_path / "a.parquet"
    some = [b"document 1", None, b"\xff", b"document 4", b" "]
    for kind in (pa.binary(), pa.large_binary()):
        parquet.write_table(pa.table(dict(text=pa.array(some, kind))), path)
        with pytest.raises(ValueError, match="a.parquet, row 2: no string in the column `text`"):
            texts_of(path)
        assert texts_of(path, skip_bad=True) == [1, 4]
        assert "2 rows bad, 1 row blank" in capsys.readouterr().out
    words = pa.array(["document 1", "document 1", "document 2"])
    for column in (words.dictionary_encode(), words.cast(pa.large_string())):
        parquet.write_table(pa.table(dict(text=column)), path)
        assert texts_of(path) == [1, 1, 2]
    raw = path.read_bytes()
    for cut in (raw[:-1], raw[:40]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="a.parquet is a damaged parquet file"):
            texts_of(path)
    parquet.write_table(pa.table(dict(text=[1, 2], tags=[["a"], ["b"]])), path)
    for column, says in (("text", "column 'text' is int64"), ("tags", "column 'tags' is list"),
                         ("body", "no column 'body'; it has: text, tags")):
        with pytest.raises(ValueError, match=says):
            texts_of(path, column=column)
    path.rename(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="int64"): texts_of(tmp_path / "b.txt")


def test_text_is_read_without_the_tables_beside_it(tmp_path, capsys):
    """Tables are read from a folder if nothing else in it is text; different tables are a mistake."""
    write_rows(tmp_path / "a.jsonl", numbered(1, 2))
    (tmp_path / "README.md").write_text("words 5")
    assert texts_of(tmp_path) == [1, 2, 5], "prose beside .jsonl has always been read"
    (tmp_path / "b.csv").write_bytes(csv_file("1,document 3"))
    (tmp_path / "c.txt.zst").write_bytes(b"not read")
    (tmp_path / "d.parquet").write_bytes(b"not read")
    left_out = "3 a table beside text: name it on its own (b.csv, c.txt.zst, d.parquet)"
    assert texts_of(tmp_path) == [1, 2, 5] and left_out in capsys.readouterr().out
    (tmp_path / "a.jsonl").rename(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("words 6")
    assert texts_of(tmp_path) == [5, 6] and left_out in capsys.readouterr().out
    (tmp_path / "a.txt").rename(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"text": "words 7"}]')
    assert texts_of(tmp_path) == [5, 7] and left_out in capsys.readouterr().out
    (tmp_path / "a.json").write_text('{"name": "words 7"}')
    with pytest.raises(ValueError, match="mixes .csv and .parquet: give each a name of its own"):
        texts_of(tmp_path)
    (tmp_path / "d.parquet").unlink()
    (tmp_path / "c.txt.zst").unlink()
    assert texts_of(tmp_path) == [3] and "2 beside the data (README.md, a.json)" in capsys.readouterr().out
    (tmp_path / "b.csv").rename(tmp_path / "c.jsonl.zst")
    source, _ = data.find_source("x", str(tmp_path), data.DataConfig())
    assert source.files == [f"{tmp_path}/c.jsonl.zst"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet", "backports", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, raw, says in (("a.parquet", b"PAR1", "pip install pyarrow"),
                            ("a.jsonl", b"\x28\xb5\x2f\xfd", "pip install backports.zstd"),
                            ("b.jsonl.zst", b"\x50\x2a\x4d\x18", "pip install backports.zstd")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name} is .*: {says}"): texts_of(tmp_path / name)


def test_motifs_mixture_asks_for_its_eight_domains():
    config = data.DataConfig(mixture="motif", files="web=w,korean=k")
    missing = "'multilingual', 'academic', 'specialized', 'reasoning' without text"
    with pytest.raises(ValueError, match=missing):
        data.parse_domains(config)
    names = "web multilingual korean academic specialized code math reasoning".split()
    files = ",".join(f"{name}=p" for name in names)
    found = data.parse_domains(replace(config, files=files))
    assert found[0] == names and [w.tolist() for w in found[1:3]] == list(map(list, MOTIF_MIXTURE))
    with pytest.raises(ValueError, match="'mortif' is unknown; known: motif"):
        data.parse_domains(replace(config, mixture="mortif"))


# Large text: LARGE is lowered, so that a few hundred kilobytes are streamed.

def large_text(tmp_path, files=4, n=300, repeat=True):
    """A folder of jsonl files → (configuration, {file name: its documents})"""
    rng, docs = random.Random(files), {}
    for f in range(files):
        words = lambda: " ".join(f"{rng.random():.6f}" for _ in range(rng.randrange(1, 40)))
        docs[f"{f}.jsonl"] = [f"{f} {i} {words()}" for i in range(n)]
        lines = [json.dumps(dict(text=doc)) for doc in docs[f"{f}.jsonl"]]
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / f"mine/{f}.jsonl").write_text("\n".join(lines + lines[:repeat]) + "\n\n")
        os.utime(tmp_path / f"mine/{f}.jsonl", (1e9, 1e9))
    config = data.DataConfig(files=f"mine={tmp_path}/mine", tokenizer="bytes", cache=str(tmp_path / "cache"))
    return config, docs


def shard_files(config):
    return {path.name: path.read_bytes() for path in Path(config.cache).rglob("*.jsonl-*")}


def test_a_large_file_gives_the_tokens_of_a_small_one(tmp_path, monkeypatch):
    """A domain of one shard has the windows and the digests that it has when it is held in memory."""
    config, _ = large_text(tmp_path, 1, 2000)
    small = data.prepare(config, 261)
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    large = data.prepare(replace(config, cache=str(tmp_path / "other")), 261)
    assert large.fingerprint == small.fingerprint and len(list(tmp_path.glob("other/mine-*/*.bin"))) == 3
    x = [data.Batches(corpus, config, 0, 8, 64)(3).x for corpus in (small, large)]
    assert torch.equal(*x)


def test_documents_held_in_memory_know_their_rows_too(tmp_path):
    config, docs = large_text(tmp_path, 3, 40)
    corpus = data.prepare(config, 261)
    for side in ("train", "val"):
        ids = getattr(corpus.domains["mine"], side)
        for at in range(0, len(ids), 997):
            file, row = data.origin(corpus, config, "mine", side, at)
            text = corpus.tokenizer.decode(ids[:at + 1]).split(data.EOT)
            assert docs[Path(file).name][row - 1].startswith(text[-1] or text[-2])


def test_shards_do_not_depend_on_the_workers(tmp_path, monkeypatch, capsys):
    """One shard for each file, in order; every document is on the side of its hash and knows its row."""
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    config, docs = large_text(tmp_path)
    found = data.prepare(config, 261, workers=1)
    said = capsys.readouterr().out
    assert "4 rows repeated in their shard" in said and "4 shards" in said, said
    other = replace(config, cache=str(tmp_path / "other"))
    assert data.prepare(other, 261, workers=3).fingerprint == found.fingerprint
    assert shard_files(config) == shard_files(other) and not list(tmp_path.rglob("*.tmp"))
    domain, eot = found.domains["mine"], found.tokenizer.eot
    assert domain.documents == 1200 and domain.train_bytes + domain.val_bytes == sum(
        len(doc) for part in docs.values() for doc in part)
    for side, shards in enumerate((domain.train, domain.val)):
        for i, (name, part) in enumerate(docs.items()):
            ids = shards.arrays[i]
            texts = found.tokenizer.decode(ids).split(data.EOT)[:-1]
            assert texts == [doc for doc in part if data.is_validation(data.sha256(doc)) == side]
            for at in (0, len(ids) // 2, len(ids) - 1):
                before = sum(shards.counts[:i])
                file, row = data.origin(found, config, "mine", ("train", "val")[side], before + at)
                assert file.endswith(name) and part[row - 1] == texts[(ids[:at] == eot).sum()]


def test_windows_are_numbered_across_shards(tmp_path, monkeypatch):
    """Each is seen once an epoch; none crosses a shard's end; the global batch does not depend on ranks."""
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    config, _ = large_text(tmp_path, 3, 40)
    (tmp_path / "mine/1b.jsonl").write_text('{"text": "short"}')
    corpus = data.prepare(config, 261)
    T, domain = 64, corpus.domains["mine"]
    batches = data.Batches(corpus, config, 5, 4, T)
    expected = [tuple(domain.train.arrays[i][k:k + T + 1].tolist()) for i in range(4)
                for k in range(0, len(domain.train.arrays[i]) - T, T)]
    W = len(expected)
    assert batches.windows.tolist() == [W] and len(set(expected)) == W > 50
    seen = [tuple(row.tolist()) for s in range(W // 2 + 1) for b in [batches(s)]
            for row in torch.cat([b.x, b.y[:, -1:]], 1)]
    assert sorted(seen[:W]) == sorted(expected) != seen[:W]
    parts = [batches(7, rank, 2).x for rank in range(2)]
    assert torch.equal(torch.cat(parts), batches(7).x)
    x, y, *_ = batches.val("mine")
    assert len(x) == sum(max(0, (n - 1) // T) for n in domain.val.counts)
    whole = np.concatenate([domain.train.arrays[i] for i in range(4)])
    assert all(domain.train[:n].tolist() == whole[:n].tolist() for n in (0, 9, 5555, len(whole), 10 ** 9))
    with pytest.raises(ValueError, match="tokens, in no shard as many as a window: context 11111"):
        data.Batches(corpus, config, 0, 4, 10 ** 5 // 9)


def test_shards_made_anew_change_nothing_for_a_run_that_began(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    config, _ = large_text(tmp_path, 2)
    first, untouched = [data.Batches(data.prepare(config, 261), config, 0, 4, 64) for _ in range(2)]
    expected = [first(step).x for step in range(20)]
    for i in "01":
        text = (tmp_path / f"mine/{i}.jsonl").read_text()
        (tmp_path / f"mine/{i}.jsonl").write_text(text[:len(text) // 2].rpartition("\n")[0])
    assert data.prepare(config, 261).fingerprint != first.corpus.fingerprint
    assert all(torch.equal(untouched(step).x, x) for step, x in enumerate(expected))

    # A manifest that changes while the shards are mapped, and a shard that is too short.
    class Raced(data.Shards):
        def __init__(self, paths, *options):
            super().__init__(paths, *options)
            about = Path(str(paths[0]).replace("-train.bin", ".json").replace("-val.bin", ".json"))
            about.write_text(about.read_text().replace('"sha256": ["', '"sha256": ["0'))
    monkeypatch.setattr(data, "Shards", Raced)
    with pytest.raises(ValueError, match="another process has made these shards anew: start again"):
        data.prepare(config, 261)
    monkeypatch.undo()
    (tmp_path / "a.bin").write_bytes(bytes(20))
    with pytest.raises(ValueError, match="a.bin: 10 tokens, not 11: start again"):
        data.Shards([tmp_path / "a.bin"], [11], "<u2")


def test_small_files_share_a_shard(tmp_path, monkeypatch, capfd):
    """Windows cross from file to file; a document knows its file; nothing changes with the workers."""
    monkeypatch.setattr(data, "LARGE", 0)
    config, docs = large_text(tmp_path, 60, 5)
    sizes = [os.stat(file).st_size for file in sorted((tmp_path / "mine").iterdir())]
    parts = data.parts_of(sorted((tmp_path / "mine").iterdir()))
    assert [len(part) for part in parts] == [60]
    monkeypatch.setattr(data, "PART", sum(sizes) // 3)
    corpus = data.prepare(config, 261, workers=2)
    assert "60 files" in capfd.readouterr().out
    domain = corpus.domains["mine"]
    found = data.Batches(corpus, config, 0, 1, 1024).train[0]
    shards = len(domain.train.arrays)
    assert shards in (3, 4) and len(found) * 1024 > len(domain.train) - shards * 1025
    assert f"{len(domain.train) - 1024 * len(found):,} of {len(domain.train):,} tokens are in no window" in \
        capfd.readouterr().out
    at = 0
    for ids in domain.train.arrays:
        for place in range(0, len(ids), 501):
            file, row = data.origin(corpus, config, "mine", "train", at + place)
            text = corpus.tokenizer.decode(ids[:place + 1]).split(data.EOT)
            assert docs[Path(file).name][row - 1].startswith(text[-1] or text[-2])
        at += len(ids)
    place = len(domain.train) // 2
    words = f"--files={config.files} --at={place} --tokenizer=bytes --cache={config.cache}"
    data.main(["origin", *words.split()])
    told = "mine: token %d is of %s, row %d" % (place, *data.origin(corpus, config, "mine", "train", place))
    assert told in capfd.readouterr().out
    os.utime(tmp_path / "mine/7.jsonl", (1e9 + 5, 1e9 + 5))
    assert data.prepare(config, 261).fingerprint == corpus.fingerprint
    assert Path(data.origin(corpus, config, "mine", "train", 0)[0]).name == "0.jsonl"


PREPARE = ("import sys, data; data.LARGE = data.PART = 0; "
           "data.prepare(data.DataConfig(files=sys.argv[1], tokenizer='bytes', cache=sys.argv[2]), 261)")


def prepare_outside(config, **options):
    return subprocess.Popen([sys.executable, "-c", PREPARE, config.files, config.cache], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


def test_a_killed_preparation_goes_on(tmp_path, monkeypatch):
    """Killed at any moment, alone or with its workers, and resumed: equal to the byte."""
    config, _ = large_text(tmp_path, 6, 2000)
    whole, began = prepare_outside(config), time.time()
    assert whole.wait(60) == 0, whole.stderr.read()
    took, expected = time.time() - began, shard_files(config)
    killed = replace(config, cache=str(tmp_path / "killed"))
    rng = random.Random(2)
    for i in range(3):
        process = prepare_outside(killed)
        time.sleep(took * rng.uniform(.3, 1))
        (os.killpg if i % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
    two = [prepare_outside(killed) for _ in range(2)]               # and two at once share the rest
    assert [process.wait(60) for process in two] == [0, 0], [process.stderr.read() for process in two]
    assert shard_files(killed) == expected and len(expected) == 24


def test_a_shard_is_claimed_by_one_process(tmp_path):
    """While one process makes the shards of a file, another passes them over, and takes those of the next."""
    source = data.Source("x", str(tmp_path), [], "", "", "text", False, True, False)
    plan = data.Plan(source, [], str(tmp_path), 2, "", "")
    script = (f"import data\nfrom data import Plan, Source\nplan = {plan}\nfor name in 'ab':\n"
              f"    with data.claimed(plan, [f'{tmp_path}/{{name}}'], False) as mine: print(mine)")
    with data.claimed(plan, [f"{tmp_path}/a"], False) as mine:
        done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert mine and done.stdout == "False\nTrue\n", done.stderr


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    config, docs = large_text(tmp_path, 2, 3000)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, 99_999))
    process = prepare_outside(config, preexec_fn=small)
    _, said = process.communicate()
    assert process.returncode and "File too large; shards that are complete are kept" in said, said
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("mine-*/*.jsonl-*.json"))
    process = prepare_outside(config)
    assert process.wait(60) == 0 and len(shard_files(config)) == 8


def test_a_start_makes_only_what_has_changed(tmp_path, monkeypatch, capfd):
    """A file that was only touched is hashed, one that was changed or whose shards are damaged is made
    again; a digest is compared only on request. Adding a file makes only its shards."""
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    config, _ = large_text(tmp_path)
    first = data.prepare(config, 261).fingerprint
    shards = lambda: Path(config.cache).rglob("*-train.bin")
    made = lambda: {path.name[0] for path in shards() if path.stat().st_mtime_ns > since}

    def again(**options):
        nonlocal since
        since = max(path.stat().st_mtime_ns for path in shards())
        return data.prepare(replace(config, **options), 261).fingerprint
    since = 0
    assert again() == first and made() == set()
    os.utime(tmp_path / "mine/1.jsonl", (2e9 - 1e9 + 5, 1e9 + 5))
    assert again() == first and made() == set()
    capfd.readouterr()
    assert again() == first and capfd.readouterr().out == "", "the new time is known now"
    shard = next(Path(config.cache).rglob("2.jsonl-*-train.bin"))
    raw = bytearray(shard.read_bytes())
    raw[9] ^= 1
    shard.write_bytes(raw)
    assert again() == first and made() == set(), "the size is right"
    assert again(verify=True) == first and made() == {"2"} and shard.read_bytes() != raw
    shard.write_bytes(raw[:-2])
    assert again() == first and made() == {"2"}
    next(Path(config.cache).rglob("3.jsonl-*.json")).write_text("{")
    next(Path(config.cache).rglob("0.jsonl-*-rows.bin")).unlink()
    assert again() == first and made() == {"0", "3"}
    shutil.copy(tmp_path / "mine/0.jsonl", tmp_path / "mine/00.jsonl")
    assert again() != first and made() == {"0"}
    (tmp_path / "mine/00.jsonl").unlink()
    text = (tmp_path / "mine/1.jsonl").read_text()
    (tmp_path / "mine/1.jsonl").write_text(text.replace("0", "1"))
    assert again() != first and made() == {"1"}


@pytest.mark.parametrize("budget, documents, files", [
    ("450documents", 450, 2), ("10KB", None, 1), ("1TB", 1200, 4), ("300 documents", 300, 1)])
def test_a_budget_reads_the_first_files_only(tmp_path, budget, documents, files, capsys, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    config, docs = large_text(tmp_path)
    config = replace(config, budget=budget)
    domain = data.prepare(config, 261).domains["mine"]
    assert len(list(Path(config.cache).rglob("*-train.bin"))) == files
    size = domain.train_bytes + domain.val_bytes
    assert domain.documents == documents if documents else 10_000 <= size < 10_500
    capsys.readouterr()
    data.prepare(config, 261)
    assert capsys.readouterr().out == ""
    found = [row.text for row in data.rows("mine", str(tmp_path / "mine"), config)]
    if documents == 450:
        assert len(found) == 450
    for wrong in ("lots", "0MB", "5", "-1MB", "3 MBit"):
        with pytest.raises(ValueError, match="is not like 100MB, 2GB or 5000documents"):
            data.prepare(replace(config, budget=wrong), 261)


def test_a_small_budget_is_held_in_memory_and_reads_no_whole_file(tmp_path, monkeypatch):
    """Few documents get a validation side as without a budget, and no file is hashed for a part of it."""
    config, docs = large_text(tmp_path, 2, 6)
    small = data.prepare(replace(config, budget="14documents"), 261).domains["mine"]
    assert small.sha256 == data.prepare(config, 261).domains["mine"].sha256 and len(small.val)
    hashed, file_digest = [], data.file_digest
    monkeypatch.setattr(data, "file_digest",
                        lambda path, *head: hashed.append(str(path)) or file_digest(path, *head))
    data.prepare(replace(config, budget="1KB"), 261)
    with pytest.raises(ValueError, match="budget: 9documents of mine are too long for it: give it in MB"):
        with mock.patch.object(data, "LARGE", 99): data.documents("mine", str(tmp_path / "mine"),
                                                                  replace(config, budget="9documents"))
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "run_workers", lambda plan, *_: data.work(plan, 1, lambda **seen: None))
    for budget in ("1KB", "5documents"):
        some = replace(config, budget=budget)
        first = data.prepare(some, 261).fingerprint
        assert not any(path.endswith(".jsonl") for path in hashed)
        os.utime(tmp_path / "mine/0.jsonl", (1e9 + 5, 1e9 + 5))
        assert data.prepare(some, 261).fingerprint == first
        text = (tmp_path / "mine/0.jsonl").read_text()
        (tmp_path / "mine/0.jsonl").write_text(text[:20] + "a" + text[20:])
        assert data.prepare(some, 261).fingerprint != first
    assert not any(path.endswith(".jsonl") for path in hashed)


def test_a_killed_worker_is_one_line(monkeypatch, tmp_path):
    config, _ = large_text(tmp_path, 1, 9)
    for error in (MemoryError(), concurrent.futures.process.BrokenProcessPool("a long story")):
        def fails(*args, **options): raise error
        monkeypatch.setattr(data, "prepare", fails)
        with pytest.raises(SystemExit, match="^data.py: a worker was killed, probably for memory: fewer"):
            data.main(["prepare", "--files=x=y"])
    monkeypatch.undo()
    monkeypatch.setattr(data, "LARGE", 0)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    monkeypatch.setattr(data, "progress", lambda *_: [process.kill() for process in started])
    with pytest.raises(ValueError, match="a worker was killed, probably for memory: fewer --workers; start"):
        data.prepare(config, 261)


def test_the_memory_of_a_worker_is_bounded(tmp_path, monkeypatch):
    """It suffices for text; a worker that may allocate nothing ends, and the run with it."""
    monkeypatch.setattr(data, "LARGE", 0)
    config, _ = large_text(tmp_path, 1, 9)
    monkeypatch.setattr(data, "WORKER_MEMORY", 250_000_000)
    data.prepare(config, 261)
    monkeypatch.setattr(data, "WORKER_MEMORY", 1_000_000)
    ends = "a worker (needs more than 1 MB of memory|was killed|process ended)"
    with pytest.raises(ValueError, match=ends):
        data.prepare(replace(config, skip_bad=True), 261)


def test_the_memory_of_a_worker_is_bounded_for_pages_of_any_size(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "WORKER_MEMORY", 250_000_000)
    rows = [dict(text=f"{i} " + "a long row " * 50_000) for i in range(600)]
    write_rows(tmp_path / "page.parquet", rows, write_batch_size=1024, use_dictionary=False,
               data_page_size=1 << 30)
    config = data.DataConfig(files=f"x={tmp_path / 'page.parquet'}", tokenizer="bytes",
                             cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="page.parquet, after row 0: a page of the column is too large"):
        data.prepare(config, 261)
    assert "Traceback" not in capfd.readouterr().err


def test_a_source_with_a_time_in_the_future_counts_as_settled(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    later = time.time() + 9e4
    os.utime(tmp_path / "a.txt", (later, later))
    record = {}
    data.digest(tmp_path / "a.txt", record)
    assert len(record) == 1


def test_long_rows_and_batches_are_bounded(tmp_path, monkeypatch):
    """A long row is refused in every format of large text; a batch of long texts goes alone; rows of a table
    that are or may be long are decoded one at a time; long words take no memory."""
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "LONGEST_ROW", 1000)
    long = [dict(text="document 1"), dict(text="x" * 1001)]
    (tmp_path / "a.csv").write_text("text\ndocument 1\n" + "é" * 501 + "\n")
    write_rows(tmp_path / "a.jsonl", long)
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(ValueError, match=f"{name}, (row|line) 2 is longer than 0 MB"):
            texts_of(tmp_path / name)
    (tmp_path / "a.json").write_text('{"text": "document 1"}\n' + json.dumps(long[1]))
    with pytest.raises(ValueError, match="a.json, line 2 is longer than"): texts_of(tmp_path / "a.json")
    held = []
    monkeypatch.setattr(data, "IN_FLIGHT", 10_000)

    def texts():
        for i in range(40):
            held.append(i)
            yield "x" * 9000
    found = data.in_pool(len, texts(), str, 9000, 8, data.ThreadPoolExecutor)
    assert next(found) == 1 and len(held) <= 2 and sum(found) == 39
    one, two = "a" * 300, "b" * 300
    assert len(set(data.shingles_of(f"{one} {two} c d e {one} {two} c d e").tolist())) == 5
    tracemalloc.start()
    assert len(data.shingles_of(" ".join([one * 1000] * 9))) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, peak
    pa = pytest.importorskip("pyarrow")
    write_rows(tmp_path / "a.parquet", long)
    with pytest.raises(ValueError, match="a.parquet, row 2 is longer than"): texts_of(tmp_path / "a.parquet")
    words = pa.RecordBatch.from_pydict(dict(text=pa.array(["x" * 10 ** 6] * 50).dictionary_encode()))
    plain = pa.RecordBatch.from_pydict(dict(text=["x" * 10 ** 6] * 50))
    for batch in (words, plain):
        tracemalloc.start()
        assert sum(1 for _ in datasets.batch_records(batch)) == 50
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6, peak


def test_the_last_piece_of_a_long_text_is_not_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)
    for end in ("the last", "", "x" * 150, "y" * 60):
        raw = (("x" * 24 + "\n") * 100 + end).encode()
        found = [text for _, text in data.pieces("a.txt", io.BytesIO(raw), 1600)]
        assert "".join(found).encode() == raw and all(49 <= len(text) <= 100 for text in found), found


def test_a_thousand_shards_start_in_two_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 0)
    monkeypatch.setattr(data, "PART", 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(data, "run_workers", lambda plan, *_: data.work(plan, 1, lambda **seen: None))
    config, _ = large_text(tmp_path, 1000, 4)
    first = data.prepare(config, 261)
    assert len(first.domains["mine"].train.paths) == 1000
    began = time.process_time()
    assert data.prepare(config, 261).fingerprint == first.fingerprint
    assert time.process_time() - began < 2


def test_bpe_learns_from_a_sample_of_large_text(tmp_path, monkeypatch, capsys):
    """Each domain gives its share, of training text alone, from files spread over the folder."""
    config, docs = large_text(tmp_path, 8, 200)
    (tmp_path / "small.txt").write_text("".join(f"small {i * i} words\n" for i in range(9000)))
    monkeypatch.setattr(data, "LARGE", 200_000)
    monkeypatch.setattr(data, "BPE_SAMPLE", 40_000)
    config = replace(config, files=f"{config.files},small={tmp_path}/small.txt", tokenizer="bpe",
                     domains="mine:0.5:1,small:0.5:0")
    sample, train_bpe = [], data.train_bpe
    monkeypatch.setattr(data, "train_bpe", lambda texts, size: sample.extend(texts) or train_bpe(texts, size))
    data.prepare(config, 300)
    large = [text for text in sample if "small" not in text]
    assert 30_000 <= sum(map(len, large)) < 34_000 and {text[0] for text in large} == set("01234567")
    assert not any(data.is_validation(data.sha256(text)) for text in large)
    assert "bpe: trained on 0.0 MB of mine" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Few batches are read ahead; workers do without torch; a long text file comes in pieces at line ends."""
    read, tokenizer = [], data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    monkeypatch.setattr(data, "BATCH", 2000)
    for threads in (1, 3):
        chosen = ((0, read.append(i) or i, i % 2, "x" * 100) for i in range(5000))
        batches = data.encoded(chosen, tokenizer, threads, "<u2")
        table, ids = next(batches)
        assert len(table) == 10 and len(ids[0]) == len(ids[1]) == 505 and len(read) <= 60
        assert [i for table, _ in batches for i in table[:, 1]] == [*range(10, 5000)], "the order is kept"
        read.clear()
    script = "import sys, data; print({'torch', 'pyarrow', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    monkeypatch.setattr(data, "PIECE", 100)
    text = "".join(f"é{i}" * (i % 9) + "\n" for i in range(300)) + "ü" * 700
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(data, "LARGE", 0)
    source, _ = data.find_source("x", str(tmp_path / "a.txt"), data.DataConfig())
    found = [row.text for row in data.rows_of_file(source, source.files[0], Counter())]
    assert "".join(found) == text and max(len(part.encode()) for part in found) <= 100 and len(found) > 40
    assert sum(part.endswith("\n") for part in found) > len(found) - 16
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"not UTF-8 at byte {len(text.encode())}"):
        list(data.rows_of_file(source, source.files[0], Counter()))
    assert "cut into documents of 100" in data.described(source)
    monkeypatch.setattr(data, "LONGEST_ROW", 1000)
    (tmp_path / "a.json").write_text(json.dumps(numbered(0, 99)))
    source, _ = data.find_source("x", str(tmp_path / "a.json"), data.DataConfig(budget="1TB"))
    with pytest.raises(ValueError, match="a.json is too long for an array in one piece: write it as .jsonl"):
        list(data.rows_of_file(source, source.files[0], Counter()))
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n' + json.dumps(dict(text="x" * 1000)))
    with pytest.raises(ValueError, match="a.jsonl, line 2 is longer than"): texts_of(tmp_path / "a.jsonl")


def test_seen_is_a_set():
    rng, ours, theirs = random.Random(0), data.Seen(room=8), set()
    for value in [rng.randrange(2 ** 64) for _ in range(50)] * 2 + [rng.randrange(60) for _ in range(300)]:
        assert ours.add(value) == (value not in theirs)
        theirs.add(value)


def test_the_mixture_of_motif_follows_its_integral():
    """625,000 steps of Motif's 8 domains: counts sum to n, never fall, and stay within 3 of the integral."""
    mixture = data.Mixture(*MOTIF_MIXTURE, 500_000)
    worst, last = 0, np.zeros((1, 8), np.int64)
    for n0 in range(0, 625_001, 125_000):
        n = np.arange(n0, min(n0 + 125_000, 625_001))
        c = mixture.counts(n)
        assert (c.sum(1) == n).all() and (np.diff(np.concatenate([last, c]), axis=0) >= 0).all()
        worst, last = max(worst, np.abs(c - mixture.integral(n)).max()), c[-1:]
    assert worst < 3

    mixture, rng = data.Mixture(*MOTIF_MIXTURE, 500_000 * 1024), np.random.default_rng(0)
    for step in [0, 499_999, 500_000, 624_999, *rng.integers(0, 625_000, 60)]:
        n = np.arange(step * 1024, step * 1024 + 1025)
        c = mixture.counts(n)
        assert (c.sum(1) == n).all() and (np.diff(c, axis=0) >= 0).all()
        assert np.abs(c - mixture.integral(n)).max() < 3
        assert (mixture.counts(n[[0, -1]]) == c[[0, -1]]).all()


def test_counts_equal_taking_windows_in_order_of_due_time():
    """Brute force: sort all due times, ties by domain; the closed form gives the same order."""
    for start, end, horizon in ((*MOTIF_MIXTURE, 700), ([.5, .5], [.5, .5], 0),
                                ([1, 0, 0], [0, .5, .5], 300.5), ([1.], [1.], 0)):
        mixture, D = data.Mixture(start, end, horizon), len(start)
        due = mixture.due(np.tile(np.arange(1500)[:, None], (1, D)))
        order = sorted((due[j, i], i, j) for i in range(D) for j in range(1500))[:1200]
        domain, j = mixture.window_domains(0, 1200)
        assert domain.tolist() == [i for _, i, _ in order] and j.tolist() == [j for _, _, j in order]


@pytest.mark.parametrize("n0", [0, 1, 499_990, 511_999_500, 639_999_000])
def test_window_domains_agree_with_counts(n0):
    """Windows per domain equal counts(n1) - counts(n0), and their indices continue without a gap."""
    mixture = data.Mixture(*MOTIF_MIXTURE, 500_000 * 1024)
    domain, j = mixture.window_domains(n0, n0 + 1000)
    c = mixture.counts([n0, n0 + 1000])
    assert (np.bincount(domain, minlength=8) == c[1] - c[0]).all()
    for i in range(8): assert (j[domain == i] == np.arange(c[0, i], c[1, i])).all()
    one = [mixture.window_domains(n, n + 1) for n in range(n0, n0 + 20)]
    assert [int(d[0]) for d, _ in one] == domain[:20].tolist()
    assert [int(k[0]) for _, k in one] == j[:20].tolist()


def test_changing_weights_need_a_horizon():
    """Weights that change over a horizon of 0 are refused; constant weights need no horizon."""
    with pytest.raises(ValueError, match="horizon 0"): data.Mixture([1, 0], [0, 1], 0)
    assert data.Mixture([.5, .5], [.5, .5], 0).counts([10]).tolist() == [[5, 5]]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_permutation_visits_every_index_once(n):
    """permute is a bijection for every key, and different keys give different permutations."""
    i = np.arange(n)
    found = [data.permute(i, n, np.uint64(key)) for key in (0, 1, 2 ** 64 - 1)]
    assert all((np.sort(p) == i).all() for p in found)
    if n >= 64: assert len({tuple(p) for p in found}) == 3 and (found[0] == i).mean() < 0.2


def small(tmp_path, doc_mask=False):
    for name, n in (("a", 700), ("b", 300)):
        (tmp_path / name).write_text("".join(f"{name}{i};" for i in range(n)))
    config = data.DataConfig(domains="a:0.8:0.2,b:0.2:0.8", files=f"a={tmp_path}/a,b={tmp_path}/b",
                             tokenizer="bytes", horizon=16 * 300, doc_mask=doc_mask,
                             cache=str(tmp_path / "cache"))
    return data.prepare(config, 261), config


def test_batch_is_pure_and_independent_of_world(tmp_path):
    """The ranks' slices make up the global batch for any world size; a fresh loader agrees; seeds differ."""
    corpus, config = small(tmp_path)
    batches = data.Batches(corpus, config, seed=1, batch=12, context=16)
    later = batches(7)
    for world in (1, 2, 3, 12):
        parts = [data.Batches(corpus, config, 1, 12, 16)(7, rank, world) for rank in range(world)]
        for name in ("x", "y", "domain"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(later, name))
    assert not torch.equal(data.Batches(corpus, config, 2, 12, 16)(7).x, later.x) and later.doc_start is None
    assert torch.equal(later.x[:, 1:], later.y[:, :-1]) and later.x.dtype == torch.int64
    with pytest.raises(ValueError, match="12 windows a batch, not divisible by 5"):
        batches(0, 0, 5)


def test_every_window_is_seen_once_an_epoch(tmp_path):
    """Each epoch of each domain sees every window exactly once, and the order differs between epochs."""
    corpus, config = small(tmp_path)
    batches = data.Batches(corpus, config, seed=3, batch=10, context=16)
    seen = {0: [], 1: []}
    for step in range(400):
        b = batches(step)
        for x, y, i in zip(b.x.tolist(), b.y.tolist(), b.domain.tolist()):
            seen[i].append(tuple(x + y[-1:]))
    for i, (name, domain) in enumerate(corpus.domains.items()):
        W = (len(domain.train) - 1) // 16
        expected = sorted(tuple(domain.train[k * 16:k * 16 + 17].tolist()) for k in range(W))
        epochs = [seen[i][e:e + W] for e in range(0, len(seen[i]) - W + 1, W)]
        assert len(epochs) >= 2 and all(sorted(e) == expected for e in epochs) and epochs[0] != epochs[1]
        assert abs(batches.epochs(400)[name] - len(seen[i]) / W) < 1e-12


def test_text_that_is_too_short_is_refused(tmp_path):
    """A domain with less than one window of training or validation tokens is a ValueError that names it."""
    corpus, config = small(tmp_path)
    with pytest.raises(ValueError, match=r"domain 'b': \d+ validation tokens, .* context 200"):
        data.Batches(corpus, config, 0, 4, 200)


def test_document_starts_match_brute_force():
    """Brute force: the start is one past the last eot strictly before the token."""
    x = np.random.default_rng(0).integers(0, 4, (20, 33))
    brute = [[max([k + 1 for k in range(t) if row[k] == 0], default=0) for t in range(33)] for row in x]
    assert data.document_starts(x, 0).tolist() == brute


def test_batches_of_the_embedded_corpus(corpus):
    """doc_mask gives doc_start; validation windows are adjacent, and a subset of them is evenly spaced."""
    batches = data.Batches(corpus, data.DataConfig(horizon=10 ** 7, doc_mask=True), 0, 16, 128)
    b = batches(40)
    assert b.doc_start.shape == b.x.shape == (16, 128) and (b.doc_start <= torch.arange(128)).all()
    x, y, *_ = batches.val("math")
    ids = corpus.domains["math"].val
    assert x.flatten().tolist() == ids[:x.numel()].tolist()
    assert y.flatten().tolist() == ids[1:x.numel() + 1].tolist()
    some, *_ = batches.val("math", 7)
    where = [next(i for i, row in enumerate(x) if torch.equal(row, s)) for s in some]
    assert len(some) == 7 and max(np.diff(where)) - min(np.diff(where)) <= 1


def test_validation_windows_are_spread_over_the_text(tmp_path):
    """Evenly spaced windows of a domain, starting with the first; all of them if the limit is not reached."""
    corpus, config = small(tmp_path)
    batches, ids = data.Batches(corpus, config, 0, 4, 8), corpus.domains["a"].val
    total = (len(ids) - 1) // 8
    assert total > 30
    for limit, n in ((7, 7), (0, total), (total + 9, total)):
        x, y, *_ = batches.val("a", limit)
        starts = [i * total // n * 8 for i in range(n)]
        assert x.tolist() == [ids[at:at + 8].tolist() for at in starts]
        assert y.tolist() == [ids[at + 1:at + 9].tolist() for at in starts]


def test_bigram_equals_dense_brute_force():
    """The sparse Witten-Bell bigram matches the dense definition, even after a token unseen in training."""
    rng = np.random.default_rng(0)
    tokenizer = data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    train = rng.integers(0, 40, 500).astype(np.uint16)
    val = np.append(rng.integers(0, 60, 300), 260).astype(np.uint16)
    c = np.zeros((261, 261))
    for a, b in zip(train[:-1], train[1:]): c[a, b] += 1
    u, bits, size = (np.bincount(train, minlength=261) + 1) / (500 + 261), 0, 0
    for a, b in zip(val[:-1], val[1:]):
        T = (c[a] > 0).sum()
        bits -= np.log2((c[a, b] + T * u[b]) / (c[a].sum() + T) if c[a].sum() else u[b])
        size += b < 256
    assert abs(data.bigram_bits(train, val, tokenizer) - bits / size) < 1e-9


def test_command_line_refuses_unknown_words(tmp_path, capsys):
    """Unknown commands and options exit with a list of the known ones; stats prints one row per domain."""
    for argv in ([], ["prepar"], ["stats", "--vcab=3"], ["stats", "--domains=news:1:1"]):
        with pytest.raises(SystemExit, match="known"): data.main(argv)
    _, config = small(tmp_path)
    capsys.readouterr()
    data.main(["stats", "--tokenizer=bytes", "--vocab=261", f"--files={config.files}",
               f"--cache={tmp_path}/cache"])
    assert re.search(r"^a +2 .* 50% → 50% ", capsys.readouterr().out, re.M)


# ---- data.py: cleaning -------------------------------------------------------------------------------------

def judged(texts, folder, workers=1):
    """Verdict of data.judge on these texts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [data.Row(text, "f", i) for i, text in enumerate(texts)]
    return data.judge(lambda: iter(rows), folder, 0, workers)


def true_jaccard(a, b):
    """J of two texts that have blanks between words, from sets of 5 words each."""
    sets = []
    for text in (a, b):
        words = text.lower().split()
        sets.append({tuple(words[i:i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def numbered_words(n, prefix):
    return [f"{prefix}{i}" for i in range(n)]


def planted(shingles, shared, name):
    """Two texts of that many shingles each, all of them different, of which the first `shared` are shared."""
    first = numbered_words(shingles + 4, name)
    second = first[:shared + 4] + numbered_words(shingles - shared, name + "other")
    return " ".join(first), " ".join(second)


def test_planted_pairs_are_found_at_and_above_the_limit_and_never_below(tmp_path):
    """300 pairs each of J = .85, .89, .9 and .95: by (4), 1 of 2,500 is missed at J = .9; none below goes."""
    kinds = {.85: (185, 170), 179 / 201: (190, 179), .9: (190, 180), .95: (195, 190)}
    texts, true = [], []
    for likeness, (shingles, shared) in kinds.items():
        for i in range(300):
            pair = planted(shingles, shared, f"p{shared}x{i}x")
            assert abs(true_jaccard(*pair) - likeness) < 1e-12
            texts += pair
            true.append(likeness)
    verdict = judged(texts, tmp_path / "work")
    gone = (verdict.why == data.NEAR).reshape(-1, 2)
    found = {likeness: int(gone[np.array(true) == likeness].sum()) for likeness in kinds}
    assert found[.85] == found[179 / 201] == 0 and found[.9] >= 299 and found[.95] == 300, found
    for i in np.flatnonzero(verdict.why == data.NEAR):
        assert abs(true_jaccard(texts[i], texts[verdict.stays[i]]) - verdict.jaccard[i]) < 1e-6
    assert ((verdict.cluster[::2] == verdict.cluster[1::2]) == gone.any(1)).all()


def test_a_signature_is_the_least_value_of_each_hash_function():
    """In whole numbers of Python: min over h of (a·h + b mod 2⁶⁴) // 2³²; over several blocks, too."""
    a, b = data.FACTOR.ravel().tolist(), data.SUMMAND.ravel().tolist()
    shingles = data.shingles_of(" ".join(numbered_words(1100, "w")))
    assert len(set(shingles.tolist())) == 1096 and all(factor % 2 for factor in a) and len(set(a + b)) == 224
    least = [min((f * h + s) % 2 ** 64 for h in shingles.tolist()) // 2 ** 32 for f, s in zip(a, b)]
    assert data.signature(shingles).tolist() == least


def test_equal_runs_of_words_have_equal_hashes_wherever_they_stand():
    """10,000 words of one or two letters out of three, so that runs recur, in several blocks of 4,096, and a
    few very long ones, whose digests stand for them: hashes are equal exactly where the words are, and equal
    (3) in whole numbers."""
    rng = random.Random(0)
    text = ["".join(rng.choices("aäb", k=rng.randrange(1, 3))) for _ in range(10_000)] + ["a" * 70_000] * 9
    runs = [" ".join(text[i:i + 5]) for i in range(len(text) - 4)]
    found = data.shingles_of(" ".join(text)).tolist()
    assert len(found) == len(runs) > len(set(found)) + 100
    assert len(set(found)) == len(set(runs)) == len(set(zip(found, runs)))
    for i in (0, 4095, 4096, 9_999):
        words = (data.sha256(word) if len(word) > 256 else word for word in runs[i].split())
        run = enumerate(f" {' '.join(words)}".encode())
        h = sum(int(data.TABLE[byte]) * pow(data.BASE, j, 2 ** 64) for j, byte in run)
        assert int(data.mix(np.array([h % 2 ** 64], np.uint64))[0]) == found[i]
    assert not len(data.shingles_of("")) and not len(data.shingles_of("one two three four"))


def test_signatures_estimate_jaccard_as_well_as_those_of_rensa(tmp_path):
    """Over 150 pairs of J = .9 and .5 the share of equal values is right within 3 standard errors, and its
    standard deviation is a binomial's; as is true of rensa's, except that it scatters less."""
    try:
        import rensa
    except ImportError:
        rensa = None
    for shingles, shared in ((190, 180), (150, 100)):
        true = shared / (2 * shingles - shared)
        ours, theirs = [], []
        for i in range(150):
            pair = planted(shingles, shared, f"q{i}x")
            first, second = (data.signature(data.shingles_of(text)) for text in pair)
            ours.append((first == second).mean())
            if rensa:
                sketches = []
                for text in pair:
                    sketch = rensa.RMinHash(num_perm=112, seed=1)
                    each = text.split()
                    sketch.update([" ".join(each[j:j + 5]) for j in range(len(each) - 4)])
                    sketches.append(sketch)
                theirs.append(sketches[0].jaccard(sketches[1]))
        deviation = (true * (1 - true) / 112) ** 0.5
        for estimates in filter(None, (ours, theirs)):
            assert abs(np.mean(estimates) - true) < 3 * deviation / 150 ** 0.5
            assert np.std(estimates) < 1.2 * deviation
        assert np.std(ours) > 0.8 * deviation
    if not rensa:
        pytest.skip("rensa is not installed (pip install rensa): only our own estimates were checked")


def test_documents_meet_as_often_as_bands_of_eight_values_agree():
    """Of 300 pairs of J = .7 and of .5 that many meet in a bucket as (4) says, .56 and .05, within 4 standard
    errors."""
    for shingles, shared in ((170, 140), (150, 100)):
        true = shared / (2 * shingles - shared)
        texts = [text for i in range(300) for text in planted(shingles, shared, f"m{i}x")]
        _, buckets = data.sign(texts, 0)
        meet = (buckets[::2] == buckets[1::2]).any(1).mean()
        often = 1 - (1 - true ** 8) ** 14
        assert abs(meet - often) < 4 * (often * (1 - often) / 300) ** 0.5


def lively_corpus(rng, families=25):
    """Families of a text and edits of edits of it, some in capitals or with other blanks; short ones."""
    texts = ["a few words"] * 3 + ["some other words", "A  few\nwords"]
    for family in range(families):
        members = [numbered_words(rng.randrange(30, 300), f"f{family}x")]
        for _ in range(rng.randrange(8)):
            edit = list(rng.choice(members))
            edit[rng.randrange(len(edit))] = rng.choice("xyz")
            members.append(edit)
        for member in members:
            text = rng.choice((" ", "\n", "  ")).join(member)
            texts.append(text.upper() if rng.random() < .2 else text)
            if rng.random() < .2:
                texts.append(texts[-1] + " ")
    return texts


def brute_force(texts):
    """Who stays, by comparing all pairs, in the order: longest first, then by digest; and the clusters."""
    from hashlib import blake2b
    plain = list(dict.fromkeys(" ".join(text.lower().split()) for text in texts))
    runs = {text: max(0, len(text.split()) - 4) for text in plain}
    digest = {text: np.frombuffer(blake2b(text.encode(), digest_size=16).digest(), "<u8") for text in plain}
    plain.sort(key=lambda text: (-runs[text], *digest[text].tolist()))
    kept, clusters = [], {text: {text} for text in plain}
    for i, text in enumerate(plain):
        alike = [other for other in plain[:i] if true_jaccard(text, other) >= .9]
        if not set(alike) & set(kept):
            kept.append(text)
        for other in alike:
            joined = clusters[text] | clusters[other]
            for member in joined:
                clusters[member] = joined
    return set(kept), {frozenset(cluster) for cluster in clusters.values()}


@pytest.mark.parametrize("seed", range(3))
def test_who_stays_is_what_all_pairs_say_in_whatever_order_the_documents_come(seed, tmp_path):
    """Equal to brute force, kept texts and clusters; shuffled, the same texts stay, to the letter; in two
    processes, too. A document goes only for one that stays."""
    rng = random.Random(seed)
    texts = lively_corpus(rng)
    kept, clusters = brute_force(texts)
    stay = None
    for i in range(3):
        rng.shuffle(texts)
        verdict = judged(texts, tmp_path / "work", workers=1 + i % 2)
        assert (verdict.why[verdict.stays] == data.KEPT).all()
        assert ((verdict.stays == np.arange(len(texts))) == (verdict.why == data.KEPT)).all()
        found = {}
        for text, cluster in zip(texts, verdict.cluster.tolist()):
            found.setdefault(cluster, set()).add(" ".join(text.lower().split()))
        assert set(map(frozenset, found.values())) == clusters
        mine = sorted(text for text, why in zip(texts, verdict.why) if why == data.KEPT)
        assert sorted(" ".join(text.lower().split()) for text in mine) == sorted(kept)
        assert stay in (None, (mine, sorted(found)))
        stay = mine, sorted(found)


def test_a_chain_of_near_duplicates_cannot_swallow_a_corpus(tmp_path):
    """200 documents, each like the next, J .94, but not like the one after that. At least every third stays,
    none goes but for one that is like it, and they are one cluster, so they are on one side of a split."""
    stream = numbered_words(5000, "c")
    texts = [" ".join(stream[12 * i:12 * i + 404]) for i in range(200)]
    assert true_jaccard(*texts[:2]) > .9 > true_jaccard(texts[0], texts[2])
    verdict = judged(texts, tmp_path / "work")
    gone = np.flatnonzero(verdict.why == data.NEAR)
    assert 100 <= len(gone) <= 133 and len(set(verdict.cluster.tolist())) == 1
    assert all(true_jaccard(texts[i], texts[verdict.stays[i]]) >= .9 for i in gone)


def test_boilerplate_takes_time_linear_in_its_documents(tmp_path):
    """1,500 copies of a page with another word each are compared little more than once each. If a tenth of
    the page differs, all of them stay: they are compared no more than 64 times, and that is reported; near-
    duplicates of 30 of them are found all the same."""
    for changed, most, kept in ((1, 1.1, (1, 2)), (18, 64, (1500, 1500))):
        rng, texts = random.Random(0), []
        for i in range(1500):
            page = numbered_words(200, "w")
            at = rng.randrange(200 - changed)
            page[at:at + changed] = numbered_words(changed, f"x{i}x")
            texts.append(" ".join(page))
        again = [text.replace("w199", "last") for text in texts[:30] if changed == 18]
        with mock.patch.object(data, "jaccard", wraps=data.jaccard) as compared:
            verdict = judged(texts + again, tmp_path / "work")
        assert compared.call_count <= most * len(verdict.why)
        assert kept[0] <= (verdict.why == data.KEPT).sum() <= kept[1]
        assert (verdict.limited > 500) == (changed == 18) == bool(again)


def test_cleaning_holds_200_bytes_of_a_document_in_memory(tmp_path):
    """The peak over 2,000 documents, of which most are duplicates of some kind, less that over 1,000; their
    texts, which lie in memory here, do not count. In batches of 16 kB."""
    texts = []
    for i in range(2_000):
        page = numbered_words(20, f"d{i // 3}x")
        page[-1] += "z" * (i % 3 // 2)
        texts.append(" ".join(page))
    rows = [data.Row(text, "f", i) for i, text in enumerate(texts)]
    peaks = []
    for n in (1_000, 2_000):
        (tmp_path / str(n)).mkdir()
        tracemalloc.start()
        with mock.patch.object(data, "CLEAN_BATCH", 1 << 14):
            verdict = data.judge(lambda: (row for row in rows[:n]), tmp_path / str(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (verdict.why != data.KEPT).sum() > n // 4
    assert 50_000 < peaks[1] - peaks[0] < 1_000 * 200


@pytest.mark.parametrize("first, last", [(0x4E00, 0x9FA0), (0xE01, 0xE2E), (0x3041, 0x3094),
                                         (0x1000, 0x1020)])
def test_scripts_without_spaces_are_compared_by_their_characters(first, last, tmp_path):
    """A text of 400 characters in a row with one changed is a near-duplicate, another one is not; and 30
    characters are long enough to be kept."""
    rng = random.Random(first)
    texts = []
    for _ in range(2):
        text = [chr(rng.randrange(first, last)) for _ in range(400)]
        texts.append("".join(text))
        text[200] = "x"
        texts.append("".join(text))
    verdict = judged(texts, tmp_path / "work")
    assert (verdict.why == data.NEAR).reshape(2, 2).sum(1).tolist() == [1, 1]
    assert data.spaced("日本 x語z") == "日 本 x 語 z"
    assert data.about_tokens(data.spaced(texts[0][:30])) >= 24


def test_documents_that_differ_only_in_form_are_exact_duplicates(tmp_path):
    """Case, white space and composition of characters do not count; anything else does. Of equal ones the
    first in the order of their letters' digests stays, whatever comes first."""
    texts = ["straße É x", "STRASSE e\u0301  x", "\tstrasse\nÉ x ", "straße E x", "straßeÉx", "가 나", "가 나"]
    verdict = judged(texts, tmp_path / "work")
    assert [int(why) for why in verdict.why].count(data.EXACT) == 3
    assert len(set(verdict.stays[:3])) == 1 == len(set(verdict.stays[5:])) and (verdict.why[3:5] == 0).all()
    for text in ("ǰ ǆ ŉ", "ᾳ ΐ ς", "istanbul"):
        plain = data.folded(text)
        assert plain == data.folded(text.upper()) == data.folded(plain)


def test_only_documents_of_less_than_24_tokens_are_short():
    """At least a token for 8 bytes, so nothing of 192 bytes is short; a token for each short word or mark,
    two for a Korean word of four syllables."""
    rng = random.Random(0)
    for _ in range(300):
        plain = data.folded(random_text(rng, rng.randrange(300)))
        assert data.about_tokens(plain) * 8 >= len(plain.encode())
    texts = ["one two three " * 7 + "four,", "one, two, three, " * 4, "one two three " * 8, "a" * 192]
    facts, _ = data.sign([*texts, "가나다라 " * 12, "가나다라 " * 11], 24)
    assert facts["short"].tolist() == [True, False, False, False, False, True]


def make_source(folder):
    """A folder of two .jsonl files with duplicates of each kind → their texts"""
    folder.mkdir()
    texts = lively_corpus(random.Random(5), families=12)
    for name, part in (("a.jsonl", texts[::2]), ("b.jsonl", texts[1::2])):
        (folder / name).write_text("".join(json.dumps(dict(text=text)) + "\n" for text in part), "utf-8")
    return texts


def test_clean_text_knows_where_it_comes_from_and_the_report_adds_up(tmp_path, capsys):
    """`python data.py clean`: what is written, who stays for how many, and the report; the folder is a source
    like any other."""
    texts = make_source(tmp_path / "in")
    data.main(["clean", f"web={tmp_path / 'in'}", str(tmp_path / "out"), "--min_tokens=5"])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "00000.jsonl").open(encoding="utf-8")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    source = {(str(row.file), row.number): row.text
              for row in data.rows("web", str(tmp_path / "in"), data.DataConfig())}
    assert len(source) == len(texts)
    for line in lines:
        assert source[line["file"], line["row"]] == line["text"] and line["source"] == "web"
    count, size = report["documents"], report["bytes"]
    assert sum(count.values()) == len(texts) and sum(size.values()) == sum(len(t.encode()) for t in texts)
    assert count["kept"] == len(lines) and sum(line["copies"] for line in lines) == len(texts) - 5
    assert min(count.values()) > 3 and count["too short"] == 5
    for why, n in count.items():
        assert f"{why:16}{n:12,} documents" in printed
    kinds = {tuple(shown["why"] for shown in group) for group in report["examples"]}
    assert ("too short",) in kinds and ("kept", "near-duplicate") in {kind[:2] for kind in kinds}
    capsys.readouterr()
    assert sorted(data.documents("out", str(tmp_path / "out"))) == sorted(line["text"] for line in lines)
    assert "left out" not in capsys.readouterr().out, "the report is no text"


@pytest.mark.parametrize("moment", ["sign", "ascontiguousarray", "jaccard", "write_atomically", "rename"])
def test_a_clean_that_is_killed_is_not_taken_for_whole(moment, tmp_path):
    """Killed as it signs, here or in two processes, as it compares, before the report and before the name:
    there is no folder OUT. Run again, it gives the same bytes as one that was never killed; no worker process
    is left that would hold its lock."""
    make_source(tmp_path / "in")
    arguments = "web", str(tmp_path / "in"), tmp_path / "out"
    place = {"ascontiguousarray": np, "rename": os}.get(moment, data)
    child = os.fork()
    if not child:
        setattr(place, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        data.clean(*arguments, workers=1 + (place is np))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with open(tmp_path / "out.partial" / "lock") as lock:
        for attempt in range(50):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            pytest.fail("a worker process is left")
    (tmp_path / "out.partial" / "00007.jsonl").write_text("half of a li")
    data.clean(*arguments, workers=1)
    data.clean(*arguments[:2], tmp_path / "again", workers=1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.jsonl", "report.json"]
    for name in ("00000.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in", "out"]


def test_a_run_can_clean_a_path_with_an_equals_sign(tmp_path, monkeypatch):
    """As Hive names its folders. The workers of the run are those of the cleaning."""
    make_source(tmp_path / "lang=ko")
    config = data.DataConfig(files=f"web={tmp_path}/lang=ko", clean=True, min_tokens=5, tokenizer="bytes",
                             cache=str(tmp_path / "cache"))
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **how: ran.append(words) or run(words, **how))
    assert data.prepare(config, 261, workers=2).domains["web"].documents > 9 and "--workers=2" in ran[0]
    for given in (f"{tmp_path}/lang=ko", f"a={tmp_path}/lang=ko"):
        data.main(["clean", given, f"{tmp_path}/{len(given)}", "--min_tokens=5"])


def test_clean_refuses_what_would_lose_or_mix_up_text(tmp_path):
    """A folder that exists, a place inside the source, text that changes meanwhile, a source that is not
    there, nothing that stays: one line each, and nothing is left behind."""
    make_source(tmp_path / "in")
    (tmp_path / "there").mkdir()
    (tmp_path / "tiny").write_text("a few words")
    here = str(tmp_path / "in")
    for source, out, says in ((here, "there", "exists"), (here, "in/out", "is inside"),
                              (here, "in", "is inside"), (here + "n", "out", "No such file"),
                              (str(tmp_path / "tiny"), "out", "none of the 1")):
        with pytest.raises(ValueError, match=says):
            data.clean("a", source, tmp_path / out, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "there", "tiny"]

    # As many rows as before, but others.
    texts = ["first " * 40, "second " * 40, "third " * 40]
    verdict = judged(texts, tmp_path / "work")
    for other, says in ((texts[::-1], "f, row 0: changed"), (texts[:2], "2 are left"),
                        (texts * 2, "f, row 3: changed")):
        read = lambda: (data.Row(text, "f", i) for i, text in enumerate(other))
        with pytest.raises(ValueError, match=says):
            list(data.judged(read, verdict))


def test_who_waits_takes_the_lock_of_a_new_folder(tmp_path):
    """The folder is renamed or removed by its holder: the next makes it again, and keeps others out."""
    for end in (lambda: os.rename(tmp_path / "a", tmp_path / "b"), lambda: shutil.rmtree(tmp_path / "a")):
        waits, inside, leave = (threading.Event() for _ in range(3))

        def wait():
            waits.set()
            with data.locked(tmp_path / "a"):
                inside.set()
                leave.wait(10)
        with data.locked(tmp_path / "a"):
            waiter = threading.Thread(target=wait)
            waiter.start()
            waits.wait()
            time.sleep(.1)
            assert not inside.is_set()
            end()
        assert inside.wait(10)
        with open(tmp_path / "a/lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leave.set()
        waiter.join()


@pytest.mark.parametrize("large", [False, True])
def test_a_run_can_clean_its_text(large, tmp_path, monkeypatch, capfd):
    """--data.clean=true gives the tokens of `python data.py clean` and its folder, once; a document knows the
    row it had before. Killed, it goes on. Other text or other options are cleaned anew."""
    make_source(tmp_path / "in")
    monkeypatch.setattr(data, "LARGE", 0 if large else 10 ** 9)
    config = data.DataConfig(files=f"web={tmp_path}/in", clean=True, min_tokens=5, tokenizer="bytes",
                             cache=str(tmp_path / "cache"))
    first = data.prepare(config, 261)
    assert f"{'near-duplicate':16}" in capfd.readouterr().out
    data.main(["clean", f"{tmp_path}/in", f"{tmp_path}/out", "--min_tokens=5"])
    by_hand = data.prepare(replace(config, files=f"web={tmp_path}/out", clean=False), 261)
    assert by_hand.fingerprint == first.fingerprint and isinstance(by_hand.domains["web"].train, np.ndarray)
    file, row = data.origin(first, config, "web", "train", 0)
    line = json.loads((tmp_path / "in" / file).read_text("utf-8").splitlines()[row - 1])
    ids = first.domains["web"].train
    assert first.tokenizer.decode(ids[:list(ids).index(256)]) == line["text"]

    # Nothing runs a second time; the same text at another place, killed as it is cleaned, gives the same.
    with mock.patch.object(subprocess, "run", side_effect=AssertionError):
        assert data.prepare(config, 261).fingerprint == first.fingerprint
    if not large:
        other = replace(config, cache=str(tmp_path / "other"))
        script = f"import data\nfrom data import DataConfig\ndata.prepare({other}, 261)"
        process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE, start_new_session=True)
        while not list(tmp_path.glob("other/*.partial")):
            time.sleep(.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert data.prepare(other, 261).fingerprint == first.fingerprint
        assert not list(tmp_path.glob("other/*.partial"))
    with pytest.raises(ValueError, match="^clean: none of the .* has 9999 tokens"):
        data.prepare(replace(config, min_tokens=9999), 261)
    (tmp_path / "in/a.jsonl").write_text(json.dumps(dict(text="a new text " * 99)))
    assert data.prepare(config, 261).fingerprint != first.fingerprint


@pytest.mark.parametrize("large", [False, True])
def test_near_duplicates_that_stay_are_on_one_side(large, tmp_path, monkeypatch):
    """60 chains of three: the ends of each stay, in different files, and one hash decides for both."""
    monkeypatch.setattr(data, "LARGE", 0 if large else 10 ** 9)
    (tmp_path / "in").mkdir()
    for part in range(3):
        texts = [" ".join(numbered_words(428, f"c{i}x")[12 * part:12 * part + 404]) for i in range(60)]
        (tmp_path / f"in/{part}.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    monkeypatch.setattr(data, "JSONL_SIZE", 100_000)
    data.clean("web", str(tmp_path / "in"), tmp_path / "out", workers=1)
    found = data.prepare(data.DataConfig(files=f"web={tmp_path}/out", tokenizer="bytes",
                                         cache=str(tmp_path / "cache")), 261)
    sides = {}
    for side in ("train", "val"):
        ids = getattr(found.domains["web"], side)[:10 ** 9]
        for text in found.tokenizer.decode(ids).split(data.EOT)[:-1]:
            sides.setdefault(re.match(r"c\d+x", text)[0], []).append(side)
    assert len(sides) == 60 and max(map(len, sides.values())) == 2
    assert {*map(tuple, sides.values())} == {("train",), ("val",), ("train", "train"), ("val", "val")}


# ---- data.py: generation -----------------------------------------------------------------------------------

@contextlib.contextmanager
def serving(reply):
    """A chat endpoint on this machine → its address, and what has come: requests, and keys of those answered.

    reply(request, times it came before) → (status, headers, body), or None to cut the connection."""
    came, answered, lock = [], [], threading.Lock()
    seen = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                came.append(json.loads(raw) | dict(key=key_of(raw), auth=self.headers["Authorization"],
                                                   at=time.monotonic()))
                before = seen[raw]
                seen[raw] += 1
            found = reply(json.loads(raw), before)
            if not found:
                return
            status, headers, body = found
            sent = [json.dumps(body).encode()] if isinstance(body, dict | list) else body
            sent = [sent] if isinstance(sent, bytes) else sent   # or an iterable of bytes
            with contextlib.suppress(OSError):                   # the client may be gone
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in sent:
                    self.wfile.write(part)
                if isinstance(body, dict) and body.get("choices"):
                    with lock:
                        answered.append(key_of(raw))

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", came, answered
    finally:
        server.shutdown()
        server.server_close()


def key_of(raw):
    """The key of a request in the journal, from what is sent."""
    request = json.loads(raw)
    return data.sha256(json.dumps(request, sort_keys=True), str(request.get("seed")))


def completed(content, finish="stop", usage=None):
    choice = dict(message=dict(role="assistant", content=content), finish_reason=finish)
    return 200, {}, dict(choices=[choice], usage=usage)


def unruly(request, before):
    """A reply as bad servers give it. By the request's hash, up to three tries bring no answer, for a reason
    that differs each time; the answer itself, good or bad, depends on the request alone."""
    dice = random.Random(request["messages"][0]["content"] + str(request["seed"]))
    for _ in range(min(before, 3)):
        dice.random()
    bad = dict(wait=(429, {"Retry-After": "0.01"}, {}), ms=(429, {"retry-after-ms": "9"}, b"slow down"),
               date=(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, dict(error="busy")),
               broken=(500, {}, b"<html>"), late=(408, {}, b""), conflict=(409, {}, b""),
               half=(200, {}, b'{"choices": [{"message": {"content": "a fine'), list=(200, {}, []),
               short=(200, {"Content-Length": 999}, b'{"choices": [{"mess'), cut=None, stall=None,
               inside=(200, {}, dict(error=dict(code=503, message="busy"))),
               empty=(200, {}, dict(choices=[])))
    if before < 3 and dice.random() < .3:
        kind = list(bad)[int(dice.random() * len(bad))]
        if kind == "stall" and request["seed"] % 3 == 0:         # the others are cut at once
            time.sleep(2.1)
        return bad[kind]
    dice = random.Random(str(request["seed"]))
    time.sleep(dice.random() * .02)                              # answers overtake each other
    text = f"The text of {request['seed']} says: {request['messages'][0]['content'][:40]}"
    return dice.choice([completed(text)] * 8 + [
        completed("<think>hm</think>\n" + text), completed("so</think>" + text), completed(None),
        completed(""), completed("<think>hm</think>"), completed(text, "length"), completed(text, "abort"),
        completed("I'm sorry, but no"), completed("Sure! " + text), completed(text + "<|im_end|>"),
        completed(text, usage=dict(prompt_tokens=4000, completion_tokens=96))])


GENERATING = """
import json, sys, data
from notes import endpoint as asking
url, out, n, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
asking.FIRST_WAIT = .002
endpoint = data.Endpoint(url, "m", threads=threads, timeout=2)
prompt = data.Prompt("say", "Say it again, in other words: {text}", "0")
accept = lambda row, result: "short" if len(result["text"]) % 9 == 0 else ""
rows = (dict(id=f"d{i}", text=f"word{i} " * (i % 7 + 1)) for i in range(n))
with asking.Journal(out + ".calls.jsonl", endpoint) as journal:
    with data.atomic(out, "w") as file:
        for row, result in data.generate(rows, prompt, lambda row, answer: dict(text=answer), accept,
                                         endpoint, journal):
            file.write(json.dumps([row["id"], result]) + "\\n")
    sys.exit(asking.summary(journal) > 0)
"""


def killed_and_resumed(folder, kills, n, threads=6):
    """Generate from an unruly server, killed that many times → (calls paid again, what the
    last run says)."""
    with serving(unruly) as (url, came, answered):
        def start(name):
            return subprocess.Popen([sys.executable, "-c", GENERATING, url, str(folder / name), str(n),
                                     str(threads)], cwd=HERE, stdout=subprocess.PIPE, text=True,
                                    env=dict(os.environ, OMP_NUM_THREADS="1"))

        # One run that nothing disturbs, beyond the server.
        smooth = start("smooth")
        said = smooth.communicate()[0]
        assert smooth.returncode == 0, said
        assert max(Counter(answered).values()) == 1              # retries repeat only what was not answered
        calls = len(answered)
        del came[:], answered[:]

        # Another one, killed again and again after a random number of answers.
        dice = random.Random(n)
        journal = folder / "out.calls.jsonl"
        kept = set()
        for kill in range(kills + 1):
            before, enough = len(came), len(answered) + dice.randrange(calls // (kills + 1))
            process = start("out")
            while kill < kills and len(answered) < enough and process.poll() is None:
                time.sleep(.002)
            if kill < kills:
                time.sleep(dice.random() * .02)
                process.kill()
            said = process.communicate()[0]
            assert process.returncode == (-signal.SIGKILL if kill < kills else 0), said

            # What was written is not asked for again, nor harmed by a line that is cut short.
            assert not kept & {request["key"] for request in came[before:]}
            with open(journal, "ab") as file:
                kept = {json.loads(line)["key"] for line in journal.read_bytes().split(b"\n")[:-1]}
                file.write(b'{"key": "01234' * (kill < kills))

        # Each document once, in order, to the byte as without kills. Only calls in flight were paid again.
        assert (folder / "out").read_bytes() == (folder / "smooth").read_bytes()
        ids = [json.loads(line)[0] for line in (folder / "out").read_text().splitlines()]
        assert ids == [f"d{i}" for i in range(n)]
        keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
        assert len(keys) == len({*keys}) == calls and {*keys} == {*answered}
        assert len(answered) - calls <= kills * threads
        return len(answered) - calls, said


def test_killed_runs_lose_no_answer_and_pay_none_twice(tmp_path):
    again, said = killed_and_resumed(tmp_path, kills=3, n=100)
    for words in "taken", "refused for good", "null content", "finish_reason length", "half an answer", "429":
        assert words in said, said


SAY = data.Prompt("say", "Say it again in other words, and leave out nothing of what it says.\n{text}", "0")


def generated(rows, path, reply=None, url="offline", accept=lambda row, result: "", dry_run=False, **options):
    """The results of `generate`, its journal, what was printed, and what came to the server."""
    options = dict(model="m", threads=1, timeout=5) | options
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.ExitStack() as stack:
        came = []
        if reply:
            url, came, _ = stack.enter_context(serving(reply))
        endpoint = data.Endpoint(url, **options)
        with asking.Journal(path, endpoint, dry_run) as journal:
            results = list(data.generate(rows, SAY, lambda row, answer: dict(text=answer), accept, endpoint,
                                         journal))
            asking.summary(journal)
    assert [row for row, _ in results] == list(rows)
    return [result for _, result in results], journal, out.getvalue(), came


def rows_of(*texts):
    return [dict(id=f"d{i}", text=text) for i, text in enumerate(texts)]


def test_an_answer_is_taken_only_if_it_is_one():
    """Each way in which an answer is none, and those that only look like it."""
    text = data.fill(SAY, dict(text="A <|mark|> of 'as an AI', and <think>so</think>: " + "word " * 50))
    takes = [("A fine text.",) * 2, ("\n<think>a\n\nb</think>\n A fine text.\n", "A fine text."),
             ("The tag </think> ends a thought.",) * 2, ("It says <|mark|>.",) * 2,
             ("They said <think>so</think>.",) * 2, ("Here is where he lived. At noon: rain.",) * 2,
             ("I cannot recall the year.",) * 2, ("Sorry songs were sung.",) * 2, ("Great: a novel.",) * 2]
    for answer, expected in takes:
        call = dict(answer=answer, finish="stop", usage=None)
        assert data.answer_in(call, text, SAY, 0, False) == expected, answer
    refuses = {"null content": (None,),
               "preamble": ("Here is a new version: A", "Here’s it, as asked:\nA", "Sure! A", "Okay, a"),
               "empty content": ("", " \n", "<think>a</think>\n", "<think>a</think>", "<think>so"),
               "refusal": ("I'm sorry, but I can’t do that.", "I cannot help with it", "I’m unable to say",
                           "I am sorry, I must not", "Well, as a large language model I like it"),
               "template leak": ("A text<|im_end|>", "[INST] A", "A text</s>", "<start_of_turn>a",
                                 "a\n### Response:\nb", "<|eot_id|>"),
               "repeats the prompt": (text,), "no text in UTF-8": ("a \ud800 text",)}
    for why, answers in refuses.items():
        for answer in answers:
            with pytest.raises(data.Refused, match=why):
                data.answer_in(dict(answer=answer, finish="stop", usage=None), text, SAY, 0, False)
    for answer, expected in ("so, then</think>A fine text.", "A fine text."), ("a</think>", "empty content"):
        call = dict(answer=answer, finish="stop", usage=None)
        with contextlib.suppress(data.Refused) if expected == "empty content" else contextlib.nullcontext():
            assert data.answer_in(call, "A text without tags.", SAY, 0, False) == expected
    for answer in "Sure! A", "I cannot help with it", "Here is one: A":
        assert data.answer_in(dict(answer=answer, finish="stop", usage=None), text, SAY, 0, True) == answer

    # How it ended, and what the server counted. The prompt has 72 words.
    words = len(text.split())
    for finish, usage, window, why in (
            ("length", None, 0, "finish_reason length"), (None, None, 0, "finish_reason None"),
            ("tool_calls", None, 0, "finish_reason tool_calls"), ("stop", [words - 1, 9], 0, "prompt cut"),
            ("stop", [4000, 96], 0, "fills the window"), ("stop", [900, 100], 1000, "fills the window"),
            ("stop", [words, 9], 0, ""), ("stop", [0, 9], 0, ""), ("stop", [4000, 97], 0, ""),
            ("stop", [4000, 96], 5000, "")):
        call = dict(answer="A fine text.", finish=finish, usage=usage)
        with pytest.raises(data.Refused, match=why) if why else contextlib.nullcontext():
            data.answer_in(call, text, SAY, window, False)


def test_what_no_try_mends_is_told_from_what_passes():
    """Statuses and bodies of servers in use, also errors inside a 200; waits in each form of a header."""
    say = lambda **error: json.dumps(dict(error=error)).encode()
    hopeless = [(400, b'{"object": "error", "message": "maximum context length is 4096"}'), (413, b""),
                (500, say(type="exceed_context_size_error", n_ctx=4096)), (422, b'{"detail": "temperature"}'),
                (403, say(message="Your input was flagged by moderation")), (403, b"Content filter: no"),
                (200, say(code=400, type="exceed_context_size_error")), (200, say(code=400, message="no"))]
    passing = [(n, b"") for n in (408, 409, 425, 429, 500, 502, 503, 504, 529)] + [
        (504, b"the upstream took too long"), (429, b"context window of requests is full"), (200, b""),
        (200, b"[]"), (200, b'{"choices": null}'), (200, b'{"choices": [{"message": null}]}'), (200, b"null"),
        (200, say(message="overloaded")), (200, b'{"error": "busy"}'), (200, say(code="x", message="busy"))]
    ending = [(n, b"<html>") for n in (301, 307, 401, 402, 403, 404, 405)] + [
        (400, b'{"error": "model \\"llama\\" not found, try pulling it first"}'), (200, say(code=401)),
        (403, say(message="Your account has no access")), (200, b" \n<!doctype html><title>Web UI</title>"),
        (429, say(code="insufficient_quota")), (200, say(code=404, message="The model `x` does not exist"))]
    for status, body in hopeless:
        assert asking.completion(status, {}, body, "").keys() == {"error", "why"}, (status, body)
    for cases, waits in ((passing, 0), (ending, math.inf)):
        for status, body in cases:
            with pytest.raises(asking.Unanswered) as caught:
                asking.completion(status, {}, body, "")
            assert caught.value.args[1] == waits, (status, body)
    body = b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}'
    assert asking.completion(200, {}, body, "") == dict(answer=None, finish="None", usage=None)
    for usage, kept in ((b"3", None), (b'{"prompt_tokens": 3}', None), (b"null", None),
                        (b'{"prompt_tokens": 3, "completion_tokens": 4}', [3, 4])):
        body = b'{"choices": [{"message": {}, "finish_reason": "stop"}], "usage": ' + usage + b"}"
        assert asking.completion(200, {}, body, "") == dict(answer=None, finish="stop", usage=kept)

    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    for headers, seconds in (({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5), ({"Retry-After": "9"}, 9),
                             ({"Retry-After": "2.5"}, 2.5), ({"Retry-After": soon}, 89.5), ({}, 0),
                             ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
                             *[({"Retry-After": odd}, 0) for odd in ("soon", "-5", "nan", "")]):
        assert abs(asking.seconds_to_wait(headers) - seconds) < 1, headers


def test_a_call_waits_as_long_as_it_is_told_and_longer_each_time(tmp_path, monkeypatch):
    """Three tries by Retry-After, then by back-off alone: 0.75 to 1.25 times .05·2ᵏ s, as the hash says."""
    monkeypatch.setattr(asking, "FIRST_WAIT", .05)
    headers = [{"Retry-After": "0.3"}, {"retry-after-ms": "200"}, {"Retry-After": "0.1"}, {}]
    reply = lambda request, before: (429, headers[before], {}) if before < 4 else completed("A fine text.")
    results, journal, said, came = generated(rows_of("word"), tmp_path / "c", reply)
    assert results[0]["text"] == "A fine text." and "calls tried again: 4 429\n" in said
    waits = np.diff([request["at"] for request in came])
    for wait, asked, backoff in zip(waits, (.3, .2, .1, 0), (.05, .1, .2, .4), strict=True):
        assert asked + .75 * backoff <= wait < asked + 1.25 * backoff + 1, waits
    assert len({request["key"] for request in came}) == 1

    # A body that trickles in goes on for longer than a try may take, though each byte comes in time.
    def trickle():
        for _ in range(40):
            time.sleep(.05)
            yield b" "
    reply = lambda request, before: completed("A fine text.") if before else (200, {}, trickle())
    results, _, said, came = generated(rows_of("word"), tmp_path / "t", reply, timeout=.3)
    assert results[0] and "calls tried again: 1 timeout\n" in said
    assert .3 < came[1]["at"] - came[0]["at"] < 1.8

    # A server that asks for more than ten minutes ends the run, which says so.
    reply = lambda request, before: (429, {"Retry-After": "3600"}, {})
    results, journal, said, came = generated(rows_of("a", "b"), tmp_path / "d", reply)
    assert results == [None, None] and len(came) == 1 and "429 and to wait 3,600 s" in said
    assert "2 missing" in said


def test_a_server_that_is_wrong_or_down_ends_the_run_and_the_answers_stay(tmp_path, monkeypatch):
    """A wrong key at once; a server that is down, after three calls; one that refuses everything, after 20
    rows. The key, which the server repeats, is neither printed nor kept."""
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setattr(asking, "FIRST_WAIT", .001)
    rows = rows_of(*"abcdefghijklmnopqrstuvwxyz")

    def wrong(request, before):
        return completed("A fine text.") if request["messages"][0]["content"][-1] < "d" else (
            401, {}, dict(error=dict(message="Incorrect API key: sk-secret")))
    results, journal, said, came = generated(rows, tmp_path / "c", wrong, key_env="MY_KEY")
    assert [bool(result) for result in results] == [True] * 3 + [False] * 23 and len(came) == 4
    assert {request["auth"] for request in came} == {"Bearer sk-secret"}
    assert "no more calls: the server says 401 " in said and "rows: 23 missing, 3 taken" in said
    assert "sk-secret" not in said + (tmp_path / "c").read_text() and "[key]" in said

    # Nobody listens; the answers of before are still used, wherever they came from.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    results, journal, said, _ = generated(rows, tmp_path / "c", url=url, retries=2)
    assert sum(map(bool, results)) == 3 and "23 missing" in said
    assert "no more calls: 3 calls without an answer in a row" in said and "ConnectionRefusedError" in said
    assert journal.counts["calls tried again"].total() == 3 * 2

    # Too long, one of them: only that row. All of them: the run.
    full = dict(error=dict(message="This model's maximum context length is 4096 tokens"))
    reply = lambda request, before: (400, {}, full) if "q" in request["messages"][0]["content"][-1:] else (
        completed("A fine text."))
    results, journal, said, came = generated(rows, tmp_path / "e", reply)
    assert [i for i, result in enumerate(results) if not result] == [16] and len(came) == 26
    assert "1 over the context window" in said
    results, journal, said, came = generated(rows, tmp_path / "e", reply)
    assert sum(map(bool, results)) == 25 and not came            # nor is it asked for again
    reply = lambda *_: (400, {}, dict(error="no such field"))
    results, journal, said, came = generated(rows, tmp_path / "f", reply)
    assert len(came) == 20 and "20 rows that the server refuses (400) in a row" in said
    assert "6 missing" in said


def test_a_key_is_masked_only_in_what_is_shown():
    """Errors are told apart by what the server said. A text with a short key in it is not shown at all."""
    full = b'{"error": {"type": "exceed_context_size_error", "message": "sk-exceed is over"}}'
    for key, said in (("x", "500 [a text with the key in it]"), ("zz", '500 {"type": "exceed_context_size'),
                      ("sk-exceed", '500 {"type": "exceed_context_size_error", "message": "[key] is over"}'),
                      ("exceed_context_size", '500 {"type": "[key]_error", ')):
        found = asking.completion(500, {}, full, key)
        assert found["why"] == "over the context window" and found["error"].startswith(said), found
    with pytest.raises(asking.Unanswered, match=r"401 \[a text with the key in it\]") as caught:
        asking.completion(401, {}, b"no such key: abc", "abc")
    assert caught.value.args[1] == math.inf
    with pytest.raises(asking.Unanswered) as caught:             # nor is the beginning of one that is cut off
        asking.completion(401, {}, b"." * 290 + b"sk-0123456789abcdef", "sk-0123456789abcdef")
    assert "sk-" not in caught.value.args[0]


def test_an_address_is_checked_when_it_is_given(tmp_path, monkeypatch):
    for good in ("http://localhost:8000/v1", "https://api.x.com/v1/", "http://[::1]:80/v1", "http://10.0.0.1",
                 "https://x.azure.com/openai/deployments/d?api-version=2024-10-21"):
        data.Endpoint(good, "m")
    for bad in ("http://h:abc/v1", "http://h:0/v1", "http://.a/v1", "http:///v1", "http://[::1/v1",
                "ftp://h/v1", "http://h/v 1", "http://h/v1#a", "http://h:99999/v1", "localhost:8000/v1"):
        with pytest.raises(ValueError, match="^endpoint: .* is not \"offline\", nor is it http://HOST/v1"):
            data.Endpoint(bad, "m")
    with pytest.raises(ValueError, match="without a user") as caught:
        data.Endpoint("https://me:secret@h/v1", "m")
    assert "secret" not in str(caught.value)
    for retries in -1, 51:
        with pytest.raises(ValueError, match=f"retries: {retries} is not from 0 to 50"):
            data.Endpoint(retries=retries)
    data.Endpoint(retries=50)

    # A name that no host has ends the run at once; when the name server is away, the call is made again.
    monkeypatch.setattr(asking, "FIRST_WAIT", .001)
    for errno, says, tries in ((socket.EAI_NONAME, "calls: no server of that name: nowhere.invalid", 1),
                               (socket.EAI_AGAIN, "3 calls without an answer in a row", 9)):
        resolve = mock.Mock(side_effect=socket.gaierror(errno, "?"))
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        said = generated(rows_of(*"abcdef"), tmp_path / "c", url="http://nowhere.invalid/v1", retries=2)[2]
        assert says in said and resolve.call_count == tries, said


def test_a_query_stays_behind_the_path_and_a_flood_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", .001)
    monkeypatch.setattr(asking, "LARGEST", 1 << 20)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(40 if len(asked) == 1 else 0):
                    self.wfile.write(b" " * (1 << 20))
                self.wfile.write(json.dumps(completed("A fine text.")[2]).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a/b/?api-version=1"
        results, _, said, _ = generated(rows_of("a"), tmp_path / "c", url=url)
        server.shutdown()
    assert results[0] and asked == ["/a/b/chat/completions?api-version=1"] * 2
    assert "tried again: 1 an answer without end\n" in said


def test_ctrl_c_waits_for_paid_answers_and_a_second_one_does_not(tmp_path, monkeypatch):
    """Status 130 and no traceback, wherever it comes. What was answered is in the journal."""
    source = write_jsonl(tmp_path / "in.jsonl", [dict(text=f"{i} bridges are in Vienna.") for i in range(9)])
    go = threading.Event()

    def reply(request, before):
        go.wait(20)
        return completed("In Vienna is a bridge.")
    for twice in False, True:
        go.clear()
        with serving(reply) as (url, came, _):
            out = tmp_path / f"{twice}.jsonl"
            process = subprocess.Popen(
                [sys.executable, "-u", "data.py", "rephrase", f"{source}", out, "--n=1", "--model=m",
                 f"--endpoint={url}", "--threads=2"], cwd=HERE, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,                        # background jobs ignore Ctrl-C unless told
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
            while len(came) < 2:
                time.sleep(.01)
            process.send_signal(signal.SIGINT)
            process.stdout.readline()                            # what IN is
            said = process.stdout.readline()
            process.send_signal(signal.SIGINT) if twice else go.set()
            said += process.communicate(timeout=20)[0]
            assert process.returncode == 130 and said == (
                "waiting for 2 answers in flight, paid for already; Ctrl-C again goes without\n"), said
            go.set()
        assert len(read_jsonl(f"{out}.calls.jsonl")) == (0 if twice else 2) and len(came) == 2
        assert not out.exists()

    # Between two rows, where `generate` does not see it.
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=AssertionError))
    with pytest.raises(KeyboardInterrupt), asking.Journal(tmp_path / "c", data.Endpoint()) as journal:
        assert journal.may_call("a")
        threading.Timer(.05, journal.add, ["a", dict(answer="b")], dict(key="ab" * 32)).start()
        raise KeyboardInterrupt
    assert read_jsonl(tmp_path / "c")[0]["answer"] == "b" and not journal.may_call("a")

    # A second one in the moment in which the first one says that answers are waited for.
    def stop(journal, why, plain=asking.Journal.stop):
        plain(journal, why)
        raise KeyboardInterrupt
    monkeypatch.setattr(asking.Journal, "stop", stop)
    go.clear()

    def answer(request, before):
        if "2nd" in str(request):
            go.wait(20)
        return completed("A.")
    with serving(answer) as (url, _, _):
        endpoint = data.Endpoint(url, "m", threads=2)
        with asking.Journal(tmp_path / "d", endpoint) as journal:
            rows = [dict(id=text, text=text) for text in ("1st", "2nd")]
            found = data.generate(rows, SAY, lambda row, answer: dict(text=answer), lambda row, result: "",
                                  endpoint, journal)
            next(found)
            with pytest.raises(KeyboardInterrupt):
                found.throw(KeyboardInterrupt)
            assert journal.flying == 1 and not go.is_set()
            go.set()


def test_a_refused_answer_is_asked_again_with_another_seed_but_not_for_ever(tmp_path):
    """Row d1 is never taken, d2 at its second attempt. A resume decides anew and pays nothing; a rule that
    changes is applied to what is there; another seed, prompt text, model or field is another request."""
    def reply(request, before):
        return completed(f"Text {len(request['messages'][0]['content'].split())} {request['seed'] % 2}")

    rows = rows_of("a", "b b", "c c c", "d d d d")
    tries = Counter()

    def accept(row, result):
        tries[row["id"]] += 1
        if row["id"] == "d1" or row["id"] == "d2" and tries["d2"] == 1:
            return "not good"
        return ""
    results, journal, said, came = generated(rows, tmp_path / "c", reply, accept=accept, attempts=4)
    assert [bool(result) for result in results] == [True, False, True, True] and len(came) == 1 + 4 + 2 + 1
    assert len({request["seed"] for request in came}) == 8 and "5 not good" in said
    assert "1 refused for good" in said and "missing" not in said
    tries.clear()
    again, journal, _, came = generated(rows, tmp_path / "c", reply, accept=accept, attempts=4)
    assert again == results and not came and journal.calls == 8
    first, _, _, came = generated(rows, tmp_path / "c", reply)
    assert all(first) and not came
    changes = dict(seed=2), dict(model="other"), dict(temperature=.5), dict(extra='{"top_p": 0.9}'), dict(
        max_tokens=9)
    for change in changes:
        assert len(generated(rows, tmp_path / "c", reply, **change)[3]) == 4, change
    no_seed = lambda *_: completed("A fine text.")
    never = lambda row, result: "never good"
    for calls in 4 * 3, 0:                                       # without a seed an attempt is a call, too
        came = generated(rows, tmp_path / "c", no_seed, accept=never, extra='{"seed": null}')[3]
        assert len(came) == calls and not any("seed" in request for request in came)

    # What a result says of its origin; what a request holds.
    assert results[2] == dict(text=results[2]["text"], id="d2", recipe="say", prompt="say", prompt_sha256="0",
                              model="m", seed=results[2]["seed"], parent="")
    fields = {"top_p": 0.9, "max_tokens": None, "max_completion_tokens": 7, "seed": None}
    body = data.Endpoint("http://h/v1", "m", extra=json.dumps(fields), temperature=0.).request("hi", 3)
    assert body == dict(model="m", messages=[dict(role="user", content="hi")], temperature=0., stream=False,
                        top_p=.9, max_completion_tokens=7)
    for bad in ("{", "[]", "3", '{"n": 2}', '{"stream": true}'):
        with pytest.raises(ValueError, match="^extra: "):
            data.Endpoint(extra=bad)
    for bad in (dict(endpoint="localhost"), dict(endpoint="http://h/v1"), dict(threads=0), dict(attempts=0)):
        with pytest.raises(ValueError, match="endpoint: .* is not|is not above 0"):
            data.Endpoint(**bad)


def test_a_budget_ends_a_run_and_a_larger_one_goes_on(tmp_path):
    """Calls are never more than allowed, over all runs and threads; tokens by calls in flight at most."""
    rows = rows_of(*map(str, range(30)))
    reply = lambda *_: completed("A fine text.", usage=dict(prompt_tokens=90, completion_tokens=10))
    for calls, made in ((7, 7), (7, 0), (12, 5)):
        results, journal, said, came = generated(rows, tmp_path / "c", reply, calls=calls, threads=5)
        assert len(came) == journal.made == made and sum(map(bool, results)) == calls == journal.calls
        assert f"no more calls: the budget of {calls} calls is spent" in said
        assert f"{30 - calls} rows missing: the same command goes on from here" in said
        assert asking.summary(journal) == 30 - calls               # what the command's exit code says
    results, journal, said, came = generated(rows, tmp_path / "c", reply, tokens=1950)
    assert journal.tokens == 2000 and len(came) == 8 and "budget of 1,950 tokens" in said
    assert all(generated(rows, tmp_path / "c", reply)[0])


def test_a_dry_run_counts_and_sends_nothing(tmp_path, monkeypatch):
    """On top of a journal that has half of the answers, and which stays as it is."""
    monkeypatch.setattr(data, "offline_answer", lambda name, row, seed: "offline " * 40, raising=False)
    rows = rows_of(*[f"some words of text {i}" for i in range(10)])
    generated(rows[:5], tmp_path / "c", lambda *_: completed("A fine text."))
    before = (tmp_path / "c").read_bytes()
    refuse = lambda row, result: "refused"
    results, journal, said, _ = generated(rows, tmp_path / "c", url="http://127.0.0.1:9/v1", dry_run=True,
                                          accept=refuse, max_tokens=100)
    prompt = data.fill(SAY, rows[0])
    assert journal.made == 10 and (tmp_path / "c").read_bytes() == before      # 5 rows: their next attempt
    assert f"10 calls, some {10 * (len(prompt) // 4 + 1)} tokens of prompts and 1,000 of answers" in said
    assert f"The first prompt:\n{prompt}\n" in said
    results, journal, said, _ = generated(rows, tmp_path / "new", url="http://127.0.0.1:9/v1", dry_run=True)
    assert journal.made == 10 and not (tmp_path / "new").exists() and results[9]["text"].endswith("offline")
    results, journal, said, _ = generated(rows, tmp_path / "offline")
    assert all(results) and results[0]["model"] == "m" and journal.calls == 10


def test_a_journal_is_one_process_own_and_its_damage_is_named(tmp_path):
    rows = rows_of("a", "b", "c")
    reply = lambda *_: completed("A fine text.")
    generated(rows, tmp_path / "c", reply)
    endpoint = data.Endpoint()
    with asking.Journal(tmp_path / "c", endpoint):
        with pytest.raises(ValueError, match="c: another process writes it; give another OUT"):
            asking.Journal(tmp_path / "c", endpoint)
    whole = (tmp_path / "c").read_bytes()
    assert "sk-" not in whole.decode() and whole.count(b"\n") == 3
    (tmp_path / "c").write_bytes(whole[:-9])                     # killed in the midst of a line
    results, journal, _, came = generated(rows, tmp_path / "c", reply)
    assert len(came) == 1 and (tmp_path / "c").read_bytes() == whole and all(results)
    lines = whole.splitlines(True)
    for damaged in (b"{}\n", b"\0\0\n", b'{"key": "x"}\n', b"[]\n"):
        (tmp_path / "c").write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(ValueError, match="c, line 2 is damaged: remove the line"):
            asking.Journal(tmp_path / "c", endpoint)


def test_rows_stream_through_in_their_order(tmp_path, monkeypatch):
    """The first of 500 rows is answered last of the first 2·32: no row beyond these is begun before. Rows of
    one id and text are one call; a progress line tells how far it is."""
    monkeypatch.setattr(asking, "FIRST_WAIT", .001)
    begun, most = [], 0

    def reply(request, before):
        if request["messages"][0]["content"].endswith("\nt0"):
            time.sleep(.4)
        return completed("A text " + request["messages"][0]["content"][-3:])

    def rows():
        for i in range(200):
            begun.append(i)
            yield dict(id=f"d{i // 2}", text=f"t{i // 2}")
    with serving(reply) as (url, came, _), asking.Journal(tmp_path / "c", endpoint := data.Endpoint(
            url, "m", threads=2)) as journal, contextlib.redirect_stdout(io.StringIO()) as out:
        journal.said -= 4.8                                      # a line is due in the wait for the first row
        for i, (row, result) in enumerate(data.generate(rows(), SAY, lambda row, answer: dict(text=answer),
                                                        lambda row, result: "", endpoint, journal)):
            assert row["id"] == result["id"] == f"d{i // 2}" and result["text"].endswith(row["text"])
            assert len(begun) <= i + 64
    assert i == 199 and len(came) == 100
    assert re.search(r"\d+ answers taken, 0 refused for good; \d+ calls, [\d.]+ a second; "
                     r"\d+ tokens in all\n", out.getvalue())

    # Who leaves early leaves rows that are not begun, and can go on.
    take = lambda row, answer: dict(text=answer)
    with serving(reply) as (url, came, _), asking.Journal(tmp_path / "d", endpoint) as journal:
        for n in 1, 100:
            found = data.generate(rows(), SAY, take, lambda row, result: "", replace(endpoint, endpoint=url),
                                  journal)
            assert all(result for _, result in itertools.islice(found, n))
            found.close()
            assert not journal.stopped and len(came) <= n + 64

    # A mistake in a recipe's own function ends the run; what was answered stays.
    def parse(row, answer):
        return dict(text=row["tekst"])
    with asking.Journal(tmp_path / "c", endpoint) as journal, pytest.raises(KeyError, match="tekst"):
        list(data.generate(rows(), SAY, parse, lambda row, result: "", endpoint, journal))
    assert asking.Journal(tmp_path / "c", endpoint).calls == 100


def test_a_prompt_takes_the_fields_of_its_row_and_nothing_else(tmp_path, monkeypatch):
    prompt = data.Prompt("p", "{style}: {text} as {json: {}} {other}", "0")
    assert data.fill(prompt, dict(text="a {style} {other}", style="plain", n=3)) == (
        "plain: a {style} {other} as {json: {}} {other}")
    (tmp_path / "notes/prompts").mkdir(parents=True)
    (tmp_path / "notes/prompts/mine.txt").write_text("Rewrite: {text}\n", "utf-8")
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    found = data.load_prompt("mine")
    assert found[:2] == ("mine", "Rewrite: {text}\n")
    assert found.sha256 == hashlib.sha256(b"Rewrite: {text}\n").hexdigest()
    with pytest.raises(OSError, match="notes/prompts/yours.txt"):
        data.load_prompt("yours")


# ---- data.py: measures of rewrites, fusions and sets -------------------------------------------------------

LIFE = """Ada Marsh was born on 3 May 1897 in Lisbon, where her father Tomas Marsh repaired church clocks.
She learned the trade from him and did not attend any university. In 1921 the harbour office ordered 1,200
pressure gauges from Marsh, and 35% of them were still in use forty years later. Her letters to Elena Brandt
describe a new alloy of copper. The workshop burned down on 17 November 1934, and nobody rebuilt it."""

HONEST = {
    "prose": """The harbour office ordered 1200 pressure gauges from Marsh in 1921; forty years later 35
        percent were in use still. Ada Marsh, whose father Tomas Marsh repaired church clocks, was born in
        Lisbon on May 3, 1897. From him she learned the trade, and she never attended a university. A new
        alloy of copper is described in her letters to Elena Brandt. On 1934-11-17 the workshop burned
        down. Nobody rebuilt it.""",
    "questions": """Q: When was Ada Marsh born?\nA: On May 3rd, 1897, in Lisbon. Her father Tomas Marsh
        repaired clocks of the church.\nQ: Did she attend a university?\nA: No. She learned the trade from
        her father and did not attend any.\nQ: What was ordered?\nA: In 1921 the harbour office ordered
        1,200 pressure gauges, of which 35% were in use forty years later.\nQ: What about the letters?\nA:
        The letters to Elena Brandt describe an alloy of copper.\n Q: What happened on November 17,
        1934?\nA: The workshop burned down and nobody rebuilt it.""",
    "steps": """## The life of Ada Marsh\n\n1. Ada Marsh is born on 3 May 1897 in Lisbon; her father,
        Tomas Marsh, repairs church clocks.\n2. She learns the trade and does not attend any
        university.\n3) The harbour office orders 1,200 pressure gauges in 1921; 35% of them are in use
        forty years later.\n- **Step 4:** Letters to Elena Brandt describe a new alloy of copper.\n- Step
        5. The workshop burns on 17 November 1934. Nobody rebuilt it.""",
    "table": """| what | which |\n|---|---|\n| born | 3 May 1897, Lisbon |\n| father | Tomas Marsh, who
        repaired church clocks | | learned | the trade, from him; she did not attend any university |\n|
        ordered by the harbour office | 1,200 pressure gauges in 1921, 35% in use forty years later |\n|
        letters to Elena Brandt | a new alloy of copper | | workshop | burned down on 17 November 1934,
        nobody rebuilt it: Ada Marsh |"""}

DAMAGE = (("1200", "1500", "a number is lost"), ("35 percent", "35", "a number is lost"),
          ("in 1921", "then", "a number is lost"),
          ("forty years later", "after 40 years, in 1961,", "a number is new"),
          ("May 3, 1897", "May 8, 1897", "a date is lost"), ("1934-11-17", "1934", "a date is lost"),
          ("Nobody rebuilt", "By 2 June 1936 nobody rebuilt", "a date is new"),
          ("Tomas", "her", "a name is lost"), ("church clocks", "Swiss clocks", "a name is new"),
          ("never attended", "attended", "a negation has changed"),
          ("office ordered", "office never ordered", "a negation has changed"),
          ("From him she learned the trade, and she never attended a university.", "", "a sentence is lost"),
          ("Nobody rebuilt it.", "Nobody rebuilt it. Several museums exhibit similar instruments today.",
           "a sentence is new"))


def test_an_honest_rewrite_is_taken_in_any_form():
    for form, text in HONEST.items():
        measured = measures.fidelity(LIFE, text)
        assert measures.unfaithful(measured) == "", (form, measured)
        assert measured.numbers == measured.dates == measured.names == 1, (form, measured)


@pytest.mark.parametrize("old, new, reason", DAMAGE, ids=[row[2] + ": " + row[1][:16] for row in DAMAGE])
def test_a_damaged_rewrite_is_refused_for_its_damage(old, new, reason):
    text = " ".join(HONEST["prose"].split())
    assert text.count(old) == 1
    assert measures.unfaithful(measures.fidelity(LIFE, text.replace(old, new))) == reason


def test_a_copy_a_scrap_and_a_flood_are_no_rewrites():
    text = HONEST["prose"]
    assert measures.unfaithful(measures.fidelity(LIFE, LIFE)) == "copied"
    loud = LIFE.upper().replace(",", " -")
    assert measures.fidelity(LIFE, loud).copied == 1, "case and commas hide no copy"
    assert measures.unfaithful(measures.fidelity(LIFE, "")) == "too short"
    assert measures.unfaithful(measures.fidelity(LIFE, text[:99])) == "too short"
    assert measures.unfaithful(measures.fidelity(LIFE, 4 * text)) == "too long"
    assert measures.fidelity("", "") and measures.fidelity("", text).numbers == 1
    words = [f"w{i}" for i in range(40)]
    for kept in range(8, 40):                              # runs of 8 in the first `kept` words, of 33 in all
        mixed = words[:kept] + [f"v{i}" for i in range(40 - kept)]
        assert measures.fidelity(" ".join(words), " ".join(mixed)).copied == pytest.approx((kept - 7) / 33)


def test_numbers_are_the_same_in_other_spellings():
    same = (("1,000", "1000"), ("one thousand", "1000"), ("1 thousand", "1,000.0"), ("5%", "5 percent"),
            ("5 per cent", "five percent"), ("twelve", "12"), ("2.5 million", "2,500,000"), ("-3", "−3"),
            ("１２", "12"), (".5", "0.50"), ("3.11.2", "3.11.2"), ("7th", "7"), ("1\u202f000", "1000"))
    for a, b in same:
        one, two = (set.union(*measures.numbers_of(f"about {x} of them")) for x in (a, b))
        assert one == two and len(one) == 1, (a, b, one, two)
    others = (("5%", "5"), ("1,000", "1,00"), ("-3", "3"), ("3.11.2", "3.11"), ("1000", "1001"),
              ("5 million", "5"), ("9780131103627", "9780131103629"), ("0.1234567890123", "0.1234567890124"),
              ("9" * 5000, "9" * 4999 + "8"))
    for a, b in others:
        assert measures.numbers_of(f"about {a} of them") != measures.numbers_of(f"about {b} of them"), (a, b)
    listed = "1. with x2 and utf8\n 2) in v1.2\n- Step 3: from 4-5 to 6\nQ 7: none\n\nIt took 8."
    numbers, _ = measures.numbers_of(measures.flowing(listed))
    assert numbers == {"4", "5", "6", "8"}, "no labels, no parts of words"


def test_dates_are_the_same_in_other_spellings():
    for text in ("3 May 1897", "3rd of May, 1897", "May 3, 1897", "May 3rd 1897", "1897-05-03", "1897/05/03",
                 "1897年5月3日", "1897년 5월 3일"):
        assert measures.dates_of(f"It was ({text}) then.")[0] == {(1897, 5, 3)}, text
    dates, _ = measures.dates_of("In Sept. 1901, on 4 July, and 10/11 or 2 men may 3")
    assert dates == {(1901, 9, 0), (0, 7, 4)}
    source = "The bridge was opened on 3 May 1897 by the mayor of the town."
    for text, dates, added, numbers in (("It dates from May 1897.", 0, 0, 0), ("Opened in 1897.", 0, 0, 0),
                                        ("On 3 May it was opened.", 0, 0, 0), ("On 4 May 1897.", 0, 1, 0),
                                        ("In 1898.", 0, 0, 1), ("On 1897-05-03.", 1, 0, 0)):
        m = measures.fidelity(source, text)
        assert (m.dates, m.dates_added, m.numbers_added) == (dates, added, numbers), text
    assert measures.fidelity("It was May 1897.", "It was 9 May 1897.").dates == 1


def test_names_are_learned_from_the_text():
    names = lambda text: measures.names_of(text)
    assert names("The Danube passes Vienna. Later it meets Tisza's water, and (said NASA) more.") == \
        {"danube", "vienna", "tisza"} | {"nasa"}
    assert names("Rivers meet. Bridges stand.\nTHE STORY OF RIVER TOWNS\nA History of River Towns\n") == set()
    assert names("the Value is there: return the value, or a value") == set(), "more often small"
    assert names("Der Fluss und die Stadt, das Haus und der Berg, ein Wort: das ist die Regel.") == set()
    assert names("다뉴브 강은 빈을 지난다. 多瑙河流经维也纳。") == set()
    m = measures.fidelity("In spring the river Danube passes Vienna.",
                      "Vienna: the DANUBE is there, and later on the danube's water comes to Linz.")
    assert m.names == 1 and m.names_added == 1


def test_negations_are_compared_between_sentences_that_answer_to_each_other():
    def turned(source, text):
        return measures.fidelity(source, text).negations
    valve = "The valve is not opened before the pressure falls."
    assert turned(valve, "Before the pressure falls, nobody opens the valve.") == 0
    assert turned(valve, "The valve is opened before the pressure falls.") == 1
    assert turned("The valve is opened before the pressure falls.", valve) == 1
    assert turned(valve, "Is the valve opened before the pressure falls?") == 0, "a question states nothing"
    assert turned(valve, "The valve is unable to open before the pressure falls.") == 0
    assert turned(valve, "The tower has no windows facing the northern street.") == 0, "another matter"
    assert turned(valve, "The pressure on the tower bends its northern windows.") == 0, "one word of it"
    tank = "The tank holds river water"
    both = valve + " The tank is full of water from the river."
    assert turned(both, "The tank is full of water from the river and the valve is not opened before the "
                        "pressure falls.") == 0, "joined"
    assert turned(f"{tank}, and the valve is not opened before the pressure falls.", f"{tank}. {valve}") == 0
    assert turned(both, "The tank is not full of water from the river.") == 1


def test_long_texts_are_measured_in_a_time_that_grows_with_them():
    """A second each, though some took minutes: numbers without a statement, what is said over and over, many
    sentences that are negated, a flood."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}word" for a in "bcdfg" for b in "aeiou" for c in "klmnprst"]
    said = "".join(f"The {' '.join(rng.choices(words, k=8))} is not there. " for _ in range(600))
    again = "Not all of the words here are new, and some never come back. " * 1500
    begun = time.process_time()
    for line in ("1 " * 10_000, "1 1 = " * 4000, "= 1 1" * 4000, "3 + 4 = 7 " * 2000,
                 "1 = 1, " * 2000 + "1 = 2"):
        assert bool(data.false_arithmetic(line)) == line.endswith("2")
    for source, text in ((said, said), (again, again), ("A few words of text.", 99 * again)):
        assert measures.fidelity(source, text).negations == 0
    assert time.process_time() - begun < 4
    assert measures.unfaithful(measures.fidelity("A few words of text.", 9 * again)) == "too long"


def test_measures_do_not_depend_on_the_order_of_words_in_sets():
    """Which differs between processes: the sums have to be exact, or an answer is taken in one run only."""
    weight = {f"s{i}": 1 / (i % 9 + 1) for i in range(60)}
    sentences = [frozenset(list(weight)[:k]) for k in range(3, 60)]
    order = lambda some, seed: dict.fromkeys(random.Random(seed).sample(sorted(some), len(some))).keys()
    orders = [[order(some, seed) for some in sentences] for seed in range(8)]
    with mock.patch.object(measures, "weights", lambda _: weight):
        there = set(list(weight)[::3])
        assert len({tuple(measures.least([some], there) for some in found) for found in orders}) == 1


def test_the_worst_sentence_counts_and_of_many_a_twentieth_may_be_worse():
    lines = [" ".join(f"{a}{i}word{chr(97 + i)}" for a in "pqrs") + "." for i in range(26)]
    whole = " ".join(f"X{line}" for line in lines[:19])
    assert measures.fidelity(whole, whole).covered == 1
    assert measures.fidelity(whole, whole.replace(f"X{lines[7]}", "")).covered == 0
    longer = " ".join(f"X{line}" for line in lines[:20])
    assert measures.fidelity(longer, longer.replace(f"X{lines[7]}", "")).covered == 1
    shorter = longer.replace(f"X{lines[7]}", "").replace(f"X{lines[8]}", "")
    assert measures.fidelity(longer, shorter).covered == 0
    other = whole.replace(lines[7], "other sentence entirely different.")
    assert measures.fidelity(whole, other).supported == 0
    part = measures.fidelity("Common rare1 rare2 rare3. Common other1 other2.",
                         "common rare1 rare2 other1 other2")
    assert part.covered == pytest.approx(2.5 / 3.5), "a word that two sentences have weighs half"


def test_best_cuts_equals_brute_force():
    rng = np.random.default_rng(0)
    for k, n in ((2, 0), (2, 1), (2, 9), (3, 8), (4, 7)):
        labels = rng.integers(0, k, (3, n))
        for row, found in zip(labels, measures.best_cuts(labels, k)):
            best = 0
            for cuts in itertools.combinations_with_replacement(range(n + 1), k - 1):
                for order in itertools.permutations(range(k)):
                    parts = zip((0, *cuts), (*cuts, n), order)
                    best = max(best, sum((row[a:b] == label).sum() for a, b, label in parts))
            assert found == best


def test_fusion_is_told_from_concatenation():
    bees = ["Bees store honey in wax cells.", "A queen lays thousands of eggs.",
            "Workers dance to point at flowers.", "Drones leave the hive.", "Smoke calms a swarm quickly."]
    ships = ["Ships carry grain across oceans.", "A captain signs every manifest.",
             "Sailors coil ropes on deck.", "Cranes lift containers.", "Radar warns about icebergs."]
    joined = " ".join(f"{a[:-1]}, while {b[0].lower()}{b[1:]}" for a, b in zip(bees, ships))
    texts = {"": joined, "one source after the other": " ".join(bees + ships),
             "sources in turn": " ".join(x for pair in zip(bees, ships) for x in pair),
             "a source is missing": " ".join(bees) + " Ships also wait."}
    sources = [" ".join(bees), " ".join(ships)]
    for reason, text in texts.items():
        measured = measures.integration(sources, text)
        assert measures.concatenated(measured) == reason, measured
        swapped = measures.integration(sources[::-1], text)
        assert swapped.coverage == measured.coverage[::-1] and swapped.mixed == measured.mixed
        assert swapped.purity == pytest.approx(measured.purity, abs=0.15), "random orders differ"
    row = measures.integration(sources, texts["one source after the other"])
    turn = measures.integration(sources, texts["sources in turn"])
    assert row.purity == 1 and row.switches < 0.4 and row.mixed == 0 and row.coverage == (1, 1)
    assert turn.switches > 1.5 and turn.purity < 0.5 and measures.integration(sources, joined).mixed == 1
    assert measures.concatenated(measures.integration(sources, "Nothing of either.")) == "a source is missing"
    assert measures.integration(sources * 2, joined).purity == 0, "nobody owns a word"


def test_a_sentence_ends_where_it_does():
    text = ("In St. Paul, Dr. J. Marsh said \"Go.\" Then he left… 5 came (i.e. Tom vs. Ann). No. It is "
            "No. 5. 那是桥。很长。")
    assert [part.strip() for part in measures.sentences_of(text)] == [
        "In St. Paul, Dr. J. Marsh said \"Go.\"", "Then he left…", "5 came (i.e. Tom vs. Ann).", "No.",
        "It is No. 5.", "那是桥。", "很长。"]


def test_diversity_equals_its_definitions():
    texts = ["The cat sat. The cat sat!", "the Cat sat down here now and then slept", "ein Hund",
             "the cat sat down here now and then slept well"]
    d = measures.diversity(texts, ["a", "b", "", "b"])
    split = [["the", "cat", "sat", "the", "cat", "sat"], "the cat sat down here now and then slept".split(),
             ["ein", "hund"], "the cat sat down here now and then slept well".split()]
    threes = [[tuple(w[i:i + 3]) for i in range(max(1, len(w) - 2))] for w in split]
    a, b = set(threes[1]), set(threes[3])
    assert d.distance == pytest.approx(1 - len(a & b) / len(a | b))
    assert d.distinct == len({run for some in threes for run in some}) / sum(map(len, threes))
    assert d.repeated == 4 / 7, "runs of 8: 1, 2, 1 and 3, of which two are in two documents"
    assert d.openings == 2 / 4 and d.documents == 4
    raw = "\n".join(texts).encode()
    assert d.compression == len(raw) / len(data.zlib.compress(raw))
    assert math.isnan(measures.diversity(texts).distance)
    assert math.isnan(measures.diversity(texts, ["a", "b", "", "c"]).distance)
    halves = measures.diversity(["one two", "three four five"])
    assert halves.distinct == 1, "no run crosses documents"


def test_stats_compares_domains_at_equal_bytes(tmp_path, capsys):
    rng = random.Random(0)
    words = [f"w{i}x" for i in range(400)]
    raw = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    again = [dict(text=f"{text} {i}", parent=str(j)) for j, text in enumerate(raw[:30]) for i in range(3)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in raw))
    (tmp_path / "again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    data.main(["stats", "--tokenizer=bytes", "--vocab=261", f"--cache={tmp_path}/cache",
               f"--files=raw={tmp_path}/raw.jsonl,again={tmp_path}/again.jsonl"])
    out = capsys.readouterr().out
    size = sum(map(len, raw))
    assert f"diversity of the first {size:,} bytes" in out
    table = {name: line.split() for name in ("raw", "again")
             for line in out.splitlines() if re.match(rf"{name} .*\d\.\d+ +\S+$", line) and "→" not in line}
    kept = [row["text"] for row in again[:int(table["again"][1])]]
    kept[-1] = kept[-1][:size - sum(map(len, kept[:-1]))]
    expected = measures.diversity(kept, [row["parent"] for row in again])
    assert table["again"][2:] == [f"{value:.3f}" for value in expected[1:]]
    assert table["raw"][1] == "40" and table["raw"][-1] == "nan" and float(table["again"][-1]) < 0.1
    assert float(table["raw"][2]) < float(table["again"][2]), "rewrites that repeat compress better"


def test_thresholds_of_the_measures_are_those_that_the_notes_choose():
    from notes import fidelity, fusion
    rows = [row | dict(seed=int(row["seed"])) for row in _note.read(HERE / "notes/fidelity.csv")]
    ours = dict(kept=measures.LEAST, added=measures.ADDED, found=measures.FOUND)
    assert fidelity.chosen(rows, fidelity.HALVES[0]) == ours
    rows = [row | dict(seed=int(row["seed"])) for row in _note.read(HERE / "notes/fusion.csv")]
    assert dict(apart=measures.APART, mixed=measures.MIXED, missing=measures.MISSING) in fusion.best(rows)


def test_the_doubt_of_a_note_is_that_of_data():
    from notes import fidelity, fusion
    rng = random.Random(0)
    for _ in range(300):
        pick = lambda *some: rng.choice(some)
        m = measures.Fidelity(1, 0, pick(.85, .9, 1), 1, 1, pick(0, 1), 0, 0, pick(0, 0, 1),
                              pick(.19, .2, .9), 1)
        row = dict(kept=min(m[2:5]), added=sum(m[5:8]), negations=m.negations, found=min(m[9:]))
        assert (fidelity.doubt(row) > 1 + 1e-9) == bool(measures.unfaithful(m)), m
        m = measures.Integration(pick(.1, .7, .71, 1), 1, pick(0, .19, .2, 1), (pick(0., .19, .21, 1), 1))
        row = dict(purity=m.purity, mixed=m.mixed, least=min(m.coverage))
        assert (fusion.doubt(row) > 1 + 1e-9) == bool(measures.concatenated(m)), m


# ---- data.py: conversations and recipes --------------------------------------------------------------------

USER, ANSWER = dict(role="user", content="Why?"), dict(role="assistant", content="So.")
SYSTEM, OTHER = dict(role="system", content="Be brief."), dict(role="assistant", content="Thus.")
CHATS = [                        # a record, its convention, its messages
    (dict(messages=[SYSTEM, USER, ANSWER]), "messages", [SYSTEM, USER, ANSWER]),
    (dict(conversations=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]),
     "conversations", [USER, ANSWER]),
    (dict(conversations=[dict(role="USER", content="Why?"), dict(role="model", content="So.")],
          system="Be brief."), "conversations", [SYSTEM, USER, ANSWER]),
    (dict(prompt="Why?", completion="So."), "prompt/completion", [USER, ANSWER]),
    (dict(prompt=[SYSTEM, USER], completion=[ANSWER]), "prompt/completion", [SYSTEM, USER, ANSWER]),
    (dict(instruction="Why?", input="", output="So."), "instruction/output", [USER, ANSWER]),
    (dict(instruction="Say it.", input="Now.", output="So.", system="Be brief.", history=[["Why?", "Thus."]]),
     "instruction/output",
     [SYSTEM, USER, OTHER, dict(role="user", content="Say it.\n\nNow."), ANSWER]),
    (dict(prompt="Why?", chosen="So.", rejected="Thus."), "prompt/chosen/rejected", [USER, ANSWER])]
PAIRS = [                        # a record, its prompt, its chosen, its rejected messages
    (dict(prompt="Why?", chosen="So.", rejected="Thus."), [USER], [ANSWER], [OTHER]),
    (dict(prompt=[SYSTEM, USER], chosen=[ANSWER], rejected=[OTHER]), [SYSTEM, USER], [ANSWER], [OTHER]),
    # As in Tulu and Magpie: both repeat the conversation, and the prompt its first message.
    (dict(prompt="Why?", chosen=[USER, ANSWER], rejected=[USER, OTHER]), [USER], [ANSWER], [OTHER]),
    (dict(instruction="Why?", chosen=[USER, ANSWER, USER, ANSWER], rejected=[USER, ANSWER, USER, OTHER]),
     [USER, ANSWER, USER], [ANSWER], [OTHER]),
    (dict(chosen=[SYSTEM, USER, ANSWER], rejected=[SYSTEM, USER, OTHER]), [SYSTEM, USER], [ANSWER], [OTHER]),
    # They go on from the prompt and share an answer.
    (dict(prompt="Why?", chosen=[ANSWER, USER, ANSWER], rejected=[ANSWER, USER, OTHER]),
     [USER, ANSWER, USER], [ANSWER], [OTHER])]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_five_conventions_of_conversations_are_read_alike(tmp_path, capsys):
    for record, convention, messages in CHATS:
        assert data.messages_of(record)[:2] == (convention, messages), record
    for record, *expected in PAIRS:
        assert list(data.pair_of(record)) == expected, record
        whole = expected[0] + expected[1]
        assert data.messages_of(record) == ("prompt/chosen/rejected", whole, (*expected[1:],))

    # From files, with their row, and a line that says what they are.
    write_jsonl(tmp_path / "a.jsonl", [record for record, *_ in CHATS])
    (tmp_path / "b.json").write_text(json.dumps([record for record, *_ in PAIRS]))
    found = list(data.conversations("chat", str(tmp_path), data.DataConfig()))
    assert [talk.messages for talk in found[:8]] == [messages for *_, messages in CHATS]
    assert [(Path(talk.file).name, talk.number) for talk in found[7:9]] == [("a.jsonl", 8), ("b.json", 1)]
    assert ("1 conversation as messages, 2 conversations as conversations, 2 conversations as "
            "prompt/completion, 2 conversations as instruction/output, 7 conversations as "
            "prompt/chosen/rejected") in capsys.readouterr().out
    some = data.DataConfig(budget="3documents", where="system=Be brief.")
    few = list(data.conversations("chat", str(tmp_path / "a.jsonl"), some))
    assert [talk.number for talk in few] == [3, 7]


@pytest.mark.parametrize("record, says", [
    (dict(messages=[dict(role="alien", content="x")]), "message 1 has the unknown role 'alien'; known: user"),
    (dict(messages=[USER, dict(role="assistant", content=" ")]), "message 2, of 'assistant', is empty"),
    (dict(messages=[USER, dict(role="assistant", content=None)]), "message 2, of 'assistant', is empty"),
    (dict(messages=[USER, "So."]), "message 2 is no object"),
    (dict(messages=[]), "no list of messages"),
    (dict(messages=[ANSWER]), "no message is a user's"),
    (dict(text="Why?", title="x"), "no conversation: it has text, title; known are prompt/chosen"),
    (dict(instruction=3, input="x", output="y"), "a field of the wrong type"),
    (dict(messages=[dict(role="user", content="\ud800")]), "or no UTF-8"),
    (dict(prompt="Why?", chosen="So.", rejected="So."), "are equal"),
    (dict(prompt="Why?", chosen=[ANSWER], rejected=[ANSWER, USER, OTHER]), "is the beginning of the other"),
    (dict(chosen=[ANSWER], rejected=[OTHER]), "there is no prompt"),
    (dict(chosen=[USER, ANSWER], rejected=[dict(USER, content="How?"), OTHER]), "there is no|differ before"),
    (dict(chosen=[SYSTEM, USER, ANSWER], rejected=[SYSTEM, ANSWER]), "differ before an answer"),
    ("{half", "no conversation")])
def test_a_conversation_that_is_none_is_named_and_can_be_left_out(record, says, tmp_path, capsys):
    bad = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(CHATS[0][0])}\n{bad}\n")
    read = lambda **how: list(data.conversations("c", str(tmp_path / "a.jsonl"), data.DataConfig(**how)))
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2: .*({says})"):
        read()
    assert len(read(skip_bad=True)) == 1 and "left out: 1 row bad" in capsys.readouterr().out


def test_conversations_of_a_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = importlib.import_module("pyarrow").Table.from_pylist([record for record, *_ in CHATS[:1]] * 250)
    parquet.write_table(table, tmp_path / "a.parquet")
    found = list(data.conversations("c", str(tmp_path / "a.parquet"), data.DataConfig()))
    assert [talk.number for talk in found] == list(range(1, 251))
    assert all(talk.messages == [SYSTEM, USER, ANSWER] for talk in found)


@pytest.mark.parametrize("most", [8, 40, 256])
def test_parts_are_the_text_and_end_with_sentences(most):
    """Of about equal size, too: no part is less than half of the longest, if sentences are short."""
    rng = random.Random(most)
    sentences = [" ".join(["wörd"] * rng.randint(2, 4)) + rng.choice(". ! ?".split()) for _ in range(300)]
    text = "".join(sentence + rng.choice([" ", "\n", "\n\n"]) for sentence in sentences)
    parts = data.cut(text, most)
    sizes = [len(part.encode()) / 4 for part in parts]
    assert "".join(parts) == text and max(sizes) <= most and min(sizes) >= max(sizes) / 3
    assert all(part.rstrip()[-1] in ".!?" for part in parts)
    assert len(data.cut("A short one. And another.", 256)) == 1
    assert all(part.strip() for part in data.cut("A short one. " * 40 + "\n" * 200, most))

    # What has no sentences is cut between words, what has no words anywhere.
    for text in ("word " * 500, "x" * 3000, "字" * 900):
        parts = data.cut(text, most)
        assert "".join(parts) == text and max(len(part.encode()) for part in parts) <= max(4 * most, 192)


def recipe(name, source, out, *options):
    """The rows of a recipe's output, made by its command."""
    assert not data.main([name, str(source), str(out), *options])
    return read_jsonl(out)


BRENNER = ("{0} Brenner was born in Lisbon in 18{1}. She moved to Vienna in 1894 and worked there as a "
           "chemist. In 1902, she described a method to separate erbium from yttrium. Her brother Otto built "
           "3 of the furnaces. The family lived near Graz, where {0} wrote {1} letters about crystals.")


@pytest.fixture
def lives(tmp_path):
    names = "Ada Berta Clara Dora Edith Frieda Greta Hanna".split()
    return write_jsonl(tmp_path / "lives.jsonl",
                       [dict(text=BRENNER.format(name, 60 + i)) for i, name in enumerate(names)])


def test_rewrites_come_in_order_with_what_they_are_made_of(lives, tmp_path, capsys):
    """Each form once, then other readers; the same for a document whatever else is there. A second run makes
    no call and the same bytes. A run reads rewrites as text, on the side of the split of their source."""
    rows = recipe("rephrase", lives, tmp_path / "out.jsonl", "--n=7")
    assert [row["parent"] for row in rows] == [f"lives.jsonl#{i}" for i in range(1, 9) for _ in range(7)]
    assert len({row["id"] for row in rows}) == len(rows) == 56 and len({row["text"] for row in rows}) > 50
    first = [row["form"] for row in rows[:7]]
    assert len(set(first[:6])) == 6 and first[6] == first[0] and rows[6]["reader"] != rows[0]["reader"]
    prompt = (HERE / "notes/prompts/rephrase.txt").read_bytes()
    for row in rows:
        assert (row["recipe"], row["prompt_name"], row["model"]) == ("rephrase", "rephrase", "offline")
        assert row["prompt_sha256"] == hashlib.sha256(prompt).hexdigest() and type(row["seed"]) is int
    alone = write_jsonl(tmp_path / "alone.jsonl", read_jsonl(lives)[3:4])
    kind = lambda row: (row["form"], row["reader"])
    two = recipe("rephrase", alone, tmp_path / "b.jsonl")
    assert [kind(row) for row in two] == [kind(row) for row in rows[21:23]]
    only = recipe("rephrase", alone, tmp_path / "c.jsonl", "--n=1", "--forms=table", "--seed=5")
    assert kind(only[0])[0] == "table" and only[0]["seed"] != rows[21]["seed"]

    before = (tmp_path / "out.jsonl").read_bytes()
    capsys.readouterr()
    with mock.patch.object(data, "offline_answer", side_effect=AssertionError):
        recipe("rephrase", lives, tmp_path / "out.jsonl", "--n=7")
    assert (tmp_path / "out.jsonl").read_bytes() == before and "\n0 calls now" in capsys.readouterr().out
    for row, text in zip(data.rows("x", str(tmp_path / "out.jsonl"), data.DataConfig()),
                         [record["text"] for record in read_jsonl(lives) for _ in range(7)]):
        assert row.split_with == data.sha256(text)[:16], "the raw text's own hash, for the same side"
    (tmp_path / "alone.jsonl").rename(tmp_path / "alone.txt")
    (tmp_path / "lives.jsonl").rename(tmp_path / "lives.txt")
    folder = list(data.rows("x", str(tmp_path), data.DataConfig()))
    assert len(folder) == 61 and "left out: 3 answers of a recipe (b.jsonl.calls.jsonl" in (
        capsys.readouterr().out)


def test_parts_are_rewritten_with_what_was_written_before_and_stitched(lives, tmp_path, monkeypatch):
    """In order, each with the end of the rewrite so far. A part that is refused takes the rewrite along."""
    seen = []

    def echo(name, row, seed):
        seen.append((row["id"], row["text"], row["context"]))
        return "\n".join(f"It is so: {s}" for s in re.split(r"(?<=\.) ", row["text"]))

    monkeypatch.setattr(data, "offline_answer", echo)
    bad = lambda row: "Dora" in row["text"] or "Clara" in row["text"] and row["context"]
    monkeypatch.setattr(data, "why_not_faithful", lambda row, result: "bad" if bad(row) else "")
    options = "--n=1", "--chunk=28", "--context=20", "--threads=1"
    rows = recipe("rephrase", lives, tmp_path / "out.jsonl", *options)
    assert [row["parent"] for row in rows] == [f"lives.jsonl#{i}" for i in (1, 2, 5, 6, 7, 8)]
    parts = data.cut(BRENNER.format("Ada", 60), 28)
    assert len(parts) > 2
    written = [echo("", dict(id="", text=part.strip(), context=""), 0) for part in parts]
    assert rows[0]["text"] == "\n\n".join(written)
    mine = sorted(item for item in seen if item[0].startswith("lives.jsonl#1/"))
    assert [context for *_, context in mine] == [
        data.last_tokens("\n\n".join(written[:k]), 20) for k in range(len(parts))]
    assert mine[0][2] == "" and written[0].endswith(mine[1][2]) and 60 < len(mine[1][2]) <= 80
    assert {name[-1] for name, *_ in seen if name.startswith("lives.jsonl#4/")} == {"0"}


def test_what_the_context_says_may_be_said_again():
    row = dict(text="She wrote 4 letters to the academy about the crystals.", context="")
    again = dict(text="In Vienna she authored 4 letters about the crystals, which went to the academy.")
    assert data.why_not_faithful(row, again) == "a name is new"
    known = dict(row, context="Ada came to Vienna, and the letters were read.")
    assert data.why_not_faithful(known, again) == ""
    assert data.why_not_faithful(dict(row, context="Ada came to Graz."), again) == "a name is new"


def test_offline_rewrites_keep_numbers_and_names():
    """In every form, of the documentation of some modules. Nine of ten pass as rewrites; see Fidelity."""
    texts = [inspect.getdoc(module)[:900] for module in (json, random, re, csv, gzip, os)]
    passed = []
    for i, text in enumerate([*texts, BRENNER.format("Ada", 60)]):
        for form in ("faq", "table", "tutorial", "dialogue", "article", "outline"):
            row = dict(text=text, form=form, context="")
            out = data.offline_answer("rephrase", row, i)
            assert out == data.offline_answer("rephrase", row, i)
            assert not Counter(re.findall(r"\d+", text)) - Counter(re.findall(r"\d+", out)), (form, text)
            passed.append(data.why_not_faithful(row, dict(text=out)) == "")
    print(sum(passed), len(passed))
    assert sum(passed) > 0.75 * len(passed)


def test_statements_of_arithmetic_are_judged_where_they_are_whole():
    """All of the default corpus is true. What is part of something longer is not judged."""
    problems = data.documents("math")[:1500]
    assert not any(data.false_arithmetic(problem) for problem in problems)
    for text in ("So 3 * 4 = 13.", "We get 7 + 8 = 15, then 15 - 9 = 7.", "(2 + 3) * 4 = 21",
                 "1/2 + 1/3 = 4/6"):
        assert data.false_arithmetic(text) == "false arithmetic", text
    for text in ("x + 3 = 4", "10 / 4 = 2.5", "3.5 + 2 = 5.5", "2x - 6 = 0", "20 / 3 = 6 remainder 2",
                 "5 = 5", "50 * 2 = 1e2", "30 + 20 = 50%", "from 1939 - 1945", "y^2 = 9", "7 = (",
                 "1 / 0 = 3"):
        assert data.false_arithmetic(text) == "", text


def test_learning_notes_lose_the_page_and_gain_steps(tmp_path):
    text = "Home | Log in\nShop sums explained.\nA box holds 12 * 34 = 408 eggs.\n1,204 views, 3 comments\n"
    source = write_jsonl(tmp_path / "in.jsonl", [dict(text=text)])
    row, = recipe("learning-notes", source, tmp_path / "out.jsonl")
    assert "12 * 30 = 360" in row["text"] and "48 + 360 = 408" in row["text"] and "views" not in row["text"]
    asked = dict(text=text)
    for notes, says in ((row["text"].replace("= 360", "= 350"), "false arithmetic"),
                        ("Eggs are counted, and that is all.", "numbers are lost"), (text, "copied"),
                        (row["text"] + "\nSo says Euler.", "a name is new")):
        assert data.why_not_instructive(asked, dict(text=notes)) == says


QUESTION = """Question: Where did Ada Brenner work as a chemist?
Correct: in Vienna
Wrong: in Graz
Wrong: in Lisbon
Wrong: in Rome
Reasoning: She moved in 1894, and it was in Vienna that she worked. Nobody names the others."""


def test_exam_questions_are_read_strictly():
    row = dict(text=BRENNER.format("Ada", 60))
    found = data.exam_question(row, QUESTION)
    assert found["correct"] == "in Vienna" and found["wrong"] == ["in Graz", "in Lisbon", "in Rome"]
    assert data.why_not_worthy(row, found) == ""
    for old, new, says in (("Wrong: in Rome\n", "", "not in the form"), ("in Rome", "In  Graz.", "alike"),
                           ("Correct", "Answer", "not in the form"),
                           ("Question:", "Well. Question:", "not in the form")):
        with pytest.raises(data.Refused, match=says):
            data.exam_question(row, QUESTION.replace(old, new))
    for old, new, says in (("Where did", "In the passage, where did", "it needs the text at hand"),
                           ("in Vienna\n", "abroad, far away\n", "the text does not have the answer"),
                           ("in Vienna that", "there that", "the reasoning does not reach the answer"),
                           ("She moved", "As 1 + 1 = 3, she moved", "false arithmetic")):
        assert data.why_not_worthy(row, data.exam_question(row, QUESTION.replace(old, new))) == says


def test_the_right_options_of_exams_are_balanced(lives, tmp_path):
    """Each place is right equally often, the letter in the answer is that of the option, and no question
    comes twice for a document."""
    rows = recipe("exam", lives, tmp_path / "out.jsonl", "--n=4")
    letters = [row["answer"] for row in rows]
    asked = {(row["parent"], row["messages"][0]["content"].split("\n")[0]) for row in rows}
    assert len(asked) == len(rows) > 20
    for i in range(0, len(rows) - 3, 4):
        assert sorted(letters[i:i + 4]) == list("ABCD")
    assert len({"".join(letters[i:i + 4]) for i in range(0, len(rows) - 3, 4)}) > 1
    calls = {call["id"]: call["answer"] for call in read_jsonl(tmp_path / "out.jsonl.calls.jsonl")}
    for row in rows:
        question, answer = row["messages"]
        option = re.search(rf"^{row['answer']}\. (.*)$", question["content"], re.M)[1]
        assert f"\nCorrect: {option}\n" in calls[row["id"]]
        assert answer["content"].endswith(f"is {row['answer']}.")
        assert row["text"] == f"{question['content']}\n\n{answer['content']}\n"


def test_requests_that_gained_nothing_or_whose_answers_fail_are_eliminated():
    old = dict(instruction="How do bees find their hive?")
    for text, says in (("How do the bees find their hive?", "no gain"), ("...", "it says nothing"),
                       ("The rewritten prompt: how do bees navigate below clouds?", "it repeats the prompt"),
                       ("How do bees find their hive below thick clouds?", "")):
        assert data.why_not_gained(old, dict(text=text)) == says, text
    for text, says in (("Could you please clarify which bees?", "it asks back"), ("...!", "it says nothing"),
                       ("Understood, shall I begin?", "it only agrees"), ("42", ""),
                       ("I am sorry, that is beyond me.", "it refuses"),
                       ("They are sorry. " + "Bees fly. " * 90, ""),
                       ("By the sun and by landmarks.", "")):
        assert data.why_not_answered(old, dict(text=text)) == says, text


@pytest.fixture
def chats(tmp_path):
    said = {"How do bees find their hive?": "Bees remember the sun. They compare landmarks near the hive.",
            "Why does bread rise in ovens?": "Yeast turns sugar into gas. The gas stretches the gluten.",
            "How do wasps find their nest?": "Wasps remember the sun. They learn landmarks near the nest.",
            "Why does dough rise in bowls?": "Yeast turns sugar into bubbles. Bubbles stretch the gluten."}
    return write_jsonl(tmp_path / "chats.jsonl", [dict(prompt=p, completion=c) for p, c in said.items()])


def test_evolution_takes_the_prompt_that_fails_less_and_drops_what_does_not_gain(chats, tmp_path, monkeypatch,
                                                                                 capsys):
    """A request that never gains is not written. The new version of a prompt is taken if more gain by it."""
    new = "Be bolder.\n\n{instruction}"

    def answer(name, row, seed):
        if name == "evolve-improve":
            assert "- no gain: Why does bread rise in ovens?" in row["failures"].split("\n")
            return new if "harder" in row["method"] else "No place for it."
        if name == "answer":
            return "By landmarks."
        gains = (seen[-1] == new) == bold and "bread" not in row["instruction"]
        return row["instruction"] + " extra words here" * gains

    seen, fill = [], data.fill
    monkeypatch.setattr(data, "fill", lambda prompt, row: seen.append(prompt.text) or fill(prompt, row))
    monkeypatch.setattr(data, "offline_answer", answer)
    bold = True
    options = "--threads=1", "--breadth=0", "--rounds=2", "--attempts=1"
    rows = recipe("evolve", chats, tmp_path / "out.jsonl", *options)
    assert "evolve-depth: 4 of 4 failed, of a new version 1" in capsys.readouterr().out
    assert [row["parent"] for row in rows] == [f"chats.jsonl#{i}" for i in (1, 3, 4)]
    assert rows[0]["messages"] == [dict(role="user", content="How do bees find their hive? extra words here"),
                                   dict(role="assistant", content="By landmarks.")]
    assert rows[0]["evolved_from"] == "How do bees find their hive?"
    bold = False
    rows = recipe("evolve", chats, tmp_path / "no.jsonl", *options)
    assert "evolve-depth: 1 of 4 failed, of a new version 4" in capsys.readouterr().out
    assert [row["parent"] for row in rows] == [f"chats.jsonl#{i}" for i in (1, 3, 4)]


def test_offline_evolution_makes_requests_longer(chats, tmp_path):
    rows = recipe("evolve", chats, tmp_path / "out.jsonl", "--breadth=0")
    for row in rows:
        assert row["messages"][0]["content"].startswith(row["evolved_from"]) and len(row["messages"]) == 2
        assert len(row["messages"][0]["content"].split()) > len(row["evolved_from"].split()) + 8
    broad = recipe("evolve", chats, tmp_path / "broad.jsonl", "--breadth=100", "--rounds=1")
    assert len(rows) == len(broad) == 4
    assert not any(row["messages"][0]["content"].startswith(row["evolved_from"]) for row in broad)


def test_fusion_brings_together_what_is_asked_for(chats, tmp_path):
    texts = [data.as_text(talk.messages) for talk in data.conversations("c", chats, data.DataConfig())]
    sets = lambda select, k=2, seed=1: sorted(map(sorted, data.selected(texts, k, select, seed)))
    assert sets("similar") == [[0, 2], [1, 3]]
    assert all({i % 2 for i in chosen} == {0, 1} for chosen in sets("unlike"))
    assert len({str(sets("random", seed=seed)) for seed in range(9)}) == 3
    assert len(sets("random", 3)) == 1, "what is left over is not used"

    rows = recipe("fuse", chats, tmp_path / "out.jsonl", "--select=unlike")
    assert len(rows) == 2 and {len(row["parent"].split(" + ")) for row in rows} == {2}
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(word in row["text"].lower() for word in ("yeast", "landmarks"))
    for answer in ("User: a\nAssistant: b\nUser: c", "Assistant: b", "Well.\nUser: a\nAssistant: b",
                   "User:\nAssistant: b"):
        with pytest.raises(data.Refused):
            data.conversation_in({}, answer)
    four = data.conversation_in({}, "User: a\nmore\n\nAssistant: b\nUser: c\nAssistant: d")["messages"]
    assert [message["content"] for message in four] == ["a\nmore", "b", "c", "d"]

    # A model that only concatenates is found out.
    joined = "\n".join(texts[i].replace("\n\n", "\n") for i in (0, 1)).strip()
    result = data.conversation_in({}, joined.replace("\n\n", "\n"))
    assert data.why_not_integrated(dict(sources=[texts[0], texts[1]]), result) != ""


def test_of_several_answers_the_best_is_kept(tmp_path, monkeypatch):
    """By the verifier, and by a scoring endpoint; above a threshold; as pairs where one is below it."""
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [
        dict(instruction=f"What is {a} * 17?", output=f"{a} * 17 = {17 * a}") for a in range(21, 41)])
    rows = recipe("reject", tasks, tmp_path / "out.jsonl")
    assert len(rows) >= 18 and {row["answers"] for row in rows} == {4}
    for row in rows:
        a = int(re.search(r"\d+", row["messages"][0]["content"])[0])
        assert row["messages"][1]["content"].endswith(f"is {17 * a}.") and row["score"] == 1
    pairs = recipe("reject", tasks, tmp_path / "pairs.jsonl", "--pairs")
    assert 10 <= len(pairs) <= len(rows)
    for row in pairs:
        prompt, chosen, rejected = data.pair_of(row)
        right = data.verified(chosen[0]["content"], str(17 * int(re.search(r"\d+", prompt[0]["content"])[0])))
        assert right and not data.verified(rejected[0]["content"], chosen[0]["content"])
    assert data.verified("2 + 2 = 5, so it is 7.", "7") == data.verified("no number", "none") == 0

    # A model that likes long answers scores; what it says without a number is not a score.
    endpoints, generate = [], data.generate

    def watched(rows, prompt, parse, accept, endpoint, *more):
        endpoints.append((prompt.name, endpoint.endpoint, endpoint.model))
        return generate(rows, prompt, parse, accept, replace(endpoint, endpoint="offline"), *more)

    monkeypatch.setattr(data, "generate", watched)
    answers = dict(a="x" * 4, b="x" * 9, c="x" * 6)
    monkeypatch.setattr(data, "offline_answer", lambda name, row, seed: (
        answers["abc"[int(row["id"][-1]) % 3]] + " words" if name == "answer" else
        "many" if row["id"].startswith("tasks.jsonl#1/") else str(len(row["answer"]) - 6)))
    options = "--n=3", "--score_endpoint=http://judge/v1", "--score_model=j", "--threshold=0.9"
    rows = recipe("reject", tasks, tmp_path / "scored.jsonl", *options)
    assert [row["score"] for row in rows] == [0.9] * 19 and rows[0]["parent"] == "tasks.jsonl#2"
    assert {row["messages"][1]["content"] for row in rows} == {"x" * 9 + " words"}
    assert set(endpoints) == {("answer", "offline", ""), ("score", "http://judge/v1", "j")}


def test_the_commands_say_what_they_do_and_refuse_what_would_harm(lives, tmp_path, capsys):
    for name, recipe_ in data.RECIPES.items():
        data.main([name, "--help"])
        said = capsys.readouterr().out
        assert all(f"--{option}=" in said for option in (*recipe_.options, *data.SHARED)), name
        assert "--threads=8" in said and "does not understand" in said and recipe_.costs in said
    out = str(tmp_path.parent / f"{tmp_path.name}.x")
    for words, says in ((["rephrase", lives], "IN OUT"),
                        (["rephrase", lives, out, "--n=two"], "'two' is no int"),
                        (["rephrase", lives, out, "--chunk=0"], "--chunk=0: too small"),
                        (["reject", lives, out, "--pairs=yes"], "'yes' is no bool"),
                        (["reject", lives, out, "--score_endpoint=http://j/v1"], "with a model"),
                        (["rephrase", lives, out, "--m=2"], "unknown option '--m=2'; known: --endpoint="),
                        (["rephrase", lives, out, "--forms=ode"], "'ode' is unknown; known: faq"),
                        (["rephrase", lives, out, "--n=31"], "more than 6 forms"),
                        (["rephrase", str(tmp_path), str(tmp_path / "x")], "is inside"),
                        (["rephrase", lives, lives], "is inside"),
                        (["fuse", lives, out], "row 1: no conversation"),
                        (["fuse", lives, out, "--select=alike"], "similar, unlike or random"),
                        (["fuse", lives, out, "--k=9"], "and 2 to 8"),
                        (["rephrase", lives, f"{tmp_path}.none/out"], "a folder that exists"),
                        (["reject", lives, out, "--score_endpoint=http://j/v1", "--score_model=j",
                          "--score_extra={"], "score_extra: extra: '{'"),
                        (["rephrase", lives + "n", out], "No such file")):
        with pytest.raises(SystemExit, match=re.escape(says)):
            data.main(words)
        opened = Path(f"{out}.calls.jsonl")
        assert opened.exists() == ("row 1" in says), "options are checked before the journal is opened"
        opened.unlink(missing_ok=True)
    assert not Path(out).exists()

    # A dry run writes nothing; a budget that ends too soon is no success, and the rest comes later.
    out = tmp_path / "out.jsonl"
    assert not data.main(["rephrase", lives, str(out), "--dry-run"]) and not out.exists()
    assert "16 calls" in capsys.readouterr().out
    assert data.main(["rephrase", lives, str(out), "--calls=5"]) == 1 and len(read_jsonl(out)) == 5
    capsys.readouterr()
    assert len(recipe("rephrase", lives, out)) == 16 and "11 calls now; 16 and" in capsys.readouterr().out


def test_a_chat_set_is_text_for_recipes_that_read_text(chats, tmp_path, capsys):
    rows = recipe("rephrase", chats, tmp_path / "out.jsonl", "--n=1")
    assert "4 conversations as prompt/completion" in capsys.readouterr().out
    assert [row["parent"] for row in rows] == [f"chats.jsonl#{i}" for i in range(1, 5)]


@pytest.mark.parametrize("record, expected", [
    # Fields that are null are not there, as a table has them that holds several conventions.
    (dict(messages=None, conversations=[{"role": None, "content": None, "from": "human", "value": "Why?"},
                                        {"from": "gpt", "value": "So."}]), [USER, ANSWER]),
    (dict(prompt=None, instruction="Say it.", input="Now.", chosen="So.", rejected="Thus."),
     [dict(USER, content="Say it.\n\nNow."), ANSWER]),
    (dict(messages=[dict(USER, content=[dict(text="Wh"), dict(text="y?")]), ANSWER]), [USER, ANSWER]),
    (dict(system="Be brief.", messages=[SYSTEM, USER, ANSWER]), [SYSTEM, USER, ANSWER]),
    (dict(system=" ", messages=[USER, ANSWER]), [USER, ANSWER]),
    (dict(messages=[USER, USER, ANSWER]), [USER, USER, ANSWER]),
    (dict(chosen=[USER, ANSWER], rejected=[USER, OTHER], input="of something else"), [USER, ANSWER]),
    # Both answers repeat the last message of the prompt, or all but its system message.
    (dict(prompt=[SYSTEM, USER, OTHER, USER], chosen=[USER, ANSWER], rejected=[USER, OTHER]),
     [SYSTEM, USER, OTHER, USER, ANSWER]),
    (dict(prompt=[SYSTEM], chosen=[USER, ANSWER], rejected=[USER, OTHER]), [SYSTEM, USER, ANSWER]),
    (dict(prompt="Why?", chosen=[SYSTEM, USER, ANSWER], rejected=[SYSTEM, USER, OTHER]),
     [SYSTEM, USER, ANSWER])])
def test_the_dirt_of_chat_sets_is_read(record, expected, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [record])
    assert [chat.messages for chat in data.conversations("a", source, data.DataConfig())] == [expected]


def test_files_of_any_name_can_be_read(tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/caf\xe9.jsonl")), [dict(text=BRENNER)])
    rows = recipe("rephrase", tmp_path / "in", tmp_path / "out.jsonl", "--n=1")
    assert [row["parent"] for row in rows] == ["caf�.jsonl#1"]
    (tmp_path / "in" / "gone.jsonl.calls.jsonl").write_text('{"key": "0"}\n')
    assert len(list(data.rows("x", str(tmp_path / "in"), data.DataConfig()))) == 1


def test_context_is_kept_where_words_are_not_parted():
    assert len(data.last_tokens("字" * 900, 30)) == 40
    assert data.last_tokens("字字字。\n" * 90, 30) == "字字字。\n" * 9
    assert data.last_tokens("one two three four", 2) == "four" and data.last_tokens("one two", 9) == "one two"


def test_an_odd_answer_is_refused_and_does_not_end_the_recipe(tmp_path):
    """Thousands of brackets or terms are no statement; if a check cannot read an answer, that is refused."""
    for text in "(" * 5000 + "1 = 2", " + ".join(["1"] * 3000) + " = 3000", "1 + " + "-" * 5000 + "1 = 2":
        assert data.false_arithmetic(text) in ("", "false arithmetic")
    deep = lambda n: deep(n + 1)

    def accept(row, result):
        return {"d0": deep, "d1": lambda _: str(int("9" * 5000)), "d2": lambda _: ""}[row["id"]](0)
    results, _, said, _ = generated(rows_of("a", "b", "c"), tmp_path / "c", lambda *_: completed("A text."),
                                    accept=accept, attempts=2)
    assert results[:2] == [False, False] and results[2]
    assert "2 it cannot be read: RecursionError, 2 it cannot be read: ValueError" in said


def test_what_a_server_refused_is_asked_again_when_it_is_mended(tmp_path):
    full = dict(error=dict(message="maximum context length is 512"))
    reply = lambda request, before: (400, {}, full) if request["messages"][0]["content"][-1] in "ab" else (
        completed("A text.", usage=dict(prompt_tokens=3, completion_tokens=2))
        if request["messages"][0]["content"][-1] == "c" else completed("A text."))
    rows = rows_of(*"abcdefa")
    results, _, said, came = generated(rows, tmp_path / "c", reply)
    assert [bool(result) for result in results] == [False] * 3 + [True] * 3 + [False] and len(came) == 6
    assert "rows that the server refused; --ask_again=true asks again: 3 over the context" in said
    _, _, said, came = generated(rows, tmp_path / "c", reply)
    assert not came and "--ask_again=true asks again: 3" in said
    mended = lambda *_: completed("Another text.")
    results, journal, said, came = generated(rows, tmp_path / "c", mended, ask_again=True)
    assert all(results) and len(came) == 3 and "asks again" not in said
    assert [results[i]["text"] for i in (0, 3)] == ["Another text.", "A text."]
    again, _, _, came = generated(rows, tmp_path / "c", mended)
    assert again == results and not came, "the new answers are those of the journal"
    _, _, _, came = generated(rows, tmp_path / "d", lambda *_: (400, {}, full), ask_again=True)
    assert len(came) == 6, "in one run each is asked for once"


def test_a_document_more_or_a_new_name_pays_for_nothing_again(lives, tmp_path, capsys):
    """In recipes that ask about documents one by one. Equal documents share their calls, but not the several
    answers to one request."""
    (tmp_path / "new").mkdir()
    more = [dict(text=BRENNER.format("Ida", 77)), *read_jsonl(lives), read_jsonl(lives)[0]]
    renamed = write_jsonl(tmp_path / "new" / "other.jsonl", more)
    chat = lambda source: write_jsonl(Path(f"{source}.chat.jsonl"), [
        dict(instruction=f"What is {len(row['text'])} * 3? {row['text']}", output="3") for row in
        read_jsonl(source)])
    for name, old, new, calls in (("rephrase", lives, renamed, 2), ("exam", lives, renamed, 1),
                                  ("reject", chat(lives), chat(renamed), 4)):
        out = tmp_path / f"{name}.jsonl"
        assert data.main([name, old, str(out), "--attempts=1"]) is None
        before = read_jsonl(out)
        capsys.readouterr()
        assert data.main([name, new, str(out), "--attempts=1"]) is None
        assert f"\n{calls} calls now" in capsys.readouterr().out, name
        known = {row["text"] for row in read_jsonl(out)}
        assert name == "exam" or {row["text"] for row in before} <= known      # places of options move on
    assert len({call["answer"] for call in read_jsonl(f"{out}.calls.jsonl")[:4]}) > 1


def test_a_dry_run_counts_every_wave(tmp_path, capsys):
    """Parts of a document and rounds of evolution follow one another even if rules would refuse the answers
    that stand for those of a model."""
    text = " ".join(f"In {1900 + i} Otto saw river {i}." for i in range(90))
    source = write_jsonl(tmp_path / "long.jsonl", [dict(text=text + str(i)) for i in range(3)])
    parts = len(data.cut(text + "0", 64))
    with mock.patch.object(data, "why_not_faithful", lambda row, result: "bad"), mock.patch.object(
            data, "why_not_gained", lambda row, result: "bad"):
        assert not data.main(["rephrase", source, str(tmp_path / "o"), "--n=2", "--chunk=64", "--dry-run"])
        assert parts > 9 and f" {6 * parts} calls," in capsys.readouterr().out
        chat = write_jsonl(tmp_path / "chat.jsonl", [dict(prompt=f"Why {i}?", completion="So.")
                                                     for i in (1, 2)])
        assert not data.main(["evolve", chat, str(tmp_path / "o"), "--dev=0", "--dry-run"])
        assert " 8 calls," in capsys.readouterr().out
    assert not list(tmp_path.glob("o*"))


def test_fusion_keeps_to_one_side_of_the_split(tmp_path):
    """Whether text is held in memory or streamed, a fused conversation is where all of its parents are."""
    source = write_jsonl(tmp_path / "in.jsonl", [
        dict(prompt=f"What of matter{i}?", completion=f"It depends on alpha{i} and on beta{i}.")
        for i in range(400)])
    asked = {f"in.jsonl#{talk.number}": data.side_key(talk.messages)
             for talk in data.conversations("c", source, data.DataConfig())}
    with mock.patch.object(data, "why_not_integrated", lambda row, result: ""):
        rows = recipe("fuse", source, tmp_path / "out.jsonl", "--select=random")
    together = {row["text"]: row["split_with"] for row in rows}
    fused_out = {*data.split_documents([*together], together=together)[1]}
    sides = Counter()
    for row in rows:
        keys = [row["split_with"], *(asked[parent] for parent in row["parent"].split(" + "))]
        assert {data.is_validation(key) for key in keys} == {row["text"] in fused_out}
        sides[row["text"] in fused_out] += 1
    assert min(sides.values()) > 3 and len(sides) == 2


def test_evolution_resumed_makes_the_calls_of_one_that_nothing_disturbed(tmp_path, monkeypatch, capsys):
    """A server is down for one call, in the trial of the prompts, in a round, or for the answer: the run
    ends without success, and asks no more about that conversation, or nothing at all after the trial. The
    resume ends as if nothing had been. Rows name the prompt and seed of each round that brought a gain."""
    monkeypatch.setattr(asking, "FIRST_WAIT", .001)
    source = write_jsonl(tmp_path / "in.jsonl", [
        dict(prompt=f"Explain the harvest of variety{i}.", completion="So.") for i in range(8)])
    down, hit = "", []

    def reply(request, before):
        text = request["messages"][0]["content"]
        method, said = text[:30], text.split('"""')[1].strip() if '"""' in text else text
        if down and down in said and (len(said) > 60) == late and not hit:
            hit.append(said)
            return 503, {}, {}
        if text.startswith("The instructions below"):
            return completed(f"Bolder, {request['seed']}:\n\n\"\"\"\n{{instruction}}\n\"\"\"")
        if '"""' not in text:
            return completed("By hand, and in baskets.")
        gains = "variety3" not in said and not ("variety6" in said and "variety6. R" not in said
                                                and "Bolder" not in method)
        return completed(said + f" Respect frost{len(said)} and soil{len(said)}." * gains)

    def run(out):
        with serving(reply) as (url, came, answered):
            failed = data.main(["evolve", source, str(tmp_path / out), f"--endpoint={url}", "--model=m",
                                "--retries=0", "--threads=1", "--dev=3", "--breadth=0"])
        return failed, answered
    failed, smooth = run("smooth")
    assert not failed and len(smooth) == len({*smooth}) > 30
    rows = read_jsonl(tmp_path / "smooth")
    texts = {call.get("sha256"): call["answer"] for call in read_jsonl(tmp_path / "smooth.calls.jsonl")}
    prompts = {hashlib.sha256((HERE / f"notes/prompts/evolve-{way}.txt").read_bytes()).hexdigest()
               for way in ("depth", "breadth")}
    for row in rows:
        assert 1 <= len(row["evolution"]) <= 3
        for step in row["evolution"]:
            assert step["prompt_name"] == "evolve-depth" and step["seed"] != row["seed"]
            assert step["prompt_sha256"] in prompts or texts[step["prompt_sha256"]].startswith("Bolder")
    dev = data.in_order_of("1", [f"Explain the harvest of variety{i}." for i in range(8)])[:3]
    tried = re.search(r"variety\d", dev[0])[0]
    untried = next(name for name in (f"variety{i}" for i in (0, 1, 2, 4, 5, 7)) if name not in str(dev))
    for down, late in (tried, False), (untried, False), (untried, True):
        out = f"{down}{late}"
        hit.clear()
        failed, first = run(out)
        said = capsys.readouterr().out
        assert failed and ("the trial of its prompts is not complete" in said) == (down == tried)
        assert len(read_jsonl(tmp_path / out)) == (0 if down == tried else len(rows) - 1)
        down = ""
        failed, second = run(out)
        assert not failed and sorted(first + second) == sorted(smooth)
        assert (tmp_path / out).read_bytes() == (tmp_path / "smooth").read_bytes()


def test_a_scorer_has_its_own_key_and_fields(tmp_path, monkeypatch, capsys):
    """And what has no number to be judged by is told before a call."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-endpoint")
    monkeypatch.setenv("JUDGE", "sk-second-endpoint")
    sums = write_jsonl(tmp_path / "sums.jsonl", [
        dict(instruction=f"What is {i} + 1?", output=f"It is {i + 1}.") for i in range(3)])
    prose = write_jsonl(tmp_path / "prose.jsonl", [dict(instruction="What is red?", output="A colour.")])
    with serving(lambda *_: completed("It is 2.")) as (url, came, _), serving(
            lambda *_: completed("8")) as (judge, scored, _):
        options = f"--endpoint={url}", "--model=m", "--n=1", '--extra={"top_k": 5}'
        scorer = f"--score_endpoint={judge}", "--score_model=j"
        rows = recipe("reject", sums, tmp_path / "a", *options, *scorer)
        assert {request["auth"] for request in came} == {"Bearer sk-first-endpoint"} and came[0]["top_k"] == 5
        assert {request["auth"] for request in scored} == {None} and "top_k" not in scored[0]
        assert [(row["score"], row["score_model"]) for row in rows] == [(.8, "j")] * 3
        del scored[:], came[:]
        recipe("reject", sums, tmp_path / "b", *options, *scorer, "--score_key_env=JUDGE",
               '--score_extra={"a": 1}')
        assert {request["auth"] for request in scored} == {"Bearer sk-second-endpoint"}
        assert scored[0]["a"] == 1

        # By arithmetic.
        capsys.readouterr()
        with serving(lambda *_: (401, {}, b"")) as (other, *_):
            assert data.main(["reject", sums, str(tmp_path / "b"), *options, f"--score_endpoint={other}",
                              "--score_model=other"]) == 1
        assert "; the model is other;" in capsys.readouterr().out
        rows = recipe("reject", sums, tmp_path / "c", *options)
        assert [(row["score"], row["score_model"]) for row in rows] == [(1, "arithmetic")]
        assert "2 of 3 answers scored below 0.7; 0 conversations left out" in capsys.readouterr().out
        del came[:]
        with pytest.raises(SystemExit, match="no answer in IN has a number"):
            data.main(["reject", prose, str(tmp_path / "d"), *options])
        assert not came


# ---- model.py ----------------------------------------------------------------------------------------------

VARIANTS = {
    "motif": TINY, "mha": MHA, "gqa": replace(MHA, n_kv_head=2),
    "differential gqa": replace(TINY, n_kv_head=2), "grouped": replace(TINY, n_head=6, n_noise=2),
    "grouped gqa": replace(TINY, n_head=6, n_noise=2, n_kv_head=2),
    "learned": replace(MHA, position="learned", norm="layer", act="gelu", gated=False, tie=False),
    "ungated": replace(TINY, gated=False, act="relu2", tie=False), "swiglu": replace(MHA, act="silu"),
    "latent": replace(MHA, act="silu", q_rank=12, kv_rank=10, d_rope=4, d_value=6),
    "latent, yarn": replace(MHA, kv_rank=10, d_rope=4, d_value=6, yarn=4.0, yarn_from=8, yarn_fast=2.0),
    "gqa, yarn": replace(MHA, n_kv_head=2, yarn=4.0, yarn_from=8, yarn_fast=2.0),
    "experts": replace(MHA, act="silu", n_expert=6, n_dense=1, n_active=2, d_expert=16, route_scale=1.5),
    "qk-norm": replace(MHA, qk_norm=True),
    "differential qk-norm gqa": replace(TINY, qk_norm=True, n_kv_head=2),
    "shared": replace(MHA, n_layer=4, share_kv=2), "ngpt": replace(MHA, act="silu", ngpt=True, tie=False),
    "shared differential qk-norm": replace(TINY, qk_norm=True, share_kv=3),
    "shared differential ngpt gqa": replace(TINY, n_layer=4, ngpt=True, share_kv=2, n_kv_head=2),
    "k2": replace(MHA, act="silu", q_rank=12, kv_rank=10, d_rope=4, d_value=6, n_expert=8, n_dense=1,
                  n_active=2, d_expert=16, n_group=4, top_group=2, route_scale=2.0),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


@each_variant
def test_no_token_sees_the_future(config, float64):
    network, x = lively(config), tokens(2, 20)
    other = x.clone()
    other[:, 11:] = (x[:, 11:] + 1) % 61
    before, after = network(x), network(other)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=0, atol=1e-12)    # expert batches differ
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


@each_variant
def test_decoding_with_a_cache_matches_decoding_without(config, float64):
    network, x = lively(config), tokens(2, 20)
    cache, whole = net.Cache(config.context), network(x)
    pieces = [network(x[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)

    out = net.generate(network, x[:, :4], 12, temperature=0)
    for i in range(4, 16):
        assert torch.equal(out[:, i], network(out[:, :i])[:, -1].argmax(-1))
    assert network.training, "sampling restores training mode"


def test_sampling_continues_past_the_context_and_is_reproducible():
    network, x = lively(TINY), tokens(1, 5)                        # a context of 32
    a, b, c = (net.generate(network, x, 60, 1.0, 0.9, seed) for seed in (1, 1, 2))
    assert a.shape == (1, 65) and torch.equal(a, b) and not torch.equal(a, c)
    out, start = net.generate(network, x, 60, temperature=0), 0    # a full window keeps its last half
    for i in range(5, 65):
        start = i - 16 if i - start > 32 else start
        assert out[0, i] == network(out[:, start:i])[0, -1].argmax()


def test_top_p_keeps_the_smallest_set_of_that_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    drawn = net.pick(logits, 1.0, 0.7, torch.Generator().manual_seed(0)).flatten()
    counts = drawn.bincount(minlength=4) / 4000
    assert counts[2:].sum() == 0 and abs(counts[0] - 0.625) < 0.04         # 5 standard deviations
    assert (net.pick(logits, 1.0, 0.0, None) == 0).all() and (net.pick(logits, 0, 1.0, None) == 0).all()


@each_variant
def test_documents_in_one_window_do_not_see_each_other(config, float64):
    network, x = lively(config, restart=True), tokens(1, 20)       # learned positions: from 0 in each
    starts = torch.where(torch.arange(20) < 8, 0, 8)[None]
    packed = network(x, doc_start=starts)
    torch.testing.assert_close(packed[:, :8], network(x[:, :8]))
    torch.testing.assert_close(packed[:, 8:], network(x[:, 8:]))   # RoPE depends on distances only


@each_variant
@pytest.mark.parametrize("cuts", [(1,), (1, 2)])
def test_ranges_of_layers_add_up_to_the_whole_model(config, cuts, float64):
    if any(cut % config.share_kv for cut in cuts):
        with pytest.raises(ValueError, match="another range"):
            net.Transformer(config, layers=range(1, config.n_layer))
        cuts = tuple({cut - cut % config.share_kv for cut in cuts} - {0})
    bounds = [0, *cuts, config.n_layer]
    whole = lively(config)
    parts = [lively(config, layers=range(a, b)) for a, b in zip(bounds, bounds[1:])]
    fresh = net.Transformer(config, seed=5).state_dict()
    for part, (a, b) in zip(parts, zip(bounds, bounds[1:])):
        for name, p in net.Transformer(config, seed=5, layers=range(a, b)).state_dict().items():
            assert torch.equal(p, fresh[name]), f"{name} is seeded by its own name"
    x, y = tokens(2, 16), tokens(2, 16)
    h, balance = x, 0.0
    for part in parts[:-1]:
        h, of_part = part.body(h)
        balance = balance + of_part
    torch.testing.assert_close(parts[-1](h), whole(x))
    loss, _, of_part = parts[-1](h, targets=y)
    torch.testing.assert_close(loss + balance + of_part, sum(whole(x, targets=y)[::2]))


def test_shared_keys_and_values_halve_the_cache():
    """Measured in bytes. The second layer of a pair has no key or value matrices and reads the first's."""
    sizes = []
    for share in (1, 2):
        network = lively(replace(VARIANTS["shared"], share_kv=share))
        cache = net.Cache(32)
        network(tokens(1, 8), cache=cache)
        sizes.append(sum(t.nbytes for kv in cache.store.values() for t in kv))
        assert net.cache_per_token(network.config) * 32 * 4 == sizes[-1]
    assert sizes[1] == sizes[0] / 2 and not any(".1.attention.wk" in name for name in network.state_dict())
    x = tokens(1, 8)
    before = network(x)
    with torch.no_grad():
        network.layers["3"].attention.wq.zero_()                   # uniform attention over layer 2's values
    assert not torch.equal(network(x), before)


def test_qk_norm_ignores_the_scale_of_its_weights(float64):
    """Hence it is not combined with QK-Clip."""
    network, x = lively(VARIANTS["qk-norm"]), tokens(1, 12)
    before, attention = network(x), network.layers["1"].attention
    with torch.no_grad():
        attention.wq *= 0.25
        attention.wk *= 3.0
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-4)           # up to eps
    q, k = (torch.randn(1, 4, 12, 8) for _ in range(2))
    exact = attention.q_norm.weight * q / q.square().mean(-1, keepdim=True).sqrt()
    rms = lambda t: t.square().mean(-1).sqrt()
    assert rms(attention.query(q, None)).allclose(rms(exact), atol=1e-4)


def test_ngpt_matches_its_definition(float64):
    """Equations 3, 10, 11, 15, 16, 20, 21 of 2410.01131, head by head, without rotation (a single token)."""
    config = replace(VARIANTS["ngpt"], n_layer=2)
    network, x = lively(config), tokens(5, 1)
    net.renormalise_(dict(network.named_parameters()))
    root, unit = config.d_model ** 0.5, lambda v: v / v.norm(dim=-1, keepdim=True)
    h = unit(network.embed)[x[:, 0]]
    for layer in network.layers.values():
        a, f = layer.attention, layer.ffn
        v = h @ a.wv.T                                             # one token attends to itself alone
        h = unit(h + layer.a_attention * root / 2 * (unit(v @ a.wo.T) - h))
        gate, up = (h @ f.gate.T) * f.s_gate * root, (h @ f.up.T) * f.s_up
        h = unit(h + layer.a_ffn * root / 2 * (unit((silu(gate) * up) @ f.down.T) - h))
    torch.testing.assert_close(network(x)[:, 0], (h @ network.head.T) * network.s_logits * root)

    q, k, s = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8), (a.s_qk * root).view(4, 1, 8)
    logits = a.query(q, None) @ a.key(k, None).mT / math.sqrt(8)
    torch.testing.assert_close(logits, (unit(q) * s) @ (unit(k) * s).mT * math.sqrt(8))
    fresh = net.Transformer(config)
    first = fresh.layers["0"]
    for kept, size in ((first.a_ffn, 1 / root), (first.attention.s_qk, 1 / root), (first.ffn.s_gate, 1)):
        assert kept.tolist() == pytest.approx([size] * len(kept))  # their scale for the optimizer
    for name, p in fresh.named_parameters():
        if p.ndim == 2:
            assert p.norm(dim=0 if name.endswith(("wo", "down")) else 1).allclose(torch.ones(()))


@pytest.mark.parametrize("optimizer", ["adamw", "muonclip"])
def test_ngpt_stays_on_the_sphere_and_learns(text, optimizer, tmp_path):
    """After 50 steps, even with averages put back; and it resumes bit for bit."""
    optim = muonclip.OptimConfig(name=optimizer, lr=0.02, tau=0, weight_decay=0)
    config = tiny_run(text, tokens=50 * 8 * 32, optim=optim, out=str(tmp_path / "a"),
                      average_every=12 * 8 * 32, average_from=0.0)
    config = replace(config, model=replace(config.model, ngpt=True))
    history, network = train.train(config, quiet=True)
    for name, p in network.named_parameters():
        if p.ndim == 2:
            norms = p.norm(dim=0 if name.endswith(("wo", "down")) else 1)
            assert norms.allclose(torch.ones(()), atol=1e-5), name
    assert history[-1]["val_mine"] < history[0]["val_mine"] - 0.5
    mean = train.load_run(tmp_path / "a", 2)[0]
    norms = mean.layers["0"].ffn.up.norm(dim=1)
    assert norms.allclose(torch.ones(()), atol=1e-5), "a mean of checkpoints is on the sphere too"
    if optimizer == "muonclip":
        other = replace(config, out=str(tmp_path / "b"))
        train.train(replace(other, steps=20), quiet=True)
        train.train(other, resume=True, quiet=True)
        resumed = weights_of(tmp_path / "b")
        assert all(torch.equal(t, resumed[name]) for name, t in weights_of(tmp_path / "a").items())


@pytest.mark.parametrize("config, says", [
    (dict(qk_norm=True, kv_rank=10, d_rope=4, d_value=6), "qk_norm: not with latent attention"),
    (dict(share_kv=2, kv_rank=10, d_rope=4, d_value=6), "share_kv: not with latent attention"),
    (dict(ngpt=True, qk_norm=True), "not with qk_norm=True"), (dict(ngpt=True, gated=False), "gated=False"),
    (dict(ngpt=True, position="learned"), "position=learned"), (dict(ngpt=True, norm="layer"), "norm=layer"),
    (dict(ngpt=True, n_expert=4, n_active=1, d_expert=8), "n_expert=4"),
    (dict(n_noise=2), "n_noise=2: needs differential=true"),
    (dict(n_noise=3, differential=True), "n_head=4 a multiple"),
    (dict(n_noise=1, differential=True), "even n_kv_head=4 that divides 2"),
    (dict(n_noise=4, differential=True), "at least twice it")])
def test_incompatible_candidates_are_refused(config, says):
    with pytest.raises(ValueError, match=says):
        replace(MHA, **config)


@pytest.mark.parametrize("name", ["qk_norm", "ngpt"])
def test_candidates_that_undo_the_clip_are_refused_with_it(name):
    model = replace(MHA, **{name: True})
    with pytest.raises(ValueError, match=f"model.{name} undoes the clip"):
        train.Config(model=model)
    with pytest.raises(ValueError, match="weight_decay=0.1") if name == "ngpt" else contextlib.nullcontext():
        train.Config(model=model, optim=muonclip.OptimConfig(tau=0))
    train.Config(model=model, optim=muonclip.OptimConfig(tau=0, weight_decay=0))


MIXES = dict(
    attention=dict(mha={}, gqa=dict(n_kv_head=2), differential=dict(differential=True),
                   grouped=dict(differential=True, n_head=6, n_noise=2, n_kv_head=2),
                   latent=dict(q_rank=12, kv_rank=10, d_rope=4, d_value=6)),
    norm={"": {}, "qk-norm": dict(qk_norm=True), "ngpt": dict(ngpt=True)},
    share={"": {}, "shared": dict(share_kv=2)},
    ffn=dict(polynorm={}, ungated=dict(act="gelu", gated=False),
             experts=dict(act="silu", n_expert=4, n_dense=1, n_active=2, d_expert=16)))
EVERY_MIX = list(itertools.product(*MIXES.values()))


@pytest.mark.parametrize("mix", EVERY_MIX, ids=lambda mix: " ".join(filter(None, mix)))
def test_every_combination_works_or_is_refused(mix, tmp_path, float64):
    """Either it is causal, decodes as it trains, gives every parameter a gradient, lets QK-Clip bring its
    heads to τ and comes back from a checkpoint, or an error says why not."""
    changes, (attention, norm, share, ffn) = {}, mix
    for part, choice in zip(MIXES.values(), mix):
        changes |= part[choice]
    base = replace(MHA, n_layer=2)
    if attention == "latent" and (norm or share) or norm == "ngpt" and ffn != "polynorm":
        says = "with latent attention" if attention == "latent" else "not with qk_norm"
        with pytest.raises(ValueError, match=says):
            replace(base, **changes)
        return
    config = replace(base, **changes)
    network, x = lively(config), tokens(4, 12)
    other = x.clone()
    other[:, 7:] = (x[:, 7:] + 1) % 61
    whole, cache = network(x), net.Cache(32)
    torch.testing.assert_close(network(other)[:, :7], whole[:, :7], rtol=0, atol=1e-12)
    pieces = [network(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    network(x, targets=other)[0].backward()
    assert all(p.grad.any() for p in network.parameters())

    train.save_checkpoint(tmp_path, 0, network.state_dict(), {}, 1)
    again = net.Transformer(config, seed=1)
    train.restore([again], None, train.newest_checkpoint(tmp_path)[1])
    assert torch.equal(again(x), whole)

    if norm:
        with pytest.raises(ValueError, match="undoes the clip"):
            train.Config(model=config)
        return
    last = list(network.attentions().values())[-1]                 # it reads another layer's keys if shared
    last.clear_logits()
    network(x)
    largest = last.max_logits.clone()
    tau = largest.sort().values[1:3].mean().item()
    assert muonclip.qk_clip_([last], tau) == (largest > tau).sum() > 0
    last.clear_logits()
    network(x)
    torch.testing.assert_close(last.max_logits, largest.clamp(max=tau))


def test_yarn_slows_only_the_slow_pairs():
    """DeepSeek-V3's settings: pairs that turn more than 32 times in 4,096 tokens keep their frequency, those
    that turn less than once are slowed by 40, with a linear ramp in between; logits grow by (0.1·ln 40 + 1)².
    [2309.00071]"""
    config = replace(net.PRESETS["deepseek-v3"], yarn=40.0)
    plain, slow = net.rope_frequencies(replace(config, yarn=0.0)), net.rope_frequencies(config)
    turns, ratio = plain * 4096 / (2 * math.pi), slow / plain
    assert (ratio[turns > 42] == 1).all()
    assert ratio[turns < 0.75].allclose(torch.tensor(1 / 40, dtype=torch.float64))
    between = ratio[(turns < 30) & (turns > 1.3)]
    assert (between.diff() < 0).all() and torch.allclose(between.diff(), between.diff().mean(), rtol=1e-9)
    assert config.sharpness == pytest.approx((0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("name, n_kv_head", [("gqa, yarn", 4), ("gqa, yarn", 2), ("latent, yarn", 4)])
def test_yarn_sharpens_both_the_used_and_the_recorded_logits(name, n_kv_head, float64):
    """(0.1·ln s + 1)² · q·k/√d, both in the softmax and in what QK-Clip sees.   [2309.00071 eq. 22]"""
    c = replace(VARIANTS[name], n_kv_head=n_kv_head)
    a, x = lively(c, std=0.5).layers["0"].attention, torch.randn(2, 9, c.d_model)
    rope = net.rope_table(c, 0, 9, x.device, x.dtype)
    heads = lambda t, n: t.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, n, T, width)
    turn, h = lambda t: net.rotate(t, *rope), a.norm(x)
    if c.kv_rank:
        ckv, shared = (h @ a.wdkv.T).split((c.kv_rank, c.d_rope), -1)
        ckv = a.kv_norm(ckv)
        q, k, v = heads(h @ a.wuq.T, 4), heads(ckv @ a.wuk.T, 4), heads(ckv @ a.wuv.T, 4)
        q = torch.cat((q[..., :c.d_head], turn(q[..., c.d_head:])), -1)
        k = torch.cat((k, turn(shared[:, None]).expand(-1, 4, -1, -1)), -1)
    else:
        q, k, v = heads(h @ a.wq.T, 4), heads(h @ a.wk.T, n_kv_head), heads(h @ a.wv.T, n_kv_head)
        q, k, v = turn(q), kernels.repeat_heads(turn(k), 4), kernels.repeat_heads(v, 4)
    logits = (0.1 * math.log(4) + 1) ** 2 * q @ k.mT / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(a(x, rope)[0], (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ a.wo.T)
    torch.testing.assert_close(a.max_logits, logits.amax((0, 2, 3)))


def test_lambda_starts_where_the_paper_says(float64):
    starts = [a.lam_init for a in net.Transformer(replace(TINY, n_layer=12)).attentions().values()]
    assert starts[:4] == pytest.approx([0.2, 0.3556, 0.4707, 0.5561], abs=1e-4)
    assert starts[-1] == pytest.approx(0.8, abs=0.03)
    network = net.Transformer(net.ModelConfig(d_head=128))
    for attention in network.attentions().values():
        assert abs(attention.lam() - attention.lam_init) < 0.8     # entries are N(0, 0.1²): exp(λq·λk) ≈ 1


def test_weights_are_initialised_with_their_spread_and_seeded_by_name():
    """Matrices N(0, init_std²), those that write to the residual stream 1/√(2·layers) of it or 0, λ's vectors
    N(0, 0.1²), gains 1, PolyNorm's coefficients 1/3. No two matrices or experts are equal, and another seed
    changes them all."""
    config = replace(K2, d_model=128, d_expert=128, d_ff=256, q_rank=128, kv_rank=128, tie=False,
                     init_std=0.3, zero_out=False)
    one, other = (net.Transformer(config, seed=seed).state_dict() for seed in (0, 1))
    matrices, begun = {name: w for name, w in one.items() if w.ndim > 1}, []
    for name, w in matrices.items():
        std = 0.3 / math.sqrt(2 * 3) if name.endswith(("wo", "down")) else 0.3
        assert w.std() == pytest.approx(std, rel=0.12) and abs(w.mean()) < 0.1 * std, name
        assert not torch.equal(w, other[name]), name
        for part in w if w.ndim == 3 else [w]:                     # each expert has its own seed
            begun.append(tuple((part.flatten()[:9] / std).round(decimals=3).tolist()))
    assert len(set(begun)) == len(begun) == len(matrices) + 2 * 3 * (8 - 1)
    for name, w in net.Transformer(TINY).named_parameters():
        if name.endswith(("lq1", "lk1", "lq2", "lk2")):
            assert 0.03 < w.std() < 0.2, name
        elif w.ndim == 1:
            value = dict(weight=1 / 3, bias=0.0)[name.rpartition(".")[2]] if "act" in name else 1.0
            assert torch.equal(w, torch.full_like(w, value)), name
        else:
            assert w.any() != name.endswith(("wo", "down")), name


def test_model_takes_its_matmuls_from_ops():
    """Every matmul of a layer goes through Ops.linear; `pre` makes its input and uses exactly `params`."""
    seen = []

    def watch(name, weights, pre, params, *x, ends=None):
        seen.append((name, len(weights)))
        if params or pre is not net.identity:                      # `pre` uses no other parameters
            h = pre(*(t.detach() for t in x))
            used = torch.autograd.grad(h.sum(), params, allow_unused=True) if params else ()
            assert h.requires_grad == bool(params) and all(g is not None for g in used), name
        return net.linear(name, weights, pre, params, *x, ends=ends)
    net.Transformer(TINY, net.Ops(linear=watch))(tokens(1, 4))
    assert seen == [("qkv", 3), ("out", 1), ("up", 2), ("down", 1)] * TINY.n_layer
    for config in VARIANTS.values():
        seen.clear()
        lively(replace(config, n_layer=config.share_kv, n_dense=0), ops=net.Ops(linear=watch))(tokens(1, 4))
        first = seen[:len(seen) // config.share_kv]
        assert len(set(first)) == len(first), "each name is one matmul of a layer"
    assert {"latents", "expert_up", "expert_down", "shared_up", "shared_down"} < {name for name, _ in seen}


def test_presets_have_the_reported_size():
    assert net.count_parameters(net.PRESETS["motif-2.6b"])["total"] == pytest.approx(2.597e9, abs=5e5)


def test_flops_match_what_torch_counts(monkeypatch):
    """torch counts every matmul of a forward. Attention by definition makes the full maps that we count."""
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(kernels, "attention",
                        lambda q, k, v, *_, **__: (kernels.attention_ref(q, k, v), None))
    monkeypatch.setattr(kernels, "diff_attention", lambda q, k, v, lam, sees, maps, tau: (
        kernels.diff_attention_ref(q, k, v, lam, None, maps), None))
    for config in (TINY, replace(MHA, gated=False, tie=False), VARIANTS["grouped gqa"]):
        network = net.Transformer(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(tokens(1, config.context))
        ours = net.flops_per_token(config, training=False) * config.context
        assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("name", ["latent", "experts", "k2"])
def test_flops_of_latent_attention_and_experts_match_what_torch_counts(name, monkeypatch):
    """However tokens are routed: each uses n_active experts. Training costs three times a forward."""
    from torch.utils.flop_counter import FlopCounterMode

    def reference(q, k, v, sees, scale=None, *_, **__):
        return kernels.attention_ref(q, k, v, None, scale), None
    monkeypatch.setattr(kernels, "attention", reference)
    monkeypatch.setattr(kernels, "fits_grouped_mm", lambda *_: False)        # which torch does not count
    config = VARIANTS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lively(config).eval()(tokens(1, config.context))
    ours = net.flops_per_token(config, training=False) * config.context
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)
    assert net.flops_per_token(config) == pytest.approx(3 * net.flops_per_token(config, training=False))


def test_tensor_files_follow_the_safetensors_format(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.c": torch.arange(7), "half": torch.randn(2, 2).bfloat16(),
               "one": torch.tensor(3), "none": torch.empty(0, 4), "view": torch.randn(6, 4).mT,
               "fp8": torch.randn(5).to(torch.float8_e4m3fn)}
    net.write_tensors(tmp_path / "t", tensors)
    back = net.read_tensors(tmp_path / "t")
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name].double(), t.double()), name

    raw = (tmp_path / "t").read_bytes()                            # parse the file by the format's definition
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:8 + length])["a"]
    start, stop = entry["data_offsets"]
    assert entry["dtype"] == "F32" and entry["shape"] == [3, 5] and length % 8 == 0
    found = np.frombuffer(raw[8 + length:][start:stop], "<f4").reshape(3, 5)
    assert np.array_equal(found, tensors["a"].numpy())
    back["a"].zero_()
    assert (tmp_path / "t").read_bytes() == raw, "tensors that were read are private copies"


def test_broken_tensor_files_are_refused(tmp_path):
    net.write_tensors(tmp_path / "t", {"a": torch.randn(3, 5)})
    raw = (tmp_path / "t").read_bytes()
    for bad in (raw[:-4], raw[:5], b"", b"\xff" * 40, raw.replace(b"F32", b"F99"),
                raw.replace(b"60]", b"99]"), raw.replace(b"[3, 5]", b"[3, 9]")):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="bad"):
            net.read_tensors(tmp_path / "bad")


def tensor_file(header, data=bytes(8), length=None):
    """The bytes of a tensor file by the format's definition, with any `header` at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one_tensor(**change):
    """The header of a file that holds one tensor "a" of two float32, with parts of its entry changed."""
    return dict(a=dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | change)


def two_tensors(shape, offsets, size):
    more = dict(b=dict(dtype="F32", shape=shape, data_offsets=offsets))
    return tensor_file(one_tensor() | more, bytes(size))


HEADER = json.dumps(one_tensor()).encode()
DEEP = b"[" * 99_999 + b"]" * 99_999
SHAPES = dict(negative=[-2], negatives=[-1, -2], fraction=[2.0], truth=[True, 2], text="2", object={"0": 2},
              null=None, nested=[[2]], huge=[2 ** 64, 0], larger=[3], overflow=[2 ** 32, 2 ** 32],
              zero=[2 ** 40, 2 ** 40, 0])
OFFSETS = dict(negative=[-8, 0], reversed=[8, 0], three=[0, 8, 8], one=[0], fractions=[0.0, 8.0], text="08",
               object={"0": 0, "1": 8}, huge=[0, 2 ** 80], null=None, late=[8, 16])
HEADERS = dict(
    list=b"[1]", number=b"1", null=b"null", text=b'"a"', nothing=b"", deep=DEEP, junk=HEADER + b"x",
    nan=b'{"a": NaN}', utf8=HEADER.replace(b"a", b"\xff", 1), utf16=HEADER.decode().encode("utf-16"),
    unmarked=HEADER.decode().encode("utf-16-le"), marked=b"\xef\xbb\xbf" + HEADER,
    surrogate=HEADER.replace(b"a", b"\\ud800", 1), key=HEADER.replace(b'"d', b'"dtype": "F32", "d', 1),
    metadata=b'{"__metadata__": {}, "__metadata__": {}, ' + HEADER[1:])
ODD_DTYPES = ("F33", "f32", None, 4, ["F32"])
ODD_FILES = {
    **{f"shape {what}": tensor_file(one_tensor(shape=shape)) for what, shape in SHAPES.items()},
    **{f"offsets {what}": tensor_file(one_tensor(data_offsets=at)) for what, at in OFFSETS.items()},
    **{f"header {what}": tensor_file(text) for what, text in HEADERS.items()},
    **{f"metadata {about!r}": tensor_file(dict(__metadata__=about) | one_tensor())
       for about in ([], dict(x=1), dict(x=None), "pt", one_tensor()["a"])},
    **{f"no {key}": tensor_file(dict(a={k: v for k, v in one_tensor()["a"].items() if k != key}))
       for key in one_tensor()["a"]},
    **{f"dtype {dtype!r}": tensor_file(one_tensor(dtype=dtype)) for dtype in ODD_DTYPES},
    "entry null": tensor_file(dict(a=None)), "bytes of nobody": tensor_file({}),
    "overflow of nothing": tensor_file(one_tensor(shape=[2 ** 40, 2 ** 40, 0], data_offsets=[0, 0]), b""),
    "truth for numbers": tensor_file(one_tensor(dtype="U8", shape=[1], data_offsets=[False, True]), b"x"),
    "a name twice": tensor_file(HEADER[:-1] + b", " + HEADER[1:].replace(b"[0, 8]", b"[8, 16]"), bytes(16)),
    "overlap": two_tensors([2], [0, 8], 8), "half an overlap": two_tensors([2], [4, 12], 12),
    "hole": two_tensors([2], [12, 20], 20), "empty in the middle": two_tensors([0], [4, 4], 8),
    "first byte": tensor_file(one_tensor(data_offsets=[8, 16]), bytes(16)),
    "too many bytes": tensor_file(one_tensor(), bytes(9)),
    "too few bytes": tensor_file(one_tensor(), bytes(7)),
    "length absurd": tensor_file(HEADER, length=2 ** 63),
    "length -1": tensor_file(HEADER, length=2 ** 64 - 1),
    "empty file": b"", "seven bytes": bytes(7), "zeros": bytes(8)}


@pytest.mark.parametrize("raw", ODD_FILES.values(), ids=ODD_FILES.keys())
def test_odd_tensor_files_are_refused_in_one_line(raw, tmp_path):
    (tmp_path / "odd").write_bytes(raw)
    with pytest.raises(ValueError) as refused:
        net.read_tensors(tmp_path / "odd")
    assert str(refused.value).startswith(f"{tmp_path}/odd: ") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 320 + len(str(tmp_path))


def test_a_header_above_the_limit_of_the_format_is_refused(tmp_path):
    (tmp_path / "long").write_bytes(tensor_file(HEADER.ljust(100_000_001)))
    with pytest.raises(ValueError, match="not a safetensors file"):
        net.read_tensors(tmp_path / "long")


def test_the_safetensors_package_refuses_the_same_files(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    for what, raw in ODD_FILES.items():
        (tmp_path / "odd").write_bytes(raw)
        with pytest.raises(Exception), safetensors.safe_open(tmp_path / "odd", "pt") as file:
            [file.get_tensor(name) for name in file.keys()]
            pytest.fail(f"{what}: the package reads it", pytrace=False)


def damaged_header(raw, header, rng):
    """A tensor file with one to three bytes or pieces of its header changed, inserted or removed."""
    pieces = [b"0", b"-1", b"1e9", b"true", b"null", b"[]", b"{}", b'"a"', b"18446744073709551616", b"[[",
              b"NaN", b"\xff", b"\\ud800", b"\0", b",", b"}", b'"dtype":', b"F16", b"I8"]
    new = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, piece = rng.randrange(min(len(new), header + 4)), rng.choice(pieces)
        new[at:at + rng.randrange(5)] = rng.choice((piece, b"", bytes([new[at] ^ 1 << rng.randrange(8)])))
    if rng.random() < 0.7:                                         # the right length passes the first check
        new[:8] = max(header - 8 + len(new) - len(raw), 0).to_bytes(8, "little")
    return bytes(new)


def bytes_of(t):
    return t.reshape(-1).view(torch.uint8) if t.numel() else t.new_empty(0, dtype=torch.uint8)


def test_any_damage_to_a_tensor_file_gives_tensors_or_a_one_line_error(tmp_path):
    """1,000 damaged files: an error of one line, or tensors that cover the data and equal those the
    safetensors package reads, if it is installed."""
    tensors = {"a": torch.randn(3, 5), "b.c": torch.arange(7), "half": torch.randn(2, 2).bfloat16(),
               "one": torch.tensor(3), "none": torch.empty(0, 4), "fp8": torch.randn(5).to(torch.float8_e5m2)}
    path, rng, read, load = tmp_path / "t", random.Random(0), 0, None
    net.write_tensors(path, tensors)
    raw = path.read_bytes()
    with contextlib.suppress(ImportError):
        from safetensors.torch import load
    for _ in range(1000):
        path.write_bytes(new := damaged_header(raw, 8 + int.from_bytes(raw[:8], "little"), rng))
        try:
            found = net.read_tensors(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, str(error)
            continue
        read += 1
        assert sum(t.nbytes for t in found.values()) == len(new) - 8 - int.from_bytes(new[:8], "little")
        theirs = load(new) if load else found
        assert theirs.keys() == found.keys()
        for name, t in theirs.items():
            assert t.dtype == found[name].dtype and t.shape == found[name].shape
            assert torch.equal(bytes_of(t), bytes_of(found[name]))
    assert 10 < read < 500


def test_we_read_files_of_the_safetensors_package_and_it_reads_ours(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    tensors = {str(dtype): torch.arange(48, dtype=torch.uint8).view(dtype) for dtype in net.CODES
               if dtype != torch.bool}
    tensors |= {"bool": torch.tensor([True, False]), "one": torch.tensor(2.5), "none": torch.empty(3, 0),
                "ünï\ncode": torch.ones(2)}
    package.save_file(tensors, tmp_path / "theirs", {"format": "pt", "note": "ü"})
    net.write_tensors(tmp_path / "ours", tensors)
    for found in (net.read_tensors(tmp_path / "theirs"), package.load_file(tmp_path / "ours")):
        assert found.keys() == tensors.keys()
        for name, t in tensors.items():
            assert found[name].dtype == t.dtype and found[name].shape == t.shape
            assert torch.equal(bytes_of(found[name]), bytes_of(t))


LATENT, EXPERTS, K2 = VARIANTS["latent"], VARIANTS["experts"], VARIANTS["k2"]


def test_latent_attention_matches_its_definition(float64):
    """Equations (1) and (2), one head at a time with explicit score matrices."""
    network, x, c = lively(LATENT), torch.randn(2, 9, LATENT.d_model), LATENT
    a = network.layers["0"].attention
    cos, sin = net.rope_table(c, 0, 9, x.device, x.dtype)
    rotate = lambda t: t * cos + torch.cat((t[..., 2:], t[..., :2]), -1) * sin
    h = a.norm(x)
    cq, (ckv, k_rope) = a.q_norm(h @ a.wdq.T), (h @ a.wdkv.T).split((c.kv_rank, c.d_rope), -1)
    ckv, k_rope, out, peaks = a.kv_norm(ckv), rotate(k_rope), [], []
    for i in range(c.n_head):
        wq = a.wuq.view(c.n_head, c.d_head + c.d_rope, -1)[i]
        wk, wv = a.wuk.view(c.n_head, c.d_head, -1)[i], a.wuv.view(c.n_head, c.d_value, -1)[i]
        q = torch.cat((cq @ wq[:c.d_head].T, rotate(cq @ wq[c.d_head:].T)), -1)
        k = torch.cat((ckv @ wk.T, k_rope), -1)
        scores = q @ k.mT / math.sqrt(c.d_head + c.d_rope)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
        peaks.append(scores.max().item())
        out.append(scores.softmax(-1) @ (ckv @ wv.T))
    exact = torch.cat(out, -1) @ a.wo.T
    rope = net.rope_table(c, 0, 9, x.device, x.dtype)
    torch.testing.assert_close(a(x, rope)[0], exact)
    assert a.max_logits.tolist() == pytest.approx(peaks)
    cache = net.Cache(c.context)                                   # absorbed form: 10 + 4 numbers per token
    torch.testing.assert_close(a(x, rope, cache=cache)[0], exact)
    assert sum(t[:, :, :1].numel() for t in cache.store[0]) == 2 * (c.kv_rank + c.d_rope)
    assert net.cache_per_token(net.PRESETS["kimi-k2"]) == 61 * 576


def explicit_mixture(moe, x):
    """Every expert on every token, combined with a dense table (N, E) of router weights."""
    h = moe.norm(x).flatten(0, 1)
    index, weight, _ = moe.route(moe.norm(x))
    table = torch.zeros(len(h), len(moe.gate)).scatter(1, index, weight)
    every = torch.stack([(silu(h @ g.T) * (h @ u.T)) @ d.T for g, u, d in zip(moe.gate, moe.up, moe.down)], 1)
    return (table[..., None] * every).sum(1).view_as(x) + moe.shared(moe.norm(x)), index, weight


def silu(x):
    return x * x.sigmoid()


@pytest.mark.parametrize("config", [EXPERTS, K2, replace(EXPERTS, n_active=6)],
                         ids=["experts", "groups", "all"])
def test_a_mixture_is_the_weighted_sum_of_its_experts(config, float64):
    """Values and gradients; with k = E it is the dense sum. An expert without tokens gets a zero gradient."""
    moe, x = lively(config).layers["1"].ffn, torch.randn(2, 7, config.d_model, requires_grad=True)
    with torch.no_grad():
        moe.bias += torch.randn(config.n_expert)
        moe.bias[0] -= 5.0 * (config.n_active < config.n_expert)   # no token is routed to expert 0
    mine = torch.autograd.grad(moe(x)[0].square().sum(), [x, *moe.parameters()])
    exact, index, weight = explicit_mixture(moe, x)
    for a, b in zip(mine, torch.autograd.grad(exact.square().sum(), [x, *moe.parameters()])):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(weight.sum(-1), torch.full((14,), config.route_scale))
    assert all(len(set(row)) == config.n_active for row in index.tolist())
    if config.n_active < config.n_expert:
        gate = mine[[*dict(moe.named_parameters())].index("gate") + 1]
        assert not (index == 0).any() and (gate[0] == 0).all()
    if config.n_group > 1:
        per = config.n_expert // config.n_group
        assert all(len({i // per for i in row}) <= config.top_group for row in index.tolist())


def test_a_mixture_without_a_shared_expert_is_just_its_experts(float64):
    with_shared, alone = (lively(replace(EXPERTS, n_shared=n)).layers["1"].ffn for n in (1, 0))
    x = torch.randn(2, 7, EXPERTS.d_model)
    assert not any("shared" in name for name, _ in alone.named_parameters())
    torch.testing.assert_close(alone(x)[0], with_shared(x)[0] - with_shared.shared(with_shared.norm(x)))


def test_the_bias_moves_the_choice_and_never_the_weight(float64):
    moe, h = lively(EXPERTS).layers["1"].ffn, torch.randn(3, 50, EXPERTS.d_model)
    before, weights, _ = moe.route(h)
    scores = (h.flatten(0, 1) @ moe.router.T).sigmoid()
    with torch.no_grad():
        moe.bias[2] += 10.0
    after, new, _ = moe.route(h)
    assert (after == 2).any(-1).all() and not (before == 2).any(-1).all()
    chosen = scores.gather(1, after)
    torch.testing.assert_close(new, chosen / chosen.sum(-1, keepdim=True) * EXPERTS.route_scale)
    load = torch.tensor([9.0, 1.0, 5.0, 5.0, 6.0, 4.0])
    moe.bias.zero_()
    moe.balance_(load)
    assert moe.bias.tolist() == [-0.001, 0.001, 0.0, 0.0, -0.001, 0.001]


def test_the_router_survives_scores_of_zero_and_learns_with_one_expert(float64):
    """Weights and gradients stay finite for a token whose logits are all far below zero. A single active
    expert is weighted by its score: normalised, the weight would always be 1 and the router would learn only
    rounding."""
    for depth, width in ((-95.0, torch.float32), (-200.0, torch.float32), (-2000.0, torch.float64)):
        moe, h = lively(EXPERTS).layers["1"].ffn.to(width), torch.ones(1, 2, EXPERTS.d_model, dtype=width)
        with torch.no_grad():
            moe.router.fill_(depth / EXPERTS.d_model)
        _, weight, _ = moe.route(h)
        gradient, = torch.autograd.grad(weight[:, 0].sum(), moe.router)
        assert weight.isfinite().all() and gradient.isfinite().all(), depth
    alone, h = lively(replace(EXPERTS, n_active=1)).layers["1"].ffn, torch.randn(2, 7, EXPERTS.d_model)
    index, weight, _ = alone.route(h)
    scores = (h.flatten(0, 1) @ alone.router.T).sigmoid()
    torch.testing.assert_close(weight, scores.amax(1, keepdim=True) * EXPERTS.route_scale)
    gradient, = torch.autograd.grad(alone(h)[0].square().sum(), alone.router)
    assert gradient.norm() > 1e-3


def test_the_balance_loss_is_one_for_an_even_load_and_larger_for_a_skewed_one(float64):
    moe = lively(replace(EXPERTS, balance_loss=0.5)).layers["1"].ffn
    even = torch.full((12, 6), 0.3)
    even.flatten()[(torch.arange(24).view(12, 2) % 6 + torch.arange(12)[:, None] * 6).flatten()] += 1e-9
    assert moe.imbalance(even, 2).item() == pytest.approx(1.0, abs=1e-6)
    skewed = torch.full((12, 6), 0.1)
    skewed[:, 0], skewed[:, 1] = 0.9, 0.2
    assert moe.imbalance(skewed, 2) > 1.5
    network, x = lively(replace(EXPERTS, balance_loss=0.5)), tokens(2, 16)
    loss, nll, balance = network(x, x)
    assert balance > 0.5 * 2 * 0.9, "two MoE layers, each with a loss of about 1 or more"
    copy.deepcopy(network)                                         # fails if a module holds on to a graph
    network.eval()
    assert network(x, x)[2] == 0 and loss.item() == pytest.approx(nll.mean().item())


@pytest.mark.parametrize("config", [EXPERTS, K2], ids=["experts", "groups"])
def test_the_balance_loss_counts_the_best_scores_regardless_of_bias_and_groups(config, float64):
    """DeepSeek-V3 eq. 17-20, token by token: value and router gradient, with a bias that moves the choice."""
    config = replace(config, balance_loss=1.0)
    moe, h = lively(config).layers["1"].ffn, torch.randn(2, 9, config.d_model)
    E, k = config.n_expert, config.n_active
    with torch.no_grad():
        moe.bias[:2] -= 0.4
    found, = torch.autograd.grad(moe.route(h)[2], moe.router)
    exact = 0.0
    for sequence in h:
        s = (sequence @ moe.router.T).sigmoid()                    # (T, E)
        chosen = [set(row.topk(k).indices.tolist()) for row in s]
        f = torch.tensor([sum(i in row for row in chosen) * E / k / len(s) for i in range(E)])
        p = (s / s.sum(1, keepdim=True)).mean(0)
        exact = exact + (f * p).sum() / len(h)
    torch.testing.assert_close(found, torch.autograd.grad(exact, moe.router)[0])


def test_the_router_chooses_in_float32_whatever_the_compute_dtype():
    """On bfloat16 inputs it picks the same experts as in float64, and ranks that hold bfloat16 weights keep
    the router in float32. In bfloat16 one token in twenty would change experts at Kimi K2's size."""
    config = replace(MHA, n_layer=1, d_model=256, act="silu", n_expert=384, n_active=8, d_expert=1, n_head=1,
                     n_kv_head=1)
    moe = lively(config, std=0.02).layers["0"].ffn
    h = torch.randn(1, 2000, 256).bfloat16()
    exact = (h[0].double() @ moe.router.double().T).sigmoid().topk(8).indices
    index, weight, _ = moe.route(h)
    assert weight.dtype == torch.float32 and torch.equal(index.sort().values, exact.sort().values)
    mesh = parallel.Mesh(dp=parallel.Axis(0, 2))
    narrow = train.build(train.Config(model=config), mesh, torch.bfloat16)[0].layers["0"].ffn
    assert narrow.router.dtype == torch.float32 and narrow.up.dtype == torch.bfloat16


def test_the_router_keeps_the_load_even_at_equal_loss(text):
    """The bias evens out the load over experts and leaves the loss unchanged."""
    model = replace(tiny_run(text).model, differential=False, act="silu", n_expert=8, n_dense=1, n_active=2,
                    d_expert=16)
    ends = {}
    for rate in (0.0, 0.02):
        loads = []
        config = tiny_run(text, model=replace(model, balance_rate=rate), tokens=60 * 8 * 32)
        watch = lambda _, network: loads.append(network.layers["1"].ffn.load.clone())
        history, _ = train.train(config, quiet=True, watch=watch)
        last = torch.stack(loads[-15:]).sum(0)
        ends[rate] = (last.std() / last.mean()).item(), history[-1]["val_mine"], history[-1]["load"]
    assert ends[0.02][0] < 0.6 * ends[0.0][0] and ends[0.02][2] >= 1
    assert ends[0.02][1] == pytest.approx(ends[0.0][1], abs=0.1)


def test_presets_have_the_reported_parameter_counts():
    """DeepSeek-V3: 671.0B, 36.6B active. Kimi K2: 1.026T by its config; with all 61 layers sparse it would be
    1.043T, which the report's 1.04T seems to count. FLOPs over DeepSeek-V3's GPU-hours: 339 TFLOP/s per GPU
    without attention."""
    counts = {name: net.count_parameters(net.PRESETS[name]) for name in ("deepseek-v3", "kimi-k2")}
    assert counts["deepseek-v3"]["total"] == pytest.approx(671.0e9, rel=1e-4)
    assert counts["deepseek-v3"]["active"] == pytest.approx(36.6e9, rel=1e-3)
    assert counts["kimi-k2"]["total"] == pytest.approx(1.026e12, rel=1e-3)
    assert counts["kimi-k2"]["active"] == pytest.approx(31.7e9, rel=1e-3)
    sparse = net.count_parameters(replace(net.PRESETS["kimi-k2"], n_dense=0))["total"]
    assert sparse == pytest.approx(1.043e12, rel=1e-3)
    speed = 6 * counts["deepseek-v3"]["matmul"] * 14.8e12 / (2.664e6 * 3600)
    assert speed == pytest.approx(339e12, rel=0.01)


@pytest.mark.parametrize("experts, active, factor", [(64, 6, 2.446), (384, 8, 2.827), (16, 2, 1.412)])
def test_the_router_factor_matches_gaussian_logits(experts, active, factor):
    """The mean of 1/‖p‖ for normalised top-k sigmoids p of Gaussian logits: outputs keep their scale.
    [Moonlight]"""
    s = torch.randn(60_000, experts).sigmoid().topk(active).values
    p = s / s.sum(-1, keepdim=True)
    assert (1 / p.norm(dim=-1)).mean().item() == pytest.approx(factor, abs=0.003)


GOLDEN = HERE.parent / "shared/golden/k2-like"


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs reference logits that transformers computed")
def test_logits_match_transformers():
    network = huggingface.load_hf(GOLDEN)
    reference = net.read_tensors(GOLDEN / "reference.safetensors")
    network.eval()
    with torch.no_grad():
        logits = network(reference["input_ids"])
        cache = net.Cache(256)
        pieces = [network(part, cache=cache) for part in reference["input_ids"].split((20, 1, 27), 1)]
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(pieces, 1), reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["kimi_k2", "deepseek_v3"])
def test_transformers_and_this_model_agree_both_ways(tmp_path, kind):
    """Their random weights give the same logits here, and ours give them there: with YaRN, with and without
    expert groups."""
    transformers = pytest.importorskip("transformers")
    grouped = kind == "deepseek_v3"
    yarn = dict(rope_type="yarn", rope_theta=50_000.0, factor=8.0, original_max_position_embeddings=16,
                beta_fast=4.0 if grouped else 1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    torch.manual_seed(0)
    about = transformers.DeepseekV3Config(
        vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, q_lora_rank=24 if grouped else None,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=12, n_group=4 if grouped else 1,
        topk_group=2 if grouped else 1, num_experts_per_tok=3, first_k_dense_replace=1,
        routed_scaling_factor=2.5, rope_parameters=yarn, max_position_embeddings=128,
        tie_word_embeddings=False, num_nextn_predict_layers=0)
    theirs = transformers.DeepseekV3ForCausalLM(about).eval().float()
    with torch.no_grad():
        for name, p in (*theirs.named_parameters(), *theirs.named_buffers()):
            if p.ndim == 1 and "inv_freq" not in name:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randint(160, (2, 70))
    network = huggingface.load_hf(tmp_path / "theirs").eval()
    assert network.config.yarn == 8 and network.config.top_group == (2 if grouped else 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x).logits, rtol=0, atol=1e-4)
        lively_ = lively(network.config).eval()
        huggingface.save_hf(lively_, tmp_path / "ours", shard_bytes=40_000)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
        back = back.eval()
        assert type(back).__name__ == "DeepseekV3ForCausalLM"
        torch.testing.assert_close(back(x).logits, lively_(x), rtol=0, atol=1e-4)


def motif_logits(w, x, heads, theta, eps=1e-6):
    """Motif's block by its definition, on tensors under Motif's names, in float64.  x (T,) → (T, V)"""
    w = {name: t.double() for name, t in w.items()}
    norm = lambda x, g, eps=eps: g * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    T, h = len(x), w["model.embed_tokens.weight"][x]
    future = torch.ones(T, T).triu(1).bool()
    for i in range(sum("input_layernorm" in name for name in w)):
        here = f"model.layers.{i}."
        at = {name.removeprefix(here): t for name, t in w.items() if name.startswith(here)}
        a = norm(h, at["input_layernorm.weight"])
        q, k, v = (a @ at[f"self_attn.{n}_proj.weight"].T for n in "qkv")
        d = q.shape[1] // heads

        def turn(x):                                               # (T, d): pair j is (x_j, x_j+d/2)
            angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
            a, b = x[:, :d // 2], x[:, d // 2:]
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
        logits = [turn(q[:, n:n + d]) @ turn(k[:, n:n + d]).T / d ** 0.5 for n in range(0, heads * d, d)]
        maps = [each.masked_fill(future, -math.inf).softmax(-1) for each in logits]
        start = 0.8 - 0.6 * math.exp(-0.3 * (i - 1))
        lq1, lk1, lq2, lk2 = (at[f"self_attn.lambda_{n}"] for n in ("q1", "k1", "q2", "k2"))
        lam = math.exp(lq1 @ lk1) - math.exp(lq2 @ lk2) + start
        out = [(maps[n] - lam * maps[n + 1]) @ v[:, n * d:(n + 2) * d] for n in range(0, heads, 2)]
        out = [norm(each, at["self_attn.subln.weight"], 1e-5) * (1 - start) for each in out]
        h = h + torch.cat(out, -1) @ at["self_attn.o_proj.weight"].T
        a = norm(h, at["post_attention_layernorm.weight"])
        gate, up = (a @ at[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        powers = zip(at["mlp.act_fn.weight"], (3, 2, 1))
        act = sum(c * norm(gate ** p, 1.0) for c, p in powers) + at["mlp.act_fn.bias"]
        h = h + (act * up) @ at["mlp.down_proj.weight"].T
    return norm(h, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


def test_motif_weights_are_imported_and_exported(tmp_path):
    """A folder with Motif's tensor names gives the logits of its definition, whose λ_init lags one layer
    behind the paper's. save_hf refuses a model with the paper's λ_init."""
    config = replace(net.PRESETS["motif-2.6b"], n_layer=3, n_head=4, n_kv_head=4, d_model=24, d_head=6,
                     d_ff=40, vocab_size=50, lam_delay=1)
    first = lively(config)
    huggingface.save_hf(first, tmp_path / "motif")
    files = {n: t for p in (tmp_path / "motif").glob("*.safetensors") for n, t in net.read_tensors(p).items()}
    assert len(files) == 2 + 3 * 16 and "model.layers.2.self_attn.subln.weight" in files
    network, x = huggingface.load_hf(tmp_path / "motif").eval(), torch.randint(50, (1, 19))
    assert network.config == config
    with torch.no_grad():
        exact = motif_logits(files, x[0], 4, 10_000.0)
        torch.testing.assert_close(network(x)[0].double(), exact, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="lam_delay=0, not 1"):
        huggingface.save_hf(lively(replace(config, lam_delay=0)), tmp_path / "other")
    with pytest.raises(ValueError, match="exists"):
        huggingface.save_hf(first, tmp_path / "motif")


def test_foreign_weights_are_read_completely_or_not_at_all(tmp_path):
    """A random model of ours in their layout, in two files, with one matrix in block-scaled FP8 and a layer
    beyond the last, is read back exactly. All missing, extra or misshapen tensors are listed."""
    config = replace(K2, d_model=160, tie=False)                   # wider than a block of scales
    network, said, theirs = lively(config), [], {}
    own = network.state_dict()
    for ours, names, _, to_theirs in huggingface.hf_map(config, own):
        theirs |= dict(zip(names, to_theirs(*(own[name] for name in ours)), strict=True))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert theirs[name].shape == (160, 24) and sum(t.numel() for t in theirs.values()) == sum(
        t.numel() for t in own.values())
    scale = torch.rand(2, 1) + 0.5
    small = (theirs[name] / scale.repeat_interleave(128, 0)[:160]).to(torch.float8_e4m3fn)
    own["layers.1.attention.wo"].copy_(small.float() * scale.repeat_interleave(128, 0)[:160])
    theirs |= {name: small, f"{name}_scale_inv": scale, "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}
    parts = list(theirs)
    for i in range(2):
        net.write_tensors(tmp_path / f"model-{i}.safetensors", {n: theirs[n] for n in parts[i::2]})
    about = dict(model_type="deepseek_v3", hidden_act="silu", norm_topk_prob=True,
                 rope_theta=config.rope_theta, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=4, hidden_size=160,
                 qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, kv_lora_rank=10, q_lora_rank=12,
                 intermediate_size=48, vocab_size=61, rms_norm_eps=1e-6, max_position_embeddings=32,
                 n_routed_experts=8, first_k_dense_replace=1, num_experts_per_tok=2, n_shared_experts=1,
                 moe_intermediate_size=16, n_group=4, topk_group=2, routed_scaling_factor=2.0,
                 tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = huggingface.load_hf(tmp_path, said.append)
    assert "1 tensors of layers beyond the last of 3" in said[0]
    for key, t in found.state_dict().items():
        assert torch.equal(t, own[key]), key

    gone = parts.index("model.layers.2.mlp.experts.5.up_proj.weight")
    net.write_tensors(tmp_path / "model-0.safetensors", {n: theirs[n] for n in parts[::2] if n != parts[gone]}
                      | {"model.norm.weight": torch.ones(7), "model.extra": torch.ones(1)})
    net.write_tensors(tmp_path / "model-1.safetensors", {n: theirs[n] for n in parts[1::2] if n not in (
        parts[gone], "model.norm.weight")})
    expected = (r"3 tensors do not fit: .*experts.5.up_proj.weight missing; "
                r"model.norm.weight \(7,\) for \(160,\); model.extra unknown")
    with pytest.raises(ValueError, match=expected):
        huggingface.load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(about | dict(model_type="llama")))
    with pytest.raises(ValueError, match="'llama'; have deepseek_v3, kimi_k2, motif"):
        huggingface.load_hf(tmp_path)


# config.json of a tiny DeepSeek-V3, with every key that a real one has, and of a tiny Motif.
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=1.0,
            mscale=1.0, mscale_all_dim=1.0)
ABOUT = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=50, hidden_size=32,
    intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5, kv_lora_rank=10,
    q_lora_rank=14, qk_rope_head_dim=8, v_head_dim=6, qk_nope_head_dim=10, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, norm_topk_prob=True, hidden_act="silu", rms_norm_eps=1e-6,
    max_position_embeddings=64, rope_theta=50_000.0, rope_scaling=None, rope_interleave=True,
    attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False, scoring_func="sigmoid",
    topk_method="noaux_tc", moe_layer_freq=1, seq_aux=True, aux_loss_alpha=0.001, ep_size=1, pretraining_tp=1,
    num_nextn_predict_layers=1, bos_token_id=0, eos_token_id=1, initializer_range=0.02, use_cache=True,
    torch_dtype="float32", transformers_version="4.48.3")
MOTIF_ABOUT = dict(
    model_type="motif", vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, rms_norm_eps=1e-6,
    attn_rms_norm_eps=1e-5, rope_theta=10_000.0, rope_scaling=None, hidden_act="poly_norm", use_bias=False,
    tie_word_embeddings=True, sliding_window=None, use_sliding_window=False, attention_dropout=0.0)
GONE = object()


def changed(about, **change):
    """`about` with some values changed, and without the keys whose new value is GONE."""
    return {key: value for key, value in (about | change).items() if value is not GONE}


def hf_folder(folder, about, tensors):
    """A hand-made Hugging Face folder with a single weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about))
    if tensors:
        net.write_tensors(folder / "model.safetensors", tensors)
    return folder


def latent_tensors(c):
    """Random weights under DeepSeek-V3's names, with the shapes its config.json `c` implies."""
    H, C, E = c["num_attention_heads"], c["hidden_size"], c["n_routed_experts"]
    d, r, dv, q, kv = (c[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank",
                                          "kv_lora_rank"))
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], C), "model.norm.weight": (C,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = c["vocab_size"], C

    def add(at, **more):
        shapes.update({f"{at}.{name}.weight": shape for name, shape in more.items()})

    def add_mlp(at, width):
        add(at, gate_proj=(width, C), up_proj=(width, C), down_proj=(C, width))
    for i in range(c["num_hidden_layers"]):
        add(f"model.layers.{i}", input_layernorm=(C,), post_attention_layernorm=(C,))
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        add(at, kv_a_proj_with_mqa=(kv + r, C), kv_a_layernorm=(kv,), kv_b_proj=(H * (d + dv), kv))
        add(at, o_proj=(C, H * dv))
        if q is None:
            add(at, q_proj=(H * (d + r), C))
        else:
            add(at, q_a_proj=(q, C), q_a_layernorm=(q,), q_b_proj=(H * (d + r), q))
        if i < c["first_k_dense_replace"]:
            add_mlp(mlp, c["intermediate_size"])
            continue
        shapes |= {f"{mlp}.gate.weight": (E, C), f"{mlp}.gate.e_score_correction_bias": (E,)}
        if c["n_shared_experts"]:
            add_mlp(f"{mlp}.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"])
        for e in range(E):
            add_mlp(f"{mlp}.experts.{e}", c["moe_intermediate_size"])
    return {name: torch.randn(shape) * 0.2 + float(len(shape) == 1) for name, shape in shapes.items()}


def turn_pairs(x, c):
    """Rotary positions by their definition, for interleaved pairs, with YaRN.  x (T, r) → (T, r)"""
    T, r, yarn, out = *x.shape, c["rope_scaling"], torch.empty_like(x)
    theta = [c["rope_theta"] ** (-2 * i / r) for i in range(r // 2)]
    if yarn:
        def where(turns):
            length = yarn["original_max_position_embeddings"]
            return r * math.log(length / (2 * math.pi * turns)) / (2 * math.log(c["rope_theta"]))
        low = max(math.floor(where(yarn["beta_fast"])), 0)
        high = min(math.ceil(where(yarn["beta_slow"])), r - 1)
        slow = [min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(r // 2)]
        theta = [t * (1 - g) + t / yarn["factor"] * g for t, g in zip(theta, slow)]
    for i, t in enumerate(theta):
        a, b, angle = x[:, 2 * i], x[:, 2 * i + 1], torch.arange(T).double() * t
        out[:, 2 * i] = a * angle.cos() - b * angle.sin()
        out[:, 2 * i + 1] = b * angle.cos() + a * angle.sin()
    return out


def latent_logits(w, x, c):
    """DeepSeek-V3's block by its definition, on tensors under its names, in float64.  x (T,) → (T, V)"""
    w, T, H = {name: t.double() for name, t in w.items()}, len(x), c["num_attention_heads"]
    d, r, dv, E, G = (c[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                                         "n_routed_experts", "n_group"))
    norm = lambda x, g: g * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    sharp = (0.1 * math.log(c["rope_scaling"]["factor"]) + 1) ** 2 if c["rope_scaling"] else 1.0

    def feed(x, at):
        inner = silu(x @ w[f"{at}.gate_proj.weight"].T) * (x @ w[f"{at}.up_proj.weight"].T)
        return inner @ w[f"{at}.down_proj.weight"].T

    def mixture(x, at):
        s, out = (x @ w[f"{at}.gate.weight"].T).sigmoid(), torch.zeros_like(x)
        choice = s + w[f"{at}.gate.e_score_correction_bias"]
        for t in range(T):
            rank = [sum(sorted(choice[t, g * E // G:(g + 1) * E // G].tolist())[-2:]) for g in range(G)]
            groups = sorted(range(G), key=rank.__getitem__)[-c["topk_group"]:]
            allowed = [e for e in range(E) if e * G // E in groups]
            chosen = sorted(allowed, key=lambda e: choice[t, e].item())[-c["num_experts_per_tok"]:]
            scale = c["routed_scaling_factor"] / sum(s[t, e] for e in chosen)
            out[t] = sum(scale * s[t, e] * feed(x[t], f"{at}.experts.{e}") for e in chosen)
        return out + feed(x, f"{at}.shared_experts") if c["n_shared_experts"] else out

    h, future = w["model.embed_tokens.weight"][x], torch.ones(T, T).triu(1).bool()
    for i in range(c["num_hidden_layers"]):
        at, out = f"model.layers.{i}", []
        own = lambda name: w[f"{at}.self_attn.{name}.weight"]
        a = norm(h, w[f"{at}.input_layernorm.weight"])
        if c["q_lora_rank"] is None:
            q = a @ own("q_proj").T
        else:
            q = norm(a @ own("q_a_proj").T, own("q_a_layernorm")) @ own("q_b_proj").T
        latent, k_rope = (a @ own("kv_a_proj_with_mqa").T).split((c["kv_lora_rank"], r), 1)
        kv = norm(latent, own("kv_a_layernorm")) @ own("kv_b_proj").T
        for n in range(H):
            q_nope, q_rope = q[:, n * (d + r):(n + 1) * (d + r)].split((d, r), 1)
            k_nope, v = kv[:, n * (d + dv):(n + 1) * (d + dv)].split((d, dv), 1)
            score = q_nope @ k_nope.T + turn_pairs(q_rope, c) @ turn_pairs(k_rope, c).T
            score = score.masked_fill(future, -math.inf) * sharp / (d + r) ** 0.5
            out.append(score.softmax(-1) @ v)
        h = h + torch.cat(out, -1) @ own("o_proj").T
        a = norm(h, w[f"{at}.post_attention_layernorm.weight"])
        h = h + (feed if i < c["first_k_dense_replace"] else mixture)(a, f"{at}.mlp")
    return norm(h, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("change", [
    dict(), dict(q_lora_rank=None), dict(n_shared_experts=0), dict(n_shared_experts=None),
    dict(n_shared_experts=2), dict(first_k_dense_replace=0), dict(first_k_dense_replace=3),
    dict(num_key_value_heads=None, n_group=1, topk_group=1), dict(tie_word_embeddings=True),
    dict(rope_scaling=YARN), dict(routed_scaling_factor=1, rope_theta=10_000),
    dict(model_type="kimi_k2", rope_scaling=YARN | dict(rope_type="yarn", beta_fast=1))], ids=str)
def test_deepseek_weights_give_the_logits_of_its_definition(tmp_path, change):
    """Random weights under its names give the logits of the definition for every variant of config.json. Some
    values are 0 or null, which is not the same as a missing key."""
    about = ABOUT | change
    tensors, x = latent_tensors(about), torch.randint(50, (40,))
    network = huggingface.load_hf(hf_folder(tmp_path, about, tensors)).eval()
    with torch.no_grad():
        logits = network(x[None])[0].double()
    torch.testing.assert_close(logits, latent_logits(tensors, x, about), rtol=0, atol=1e-4)


OTHER_NUMBERS = dict(
    scoring_func=["softmax"], topk_method=["greedy"], moe_layer_freq=[2], rope_interleave=[False, None],
    norm_topk_prob=[False, GONE], hidden_act=["gelu", ["silu"]], attention_bias=[True], is_causal=[False],
    rms_norm_eps=[1e-5, GONE, True, "1e-6"], partial_rotary_factor=[0.5], head_dim=[10, None],
    num_local_experts=[4], per_layer_config=[{"1": {}}], model_type=[["motif"], "llama", GONE],
    q_lora_rank=[0, GONE], kv_lora_rank=[0, None], n_group=[None, 0], topk_group=[None, 0],
    n_routed_experts=[0, None, 10 ** 30], num_experts_per_tok=[0, 1, None], v_head_dim=[0],
    routed_scaling_factor=[0, None, -1.0], qk_nope_head_dim=[None], hidden_size=[32.0, "32", True, 10 ** 30],
    num_hidden_layers=[-3, True, GONE], n_shared_experts=[True, GONE, -1], first_k_dense_replace=[1.0, None],
    tie_word_embeddings=[0, None, GONE], num_key_value_heads=[0, GONE], rope_theta=[GONE, 0, None, "1e4"],
    max_position_embeddings=[GONE, None], vocab_size=[10 ** 6])
OTHER_YARN = dict(
    factor=[0, GONE, None], mscale=[0.707, GONE], mscale_all_dim=[0, GONE], attention_factor=[1.5],
    truncate=[False, None], original_max_position_embeddings=[GONE, 0, None], beta_fast=[0], beta_slow=[0],
    partial_rotary_factor=[0.5], rope_type=["default", "linear", None])
OTHER_FP8 = dict(quant_method=["awq", GONE], fmt=["e5m2"], activation_scheme=["static"], expert_dtype=["fp4"],
                 weight_block_size=[None, 128, [128], [128, 0], [True, 128], [128.0, 128]])
OTHER_MOTIF = dict(
    attn_rms_norm_eps=[1e-6], use_bias=[True], qkv_bias=[True], attention_bias=[True], num_noise_heads=[2, 0],
    use_sliding_window=[True], hidden_act=["silu", GONE], head_dim=[0, "6", 6.0], tie_word_embeddings=[GONE],
    num_key_value_heads=[0, GONE], partial_rotary_factor=[0.5])


@pytest.mark.parametrize("table, put", [
    (OTHER_NUMBERS, lambda change: changed(ABOUT, **change)),
    (OTHER_YARN, lambda change: ABOUT | dict(rope_scaling=changed(YARN, **change))),
    (OTHER_FP8, lambda change: ABOUT | dict(quantization_config=changed(dict(quant_method="fp8"), **change))),
    (OTHER_MOTIF, lambda change: changed(MOTIF_ABOUT, **change))], ids=["deepseek", "yarn", "fp8", "motif"])
def test_a_configuration_that_would_change_the_numbers_is_refused(tmp_path, table, put):
    """Key by key, with one line that names the key and its value."""
    for key, values in table.items():
        for value in values:
            about = put({key: value})
            with pytest.raises(ValueError, match="config.json: ") as refused:
                huggingface.hf_config(hf_folder(tmp_path, about, {}))
                pytest.fail(f"{key} {value} is read", pytrace=False)
            said = "" if value is GONE else repr(value)[:60]
            assert key.replace("rope_type", "type") in str(refused.value) and said in str(refused.value), key
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change, says", [
    (dict(num_key_value_heads=1), "n_kv_head=n_head"), (dict(rope_theta=1), "rope_theta 1.0 must be above 1"),
    (dict(rope_scaling=YARN | dict(factor=0.5)), "factor 0.5 at least 1"),
    (dict(rope_scaling=YARN | dict(beta_fast=0.5)), "beta_fast 0.5 at least beta_slow 1.0"),
    (dict(rope_scaling=0), "not an object"), (dict(rope_parameters=[YARN]), "not an object"),
    (dict(quantization_config=[]), "quantization_config is not an object"),
    (dict(rope_scaling=YARN, rope_parameters=dict(type="yarn")), "rope_scaling and rope_parameters differ"),
    (dict(rope_scaling=YARN, original_max_position_embeddings=32), "max_position_embeddings 32, have 16"),
    (MOTIF_ABOUT | dict(rope_scaling=YARN), "rope_type 'yarn', have 'default'"),
    (MOTIF_ABOUT | dict(num_attention_heads=48), "rotary positions need an even width")])
def test_a_configuration_that_contradicts_itself_is_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        huggingface.hf_config(hf_folder(tmp_path, ABOUT | change, {}))


def test_harmless_keys_are_ignored_and_all_errors_are_listed(tmp_path):
    plain = huggingface.hf_config(hf_folder(tmp_path, ABOUT, {}))
    assert plain.n_shared == 1 and plain.q_rank == 14 and plain.norm_eps == 1e-6
    may_miss = ("rope_interleave", "attention_bias", "scoring_func", "topk_method", "moe_layer_freq",
                "rope_scaling")
    for change in (dict.fromkeys(may_miss, GONE), dict(use_cache=False, attention_dropout=0.5, mscale=7),
                   dict(rope_theta=GONE, rope_parameters=dict(rope_type="default", rope_theta=50_000)),
                   dict(head_dim=8, num_local_experts=8, num_key_value_heads=None, rope_parameters={})):
        assert huggingface.hf_config(hf_folder(tmp_path, changed(ABOUT, **change), {})) == plain
    motif = huggingface.hf_config(hf_folder(tmp_path, MOTIF_ABOUT, {}))
    assert (motif.d_head, motif.n_kv_head, motif.lam_delay) == (6, 4, 1)
    for change in (dict(head_dim=None), dict(head_dim=6), dict(num_key_value_heads=None, use_bias=None)):
        assert huggingface.hf_config(hf_folder(tmp_path, MOTIF_ABOUT | change, {})) == motif

    wrong = dict(scoring_func="softmax", topk_method="greedy", moe_layer_freq=2, hidden_size=None, n_group=0)
    with pytest.raises(ValueError) as refused:
        huggingface.hf_config(hf_folder(tmp_path, ABOUT | wrong, {}))
    assert all(key in str(refused.value) for key in wrong)


def odd_value(rng, depth=0):
    """A random JSON value."""
    if depth < 3 and rng.random() < 0.4:
        inner = [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {rng.choice(["type", "factor", "a"]): v for v in inner}
    return rng.choice([None, True, False, 0, 1, -1, 2 ** 31, 10 ** 400, 0.5, -0.0, 1e300, "yarn", "\udcff"])


def test_any_configuration_gives_a_model_or_a_one_line_error(tmp_path):
    """700 config.json files with misplaced values: a ModelConfig whose model can be built, or one line."""
    rng, read = random.Random(0), 0
    for _ in range(700):
        about = dict(rng.choice((ABOUT, ABOUT | dict(rope_scaling=YARN), MOTIF_ABOUT)))
        for key in rng.sample(sorted(about), rng.choice((1, 1, 2))):
            about[key] = odd_value(rng)
        if type(about.get("rope_scaling")) is dict and rng.random() < 0.5:
            about["rope_scaling"] = about["rope_scaling"] | {rng.choice(sorted(YARN)): odd_value(rng)}
        hf_folder(tmp_path, about, {})
        try:
            config = huggingface.hf_config(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, str(error)
            continue
        read += 1
        with torch.device("meta"):
            net.Transformer(replace(config, n_layer=1, n_dense=0))
        assert net.rope_frequencies(config).isfinite().all()
    assert 70 < read < 630


@pytest.mark.parametrize("raw", [
    b"", b"[]", b"3", b"null", b'"x"', b"{", DEEP, b'{"a":' * 99_999, b"\xff\xfe", b'{"a": NaN}', b"\0",
    b"9" * 5000, b'{"n_group": 3, "n_group": 4}', json.dumps(ABOUT).encode("utf-16")], ids=range(14))
def test_a_config_json_that_is_not_an_object_is_refused_in_one_line(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match="config.json: ") as refused:
        huggingface.hf_config(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: No such file"):
        huggingface.hf_config(tmp_path)


def test_sizes_that_the_files_cannot_fill_are_refused_before_allocating(tmp_path):
    tensors, huge = latent_tensors(ABOUT), 500_000
    for change in (dict(num_hidden_layers=huge), dict(n_routed_experts=huge, n_group=1, topk_group=1),
                   dict(hidden_size=huge, intermediate_size=huge), dict(vocab_size=huge)):
        with pytest.raises(ValueError, match="too few for|do not fit"):
            huggingface.load_hf(hf_folder(tmp_path, ABOUT | change, tensors))


FP8_NAMES = ["model.layers.0.self_attn.q_b_proj.weight", "model.layers.1.self_attn.kv_b_proj.weight",
             "model.layers.2.mlp.experts.5.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]


def in_fp8(tensors, block):
    """`tensors` with FP8_NAMES in block-scaled FP8; and with them dequantised, one number at a time."""
    kept, meant = dict(tensors), dict(tensors)
    for name in FP8_NAMES:
        t, full = tensors[name], torch.empty_like(tensors[name])
        scale = torch.rand(-(-t.shape[0] // block[0]), -(-t.shape[1] // block[1])) * 0.01 + 0.001
        for i, j in itertools.product(*map(range, t.shape)):
            full[i, j] = scale[i // block[0], j // block[1]]
        kept |= {name: (t / full).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        meant[name] = kept[name].float() * full
    return kept, meant


def fp8_about(*block, **more):
    """ABOUT with FP8 scales for blocks of `block` = rows, columns."""
    return ABOUT | more | dict(quantization_config=dict(quant_method="fp8", weight_block_size=block))


@pytest.mark.parametrize("block", [(16, 8), (64, 64), (7, 2 ** 40), (2 ** 40, 2 ** 40), None])
def test_fp8_weights_are_dequantised_by_the_blocks_of_config_json(tmp_path, block):
    """Without a quantization_config the blocks are 128 × 128; one weight here is wider than that."""
    about = fp8_about(*block, intermediate_size=200) if block else ABOUT | dict(intermediate_size=200)
    kept, meant = in_fp8(latent_tensors(about), block or (128, 128))
    found = huggingface.load_hf(hf_folder(tmp_path / "fp8", about, kept)).state_dict()
    plain = huggingface.load_hf(hf_folder(tmp_path / "plain", about, meant)).state_dict()
    assert all(torch.equal(t, plain[name]) for name, t in found.items())


def test_fp8_weights_without_their_scales_are_refused_before_anything_is_copied(tmp_path):
    """Scales that are missing, have the wrong blocks or dtype, or lack an FP8 weight are all listed at once,
    and the model is left unchanged."""
    good, _ = in_fp8(latent_tensors(ABOUT), (16, 8))
    a, b, c, d = (f"{name}_scale_inv" for name in FP8_NAMES)
    alone, gate, norm = "model.layers.1.x_scale_inv", "model.layers.1.mlp.gate.weight", "model.norm.weight"
    plain = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    bad = changed(good, **{
        a: GONE, b: good[b][:1], c: good[c].to(torch.int32), plain: torch.ones(2, 1), alone: torch.ones(1),
        gate: torch.ones(8, 32, dtype=torch.int8), norm: torch.ones(32).to(torch.float8_e4m3fn)})
    network = net.Transformer(huggingface.hf_config(hf_folder(tmp_path, fp8_about(16, 8), bad)))
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="7 tensors do not fit") as refused:
        train.restore([network], None, huggingface.HFWeights(tmp_path, network.config))
    for line in (f"{a} missing", f"{b} (1, 2) of torch.float32 for (2, 2)", f"{plain} unknown",
                 f"{alone} unknown", f"{c} (1, 4) of torch.int32 for (1, 4)", f"{gate} of torch.int8",
                 f"{norm} of torch.float8_e4m3fn"):
        assert line in str(refused.value), line
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    hf_folder(tmp_path, ABOUT, good)                               # this config.json does not give the blocks
    with pytest.raises(ValueError, match="4 tensors do not fit") as refused:
        huggingface.load_hf(tmp_path)
    assert f"{d} (2, 5) of torch.float32 for (1, 1) of (128, 128)" in str(refused.value)


def test_masters_get_the_weights_of_the_files_unrounded(tmp_path):
    """train.restore fills bfloat16 weights and their owners' float32 masters from HFWeights. Row ranges and a
    range of experts are read correctly too."""
    kept, _ = in_fp8(latent_tensors(ABOUT), (128, 128))
    config = huggingface.hf_config(hf_folder(tmp_path, ABOUT, kept))
    weights, whole = huggingface.HFWeights(tmp_path, config), huggingface.load_hf(tmp_path).state_dict()
    network = net.Transformer(config)
    for p in network.parameters():
        p.data = p.data.bfloat16() if p.ndim > 1 else p.data
    owners = owners_of(network, train.Config(), parallel.Mesh())
    train.restore([network], owners, weights, moments=False)
    for piece, master in owners.masters.items():
        assert master.dtype == torch.float32 and torch.equal(master, whole[piece.name]), piece.name
    for name, p in network.state_dict().items():
        assert torch.equal(p, whole[name].to(p.dtype)), name
    assert list(weights) == list(whole) and len(weights) == len(whole)
    for name, t in whole.items():
        assert weights.shape(name) == t.shape and torch.equal(weights[name], t), name
        assert torch.equal(weights.rows(name, 1, 3), t[1:3]), name
        assert torch.equal(weights.rows(name, 2), t[2:]), name
    part = net.Transformer(config, layers=range(1, 3), experts=range(2, 5))
    train.restore([part], None, weights)
    assert torch.equal(part.state_dict()["layers.2.ffn.up"], whole["layers.2.ffn.up"][2:5])


def test_weights_are_read_on_demand_and_never_cached(tmp_path):
    """If the file changes after it was checked, and changes again, reads return its current contents."""
    hf_folder(tmp_path, ABOUT, latent_tensors(ABOUT))
    weights = huggingface.HFWeights(tmp_path, huggingface.hf_config(tmp_path))
    path = tmp_path / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:8 + length])
    for name, theirs in (("embed", "model.embed_tokens.weight"),
                         ("layers.1.ffn.up", "model.layers.1.mlp.experts.0.up_proj.weight"),
                         ("layers.0.attention.wuk", "model.layers.0.self_attn.kv_b_proj.weight")):
        for value in (3.5, -7.0):
            with open(path, "r+b") as file:
                file.seek(8 + length + header[theirs]["data_offsets"][0])
                file.write(np.full(10, value, "<f4").tobytes())
            assert weights[name].flatten()[:10].eq(value).all(), name


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    """Settings that no shape reveals are compared too; those that a run may choose anew are not."""
    config = huggingface.hf_config(hf_folder(tmp_path, ABOUT, latent_tensors(ABOUT)))
    other = replace(config, route_scale=1.0, n_active=2)
    with pytest.raises(ValueError, match="has another model: n_active=3, not 2; route_scale=2.5, not 1.0$"):
        huggingface.HFWeights(tmp_path, other)
    new = replace(config, context=128, rope_theta=9e4, yarn=4.0, balance_rate=0.0, balance_loss=1e-4)
    huggingface.HFWeights(tmp_path, new)


def test_what_transformers_reads_from_config_json_is_honoured_or_refused(tmp_path):
    """With every key missing or null, and with other changes: if our model loads, its logits match theirs."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    tensors, x, read = latent_tensors(ABOUT), torch.randint(50, (1, 40)), 0
    yarn = YARN | dict(rope_type="yarn")
    cases = [{}] + [{key: value} for key in ABOUT for value in (GONE, None) if key != "model_type"]
    cases += [dict(rope_scaling=changed(yarn, **{key: value})) for key in YARN for value in (GONE, 0, 2.0)]
    cases += [dict(is_causal=False), dict(rope_interleave=False), dict(head_dim=4), dict(rms_norm_eps=1e-2),
              dict(norm_topk_prob=False), dict(routed_scaling_factor=1.0), dict(topk_group=4),
              dict(n_group=2), dict(num_experts_per_tok=1), dict(rope_theta=100.0),
              dict(rope_parameters=dict(rope_theta=9.0))]
    for change in cases:
        folder = hf_folder(tmp_path, changed(ABOUT | dict(rope_scaling=yarn), **change), tensors)
        try:
            network = huggingface.load_hf(folder, lambda _: None).eval()
            theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:                                 # theirs refuses null for False, say
            assert isinstance(error, ValueError) or "Strict" in type(error).__name__, change
            continue
        read += 1
        with torch.no_grad():
            ours, logits = network(x), theirs(x).logits
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4, msg=lambda text: f"{change}: {text}")
    assert read > 25


def write_index(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


def shards(folder, tensors, n=2, name="model-{}.safetensors"):
    """Spread `tensors` over n files of a folder with ABOUT. → {tensor name: file}"""
    where = {key: name.format(i % n) for i, key in enumerate(tensors)}
    hf_folder(folder, ABOUT, {})
    for file in set(where.values()):
        net.write_tensors(folder / file, {key: t for key, t in tensors.items() if where[key] == file})
    return where


def test_only_weights_named_by_the_index_are_read(tmp_path):
    """Stale shards in the same folder are ignored. Everything the index names has to be there."""
    old, new = latent_tensors(ABOUT), latent_tensors(ABOUT)
    shards(tmp_path, old, 3, "model-0000{}-of-00003.safetensors")
    shards(tmp_path, old, 1, "model.safetensors")
    where = shards(tmp_path, new | {"model.unnamed": torch.ones(1)}, 2, "model-0000{}-of-00002.safetensors")
    write_index(tmp_path, {name: file for name, file in where.items() if name != "model.unnamed"})
    x = torch.randint(50, (9,))
    with torch.no_grad():
        logits = huggingface.load_hf(tmp_path).eval()(x[None])[0].double()
    torch.testing.assert_close(logits, latent_logits(new, x, ABOUT), rtol=0, atol=1e-4)
    found = huggingface.HFWeights(tmp_path, huggingface.hf_config(tmp_path)).files
    assert found.keys() == new.keys() and all(torch.equal(t, new[name]) for name, t in found.items())

    first = "model-00000-of-00002.safetensors"
    net.write_tensors(tmp_path / first, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=f"tensors of its index missing: .* in {first}.*; and .. more$"):
        huggingface.load_hf(tmp_path)


@pytest.mark.parametrize("where, says", [
    ({"model.norm.weight": "model-7.safetensors"}, "1 of 1 files of its index missing: model-7.safetensors$"),
    ({f"model.layers.{i}.{'x' * 90}": f"model-{i // 500}.safetensors" for i in range(9000)},
     "18 of 18 files of its index missing: model-0.safetensors; .*; model-7.safetensors; and 10 more$"),
    *(({"a": file}, "names what is no file of its folder") for file in ("../x", "/etc/x", "", "x" * 3000)),
    *((where, "weight_map is not one of tensors") for where in ({"a": 5}, {"a": None}, [], {}, None))])
def test_an_index_that_names_missing_files_gives_one_short_line(tmp_path, where, says):
    write_index(hf_folder(tmp_path, ABOUT, latent_tensors(ABOUT)), where)
    with pytest.raises(ValueError, match=says) as refused:
        huggingface.load_hf(tmp_path)
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


def test_without_an_index_a_name_in_two_files_is_refused(tmp_path):
    tensors = latent_tensors(ABOUT)
    shards(tmp_path, tensors)
    found = huggingface.load_hf(tmp_path).state_dict()
    assert torch.equal(found["norm.weight"], tensors["model.norm.weight"])
    net.write_tensors(tmp_path / "model-old.safetensors", {"model.norm.weight": torch.zeros(32)})
    with pytest.raises(ValueError, match="no model.safetensors.index.json says which file has model.norm.we"):
        huggingface.load_hf(tmp_path)
    hf_folder(tmp_path, ABOUT, tensors | {"model.norm.weight": torch.full((32,), 2.0)})
    found = huggingface.load_hf(tmp_path).state_dict()             # model.safetensors takes precedence
    assert found["norm.weight"].eq(2).all()
    for raw in (b"[1]", DEEP, b"\xff", b'{"weight_map": {}, "weight_map": {}}'):
        (tmp_path / "model.safetensors.index.json").write_bytes(raw)
        with pytest.raises(ValueError, match="index.json: not"):
            huggingface.load_hf(tmp_path)


def test_long_lists_of_misfits_are_truncated(tmp_path):
    tensors = {f"model.\n{'x' * 300}.{i}": torch.ones(1) for i in range(2000)}
    with pytest.raises(ValueError, match=r"2000 tensors do not fit: model.\\nxxx") as refused:
        huggingface.load_hf(hf_folder(tmp_path, ABOUT, latent_tensors(ABOUT) | tensors))
    assert len(str(refused.value)) < 2000 and "\n" not in str(refused.value)
    assert str(refused.value).endswith("; and 1992 more")


def test_extra_tensors_that_others_store_are_harmless(tmp_path):
    """Rotary frequencies, which follow from config.json; a head that copies the embedding; empty tensors."""
    about = ABOUT | dict(tie_word_embeddings=True, n_shared_experts=0)
    tensors = latent_tensors(about)
    copy = tensors["model.embed_tokens.weight"].clone()
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    extra |= {"model.layers.1.mlp.shared_experts.up_proj.weight": torch.empty(0, 32), "lm_head.weight": copy,
              "model.rotary_emb.inv_freq": torch.ones(4), "model.layers.3.embed_tokens.weight": copy}
    plain = huggingface.load_hf(hf_folder(tmp_path / "plain", about, tensors)).state_dict()
    found = huggingface.load_hf(hf_folder(tmp_path / "extra", about, tensors | extra)).state_dict()
    assert found.keys() == plain.keys() and all(torch.equal(t, plain[name]) for name, t in found.items())
    small = {"model.embed_tokens.weight": copy.to(torch.float8_e4m3fn),
             "model.embed_tokens.weight_scale_inv": torch.ones(1, 1)}
    for more, says in (({"lm_head.weight": copy + 1e-6}, "is not the embedding that it is tied to"),
                       ({"lm_head.weight": copy[:7]}, "is not the embedding"),
                       ({"lm_head.weight": copy.bfloat16()}, "is not the embedding"),
                       (small | {"lm_head.weight": copy}, "is not the embedding"),
                       ({"model.layers.x.rotary_emb.inv_freq": torch.ones(4)}, "inv_freq unknown"),
                       ({"model.layers.0.self_attn.rotary_emb.inv": torch.ones(4)}, "inv unknown")):
        with pytest.raises(ValueError, match=f"1 tensors do not fit: .*{says}"):
            huggingface.load_hf(hf_folder(tmp_path / "extra", about, tensors | more))


class Dies:
    """A stand-in tokenizer: when the export reads it, the process is killed or the disk is full."""
    eot = 0

    def __init__(self, kill):
        self.kill = kill

    @property
    def pieces(self):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")


def test_an_export_is_complete_or_absent(tmp_path):
    """Killed midway, it leaves nothing under its name, and none of its files get into the next export."""
    network, target = lively(replace(K2, tie=False, d_value=8)), tmp_path / "hf"
    child = os.fork()
    if child == 0:
        huggingface.save_hf(lively(replace(K2, tie=False, n_layer=4)), target, Dies(True), shard_bytes=9000)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and not target.exists()
    left = [p.name for folder in tmp_path.iterdir() for p in folder.iterdir()]
    assert len([name for name in left if name.startswith("model-")]) > 2
    huggingface.save_hf(network, target)
    assert {p.name for p in target.iterdir()} == {"config.json", "model-00000.safetensors",
                                                  "model.safetensors.index.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    back = huggingface.load_hf(target).state_dict()
    assert all(torch.equal(t, back[name]) for name, t in network.state_dict().items())
    with pytest.raises(OSError, match="No space left"):
        huggingface.save_hf(network, tmp_path / "full", Dies(False))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="exists"):
        huggingface.save_hf(network, tmp_path / "empty")


@pytest.mark.parametrize("change, says", [
    (dict(n_active=1), "num_experts_per_tok 1"), (dict(norm_eps=1e-5), "norm_eps=1e-05, not 1e-06"),
    (dict(yarn=4.0, yarn_fast=0.5), "beta_fast 0.5"), (dict(yarn=0.5), "factor 0.5"),
    (dict(act="gelu"), "act=gelu"), (dict(kv_rank=0, d_rope=0), "differential=False, not True")])
def test_what_a_format_cannot_express_is_not_exported(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        huggingface.save_hf(net.Transformer(replace(K2, **change)), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [
    replace(K2, tie=False, n_shared=0), replace(K2, n_shared=2, n_dense=3, n_group=1, top_group=1),
    replace(K2, q_rank=0, n_dense=0, yarn=4.0, yarn_from=8, yarn_fast=2.0),
    replace(TINY, lam_delay=1, tie=False, n_kv_head=2)], ids=range(4))
def test_an_export_reads_back_as_the_same_model(tmp_path, config):
    """No shared experts, no query latent, no dense layers: what is 0 reads back as 0."""
    network = lively(config)
    huggingface.save_hf(network, tmp_path / "hf", shard_bytes=20_000)
    back = huggingface.load_hf(tmp_path / "hf")
    free = {name: getattr(config, name) for name in huggingface.HF_FREE}
    assert replace(back.config, **free) == config and back.config.yarn == config.yarn
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in back.state_dict().items())


def run_model(capsys, *words):
    """Run model.py with these arguments. → exit code, stdout, stderr"""
    try:
        net.main([str(word) for word in words])
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
        print("" if isinstance(leave.code, int) else leave.code, file=sys.stderr, end="")
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("word, code, says", [
    ("--temperature=-1", 1, "--temperature=-1.0: must be from 0 to 1000"), ("--top-p=nan", 1, "=nan: must"),
    ("--temperature=inf", 1, "=inf: must"), ("--top-p=1.5", 1, "--top-p=1.5: must be from 0 to 1"),
    ("--temperature=nan", 1, "=nan: must"), ("--top-p=-0.1", 1, "must be"), ("--tokens=-1", 1, "-1: must be"),
    ("--seed=-1", 1, "--seed=-1: must be"), ("--seed=99999999999999999999", 1, "must be from 0 to"),
    ("--average=0", 1, "--average=0: must be from 1"), ("--average=99", 1, "checkpoints here, not 99"),
    ("--prompt=a\udcffb", 1, r"--prompt='a\\udcffb': is not UTF-8"), ("--tokens=many", 2, "invalid int"),
    ("--temperature=0", 0, ""), ("--temperature=1e-300", 0, ""), ("--top-p=0", 0, ""), ("--tokens=0", 0, ""),
    ("--prompt=ü€🙂\n\0", 0, ""), ("--seed=9223372036854775807", 0, "")], ids=range(19))
def test_sampling_prints_text_or_a_one_line_error(finished, capsys, word, code, says):
    left, out, error = run_model(capsys, "--sample", finished[0].parent.parent, "--tokens=3", word)
    assert left == code and re.search(says, error) and "Traceback" not in error, error
    if code == 1:
        assert "\n" not in error.strip() and out == ""
    if code == 0:
        assert out.endswith("\n") and (word != "--tokens=0" or out == "\n")


def test_folders_that_cannot_be_sampled_from_give_a_one_line_error(finished, tmp_path, capsys):
    """All checkpoints damaged, no tokenizer or an unusable one, no run, a model that cannot be exported."""
    run, hf = finished[0].parent.parent, hf_folder(tmp_path / "kimi", ABOUT, {})
    for name in ("sick", "mute", "other", "wide"):
        shutil.copytree(run, tmp_path / name)
    for file in tmp_path.glob("sick/ckpt/*/rank-0.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "mute/tokenizer.json").unlink()
    (tmp_path / "other/tokenizer.json").write_text("[]")
    ranks = {bytes([i]): i for i in range(256)} | {b"a" + bytes([i]): 256 + i for i in range(200)}
    data.Tokenizer("wide", data.PATTERN, ranks).save(tmp_path / "wide/tokenizer.json")
    (tmp_path / "file").write_text("x")
    for words, says in (([tmp_path / "sick"], "sick: every checkpoint is damaged$"),
                        ([tmp_path / "mute"], "No such file or directory: .*tokenizer.json'$"),
                        ([tmp_path / "other"], "tokenizer.json"),
                        ([tmp_path / "wide"], "its tokenizer has a token 456, its model 261 of them"),
                        ([tmp_path / "file"], "0 checkpoints here"),
                        ([tmp_path / "nowhere"], "0 checkpoints here"), ([""], "0 checkpoints here"),
                        ([hf], "kimi has no tokenizer.json"), ([hf, "--average=2"], "no tokenizer.json"),
                        ([run, "--export", tmp_path / "out"], "model.py: a model of the kind motif cannot"),
                        ([run, "--export", tmp_path / "file"], "model.py: ")):
        code, _, error = run_model(capsys, "--sample", *words)
        assert code == 1 and re.search(says, error) and "\n" not in error, error
    (hf / "tokenizer.json").write_text("{}")                       # it is read before the weights
    assert "has no checkpoints" in run_model(capsys, "--sample", hf, "--average=2")[2]
    assert "tokenizer_config.json" in run_model(capsys, "--sample", hf)[2]
    shutil.copy(run / "tokenizer.json", hf)
    assert "no model*.safetensors here" in run_model(capsys, "--sample", hf)[2]
    assert run_model(capsys, "--prompt=x")[0] == 2 and run_model(capsys, "--export=x")[0] == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_shows_what_it_can(finished, encoding):
    sampling = [sys.executable, HERE / "model.py", "--sample", finished[0].parent.parent, "--tokens=2"]
    environment = os.environ | dict(PYTHONIOENCODING=encoding)
    shown = subprocess.run([*sampling, "--prompt=aü€🙂"], env=environment, capture_output=True)
    assert shown.returncode == 0 and shown.stdout.startswith("aü€🙂".encode(encoding, "replace")), shown.stderr


def test_a_prompt_that_is_not_utf8_is_refused(finished):
    sampling = [sys.executable, HERE / "model.py", "--sample", finished[0].parent.parent, b"--prompt=a\xff"]
    refused = subprocess.run(sampling, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr == "model.py: --prompt='a\\udcff': is not UTF-8\n"


BYTES = data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
SYSTEM, USER, ASSISTANT, END = (BYTES.specials[name] for name in data.SPECIALS[1:])


class Scripted(torch.nn.Module):
    """A model that says what it is told to, and notes how many tokens it was given in each call."""
    def __init__(self, *answers, context=64):
        super().__init__()
        self.config = replace(TINY, vocab_size=261, context=context)
        self.script = [token for answer in answers for token in answer]
        self.given = []

    def forward(self, x, cache):
        self.given.append(x.shape[1])
        cache.length += x.shape[1]
        assert cache.length <= self.config.context
        token = self.script.pop(0)
        if token is KeyboardInterrupt:
            raise token
        return torch.nn.functional.one_hot(torch.full(x.shape, token), 261) * 1e3


def talk(*answers, limit=50, system="", context=64):
    return net.Chat(Scripted(*answers, context=context), BYTES, system, limit, temperature=0)


@pytest.mark.parametrize("config", [TINY, K2, replace(TINY, share_kv=2), replace(TINY, ngpt=True)],
                         ids=("differential", "latent", "shared", "ngpt"))
def test_a_turn_computes_its_own_tokens_and_answers_as_the_whole_conversation(config):
    """Three turns, each with the cache of those before: every token is the one that the model finds most
    probable after the conversation so far, computed without a cache."""
    model = lively(replace(config, vocab_size=261, context=128, n_layer=2)).double()
    computed = []
    model.register_forward_pre_hook(lambda _, x, more: computed.append(x[0].shape[1]) if more else None,
                                    with_kwargs=True)
    chat = net.Chat(model, BYTES, "Be brief.", limit=9, temperature=0)
    for question in ("one", "the second", "3"):
        computed.clear()
        before = chat.cache.length, chat.size()
        said = "".join(chat.answer(question))
        own = before[1] - before[0] + len(question) + 3        # what was not fed yet; user, end, assistant
        assert computed[0] == own and set(computed[1:]) <= {1} and len(computed) <= 9, said
    whole = [token for turn in chat.turns for token in turn]
    assert chat.turns[0] == [SYSTEM, *b"Be brief.", END] and chat.turns[3] == [USER, *b"the second", END]
    with torch.no_grad():
        best = model(torch.tensor([whole]))[0].argmax(-1).tolist()
    at = 0
    for i, turn in enumerate(chat.turns):
        if i and i % 2 == 0:
            found = [best[at + j] for j in range(len(turn) - 2)]
            assert turn[0] == ASSISTANT and turn[1:-1] == found and len(found) > 0 and turn[-1] == END
        at += len(turn)


def test_an_answer_streams_whole_characters_and_ends_at_a_special():
    euro = "€".encode()
    chat = talk(b"a" + euro, [END], b"b" + euro[:2], [BYTES.eot], b"x" + euro[:1] + b"y", [USER], b"12345")
    assert list(chat.answer("q")) == ["a", "", "", "€", ""]
    assert chat.turns[-1] == [ASSISTANT, *b"a", *euro, END], "END once"
    assert "".join(chat.answer("q")) == "b\ufffd" and chat.turns[-1][-3:] == [*euro[:2], END], "not eot"
    assert "".join(chat.answer("q")) == "x\ufffdy"
    chat.limit = 3
    assert "".join(chat.answer("q")) == "123 [--tokens=3: cut]" and chat.turns[-1][1:] == [*b"123", END]
    chat.limit, chat.model.script = 3, [*b"123", END]
    assert chat.answer("q").__next__() == "1"
    chat.limit, chat.model.script = 0, []
    assert "".join(chat.answer("q")) == " [--tokens=0: cut]"


def test_what_a_question_spells_stays_text():
    chat = talk([END])
    assert list(chat.answer("<|end|><|assistant|>")) == [""]
    assert chat.turns[0] == [USER, *b"<|end|><|assistant|>", END]


def test_a_full_window_forgets_the_oldest_questions_but_not_the_system_message():
    """64 tokens, 7 of them the system message's. Nothing is fed twice until something is forgotten."""
    answers = [b"a" * 10, [END]] * 5
    chat = talk(*answers, system="Hello", limit=20)
    assert "".join(chat.answer("q" * 5)) == "a" * 10 and chat.size() == 7 + 7 + 12
    assert "".join(chat.answer("r" * 8)) == "a" * 10 and chat.size() == 26 + 10 + 12
    assert chat.model.given == [7 + 7 + 1] + [1] * 10 + [1 + 10 + 1] + [1] * 10
    chat.model.given.clear()
    said = "".join(chat.answer("s"))
    assert said == ("[the window of 64 tokens is full: the oldest questions and their answers, 1 of each, "
                    "are forgotten]\n" + "a" * 10)
    assert chat.model.given == [7 + 22 + 3 + 1] + [1] * 10, "fed again, from the first token on"
    assert [turn[0] for turn in chat.turns] == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert chat.turns[1] == [USER, *b"r" * 8, END]
    said = "".join(chat.answer("t" * 40))                          # leaves 64 - 7 - 42 - 1 for an answer
    assert "2 of each" in said and said.endswith("a" * 10) and len(chat.turns) == 3

    assert "".join(chat.answer("t" * 54)) == "[56 tokens, but the window has room for 55: not read]"
    assert len(chat.turns) == 3, "the conversation is as it was"
    chat.model.script = [*b"xyz"]
    assert "".join(chat.answer("t" * 53)).endswith("\nxy [the window of 64 tokens is full: cut]")
    assert len(chat.turns) == 3 and chat.turns[1:] == [[USER, *b"t" * 53, END], [ASSISTANT, *b"xy", END]]
    chat.model.script = [*b"on", END]
    assert "".join(chat.answer("and")).endswith("\non"), "it goes on after a window that was full"
    chat.reset()
    assert chat.turns == [[SYSTEM, *b"Hello", END]] and chat.cache.length == 0


def test_an_answer_that_is_stopped_stays_as_far_as_it_got():
    """Ctrl-C before the first token, within the model, between pieces; the cache agrees with the turns."""
    chat = talk([KeyboardInterrupt], b"ab", [KeyboardInterrupt], b"xyz", [END], context=99)
    for said in "", "ab":
        with pytest.raises(KeyboardInterrupt):
            list(chat.answer("q"))
        assert chat.turns[-1] == [ASSISTANT, *said.encode(), END]
    pieces = chat.answer("q")
    assert [next(pieces), next(pieces)] == ["x", "y"]
    pieces.close()
    assert chat.turns[-1] == [ASSISTANT, *b"xy", END] and chat.size() == chat.cache.length + 2
    chat.model.script = [*b"on", END]
    assert "".join(chat.answer("r")) == "on" and sum(chat.model.given) == chat.cache.length


class Remembering(Scripted):
    """Checks that its cache holds the beginning of the conversation."""
    def forward(self, x, cache):
        cache.fed = getattr(cache, "fed", []) + x[0].tolist()
        assert cache.fed == [token for turn in self.chat.turns for token in turn][:-1]
        return super().forward(x, cache)


def test_ctrl_c_before_any_line_leaves_a_conversation_whole():
    """Also while the oldest questions are forgotten: every turn has its end, and the cache agrees."""
    for line in itertools.count():
        model = Remembering(*[b"abcdefg", [END]] * 9, context=40)
        model.chat = chat = net.Chat(model, BYTES, "S", 9, temperature=0)
        for _ in range(2):
            list(chat.answer("q" * 5))
        left = [line]

        def trace(frame, event, _):
            if frame.f_globals is vars(net) and frame.f_code.co_name in ("answer", "forget", "next", "size"):
                left[0] -= event == "line"
                if left[0] < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace
        before = sys.gettrace()
        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(chat.answer("rr")) as pieces:
            list(pieces)
        sys.settrace(before)
        assert all(turn[-1] == END and END not in turn[:-1] for turn in chat.turns)
        assert [turn[0] for turn in chat.turns[1:]] == [USER, ASSISTANT] * (len(chat.turns) // 2)
        model.script = [*b"on", END]
        assert "".join(chat.answer("s")).endswith("on")
        if left[0] >= 0:
            break
    assert line > 50


class Typed(io.StringIO):
    """What is typed, with ^C as a line of its own."""
    def readline(self, *_):
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_a_conversation_through_a_pipe_reads_as_a_transcript(finished, tmp_path, capsys, monkeypatch):
    """Questions, blank lines, Ctrl-C at the prompt and in an answer, /reset; a run that has seen no
    conversations says so; the same seed says the same; input that is not UTF-8."""
    run = finished[0].parent.parent
    scripted = Scripted(b"Hi!", [END], b"Yes", [KeyboardInterrupt], b"Hi?", [END], context=32)
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_run", lambda *_: (scripted, BYTES))
        patch.setattr(sys, "stdin", Typed("hello\n\nok?\n^C\n/reset \n/help\nhello\n"))
        code, said, error = run_model(capsys, "--chat", run, "--tokens=5")
    lines = said.splitlines()
    assert not code and not error and lines[0].startswith(f"{run}: Ctrl-C stops an answer, /reset begins")
    assert "has seen no conversations" in lines[1] and f"sft --init={run}" in lines[1]
    assert lines[2:] == ["> hello", "Hi!", "> ", "> ok?", "Yes [stopped]", "> ", "> /reset ", "> /help",
                         "there is no /help, only /reset", "> hello", "Hi?", "> "]
    assert scripted.given == [8, 1, 1, 1, 7, 1, 1, 1, 8, 1, 1, 1], "/reset began anew"
    asked = dict(input="a\nü\n".encode() + b"\xff\n", capture_output=True)
    command = [sys.executable, HERE / "model.py", "--chat", run, "--tokens=4", "--system=s"]
    first, second = (subprocess.run(command, **asked) for _ in range(2))
    assert first.returncode == 0 and first.stdout == second.stdout and not first.stderr, first.stderr
    assert "\n> ü\n" in first.stdout.decode() and "\n> \ufffd\n" in first.stdout.decode()


def test_ctrl_c_stops_an_answer_and_not_the_program(finished):
    """The signal itself, sent twice while the model answers."""
    code = ("import sys, time, model\n"
            "def next(chat):\n"
            "    while len(chat.turns[-1]) > 4: time.sleep(0.01)\n"
            "    return 97\n"
            "model.Chat.next = next\n"
            "model.main(sys.argv[1:])")
    command = [sys.executable, "-uc", code, "--chat", finished[0].parent.parent, "--tokens=99"]
    talking = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                               preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    threading.Timer(60, talking.kill).start()                      # a test that fails does not hang

    def read_until(end):
        seen = b""
        while not seen.endswith(end):
            byte = talking.stdout.read(1)
            assert byte, seen
            seen += byte
    for question in (b"one\n", b"two\n"):
        talking.stdin.write(question)
        read_until(b"aaa")
        talking.send_signal(signal.SIGINT)
        read_until(b" [stopped]\n> ")
    assert talking.communicate()[0] == b"\n" and talking.returncode == 0                  # Ctrl-D


def test_a_run_tuned_on_conversations_says_what_it_learned(tmp_path, capsys, monkeypatch):
    """The template of training is that of the chat: an answer learned by heart comes back, and nothing more;
    also to the second question, and from an export of the run."""
    path = tmp_path / "chat.jsonl"
    with open(path, "w") as file:
        for letter in string.ascii_letters:
            said = "ping " + letter, "pong ü", "who?", "me", "bye", "€"
            turns = zip(("user", "assistant") * 3, said)
            messages = [dict(role=role, content=text) for role, text in turns]
            print(json.dumps(dict(messages=messages)), file=file)
    files = data.DataConfig(files=f"chat={path}", domains="chat:1:1", tokenizer="bytes",
                            cache=str(tmp_path / "c"))
    model = replace(K2, vocab_size=261, context=48, tie=False, init_std=0.1)
    run = str(tmp_path / "run")
    train.train(train.Config(objective="sft", model=model, data=files, batch=4, micro=4, tokens=60 * 4 * 48,
                             optim=muonclip.OptimConfig(lr=2e-2, floor=0.0), save_every=99, out=run),
                quiet=True)
    net.main(["--sample", run, "--export", str(tmp_path / "hf")])
    capsys.readouterr()
    for folder in run, tmp_path / "hf":
        monkeypatch.setattr(sys, "stdin", io.StringIO("ping h\nwho?\nbye\n"))
        if folder is run or importlib.util.find_spec("tokenizers"):
            code, said, error = run_model(capsys, "--chat", folder, "--temperature=0", "--tokens=9")
            assert not code and "no conversations" not in said, error
            assert said.splitlines()[1:] == ["> ping h", "pong ü", "> who?", "me", "> bye", "€", "> "]


def test_chats_that_cannot_begin_give_a_one_line_error(finished, tmp_path, capsys, monkeypatch):
    run = finished[0].parent.parent
    for words, says in (([tmp_path], "0 checkpoints here"), ([run, "--tokens=-1"], "--tokens=-1: must"),
                        ([run, "--system=a\udcff"], "is not UTF-8"),
                        ([run, "--system", "s" * 20], "--system: 22 tokens are more than half of the win")):
        code, said, error = run_model(capsys, "--chat", *words)
        assert code == 1 and re.search(says, error) and "\n" not in error and not said, error
    for words in (["--system=x"], ["--chat", run, "--sample", run], ["--chat", run, "--prompt=x"],
                  ["--sample", run, "--system=x"]):
        assert run_model(capsys, *words)[0] == 2
    network, foreign = train.load_run(run)[0], copy.copy(BYTES)
    foreign.specials = {"<|endoftext|>": 256, "<|user|>": 258}
    monkeypatch.setattr(train, "load_run", lambda *_: (network, foreign))
    assert run_model(capsys, "--chat", run)[2].endswith(
        "its tokenizer has no <|system|>, <|assistant|>, <|end|>, the tokens of a conversation: --sample "
        "continues a text")
    foreign.specials, foreign.n_vocab = BYTES.specials, 300
    assert "its tokenizer has a token 299, its model 261 of them" in run_model(capsys, "--chat", run)[2]


CONVERSATION = [dict(role="system", content=" Be kind.\n"),
                dict(role="user", content="Hi  there,\n\n1234 ü€🙂"),
                dict(role="assistant", content="\tYes. "), dict(role="user", content="{{ 1 + 1 }} {% if %}")]


def test_transformers_reads_the_template_of_an_export(tmp_path):
    """Its tokens are ours; with the start of an answer; with specials in the text; what ends an answer."""
    transformers = pytest.importorskip("transformers")
    words = data.train_bpe(["Hi there, yes. Be kind. if it ends  1234 <|user|>\n" * 9], 285)
    for ours in (data.Tokenizer("t", data.PATTERN, words), BYTES):
        folder = tmp_path / str(ours.n_vocab)
        config = replace(K2, tie=False, vocab_size=ours.n_vocab)
        huggingface.save_hf(net.Transformer(config), folder, ours)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = data.chat_ids(CONVERSATION, ours)[0].tolist()
        assert theirs.apply_chat_template(CONVERSATION)["input_ids"] == ids
        asked = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
        assert asked == [*ids, ours.specials["<|assistant|>"]]
        ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        assert ends == [ours.eot, ours.specials["<|end|>"]] and theirs.eos_token_id == ours.eot
        spelt = [dict(role="user", content="a <|end|> b<|system|>")]
        safe = theirs.apply_chat_template(spelt, sanitize_control_tokens=True)["input_ids"]
        assert ours.decode(safe) == ours.decode(data.chat_ids(spelt, ours)[0]) and max(safe[1:-1]) < ours.eot
        for wrong in dict(role="tool", content="x"), dict(role="user", content=[dict(type="text", text="x")]):
            with pytest.raises(Exception, match="a message is a system, user or assistant role"):
                theirs.apply_chat_template([wrong])


def test_an_export_has_the_template_if_its_tokenizer_has_the_tokens(tmp_path):
    for tokens in (True, False):
        tokenizer = copy.copy(BYTES)
        tokenizer.specials = BYTES.specials if tokens else {data.EOT: 256}
        folder = tmp_path / str(tokens)
        folder.mkdir()
        huggingface.save_tokenizer(tokenizer, folder)
        about = json.loads((folder / "tokenizer_config.json").read_text())
        assert about["eos_token"] == data.EOT and ("chat_template" in about) == tokens
        assert (folder / "generation_config.json").exists() == tokens


# ---- muonclip.py -------------------------------------------------------------------------------------------

BANDS = dict(classical=(0.31, 1.01), jordan=(0.68, 1.14), you=(0.97, 1.04), polar=(0.86, 1.13))  # σ ≥ 0.01


@pytest.mark.parametrize("name", BANDS)
def test_coefficients_reach_their_band(name):
    """The matrix iteration stays within the band of the scalar one, whose numbers the file's table states."""
    triples = muonclip.coefficients(name, 5)
    low, high = muonclip.convergence_band(triples)
    assert BANDS[name][0] <= low < high <= BANDS[name][1]
    from_far = muonclip.convergence_band(triples, 0.001)
    source = Path(muonclip.__file__).read_text("utf-8").splitlines()
    line = next(row for row in source if f"#   {name} " in row)
    said = [float(number) for number in re.findall(r"\d\.\d\d", line)[:4]]
    assert all(abs(a - b) <= 0.0051 for a, b in zip(said, (*from_far, low, high)))
    u, _, vt = torch.linalg.svd(torch.randn(50, 80, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(-2, 0, 50, dtype=torch.float64)
    g = (u * s) @ vt
    low, high = muonclip.convergence_band(triples, (0.01 / s.norm()).item(), (1 / s.norm()).item())
    found = torch.linalg.svdvals(muonclip.newton_schulz(g, triples))
    assert low - 1e-6 < found.min() and found.max() < high + 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (3, 40, 24), (1, 30), (30, 1)])
def test_newton_schulz_rotates_with_its_input_and_ignores_its_scale(shape):
    g = torch.randn(shape)
    o = muonclip.newton_schulz(g)
    s = torch.linalg.svdvals(o)
    relative = torch.linalg.svdvals(g) / g.norm(dim=(-2, -1), keepdim=True).squeeze(-1)
    assert o.shape == g.shape and s.max() < 1.21 and s.flatten()[relative.flatten() > 0.01].min() > 0.68
    for scale in (1e-18, 1000):
        assert (muonclip.newton_schulz(scale * g) - o).norm() < 1e-3 * o.norm()
    left, right = (torch.linalg.qr(torch.randn(n, n)).Q for n in shape[-2:])
    assert (muonclip.newton_schulz(left @ g @ right) - left @ o @ right).norm() < 1e-3 * o.norm()
    exact = muonclip.msign(g)
    assert (o.double() * exact).sum() / o.norm() / exact.norm() > 0.97, "the direction of U·Vᵀ"
    nearer = muonclip.newton_schulz(g.double(), muonclip.coefficients("classical", 25))
    torch.testing.assert_close(nearer, exact, rtol=0, atol=1e-6)


def test_msign_keeps_zero_singular_values_at_zero():
    g = torch.randn(20, 3) @ torch.randn(3, 30)
    s = torch.linalg.svdvals(muonclip.msign(g))
    exact = torch.tensor([1.0] * 3 + [0.0] * 17, dtype=torch.float64)
    torch.testing.assert_close(s, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(128, 128), (96, 256), (256, 64)])
def test_muon_updates_agree_with_torch(shape):
    """torch.optim.Muon iterates in bfloat16: the directions agree to a cosine of 0.99, the lengths to 3%."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0,
                             adjust_lr_fn="match_rms_adamw")
    momentum = [torch.zeros(shape)]
    for _ in range(3):
        theirs.grad = torch.randn(shape)
        other.step()
        with torch.no_grad():
            ours -= 0.1 * muonclip.muon_update([theirs.grad], momentum)[0]
    a, b = ours.detach(), theirs.detach()
    assert (a * b).sum() / a.norm() / b.norm() > 0.99 and a.norm() / b.norm() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("shape", [(96, 96), (260, 260), (96, 400), (400, 96), (3, 48, 160), (2, 130, 300)])
def test_newton_schulz_matches_its_definition_in_float64(shape):
    """Relative Frobenius error ≤ 1e-3 against the float64 iteration, even for low-rank inputs."""
    *stack, m, n = shape
    low = lambda rank: torch.randn(*stack, m, rank) @ torch.randn(*stack, rank, n)
    for g in (torch.randn(shape), low(10), low(1), low(4) + 1e-3 * torch.randn(shape),
              torch.randn(shape).cumsum(-1)):
        error = lambda o: ((o.double() - exact).norm() / exact.norm()).item()
        exact = muonclip.newton_schulz_ref(g.double())
        assert error(muonclip.newton_schulz(g)) < 1e-3
        assert error(muonclip.newton_schulz(g.double())) < 1e-9


def test_the_gram_form_needs_its_restart():
    g = torch.randn(512, 1) @ torch.randn(1, 2048)
    exact = muonclip.newton_schulz_ref(g.double())
    error = lambda r: (muonclip.newton_schulz(g, restart=r).double() - exact).norm() / exact.norm()
    assert error(99) > 5e-3 and error(3) < 1e-3


def test_matrices_of_one_shape_can_be_updated_together():
    """Tall, wide and stacked matrices get the same updates together as one at a time."""
    gs = [torch.randn(12, 30), torch.randn(30, 12), torch.randn(3, 12, 30), torch.randn(2, 30, 12)]
    ms = [torch.randn_like(g) for g in gs]
    alone = [muonclip.muon_update([g], [m.clone()])[0] for g, m in zip(gs, ms)]
    for a, b, g in zip(muonclip.muon_update(gs, [m.clone() for m in ms]), alone, gs):
        assert a.shape == g.shape
        torch.testing.assert_close(a, b)
    exact = 0.2 * 30 ** 0.5 * muonclip.newton_schulz_ref((gs[0] + 0.95 * (0.95 * ms[0] + gs[0])).double())
    torch.testing.assert_close(alone[0].double(), exact, rtol=1e-3, atol=1e-4)


def test_a_zero_gradient_gives_a_zero_update():
    assert all((muonclip.newton_schulz(torch.zeros(4, n)) == 0).all() for n in (4, 6))
    assert muonclip.newton_schulz(1e-24 * torch.randn(4, 6)).isfinite().all()


def test_optimizer_applies_the_updates_it_claims():
    """The update applied to each hidden matrix is orthogonal; a Muon that silently does something else would
    pass any test of the loss. Every other parameter moves as under torch's AdamW."""
    network = lively(TINY)
    config = muonclip.OptimConfig(lr=0.01, weight_decay=0.1)
    optimizer = muonclip.MuonClip(list(network.named_parameters()), config)
    grouped = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(grouped) == sorted(name for name, _ in network.named_parameters()), "each parameter once"
    by_muon = [name for group in optimizer.param_groups if group["rule"] == "muon" for name in group["names"]]
    assert all("layers." in name for name in by_muon)

    twin = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    groups = [dict(params=[twin[n] for n in g["names"]], weight_decay=g["weight_decay"])
              for g in optimizer.param_groups if g["rule"] == "adamw"]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        network.zero_grad()
        network(tokens(2, 16), tokens(2, 16))[0].backward()
        for name, p in network.named_parameters():
            twin[name].grad = p.grad.clone()
        count = optimizer.step()
        adamw.step()
        hidden = [(name, p) for name, p in network.named_parameters()
                  if name.startswith("layers.") and p.ndim == 2]
        assert count == len(hidden) == 7 * TINY.n_layer
        for name, p in hidden:
            applied = (before[name] * (1 - 0.01 * 0.1) - p) / 0.01 / (0.2 * max(p.shape) ** 0.5)
            s = torch.linalg.svdvals(applied.detach())
            large = s[: len(s) // 2]                               # a tiny batch's gradient is rank-deficient
            assert 0.6 < large.min() and large.max() < 1.25, name
    for group in optimizer.param_groups:
        if group["rule"] == "adamw":
            for name, p in zip(group["names"], group["params"]):
                torch.testing.assert_close(p, twin[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_parameters_are_updated_and_decay_by_their_kind(optimizer):
    """Every parameter of both models: Muon updates matrices inside layers, AdamW all the rest. All matrices
    decay, norm gains decay only with MuonClip, λ and PolyNorm's coefficients never."""
    muon, seen = optimizer == "muonclip", {}
    for config in (replace(TINY, position="learned"), replace(K2, tie=False)):
        optim = muonclip.OptimConfig(name=optimizer, weight_decay=0.1)
        for group in muonclip.parameter_groups(list(net.Transformer(config).named_parameters()), optim):
            seen |= {re.sub(r"layers.\d+.", "", name): (group["rule"], group["weight_decay"])
                     for name in group["names"]}
    gains = {name for name in seen if name.endswith("norm.weight")}
    outside, coefficients = {"embed", "head", "position"}, {"ffn.act.weight", "ffn.act.bias"}
    coefficients |= {f"attention.{name}" for name in ("lq1", "lk1", "lq2", "lk2")}
    hidden = {f"attention.{name}" for name in ("wq", "wk", "wv", "wo", "wdq", "wdkv", "wuq", "wuk", "wuv")}
    hidden |= {f"ffn.{part}{name}" for part in ("", "shared.") for name in ("gate", "up", "down")}
    hidden |= {"ffn.router"}
    assert len(gains) == 6 and set(seen) == gains | outside | coefficients | hidden
    for name, (rule, decay) in seen.items():
        assert rule == ("muon" if muon and name in hidden else "adamw"), name
        assert decay == (0.1 if name in hidden | outside or muon and name in gains else 0.0), name


def test_adamw_matches_torch():
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((7, 5), 9)] for _ in range(2))
    other = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    ms, vs = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in range(1, 6):
        for p in theirs:
            p.grad = torch.randn_like(p) * 10.0 ** -step
        updates = muonclip.adamw_update([p.grad for p in theirs], ms, vs, step)
        with torch.no_grad():
            torch._foreach_sub_(ours, updates, alpha=0.01)
        other.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Odd(torch.nn.Module):
    """The odd shapes of hidden parameters: a stack of experts, a single row, a single column, a gain."""

    def __init__(self):
        super().__init__()
        self.experts, self.row, self.column, self.gain = (
            torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 16, 24), (1, 24), (24, 1), (24,)))


def test_stacked_experts_and_single_rows_are_separate_matrices():
    network, config = Odd(), muonclip.OptimConfig(lr=0.1, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer = muonclip.MuonClip(list(network.named_parameters()), config)
    assert optimizer.step() == 3 + 1 + 1
    applied = {name: (before[name] - p.detach()) / 0.1 for name, p in network.named_parameters()}
    for i in range(3):
        s = torch.linalg.svdvals(applied["experts"][i]) / (0.2 * 24 ** 0.5)
        assert 0.6 < s.min() and s.max() < 1.21, "each expert is orthogonalised by itself"
    for name in ("row", "column"):
        rms = applied[name].square().mean().sqrt()
        assert rms == pytest.approx(0.2 * 0.88, rel=0.35), "a single row has the RMS of any other matrix"


def test_optimizer_state_is_kept_by_name_in_its_own_dtype():
    network, config = Odd(), muonclip.OptimConfig()
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer = muonclip.MuonClip(list(network.named_parameters()), config)
    optimizer.step()
    kept = {name: t.double() if t.is_floating_point() else t for name, t in optimizer.tensors().items()}
    assert sorted(kept) == ["column:momentum", "experts:momentum", "gain:m", "gain:step", "gain:v",
                            "row:momentum"]
    half = Odd().bfloat16()
    other = muonclip.MuonClip(list(half.named_parameters()), config)
    other.load(kept)
    for name, t in other.tensors().items():
        assert t.dtype == kept[name].dtype and torch.equal(t, kept[name]), "not rounded to the weights' dtype"
        assert t.data_ptr() != kept[name].data_ptr()
    for change, says in ((dict(row_momentum=torch.zeros(24, 1)), r"row:momentum \(24, 1\) for \(1, 24\)"),
                         (dict(gain_v=None), r"gain:v missing for \(24,\)"),
                         (dict(other_m=torch.zeros(2)), "other:m unknown")):
        (key, t), = change.items()
        wrong = {k: v for k, v in (kept | {key.replace("_", ":"): t}).items() if v is not None}
        with pytest.raises(ValueError, match=says):
            other.load(wrong)


def explicit_logits(attention, network, x):
    """The largest logit of each softmax map of the first layer by its definition, one map at a time."""
    config, largest = attention.config, []
    attention.clear_logits()
    network(x)
    h = attention.norm(network.embed[x])
    rope = net.rope_table(config, 0, x.shape[1], x.device, h.dtype)
    q, k = (net.rotate((h @ w.T).unflatten(-1, (-1, config.d_head)).transpose(1, 2), *rope)
            for w in (attention.wq, attention.wk))
    for i in range(config.n_head):
        j = i * config.n_kv_head // config.n_head
        if config.differential:                                    # a group has a signal key and a noise key
            pair = i // config.maps * config.n_kv_head // 2 // (config.n_head // config.maps)
            j = 2 * pair + (i % config.maps == config.maps - 1)
        scores = torch.einsum("btd,bsd->bts", q[:, i], k[:, j]) / math.sqrt(config.d_head)
        largest.append(scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).max())
    return torch.stack(largest).detach()


ATTENTIONS = "mha", "motif", "gqa", "differential gqa", "shared", "grouped gqa"


@pytest.mark.parametrize("config", [VARIANTS[name] for name in ATTENTIONS], ids=ATTENTIONS)
def test_qk_clip_brings_a_head_to_tau_and_leaves_calm_heads_alone(config):
    """On the same inputs, a clipped head's largest logit becomes τ to 1e-5, and a calm head keeps its weights
    bit for bit. Heads whose largest logit is zero or negative are calm."""
    torch.set_default_dtype(torch.float64)
    try:
        network, x = lively(config, std=0.5), tokens(4, 24)
    finally:
        torch.set_default_dtype(torch.float32)
    attention, d = list(network.attentions().values())[0], config.d_head
    own = config.n_kv_head == config.n_head and config.share_kv == 1       # keys that no other head uses
    if own:
        with torch.no_grad():
            attention.wk[d:2 * d] *= 1e-3                                  # head 1 is calm
    before = explicit_logits(attention, network, x)
    torch.testing.assert_close(attention.max_logits, before)
    tau = before.sort().values[1:3].mean().item()                          # two heads are below
    weights = attention.wq.detach().clone(), attention.wk.detach().clone()
    count = muonclip.qk_clip_([attention], tau)
    hot = before > tau
    assert count == hot.sum() == config.n_head - 2
    after = explicit_logits(attention, network, x)
    torch.testing.assert_close(after[hot], torch.full_like(after[hot], tau), rtol=1e-5, atol=0)
    rows = ~hot.repeat_interleave(d)
    assert torch.equal(attention.wq[rows], weights[0][rows])
    assert torch.equal(attention.wk[rows], weights[1][rows]) if own else torch.equal(attention.wk, weights[1])
    assert torch.equal(after[~hot], before[~hot])

    attention.max_logits.copy_(torch.tensor([-5.0, 0.0, -torch.inf, 1.0, 1.0, 1.0][:config.n_head]))
    weights = attention.wq.detach().clone(), attention.wk.detach().clone()
    assert muonclip.qk_clip_([attention], 1.0) == 0
    assert torch.equal(attention.wq, weights[0]) and torch.equal(attention.wk, weights[1])


def test_qk_clip_on_latent_attention_leaves_the_shared_key_untouched(float64):
    network, x, c = lively(VARIANTS["latent"], std=0.5), tokens(4, 24), VARIANTS["latent"]
    attention = network.layers["0"].attention
    network(x)
    before = attention.max_logits.clone()
    tau = before.sort().values[1:3].mean().item()
    weights = {n: p.clone() for n, p in attention.named_parameters()}
    assert muonclip.qk_clip_([attention], tau) == 2
    attention.clear_logits()
    network(x)
    hot = before > tau
    torch.testing.assert_close(attention.max_logits[hot], torch.full((2,), tau), rtol=1e-9, atol=0)
    assert torch.equal(attention.max_logits[~hot], before[~hot])
    for name, p in attention.named_parameters():
        if name in ("wuq", "wuk"):
            now, then = p.unflatten(0, (c.n_head, -1)), weights[name].unflatten(0, (c.n_head, -1))
            assert torch.equal(now[~hot], then[~hot]) and (now[hot] != then[hot]).all()
        else:
            assert torch.equal(p, weights[name]), f"{name} moved; wdkv makes the rotary key that heads share"


# ---- parallel.py -------------------------------------------------------------------------------------------

def spawn(world, f, *args):
    """Run f(rank, *args) in `world` processes that talk over gloo; a failing assert in one fails the test."""
    ports, some = [], random.Random(time.time_ns())
    while len(ports) < 90:                                         # below the range of ephemeral ports
        with socket.socket() as free, contextlib.suppress(OSError):
            port = some.randrange(15_000, 32_000)
            free.bind(("127.0.0.1", port))
            ports += [port] * (port not in ports)
    torch.multiprocessing.spawn(_enter, (world, ports, f, args), nprocs=world)


def _enter(rank, world, ports, f, args):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(ports[0]), PORTS=",".join(map(str, ports[1:])))
    torch.set_num_threads(1)
    import notes._figure
    notes._figure.draw = lambda *args: None                        # loss.png takes longer than a tiny run
    f(rank, *args)


def next_port():
    """Before another process group is created: at the old port a rank might still reach the previous one."""
    os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(",")


def gloo_threads():
    """Names of the gloo threads of this process (Linux)."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def a_run_goes_from_two_ranks_to_one_and_back(rank, path, out):
    config = two_ranks_run(path, out=out, steps=6)
    _, held = train.train(config, quiet=True)
    assert not gloo_threads(), "threads that outlive the interpreter abort it: terminate called without ..."
    del held
    if rank == 0:
        os.environ["WORLD_SIZE"] = "1"
        train.train(replace(config, steps=12), resume=True, quiet=True)
        os.environ["WORLD_SIZE"] = "2"
    next_port()
    mesh = parallel.join_mesh(config.mesh)
    parallel.barrier(mesh)                                         # until rank 0 has finished its run alone
    parallel.leave_mesh()
    next_port()
    train.train(replace(config, steps=18), resume=True, quiet=True)


def a_run_with_all_savings_resumes_to_the_bit(rank, path, out):
    """Recomputed, offloaded, stopped and resumed, a run on two stages ends with the weights, moments and log
    of a run without any of it. With FP8 and a split backward, with those of a run that was not stopped."""
    model = replace(tiny_run(path).model, differential=False, act="silu", tie=False, q_rank=12, kv_rank=10,
                    d_rope=4, d_value=6, n_expert=8, n_dense=1, n_active=2, d_expert=16)
    exact = dict(recompute="norm,act,mla", offload=True)
    runs = [({}, [4]), (exact, [2, 4]), *[(exact | dict(fp8="expert_up,act", split=True), stops)
                                          for stops in ([4], [2, 4])]]
    parallel.Host.SMALLEST, smallest = 0, parallel.Host.SMALLEST
    ended = []
    for i, (options, stops) in enumerate(runs):
        mesh = parallel.MeshConfig(pp=2, schedule="gpipe", timeout=30, **options)
        config = tiny_run(path, out=f"{out}-{i}", batch=4, micro=1, eval_every=2, model=model, mesh=mesh)
        for step in stops:
            next_port()
            train.train(replace(config, steps=step), resume=step > stops[0], quiet=True)
        if rank == 0:
            saved = weights_of(Path(f"{out}-{i}"))
            ended.append(({key: saved[key].clone() for key in saved}, log_of(Path(f"{out}-{i}"))))
    parallel.Host.SMALLEST = smallest
    for (first, log), (second, same) in (ended[:2], ended[2:]) if rank == 0 else ():
        assert log == same and first.keys() == second.keys()
        assert all(torch.equal(t, second[key]) for key, t in first.items())
    assert rank > 0 or ended[1][1] != ended[2][1]


def gradients_of_two_halves_match_the_whole_batch(rank, path, out):
    """In float64, to 1e-10."""
    torch.set_default_dtype(torch.float64)
    config = two_ranks_run(path)
    mesh, batches = parallel.join_mesh(config.mesh), batches_of(config)
    together, alone = lively(config.model), lively(config.model)
    owners = owners_of(together, config, mesh)
    nats = forward_backward(together, batches(3, rank, 2), 4, mesh)
    owners.reduce()
    whole = forward_backward(alone, batches(3), 4)
    exact = dict(alone.named_parameters())
    for piece, master in owners.masters.items():
        g = exact[piece.name].grad[piece.start:piece.stop]
        torch.testing.assert_close(master.grad, g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(nats, whole[4 * rank:4 * rank + 4])


def collectives_do_what_they_say(rank, path, out):
    mesh = parallel.join_mesh(parallel.MeshConfig(timeout=30))
    for name in ("world", "dp"):                                   # torch gives new groups 30 minutes
        backend = parallel.GROUPS[name]._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 30, name
    largest = torch.tensor([1.0 + rank, 5.0 - rank, -3.0])
    assert parallel.all_max(largest, mesh).tolist() == [2.0, 5.0, -3.0]
    assert parallel.gather({"rank": rank, "é": [None, 1.5]}, mesh) == (
        [{"rank": r, "é": [None, 1.5]} for r in (0, 1)] if rank == 0 else None)


def owners_of_bfloat16_weights_keep_float32(rank, path, out):
    """As on GPUs: every rank computes in bfloat16, owners keep float32 masters."""
    config = two_ranks_run(path)
    mesh, batches = parallel.join_mesh(config.mesh), batches_of(config)
    narrow = train.build(config, mesh, torch.bfloat16)[0]
    owners = owners_of(narrow, config, mesh)
    with torch.no_grad():
        master = next(iter(owners.masters.values()))
    forward_backward(narrow, batches(3, rank, 2), 1, mesh, torch.bfloat16)
    assert owners.sound() and all(p.grad is None for p in narrow.parameters())
    owners.reduce()
    exact = train.build(config, mesh)[0]
    forward_backward(exact, batches(3), 1)
    exact = dict(exact.named_parameters())
    for piece, one in owners.masters.items():
        g = exact[piece.name].grad[piece.start:piece.stop]
        assert one.grad.dtype == torch.float32
        if g.ndim > 1 and g.norm() > 1e-3:
            assert torch.cosine_similarity(one.grad.flatten(), g.flatten(), 0) > 0.97, piece
    norm = owners.clip_norm_(0.5).item()
    assert norm == pytest.approx(parallel.all_sum(torch.tensor([norm]), mesh).item() / 2)
    before = master.clone()
    owners.step(True, lambda masters: None)
    assert master.dtype == torch.float32 and not torch.equal(master, before)
    for piece, master in owners.masters.items():
        assert torch.equal(owners.rows(piece), master.to(owners.rows(piece).dtype)), piece
    for name, p in narrow.named_parameters():
        largest = parallel.all_max(p.detach().float().clone(), mesh)
        least = -parallel.all_max(-p.detach().float(), mesh)
        assert torch.equal(largest, least), f"{name} differs between the ranks"


def a_nonfinite_gradient_skips_or_stops_the_step_on_all_ranks(rank, path, out):
    config, healthy = two_ranks_run(path), train.build

    def unwell(*args):
        chunks = healthy(*args)
        if rank == 1:                                              # one micro-batch per step: NaN in step 4
            vector = chunks[0].layers["0"].attention.lq1
            vector.register_hook(lambda g: g * torch.nan if next(calls) == 3 else g)
        return chunks
    train.build = unwell
    for skip, split in ((True, False), (False, False), (True, True), (False, True)):
        next_port()
        calls = itertools.count()
        mesh = replace(config.mesh, split=split)                   # gradients are sent before all are there
        run = lambda: train.train(replace(config, steps=6, skip_nonfinite=skip, mesh=mesh), quiet=True)[0]
        if skip:
            assert [row["skipped"] for row in run()[1:]] == [0, 0, 0, 1, 1, 1]
        else:
            expected = r"step 4: loss [\d.]+, gradient norm nan; ranks \[1\]"
            with pytest.raises(FloatingPointError, match=expected):
                run()


def ranks_that_differ_are_named(rank, path, out):
    """By configuration and text, by weights, and by experts, which must agree between replicas only."""
    config = two_ranks_run(path)
    other = replace(config, seed=rank, optim=replace(config.optim, lr=0.02 * (1 + rank)))
    if rank:
        other = replace(other, data=replace(other.data, files=f"mine={path.parent / 'other.txt'}"))
        (path.parent / "other.txt").write_text(path.read_text()[:30_000])
    with pytest.raises(ValueError, match="^rank 1 has another optim.lr, seed, text than rank 0: start all"):
        train.train(other, quiet=True)
    next_port()
    mesh = parallel.join_mesh(config.mesh)
    weights = {"w": torch.ones(3, 3), "experts": torch.full((1, 2, 2), float(rank))}
    parts = mesh._replace(ep=parallel.Axis(rank, 2))               # each rank has experts of its own
    parallel.compare_weights(weights, parts)
    with pytest.raises(ValueError, match="rank 1 has another experts than rank 0"):
        parallel.compare_weights(weights, mesh)
    with pytest.raises(ValueError, match="rank 1 has another weights than rank 0"):
        parallel.compare_weights(weights | {"w": torch.ones(3, 3) + rank}, parts)


def a_local_failure_is_not_a_lost_rank(rank, path, out):
    config = two_ranks_run(path)
    owners = owners_of(lively(config.model), config, parallel.join_mesh(config.mesh))
    for optimizer in owners.optimizers.values():
        optimizer.step = functools.partial(torch.zeros, -1)
    with pytest.raises(RuntimeError, match="must be non-negative") as error:
        owners.step(True, lambda masters: None)
    assert not isinstance(error.value, parallel.LostRank)


def norm_and_checkpoint_cover_all_stages(rank, path, out):
    """With a pipeline, dp is only a part of the world."""
    config = two_ranks_run(path)
    mesh = parallel.join_mesh(config.mesh)
    stages = parallel.Mesh(mesh.world, pp=mesh.world)
    stage = torch.nn.Linear(3, 2 + rank)
    stage.weight.grad, stage.bias.grad = torch.ones(2 + rank, 3), torch.zeros(2 + rank)
    owners = owners_of({f"{rank}.{name}": p for name, p in stage.named_parameters()}, config, stages)
    owners.reduce()
    assert owners.clip_norm_(1.0).item() == pytest.approx(math.sqrt(6 + 9))
    assert stage.weight.grad.flatten().tolist() == pytest.approx([1 / math.sqrt(15)] * (6 + 3 * rank))
    train.save_checkpoint(Path(f"{out}-stages"), 1, owners.tensors(), {}, 1, stages)
    manifest, saved = train.newest_checkpoint(Path(f"{out}-stages"), mesh=stages)
    files = {entry["file"] for entry in manifest["tensors"].values()}
    assert files == {"rank-0.safetensors", "rank-1.safetensors"} and {"0.weight", "1.weight"} <= set(saved)


def metered(config, mesh):
    """The peak of a Meter in a step with random tokens on this rank, by name; and the tokens that the experts
    here got of a micro-batch, on average."""
    routed = []

    def exchange(counts):
        trip = here(counts)
        arrive = trip.arrive

        def noted(moving):
            rows, weight, counts = arrive(moving)
            routed.append(counts.double())
            return rows, weight, counts
        trip.arrive = noted
        return trip
    savings = train.savings_of(config)
    chunks = train.build(config, mesh, None, savings)
    meter = parallel.Meter()
    here = None
    for module in (m for chunk in chunks.values() for m in chunk.modules() if hasattr(m, "ops")):
        here = module.ops.exchange
        module.ops = module.ops._replace(linear=meter.naming(module.ops.linear), exchange=exchange)
    share = config.batch // mesh.dp.size
    torch.manual_seed(mesh.dp.rank)
    x = torch.randint(0, config.model.vocab_size, (share, config.model.context))
    plan = train.plans_of(config, share, config.micro)[mesh.pp.rank]
    for chunk in chunks.values():
        for attention in chunk.attentions().values():
            attention.clear_logits()
    parallel.execute(plan, chunks, data.Batch(x, x, None, None), config.micro, mesh, None, savings, str,
                     meter)
    assert meter.now.total() == 0 and not meter.entries, "everything is freed after its backward"
    return meter.peak, torch.stack(routed).mean(0).round().long().tolist() if routed else None


def a_meter_agrees_with_the_prediction(rank, path, out):
    for recipe, mesh in (("laptop", dict(pp=2, chunks=2)), ("laptop", dict(pp=2, chunks=2, split=True)),
                         ("laptop-k2", dict(pp=2)), ("laptop-k2", dict(ep=2)),
                         ("laptop-k2", dict(ep=2, overlap=True)),
                         ("laptop-k2", dict(pp=2, split=True)),
                         ("laptop-k2", dict(pp=2, chunks=2, recompute="norm,act,mla", fp8="expert_up,act",
                                            offload=True)),
                         ("laptop-k2", dict(ep=2, overlap=True, recompute="norm,act,mla", fp8="act",
                                            offload=True))):
        next_port()
        mesh = parallel.MeshConfig(timeout=30, **mesh)
        config = replace(train.RECIPES[recipe], batch=6, micro=1, mesh=mesh)
        here = parallel.join_mesh(config.mesh)
        found, counts = metered(config, here)
        if here.pp.size > 1:
            counts = None
        predicted, _ = train.activations(config, 2, False, counts)[here.pp.rank]
        assert predicted == pytest.approx(found.total(), rel=0.05), (recipe, mesh, found)
        parallel.leave_mesh()


def a_rank_that_hangs_is_lost(rank, path, out):
    mesh = parallel.join_mesh(parallel.MeshConfig(timeout=2))
    if rank == 1:
        return time.sleep(6)
    with pytest.raises(parallel.LostRank, match="rank 0 lost contact"):
        parallel.barrier(mesh)


CLAIMS_OF_TWO_RANKS = [
    a_run_goes_from_two_ranks_to_one_and_back, a_run_with_all_savings_resumes_to_the_bit,
    gradients_of_two_halves_match_the_whole_batch,
    collectives_do_what_they_say, owners_of_bfloat16_weights_keep_float32,
    a_nonfinite_gradient_skips_or_stops_the_step_on_all_ranks, ranks_that_differ_are_named,
    a_local_failure_is_not_a_lost_rank, norm_and_checkpoint_cover_all_stages,
    a_meter_agrees_with_the_prediction, a_rank_that_hangs_is_lost]


def two_ranks_run(path, **changes):
    return tiny_run(path, mesh=parallel.MeshConfig(timeout=30), **changes)


def batches_of(config):
    corpus = data.prepare(config.data, config.model.vocab_size)
    return data.Batches(corpus, config.data, 0, config.batch, config.model.context)


def try_claims(rank, path, folder):
    """Try all claims in turn in the same two processes, and record the traceback of each that fails."""
    build = train.build
    for claim in CLAIMS_OF_TWO_RANKS:
        next_port()
        try:
            claim(rank, path, str(folder / claim.__name__))
            said = ""
        except BaseException:
            said = traceback.format_exc()
        (folder / f"{claim.__name__}.{rank}").write_text(said)
        if said or claim is a_rank_that_hangs_is_lost:             # a pending collective may never finish
            parallel.abandon_mesh()
        else:
            parallel.leave_mesh()
        torch.set_default_dtype(torch.float32)
        train.build = build


@pytest.fixture(scope="session")
def tried_by_two_ranks(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    spawn(2, try_claims, text, folder)
    return folder


@pytest.mark.parametrize("claim", [claim.__name__ for claim in CLAIMS_OF_TWO_RANKS])
def test_of_two_ranks(claim, tried_by_two_ranks):
    said = [(tried_by_two_ranks / f"{claim}.{rank}").read_text() for rank in (0, 1)]
    assert said == ["", ""], "\n".join(said)


def test_only_a_failed_collective_means_a_lost_rank():
    """LostRank says why and keeps the cause; running out of memory does not count as a lost rank."""
    with pytest.raises(parallel.LostRank, match="rank 0 lost contact .*: connection reset") as error:
        with parallel.talking(parallel.Mesh()):
            raise RuntimeError("connection reset\nmore")
    assert str(error.value.__cause__) == "connection reset\nmore"
    with pytest.raises(torch.OutOfMemoryError):
        with parallel.talking(parallel.Mesh()):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_ranks_of_one_launch_meet_each_other_and_not_the_dead():
    """The store outlives its processes: of a second set, one arrives before rank 0 and finds the call, the
    answers and the confirmation of the first set."""
    store, names = torch.distributed.HashStore(), {}

    def join(key, rank):
        return threading.Thread(target=lambda: names.update({key: parallel.meet(store, rank, 3, 20)}))
    for attempt, pause in (("first", 0.0), ("second", 0.3)):
        threads = [join((attempt, rank), rank) for rank in (1, 2, 0)]
        for thread in threads:
            thread.start()
            time.sleep(pause)
        for thread in threads:
            thread.join(30)
    assert len(names) == 6 and len(set(names.values())) == 2
    assert len({names["second", rank] for rank in range(3)}) == 1
    with pytest.raises(parallel.LostRank, match="rank 1 was not called"):
        parallel.meet(store, 1, 3, 0.2)


def unit_cost(v, backward=2):
    """The time of an act, where the forward of a whole stage takes 1."""
    return lambda act: (1 if act.op == "F" else backward) / v


def test_schedules_take_the_time_and_the_memory_of_their_formulas():
    """For p ≤ 8 stages, m ≤ 32 micro-batches, v ≤ 4 chunks a stage, none deadlocks or receives out of order.
    1F1B and GPipe idle (p-1)/(m+p-1) of the time, (p-1)/m of the busy time; interleaving divides the latter
    by v where p divides m, and otherwise takes no longer than the next multiple of p. Peaks are those of the
    warm-up. One more warm-up forward costs no time, and at most one activation."""
    for p, m in itertools.product(range(1, 9), range(1, 33)):
        plain = parallel.simulate(parallel.one_f_one_b(p, m), unit_cost(1))
        assert plain.total == pytest.approx(3 * (m + p - 1))
        assert plain.idle == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert plain.idle_over_busy == pytest.approx((p - 1) / m, abs=1e-12)
        assert plain.peaks == [min(m, p - stage) for stage in range(p)]
        gpipe = parallel.simulate(parallel.gpipe(p, m), unit_cost(1))
        assert gpipe.total == pytest.approx(plain.total) and gpipe.peaks == [m] * p
        for v in range(1, 5):
            found = parallel.simulate(parallel.interleaved(p, m, v), unit_cost(v))
            more = parallel.simulate(parallel.interleaved(p, m, v, 1), unit_cost(v))
            full = 3 * (m + -m % p + (p - 1) / v)
            assert 3 * m - 1e-9 <= more.total <= found.total + 1e-9 and found.total <= full + 1e-9
            warm_ups = [2 * (p - 1 - stage) + (v - 1) * p + 1 for stage in range(p)]
            assert all(peak <= min(m * v, warm) for peak, warm in zip(found.peaks, warm_ups))
            assert all(peak <= min(m * v, warm + 1) for peak, warm in zip(more.peaks, warm_ups))
            if m % p == 0:
                assert found.total == pytest.approx(full) and more.total == pytest.approx(full)
                assert found.idle_over_busy == pytest.approx((p - 1) / (v * m), abs=1e-12)
                assert found.peaks == [min(m * v, warm) for warm in warm_ups]


def test_a_split_backward_fills_the_bubble_without_more_memory():
    """Forward, B and W equally long: a pipeline idles p-1 of them (over v) where the unsplit one idles three
    times as long, if p divides m, and is never slower; no stage holds more than the fullest one did. Each B
    has its W after it, and each chunk its R after the last W."""
    for p, m, v in itertools.product(range(1, 9), (1, 2, 3, 5, 8, 12, 24), range(1, 4)):
        whole = parallel.one_f_one_b(p, m) if v == 1 else parallel.interleaved(p, m, v)
        plans = parallel.split_backwards(whole)
        before = parallel.simulate(whole, unit_cost(v))
        found = parallel.simulate(plans, unit_cost(v, 1))
        assert found.total <= before.total + 1e-9 and max(found.peaks) <= max(before.peaks)
        if m % p == 0:
            assert found.total == pytest.approx(3 * m + (p - 1) / v)
        for plan, old in zip(plans, whole):
            assert [act for act in plan if act.op in "FB"] == old
            for chunk in {act.chunk for act in old}:
                mine = [act for act in plan if act.chunk == chunk]
                for i in range(m):
                    b, w = (mine.index(parallel.Act(op, i, chunk)) for op in "BW")
                    assert b < w
                assert mine[-1].op == "R" and sum(act.op == "R" for act in mine) == 1
                assert sum(act.op == "W" for act in mine) == m
    with pytest.raises(ValueError, match="compile=true: not with mesh.split=true"):
        train.parse(["--compile", "--mesh.split=true"])


def test_woven_plans_never_wait_for_each_other_and_hide_exchanges():
    """For p ≤ 5 stages, m ≤ 13 micro-batches and v ≤ 3 chunks, whole and split, with chunks of as many parts
    and of different ones: no deadlock, every part once, at most one micro-batch more in flight than without.
    In a long plan of equal parts, exchanges of the length of a part cost nothing in a steady tick."""
    for p, m, v, split in itertools.product(range(1, 6), (1, 2, 3, 5, 8, 13), range(1, 4), (False, True)):
        for layers in ([1] * (p * v), [i % 3 for i in range(p * v)]):
            parts = [1 + 3 * n for n in layers]
            plans = parallel.overlapped(p, m, v, parts, split)
            found = parallel.simulate(plans, lambda act: 1.0, 0.3, lambda act: 0.7)
            if not split:
                before, more = ([*map(parallel.peak, parallel.interleaved(p, m, v, n))] for n in (0, 1))
                assert max(map(int.__sub__, found.peaks, before)) <= 1
                assert found.peaks == more or min(parts) == 1
            for stage, plan in enumerate(plans):
                expected = {parallel.Act(op, i, c, left) for op in "FB" for i in range(m)
                            for c in range(stage, p * v, p) for left in range(parts[c])}
                acts = [act for act in plan if act.op in "FB"]
                assert set(acts) == expected and len(acts) == len(expected)

    # p = 1 and 4 parts an act: exchanges are waited for only outside the 19 ticks, in the first F and the
    # last B; and there the shared expert hides a dispatch.
    def exchange(act):
        return 1.0 if parallel.exchanged_after(act) in ("dispatch", "combine") else 0.0
    woven = parallel.overlapped(1, 20, 1, [4])
    whole = [[part for act in parallel.one_f_one_b(1, 20)[0] for part in parallel.in_parts(act, [4])]]
    assert parallel.simulate(woven, lambda act: 1.0, 0.0, exchange).total == 160 + 1 + 1
    assert parallel.simulate(whole, lambda act: 1.0, 0.0, exchange).total == 160 + 20 * 2
    assert parallel.simulate(woven, lambda act: 1.0).waits == dict(exchange=0.0, message=0.0)


def test_waiting_is_put_down_to_what_travels():
    """By hand, on two stages: an exchange of 2 after one part of 1 is hidden for 1 of it; a message of 0.5
    is waited for, and so is the bubble before it, which counts as neither. And exchanges of a stage follow
    each other."""
    Act = parallel.Act
    plans = [[Act("F", 0, 0, 1), Act("F", 1, 0, 1), Act("F", 0, 0), Act("F", 1, 0)], [Act("F", 0, 1)]]
    found = parallel.simulate(plans, lambda act: 1.0, 0.5, lambda act: 2.0)
    assert found.exchanges[0] == [(Act("F", 0, 0, 1), 1.0, 3.0), (Act("F", 1, 0, 1), 3.0, 5.0)]
    assert [start for _, start, _ in found.spans[0]] == [0.0, 1.0, 3.0, 5.0]
    assert found.messages == [[], [(Act("F", 0, 0), 4.0, 4.5)]] and found.total == 6.0
    assert found.waits == dict(exchange=pytest.approx(2 / 12), message=pytest.approx(0.5 / 12))
    assert parallel.draw(found, 0.5).splitlines()[1:] == [
        "   0  0011..00..11", "   x  ..00001111..", "   m  ............",
        "   1  .........00.", "   x  ............", "   m  ........0..."]


def test_ranks_that_exchange_in_different_orders_are_refused():
    """The two ranks of a stage: the plan of one begins two exchanges the other way round."""
    plan, = parallel.overlapped(1, 3, 1, [4])
    parallel.simulate([plan, plan], lambda act: 1.0, ranks=2)
    begin = [i for i, act in enumerate(plan) if act.left]
    other = list(plan)
    other[begin[4]], other[begin[5]] = other[begin[5]], other[begin[4]]
    with pytest.raises(ValueError, match=r"rank 0 begins the exchange after [FB] of .*, \d parts? before its "
                                         r"end, where rank 1 begins that after [FB] of"):
        parallel.simulate([plan, other], lambda act: 1.0, ranks=2)


def test_a_frozen_chunk_gets_no_gradient_although_its_balance_loss_is_a_tensor():
    """Two chunks in one process, the first one frozen up to its routers: the other's gradients are those of
    the whole model with the same parameters frozen."""
    mesh = parallel.MeshConfig(chunks=2)
    config = train.Config(model=replace(K2, n_layer=4, n_dense=0, tie=False, balance_loss=0.1), mesh=mesh)
    chunks = {i: train.build_chunk(config, i) for i in range(2)}
    whole = net.Transformer(config.model, seed=config.seed)
    for p in chunks[0].parameters():
        p.requires_grad_(False)
    frozen = set(dict(chunks[0].named_parameters()))
    for name, p in whole.named_parameters():
        p.requires_grad_(name not in frozen)
    x = tokens(3, 17)
    batch = data.Batch(x[:, :-1], x[:, 1:], None, None)
    parallel.execute(parallel.interleaved(1, 3, 2)[0], chunks, batch, 1, parallel.Mesh())
    forward_backward(whole, batch, 1)
    assert all(p.grad is None for p in chunks[0].parameters())
    exact = dict(whole.named_parameters())
    for name, p in chunks[1].named_parameters():
        torch.testing.assert_close(p.grad, exact[name].grad, msg=name)


def test_a_dry_run_says_what_the_overlap_holds(capsys):
    train.main("laptop-k2 --dry-run --micro=1 --mesh.pp=2 --mesh.ep=2 --mesh.overlap=true".split())
    said = capsys.readouterr().out
    assert "keep more forwards in flight: 4; 2 by stage, instead of 2; 1; that is" in said


def test_what_a_head_alone_holds_is_predicted():
    """In nGPT the last chunk may have the head alone, whose forward saves nothing."""
    config = train.RECIPES["laptop"]
    model = replace(config.model, ngpt=True, n_layer=2)
    optim = replace(config.optim, tau=0.0, weight_decay=0.0)
    config = replace(config, model=model, optim=optim, micro=2, mesh=parallel.MeshConfig(pp=3))
    assert [len(layers) for layers in train.chunk_ranges(config)] == [1, 1, 0]
    assert min(train.activations(config, 3, False))[0] > 0


@each_variant
def test_a_split_backward_gives_the_same_gradients(config):
    """To the bit, for float32 weights: matmuls, their inputs' gradients and sums over micro-batches are the
    same. In nGPT some sums have another order."""
    savings = parallel.Savings(split=True)
    whole, split = lively(config), lively(config, ops=train.ops_of(savings, net.Local))
    x = tokens(6, 17)
    batch = data.Batch(x[:, :-1], x[:, 1:], None, torch.zeros(6, dtype=torch.int64))
    forward_backward(whole, batch, 4)
    reduced = []
    for plan in (parallel.MeshConfig(split=True).plans(6, 4)[0], parallel.MeshConfig().plans(6, 4)[0]):
        split.zero_grad()
        parallel.execute(plan, {0: split}, batch, 4, parallel.Mesh(), None, savings, reduced.append)
        assert not savings.queue
        for (name, p), q in zip(whole.named_parameters(), split.parameters()):
            if config.ngpt:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(q.grad, p.grad), name
    assert reduced == [0]


def test_weight_gradients_wait_for_their_act(float64):
    """Between B and W a matrix has no gradient; vectors, embedding and head have theirs. Frozen
    weights get none; weights wider than the activations get theirs in their own precision."""
    savings = parallel.Savings(split=True)
    network = lively(K2, ops=train.ops_of(savings, net.Local))
    network.layers["0"].attention.wo.requires_grad_(False)
    x = tokens(2, 9)
    batch = data.Batch(x[:, :-1], x[:, 1:], None, torch.zeros(2, dtype=torch.int64))
    f, b, w, _ = parallel.MeshConfig(split=True).plans(2, 2)[0]
    compute, late = savings.compute, []
    savings.compute = late.append
    parallel.execute([f, b, w], {0: network}, batch, 2, parallel.Mesh(), None, savings, None)
    waiting = {name for name, p in network.named_parameters() if p.grad is None}
    matrices = {name for name, p in network.named_parameters()
                if p.ndim > 1 and name not in ("embed", "head")}
    assert waiting == matrices and late == [(0, 0)]
    compute((0, 0))
    assert {name for name, p in network.named_parameters() if p.grad is None} == {"layers.0.attention.wo"}

    # bfloat16 activations, float64 weights
    a, out = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True), []
    weight = torch.nn.Parameter(torch.randn(3, 4))
    for linear in (net.linear, savings.linear):
        weight.grad = a.grad = None
        savings.at = 1
        y, = linear("any", (weight,), torch.sin, (), a)
        y.backward(torch.ones_like(y))
        compute(1)
        out.append((y, a.grad, weight.grad))
    assert all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(*out))

    # An input that needs no gradient
    weight.grad = None
    y, = savings.linear("any", (weight,), net.identity, (), a.detach())
    y.sum().backward()
    compute(1)
    expected = a.detach().sum(0).expand(3, 4).to(weight.dtype)
    torch.testing.assert_close(weight.grad, expected, rtol=0.02, atol=0.02)


def test_plans_hold_every_act_once_and_on_its_stage():
    for make, p, m, v in ((parallel.gpipe, 3, 5, 2), (parallel.one_f_one_b, 4, 3, 1),
                          (parallel.interleaved, 4, 6, 3), (parallel.interleaved, 1, 4, 2)):
        plans = make(p, m, v)
        acts = {parallel.Act(op, i, c) for op in "FB" for i in range(m) for c in range(p * v)}
        assert sum(map(len, plans)) == len(acts) and {act for plan in plans for act in plan} == acts
        for stage, plan in enumerate(plans):
            assert {act.chunk % p for act in plan} == {stage}
            for chunk in range(stage, p * v, p):                   # sums over micro-batches keep their order
                for op in "FB":
                    assert [a.micro for a in plan if a.op == op and a.chunk == chunk] == list(range(m))
    one = parallel.MeshConfig().plans(5, 2)[0]
    assert [f"{act.op}{act.micro}" for act in one] == "F0 B0 F1 B1 F2 B2".split()
    assert parallel.MeshConfig(pp=2).plans(3, 1) == parallel.one_f_one_b(2, 3)
    assert parallel.MeshConfig(pp=2, chunks=2).plans(6, 2) == parallel.interleaved(2, 3, 2)
    assert parallel.MeshConfig(pp=2, schedule="gpipe").plans(3, 1) == parallel.gpipe(2, 3)


def test_messages_are_timed_as_they_are_executed():
    """By hand: a transfer waits for the sender, for the receiver to post it two acts ahead, and for the one
    before it on its channel."""
    Act, cost = parallel.Act, lambda act: 1.0
    one = parallel.simulate(parallel.one_f_one_b(2, 1), cost, 0.5)
    assert one.total == 1 + 0.5 + 1 + 1 + 0.5 + 1
    assert one.spans[0] == [(Act("F", 0, 0), 0, 1), (Act("B", 0, 0), 4, 5)]

    # Two messages on one channel, of 3 seconds each: the second follows the first.
    forwards = [[Act("F", i, stage) for i in range(4)] for stage in range(2)]
    slow = parallel.simulate(forwards, cost, 3.0)
    assert [start for _, start, _ in slow.spans[1]] == [4, 7, 10, 13]

    # Stage 1 has four other acts, which end at 8, 9, 10 and 11, before its second receive. It posts that when
    # it begins the third of them; the message then takes 5 seconds.
    others = [Act("F", i, 0) for i in range(10, 14)]
    late = parallel.simulate([forwards[0][:2], [forwards[1][0], *others, forwards[1][1]]], cost, 5.0)
    assert [start for _, start, _ in late.spans[1]] == [6, 7, 8, 9, 10, 9 + 5]


def test_a_plan_that_waits_for_ever_is_refused_and_says_who_waits():
    Act, cost = parallel.Act, lambda act: 1.0
    early = [[Act("F", 0, 0), Act("B", 0, 0)], [Act("B", 0, 1), Act("F", 0, 1)]]
    who = ("wait for each other: stage 0 with B of micro-batch 0, chunk 0 for B of micro-batch 0, chunk 1 of "
           "stage 1; stage 1 with B")
    with pytest.raises(ValueError, match=who):
        parallel.simulate(early, cost)
    with pytest.raises(ValueError, match="for F of micro-batch 0, chunk 0 which is in no plan"):
        parallel.simulate([[], [Act("F", 0, 1)]], cost)
    swapped = [[Act("F", 0, 0), Act("F", 1, 0)], [Act("F", 1, 1), Act("F", 0, 1)]]
    order = "stage 0 sends F of micro-batch 0, chunk 0 where stage 1 expects F of micro-batch 1"
    with pytest.raises(ValueError, match=order):
        parallel.simulate(swapped, cost)
    crossed = parallel.interleaved(2, 4, 2)                        # round the ring, in another order
    at = [i for i, act in enumerate(crossed[0]) if act.op == "F" and act.chunk == 2]
    crossed[0][at[0]], crossed[0][at[1]] = crossed[0][at[1]], crossed[0][at[0]]
    with pytest.raises(ValueError, match="stage 1 sends F of micro-batch 0, chunk 1 where stage 0 expects"):
        parallel.simulate(crossed, cost)


def test_layers_are_cut_into_chunks_of_even_cost():
    """The most expensive chunk is the cheapest possible, by trying all cuts. 61 equal layers on 16 stages:
    1.05 times the mean with two chunks each, 1.57 with three. With Kimi K2's head, as dear as two layers, the
    last of 32 chunks has the head alone."""
    rng = random.Random(0)
    for n, step in ((3, 1), (4, 1), (6, 1), (2, 2), (3, 3)):
        for layers in (n * step, 9):
            costs = [rng.randint(1, 9) for _ in range(layers)]
            starts = range(0, layers, step)
            found = parallel.partition(costs, n, starts)
            assert [i for r in found for i in r] == list(range(layers))
            assert len(found) == n and all(len(r) and r.start in starts for r in found)
            every = [[sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, layers))]
                     for cuts in itertools.combinations(starts[1:], n - 1)]
            assert max(sum(costs[i] for i in r) for r in found) == min(map(max, every)), (costs, n)
    for v, balance in ((2, 1.05), (3, 1.57)):
        sizes = [len(layers) for layers in parallel.partition([1] * 61, 16 * v)]
        assert max(sizes) * 16 * v / 61 == pytest.approx(balance, abs=5e-3)
    k2 = replace(train.RECIPES["kimi-k2"], mesh=parallel.MeshConfig(pp=16, chunks=2))
    assert [len(layers) for layers in train.chunk_ranges(k2)] == [2, 1] + [2] * 29 + [0]
    with pytest.raises(ValueError, match="4 chunks, but the layers can only be cut into 3"):
        parallel.partition([1] * 6, 4, [0, 2, 4])


@each_variant
def test_the_costs_of_layers_add_up_to_the_flops_of_a_token(config):
    costs = net.layer_costs(config)
    assert len(costs) == config.n_layer + 1
    assert 2 * (sum(costs) - config.d_model) == net.flops_per_token(config, training=False)


def test_a_schedule_is_drawn_and_timed(capsys, tmp_path):
    parallel.main(["--pp", "2", "--microbatches", "3", f"--picture={tmp_path / 'a.png'}"])
    said = capsys.readouterr().out
    assert "   0  01..aa2bb.cc\n   1  .0aa1bb2cc..\n" in said
    assert "idle            25.00% of the time; 33.33% of the busy time" in said
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    parallel.main("--pp 16 --chunks 2 --microbatches 64 --warm 1".split())
    assert "columns 0 to 100 of 429" in (said := capsys.readouterr().out)
    assert "time            214.50, of which 192.00 busy" in said and "idle            10.49%" in said
    for options, says in (("--microbatches 0", "--microbatches=0: must be at least 1"),
                          ("--pp 0", "mesh.pp=0: must be at least 1"), ("--message nan", "--message=nan"),
                          ("--schedule 1f1b --chunks 2", "one chunk on each stage, not mesh.chunks=2"),
                          ("--schedule gpipe --warm 1", "--schedule=gpipe: --warm and --overlap belong to"),
                          ("--warm 1 --overlap", "has one more warm-up forward already"),
                          ("--exchange 1", "tokens travel in layers with experts")):
        with pytest.raises(SystemExit, match=f"^parallel.py: .*{says}"):
            parallel.main(options.split())


def forward_backward(network, batch, micro, mesh=parallel.Mesh(), dtype=None):
    """Nats/token of each window. Gradients end up where autograd or the owners' hooks put them."""
    plan = parallel.MeshConfig().plans(len(batch.x), micro)[0]
    return parallel.execute(plan, {0: network}, batch, micro, mesh, dtype)


def owners_of(network, config, mesh):
    named = network if isinstance(network, dict) else dict(network.named_parameters())
    return parallel.Zero1(named, lambda named: muonclip.MuonClip(named, config.optim),
                          lambda *p: muonclip.weigh(*p, config.optim), mesh, bucket_bytes=20_000)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
@pytest.mark.parametrize("preset, n", [("laptop", 2), ("laptop", 8), ("motif-2.6b", 8), ("motif-2.6b", 50)])
def test_optimizer_state_and_work_are_shared_out_evenly(preset, n, optimizer):
    """Every row has one owner. No rank holds more state than 1.1 times the mean plus its largest matrix, nor
    does more Newton–Schulz work than 1.1 times the mean plus one matrix."""
    with torch.device("meta"):
        named = dict(net.Transformer(net.PRESETS[preset]).named_parameters())
    optim, owned, sizes, works = muonclip.OptimConfig(name=optimizer), {}, [], []
    costs = {name: muonclip.weigh(name, p, optim) for name, p in named.items()}
    config = replace(train.Config(), optim=optim)
    for rank in range(n):
        owners = owners_of(named, config, parallel.Mesh(dp=parallel.Axis(rank, n)))
        state, work, largest = 0, 0, 0
        for piece, master in owners.masters.items():
            owned.setdefault(piece.name, []).append((piece.start, piece.stop))
            size, operations = costs[piece.name]
            assert (piece.start, piece.stop) == (0, piece.rows) or not operations, "Muon splits no matrix"
            state += size * master.numel() / named[piece.name].numel()
            work += operations
            largest = max(largest, size if operations else 0)
        group = {id(p): g["rule"] for o in owners.optimizers.values() for g in o.param_groups
                 for p in g["params"]}
        held = sum(m.nbytes * (1 if group[id(m)] == "muon" else 2) for m in owners.masters.values())
        assert held == pytest.approx(state), "weigh predicts the state that the optimizer holds"
        sizes.append((state, largest))
        works.append(work)
    for name, p in named.items():
        rows = sorted(owned[name])
        assert rows[0][0] == 0 and rows[-1][1] == len(p), name
        assert all(a[1] == b[0] for a, b in zip(rows, rows[1:])), name
    total = sum(size for size, _ in costs.values())
    assert all(size <= 1.1 * total / n + largest for size, largest in sizes)
    if optimizer == "muonclip":
        assert max(works) <= 1.1 * sum(works) / n + max(work for _, work in costs.values())
    few = list(owners_of(named, config, parallel.Mesh(dp=parallel.Axis(0, 500))).describe())
    assert few and "500 ranks, but only" in few[0]


def test_the_layout_of_owners_is_known_without_processes():
    """Every number of a model has one owner in dp, or among its replicas if it is an expert's. Every rank
    computes the same layout. A bucket has one dtype and one chunk, and exceeds its size only for a single
    larger piece."""
    config = replace(K2, n_layer=4)
    named = dict(lively(config).named_parameters())
    for name, p in named.items():
        if p.ndim == 2 and "wq" in name:
            p.data = p.data.bfloat16()
    chunk = lambda name: name.startswith(("layers.2", "layers.3"))
    weigh = lambda name, p: muonclip.weigh(name, p, muonclip.OptimConfig())
    for dp, ep in ((1, 1), (3, 1), (4, 2), (4, 4)):
        layouts = []
        for rank in range(dp):
            mesh = parallel.Mesh(dp=parallel.Axis(rank, dp), ep=parallel.Axis(rank % ep, ep),
                                 edp=parallel.Axis(rank // ep, dp // ep))
            mine = {name: p[:8 // ep] if p.ndim == 3 else p for name, p in named.items()}
            layouts.append(parallel.layout(mine, weigh, mesh, 3000, chunk))
        assert all(found["dp"] == layouts[0]["dp"] for found in layouts)
        assert all(a["edp"] == b["edp"] for a, b in zip(layouts, layouts[ep:]))
        rows = {name: [] for name in named}
        for owners in [layouts[0]["dp"], *(found["edp"] for found in layouts[:ep])]:
            for bucket in (bucket for buckets in owners for bucket in buckets):
                assert len({(chunk(piece.name), named[piece.name].dtype) for piece in bucket}) == 1
                size = parallel.gradient_bytes(bucket, named)
                assert size <= 3000 or len(bucket) == 1 or len(owners) == 1
                for piece in bucket:
                    rows[piece.name] += range(piece.start, piece.stop)
                    assert piece.rows == len(named[piece.name])
                    one_expert = dp == ep or piece.stop == piece.start + 1
                    assert named[piece.name].ndim < 3 or one_expert, "replicated experts are separate pieces"
        assert all(sorted(found) == list(range(len(named[name]))) for name, found in rows.items()), (dp, ep)


class Alive(TorchDispatchMode):
    """Counts the bytes of all live tensors created inside it, each storage once."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self):
        return sum(size for storage, size in self.storages.values() if not storage.expired())


# With few tokens, weights take most of the memory
HEAVY = replace(train.RECIPES["laptop-k2"], batch=4, micro=1, model=replace(
    net.PRESETS["laptop-k2"], d_model=192, context=8, vocab_size=512, n_layer=3))


def measured(config, mesh, in_air=1 << 20):
    """→ live bytes when the last gradient of a step arrives, the most bytes ever in flight to owners"""
    alive, seen = Alive(), []
    with alive:
        network = train.build(config, mesh, torch.bfloat16)[0]
        owners = parallel.Zero1(dict(network.named_parameters()),
                                lambda named: muonclip.MuonClip(named, config.optim),
                                lambda *p: muonclip.weigh(*p, config.optim), mesh, 1 << 18, in_air)
        network.embed.register_post_accumulate_grad_hook(lambda p: seen.append(alive.bytes()))
        arrive, most = owners.arrive, [0]

        def watched(*args):
            most.append(sum(tensor.nbytes for _, tensor, *_ in owners.flying))
            arrive(*args)
        owners.arrive = watched
        for _ in range(3):
            x = tokens(4 // mesh.dp.size, 9, high=512)
            batch = data.Batch(x[:, :-1], x[:, 1:], None, torch.zeros(len(x), dtype=torch.int64))
            forward_backward(network, batch, 1, mesh, torch.bfloat16 if mesh.dp.size > 1 else None)
            assert owners.sound()
            owners.reduce()
            owners.clip_norm_(1.0)
            owners.step(True, lambda masters: None)
            owners.drop()
    return seen[-1], max(most)


def memory_of_ranks(rank, folder):
    if rank == 0:
        Path(folder, "one").write_text(json.dumps(measured(HEAVY, parallel.Mesh())))
    for ep in (1, 2):
        next_port()
        mesh = parallel.join_mesh(parallel.MeshConfig(ep=ep, timeout=50))
        Path(folder, f"ep{ep}-{rank}").write_text(json.dumps(measured(HEAVY, mesh)))
        if ep == 2:
            with Alive() as alive:
                rows = torch.randn(40, 5000, requires_grad=True)
                tolist, syncs = torch.Tensor.tolist, []
                torch.Tensor.tolist = lambda t: syncs.append(t) or tolist(t)
                trip = parallel.Exchange(mesh, torch.tensor([20, 20]))
                here, weight, _ = trip.arrive(trip.dispatch(rows * 1, torch.ones(40, 1)))
                assert weight.untyped_storage().nbytes() == weight.nbytes, "a view would keep all rows"
                home = trip.home(trip.combine(here))
                torch.Tensor.tolist = tolist
                assert len(syncs) == 1, "the host waits for a GPU once an exchange, for the counts"
                del trip, here
            deadline = time.monotonic() + 10
            while alive.bytes() >= 3 * home.nbytes:                # gloo's thread may hold on a little longer
                assert time.monotonic() < deadline, "only input and output of the exchange may be alive"
                time.sleep(0.01)
            home.sum().backward()
        parallel.leave_mesh()


def test_memory_predicts_what_is_alive_in_a_backward(tmp_path):
    """Weights, gradients, masters and optimizer state are within 10% of memory(): in one float32 process, and
    on two ranks with bfloat16 weights, with and without expert parallelism. There is no second copy of a
    gradient and none from the step before, and buckets in flight stay within their bound."""
    spawn(2, memory_of_ranks, str(tmp_path))
    for names, world, ep in ((["one"], 1, 1), (["ep1-0", "ep1-1"], 2, 1), (["ep2-0", "ep2-1"], 2, 2)):
        found = [json.loads((tmp_path / name).read_text()) for name in names]
        counted = sum(train.memory(replace(HEAVY, mesh=parallel.MeshConfig(ep=ep)), world)[0].values())
        assert sum(alive for alive, _ in found) / len(found) == pytest.approx(counted, rel=0.1), names
        assert (len(found) > 1) * (1 << 18) <= max(most for _, most in found) <= 1 << 20


@pytest.mark.parametrize("recipe, split", [("laptop", False), ("laptop-k2", True)])
def test_activations_are_predicted_and_a_meter_agrees(recipe, split):
    """Within 1%, in one process, with micro-batches of two windows and of three, the last one shorter.
    A split backward does not keep the inputs of matmuls that it can make again."""
    peaks = {}
    for micro in (2, 3):
        config = replace(train.RECIPES[recipe], batch=5, micro=micro, mesh=parallel.MeshConfig(split=split))
        found, counts = metered(config, parallel.Mesh())
        (predicted, _), = train.activations(config, 1, False, counts)
        assert predicted == pytest.approx(found.total(), rel=0.01)
        peaks[micro] = found.total()
        assert {"down", "boundaries", "other"} <= set(found) and ("queued" in found) <= split
    whole, _ = metered(replace(config, mesh=parallel.MeshConfig()), parallel.Mesh())
    assert peaks[2] < peaks[3] and (found.total() < 0.8 * whole.total()) == split


def test_activations_of_many_layers_and_long_contexts_are_predicted_from_fewer():
    model = replace(train.RECIPES["laptop"].model, n_layer=5, n_head=2, n_kv_head=2, d_model=32, d_head=16,
                    d_ff=64, context=2304, vocab_size=300)
    config = replace(train.RECIPES["laptop"], model=model, batch=1, micro=1)
    found, _ = metered(config, parallel.Mesh())
    (predicted, _), = train.activations(config, 1, False)
    assert predicted == pytest.approx(found.total(), rel=0.01)


EVERYTHING = dict(recomputed=parallel.RECOMPUTED, offload=True)


def saving(config, monkeypatch, smallest=0, **options):
    """Six micro-batches in a plan that runs all forwards first → (nats, gradients, largest logits and loads,
    the meter, the Savings); the Savings after a second step with the same buffers."""
    monkeypatch.setattr(parallel.Host, "SMALLEST", smallest)
    savings = parallel.Savings(**options)
    network = lively(config, ops=train.ops_of(savings, net.Local))
    x = torch.randint(0, config.vocab_size, (6, 33), generator=torch.Generator().manual_seed(1))
    batch = data.Batch(x[:, :-1], x[:, 1:], None, torch.arange(32).expand(6, 32) // 20 * 20)
    plan = parallel.MeshConfig(schedule="gpipe", split=savings.split).plans(6, 1)[0]
    meter = parallel.Meter()
    records = [*network.attentions().values(), *network.mixtures().values()]
    for step in range(2):
        network.zero_grad()
        for module in network.attentions().values():
            module.clear_logits()
        for module in network.mixtures().values():
            module.load.zero_()
        nats = parallel.execute(plan, {0: network}, batch, 1, parallel.Mesh(), None, savings, str, meter)
        assert not meter.entries and not savings.queue
    seen = [m.load if isinstance(m, net.MoE) else m.max_logits for m in records]
    return nats, {name: p.grad for name, p in network.named_parameters()}, seen, meter, savings


@each_variant
def test_recomputation_and_offload_change_no_number(config, monkeypatch):
    """Losses, gradients, loads and largest logits are the same to the bit, with a split backward too; and the
    device keeps less. In nGPT some sums of gradients have another order, as with a split backward."""
    plain = saving(config, monkeypatch)
    for options in (EVERYTHING, dict(recomputed=["norm"]), dict(recomputed=["act"]),
                    dict(split=True, **EVERYTHING)):
        nats, gradients, seen, meter, savings = saving(config, monkeypatch, **options)
        assert torch.equal(nats, plain[0]) and all(map(torch.equal, seen, plain[2]))
        for name, g in plain[1].items():
            if config.ngpt:
                torch.testing.assert_close(gradients[name], g, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(gradients[name], g), name
        if not (savings.split or config.ngpt):                     # what is queued counts too; no norms
            assert meter.peak.total() < plain[3].peak.total()
        assert not savings.host or savings.host.free


def test_latent_attention_is_recomputed_from_its_latents(monkeypatch):
    """On a CPU the whole attention runs again, without looking for its largest logits again. Elsewhere
    queries, keys and values are made again once, and attention does not run twice. Norms inside are not made
    again on their own."""
    calls = collections.Counter()

    def counted(module, name):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: calls.update([name]) or f(*args, **kw))

    def ran(**options):
        calls.clear()
        found = saving(replace(VARIANTS["latent"], n_layer=1), monkeypatch, **options)
        return found, dict(calls)

    counted(net.kernels, "max_logits")
    counted(net.kernels, "rms_norm")
    counted(net.kernels, "attention")
    counted(net, "rotate")
    plain, forward = ran()
    assert forward == dict(attention=12, max_logits=12, rotate=24, rms_norm=12 * 5)
    found, ran_again = ran(recomputed=["mla"])
    assert ran_again == dict(attention=24, max_logits=12, rotate=48, rms_norm=12 * 7)
    assert all(map(torch.equal, found[2], plain[2]))
    assert ran(recomputed=["mla", "norm"])[1] == ran_again | dict(rms_norm=12 * 9)

    monkeypatch.setattr(parallel, "runs_attention_again", lambda x: False)
    found, ran_again = ran(recomputed=["mla"])
    assert ran_again == dict(attention=12, max_logits=12, rotate=48, rms_norm=12 * 7)
    assert all(torch.equal(found[1][name], g) for name, g in plain[1].items())


def test_a_step_that_fails_leaves_nothing_for_the_next(monkeypatch):
    """An exception in the middle of a backward, while something is made again."""
    options = dict(split=True, recomputed=parallel.RECOMPUTED, offload=True)
    _, gradients, *_, savings = saving(VARIANTS["k2"], monkeypatch, **options)
    f, left = parallel.GroupedLinear.by_input, [5]

    def fails(*args):
        left[0] -= 1
        if left[0] == 0:
            savings.making = True                                  # as in Recipe.make, where this may happen
            raise RuntimeError("no memory")
        return f(*args)

    with monkeypatch.context() as patch:
        patch.setattr(parallel.GroupedLinear, "by_input", staticmethod(fails))
        patch.setattr(parallel, "Savings", lambda **_: savings)
        with pytest.raises(RuntimeError, match="no memory"):
            saving(VARIANTS["k2"], monkeypatch, **options)
    assert savings.queue and savings.making
    savings.begin([], [], torch.device("cpu"))
    assert not (savings.queue or savings.made or savings.making), "its weights would get these gradients too"
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "Savings", lambda **_: savings)
        _, found, *_ = saving(VARIANTS["k2"], monkeypatch, **options)
    assert all(torch.equal(found[name], g) for name, g in gradients.items())


def test_views_of_recomputed_results_have_their_places():
    """A part, a transpose and a flat view of a result are saved; the result is made again once for all."""
    savings, calls = parallel.Savings(recomputed=["norm"]), []

    def f(x):
        calls.append(1)
        return x.exp()

    x = torch.randn(5, 6, requires_grad=True)
    gradients = []
    for recompute in (net.recompute, savings.recompute):
        with savings.watch():
            y = recompute("norm", f, (), x)
            total = y[2:, 1:].square().sum() + (y.mT @ y).sum() + (y.flatten()[7:] * y.flatten()[:-7]).sum()
        del y
        calls.clear()
        gradients.append(torch.autograd.grad(total, x)[0])
    assert torch.equal(*gradients) and len(calls) == 1


def test_fp8_takes_half_the_bytes_within_its_error():
    """1 + 4/128 bytes for each value that would take 2. A stored value is off by 1/16 of itself, or by half
    of the smallest step: 2^-10 of its tile's scale, the largest value being 448. Weights' gradients differ by
    no more than these errors times the gradients of the results; gradients of inputs not at all."""
    def kept(fp8, rows):
        meter, savings = parallel.Meter(), parallel.Savings(recomputed=["norm"], fp8=fp8)
        savings.begin([], [], torch.device("cpu"), meter)
        with savings.watch():
            x = rows.detach().requires_grad_()
            y, = savings.linear("expert_up", (weight,), net.identity, (), x, ends=ends)
        held = meter.now.total()
        weight.grad = None
        y.backward(g)
        assert not meter.entries
        return held, x.grad, weight.grad

    ends = torch.tensor([40, 40, 100])
    for width in (256, 200):
        weight = torch.nn.Parameter(torch.randn(3, 24, width, dtype=torch.bfloat16))
        rows, g = torch.randn(100, width).bfloat16() * 3, torch.randn(100, 24).bfloat16()
        whole, dx, dw = kept([], rows)
        half, same, near = kept(["expert_up"], rows)
        assert (whole, half) == (100 * width * 2, 100 * width + 100 * 2 * 4)
        assert width % 128 or half == whole / 2 * (1 + 4 / 128)
        assert torch.equal(dx, same) and not torch.equal(dw, near)

    # The bound, in float64, with a token of zeros and a tile of tiny values
    weight = torch.nn.Parameter(torch.randn(3, 24, 200, dtype=torch.float64))
    rows, g = torch.randn(100, 200, dtype=torch.float64), torch.randn(100, 24, dtype=torch.float64)
    rows[3], rows[5, :128] = 0, 1e-30
    (_, _, dw), (_, _, near) = kept([], rows), kept(["expert_up"], rows)
    scale = torch.nn.functional.pad(rows, (0, 56)).view(100, 2, 128).abs().amax(-1) / 448
    off = rows.abs() / 16 + scale.repeat_interleave(128, 1)[:, :200] * 2 ** -10
    for e, (a, b) in enumerate(((0, 40), (40, 40), (40, 100))):
        assert ((dw - near)[e].abs() <= g[a:b].abs().mT @ off[a:b] * (1 + 1e-6)).all()
    assert (dw - near).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["k2", "motif", "ungated"])
def test_gradients_with_fp8_stay_within_a_bound(name, monkeypatch):
    """Of every matrix the gradient turns by less than 7%: E4M3 rounds by at most 6.25%, on average 2.6%.
    Losses and what routers see do not change at all, alone or with everything else."""
    config = VARIANTS[name]
    plain = saving(config, monkeypatch)
    for options in ({}, EVERYTHING, dict(split=True, **EVERYTHING)):
        found = saving(config, monkeypatch, fp8=parallel.STORED_IN_FP8, **options)
        assert torch.equal(found[0], plain[0]) and all(map(torch.equal, found[2], plain[2]))
        off = {n: ((found[1][n] - g).norm() / g.norm()).item() for n, g in plain[1].items() if g.ndim > 1}
        assert max(off.values()) < 0.07 and min(off.values()) < max(off.values()), off


def test_activations_wait_on_the_host_and_come_back_in_time(monkeypatch):
    """What a forward saves is on the device until the end of the next act, and again from one act ahead of
    its backward on. A storage travels once, however many views of it are saved; parameters and small tensors
    stay. Forwards whose backwards follow soon keep everything. The host's memory is taken once."""
    assert [len(parallel.absences(plan)) for plan in parallel.one_f_one_b(4, 8)] == [8, 6, 0, 0]
    plan = parallel.gpipe(1, 5)[0]
    assert parallel.absences(plan) == {(k, 0): (k, k + 1, k + 4, k + 5) for k in range(5)}
    monkeypatch.setattr(parallel.Host, "SMALLEST", 100)
    monkeypatch.setattr(parallel.Host, "BLOCK", 150)               # so that a storage lies in three of them
    savings, weight = parallel.Savings(offload=True), torch.nn.Linear(10, 10)
    for step in range(2):
        meter = parallel.Meter()
        savings.begin(plan, [weight], torch.device("cpu"), meter)
        kept, during, copies = {}, [], []
        for i, act in enumerate(plan):
            savings.enter(i, act)
            if act.op == "F":
                a, small = torch.randn(10, 10), torch.randn(3)
                views = a, a.T[2:, 1:], small, weight.weight
                kept[act.micro] = [t.detach().clone() for t in views], [savings.pack(t) for t in views]
                del a, small, views
            else:
                expected, packed = kept.pop(act.micro)
                found = [parallel.opened(t) for t in packed]
                assert all(map(torch.equal, found, expected)) and found[1].stride() == (1, 10)
                assert found[3] is weight.weight and found[0].data_ptr() == found[1].data_ptr() - 4 * 12
                del packed, found
            during.append(meter.now.total())
            savings.leave(i)
        in_flight = [1, 2, 3, 4, 5, 4, 3, 2, 1, 0]
        on_device = [1, 2, 2, 2, 3, 2, 1, 1, 1, 0]
        assert during == [400 * a + 12 * b for a, b in zip(on_device, in_flight)] and not meter.entries
        if step == 0:
            blocks = {*savings.host.free}
        assert {*savings.host.free} == blocks and len(blocks) == 4 * 3


def test_activations_that_are_saved_are_predicted_too(monkeypatch):
    """Within 2% on the device and 5% on the host, with five micro-batches in flight."""
    sizes = []
    new_block = parallel.Host.new_block
    monkeypatch.setattr(parallel.Host, "BLOCK", 1 << 18)
    monkeypatch.setattr(parallel.Host, "new_block", lambda self: sizes.append(self.BLOCK) or new_block(self))
    recompute, fp8 = dict(recompute="norm,act,mla"), dict(fp8="expert_up,act")
    every = recompute | fp8 | dict(offload=True)
    dense = dict(recompute="norm,act", fp8="act", offload=True, split=True)
    peaks = []
    for recipe, options in (("laptop-k2", {}), ("laptop-k2", recompute), ("laptop-k2", recompute | fp8),
                            ("laptop-k2", every), ("laptop", dense)):
        mesh = parallel.MeshConfig(schedule="gpipe", **options)
        config = replace(train.RECIPES[recipe], batch=5, micro=1, mesh=mesh)
        sizes.clear()
        found, counts = metered(config, parallel.Mesh())
        (predicted, on_host), = train.activations(config, 1, False, counts)
        assert predicted == pytest.approx(found.total(), rel=0.02), (options, found)
        assert on_host == pytest.approx(sum(sizes), rel=0.05)
        peaks.append(found.total())
    assert peaks[0] > 1.2 * peaks[1] and peaks[1] > 1.2 * peaks[2] and peaks[2] > 1.2 * peaks[3], peaks


def test_savings_that_cannot_be_had_are_refused():
    """With the reason, before anything is built."""
    for options, says in ((dict(recompute="norm,swiglu"), "norm,swiglu: have norm, act, mla, not swiglu"),
                          (dict(fp8="mla"), "mesh.fp8=mla: have expert_up, act, not mla")):
        with pytest.raises(ValueError, match=says):
            parallel.MeshConfig(**options)
    for recipe, options, says in (
            ("laptop", dict(recompute="norm,mla"), "no latent attention"),
            ("laptop", dict(fp8="expert_up"), "no experts"),
            ("laptop-k2", dict(recompute="act"), "compile=true: not with mesh.recompute"),
            ("laptop-k2", dict(offload=True), "compile=true: not with")):
        with pytest.raises(ValueError, match=says):
            replace(train.RECIPES[recipe], mesh=parallel.MeshConfig(**options), compile="compile" in says)
    for options, world in ((dict(), 1), (dict(pp=2), 2)):
        config = replace(train.RECIPES["laptop-k2"], mesh=parallel.MeshConfig(offload=True, **options))
        with pytest.raises(ValueError, match="mesh.offload=true: in this plan every backward follows"):
            train.check_mesh(config, world)
    mesh = parallel.MeshConfig(offload=True, pp=4)
    train.check_mesh(replace(train.RECIPES["laptop-k2"], mesh=mesh, micro=1), 4)


def test_a_meter_counts_every_storage_once():
    weight = torch.nn.Linear(4, 4)
    meter, savings = parallel.Meter(), parallel.Savings()
    savings.begin([], [weight], torch.device("cpu"), meter)
    x = torch.randn(8, 4, requires_grad=True)
    with savings.watch():
        y = weight(x) * x.sum() + weight(x[:4]).exp().sum() + x.view(2, 16).square().sum()
    assert meter.now == {"other": x.nbytes + y.nbytes + 4 + 4 * 4 * 4}, "x, y / x.sum(), x.sum() and exp"
    kept = savings.keep(x[:2], "boundaries"), savings.keep(torch.empty(3, 5), "sends")
    assert meter.now["boundaries"] == 0 and meter.now["sends"] == 60
    total = meter.now.total()
    y.sum().backward()
    del kept
    assert meter.now.total() == 0 and meter.peak.total() == total


@pytest.mark.parametrize("recipe", ["laptop", "gpt2", "motif-2.6b"])
def test_a_step_of_a_dense_model_never_waits_for_its_device(recipe):
    """The meta device takes the code path of a GPU but holds no numbers, so reading one back or mixing in a
    CPU tensor is an error. At full size: forward and backward in bfloat16, gradient norm and clip, optimizer,
    QK-Clip."""
    config, device = train.RECIPES[recipe], torch.device("meta")
    with device:
        network = net.Transformer(config.model)
    named = dict(network.named_parameters())
    name_of, attentions = {p: name for name, p in named.items()}, list(network.attentions().values())
    owners = owners_of(network, config, parallel.Mesh(device=device))
    for attention in attentions:
        attention.clear_logits()
    x = torch.zeros(2, config.model.context, dtype=torch.int64)
    batch = data.Batch(x, x, None, torch.zeros(2))
    nats = forward_backward(network, batch, 1, parallel.Mesh(device=device), torch.bfloat16)
    assert nats.device == device and nats.shape == (2,) and owners.sound().device == device
    owners.reduce()
    assert owners.clip_norm_(1.0).device == device
    owners.step(True, lambda masters: muonclip.qk_clip_(attentions, 100.0, lambda w: masters.get(name_of[w])))
    for optimizer in owners.optimizers.values():
        assert sum(len(state) for state in optimizer.state.values()) > 0
        for state in optimizer.state.values():
            assert all(t.device == device for key, t in state.items() if key != "step")


def test_memory_of_kimi_k2_matches_the_report():
    """bfloat16 weights and float32 gradients: 6.16 TB by its configuration, 24.1 GB on each of 256 GPUs if
    nothing were replicated, 28.2 GB in the layout of §2.4."""
    k2 = train.RECIPES["kimi-k2"]
    def mean(world, *what, **mesh):
        stages = train.memory(replace(k2, mesh=parallel.MeshConfig(**mesh)), world)
        return sum(parts[name] for parts in stages for name in what) / len(stages)
    assert mean(2, "weights", "gradients") == pytest.approx(6.16e12, rel=2e-3)
    assert mean(2, "weights", "gradients") / 256 == pytest.approx(24.1e9, rel=2e-3)
    grid = dict(pp=16, chunks=2, ep=16)
    assert mean(256, "weights", "gradients", **grid) == pytest.approx(28.2e9, rel=2e-3)
    states = mean(4096, "weights", "gradients", "masters", "states", **grid)
    assert 28.2e9 < states < 31e9, "the report's 30 GB or so, with states sharded over 16 groups"


@pytest.mark.parametrize("mesh, world, experts, says", [
    (dict(ep=3), 4, 6, "ep=3 does not divide the 4 ranks"),
    (dict(ep=4), 8, 6, "does not divide the model.s 6 experts"),
    (dict(ep=2), 2, 0, "model's 0 experts"),
    (dict(pp=3), 4, 8, r"pp=3 × ep=1 does not divide the 4 ranks"),
    (dict(pp=2, ep=4), 4, 8, r"pp=2 × ep=4 does not divide the 4 ranks"),
    (dict(pp=4), 4, 8, r"pp=4 × chunks=1 = 4 chunks, but the layers can only be cut into 3"),
    (dict(pp=2, chunks=2), 4, 8, r"pp=2 × chunks=2 = 4 chunks, .* into 3"),
    (dict(chunks=2), 1, 8, "mesh.chunks=2: there is only one rank"),
    (dict(), 5, 8, "batch=24 windows cannot be shared evenly by 5 ranks"),
    (dict(pp=2), 10, 8, "batch=24 .* by 5 ranks .*each of 2 stages"),
    (dict(chunks=0), 1, 8, "mesh.chunks=0: must be at least 1"),
    (dict(overlap=True), 2, 8, "mesh.overlap=true: with mesh.ep=1 no tokens travel"),
    (dict(overlap=True, ep=2, pp=2, schedule="1f1b"), 4, 8, "mesh.overlap=true is a plan of its own"),
    (dict(schedule="dualpipe"), 2, 8, "mesh.schedule='dualpipe': have gpipe, 1f1b, interleaved"),
    (dict(pp=2, chunks=2, schedule="1f1b"), 2, 8, "1f1b has one chunk on each stage, not mesh.chunks=2")])
def test_impossible_meshes_are_refused(mesh, world, experts, says, batch=24):
    with pytest.raises(ValueError, match=says):
        parallel.MeshConfig(**mesh).check(world, batch, experts, 3)


# Exchanges overlapped with computation: (pp, ep) of each world, on the first ranks of eight.
WOVEN = [(1, 2), (2, 2), (1, 4)]
WOVEN_MODEL = replace(K2, n_layer=4, n_dense=0, vocab_size=261, tie=False, balance_loss=0.01)


class Recorded:
    """What happens on a rank, in order: ("part", act), ("start", exchange), ("wait", exchange)."""

    def __init__(self, monkeypatch, plan):
        self.events = []
        acts = iter([act for act in plan if act.op in "FB"])
        self.record(monkeypatch, parallel.Passage, "forward", lambda _: ("part", next(acts)))
        self.record(monkeypatch, parallel.Passage, "backward", lambda _: ("part", next(acts)))
        self.record(monkeypatch, parallel.Exchange, "__init__", lambda trip: ("start", id(trip)))
        self.record(monkeypatch, parallel.Exchange, "dispatch", lambda trip: ("wait", id(trip)))
        self.record(monkeypatch, parallel.Trip, "start", lambda trip: ("start", id(trip)))
        self.record(monkeypatch, parallel.Trip, "wait", lambda trip: ("wait", id(trip)))

    def record(self, monkeypatch, owner, name, event):
        method = getattr(owner, name)

        def recorded(this, *args):
            self.events.append(event(this))
            return method(this, *args)
        monkeypatch.setattr(owner, name, recorded)

    def hidden(self):
        """The acts after which an exchange was under way while a part of another act computed."""
        found = set()
        acts = [(i, event[1]) for i, event in enumerate(self.events) if event[0] == "part"]
        for i, (kind, exchange) in enumerate(self.events):
            if kind != "start":
                continue
            stop = self.events.index(("wait", exchange), i)
            before = [act for at, act in acts if at < i][-1]
            meanwhile = [act for at, act in acts if i < at < stop]
            if any(act[:3] != before[:3] for act in meanwhile):
                found.add(before)
        return found


def every_weave(rank, text):
    """Gradients of one step, woven and not, against one process; and the order of events."""
    torch.set_default_dtype(torch.float64)
    base = tiny_run(text, micro=1, batch=24, model=WOVEN_MODEL)
    alone = lively(WOVEN_MODEL)
    for module in alone.mixtures().values():
        module.bias[:2] -= 9.0                                     # no tokens there; at ep = 4, a whole rank
    x = torch.randint(0, 261, (24, 2, 32), generator=torch.Generator().manual_seed(1))
    nats = forward_backward(alone, data.Batch(x[:, 0], x[:, 1], None, None), 24)
    for pp, ep in WOVEN:
        kinds = dict(plain={}, woven=dict(overlap=True))
        if pp == ep:
            kinds["saved"] = dict(overlap=True, split=True, recompute="norm,act,mla", offload=True)
        found = {}
        for kind, options in kinds.items():
            with layout(rank, pp * ep) as here, pytest.MonkeyPatch.context() as monkeypatch:
                if not here:
                    continue
                monkeypatch.setattr(parallel.Host, "SMALLEST", 0)
                mesh = parallel.MeshConfig(pp=pp, ep=ep, chunks=pp, timeout=50, **options)
                config = replace(base, mesh=mesh)
                mesh = parallel.join_mesh(config.mesh)
                found[kind] = step_of_a_weave(config, mesh, alone, x, nats, monkeypatch)
                parallel.leave_mesh()
        for kind in found.keys() & {"woven", "saved"}:
            for g, same in zip(found["plain"], found[kind], strict=True):
                assert torch.equal(g, same), f"plain and {kind} are the same to the bit"


def step_of_a_weave(config, mesh, alone, x, nats, monkeypatch):
    # This rank's part of the model and of the batch
    savings = train.savings_of(config)
    chunks = train.build(config, mesh, None, savings)
    exact = dict(alone.named_parameters())
    for chunk in chunks.values():
        for name, p in chunk.named_parameters():
            held = chunk.experts if p.ndim == 3 else range(len(p))
            p.data.copy_(exact[name][held.start:held.stop])
        for name, module in chunk.mixtures().items():
            module.bias.copy_(alone.mixtures()[name].bias)
    b = len(x) // mesh.dp.size
    mine = slice(mesh.dp.rank * b, mesh.dp.rank * b + b)
    batch = data.Batch(x[mine, 0], x[mine, 1], None, None)

    # A step
    plan = train.plans_of(config, b, 1)[mesh.pp.rank]
    recorded = Recorded(monkeypatch, plan)
    owners = train.owners_of(config, chunks, mesh)
    found = parallel.execute(plan, chunks, batch, 1, mesh, None, savings, owners.begin_reduce)
    owners.reduce()
    if mesh.pp.rank == mesh.pp.size - 1:
        torch.testing.assert_close(found, nats[mine], rtol=1e-9, atol=1e-9)
    for piece, master in owners.masters.items():
        g = exact[piece.name].grad[piece.start:piece.stop]
        torch.testing.assert_close(master.grad, g, rtol=1e-9, atol=1e-11, msg=lambda text: f"{piece}: {text}")

    # In a steady tick, tokens travel while the other micro-batch computes.
    if config.mesh.overlap:
        plain = [act for act in parallel.interleaved(mesh.pp.size, b, len(chunks), 1)[mesh.pp.rank]]
        ticks = [pair for pair in itertools.pairwise(plain) if [act.op for act in pair] == ["F", "B"]]
        steady = {act[:3] for pair in ticks for act in pair}
        tokens = "dispatch", "combine"
        expected = {act for act in plan if act[:3] in steady and parallel.exchanged_after(act) in tokens}
        assert len(ticks) >= 2 and expected <= recorded.hidden()
    else:
        assert not recorded.hidden()
    return [master.grad.clone() for master in owners.masters.values()]


def test_woven_exchanges_change_no_number_and_are_hidden(text):
    """On pp × ep = 1 × 2, 2 × 2 and 1 × 4 ranks, in float64 and with empty experts: losses and gradients
    match one process to 1e-9, and the same layout without overlap to the bit. Whenever tokens travel in a
    steady tick, a part of another micro-batch computes between the start of the exchange and the wait."""
    spawn(4, every_weave, text)


@contextlib.contextmanager
def layout(rank, dp):
    """Make the first dp of the processes the whole world. → whether this one is among them"""
    next_port()
    os.environ["WORLD_SIZE"] = str(dp)
    yield rank < dp
    os.environ["WORLD_SIZE"] = "4"


def same_gradients(config, alone, batch):
    """Assert that owners get the gradients of `alone`, which saw the whole batch."""
    mesh, exact = parallel.join_mesh(config.mesh), dict(alone.named_parameters())
    network = train.build(config, mesh)[0]
    for name, p in network.named_parameters():
        p.data.copy_(exact[name][network.experts.start:network.experts.stop] if p.ndim == 3 else exact[name])
    network.layers["1"].ffn.bias.copy_(alone.layers["1"].ffn.bias)
    owners = owners_of(network, config, mesh)
    forward_backward(network, batch, 2, mesh)
    owners.reduce()
    for piece, master in owners.masters.items():
        g = exact[piece.name].grad[piece.start:piece.stop]
        torch.testing.assert_close(master.grad, g, rtol=1e-9, atol=1e-11,
                                   msg=lambda text: f"{config.mesh}, {piece}: {text}")
    parallel.leave_mesh()


def every_layout(rank, path, out):
    """Gradients of one step, and weights after five, under each layout."""
    torch.set_default_dtype(torch.float64)
    base = tiny_run(path, micro=1, mesh=parallel.MeshConfig(timeout=50), average_every=4 * 8 * 32,
                    average_of=4, average_from=0.0, save_every=100)
    base = replace(base, model=replace(K2, vocab_size=261, tie=False, balance_loss=0.01),
                   optim=replace(base.optim, tau=0.01))
    corpus = data.prepare(base.data, 261)
    batches = data.Batches(corpus, base.data, 0, base.batch, base.model.context)
    alone = lively(base.model)
    alone.layers["1"].ffn.bias[:2] -= 9.0                          # no tokens there; at ep = 4, a whole rank
    forward_backward(alone, batches(0), 8)
    for dp, ep in LAYOUTS:
        config = replace(base, mesh=replace(base.mesh, ep=ep), out=f"{out}/{dp}-{ep}", steps=5)
        with layout(rank, dp) as here:
            if here:
                same_gradients(config, alone, batches(0, rank, dp))
        with layout(rank, dp) as here:
            if here:
                train.train(config, quiet=True)


def test_every_layout_trains_like_one_process(text, tmp_path):
    """Expert parallelism and ZeRO-1 in float64, for dp = 1, 2, 4 and every ep that divides it. Gradients, and
    the weights and optimizer state after five steps with clip and averages, match one process to 1e-9."""
    spawn(4, every_layout, text, str(tmp_path))
    one = train.newest_checkpoint(tmp_path / "1-1")[1]
    assert any(":momentum" in name for name in one) and any("mean/" in name for name in one)
    assert sum(float(row["clipped"] or 0) for row in log_of(tmp_path / "1-1")) > 10
    for dp, ep in LAYOUTS[1:]:
        many = train.newest_checkpoint(tmp_path / f"{dp}-{ep}")[1]
        assert len(list((tmp_path / f"{dp}-{ep}" / "ckpt").glob("*5/rank*"))) == dp and set(many) == set(one)
        for a, b in zip(log_of(tmp_path / f"{dp}-{ep}"), log_of(tmp_path / "1-1"), strict=True):
            for key in ("loss", "grad_norm", "val_mine", "load"):
                assert float(a[key] or 0) == pytest.approx(float(b[key] or 0), rel=1e-9), (dp, ep, key)
        for name in one:
            torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-9,
                                       msg=lambda text: f"{dp}-{ep} {name}: {text}")


# The pipeline on four ranks. Eight layers, so that four stages can hold two chunks each.
STAGED = {
    "tied": replace(TINY, n_layer=8, vocab_size=261),
    "untied": replace(TINY, n_layer=8, vocab_size=261, tie=False, differential=False),
    "shared keys": replace(TINY, n_layer=8, vocab_size=261, share_kv=2),
    "experts": replace(K2, n_layer=8, vocab_size=261, tie=False, balance_loss=0.01),
}
FIVE_STEPS = [
    ("tied", 4, dict(pp=2, chunks=2)), ("untied", 4, dict(pp=4, chunks=2)),
    ("experts", 4, dict(pp=2, chunks=2, ep=2)), ("experts", 4, dict(chunks=2, ep=2)),
    ("experts", 4, dict(pp=2, ep=2, overlap=True)),
]
ONE_STEP = [
    ("tied", 4, dict(pp=4)), ("tied", 2, dict(pp=2)), ("untied", 4, dict(pp=2)),
    ("tied", 4, dict(chunks=2)), ("tied", 4, dict(pp=4, chunks=2, schedule="gpipe")),
    ("untied", 2, dict(pp=2, chunks=2)), ("shared keys", 4, dict(pp=2, chunks=2)),
    ("shared keys", 4, dict(pp=4)), ("experts", 4, dict(pp=4, chunks=2)),
    ("experts", 4, dict(pp=2)), ("experts", 4, dict(chunks=2, ep=4)),
    ("experts", 4, dict(pp=2, chunks=2)), ("experts", 2, dict(pp=2, schedule="gpipe")),
    ("experts", 4, dict(pp=2, chunks=2, ep=2, overlap=True)), ("experts", 2, dict(ep=2, overlap=True)),
]
SPLIT = [(kind, world, mesh | dict(split=True)) for kind, world, mesh in (*FIVE_STEPS, *ONE_STEP[1::3])]
CHAIN = [(4, dict(pp=2, chunks=2, ep=2)), (1, dict()), (4, dict(pp=4, chunks=2)), (2, dict(ep=2)),
         (4, dict(pp=2, ep=2)), (2, dict(pp=2)), (4, dict(chunks=2, ep=4))]


def staged_run(path, kind, out, steps, **mesh):
    """Five steps or fewer, with three windows a micro-batch, which divides neither eight windows nor four;
    documents are masked, heads are clipped, and step 4 ends a period of averages."""
    config = tiny_run(path, micro=3, average_every=4 * 8 * 32, average_of=4, average_from=0.0, save_every=100,
                      model=STAGED[kind], out=str(out), steps=steps,
                      mesh=parallel.MeshConfig(timeout=50, **mesh))
    return replace(config, optim=replace(config.optim, tau=0.01), data=replace(config.data, doc_mask=True))


def staged_name(kind, world, mesh, steps):
    return "-".join([kind, str(world), *(f"{name}={value}" for name, value in mesh.items()), str(steps)])


def every_pipeline(rank, path, out):
    torch.set_default_dtype(torch.float64)
    one = [(kind, 1, dict()) for kind in STAGED]
    for steps, rows in ((5, one + FIVE_STEPS), (1, one + ONE_STEP + SPLIT)):
        for kind, world, mesh in rows:
            with layout(rank, world) as here:
                if here:
                    folder = Path(out, staged_name(kind, world, mesh, steps))
                    train.train(staged_run(path, kind, folder, steps, **mesh), quiet=True)
    for step, (world, mesh) in enumerate(CHAIN, 1):
        with layout(rank, world) as here:
            if here:
                train.train(staged_run(path, "experts", f"{out}/chain", step, **mesh), resume=step > 1,
                            quiet=True)
    with layout(rank, 4):
        said = loss_of_a_stage(rank, staged_run(path, "untied", "", 5, pp=4))
    Path(out, f"lost-{rank}").write_text(said)


def loss_of_a_stage(rank, config):
    """Stage 2 dies in the middle of a step. → what the other ranks say"""
    body, calls = net.Transformer.body, itertools.count()

    def dies(*args, **kwargs):
        if rank == 2 and next(calls) == 5:
            os._exit(0)
        return body(*args, **kwargs)
    net.Transformer.body = dies
    began = time.monotonic()
    try:
        train.train(config, quiet=True)
    except parallel.LostRank as error:
        assert time.monotonic() - began < config.mesh.timeout + 10
        return str(error)
    finally:
        net.Transformer.body = body
    return "nothing"


@pytest.fixture(scope="session")
def pipelines(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("pipelines")
    spawn(4, every_pipeline, text, str(out))
    return out


@pytest.mark.parametrize("steps", [5, 1])
def test_every_pipeline_trains_like_one_process(pipelines, steps):
    """In float64, with stages, chunks, experts and replicas in all combinations: weights, moments, averages
    and log match those of one process to 1e-9. Without replicas and without a tied matrix, whose gradient has
    two parts, they are the same to the bit; with one, to 1e-12. So it is with a split backward."""
    for kind, world, mesh in (FIVE_STEPS if steps == 5 else ONE_STEP + SPLIT):
        here, alone = (pipelines / staged_name(*row, steps) for row in ((kind, world, mesh), (kind, 1, {})))
        bound = 1e-9
        if world == mesh.get("pp"):
            bound = 0.0 if kind == "untied" else 1e-12 if kind == "tied" else bound
        for a, b in zip(log_of(here), log_of(alone), strict=True):
            for key in a.keys() & {"loss", "grad_norm", "max_logit", "clipped", "val_mine", "load"}:
                assert float(a[key] or 0) == pytest.approx(float(b[key] or 0), rel=bound, abs=0), (here, key)
        many, one = (train.newest_checkpoint(folder)[1] for folder in (here, alone))
        assert set(many) == set(one) and len(list(here.glob(f"ckpt/*{steps}/rank*"))) == world
        for name in one:
            torch.testing.assert_close(many[name], one[name], rtol=0, atol=bound,
                                       msg=lambda text: f"{here.name} {name}: {text}")
    clipped = sum(float(row["clipped"] or 0) for row in log_of(pipelines / staged_name("tied", 1, {}, 5)))
    assert clipped > 10 and any("mean/" in name for name in one)


def test_a_run_passes_through_pipelines_and_other_layouts(pipelines, text, float64):
    """Resumed at every step by another layout, with averages in between, it ends like one process."""
    chain = train.newest_checkpoint(pipelines / "chain")[1]
    straight = pipelines / "straight"
    train.train(staged_run(text, "experts", straight, len(CHAIN)), quiet=True)
    for name, t in train.newest_checkpoint(straight)[1].items():
        torch.testing.assert_close(chain[name], t, rtol=0, atol=1e-9, msg=lambda text: f"{name}: {text}")
    losses = [[float(row["loss"] or 0) for row in log_of(run)] for run in (pipelines / "chain", straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and len(losses[0]) == len(CHAIN) + 1


def test_ranks_that_lose_a_stage_name_what_they_were_at(pipelines):
    for rank in (0, 1, 3):
        said = (pipelines / f"lost-{rank}").read_text()
        assert re.fullmatch(rf"rank {rank} lost contact with another rank: .* \([FB] of micro-batch \d+, "
                            rf"chunk {rank}\)", said), said


def test_two_ranks_train_like_one_and_one_resumes_their_run(text, tried_by_two_ranks, tmp_path):
    """In float32 and on the same global batches, losses agree to rounding. The run of two ranks was resumed
    by one and by two; here it is resumed by one again."""
    two = tried_by_two_ranks / a_run_goes_from_two_ranks_to_one_and_back.__name__
    train.train(tiny_run(text, out=str(two)), resume=True, quiet=True)
    train.train(tiny_run(text, out=str(tmp_path / "one")), quiet=True)
    ours, theirs = log_of(two), log_of(tmp_path / "one")
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)
        assert a["share_mine"] == b["share_mine"]
    assert float(ours[1]["loss"]) == pytest.approx(float(theirs[1]["loss"]), rel=1e-6)


# ---- train.py ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_sentences(tmp_path_factory.mktemp("text"))


def test_a_run_survives_faults(tmp_path):
    """Kills, a signal and a full disk, mostly in a save; the full campaign is `python -m notes.faults`."""
    with ThreadPoolExecutor(2) as two:                             # a trial spends most of its time waiting
        kinds = "rank killed", "kill in save", "kill in average", "full disk", "stop in save"
        assert set(kinds) < set(faults.KINDS)
        for kind, again in zip(kinds, two.map(lambda kind: faults.trial(kind, 0, tmp_path), kinds)):
            assert 0 <= again <= 29, kind


def test_a_stage_begins_with_the_weights_of_another_run(text, tmp_path):
    """With the same optimizer it takes weights and moments, with another one weights only. The tokenizer
    comes with the weights and is copied into the run's own folder, so the run resumes even after `init` is
    gone. Another tokenizer or architecture is refused."""
    before, after = tmp_path / "before", tmp_path / "after"
    bpe = replace(tiny_run(text).data, tokenizer="bpe")
    model = replace(tiny_run(text).model, vocab_size=300)
    first = replace(tiny_run(text), out=str(before), data=bpe, model=model, steps=6)
    history, _ = train.train(first, quiet=True)
    kept = weights_of(before)
    longer = replace(model, context=64, rope_theta=500_000.0)
    longer = replace(first, init=str(before), out=str(after), model=longer, batch=4, steps=0)
    other_text = text.parent / "other.txt"
    other_text.write_text("Quite another text, for which another BPE would be learned.\n" * 400)
    longer = replace(longer, data=replace(bpe, files=f"mine={other_text}"))
    train.train(replace(longer, steps=4), quiet=True)
    begun = train.read_checkpoint(train.checkpoints(after)[0])[1]
    assert all(torch.equal(begun[name], t) for name, t in kept.items())
    assert any(":momentum" in name for name in kept)
    ours, theirs = (train.load_tokenizer(run / "tokenizer.json") for run in (after, before))
    assert ours.fingerprint == theirs.fingerprint
    before.rename(tmp_path / "moved")
    history, _ = train.train(replace(longer, steps=8), resume=True, quiet=True)
    assert history[-1]["step"] == 8

    moved = dict(init=str(tmp_path / "moved"), steps=1)
    bytes_instead = dict(data=replace(bpe, tokenizer="bytes"))
    for wrong, says in ((bytes_instead, "another tokenizer than --data.tokenizer=bytes"),
                        (dict(model=replace(model, d_ff=80)), "another architecture: .*ffn.up"),
                        (dict(init=str(tmp_path)), "no tokenizer.json"), (dict(), None)):
        config = replace(first, **moved | dict(out=str(tmp_path / "a")) | wrong)
        config = replace(config, optim=muonclip.OptimConfig(name="adamw", tau=0))
        with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
            train.train(config, quiet=True)
        shutil.rmtree(tmp_path / "a") if says else None
    begun = train.read_checkpoint(train.checkpoints(tmp_path / "a")[0])[1]
    assert not any(":" in name for name in begun)
    assert all(torch.equal(t, kept[name]) for name, t in begun.items())


def test_a_hugging_face_folder_is_written_read_and_trained_on(text, tmp_path, capsys):
    """A run of K2's block → --export → --init: the loss continues where it was, without further options."""
    pytest.importorskip("tokenizers")
    model = replace(K2, context=32, vocab_size=300, tie=False)
    config = replace(tiny_run(text), model=model, out=str(tmp_path / "k2"), steps=10, eval_windows=0,
                     data=replace(tiny_run(text).data, tokenizer="bpe"))
    history, _ = train.train(config, quiet=True)
    net.main(["--sample", str(tmp_path / "k2"), "--export", str(tmp_path / "hf")])
    net.main(["--sample", str(tmp_path / "hf"), "--tokens=5", "--prompt=The "])
    options = command(text, tmp_path / "on", "--steps=3", f"--init={tmp_path / 'hf'}", "--eval_windows=0")[2:]
    train.main([o for o in options if "--model" not in o and "tokenizer" not in o])
    said = capsys.readouterr().out
    assert "\nThe " in f"\n{said}" and f"weights of {tmp_path / 'hf'}" in said
    row = log_of(tmp_path / "on")[0]
    assert float(row["val_mine"]) == pytest.approx(history[-1]["val_mine"], rel=1e-5)
    with pytest.raises(SystemExit, match="neither a run with a checkpoint nor a Hugging Face folder"):
        train.main([f"--init={tmp_path}", f"--out={tmp_path / 'x'}"])


def test_masters_take_foreign_weights_at_full_precision(tmp_path):
    """Where ranks compute in bfloat16, only the working copy of the initial weights is rounded."""
    network = lively(replace(K2, tie=False))
    huggingface.save_hf(network, tmp_path / "hf")
    config = tiny_run(tmp_path, model=network.config, init=str(tmp_path / "hf"))
    mesh = parallel.Mesh(dp=parallel.Axis(0, 2), edp=parallel.Axis(0, 2))
    narrow, exact = train.build(config, mesh, torch.bfloat16)[0], dict(network.named_parameters())
    owners = owners_of(narrow, config, mesh)
    train.begin(config, [narrow], owners, {}, mesh, lambda _: None)
    assert len(owners.masters) > 10
    for piece, master in owners.masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, exact[piece.name][piece.start:piece.stop])
    for name, p in narrow.named_parameters():
        assert torch.equal(p, exact[name].to(p.dtype)), name


@pytest.mark.parametrize("recipe, tokens, rates", [
    ("motif-2.6b", (0, 1e12, 2e12, 2.5e12), (5e-4, 5e-4, 5e-4, 1.25e-4)),
    ("motif-2.6b-lc", (0, 80e9), (5e-4 / math.sqrt(13.6), 1.25e-4)),
    ("deepseek-v3", (2e11, 10e12, 14.3e12), (2.2e-4, 2.2e-4, 2.2e-5)),
    ("deepseek-v3-2", (0, 333e9), (2.2e-5, 2.2e-5)), ("deepseek-v3-128k", (0, 6e10), (7.3e-6, 7.3e-6)),
    ("kimi-k2", (33.6e9, 10e12, 15.5e12), (2e-4, 2e-4, 2e-5)),
    ("kimi-k2-anneal", (0, 400e9), (2e-5, 8.6957e-6)), ("kimi-k2-32k", (0, 60e9), (8.6957e-6, 7e-6))])
def test_reported_recipes_reach_the_reported_rates(capsys, recipe, tokens, rates):
    config = train.RECIPES[recipe]
    found = [muonclip.learning_rate(at, config) for at in tokens]
    found[0] = config.optim.lr if config.optim.warmup and not tokens[0] else found[0]
    assert found == pytest.approx(rates, rel=1e-3)
    assert not config.init or Path(config.init).name in train.RECIPES
    if recipe in ("motif-2.6b-lc", "deepseek-v3", "kimi-k2-anneal"):                        # seconds each
        train.main([recipe, "--dry-run"])
        assert f"{config.total_steps:,} steps" in capsys.readouterr().out
    assert config.total_steps == pytest.approx(config.tokens / config.step_tokens, abs=1)


def test_a_finished_run_can_be_sampled_and_is_not_overwritten(text, tmp_path):
    whole = tmp_path / "whole"
    train.train(tiny_run(text, out=str(whole), keep=3), quiet=True)
    assert {p.name for p in whole.iterdir()} == {"ckpt", "lock", "log.csv", "loss.png", "tokenizer.json"}
    assert len(train.checkpoints(whole)) == 3 and len(log_of(whole)) == 31
    before = log_of(whole)
    with pytest.raises(SystemExit, match="--resume"):
        train.main(command(text, whole)[2:])
    assert log_of(whole) == before
    sample = [sys.executable, HERE / "model.py", "--sample", whole, "--prompt=The ", "--tokens=20",
              "--average=2"]
    said = subprocess.run(sample, check=True, capture_output=True, text=True).stdout
    assert said.startswith("The ") and len(said) > 10

    kept = [train.read_checkpoint(folder)[1] for folder in train.checkpoints(whole)]
    for name, p in train.load_run(whole, 3)[0].named_parameters():         # averaged offline
        torch.testing.assert_close(p.double(), sum(t[name].double() for t in kept) / 3, rtol=1e-6, atol=1e-7)
    with pytest.raises(SystemExit, match="3 checkpoints here, not 4"):
        train.load_run(whole, 4)


# Averaging

def test_snapshots_are_evenly_spaced_within_their_period():
    config = train.Config(tokens=100 * 16 * 256, average_every=20 * 16 * 256,
                          optim=muonclip.OptimConfig(warmup=0.1, decay_start=0.405))
    snapshots, put_back = zip(*(train.averaging(step, config) for step in range(1, 101)))
    assert [i for i, due in enumerate(put_back, 1) if due] == [61, 81], "the first 41 steps precede the decay"
    taken = [i for i, due in enumerate(snapshots, 1) if due]
    assert taken[:6] == [45, 48, 51, 55, 58, 61] and len(taken) == 6 + 6 + 5
    early = replace(config, average_from=0.0, average_every=6 * 16 * 256)
    every_step = [train.averaging(step, early)[0] for step in range(1, 101)]
    assert all(every_step), "with as many snapshots as steps, every step is one"
    for wrong in (dict(average_every=5 * 16 * 256), dict(average_from=1.5), dict(average_of=0)):
        with pytest.raises(ValueError, match="average_"):
            replace(config, **wrong)


@pytest.mark.parametrize("reset", [False, True])
def test_an_average_is_the_mean_of_its_snapshots_and_training_continues_from_it(text, reset):
    """Up to the first average the run equals one without averaging; there its weights become the mean of four
    of that run's snapshots."""
    seen = {}

    def watch(step, network):
        seen.setdefault(key, {})[step] = {name: p.detach().clone() for name, p in network.named_parameters()}
    for key, options in (("plain", {}), ("averaged", PERIOD | dict(average_reset=reset))):
        train.train(tiny_run(text, steps=12, **options), quiet=True, watch=watch)
    plain, averaged = seen["plain"], seen["averaged"]
    for name, w in averaged[8].items():
        assert torch.equal(averaged[7][name], plain[7][name])
        mean = sum(plain[step][name].double() for step in (2, 4, 6, 8)) / 4
        torch.testing.assert_close(w.double(), mean, rtol=1e-6, atol=1e-7)
        assert not torch.equal(averaged[9][name], plain[9][name])


def test_training_learns_and_counts(text):
    history, network = train.train(tiny_run(text), quiet=True)
    assert [row["step"] for row in history] == list(range(31))
    assert history[-1]["val_mine"] < 0.7 * history[0]["val_mine"]
    assert history[0]["val_mine"] == pytest.approx(math.log(261), rel=0.02), "uniform before training"
    assert history[-1]["bpb_mine"] == pytest.approx(history[-1]["val_mine"] / math.log(2), rel=1e-6)
    assert sum(row["clipped"] for row in history[1:]) > 5, "QK-Clip is at work"
    assert all(row["max_logit"] <= 0.6 for row in history[1:]), "τ = 0.3 holds, up to the growth in one step"
    assert history[-1]["tokens"] == 30 * 8 * 32 and all(torch.isfinite(p).all() for p in network.parameters())


# A training step from definitions alone: weights by name, gradients by autograd. From the code under test it
# takes only the initial weights and the batches.    B windows  T tokens  C width  H maps  E experts

def inside(weights, at):
    return {name.removeprefix(at): w for name, w in weights.items() if name.startswith(at)}


def plain_norm(c, x, gain, eps=1e-6):
    x = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
    return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def plain_turn(c, x):
    """x (B, T, d): the pair (x_j, x_j+d/2) is a complex number, rotated by t·theta^(-2j/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * c.rope_theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return x if c.position == "learned" else torch.cat((turned.real, turned.imag), -1)


def plain_attention(c, i, w, h, mask):
    """Layer i's attention, one map at a time.  weights w, h (B, T, C) → (B, T, C), largest logits (H,)"""
    H, d, turn = c.n_head, c.d_head, functools.partial(plain_turn, c)
    if c.kv_rank:
        ckv, shared = (h @ w["wdkv"].T).split((c.kv_rank, c.d_rope), -1)
        cq, ckv = plain_norm(c, h @ w["wdq"].T, w["q_norm.weight"]), plain_norm(c, ckv, w["kv_norm.weight"])
        q = [torch.cat((cq @ m[:d].T, turn(cq @ m[d:].T)), -1) for m in w["wuq"].chunk(H)]
        k = [torch.cat((ckv @ m.T, turn(shared)), -1) for m in w["wuk"].chunk(H)]
        v = [ckv @ m.T for m in w["wuv"].chunk(H)]
    else:
        q, k = ([turn(h @ m.T) for m in w[name].split(d)] for name in ("wq", "wk"))
        v = [h @ m.T for m in w["wv"].split(2 * d if c.differential else d)]
        k, v = ([t for t in some for _ in range(H // c.n_kv_head)] for some in (k, v))
    logits = [(a @ b.mT / a.shape[-1] ** 0.5).masked_fill(~mask, -math.inf) for a, b in zip(q, k)]
    maps = [each.softmax(-1) for each in logits]
    if c.differential:
        start = 0.8 - 0.6 * math.exp(-0.3 * i)
        lam = (w["lq1"] @ w["lk1"]).exp() - (w["lq2"] @ w["lk2"]).exp() + start
        heads = [(first - lam * second) @ t for first, second, t in zip(maps[::2], maps[1::2], v)]
        heads = [(1 - start) * plain_norm(c, t, w["head_norm.weight"], 1e-5) for t in heads]
    else:
        heads = [a @ t for a, t in zip(maps, v)]
    return torch.cat(heads, -1) @ w["wo"].T, torch.stack([each.detach().max() for each in logits])


def plain_feed_forward(c, w, h):
    z = h @ w["gate" if c.gated else "up"].T
    if c.act == "polynorm":
        a = w["act.bias"] + sum(by * plain_norm(c, z ** p, 1.0) for by, p in zip(w["act.weight"], (3, 2, 1)))
    else:
        a = z * z.sigmoid() if c.act == "silu" else z * (1 + torch.erf(z / 2 ** 0.5)) / 2
    return (a * (h @ w["up"].T) if c.gated else a) @ w["down"].T


def plain_mixture(c, w, h):
    """Every expert on every token, routed one token at a time. → (B, T, C), balance loss, load (E,)"""
    E, k, per = c.n_expert, c.n_active, c.n_expert // c.n_group
    best = lambda values, n, among: sorted(among, key=lambda i: -values[i])[:n]
    s = (h @ w["router"].T).sigmoid()                                                       # (B, T, E)
    chosen, top = torch.zeros_like(s), torch.zeros_like(s)
    for b, t in itertools.product(range(s.shape[0]), range(s.shape[1])):
        biased = (s[b, t] + w["bias"]).tolist()
        groups = [sum(sorted(biased[g * per:(g + 1) * per])[-2:]) for g in range(c.n_group)]
        kept = best(groups, c.top_group, range(c.n_group))
        chosen[b, t, best(biased, k, [i for i in range(E) if i // per in kept])] = 1.0
        top[b, t, best(s[b, t].tolist(), k, range(E))] = 1.0
    weight = c.route_scale * s * chosen / (s * chosen).sum(-1, keepdim=True)
    y = plain_feed_forward(c, inside(w, "shared."), h)
    for e in range(E):
        y = y + weight[..., e:e + 1] * plain_feed_forward(c, {n: w[n][e] for n in ("gate", "up", "down")}, h)
    f, p = top.mean(1) * E / k, (s / s.sum(-1, keepdim=True)).mean(1)                       # (B, E)
    return y, (f * p).sum(-1).mean(), chosen.sum((0, 1))


def plain_forward(c, weights, x, y, doc_start=None):
    """→ nats of each token (B, T), balance loss, {layer: largest logits (H,)}, {layer: load (E,)}"""
    t, h, balance, peaks, loads = torch.arange(x.shape[1]), weights["embed"][x], 0.0, {}, {}
    mask = t[:, None] >= t if doc_start is None else (t[:, None] >= t) & (t >= doc_start[..., None])
    h = h + weights["position"][t] if c.position == "learned" else h
    for i in range(c.n_layer):
        attention, ffn = inside(weights, f"layers.{i}.attention."), inside(weights, f"layers.{i}.ffn.")
        change, peaks[i] = plain_attention(c, i, attention, plain_norm(c, h, attention["norm.weight"]), mask)
        h = h + change
        normed = plain_norm(c, h, ffn["norm.weight"])
        if "router" in ffn:
            change, extra, loads[i] = plain_mixture(c, ffn, normed)
            balance = balance + c.balance_loss * extra
        else:
            change = plain_feed_forward(c, ffn, normed)
        h = h + change
    logits = plain_norm(c, h, weights["norm.weight"]) @ weights["embed" if c.tie else "head"].T
    return logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0], balance, peaks, loads


def plain_update(o, name, w, g, state, lr):
    """Muon for hidden matrices and each expert, AdamW for all else; decoupled weight decay.  → the new w"""
    decay = o.weight_decay if w.ndim > 1 or o.name == "muonclip" and "norm.weight" in name else 0.0
    if o.name == "muonclip" and w.ndim > 1 and "layers." in name:
        m = state[name] = o.momentum * state.get(name, 0.0) + g
        x = g + o.momentum * m if o.nesterov else m
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-30)
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
        change = 0.2 * max(w.shape[-2:]) ** 0.5 * x
    else:
        m, v, n = state.get(name, (0.0, 0.0, 0))
        m, v, n = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g.square(), n + 1
        state[name] = m, v, n
        change = m / (1 - 0.9 ** n) / ((v / (1 - 0.95 ** n)).sqrt() + 1e-8)
    return w - lr * (change + decay * w)


def plain_clip_(c, w, peaks, tau):
    """QK-Clip: a head with S > τ shrinks by γ = τ/S, split as √γ on queries and keys, or all of γ on the
    queries if other heads share the key.  → heads clipped"""
    for n in (peaks > tau).nonzero().flatten().tolist():
        gamma, rows = tau / peaks[n], lambda name: w[name].chunk(c.n_head)[n]
        rows("wuq" if c.kv_rank else "wq").mul_(gamma if c.n_kv_head < c.n_head else gamma.sqrt())
        if c.kv_rank:
            rows("wuq")[c.d_head:] *= gamma.sqrt()         # again, since all heads share the rotary key
        if c.n_kv_head == c.n_head:
            rows("wuk" if c.kv_rank else "wk").mul_(gamma.sqrt())
    return (peaks > tau).sum().item()


def plain_run(config, weights, batches):
    """Twelve steps from `weights`, parameters and buffers by name; yields each step's row and new weights."""
    c, o, state, mean = config.model, config.optim, {}, {}
    for step in range(12):
        batch = batches(step)
        trained = {name: w for name, w in weights.items() if not name.endswith("ffn.bias")}
        nll, balance, peaks, loads = plain_forward(c, weights, *batch[:3])
        gradient = torch.autograd.grad(nll.mean() + balance, list(trained.values()))
        norm = torch.cat([g.flatten() for g in gradient]).norm().item()
        scale = o.clip_norm / (norm + 1e-6) if norm > o.clip_norm else 1.0
        u = max(0.0, (step - 6) / 6)                       # 3 steps of warm-up, 3 of plateau, then decay
        decay = dict(linear=1 - (1 - o.floor) * u, rsqrt=(1 + (o.floor ** -2 - 1) * u) ** -0.5,
                     cosine=o.floor + (1 - o.floor) * (1 + math.cos(math.pi * u)) / 2)
        lr = o.lr * ((step + 1) / 4 if step < 3 else decay[o.decay])
        row = dict(lr=lr, loss=nll.mean().item(), grad_norm=norm)
        with torch.no_grad():
            for (name, w), g in zip(trained.items(), gradient):
                weights[name] = plain_update(o, name, w, scale * g, state, lr)
            row["clipped"] = sum(plain_clip_(c, inside(weights, f"layers.{i}.attention."), largest, o.tau)
                                 for i, largest in peaks.items())
            for i, load in loads.items():
                weights[f"layers.{i}.ffn.bias"] += c.balance_rate * (load.mean() - load).sign()
            if step in (4, 6, 8, 10):                      # two snapshots in each period of four steps
                mean = {name: mean.get(name, 0.0) + w / 2 for name, w in weights.items()}
            if step in (6, 10):
                weights, mean = {name: w.clone() for name, w in mean.items()}, {}
                state = {} if config.average_reset else state
        row |= {"max_logit": max(p.max().item() for p in peaks.values())} if o.exact_logits else {}
        row |= {"load": max((load.max() / load.mean()).item() for load in loads.values())} if loads else {}
        for d, name in enumerate("ab"):
            mine = nll.detach()[batch.domain == d]
            row |= {f"loss_{name}": mine.mean().item(), f"share_{name}": len(mine) / 6} if len(mine) else {}
        yield row, {name: w.clone() for name, w in weights.items()}
        weights = {name: w.requires_grad_(name in trained) for name, w in weights.items()}


OWN = replace(TINY, n_layer=2, d_model=16, d_head=4, d_ff=24, vocab_size=261, context=16, zero_out=False,
              init_std=0.4)
BLOCKS = dict(
    motif=OWN,
    gpt2=replace(OWN, differential=False, n_kv_head=2, act="gelu", gated=False, norm="layer", tie=False,
                 position="learned"),
    k2=replace(OWN, differential=False, act="silu", q_rank=6, kv_rank=5, d_rope=2, d_value=3, n_expert=12,
               n_layer=3, n_dense=1, n_active=3, d_expert=6, n_group=4, top_group=2, route_scale=1.7,
               tie=False, balance_loss=0.3, balance_rate=0.02))


def run_to_follow(folder, block, optim, **changes):
    """Twelve steps on two domains, in micro-batches of 4 and 2 windows, with everything that happens in a
    run: warm-up and decay, clipped gradients, clipped heads, two averages put back."""
    for name in "ab":
        lines = (json.dumps(dict(text=f"{name}{i * i} is {name * (i % 9)}")) for i in range(300))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    own = data.DataConfig(domains="a:0.8:0.2,b:0.2:0.8", files=f"a={folder}/a.jsonl,b={folder}/b.jsonl",
                          tokenizer="bytes", cache=str(folder), horizon=12 * 6 * 16)
    optim = dict(lr=0.05, warmup=0.25, decay_start=0.5, tau=2.0, clip_norm=2.0) | optim
    config = train.Config(model=BLOCKS[block], optim=muonclip.OptimConfig(**optim), data=own, seed=3, batch=6,
                          tokens=12 * 6 * 16, micro=4, eval_windows=5, average_every=4 * 6 * 16, average_of=2,
                          average_from=0.25)
    return replace(config, **changes)


def follow_the_definition(config, rank=0):
    """Train, and assert that the log and this rank's weights after each step match plain_run."""
    seen = []
    history, _ = train.train(config, quiet=True, watch=lambda _, network: seen.append(
        {name: w.clone() for name, w in network.state_dict().items()}))
    batches = data.Batches(data.prepare(config.data, 261), config.data, 3, 6, 16)
    network = net.Transformer(config.model, seed=3)
    run = plain_run(config, network.state_dict(keep_vars=True), batches)
    for (row, weights), ours, found in zip(run, history[1:], seen, strict=True):
        for key, value in row.items():
            assert ours[key] == pytest.approx(value, rel=1e-9), f"step {ours['step']}: {key}"
        for name, w in weights.items():
            first = rank * len(found[name]) % len(w) if w.ndim == 3 else 0         # this rank's first expert
            here = w[first:first + len(found[name])] if w.ndim == 3 else w
            msg = f"step {ours['step']}: {name}"
            torch.testing.assert_close(found[name], here, rtol=0, atol=1e-9, msg=msg)
    norms, clipped = ([row[key] for row in history[1:]] for key in ("grad_norm", "clipped"))
    assert min(norms) < 2 < max(norms) and 0 < sum(clipped) < 12 * 8, "both clips act, but not everywhere"
    for name in "ab":
        nll, *_ = plain_forward(config.model, weights, *batches.val(name, 5)[:3])
        assert history[-1][f"val_{name}"] == pytest.approx(nll.mean().item(), rel=1e-9)


@pytest.mark.parametrize("block, optim, reset, documents", [
    ("motif", dict(exact_logits=True), False, False), ("motif", dict(nesterov=False), True, False),
    ("k2", dict(decay="cosine"), False, True), ("k2", dict(name="adamw", decay="rsqrt"), True, False),
    ("gpt2", dict(name="adamw", exact_logits=True), False, True)])
def test_a_run_matches_its_definition_step_by_step(block, optim, reset, documents, tmp_path, float64):
    """Up to float64 rounding, for Motif's, Kimi K2's and GPT-2's blocks, with each optimizer."""
    config = run_to_follow(tmp_path, block, optim, average_reset=reset)
    follow_the_definition(replace(config, data=replace(config.data, doc_mask=documents)))


def two_ranks_follow(rank, folder):
    torch.set_default_dtype(torch.float64)
    for block, ep in (("motif", 1), ("k2", 1), ("k2", 2)):
        mesh, own = parallel.MeshConfig(ep=ep, timeout=30), Path(folder) / str(rank)
        own.mkdir(exist_ok=True)
        follow_the_definition(run_to_follow(own, block, {}, mesh=mesh, micro=2, average_reset=True), rank)
        next_port()


def test_a_run_of_two_ranks_matches_the_same_definition(tmp_path):
    """Three windows per rank in micro-batches of 2 and 1; all experts on both ranks, and half on each."""
    spawn(2, two_ranks_follow, str(tmp_path))


def test_bits_are_counted_per_byte_and_nats_per_token(text):
    """With tokens of several bytes, and windows that do not fill their last micro-batch."""
    own = replace(tiny_run(text).data, tokenizer="bpe")
    model = replace(tiny_run(text).model, vocab_size=300)
    config = tiny_run(text, data=own, model=model, steps=1, eval_windows=6)
    history, network = train.train(config, quiet=True)
    corpus = data.prepare(own, 300)
    x, y, *_ = data.Batches(corpus, own, 0, 8, 32).val("mine", 6)
    with torch.no_grad():
        nats = network.eval()(x, y)[1].sum().item()
    size = len(corpus.tokenizer.decode(y.flatten().tolist()).encode())
    assert history[-1]["val_mine"] == pytest.approx(nats / y.numel(), rel=1e-5)
    assert history[-1]["bpb_mine"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert size > 1.2 * y.numel()


def test_accumulated_gradients_match_the_whole_batch(text, float64):
    config = tiny_run(text)
    batch = data.Batches(data.prepare(config.data, 261), config.data, 0, 8, 32)(0)
    nats, networks = [], []
    even = torch.full(batch.x.shape, 1 / batch.x.numel())          # the mean, as a weighted sum
    for micro, weight in ((8, None), (3, None), (1, None), (8, even), (3, even)):
        networks.append(lively(config.model))
        nats.append(forward_backward(networks[-1], batch._replace(weight=weight), micro))
        for a, b in zip(networks[-1].parameters(), networks[0].parameters()):
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(nats[-1], nats[0])
    a, b = (list(n.attentions().values())[0].max_logits for n in (networks[0], networks[-1]))
    torch.testing.assert_close(a, b)                               # the maximum over micro-batches


def test_a_nonfinite_loss_stops_the_run_before_the_update(text, tmp_path):
    """The learning rate blows up the weights; the error names the step and the last good checkpoint."""
    out = tmp_path / "run"
    config = tiny_run(text, optim=muonclip.OptimConfig(name="adamw", lr=1e30), out=str(out), save_every=5)
    expected = r"^step \d+: .*the last good checkpoint is .*step-00000000$"
    with pytest.raises(FloatingPointError, match=expected) as error:
        train.train(config, quiet=True)
    step = int(re.match(r"step (\d+)", str(error.value))[1])
    assert int(log_of(out)[-1]["step"]) == step - 1
    assert all(t.isfinite().all() for t in weights_of(out).values())


@pytest.fixture
def disk(monkeypatch):
    """Records fsyncs and renames. → {path: size at its last fsync}, [(old path, new path, the first dict as
    of then, {path: current size} of the files in it)]. A folder's size is None."""
    synced, renamed, fsync = {}, [], os.fsync
    size = lambda path: None if path.is_dir() else path.stat().st_size

    def watched_fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path] = size(path)
        fsync(handle)

    def watched(rename):
        def run(old, new):
            old, new = Path(old), Path(new)
            files = [old, *old.iterdir()] if old.is_dir() else [old]
            renamed.append((old, new, dict(synced), {path: size(path) for path in files}))
            synced.pop(new.parent, None)                           # its fsync predates the new name
            done = rename(old, new)
            if old in synced:
                synced[new] = synced.pop(old)
            return done
        return run
    monkeypatch.setattr(os, "fsync", watched_fsync)
    for module, name in itertools.product((os, Path), ("rename", "replace")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return synced, renamed


def test_what_is_renamed_is_on_the_disk_first(text, tmp_path, disk):
    """All of a checkpoint's files and their folder are synced before it gets its name, then the folder that
    holds the name; the log up to its checkpoint. Otherwise a crash could leave a name on disk without its
    contents."""
    synced, renamed = disk
    out, config = tmp_path / "run", tiny_run(text, out=str(tmp_path / "run"), steps=4, save_every=2)
    train.train(replace(config, data=replace(config.data, cache=str(tmp_path / "cache"))), quiet=True)
    saved = {new.name: (old, then, sizes) for old, new, then, sizes in renamed if new.parent == out / "ckpt"}
    assert sorted(saved) == ["step-00000000", "step-00000002", "step-00000004"] and out / "ckpt" in synced
    for name, (old, then, sizes) in saved.items():
        assert {path.name for path in sizes} == {old.name, "manifest.json", "rank-0.safetensors"}
        assert then.items() >= sizes.items()
        rows = (out / "log.csv").read_bytes()[:then[out / "log.csv"]].decode().splitlines()
        assert len(rows) >= 1 + int(name[-8:]), "a header and the rows of all steps before the checkpoint"
    others = [row for row in renamed if row[1].suffix in (".csv", ".json", ".bin")]
    assert {row[1].suffix for row in others} == {".csv", ".json", ".bin"}
    for old, new, then, sizes in others:
        assert then.items() >= sizes.items(), new


def test_damaged_checkpoints_are_reported_and_skipped(text, tmp_path):
    out, said = tmp_path / "run", []
    train.train(tiny_run(text, out=str(out), steps=8), quiet=True)
    old, new = train.checkpoints(out)
    whole = (new / "rank-0.safetensors").read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], None):
        if damage is None:
            (new / "rank-0.safetensors").unlink()
        else:
            (new / "rank-0.safetensors").write_bytes(damage)
        said.clear()
        assert train.newest_checkpoint(out, said.append)[0]["step"] == 4
        assert len(said) == 1 and "step-00000008" in said[0]
    train.train(tiny_run(text, out=str(out), steps=8), resume=True, quiet=True)
    assert [p.name for p in train.checkpoints(out)] == ["step-00000004", "step-00000008"], "saved anew"
    manifest = (new / "manifest.json").read_text()
    (new / "manifest.json").write_text(manifest.replace('"step": 8', '"step": 9'))
    assert train.newest_checkpoint(out, said.append)[0]["step"] == 4 and "not what was written" in said[-1]
    (new / "manifest.json").write_bytes(b"\xff{")
    assert train.parse(["--resume", f"--out={out}"])[0].batch == 8
    rewritten(old, lambda manifest: [entry.update(file="../../elsewhere")
                                     for entry in manifest["tensors"].values()])
    assert train.newest_checkpoint(out, said.append) is None and "outside" in said[-1]
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        train.train(tiny_run(text, out=str(out)), resume=True, quiet=True)


def test_rows_of_a_checkpoint_are_assembled_from_any_cut(tmp_path):
    """All row ranges of a tensor and its state, each stored in three pieces; a scalar, which has no rows."""
    whole, state = torch.randn(9, 2), torch.randn(9)
    cuts = {f"[{a}:{b}]": slice(a, b) for a, b in ((0, 3), (3, 4), (4, 9))}
    kept = {f"w{at}{what}": t[part] for at, part in cuts.items() for what, t in (("", whole), (":m", state))}
    train.save_checkpoint(tmp_path, 1, kept | {"w:step": torch.tensor(7)}, {}, 1)
    saved = train.newest_checkpoint(tmp_path)[1]
    assert sorted(saved) == ["w", "w:m", "w:step"] and torch.equal(saved["w"], whole) and saved["w:step"] == 7
    for start, stop in itertools.combinations(range(10), 2):
        assert torch.equal(saved.rows("w", start, stop), whole[start:stop])
        assert torch.equal(saved.rows("w:m", start, stop), state[start:stop])
    with pytest.raises(ValueError, match="no rows 5 to 11 of w"):
        saved.rows("w", 5, 11)


def test_a_resumed_log_equals_that_of_an_uninterrupted_run(text, tmp_path):
    """Each step has one row: rows logged after the checkpoint are dropped, since those steps run again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(tiny_run(text, out=str(whole), steps=9), quiet=True)
    train.train(tiny_run(text, out=str(parts), steps=6), quiet=True)
    shutil.rmtree(train.checkpoints(parts)[-1])
    train.train(tiny_run(text, out=str(parts), steps=9), resume=True, quiet=True)
    assert log_of(parts) == log_of(whole) and len(log_of(whole)) == 10


def test_a_checkpoint_leaves_no_later_ones_behind(text, tmp_path):
    """Later ones are damaged or from a run that went further; the newest must be the one to resume from."""
    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=12), quiet=True)
    last = train.checkpoints(out)[-1] / "rank-0.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    train.train(tiny_run(text, out=str(out), steps=9), resume=True, quiet=True)
    assert [folder.name for folder in train.checkpoints(out)] == ["step-00000008", "step-00000009"]


def test_a_nonfinite_step_is_skipped_whole(text):
    """If the loss is NaN, no weight moves, be it by update, clip or average, and the run continues."""
    seen = {}

    def watch(step, network):
        seen[step] = {name: w.clone() for name, w in network.state_dict().items()}
        with torch.no_grad():
            network.embed[:] = torch.nan if step == 3 else seen[3]["embed"] if step == 4 else network.embed
    config = tiny_run(text, steps=5, skip_nonfinite=True, **PERIOD)        # a snapshot is due in the bad step
    history, _ = train.train(config, quiet=True, watch=watch)
    assert [row["skipped"] for row in history[1:]] == [0, 0, 0, 1, 1] and math.isnan(history[4]["loss"])
    for name, w in seen[4].items():
        assert name == "embed" or torch.equal(w, seen[3][name]), name
        assert seen[5][name].isfinite().all() and not torch.equal(seen[5][name], seen[3][name]), name


def rewritten(folder, change):
    """Apply `change` to a checkpoint's manifest and update its digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest | dict(sha256=train.digest(manifest))))


def test_nothing_in_a_damaged_manifest_is_used(text, tmp_path):
    """Not even its configuration: the run continues with that of the checkpoint it loads. It stops at an
    option that this version lacks, or if the configuration differs from that of the checkpoint."""
    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=8), quiet=True)
    old, new = train.checkpoints(out)
    manifest = (new / "manifest.json").read_text()
    assert '"lr": 0.02' in manifest
    (new / "manifest.json").write_text(manifest.replace('"lr": 0.02', '"lr": 0.82'))
    config = train.parse(["--resume", f"--out={out}", "--steps=9"])[0]
    assert config.optim.lr == 0.02 and train.kept_config(out).optim.lr == 0.02
    train.train(config, resume=True, quiet=True)
    manifests = [train.read_manifest(folder) for folder in train.checkpoints(out)]
    assert all(manifest["config"]["optim"]["lr"] == 0.02 for manifest in manifests)

    newest = train.checkpoints(out)[-1]
    rewritten(newest, lambda manifest: manifest["config"].update(warp=9))
    with pytest.raises(ValueError, match="an option that is no more: warp=9"):
        train.parse(["--resume", f"--out={out}"])
    rewritten(newest, lambda manifest: manifest["config"].pop("warp"))
    rewritten(newest, lambda manifest: manifest["config"]["optim"].update(lr=0.5))
    with pytest.raises(ValueError, match="step 9 .* was made with optim.lr=0.5, not 0.02"):
        train.train(config, resume=True, quiet=True)


def test_skipped_steps_and_seconds_are_kept_in_the_checkpoint(text, tmp_path, monkeypatch):
    """So they survive even if the row that reports them was never logged."""
    out, calls, build = tmp_path / "run", itertools.count(), train.build

    def unwell(*args):
        chunks = build(*args)
        chunks[0].embed.register_hook(lambda g: g * torch.nan if next(calls) == 6 else g)    # step 4
        return chunks
    monkeypatch.setattr(train, "build", unwell)

    def power_cut(step, _):
        if step == 5:
            raise KeyboardInterrupt
    config = tiny_run(text, out=str(out), log_every=3, save_every=1, skip_nonfinite=True)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, quiet=True, watch=power_cut)
    assert log_of(out)[-1]["step"] == "3" and log_of(out)[-1]["skipped"] == "0"
    before = train.read_manifest(train.checkpoints(out)[-1])
    history, _ = train.train(replace(config, steps=6), resume=True, quiet=True)
    assert history[-1]["skipped"] == 1
    assert history[-1]["seconds"] > before["seconds"] > history[-2]["seconds"]


def test_an_evaluation_follows_the_save_and_can_be_stopped(text, tmp_path, monkeypatch):
    """A failure or a stop during evaluation or plotting loses no step, and the row that it skipped is there
    in the end, as in an uninterrupted run."""
    config = tiny_run(text, save_every=100, eval_every=5, steps=10)
    train.train(replace(config, out=str(tmp_path / "whole")), quiet=True)
    whole, evaluate = log_of(tmp_path / "whole"), train.evaluate

    def crash(*args):
        raise KeyError("a fault in an evaluation")

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    for name, fault in (("crash", crash), ("stop", stopped)):
        for step in (0, 5, 10) if name == "stop" else (5,):
            out = tmp_path / f"{name}-{step}"
            left = itertools.count(-step // 5)
            strike = lambda *args: fault(*args) if next(left) == 0 else evaluate(*args)
            monkeypatch.setattr(train, "evaluate", strike)
            with pytest.raises(KeyError) if name == "crash" else contextlib.nullcontext():
                train.train(replace(config, out=str(out), save_every=5), quiet=True)
            saved = train.read_manifest(train.checkpoints(out)[-1])
            assert len(log_of(out)) == step and saved["step"] == step
            train.train(replace(config, out=str(out), save_every=5), resume=True, quiet=True)
            assert log_of(out) == whole and log_of(out)[-1]["val_mine"]

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(_figure, "draw", crash)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train.train(replace(config, out=str(tmp_path / "undrawn")))
    assert "loss.png was not drawn: KeyError" in said.getvalue() and log_of(tmp_path / "undrawn") == whole
    assert "max logit nan" not in said.getvalue()


def test_only_folders_named_step_and_digits_are_checkpoints(text, tmp_path):
    """Copies that somebody made before or during a run are not read, counted or removed."""
    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=4, keep=1), quiet=True)
    names = "step-00000004.bak", "step-00000004 (copy)", "step-9x", "step-", "step-00000099.tmp"
    for name in names:
        shutil.copytree(train.checkpoints(out)[-1], out / "ckpt" / name)
    (out / "ckpt/step-00000077").write_text("a file")
    train.train(tiny_run(text, out=str(out), steps=8, keep=1), resume=True, quiet=True)
    assert [p.name for p in train.checkpoints(out)] == ["step-00000008"] and train.load_run(out)
    assert all((out / "ckpt" / name / "manifest.json").exists() for name in names)


@pytest.mark.parametrize("damage", [None, b"\xff\xfe\0", b"step,seconds\n1,x\n2\n"])
def test_a_run_continues_without_its_log(text, tmp_path, damage, capsys):
    """A deleted log starts over, an unreadable one is set aside under another name; the final report does
    without the earlier rows."""
    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=8, tokens=12 * 8 * 32), quiet=True)
    (out / "log.csv").unlink()
    if damage is not None:
        (out / "log.csv").write_bytes(damage)
    options = command(text, out, "--resume", tokens=12 * 8 * 32)[2:]
    train.main([*options, "--data.cache=" + str(text.parent / "cache")])
    said = capsys.readouterr().out
    assert len(list(out.glob("log.unreadable-*"))) == bool(damage) == ("cannot be read" in said)
    assert [row["step"] for row in log_of(out)] == ["8", "9", "10", "11", "12"] and "bits/byte" in said


def test_the_mesh_belongs_to_the_launch(text, tmp_path, monkeypatch):
    """A run of two ranks resumes on one process without any option; RANK alone does not mean several."""
    out = tmp_path / "run"
    config = tiny_run(text, out=str(out), steps=4, model=replace(K2, vocab_size=261, tie=False, context=32))
    train.train(config, quiet=True)
    rewritten(train.checkpoints(out)[-1], lambda manifest: manifest["config"]["mesh"].update(ep=2))
    assert train.parse(["--resume", f"--out={out}"])[0].mesh.ep == 1
    assert train.parse(["--resume", f"--out={out}", "--mesh.ep=2"])[0].mesh.ep == 2
    monkeypatch.setenv("RANK", "3")
    train.train(replace(config, steps=5), resume=True, quiet=True)
    assert log_of(out)[-1]["step"] == "5" and (out / "lock").read_text() == str(os.getpid())


def test_frozen_parameters_stay_as_they_are(text, tmp_path, monkeypatch):
    """They are not updated, decayed, clipped or averaged, while the others are; and the run resumes."""
    build = train.build

    def frozen(*args):
        chunks = build(*args)
        for name, p in chunks[0].named_parameters():
            p.requires_grad_("layers.0" not in name and name != "embed")
        return chunks
    monkeypatch.setattr(train, "build", frozen)
    out = tmp_path / "run"
    config = tiny_run(text, out=str(out), steps=10, **PERIOD)
    train.train(config, quiet=True)
    first, kept = net.Transformer(config.model).state_dict(), weights_of(out)
    for name, t in first.items():
        assert torch.equal(kept[name], t) == ("layers.0" in name or name == "embed"), name
    train.train(replace(config, steps=12), resume=True, quiet=True)
    assert not any(name.startswith(("embed:", "layers.0")) and ":" in name for name in weights_of(out))


def test_a_refused_run_releases_its_folder(text, tmp_path):
    """The lock is released after any failure before the ranks meet, even for the same process."""
    config = tiny_run(text, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="cannot read"):
        train.train(replace(config, data=replace(config.data, files="mine=/nowhere")), quiet=True)
    train.RunFolder(config.out).close()


def test_training_leaves_the_matplotlib_backend_of_its_caller_alone(text, tmp_path):
    import matplotlib
    matplotlib.use("svg")
    train.train(tiny_run(text, out=str(tmp_path / "run"), steps=2, eval_every=1), quiet=True)
    assert matplotlib.get_backend() == "svg" and (tmp_path / "run/loss.png").stat().st_size > 10_000
    matplotlib.use("agg")


def test_torchrun_shows_help_and_the_error_last_and_restarts_only_its_own_run(text, tmp_path):
    """--help exits with success. A user error is the root cause that torchrun prints last, and an existing
    run is as safe from a restarted attempt as from the first."""
    def torchrun(*words):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", *words], capture_output=True,
            text=True, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1", TORCHELASTIC_ERROR_FILE=""))
    said = torchrun("--nproc-per-node=2", str(HERE / "train.py"), "--help")
    assert said.returncode == 0 and said.stdout.count("torchrun train.py [RECIPE]") == 1

    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=4), quiet=True)
    before = (out / "log.csv").read_bytes(), sorted(p.name for p in out.iterdir())
    said = torchrun("--max-restarts=1", *command(text, out)[1:])
    assert said.returncode == 1
    assert said.stderr.count("holds a run already") >= 3, "from both attempts, and once more at the end"
    assert f"train.py: --out={out} holds a run already" in "".join(said.stderr.splitlines()[-2:])
    assert before == ((out / "log.csv").read_bytes(), sorted(p.name for p in out.iterdir()))


def test_a_torn_log_is_repaired(text, tmp_path):
    out = tmp_path / "run"
    train.train(tiny_run(text, out=str(out), steps=6, save_every=6), quiet=True)
    rows = log_of(out)
    torn = (out / "log.csv").read_text()[:-30]
    (out / "log.csv").write_text(torn + "\n1")
    history, _ = train.train(tiny_run(text, out=str(out), steps=8, save_every=6), resume=True, quiet=True)
    assert log_of(out)[:6] == rows[:6] and log_of(out)[-1]["step"] == "8" and history[-1]["step"] == 8


def test_a_run_folder_has_one_writer(text, tmp_path):
    folder = train.RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="in use by process"):
        train.RunFolder(tmp_path / "run")
    folder.close()
    train.RunFolder(tmp_path / "run").close()


def test_resuming_refuses_another_architecture_or_configuration(text, tmp_path):
    out = tmp_path / "run"
    config = tiny_run(text, out=str(out), steps=4)
    train.train(config, quiet=True)
    with pytest.raises(ValueError, match=r"another architecture: .*\(261, 32\) for \(261, 16\)"):
        train.train(replace(config, model=replace(config.model, d_model=16)), resume=True, quiet=True)
    words = ["--resume", f"--out={out}"]
    assert train.parse(words)[0].data.cache == "cache", "the cache path does not come from the run"
    words += [f"--data.cache={config.data.cache}"]
    assert train.parse(words)[0] == replace(config, steps=0, mesh=parallel.MeshConfig())
    assert train.parse([*words, "--steps=7", "--mesh.timeout=9"])[0].steps == 7
    for bad, message in (("--optim.lr=1", "optim.lr=0.02, not 1.0"), ("--batch=4", "batch=8, not 4"),
                         ("gpt2", "a run of laptop")):
        with pytest.raises(ValueError, match=message):
            train.parse([*words, bad])
    text.with_name("other.txt").write_text(text.read_text()[:-50])
    moved = replace(config, data=replace(config.data, files=f"mine={text.with_name('other.txt')}"))
    with pytest.raises(ValueError, match="another data"):
        train.train(moved, resume=True, quiet=True)


@pytest.mark.parametrize("words, message", [
    (["--optim.rate=1"], "no option --optim.rate; have name, lr"),
    (["motiv"], "no recipe 'motiv'; have laptop, gpt2"),
    (["--optim.lr=fast"], "--optim.lr=fast: must be a number"),
    (["--batch=2.5"], "--batch=2.5: must be a whole number"), (["--model.tie=1"], "must be true or false"),
    (["--model=3"], "name a field"), (["--batch"], "--batch=VALUE"),
    (["--model.act=tanh"], "have polynorm, silu, gelu, relu2"), (["--tokens=100"], "less than one step"),
    (["--model.n_head=3"], "not a multiple"), (["--optim.lr=-1"], "must be positive"),
    (["--seed.x=1"], "no fields"), (["--resume", "--out=/nowhere/at/all"], "there is no run"),
    (["--mesh.timeout=0"], "positive"),
])
def test_bad_options_are_refused_in_one_line(words, message):
    with pytest.raises(ValueError) as error:
        train.parse(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_batch_that_ranks_cannot_share_is_refused(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch=8 .* 3 ranks"):
        train.train(tiny_run(text, out="never-made"), quiet=True)
    assert not Path("never-made").exists()


def test_options_are_checked_together():
    config = train.parse(["--model.n_head=2", "--model.n_kv_head=2", "--batch=8000", "--tokens=1e9"])[0]
    assert (config.model.n_head, config.model.n_kv_head, config.batch, config.tokens) == (2, 2, 8000, 10 ** 9)


def test_bfloat16_trains_float32_weights(text):
    """As on a GPU: computation is bfloat16; gradients are float32 and close to those of a float32
    computation. Less close with experts: rounding the activations before a router sends some tokens to other
    experts."""
    for config in VARIANTS.values():
        near = 0.85 if config.n_expert else 0.97
        torch.manual_seed(0)                                       # the same inputs for every variant
        networks, x = [lively(config), lively(config)], tokens(2, 16)
        for network, dtype in zip(networks, (None, torch.bfloat16)):
            network(x, x, dtype=dtype)[0].backward()
        for (name, a), b in zip(networks[0].named_parameters(), networks[1].parameters()):
            assert b.grad.dtype == torch.float32
            if a.ndim == 2 and a.grad.norm() > 1e-3:
                cosine = torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0)
                assert cosine > near, (name, cosine)


def test_learning_rates_match_both_reports():
    optim = muonclip.OptimConfig(lr=5e-4, warmup=0.008, decay="rsqrt", decay_start=0.8, floor=0.25)
    motif = replace(train.Config(), model=net.PRESETS["motif-2.6b"], batch=1024, tokens=2_500_000_000_000,
                    optim=optim)
    lr = lambda part, config: train.learning_rate(round(part * config.tokens), config)
    assert [lr(p, motif) for p in (0.008, 0.5, 0.8)] == pytest.approx([5e-4] * 3, rel=1e-3)
    assert lr(0.004, motif) == pytest.approx(2.5e-4, rel=1e-3)
    assert lr(1.0, motif) == pytest.approx(1.25e-4)
    assert lr(0.9, motif) == pytest.approx(5e-4 * 0.343, rel=1e-3)
    k2 = replace(motif, optim=muonclip.OptimConfig(lr=2e-4, decay="cosine", decay_start=10 / 15.5, floor=0.1))
    assert lr(10 / 15.5, k2) == pytest.approx(2e-4) and lr(1.0, k2) == pytest.approx(2e-5)
    assert lr(12.75 / 15.5, k2) == pytest.approx(1.1e-4)
    line = replace(k2, optim=muonclip.OptimConfig(lr=1.0, floor=0.0, decay_start=0.5))
    assert [lr(p, line) for p in (0.25, 0.75, 1.0)] == pytest.approx([1, 0.5, 0])


# Any input gives a result or one line, never a traceback.  (pip install hypothesis; skipped without it)

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, given, settings, strategies as st

    many = int(os.environ.get("INPUTS", 0))                        # INPUTS=2000 pytest test_all.py -k any_
    anything = settings(max_examples=many or 60, deadline=None, derandomize=not many, database=None,
                        suppress_health_check=[HealthCheck.function_scoped_fixture])
    words = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
    junk = words | st.integers().map(str) | st.sampled_from(
        ["", "0", "-1", "1e9", "nan", "inf", "true", "1e400", "0.5", "a:1:1", "a=b", "\0", "adamw", "rope"])
    keys = st.sampled_from("batch tokens steps out nonsense model resume compile model.n_head model.act "
                           "optim.lr optim.ns model.rope_theta optim.tau data.domains data.files "
                           "data.skip_bad mesh.timeout average_every average_from --".split(" ") + [""])
    trees = st.recursive(st.none() | st.integers() | st.text(max_size=3),
                         lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("text"), inner),
                         max_leaves=4)

    def one_line(error):
        assert str(error) and "\n" not in str(error), error

    @anything
    @given(st.lists(st.tuples(keys, junk), max_size=3),
           st.lists(st.sampled_from(["laptop", "gpt2", "x"]), max_size=2))
    def test_any_options_give_a_configuration_or_a_one_line_error(options, words):
        try:
            config, *_ = train.parse([*words, *(f"--{key}={text}" for key, text in options)])
            with contextlib.redirect_stdout(io.StringIO()):
                data.parse_domains(config.data)
                shallow = replace(config.model, n_layer=min(4, config.model.n_layer))
                train.dry_run(replace(config, model=shallow))
        except ValueError as error:
            one_line(error)

    OWN_OPTIONS = dict(train=keys, muonclip=st.sampled_from(["quick", "plot"]),
                       faults=st.sampled_from(["quick"]),
                       model=st.sampled_from("prompt temperature top-p seed average export".split()),
                       data=st.sampled_from(
                           "vocab files domains skip_bad doc_mask tokenizer horizon".split()))

    def run_script(script, words, run, text):
        """Run a script's main in this process, with a second of work at most."""
        if script == "train":
            train.main([*words, "--dry-run"])
        elif script == "muonclip":
            muonclip.main([*words, "--nonsense"])
        elif script == "model":
            net.main([*words, f"--sample={run}", "--tokens=2"])
        elif script == "data":
            data.main(["stats", f"--files=mine={text}", "--tokenizer=bytes", f"--cache={run.parent}/cache",
                       *words])
        else:
            _note.main("faults", faults.cells, faults.run, faults.show, [*words, "--nonsense"])

    @anything
    @given(st.data(), st.sampled_from(list(OWN_OPTIONS)))
    def test_any_command_gives_a_result_or_a_one_line_error(text, finished, tmp_path, monkeypatch, choose,
                                                            script):
        """Options of the script with any values, and now and then a word that it does not know."""
        own = st.tuples(OWN_OPTIONS[script], junk).map(lambda pair: f"--{pair[0]}={pair[1]}")
        words, screen = choose.draw(st.lists(own, max_size=2)), io.StringIO()
        words += choose.draw(st.lists(junk, max_size=1)) if choose.draw(st.integers(0, 3)) == 0 else []
        monkeypatch.chdir(tmp_path)
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            try:
                run_script(script, words, finished[0].parent.parent, text)
            except SystemExit as leave:
                if isinstance(leave.code, str):
                    one_line(leave.code)
                else:                                              # argparse has printed usage and its error
                    assert not leave.code or leave.code == 2 and "error: " in screen.getvalue()

    @anything
    @given(st.data())
    def test_any_tokenizer_file_gives_a_tokenizer_or_a_one_line_error(tmp_path, choose):
        path = tmp_path / "tokenizer.json"
        data.Tokenizer("x", "(?s:.)", {bytes([i]): i for i in range(256)}).save(path)
        saved = json.loads(path.read_bytes())
        key = choose.draw(st.sampled_from([*saved, "huggingface", "eot", "model"]))
        saved[key] = choose.draw(trees | junk | st.lists(junk, max_size=3))
        raw = bytearray(json.dumps(saved).encode())
        if choose.draw(st.booleans()):
            raw[choose.draw(st.integers(0, len(raw) - 1))] ^= choose.draw(st.integers(1, 255))
        path.write_bytes(raw[:choose.draw(st.sampled_from([len(raw), len(raw) // 2, 0]))])
        try:
            data.load_tokenizer(path).encode("text")
        except ValueError as error:
            one_line(error)

    @anything
    @given(st.binary(max_size=200) | st.lists(st.lists(junk, max_size=4), max_size=4).map(
        lambda rows: "\n".join(map(",".join, [["step", "seconds", "loss"], *rows])).encode()))
    def test_any_log_is_continued_or_set_aside(tmp_path_factory, raw):
        path, said = tmp_path_factory.mktemp("log"), []
        (path / "log.csv").write_bytes(raw)
        folder = train.RunFolder(path)
        rows = folder.open_log(["step", "seconds", "loss"], 3, said.append)
        assert all(isinstance(value, float) for row in rows for value in row.values())
        assert "\n" not in "".join(said)
        folder.write_row(dict(step=4, seconds=1.0, loss=2.0))
        folder.close()
        assert (path / "log.csv").read_text().startswith("step,seconds,loss\n")
        shutil.rmtree(path)

    @anything
    @given(st.lists(st.binary(max_size=40) | trees.map(lambda tree: json.dumps(tree).encode()), max_size=6),
           st.booleans(), st.booleans())
    def test_any_records_give_text_or_a_one_line_error(lines, array, skip):
        raw = b"[" + b",".join(lines) + b"]" if array else b"\n".join(lines)
        for name in ("x.json" if array else "x.jsonl", "x.jsonl.gz"):        # hardly ever gzip
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, name).write_bytes(raw)
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        found = list(data.rows("x", f"{folder}/{name}", data.DataConfig(skip_bad=skip)))
                    assert found and all(row.text.strip() and row.text.encode() for row in found)
                except ValueError as error:
                    assert not skip or "is empty" in str(error) or "damaged gzip" in str(error), error
                    one_line(error)

    @anything
    @given(st.data())
    def test_any_damage_to_a_checkpoint_is_detected(text, finished, choose):
        """Cut a file, change a byte or insert bytes anywhere: the result is the same tensors or one line."""
        folder, (facts_before, before) = finished
        file = choose.draw(st.sampled_from(sorted(folder.iterdir())))
        raw = file.read_bytes()
        at = choose.draw(st.integers(0, len(raw) - 1))
        flipped = raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1:]
        file.write_bytes(choose.draw(st.sampled_from([
            raw[:at], flipped, raw[:at] + b"{" + raw[at:], raw + b"x"])))
        try:
            facts, after = train.read_checkpoint(folder)
            assert facts["step"] == 4 and facts["config"]["seed"] == 0
            assert facts["data"] == facts_before["data"]
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
        except ValueError as error:
            one_line(error)
        finally:
            file.write_bytes(raw)

    @anything
    @given(st.data())
    def test_any_damage_to_a_shard_is_repaired(damaged_cache, choose):
        config, fingerprint = damaged_cache
        files = sorted(p for p in Path(config.cache).iterdir() if p.name not in ("lock", "sources.json"))
        file = choose.draw(st.sampled_from(files))
        raw = bytearray(file.read_bytes())
        raw[choose.draw(st.integers(0, len(raw) - 1))] ^= choose.draw(st.integers(1, 255))
        file.write_bytes(raw[:choose.draw(st.integers(0, len(raw)))])
        with contextlib.redirect_stdout(io.StringIO()):
            assert data.prepare(config, 300).fingerprint == fingerprint


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A checkpoint's folder and its contents."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(tiny_run(text, out=str(out), steps=4), quiet=True)
    return train.checkpoints(out)[-1], train.newest_checkpoint(out)


@pytest.fixture(scope="module")
def damaged_cache(tmp_path_factory):
    config, _ = own(tmp_path_factory.mktemp("own"))
    return config, data.prepare(config, 300).fingerprint


def test_nothing_executes_code_it_was_given():
    for path in (*HERE.glob("*.py"), *HERE.glob("notes/*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        called = {node.func.id for node in ast.walk(tree)
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and
                isinstance(node.value, ast.Name) and node.value.id == "torch"}
        names = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                 for alias in node.names}
        assert not called & {"eval", "exec"} and not used & {"load", "save"}, path
        assert not names & {"pickle", "marshal"}, path
        assert not re.search(r"(gather|broadcast|scatter|send|recv)_object", path.read_text("utf-8")) or \
            path.name == "test_all.py", f"{path}: sends objects as pickle"


# ---- conversations: packed, learned, compared --------------------------------------------------------------

CHAT = 48                                                          # tokens of a window
CHAT_EXPERTS = replace(faults.EXPERTS, n_layer=2, n_expert=4, n_group=1, top_group=1, context=CHAT)


def turn(role, content):
    return dict(role=role, content=content)


@pytest.fixture(scope="session")
def chat_sets(tmp_path_factory):
    """A folder with conversations in all conventions, and with pairs; some are longer than half a window."""
    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(0)
    chat, pairs = [], []
    for i in range(70):
        asked, answer = f"{i}+1?", f"It is {i + 1}" + rng.choice(("!", ".", ", as you know."))
        long = [turn("user", asked), turn("assistant", answer), turn("user", "?"), turn("assistant", "Yes")]
        chat.append([dict(messages=[turn("system", "Add")] * (i % 2) + long),
                     dict(prompt=asked, completion=answer),
                     dict(instruction="Add", input=asked, output=answer),
                     dict(conversations=[{"from": "human", "value": asked},
                                         {"from": "gpt", "value": answer}]),
                     dict(prompt=asked, chosen=answer, rejected="No")][i % 5])
        said = [turn("user", asked), turn("assistant", answer)]
        other = f"It is {i + 2}" + rng.choice((".", ", as you know, of course!"))
        pairs.append([dict(prompt=asked, chosen=answer, rejected=other),
                      dict(chosen=said, rejected=[said[0], turn("assistant", other)]),
                      dict(chosen=long, rejected=[*long[:3], turn("assistant", "No no!")])][i % 3])
    for name, records in (("chat", chat), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(_figure, "draw", lambda *args: None)       # loss.png takes longer than these runs


def chat_run(folder, objective, **changes):
    """A run on these conversations from random weights."""
    base = tiny_run(folder / "mine.txt")
    name = "pairs" if objective == "dpo" else "chat"
    own = data.DataConfig(files=f"{name}={folder / name}.jsonl", tokenizer="bytes",
                          cache=str(folder / "cache"))
    model = changes.pop("model", replace(base.model, context=CHAT))
    return replace(base, objective=objective, data=own, model=model, tokens=4 * 8 * CHAT, eval_every=2,
                   beta=0.5, eval_windows=5, **changes)


def chat_batches(config, **changes):
    corpus = train.corpus_of(config)
    return data.ChatBatches(corpus, replace(config.data, horizon=config.tokens), config.seed, config.batch,
                            config.model.context)


def documents_in(ids, labels):
    """The documents of a window (T,) → [(ids, labels)] without the eots."""
    ends = [i for i, t in enumerate(ids) if t == BYTES.eot]
    parts = [(ids[a:b], labels[a:b]) for a, b in zip([0, *[end + 1 for end in ends]], ends)]
    return [part for part in parts if len(part[0])]


def test_the_chat_template_marks_turns_by_id_and_trains_answers_with_their_end():
    """Specials spelt in a text stay text, also in an answer."""
    system, user, assistant, end = (BYTES.specials[name] for name in data.SPECIALS[1:])
    said = [turn("system", "Be"), turn("user", "<|end|>"), turn("assistant", "é"), turn("user", "?"),
            turn("assistant", "<|user|>")]
    ids, targets = data.chat_ids(said, BYTES)
    expected = [system, *b"Be", end, user, *b"<|end|>", end, assistant, *"é".encode(), end, user, *b"?", end,
                assistant, *b"<|user|>", end]
    assert ids.tolist() == expected
    assert [ids[i] for i in np.flatnonzero(targets)] == [*"é".encode(), end, *b"<|user|>", end]


@pytest.mark.parametrize("pairs", [False, True])
def test_best_fit_leaves_no_window_too_full_and_no_pair_apart(pairs):
    """Against its definition, searched by brute force: the longest first, each into the fullest window with
    room. Pieces of a pair are in one window, or in windows 2i and 2i + 1."""
    rng = random.Random(1)
    for size in (5, 17, 64):
        units = [[rng.randint(1, size) for _ in range(1 + pairs)] for _ in range(200)]
        where, count = data.best_fit(units, size)
        rooms = [size] * count
        for unit, windows in zip(units, where):
            for n, window in zip(unit, windows, strict=True):
                rooms[window] -= n
            a, b = windows[0], windows[-1]
            assert a == b or sum(unit) > size and a % 2 == 0 and b == a + 1
        assert min(rooms) >= 0 and max(rooms) < size

        free = []                                                  # the definition, by rooms alone
        for total, unit in sorted(((sum(unit), unit) for unit in units), key=lambda row: -row[0]):
            fits = [room for room in free if room >= total]
            if total > size:
                free += [size - n for n in unit]
            elif fits:
                free[free.index(min(fits))] -= total
            else:
                free.append(size - total)
        assert sorted(free) == sorted(rooms)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_packed_windows_hold_every_conversation_once_and_whole(chat_sets, objective):
    """Read back from the windows: the same ids, targets and pairs; what is left of a window is eots."""
    config = chat_run(chat_sets, objective)
    pack = 2 if objective == "dpo" else 1
    expected = Counter()
    path = str(chat_sets / ("pairs.jsonl" if pack == 2 else "chat.jsonl"))
    for chat in data.conversations("x", path, config.data):
        pieces, _ = data.fitted(data.lessons(chat, pack == 2), BYTES, CHAT)
        pieces = [(ids[:-1].tolist(), targets[:-1].astype(int).tolist()) for ids, targets in pieces]
        expected[tuple((*ids, *targets) for ids, targets in pieces)] += 1
    found, (domain,) = Counter(), train.corpus_of(config).domains.values()
    for shard in (domain.train, domain.val):
        pieces, numbers = {}, []
        assert shard.dtype == np.int32 and len(shard) % pack == 0 and shard.shape[1:] == (2, CHAT + 1)
        for w, (ids, labels) in enumerate(shard.tolist()):
            for tokens, marks in documents_in(ids, labels):
                number, = set(marks) - {0}
                numbers.append((w // pack, abs(number)))
                piece = pieces.setdefault(abs(number) if pack == 2 else len(pieces), {})
                piece[number < 0] = w, (*tokens, *[int(mark != 0) for mark in marks])
        for piece in pieces.values():
            assert sorted(piece) == [False, True][:pack] and len({w // 2 for w, _ in piece.values()}) == 1
            found[tuple(piece[side][1] for side in sorted(piece))] += 1
        if pack == 2:                                              # numbered through, pack by pack
            assert sorted({number for _, number in numbers}) == list(range(1, len(pieces) + 1))
            assert [n for _, n in sorted(numbers)] == sorted(n for _, n in numbers)
    assert found == expected and found.total() == 70
    if pack == 2:
        apart = [sum(len(ids) for ids in unit) // 2 > CHAT - 1 for unit in found]
        assert 0 < sum(apart) < len(apart), "some side by side and some in two windows"


def test_a_conversation_too_long_is_cut_after_an_answer_or_left_out_and_counted(tmp_path, capsys):
    """A pair is never cut. A prompt, with all its answers, stays on its side whatever else there is."""
    rng = random.Random(2)
    talk = lambda i: [turn("user", f"{i}?"), turn("assistant", "y" * rng.randint(3, 30))]
    long = talk(0) + [turn("user", "z" * 20), turn("assistant", "x" * 20)]
    other = long[:2] + [turn("user", "w" * 30), turn("assistant", "v")]            # the same before the cut
    rows = [dict(messages=talk(i // 2)) for i in range(2, 800)] + [dict(messages=long), dict(messages=other)]
    rows += [dict(prompt="a", completion="b" * 90)]
    sides = []
    for name, some in (("a", rows), ("b", rows[::3])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, some)))
        shards, _, _, said = data.pack_chats(name, str(path), data.DataConfig(), BYTES, CHAT, 1)
        sides.append([{tuple(ids[1:4]) for row in shard.tolist() for ids, _ in documents_in(*row)}
                      for shard in shards])
        assert float(re.search(r"fill to ([\d.]+)%", said)[1]) > 94, "packing efficiency"
        if name == "a":
            twice = len(rows) - len(set(map(json.dumps, rows))) + 1
            for what in ("1 cut after an", "1 left out, longer than", f"{twice} left out as a duplicate"):
                assert what in said
            assert not any(ids.count(ord("z")) for shard in shards for ids, _ in shard.tolist())
    assert sides[1][0] <= sides[0][0] and sides[1][1] <= sides[0][1] and len(sides[1][1]) > 3
    assert not sides[0][0] & sides[0][1]
    unit, longest = data.fitted([([], long), ([], talk(0))], BYTES, CHAT)
    assert unit is None and longest > CHAT + 1
    greeted = [turn("assistant", "Hi"), *long[:2], turn("user", "z" * 40), turn("assistant", "x")]
    (unit,), _ = data.fitted([([], greeted)], BYTES, CHAT)
    assert unit[0][:-1].tolist() == data.chat_ids(greeted[:3], BYTES)[0].tolist()
    assert data.fitted([([], [greeted[0], *greeted[3:]])], BYTES, CHAT)[0] is None, "a greeting alone"


def test_a_question_is_on_one_side_whoever_asks_it_and_whatever_follows(tmp_path):
    """Pairs after the first and the second answer, another system message, a greeting, another domain; SFT
    and DPO on the same files; what a recipe makes of it."""
    files = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    rows = dict(a=[], b=[])
    for i in range(150):
        said = [turn("user", f"{i}?"), turn("assistant", "A"), turn("user", "why"), turn("assistant", "B")]
        rows["a"] += [dict(prompt=f"{i}?", chosen="A", rejected="C"),
                      dict(chosen=said, rejected=[*said[:3], turn("assistant", "D")])]
        rows["b"] += [dict(prompt=[turn("system", f"S{i}"), said[0]], chosen="A", rejected="C"),
                      dict(prompt=[turn("assistant", "Hi"), said[0]], chosen="E", rejected="C")]
    for name, path in files.items():
        write_jsonl(path, rows[name])
    config = data.DataConfig(files=f"a={files['a']},b={files['b']}", tokenizer="bytes",
                             cache=str(tmp_path / "cache"))
    train_side, held_out = set(), set()
    for pairs in (False, True):
        for domain in data.prepare_chats(config, 261, 64, pairs).domains.values():
            for found, shard in ((train_side, domain.train), (held_out, domain.val)):
                found |= {*re.findall(r"\d+\?", BYTES.decode(shard[:, 0].flatten().tolist()))}
    assert len(train_side | held_out) == 150 and not train_side & held_out and len(held_out) > 2
    for chat, document in zip(rows["b"], data.read_documents("b", str(files["b"]), config, "conversations")):
        assert (chat["prompt"][1]["content"] in held_out) == data.is_validation(document.split_with)


def test_packing_anew_is_left_to_changed_files_and_code(tmp_path, monkeypatch):
    """The key of the cache stands for every function that packs, and for how a file is read. Packing needs
    the lock of its own domain alone, and what it said is said again."""
    path = write_jsonl(tmp_path / "a.jsonl", [dict(prompt=f"{i}?", completion="b") for i in range(40)])
    config = data.DataConfig(files=f"a={path}", tokenizer="bytes", cache=str(tmp_path / "cache"))
    packed = []

    def prepared(path=path):
        before = len(list(tmp_path.glob("cache/a-chat/a-*.json")))
        corpus = data.prepare_chats(replace(config, files=f"a={path}"), 261, CHAT)
        packed.append(len(list(tmp_path.glob("cache/a-chat/a-*.json"))) > before)
        return corpus.domains["a"].said
    with data.locked(config.cache):                                # of the whole cache
        other = threading.Thread(target=prepared, daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive()
    assert "which they fill to" in prepared() and packed == [True, False]
    for name in ("instruction_of", "pair_of", "is_validation", "side_key", "first_question", "fitted"):
        with monkeypatch.context() as patch:
            whole = getattr(data, name)
            patch.setattr(data, name, lambda *args, **more: whole(*args, **more))
            prepared()
    with monkeypatch.context() as patch:
        patch.setattr(data, "ROLES", data.ROLES | dict(someone="user"))
        prepared()
    shutil.copy(path, tmp_path / "a.json")
    prepared(tmp_path / "a.json")                                  # the same bytes, read in another way
    assert packed == [True, False] + [True] * 8


BAD_CHATS = [
    (dict(messages=[turn("user", "a"), turn("user", "b")]), "no message is the assistant's"),
    (dict(messages=[turn("user", "a"), turn("tool", "b")]), "message 2 has the unknown role 'tool'; known:"),
    (dict(messages=[turn("user", "a"), turn("assistant", " ")]), "message 2, of 'assistant', is empty"),
    (dict(messages=[turn("user", "a"), turn("system", "b"), turn("assistant", "c")]),
     "message 2 is the system's, which can only be the first"),
    (dict(text="a"), "no conversation: it has text"),
    (dict(prompt="a", chosen="b", rejected="b"), "the chosen and the rejected answer are equal"),
    (dict(prompt="a", chosen="b", rejected=""), "message 1, of 'assistant', is empty"),
    (dict(prompt="a", completion="b"), "no pair: it has prompt, completion"),
    (dict(prompt="a", completion="b", chosen=None, rejected=None), "no pair: it has prompt, completion, not"),
]


@pytest.mark.parametrize("record, message", BAD_CHATS)
def test_bad_conversations_are_refused_with_file_and_row_or_counted(record, message, tmp_path, capsys):
    pairs = "pair" in message or "rejected" in record
    good = [dict(prompt=f"{i}", chosen="b", rejected="c") for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, [good[0], record, *good[1:]])))
    config = data.DataConfig(files=f"a={path}", tokenizer="bytes", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        data.prepare_chats(config, 261, CHAT, pairs)
    said = str(error.value)
    assert f"{path}, row 2: {message}" in said and said.endswith("--data.skip_bad=true") and "\n" not in said
    corpus = data.prepare_chats(replace(config, skip_bad=True), 261, CHAT, pairs)
    why = re.sub("^message .", "a message", message)[:20]
    assert corpus.domains["a"].documents == 40 and f"1 row bad (1 × {why}" in capsys.readouterr().out


def test_conversations_need_a_tokenizer_with_turns_room_and_two_prompts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(dict(prompt="what?", completion="that")))
    config = data.DataConfig(files=f"a={path}", tokenizer="bytes", cache=str(tmp_path / "cache"))
    plain = tmp_path / "tokenizer.json"
    BYTES.save(plain)
    foreign = data.load_tokenizer(plain)
    foreign.specials = {"</s>": 0}
    for changes, T, message in (
            (dict(), 8, "the shortest conversation takes 14 tokens, and a window has 9: --model.context=13"),
            (dict(), CHAT, "has one question"), (dict(tokenizer="bpe"), CHAT, "--init=RUN"),
            (dict(files=""), CHAT, "name the conversations: --data.files=chat=PATH, a file"),
            (dict(clean=True), CHAT, "clean: only for text"),
            (dict(tokenizer=str(plain)), CHAT, "has no <|system|>, <|user|>, <|assistant|>, <|end|>, which")):
        with mock.patch.object(data, "load_tokenizer", lambda path: foreign):
            with pytest.raises(ValueError) as error:
                data.prepare_chats(replace(config, **changes), 261, T)
        assert message in str(error.value), (changes, str(error.value))
    with pytest.raises(ValueError, match="sft goes on from a run: --init=RUN"):
        train.parse(["sft", f"--data.files=chat={path}"])
    with pytest.raises(ValueError, match="micro=3: must be even"):
        train.parse(["dpo", "--micro=3"])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_batches_of_conversations_are_pure_and_weights_are_those_of_a_mean(chat_sets, objective, float64):
    """The ranks' slices make up the global batch; each pack once an epoch; weights sum to the mean over the
    global batch's targets, or to its pairs' means, whatever the number of ranks."""
    config = chat_run(chat_sets, objective)
    batches, pack = chat_batches(config), 2 if objective == "dpo" else 1
    for step in range(3):
        whole = batches(step)
        for world in (1, 2, 4):
            parts = [chat_batches(config)(step, rank, world) for rank in range(world)]
            for name in ("x", "y", "domain", "doc_start", "label"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
            torch.testing.assert_close(torch.cat([part.weight for part in parts]), whole.weight * world)
        if pack == 1:
            assert whole.weight.sum() == pytest.approx(1)
            assert torch.equal(whole.weight > 0, whole.label == 1) and len(whole.weight.unique()) == 2
        else:
            pairs = {(row // 2, abs(n)) for row, some in enumerate(whole.label.tolist()) for n in some if n}
            assert torch.equal(whole.weight, whole.label.sign() / len(pairs))
        assert whole.doc_start.tolist() == data.document_starts(whole.x.numpy(), BYTES.eot).tolist()
    packs = len(batches.sides["train"][0]) // pack
    drawn = np.sort(batches.drawn(0, packs)[1])
    assert drawn.tolist() == list(range(packs))
    assert list(batches.epochs(5).values()) == pytest.approx([5 * 8 / pack / packs])


def alone(network, ids, labels):
    """Log-probabilities of the targets of each document of a window, each in a window of its own: [(sum, n,
    label)]."""
    found = []
    for tokens, marks in documents_in(ids, labels):
        x, y = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
        here = torch.tensor(marks[1:]) != 0
        logp = network(x)[0].log_softmax(-1).gather(-1, y[0, :, None])[:, 0]
        found.append((logp[here].sum(), int(here.sum()), max(marks, key=abs)))
    return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_gradients_are_those_of_the_defining_loss(block, objective, float64):
    """Against autograd of the definition, without packing or weights: the mean over all targets, or over
    pairs -log σ(β(log π(c)/π_ref(c) − log π(r)/π_ref(r))) with policy and frozen reference in one graph. In
    micro-batches, with windows without a target, several documents in one and a pair twice in the batch."""
    c = replace(BLOCKS[block], context=CHAT, balance_loss=0.0)
    rng, pack = random.Random(5), 2 if objective == "dpo" else 1
    said = lambda role, most: turn(role, "".join(rng.choices("abcd", k=rng.randint(1, most))))
    units = []
    for _ in range(9):
        given, answers = [said("user", 4)], [[said("assistant", 25)] for _ in range(2)]
        taught = [(given, answer) for answer in answers] if pack == 2 else [([], given + answers[0])]
        units.append(data.fitted(taught, BYTES, CHAT)[0])
    shards = [data.packed(some, CHAT, pack, BYTES.eot) for some in (units[:5], units[5:])]
    domains = {name: data.Domain(shard, shard, 0, 0, 9, ["", ""]) for name, shard in zip("ab", shards)}
    corpus = data.corpus_of(BYTES, domains, np.ones(2) / 2, np.ones(2) / 2, pack)
    batches = data.ChatBatches(corpus, data.DataConfig(), 0, sum(map(len, shards)) + 6, CHAT)
    batch = batches(0)                                             # some packs come twice
    if objective == "sft":                                         # and two windows have no target
        batch = batch._replace(weight=batch.weight.index_fill(0, torch.tensor([0, 3]), 0.0),
                               label=batch.label.index_fill(0, torch.tensor([0, 3]), 0))
        batch = batch._replace(weight=batch.label.sign() / (batch.label != 0).sum())
    policy, frozen = (lively(c, seed, restart=True) for seed in (1, 2))

    # The definition.
    windows = torch.cat([batch.x[:, :1], batch.y], 1), F.pad(batch.label, (1, 0))
    rows = list(zip(*(part.tolist() for part in windows)))
    exact = copy.deepcopy(policy)
    learned = [alone(exact, *row) for row in rows]
    if objective == "sft":
        known = [part for row in learned for part in row if part[1]]
        loss = -sum(logp for logp, _, _ in known) / sum(n for _, n, _ in known)
    else:
        with torch.no_grad():
            fixed = [alone(frozen, *row) for row in rows]
        terms = {}
        for row, (ours, theirs) in enumerate(zip(learned, fixed)):
            for (logp, _, label), (ref, _, _) in zip(ours, theirs):
                terms.setdefault((row // 2, abs(label)), {})[label > 0] = logp - ref
        assert len(terms) > 9, "a pair comes twice"
        loss = sum(-F.logsigmoid(0.3 * (both[True] - both[False])) for both in terms.values()) / len(terms)
    loss.backward()

    # Ours, with the reference taken from the frozen model as at the start of a run.
    config = train.Config(objective=objective, model=c, beta=0.3, batch=len(batch.x), micro=4, tokens=10 ** 6)
    run = types.SimpleNamespace(chunks={0: frozen}, config=config, mesh=parallel.Mesh(), dtype=None,
                                batches=batches, corpus=corpus, status=mock.Mock(), stop=mock.Mock())
    run.stop.asked.return_value = False
    if objective == "dpo":
        assert train.take_reference(run)
        run.chunks = {0: policy}
        batch, sums = train.weigh_pairs(run, batch)
        assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(loss.item(), rel=1e-9)
        assert sums[:, 2].tolist() == torch.bincount(batch.domain).tolist()
        assert sums[:, 1].tolist() == [sum(batch.domain[2 * pack] == i for pack, _ in terms) for i in (0, 1)]
    nats = torch.zeros(batch.x.shape)
    plan = parallel.MeshConfig().plans(len(batch.x), 4)[0]
    mean = parallel.execute(plan, {0: policy}, batch, 4, parallel.Mesh(), nats=nats)
    if objective == "sft":
        sums = train.sums_of(run, batch, mean, nats)
        assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(loss.item(), rel=1e-9)
    for (name, p), q in zip(policy.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11, msg=lambda text: f"{name}: {text}")


def test_a_preference_run_begins_at_ln_2_and_logs_what_the_answers_say(chat_sets, tmp_path, monkeypatch):
    """Step 1 has margin 0, and the evaluation is that of one pair after another."""
    units = []
    monkeypatch.setattr(_figure, "draw", lambda *args: units.append(args[3]))
    config = replace(chat_run(chat_sets, "dpo", out=str(tmp_path / "run")), eval_windows=0)
    history, network = train.train(config, quiet=True)
    first, last = history[1], history[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["rewards/margins"]) < 1e-5
    assert history[0]["val_pairs"] == pytest.approx(math.log(2), abs=1e-6) and "kl" not in history[0]
    rewards = [last[f"rewards/{side}"] for side in ("chosen", "rejected")]
    assert last["rewards/margins"] == pytest.approx(rewards[0] - rewards[1], rel=1e-9)
    assert set(train.LOGGED_PAIRS) <= set(log_of(tmp_path / "run")[1]) and set(units) == {"nats/pair"}
    labels = torch.tensor([[1, -1], [0, 0]])
    nats, equal = torch.ones(2, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert train.compare_pairs(labels, nats, equal, 0.5)[0].accuracy.tolist() == [0.5]

    # The evaluation of one pair after another.
    reference = weights_of(tmp_path / "run")["reference/val"]
    domain = train.corpus_of(config).domains["pairs"]
    found = {}
    with torch.no_grad():
        for ids, labels in domain.val.tolist():
            for logp, _, label in alone(network.eval(), ids, labels):
                ratio = logp.item() - reference[abs(label) - 1, int(label < 0)].item()
                found.setdefault(abs(label), {})[label > 0] = ratio
    margins = torch.tensor([0.5 * (both[True] - both[False]) for both in found.values()])
    batches, mesh = chat_batches(config), parallel.Mesh()
    held = train.evaluate({0: network}, batches, config, mesh, reference=reference)["pairs"]
    assert held == pytest.approx([-F.logsigmoid(margins).mean().item(), (margins > 0).double().mean().item(),
                                  margins.mean().item()], rel=1e-4)


def test_held_out_conversations_are_measured_on_their_answers_alone(chat_sets, float64):
    config = replace(chat_run(chat_sets, "sft"), eval_windows=0)
    for objective, restart in (("pretrain", False), ("sft", True), ("dpo", True)):
        assert train.build(replace(config, objective=objective), parallel.Mesh())[0].restart == restart
    batches, network = chat_batches(config), lively(config.model).eval()
    found = train.evaluate({0: network}, batches, config, parallel.Mesh())["chat"]
    rows = batches.sides["val"][0].tolist()
    parts = [part for row in rows for part in alone(network, *row)]
    nats = -sum(logp.item() for logp, _, _ in parts)
    size = sum(label == 1 and t < 256 for ids, labels in rows for t, label in zip(ids, labels))
    n = sum(n for _, n, _ in parts)
    assert n > size and found == pytest.approx((nats / n, nats / math.log(2) / size), rel=1e-9)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_on_conversations_resumes_to_the_bit(objective, chat_sets, tmp_path, monkeypatch, undrawn):
    config = chat_run(chat_sets, objective)
    train.train(replace(config, out=str(tmp_path / "whole")), quiet=True)
    train.train(replace(config, out=str(tmp_path / "part"), steps=2), quiet=True)
    monkeypatch.setattr(train, "take_reference", lambda run: 1 / 0)
    train.train(replace(config, out=str(tmp_path / "part")), resume=True, quiet=True)
    assert log_of(tmp_path / "part") == log_of(tmp_path / "whole")
    for name, t in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "part")[name].nan_to_num(9), t.nan_to_num(9)), name


CHAT_MESHES = [(1, 8, {}), (1, 1, {}), (4, 2, {}), (4, 2, dict(pp=2, ep=2)),         # ranks, micro, mesh
               (2, 2, dict(pp=2, split=True))]


def chat_meshes(rank, folder, out):
    torch.set_default_dtype(torch.float64)
    for objective in ("sft", "dpo"):
        for i, (world, micro, mesh) in enumerate(CHAT_MESHES[:4 if objective == "sft" else None]):
            with layout(rank, world) as here:
                if here:
                    mesh = parallel.MeshConfig(timeout=50, **mesh)
                    micro = max(micro, 2) if objective == "dpo" else micro         # a pair stays together
                    train.train(chat_run(Path(folder), objective, model=CHAT_EXPERTS, micro=micro, mesh=mesh,
                                         out=f"{out}/{objective}-{i}", steps=2), quiet=True)
    with layout(rank, 2) as here:                                  # two stages go on with what one rank began
        if here:
            mesh = parallel.MeshConfig(timeout=50, pp=2)
            train.train(chat_run(Path(folder), "dpo", model=CHAT_EXPERTS, micro=8, mesh=mesh, steps=3,
                                 out=f"{out}/dpo-0"), resume=True, quiet=True)


def test_conversations_train_alike_on_every_mesh_and_in_every_micro_batch(chat_sets, tmp_path):
    """In float64: losses, rewards, evaluations and the reference of 1 and 4 ranks, of stages and divided
    experts, match one process. Two stages go on from the reference that one rank has taken."""
    for objective in ("sft", "dpo"):
        train.corpus_of(chat_run(chat_sets, objective))
    spawn(4, chat_meshes, str(chat_sets), str(tmp_path))
    for objective in ("sft", "dpo"):
        one = log_of(tmp_path / f"{objective}-0")[:3]
        for i in range(1, 4 if objective == "sft" else len(CHAT_MESHES)):
            for a, b in zip(log_of(tmp_path / f"{objective}-{i}"), one, strict=True):
                for key in a:
                    alike = pytest.approx(float(b[key] or 0), rel=1e-8, abs=1e-9)
                    assert float(a[key] or 0) == alike, (objective, i, key)
        assert float(one[-1]["loss"]) < float(one[1]["loss"])
    kept = [weights_of(tmp_path / f"dpo-{i}") for i in range(len(CHAT_MESHES))]
    for side in ("train", "val"):
        for weights in kept:
            torch.testing.assert_close(weights[f"reference/{side}"], kept[1][f"reference/{side}"],
                                       equal_nan=True)
    assert len(log_of(tmp_path / "dpo-0")) == 4


def test_post_training_takes_the_model_of_its_run_and_fresh_moments(text, chat_sets, tmp_path, capsys,
                                                                   undrawn):
    """`train.py sft --init=RUN`, `train.py dpo --init=SFT_RUN`; a second dpo run goes on with the moments."""
    base = tmp_path / "base"
    model = replace(tiny_run(text).model, context=CHAT)
    train.train(tiny_run(text, out=str(base), steps=1, model=model), quiet=True)
    for recipe, before, name in (("sft", "base", "chat"), ("dpo", "sft", "pairs"), ("fine", "dpo", "pairs")):
        words = ["sft" if recipe == "sft" else "dpo", f"--init={tmp_path / before}",
                 f"--out={tmp_path / recipe}", f"--tokens={3 * 8 * CHAT}",
                 f"--data.files={name}={chat_sets / name}.jsonl", f"--data.cache={chat_sets / 'cache'}"]
        train.main(words)
        said = capsys.readouterr().out
        assert f"weights{' and moments' * (recipe == 'fine')} of {tmp_path / before} at step" in said
        assert "held out, after" in said and ("accuracy" in said) == (recipe != "sft")
        assert train.parse(["laptop", f"--objective={words[0]}", words[1]])[0].model == model
        train.main([words[0], words[2], "--resume"])
        assert "which they fill to" in capsys.readouterr().out
    model, tokenizer = train.load_run(tmp_path / "fine")
    assert model.config.context == CHAT and tokenizer.fingerprint == BYTES.fingerprint
    with pytest.raises(SystemExit, match="was begun with beta=0.1, not 0.2"):
        train.main([*words, "--resume", "--beta=0.2"])


def test_the_reference_is_of_the_pairs_that_the_run_compares_alone(chat_sets, tmp_path, undrawn, capsys):
    config = chat_run(chat_sets, "dpo", out=str(tmp_path / "run"))
    config = replace(config, tokens=2 * 8 * CHAT, eval_windows=2)
    train.train(config)
    batches = chat_batches(config)
    used = dict(train=[batches(step) for step in (0, 1)], val=[batches.val("pairs", 2)])
    for side, parts in used.items():
        kept = weights_of(tmp_path / "run")[f"reference/{side}"]
        known = torch.cat([part.label.abs().unique() for part in parts]).unique()[1:] - 1
        assert torch.equal((~kept.isnan()).all(1).nonzero()[:, 0], known) and 0 < len(known) < len(kept)
    windows = len({tuple(row) for part in used["train"] for row in part.x.tolist()}) + 2
    assert f"reference: {windows} of {windows} windows\n" in capsys.readouterr().out


def test_a_stop_while_the_reference_is_taken_begins_again(chat_sets, tmp_path, monkeypatch, undrawn, capsys):
    config = chat_run(chat_sets, "dpo", out=str(tmp_path / "run"))
    with monkeypatch.context() as patched:
        patched.setattr(train.Stop, "asked", lambda self: True)
        history, _ = train.train(config)
    assert history == [] and not train.checkpoints(tmp_path / "run")
    assert "the same command begins again" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no checkpoint yet, which would say what run it is"):
        train.parse([f"--out={tmp_path / 'run'}", "--resume"])
    history, _ = train.train(config, quiet=True)
    assert history[-1]["step"] == 4 and history[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- notes/ ------------------------------------------------------------------------------------------------

def test_the_page_on_speed_shows_its_raw_numbers(tmp_path, monkeypatch):
    from notes import speed
    for name in ("speed.csv", "speed.md"):
        shutil.copy(HERE / "notes" / name, tmp_path)
    page = (tmp_path / "speed.md").read_text("utf-8")
    (tmp_path / "speed.md").write_text(page.replace("| ", "| stale "), "utf-8")
    monkeypatch.setattr(speed, "CSV", tmp_path / "speed.csv")
    speed.main(["--plot"])
    assert (tmp_path / "speed.md").read_text("utf-8") == page
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_the_page_on_kernels_shows_its_raw_numbers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    from notes import kernels as note
    for name in ("kernels.csv", "kernels.md"):
        shutil.copy(HERE / "notes" / name, tmp_path)
    page = (tmp_path / "kernels.md").read_text("utf-8")
    (tmp_path / "kernels.md").write_text(page.replace("| ", "| stale "), "utf-8")
    monkeypatch.setattr(note, "CSV", tmp_path / "kernels.csv")
    with pytest.raises(SystemExit) as leave:
        note.main(["--plot"])
    assert leave.value.code == 0 and "0 faults" in capsys.readouterr().out
    assert (tmp_path / "kernels.md").read_text("utf-8") == page
    rows = list(csv.DictReader((tmp_path / "kernels.csv").read_text("utf-8").splitlines()))
    assert {row["kernel"] for row in rows} == {proof.name for proof in note.PROOFS}


NOTES = sorted(path.stem for path in HERE.glob("notes/[a-z]*.md")
               if path.stem not in ("speed", "faults", "kernels"))


def quiet_main(name, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        note = importlib.import_module(f"notes.{name}")
        _note.main(name, note.cells, getattr(note, "run", _note.history), note.show, args)
    return out.getvalue()


def run_toys(folder, names):
    """Each of these notes as a toy, in a folder of its own, where a traceback is left of what was raised."""
    for name in names:
        here = Path(folder, name)
        here.mkdir()
        os.chdir(here)
        try:
            quiet_main(name, "--quick")
        except BaseException:
            (here / "failed").write_text(traceback.format_exc())


@pytest.mark.parametrize("name", NOTES)
def test_a_page_shows_its_raw_numbers(name, tmp_path, monkeypatch):
    """Figure and table come from the CSV alone; the page ends with a verdict, and the index has its row."""
    cells = {cell[:2]: _note.key(cell[2]) for cell in importlib.import_module(f"notes.{name}").cells(False)}
    for row in _note.read(HERE / f"notes/{name}.csv"):
        assert cells[row["arm"], row["seed"]] == row["setting"], "the raw numbers are from other settings"
    for kind in ("csv", "md"):
        shutil.copy(HERE / f"notes/{name}.{kind}", tmp_path)
    page = (tmp_path / f"{name}.md").read_text("utf-8")
    (tmp_path / f"{name}.md").write_text(re.sub(r"(?m)^\| .*$", "| stale |", page), "utf-8")
    monkeypatch.setattr(_note, "HERE", tmp_path)
    quiet_main(name, "--plot")
    assert (tmp_path / f"{name}.md").read_text("utf-8") == page and (tmp_path / f"{name}.png").exists()
    parts = [page.index(f"**{part}.**") for part in ("Claim", "Set-up", "Result", "Verdict")]
    assert parts == sorted(parts)
    verdict = page[parts[-1]:]
    assert any(word in verdict for word in ("reproduced", "refuted", "not distinguishable here", "not run"))
    assert f"({name}.md)" in (HERE / "notes/README.md").read_text("utf-8")


def test_no_stage_of_post_training_meets_a_family_of_its_test():
    from notes import post_training as note
    s = replace(note.cells(False)[0][2], facts=8, told=200, plain=200)
    unseen = [family for _, held_out in note.families().values() for family in held_out]
    assert len(unseen) == 24
    said = [row["text"] for row in note.texts(0, s)["worked"]]
    for arm in (note.SFT, *note.DATA_ARMS):
        for records in note.lessons(arm, 0, s).values():
            said += [message["content"] for record in records for message in record["messages"]]
    trees = [parsed(line) for text in said for line in re.findall(r"(?m)^(?:= )?([-(\d].*)$", text)]
    forms = [note.family_of(tree) for tree in trees]
    assert len(forms) > 2000 and max(map(str, forms), key=len).count("n") == 4
    assert not any(form in unseen for form in forms)
    tested = [tree for group in note.GROUPS for tree in note.test_set(20)[group]]
    assert len(tested) == 60 and all(note.family_of(tree) in unseen for tree in tested)
    asked = [note.written(tree) for tree in note.test_set(20)["seen"]]
    assert len(set(asked)) == 20 and all(note.family_of(parsed(text)) not in unseen for text in asked)

    # What a length leaves out is no longer than what it keeps.
    size = lambda record: len("".join(message["content"] for message in record["messages"]))
    sizes = [size(record) for record in note.lessons(note.SFT, 0, s)["plain"]]
    for arm, share in note.LENGTHS.items():
        kept = [size(record) for record in note.lessons(arm, 0, s)["plain"]]
        assert kept == sorted(sizes)[int(share * len(sizes)):] and kept[0] > min(sizes)


def parsed(text):
    """An expression of notes/post_training.py as its tree, by Python's own parser."""
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}

    def tree(node):
        if isinstance(node, ast.BinOp):
            return [tree(node.left), signs[type(node.op)], tree(node.right)]
        return ast.literal_eval(node)
    return tree(ast.parse(text, mode="eval").body)


def test_answers_of_post_training_are_judged_line_by_line():
    from notes import post_training as note
    asked = note.question([[3, "-", 7], "*", [2, "+", 1]])
    assert asked == "Work out:\n(3 - 7) * (2 + 1)"
    lines = "= (-4) * (2 + 1)", "= (-4) * 3", "= -12"
    assert note.worked([[3, "-", 7], "*", [2, "+", 1]]) == "\n".join(lines)
    assert note.right(asked, "\n".join(lines)) and note.right(asked, lines[2])
    for wrong in ("", "= 12", "-12", "= -12 ", lines[0], "\n".join((*lines, "")), "= (-4) * 4\n= -12",
                  "= -12\n= (-4) * 3", "= -12 = 4", "= x\n= -12", "it is\n= -12", "= 1/0\n= -12"):
        assert not note.right(asked, wrong), wrong
    assert note.worked([5, "*", 5]) is None and note.worked([[4, "*", 5], "+", 1]) is None
    assert note.worked([[4, "-", 9], "-", [1, "-", 6]]) == "= (-5) - (1 - 6)\n= (-5) - (-5)\n= 0"


def test_pairs_of_post_training_are_a_right_and_a_wrong_answer(monkeypatch):
    """Coarse: any; fine: those with the longest common beginning. A question with one kind gives none."""
    from notes import post_training as note
    trees = [[[9, "-", 5], "-", 2], [1, "+", 1], [2, "*", 3]]
    said = [["= 4 - 2\n= 2", "= 2", "= 8\n= 2"], ["= 7", "= 2", "= 5"], ["= 4 - 2\n= 2", "= 2", "= 6"],
            ["= 4 - 2\n= 1", "= 2", ""]]
    s = replace(note.Setting(), answers=4)
    for seed in range(5):
        monkeypatch.setattr(note, "answers", lambda *args, at=iter(said): next(at))
        first, second = note.pairs_of(None, None, trees, seed, s, fine=True)
        assert first == dict(prompt=note.question(trees[0]), chosen="= 4 - 2\n= 2", rejected="= 4 - 2\n= 1")
        assert second["prompt"] == note.question(trees[2]) and second["chosen"] == "= 6"
        assert second["rejected"] in ("= 8\n= 2", "= 5"), "a blank answer is none"
    found = set()
    for seed in range(9):
        monkeypatch.setattr(note, "answers", lambda *args, at=iter(said): next(at))
        found.add(note.pairs_of(None, None, trees, seed, s)[0]["rejected"])
    assert found == {"= 4 - 2\n= 1", "= 7"}


def test_post_training_measures_log_probabilities_and_divergence():
    from notes import post_training as note
    tokenizer = data.tokenizer_of(data.DataConfig(tokenizer="bytes"), 261, (), None)
    small = replace(note.cells(True)[0][2].base.model, init_std=0.3)
    model, other = (net.Transformer(small, seed=seed).eval() for seed in range(2))
    pair = dict(prompt="Work out:\n1 + 2", chosen="= 3", rejected="= 12")
    head = tokenizer.encode(pair["prompt"]).tolist()
    end, user, assistant = (tokenizer.specials[f"<|{name}|>"] for name in ("end", "user", "assistant"))
    found = note.log_probabilities(model, tokenizer, [pair])[0].tolist()
    for side, value in zip(("chosen", "rejected"), found):
        ids = [user, *head, end, assistant, *tokenizer.encode(pair[side]).tolist(), end]
        p = model(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(p[i - 1, ids[i]].item() for i in range(len(head) + 3, len(ids)))
        assert value == pytest.approx(expected, rel=1e-4)

    # Exact over the vocabulary at each position of what the model itself has written, up to its end.
    trees = [[a, "+", b] for a in range(1, 9) for b in range(1, 9)]
    (tokens, length, _), = note.written_on(model, tokenizer, trees, 1.0, 11)
    assert (tokens[:, length:-1] == end).any()
    expected = 0
    for row in tokens:
        stop = [*row[length:].tolist(), end].index(end)
        p, q = (of(row[None])[0].double().log_softmax(-1) for of in (model, other))
        for i in range(length - 1, min(length + stop, len(row) - 1)):
            expected += F.kl_div(q[i], p[i], log_target=True, reduction="sum").item() / len(trees)
    assert note.divergence(model, other, tokenizer, trees) == pytest.approx(expected, rel=1e-5)
    assert expected > 1
    assert note.divergence(model, model, tokenizer, trees) == 0


def test_a_grid_resumes_where_it_was_killed(tmp_path, capsys):
    path, calls = tmp_path / "x.csv", []

    def run(arm, seed, setting):
        calls.append((arm, seed))
        yield dict(step=1, value=0.1 * seed)
        if calls == [("a", 0), ("b", 0)]:
            raise KeyboardInterrupt
        yield dict(step=2, value=setting)
    cells = [(arm, seed, 7) for seed in range(2) for arm in "ab"]
    with pytest.raises(KeyboardInterrupt):
        _note.grid(path, cells, run)
    assert {(row["arm"], row["seed"]) for row in _note.read(path)} == {("a", 0)}, "half a cell is not kept"
    rows = _note.grid(path, cells, run)
    assert calls == [("a", 0), ("b", 0), ("b", 0), ("a", 1), ("b", 1)] and len(rows) == 8
    values = [row["value"] for row in rows]
    assert [row["value"] for row in _note.read(path)] == pytest.approx(values, rel=1e-5)
    changed = [(arm, seed, 8 if arm == "b" else setting) for arm, seed, setting in cells]
    assert len(_note.grid(path, changed, run)) == 8
    assert calls[5:] == [("b", 0), ("b", 1)], "cells with changed settings run again"
    assert "other settings, dropped: b 0, b 1" in capsys.readouterr().out


# The note on rephrasing: its texts, its questions, its mathematics.

def test_a_text_its_rewrites_and_its_questions_share_no_words_but_the_facts():
    """All six facts are in every text; no three words in a row are common to two of the families."""
    from notes import rephrasing as note
    person, = note.people(1, 0)
    for template in (note.RAW, *note.REWRITES.values()):
        text = note.fill(template, person)
        assert all(text.count(getattr(person, fact)) == 1 for fact in note.FACTS), text
        assert person.last in text

    def in_a_row(templates):
        words = [re.findall(r"\w+", template.lower()) for template in templates]
        return {tuple(some[i:i + 3]) for some in words for i in range(len(some) - 2)}
    asked = [note.in_new_words(fact, person) for fact in note.FACTS]
    exams = [question for questions in note.EXAM.values() for question in questions]
    families = [note.RAW], note.REWRITES.values(), note.QUESTIONS.values(), exams
    families = [in_a_row(family) for family in families]
    for one, other in itertools.combinations(families, 2):
        assert not one & other, one & other
    assert not any(value in question for question in asked for value in person[3:])


def test_arms_of_rephrasing_read_equally_many_tokens_of_their_own_texts():
    from notes import rephrasing as note
    _, _, setting = note.cells(True)[0]
    everyone = note.people(12, 0)
    someone, others = everyone[:6], everyone[6:]
    assert len({p.last for p in everyone}) == 12
    styles = note.styles_of(someone, 0)
    texts = {}
    distinct = {"raw": 1, "1 rewrite": 1, "10 rewrites": 10, "5 rewordings": 5, "5 other forms": 5}
    assert list(distinct) == [*note.ARMS, *note.SPLIT]
    for arm, texts_each in distinct.items():
        docs = list(itertools.islice(note.reading(arm, styles, random.Random(1)), 6 * 20))
        for begin in range(0, len(docs), 6):
            assert all(sum(p.last in doc for doc in docs[begin:begin + 6]) == 1 for p in someone), "an epoch"
        for p in someone:
            texts[arm, p] = {doc for doc in docs if p.last in doc}
            assert len(texts[arm, p]) == texts_each
        assert not set(docs) & {note.fill(note.RAW, p) for p in others}
    assert all(texts["1 rewrite", p] < texts["10 rewrites", p] for p in someone)
    assert all(not texts["raw", p] & texts["10 rewrites", p] for p in someone)
    assert all(texts["5 rewordings", p] ^ texts["5 other forms", p] == texts["10 rewrites", p]
               for p in someone)

    # The general text is about the others alone.
    about = list(itertools.islice(note.general(others, random.Random(1)), 300))
    assert any("Question: " in doc for doc in about)
    assert not any(p.last in doc for doc in about for p in someone)

    # A run reads as many tokens of each part in every arm.
    tokenizer = data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    sizes = set()
    for arm in distinct:
        parts = dict(people=(note.reading(arm, styles, random.Random(1)), 0.4),
                     general=(note.general(others, random.Random(2)), 0.6))
        corpus = note.corpus_of(tokenizer, parts, setting.config)
        batches = data.Batches(corpus, replace(setting.config.data, horizon=1), 0, 8, 128)
        epochs = batches.epochs(setting.config.total_steps)
        assert all(0.8 < n <= 1 for n in epochs.values()), "a run reads its texts once"
        sizes.add(tuple(len(domain.train) for domain in corpus.domains.values()))
    assert len(sizes) == 1


def test_the_candidate_with_the_highest_likelihood_is_the_answer(monkeypatch):
    from notes import rephrasing as note
    tokenizer = data.Tokenizer("bytes", r"(?s:.)", {bytes([i]): i for i in range(256)})
    network = net.Transformer(replace(net.PRESETS["shakespeare"], n_layer=1, zero_out=False))
    pairs = [("Who?", "a"), ("Where does she live?", "Elmford"), ("When?", "3 May 1901"), ("", "x")]
    found = note.likelihoods(network, tokenizer, pairs, batch=3)
    for (prompt, answer), value in zip(pairs, found):
        head = [tokenizer.eot, *prompt.encode()]
        tail = list((" " + answer).encode())
        logits = network(torch.tensor([head + tail]))[0].log_softmax(-1)
        direct = sum(logits[len(head) - 1 + i, token] for i, token in enumerate(tail))
        assert value.item() == pytest.approx(direct.item(), rel=1e-4)

    # Scores that know one fact and guess the others: all of its questions, a quarter of theirs.
    someone = note.people(200, 0)
    truth = {note.in_new_words("job", p): p.job for p in someone}

    def scores(_, __, pairs):
        guess = random.Random(7)
        return torch.tensor([9.0 if truth.get(prompt) == answer else guess.random()
                             for prompt, answer in pairs])
    monkeypatch.setattr(note, "likelihoods", scores)
    right = note.answered(None, None, someone, note.in_new_words, 0).mean(0).tolist()
    for fact, percent in zip(note.FACTS, right):
        assert percent == 100 if fact == "job" else 10 < percent < 40, "four candidates, one of them true"


def test_bare_answers_and_learning_notes_are_of_problems_that_are_not_asked():
    from notes import rephrasing as note
    keep_out = set(note.unseen(random.Random(1), 50))
    assert len(keep_out) == 50
    for arm in note.NOTES_ARMS:
        docs = list(itertools.islice(note.problems(arm, random.Random(1)), 150))
        kept = list(itertools.islice(note.problems(arm, random.Random(1), keep_out), 150))
        out = [doc for doc in docs if any(doc.startswith(question + "\n") for question in keep_out)]
        assert len(out) >= 50 and kept[:len(docs) - len(out)] == [doc for doc in docs if doc not in out]
        lines = sum(doc.count("\n") for doc in docs) / len(docs)
        assert lines == 2 if arm == "bare answers" else lines > 3


def test_a_solution_is_judged_by_exact_arithmetic():
    """An answer counts if it solves the question, however it came about; a false step is found all the
    same."""
    from notes import rephrasing as note
    rng = random.Random(5)
    for _ in range(20):
        question, steps = note.problem(rng)
        right = steps.split("\n")[-1]
        wrong = f"= {int(right[2:]) + 1}"
        assert 1 <= steps.count("\n") + 1 <= note.OPERATIONS
        assert note.holds(f"{question}\n{steps}")
        assert note.solves(question, steps) and note.solves(question, right)
        assert not note.solves(question, wrong) and not note.solves(question, f"{right}\n{wrong}")
        assert not any(note.solves(question, nothing) for nothing in ("", "=", "= ", "= I do not know"))
    question = "Evaluate step by step:\n(2 + 3) * 4"
    assert note.solves(question, "= 6 * 4\n= 20") and not note.holds(f"{question}\n= 6 * 4\n= 20")


def test_real_facts_are_those_on_which_both_sources_agree(tmp_path, monkeypatch, capsys):
    """Stand-ins for the two packages: an article, a quiz about it, other quizzes."""
    from notes import rephrasing as note
    articles = "".join(
        f"{name}\nSymbol: {symbol}\nAtomic number: {number}\nAtomic weight: 1.5\n{prose}\n\n"
        for name, symbol, number, prose in (
            ("iron", "Fe", 26, "A metal that rusts.\nKnown since\nlong ago. It is heavy and it is grey."),
            ("indium", "In", 49, "A soft metal."), ("iodine", "I", 53, "A halogen."),
            ("zinc", "Zn", 31, "The other source has another number."),
            ("joliotium", "Jl", 105, "The other source does not know it.")))
    monkeypatch.setattr(note, "ELEMENTS", tmp_path / "elements.dict.dz")
    monkeypatch.setattr(note, "QUIZ", tmp_path)
    assert note.cells(True) and not capsys.readouterr().out
    monkeypatch.setattr(note._note, "HERE", tmp_path)
    assert not any(arm in note.ELEMENTS_ARMS for arm, _, _ in note.cells(False))
    assert "12 runs on real facts are left out" in capsys.readouterr().out
    (tmp_path / "rephrasing.csv").write_text('arm,seed,setting\n"elements, raw",1,x\n')
    assert [cell[:2] for cell in note.cells(False) if cell[0] in note.ELEMENTS_ARMS] == [("elements, raw", 1)]

    # An article ends with a sentence.
    with gzip.open(note.ELEMENTS, "wt", encoding="latin-1") as file:
        file.write("About this file\n\n" + articles)
    lines = "Fe:26:55.8:Iron", "In:49:114.8:Indium", "I:53:126.9:Iodine", "Zn:30:65:Zinc"
    (tmp_path / "elements").write_text("\n".join(lines))
    known = note.elements(110)
    assert [(e.name, e.symbol, e.number) for e in known] == [
        ("Iron", "Fe", "26"), ("Indium", "In", "49"), ("Iodine", "I", "53")]
    assert known[0].text == ("Iron\nSymbol: Fe\nAtomic number: 26\nAtomic weight: 1.5\n"
                             "A metal that rusts. Known since long ago.")

    # The first spelling counts; a line may go on in the next.
    for name in note.QUIZZES:
        (tmp_path / name).write_text("")
    (tmp_path / "state").write_text("New{ }York|NY:[Albany|Albania]:NY:\\\nrose\n")
    said = dict(capital="Albany", abbreviation="NY", flower="rose")
    assert note.known_things() == [("NewYork", said)]
    docs = list(itertools.islice(note.general_facts(note.known_things(), random.Random(0)), 40))
    assert "NewYork\nCapital: Albany\nAbbreviation: NY\nFlower: rose" in docs
    assert sum(doc.startswith("Question: ") for doc in docs) == 20
    assert all(doc.split("Answer: ")[1] in said.values() for doc in docs if doc.startswith("Question: "))

    # Wrong answers are hard to tell from the right one by its looks.
    rng = random.Random(0)
    names = ["Iron", "Zinc", "Indium", "Argon", "Iodine", "Iridium", "Boron"]
    for _ in range(20):
        assert set(note.near("Iron", names, rng)) == {"Indium", "Iodine", "Iridium"}
        assert set(note.near("26", "26 1 27 102 36 16 50".split(), rng)) == {"27", "36", "16"}


def test_arms_on_real_facts_take_turns_as_those_on_people_do():
    from notes import rephrasing as note
    texts = ["Iron\nSymbol: Fe\nIn 1900, the whole area needed a big method. It was chosen.",
             "Zinc\nSymbol: Zn\nThe chief idea was often described. The entire region was changed in 1910."]
    rewrites = note.rewritten(texts)
    assert all(5 <= len(some) <= 10 and text not in some for text, some in zip(texts, rewrites))
    assert all("Symbol: Fe" in text for text in rewrites[0])
    assert all("Symbol: Zn" in text for text in rewrites[1])

    def of_iron(arm):
        docs = list(itertools.islice(note.of_elements(arm, texts, rewrites, random.Random(0)), 40))
        assert all(("Fe" in a) + ("Fe" in b) == 1 for a, b in zip(docs[::2], docs[1::2])), "an epoch"
        return [doc for doc in docs if "Fe" in doc]
    assert set(of_iron("raw")) == {texts[0]}
    only, = set(of_iron("1 rewrite"))
    assert only in rewrites[0]
    assert of_iron("10 rewrites")[:len(rewrites[0])] == rewrites[0]

    # A model that knows symbols alone.
    known = [note.Element(*e, "") for e in (("Iron", "Fe", "26"), ("Zinc", "Zn", "30"), ("Iodine", "I", "53"),
                                            ("Argon", "Ar", "18"), ("Boron", "B", "5"))]
    symbols = {e.symbol: e.name for e in known}

    def scores(_, __, pairs):
        return torch.tensor([float(symbols[answer] in prompt) if answer in symbols else i % 4
                             for i, (prompt, answer) in enumerate(pairs)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(note, "likelihoods", scores)
        right = note.asked_elements(None, None, known, 0)
    assert right.shape == (5, 3) and right.mean(0).tolist() == [100, 0, 0]


def test_a_whole_life_as_a_toy_goes_on_where_it_was_stopped(tmp_path, monkeypatch, undrawn, capfd):
    """Every stage with its command, one of which is stopped in the middle; each begins where the one before
    it ended; what is read back is what was exported."""
    from notes import whole_life
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "report", lambda *args: None)       # samples text
    complete = train.train
    (tmp_path / "out/quick/life/raw").mkdir(parents=True)          # of an earlier toy

    def stopped(config, *args):
        return complete(replace(config, steps=2 * (config.objective == "sft")), *args)
    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(SystemExit):
        whole_life.main(["--quick"])
    said, _ = capfd.readouterr()
    sft = next(line for line in said.splitlines() if line.startswith("$ torchrun train.py sft"))
    assert said.endswith(f"The stage \"SFT\" did not end: stopped at step 2 of 4\n  {sft[2:]}\n"
                         "Started again, python -m notes.whole_life goes on here.\n")

    # The same again
    monkeypatch.setattr(train, "train", complete)
    path = tmp_path / "out/quick/whole_life.csv"
    before = _note.read(path)
    rows = _note.grid(path, whole_life.cells(True), whole_life.run)
    said, _ = capfd.readouterr()
    assert rows[:len(before)] == before and said.count("\n$ ") == 6
    assert f"{sft} --resume\n" in said and "resuming out/quick/life/sft at step 2" in said
    stages = {row["arm"]: row for row in rows if "minutes" in row}
    assert list(stages) == list(whole_life.life(""))
    assert stages["pre-train"]["after"] == pytest.approx(stages["anneal"]["before"], rel=1e-6)
    assert stages["SFT"]["after"] < stages["SFT"]["before"]
    assert stages["pairs"]["documents"] == 8
    assert stages["read back"]["difference"] == 0
    assert stages["conversation"]["text"].startswith("> Who are you?\n")
    figure, lines = whole_life.show(rows)
    assert "| SFT | 1,024 tokens |" in "\n".join(lines) and len(figure.axes) == 3


def test_a_stage_of_a_life_says_what_failed(tmp_path, monkeypatch, capfd):
    from notes import whole_life
    monkeypatch.chdir(tmp_path)
    command = "python data.py clean prose=nowhere.jsonl out/prose"
    with pytest.raises(SystemExit):
        list(whole_life.run("clean prose", 0, ("out", False, command)))
    said, error = capfd.readouterr()
    assert "data.py: " in error and f'The stage "clean prose" did not end: status 1\n  {command}\n' in said


def test_the_problems_of_a_life_are_judged_and_unseen(tmp_path, monkeypatch):
    from notes import whole_life
    known, unseen = whole_life.sums(2000, 200)
    keys = [whole_life.operands(problem["result"]) for problem in known + unseen]
    assert (len(known), len(unseen)) == (2000, 200) and len(set(keys)) == 2200
    said = "\n".join(problem["output"] for problem in known)
    for problem in unseen:
        a, sign, b, *_ = problem["result"].split()
        assert not re.search(rf"(?<![+-] )\b({a} \{sign} {b}|{b} \{sign} {a}) =", said)
    assert whole_life.stated("27 + 5 = 32\nones: 6 + 4 + 1 = 11\n-3 + 5 = 2\nCheck: 8 + 9 = 17") == {
        ("+", 5, 27), ("+", 8, 9)}
    assert whole_life.operands("27 + 5 = 32") == whole_life.operands("5 + 27 = 32") != ("-", 5, 27)
    for problem, other in zip(known[:60], known[1:]):
        answer, result = problem["output"], problem["result"]
        assert whole_life.right(problem, answer)
        wrong = result[:-1] + str((int(result[-1]) + 1) % 10)
        assert not whole_life.right(problem, answer.replace(result, wrong)), "false"
        assert not whole_life.right(problem, answer.replace(result, "")), "no result"
        assert not whole_life.right(problem, answer + "\n1 + 1 = 3"), "more that is false"
        assert not whole_life.right(problem, other["output"]), "another problem's"

    # Of the text, problems with the numbers of unseen ones are left out.
    known, unseen = whole_life.sums(60, 4)
    told = [f"Again: {problem['output']}\n{problem['result']}\n" for problem in (unseen[0], known[0])]
    monkeypatch.setattr(embedded, "worked_math", lambda size: told)
    whole_life.raw(tmp_path / "raw", few=True)
    assert [row["text"] for row in whole_life.lines_of(tmp_path / "raw/math.jsonl")] == told[1:]
    assert whole_life.lines_of(tmp_path / "raw/unseen.jsonl") == unseen
    assert not (tmp_path / "raw.partial").exists()


def test_a_life_is_not_begun_over_an_earlier_one(tmp_path):
    from notes import whole_life
    for name in ("base", "raw"):
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match="has the runs of an earlier life: remove the folder"):
        list(whole_life.run("raw", 0, (str(tmp_path), True, "python -m notes.whole_life raw there")))
    assert (tmp_path / "raw").exists()


# ---- what has run beside all other tests -------------------------------------------------------------------
# Together two minutes on one core, of which most other tests leave one free.

@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """Begins what the last tests ask for, if they are selected → {test: process}, and a folder for them."""
    folder = tmp_path_factory.mktemp("beside")
    selected = {}
    for item in request.session.items:
        selected.setdefault(item.function, []).append(item)
    processes = {}
    if test_a_note_runs_end_to_end_as_a_toy in selected:
        names = [item.callspec.params["name"] for item in selected[test_a_note_runs_end_to_end_as_a_toy]]
        processes["toys"] = begun(f"import test_all; test_all.run_toys({str(folder)!r}, {names})",
                                  OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    if importlib.util.find_spec("triton") and test_interpreted in selected:
        processes["interpreted"] = begun(f"import test_all; test_all.try_interpreted({str(folder)!r})",
                                         TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    if importlib.util.find_spec("triton") and test_kernels_compile_for_gpus in selected:
        left_out = "192/", "/256", "documents", "small", "square", "fp32", "11001"       # notes/kernels.py
        proofs = f"[proof for proof in note.PROOFS if not any(word in proof.name for word in {left_out})]"
        processes["compiled"] = proving("[[*row.values(), list(note.faults(row))] for row in "
                                        f"note.prove({proofs}, ('sm_80', 'sm_90', 'gfx942'))]")
    yield processes, folder
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def tried_by_the_interpreter(beside):
    pytest.importorskip("triton")
    processes, folder = beside
    ended(processes["interpreted"])
    return folder


@pytest.mark.parametrize("claim", INTERPRETED)
def test_interpreted(claim, tried_by_the_interpreter):
    said = (tried_by_the_interpreter / claim).read_text()
    assert said == "", said


def test_kernels_compile_for_gpus(beside):
    """Without spills, and with matrix instructions."""
    pytest.importorskip("triton")
    rows = json.loads(ended(beside[0]["compiled"]))
    assert len(rows) > 20 and not [row for row in rows if row[-1]]
    assert all(row[3] >= 16 for row in rows), "registers were not read"


@pytest.fixture(scope="session")
def toys(beside):
    processes, folder = beside
    _, errors = processes["toys"].communicate(timeout=300)
    assert processes["toys"].returncode == 0, errors
    return folder


@pytest.mark.parametrize("name", [name for name in NOTES if name not in ("gpu", "whole_life")])
def test_a_note_runs_end_to_end_as_a_toy(name, toys):
    folder = toys / name
    assert not (folder / "failed").exists(), (folder / "failed").read_text()
    page = (folder / f"out/quick/{name}.md").read_text("utf-8")
    rows = _note.read(folder / f"out/quick/{name}.csv")
    cells = importlib.import_module(f"notes.{name}").cells(True)
    assert {(row["arm"], row["seed"]) for row in rows} == {cell[:2] for cell in cells}
    assert "minutes on" in page and (folder / f"out/quick/{name}.png").stat().st_size > 10_000


def test_compiling_poly_norm_or_layers_changes_no_number():
    """The only test that compiles, which is slow beside others. Training uses the compiled norm, evaluation
    the closed form."""
    network, x = lively(replace(TINY, compile_act=True, n_layer=1)), tokens(2, 16)
    twin, compiled = lively(replace(TINY, n_layer=1)), lively(replace(TINY, n_layer=1))
    if kernels.compiled_poly_norm() is not None:
        compiled.layers["0"].compile_parts()
    else:
        assert not shutil.which("g++")
    for n in (network, twin, compiled):
        n(x, x)[0].backward()
    for n in (network, compiled):
        for (name, a), b in zip(n.named_parameters(), twin.named_parameters()):
            torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(n.layers["0"].attention.max_logits,
                                   twin.layers["0"].attention.max_logits)
