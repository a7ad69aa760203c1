"""Random patches: of one size, of image and label alike, about labels where there are any, and numbered."""

import pytest
import torch

from vision_ssm.data.patches import KEPT, Patches, centres

VARIED = {"rotate": 0.3, "scale": 0.2, "mirror": (0, 1), "gain": 0.1, "offset": 0.1, "noise": 0.1}


def blob(*shape: int, channels: int = 1) -> dict[str, torch.Tensor]:
    """An item with labels in one corner, whose image says where the labels are."""
    label = torch.zeros(1, *shape)
    label[(slice(None), *(slice(0, 3) for _ in shape))] = 1
    return {"image": label.repeat(channels, *(1 for _ in shape)) * 5, "label": label}


@pytest.mark.parametrize("size", [(8, 6), (8, 6, 4)])
def test_a_draw_depends_on_its_number_alone(size):
    items = [blob(*(2 * side for side in size), channels=2), blob(*(side + 1 for side in size), channels=2)]
    draws = [Patches(items, size, **VARIED, seed=seed) for seed in (1, 1, 2)]
    forwards = [draws[0][i] for i in range(6)]
    backwards = [draws[1][i] for i in reversed(range(6))][::-1]
    for one, same in zip(forwards, backwards, strict=True):
        assert one["image"].shape == (2, *size)
        assert type(one["image"]) is type(one["label"]) is torch.Tensor
        assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(forwards[0]["image"], draws[2][0]["image"])


def test_image_and_label_are_moved_alike():
    label = torch.zeros(1, 20, 20, 20)
    label[:, :9, :12, 4:] = 1
    patches = Patches([{"image": label * 5, "label": label}], (12, 12, 12), rotate=0.5, scale=0.2, mirror=(0, 1, 2))
    for draw in range(8):
        image, moved = (patches[draw][key] for key in ("image", "label"))
        assert set(moved.unique().tolist()) == {0, 1}
        assert ((image > 2.5) != (moved > 0)).float().mean() < 0.02  # linear and nearest differ at the edge alone


def test_half_of_the_patches_lie_about_a_label():
    item = blob(60, 60)
    labelled = [Patches([item], (6, 6))[draw]["label"].any().item() for draw in range(60)]
    assert 0.3 < sum(labelled) / 60 < 0.7


def test_small_items_are_padded_with_zeros():
    patch = Patches([{"image": torch.ones(1, 3, 4), "label": torch.ones(1, 3, 4)}], (8, 8))[0]
    assert patch["label"].sum() == 12
    assert patch["image"].shape == (1, 8, 8)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_item_of_one_kind_alone_is_drawn_from_anywhere_in_silence(value):
    patches = Patches([{"image": torch.rand(1, 9, 9, 9), "label": torch.full((1, 9, 9, 9), value)}], (4, 4, 4))
    assert len({patches[draw]["image"].sum().item() for draw in range(8)}) == 8


def test_few_centres_are_kept_of_many_voxels():
    found = centres(torch.arange(90_000).reshape(1, 300, 300) % 3)
    assert all(KEPT / 2 < len(index) <= KEPT for index in found.values())
    assert int(found["background"].max()) > 89_000


def test_a_size_of_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"size \(4, 4\) are of 2 axes, the items of 3"):
        Patches([blob(9, 9, 9)], (4, 4))
