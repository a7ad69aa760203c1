"""Moving digits as clips, and the digits themselves."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.data.images import mnist
from vision_ssm.data.moving_digits import MovingDigits


def block(side: int = 4, label: int = 7) -> dict[str, torch.Tensor]:
    """A digit that is all ink, so that where it is can be read off a frame."""
    return {"image": torch.ones(1, side, side), "label": torch.tensor(label)}


def corners(video: torch.Tensor) -> torch.Tensor:
    """Row and column (t, 2) of the topmost and leftmost ink of a clip (t, 1, h, w)."""
    ink = video[:, 0] > -1
    return torch.stack([ink.any(dim=2).int().argmax(1), ink.any(dim=1).int().argmax(1)], dim=1)


@pytest.fixture
def digits() -> list[dict[str, torch.Tensor]]:
    """Ten strokes of 28 x 28 pixels, as thick and as bright as those of MNIST."""
    strokes = torch.zeros(10, 1, 28, 28)
    for number, stroke in enumerate(strokes[:, 0]):
        stroke[4:24, 5 + number : 9 + number] = 1
    return [{"image": stroke, "label": torch.tensor(number)} for number, stroke in enumerate(strokes)]


def test_clips_are_digits_on_a_canvas(digits):
    video = MovingDigits(digits, clips=3, frames=20)[2]["video"]
    assert video.shape == (20, 1, 64, 64) and video.dtype == torch.float32
    assert video.min() == -1 and video.max() > 0.9
    ink = [int((frame > -1).sum()) for frame in video]
    assert min(ink) > 50  # digits never leave the canvas


def test_a_clip_is_a_function_of_seed_and_number_alone(digits):
    first, second = (MovingDigits(digits, clips=8, frames=5, seed=3) for _ in range(2))
    forwards = [first[number]["video"] for number in range(8)]
    backwards = [second[number]["video"] for number in reversed(range(8))]
    assert all(map(torch.equal, forwards, reversed(backwards)))
    assert not any(torch.equal(one, other) for one, other in pairwise(forwards))
    other = MovingDigits(digits, clips=1, frames=5, seed=4)[0]["video"]
    assert not any(torch.equal(one, other) for one in forwards)


def test_a_shorter_clip_is_the_beginning_of_a_longer(digits):
    short, long = (MovingDigits(digits, clips=1, frames=frames)[0]["video"] for frames in (7, 40))
    assert torch.equal(short, long[:7])


def test_workers_and_start_change_no_draw(digits):
    draws = Draws(MovingDigits(digits, clips=5, frames=2, size=(30, 32)), seed=1)

    def made(workers: int, start: int, batches: int) -> list[torch.Tensor]:
        sampler = DrawSampler(draws)
        sampler.start = start
        loader = iter(DataLoader(draws, batch_size=2, sampler=sampler, num_workers=workers))
        return [next(loader)["video"] for _ in range(batches)]

    alone = made(0, 0, 4)
    assert all(map(torch.equal, alone, made(2, 0, 4)))
    assert all(map(torch.equal, alone[2:], made(0, 4, 2)))


def test_digits_move_straight_at_one_speed_and_bounce():
    clips = MovingDigits([block()], clips=20, frames=60, size=(104, 204), count=1, speed=0.05)
    bounced = 0
    for number in range(20):
        place = corners(clips[number]["video"]).double() / torch.tensor([100.0, 200.0])
        assert place.min() >= 0 and place.max() <= 1
        step = place.diff(dim=0)
        inside = ((place[1:-1] - 0.5).abs() < 0.4).all(dim=1)
        torch.testing.assert_close(
            step[1:][inside].norm(dim=1), torch.full((int(inside.sum()),), 0.05).double(), atol=0.02, rtol=0
        )
        assert (step[1:][inside] - step[:-1][inside]).abs().max() < 0.03
        bounced += int((step.sign().diff(dim=0).abs() == 2).any())
    assert bounced > 10


def test_the_brighter_of_overlapping_digits_is_seen():
    dim = {"image": torch.full((1, 4, 4), 0.5), "label": torch.tensor(1)}
    for item in MovingDigits([block(), dim], clips=10, frames=2, size=(4, 4), count=12):
        assert (item["video"] == 1).all()  # a sum would wrap, and the last one drawn is often the dim one


def test_every_digit_of_a_clip_moves_by_itself():
    video = MovingDigits([block(1)], clips=1, frames=30, size=(40, 50), count=3, speed=0.02)[0]["video"]
    assert (video > 0).sum(dim=(1, 2, 3)).max() == 3
    assert video.shape == (30, 1, 40, 50)


def test_digits_are_resized(digits):
    video = MovingDigits(digits, clips=1, frames=4, size=(16, 16), digit_size=14)[0]["video"]
    assert video.shape == (4, 1, 16, 16) and video.max() > 0.3


@pytest.mark.parametrize("speed", [0.02, 0.3])
def test_heading_is_the_way_at_the_end(speed):
    clips = MovingDigits([block(1)], clips=200, frames=9, size=(101, 101), count=1, speed=speed, label="heading")
    seen = set()
    for item in clips:
        before, last = corners(item["video"])[-2:]
        if ((before / 100 - 0.5).abs() < 0.5 - speed).all():  # too far from the border to bounce
            (down, right), label = (last - before).tolist(), int(item["label"])
            seen.add(label)
            assert down * (-1, 1)[label // 2] >= 0 and right * (-1, 1)[label % 2] >= 0
    assert seen == {0, 1, 2, 3}


def test_sum_is_that_of_the_digits():
    items = [block(1, label) for label in (2, 5)]
    sums = {int(item["label"]) for item in MovingDigits(items, clips=30, frames=1, size=(9, 9), label="sum")}
    assert sums == {4, 7, 10}


def test_a_clip_beyond_the_last_ends_a_loop():
    clips = MovingDigits([block()], clips=2, frames=1, size=(8, 8))
    assert len(list(clips)) == len(clips) == 2
    with pytest.raises(IndexError, match="clip 2 does not exist; clips are 0 to 1"):
        clips[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": []}, "no digits to move"),
        ({"digits": [{"image": torch.ones(3, 4, 4), "label": torch.tensor(0)}]}, r"\(1, d, d\); got \(3, 4, 4\)"),
        ({"frames": 0}, "frames=0"),
        ({"speed": -1.0}, "speed=-1.0"),
        ({"size": (3, 9)}, "digits of 4 pixels do not fit on a canvas of 3 x 9"),
        ({"digit_size": 10}, "digits of 10 pixels do not fit"),
        ({"label": "colour"}, "labels are heading, sum, and None"),
        ({"label": "heading"}, "count is 2; set count=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**{"digits": [block()], "clips": 1, "frames": 2, "size": (8, 8)} | change)


def write_mnist(root, images: np.ndarray, labels: np.ndarray) -> None:
    """All digits to train, and all but the last to test."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, end in (("train", None), ("t10k", -1)):
        for kind, values in (("images-idx3", images[:end]), ("labels-idx1", labels[:end])):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + values.tobytes())


def test_the_folder_of_torchvision_is_read(tmp_path):
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8)
    write_mnist(tmp_path, images, np.array([4, 0, 9], np.uint8))
    train, test = (mnist(str(tmp_path), part) for part in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    assert [int(item["label"]) for item in train] == [4, 0, 9]
    assert torch.equal(train[1]["image"], torch.from_numpy(images[1:2]).float() / 255)


def test_a_folder_without_mnist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/MNIST/raw lacks train-images-idx3-ubyte"):
        mnist(str(tmp_path), "train")


@pytest.mark.parametrize("bytes_left", [3, 10, 20])
def test_a_damaged_mnist_is_named(bytes_left, tmp_path):
    write_mnist(tmp_path, np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8))
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=f"test files of {tmp_path}/MNIST/raw are truncated or damaged"):
        mnist(str(tmp_path), "test")
