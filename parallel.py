"""What changes when one device becomes many.

`Mesh` is this process's place among the ranks; `Mesh()` is a process on its own, for which every
collective here is the identity. It is built once, in train.py, and passed as an argument: no module asks
for its rank.

  pipeline             stages divide the layers; micro-batches pass through them, activations forwards and
                       gradients backwards. Who does what when is a plan, a plain list [Kimi K2 §2.4.2]
  expert parallelism   ranks of an ep group divide the experts; tokens are dispatched to them and their
                       outputs combined                                                 [Kimi K2 §2.4.2]
  activations          what is kept for the backward is made again, stored in FP8, or waits in the memory
                       of the host                                                      [Kimi K2 §2.4.3]
  ZeRO-1               each matrix has one owner, which alone keeps its optimizer state: gradients are
                       reduced to the owner, weights broadcast from it

World = pp × edp × ep, in this order, and dp = edp × ep: rank r of dp is number r % ep of ep group r // ep.
Experts are replicated on the edp ranks, everything else of a stage on its dp ranks.

Try:     python parallel.py --pp 4 --chunks 2 --microbatches 8      # draw and time a schedule
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
import uuid
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional    # imported after a process group exists, its defaults would hold it
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import GroupedLinear, accumulation_dtype, fp8_pack, fp8_unpack, linears, listed

RECOMPUTED = "norm", "act", "mla"        # what mesh.recompute may name: see Savings
STORED_IN_FP8 = "expert_up", "act"       # what mesh.fp8 may name


def names(text):
    """"a, b" → {"a", "b"}"""
    return {name.strip() for name in text.split(",")} - {""}


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks are laid out; dp = world / pp. ValueError names the field to change."""
    pp: int = 1                  # pipeline stages
    chunks: int = 1              # ranges of layers on each stage
    schedule: str = ""           # gpipe | 1f1b | interleaved; "" = 1f1b with one chunk, else interleaved
    split: bool = False          # compute the weights' gradients where a stage would wait   [Kimi K2 §2.4.2]
    ep: int = 1                  # ranks that divide the experts among them
    overlap: bool = False        # tokens travel to experts while another micro-batch computes   [§2.4.2]
    recompute: str = ""          # norm,act,mla: what the backward makes again instead of storing it [§2.4.3]
    fp8: str = ""                # expert_up,act: inputs of experts and activations that are stored in FP8;
                                 # act is then recomputed
    offload: bool = False        # the rest waits for its backward in the memory of the host     [§2.4.3]
    timeout: float = 600.0       # seconds that a collective waits for a rank; saving has to take less

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"mesh.timeout={self.timeout}: must be positive, in seconds")
        for name in ("pp", "chunks", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name}={getattr(self, name)}: must be at least 1")
        for name, known in (("recompute", RECOMPUTED), ("fp8", STORED_IN_FP8)):
            unknown = names(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"mesh.{name}={getattr(self, name)}: have {', '.join(known)}, not "
                                 f"{listed(sorted(unknown))}")
        if self.schedule not in ("", *SCHEDULES):
            raise ValueError(f"mesh.schedule={self.schedule!r}: have {', '.join(SCHEDULES)}")
        if self.schedule == "1f1b" and self.chunks > 1:
            raise ValueError(f"mesh.schedule=1f1b has one chunk on each stage, not mesh.chunks="
                             f"{self.chunks}: take interleaved")
        if self.overlap and self.schedule not in ("", "interleaved"):
            raise ValueError(f"mesh.schedule={self.schedule}: mesh.overlap=true is a plan of its own, "
                             "interleaved with one more forward in the warm-up: leave mesh.schedule out")
        if self.overlap and self.ep == 1:
            raise ValueError("mesh.overlap=true: with mesh.ep=1 no tokens travel that could be overlapped")

    def check(self, world, batch, n_expert, groups):
        """Raise ValueError unless `world` ranks can share `batch` windows, `n_expert` experts, and layers
        that can be cut into `groups` chunks (layers with the same keys and values stay together)."""
        chunks = self.pp * self.chunks
        rules = [
            (world % (self.pp * self.ep) == 0,
             f"mesh.pp={self.pp} × ep={self.ep} does not divide the {world} ranks there are"),
            (batch % (world // self.pp or 1) == 0,
             f"--batch={batch} windows cannot be shared evenly by {world // self.pp} ranks"
             + f" (those of each of {self.pp} stages)" * (self.pp > 1)),
            (self.ep == 1 or n_expert > 0 and n_expert % self.ep == 0,
             f"mesh.ep={self.ep} does not divide the model's {n_expert} experts"),
            (self.chunks == 1 or world > 1,
             f"mesh.chunks={self.chunks}: there is only one rank, which needs no pipeline: mesh.chunks=1"),
            (chunks <= groups,
             f"mesh.pp={self.pp} × chunks={self.chunks} = {chunks} chunks, but the layers can only be cut "
             f"into {groups}"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(message)

    @functools.cache
    def plans(self, windows, micro, parts=()):
        """The plans of all stages for `windows` windows in micro-batches of `micro`. parts: with overlap, a
        tuple: in how many parts each chunk is run."""
        name = self.schedule
        if not name:
            name = "1f1b" if self.chunks == 1 else "interleaved"
        m = -(-windows // micro)
        if self.overlap:
            return overlapped(self.pp, m, self.chunks, parts, self.split)
        plans = SCHEDULES[name](self.pp, m, self.chunks)
        if self.split:
            plans = split_backwards(plans)
        return plans


GROUPS = {}                      # name of an axis, or of a channel between stages: its process group


class Axis(NamedTuple):
    """One direction of the mesh: this process's rank along it, and its size.

    It holds the name of its process group and not the group itself. gloo's threads end with the last
    reference to their group, and a thread that outlives the interpreter aborts the process: so
    `leave_mesh` has to be able to drop every reference, whoever still holds a mesh."""
    rank: int = 0
    size: int = 1
    name: str = ""               # "" without a process group

    @property
    def group(self):
        return GROUPS[self.name]


class Mesh(NamedTuple):
    """This process's coordinates, and the device it computes on. Decisions that all ranks take together
    go over `world`."""
    world: Axis = Axis()         # all ranks
    dp: Axis = Axis()            # data parallel
    pp: Axis = Axis()            # pipeline stage
    ep: Axis = Axis()            # place in the expert-parallel group
    edp: Axis = Axis()           # replica of this rank's experts
    ends: Axis = Axis()          # in the first and the last stage: the ranks of both; they share tied weights
    device: torch.device = torch.device("cpu")


def this_rank():
    """This process's rank as torchrun set it, known before the process group; 0 for a single process."""
    if world_size() > 1:
        return int(os.environ.get("RANK", 0))
    return 0


def world_size():
    """The number of ranks, as torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_id():
    """Names the torchrun launch of this process, restarts included: host, torchrun's pid and start time.
    "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""

    # The start time tells a reused pid apart; only Linux has /proc.
    began = ""
    with contextlib.suppress(OSError):
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{os.uname().nodename} {os.getppid()} {began}"


def join_mesh(config, facts=None):
    """The mesh of this process, from torchrun's variables; a plain `python train.py` is a mesh of one.

    NCCL on GPUs, gloo on CPUs. Call it when the data is ready: from here on, a rank that has to wait
    longer than config.timeout fails. `facts` {what: text} must be equal on all ranks; `compare` checks that
    first. ValueError: fewer GPUs than ranks, or ranks not started alike. LostRank: a rank is missing."""
    # Device: one GPU for each rank of this host, else the CPU
    world = world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"--nproc-per-node: local rank {local}, but only {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(device=device)

    # All ranks, in a process group of this launch alone
    timeout = timedelta(seconds=config.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(meet(store, rank, world, config.timeout), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    GROUPS["world"] = dist.group.WORLD
    everyone = Axis(rank, world, "world")
    compare(facts or {}, Mesh(everyone, device=device))

    # The grid of ranks, and its lines along each axis
    shape = config.pp, world // config.pp // config.ep, config.ep              # pp, edp, ep
    grid = torch.arange(world).view(shape)
    lines = dict(
        dp=grid.flatten(1),
        pp=grid.flatten(1).T,
        ep=grid.flatten(0, 1),
        edp=grid.transpose(1, 2).flatten(0, 1),
    )
    if config.overlap:
        lines["counts"] = lines["ep"]          # so that counts are not queued behind tokens under way
    if config.pp > 1:
        lines["ends"] = grid[[0, -1]].view(1, -1)
        lines |= dict.fromkeys(channels(config.chunks), lines["pp"])

    # A process group for each line of several ranks. All ranks make all of them, in the same order.
    axes = dict(world=everyone)
    for name, ranks in lines.items():
        if ranks.shape[1] == 1:
            continue
        group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout, backend=backend)
        if group is not None:
            GROUPS[name] = group
            axes[name] = Axis(dist.get_rank(group), ranks.shape[1], name)
    mesh = Mesh(**{name: axis for name, axis in axes.items() if name in Mesh._fields}, device=device)
    open_channels(mesh)
    return mesh


def meet(store, rank, world, timeout):
    """A name on which exactly the processes alive now agree. LostRank: none within `timeout` seconds.

    torchrun's store survives a restart: without a name of its own, a new process group would read the
    addresses of dead processes; and torchrun's agents disagree about how often they have restarted. Each
    process draws a random id, and four messages go through the store (A is rank 0's id, B rank 1's):

        rank 0   call = A                     rank 0 calls under its own id
        rank 1   A/1 = B                      the others answer to the call they read
        rank 0   A/confirmed = B              rank 0 has every answer, and says whose
        rank 1   reads B there: the name is A

    An answer may be that of a dead predecessor: a rank that does not find its own id among the confirmed
    ones waits for rank 0's next call."""
    me = uuid.uuid4().hex
    deadline = time.monotonic() + timeout

    # Rank 0 calls, waits for every answer, and confirms them.
    if rank == 0:
        store.set("call", me)
        answers = [store.get(f"{me}/{r}").decode() for r in range(1, world)]
        store.set(f"{me}/confirmed", ",".join(answers))
        return me

    # Answer, then wait for the confirmation or for another call.
    while time.monotonic() < deadline:
        call = store.get("call").decode()
        store.set(f"{call}/{rank}", me)
        while store.get("call").decode() == call and time.monotonic() < deadline:
            if store.check([f"{call}/confirmed"]):
                if me in store.get(f"{call}/confirmed").decode().split(","):
                    return call
            time.sleep(0.02)
    raise LostRank(f"rank {rank} was not called by rank 0 within {timeout:g} seconds")


def leave_mesh():
    """Leave in order, when every message has arrived. The communication threads have ended on return."""
    GROUPS.clear()
    abandon_mesh()


def abandon_mesh():
    """Leave after an error: messages that are still in flight are not waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


class LostRank(RuntimeError):
    """Another rank died, or did not answer within the timeout: no collective can be completed."""


@contextlib.contextmanager
def talking(mesh):
    """Put around communication, and nothing else: its failure becomes LostRank. gloo reports a lost rank as
    a bare RuntimeError, which any computation might raise too."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise LostRank(f"rank {mesh.world.rank} lost contact with another rank: {what}") from error


def barrier(mesh):
    """Wait until every rank is here."""
    if mesh.world.size > 1:
        with talking(mesh):
            dist.barrier(mesh.world.group)


def all_max(t, mesh):
    """Elementwise maximum over all ranks, in place."""
    if mesh.world.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.MAX, mesh.world.group)
    return t


def all_sum(t, mesh):
    """Elementwise sum over all ranks, in place."""
    if mesh.world.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.SUM, mesh.world.group)
    return t


def gather(thing, mesh):
    """A JSON value → the list of every rank's on rank 0, None elsewhere. JSON and not pickle: what comes
    over the network is data, never code."""
    if mesh.world.size == 1:
        return [thing]

    # All ranks pad their bytes with blanks to the longest.
    raw = torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)
    longest = int(all_max(torch.tensor([len(raw)], device=mesh.device), mesh).item())
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8, device=mesh.device)
    padded[:len(raw)] = raw

    # Only rank 0 receives; JSON ignores the trailing blanks.
    everyone = None
    if mesh.world.rank == 0:
        everyone = [torch.empty_like(padded) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.gather(padded, everyone, group=mesh.world.group, group_dst=0)
    if everyone is None:
        return None
    return [json.loads(t.cpu().numpy().tobytes()) for t in everyone]


COMPARED = 512                   # facts at most; a fixed size, so that ranks of another version can compare


def compare(facts, mesh, like=0):
    """Check that `facts` {what: text} equal those of rank `like`. Each rank may name another reference.

    ValueError, on all ranks: which rank differs from which, and in what. One collective, 8 bytes a fact."""
    if mesh.world.size == 1:
        return

    # A row: the rank to be compared with, then a hash of each fact. The first fact is the list of names.
    names = ["version", *facts]
    texts = [" ".join(names), *facts.values()]
    mine = torch.zeros(1 + COMPARED, dtype=torch.int64)
    mine[0] = like
    for i, text in enumerate(texts, 1):
        mine[i] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)

    # All rows to all ranks
    mine = mine.to(mesh.device)
    table = [torch.empty_like(mine) for _ in range(mesh.world.size)]
    with talking(mesh):
        dist.all_gather(table, mine, group=mesh.world.group)

    # Every rank finds the same differences.
    said = []
    table = torch.stack(table).tolist()
    for rank, (reference, *row) in enumerate(table):
        wanted = table[reference][1:]
        different = [name for name, a, b in zip(names, row, wanted) if a != b]
        if row[0] != wanted[0]:              # the lists of names differ, so no other column can be compared
            different = names[:1]
        if different:
            said.append(f"rank {rank} has another {', '.join(different)} than rank {reference}")
    if said:
        raise ValueError(f"{listed(said, 4)}: start all ranks with the same command, files and software")


def checksum(t):
    """sha256 of a tensor's bytes."""
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def compare_weights(tensors, mesh, tied=()):
    """`compare` for {name: weight}. All ranks of a stage hold the same weights, except for experts (3-D):
    those are equal on the ranks with the same place in their ep group. The weights named in `tied` are equal
    in the first and the last stage."""
    if mesh.world.size == 1:
        return

    # What, of these tensors, equals that of which rank
    stage = mesh.pp.rank * mesh.dp.size
    rows = [
        ("weights", [name for name, t in tensors.items() if t.ndim < 3], stage),
        ("experts", [name for name, t in tensors.items() if t.ndim == 3], stage + mesh.ep.rank),
    ]
    if mesh.pp.size > 1 and tied:
        first = 0 if mesh.ends.size > 1 else mesh.world.rank
        rows.append(("tied weights", [name for name in tied if mesh.ends.size > 1], first))
    for what, names, like in rows:
        digests = [f"{name} {checksum(tensors[name])}" for name in names]
        compare({what: " ".join(digests)}, mesh, like)


# ---- plans -------------------------------------------------------------------------------------------------
# The layers are cut into p·v chunks, v on each of p stages; chunk c lies on stage c % p. A plan is the list
# of what one stage does, in order; a schedule gives the plans of all stages. For p = 2 and 3 micro-batches:
#
#                      1F1B                    interleaved, v = 2 (a, b: first and second chunk of the stage)
#     stage 0   F0 F1 B0 F2 B1 B2       Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Bb1 Fb2 Ba0 Ba1 Bb2 Ba2
#     stage 1   F0 B0 F1 B1 F2 B2       Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Fa2 Ba0 Ba1 Fb2 Bb2 Ba2

class Act(NamedTuple):
    """One step of a plan.

    F  forward        B  backward; or only its gradients of activations and vectors, where a W follows
    W  the gradients of the matrices that B has left        R  send a chunk's gradients to their owners

    F and B may be cut into parts: each is then an act, and between two of them tokens travel to their experts
    or back (`exchanged_after`)."""
    op: str
    micro: int                   # index of the micro-batch
    chunk: int = 0               # index of the chunk of layers, over all stages
    left: int = 0                # how many parts follow; 0 completes an F or a B

    def __str__(self):
        more = f", {self.left} parts before its end" * (self.left > 0)
        return f"{self.op} of micro-batch {self.micro}, chunk {self.chunk}{more}"


def needs(act, parts):
    """The acts whose results an act needs: the whole dependency graph. parts: of every chunk of the model, in
    how many parts it is run.

    Two kinds of messages are among them. What comes from another chunk: activations for an F, gradients for a
    B. And what comes from the part before, in which tokens were sent: an exchange."""
    op, micro, chunk, left = act
    if op == "W":
        return [Act("B", micro, chunk)]
    if op == "R":
        return [Act("W", micro, chunk)]
    if left < parts[chunk] - 1:
        return [act._replace(left=left + 1)]                       # an exchange

    # The first part, or the whole act
    found = []
    if op == "F" and chunk > 0:
        found.append(Act("F", micro, chunk - 1))
    if op == "B":
        found.append(Act("F", micro, chunk))
        if chunk < len(parts) - 1:
            found.append(Act("B", micro, chunk + 1))
    return found


def parts_of(plans, chunks=0):
    """The number of parts of each chunk in these plans: a list of at least `chunks` entries, 1 for a chunk in
    none of them."""
    acts = [act for plan in plans for act in plan]
    parts = [1] * max(chunks, 1 + max(act.chunk for act in acts))
    for act in acts:
        parts[act.chunk] = max(parts[act.chunk], 1 + act.left)
    return parts


def alternate(forwards, backwards, warm_up):
    """`warm_up` forwards, one forward and one backward in turn, the backwards that are left: a list of ticks,
    tuples of one act or two."""
    pairs = list(zip(forwards[warm_up:], backwards))
    return [(act,) for act in forwards[:warm_up]] + pairs + [(act,) for act in backwards[len(pairs):]]


def flat(ticks):
    """The acts of some ticks, in order."""
    return [act for tick in ticks for act in tick]


def in_groups(stage, p, m, v):
    """The forwards and the backwards of a stage, in order: micro-batches in groups of p, and all chunks of a
    group, from the first to the last or back, before the next group."""
    forwards = []
    backwards = []
    for start in range(0, m, p):
        for k in range(v):
            for micro in range(start, min(start + p, m)):
                forwards.append(Act("F", micro, k * p + stage))
                backwards.append(Act("B", micro, (v - 1 - k) * p + stage))
    return forwards, backwards


def gpipe(p, m, v=1):
    """All forwards, then all backwards.   [1811.06965]"""
    return [flat(alternate(*in_groups(stage, p, m, v), m * v)) for stage in range(p)]


def one_f_one_b(p, m, v=1):
    """1F1B, with one chunk a stage: a backward as soon as there is one, so that stage r holds the
    activations of p - r micro-batches at most.   [2104.04473 §2.2]"""
    return [flat(alternate(*in_groups(stage, p, m, 1), p - 1 - stage)) for stage in range(p)]


def interleaved(p, m, v=1, warm=0):
    """Interleaved 1F1B: v chunks a stage make the bubble v times shorter.   [2104.04473 §2.2]"""
    return [flat(ticks) for ticks in interleaved_ticks(p, m, v, warm)]


def interleaved_ticks(p, m, v, warm):
    """The plans of `interleaved` as lists of ticks.

    warm: forwards added to the warm-up of 2(p-1-stage) + (v-1)p. With one more, forward and backward of
    a tick are of different micro-batches, and one can hide the messages of the other.   [Kimi K2 §2.4.2]
    If p does not divide m, the first group is incomplete: it is planned whole, and the micro-batches that
    it lacks are left out. Leaving out whole micro-batches cannot make a plan deadlock; interleaving an
    incomplete group as it is can."""
    missing = -m % p
    stages = []
    for stage in range(p):
        # The ticks of whole groups, and what they lack left out
        warm_up = 2 * (p - 1 - stage) + (v - 1) * p + warm
        ticks = alternate(*in_groups(stage, p, missing + m, v), warm_up)
        stages.append([[act._replace(micro=act.micro - missing) for act in tick if act.micro >= missing]
                       for tick in ticks])
    return stages


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved}


def split_backwards(plans):
    """Split every B of these plans into a shorter B, which the stages before it wait for, and a W.

    A W is placed where its stage would wait at least as long as it takes; and before a forward that would
    leave more micro-batches without their W than there are at most in the plans without it, on any stage:
    so that the peak stays as it is. Forward, B and W are taken to last equally long. After the last W of
    a chunk comes its R.   [2401.10241 §2.2]"""
    # What the plans have in common
    parts = parts_of(plans)
    bound = max(map(peak, plans))
    last = max(act.micro for act in plans[0])

    # Of every stage
    split = [[] for _ in plans]
    left = [[] for _ in plans]                     # the Ws that are still to be placed
    live = [0] * len(plans)                        # forwards without their W
    free = [0] * len(plans)                        # when the stage has finished what it began
    at = [0] * len(plans)                          # the next act of its plan
    finish = {}

    def place(stage, act, start=0):
        # Its R follows the last W of a chunk at once.
        split[stage].append(act)
        live[stage] += (act.op == "F") - (act.op == "W")
        free[stage] = finish[act] = max(start, free[stage]) + 1
        if act.op == "W" and act.micro == last:
            split[stage].append(act._replace(op="R"))

    # Let every stage go on as far as it can, as in `simulate`.
    going = True
    while going:
        going = False
        for stage, plan in enumerate(plans):
            while at[stage] < len(plan):
                act = plan[at[stage]]
                ready = [finish.get(need) for need in needs(act, parts)]
                if None in ready:
                    break
                start = max([free[stage], *ready])
                # Is there time, or need, for a W first?
                full = act.op == "F" and live[stage] == bound
                if left[stage] and (full or start > free[stage]):
                    place(stage, left[stage].pop(0))
                    continue
                place(stage, act, start)
                if act.op == "B":
                    left[stage].append(act._replace(op="W"))
                at[stage] += 1
                going = True

    # What is left comes last.
    for stage, acts in enumerate(left):
        for act in acts:
            place(stage, act)
    return split


def exchanged_after(act):
    """What is exchanged between a part and the one after it: "counts", how many tokens will travel;
    "dispatch", the tokens, or in the backward their gradients; "combine", the experts' outputs; or None."""
    kinds = dict(F=("counts", "dispatch", "combine"), B=("combine", "dispatch", None))
    return kinds[act.op][-act.left % 3] if act.left else None


def in_parts(act, parts):
    """The parts of an F or a B, in order; a W or an R is not cut."""
    if act.op not in "FB":
        return [act]
    return [act._replace(left=left) for left in reversed(range(parts[act.chunk]))]


def legs(act, parts):
    """The parts of an act, grouped between transfers of tokens. Counts end no group: they are too short to be
    worth hiding."""
    found = [[]]
    for part in in_parts(act, parts):
        found[-1].append(part)
        if exchanged_after(part) in ("dispatch", "combine"):
            found.append([])
    return found


def weave(plan, parts, ticks):
    """Cut the acts of a plan into parts. Those of the forward and the backward of a tick take turns, so that
    while the tokens of one travel, the other computes.   [Kimi K2 §2.4.2]

    ticks: of the plan before its backwards were split. A W that has come between the two goes first: it hides
    the message that the backward waits for. A forward F1 and a backward B0 of a layer with experts, woven:

        B0  sum                            experts            router, attention
        F1       attention, router, shared         experts                       sum of the experts"""
    partner = dict(tick for tick in ticks if len(tick) == 2)
    woven = []
    plan = collections.deque(plan)
    while plan:
        act = plan.popleft()
        if act not in partner:
            woven += in_parts(act, parts)
            continue
        while plan[0].op == "W":
            woven.append(plan.popleft())

        # Spread the legs of each act evenly over the tick, and merge them; on a tie the backward goes first
        places = []
        for some in legs(plan.popleft(), parts), legs(act, parts):
            places += [((k + 0.5) / len(some), leg) for k, leg in enumerate(some)]
        for _, leg in sorted(places, key=lambda place: place[0]):
            woven += leg
    return woven


def overlapped(p, m, v, parts, split=False):
    """Interleaved 1F1B with one more warm-up forward, in parts that are woven. It holds one micro-batch more
    than `interleaved`."""
    stages = interleaved_ticks(p, m, v, warm=1)
    plans = [flat(ticks) for ticks in stages]
    if split:
        plans = split_backwards(plans)
    return [weave(plan, parts, ticks) for plan, ticks in zip(plans, stages)]


def partition(costs, n, starts=None):
    """Cut a row of layers, and what follows them (the head), into n contiguous chunks → the range of each.

    costs: of every layer. starts: where a chunk may begin; anywhere by default. The cut minimises the cost
    of the most expensive chunk, which sets the pace; then the sum of squares. ValueError: fewer places to
    begin than chunks."""
    # Where chunks may begin and end; the cost of a..b is total[b] - total[a]
    bounds = [*(starts or range(len(costs))), len(costs)]
    if n >= len(bounds):
        raise ValueError(f"{n} chunks, but the layers can only be cut into {len(bounds) - 1}")
    total = [0, *itertools.accumulate(costs)]

    # Best cuts into 1, 2, ... n chunks, by where the last one stops: (most expensive, squares, stops)
    best = {0: (0, 0, ())}
    for _ in range(n):
        longer = {}
        for start, (most, squares, stops) in best.items():
            for stop in bounds[bounds.index(start) + 1:]:
                cost = total[stop] - total[start]
                cut = max(most, cost), squares + cost ** 2, (*stops, stop)
                longer[stop] = min(cut, longer.get(stop, cut))
        best = longer
    stops = best[len(costs)][2]
    return [range(start, stop) for start, stop in zip((0, *stops), stops)]


# ---- plans: time them, draw them ---------------------------------------------------------------------------

AHEAD = 2                        # a receive is posted this many whole forwards or backwards ahead


class Timeline(NamedTuple):
    """When the stages of a pipeline do what."""
    spans: list                  # of each stage: its [(act, start, finish)]
    exchanges: list              # of each stage: [(the part that began it, start, finish)]
    messages: list               # of each stage: [(the act that sent it, start, finish)] of those it receives
    total: float                 # from the first start to the last finish
    idle: float                  # share of the stages' time without an act: (p-1)/(m+p-1) for 1F1B
    idle_over_busy: float        # the reports' bubble, idle time over that of the acts: (p-1)/m for 1F1B
    waits: dict                  # share of the stages' time in which they wait for an "exchange" or "message"
    peaks: list                  # of each stage: the most forwards that wait for their backward


def simulate(plans, cost, message=0.0, exchange=lambda act: 0.0, ranks=1):
    """Time the plans of all stages → Timeline. In seconds: cost(act) for an act (none for R), `message` for a
    message, exchange(act) for the exchange that a part starts.

    An exchange starts when its part ends; but in the part with the shared expert the dispatch starts at the
    beginning, and its gradient is needed only at the end of that part's backward: the shared expert overlaps
    with both.

    Messages are those of `execute`: a transfer begins when the sender has the tensor, the receiver has
    posted the receive (see AHEAD), and the message before it on the same channel has arrived. A channel is
    a pair of stages and a kind, activations or gradients; it delivers in the order of sending. The exchanges
    of tokens of a stage follow one another; counts have a channel of their own.
    ranks: how many plans there are of each stage, in a row; its ranks exchange tokens with each other.
    ValueError: ranks of a stage begin exchanges in different orders; a message is received in another order
    than it is sent; or stages wait for each other, and who waits for whom."""
    check_exchanges(plans, ranks)
    plans = plans[::ranks]
    parts = parts_of(plans)
    stage_of = {act: stage for stage, plan in enumerate(plans) for act in plan}
    check_order(plans, stage_of, parts)

    ahead = [AHEAD * max(parts_of([plan])) if plan else 0 for plan in plans]
    free = [0.0] * len(plans)                      # when the stage has finished what it began
    spans, exchanges, messages = ([[] for _ in plans] for _ in range(3))
    finish = {}
    arrived = {}                                   # (stage, act): when its message or exchange arrived there
    last = {}                                      # channel, of messages or of exchanges: the last arrival
    waits = dict(exchange=0.0, message=0.0)

    def begin(stage, act):
        """When the act can begin, or None if what it needs is not known yet. If that is a dispatch's
        gradient: when it can begin so as to end with its arrival."""
        times = [free[stage]]
        for need in needs(act, parts):
            if need not in finish:
                return None
            if stage_of[need] != stage and (stage, need) not in arrived:
                # A message: its receive was posted when an earlier act ended
                at = len(spans[stage]) - ahead[stage] - 1
                posted = spans[stage][at][2] if at >= 0 else 0.0
                channel = stage_of[need], stage, need.op
                start = max(finish[need], posted, last.get(channel, 0.0))
                last[channel] = arrived[stage, need] = start + message
                messages[stage].append((need, start, last[channel]))
            here = arrived.get((stage, need), 0.0)
            if act.op == "B" and exchanged_after(need) == "dispatch":
                here -= cost(act)
            times.append(here)
        return max(times)

    # Let every stage go on as far as it can, until none can.
    going = True
    while going:
        going = False
        for stage, plan in enumerate(plans):
            while len(spans[stage]) < len(plan):
                act = plan[len(spans[stage])]
                start = begin(stage, act)
                if start is None:
                    break
                going = True

                # What it waited for, while that travelled
                wait = start - max([free[stage], *map(finish.get, needs(act, parts))])
                if wait > 0:
                    kind = "exchange" if act.left < parts[act.chunk] - 1 else "message"
                    waits[kind] += wait

                # The act, and the exchange that it begins
                took = 0.0 if act.op == "R" else cost(act)
                finish[act] = free[stage] = start + took
                spans[stage].append((act, start, finish[act]))
                kind = exchanged_after(act)
                if kind:
                    ready = start if act.op == "F" and kind == "dispatch" else finish[act]
                    channel = stage, kind == "counts"
                    begun = max(ready, last.get(channel, 0.0))
                    last[channel] = arrived[stage, act] = begun + exchange(act)
                    exchanges[stage].append((act, begun, last[channel]))

    # Who waits for whom
    waiting = []
    for stage, plan in enumerate(plans):
        if len(spans[stage]) < len(plan):
            act = plan[len(spans[stage])]
            need = next(need for need in needs(act, parts) if need not in finish)
            where = f"of stage {stage_of[need]}" if need in stage_of else "which is in no plan"
            waiting.append(f"stage {stage} with {act} for {need} {where}")
    if waiting:
        raise ValueError("the plans wait for each other: " + "; ".join(waiting))

    # The sums
    total = max(free)
    busy = sum(stop - start for of_stage in spans for _, start, stop in of_stage)
    idle = len(plans) * total - busy
    waits = {kind: wait / (idle + busy) for kind, wait in waits.items()}
    return Timeline(spans, exchanges, messages, total, idle / (idle + busy), idle / busy, waits,
                    [peak(plan) for plan in plans])


def check_exchanges(plans, ranks):
    """ValueError unless the ranks of each stage, whose plans follow each other, begin exchanges in one order:
    in an exchange each waits for all others."""
    for first in range(0, len(plans), ranks):
        order = [act for act in plans[first] if act.left]
        for rank in range(first, first + ranks):
            others = [act for act in plans[rank] if act.left]
            for ours, theirs in itertools.zip_longest(order, others):
                if ours != theirs:
                    raise ValueError(f"rank {first} begins the exchange after {ours}, where rank {rank} "
                                     f"begins that after {theirs}")


def check_order(plans, stage_of, parts):
    """ValueError unless every channel's messages are received in the order in which they are sent."""
    sent = {}
    received = {}
    consumers = {}

    # Received, in the order of the receiver's plan
    for stage, plan in enumerate(plans):
        for act in plan:
            for need in needs(act, parts):
                if stage_of.get(need, stage) != stage:
                    consumers[need] = stage
                    received.setdefault((stage_of[need], stage, need.op), []).append(need)

    # Sent, in the order of the sender's
    for stage, plan in enumerate(plans):
        for act in plan:
            if act in consumers:
                sent.setdefault((stage, consumers[act], act.op), []).append(act)

    # NCCL has no tags: both orders have to be one
    for (source, stage, _), acts in received.items():
        for ours, theirs in zip(acts, sent[source, stage, acts[0].op]):
            if ours != theirs:
                raise ValueError(f"stage {source} sends {theirs} where stage {stage} expects {ours}")


def peak(plan):
    """The most forwards of a plan that wait for their backward, or for their W if the backward is split."""
    ends = "W" if any(act.op == "W" for act in plan) else "B"
    begun = set()
    most = 0
    for act in plan:
        if act.op == "F":
            begun.add((act.micro, act.chunk))
        if act.op == ends and act.left == 0:
            begun.discard((act.micro, act.chunk))
        most = max(most, len(begun))
    return most


def draw(timeline, unit, columns=100):
    """A timeline as text, a row for each stage and a column for each `unit` seconds: digits are forwards
    (the last digit of the micro-batch), letters backwards (a = 0), capital letters the weights' gradients,
    dots idle time. Of a long timeline the first and the last `columns` columns.

    With exchanges, three rows for each stage: what it computes, exchanges (x), messages that arrive (m)."""
    width = max(1, round(timeline.total / unit))
    letters = dict(F="0123456789", B="abcdefghij", W="ABCDEFGHIJ", R="..........")

    def row(spans):
        drawn = ["."] * width
        for act, start, stop in spans:
            letter = letters[act.op][act.micro % 10]
            first, end = round(start / unit), round(stop / unit)
            drawn[first:end] = letter * (end - first)
        return "".join(drawn)

    # The rows of each stage
    rows = []
    for stage, spans in enumerate(timeline.spans):
        rows.append((stage, row(spans)))
        if any(timeline.exchanges):
            rows.append(("x", row(timeline.exchanges[stage])))
            rows.append(("m", row(timeline.messages[stage])))

    # Begin and end of a long one
    if width <= 2 * columns:
        parts = [(at, at + columns) for at in range(0, width, columns)]
    else:
        parts = [(0, columns), (width - columns, width)]
    lines = []
    for first, end in parts:
        lines.append(f"columns {first} to {min(end, width)} of {width}")
        lines += [f"{name:>4}  {drawn[first:end]}" for name, drawn in rows]
    return "\n".join(lines)


# ---- plans: run one ----------------------------------------------------------------------------------------
# A channel carries one kind of message from stage to stage in one direction, over a process group of its own,
# so that a receive posted early holds up nothing else. If a stage has several chunks, the last stage sends
# activations to the first, and the first gradients to the last: they go round the ring.

def channels(chunks):
    """The names of the channels with so many chunks a stage: "F" carries activations, "B" gradients."""
    names = ["F", "B"]
    if chunks > 1:
        names += ["F round", "B round"]
    return names


def open_channels(mesh):
    """Send one number over every channel, since NCCL connects at the first message: not in the first step."""
    p, rank = mesh.pp.size, mesh.pp.rank
    hello = torch.zeros(1, device=mesh.device)
    for name in filter(GROUPS.__contains__, channels(2)):
        step = 1 if name.startswith("F") else -1
        for source in range(p):
            target = (source + step) % p
            if name.endswith("round") == (target == source + step):
                continue
            with talking(mesh):
                if rank == source:
                    dist.send(hello, group=GROUPS[name], group_dst=target)
                if rank == target:
                    dist.recv(hello, group=GROUPS[name], group_src=source)


class Messages:
    """Tensors between the chunks of a plan: from stage to stage, or on one stage if there is only one.

    empty(micro) → an uninitialised boundary tensor of a micro-batch. keep: see `Meter.keep`."""

    def __init__(self, plan, parts, empty, mesh, keep):
        self.mesh = mesh
        self.empty = empty
        self.keep = keep
        self.posted = {}                           # message: (request, tensor, kept) of a receive
        self.sent = []                             # (request, tensor, kept) of sends that may not be done
        self.here = {}                             # message: (tensor, kept), with a single stage
        self.needed = {}                           # act: the message that it needs
        for act in plan:
            self.needed |= {act: need for need in needs(act, parts) if need.chunk != act.chunk}

    def group(self, message):
        """The process group of a message's channel. It goes round the ring to or from chunks 0, p, 2p, ..."""
        upper = message.chunk + (message.op == "F")
        return GROUPS[message.op + " round" * (upper % self.mesh.pp.size == 0)]

    def post(self, acts):
        """Post the receives of those acts that need a message."""
        for message in filter(None, map(self.needed.get, acts)):
            if self.mesh.pp.size > 1 and message not in self.posted:
                tensor = self.empty(message.micro)
                source = message.chunk % self.mesh.pp.size
                with talking(self.mesh):
                    request = dist.irecv(tensor, group=self.group(message), group_src=source)
                self.posted[message] = request, tensor, self.keep(tensor, "receives")

    def receive(self, act):
        """The message that an act needs, once it is here."""
        message = self.needed.pop(act)
        if self.mesh.pp.size == 1:
            return self.here.pop(message)[0]
        request, tensor, _ = self.posted.pop(message)
        with talking(self.mesh):
            request.wait()
        return tensor

    def send(self, act, tensor):
        """Send the result of an act to the chunk after it (F) or before it (B)."""
        if self.mesh.pp.size == 1:
            self.here[act] = tensor, self.keep(tensor, "sends")
            return

        # A tensor is kept until its send is done. gloo says so only in wait().
        self.sent = [sent for sent in self.sent if not sent[0].is_completed()]
        tensor = tensor.contiguous()
        step = 1 if act.op == "F" else -1
        target = (act.chunk + step) % self.mesh.pp.size
        with talking(self.mesh):
            request = dist.isend(tensor, group=self.group(act), group_dst=target)
        self.sent.append((request, tensor, self.keep(tensor, "sends")))

    def finish(self):
        """Wait until everything that was sent has been received."""
        for request, *_ in self.sent:
            with talking(self.mesh):
                request.wait()
        self.sent.clear()


class Passage:
    """A micro-batch on its way through a chunk: its forward, then its backward, part by part. The graph is
    cut where the chunk's generator yields, so that each part has a graph of its own; and in front of x, whose
    gradient is another chunk's. Gradients are the same to the bit as with the graph in one piece, but for a
    matrix that is used in two parts (a tied embedding): its sum has another order.

    x: tokens, or what the chunk before has sent. parts(x) → the chunk's generator."""

    def __init__(self, x, parts):
        self.windows = len(x)
        self.of_x = {}                             # 0: the gradient of x
        if x.requires_grad:
            x = cut(x, self.of_x, 0)
        self.generator = parts(x)
        self.entering = None                       # what the next part is given
        self.cuts = []                             # after each part: what it passed on, and its gradients

    def forward(self):
        """The next part → whether it was the last one. Then `y` and `balance` are here."""
        try:
            _, live = self.generator.send(self.entering)
        except StopIteration as end:
            self.y, self.balance = end.value
            self.generator = self.entering = None
            return True

        # Keep gradient edges and not the tensors, so that these can be freed.
        edges = []
        gradients = {}
        entering = list(live)
        for i, t in enumerate(live):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                edges.append((i, torch.autograd.graph.get_gradient_edge(t)))
                entering[i] = cut(t, gradients, i)
        self.entering = tuple(entering)
        self.cuts.append((edges, gradients))
        return False

    def backward(self, roots, gradients):
        """The backward of the last part, from the gradients of its roots."""
        if roots:
            torch.autograd.backward(roots, gradients)

    def backward_before(self):
        """The backward of the part before, from the gradients that the last backward has left."""
        edges, gradients = self.cuts.pop()
        found = [(edge, gradients[i]) for i, edge in edges if i in gradients]
        self.backward(*zip(*found) if found else ((), ()))


def cut(t, gradients, i):
    """t without its graph; its gradient will be put into gradients[i]. The anchor makes it require one."""
    return Cut.apply(t.detach(), torch.empty(0, requires_grad=True), gradients, i)


class Cut(torch.autograd.Function):
    """The identity at the beginning of a part: puts the gradient into gradients[i], for the part before."""

    @staticmethod
    def forward(ctx, x, anchor, gradients, i):
        ctx.gradients = gradients
        ctx.i = i
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.gradients[ctx.i] = g
        return None, None, None, None


def execute(plan, chunks, batch, micro, mesh, dtype=None, savings=None, reduce=None, meter=None, nats=None):
    """Run this stage's plan on this rank's windows: the gradients of the loss, accumulated over
    micro-batches in p.grad, or in the buckets of ZeRO-1. The loss is the mean over windows, or the sum of
    weight × term if the batch has weights. Without gradients (torch.no_grad), the plan has forwards only.

    chunks {index: chunk}: this stage's ranges of layers, with
        chunk.body(x, doc_start, dtype=dtype) → (y, balance loss); chunk 0 gets tokens, the others the y
                                                 (b, T, chunk.width) of the chunk before
        chunk.parts(x, doc_start, dtype=dtype)   the same as a generator, if the plan runs the chunk in parts
        chunk.loss(h, targets, weight) → (loss, its terms (N,)), in the last one
        chunk.count(on)                          whether forwards record what they see: not what is recomputed
    savings: the Savings whose operations the chunks use, if any. reduce(chunk): what R does.
    meter: a Meter of what is kept for the backward, if that is to be measured.
    nats (b, T): gets those of each token, if given, where the loss is.
    → nats/token of each window (b,), in float64 on the mesh's device; zeros if the loss is on another stage.
    LostRank names the act."""
    share, T = batch.x.shape[:2]
    losses = torch.zeros(share, dtype=torch.float64, device=mesh.device)
    first = next(iter(chunks.values()))
    total = mesh.pp.size * len(chunks)
    last = total - 1
    parts = parts_of([plan], total)
    live = {}                                      # (micro, chunk): its Passage, from forward to backward
    savings = savings or Savings()
    savings.begin(plan, chunks.values(), mesh.device, meter)
    keep = savings.keep
    split = any(act.op == "W" for act in plan)

    def windows(micro_batch, tensor):
        """The micro-batch's part of a tensor of the batch, on the device."""
        if tensor is None:
            return None
        return tensor[micro_batch * micro:(micro_batch + 1) * micro].to(mesh.device)

    def empty(micro_batch):
        b = len(batch.x[micro_batch * micro:(micro_batch + 1) * micro])
        boundary = dtype or next(first.parameters()).dtype
        return torch.empty(b, T, first.width, dtype=boundary, device=mesh.device)

    def loss_of(i, h):
        """The loss of micro-batch i, whose terms are recorded."""
        loss, terms = chunks[last].loss(h, windows(i, batch.y), windows(i, batch.weight))
        terms = terms.detach().double().view(len(h), -1)
        losses[i * micro:(i + 1) * micro] = terms.mean(1)
        if nats is not None:
            nats[i * micro:(i + 1) * micro] = terms
        return loss

    def passage(act):
        """The micro-batch at the beginning of its way through the chunk."""
        if act.chunk == 0:
            x = windows(act.micro, batch.x)
        else:
            x = messages.receive(act).requires_grad_(torch.is_grad_enabled())
        chunk = chunks[act.chunk]
        body = chunk.parts if parts[act.chunk] > 1 else functools.partial(in_one, chunk.body)
        return Passage(x, functools.partial(body, doc_start=windows(act.micro, batch.doc_start), dtype=dtype))

    def forward(act):
        at = act.micro, act.chunk
        if at not in live:
            live[at] = passage(act)
        run = live[at]
        with savings.watch():
            ended = run.forward()
        if not ended:
            return

        # The loss is left to the backward, so that no micro-batch in flight holds its logits' gradient.
        y = run.y
        if act.chunk == last:
            if not torch.is_grad_enabled():
                loss_of(act.micro, y)
            run.kept = keep(y, "boundaries")
        else:
            messages.send(act, y.detach())
            run.y = None
            if y.requires_grad:                                    # unless chunk 0 is frozen
                run.y = torch.autograd.graph.get_gradient_edge(y)  # without y itself, which is free once sent
        if not torch.is_grad_enabled():
            del live[at]

    def backward(act):
        run = live[act.micro, act.chunk]
        if act.left == parts[act.chunk] - 1:
            begin_backward(act, run)
        else:
            run.backward_before()
        if act.left == 0:
            del live[act.micro, act.chunk]
            if act.chunk > 0:
                messages.send(act, run.of_x.pop(0))

    def begin_backward(act, run):
        # Roots of the backward and their gradients. A balance loss is always a mean over windows.
        of_all = run.windows / share
        if act.chunk == last:
            with savings.watch():
                loss = loss_of(act.micro, run.y)
            if batch.weight is None:
                roots = [(loss + run.balance) * of_all]
            else:
                roots = [loss + run.balance * of_all]
            gradients = [None]
        else:
            roots = []
            gradients = []
            received = messages.receive(act)
            run.kept = keep(received, "boundaries")
            if run.y is not None:
                roots.append(run.y)
                gradients.append(received)
            if isinstance(run.balance, torch.Tensor) and run.balance.requires_grad:
                roots.append(run.balance * of_all)
                gradients.append(None)
        run.y = run.balance = None
        run.backward(roots, gradients)

    # Receives are posted ahead of the acts that need them.
    messages = Messages(plan, parts, empty, mesh, keep)
    ahead = AHEAD * max(parts)
    for i, act in enumerate(plan):
        at = act.micro, act.chunk
        try:
            messages.post(plan[i:i + ahead + 1])
            savings.enter(i, act)
            if act.op == "F":
                forward(act)
            if act.op == "B":
                with savings.unrecorded(chunks[act.chunk]):
                    backward(act)
            if act.op == "W" or act.op == "B" and act.left == 0 and not split:
                savings.compute(at)
            if act.op == "R":
                reduce(act.chunk)
            savings.leave(i)
        except LostRank as error:
            raise LostRank(f"{error} ({act})") from error
    messages.finish()
    return losses


def in_one(body, *arguments, **options):
    """A generator of a single part."""
    yield from ()
    return body(*arguments, **options)


# ---- the split backward ------------------------------------------------------------------------------------
# Other stages wait for the gradient of a matmul's input, but nobody waits for that of its weights. So B
# computes only the first, and leaves the second to W.                           [2401.10241; Kimi K2 §2.4.2]

class SavedLinear(torch.autograd.Function):
    """h·wᵀ for each w, as kernels.linears. Savings keep h, and weights are kept as they are, not in the dtype
    of h. With a split backward, h and the gradients of the results are left for W."""

    @staticmethod
    def forward(ctx, savings, fp8, ends, h, *weights):
        ctx.savings = savings
        ctx.at = savings.at
        ctx.ends = ends
        ctx.weights = weights                      # themselves: through hooks, autograd returns aliases
        if any(ctx.needs_input_grad[4:]):
            ctx.h = Tiles(savings, h) if fp8 else savings.pack(h.detach())
        return linears(h, weights, ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        weights = ctx.weights

        # By h. The sum begins with the last, as autograd's does.
        dh = None
        if ctx.needs_input_grad[3]:
            for w, g in reversed(list(zip(weights, gradients))):
                part = g @ w.to(g.dtype) if ctx.ends is None else GroupedLinear.by_input(g, w, ctx.ends)
                dh = part if dh is None else dh + part

        # By the weights: in W, or now
        dw = [None for _ in weights]
        if any(ctx.needs_input_grad[4:]):
            kept, ctx.h = ctx.h, None
            if ctx.savings.split:
                ctx.savings.leave_to_w(ctx.at, weights, kept, gradients, ctx.ends)
            else:
                h = opened(kept)
                dw = [weight_gradient(w, g, h, ctx.ends) if w.requires_grad else None
                      for w, g in zip(weights, gradients)]
        return None, None, None, dh, *dw


def weight_gradient(w, g, h, ends):
    """gᵀ·h over all rows, or over those of each expert, in the dtype of w."""
    if ends is None:
        return (g.flatten(0, -2).mT @ h.flatten(0, -2)).to(w.dtype)
    return GroupedLinear.by_weight(g, h, w, ends).to(w.dtype)


# ---- activations that fit ----------------------------------------------------------------------------------
# Three ways to occupy less memory between a forward and its backward.                      [Kimi K2 §2.4.3]
#
#   recompute   a result that is cheap to make is not stored: whoever saves it for the backward gets a recipe
#   fp8         E4M3 with a scale for every 128 values: 1 + 4/128 bytes a value. Nothing is computed in FP8
#   offload     what is stored waits in the memory of the host (`Host`)
#
# They compose: what is recomputed is not stored, its inputs may be stored in FP8, and whatever is stored may
# go to the host.

class Savings:
    """The operations `linear`, `attention` and `recompute` of a model (model.Ops), and the hooks under which
    its forwards run. One object serves all chunks of a rank.

    recomputed: norm, whatever is in front of a matmul but not of a down-projection: norms, heads side by
                side, a router's float32 copy. Not the last norm, nor those of queries and keys
                act, what is in front of a down-projection: activation × up
                mla, queries, keys and values of latent attention from its latents; on a CPU, where torch's
                kernel may keep T×T maps, all of its attention
    fp8:        expert_up, the rows that experts are sent
                act, the inputs of activations, which are then recomputed
    offload:    copy what is kept to the host
    split:      leave the gradients of weights to W. Norm and act are then recomputed in any case"""

    def __init__(self, split=False, recomputed=(), fp8=(), offload=False):
        self.split = split
        self.recomputed = {*recomputed, *({"act"} & {*fp8}), *(("norm", "act") if split else ())}
        self.fp8 = {*fp8}
        self.host = Host() if offload else None
        self.at = None                             # (micro-batch, chunk) of the act that runs
        self.making = False                        # while something is made again
        self.queue = {}                       # (micro-batch, chunk): [(weights, h, gradients, ends, kept)]
        self.made = {}              # storage: (weak reference, Recipe, number of the result, where it begins)
        self.exempt = set()                        # storages that stay as they are: parameters and buffers
        self.meter = None

    def begin(self, plan, chunks, device, meter=None):
        """Before a plan is run."""
        self.meter = meter
        self.making = False                        # the plan before may have failed half-way
        self.queue.clear()
        self.made.clear()
        self.exempt = {t.untyped_storage()._cdata for chunk in chunks
                       for t in (*chunk.parameters(), *chunk.buffers())}
        if self.host:
            self.host.begin(plan, device, self.keep)

    def enter(self, i, act):
        """Before act number i."""
        self.at = act.micro, act.chunk
        if self.host:
            self.host.enter(i, act)

    def leave(self, i):
        """After act number i."""
        if self.host:
            self.host.leave(i)

    @contextlib.contextmanager
    def unrecorded(self, chunk):
        """The context of a backward: attention that runs again does not record its logits again."""
        again = "mla" in self.recomputed
        if again:
            chunk.count(False)
        try:
            yield
        finally:
            if again:
                chunk.count(True)

    # What is kept

    def watch(self):
        """The context of a forward: autograd stores what `pack` makes of the tensors that it saves."""
        self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
        if self.meter or self.host or self.recomputed:
            return torch.autograd.graph.saved_tensors_hooks(self.pack, opened)
        return contextlib.nullcontext()

    def pack(self, t):
        """What is kept of a tensor until the backward; `opened` makes the tensor of it. The hooks see aliases
        of what the model has, so a tensor is known by its storage."""
        storage = t.untyped_storage()
        if storage._cdata in self.exempt:
            return t
        if storage._cdata in self.made:
            _, reference, number, start = self.made[storage._cdata]
            recipe = reference()
            if recipe:
                return Result(recipe, number, t, start)
        if self.host and self.host.takes(storage):
            return self.host.put(t, self.meter and self.meter.name)
        if self.meter:
            return self.keep(t, self.meter.name)
        return t

    def keep(self, tensor, name):
        """Count a tensor under a name, if there is a meter, until the object that is returned is freed."""
        return Kept(tensor, self.meter, name) if self.meter else None

    # Operations of a model

    def linear(self, name, weights, pre, params, *x, ends=None):
        """As model.linear."""
        fp8 = name in self.fp8                     # expert_up: the rows themselves are the matmul's input
        kind = "act" if name.endswith("down") else "norm"
        h = pre(*x) if fp8 else self.recompute(kind, pre, params, *x)
        if not torch.is_grad_enabled():
            return linears(h, weights, ends)
        return SavedLinear.apply(self, fp8, ends, h, *weights)

    def attention(self, attend, make, params, *latents):
        """As model.attention. On a GPU the kernel keeps its result and its normalisers, and does not run
        again."""
        if runs_attention_again(latents[0]):
            return self.recompute("mla", lambda *latents: attend(*make(*latents)), params, *latents)
        return attend(*self.recompute("mla", make, params, *latents))

    def recompute(self, kind, f, params, *x):
        """f(*x), which is not stored if `kind` is recomputed."""
        if kind not in self.recomputed or self.making or not torch.is_grad_enabled():
            return f(*x)
        recipe = Recipe(self, f, params, x, kind in self.fp8)
        results = Again.apply(recipe, *x, *params)

        # From now on, whoever saves a result gets the recipe. A view of x needs none.
        known = {t.untyped_storage()._cdata for t in x}
        for number, t in enumerate(results if isinstance(results, tuple) else (results,)):
            storage = t.untyped_storage()
            if storage._cdata not in known:
                entry = StorageWeakRef(storage), weakref.ref(recipe), number, t.storage_offset()
                self.made[storage._cdata] = entry
        return results

    # The gradients that B leaves to W. They are kept by (micro-batch, chunk) and not by thread: autograd runs
    # a GPU's backward on another one.

    def leave_to_w(self, at, weights, h, gradients, ends):
        kept = [self.keep(g, "queued") for g in gradients]
        self.queue.setdefault(at, []).append((weights, h, gradients, ends, kept))

    def compute(self, at):
        """Add the gradients of one micro-batch and chunk to those of the weights, as autograd would: into
        p.grad, or with the hooks of ZeRO-1."""
        for weights, kept, gradients, ends, _ in self.queue.pop(at, ()):
            h = opened(kept)
            for w, g in zip(weights, gradients):
                if w.requires_grad:
                    # Through a view, autograd adds it up and calls the hooks
                    torch.autograd.backward(w.view_as(w), weight_gradient(w, g, h, ends))


def runs_attention_again(x):
    """Whether recomputing `mla` covers all of attention: on a CPU, whose kernel may keep T×T maps."""
    return x.device.type == "cpu"


def opened(kept):
    """The tensor of what `Savings.pack` has made of it."""
    return kept if isinstance(kept, torch.Tensor) else kept.open()


class Tiles:
    """A tensor in FP8."""

    def __init__(self, savings, t):
        self.dtype = t.dtype
        self.codes, self.scale = (savings.pack(part) for part in fp8_pack(t.detach()))

    def open(self):
        return fp8_unpack(opened(self.codes), opened(self.scale), self.dtype)


class Recipe:
    """How to make the results of f(*x) again, which is done at most once: for the matmul or attention whose
    backward needs the results, then for the derivative of f."""

    def __init__(self, savings, f, params, x, fp8):
        self.savings = savings
        self.f = f
        self.params = params
        self.needs_gradient = [t.requires_grad for t in x]
        self.results = None                        # with their graph; after the backward without it

        # A column, as the routing weights are, is no row of tiles.
        self.x = [Tiles(savings, t) if fp8 and t.shape[-1] > 1 else savings.pack(t.detach()) for t in x]

    def make(self):
        """→ the results, a tuple"""
        if self.results is None:
            self.inputs = [opened(kept).detach().requires_grad_(needed)
                           for kept, needed in zip(self.x, self.needs_gradient)]
            self.savings.making = True
            try:
                with torch.enable_grad(), self.savings.watch():
                    results = self.f(*self.inputs)
            finally:
                self.savings.making = False
            self.results = results if isinstance(results, tuple) else (results,)
            self.kept = [self.savings.keep(t, "made again") for t in self.results]
        return self.results

    def backward(self, gradients):
        """The gradients of the results → those of x and the parameters. Afterwards only W may need the
        results."""
        results = self.make()
        some = [number for number, t in enumerate(results) if t.requires_grad]
        wanted = [t for t in (*self.inputs, *self.params) if t.requires_grad]
        found = {}
        if some:
            found = torch.autograd.grad([results[i] for i in some], wanted, [gradients[i] for i in some],
                                        allow_unused=True)
            found = dict(zip(wanted, found))
        found = [found.get(t) for t in (*self.inputs, *self.params)]
        self.results = tuple(t.detach() for t in results)
        self.x = self.inputs = None
        return found


class Result:
    """A tensor in the storage of a Recipe's result, which begins there at `start`."""

    def __init__(self, recipe, number, t, start):
        self.recipe = recipe
        self.number = number
        self.shape = t.shape
        self.stride = t.stride()
        self.offset = t.storage_offset() - start

    def open(self):
        result = self.recipe.make()[self.number].detach()
        return result.as_strided(self.shape, self.stride, result.storage_offset() + self.offset)


class Again(torch.autograd.Function):
    """f(*x) by a Recipe, whose derivative is that of the results made again. (A hook on a parameter of f is
    called twice: by the backward of f alone, and by the whole.)"""

    @staticmethod
    def forward(ctx, recipe, *tensors):
        ctx.recipe = recipe
        return recipe.f(*tensors[:len(recipe.x)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        recipe, ctx.recipe = ctx.recipe, None
        return None, *recipe.backward(gradients)


# ---- activations that fit: in the memory of the host -------------------------------------------------------
# While a micro-batch waits for its backward, others compute. What its forward has saved is copied out during
# the next act, and back during the last act before its backward:
#
#     act       i               i + 1           ...             j − 1           j
#               forward         copy out        in the host     copy back       backward
#
# A forward whose backward follows sooner keeps everything on the device, as on the last stages of 1F1B.

class Absence(NamedTuple):
    """When the activations of a micro-batch in a chunk are away, as indexes of a plan's acts."""
    out: int                     # they are copied out after this act
    freed: int                   # their memory on the device is free after this one
    back: int                    # they are copied back from the beginning of this one on
    needed: int                  # the backward begins with this one


def absences(plan):
    """{(micro-batch, chunk): Absence} of those whose memory is free during one act at least. If acts are
    parts, a copy has as many acts as a chunk has parts."""
    time = max(parts_of([plan])) if plan else 1
    forward = {}
    found = {}
    for i, act in enumerate(plan):
        at = act.micro, act.chunk
        if act.op == "F":
            forward[at] = i
        if act.op == "B" and at in forward:
            out = forward.pop(at)
            absence = Absence(out, out + time, i - time, i)
            if absence.freed + 1 < absence.back:
                found[at] = absence
    return found


class Host:
    """Memory of the host for what forwards save: storages as a whole, known by their identity.

    On a GPU a copy runs on a stream of its own, and events order it in both directions: it begins when the
    computation that fills its source, or still reads the memory of its target, is done; and the computation
    waits for its end before it reads the target, or reuses the memory of the source. The host's memory is
    pinned, taken once in blocks, and reused. On a CPU the same code copies within its memory."""

    SMALLEST = 1 << 16           # bytes; what is smaller stays, since a copy takes about 10 µs        [ours]
    BLOCK = 1 << 25              # bytes; a power of two, since torch rounds pinned memory up to one   [ours]

    def __init__(self):
        self.free = []                             # blocks
        self.out = self.back = None                # streams

    def begin(self, plan, device, keep):
        """Before a plan is run. keep: Savings.keep."""
        self.device = device
        self.keep = keep
        self.loading = None                        # the Cargo of the forward that runs
        if device.type == "cuda" and not self.out:
            self.out = torch.cuda.Stream(device)
            self.back = torch.cuda.Stream(device)

        # What is done before and after which act
        self.cargoes = {}
        self.before = collections.defaultdict(list)
        self.after = collections.defaultdict(list)
        for at, absence in absences(plan).items():
            cargo = self.cargoes[at] = Cargo()
            self.after[absence.out].append((self.send, cargo))
            self.after[absence.freed].append((self.release, cargo))
            self.before[absence.back].append((self.fetch, cargo))
            self.before[absence.needed].append((self.wait, cargo))

    def takes(self, storage):
        """Whether a storage that is saved now will leave."""
        return self.loading is not None and storage.nbytes() >= self.SMALLEST

    def put(self, t, name):
        """Take a tensor on → what is kept of it."""
        storage = t.untyped_storage()
        boxes = self.loading.boxes
        if storage._cdata not in boxes:
            data = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
            boxes[storage._cdata] = Box(name, data, self.keep(data, name))
        return Boxed(boxes[storage._cdata], t)

    def enter(self, i, act):
        """Before act number i."""
        self.loading = self.cargoes.get((act.micro, act.chunk)) if act.op == "F" else None
        for do, cargo in self.before[i]:
            do(cargo)

    def leave(self, i):
        """After act number i."""
        self.loading = None
        for do, cargo in self.after[i]:
            do(cargo)

    def send(self, cargo):
        """Begin to copy out: into as many blocks as it takes, one storage behind the other."""
        boxes = cargo.boxes.values()
        pairs = []
        room = 0
        for box in boxes:
            for data in self.pieces(box.data, room):
                if room == 0:
                    cargo.blocks.append(self.free.pop() if self.free else Block(self.new_block()))
                    room = self.BLOCK
                start = self.BLOCK - room
                place = cargo.blocks[-1].memory[start:start + len(data)]
                room -= len(data)
                box.places.append(place)
                pairs.append((place, data))
        cargo.copied = self.copy(self.out, pairs, [block.busy for block in cargo.blocks])

        # The memory on the device is held until `release`.
        cargo.leaving = [(box.data, box.kept) for box in boxes]
        for box in boxes:
            box.data = box.kept = None

    def pieces(self, data, room):
        """The bytes of a storage in pieces: the first fills `room` bytes, the others a block each."""
        first = min(room, len(data))
        return [piece for piece in (data[:first], *data[first:].split(self.BLOCK)) if len(piece)]

    def new_block(self):
        return torch.empty(self.BLOCK, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def fetch(self, cargo):
        """Begin to copy back."""
        pairs = []
        for box in cargo.boxes.values():
            sizes = [len(place) for place in box.places]
            box.data = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            box.kept = self.keep(box.data, box.name)
            pairs += zip(box.data.split(sizes), box.places)
            box.places = []
        cargo.copied = self.copy(self.back, pairs, [cargo.copied])

        # The blocks may be written again as soon as they are read.
        for block in cargo.blocks:
            block.busy = cargo.copied
        self.free += cargo.blocks
        cargo.boxes = {}
        cargo.blocks = []

    def copy(self, stream, pairs, after):
        """Copy (target, source) pairs, after the events `after` → the event of their end. On a CPU None."""
        if stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None

        # What the computation has queued so far. Asked in the stream's context, this would be the stream's.
        queued = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(stream):
            for event in {queued, *after} - {None}:
                stream.wait_event(event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return stream.record_event()

    def wait(self, cargo):
        """Let the computation wait for the last copy; the host itself does not wait."""
        if cargo.copied:
            torch.cuda.current_stream(self.device).wait_event(cargo.copied)

    def release(self, cargo):
        """Free the memory on the device, once it is copied."""
        self.wait(cargo)
        cargo.leaving = ()


def blocks_of(size):
    """The bytes of the host's memory that so many bytes of activations take."""
    return -(-size // Host.BLOCK) * Host.BLOCK


@dataclass(eq=False)
class Block:
    """Memory of the host."""
    memory: torch.Tensor             # bytes
    busy: object = None              # until this event, or None


@dataclass(eq=False)
class Box:
    """A storage that leaves and comes back."""
    name: str                        # that a Meter counts it under
    data: torch.Tensor = None        # its bytes on the device; None while it is away
    kept: object = None              # what a Meter counts of them
    places: list = field(default_factory=list)     # its bytes on the host, in pieces


@dataclass(eq=False)
class Cargo:
    """What the forward of a micro-batch in a chunk has saved."""
    boxes: dict = field(default_factory=dict)      # storage: Box
    blocks: list = field(default_factory=list)     # of the host's memory
    leaving: list = ()                             # memory on the device that is copied out
    copied: object = None                          # the event at the end of its last copy


class Boxed:
    """A tensor in the storage of a Box."""

    def __init__(self, box, t):
        self.box = box
        self.dtype = t.dtype
        self.where = t.storage_offset(), t.shape, t.stride()

    def open(self):
        data = self.box.data
        return torch.empty(0, dtype=self.dtype, device=data.device).set_(data.untyped_storage(), *self.where)


# ---- what is kept, measured and predicted ------------------------------------------------------------------

class Kept:
    """A tensor that a Meter counts as long as this object lives."""

    def __init__(self, tensor, meter, name):
        self.tensor = tensor
        self.storage = tensor.untyped_storage()
        self.meter = meter
        meter.add(self.storage, name)

    def open(self):
        return self.tensor

    def __del__(self):
        self.meter.remove(self.storage)


class Meter:
    """Bytes on the device that are kept for the backward, by name: `now`, and at the `peak`. A storage counts
    once, under the name that kept it first, however many views of it are kept.

    The names: of a matmul, for what autograd saves in it; "other", for what it saves elsewhere; "boundaries"
    between chunks; "receives" that are posted; "sends" that may not be done; "made again" by a backward;
    "queued" for W."""

    def __init__(self):
        self.entries = {}                          # storage: [times kept, bytes, name]
        self.now = collections.Counter()
        self.peak = collections.Counter()
        self.name = "other"

    def add(self, storage, name):
        # A storage that is kept already counts no second time.
        entry = self.entries.setdefault(storage._cdata, [0, storage.nbytes(), name])
        entry[0] += 1
        if entry[0] == 1:
            self.now[name] += entry[1]
            if self.now.total() > self.peak.total():
                self.peak = self.now.copy()

    def remove(self, storage):
        entry = self.entries[storage._cdata]
        entry[0] -= 1
        if entry[0] == 0:
            self.now[entry[2]] -= entry[1]
            del self.entries[storage._cdata]

    def naming(self, linear):
        """The operation `linear`, whose name is that of what is saved in it."""
        def named(name, *args, **options):
            self.name = name
            try:
                return linear(name, *args, **options)
            finally:
                self.name = "other"
        return named


class Held(NamedTuple):
    """Bytes that a chunk keeps of one micro-batch."""
    forward: int                 # from its forward on
    more: int                    # in its backward, at most, in addition
    queued: int                  # from its backward until its W
    leaves: int                  # of `forward`: what may wait in the memory of the host
    shares: tuple = (1.0,)       # of `forward`: what each part of the chunk holds


def held_by(chunk, x, targets, savings, last, dtype=None, cut=False):
    """Forward and backward of a chunk alone, under a meter → Held. Its tensors need no storage.

    x: tokens, or what comes from the chunk before. savings: those of its operations. cut: run the chunk in
    parts."""
    # The forward
    meter = Meter()
    savings.begin([], [chunk], x.device, meter)
    body = chunk.parts if cut else functools.partial(in_one, chunk.body)
    if x.is_floating_point():
        x.requires_grad_()
    run = Passage(x, functools.partial(body, dtype=dtype))
    held = [0]
    ended = False
    while not ended:
        with savings.watch():
            ended = run.forward()
        held.append(meter.now.total())
    leaves = sum(size for _, size, _ in meter.entries.values() if size >= Host.SMALLEST)
    y, balance = run.y, run.balance
    del run.y, run.balance, x
    kept = []
    if last:
        kept.append(savings.keep(y, "boundaries"))
    forward = meter.now.total()
    shares = [b - a for a, b in itertools.pairwise(held)]
    shares = tuple(share / (held[-1] or 1) for share in shares)    # a head alone may save nothing

    # The backward, from the loss or from a gradient that another chunk has sent
    meter.peak = meter.now.copy()
    if last:
        with savings.watch():
            loss, _ = chunk.loss(y, targets)
        roots = [loss]
    else:
        kept.append(savings.keep(torch.empty_like(y), "boundaries"))
        roots = [y.sum()]
    if isinstance(balance, torch.Tensor):
        roots.append(balance)
    run.backward(roots, None)
    while run.cuts:
        run.backward_before()
    more = meter.peak.total() - forward
    kept.clear()
    roots.clear()
    queued = meter.now.total()
    savings.queue.clear()                          # while the meter is there to be told
    return Held(forward, more, queued, leaves, shares)


def predicted_peak(plan, held, boundary, mesh_size, sends_stay, offload=False):
    """The most bytes that a plan keeps for its backwards → (on the device, on the host). held(act) → Held;
    boundary(act) → bytes of a boundary tensor. sends_stay: with gloo, which says only at the end of a step
    that a send is done. offload: with Host."""
    chunks = mesh_size * len({act.chunk for act in plan})
    parts = parts_of([plan], chunks)
    ahead = AHEAD * max(parts)
    live = sent = most = host = most_host = 0

    # Bytes that come back from the host before an act, and have left for it after one
    back = collections.Counter()
    left = collections.Counter()
    on_host = collections.Counter()
    for absence in absences(plan).values() if offload else ():
        leaves = held(plan[absence.out]).leaves
        back[absence.back] += leaves
        left[absence.freed] += leaves
        on_host[absence.out] += blocks_of(leaves)
        on_host[absence.back] -= blocks_of(leaves)

    for i, act in enumerate(plan):
        live += back[i]
        host += on_host[i]
        most_host = max(most_host, host)

        # Receives that are posted; the act's own has become part of what is held.
        posted = 0
        if mesh_size > 1:
            for later in plan[i + 1:i + ahead + 1]:
                if any(need.chunk != later.chunk for need in needs(later, parts)):
                    posted += boundary(later)

        # A backward begins with the last part of the forward, and needs most room there: for the loss.
        one = held(act)
        if act.op == "F":
            live += one.forward * one.shares[-1 - act.left]
            most = max(most, live + sent + posted)
        if act.op == "B":
            more = one.more if act.left == parts[act.chunk] - 1 else 0
            most = max(most, live + more + sent + posted)
            live += (one.queued - one.forward) * one.shares[act.left]
        if act.op == "W":
            live -= one.queued

        live -= left[i]

        # What is sent, and stays with gloo
        ends = act.left == 0
        sends = ends and (act.op == "F" and act.chunk < chunks - 1 or act.op == "B" and act.chunk > 0)
        if sends and mesh_size > 1 and sends_stay:
            sent += boundary(act)
    return most, most_host


# ---- expert parallelism ------------------------------------------------------------------------------------

class Trip:
    """An all-to-all in flight: `sent[i]` rows go to rank i of ep, `received[i]` rows come from it.
    Gradients take the same way back.

    Depart starts it and Arrive waits for it. What is computed between the two overlaps with the transfer:
    the shared expert in the forward, its gradient in the backward; and whatever a woven plan has there. Of a
    graph that is cut between the two, Arrive is in the part after the cut."""

    def __init__(self, mesh, sent, received):
        self.mesh = mesh
        self.sent = sent
        self.received = received

    def start(self, x, sent, received):
        """x (sum(sent), ...) → a tensor (sum(received), ...) that `wait` will have filled."""
        out = x.new_empty(sum(received), *x.shape[1:])
        with talking(self.mesh):
            self.work = dist.all_to_all_single(out, x.contiguous(), received, sent, self.mesh.ep.group,
                                               async_op=True)
        return out

    def wait(self):
        work = self.work
        self.work = None                                           # a handle keeps both tensors alive
        with talking(self.mesh):
            work.wait()


class Depart(torch.autograd.Function):
    """Forward: start the transfer. Backward: wait for the gradient that Arrive has sent back."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        return trip.start(x, trip.sent, trip.received)             # not filled yet

    @staticmethod
    def backward(ctx, _):
        ctx.trip.wait()
        gradient = ctx.trip.gradient
        ctx.trip.gradient = None
        return gradient, None


class Arrive(torch.autograd.Function):
    """Forward: wait for the transfer. Backward: send the gradient back, without waiting."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        trip.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.trip.gradient = ctx.trip.start(g, ctx.trip.received, ctx.trip.sent)
        return g, None                                             # a placeholder: Depart has the real one


class Exchange:
    """The way of tokens to their experts and back, as model.Local, where the experts are divided over
    mesh.ep, in the order of its ranks. Nothing is padded; any count may be 0.

    Each of the first three steps begins a transfer, which the step after it waits for."""

    def __init__(self, mesh, counts):
        """counts (E,): how many tokens go from here to each expert."""
        self.mesh = mesh
        self.counts = counts
        self.received = torch.empty_like(counts)               # from each rank for each expert here: (n·E/n,)
        group = GROUPS.get("counts", mesh.ep.group)
        with talking(mesh):
            self.work = dist.all_to_all_single(self.received, counts, group=group, async_op=True)

    def dispatch(self, rows, weight):
        """Tokens (M, C) leave, sorted by expert, with their weights (M, 1) as a last column."""
        work = self.work
        self.work = None
        with talking(self.mesh):
            work.wait()

        # Rows to and from each rank. Here, and only here, the host has to wait for a GPU.
        both = torch.stack((self.counts, self.received))
        sent, got = both.view(2, self.mesh.ep.size, -1).sum(2).tolist()
        self.out = Trip(self.mesh, sent, got)
        self.back = Trip(self.mesh, got, sent)
        return Depart.apply(torch.cat((rows, weight), 1), self.out)

    def arrive(self, moving):
        """→ tokens (N, C) and weights (N, 1), sorted by expert, and the counts of the experts here (E/n,)."""
        # The order that turns rows sorted by source rank, then expert, into rows sorted by expert
        n = self.mesh.ep.size
        expert = torch.arange(len(self.counts) // n, device=moving.device).repeat(n)
        expert = expert.repeat_interleave(self.received, output_size=len(moving))
        self.order = expert.argsort(stable=True)
        rows = Arrive.apply(moving, self.out)[self.order]

        # Both are copies: a view of either would keep all of the rows for its backward.
        return rows[:, :-1].contiguous(), rows[:, -1:].clone(), self.received.view(n, -1).sum(0)

    def combine(self, rows):
        """The experts' outputs (N, C) leave, in the order in which their tokens arrived."""
        return Depart.apply(rows[self.order.argsort()], self.back)

    def home(self, moving):
        """→ the outputs (M, C), in the order in which the tokens left."""
        return Arrive.apply(moving, self.back)


# ---- ZeRO-1: who owns what ---------------------------------------------------------------------------------

class Piece(NamedTuple):
    """The unit of ownership, transfer and saving: rows start..stop of a parameter that has `rows` rows on
    all ranks together.

    A matrix is one piece, since its update needs the whole matrix, and so is each expert of a stack.
    Elementwise tensors (embeddings, vectors) may be cut between any two rows."""
    name: str
    start: int
    stop: int
    rows: int

    @property
    def key(self):
        if (self.start, self.stop) == (0, self.rows):
            return self.name
        return f"{self.name}[{self.start}:{self.stop}]"


def share_out(items, n):
    """[(piece, bytes, operations)] → the pieces of each of n owners.

    First the matrices, costliest first: each goes to the owner with the fewest operations so far, among
    those that it leaves at 1.1 times the mean of bytes or less. Then elementwise tensors (0 operations) are
    cut by rows to even out bytes. For two owners:

                          bytes   operations   owner 0      owner 1
        matrix a              8            4   a
        matrix b              8            3                b
        matrix c              8            2                c             (3 < 4 operations so far)
        embedding e[12]      12            0   e[0:10]      e[10:12]
                                         sum   18 bytes, 4  18 bytes, 5
    """
    # Matrices, by operations under the bound on bytes
    bound = 1.1 * sum(size for _, size, _ in items) / n
    own = [[] for _ in range(n)]
    size_of = [0.0] * n
    work_of = [0.0] * n
    matrices = [item for item in items if item[2]]
    for piece, size, work in sorted(matrices, key=lambda item: (-item[2], item[0])):
        fitting = [r for r in range(n) if size_of[r] + size <= bound]
        if fitting:
            r = min(fitting, key=lambda r: (work_of[r], size_of[r]))
        else:
            r = min(range(n), key=size_of.__getitem__)
        own[r].append(piece)
        size_of[r] += size
        work_of[r] += work

    # The level of bytes to which elementwise tensors raise the k + 1 owners that have the fewest
    elementwise = [(piece, size) for piece, size, work in items if not work]
    left = sum(size for _, size in elementwise)
    level = 0.0
    for k, size in enumerate(sorted(size_of)):
        level = (left + sum(sorted(size_of)[:k + 1])) / (k + 1)
        if k + 1 == n or level <= sorted(size_of)[k + 1]:
            break

    # Fill one owner after another up to that level; the last takes what is left.
    r = 0
    room = level - size_of[0]
    for piece, size in elementwise:
        start = piece.start
        row = size / (piece.stop - piece.start)
        while start < piece.stop:
            while room < row / 2 and r < n - 1:
                r += 1
                room = level - size_of[r]
            stop = piece.stop
            if r < n - 1:
                stop = min(piece.stop, start + max(1, round(room / row)))
            own[r].append(piece._replace(start=start, stop=stop))
            room -= (stop - start) * row
            start = stop
    return [sorted(pieces) for pieces in own]


def pieces_of(name, p, cost, mesh, axis):
    """The pieces of a parameter, as items of `share_out`. cost: (bytes, operations) of the whole parameter.
    A stack of experts is cut into single experts where they have replicas that can own them."""
    # Experts are numbered over all ranks of ep.
    first = 0
    rows = len(p)
    if p.ndim == 3:
        first = mesh.ep.rank * len(p)
        rows = mesh.ep.size * len(p)

    # One piece, or one for each expert, at an equal part of the cost
    stops = [first + len(p)]
    if p.ndim == 3 and axis.size > 1:
        stops = range(first + 1, first + len(p) + 1)
    starts = [first, *stops[:-1]]
    return [(Piece(name, start, stop, rows), *(c / len(stops) for c in cost))
            for start, stop in zip(starts, stops)]


def numbers(piece, p):
    """The number of elements of a piece of parameter p."""
    return (piece.stop - piece.start) * (p.numel() // len(p))


def gradient_bytes(pieces, parameters):
    """Bytes of the pieces' gradients, which are kept in float32 or wider."""
    total = 0
    for piece in pieces:
        p = parameters[piece.name]
        total += numbers(piece, p) * accumulation_dtype(p.dtype).itemsize
    return total


def layout(parameters, weigh, mesh, room=math.inf, chunk=lambda name: 0, tied=()):
    """Who owns what → {"dp", "edp" or "ends": [the buckets of each owner on that axis]}; a bucket is a list
    of pieces. A pure function: all ranks of the axis compute the same, and nothing is moved.

    parameters {name: parameter}: 3-D ones are stacks of this rank's experts, others equal on all of dp;
    those named in `tied` are also equal in the first and the last stage of a pipeline.
    weigh(name, parameter) → (bytes of its optimizer state, operations of its update; 0 = elementwise).
    A bucket holds pieces of one dtype and one chunk of layers (`chunk(name)`), and at most `room` bytes of
    gradients, unless a single piece is larger."""
    def kind(piece):
        return chunk(piece.name), str(parameters[piece.name].dtype)

    def cut(pieces, room):
        buckets = []
        for piece in sorted(pieces, key=kind):
            fits = buckets and kind(piece) == kind(buckets[-1][0]) and \
                gradient_bytes([*buckets[-1], piece], parameters) <= room
            if not fits:
                buckets.append([])
            buckets[-1].append(piece)
        return buckets

    # Experts have owners among their replicas, tied weights among both ends, everything else among dp.
    items = dict(dp=[], edp=[], ends=[])
    for name, p in parameters.items():
        among = "dp"
        if p.ndim == 3:
            among = "edp"
        if name in tied and mesh.ends.size > 1:
            among = "ends"
        items[among] += pieces_of(name, p, weigh(name, p), mesh, getattr(mesh, among))

    # A single owner sends nothing, so its buckets need no bound.
    owned = {}
    for among, some in items.items():
        n = getattr(mesh, among).size
        bound = room if n > 1 else math.inf
        owned[among] = [cut(pieces, bound) for pieces in share_out(some, n)]
    return owned


# ---- ZeRO-1: gradients to their owners, weights back -------------------------------------------------------
# The phases of a step, and the methods of Zero1 that run them:
#
#   accumulate   autograd's hook (`take`) adds each gradient to its bucket's float32 sum, and frees it.
#   reduce       each bucket is summed over its ranks onto its owner, which divides by dp: `master.grad`.
#                `begin_reduce` begins with one chunk, while the others are still computing.
#   clip         `clip_norm_` takes one norm over all owners and scales their gradients.
#   update       `step`: owners update their masters, one round (a bucket of each owner) after another.
#   broadcast    `step` sends each updated round (`send_weights`, `take_weights`) while the next is updated.
#   free         `drop` frees the gradients.
#
# `travel` and `arrive` bound the bytes in flight of the two phases that communicate.

@dataclass(eq=False)
class Bucket:
    """Pieces of one dtype that travel together, to or from their owner: a rank of `axis`."""
    axis: Axis
    owner: int
    pieces: list
    chunk: int = 0                   # that its parameters belong to
    begun: bool = False              # whether its gradients are on the way to their owner
    gradient: torch.Tensor = None    # flat sum of this rank's gradients, float32 or wider; None if empty

    @property
    def mine(self):
        return self.owner == self.axis.rank


class Zero1:
    """Each piece of the model has one owner among the ranks that hold it; only the owner has its optimizer
    state [ZeRO §5.1]

    parameters, weigh, chunk, tied: see `layout`. make([(key, tensor)]) → a torch optimizer for these. Where
    parameters are narrower than float32, owners keep a float32 master.
    everywhere: the names of the parameters of all stages, if there are several.

    Memory. Without replicas, gradients stay where autograd puts them. On several ranks they live in their
    buckets: 4 bytes an element until `reduce`, after which only the owner has them, as views of the bucket.
    At most `in_air` bytes are in flight at a time; a whole round of buckets fits."""

    def __init__(self, parameters, make, weigh, mesh, bucket_bytes=32 << 20, in_air=256 << 20,
                 chunk=lambda name: 0, tied=(), everywhere=()):
        self.mesh = mesh
        self.parameters = parameters
        self.names = sorted({*parameters, *everywhere})
        self.in_air = in_air
        self.works = {name: weigh(name, p)[1] for name, p in parameters.items()}
        self.flying = []                                           # (request, tensor, bucket, land)
        self.sent_sound = []                                       # of chunks on the way: are they finite?

        # A round is one bucket of each owner: updated at the same time, then sent.
        self.rounds = []
        room = min(bucket_bytes, in_air // max(mesh.dp.size, mesh.ends.size))
        for name, owners in layout(parameters, weigh, mesh, room, chunk, tied).items():
            axis = getattr(mesh, name)
            for some in itertools.zip_longest(*owners):
                self.rounds.append([Bucket(axis, r, pieces, chunk(pieces[0].name))
                                    for r, pieces in enumerate(some) if pieces])

        # What is owned here: masters, and one optimizer a bucket
        self.masters = {}
        self.optimizers = {}
        for bucket in self.buckets():
            if not bucket.mine:
                continue
            for piece in bucket.pieces:
                master = self.rows(piece)
                if master.dtype != accumulation_dtype(master.dtype):
                    master = master.float()
                self.masters[piece] = master
            trained = [piece for piece in bucket.pieces if self.parameters[piece.name].requires_grad]
            if trained:
                self.optimizers[bucket] = make([(piece.key, self.masters[piece]) for piece in trained])

        # Where the gradient of a parameter goes: name → [(bucket, piece, its slice of the bucket)]
        self.places = {}
        for bucket in self.buckets():
            at = 0
            for piece in bucket.pieces:
                stop = at + numbers(piece, parameters[piece.name])
                self.places.setdefault(piece.name, []).append((bucket, piece, slice(at, stop)))
                at = stop

        # Gradients go there as soon as autograd has them.
        for name, places in self.places.items():
            p = parameters[name]
            if p.requires_grad and not self.alone(places[0][0]):
                p.register_post_accumulate_grad_hook(functools.partial(self.take, name))

    def buckets(self):
        return [bucket for some in self.rounds for bucket in some]

    def alone(self, bucket):
        """Whether only this rank has gradients for a bucket: they stay where autograd puts them."""
        return self.mesh.dp.size == 1 and bucket.axis.size == 1

    def trained(self):
        """{piece: master} of what is owned here and not frozen."""
        owned = self.masters.items()
        return {piece: master for piece, master in owned if self.parameters[piece.name].requires_grad}

    def rows(self, piece, of=None):
        """The rows of a piece in this rank's parameter, or in `of`, a tensor of the same shape."""
        p = self.parameters[piece.name].detach() if of is None else of
        if len(p) == piece.stop - piece.start:
            return p
        first = self.mesh.ep.rank * len(p) if p.ndim == 3 else 0
        return p[piece.start - first:piece.stop - first]

    def take(self, name, p):
        """Called by autograd when p.grad is complete: into the buckets, and freed. It is also called for a
        matrix whose gradient B has left to W: there is none yet."""
        if p.grad is not None:
            self.accumulate(name, p.grad)
            p.grad = None

    @torch.no_grad()
    def accumulate(self, name, gradient):
        """Add a gradient of this rank to the buckets that hold its parameter."""
        for bucket, piece, where in self.places[name]:
            self.fill(bucket)
            bucket.gradient[where].add_(self.rows(piece, gradient).flatten())

    def fill(self, bucket):
        """Start a bucket's sum at zero. It stays zero where no token was routed to its experts."""
        if bucket.gradient is None:
            p = self.parameters[bucket.pieces[0].name]
            size = sum(numbers(piece, self.parameters[piece.name]) for piece in bucket.pieces)
            bucket.gradient = torch.zeros(size, dtype=accumulation_dtype(p.dtype), device=p.device)

    def travel(self, buckets, start, land):
        """start(bucket) → (request, tensor) sends a bucket, land(bucket, tensor) takes it on arrival.

        At most `in_air` bytes are in flight, or one bucket; `arrive` waits for the rest."""
        for bucket in buckets:
            # A single owner has nothing to send.
            if bucket.axis.size == 1:
                land(bucket, None)
                continue

            # Wait until there is room in the air, then send.
            room = self.in_air - gradient_bytes(bucket.pieces, self.parameters)
            while self.flying and sum(tensor.nbytes for _, tensor, *_ in self.flying) > room:
                self.arrive(1)
            request, tensor = start(bucket)
            self.flying.append((request, tensor, bucket, land))

    def arrive(self, n=None):
        """Wait for the first n in flight, or for all."""
        if n is None:
            n = len(self.flying)
        for request, tensor, bucket, land in self.flying[:n]:
            with talking(self.mesh):
                request.wait()
            land(bucket, tensor)
        del self.flying[:n]

    @torch.no_grad()
    def reduce(self):
        """The mean over dp of all gradients, into the owners' `master.grad`. An expert's gradient is summed
        over its replicas and a tied one over both ends. These too are divided by dp: the loss is a mean over
        the ranks of dp, and together they have sent the expert all its tokens."""
        # What this rank has alone: autograd's gradients
        alone = [piece for bucket in self.buckets() if self.alone(bucket) for piece in bucket.pieces]
        for piece in alone:
            p, master = self.parameters[piece.name], self.masters[piece]
            if p.requires_grad and p.grad is None:
                master.grad = torch.zeros_like(master)
            elif p.requires_grad:
                master.grad = self.rows(piece, p.grad)

        # Everything else that is not on the way yet; on return every gradient is where it belongs.
        self.send_gradients([bucket for bucket in self.buckets() if not self.alone(bucket)])
        self.arrive()
        self.sent_sound.clear()
        for bucket in self.buckets():
            bucket.begun = False

    @torch.no_grad()
    def begin_reduce(self, chunk):
        """Send the gradients of one chunk on their way to their owners; `reduce` waits for them. Whether they
        are finite is noted first: afterwards an owner has a sum in their place."""
        some = [bucket for bucket in self.buckets() if bucket.chunk == chunk and not self.alone(bucket)]
        if not some:
            return
        found = [bucket.gradient for bucket in some if bucket.gradient is not None]
        self.sent_sound.append(torch.nn.utils.get_total_norm(found).isfinite())
        self.send_gradients(some)

    def send_gradients(self, buckets):
        """The ranks of an axis sum each bucket onto its owner, unless it is on the way already."""
        n = self.mesh.dp.size

        def start(bucket):
            self.fill(bucket)
            with talking(self.mesh):
                request = dist.reduce(bucket.gradient, group_dst=bucket.owner, group=bucket.axis.group,
                                      async_op=True)
            return request, bucket.gradient

        # The owner's masters get views of it; the other ranks free it.
        def land(bucket, _):
            self.fill(bucket)
            if bucket.mine:
                bucket.gradient.div_(n)
                sizes = [self.masters[piece].numel() for piece in bucket.pieces]
                for piece, mine in zip(bucket.pieces, bucket.gradient.split(sizes)):
                    if self.parameters[piece.name].requires_grad:
                        self.masters[piece].grad = mine.view_as(self.masters[piece])
            bucket.gradient = None

        waiting = [bucket for bucket in buckets if not bucket.begun]
        for bucket in waiting:
            bucket.begun = True
        self.travel(waiting, start, land)

    def set_rate(self, lr):
        """Set the learning rate of every optimizer."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def forget(self):
        """Reset the optimizers' moments."""
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    def drop(self):
        """After a step: free the gradients."""
        for tensor in (*self.parameters.values(), *self.masters.values()):
            tensor.grad = None

    @torch.no_grad()
    def clip_norm_(self, largest):
        """Scale the owners' gradients to a norm of at most `largest`. → the norm before, over all ranks

        In float64. Squares are summed over all ranks tensor by tensor, and then over the tensors in the order
        of their names: so the layout of the ranks does not change the norm."""
        # The squared norm of each tensor's rows that are owned here
        index = {name: i for i, name in enumerate(self.names)}
        squares = torch.zeros(len(index), dtype=torch.float64, device=self.mesh.device)
        trained = self.trained()
        gradients = [master.grad for master in trained.values()]
        if gradients:
            norms = torch.stack(torch._foreach_norm(gradients, 2, torch.float64))
            where = torch.tensor([index[piece.name] for piece in trained], device=norms.device)
            squares.index_add_(0, where, norms.square())

        # On a GPU the factor is applied even if it is 1, to avoid a synchronization.
        norm = all_sum(squares, self.mesh).sum().sqrt()
        if gradients and (norm.device.type != "cpu" or norm > largest):
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, update, follow):
        """Owners update their pieces (if `update`), follow({key: master}) adjusts them, and all ranks get
        the new weights: those of a round are broadcast while the next round is updated."""
        trained = self.trained()
        for some in self.rounds:
            # Update this rank's own bucket, then start to broadcast the whole round.
            for bucket in some:
                if bucket.mine:
                    if update and bucket in self.optimizers:
                        self.optimizers[bucket].step()
                    follow({piece.key: trained[piece] for piece in bucket.pieces if piece in trained})
            self.travel(some, self.send_weights, self.take_weights)
        self.arrive()

    def send_weights(self, bucket):
        """Start to broadcast a bucket's weights, flat and in their own dtype. → (request, flat)"""
        here = [self.rows(piece) for piece in bucket.pieces]
        flat = here[0].new_empty(sum(t.numel() for t in here))
        if bucket.mine:
            torch.cat([self.masters[piece].to(flat.dtype).flatten() for piece in bucket.pieces], out=flat)
        with talking(self.mesh):
            request = dist.broadcast(flat, group_src=bucket.owner, group=bucket.axis.group, async_op=True)
        return request, flat

    def take_weights(self, bucket, flat):
        """Copy weights into the parameters: the received ones, or the owner's masters unless they share
        memory."""
        for piece in bucket.pieces:
            here = self.rows(piece)
            if not bucket.mine:
                mine, flat = flat[:here.numel()], flat[here.numel():]
                here.copy_(mine.view_as(here))
            elif here.data_ptr() != self.masters[piece].data_ptr():
                here.copy_(self.masters[piece])

    def sound(self):
        """Whether this rank's own gradients are finite, before they are reduced: a boolean tensor, ()."""
        # On several ranks gradients are in buckets, on one rank in p.grad.
        found = [bucket.gradient for bucket in self.buckets() if not bucket.begun]
        found += [p.grad for p in self.parameters.values()]
        sound = torch.nn.utils.get_total_norm([t for t in found if t is not None]).isfinite()
        return torch.stack([sound.to(self.mesh.device), *self.sent_sound]).all()

    def describe(self):
        """A line for each axis of this stage on which some ranks have no matrix to update."""
        for axis in (self.mesh.dp, self.mesh.edp):
            buckets = [bucket for bucket in self.buckets() if bucket.axis is axis]
            owned = [(bucket.owner, piece.name) for bucket in buckets for piece in bucket.pieces]
            busy = {owner for owner, name in owned if self.works[name]}
            if axis.size > 1 and buckets and len(busy) < axis.size:
                yield f"{axis.size} ranks, but only {len(busy)} own a matrix: the others wait for its update"

    def tensors(self):
        """{key: tensor} of what this rank owns: masters, and its optimizers' state under "KEY:STATE"."""
        kept = {piece.key: master for piece, master in self.masters.items()}
        for optimizer in self.optimizers.values():
            kept |= optimizer.tensors()
        return kept

    @torch.no_grad()
    def load(self, saved, moments=True):
        """Read masters, and their optimizer state if `moments`, from a checkpoint (`Saved`) of any layout.
        ValueError: it has optimizer state of parameters that this model lacks."""
        # Which states were saved: parameter name → ["momentum", ...]
        states = {}
        for name in saved:
            name, colon, state = name.partition(":")
            if colon and moments:
                states.setdefault(name, []).append(state)
        lost = [name for name in states if name not in self.names]
        if lost:
            raise ValueError(f"the optimizer state is of another model: {listed(lost)} unknown")

        # Masters: the rows owned here
        own = {piece.key: piece for piece in self.masters}
        for piece, master in self.masters.items():
            master.copy_(saved.rows(piece.name, piece.start, piece.stop))

        # The same rows of each state
        for optimizer in self.optimizers.values():
            keys = [key for group in optimizer.param_groups for key in group["names"]]
            tensors = {}
            for key in keys:
                name, start, stop, _ = own[key]
                for state in states.get(name, ()):
                    tensors[f"{key}:{state}"] = saved.rows(f"{name}:{state}", start, stop)
            optimizer.load(tensors)


# ---- draw and time a schedule ------------------------------------------------------------------------------

def main(argv):
    """The command line: draw the plans of a schedule and time them. Errors: SystemExit, in one line."""
    parser = argparse.ArgumentParser(description="Draw and time a pipeline schedule, without running it.")
    parser.add_argument("--pp", type=int, default=4, help="stages")
    parser.add_argument("--chunks", type=int, default=1, help="chunks of layers on each stage")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="", help="gpipe, 1f1b or interleaved, like --mesh.schedule")
    parser.add_argument("--warm", type=int, default=0, help="forwards added to the warm-up; Kimi K2: 1")
    parser.add_argument("--split", action="store_true", help="weights' gradients apart, half of a backward")
    parser.add_argument("--backward", type=float, default=2.0, help="its time, in forwards of a stage")
    parser.add_argument("--message", type=float, default=0.0, help="time of a message, in such forwards")
    parser.add_argument("--experts", type=int, default=0, help="layers with experts in a chunk")
    parser.add_argument("--exchange", type=float, default=0.0, help="time of a dispatch or a combine")
    parser.add_argument("--overlap", action="store_true", help="exchange while another micro-batch computes")
    parser.add_argument("--columns", type=int, default=100, help="of the drawing")
    parser.add_argument("--k2", action="store_true", help="time Kimi K2's step on many GPUs instead")
    parser.add_argument("--picture", metavar="FILE", help="draw it as a picture too: FILE.png")
    args = parser.parse_args(argv)
    try:
        if args.k2:
            from notes.k2_infrastructure import main as step_of_k2
            return step_of_k2()
        print_schedule(args)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"parallel.py: {error}") from None


def print_schedule(args):
    """Draw and time the schedule of `main`'s options. ValueError: they are out of range or contradict."""
    least_of = dict(microbatches=1, warm=0, backward=0, message=0, experts=0, exchange=0, columns=1)
    for name, least in least_of.items():
        if not least <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name}={getattr(args, name)}: must be at least {least}, and finite")
    if (args.warm or args.overlap) and args.schedule not in ("", "interleaved"):
        raise ValueError(f"--schedule={args.schedule}: --warm and --overlap belong to interleaved")
    if args.warm and args.overlap:
        raise ValueError(f"--warm={args.warm}: --overlap has one more warm-up forward already")

    if args.exchange and not args.experts:
        raise ValueError(f"--exchange={args.exchange}: tokens travel in layers with experts: --experts=1")

    # The plans; a forward of all chunks of a stage takes 1, the parts of an act equally long
    m, v = args.microbatches, args.chunks
    parts = [1 + 3 * args.experts] * (args.pp * v)
    plans = MeshConfig(args.pp, v, args.schedule).plans(m, 1)
    if args.warm:
        plans = interleaved(args.pp, m, v, args.warm)
    times = dict(F=1 / v, B=args.backward / v)
    if args.split:
        plans = split_backwards(plans)
        times |= dict.fromkeys("BW", args.backward / v / 2)
    if args.overlap:
        plans = overlapped(args.pp, m, v, parts, args.split)
    elif args.experts:
        plans = [[part for act in plan for part in in_parts(act, parts)] for plan in plans]

    def cost(act):
        return times[act.op] / (1 if act.op == "W" else parts[act.chunk])

    def exchange(act):
        return args.exchange if exchanged_after(act) in ("dispatch", "combine") else 0.0
    timeline = simulate(plans, cost, args.message, exchange)

    # Drawn, and in numbers
    print(draw(timeline, 1 / max(v, parts[0]), args.columns))
    print(f"\n{args.pp} stages × {v} chunks, {m} micro-batches; 1 = the forward of a stage\n"
          f"  time            {timeline.total:.2f}, of which {m * (1 + args.backward):.2f} busy\n"
          f"  idle            {timeline.idle:.2%} of the time; {timeline.idle_over_busy:.2%} of the busy "
          "time (the reports' bubble)\n"
          f"  waiting         {timeline.waits['exchange']:.2%} of the time for exchanges under way, "
          f"{timeline.waits['message']:.2%} for messages\n"
          f"  in flight       {listed(timeline.peaks, 32)} forwards of a chunk, by stage")
    if args.picture:
        from notes._figure import draw_timelines
        draw_timelines([("stages × time", timeline)], args.picture)
        print(f"  picture         {args.picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
