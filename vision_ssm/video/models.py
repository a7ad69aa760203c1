"""Models of video by name: layers over time and their sizes, as data."""

from collections.abc import Callable
from functools import partial

from torch import nn

from vision_ssm.layers import TemporalStack
from vision_ssm.video.conv_lstm import ConvLSTM
from vision_ssm.video.convs5 import convs5_stack
from vision_ssm.video.next_code import NextCode
from vision_ssm.video.next_frame import NextFrame
from vision_ssm.video.transformer import FrameTransformer


def conv_lstm_stack(dim: int, *, layers: int = 8) -> TemporalStack:
    """As many ConvLSTM layers as there are of ConvS5."""
    return TemporalStack(ConvLSTM(dim) for _ in range(layers))


def moving_mnist(stack: Callable[[int], nn.Module], width: int) -> NextFrame:
    """A model of grey clips of 64x64 pixels with layers stack(width) between the published encoder and decoder."""
    return NextFrame(stack(width), dim=width)


MODELS: dict[str, Callable[[], NextFrame]] = {
    # Published, by the length of the clips that they were trained on: as many states at each place as channels.
    "convs5_moving_mnist_300": partial(moving_mnist, partial(convs5_stack, state=256), 256),
    "convs5_moving_mnist_600": partial(moving_mnist, partial(convs5_stack, state=128), 128),
    # What they are compared with, of the same width and depth; these sizes are not the paper's.
    "conv_lstm_moving_mnist": partial(moving_mnist, conv_lstm_stack, 256),
    "transformer_moving_mnist": partial(moving_mnist, FrameTransformer, 256),
    "transformer_recomputed_moving_mnist": partial(moving_mnist, partial(FrameTransformer, cache=False), 256),
}
"""Next-frame models in pixels, with fresh weights: ``MODELS["convs5_moving_mnist_300"]()``."""


def next_code(codes: int, *, layers: int) -> NextCode:
    """A model of code maps of 16x16 with the sizes that the 3-D environments share."""
    stack = convs5_stack(512, state=512, layers=layers, clip_eigenvalues=False)
    return NextCode(stack, codes, dim=512, actions=6, action_dim=16)


CODE_MODELS: dict[str, Callable[[int], NextCode]] = {
    # Published, but for the width of a code's embedding, which is ours.
    "convs5_dmlab": partial(next_code, layers=8),
    "convs5_minecraft": partial(next_code, layers=12),
    "convs5_habitat": partial(next_code, layers=8),
}
"""Models of codes, by how many the tokenizer has, with fresh weights: ``CODE_MODELS["convs5_dmlab"](1024)``."""
