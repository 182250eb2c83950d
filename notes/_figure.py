"""Pictures: of a run, loss.png in its folder, drawn while it trains; and of pipeline schedules."""
import numpy as np
from matplotlib import colormaps
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure                               # not pyplot: the backend is the caller's

from data import atomic


def draw(history, domains, path, unit="nats/token"):
    """loss.png: loss by domain, in this unit, learning rate, mixture and largest logit, all over tokens."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = [row for row in history if "loss" in row]
    million = [row["tokens"] / 1e6 for row in steps]
    (loss, rate), (mixture, logit) = axes
    loss.plot(million, [row["loss"] for row in steps], color="0.8", label="training")
    for i, name in enumerate(domains):
        points = [(row["tokens"] / 1e6, row[f"val_{name}"]) for row in history if f"val_{name}" in row]
        at, nats = [tokens for tokens, _ in points], [value for _, value in points]
        loss.plot(at, nats, marker="o", ms=3, color=f"C{i}", label=f"{name}, validation")
    rate.plot(million, [row["lr"] for row in steps], color="C0")
    width = 1 + len(steps) // 40                                   # few windows per step: average neighbours
    shares = np.array([[row[f"share_{name}"] for row in steps] for name in domains])
    shares = np.pad(shares, ((0, 0), (width // 2, width - 1 - width // 2)), "edge")
    shares = [np.convolve(share, np.full(width, 1 / width), "valid") for share in shares]
    mixture.stackplot(million, shares, labels=domains, alpha=0.8)
    exact = [row for row in steps if "max_logit" in row]
    logit.plot([row["tokens"] / 1e6 for row in exact], [row["max_logit"] for row in exact], color="C0")
    for axis, title in ((loss, f"loss ({unit})"), (rate, "learning rate"),
                        (mixture, "mixture (share of windows)"), (logit, "largest logit q·k/√d")):
        axis.set(title=title, xlabel="million tokens")
    loss.legend(fontsize=8)
    mixture.legend(fontsize=8, loc="lower left")
    with atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")


COLOURS = dict(F="Blues", B="Oranges", W="Greens")


def draw_timelines(timelines, path):
    """A picture of [(title, parallel.Timeline)], one below the other."""
    stages = sum(len(timeline.spans) * (2 if any(timeline.exchanges) else 1) for _, timeline in timelines)
    figure = Figure(figsize=(12, 0.6 * len(timelines) + 0.2 * stages + 0.4), layout="constrained")
    put_timelines(figure, timelines)
    with atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")


def put_timelines(figure, timelines, end=None):
    """Fill a figure with timelines: a row for each stage; forwards in blue, backwards in orange, weights'
    gradients in green; darker for each further chunk of the stage. With exchanges, three rows for each stage:
    computation, exchanges and the messages that arrive. `end`: where to cut them off."""
    stages = [len(timeline.spans) for _, timeline in timelines]
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=stages)[:, 0]
    end = end or max(timeline.total for _, timeline in timelines)
    for axes, p, (title, timeline) in zip(panels, stages, timelines):
        rows = [(timeline.spans, 0.0, 0.9)]
        if any(timeline.exchanges):
            rows = [(timeline.spans, 0.0, 0.46), (timeline.exchanges, 0.48, 0.68),
                    (timeline.messages, 0.7, 0.9)]

        # The colour is the op's and the chunk's; a message has that of its sender.
        boxes = {}
        for kind, top, bottom in rows:
            for stage, spans in enumerate(kind):
                for act, start, stop in spans:
                    left, right = (start, stage + top), (stop, stage + top)
                    corners = [left, right, (stop, stage + bottom), (start, stage + bottom)]
                    boxes.setdefault((act.op, act.chunk // p), []).append(corners)
        darkest = max(1, *(k for _, k in boxes))
        for (op, k), some in boxes.items():
            if op == "R":
                continue
            shade = colormaps[COLOURS[op]](0.35 + 0.45 * k / darkest)
            axes.add_collection(PolyCollection(some, facecolors=shade, edgecolors="white", lw=0.3))

        # Time to the right, stage 0 on top
        axes.set(xlim=(0, end), ylim=(p, 0), ylabel="stage", yticks=[0.45, p - 0.55])
        axes.set_yticklabels(["0", str(p - 1)])
        axes.grid(False)
        title += f": time {timeline.total:.1f}, idle {timeline.idle:.1%}"
        axes.set_title(title, fontsize=9, loc="left")
    panels[-1].set_xlabel("time")
