"""Pixels -> raw latents of the VAE, and back, on any number of GPUs, continued where it stopped."""

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm2kit.data.dataset import ImageDataset, data_identity
from edm2kit.data.image_files import encode_png
from edm2kit.data.latents import ENCODER_FILE, LatentSource, read_latent_source
from edm2kit.data.output import PartialDataset, is_finished
from edm2kit.models.vae import STABILITY_VAE, load_vae, vae_decode, vae_encode, vae_sha256
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.progress import progress_bar

DTYPES = {"fp32": np.float32, "fp16": np.float16}
_ZIP_ENTRY_BYTES = 200  # headers and index of one file


@dataclass(frozen=True)
class Job:
    """What to write: `work` turns raw items [N, C, H, W] into the bytes of N files, called `names` at `dest`.

    `settings` tell one result from another; `extra` are files beside the images.
    """

    dataset: ImageDataset
    dest: Path
    names: Sequence[str]
    work: Callable[[np.ndarray], list[bytes]]
    settings: dict[str, Any]
    extra: dict[str, bytes]


def encode(
    source: Path,
    dest: Path,
    *,
    vae: str,
    dtype: str,
    max_images: int | None,
    batch: int,
    workers: int,
    device: str,
) -> None:
    """Write the raw latents of the pixels at `source` to `dest`, posterior mean and std, one .npy file per image.

    `vae` is a hub name or folder; `dtype`, a key of DTYPES, what is stored; `batch`, `workers` as for `run`. Raises
    ValueError for wrong input, OSError where writing fails. Calling again goes on where this one stopped.
    """
    with dist.session(device) as picked:
        dataset = ImageDataset(source, max_images)
        if dataset.raw_dtype != np.uint8:
            raise ValueError(f"{source} holds latents already; encode takes pixels")
        work = partial(encode_batch, load_vae(vae, picked), picked, DTYPES[dtype])
        identity = LatentSource(vae, vae_sha256(vae))
        settings = {"made_by": "encode", "dtype": dtype, "vae_sha256": identity.vae_sha256}
        run(make_job(dataset, dest, ".npy", work, settings, {ENCODER_FILE: identity.to_json()}), batch, workers)


def decode(
    source: Path, dest: Path, *, vae: str | None, max_images: int | None, batch: int, workers: int, device: str
) -> None:
    """Write the pixels of the raw latents at `source` (of the posterior's mean) to `dest` as PNG files.

    `vae` stands in for the name that encode recorded, and must be the same VAE. Otherwise as `encode`.
    """
    with dist.session(device) as picked:
        dataset = ImageDataset(source, max_images)
        if dataset.raw_dtype == np.uint8:
            raise ValueError(f"{source} holds pixels; decode takes what encode wrote")
        recorded = read_latent_source(dataset)
        name = vae or (recorded.vae_name if recorded else STABILITY_VAE)
        sha256 = vae_sha256(name)
        if recorded is not None and recorded.vae_sha256 != sha256:
            raise ValueError(
                f"{source} was encoded by the VAE {recorded.vae_name} with weights {recorded.vae_sha256[:12]}..., and "
                f"{name} has {sha256[:12]}...; name the same one with --vae"
            )
        work = partial(decode_batch, load_vae(name, picked), picked)
        run(make_job(dataset, dest, ".png", work, {"made_by": "decode", "vae_sha256": sha256}, {}), batch, workers)


def encode_batch(vae: torch.nn.Module, device: torch.device, dtype: type, images: np.ndarray) -> list[bytes]:
    """uint8 [N, 1 or 3, H, W] -> .npy files of [8, H/8, W/8]; ValueError where a number is too large for `dtype`."""
    pixels = torch.from_numpy(images).to(device).expand(-1, 3, -1, -1)
    with np.errstate(over="ignore"):  # told below
        latents = vae_encode(vae, pixels).cpu().numpy().astype(dtype)
    if not np.isfinite(latents).all():
        raise ValueError(f"the VAE's latents are not finite in {np.dtype(dtype).name}; store them as fp32")
    return [_npy(latent) for latent in latents]


def decode_batch(vae: torch.nn.Module, device: torch.device, raw: np.ndarray) -> list[bytes]:
    """float32 raw latents [N, 8, h, w] -> PNG files of [8h, 8w] RGB pixels."""
    means = torch.from_numpy(raw[:, : raw.shape[1] // 2].copy()).to(device)
    pixels = vae_decode(vae, means).permute(0, 2, 3, 1).cpu().numpy()
    return [encode_png(Image.fromarray(image)) for image in pixels]


def make_job(
    dataset: ImageDataset,
    dest: Path,
    suffix: str,
    work: Callable[[np.ndarray], list[bytes]],
    settings: dict[str, Any],
    extra: dict[str, bytes],
) -> Job:
    """A job whose files keep the names of the source but for their ending. ValueError where two become the same."""
    if dest.resolve().is_relative_to(dataset.path.resolve()):
        raise ValueError(f"--dest {dest} lies within --source {dataset.path}; choose a place outside")
    names = [PurePosixPath(dataset.file_name(k)).with_suffix(suffix).as_posix() for k in range(len(dataset))]
    if len(set(names)) < len(names):
        twice = next(a for a, b in zip(sorted(names), sorted(names)[1:], strict=False) if a == b)
        raise ValueError(f"{dataset.path}: two images would become {twice}; rename one")
    return Job(dataset, dest, names, work, {**settings, "source": data_identity(dataset)}, extra)


def run(job: Job, batch: int, workers: int) -> None:
    """Do what is left of a job, on all ranks together: `batch` images at a time, read by `workers` threads, on each.

    Rank 0 writes. Raises, on every rank, ValueError or OSError where one fails; what is written stays.
    """
    if dist.on_rank0(is_finished, job.dest, job.settings):
        dist.print0(f"{job.dest} is already there, whole and made with these settings: nothing to do")
        return
    with _Output(job) as output:
        todo = [k for k, name in enumerate(job.names) if name not in output.names]
        told = False
        with progress_bar(len(job.names), initial=len(job.names) - len(todo)) as bar:
            for names, files in _results(job, todo, batch, workers):
                if not told:
                    dist.on_rank0(_check_disk, job, files, len(todo))
                    told = True
                parts = dist.gather_on_rank0(list(zip(names, files, strict=True)))
                bar.update(dist.on_rank0(output.add, parts))
        dist.on_rank0(output.finish)
    dist.print0(f"Wrote {len(job.names)} files to {job.dest}")


def _results(job: Job, todo: Sequence[int], batch: int, workers: int) -> Iterator[tuple[list[str], list[bytes]]]:
    """This rank's names and files, round by round, as many rounds on every rank; reads one round ahead."""
    each = batch * dist.world_size()
    rounds = [todo[start : start + each] for start in range(0, len(todo), each)]
    shares = [chunk[dist.rank() * batch : (dist.rank() + 1) * batch] for chunk in rounds]
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(job.dataset.__getitem__, k) for k in shares[0]] if shares else []
        for this, following in zip(shares, [*shares[1:], []], strict=True):
            reading, ahead = ahead, [pool.submit(job.dataset.__getitem__, k) for k in following]
            files, error = [], None
            try:
                items = [future.result()[0] for future in reading]
                files = job.work(np.stack(items)) if items else []
            except ValueError as caught:
                error = caught
            dist.raise_together(error)
            yield [job.names[k] for k in this], files


def _check_disk(job: Job, files: Sequence[bytes], num_left: int) -> None:
    """Tell what the work will need; ValueError where the disk has less."""
    need = num_left * (len(files[0]) + _ZIP_ENTRY_BYTES)
    folder = job.dest.resolve().parent
    free = shutil.disk_usage(folder).free
    text = f"{num_left} of {len(job.names)} files to write: {need / 1e9:.2f} GB; {free / 1e9:.2f} GB free in {folder}"
    dist.print0(text)
    if need > free:
        raise ValueError(f"not enough space: {text}")


class _Output:
    """A PartialDataset open on rank 0; every rank knows the `names` that are there and whole."""

    def __init__(self, job: Job):
        self.job = job

    def __enter__(self) -> "_Output":
        self._partial: PartialDataset | None = None
        self.names: set[str] = dist.on_rank0(self._open)
        return self

    def _open(self) -> set[str]:
        self._partial = PartialDataset(self.job.dest, self.job.settings).__enter__()
        return set(self._partial.names)

    def __exit__(self, *error: Any) -> None:
        if self._partial is not None:
            self._partial.__exit__(*error)

    def add(self, parts: list[list[tuple[str, bytes]]]) -> int:
        """Write every rank's files (rank 0); returns how many."""
        files = [file for part in parts for file in part]
        for name, data in files:
            self._partial.add(name, data)
        return len(files)

    def finish(self) -> None:
        """Write labels and extra files, and give the data set its name (rank 0)."""
        for name, data in self.job.extra.items():
            self._partial.add(name, data)
        self._partial.finish(_labels(self.job))


def _labels(job: Job) -> dict[str, Any]:
    """dataset.json with the source's labels under the new names."""
    dataset = job.dataset
    if dataset.labels is None:
        return {"labels": None}
    content = {"labels": [[name, int(k)] for name, k in zip(job.names, dataset.labels, strict=True)]}
    return content if dataset.label_names is None else {**content, "label_names": list(dataset.label_names)}


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()
