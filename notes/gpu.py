"""What a GPU makes of this repository: every kernel, the optimizer, blocks of Motif-2.6B, whole runs.

  python -m notes.gpu           # on a machine with a GPU; some minutes, most of them torch.compile's

Without a GPU it says so and stops; `--plot` works everywhere.
"""
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend

import kernels
import muonclip
import parallel
import train
from data import Batch
from model import Transformer, flops_per_token
from notes import _note, activation_memory

LAYERS = 4                                     # of Motif-2.6B's 32; its head and embedding are whole
BLOCKS = replace(train.RECIPES["motif-2.6b"].model, n_layer=LAYERS)
TORCHS = {"torch.compile": "torch.compile", "cuBLAS": "cuBLAS", "grouped_mm": "grouped_mm", "cuDNN": "cuDNN",
          "flash": "FlashAttention 2", "torch's": "torch's choice", "torch's choice": "torch's choice",
          "two calls of torch": "torch's choice"}                  # their names in the figure
K2 = replace(train.RECIPES["kimi-k2"].model, n_layer=3, n_expert=16, vocab_size=16_384, context=4096)
KINDS = {                                      # of a GPU's kernels, by words in their names
    "attention": ("flash", "attention", "fmha"), "PolyNorm": ("poly_norm",),
    "matmuls": ("gemm", "nvjet", "cutlass", "cublas", "xmma"), "logits": ("amax", "max_"),
}


def seconds(f, rounds=10):
    """Median seconds of f() on the GPU, after two rounds to warm up."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[rounds // 2]


def operation(name):
    """A row of `python kernels.py`: milliseconds, share of the ceiling, speed against other forms."""
    row = next(row for row in kernels.operations("cuda", True) if row.name == name)
    found = {}
    for what, (ms, speed, share, ratios) in zip(("forward", "both"), kernels.timed(row, kernels.ceilings())):
        found |= {f"{what}_ms": ms, f"{what}_speed": speed, f"{what}_share": share}
        found |= {f"{what}_over {other}": ratio for other, ratio in ratios.items()}
    yield found


def beside(ours, tensors, others):
    """Milliseconds of ours, and how many times as fast it is as the others."""
    times = kernels.milliseconds(ours, tensors)
    found = {f"{what}_ms": ms for what, ms in zip(("forward", "both"), times)}
    for name, f in others.items():
        for what, ms, theirs in zip(("forward", "both"), times, kernels.milliseconds(f, tensors)):
            found[f"{what}_over {name}"] = theirs / ms
    yield found


def torchs(*backends):
    """Causal attention by torch, with the first of these kernels that takes it."""
    def attend(q, k, v):
        with torch.nn.attention.sdpa_kernel(list(backends)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attend


def attention_at(B, H, T, d, dv):
    """Attention at a size where launching a kernel costs nothing beside running it."""
    q, k, v = (torch.randn(B, H, T, width, device="cuda") for width in (d, d, dv))
    one = {name: torchs(kernel) for name, kernel in
           (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)) if d == dv}

    def in_a_pass(q, k, v):
        kernels.exact_max_logits(q.detach(), k.detach())
        return kernels.attention(q, k, v)[0]

    logits = {"with the largest logits": lambda *qkv: kernels.attention(*qkv, tau=None)[0],
              "with a pass for these": in_a_pass}
    yield from beside(lambda *qkv: kernels.attention(*qkv)[0], (q, k, v),
                      one or {"torch's choice": torchs(SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)})
    yield from beside(lambda *qkv: kernels.attention(*qkv)[0], (q, k, v), logits)


def differential_at(B, heads, T, d):
    """Differential attention, against two calls of torch and plain attention with as many multiply-adds."""
    q, k = (torch.randn(B, 2 * heads, T, d, device="cuda") for _ in range(2))
    v = torch.randn(B, heads, T, 2 * d, device="cuda")
    torch_s = torchs(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    more = [torch.randn(B, 3 * heads, T, d, device="cuda") for _ in range(3)]
    plain = kernels.milliseconds(lambda *qkv: kernels.attention(*qkv)[0], more)
    found, = beside(lambda *qkv: kernels.diff_attention(*qkv, 0.3)[0], (q, k, v),
                    {"two calls of torch": lambda q, k, v: kernels.diff_attention_ref(
                        q, k, v, 0.3, attend=lambda q, k, v, _: torch_s(q, k, v))})
    for what, ms in zip(("forward", "both"), plain):
        found[f"{what}_over plain"] = ms / found[f"{what}_ms"]
    yield found


def experts_at(M, E, D, O):
    """The experts' matmul with equally many rows for each, against torch's."""
    ends = torch.arange(1, E + 1, device="cuda") * (M // E)
    x, w = torch.randn(M, D, device="cuda"), torch.randn(E, O, D, device="cuda")
    grouped_mm = torch.nn.functional.grouped_mm
    yield from beside(lambda x, w: kernels.grouped_linear(x, w, ends), (x, w),
                      {"grouped_mm": lambda x, w: grouped_mm(x, w.mT, offs=ends.int())})


def blocks():
    """The model, with random weights that are drawn on the GPU."""
    with torch.device("meta"):
        model = Transformer(BLOCKS)
    model.to_empty(device="cuda")
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.02)
    return model


def step_of_blocks(plain):
    """Forward and backward of one window of 4,096 tokens; `plain`: without our kernels. Exact logits."""
    if plain:
        kernels.takes_kernels = kernels.is_for_flash = lambda *_: False
    config = replace(train.RECIPES["motif-2.6b"], model=BLOCKS)
    torch.manual_seed(0)
    model = blocks()
    x = torch.randint(0, BLOCKS.vocab_size, (2, 1, BLOCKS.context))
    batch = Batch(x[0], x[1], None, None)
    mesh = parallel.Mesh(device=torch.device("cuda"))
    plan, = config.mesh.plans(1, 1)

    def step():
        model.zero_grad()
        for attention in model.attentions().values():
            attention.clear_logits()
        parallel.execute(plan, {0: model}, batch, 1, mesh, torch.bfloat16)
    took = seconds(step)

    # Where the time goes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    spent = {}
    for event in profile.key_averages():
        kinds = [kind for kind, words in KINDS.items() if any(word in event.key for word in words)]
        kind = kinds[0] if kinds else "rest"
        spent[kind] = spent.get(kind, 0.0) + event.self_device_time_total / 1e6
    total = sum(spent.values())
    rate = BLOCKS.context / took
    speed = train.matmul_speed(torch.device("cuda"), torch.bfloat16)
    yield dict(seconds=took, tokens_per_s=rate, mfu=rate * flops_per_token(BLOCKS) / speed, busy=total / took,
               **{f"share {kind}": value / total for kind, value in spent.items()})


def activations(name):
    """What a step of three layers of Kimi K2 keeps for its backward, with some savings: eight windows of
    4,096 tokens in flight, 16 experts, weights in bfloat16."""
    config = replace(train.RECIPES["kimi-k2"], model=K2, batch=2 * activation_memory.IN_FLIGHT, micro=1)
    config = activation_memory.with_savings(config, name)
    with torch.device("meta"):
        model = Transformer(K2)
    for what, p in model.named_parameters():
        if train.may_be_narrow(what, p):
            p.data = p.data.bfloat16()
    model.to_empty(device="cuda")
    for what, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, 0.0, 0.006)
    device = torch.device("cuda")
    torch.manual_seed(0)
    step, savings = activation_memory.step(model, config, device, torch.bfloat16)
    meter = parallel.Meter()
    step(meter)
    took = seconds(step, 3)

    # The allocator's peak, beside weights and gradients; and the meter's, and its prediction for two ranks
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    held = sum(2 * p.nbytes for p in model.parameters())
    peak = torch.cuda.max_memory_allocated() - held
    (predicted, _), = train.activations(config, 2, True)
    found = dict(seconds=took, peak=peak, meter=meter.peak.total(), predicted=predicted,
                 host=activation_memory.bytes_on_host(savings))
    if savings and savings.host:
        found |= copies(step)
    yield found


def copies(step):
    """How long a step copies out and back, and how much of that while kernels run; in seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spans = {"kernels": [], "out": [], "back": []}
    for event in profile.events():
        kind = {"Memcpy DtoH": "out", "Memcpy HtoD": "back"}.get(event.name[:11], "kernels")
        waits = event.name.endswith(("Sync", "Wait Event"))        # listed as if they were work
        if event.device_type == torch.autograd.DeviceType.CUDA and not waits:
            spans[kind].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    busy = merged(spans["kernels"])
    found = dict(busy=sum(stop - start for start, stop in busy))
    for kind in ("out", "back"):
        some = merged(spans[kind])
        found[kind] = sum(stop - start for start, stop in some)
        found[f"{kind}_hidden"] = sum(max(0.0, min(stop, b) - max(start, a)) for start, stop in some
                                      for a, b in busy)
    return found


def merged(spans):
    """Overlapping (start, stop) joined, in order."""
    found = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(stop, found[-1][1])
        else:
            found.append([start, stop])
    return found


def optimizer(whose):
    """A step of Muon over the matrices of these blocks: MuonClip, or torch.optim.Muon."""
    named = {name: p for name, p in blocks().named_parameters()
             if p.ndim == 2 and name.startswith("layers.")}
    for p in named.values():
        p.grad = torch.randn_like(p)
    if whose == "ours":
        optim = muonclip.MuonClip(list(named.items()), muonclip.OptimConfig())
    else:
        optim = torch.optim.Muon(named.values(), lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    yield dict(seconds=seconds(optim.step, 5), parameters=sum(p.numel() for p in named.values()))


def whole_run(recipe):
    """`torchrun train.py RECIPE`, from its start to its last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "train.py", recipe, f"--out={folder}/run"]
        subprocess.run(command, cwd=_note.HERE.parent, check=True, stdout=subprocess.DEVNULL)
        took = time.perf_counter() - began
        last = _note.read(_note.Path(folder, "run", "log.csv"))[-1]
    yield dict(seconds=took, tokens_per_s=last["tokens_per_s"],
               **{name: value for name, value in last.items() if name.startswith("bpb_")})


RUNS = {"blocks": (step_of_blocks, False), "blocks, torch's operations": (step_of_blocks, True),
        "optimizer: MuonClip": (optimizer, "ours"), "optimizer: torch.optim.Muon": (optimizer, "torch's")}
RUNS |= {f"kernel: {row.name}": (operation, row.name) for row in kernels.operations("cpu", False)}
RUNS |= {"large: attention, 4 × 16 heads, 4,096 tokens": (attention_at, (4, 16, 4096, 128, 128)),
         "large: attention, 16 heads, 16,384 tokens": (attention_at, (1, 16, 16_384, 128, 128)),
         "large: latent widths, 4 × 16 heads, 4,096 tokens": (attention_at, (4, 16, 4096, 192, 128)),
         "large: differential, 4 × 16 maps, 4,096 tokens": (differential_at, (4, 8, 4096, 128)),
         "large: experts, 7168 → 2048": (experts_at, (32_760, 24, 7168, 2048))}
RUNS |= {f"activations: {name}": (activations, name) for name in activation_memory.SAVINGS}
RUNS |= {"run: laptop": (whole_run, "laptop"), "run: laptop-k2": (whole_run, "laptop-k2")}


def cells(quick):
    return [(arm, 0, None) for arm in RUNS]


def run(arm, seed, _):
    if not torch.cuda.is_available():
        raise SystemExit("notes.gpu: there is no GPU here")
    f, argument = RUNS[arm]
    torch.cuda.empty_cache()
    kept = kernels.takes_kernels, kernels.is_for_flash
    try:
        yield from f(*argument) if isinstance(argument, tuple) else f(argument)
    finally:
        kernels.takes_kernels, kernels.is_for_flash = kept


def show(rows):
    by_arm = {}
    for row in rows:
        by_arm[row["arm"]] = by_arm.get(row["arm"], {}) | row

    # A bar for each kernel and other form: how many times as fast ours is
    figure, ((axes,),) = _note.panels(1, 1, width=9, height=5)
    bars = []
    lines = [("operation", "forward, ms", "of the ceiling", "and backward, ms", "of the ceiling",
              "times as fast as")]
    for arm, row in by_arm.items():
        if not arm.startswith(("kernel: ", "large: ")):
            continue
        name = arm.partition(": ")[2]
        ratios = []
        for column in row:
            what, _, other = column.partition("_over ")
            if other:
                way = dict(forward="forward", both="and backward")[what]
                if other in TORCHS:
                    bars.append((f"{name}, {way}", TORCHS[other], row[column]))
                ratios.append(f"{other} {row[column]:.2f}" + " with backward" * (what == "both"))
        cells = [f"{row[key]:.3g}" if key in row else "–"
                 for key in ("forward_ms", "forward_share", "both_ms", "both_share")]
        lines.append((name, *cells, ", ".join(ratios)))
    names = list(dict.fromkeys(name for name, *_ in bars))
    colours = dict(zip(dict.fromkeys(other for _, other, _ in bars), _note.COLOURS))
    for i, name in enumerate(names):
        some = [(other, ratio) for one, other, ratio in bars if one == name]
        for j, (other, ratio) in enumerate(some):
            axes.barh(i + (j + 0.5) / len(some) * 0.8 - 0.4, ratio, 0.8 / len(some), color=colours[other])
    for other, colour in colours.items():
        axes.barh(0, 0, color=colour, label=other)                 # for the legend
    axes.set(yticks=range(len(names)), title="times as fast as")
    axes.set_yticklabels(names, fontsize=7)
    axes.axvline(1.0, color="0.4", ls=":")
    axes.invert_yaxis()
    axes.legend()

    # Steps and runs
    steps = [("what", "seconds", "tokens/s", "MFU", "where the GPU's time goes")]
    for arm, row in by_arm.items():
        if arm.startswith(("kernel: ", "large: ", "activations: ")):
            continue
        shares = [name for name in row if name.startswith("share ")]
        spent = ", ".join(f"{name.removeprefix('share ')} {row[name]:.0%}" for name in shares)
        rate = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "–"
        mfu = f"{row['mfu']:.0%}" if "mfu" in row else "–"
        steps.append((arm, f"{row['seconds']:.3g}", rate, mfu, spent))

    # Activations
    kept = [("three layers of Kimi K2", "GB by allocator", "by meter", "predicted over meter",
             "GB on the host", "seconds", "copied out, back: seconds, of which hidden")]
    for name in activation_memory.SAVINGS:
        row = by_arm.get(f"activations: {name}")
        if not row:
            continue
        copied = "–"
        if "out" in row:
            copied = ", ".join(f"{row[kind]:.2f} {row[f'{kind}_hidden'] / row[kind]:.0%}"
                               for kind in ("out", "back"))
        kept.append((name, f"{row['peak'] / 1e9:.1f}", f"{row['meter'] / 1e9:.1f}",
                     f"{row['predicted'] / row['meter']:.3f}", f"{row['host'] / 1e9:.1f}",
                     f"{row['seconds']:.2f}", copied))
    return figure, [*_note.table(*lines), "", *_note.table(*steps), "", *_note.table(*kept)]


if __name__ == "__main__":
    _note.main("gpu", cells, run, show)
