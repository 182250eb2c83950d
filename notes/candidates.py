"""Motif's choices: every candidate beside the same base, with AdamW as in Motif and the winners with MuonClip too."""
from dataclasses import replace

import train
from model import ModelConfig, count_parameters
from notes import _note

STEPS = 800                                                        # of 2,048 bytes
RATES = dict(adamw=(1e-3, 3e-3, 1e-2), muonclip=(3e-3, 1e-2, 3e-2))
BASE = ModelConfig(n_layer=4, n_head=4, n_kv_head=4, d_model=64, d_head=16, d_ff=192, vocab_size=261, context=128,
                   differential=False, act="silu", init_std=0.1)
CHANGES = {"base": {}, "QK-Norm": dict(qk_norm=True), "differential": dict(differential=True),
           "shared K/V": dict(share_kv=2), "nGPT": dict(ngpt=True), "PolyNorm": dict(act="polynorm"),
           "differential + PolyNorm": dict(differential=True, act="polynorm")}


def hidden(model):
    counts = count_parameters(model)
    return counts["total"] - counts["embedding"]


def like(base, **changes):
    """`base` with the changes and, by the width of its feed-forward layers, as many hidden parameters."""
    model = replace(base, **changes)
    a_column = (hidden(replace(model, d_ff=200)) - hidden(replace(model, d_ff=100))) / 100
    return replace(model, d_ff=4 * round((model.d_ff + (hidden(base) - hidden(model)) / a_column) / 4))


def config(changes, lr, rule="adamw", base=BASE, steps=STEPS):
    """Bytes of Python sources. AdamW with the settings of Motif §3.2.2, where the rate is held for four fifths of
    the run. nGPT has no weight decay and no warm-up, and no clip, like QK-Norm."""
    model, recipe = like(base, **changes), train.RECIPES["laptop"]
    optim = replace(recipe.optim, name=rule, lr=lr, momentum=0.95, decay="rsqrt", decay_start=0.8, floor=0.25,
                    warmup=0.0 if model.ngpt else 0.02, weight_decay=0.0 if model.ngpt else 0.1,
                    tau=0.0 if rule == "adamw" or model.ngpt or model.qk_norm else 100.0)
    return replace(recipe, model=model, optim=optim, batch=16, micro=16, tokens=steps * 16 * model.context,
                   eval_every=100, eval_windows=512, save_every=10 ** 9,
                   data=replace(recipe.data, domains="code:1:1", tokenizer="bytes"))


def cells(quick):
    runs = [(f"{arm}, {lr:g}", 0, config(change, lr)) for lr in RATES["adamw"] for arm, change in CHANGES.items()]
    return [(arm, seed, _note.toy(c)) for arm, seed, c in runs if not seed] if quick else runs


def show(rows):
    raise SystemExit("not yet")


if __name__ == "__main__":
    _note.main("candidates", cells, _note.history, show)
