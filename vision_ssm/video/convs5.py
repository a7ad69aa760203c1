"""Next-frame prediction with ConvS5.

Smith et al., "Convolutional State Space Models for Long-Range Spatiotemporal Modeling", NeurIPS 2023,
arXiv:2310.19694.
"""

from functools import partial

from vision_ssm.layers.convs5 import ConvS5, ConvS5Layer
from vision_ssm.layers.convs5_outputs import ResNetOutput
from vision_ssm.layers.over_time import TemporalStack


def convs5_stack(
    dim: int, *, state: int, layers: int = 8, blocks: int = 1, clip_eigenvalues: bool = True, groups: int = 32
) -> TemporalStack:
    """The published layers: 3x3 kernels, ResNet output blocks, norms after the skip.

    Args:
        dim: channels c in and out.
        state: real size of the state at each place.
        layers: how many.
        blocks: blocks of the initial spectrum.
        clip_eigenvalues: keep real parts at -1e-4 or below, which keeps long rollouts from growing.
        groups: groups of the norms in the output blocks.

    Raises:
        ValueError: sizes that do not fit.
    """
    if min(dim, layers, groups) < 1 or dim % groups:
        raise ValueError(
            "dim, layers and groups must be at least 1 and groups must divide dim; "
            f"got dim={dim}, layers={layers}, groups={groups}"
        )
    output = partial(ResNetOutput, groups=groups)
    mixers = (
        ConvS5(dim, state=state, blocks=blocks, clip_eigenvalues=clip_eigenvalues, output=output) for _ in range(layers)
    )
    return TemporalStack(ConvS5Layer(mixer) for mixer in mixers)
