"""Counts the parameters of every timm architecture with published weights that the backbone contract may serve.

    python -m benchmarks.speed.sizes

It writes the table that `lpt list backbones --all` reads: millions of parameters, 0 where the backbone contract refuses
it.
"""

import timm
import torch

from lpt.errors import BackboneError
from lpt.files import write_atomic
from lpt.model.backbones.published import SERVED, SIZES, module_of
from lpt.model.backbones.timm_vit import refuse_unserved, refuse_unserved_module


def main() -> None:
    architectures = sorted({name.partition(".")[0] for name in timm.list_pretrained()})
    rows = [f"{name}\t{millions(name):.4g}\n" for name in architectures if module_of(name) in SERVED]
    write_atomic(SIZES, "".join(rows).encode())
    print(f"{len(rows)} architectures in {SIZES}")


def millions(architecture: str) -> float:
    """Of parameters without a classifier; 0 where the backbone contract refuses the architecture."""
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=0)
    try:
        refuse_unserved(architecture, architecture)
        refuse_unserved_module(architecture, vit)
    except BackboneError:
        return 0.0
    return sum(parameter.numel() for parameter in vit.parameters()) / 1e6


if __name__ == "__main__":
    main()
