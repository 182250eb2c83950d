"""What each fast path costs relative to its baseline, on this machine, in one run.

  python -m notes.speed                 # operations, optimizer, a step: 2 minutes; adds a run to speed.csv
  python -m notes.speed --whole=FILE    # `shakespeare` and its control, interleaved, on that text: 10 minutes
  python -m notes.speed --ranks         # ZeRO-1 on two ranks: half a minute
  python -m notes.speed --text          # tokenizing beside tiktoken alone, cleaning beside rensa: a minute
  python -m notes.speed --plot          # table and figure from speed.csv alone

Every number is a ratio of two medians whose calls are interleaved, because machines differ and their load
changes by the minute. Run it on an otherwise idle machine.
"""
import argparse
import contextlib
import csv
import itertools
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import kernels
import muonclip
import parallel
import train
from data import Batch
from model import Attention, FeedForward, ModelConfig, MoE, Ops, Transformer, identity
from notes import _note

CSV = Path(__file__).with_suffix(".csv")
COLUMNS = ["run", "what", "case", "baseline", "ms", "baseline_ms", "ratio", "target"]


def in_turn(*fs, rounds=15):
    """Median milliseconds of each function, with their calls interleaved."""
    times = [[] for _ in fs]
    for i in range(rounds + 3):
        for f, ts in zip(fs, times):
            begin = time.perf_counter()
            f()
            ts.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(ts[3:]) for ts in times]


def there_and_back(f, *inputs):
    """Forward and backward of f as a single function without arguments."""
    weight = torch.randn_like(f(*inputs).detach())
    return lambda: torch.autograd.backward(f(*inputs), weight)


# ---- operations --------------------------------------------------------------------------------------------

def poly_norm():
    for shape in ((768, 512), (2048, 2048)):
        x, w = torch.randn(shape, requires_grad=True), torch.full((3,), 1 / 3, requires_grad=True)
        b = torch.zeros(1, requires_grad=True)
        forms = {"compiled": lambda x, w, b: kernels.poly_norm(x, w, b, compiled=True),
                 "closed form": kernels.poly_norm, "definition": kernels.poly_norm_ref}
        calls = [there_and_back(F.gelu, x), *(there_and_back(f, x, w, b) for f in forms.values())]
        gelu, *times = in_turn(*calls)
        for name, t in zip(forms, times):
            yield "PolyNorm, forward + backward", f"{name}, {shape[0]}×{shape[1]}", "GELU", t, gelu, \
                "≤ 2" if name == "compiled" else ""


def attention():
    config = ModelConfig(n_head=8, n_kv_head=8, d_model=256, d_head=32, context=1024)
    for B, T, target in ((16, 64, "≤ 1.5"), (8, 256, "≤ 2"), (2, 1024, "≤ 2")):
        calls = []
        for differential in (True, False):
            module = Attention(replace(config, differential=differential), 0, Ops()).eval()
            for p in module.parameters():
                nn.init.normal_(p, 0, 0.05)
            calls.append(there_and_back(lambda x, module=module: module(x)[0],
                                        torch.randn(B, T, 256, requires_grad=True)))
        ours, mha = in_turn(*calls)
        yield "attention module, forward + backward", f"differential, {B}×{T}", "MHA, as many maps", \
            ours, mha, target


# ---- the optimizer -----------------------------------------------------------------------------------------

class Matrices(nn.Module):
    """The hidden matrices of 6 layers of width 512: 25.2M parameters."""

    def __init__(self):
        super().__init__()
        shapes = dict(wq=(512, 512), wk=(512, 512), wv=(512, 512), wo=(512, 512), gate=(2048, 512),
                      up=(2048, 512), down=(512, 2048))
        self.layers = nn.ParameterDict({f"{i}-{name}": nn.Parameter(0.02 * torch.randn(shape))
                                        for i in range(6) for name, shape in shapes.items()})
        for p in self.parameters():
            p.grad = torch.randn_like(p)


@torch.no_grad()
def plain_muon(parameters, momenta):
    for p, m in zip(parameters, momenta):
        m.mul_(0.95).add_(p.grad)
        g = p.grad + 0.95 * m
        o = muonclip.newton_schulz_ref(g.mT).mT if g.shape[0] > g.shape[1] else muonclip.newton_schulz_ref(g)
        p.mul_(1 - 1e-4).sub_(o, alpha=1e-3 * 0.2 * max(p.shape) ** 0.5)


def mixture():
    """A layer of experts against a dense one with as many active weights per token; 2,048 tokens."""
    base = replace(train.RECIPES["laptop-k2"].model, zero_out=False)
    for width, wide, experts in ((128, 128, 16), (256, 256, 16), (256, 512, 8)):
        config = replace(base, d_model=width, d_expert=wide, d_ff=3 * wide, n_expert=experts)
        moe, dense = MoE(config, Ops(), range(experts)), FeedForward(config, Ops())
        with torch.no_grad():
            for p in (*moe.parameters(), *dense.parameters()):
                p.normal_(0, 0.1)
        x = torch.randn(8, 256, width, requires_grad=True)
        ours, theirs = in_turn(there_and_back(lambda x, moe=moe: moe(x)[0], x), there_and_back(dense, x))
        yield "experts, forward + backward", \
            f"{experts} of width {wide}, 2 and a shared one, model {width}", \
            "dense, as many multiplications", ours, theirs, "≤ 1.5"


def optimizer():
    model = Matrices()
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    theirs = torch.optim.Muon(parameters, lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours = muonclip.MuonClip(list(model.named_parameters()), muonclip.OptimConfig())
    ours, torchs, plain = in_turn(ours.step, theirs.step, lambda: plain_muon(parameters, momenta), rounds=7)
    yield "Muon step, 25.2M parameters", "ours (float32)", "torch.optim.Muon (bfloat16)", \
        ours, torchs, "≤ 0.4"
    yield "Muon step, 25.2M parameters", "ours (float32)", "plain float32 loop", ours, plain, "≤ 0.7"


# ---- a training step ---------------------------------------------------------------------------------------

def step_of(recipe, batch):
    """A model and one of its training steps as functions: data, forward, backward, optimizer, clip."""
    config = train.RECIPES[recipe]
    model, state = Transformer(config.model), {}
    optim = muonclip.MuonClip(list(model.named_parameters()), replace(config.optim, lr=1e-3))
    data = replace(train.RECIPES["laptop"].data, horizon=config.tokens)          # the default text for all
    corpus = train.prepare(replace(data, tokenizer=config.data.tokenizer), config.model.vocab_size)
    batches = train.Batches(corpus, data, 0, batch, config.model.context)
    attentions = list(model.attentions().values())

    def load():
        state["batch"] = batches(7)

    def forward():
        model.zero_grad()
        state["loss"] = model(state["batch"].x, state["batch"].y)[0]
    return model, [load, forward, lambda: state["loss"].backward(), optim.step,
                   lambda: muonclip.qk_clip_(attentions, 100.0)]


def logits():
    """What watching the largest logits adds to a training step. The pass over every layer's queries and keys
    is timed by itself, interleaved with a step without it, since a whole step varies by more than the pass
    takes."""
    model, parts = step_of("laptop", train.RECIPES["laptop"].batch)
    config, attentions = model.config, list(model.attentions().values())
    q, k = torch.randn(2, train.RECIPES["laptop"].batch, config.n_head, config.context, config.d_head)

    def step():
        for a in attentions:
            a.clear_logits(math.inf)                   # logits are not watched
        for part in parts[:-1]:
            part()

    def watch(tau, clip=False):
        def run():
            for a in attentions:
                a.max_logits.copy_(kernels.max_logits(q, k, None, tau)[0])
            if clip:
                muonclip.qk_clip_(attentions, 1e-3)
        return run
    top = kernels.max_logits_ref(q, k).max().item()
    norms = next(kernels.bound_max_logits(q, k)).min().item()
    for case, run, target in (("random heads, every logit just below τ/3", watch(3 * top), "≤ 1.03"),
                              ("both bounds tried in vain", watch(0.5 * norms), ""),
                              ("above: exact for every head", watch(None), ""),
                              ("exact, and every head clipped", watch(None, True), "")):
        extra, none = in_turn(run, step)
        yield "laptop step, watching the largest logit", case, "not watching", none + extra, none, target


def bounds():
    """How tight the bounds are, for random heads and for heads that explode along one direction."""
    B, H, T, d = 8, 4, 256, 32
    for case, push in (("random heads", 0.0), ("along one direction", 30.0)):
        q, k = torch.randn(B, H, T, d), torch.randn(B, H, T, d)
        q[..., 0] += push
        k[..., 0] += push
        exact = kernels.max_logits_ref(q, k)
        for name, bound in zip(("norms", "centres of 16 keys"), kernels.bound_max_logits(q, k)):
            yield "bound on the largest logit (in units of logit)", f"{name}, {case}", "the maximum", \
                bound.max().item(), exact.max().item(), ""


def compiled():
    """`--compile`: torch.compile of every layer, from a cold start, with exact largest logits."""
    from torch._inductor.utils import fresh_inductor_cache
    parts = []
    for on in (False, True):
        model, calls = step_of("laptop", train.RECIPES["laptop"].batch)
        for layer in model.layers.values() if on else ():
            layer.compile_parts()
        for a in model.attentions().values():
            a.clear_logits(None if on else 100.0)
        parts.append(lambda calls=calls: [call() for call in calls])
    with fresh_inductor_cache():
        begin = time.perf_counter()
        parts[1]()
        first = (time.perf_counter() - begin) * 1e3
        plain, ours = in_turn(*parts)
    yield "laptop step, --compile", "after the first step", "without", ours, plain, ""
    yield "laptop step, --compile", "the first step, nothing cached (in steps)", "without", first, plain, ""


def split():
    for recipe in ("laptop", "gpt2", "shakespeare"):
        batch = train.RECIPES[recipe].batch
        times = in_turn(*step_of(recipe, batch)[1], rounds=15)
        for name, t in zip(("data", "forward", "backward", "optimizer", "clip"), times):
            yield f"step of {recipe}, batch {batch}", name, "whole step", t, sum(times), ""


# ---- two ranks ---------------------------------------------------------------------------------------------

def on_a_rank(rank, port, path):
    """A step of `laptop` on two ranks, three optimizers interleaved; rank 0 writes the times."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
    torch.set_num_threads(1)
    mesh, config = parallel.join_mesh(parallel.MeshConfig()), train.RECIPES["laptop"]
    x = torch.randint(config.model.vocab_size, (config.batch // 2, config.model.context + 1))
    batch = Batch(x[:, :-1], x[:, 1:], None, torch.zeros(len(x), dtype=torch.int64))
    plan = config.mesh.plans(len(x), len(x))[0]                    # a single micro-batch

    def ours(name):
        optim = muonclip.OptimConfig(name=name, lr=1e-3, tau=0.0)
        model = Transformer(config.model)
        owners = parallel.Zero1(dict(model.named_parameters()), lambda named: muonclip.MuonClip(named, optim),
                                lambda *p: muonclip.weigh(*p, optim), mesh)

        def step():
            parallel.execute(plan, {0: model}, batch, len(x), mesh)
            owners.reduce()
            owners.clip_norm_(1.0)
            owners.step(True, lambda masters: None)
            owners.drop()
        return step

    def theirs():
        model = DistributedDataParallel(Transformer(config.model), broadcast_buffers=False)
        optim = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

        def step():
            model.zero_grad()
            loss, *_ = model(batch.x, batch.y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
        return step
    adamw, muon, zero = in_turn(ours("adamw"), ours("muonclip"), theirs(), rounds=25)
    if rank == 0:
        Path(path).write_text(f"{adamw} {muon} {zero}")
    parallel.leave_mesh()


class Block(nn.Module):
    """A chunk of the pipeline that is timed: linear, GELU, linear; the loss is the mean square."""
    width = 256

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, x):
        return self.net(x)

    def body(self, x, doc_start=None, dtype=None):
        return self.net(x), 0.0

    def loss(self, h, targets, weight=None):
        terms = (h - targets).square().mean(-1).flatten()
        return terms.mean(), terms


class SplitBlock(Block):
    """A Block whose matrices get their gradients in W."""

    def __init__(self, savings):
        super().__init__()
        self.savings = savings

    def body(self, x, doc_start=None, dtype=None):
        first, gelu, second = self.net
        h, = self.savings.linear("up", (first.weight,), identity, (), x)
        y, = self.savings.linear("down", (second.weight,), gelu, (), h + first.bias)
        return y + second.bias, 0.0


def seconds_of_acts(run, plan, other_waits=lambda: 0.0):
    """Run a plan once → the seconds of each act, with its sends and receives, but without waiting.

    other_waits() → seconds waited so far for anything else."""
    post, receive = parallel.Messages.post, parallel.Messages.receive
    starts, waited, others = [], [], []

    def begins(*args):
        starts.append(time.perf_counter())
        waited.append(0.0)
        others.append(other_waits())
        return post(*args)

    def waits(*args):
        began = time.perf_counter()
        tensor = receive(*args)
        waited[-1] += time.perf_counter() - began
        return tensor
    parallel.Messages.post, parallel.Messages.receive = begins, waits
    try:
        run()
    finally:
        parallel.Messages.post, parallel.Messages.receive = post, receive
    stops = [*starts[1:], time.perf_counter()]
    others = [b - a for a, b in itertools.pairwise((*others, other_waits()))]
    return [stop - start - wait - other for start, stop, wait, other in zip(starts, stops, waited, others)]


def without_messages(block, rounds=100):
    """Median seconds of a forward and of a backward of a block; the other rank measures its own."""
    x, gradient = torch.randn(2, 4, 128, 256)
    seconds = dict(F=[], B=[])
    for _ in range(rounds):
        began = time.perf_counter()
        out, _ = block.body(x.detach().requires_grad_())
        middle = time.perf_counter()
        out.backward(gradient)
        seconds["F"].append(middle - began)
        seconds["B"].append(time.perf_counter() - middle)
    return {op: statistics.median(times) for op, times in seconds.items()}


def on_a_stage(rank, port, path):
    """Interleaved 1F1B on two stages of four chunks, against torch.distributed.pipelining, in turn; and the
    time that the simulator gives."""
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
    torch.set_num_threads(1)
    mesh = parallel.join_mesh(parallel.MeshConfig(pp=2, chunks=4))
    x, y = torch.randn(2, 32, 128, 256)
    blocks = {}
    for i in range(8):
        block = Block()                                            # all are made: the same numbers everywhere
        if i % 2 == rank:
            blocks[i] = block
    batch = Batch(x, y, None, None)
    plans = parallel.interleaved(2, 8, 4)

    def ours():
        for block in blocks.values():
            block.zero_grad()
        parallel.execute(plans[rank], blocks, batch, 4, mesh)

    stages = [PipelineStage(block, i, 8, torch.device("cpu"), group=mesh.pp.group)
              for i, block in blocks.items()]
    schedule = ScheduleInterleaved1F1B(stages, 8, loss_fn=F.mse_loss)

    def theirs():
        for block in blocks.values():
            block.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)

    # Ours with a split backward; torch's ScheduleInterleavedZeroBubble stops here with an error
    savings = parallel.Savings(split=True)
    split_plans = parallel.split_backwards(plans)
    shared = {i: SplitBlock(savings) for i in blocks}
    for i, block in shared.items():
        block.net = blocks[i].net

    def split():
        for block in blocks.values():
            block.zero_grad()
        parallel.execute(split_plans[rank], shared, batch, 4, mesh, None, savings, str)

    # They compute the same gradients.
    gradients = []
    for step in (ours, theirs, split):
        step()
        gradients.append([p.grad.clone() for block in blocks.values() for p in block.parameters()])
    for a, b, c in zip(*gradients):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)

    acts = []

    def together(step):
        def timed():
            parallel.barrier(mesh)
            step()
            parallel.barrier(mesh)
        return timed
    alone = without_messages(blocks[rank])
    ms, torch_ms, split_ms = in_turn(together(lambda: acts.append(seconds_of_acts(ours, plans[rank]))),
                                     together(theirs), together(split), rounds=41)

    # The simulated times: of every run, from its own acts; and from acts without messages
    everyone = parallel.gather([acts, alone], mesh)
    if rank == 0:
        ideals = []
        for of_ranks in zip(*(acts for acts, _ in everyone)):
            cost = {act: t for plan, times in zip(plans, of_ranks) for act, t in zip(plan, times)}
            ideals.append(parallel.simulate(plans, cost.get).total * 1e3)
        bare = {op: statistics.mean(times[op] for _, times in everyone) for op in "FB"}
        bare_ms = parallel.simulate(plans, lambda act: bare[act.op]).total * 1e3
        Path(path).write_text(f"{ms} {torch_ms} {statistics.median(ideals)} {bare_ms} {split_ms}")
    parallel.leave_mesh()


def on_two_ranks(f):
    """The numbers that f(rank, port, path) writes, run in two processes."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, path = str(free.getsockname()[1]), f"{folder}/times"
        free.close()
        torch.multiprocessing.spawn(f, (port, path), nprocs=2)
        return map(float, Path(path).read_text().split())


def ranks():
    ours, torchs, as_run, alone, split = on_two_ranks(on_a_stage)
    what = "interleaved 1F1B, two stages of four chunks"
    yield what, "8 micro-batches", "torch.distributed.pipelining", ours, torchs, "≤ 1.02"
    yield what, "8 micro-batches", "simulated, acts as in the run", ours, as_run, "≤ 1.08"
    yield what, "8 micro-batches", "simulated, acts without messages", ours, alone, ""
    yield what, "8 micro-batches, split backward", "unsplit", split, ours, ""
    adamw, muon, zero = on_two_ranks(on_a_rank)
    theirs = "DDP and ZeroRedundancyOptimizer, AdamW"
    yield "laptop step, two ranks of one thread", "ZeRO-1 with AdamW", theirs, adamw, zero, "≤ 1"
    yield "laptop step, two ranks of one thread", "ZeRO-1 with MuonClip", theirs, muon, zero, ""


# ---- text --------------------------------------------------------------------------------------------------

def tokenizing():
    """`data.py prepare` on a file of the standard library's code: reading, hashing, splitting, tokenizing and
    writing by one thread, beside tiktoken alone on the same documents."""
    docs = data.documents("code")
    size = sum(len(doc.encode()) for doc in docs) / 1e6
    tokenizer = data.prepare(data.DataConfig(), 4096).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder, "tokenizer.json"))
        file = Path(folder, "code.jsonl")
        file.write_text("".join(json.dumps(dict(text=doc)) + "\n" for doc in docs))
        source, _ = data.find_source("code", str(file), data.DataConfig())
        plan = data.Plan(source._replace(large=True), [source.files], folder, 2, "", "")
        manifest, _, _ = data.shard_paths(plan, source.files)

        def prepared():
            manifest.unlink(missing_ok=True)
            data.work(plan, 1, lambda **seen: None)

        def alone():
            for doc in docs:
                tokenizer.encoding.encode_to_numpy(doc, disallowed_special=())
        ours, theirs = in_turn(prepared, alone, rounds=5)
    yield "tokenizing text", f"{size:.1f} MB in {len(docs):,} documents", "tiktoken", ours, theirs, "≤ 1.25"


def signing():
    """Signatures of the documentation in the default corpus, by one process; with rensa, if it is there."""
    rensa = None
    with contextlib.suppress(ImportError):
        import rensa
    docs = data.documents("prose")
    size = sum(len(doc.encode()) for doc in docs) / 1e6

    def rensas():
        for doc in docs:
            words = data.spaced(data.folded(doc)).split()
            sketch = rensa.RMinHash(num_perm=112, seed=1)
            sketch.update([" ".join(words[i:i + 5]) for i in range(len(words) - 4)])
            sketch.digest()
    case = f"{size:.1f} MB in {len(docs):,} documents"
    ours, *theirs = in_turn(lambda: data.sign(docs, 0), *[rensas] * bool(rensa), rounds=5)
    yield "signing text", case, "2 MB/s", ours, size / 2 * 1e3, "≤ 1"
    for t in theirs:
        yield "signing text", case, "rensa", ours, t, ""


# ---- whole runs: a loss, and the time to reach it ----------------------------------------------------------

def control(path):
    """A common CPU recipe: GPT-2 style, 4 layers of 128, context 64, AdamW 1e-3, 2,000 steps of 12×64."""
    gpt2, ours = train.RECIPES["gpt2"], shakespeare(path)
    return replace(gpt2, model=replace(gpt2.model, context=64, vocab_size=261), data=ours.data, batch=12,
                   micro=12, tokens=2000 * 12 * 64, eval_every=10 ** 9, eval_windows=0, save_every=10 ** 9,
                   optim=replace(gpt2.optim, lr=1e-3, warmup=0.05, beta2=0.99, floor=0.1))


def shakespeare(path):
    recipe = train.RECIPES["shakespeare"]
    return replace(recipe, eval_every=10 ** 9, save_every=10 ** 9,
                   data=replace(recipe.data, files=f"shakespeare={path}"))


class PlainGPT(nn.Module):
    """The control's network as one would write it in an afternoon."""

    def __init__(self, V=261, T=64, C=128, L=4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.norm = nn.LayerNorm(C, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict(dict(
            n1=nn.LayerNorm(C, bias=False), qkv=nn.Linear(C, 3 * C, bias=False),
            o=nn.Linear(C, C, bias=False), n2=nn.LayerNorm(C, bias=False),
            up=nn.Linear(C, 4 * C, bias=False), down=nn.Linear(4 * C, C, bias=False))) for _ in range(L))

    def forward(self, x, y):
        h = self.tokens(x) + self.positions.weight
        for a in self.layers:
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in a.qkv(a.n1(h)).chunk(3, -1))
            h = h + a.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + a.down(F.gelu(a.up(a.n2(h))))
        return F.cross_entropy((self.norm(h) @ self.tokens.weight.T).flatten(0, 1), y.flatten())


def against_plain(path, steps=200):
    """Our loop for the control, logging included, against a plain loop over the same network, interleaved."""
    config = replace(control(path), steps=steps, eval_windows=4)
    corpus = train.prepare(config.data, 261)

    def plain():
        model = PlainGPT()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.from_numpy(corpus.domains["shakespeare"].train.astype("int64"))
        begin = time.perf_counter()
        for _ in range(steps):
            at = torch.randint(len(ids) - 65, (12,)).tolist()
            x, y = (torch.stack([ids[i + s:i + s + 64] for i in at]) for s in (0, 1))
            optim.zero_grad(set_to_none=True)
            loss = model(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
            loss.item()
        return (time.perf_counter() - begin) * 1e3 / steps
    pairs = [(train.train(config, quiet=True)[0][-1]["seconds"] * 1e3 / steps, plain()) for _ in range(3)]
    ours, theirs = (statistics.median(t) for t in zip(*pairs))
    yield "control, one step", "our loop", "a plain loop, same network", ours, theirs, "≤ 1.1"


def whole(path):
    """`shakespeare` and its control, three interleaved runs each: seconds of training, final loss."""
    runs = {"shakespeare": shakespeare(path), "control": control(path)}
    ends = {name: [] for name in runs}
    for seed in range(3):
        for name, config in runs.items():
            begin = time.perf_counter()
            history, _ = train.train(replace(config, seed=seed), quiet=True)
            ends[name].append((history[-1]["seconds"] * 1e3, history[-1]["val_shakespeare"]))
            seconds = time.perf_counter() - begin
            print(f"{name}, seed {seed}: {history[-1]['seconds']:.1f} s of training ({seconds:.1f} "
                  f"s with both evaluations), {ends[name][-1][1]:.4f} nats/byte", flush=True)
    (ours, loss), (theirs, their_loss) = (map(statistics.median, zip(*ends[name])) for name in runs)
    yield "Tiny Shakespeare, time of training", f"shakespeare, to {loss:.3f}", \
        f"the control, to {their_loss:.3f}", ours, theirs, "≤ 0.25"


# ---- table and figure --------------------------------------------------------------------------------------

def measured(path, two_ranks, text):
    """Rows of the whole runs on the text at `path`, of two ranks, of text, or by default of the parts."""
    parts = (poly_norm, attention, mixture, optimizer, bounds, logits, split, compiled)
    if path:
        parts = against_plain, whole
    elif two_ranks or text:
        parts = (ranks,) if two_ranks else (tokenizing, signing)
    for part in parts:
        yield from part(path) if path else part()


def show():
    """Write the table of speed.md and speed.png from speed.csv."""
    with open(CSV, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        case, baseline = (row[key].split(", to ")[0] for key in ("case", "baseline"))
        found.setdefault((row["what"], case, baseline), []).append(row)
    _note.write_table(CSV.with_suffix(".md"), _note.table(
        ("what", "case", "beside", "ratios, one a run", "wanted"),
        *((what, some[-1]["case"], some[-1]["baseline"],
           ", ".join(f"{float(row['ratio']):.2f}" for row in some), some[-1]["target"])
          for (what, *_), some in found.items())))

    bars = [(f"{what.split(',')[0]}: {case}\nbeside {baseline}", [float(row["ratio"]) for row in some],
             float(some[0]["target"][2:]))
            for (what, case, baseline), some in found.items() if some[0]["target"]]
    figure, [[axis]] = _note.panels(1, 1, width=9, height=0.55 * len(bars) + 1)
    for i, (label, ratios, target) in enumerate(reversed(bars)):
        colour = _note.COLOURS[0 if max(ratios) <= target else 4]
        axis.barh(i, sum(ratios) / len(ratios), color=colour, height=0.6)
        axis.plot(ratios, [i] * len(ratios), "k.", ms=4)
        axis.plot([target, target], [i - 0.4, i + 0.4], color="k", lw=2)
    axis.set(yticks=range(len(bars)), yticklabels=[label for label, *_ in reversed(bars)], xscale="log",
             xlabel="time / baseline (black: wanted at most; dots: runs; orange: missed)")
    axis.tick_params(axis="y", labelsize=9)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=9)
    figure.savefig(CSV.with_suffix(".png"), dpi=110)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", metavar="FILE", help="Tiny Shakespeare, as a text file")
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args(argv)
    if args.plot:
        return show()
    fresh = not CSV.exists()
    with open(CSV, "a+", newline="") as file:
        file.seek(0)
        run = 1 + max((int(row["run"]) for row in csv.DictReader(file)), default=0)
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for what, case, baseline, ms, baseline_ms, target in measured(args.whole, args.ranks, args.text):
            ratio = ms / baseline_ms
            writer.writerow(dict(zip(COLUMNS, (run, what, case, baseline, f"{ms:.3f}", f"{baseline_ms:.3f}",
                                               f"{ratio:.3f}", target))))
            file.flush()
            print(f"{what:<46} {case:<36} {ms:>9.2f} / {baseline_ms:>9.2f} = {ratio:5.2f} {target:<7} "
                  f"{baseline}")
    show()


if __name__ == "__main__":
    main(sys.argv[1:])
