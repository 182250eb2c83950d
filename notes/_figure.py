"""The figure of a run: loss.png in its folder, drawn while it trains."""
import numpy as np
from matplotlib.figure import Figure                               # not pyplot: the backend is the caller's

from data import atomic


def draw(history, domains, path):
    """loss.png: loss by domain, learning rate, mixture and largest logit, all over tokens."""
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
    for axis, title in ((loss, "loss (nats/token)"), (rate, "learning rate"),
                        (mixture, "mixture (share of windows)"), (logit, "largest logit q·k/√d")):
        axis.set(title=title, xlabel="million tokens")
    loss.legend(fontsize=8)
    mixture.legend(fontsize=8, loc="lower left")
    with atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")
