"""Generated images on disk: a PNG per seed and a record of the settings, both checked before reuse."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    runs: list[tuple[int, int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], seed)
        else:
            runs.append((seed, seed))
    texts = []
    for first, last in runs:
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(texts)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images {seed:06d}.png, all made with the same `settings`; with `subdirs`, grouped by thousands."""

    path: Path
    subdirs: bool
    settings: Mapping[str, Any]

    def file(self, seed: int) -> Path:
        """Where the image of a seed belongs."""
        folder = self.path / f"{seed // 1000 * 1000:06d}" if self.subdirs else self.path
        return folder / f"{seed:06d}.png"

    @property
    def all_settings(self) -> dict[str, Any]:
        """What the record holds: `subdirs` is a setting too, because a folder has one layout."""
        return {**self.settings, "subdirs": self.subdirs}

    def claim(self, seeds: Sequence[int], overwrite: bool) -> None:
        """Make sure that the images in the folder were made with these settings, or remove them if `overwrite` is set.

        Overwriting removes the images of `seeds` and, if the settings differ, every image of the old record, so that a
        folder never holds a mixture. To be called on rank 0. Raises ValueError with the differences.
        """
        old = read_record(self.path / RECORD)
        if old is not None:
            reasons = settings_differences(old["settings"], self.all_settings)
        else:
            existing = [self.file(seed) for seed in seeds if self.file(seed).exists()]
            reasons = [f"{existing[0].name} without {RECORD}"] if existing else []
        if reasons and not overwrite:
            raise ValueError(
                f"{self.path} holds images made with other settings ({'; '.join(reasons[:4])}); "
                "choose another folder, or use --overwrite to replace them"
            )
        if overwrite:
            self._remove(seeds)
        if overwrite and reasons and old is not None:
            before = ImageFolder(self.path, old["settings"].get("subdirs", False), {})
            for run in old["runs"]:
                before._remove(IntRanges().convert(run["seeds"], None, None))
            (self.path / RECORD).unlink()

    def _remove(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.file(seed).unlink(missing_ok=True)

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` without a complete image, the same list on every rank; each rank checks its share."""
        share = seeds[dist.rank() :: dist.world_size()]
        found = dist.gather_objects([seed for seed in share if not _is_complete_png(self.file(seed))])
        return sorted(seed for part in found for seed in part)

    def note_run(self, run: Mapping[str, Any]) -> None:
        """Add a run to the record, on rank 0; it has at least the key `seeds`, as from `seed_ranges`."""
        record = read_record(self.path / RECORD) or {"settings": self.all_settings, "runs": []}
        record["runs"].append(dict(run))
        write_json(self.path / RECORD, record)

    def save(self, batches: Iterable[ImageBatch]) -> None:
        """Write every image of `batches`, each batch while the next is generated. Raises OSError if that fails."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            writing: list[Future[None]] = []
            for batch in batches:
                for job in writing:
                    job.result()
                pixels = batch.images.cpu().numpy()
                classes = [None] * len(batch.seeds) if batch.classes is None else batch.classes.tolist()
                writing = [pool.submit(self._write, *image) for image in zip(batch.seeds, classes, pixels, strict=True)]
            for job in writing:
                job.result()

    def _write(self, seed: int, index: int | None, pixels: np.ndarray) -> None:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("seed", str(seed))
        if index is not None:
            notes.add_text("class", str(index))
        with atomic_write(self.file(seed)) as file:
            to_image(pixels).save(file, "PNG", pnginfo=notes, compress_level=3)

    def read(self, seeds: Iterable[int]) -> Iterator[tuple[np.ndarray, int | None]]:
        """Yield (pixels, class or None) of each seed; pixels are uint8 [C,H,W].

        Raises ValueError if an image cannot be read.
        """
        for seed in seeds:
            try:
                with Image.open(self.file(seed)) as image:
                    pixels, index = np.asarray(image), image.info.get("class")
            except (OSError, SyntaxError) as error:
                raise ValueError(f"{self.file(seed)} cannot be read ({error}); run the same command again") from error
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            yield pixels, None if index is None else int(index)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of images and the runs that made them; None if there is none. Raises ValueError if it is damaged."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["settings"], dict) and all(isinstance(run["seeds"], str) for run in record["runs"]):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged; choose another place, or delete it together with its images")


def _is_complete_png(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # the checksum of every chunk, up to the last
    except (OSError, SyntaxError, ValueError):
        return False
    return True
