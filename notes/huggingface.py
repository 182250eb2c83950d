"""Import and export of weights and tokenizers: folders in the layout of Hugging Face.

  torchrun train.py --init=FOLDER --data.files=mine=PATH        train on, from the weights of such a folder
  python model.py --sample FOLDER --prompt "..."                sample from it
  python model.py --sample RUN --export FOLDER                  write a run's model as one

`hf_map` translates between their tensor names and ours, in both directions; the tables before it say which
configurations describe the same model. Anything that would be a different model is refused by name before any
weight is read.
"""
import json
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data import SPECIALS, Tokenizer, sha256, write_atomically
from kernels import listed
from model import ModelConfig, Transformer, json_object, read_tensors, write_tensors


# ---- weights: the layouts of DeepSeek-V3, Kimi K2 and Motif-2.6B -------------------------------------------

# Names of tensors: ours in layers.N. ↔ theirs in model.layers.N.
HF_LAYER = {
    "attention.norm.weight": "input_layernorm.weight", "ffn.norm.weight": "post_attention_layernorm.weight",
    "attention.wdq": "self_attn.q_a_proj.weight", "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wuq": "self_attn.q_b_proj.weight", "attention.wdkv": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "ffn.router": "mlp.gate.weight", "ffn.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn.{part}{ours}": f"mlp.{theirs}{ours}_proj.weight" for ours in ("gate", "up", "down")
       for part, theirs in (("", ""), ("shared.", "shared_experts."))},
    **{f"attention.w{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},               # Motif's, from here on
    **{f"attention.l{x}": f"self_attn.lambda_{x}" for x in ("q1", "k1", "q2", "k2")},
    "attention.head_norm.weight": "self_attn.subln.weight", "ffn.act.weight": "mlp.act_fn.weight",
    "ffn.act.bias": "mlp.act_fn.bias"}

# {our field of ModelConfig: their key in config.json}
HF_CONFIG = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                 d_model="hidden_size", d_ff="intermediate_size", vocab_size="vocab_size",
                 norm_eps="rms_norm_eps", context="max_position_embeddings", tie="tie_word_embeddings")
HF_DEEPSEEK = dict(d_head="qk_nope_head_dim", d_rope="qk_rope_head_dim", d_value="v_head_dim",
                   q_rank="q_lora_rank", kv_rank="kv_lora_rank", n_expert="n_routed_experts",
                   n_dense="first_k_dense_replace", n_active="num_experts_per_tok",
                   n_shared="n_shared_experts", d_expert="moe_intermediate_size", n_group="n_group",
                   top_group="topk_group", route_scale="routed_scaling_factor")
HF_YARN = dict(yarn="factor", yarn_from="original_max_position_embeddings", yarn_fast="beta_fast",
               yarn_slow="beta_slow")
COMMON_FIELDS = dict(gated=True, norm="rms", position="rope", qk_norm=False, share_kv=1, ngpt=False,
                     n_noise=0)
DEEPSEEK_FIELDS = COMMON_FIELDS | dict(differential=False, act="silu")
MOTIF_FIELDS = COMMON_FIELDS | dict(differential=True, act="polynorm", lam_delay=1, kv_rank=0, n_expert=0,
                                    yarn=0.0)

# Other keys of config.json that affect the numbers, with the values our model implements; `...`: key missing
HF_BOTH = dict(attention_bias=(False, None, ...), is_causal=(True, ...), per_layer_config=(None, ...),
               partial_rotary_factor=(1, ...))
HF_DEEPSEEK_IS = HF_BOTH | dict(
    hidden_act=("silu",), norm_topk_prob=(True,), rope_interleave=(True, ...), scoring_func=("sigmoid", ...),
    topk_method=("noaux_tc", ...), moe_layer_freq=(1, ...),
    rms_norm_eps=(1e-6,))                                          # their code always uses it for latents
HF_MOTIF_IS = HF_BOTH | dict(
    hidden_act=("poly_norm",), attn_rms_norm_eps=(1e-5, ...), use_bias=(False, None, ...),
    qkv_bias=(False, None, ...), num_noise_heads=(None, ...), use_sliding_window=(False, None, ...))
HF_YARN_IS = dict(mscale=(1,), mscale_all_dim=(1,), attention_factor=(None, ...), truncate=(True, ...))
HF_FP8_IS = dict(quant_method=("fp8",), fmt=("e4m3", ...), activation_scheme=("dynamic", ...),
                 expert_dtype=("fp8", ...))
HF_LATENT = HF_CONFIG | HF_DEEPSEEK, DEEPSEEK_FIELDS, HF_DEEPSEEK_IS, ("default", "yarn")
HF_KINDS = dict(deepseek_v3=HF_LATENT, kimi_k2=HF_LATENT,
                motif=(HF_CONFIG, MOTIF_FIELDS, HF_MOTIF_IS, ("default",)))

# Fields that a run may choose anew for existing weights; all others must match the folder's.
HF_FREE = {"context", "rope_theta", *HF_YARN, "balance_rate", "balance_loss", "compile_act", "zero_out",
           "init_std", "loss_chunk"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def turn_rotary(w, rows, rotary, back=False):
    """Their rotary pairs are interleaved, ours lie half a head apart. w (M·rows, inputs): the last `rotary`
    of each `rows` rows are reordered from their layout to ours, or back."""
    if not w.shape[0]:
        return w
    kept, turned = w.unflatten(0, (-1, rows)).split((rows - rotary, rotary), 1)
    pairs = turned.unflatten(1, (2, -1) if back else (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((kept, pairs), 1).flatten(0, 1)


def hf_map(config, names):
    """The mapping, in both directions, of the tensors `names` of a state dict. Yields (our names, their
    names, f(*theirs) → our tensors, g(*ours) → their tensors) for each group that is converted together."""
    c, same = config, lambda *ts: ts
    outside = {"embed": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
               "head": "lm_head.weight"}
    turned = {}
    if c.kv_rank:
        turned = {"attention.wuq": c.d_head + c.d_rope, "attention.wdkv": c.kv_rank + c.d_rope}
    for name in names:
        number, _, leaf = name.removeprefix("layers.").partition(".")
        ours, theirs = (name,), outside.get(name, f"model.layers.{number}.{HF_LAYER.get(leaf)}")
        if leaf == "attention.wuq" and not c.q_rank:
            theirs = theirs.replace("q_b_proj", "q_proj")
        if leaf in turned:
            turn = lambda w, back=False, rows=turned[leaf]: (turn_rotary(w, rows, c.d_rope, back),)
            yield ours, (theirs,), turn, lambda w, turn=turn: turn(w, True)
        elif leaf == "attention.wuk":                              # theirs holds k and v, head by head
            by_head = lambda w: w.unflatten(0, (c.n_head, -1))
            cut = lambda w: [t.flatten(0, 1) for t in by_head(w).split((c.d_head, c.d_value), 1)]
            join = lambda k, v: (torch.cat([by_head(k), by_head(v)], 1).flatten(0, 1),)
            yield (name, name[:-1] + "v"), (f"model.layers.{number}.self_attn.kv_b_proj.weight",), cut, join
        elif leaf in ("ffn.gate", "ffn.up", "ffn.down") and c.n_expert and int(number) >= c.n_dense:
            each = tuple(theirs.replace("mlp.", f"mlp.experts.{i}.") for i in range(c.n_expert))
            yield ours, each, lambda *ts: (torch.stack(ts),), lambda t: t.unbind()
        elif leaf != "attention.wuv":
            yield ours, (theirs,), same, same


def unlike(found, needs):
    """One line for each key of `needs` {key: allowed values} whose value in `found` is not allowed."""
    for key, can in needs.items():
        if found.get(key, ...) not in can:
            have = " or ".join(repr(value) for value in can if value is not ...)
            said = repr(found[key])[:60] if key in found else "missing"
            yield f"{key} {said}, have {have}"


def hf_rope(found):
    """The position settings of config.json as one object, and a line for each contradiction. They are in one
    of two places; theta may be outside of it."""
    places = [found.get(key) for key in ("rope_scaling", "rope_parameters")]
    if any(place is not None and type(place) is not dict for place in places):
        return {}, ["rope_scaling or rope_parameters is not an object"]
    outside = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
    rope = outside | (places[0] or places[1] or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = ["rope_scaling and rope_parameters differ"] if all(places) and places[0] != places[1] else []
    wrong += unlike(rope, dict(type=(kind, ...), partial_rotary_factor=(1, ...)))
    before = "original_max_position_embeddings"
    wrong += unlike(found, {before: (rope.get(before), ...)})
    return rope | dict(rope_type=kind), wrong


def hf_values(found, fields, null):
    """{our field: value} for `fields` {our field: key of `found`}, and a line for each key that is missing or
    does not fit its field. `null` {our field: value} says what null means where it is allowed."""
    values, wrong = {}, []
    for ours, key in fields.items():
        value, kind = found.get(key, ...), type(getattr(ModelConfig, ours))
        if value is None and ours in null:
            values[ours] = null[ours]
            continue
        if kind is float and type(value) is int and abs(value) < 2 ** 53:
            value = float(value)
        least = dict(n_shared=0, n_dense=0, n_active=2).get(ours, 1)       # codes differ for n_active = 1
        most = 2 ** 31 if ours in ("context", "yarn_from") else 2 ** 19    # no tensor reaches 2^63 bytes
        needs = {bool: "true or false", float: "a number above 0", int: f"whole, {least} to {most}"}
        fits = type(value) is kind
        if fits and kind is int:
            fits = least <= value <= most
        if fits and kind is float:
            fits = 0 < value < math.inf
        if not fits:
            said = repr(found[key])[:60] if key in found else "missing"
            wrong.append(f"{key} {said}, needs {needs[kind]}")
        values[ours] = value
    return values, wrong


def hf_block(found):
    """The FP8 block of config.json, (rows, columns) that share a scale, and a line for each error."""
    about = found.get("quantization_config")
    if about is None:
        return (128, 128), []                                      # [DeepSeek-V3's]
    if type(about) is not dict:
        return None, ["quantization_config is not an object"]
    wrong, block = [*unlike(about, HF_FP8_IS)], about.get("weight_block_size", [128, 128])
    if not (type(block) is list and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        wrong.append(f"weight_block_size {repr(block)[:60]}, needs two whole numbers above 0")
    return block, [f"quantization_config: {line}" for line in wrong]


def hf_about(folder):
    """config.json → (ModelConfig, FP8 block as in `hf_block`).  ValueError: everything that we cannot build,
    or would build differently from its authors"""
    path = Path(folder) / "config.json"
    try:
        found = json_object(path.read_bytes(), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    kind = found.get("model_type")
    if kind not in list(HF_KINDS):
        raise ValueError(f"{path}: model_type {repr(kind)[:60]}; have {', '.join(HF_KINDS)}")
    fields, fixed, needs, turns = HF_KINDS[kind]

    # Positions
    rope, wrong = hf_rope(found)
    wrong += unlike(rope, dict(rope_type=turns))
    stretch = dict(rope_theta="rope_theta")
    if rope.get("rope_type") == "yarn":
        wrong += unlike(rope, HF_YARN_IS)
        stretch |= {ours: key for ours, key in HF_YARN.items()
                    if ours in ("yarn", "yarn_from") or rope.get(key) is not None}
    turning, amiss = hf_values(rope, stretch, {})
    wrong += amiss

    # The network; for latent attention, transformers' head_dim is the width of the rotary part
    if kind != "motif":
        needs = needs | dict(head_dim=(found.get("qk_rope_head_dim"), ...),
                             num_local_experts=(found.get("n_routed_experts"), ...))
    elif found.get("head_dim") is not None:
        fields = fields | dict(d_head="head_dim")
    null = dict(n_kv_head=found.get("num_attention_heads"), q_rank=0, n_shared=0)
    values, amiss = hf_values(found, fields, null)
    block, unfit = hf_block(found)
    wrong += [*amiss, *unlike(found, needs), *unfit]
    if wrong:
        raise ValueError(f"{path}: {listed(wrong)}")
    if kind == "motif":
        values.setdefault("d_head", max(values["d_model"] // values["n_head"], 1))
    try:
        config = ModelConfig(**values | turning | fixed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.rope_theta <= 1 or turning.get("yarn", 1) < 1 or config.yarn_fast < config.yarn_slow:
        raise ValueError(f"{path}: rope_theta {config.rope_theta} must be above 1; with YaRN, factor "
                         f"{config.yarn} at least 1 and beta_fast {config.yarn_fast} at least beta_slow "
                         f"{config.yarn_slow}")
    return config, block


def hf_config(folder):
    """config.json of a DeepSeek-V3, Kimi K2 or Motif model → ModelConfig.  ValueError: as hf_about"""
    return hf_about(folder)[0]


def hf_tensors(folder):
    """{their name: tensor}: those that model.safetensors.index.json names; without an index, those of
    model.safetensors or else of all model*.safetensors. ValueError: missing or ambiguous tensors"""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        alone = folder / "model.safetensors"
        paths = [alone] if alone.exists() else sorted(folder.glob("model*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: no model*.safetensors here")
        found = [read_tensors(path) for path in paths]
        count = Counter(name for tensors in found for name in tensors)
        twice = [name for name, n in count.items() if n > 1]
        if twice:
            raise ValueError(f"{folder}: no {index.name} says which file has {listed(twice)}")
        return {name: t for tensors in found for name, t in tensors.items()}

    where = json_object(index.read_bytes(), index).get("weight_map")
    if type(where) is not dict or not where or any(type(file) is not str for file in where.values()):
        raise ValueError(f"{index}: its weight_map is not one of tensors to files")
    names = list(dict.fromkeys(where.values()))
    odd = [name for name in names if not re.fullmatch(r"[\w.-]{1,200}", name)]
    if odd:
        raise ValueError(f"{index} names what is no file of its folder: {listed(odd)}")
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise ValueError(f"{folder}: {len(lost)} of {len(names)} files of its index missing: {listed(lost)}")
    files = {name: read_tensors(folder / name) for name in names}
    lost = [f"{name} in {file}" for name, file in where.items() if name not in files[file]]
    if lost:
        raise ValueError(f"{folder}: {len(lost)} tensors of its index missing: {listed(lost)}")
    return {name: files[file][name] for name, file in where.items()}


def hf_misfits(files, shapes, tied, block):
    """A line for each mismatch between the tensors `files` and `shapes` {their name: shape}: weights that are
    missing, misshapen or not floating point, FP8 weights without scales, scales without FP8 weights, unknown
    names."""
    for name, shape in shapes.items():
        t, scale = files.get(name), files.get(f"{name}_scale_inv")
        if t is None:
            yield f"{name} missing"
        elif t.shape != shape:
            yield f"{name} {tuple(t.shape)} for {tuple(shape)}"
        elif t.dtype in FP8 and t.ndim == 2:
            blocks = tuple(-(-n // width) for n, width in zip(t.shape, block))
            if scale is None:
                yield f"{name}_scale_inv missing"
            elif scale.shape != blocks or scale.dtype not in (*FLOATS, torch.float8_e8m0fnu):
                yield f"{name}_scale_inv {tuple(scale.shape)} of {scale.dtype} for {blocks} of {block}"
        elif t.dtype not in FLOATS:
            yield f"{name} of {t.dtype}"
    embed = files.get("model.embed_tokens.weight")
    for name, t in files.items():
        weight = name.removesuffix("_scale_inv")
        scales = weight != name and weight in shapes and weight in files and files[weight].dtype in FP8
        angles = re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name)
        if name in shapes or scales or angles or not t.numel():
            continue
        if name != "lm_head.weight" or not tied:
            yield f"{name} unknown"
        elif t.dtype not in FLOATS or embed is None or embed.dtype != t.dtype or not torch.equal(t, embed):
            yield f"{name} is not the embedding that it is tied to"


class HFWeights:
    """The tensors of a Hugging Face folder under our names, with the interface that parallel.Saved has for
    checkpoints: `weights[name]`, or some of its rows, in the stored precision, with FP8 dequantised. Tensors
    are read and assembled on demand and never cached.

    Layers beyond the last (the multi-token prediction layer) are skipped and counted. ValueError: all tensors
    that are missing, extra or misshapen, or a folder whose model is not `config`."""

    def __init__(self, folder, config, say=print):
        theirs, self.block = hf_about(folder)
        other = [f"{name}={value}, not {getattr(config, name)}" for name, value in vars(theirs).items()
                 if name not in HF_FREE and value != getattr(config, name)]
        if other:
            raise ValueError(f"{folder} has another model: {listed(other)}")
        self.files = hf_tensors(folder)
        if len(self.files) < config.n_layer + (config.n_layer - config.n_dense) * config.n_expert:
            raise ValueError(f"{folder}: {len(self.files)} tensors are too few for {config.n_layer} layers")
        with torch.device("meta"):
            self.whole = Transformer(config).state_dict()

        # {our name: (their names, their tensors → our tensors, index of ours among those)}
        self.sources, shapes = {}, {}
        for ours, names, to_ours, to_theirs in hf_map(config, self.whole):
            self.sources |= {name: (names, to_ours, i) for i, name in enumerate(ours)}
            given = to_theirs(*(self.whole[name] for name in ours))
            shapes |= {name: t.shape for name, t in zip(names, given)}
        number = {name: re.match(r"model\.layers\.(\d{1,9})\.", name) for name in self.files}
        beyond = {name for name, found in number.items() if found and int(found[1]) >= config.n_layer}
        here = {name: t for name, t in self.files.items() if name not in beyond}
        wrong = list(hf_misfits(here, shapes, config.tie, self.block))
        if wrong:
            raise ValueError(f"{folder}: {len(wrong)} tensors do not fit: {listed(wrong)}")
        if beyond:
            say(f"{folder}: {len(beyond)} tensors of layers beyond the last of {config.n_layer} left out")

    def __iter__(self):
        return iter(self.whole)

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, name):
        return self.rows(name)

    def shape(self, name):
        return self.whole[name].shape

    def rows(self, name, start=0, stop=None):
        """Rows start..stop, all by default; of a stack of experts, only these experts are read."""
        theirs, to_ours, i = self.sources[name]
        if self.whole[name].ndim == 3:
            return to_ours(*map(self.read, theirs[start:stop]))[0]
        return to_ours(*map(self.read, theirs))[i][start:stop]

    def read(self, name):
        """A tensor by their name; FP8 is multiplied by its scales, one per block."""
        t, scale = self.files[name], self.files.get(f"{name}_scale_inv")
        if scale is None:
            return t
        rows, columns = (min(width, n) for width, n in zip(self.block, t.shape))
        scale = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return t.float() * scale[:t.shape[0], :t.shape[1]]


@torch.no_grad()
def load_hf(folder, say=print):
    """Build the model of a DeepSeek-V3, Kimi K2 or Motif folder.  ValueError: as HFWeights"""
    config = hf_config(folder)
    weights = HFWeights(folder, config, say)                       # checks sizes before allocating the model
    model = Transformer(config)
    for name, p in model.state_dict().items():
        p.copy_(weights[name])
    return model


def write_hf(model, folder, dtype, shard_bytes):
    """Write a whole model's weights under their names: files of about shard_bytes each, and their index."""
    shard, where, own = {}, {}, model.state_dict()

    def write():
        name = f"model-{len(set(where.values())):05d}.safetensors"
        write_tensors(folder / name, shard)
        where.update(dict.fromkeys(shard, name))
        shard.clear()
    for ours, theirs, _, to_theirs in hf_map(model.config, own):
        for name, t in zip(theirs, to_theirs(*(own[o] for o in ours))):
            shard[name] = t if dtype is None or name.endswith("correction_bias") else t.to(dtype)
            if sum(t.nbytes for t in shard.values()) > shard_bytes:
                write()
    if shard:
        write()
    index = dict(metadata={}, weight_map=where)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def save_hf(model, folder, tokenizer=None, dtype=None, shard_bytes=4 << 30):
    """Write a whole model as a Hugging Face folder, with its tokenizer.json if a tokenizer is given. MLA with
    experts is written as deepseek_v3, which transformers and the servers built on it load as
    DeepseekV3ForCausalLM; Motif's block as motif, only with lam_delay=1, the λ_init of its code. The folder
    appears only when it is complete. ValueError: what the format cannot express"""
    c, folder = model.config, Path(folder)
    kind = "deepseek_v3" if c.kv_rank else "motif"
    needs = DEEPSEEK_FIELDS | dict(n_expert=max(c.n_expert, 1), norm_eps=1e-6) if c.kv_rank else MOTIF_FIELDS
    wrong = [f"{name}={getattr(c, name)}, not {value}" for name, value in needs.items()
             if getattr(c, name) != value]
    if wrong:
        raise ValueError(f"a model of the kind {kind} cannot have {'; '.join(wrong)}")
    if folder.exists():
        raise ValueError(f"{folder} exists: name a new folder")

    # config.json
    fields = HF_CONFIG | HF_DEEPSEEK if c.kv_rank else HF_CONFIG
    about = {theirs: getattr(c, ours) for ours, theirs in fields.items()}
    about |= dict(model_type=kind, rope_theta=c.rope_theta, torch_dtype=str(dtype or model.embed.dtype)[6:])
    if c.kv_rank:
        about |= dict(architectures=["DeepseekV3ForCausalLM"], hidden_act="silu", norm_topk_prob=True,
                      q_lora_rank=c.q_rank or None, scoring_func="sigmoid", topk_method="noaux_tc",
                      rope_interleave=True, attention_bias=False, num_nextn_predict_layers=0,
                      bos_token_id=None, eos_token_id=None)
    else:
        about |= dict(architectures=["MotifForCausalLM"], hidden_act="poly_norm", head_dim=c.d_head,
                      use_bias=False, attn_rms_norm_eps=1e-5)
    if c.yarn:
        yarn = {theirs: getattr(c, ours) for ours, theirs in HF_YARN.items()}
        about["rope_scaling"] = dict(yarn, type="yarn", mscale=1.0, mscale_all_dim=1.0)
    if tokenizer:
        about["eos_token_id"] = tokenizer.eot

    # Into an empty temporary folder, since an export that was killed may have left files, then renamed
    tmp = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        (tmp / "config.json").write_text(json.dumps(about, indent=1))
        hf_config(tmp)                                             # refuses what could not be read back
        write_hf(model, tmp, dtype, shard_bytes)
        if tokenizer:
            save_tokenizer(tokenizer, tmp)
        os.sync()                                                  # on disk before it gets its name
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


# ---- tokenizers --------------------------------------------------------------------------------------------

# The printable character for each byte in tokenizer.json: itself, or one from 256 on   [GPT-2's table]
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_CHARS = [chr(b) if b in PRINTABLE else chr(256 + sum(c not in PRINTABLE for c in range(b)))
              for b in range(256)]


def halves(piece, ranks):
    """The two pieces whose merge, the last of BPE, gives this one."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# A byte-level tokenizer must round-trip this: blanks, line ends, Unicode forms, accents, control characters
PROBE = ("A  word,  two  blanks,\r\na\ttab; \u212b \ufb01 e\u0301 \u00e9 \u6f22\u5b57 \U0001f642 1234567 "
         "Don't\u3000x\x00\n\n\nEnd \n ")


# The template of data.chat_ids in Jinja. transformers reads a special that a message spells as that special,
# unless it is called with sanitize_control_tokens=True, which keeps it text, in slightly other tokens
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] "
    "or message['content'] is not string -%}"
    "{{ raise_exception('a message is a system, user or assistant role and a text as content') }}"
    "{%- endif -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}")


class HuggingFaceTokenizer(Tokenizer):
    """A foreign byte-level tokenizer.json, read by the tokenizers package; `text`: the file, `eot`: an id."""
    def __init__(self, text, eot):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("a Hugging Face tokenizer.json needs: pip install tokenizers") from None
        try:
            self.text, self.theirs, self.eot = text, tokenizers.Tokenizer.from_str(text), eot
        except Exception as error:                               # the package has no exception class for it
            raise ValueError(f"not a tokenizer.json: {str(error).splitlines()[0]:.200}") from None
        self.theirs.encode_special_tokens = True                 # as text; special tokens are added by id
        self.theirs.no_truncation()                              # undo settings for other uses: encode all
        self.theirs.no_padding()                                 # of a text, always to the same ids
        if getattr(self.theirs.model, "dropout", None): self.theirs.model.dropout = None
        added = self.theirs.get_added_tokens_decoder()
        vocab = self.theirs.get_vocab(with_added_tokens=False)
        self.n_vocab = max([*vocab.values(), *added]) + 1
        self.pieces, byte_of = [b""] * self.n_vocab, {c: b for b, c in enumerate(BYTE_CHARS)}
        for piece, i in vocab.items():
            if i in added: continue
            if not byte_of.keys() >= set(piece):
                raise ValueError(f"tokenizer.json: {piece!r} is not made of bytes: "
                                 f"only byte-level ones are read")
            self.pieces[i] = bytes(byte_of[c] for c in piece)
        for i, token in added.items(): self.pieces[i] = token.content.encode()
        self.token_bytes = np.array([len(piece) for piece in self.pieces])
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.token_bytes[list(self.specials.values())] = 0
        self.fingerprint = sha256(text, str(eot))
        if (back := self.decode(self.encode(PROBE).tolist())) != PROBE:
            about, at = json.loads(text), len(os.path.commonprefix([PROBE, back]))
            parts = {key: about[key] for key in ("normalizer", "pre_tokenizer") if about.get(key)}
            raise ValueError(f"tokenizer.json changes text: {PROBE[at:at + 9]!r} comes back as "
                             f"{back[at:at + 9]!r}; it has {json.dumps(parts)[:300]}")

    def encode(self, text):
        return np.array(self.theirs.encode(text, add_special_tokens=False).ids, np.uint32)

    def save(self, path):
        write_atomically(path, json.dumps(dict(huggingface=self.text, eot=self.eot)).encode())


def read_hf_tokenizer(path, text):
    """A tokenizer.json, and the tokenizer_config.json in its folder that names the end-of-text token."""
    try:
        eos = json.loads(path.with_name("tokenizer_config.json").read_bytes())["eos_token"]
        eos = eos["content"] if isinstance(eos, dict) else eos
        if type(eos) is not str: raise ValueError
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path}: needs tokenizer_config.json beside it, with its eos_token") from None
    tokenizer = HuggingFaceTokenizer(text, -1)
    if eos not in tokenizer.specials:
        raise ValueError(f"{path}: eos_token {eos!r} is not one of its specials")
    return HuggingFaceTokenizer(text, tokenizer.specials[eos])


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json, which the tokenizers package and transformers read. If
    it has the tokens of a conversation, then also their template, and in generation_config.json what ends an
    answer."""
    folder, eot = Path(folder), tokenizer.pieces[tokenizer.eot].decode()
    about = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=eot, clean_up_tokenization_spaces=False)
    if tokenizer.specials.keys() >= set(SPECIALS[1:]):
        about["chat_template"] = CHAT_TEMPLATE
        ends = dict(eos_token_id=[tokenizer.eot, tokenizer.specials["<|end|>"]])
        write_atomically(folder / "generation_config.json", json.dumps(ends).encode())
    write_atomically(folder / "tokenizer_config.json", json.dumps(about).encode())
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return write_atomically(folder / "tokenizer.json", tokenizer.text.encode())
    ranks = {piece: i for i, piece in enumerate(tokenizer.pieces[:tokenizer.eot]) if piece}
    shown = lambda piece: "".join(BYTE_CHARS[b] for b in piece)
    merges = [[shown(half) for half in halves(piece, ranks)] for piece in ranks if len(piece) > 1]
    split = dict(type="Split", pattern=dict(Regex=tokenizer.encoding._pat_str), behavior="Isolated",
                 invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    saved = dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
                 added_tokens=[dict(id=i, content=name) | special for name, i in tokenizer.specials.items()],
                 pre_tokenizer=dict(type="Sequence", pretokenizers=[split] * bool(merges) + [level]),
                 decoder=level, model=dict(type="BPE", vocab={shown(p): i for p, i in ranks.items()},
                                           merges=merges))
    write_atomically(folder / "tokenizer.json", json.dumps(saved).encode())
