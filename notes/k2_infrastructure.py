"""Kimi K2's overlap: tokens travel to experts and back while another micro-batch computes.

Arms "clock, ..." run plans of `parallel.execute`, woven and not, on two ranks that compute and on four that
sleep, with exchanges slowed to a known time; they need an otherwise idle machine. Arms "K2, ..." simulate its
step on many GPUs, from the assumptions below; `python parallel.py --k2` prints their table.
"""
import functools
import json
import os
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import parallel
import train
from data import Batch
from model import PRESETS, ModelConfig, Transformer, count_parts, whole
from notes import _note
from notes._figure import put_timelines
from notes.schedules import Sleep, on_ranks
from notes.speed import seconds_of_acts

# ---- K2 on many GPUs: the assumptions ----------------------------------------------------------------------

FLOPS = 400e12               # FLOP/s of a GPU in matmuls: 40% of an H800's bfloat16 peak             [ours]
NETWORK = 40e9               # bytes/s of a GPU to other nodes, each way: 80% of 400 Gb/s             [ours]
NVLINK = 160e9               # bytes/s within a node, each way: 80% of an H800's 200 GB/s             [ours]
LATENCY = 50e-6              # seconds of a small exchange: the counts, and the host that reads them  [ours]
NODE = 8                     # GPUs of a node                                                       [§2.4.1]
TOKENS = 67_108_864          # of a global batch                                                      [§2.5]
WINDOW = 4096                # tokens of a window; a micro-batch is one window                  [§2.5; ours]
BYTES = 2                    # of a number that travels: bfloat16                                     [ours]
P, V = 16, 2                 # stages; chunks of layers on each                               [§2.4.2; ours]
GPUS = 256, 1024, 4096


class Work:
    """Seconds of acts, exchanges and messages of K2, with `v` chunks a stage, `ep` ranks in a group and
    `heads` heads. split: a B is without the weights' gradients."""

    def __init__(self, v, ep=16, heads=64, split=False):
        self.split = split
        mesh = parallel.MeshConfig(pp=P, chunks=v, ep=ep)
        model = replace(PRESETS["kimi-k2"], n_head=heads, n_kv_head=heads)
        config = replace(train.RECIPES["kimi-k2"], model=model, mesh=mesh)
        self.ranges = train.chunk_ranges(config)
        self.parts = tuple(count_parts(model, layers) for layers in self.ranges)

        # Multiply-adds of a token in a dense layer's parts, and in one with experts
        with torch.device("meta"):
            some = replace(model, n_layer=2)
            sizes = {name: p.numel() for name, p in Transformer(some, experts=range(1)).named_parameters()}
        scores = WINDOW / 2 * heads * (model.d_head + model.d_rope + model.d_value)

        def size(pattern):
            return sum(n for name, n in sizes.items() if re.match(pattern, name))
        self.seconds_of = {
            "attention": self.time(size(r"layers\.1\.(attention|ffn\.router)") + scores),
            "shared": self.time(size(r"layers\.1\.ffn\.shared")),
            "experts": self.time(size(r"layers\.1\.ffn\.(gate|up|down)") * model.n_active),
            "dense": self.time(size(r"layers\.0\.ffn")),
            "head": self.time(size("head"))}

        # A row for each expert of a token: those that stay in the node go over NVLink, the others do not
        rows = WINDOW * model.n_active * model.d_model * BYTES
        near = min(1.0, NODE / ep)
        self.exchange_seconds = max(rows * near / NVLINK, rows * (1 - near) / NETWORK)
        self.message = WINDOW * model.d_model * BYTES / NETWORK

    def time(self, multiply_adds):
        return 2 * multiply_adds * WINDOW / FLOPS

    @functools.cache
    def forward(self, chunk, part):
        """Seconds of a part of a chunk's forward: 0 is the first."""
        sparse = self.parts[chunk] // 3
        took = 0.0
        if part % 3 == 0 and part < 3 * sparse:
            took += self.seconds_of["attention"]
        if part % 3 == 1:
            took += self.seconds_of["shared"]
        if part % 3 == 2:
            took += self.seconds_of["experts"]
        if chunk == 0 and part == 0:
            took += self.seconds_of["attention"] + self.seconds_of["dense"]
        if chunk == len(self.parts) - 1 and part == self.parts[chunk] - 1:
            took += self.seconds_of["head"]
        return took

    def cost(self, act):
        """A backward's gradients by inputs and by weights each take as long as the forward."""
        n = self.parts[act.chunk]
        if act.op == "F":
            return self.forward(act.chunk, n - 1 - act.left)
        if act.op == "W":
            return sum(self.forward(act.chunk, part) for part in range(n))
        return self.forward(act.chunk, act.left) * (1 if self.split else 2)

    def exchange(self, act):
        kind = parallel.exchanged_after(act)
        if kind == "counts":
            return LATENCY
        return self.exchange_seconds if kind else 0.0

    def step(self, plans):
        return parallel.simulate(plans, self.cost, self.message, self.exchange)


def in_parts(plans, parts):
    """Plans cut into parts that follow each other."""
    return [[part for act in plan for part in parallel.in_parts(act, parts)] for plan in plans]


# What is added from row to row: (chunks on a stage, whether woven, whether split)
ARRANGEMENTS = {
    "1F1B": (1, False, False),
    "interleaved": (2, False, False),
    "+1 warm-up, woven": (2, True, False),
    "W under messages": (2, True, True),
}


def step_of_k2(gpus, name, ep=16, heads=64):
    """(Work, timeline) of a step of K2 under one of ARRANGEMENTS."""
    v, woven, split = ARRANGEMENTS[name]
    m = TOKENS // WINDOW // (gpus // P)
    work = Work(v, ep, heads, split)
    if woven:
        return work, work.step(parallel.overlapped(P, m, v, work.parts, split))
    plans = parallel.one_f_one_b(P, m) if v == 1 else parallel.interleaved(P, m, v)
    return work, work.step(in_parts(plans, work.parts))


CELLS = {f"K2, {gpus} GPUs: {name}": (gpus, name, 16, 64) for gpus in GPUS for name in ARRANGEMENTS}
CELLS |= {f"K2, 1024 GPUs: woven, EP {ep}, {heads} heads": (1024, "+1 warm-up, woven", ep, heads)
          for ep in (8, 16, 32, 64) for heads in (64, 128)}


def row_of_k2(gpus, name, ep, heads):
    """What a step takes, and its shares: idle in the bubble, waiting for exchanges and for messages."""
    work, found = step_of_k2(gpus, name, ep, heads)
    exchange, message = found.waits["exchange"], found.waits["message"]
    return dict(gpus=gpus, ep=ep, heads=heads, seconds=found.total, exchange=exchange, message=message,
                bubble=found.idle - exchange - message, micro_batches=TOKENS // WINDOW // (gpus // P),
                attention_ms=1e3 * work.seconds_of["attention"], exchange_ms=1e3 * work.exchange_seconds,
                peak=max(found.peaks))


def assumptions():
    """The numbers that the simulation of K2 rests on, with the lengths that follow from them."""
    work = Work(V)
    ms = {name: f"{1e3 * seconds:.2f} ms" for name, seconds in work.seconds_of.items()}
    return [
        f"{FLOPS / 1e12:.0f} TFLOP/s a GPU [ours]; network {NETWORK / 1e9:.0f} GB/s, NVLink "
        f"{NVLINK / 1e9:.0f} GB/s, each way [ours]; counts {LATENCY * 1e6:.0f} us [ours]",
        f"pp {P} x ep 16, nodes of {NODE} GPUs [report]; {TOKENS / 1e6:.0f}M tokens a step in windows of "
        f"{WINDOW} [report], one a micro-batch [ours]; {V} chunks a stage [ours]; bfloat16 travels [ours]",
        f"forward of one micro-batch: attention {ms['attention']}, shared expert {ms['shared']}, experts "
        f"{ms['experts']}, dense layer {ms['dense']}, head {ms['head']}; B and W each as long as the forward",
        f"dispatch or combine {1e3 * work.exchange_seconds:.2f} ms; message {1e3 * work.message:.2f} ms"]


def table(rows):
    """The rows of `row_of_k2` as lines of text columns: (arm, seconds, bubble, exchange, message)."""
    shares = "bubble", "exchange", "message"
    return [(row["arm"], f"{row['seconds']:.1f}", *(f"{row[name]:.1%}" for name in shares)) for row in rows]


def main():
    """Print the assumptions, and the step of K2 under each arrangement."""
    print("\n".join(assumptions()))
    rows = [dict(arm=arm, **row_of_k2(*cell)) for arm, cell in CELLS.items()]
    for line in (("", "seconds", "bubble", "exchange", "message"), *table(rows)):
        print(f"{line[0]:<42}", *(f"{word:>9}" for word in line[1:]))


# ---- against the clock -------------------------------------------------------------------------------------

SLOW = dict(computing=0.015, sleeping=0.03)     # seconds of an exchange, from its start
MICRO_BATCHES = 8
NAP = dict(A=0.02, S=0.01, E=0.04, C=0.005)    # seconds of a forward's parts that sleep; a backward's: twice
MODEL = ModelConfig(n_layer=2, n_head=4, n_kv_head=4, d_model=192, d_head=32, d_ff=384, vocab_size=512,
                    context=256, differential=False, act="silu", kv_rank=64, q_rank=96, d_rope=16, d_value=32,
                    n_expert=8, n_active=2, d_expert=256, n_shared=1, n_dense=0, tie=False)


class Sleeper(nn.Module):
    """A chunk with one layer of experts, which only sleeps, and whose tokens travel as real ones do."""
    width = 8

    def __init__(self, mesh):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.mesh = mesh

    def nap(self, x, part):
        return Sleep.apply(x, self.weight, NAP[part], 2 * NAP[part])

    def parts(self, x, doc_start=None, dtype=None):
        x = self.nap(x, "A")
        counts = torch.ones(self.mesh.ep.size, dtype=torch.int64)
        trip = parallel.Exchange(self.mesh, counts)
        rows = x.flatten(0, 1).repeat(len(counts), 1)
        x, rows = yield "counts", (x, rows)
        moving = trip.dispatch(rows, rows[:, :1])
        x, moving = yield "dispatch", (self.nap(x, "S"), moving)
        rows, *_ = trip.arrive(moving)
        moving = trip.combine(self.nap(rows, "E"))
        x, moving = yield "combine", (x, moving)
        return self.nap(x + trip.home(moving).mean(0), "C"), 0.0

    def body(self, x, doc_start=None, dtype=None):
        return whole(self.parts(x, doc_start, dtype))

    def loss(self, h, targets, weight=None):
        terms = h.sum(-1).flatten()
        return terms.mean(), terms


class SlowExchanges:
    """Exchanges of tokens take `seconds` each, one after the other, as over a network that one of them fills;
    what is waited for them is added up in `waited`."""

    def __init__(self, seconds):
        self.waited = 0.0
        self.busy_until = 0.0
        start, wait, dispatch = parallel.Trip.start, parallel.Trip.wait, parallel.Exchange.dispatch

        def started(trip, *args):
            trip.until = self.busy_until = max(time.perf_counter(), self.busy_until) + seconds
            return start(trip, *args)

        def awaited(trip):
            began = time.perf_counter()
            wait(trip)
            time.sleep(max(0.0, trip.until - time.perf_counter()))
            self.waited += time.perf_counter() - began

        # The counts have to come from the other ranks too
        def dispatched(exchange, *args):
            began = time.perf_counter()
            exchange.work.wait()
            self.waited += time.perf_counter() - began
            return dispatch(exchange, *args)
        parallel.Trip.start, parallel.Trip.wait = started, awaited
        parallel.Exchange.dispatch = dispatched


def on_a_rank(rank, port, path, pp, ep, computing):
    """Run woven and unwoven plans in turn; rank 0 writes {name: [(seconds, simulated seconds)]}."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(pp * ep), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
    torch.set_num_threads(1)
    slow = SLOW["computing" if computing else "sleeping"]
    exchanges = SlowExchanges(slow)
    mesh = parallel.join_mesh(parallel.MeshConfig(pp=pp, ep=ep, timeout=60))
    if computing:
        layers = range(MODEL.n_layer)
        config = train.Config(model=MODEL, mesh=parallel.MeshConfig(ep=ep))
        chunks = train.build(config, mesh)
        for attention in chunks[0].attentions().values():
            attention.clear_logits()
        parts = (count_parts(MODEL, layers),)
        x = torch.randint(0, MODEL.vocab_size, (2, 2 * MICRO_BATCHES, MODEL.context))
        batch = Batch(x[0], x[1], None, None)
        micro = 2
    else:
        chunks = {mesh.pp.rank: Sleeper(mesh)}
        parts = (4,) * pp
        batch = Batch(*torch.randn(2, MICRO_BATCHES, 1, Sleeper.width), None, None)
        batch.x.requires_grad_()
        micro = 1

    # The same acts in the same order, F0 F1 B0 F2 B1 ... for one stage; woven, and part after part
    plain = [parallel.flat(ticks) for ticks in parallel.interleaved_ticks(pp, MICRO_BATCHES, 1, 1)]
    kinds = {"woven": parallel.overlapped(pp, MICRO_BATCHES, 1, parts), "unwoven": in_parts(plain, parts)}
    found = {name: [] for name in kinds}
    for _ in range(6):
        for name, plans in kinds.items():
            parallel.barrier(mesh)
            began = time.perf_counter()
            acts = seconds_of_acts(
                lambda plan=plans[mesh.pp.rank]: parallel.execute(plan, chunks, batch, micro, mesh),
                plans[mesh.pp.rank], lambda: exchanges.waited)
            parallel.barrier(mesh)
            took = time.perf_counter() - began
            everyone = parallel.gather(acts, mesh)
            if rank == 0:
                found[name].append((took, simulated(plans, everyone, parts, slow, computing)))
    if rank == 0:
        Path(path).write_text(json.dumps({name: times[1:] for name, times in found.items()}))
    parallel.leave_mesh()


def simulated(plans, everyone, parts, slow, computing):
    """Seconds of a step by the simulator. Ranks that compute: from how long their acts took, on average over
    ranks, without waiting. Ranks that sleep: from their naps alone."""
    def nap(act):
        name = "ASEC"[parts[act.chunk] - 1 - act.left] if act.op == "F" else "ASEC"[act.left]
        return NAP[name] * (1 if act.op == "F" else 2)

    cost = nap
    if computing:
        cost = {act: statistics.mean(times) for act, *times in zip(plans[0], *everyone)}.get

    def exchange(act):
        return slow if parallel.exchanged_after(act) in ("dispatch", "combine") else 0.0
    return parallel.simulate(plans, cost, 0.0, exchange).total


@functools.cache
def clock(what):
    """{"woven" or "unwoven": [(seconds, simulated seconds)] of five runs}, on two computing or four sleeping
    ranks."""
    pp, ep = (1, 2) if what == "computing" else (2, 2)
    return on_ranks(on_a_rank, pp * ep, pp, ep, what == "computing")


# ---- the note ----------------------------------------------------------------------------------------------

def cells(quick):
    if quick:                                  # many GPUs have few micro-batches each
        return [(arm, 0, (16_384, *cell[1:])) for arm, cell in CELLS.items()]
    clocks = [f"clock, {what}: {kind}" for what in SLOW for kind in ("woven", "unwoven")]
    return [(arm, 0, cell) for arm, cell in CELLS.items()] + [(arm, 0, None) for arm in clocks]


def run(arm, seed, cell):
    if arm in CELLS:
        yield row_of_k2(*cell)
        return
    what, kind = arm.removeprefix("clock, ").split(": ")
    for took, predicted in clock(what)[kind]:
        yield dict(seconds=took, simulated_seconds=predicted)


def show(rows):
    figure, _ = _note.panels(1, 1, width=11, height=9)
    figure.clear()
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    k2 = {row["arm"]: row for row in rows if row["arm"] in CELLS}

    # Shares of the step, for each arrangement; exposed exchange over ep
    shares, sizes = upper.subplots(1, 2)
    names = [arm for arm in CELLS if " EP " not in arm and "1024" in arm]
    left = [0.0] * len(names)
    for kind, colour in zip(("bubble", "exchange", "message"), _note.COLOURS):
        width = [k2[arm][kind] for arm in names]
        label = dict(bubble="bubble", exchange="exposed exchange", message="exposed message")[kind]
        shares.barh([arm.split(": ")[1] for arm in names], width, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, width)]
    shares.invert_yaxis()
    shares.set(title="share of the step without computation, 1,024 GPUs")
    shares.legend(fontsize=7)
    for heads, colour in zip((64, 128), _note.COLOURS):
        mine = [row for arm, row in k2.items() if " EP " in arm and row["heads"] == heads]
        sizes.plot([row["ep"] for row in mine], [row["exchange"] for row in mine], marker="o", color=colour,
                   label=f"{heads} heads: attention {mine[0]['attention_ms']:.1f} ms")
    sizes.set(title="share of exposed exchange, woven", xscale="log", xlabel="ranks of an ep group",
              xticks=(8, 16, 32, 64), xticklabels=(8, 16, 32, 64))
    sizes.minorticks_off()
    sizes.legend(fontsize=7)

    # A few stages, with a layer of experts in each chunk, all like chunk 1 of K2
    work = Work(V)
    timelines = []
    for name, plans in (("one after the other", in_parts(parallel.interleaved(2, 6, 2), (4,) * 4)),
                        ("woven", parallel.overlapped(2, 6, 2, (4,) * 4))):
        found = parallel.simulate(plans, lambda act: 1e3 * work.cost(act._replace(chunk=1)),
                                  1e3 * work.message, lambda act: 1e3 * work.exchange(act))
        timelines.append((f"2 stages × 2 chunks of one layer of K2, 6 micro-batches, {name} (ms)", found))
    put_timelines(lower, timelines)

    # Tables
    heading = "", "seconds a step", "bubble", "exposed exchange", "exposed message"
    ran = []
    for what in SLOW:
        for kind in ("unwoven", "woven"):
            mine = [row for row in rows if row["arm"] == f"clock, {what}: {kind}"]
            if mine:
                ratios = [row["seconds"] / row["simulated_seconds"] for row in mine]
                ran.append((f"{what}, {kind}", f"{statistics.median(row['seconds'] for row in mine):.2f}",
                            f"{statistics.median(row['simulated_seconds'] for row in mine):.2f}",
                            _note.spread(ratios)))
    titles = "ranks, plan", "seconds a step", "simulated", "measured over simulated"
    return figure, ["Assumptions of the simulation:", "", *(f"- {line}" for line in assumptions()), "",
                    *_note.table(heading, *table(k2.values())), "",
                    "Against the clock: median of five runs; ratios with their range.", "",
                    *_note.table(titles, *ran)]


if __name__ == "__main__":
    _note.main("k2_infrastructure", cells, run, show)
