"""Generated images on disk: one PNG per seed, a record of what made them, and both checked before reuse."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from edm2kit.cli.click_types import IntRanges
from edm2kit.data.image_files import to_image
from edm2kit.data.labels import RECORD
from edm2kit.guidance.records import settings_differences
from edm2kit.sampling.engine import ImageBatch
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.records import write_json


def seed_ranges(seeds: Iterable[int]) -> str:
    """Seeds as `edm2kit.cli.click_types.IntRanges` reads them, such as 0-63,70."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of {seed:06d}.png, grouped by thousands where `subdirs`, all made with the same `settings`."""

    path: Path
    subdirs: bool
    settings: Mapping[str, Any]

    def file(self, seed: int) -> Path:
        folder = self.path / f"{seed // 1000 * 1000:06d}" if self.subdirs else self.path
        return folder / f"{seed:06d}.png"

    @property
    def all_settings(self) -> dict[str, Any]:
        """What the record holds: how files are named is a setting too, for a folder has one layout."""
        return {**self.settings, "subdirs": self.subdirs}

    def claim(self, seeds: Sequence[int], overwrite: bool) -> None:
        """Make sure that what lies here was made with these settings; with `overwrite`, remove what is in the way.

        Overwriting removes the images of `seeds` and, under other settings, every image of the old record: a folder
        never holds a mixture. Raises ValueError saying what differs.
        """
        dist.on_rank0(self._claim, seeds, overwrite)

    def _claim(self, seeds: Sequence[int], overwrite: bool) -> None:
        old = self._read_record()
        if old is None:
            reasons = [f"{self.file(s).name} without {RECORD}" for s in seeds if self.file(s).exists()][:1]
        else:
            reasons = settings_differences(old["settings"], self.all_settings)
        if reasons and not overwrite:
            raise ValueError(
                f"{self.path} holds images made with other settings ({'; '.join(reasons[:4])}); "
                "choose another folder, or use --overwrite to replace them"
            )
        if overwrite:
            self._remove(seeds)
            if old is not None and reasons:
                before = ImageFolder(self.path, old["settings"].get("subdirs", False), {})
                before._remove(seed for run in old["runs"] for seed in IntRanges().convert(run["seeds"], None, None))
                (self.path / RECORD).unlink()

    def _remove(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.file(seed).unlink(missing_ok=True)

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` without a whole image here, the same list on every rank; each rank looks at its share."""
        share = seeds[dist.rank() :: dist.world_size()]
        found = dist.gather_objects([seed for seed in share if not _is_whole_png(self.file(seed))])
        return sorted(seed for part in found for seed in part)

    def note_run(self, run: Mapping[str, Any]) -> None:
        """Add a run to the record; it needs at least `seeds`, in the words of `seed_ranges`."""
        dist.on_rank0(self._note_run, run)

    def _note_run(self, run: Mapping[str, Any]) -> None:
        record = self._read_record() or {"settings": self.all_settings, "runs": []}
        record["runs"].append(dict(run))
        write_json(self.path / RECORD, record)

    def _read_record(self) -> dict[str, Any] | None:
        return read_record(self.path / RECORD)

    def save(self, batches: Iterable[ImageBatch]) -> None:
        """Write every image of `batches`, one batch while the next is drawn. Raises OSError where one cannot be."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            writing = []
            for batch in batches:
                _finish(writing)
                pixels = batch.images.cpu().numpy()
                classes = [None] * len(batch.seeds) if batch.classes is None else batch.classes.tolist()
                writing = [pool.submit(self._write, *job) for job in zip(batch.seeds, classes, pixels, strict=True)]
            _finish(writing)

    def _write(self, seed: int, index: int | None, pixels: np.ndarray) -> None:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("seed", str(seed))
        if index is not None:
            notes.add_text("class", str(index))
        with atomic_write(self.file(seed)) as file:
            to_image(pixels).save(file, "PNG", pnginfo=notes, compress_level=3)

    def read(self, seeds: Iterable[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        """(pixels, class or None) of each seed; pixels are uint8 [C,H,W]. Raises ValueError on a damaged image."""
        for seed in seeds:
            try:
                with Image.open(self.file(seed)) as image:
                    pixels, index = np.asarray(image), image.info.get("class")
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{self.file(seed)} cannot be read ({error}); run the same command again") from error
            yield pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), None if index is None else int(index)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record of images and their runs; None where there is none. Raises ValueError on a damaged one."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["settings"], dict) and all(isinstance(run["seeds"], str) for run in record["runs"]):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged; choose another place, or delete it with its images")


def _is_whole_png(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # every chunk's checksum, up to the last
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _finish(writing: list) -> None:
    for job in writing:
        job.result()
