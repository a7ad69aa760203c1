"""Swin-UMamba's own parts."""

import pytest
import torch
from torch import nn

from vision_ssm.segmentation.swin_umamba import SwinUMamba


def test_parameters_as_the_paper_rounds_them():
    """60 M on images of three channels and seven classes."""
    with torch.device("meta"):
        net = SwinUMamba(2, in_channels=3, out_channels=7)
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6) == 60


def test_the_encoder_is_vmamba_after_a_stem_of_its_own():
    net = SwinUMamba(2, 2, 3, backbone="test_vmamba", stem_channels=12)
    half = net.stem(torch.randn(1, 2, 64, 96))
    assert half.shape == (1, 12, 32, 48)
    assert net.patch_embed(half).shape == (1, 16, 16, 24)
    convolution = net.stem[0]
    assert (convolution.kernel_size, convolution.stride, convolution.padding) == ((7, 7), (2, 2), (3, 3))


def test_the_decoder_is_as_wide_as_the_next_coarser_map():
    net = SwinUMamba(2, 2, 3, backbone="test_vmamba", stem_channels=12, deep_supervision=True)
    widths = [head.conv.conv.in_channels for head in net.decoder.heads]
    assert widths == [12, 16, 24, 32, 48]


def test_skips_and_decoder_are_residual():
    net = SwinUMamba(2, 1, 2, backbone="test_vmamba", stem_channels=8)
    for block in (*(skip.layer for skip in net.skips), *(up.conv_block for up in net.decoder.up)):
        assert isinstance(block.conv3.conv, nn.Conv2d)  # the way around, where the width changes


def test_wrong_arguments_say_what_is_accepted():
    with pytest.raises(ValueError, match="spatial_dims=2; got spatial_dims=3"):
        SwinUMamba(3, 1, 2)
    with pytest.raises(ValueError, match=r"unknown backbone 'vim_tiny'; the VMambas are .*vmamba_tiny"):
        SwinUMamba(2, 1, 2, backbone="vim_tiny")
