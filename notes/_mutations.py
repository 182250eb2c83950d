"""Mutation tests: deliberate mistakes, each of which must be caught by the tests named in its row.

    python -m notes._mutations                    all mutations, one at a time: some ten minutes
    python -m notes._mutations parallel disk      only rows that contain one of these words, e.g. a file name

A row is (what is wrong, old text, new text, the tests: an expression for pytest -k). The repository is copied
to a temporary folder, where the named tests must pass. Then the mutations are applied one at a time, and the
row's tests must fail; if they pass, the mutation survives. A row whose old text does not occur exactly once
is stale: the code has changed, and the row must be updated. Exits with 1 unless all are caught. Not a note:
it has no page.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent.parent
ONE = "run_matches_its_definition_step_by_step"
TWO = "run_of_two_ranks_matches_the_same_definition"
DISK = "renamed_is_on_the_disk"
PIPE = "every_pipeline"
WOVEN = "woven_exchanges"
RUN = "interpreted"
FLASH = "interpreted and flash"

TABLE = {
    "kernels.py": [
        ("RMSNorm's gradient along x", "gw.addcmul_(n, c, value=-1).mul_(r)", "gw.mul_(r)",
         "rms_norm_matches"),
        ("PolyNorm's gradient, sign of a term", "dx.addcmul_(c, x, value=-1)", "dx.addcmul_(c, x)",
         "poly_norm_matches"),
        ("a kernel's load without its mask", "x = tl.load(x_ptr + begin + start + column, inside, 0.0,",
         "x = tl.load(x_ptr + begin + start + column,", RUN),
        ("a kernel's store without its mask", "tl.store(dx_ptr + at, h * slope - back, inside)",
         "tl.store(dx_ptr + at, h * slope - back)", RUN),
        ("a kernel's derivative of x³ without the 3", "slope = (3 * a3 * x + 2 * a2)",
         "slope = (a3 * x + 2 * a2)", RUN),
        ("a kernel's derivative of a norm without p", "t2 = 2 * a2 * r2 * s2 / D", "t2 = a2 * r2 * s2 / D",
         RUN),
        ("only the first block of a row's sums", "        sum3 += h * x * x * x\n",
         "        sum3 = h * x * x * x\n", RUN),
        ("a kernel's gradient of the gate without b", "poly = ((a3 * x + a2) * x + a1) * x + b\n",
         "poly = ((a3 * x + a2) * x + a1) * x\n", RUN),
        ("a kernel's sums in the order of p", "tl.store(sums_ptr + 4 * row, s3)",
         "tl.store(sums_ptr + 4 * row, s1)", RUN),
        ("PolyNorm's gate is left out on a CPU", "return y if gate is None else y * gate\n\n\n# ----",
         "return y\n\n\n# ----", "poly_norm_matches"),
        ("FP8 rounds ties up", "odd = (pattern >> 20) & 1", "odd = 1", RUN),
        ("FP8's small values with normal exponents", "tl.where(scaled < 0.015625, multiple, code)", "code",
         RUN),
        ("FP8 values above 448", "bitcast=True), divisor), 448.0)", "bitcast=True), divisor), 500.0)", RUN),
        ("FP8 loses NaN", "code | ((bits >> 24) & 0x80), 0x7F)", "code | ((bits >> 24) & 0x80), 0)", RUN),
        ("FP8's scale of another row", "tl.load(scale_ptr + row * tiles + tile,",
         "tl.load(scale_ptr + row + tile,", RUN),
        ("a query sees the next key", "mask = key <= query\n", "mask = key <= query + 1\n",
         "two_explicit_maps or " + ONE),
        ("a document's first token is masked", "(key >= doc_start", "(key > doc_start", ONE),
        ("differential attention adds its maps", "append((signal - lam * noise)",
         "append((signal + lam * noise)", "two_explicit_maps"),
        ("Flash: the mask is off by one", "seen = j <= past + i\n", "seen = j < past + i\n", FLASH),
        ("Flash: documents are ignored", "seen = seen & (j >= starts)", "seen = seen & (j >= 0)", FLASH),
        ("Flash: tiles on the diagonal count as whole", "(past + i0 + 1) // N * N",
         "(past + i0 + N) // N * N",
         FLASH),
        ("Flash: tiles in which documents begin count as whole", "tl.load(until_ptr + j0) // M * M",
         "tl.load(until_ptr + j0)", FLASH),
        ("Flash: a query's gradient without scale", "dq1 * scale, dq2 * scale", "dq1, dq2", FLASH),
        ("Flash: a key's gradient without scale", "dk1 * scale, dk2 * scale", "dk1, dk2", FLASH),
        ("Flash: a gradient without δ", "ds = p * (dp - delta[None, :])", "ds = p * dp", FLASH),
        ("Flash: old sums keep their maximum", "total = total * keep + tl.sum(p, 1)",
         "total = total + tl.sum(p, 1)", FLASH),
        ("Flash: the maximum before the scale", 'float("-inf")), 0) * scale', 'float("-inf")), 0)', FLASH),
        ("Flash: the maximum of rows past the end", 'tl.max(tl.where(i < T, m, float("-inf")), 0)',
         "tl.max(m, 0)", FLASH),
        ("Flash: another head's keys", "value = h // MAPS // (H // MAPS // Hv)", "value = h // MAPS % Hv",
         FLASH),
        ("Flash: the noise map reads a signal's keys", "h % MAPS // (MAPS - 1)", "0", FLASH),
        ("Flash: a key's gradient from another head", "member // each) * MAPS", "member % each) * MAPS",
         FLASH),
        ("Flash: the second part of a query is left out", "s = tl.dot(a2, b2.T, s, input_precision=\"ieee\")",
         "pass", FLASH),
        ("a bound that is too low", ".norm(dim=-1).amax(3)", ".norm(dim=-1).mean(3)", "bounds_on"),
        ("cross-entropy's gradient by chunk", "grad.div_(N) if", "grad.div_(len(target)) if",
         "cross_entropy_in_chunks"),
        ("an expert's gradient from all rows", "dw[e] = g[rows].mT @ x[rows]", "dw[e] = g.mT @ x",
         "weighted_sum or grouped_linear"),
        ("grouped_mm for any width", "all(size % 16 == 0 for size in sizes)", "True", "grouped_linear"),
        ("an expert's gradient with sides exchanged", "F.grouped_mm(g.contiguous().mT, x,",
         "F.grouped_mm(x.contiguous().mT, g,", "grouped_linear"),
        ("a mirror that does not transpose", "column.to(tl.int64) * m + row + j * m + i, block",
         "column.to(tl.int64) * m + row + i * m + j, block", "interpreted"),
        ("no mirror above the diagonal", "    if column > row:\n        return\n",
         "    if column >= row:\n        return\n", "interpreted"),
        ("a block with the wrong rows on its right", "rows.load([top + column, start])",
         "rows.load([top + row, start])", "interpreted"),
        ("stacked matrices overlap", "top = matrix * m\n", "top = matrix\n", "interpreted"),
        ("beta also scales the matrix itself", "alpha / beta, float(beta)", "alpha, float(beta)",
         "interpreted"),
        ("a slot goes to the next expert", "(e < E)).to(tl.int32)) - 1", "(e < E)).to(tl.int32))",
         "interpreted"),
        ("an expert begins where it ends", "tl.load(ends + e - 1, mask=e > 0, other=0), tl.load(ends + e)",
         "tl.load(ends + e, mask=e > 0, other=0), tl.load(ends + e)", "interpreted"),
        ("experts without slots of their own", "other=0) // BLOCK + e\n", "other=0) // BLOCK\n",
         "interpreted"),
        ("a block runs into the next expert's rows",
         "inside = (i < (last - first).to(tl.int32)) & (j < width - column)", "inside = j < width - column",
         "interpreted"),
        ("an expert's gradient with the next one's rows", "a = tl.where(mine, g.load([rest, row]), 0.0)",
         "a = g.load([rest, row])", "interpreted"),
        ("an expert's gradient with the next one's inputs",
         "b = tl.where(mine, x.load([rest, column]), 0.0)", "b = x.load([rest, column])", "interpreted"),
        ("an expert's gradient without its last rows", "    if rest < last:\n", "    if rest < first:\n",
         "interpreted"),
        ("all experts read the first one's matrix", "w += e.to(tl.int64) * n * width", "w += 0",
         "interpreted"),
        ("the matrix read the wrong way round", "[n, width], [width, 1], [STEP, BLOCK_N]",
         "[n, width], [1, n], [STEP, BLOCK_N]", "interpreted"),
        ("large tiles where they would be few", "columns <= 128 or blocks < 132", "columns <= 128",
         "tiles_of_experts"),
        ("descriptors of rows of any width", "x.shape[-1] * size % 16 == 0 for", "True for",
         "descriptors_take"),
        ("descriptors of any memory", "x.numel() and x.data_ptr() % 16 == 0 and", "x.numel() and",
         "descriptors_take"),
        ("the kernel for any symmetric product", "return takes_kernels(x) and many and",
         "return takes_kernels(x) and", "descriptors_take"),
    ],
    "data.py": [
        ("BPE breaks ties the other way", "heappush(heap, (-count[p], p))",
         "heappush(heap, (-count[p], p[::-1]))", "bpe_equals"),
        ("cumulative integral of the mixture", "u * u / (2 * self.horizon)", "u * u / self.horizon",
         "mixture_of_motif"),
        ("the permutation runs past its end", "out = x >= n", "out = x > n", "permutation_visits"),
        ("ranks see each other's windows", "+ rank * b\n", "+ rank\n", "independent_of_world"),
        ("the data seed is ignored", "np.full(b, self.seed & 2 ** 64 - 1,", "np.full(b, 0,",
         "independent_of_world"),
        ("every epoch in the same order", "for part in (domain, j // W)", "for part in (domain,)",
         "once_an_epoch"),
        ("targets are the inputs themselves", "(rows[:, :-1], rows[:, 1:])", "(rows[:, :-1], rows[:, :-1])",
         "independent_of_world"),
        ("eot belongs to the next document", "np.arange(1, x.shape[1] + 1), 0)",
         "np.arange(x.shape[1]), 0)", "document_starts"),
        ("only the first windows are evaluated", "np.arange(n) * total // n * T", "np.arange(n) * T",
         "validation_windows"),
        ("the bigram's back-off weight", "(both + followers[a] * unigram[b])", "(both + unigram[b])",
         "bigram_equals"),
        ("no limit on validation", "if held + sizes[i] <= total / 10:", "if True:", "few_or_uneven"),
        ("validation may be tiny", "enough = held >= total / 100", "enough = held > 0", "few_or_uneven"),
        ("hidden files are read", 'if file.name.startswith("."):', "if False:", "what_is_read"),
        ("shards of another reading", "{kind_of(file)} {file.suffix", "{file.suffix", "knows_how_a_file"),
        ("shards of the packed file", "{file.suffix.lower() == '.gz'} ", "", "knows_how_a_file"),
        ("links are followed forever", "in seen:", "in set():", "what_is_read"),
        ("shards are not synced to disk", "os.fsync(file.fileno())", "pass", DISK),
    ],
    "model.py": [
        ("tensor files are not synced to disk", "os.fsync(file.fileno())", "pass", DISK),
        ("rotary direction reversed", "torch.cat((-sin, sin), -1)", "torch.cat((sin, -sin), -1)", ONE),
        ("rotary pairs are interleaved", "x.roll(x.shape[-1] // 2, -1)", "x.roll(1, -1)", ONE),
        ("YaRN without sharpening, MHA", "return q * self.config.sharpness if self.config.yarn else q",
         "return q", "yarn_sharpens"),
        ("YaRN without sharpening, MLA", "q = q * c.sharpness if c.yarn else q\n", "pass\n", "yarn_sharpens"),
        ("λ_init counts layers from 1", "(layer - config.lam_delay)", "(layer + 1 - config.lam_delay)",
         "lambda_starts or " + ONE),
        ("the head norm's ε is the model's", "RMSNorm(2 * d, eps=1e-5)", "RMSNorm(2 * d, config.norm_eps)",
         ONE),
        ("half of γ where keys are shared", "return [(self.wq, by_head, 1.0)]",
         "return [(self.wq, by_head, 0.5)]", "qk_clip_brings"),
        ("half of γ for rotary queries", "by_head(w)[:, d:], 1.0)", "by_head(w)[:, d:], 0.5)", ONE),
        ("logits of only the last micro-batch", "torch.maximum(self.max_logits, largest)", "largest", ONE),
        ("groups ranked by their best expert", "min(2, groups.shape[-1])", "1", ONE),
        ("the router's bias enters the weights", "weight = s.gather(1, index)",
         "weight = choice.gather(1, index)", "bias_moves"),
        ("balance loss of biased scores", "best = s.topk(k, -1)", "best = (s + self.bias).topk(k, -1)",
         "balance_loss_counts"),
        ("balance loss over all sequences", "unflatten(0, (B, -1)).mean(1) * E / k",
         "mean(0, keepdim=True) * E / k", ONE),
        ("balance loss of only the last layer", "return x + y, kv, total + balance",
         "return x + y, kv, balance", ONE),
        ("router's bias moves the wrong way", "(load.mean() - load).sign()", "(load - load.mean()).sign()",
         ONE),
        ("load of only the last micro-batch", "self.load += counts", "self.load = counts", ONE),
        ("rows go to the wrong tokens in the backward", "g.index_select(0, *ctx.saved_tensors)",
         "g.index_select(0, ctx.saved_tensors[0].flip(0))", "weighted_sum"),
        ("experts without router weights", "gated(self.act, gate, up) * weight", "gated(self.act, gate, up)",
         "weighted_sum"),
        ("residual projections start too large", "init_std / math.sqrt(2 * self.config.n_layer)", "init_std",
         "weights_are_initialised"),
        ("the weight seed is ignored", 'f"{seed}/{unit_name}"', "unit_name", "weights_are_initialised"),
        ("FLOPs of training", "(6 if training else 2)", "(4 if training else 2)", "flops_of"),
        ("FLOPs of latent attention", "return config.d_head + config.d_rope + config.d_value",
         "return config.d_head + config.d_value", "flops_of"),
    ],
    "notes/kernels.py": [
        ("spills are not a fault", 'if row["spilled"] > row["allowed"]:', "if False:", "is_a_fault"),
        ("matmuls without matrix instructions", 'if row["matmul"] and not row["matrix"]:', "if False:",
         "is_a_fault"),
    ],
    "notes/corpus.py": [
        ("false statements pass", "claim(len({value(side) for side in sides}) == 1, found)", "pass",
         "arithmetic_statement"),
    ],
    "muonclip.py": [
        ("bA and cA² exchanged", "symmetric_square(symmetric_product(x), b, c)",
         "symmetric_square(symmetric_product(x), c, b)", "form_of_newton"),
        ("always Nesterov", "alpha=momentum) if nesterov else ms", "alpha=momentum)", ONE),
        ("the Gram matrix is never recomputed", "k % restart == 0", "False", "needs_its_restart"),
        ("AdamW's β1", "torch._foreach_lerp_(ms, gs, 1 - beta1)", "torch._foreach_lerp_(ms, gs, beta1)", ONE),
        ("AdamW's ε", "torch._foreach_add_(roots, eps)", "torch._foreach_add_(roots, eps ** 0.5)", ONE),
        ("negative logits are clipped", "torch.where(s > tau,", "torch.where(s.abs() > tau,",
         "qk_clip_brings"),
        ("warm-up starts at 0", "c.lr * (tokens + config.step_tokens) /", "c.lr * tokens /", ONE),
        ("the mean survives being put back", "w.copy_(mean.pop(name))", "w.copy_(mean[name])", ONE),
        ("λ and coefficients decay", '"embedding and head") or kind == "gains" and muon',
         '"embedding and head") or muon', "by_their_kind"),
        ("gains decay under AdamW", 'or kind == "gains" and muon', 'or kind == "gains"', "by_their_kind"),
        ("decay without the rate", '1 - group["lr"] * group["weight_decay"]', '1 - group["weight_decay"]',
         ONE),
    ],
    "parallel.py": [
        ("expert gradients go the wrong way", "start(g, ctx.trip.received, ctx.trip.sent)",
         "start(g, ctx.trip.sent, ctx.trip.received)", TWO),
        ("tokens return in order of arrival", "Depart.apply(rows[self.order.argsort()], self.back)",
         "Depart.apply(rows, self.back)", TWO),
        ("a cut loses the gradient of the part after it", "ctx.gradients[ctx.i] = g", "pass", WOVEN),
        ("parts are not woven", "key=lambda place: place[0]", "key=lambda place: 0", WOVEN),
        ("an exchange begins before the one ahead has ended", "max(ready, last.get(channel, 0.0))", "ready",
         "put_down"),
        ("exchanges in any order", "if ours != theirs:\n                    raise ValueError(f\"rank {first}",
         "if False:\n                    raise ValueError(f\"rank {first}", "different_orders"),
        ("a peak by parts", "if act.op == ends and act.left == 0", "if act.op == ends", "woven_plans"),
        ("all matrices on the first owner", "r = min(fitting, key=lambda r: (work_of[r], size_of[r]))",
         "r = fitting[0]", "shared_out_evenly"),
        ("the norm of one rank's gradients only", "all_sum(squares, self.mesh).sum()", "squares.sum()", TWO),
        ("the norm is summed twice", "all_sum(squares, self.mesh).sum()",
         "all_sum(all_sum(squares, self.mesh), self.mesh).sum()", TWO),
        ("gradients of only the last micro-batch", "bucket.gradient[where].add_(",
         "bucket.gradient[where].copy_(", TWO),
        ("expert gradients over their replicas", "bucket.gradient.div_(n)",
         "bucket.gradient.div_(bucket.axis.size)", TWO),
        ("micro-batches weigh the same", "of_all = run.windows / share", "of_all = micro / share", ONE),
        ("a backward through another chunk", "run = live[act.micro, act.chunk]",
         "run = live[next(iter(live))]", PIPE),
        ("both ends update their own embedding", 'among = "ends"', 'among = "dp"', PIPE),
        ("experts are reduced across stages", "edp=grid.transpose(1, 2).flatten(0, 1)",
         "edp=grid.permute(2, 0, 1).flatten(1)", PIPE),
        ("a stage's balance loss is dropped", "roots.append(run.balance * of_all)",
         "roots.append(run.balance * 0.0)", PIPE),
        ("groups wait for half an hour", "ranks.tolist(), timeout=timeout,", "ranks.tolist(),",
         "of_two_ranks"),
        ("incomplete groups are planned as they are", "missing = -m % p", "missing = 0", "schedules_take"),
        ("a warm-up one forward short", "2 * (p - 1 - stage) + (v - 1) * p + warm",
         "2 * (p - 1 - stage) + (v - 1) * p + warm - 1", "schedules_take"),
        ("transfers overtake each other", "posted, last.get(channel, 0.0))", "posted)", "messages_are"),
        ("receives are posted at once", "posted = spans[stage][at][2] if at >= 0 else 0.0", "posted = 0.0",
         "messages_are"),
        ("a W is dropped", "left[stage].append(act._replace(op=\"W\"))",
         "left[stage][:] = [act._replace(op=\"W\")]", "fills_the_bubble"),
        ("a W is done twice", "for weights, kept, gradients, ends, _ in self.queue.pop(at, ()):",
         "for weights, kept, gradients, ends, _ in 2 * self.queue.pop(at, []):", "gives_the_same"),
        ("B forgets the gradients of pre's parameters",
         "[found.get(t) for t in (*self.inputs, *self.params)]",
         "[found.get(t) for t in self.inputs] + [None] * len(self.params)", "gives_the_same"),
        ("a recipe's result is stored all the same", "if storage._cdata not in known:", "if False:",
         "saved_are_predicted"),
        ("a recomputed forward is recorded", "chunk.count(False)", "pass", "recomputed_from_its"),
        ("nested results are made again twice", "or self.making or not", "or not", "recomputed_from_its"),
        ("FP8 rows are kept whole as well", "h = pre(*x) if fp8 else self.recompute(kind, pre, params, *x)",
         "h = self.recompute(kind, pre, params, *x)", "fp8_takes"),
        ("a view is restored at the wrong place", "self.offset = t.storage_offset() - start",
         "self.offset = 0", "views_of_recomputed"),
        ("a storage travels for every view", "if storage._cdata not in boxes:", "if True:",
         "wait_on_the_host"),
        ("parameters leave for the host", "if storage._cdata in self.exempt:", "if False:",
         "wait_on_the_host"),
        ("nothing is freed on the device", "        cargo.leaving = ()\n", "        pass\n",
         "wait_on_the_host"),
        ("activations come back too late", "Absence(out, out + time, i - time, i)",
         "Absence(out, out + time, i, i)", "wait_on_the_host"),
        ("a block is used while it is full", "self.free.pop() if self.free", "self.free[-1] if self.free",
         "change_no_number"),
        ("pieces come back in the wrong order", "data.split(sizes), box.places)",
         "data.split(sizes), box.places[::-1])", "wait_on_the_host"),
        ("a failed step is remembered", "        self.queue.clear()\n        self.made", "        self.made",
         "a_step_that_fails"),
        ("weights of experts keep all rows", "rows[:, -1:].clone()", "rows[:, -1:]", "memory_predicts"),
        ("R comes before the last W, in the plan", 'act.op == "W" and act.micro == last',
         'act.op == "W" and act.micro == 0', "fills_the_bubble"),
        ("R before the last W, as it runs", 'act.op == "W" and act.micro == last',
         'act.op == "W" and act.micro == 0', PIPE),
        ("a chunk's soundness is not noted", "self.sent_sound.append(", "bool(", "of_two_ranks"),
        ("vectors' hooks take what is not there", "        if p.grad is not None:\n            self.accum",
         "        if True:\n            self.accum", PIPE),
        ("a channel delivers in any order", "if ours != theirs:\n                raise ValueError(f\"stage",
         "if False:\n                raise ValueError(f\"stage", "waits_for_ever"),
        ("the last chunk gets what is left", "max(most, cost), squares", "cost, squares", "layers_are_cut"),
        ("the learning rate is never set", 'group["lr"] = lr', "pass", ONE),
        ("threads outlive the mesh", "    GROUPS.clear()\n", "", "of_two_ranks"),
        ("a bucket mixes two chunks", "return chunk(piece.name), str(", "return (str)(", "without_processes"),
        ("replicated experts are one piece", "if p.ndim == 3 and axis.size > 1:", "if False:",
         "without_processes"),
        ("the norm is read from the device", 'norm.device.type != "cpu" or norm > largest', "norm > largest",
         "never_waits"),
        ("moments survive an average", "optimizer.state.clear()", "pass", ONE),
    ],
    "train.py": [
        ("gradients are never clipped", "owners.clip_norm_(config.optim.clip_norm)",
         "owners.clip_norm_(math.inf)", ONE),
        ("logits are never cleared", "        attention.clear_logits(threshold)\n", "        pass\n", ONE),
        ("the router's load is never cleared", "        moe.load.zero_()\n", "        pass\n", ONE),
        ("router biases are not averaged", "put_back_(run.buffers, run.mean)", "pass", ONE),
        ("QK-Clip comes before the update", "owners.step(sound, follow)",
         "owners.step(False, follow); run.owners.step(sound, len)", ONE),
        ("a rank's own load moves the router", "moe.balance_(seen.loads[run.sparse.index(layer)])",
         "moe.balance_(moe.load)", TWO),
        ("a stage's loads go to other layers", "loads[run.sparse.index(layer)] = moe.load",
         "loads[list(run.mixtures).index(layer)] = moe.load", PIPE),
        ("bits per token, not per byte", "nats / math.log(2) / size", "nats / math.log(2) / tokens",
         "bits_are_counted"),
        ("ranks evaluate the same windows", "[:, mesh.dp.rank].flatten()", "[:, 0].flatten()", TWO),
        ("every stage counts its tokens", "if mesh.pp.rank == mesh.pp.size - 1:\n                targets",
         "if True:\n                targets", PIPE),
        ("losses of another domain", "index_add_(0, batch.domain.to(",
         "index_add_(0, batch.domain.flip(0).to(", ONE),
        ("changed data is accepted", 'for what in ("tokenizer", "data"):', 'for what in ("tokenizer",):',
         "resuming_refuses"),
        ("the log keeps later rows", 'and int(row["step"]) <= step]', "]", "resumed_log"),
        ("moments of another optimizer", "moments=same)", "moments=True)", "stage_begins"),
        ("a nonfinite step updates", "owners.step(sound, follow)", "owners.step(True, follow)",
         "skipped_whole"),
        ("memory ignores expert parallelism", "(mesh.ep if p.ndim == 3 else 1)", "1", "memory_of"),
        ("rows from the wrong offset", "t[max(start - at, 0):stop - at]", "t[:stop - at]",
         "rows_of_a_checkpoint"),
        ("a checkpoint's folder is not synced", "        sync_folder(tmp)\n", "", DISK),
        ("a checkpoint's own name is not synced", "        sync_folder(ckpt)\n", "", DISK),
        ("the manifest is not synced to disk", "with atomic(tmp / \"manifest.json\", \"w\")",
         "with open(tmp / \"manifest.json\", \"w\")", DISK),
        ("later checkpoints stay", "kept[here:] + kept", "kept", "leaves_no_later"),
        ("the log is not synced to disk", "run.folder.sync_log()", "pass", DISK),
        ("checksums are not compared", 'i % parts == part and parallel.checksum(t) != entry["sha256"]',
         "False", "damaged_checkpoints"),
    ],
}


def run(folder, tests):
    """pytest's exit status: 0 all pass, 1 some fail, anything else means that the tests could not run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "test_all.py", "-k", tests]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    try:
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=300).returncode
    except subprocess.TimeoutExpired:
        return 1                                                   # a mutation may well hang forever


def attempt(folder, file, old, new, tests):
    """Apply one mutation, run its tests, undo it.  → its verdict: caught, survives, stale or broken"""
    path = folder / file
    text = path.read_text("utf-8")
    if text.count(old) != 1:
        return "stale"
    path.write_text(text.replace(old, new), "utf-8")
    status = run(folder, tests)
    path.write_text(text, "utf-8")
    return {0: "survives", 1: "caught"}.get(status, "broken")


def main(words):
    rows = [(file, *row) for file, some in TABLE.items() for row in some]
    rows = [row for row in rows if not words or any(word in " ".join(row) for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kimotif"
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".git", "cache", "out", "__pycache__"))
        if run(copy, " or ".join(sorted({tests for *_, tests in rows}))) != 0:
            raise SystemExit("tests of these rows do not pass on the unchanged code, or there are none")
        verdicts = []
        for file, what, *row in rows:
            verdicts.append(attempt(copy, file, *row))
            print(f"{verdicts[-1]:<9} {file:<12} {what:<42} {row[-1]}", flush=True)
    caught = verdicts.count("caught")
    print(f"{caught} of {len(verdicts)} caught")
    raise SystemExit(0 if caught == len(verdicts) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
