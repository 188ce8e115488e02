"""Images kept out of training, to measure how a network does on images that it has not seen."""

import hashlib
import os
from typing import Any

import numpy as np

from edm2kit.data.dataset import Source

LEAST = 2  # images on either side: one alone has no standard error


class Part(Source):
    """Some items of another source, by their numbers `picked` in it, int64 [N].

    It has the identity of the other source and, as `about`, what makes it a part.
    """

    def __init__(self, whole: Source, picked: np.ndarray, about: dict[str, Any]):
        self.whole, self.picked, self.about = whole, picked, about
        self.path, self.item_shape, self.item_dtype = whole.path, whole.item_shape, whole.item_dtype
        self.condition_space = whole.condition_space
        self.labels = None if whole.labels is None else whole.labels[picked]

    def __len__(self) -> int:
        return len(self.picked)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Items `indices` of this part, as in `Source.read`."""
        return self.whole.read(self.picked[indices])

    def identity(self) -> dict[str, Any]:
        """The identity of the complete data set, and which part of it this is."""
        return {**self.whole.identity(), "holdout": self.about}

    def files_digest(self) -> str | None:
        """As of the complete data set."""
        return self.whole.files_digest()

    def files_stamp(self, times: bool = True) -> str | None:
        """As of the complete data set."""
        return self.whole.files_stamp(times)

    def files_sample(self) -> str | None:
        """As of the complete data set."""
        return self.whole.files_sample()

    def item_name(self, index: int) -> str:
        """The name that the item has in the complete data set."""
        return self.whole.item_name(int(self.picked[index]))

    def read_extra(self, name: str) -> bytes | None:
        """As of the complete data set."""
        return self.whole.read_extra(name)

    @property
    def needs_decoding(self) -> bool:
        """As of the complete data set."""
        return self.whole.needs_decoding

    @property
    def left_out(self) -> list[str]:
        """As of the complete data set."""
        return self.whole.left_out


def split(source: Source, holdout: float) -> tuple[Part, Part]:
    """The images to train on, and those held out: `holdout` is their share if below 1, otherwise their number.

    The held-out images are those whose names have the smallest SHA-256. So the choice depends neither on a seed nor on
    the order or the number of the other images, and is the same for a converted copy that keeps the names. Raises
    ValueError if fewer than two images remain on either side.
    """
    total = len(source)
    count = round(total * holdout) if holdout < 1 else int(holdout)
    if count < LEAST or total - count < LEAST:
        raise ValueError(
            f"--holdout {holdout:g} would keep {count} of {total} images of {source.path} out of training; {LEAST} "
            "must remain on either side. Below 1 it is a share (0.05), otherwise a number of images (500)"
        )
    digests = [hashlib.sha256(os.fsencode(source.item_name(k))).digest() for k in range(total)]
    by_digest = sorted(range(total), key=lambda k: (digests[k], k))
    held = np.sort(np.array(by_digest[:count], dtype=np.int64))
    kept = np.sort(np.array(by_digest[count:], dtype=np.int64))
    names = hashlib.sha256()
    for k in held.tolist():
        names.update(digests[k])
    about = {"num_images": count, "sha256": names.hexdigest()}
    return Part(source, kept, about), Part(source, held, about)
