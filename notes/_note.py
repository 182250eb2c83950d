"""What the notes share: a grid of runs kept in a CSV, one style of figure, the table in a page.

  python -m notes.NAME            # run what NAME.csv lacks (all, if it was deleted), then figure and table
  python -m notes.NAME --plot     # figure and table from NAME.csv alone
  python -m notes.NAME --quick    # a smoke test: the same code on a toy, in seconds, into out/quick/

A note is a list of cells (arm, seed, setting), a `run(arm, seed, setting)` that yields rows of raw numbers,
and a `show(rows)` → (figure, lines of the table). A finished cell stays in the CSV: a killed grid resumes
when rerun.
"""
import argparse
import csv
import hashlib
import platform
import shutil
import statistics
import time
from dataclasses import is_dataclass, replace
from pathlib import Path

import torch

import train
from data import atomic

HERE = Path(__file__).parent
# The Okabe–Ito palette, which colour-blind readers can tell apart
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
TEXTS = "arm", "setting", "machine", "text"                        # columns of a CSV; the others are numbers


# ---- the grid ----------------------------------------------------------------------------------------------

def machine():
    """Hardware and versions, on one line."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}, {versions}"


def read(path):
    """Rows of a CSV, with numbers as floats and empty fields left out; [] if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v if k in TEXTS else float(v) for k, v in row.items() if v != ""}
                for row in csv.DictReader(file)]


def write(path, rows):
    """Write the rows as a CSV, atomically."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)


def key(setting):
    """A hash of a dataclass's non-default fields, so that a field added later changes no key."""
    said = list(train.changes(type(setting)(), setting)) if is_dataclass(setting) else setting
    return hashlib.sha256(repr(said).encode()).hexdigest()[:8]


def grid(path, cells, run):
    """Run the cells (arm, seed, setting) that are not in the CSV yet, and add each to it when it finishes.

    Every row carries its arm, its seed and the key of its setting; cells that ran with other settings are
    dropped and named. The first row of a cell also has the minutes it took and the machine."""
    want = {(arm, seed): setting for arm, seed, setting in cells}
    kept = [row for row in read(path) if (cell := (row["arm"], row["seed"])) in want
            and key(want[cell]) == row["setting"]]
    dropped = {(row["arm"], int(row["seed"])) for row in read(path)}
    dropped -= {(row["arm"], int(row["seed"])) for row in kept}
    if dropped:
        names = ", ".join(f"{arm} {seed}" for arm, seed in sorted(dropped))
        print(f"{path.name}: run with other settings, dropped: {names}")
    done = {(row["arm"], row["seed"]) for row in kept}
    if done == set(want):
        print(f"{path}: all {len(done)} runs are there already; delete it to run them again")
    for (arm, seed), setting in ((cell, some) for cell, some in want.items() if cell not in done):
        begin = time.perf_counter()
        rows = [dict(arm=arm, seed=seed, setting=key(setting), **row) for row in run(arm, seed, setting)]
        rows[0] |= dict(minutes=(time.perf_counter() - begin) / 60, machine=machine())
        kept += rows
        write(path, kept)
        print(f"{path.stem}: {arm}, seed {seed}: {rows[0]['minutes']:.2f} minutes", flush=True)
    return kept


def trained(config, seed, watch=None):
    """The history of a complete run. Ctrl-C and SIGTERM, which stop a run early, end the whole grid here."""
    rows, _ = train.train(replace(config, seed=seed), quiet=True, watch=watch)
    if rows[-1]["step"] < config.total_steps:
        raise KeyboardInterrupt
    return rows


def history(arm, seed, config, watch=None):
    """A `run` that trains and yields a row per evaluation: `bpb`, bits/byte averaged over domains, and
    `seconds` of training so far, evaluation not counted."""
    for row in trained(config, seed, watch):
        bits = [v for k, v in row.items() if k.startswith("bpb_")]
        if bits:
            yield dict(tokens=row["tokens"], seconds=row["seconds"], bpb=statistics.mean(bits),
                       **{k: v for k, v in row.items() if k.startswith("bpb_") and len(bits) > 1})


SPEED = "speed, "


def speed_cells(configs, rounds=3):
    """Cells of 30 steps that time {arm: configuration} in turn; only ratios within a round are meaningful.
    They run last and need an otherwise idle machine."""
    return [(SPEED + arm, i, replace(c, tokens=30 * c.step_tokens, eval_windows=1, eval_every=10 ** 9))
            for i in range(rounds) for arm, c in configs.items()]


def timed(arm, seed, config):
    """A `run` of such a cell: tokens/s of its fastest, least disturbed step."""
    yield dict(tokens_per_s=max(row["tokens_per_s"] for row in trained(config, seed)[1:]))


def pace(rows, arm, base):
    """Tokens/s of an arm relative to `base`: '1.00 (0.97–1.02)', the median and the range over rounds."""
    speed = {(row["arm"], row["seed"]): row["tokens_per_s"] for row in rows if row["arm"].startswith(SPEED)}
    ratios = [v / speed[SPEED + base, i] for (of, i), v in speed.items() if of == SPEED + arm]
    return spread(ratios, 2) if ratios else "not yet measured"


def toy(config):
    """A shrunken configuration that trains in a second, on files of this repository."""
    names = [item.split(":")[0] for item in config.data.domains.split(",")]
    texts = zip(names, ("README.md", "train.py", "model.py"))
    files = ",".join(f"{name}={HERE.parent / file}" for name, file in texts)
    small = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_head=16, d_ff=32, vocab_size=261, context=32)
    small |= dict(n_head=3, n_noise=1) if config.model.n_noise else {}
    return replace(config, model=replace(config.model, **small), batch=4, micro=4, tokens=12 * 4 * 32,
                   eval_every=4, eval_windows=2, average_every=6 * 4 * 32 if config.average_every else 0,
                   data=replace(config.data, tokenizer="bytes", files=files, cache="out/quick/cache"))


def main(name, cells, run, show, argv=None, folder=HERE):
    """A note's command line. cells(quick) → [(arm, seed, setting)]; show(rows) → (figure, table lines).
    folder: where a run leaves its CSV, page and figure, for a note that everybody runs anew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy of the same code, into out/quick/")
    parser.add_argument("--plot", action="store_true", help="figure and table from the CSV alone")
    args = parser.parse_args(argv)
    if args.quick:
        folder = Path("out/quick")
    elif args.plot:
        folder = HERE
    path = folder / f"{name}.csv"
    if args.quick:
        path.unlink(missing_ok=True)
    if folder != HERE:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / f"{name}.md", folder)
    rows = read(path) if args.plot else grid(path, cells(args.quick), run)
    if not rows:
        raise SystemExit(f"{path}: nothing to plot; run python -m notes.{name} first")
    figure, lines = show([row | dict(seed=int(row["seed"])) for row in rows])
    from matplotlib.pyplot import close                            # late, since panels() sets the backend
    figure.savefig(path.with_suffix(".png"), dpi=110)
    close(figure)
    first = [row for row in rows if "minutes" in row]
    machines = "; ".join(dict.fromkeys(row["machine"] for row in first))
    took = f"*{sum(row['minutes'] for row in first):.0f} minutes on {machines}; [raw numbers]({path.name}).*"
    write_table(path.with_suffix(".md"), [*lines, "", took])
    print(f"{path.with_suffix('.md')}, .png: written")


# ---- page and figure ---------------------------------------------------------------------------------------

def write_table(page, lines):
    """Replace what is between the table markers of a page by these lines."""
    before, _, rest = page.read_text("utf-8").partition("<!-- table -->")
    after = rest.partition("<!-- end of table -->")[2]
    block = "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end of table -->"
    page.write_text(before + block + after, "utf-8")


def table(*rows):
    """Lines of a Markdown table whose first row is the header."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def spread(values, digits=3):
    """'median (least–largest)'."""
    low, high = min(values), max(values)
    range_ = f" ({low:.{digits}f}–{high:.{digits}f})" if low < high else ""
    return f"{statistics.median(values):.{digits}f}{range_}"


def panels(rows, columns, width=9.0, height=3.2):
    """A figure and its axes, in the common style of all notes, readable at half its width."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcdefaults()
    plt.rcParams.update({"font.size": 11, "axes.prop_cycle": plt.cycler(color=COLOURS),
                         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "axes.axisbelow": True, "grid.color": "0.92", "lines.linewidth": 1.8,
                         "legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 11})
    return plt.subplots(rows, columns, figsize=(width, height * rows), layout="constrained", squeeze=False)


def of_arm(rows, arm):
    """The rows of an arm, by seed: {seed: rows}."""
    seeds = {}
    for row in rows:
        if row["arm"] == arm:
            seeds.setdefault(row["seed"], []).append(row)
    return seeds


def band(axis, rows, arm, x, y, **style):
    """Plot an arm's column y over x: the median of its seeds as a line, their range as a band."""
    points = {}
    for row in rows:
        if row["arm"] == arm and x in row and y in row:
            points.setdefault(row[x], []).append(row[y])
    xs = sorted(points)
    line, = axis.plot(xs, [statistics.median(points[at]) for at in xs], **({"label": arm} | style))
    axis.fill_between(xs, [min(points[at]) for at in xs], [max(points[at]) for at in xs],
                      color=line.get_color(), alpha=0.2, lw=0)
    return line


def log_y(axis):
    """Make the y axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def reported(axis, y, label):
    """Mark a number of the report as a dotted line."""
    axis.axhline(y, color="0.4", ls=":", lw=1.5, label=label)
