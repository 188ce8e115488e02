"""Networks: building blocks, the denoisers made of them, and what surrounds these (encoders, cost, freezing).

`NETWORKS` names the kinds of networks; `full_architecture` and `build_network` make one of them.
"""

from edm2kit.models.adapters import VP, Adapted, DiscreteVP, Flow, Rescaled
from edm2kit.models.compilation import compile_
from edm2kit.models.cost import Cost, evaluation_cost
from edm2kit.models.edm2 import Precond, freeze_
from edm2kit.models.encoders import ENCODERS, Encoder, make_encoder
from edm2kit.models.layers import normalize_weights_
from edm2kit.models.networks import (
    NETWORKS,
    NetworkKind,
    build_network,
    full_architecture,
    network_kind,
    register_network,
)
from edm2kit.models.preconditioning import Edits, Preconditioner, RawNetwork

__all__ = [
    "ENCODERS",
    "NETWORKS",
    "VP",
    "Adapted",
    "Cost",
    "DiscreteVP",
    "Edits",
    "Encoder",
    "Flow",
    "NetworkKind",
    "Precond",
    "Preconditioner",
    "RawNetwork",
    "Rescaled",
    "build_network",
    "compile_",
    "evaluation_cost",
    "freeze_",
    "full_architecture",
    "make_encoder",
    "network_kind",
    "normalize_weights_",
    "register_network",
]
