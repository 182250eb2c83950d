"""What recomputation, FP8 storage and offload save between a forward and its backward, and what they cost.

  python -m notes.activation_memory           # some 40 minutes, most of them for the losses

The same on a GPU: `python -m notes.gpu`.
"""
import multiprocessing
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import parallel
import train
from data import Batch
from model import Local, Transformer, count_parameters
from notes import _note

RECOMPUTED = dict(recompute="norm,act,mla")
FP8 = dict(fp8="expert_up,act")
SAVINGS = {                                    # options of the mesh
    "none": {}, "norm": dict(recompute="norm"), "act": dict(recompute="act"), "mla": dict(recompute="mla"),
    "norm, act, mla": RECOMPUTED, "FP8": FP8, "offload": dict(offload=True),
    "norm, act, mla, FP8": RECOMPUTED | FP8, "all": RECOMPUTED | FP8 | dict(offload=True)}
K2 = "none", "norm, act, mla", "norm, act, mla, FP8", "all"
IN_FLIGHT = 8                                  # micro-batches of one window, all forwards first


# ---- a step of one process ---------------------------------------------------------------------------------

def with_savings(config, name):
    """The configuration of a process that runs all forwards first, with these savings."""
    return replace(config, mesh=parallel.MeshConfig(schedule="gpipe", **SAVINGS[name]))


def step(model, config, device, dtype=None):
    """→ a function of an optional parallel.Meter that runs forward and backward of IN_FLIGHT windows with the
    savings of config.mesh; and its parallel.Savings."""
    savings = train.savings_of(config)
    x = torch.randint(0, config.model.vocab_size, (2, IN_FLIGHT, config.model.context))
    batch = Batch(x[0], x[1], None, None)
    plan, = train.plans_of(config, IN_FLIGHT, 1)
    mesh = parallel.Mesh(device=device)

    def run(meter=None):
        for module in model.modules():
            if hasattr(module, "ops"):
                module.ops = train.ops_of(savings, Local)
        for attention in model.attentions().values():
            attention.clear_logits()
        model.zero_grad(set_to_none=False)                         # so that they are there all the time
        parallel.execute(plan, {0: model}, batch, 1, mesh, dtype, savings, str, meter)
    return run, savings


def bytes_on_host(savings):
    """The memory of the host that was taken for what is offloaded."""
    return sum(block.memory.nbytes for block in savings.host.free) if savings and savings.host else 0


def resident(what):
    """Bytes of this process: VmRSS, resident now; VmHWM, at most since the mark was reset. Linux only."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def in_a_process(config, pipe):
    """The most memory that a process of its own takes for two steps, beyond what it holds with gradients."""
    torch.set_num_threads(1)
    model = Transformer(config.model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run, _ = step(model, config, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")                  # resets the mark
    before = resident("VmRSS")
    run()
    run()
    pipe.send(resident("VmHWM") - before)


def on_a_cpu(name, config):
    """Bytes by meter, by prediction and of a process; the time of a step over that of a step without savings,
    the two taking turns."""
    config = with_savings(config, name)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=in_a_process, args=(config, theirs))
    process.start()
    peak = ours.recv()
    process.join()

    model = Transformer(config.model)
    run, savings = step(model, config, torch.device("cpu"))
    plain, _ = step(model, with_savings(config, "none"), torch.device("cpu"))
    meter = parallel.Meter()
    run(meter)
    (predicted, _), = train.activations(replace(config, batch=IN_FLIGHT, micro=1), 1, False)
    ratios = []
    for _ in range(25):
        times = []
        for f in (plain, run):
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0])
    low, middle, high = statistics.quantiles(ratios[1:], n=4)
    yield dict(meter=meter.peak.total(), predicted=predicted, host=bytes_on_host(savings), process=peak,
               ratio=middle, least=low, most=high)


# ---- Kimi K2, predicted ------------------------------------------------------------------------------------

def of_k2(name, windows):
    """A row for each stage of K2 on 256 GPUs, two chunks a stage, exchanges overlapped; `windows` a step."""
    mesh = parallel.MeshConfig(pp=16, ep=16, chunks=2, overlap=True, **SAVINGS[name])
    config = replace(train.RECIPES["kimi-k2"], mesh=mesh, batch=windows)
    states = train.memory(config, 256)
    whole = 6 * count_parameters(config.model)["total"]            # 2 bytes of weights, 4 of gradients
    for stage, (device, host) in enumerate(train.activations(config, 256, True)):
        yield dict(stage=stage, activations=device, host=host, whole=whole, **states[stage])


# ---- the grid ----------------------------------------------------------------------------------------------

def cells(quick):
    whole = train.RECIPES["laptop-k2"]
    config = replace(whole, tokens=whole.tokens // 2)
    losses = {"loss: stored whole": config,
              "loss: stored in FP8": replace(config, mesh=parallel.MeshConfig(**FP8))}
    if quick:
        losses = {arm: _note.toy(c) for arm, c in losses.items()}
    windows = 512 if quick else train.RECIPES["kimi-k2"].batch
    found = [(f"CPU: {name}", 0, _note.toy(whole) if quick else whole)
             for name in (["all"] if quick else SAVINGS)]
    found += [(f"K2: {name}", 0, windows) for name in (["all"] if quick else K2)]
    return found + [(arm, seed, c) for seed in range(5 if not quick else 1) for arm, c in losses.items()]


def run(arm, seed, setting):
    kind, name = arm.split(": ")
    if kind == "CPU":
        yield from on_a_cpu(name, setting)
    elif kind == "K2":
        yield from of_k2(name, setting)
    else:
        yield from _note.history(arm, seed, setting)


def show(rows):
    figure, ((bars, stages, losses),) = _note.panels(1, 3, width=13, height=3.6)
    by_kind = {kind: {} for kind in ("CPU", "K2", "loss")}
    for row in rows:
        kind, name = row["arm"].split(": ")
        by_kind[kind].setdefault(name, []).append(row)

    # One process
    lines = [("savings", "MB by meter", "predicted", "MB of the process", "MB on the host",
              "time of a step over none")]
    names = [name for name in SAVINGS if name in by_kind["CPU"]]
    for name in names:
        row, = by_kind["CPU"][name]
        lines.append((name, f"{row['meter'] / 1e6:.1f}", f"{row['predicted'] / row['meter']:.3f}",
                      f"{row['process'] / 1e6:.0f}", f"{row['host'] / 1e6:.0f}" if row["host"] else "–",
                      f"{row['ratio']:.2f} ({row['least']:.2f}–{row['most']:.2f})"))
    bars.barh(names, [by_kind["CPU"][name][0]["meter"] / 1e6 for name in names])
    bars.invert_yaxis()
    bars.set(title="laptop-k2, CPU: MB kept", xlabel="MB")

    # Kimi K2
    k2 = [("GB a GPU: mean of 16 stages (most)", "weights, gradients", "masters, optimizer", "activations",
           "on the host", "most in all")]
    for name, some in by_kind["K2"].items():
        model = [row["weights"] + row["gradients"] for row in some]
        owned = [row["masters"] + row["states"] for row in some]
        kept = [row["activations"] for row in some]
        total = max(map(sum, zip(model, owned, kept)))
        k2.append((name, *(f"{sum(values) / len(values) / 1e9:.1f} ({max(values) / 1e9:.1f})"
                           for values in (model, owned, kept, [row["host"] for row in some])),
                   f"{total / 1e9:.1f}"))
        stages.plot([row["stage"] for row in some], [row["activations"] / 1e9 for row in some], label=name)
    _note.log_y(stages)
    stages.set(title="Kimi K2: GB of activations a GPU", xlabel="stage", xticks=range(0, 16, 5))
    stages.legend()

    # Losses
    ends = {}
    for name in by_kind["loss"]:
        _note.band(losses, rows, f"loss: {name}", "tokens", "bpb", label=name)
        last = {row["seed"]: row["bpb"] for row in by_kind["loss"][name]}
        ends[name] = [last[seed] for seed in sorted(last)]
    losses.set(title="laptop-k2: bits/byte", xlabel="tokens")
    losses.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e3:.0f}k")
    losses.legend()
    table = [("stored", "bits/byte at the end", "seeds", "change against the same seeds, %")]
    base, *others = ends
    table.append((base, _note.spread(ends[base], 4), len(ends[base]), "–"))
    for name in others:
        pairs = [100 * (b / a - 1) for a, b in zip(ends[base], ends[name])]
        visible = ""
        if len(pairs) > 1:
            visible = f"; ± {2 * statistics.stdev(pairs) / len(pairs) ** 0.5:.2f} could be seen"
        table.append((name, _note.spread(ends[name], 4), len(ends[name]), _note.spread(pairs, 2) + visible))
    whole = by_kind["K2"]["all"][0]["whole"] / 1e12
    whole = f"Kimi K2, weights and gradients of the whole model: {whole:.2f} TB."
    return figure, [*_note.table(*lines), "", whole, "", *_note.table(*k2), "", *_note.table(*table)]


if __name__ == "__main__":
    _note.main("activation_memory", cells, run, show)
