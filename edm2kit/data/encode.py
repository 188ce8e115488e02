"""Latents: encode pixels with the VAE and decode them again, on any number of GPUs, resuming where it stopped."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
import torch

from edm2kit.data.archive import check_name
from edm2kit.data.dataset import ENCODER_FILE, EncoderRecord, Source, open_source, read_encoder_record
from edm2kit.data.image_files import encode_npy, encode_png
from edm2kit.data.labels import Labels, names_digest
from edm2kit.data.output import PartialDataset, is_finished
from edm2kit.models.encoders import to_image
from edm2kit.models.vae import STABILITY_VAE, load_vae, vae_decode, vae_encode, vae_sha256
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.file_threads import FileThreads, Job

DTYPES = {"fp32": np.float32, "fp16": np.float16}
_ZIP_ENTRY_BYTES = 200  # headers and index entry of one file


@dataclass(frozen=True)
class FileJob:
    """Files to write to `dest`: `work` turns raw items [N, C, H, W] into the bytes of N files.

    `names` has one file name per item. `settings` distinguish this result from others; `extra` are files that are
    written beside the items.
    """

    source: Source
    dest: Path
    names: Sequence[str]
    work: Callable[[np.ndarray], list[bytes]]
    settings: dict[str, Any]
    extra: dict[str, bytes]


def encode(
    source: str,
    dest: Path,
    *,
    vae: str,
    dtype: str,
    max_images: int | None,
    batch: int,
    workers: int,
    device: str,
) -> None:
    """Encode the pixels at `source` to raw latents, posterior mean and standard deviation, one .npy file per image.

    `vae` is a hub name or folder, `dtype` a key of DTYPES. `batch` and `workers` are those of `run`. Calling this again
    resumes an unfinished result. Raises ValueError for wrong input and OSError if writing fails.
    """
    with dist.session(device) as picked:
        dataset = open_source(source, max_images)
        if dataset.item_dtype != np.uint8:
            raise ValueError(f"{source} contains latents already; encode needs pixels")
        work = partial(encode_batch, load_vae(vae, picked), picked, DTYPES[dtype])
        record = EncoderRecord(vae, vae_sha256(vae))
        settings = {"made_by": "encode", "dtype": dtype, "vae_sha256": record.vae_sha256}
        run(make_job(dataset, dest, ".npy", work, settings, {ENCODER_FILE: record.to_json()}), batch, workers)


def decode(
    source: str, dest: Path, *, vae: str | None, max_images: int | None, batch: int, workers: int, device: str
) -> None:
    """Decode the raw latents at `source`, using the posterior mean, to PNG files.

    `vae` replaces the name that encode recorded; the weights must be the same. Otherwise like `encode`.
    """
    with dist.session(device) as picked:
        dataset = open_source(source, max_images)
        if dataset.item_dtype == np.uint8:
            raise ValueError(f"{source} contains pixels; decode needs the latents that encode writes")
        record = read_encoder_record(dataset)
        recorded_name = STABILITY_VAE if record is None else record.vae_name
        name = vae or recorded_name
        sha256 = vae_sha256(name)
        if record is not None and record.vae_sha256 != sha256:
            raise ValueError(
                f"{source} was encoded by the VAE {record.vae_name} with weights {record.vae_sha256[:12]}..., but "
                f"{name} has {sha256[:12]}...; give the same VAE with --vae"
            )
        work = partial(decode_batch, load_vae(name, picked), picked)
        run(make_job(dataset, dest, ".png", work, {"made_by": "decode", "vae_sha256": sha256}, {}), batch, workers)


def encode_batch(vae: torch.nn.Module, device: torch.device, dtype: type, images: np.ndarray) -> list[bytes]:
    """Encode uint8 [N, 1 or 3, H, W] to .npy files of [8, H/8, W/8].

    Raises ValueError if a number is too large for `dtype`.
    """
    pixels = torch.from_numpy(images).to(device).expand(-1, 3, -1, -1)
    with np.errstate(over="ignore"):  # reported below
        latents: np.ndarray = vae_encode(vae, pixels).cpu().numpy().astype(dtype)
    if not np.isfinite(latents).all():
        raise ValueError(f"the VAE's latents are not finite in {np.dtype(dtype).name}; use --dtype fp32")
    return [encode_npy(latent) for latent in latents]


def decode_batch(vae: torch.nn.Module, device: torch.device, raw: np.ndarray) -> list[bytes]:
    """Decode float32 raw latents [N, 8, h, w] to PNG files of [8h, 8w] RGB pixels."""
    means = torch.from_numpy(raw[:, : raw.shape[1] // 2].copy()).to(device)
    return [encode_png(to_image(pixels)) for pixels in vae_decode(vae, means).cpu().numpy()]


def make_job(
    source: Source,
    dest: Path,
    suffix: str,
    work: Callable[[np.ndarray], list[bytes]],
    settings: dict[str, Any],
    extra: dict[str, bytes],
) -> FileJob:
    """A job whose files have the names of the source, with another suffix.

    Raises ValueError if `dest` is inside the source, if a name would leave `dest`, or if two names become the same.
    """
    if dest.resolve().is_relative_to(source.path.resolve()):
        raise ValueError(f"--dest {dest} is inside --source {source.path}; choose a folder outside")
    names = [PurePosixPath(source.item_name(k)).with_suffix(suffix).as_posix() for k in range(len(source))]
    for name in names:
        check_name(name, source.path)
    for name, following in itertools.pairwise(sorted(names)):
        if name == following:
            raise ValueError(f"{source.path}: two images would become {name}; rename one")
    content = {"source": source.identity(), "source_files": source.files_digest()}
    if (sizes := source.files_stamp(times=False)) is not None:
        content["source_sizes"] = sizes
        content["source_sample"] = dist.on_rank0(source.files_sample)
    if source.labels is not None:
        content["class_names"] = names_digest(source.label_names, source.label_dim)
    return FileJob(source, dest, names, work, {**settings, **content}, extra)


def run(job: FileJob, batch: int, workers: int) -> None:
    """Write the files of a job that are not there yet, on all ranks together.

    Each rank processes `batch` images at a time and reads them with `workers` threads; rank 0 writes. If one rank fails
    with ValueError or OSError, all ranks raise it, and the files written so far are kept.
    """
    if dist.on_rank0(is_finished, job.dest, job.settings):
        dist.print0(f"{job.dest} is complete and was made with these settings: nothing to do")
        return
    with _Output(job) as output:
        # complete batches: in a batch of another size, the VAE rounds differently
        unfinished = {k // batch for k, name in enumerate(job.names) if name not in output.names}
        todo = [k for k in range(len(job.names)) if k // batch in unfinished]
        checked = False
        with progress_bar(len(job.names), initial=len(job.names) - len(todo)) as bar:
            for names, files in _results(job, todo, batch, workers):
                if not checked:
                    dist.on_rank0(_check_disk, job, files, len(todo))
                    checked = True
                parts = dist.gather_on_rank0(list(zip(names, files, strict=True)))
                bar.update(dist.on_rank0(output.add, parts))
        dist.on_rank0(output.finish)
    dist.print0(f"Wrote {len(job.names)} files to {job.dest}")


def _results(job: FileJob, todo: Sequence[int], batch: int, workers: int) -> Iterator[tuple[list[str], list[bytes]]]:
    """This rank's names and files, round by round, with the same number of rounds on all ranks; reads one round ahead.

    An error on one rank is raised on all.
    """
    shares = []
    for start in range(0, len(todo), batch * dist.world_size()):
        first = start + dist.rank() * batch
        shares.append(todo[first : first + batch])
    with FileThreads(workers) as threads:

        def submit(share: Sequence[int]) -> list[Job[Any]]:
            names = [f"{job.source.path}: {job.source.item_name(k)}" for k in share]
            return [threads.submit(name, job.source.__getitem__, k) for name, k in zip(names, share, strict=True)]

        ahead = submit(shares[0]) if shares else []
        for number, share in enumerate(shares, 1):
            reading = ahead
            ahead = submit(shares[number]) if number < len(shares) else []
            files: list[bytes] = []
            error = None
            try:
                if reading:
                    files = job.work(np.stack([image.result()[0] for image in reading]))
            except (ValueError, OSError) as caught:
                error = caught
            dist.raise_together(error)
            yield [job.names[k] for k in share], files


def _check_disk(job: FileJob, files: Sequence[bytes], num_left: int) -> None:
    """Print the space that the job needs; raises ValueError if the disk has less."""
    need = num_left * (len(files[0]) + _ZIP_ENTRY_BYTES)
    folder = job.dest.resolve().parent
    free = shutil.disk_usage(folder).free
    text = f"{num_left} of {len(job.names)} files to write: {need / 1e9:.2f} GB; {free / 1e9:.2f} GB free in {folder}"
    dist.print0(text)
    if need > free:
        raise ValueError(f"not enough space: {text}")


class _Output:
    """A PartialDataset that is open on rank 0; every rank knows the `names` of the files that are complete."""

    def __init__(self, job: FileJob):
        self.job = job
        self._partial: PartialDataset | None = None

    def __enter__(self) -> "_Output":
        self.names: set[str] = dist.on_rank0(self._open)
        return self

    def _open(self) -> set[str]:
        self._partial = PartialDataset(self.job.dest, self.job.settings).__enter__()
        return set(self._partial.names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._partial is not None:
            self._partial.__exit__(kind, error, traceback)

    def add(self, parts: list[list[tuple[str, bytes]]]) -> int:
        """Write the files of all ranks (on rank 0) and return their number."""
        assert self._partial is not None
        files = [file for part in parts for file in part]
        for name, data in files:
            if name not in self.names:  # it has been written before, and others of its batch have not
                self._partial.add(name, data)
        return len(files)

    def finish(self) -> None:
        """Write labels and extra files, and move the data set to its destination (on rank 0)."""
        assert self._partial is not None
        for name, data in self.job.extra.items():
            self._partial.add(name, data)
        source = self.job.source
        content: dict[str, Any] = {"labels": None}
        if source.labels is not None:
            content = Labels(source.labels, source.label_names, source.label_dim).to_json(list(self.job.names))
        self._partial.finish(content)
