"""What every segmentation network holds to; one more network is one more row of ``NETWORKS``."""

import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.networks import eval_mode
from torch import nn
from torch.testing import assert_close

from vision_ssm.segmentation import SegMamba, SSMUNet, SwinUMamba, UltraLightVMUNet, UMamba, VMUNet
from vision_ssm.segmentation.ultralight_vm_unet import ChannelBridge

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")


def ssm_unet(spatial_dims, backbone, **arguments):
    return SSMUNet(backbone, spatial_dims=spatial_dims, **arguments)


# A tiny form of each, called as network(in_channels=, out_channels=, ...), and the axes of its images.
NETWORKS = {
    "umamba_bottleneck_3d": (partial(UMamba, 3, channels=(4, 6, 8), state=2), 3),
    "umamba_encoder_3d": (
        partial(
            UMamba,
            3,
            form="encoder",
            channels=(4, 6, 8),
            strides=(1, (1, 2, 2), 2),
            kernel_sizes=((1, 3, 3), 3, 3),
            state=2,
        ),
        3,
    ),
    "umamba_encoder_2d": (partial(UMamba, 2, form="encoder", channels=(4, 6, 8), state=2), 2),
    "segmamba_3d": (partial(SegMamba, 3, dims=(4, 6), depths=(1, 2), hidden=8, state=2), 3),
    "segmamba_2d": (partial(SegMamba, 2, dims=(4, 6), depths=(1, 1), mambas=2, hidden=8, state=2), 2),
    "ssm_unet_3d": (
        partial(
            ssm_unet,
            3,
            backbone="ssm3d_nano",
            dims=(4, 6, 8),
            depths=(1, 1, 1),
            strides=(2, (1, 2, 2), 2),
            kernel_sizes=(3, (1, 3, 3), 3),
        ),
        3,
    ),
    "ssm_unet_2d": (partial(ssm_unet, 2, backbone="test_vmamba", decoder_channels=(4, 4, 6, 8, 8)), 2),
    "vm_unet": (partial(VMUNet, 2, backbone="test_vmamba", depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1)), 2),
    "swin_umamba": (partial(SwinUMamba, 2, backbone="test_vmamba", stem_channels=8), 2),
    "ultralight_vm_unet": (partial(UltraLightVMUNet, 2, widths=(4, 8, 8, 8, 12, 16), state=2), 2),
}
SIZES = {2: [(1, 1), (2, 3), (33, 65), (32, 48)], 3: [(1, 1, 1), (3, 2, 5), (17, 33, 65), (16, 16, 16)]}
ODD = {2: (13, 18), 3: (7, 9, 10)}


@pytest.fixture(params=NETWORKS)
def case(request):
    return NETWORKS[request.param]


@pytest.fixture
def network(case):
    return lambda in_channels=1, out_channels=3, **arguments: case[0](
        in_channels=in_channels, out_channels=out_channels, **arguments
    )


@pytest.fixture
def spatial_dims(case):
    return case[1]


@pytest.fixture
def image(spatial_dims):
    """A batch of two images of odd sizes with one channel."""
    return torch.randn(2, 1, *ODD[spatial_dims])


def scans(net):
    return [name for name in net.state_dict() if name.endswith("A_log")]


def spheres(images):
    """The two-class task: where a smoothed image is bright."""
    pool = F.avg_pool2d if images.dim() == 4 else F.avg_pool3d
    return (pool(images, 3, stride=1, padding=1).mean(1) > 0).long()


@pytest.mark.parametrize("size", range(4))
def test_logits_have_the_size_of_the_image(network, spatial_dims, size):
    sizes = SIZES[spatial_dims][size]
    net = network()
    with eval_mode(net):
        logits = net(torch.randn(1, 1, *sizes))
    assert logits.shape == (1, 3, *sizes) and logits.isfinite().all()


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4])
def test_channels(network, image, in_channels):
    net = network(in_channels, out_channels=2)
    with eval_mode(net):
        assert net(image.repeat(1, in_channels, *[1] * (image.dim() - 2))).shape == (2, 2, *image.shape[2:])


def test_sizes_that_need_no_padding_are_not_padded(network, spatial_dims):
    """A padded image would give other logits where it is not padded."""
    net = network().eval()
    image = torch.randn(1, 1, *SIZES[spatial_dims][-1])
    padded = F.pad(image, [0, 32] * spatial_dims, mode="replicate")
    sizes = [slice(size) for size in image.shape[2:]]
    assert not torch.allclose(net(padded)[(..., *sizes)], net(image), atol=1e-4)
    uneven = image[..., :-1]
    repeated = torch.cat([uneven, uneven[..., -1:]], dim=-1)
    assert_close(net(uneven), net(repeated)[..., :-1])


def test_deep_supervision_predicts_every_level_in_training_only(network, image):
    net, plain = network(deep_supervision=True), network()
    logits = net.train()(image)
    assert isinstance(logits, list) and len(logits) == len(net.reductions) - 1 > 1
    for level, reduction in zip(logits, net.reductions, strict=False):
        assert level.shape[2:] == tuple(-(-n // r) for n, r in zip(image.shape[2:], reduction, strict=True))
    assert net.eval()(image).shape == plain.train()(image).shape == logits[0].shape


def test_every_parameter_is_trained(network, image):
    net = network(deep_supervision=True).train()
    sum(logits.square().mean() for logits in net(image)).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_the_identity_twin_has_no_scan_and_all_else(network, image):
    net, twin = network(), network(mixer="identity")
    shapes, twins = ({k: v.shape for k, v in m.state_dict().items()} for m in (net, twin))
    assert scans(net) and not scans(twin)
    assert twins.items() < shapes.items()
    with eval_mode(twin):
        assert twin(image).shape == net.eval()(image).shape


def test_a_scan_reaches_over_the_whole_image(network, spatial_dims):
    """With the scan, a cell depends on those far before it; the twin is local but for what it reads of whole maps."""
    for arguments, reaches in (({}, True), ({"mixer": "identity"}, False)):
        net = network(out_channels=1, **arguments).double()
        for module in net.modules():
            if isinstance(module, (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, ChannelBridge)):
                module.forward = lambda x: x
        length = 640 if spatial_dims == 2 else 160
        image = torch.randn(1, 1, *[4] * (spatial_dims - 1), length, dtype=torch.float64, requires_grad=True)
        net(image)[..., -1].sum().backward()
        assert bool(image.grad[..., :4].any()) == reaches


def test_gradients(network, spatial_dims):
    net = network(out_channels=2).double().eval()
    image = torch.randn(1, 1, *[3] * spatial_dims, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in net.named_parameters() if name.endswith(("A_log", "dt_weight", "in_proj.weight"))][:3]
    assert torch.autograd.gradcheck(lambda *_: net(image), (image, *weights), fast_mode=True)


def test_checkpointing_changes_nothing(network, image):
    net = network().train()
    found = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        logits = net(image)
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in net.parameters())])
    for plain, again in zip(*found, strict=True):
        assert_close(plain, again)


def test_script_save(network, image):
    net = network(deep_supervision=True).eval()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(net), buffer)
    buffer.seek(0)
    assert_close(torch.jit.load(buffer)(image), net(image), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles(network, image):
    torch.compiler.reset()  # what other tests compiled of the same code would make this one compile for any size
    net, image = network().double().eval(), image.double()
    with torch.no_grad():
        assert_close(torch.compile(net, backend="eager", fullgraph=True)(image), net(image))


def test_exports(network, image):
    net = network().eval()
    assert_close(torch.export.export(net, (image,)).module()(image), net(image))


def test_two_forwards_are_the_same(network, image):
    net = network().eval()
    assert torch.equal(net(image), net(image))


def test_an_image_of_another_shape_is_refused(network, image):
    net = network(in_channels=2)
    with pytest.raises(ValueError, match=r"images of shape \(batch, 2, then \d sizes of at least 1\); got \[2, 1, "):
        net(image)
    with pytest.raises(ValueError, match="images of shape"):
        net(image[0])
    with pytest.raises(ValueError, match="images of shape"):
        net(image[..., :0])
    with pytest.raises(ValueError, match=r"takes floating point numbers; got torch\.uint8"):
        net(image.expand(-1, 2, *image.shape[2:]).to(torch.uint8))


def test_wrong_arguments_say_what_is_accepted(case):
    make, _ = case
    for channels in ({"in_channels": 0, "out_channels": 2}, {"in_channels": 1, "out_channels": -1}):
        with pytest.raises(ValueError, match=r"must be at least 1; got in_channels=\d, out_channels=-?\d"):
            make(**channels)
    with pytest.raises(ValueError, match=r"unknown mixer 'mmaba'.*identity"):
        make(in_channels=1, out_channels=2, mixer="mmaba")
    with pytest.raises(ValueError, match=r"spatial_dims.*got (spatial_dims=)?4"):
        make.func(4, in_channels=1, out_channels=2, **make.keywords)


def test_other_mixers_serve(network, image):
    with eval_mode(net := network(mixer="hilbert")):
        assert scans(net) and net(image).isfinite().all()


def train(net, dtype, steps, device="cpu", lr=2e-3):
    """Losses of a few hundred steps on bright spheres, all in autocast to ``dtype`` unless that is float32."""
    torch.manual_seed(1)
    sizes = (16,) * len(net.reductions[0])
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        images = torch.randn(2, 1, *sizes).to(device)
        target = spheres(images)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = net(images)
            loss = F.cross_entropy(logits.float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_it_learns_in_bfloat16(network):
    losses = train(network().train(), torch.bfloat16, steps=12)
    assert losses.isfinite().all()
    assert losses[-3:].mean() < 0.97 * losses[:3].mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision as a GPU does it")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_200_steps_in_half_precision_are_those_of_float32(network, dtype):
    """At the rate of the other tests, float32 itself ends 2 % elsewhere if the weights are changed by 1e-4."""
    net, wide = network().cuda(), network().cuda()
    wide.load_state_dict(net.state_dict())
    losses, reference = (
        train(m.train(), kind, 200, "cuda", lr=5e-4) for m, kind in ((net, dtype), (wide, torch.float32))
    )
    assert losses.isfinite().all()
    assert_close(losses[-50:].mean(), reference[-50:].mean(), rtol=0.02, atol=0.0)
