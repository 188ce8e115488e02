# The tested versions and all commands, for machines with and without NVIDIA GPUs: docs/clusters.md
FROM python:3.11-slim
WORKDIR /opt/edm2kit
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY edm2kit ./edm2kit
RUN pip install --no-cache-dir --constraint constraints.txt ".[vae,hub,tensorboard,wandb]"
COPY train.py generate.py calculate_metrics.py reconstruct_phema.py ./
COPY scripts ./scripts
# users without a home folder (docker run --user) need a place for downloads; mount a folder there to keep them
ENV DNNLIB_CACHE_DIR=/tmp/edm2-toolkit PYTHONUNBUFFERED=1
