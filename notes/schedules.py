"""Pipeline schedules: simulated, against their formulas, and against the clock.

Arms "simulated: ..." are exact. Arms "clock, ..." run `parallel.execute` on several ranks: two that compute,
and four whose acts sleep. They need an otherwise idle machine.
"""
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import parallel
from data import Batch
from notes import _note
from notes._figure import put_timelines
from notes.speed import Block, SplitBlock, seconds_of_acts

P = 8                                          # stages, in the simulated arms
COUNTS = 16, 32, 64, 128                      # micro-batches
BACKWARD = 2.0                                 # time of a backward, in forwards


# ---- schedules ---------------------------------------------------------------------------------------------

def dualpipe(p, m):
    """Micro-batches enter at both ends: half of them pass ranks 0 to p-1, the others p-1 to 0, so that every
    rank holds the layers of two stages, r and p-1-r. The phases of DeepSeek's schedule [DeepSeek-V3 §3.2.1],
    without its split backward; p even, m even, m ≥ 2p."""
    plans = []
    for r in range(p):
        outer = min(r, p - 1 - r)                                  # 0 at both ends
        inner = p // 2 - 1 - outer
        near = 0 if r < p // 2 else 1                              # the direction that enters nearby
        nexts = {(op, way): iter(range(way * m // 2, (way + 1) * m // 2)) for op in "FB" for way in (0, 1)}
        phases = [("F0", 2 * inner), ("F0 F1", outer + 1), ("B1 F1", inner),
                  ("F0 B1 F1 B0", m // 2 - p + outer + 1),
                  ("B1 F1 B0", inner), ("B1 B0", outer + 1), ("B0", inner)]
        plan = []
        for steps, times in phases:
            for op, far in steps.split() * times:
                way = near ^ int(far)
                plan.append(parallel.Act(op, next(nexts[op, way]), p - 1 - r if way else r))
        plans.append(plan)
    return plans


def schedules(p, m):
    """{name: (plans, chunks a stage, bubble over busy time by its formula)}; DualPipe's is that of its split
    backward, with a third of the time in the weights' gradients."""
    return {"GPipe": (parallel.gpipe(p, m), 1, (p - 1) / m),
            "1F1B": (parallel.one_f_one_b(p, m), 1, (p - 1) / m),
            "interleaved, 2 chunks": (parallel.interleaved(p, m, 2), 2, (p - 1) / m / 2),
            "one more warm-up, 2 chunks": (parallel.interleaved(p, m, 2, 1), 2, (p - 1) / m / 2),
            "interleaved, 4 chunks": (parallel.interleaved(p, m, 4), 4, (p - 1) / m / 4),
            "1F1B, split": (parallel.split_backwards(parallel.one_f_one_b(p, m)), 1, (p - 1) / m / 3),
            "interleaved, 2 chunks, split": (
                parallel.split_backwards(parallel.interleaved(p, m, 2)), 2, (p - 1) / m / 2 / 3),
            "DualPipe, unsplit": (dualpipe(p, m), 1, 2 / 3 * (p / 2 - 1) / m)}


def op_times(plans, v):
    """{op: time} where the forward of a stage takes 1."""
    if any(act.op == "W" for act in plans[0]):
        return dict(F=1 / v, B=BACKWARD / 2 / v, W=BACKWARD / 2 / v)
    return dict(F=1 / v, B=BACKWARD / v)


def timed(plans, v):
    times = op_times(plans, v)
    return parallel.simulate(plans, lambda act: times[act.op])


# ---- against the clock -------------------------------------------------------------------------------------

class Sleep(torch.autograd.Function):
    """The identity; it sleeps in the forward and in the backward."""

    @staticmethod
    def forward(ctx, x, weight, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        time.sleep(ctx.seconds)
        return g, None, None, None


class Sleeper(nn.Module):
    """A chunk that only sleeps. seconds: {op: seconds}"""
    width = 8

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds = seconds

    def body(self, x, doc_start=None, dtype=None):
        return Sleep.apply(x, self.weight, self.seconds["F"], self.seconds["B"]), 0.0

    def loss(self, h, targets, weight=None):
        terms = h.sum(-1).flatten()
        return terms.mean(), terms


class SleepingW(parallel.Savings):
    """A split backward whose W only sleeps."""

    def __init__(self, seconds):
        super().__init__(split=True)
        self.seconds = seconds

    def compute(self, at):
        time.sleep(self.seconds["W"])


SLEEP = 0.06                                   # seconds: the forward of a whole stage


def on_a_rank(rank, port, path, p, name, computing):
    """Run the plan of `name` five times; rank 0 writes [seconds, simulated seconds] of each."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(p), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port)
    torch.set_num_threads(1)
    plans, v, _ = schedules(p, 8)[name]
    mesh = parallel.join_mesh(parallel.MeshConfig(pp=p, chunks=v, timeout=60))
    shape = (32, 128, Block.width) if computing else (8, 1, Sleeper.width)
    batch = Batch(*torch.randn(2, *shape), None, None)
    seconds = {op: SLEEP * t for op, t in op_times(plans, v).items()}
    savings = None
    if "W" in seconds:
        savings = parallel.Savings(split=True) if computing else SleepingW(seconds)
    blocks = {}
    for i in range(rank, p * v, p):
        if not computing:
            blocks[i] = Sleeper(seconds)
        else:
            blocks[i] = SplitBlock(savings) if savings else Block()
    if not computing:                                              # so that chunk 0 has a backward
        batch.x.requires_grad_()
    found = []
    for _ in range(7):
        parallel.barrier(mesh)
        began = time.perf_counter()
        acts = seconds_of_acts(lambda: parallel.execute(plans[rank], blocks, batch, shape[0] // 8, mesh,
                                                        savings=savings, reduce=str), plans[rank])
        parallel.barrier(mesh)
        took = time.perf_counter() - began
        everyone = parallel.gather(acts, mesh)
        if rank == 0:
            cost = {act: t for plan, times in zip(plans, everyone) for act, t in zip(plan, times)}
            if not computing:
                cost = {act: seconds.get(act.op) for act in cost}
            found.append((took, parallel.simulate(plans, cost.get).total))
    if rank == 0:
        Path(path).write_text(json.dumps(found[2:]))
    parallel.leave_mesh()


def on_ranks(f, world, *arguments):
    """Run f(rank, port, path, *arguments) in `world` processes → the JSON that one of them wrote to path."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port, path = str(free.getsockname()[1]), f"{folder}/times"
        free.close()
        torch.multiprocessing.spawn(f, (port, path, *arguments), nprocs=world)
        return json.loads(Path(path).read_text())


def clock(name, computing):
    """[(seconds, simulated seconds)] of five runs, on two computing or four sleeping ranks."""
    p = 2 if computing else 4
    return on_ranks(on_a_rank, p, p, name, computing)


# ---- the note ----------------------------------------------------------------------------------------------

def cells(quick):
    exact = [f"simulated: {name}" for name in schedules(P, 16)]
    if quick:
        return [(arm, 0, None) for arm in exact]
    names = [name for name in schedules(P, 16) if "DualPipe" not in name]
    clocks = [f"clock, {what}: {name}" for what in ("computing", "sleeping") for name in names]
    return [(arm, 0, None) for arm in (*exact, *clocks)]


def run(arm, seed, _):
    what, name = arm.split(": ")
    if what == "simulated":
        for m in COUNTS:
            plans, v, formula = schedules(P, m)[name]
            found = timed(plans, v)
            yield dict(micro_batches=m, bubble=found.idle_over_busy, formula=formula, idle=found.idle,
                       peak=max(found.peaks) / v, parameters=2 if "DualPipe" in name else 1)
    else:
        for took, simulated in clock(name, "computing" in what):
            yield dict(seconds=took, simulated_seconds=simulated)


def show(rows):
    figure, _ = _note.panels(1, 1, width=11, height=14)
    figure.clear()
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    put_timelines(lower, [(name, timed(plans, v)) for name, (plans, v, _) in schedules(4, 8).items()])

    # Bubble and peak over micro-batches
    bubbles, peaks = upper.subplots(1, 2)
    colours = dict(zip(schedules(P, 16), [*_note.COLOURS, "0.5"]))
    at = []
    for name in schedules(P, 16):
        mine = [row for row in rows if row["arm"] == f"simulated: {name}"]
        counts = [row["micro_batches"] for row in mine]
        bubbles.plot(counts, [row["bubble"] for row in mine], marker="o", color=colours[name])
        bubbles.plot(counts, [row["formula"] for row in mine], ls=":", color=colours[name])
        peaks.plot(counts, [row["peak"] for row in mine], marker="o", color=colours[name], label=name)
        at += [(name, f"{row['bubble']:.4f}", f"{row['formula']:.4f}", f"{row['peak']:.2f}",
                f"{row['parameters']:.0f}×") for row in mine if row["micro_batches"] == 32]
    bubbles.set_title(f"idle over busy time, {P} stages (dotted: formula)")
    peaks.set_title("most activations of a rank, in those of a whole stage")
    for axes in (bubbles, peaks):
        axes.set(xscale="log", xlabel="micro-batches", xticks=COUNTS, xticklabels=COUNTS)
        axes.minorticks_off()
        _note.log_y(axes)
    peaks.legend(fontsize=7, loc="center right", bbox_to_anchor=(1.0, 0.42))

    # What the split gains, for several p
    gains = []
    for p in (2, 4, 8):
        found = schedules(p, 32)
        names = "1F1B", "1F1B, split", "interleaved, 2 chunks", "interleaved, 2 chunks, split"
        bubbles_of = [timed(*found[name][:2]).idle_over_busy for name in names]
        gains.append((p, *(f"{bubble:.4f}" for bubble in bubbles_of)))

    # Tables
    heading = "schedule", "idle over busy", "formula", "peak activations", "parameters"
    ratios = {}
    for row in rows:
        what, name = row["arm"].removeprefix("clock, ").split(": ")
        if what != "simulated":
            ratios.setdefault(name, {}).setdefault(what, []).append(row["seconds"] / row["simulated_seconds"])
    ran = [(name, *(_note.spread(found[what]) if what in found else "not yet measured"
                    for what in ("computing", "sleeping"))) for name, found in ratios.items()]
    titles = "stages", "1F1B", "split", "interleaved, 2 chunks", "split"
    return figure, [f"Simulated: {P} stages, 32 micro-batches.", "", *_note.table(heading, *at), "",
                    "Simulated: idle over busy time, 32 micro-batches.", "", *_note.table(titles, *gains), "",
                    "Measured over simulated time: median and range of five runs.", "",
                    *_note.table(("schedule", "two ranks that compute", "four ranks that sleep"), *ran)]


if __name__ == "__main__":
    _note.main("schedules", cells, run, show)
