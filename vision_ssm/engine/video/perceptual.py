"""Distances of generated frames that need trained weights: LPIPS and FVD. What is missing is said, never made up."""
# Shapes: n clips, t frames, k channels of a frame, h rows, w columns, d features of a clip.

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LPIPS_SIDE", "ClipFeatures", "NotMeasured", "frechet_distance", "lpips"]

LPIPS_SIDE = 32  # pixels, the least that AlexNet takes
CLIP_SIDE = 224  # pixels, to which clips are resized for their features


class NotMeasured(Exception):
    """Why a distance cannot be measured on this machine."""


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS on AlexNet, of frames (n, k, h, w) in [0, 1] twice -> (n,); nothing is downloaded.

    Raises:
        NotMeasured: torchmetrics, which brings its linear weights, or AlexNet's ImageNet weights are not here.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError:
        raise NotMeasured("needs torchmetrics; pip install 'vision-ssm[video]'") from None
    from torchvision.models import AlexNet_Weights

    weights = Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name)
    if not weights.is_file():
        raise NotMeasured(f"needs AlexNet's ImageNet weights of torchvision in {weights}")
    net = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)

    def distance(prediction: Tensor, truth: Tensor) -> Tensor:
        found: Tensor = net(*(coloured(2 * frames - 1) for frames in (prediction, truth)))
        return found.flatten()

    return distance


class ClipFeatures:
    """Features of whole clips, by a network that a user gives.

    Args:
        path: TorchScript file of a network from clips (n, 3, t, 224, 224) in [-1, 1] to features (n, d), such as the
            I3D trained on Kinetics-400 that published distances use.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no TorchScript.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no such feature extractor: {path}; give a TorchScript file")
        try:
            with warnings.catch_warnings():  # the format in which these extractors are handed on
                warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
                warnings.filterwarnings("ignore", message=".*torch.jit.load", category=DeprecationWarning)
                self.net: nn.Module = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is no TorchScript file ({str(error).splitlines()[0]})") from error
        self.path = path

    def __call__(self, clips: Tensor) -> Tensor:
        """Clips (n, t, k, h, w) in [-1, 1] -> features (n, d) in float64.

        Raises:
            ValueError: the network gives something else.
        """
        frames = coloured(clips.flatten(0, 1).float())
        frames = F.interpolate(frames, size=(CLIP_SIDE, CLIP_SIDE), mode="bilinear", antialias=True)
        features = self.net(frames.unflatten(0, clips.shape[:2]).transpose(1, 2))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(clips):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{self.path} must give features ({len(clips)}, d) for {len(clips)} clips; it gave {found}"
            )
        return features.double()


def coloured(frames: Tensor) -> Tensor:
    """Frames (n, k, h, w) with three channels; grey ones are repeated.

    Raises:
        ValueError: they have neither one nor three.
    """
    if frames.shape[1] not in (1, 3):
        raise ValueError(f"perceptual distances are of grey or RGB frames; these have {frames.shape[1]} channels")
    return frames.expand(-1, 3, -1, -1)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the normal distributions with the means and covariances of features (n, d) and (m, d).

    The trace of the root of the product of both covariances is the sum of the singular values of (n, m) products of
    centred features, so no root of a matrix is taken, and there may be fewer clips than features.

    Raises:
        ValueError: a covariance needs two clips.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a Fréchet distance needs two clips on each side; got {len(x)} and {len(y)}")
    centred = [(m - m.mean(dim=0)) / (len(m) - 1) ** 0.5 for m in (x, y)]
    spread = sum(float(m.square().sum()) for m in centred)
    common = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    return float((x.mean(dim=0) - y.mean(dim=0)).square().sum()) + spread - 2 * common
