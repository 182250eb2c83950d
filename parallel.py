"""What changes when one device becomes many; and checkpoints, which have to outlive every such change.

`Mesh` says where this process stands; `Mesh()` is a process on its own, and every function here is then the identity.
It is made once, in train.py, and handed on as an argument: no module of this project asks who it is.
"""
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from kernels import read_tensors, write_tensors


@dataclass(frozen=True)
class MeshConfig:
    timeout: float = 600.0       # seconds after which a collective that waits for a lost rank fails; saving takes less

    def __post_init__(self):
        if not self.timeout > 0:
            raise ValueError(f"mesh.timeout={self.timeout}: must be positive, in seconds")


class Axis(NamedTuple):
    rank: int = 0
    size: int = 1
    group: object = None         # torch.distributed process group; None = nobody to talk to


class Mesh(NamedTuple):
    """This process's coordinates: data parallel, pipeline stage, expert group; and the device it computes on."""
    dp: Axis = Axis()
    pp: Axis = Axis()
    ep: Axis = Axis()
    device: torch.device = torch.device("cpu")


def this_rank():
    """This process's rank as torchrun set it; known before the process group is."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many ranks there are, as torchrun set it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_mesh(config):
    """The mesh of this process, from the variables that torchrun sets; a plain `python train.py` stands alone.

    NCCL on GPUs, gloo on CPUs. Call it when data is ready: from here on, who waits longer than the timeout fails."""
    world = world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node: local rank {local}, but only {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        return Mesh(device=device)
    timeout = timedelta(seconds=config.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")    # torchrun's store outlives a restart: without names
    store = dist.PrefixStore(f"attempt-{attempt}", store)          # of its own, a new rank meets a dead one's address
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=timeout)
    return Mesh(dp=Axis(this_rank(), world, dist.group.WORLD), device=device)


def leave_mesh(mesh):
    if mesh.dp.size > 1:
        dist.destroy_process_group()


class LostRank(RuntimeError):
    """Another rank died, or did not answer within the timeout: nothing that needs all of them can go on."""


@contextlib.contextmanager
def talking(mesh):
    try:
        yield
    except RuntimeError as error:                                  # gloo has no class of its own
        raise LostRank(f"rank {mesh.dp.rank} lost contact with another rank: {str(error).splitlines()[0]}") from None


def barrier(mesh):
    if mesh.dp.size > 1:
        with talking(mesh):
            dist.barrier(mesh.dp.group)


def all_max(t, mesh):
    """Element-wise maximum over ranks, in place."""
    if mesh.dp.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.MAX, mesh.dp.group)
    return t


def all_sum(t, mesh):
    """Element-wise sum over ranks, in place."""
    if mesh.dp.size > 1:
        with talking(mesh):
            dist.all_reduce(t, dist.ReduceOp.SUM, mesh.dp.group)
    return t


def average_gradients_(parameters, mesh, bucket_bytes=32 << 20):
    """Replace every gradient by its mean over the ranks. Small ones travel together, in buckets of `bucket_bytes`."""
    if mesh.dp.size == 1:
        return
    bucket, size = [], 0
    for p in [*parameters, None]:
        if bucket and (p is None or size + p.grad.nbytes > bucket_bytes or p.grad.dtype != bucket[0].dtype):
            flat = torch.cat([g.flatten() for g in bucket])
            all_sum(flat, mesh).div_(mesh.dp.size)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0
        if p is not None:
            bucket.append(p.grad)
            size += p.grad.nbytes


# ---- checkpoints --------------------------------------------------------------------------------------------------

def checksum(t):
    return hashlib.sha256(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def digest(manifest):
    """Of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_folder(path):
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(run, step, tensors, facts, keep):
    """run/ckpt/step-N: one tensor file a rank and, last, the manifest. Written beside, forced to disk, then renamed: a
    folder of that name is whole. `facts` go into the manifest; the newest `keep` checkpoints stay."""
    ckpt = run / "ckpt"
    final, beside = ckpt / f"step-{step:08d}", ckpt / f".saving-{step:08d}"
    for unfinished in ckpt.glob(".saving-*"):
        shutil.rmtree(unfinished)
    beside.mkdir(parents=True)
    write_tensors(beside / "rank-0.safetensors", tensors)
    entries = {name: dict(file="rank-0.safetensors", shape=list(t.shape), dtype=str(t.dtype), sha256=checksum(t))
               for name, t in tensors.items()}
    manifest = dict(facts, step=step, tensors=entries)
    with open(beside / "manifest.json", "w") as file:
        json.dump(dict(manifest, sha256=digest(manifest)), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync_folder(ckpt)
    kept = checkpoints(run)
    here = kept.index(final) + 1
    for old in kept[here:] + kept[:here][:-keep]:              # later ones are damaged, or this run began before them
        shutil.rmtree(old)


def checkpoints(run):
    """Folders of finished checkpoints, oldest first."""
    return sorted(p for p in (run / "ckpt").glob("step-*") if p.is_dir())


def read_checkpoint(folder):
    """→ (manifest, {name: tensor}) with every tensor's shape, type and checksum verified. Raises ValueError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("sha256") != digest(manifest):
            raise ValueError("manifest.json is not what was written")
        entries = manifest["tensors"]
        names = {entry["file"] for entry in entries.values()}
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{folder}: its manifest names files outside the folder")
        files = {name: read_tensors(folder / name) for name in names}
        tensors = {name: files[entry["file"]][name] for name, entry in entries.items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
    for name, t in tensors.items():
        if str(t.dtype) != entries[name]["dtype"] or list(t.shape) != entries[name]["shape"] \
                or checksum(t) != entries[name]["sha256"]:
            raise ValueError(f"{folder} is damaged: {name} is not what the manifest says")
    return manifest, tensors


def newest_checkpoint(run, say=print):
    """The newest intact checkpoint of a run, or None; damaged ones are named and passed over."""
    for folder in reversed(checkpoints(run)):
        try:
            return read_checkpoint(folder)
        except ValueError as error:
            say(f"{error}; trying the one before")
    return None
