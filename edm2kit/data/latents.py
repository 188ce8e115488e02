"""What a data set of raw latents says of the VAE that made it."""

import json
from dataclasses import asdict, dataclass

from edm2kit.data.dataset import ImageDataset

ENCODER_FILE = "encoder.json"


@dataclass(frozen=True)
class LatentSource:
    """The VAE behind raw latents: `vae_name` as it was called (hub name or folder), `vae_sha256` of its weights."""

    vae_name: str
    vae_sha256: str

    def to_json(self) -> bytes:
        """The content of encoder.json."""
        return json.dumps(asdict(self)).encode()


def read_latent_source(dataset: ImageDataset) -> LatentSource | None:
    """What the data set's encoder.json says; None where there is none (pixels, or latents made by other tools).

    Raises ValueError where the file is damaged.
    """
    data = dataset.read_extra(ENCODER_FILE)
    if data is None:
        return None
    try:
        source = LatentSource(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{dataset.path}/{ENCODER_FILE}: is damaged: {error}") from error
    return source
