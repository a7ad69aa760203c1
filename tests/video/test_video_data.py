"""Clips as data: moving digits, files of videos and cine volumes."""

import errno
import struct
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop

from vision_ssm.data import video_files, video_folder
from vision_ssm.data.cine import CineSlices, acdc_cines, evenly, nifti_cines
from vision_ssm.data.draws import Draws, DrawSampler
from vision_ssm.data.images import mnist
from vision_ssm.data.moving_digits import MovingDigits
from vision_ssm.data.video_files import index_video, read_clip, read_video
from vision_ssm.data.video_folder import VideoFolder, video_paths
from vision_ssm.engine.video.encoding import ENCODINGS, write_video

av = pytest.importorskip("av")


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


def decoded(path, channels: int) -> torch.Tensor:
    """Frames (t, k, h, w) in [-1, 1] as PyAV alone reads them."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="gray" if channels == 1 else "rgb24") for frame in container.decode(video=0)]
    pixels = torch.from_numpy(np.stack(frames)).float() / 127.5 - 1
    return pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)


def gradient(channels: int, height: int = 20, width: int = 24, frames: int = 7) -> torch.Tensor:
    """A smooth clip (t, k, h, w) in [-1, 1] whose frames differ."""
    rows, columns = torch.linspace(-1, 0.4, height)[:, None], torch.linspace(0, 0.5, width)
    planes = torch.stack([rows + columns, rows - columns + 0.2, columns - rows - 0.3])[:channels]
    return (planes + torch.arange(frames)[:, None, None, None] * 0.02).clamp(-1, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ENCODINGS)
def test_what_is_written_is_read(suffix, channels, tmp_path):
    clip = gradient(channels, height=21)
    write_video(tmp_path / f"clip{suffix}", clip, fps=10)
    assert [path.name for path in tmp_path.iterdir()] == [f"clip{suffix}"]
    read = decoded(tmp_path / f"clip{suffix}", channels)
    assert read.shape == (7, channels, 22 if suffix == ".mp4" else 21, 24)
    exact = suffix == ".mkv" or (suffix == ".gif" and channels == 1)
    error = (read[:, :, :21] - clip).abs()
    assert error.max() <= 1 / 255 + 1e-6 if exact else error.mean() < 0.2
    with av.open(tmp_path / f"clip{suffix}") as container:
        assert container.streams.video[0].average_rate == 10


def test_values_beyond_are_clipped_and_odd_edges_repeated(tmp_path):
    for suffix in (".mkv", ".mp4"):
        write_video(tmp_path / f"clip{suffix}", torch.full((2, 1, 21, 33), 1.5), fps=10)
        read = decoded(tmp_path / f"clip{suffix}", 1)
        torch.testing.assert_close(read, torch.ones_like(read), atol=0.03, rtol=0)


def test_frames_may_come_one_by_one(tmp_path):
    clip = gradient(1)
    write_video(tmp_path / "clip.mkv", (frame for frame in clip), fps=29.97)
    assert len(decoded(tmp_path / "clip.mkv", 1)) == len(clip)


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("clip.avi", gradient(1), 10, r"\.avi is no kind of video known here; choose \.mp4, \.mkv, \.gif"),
        ("clip", gradient(1), 10, "no suffix"),
        ("clip.gif", gradient(1), 60, r"\.gif takes 0\.01 to 50 frames per second; got 60"),
        ("clip.mp4", gradient(1), 0, "got 0"),
        ("clip.mp4", [], 10, "no frames to write"),
        ("clip.mp4", torch.zeros(2, 2, 8, 8), 10, r"1 or 3 channels and not empty; got \(2, 8, 8\)"),
        ("clip.mp4", [torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], 10, r"first is \(1, 8, 8\), number 1 \(1, 8, 9\)"),
        ("clip.mp4", [torch.zeros(1, 8, 8), torch.full((1, 8, 8), float("nan"))], 10, "frame 1 holds 64 NaN"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_as_it_was(name, frames, fps, message, tmp_path):
    (tmp_path / name).write_text("before")
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "before"


REORDERED = {"bf": "3", "sc_threshold": "0"}
KINDS = {  # of files: what they are encoded with
    ".avi": ("mpeg4", {"bf": "2", "b": "8000000"}),
    ".mp4": ("h264", REORDERED),
    ".mkv": ("ffv1", {}),
    ".gif": ("gif", {}),
    ".mpg": ("mpeg2video", {"bf": "2", "b": "8000000"}),
    ".ts": ("h264", {}),
    ".webm": ("libvpx-vp9", {}),
    ".mov": ("mjpeg", {}),
}
LEVELS = torch.linspace(-0.8, 0.8, 20)  # the grey of each frame of ``counted``


def encode(path, frames: np.ndarray, codec: str, options: dict[str, str], kind: str | None = None) -> None:
    """Writes grey frames (t, h, w) with a key frame among every eight."""
    with av.open(path, "w", format=kind) as container:
        stream = container.add_stream(codec, 10, options)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "gray" if codec in ("ffv1", "gif") else "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 8
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


def counted(height: int = 32, width: int = 48) -> np.ndarray:
    """Frames (20, h, w) that tell their number."""
    grey = LEVELS.add(1).mul(127.5).round().byte().numpy()
    return np.broadcast_to(grey[:, None, None], (20, height, width)).copy()


@pytest.fixture
def kinds(tmp_path):
    for suffix, (codec, options) in KINDS.items():
        encode(tmp_path / f"clip{suffix}", counted(), codec, options)
    encode(tmp_path / "raw.mp4", counted(), "h264", {}, kind="h264")  # a bare stream, in which frames have no times
    encode(tmp_path / "reordered.avi", counted(), "h264", REORDERED)  # whose times are guessed, and wrong
    return tmp_path


def test_every_kind_of_file_gives_the_frames_that_are_asked_for(kinds):
    paths = video_paths(str(kinds))
    assert len(paths) == len(KINDS) + 2
    for path in paths:
        video = index_video(path)
        assert len(video) == 20, path
        for positions in (range(20), range(13, 14), range(5, 18, 3), range(8, 16)):
            clip = read_clip(video, positions, channels=1)
            assert clip.shape == (len(positions), 1, 32, 48)
            error = (clip.mean(dim=(1, 2, 3)) - LEVELS[list(positions)]).abs().max()
            assert error < 0.03, (path, positions)  # frames differ by 0.08


def test_decoding_begins_at_the_last_key_frame_and_at_the_first_where_times_mislead(kinds, monkeypatch):
    begun, decoded = [], video_files.decoded
    monkeypatch.setattr(video_files, "decoded", lambda *given: begun.append(given[2]) or decoded(*given))
    read_clip(index_video(kinds / "clip.mp4"), range(18, 20), channels=1)
    read_clip(index_video(kinds / "reordered.avi"), range(3, 20), channels=1)
    assert begun == [16, 0, None]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_is_read_as_it_was_written(channels, tmp_path):
    clip = gradient(channels)
    write_video(tmp_path / "clip.mkv", clip, fps=10)
    read = read_video(tmp_path / "clip.mkv", channels=channels)
    torch.testing.assert_close(read, clip, atol=1 / 255 + 1e-6, rtol=0)
    assert torch.equal(read_video(tmp_path / "clip.mkv", channels=channels, frames=2), read[:2])


def test_colour_is_read_as_grey_and_grey_as_colour(tmp_path):
    write_video(tmp_path / "clip.mkv", gradient(1), fps=10)
    colour = read_video(tmp_path / "clip.mkv", channels=3)
    torch.testing.assert_close(colour, gradient(1).expand(-1, 3, -1, -1), atol=0.03, rtol=0)
    green = torch.tensor([-1.0, 1.0, -1.0])[None, :, None, None].expand(2, 3, 16, 16)
    write_video(tmp_path / "green.mkv", green, fps=10)
    luma = read_video(tmp_path / "green.mkv", channels=1)
    torch.testing.assert_close(luma, torch.full_like(luma, 2 * 0.587 - 1), atol=0.05, rtol=0)


def test_a_title_in_another_encoding_is_no_obstacle(tmp_path):
    with av.open(tmp_path / "clip.avi", "w") as container:
        container.metadata["title"] = "\xe9"
        stream = container.add_stream("mpeg4", 10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(counted()[0], format="gray")))
        container.mux(stream.encode())
    content = (tmp_path / "clip.avi").read_bytes()
    assert content.count(b"\xc3\xa9") == 1
    (tmp_path / "clip.avi").write_bytes(content.replace(b"\xc3\xa9", b"\xe9 "))
    assert len(index_video(tmp_path / "clip.avi")) == 1


def test_an_error_that_pyav_has_no_name_for_names_the_file(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mkv", gradient(1), fps=10)

    def fail(*given: object, **options: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(ValueError, match=r"clip\.mkv is no video, .* \(Operation not supported\)"):
        index_video(tmp_path / "clip.mkv")


def test_an_ultrasound_is_written_and_read(tmp_path):
    source = Path(__file__).parents[3] / "shared" / "data" / "ultrasound_clip.npz"
    if not source.is_file():
        pytest.skip("the ultrasound is not beside this checkout")
    clip = torch.from_numpy(np.load(source)["video"])[:8, None].float() / 127.5 - 1
    for suffix, error in ((".mp4", 0.01), (".gif", 0)):
        write_video(tmp_path / f"clip{suffix}", clip, fps=30)
        read = VideoFolder(str(tmp_path), frames=8, size=(240, 320), channels=1)[0]["video"]
        assert (read - clip).abs().mean() <= error
        (tmp_path / f"clip{suffix}").unlink()


@pytest.mark.parametrize("size", [(10, 12), (5, 12), (10, 6), (40, 60), (20, 24)])
def test_frames_cover_the_size_and_are_cropped_about_their_centre(size, tmp_path):
    write_video(tmp_path / "clip.mkv", gradient(3), fps=10)  # of 20 x 24 pixels
    read = read_video(tmp_path / "clip.mkv", channels=3, size=size)
    scale = max(size[0] / 20, size[1] / 24)
    resized = interpolate(gradient(3), size=(round(20 * scale), round(24 * scale)), mode="bilinear", antialias=True)
    expected = center_crop(resized, list(size))
    assert read.shape == expected.shape
    assert (read - expected).abs().mean() < 0.02


@pytest.fixture
def folder(tmp_path):
    """Two splits, as folders and as lists: train has two videos of different sizes, test one."""
    for name, frames in (("train/run/a", 9), ("train/walk/b", 7), ("test/walk/c", 5)):
        path = tmp_path / "set" / f"{name}.mkv"
        path.parent.mkdir(parents=True, exist_ok=True)
        height = 24 if name.endswith("a") else 30
        write_video(path, LEVELS[:frames, None, None, None].expand(-1, 1, height, 40), fps=10)
    (tmp_path / "set" / "notes.txt").write_text("no video")
    (tmp_path / "set" / "walks.txt").write_text("train/walk/b.mkv\r\ntest/walk/c.mkv\n\n")
    return tmp_path / "set"


def levels(item: dict[str, torch.Tensor]) -> list[int]:
    """Numbers of the frames of a clip."""
    grey = item["video"].mean(dim=(1, 2, 3))
    return (grey[:, None] - LEVELS).abs().argmin(dim=1).tolist()


def test_clips_lie_side_by_side_in_a_video(folder):
    clips = VideoFolder(str(folder), part="train", frames=3, size=(16, 16))
    assert clips[0]["video"].shape == (3, 3, 16, 16) and clips[0]["video"].dtype == torch.float32
    assert [levels(clip) for clip in map(clips.__getitem__, range(len(clips)))] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2], [3, 4, 5],
    ]  # fmt: skip


def test_clips_may_overlap_and_leave_frames_out(folder):
    clips = VideoFolder(str(folder), part="test", frames=2, stride=2, every=1, size=(16, 16), channels=1)
    assert [levels(clips[number]) for number in range(len(clips))] == [[0, 2], [1, 3], [2, 4]]


def test_a_split_is_a_folder_or_a_list(folder):
    names = {part: [path.name for path in video_paths(str(folder), part)] for part in ("", "train", "test", "walks")}
    assert names == {
        "": ["c.mkv", "a.mkv", "b.mkv"],
        "train": ["a.mkv", "b.mkv"],
        "test": ["c.mkv"],
        "walks": ["c.mkv", "b.mkv"],
    }


def test_a_video_is_of_the_class_of_its_folder(folder):
    clips = VideoFolder(str(folder), frames=5, size=(8, 8), classes=("walk", "run"))
    assert [int(clips[number]["label"]) for number in range(len(clips))] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"c\.mkv lies in a folder of no class; classes are run"):
        VideoFolder(str(folder), frames=5, size=(8, 8), classes=("run",))


def test_clips_load_in_workers(folder):
    loader = DataLoader(VideoFolder(str(folder), part="train", frames=3, size=(16, 16)), batch_size=5, num_workers=2)
    assert [batch["video"].shape for batch in loader] == [(5, 3, 3, 16, 16)]


def test_progress_is_shown_where_files_are_many(monkeypatch):
    given = []
    monkeypatch.setattr(video_folder, "track", lambda paths, *_, disable, **__: given.append(disable) or paths)
    monkeypatch.setattr(video_folder, "Console", lambda stderr: SimpleNamespace(is_terminal=True))
    for count in (3, 300):
        assert len(list(video_folder.tracked([Path("clip.mp4")] * count, "reading"))) == count
    assert given == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"stride": 0}, "stride=0"),
        ({"every": 0}, "every=0"),
        ({"channels": 2}, "of 1 or 3 channels; got 2"),
        ({"frames": 4, "stride": 2}, r"covers 7, and 1 of 3 videos are shorter: .*c\.mkv \(5\)\. Take fewer"),
    ],
)
def test_clips_that_do_not_fit_are_refused(change, message, folder):
    with pytest.raises(ValueError, match=message):
        VideoFolder(**{"root": str(folder), "frames": 2, "size": (8, 8)} | change)


def test_what_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        video_paths(str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"neither a folder val nor a list val\.txt; it has notes\.txt, test"):
        video_paths(str(folder), "val")
    with pytest.raises(FileNotFoundError, match=r"notes\.txt names 1 files that are not there: .*no video"):
        video_paths(str(folder), "notes")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no video .*; it has nothing"):
        video_paths(str(folder), "empty")
    (folder / "none.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"none\.txt is empty"):
        video_paths(str(folder), "none")
    (folder / "train.txt").write_text("test/walk/c.mkv")
    with pytest.raises(ValueError, match=r"train is a folder and .* a list; keep one"):
        video_paths(str(folder), "train")
    with pytest.raises(FileNotFoundError, match=r"no such video: .*gone"):
        index_video(folder / "gone.mp4")


@pytest.mark.parametrize("suffix", [*KINDS])
@pytest.mark.parametrize("part", [0, 0.02, 0.35, 0.6])
def test_a_truncated_file_is_named_or_its_remaining_frames_are_right(part, suffix, kinds):
    path = kinds / f"clip{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    try:
        clip = read_video(path, channels=1)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert suffix in (".mpg", ".ts"), "its length is known from more than its frames"
        assert (clip.mean(dim=(1, 2, 3)) - LEVELS[: len(clip)]).abs().max() < 0.03


def test_an_mp4_that_is_cut_within_its_frames_is_found_out_by_its_index(tmp_path):
    with av.open(tmp_path / "clip.mp4", "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("h264", 10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 255, (20, 32, 48), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"clip\.mp4 is no video, or is truncated or damaged \(1 of \d+ frames"):
        index_video(tmp_path / "clip.mp4")


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4 is no video, or is truncated or damaged \(Invalid data"):
        index_video(tmp_path / "text.mp4")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", 44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), format="s16", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4 holds no video"):
        index_video(tmp_path / "sound.mp4")


def test_frames_of_different_sizes_are_refused(tmp_path):
    parts = []
    for height in (32, 48):
        encode(tmp_path / "part", counted(height), "h264", {}, kind="h264")
        parts.append((tmp_path / "part").read_bytes())
    (tmp_path / "clip.mp4").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match=r"different sizes: \(32, 48\) and, from frame 20, \(48, 48\)"):
        read_video(tmp_path / "clip.mp4", channels=1, size=(16, 16))


@pytest.mark.parametrize("frames", [0, 8])
def test_more_frames_than_there_are_are_refused(frames, tmp_path):
    write_video(tmp_path / "clip.mkv", gradient(1), fps=10)
    with pytest.raises(ValueError, match=rf"clip\.mkv has 7 frames; {frames} were asked for"):
        read_video(tmp_path / "clip.mkv", channels=1, frames=frames)


def test_a_missing_pyav_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vision-ssm\[video\]"):
        index_video(tmp_path / "clip.mp4")
    with pytest.raises(ImportError, match=r"vision-ssm\[video\]"):
        write_video(tmp_path / "clip.mp4", gradient(1), fps=10)
    assert not list(tmp_path.iterdir())


SHORT_AXIS = np.diag([1.5, 2.0, 8.0, 1.0])  # mm


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = SHORT_AXIS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def heart(frames: int = 10) -> np.ndarray:
    """A cine (20, 16, 3, t): slice z is a ramp from 100 z along x, on which a square gets brighter."""
    cine = np.zeros((20, 16, 3, frames), np.int16)
    cine += np.arange(20, dtype=np.int16)[:, None, None, None] + (100 * np.arange(3, dtype=np.int16))[:, None]
    cine[8:12, 6:10] += (20 * np.arange(frames)).astype(np.int16)
    return cine


def labels(first: int) -> np.ndarray:
    """A label map (20, 16, 3) with 3 in the square, and ``first`` in the corner."""
    label = np.zeros((20, 16, 3), np.uint8)
    label[8:12, 6:10], label[0, 0] = 3, first
    return label


@pytest.fixture
def acdc(tmp_path):
    """Three patients, labelled in the first and the eighth of ten frames."""
    for number in (1, 2, 3):
        stem = tmp_path / "acdc" / f"patient{number:03}" / f"patient{number:03}"
        save(stem.with_name(f"{stem.name}_4d.nii.gz"), heart())
        for frame, first in ((1, 1), (8, 2)):
            save(stem.with_name(f"{stem.name}_frame{frame:02}_gt.nii.gz"), labels(first))
    return tmp_path / "acdc"


def scaled(voxels: np.ndarray) -> torch.Tensor:
    low, high = np.percentile(heart(), (1, 99))
    return torch.from_numpy(((voxels - low) / (high - low) * 2 - 1).clip(-1, 1)).float()


def test_every_slice_of_a_cine_is_a_clip(acdc):
    clips = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(20, 16), classes=4)
    assert len(clips) == 3
    for z, item in enumerate(map(clips.__getitem__, range(3))):
        assert item["video"].dtype == torch.float32 and item["label"].dtype == torch.int64
        torch.testing.assert_close(item["video"][:, 0], scaled(heart()[:, :, z]).movedim(-1, 0))
        assert item["spacing"].tolist() == [1.5, 2.0]
        assert [int(frame.max()) for frame in item["label"]] == [3, -1, -1, -1, -1, -1, -1, 3, -1, -1]
        for number, first in ((0, 1), (7, 2)):
            assert torch.equal(item["label"][number, 0], torch.from_numpy(labels(first)[..., z]).long())


def test_frames_are_spread_over_the_beat_with_those_that_have_labels(acdc):
    clips = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=4, size=(20, 16), classes=4)
    # Frames 0, 2, 5 and 7 as they come; of them the fourth, frame 7, is labelled.
    torch.testing.assert_close(clips[1]["video"][:, 0], scaled(heart()[:, :, 1, [0, 2, 5, 7]]).movedim(-1, 0))
    assert [int(frame.max()) for frame in clips[1]["label"]] == [3, -1, -1, 3]
    assert evenly(10, 4, [0, 6]) == [0, 2, 6, 7]
    assert evenly(30, 3, [11, 12, 13]) == [11, 12, 13]
    assert evenly(7, 7, [3]) == list(range(7))


def test_slices_are_cropped_and_padded_alike_on_both_sides(acdc):
    item = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(10, 20), classes=4)[0]
    torch.testing.assert_close(item["video"][:, 0, :, 2:18], scaled(heart()[5:15, :, 0]).movedim(-1, 0))
    assert (item["video"][..., [0, 1, 18, 19]] == -1).all()
    assert (item["label"][7, ..., [0, 1, 18, 19]] == 0).all() and (item["label"][6] == -1).all()
    assert torch.equal(item["label"][7, 0, :, 2:18], torch.from_numpy(labels(2)[5:15, :, 0]).long())


def test_slices_are_resampled_to_one_spacing(acdc):
    item = CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=10, size=(10, 11), spacing=3.0, classes=4)[0]
    assert item["spacing"].tolist() == [3.0, pytest.approx(2.0 * 16 / 11)]
    expected = interpolate(scaled(heart()[:, :, 0]).movedim(-1, 0)[None], (10, 11), mode="bilinear", antialias=True)
    torch.testing.assert_close(item["video"][:, 0], expected[0])
    assert set(item["label"][7].unique().tolist()) <= {0, 2, 3} and (item["label"][7, 0, 4:6, 4:6] == 3).all()


def test_patients_are_split_and_every_one_is_tested_once(acdc):
    tested = [case["video"] for fold in range(3) for case in acdc_cines(str(acdc), "test", fold, folds=3)]
    assert len(set(tested)) == len(tested) == 3
    train, test = ({case["video"] for case in acdc_cines(str(acdc), part, folds=3)} for part in ("train", "test"))
    assert (len(train), len(test)) == (2, 1) and not train & test


def test_cines_without_labels_are_clips_too(tmp_path):
    for name in ("a.nii.gz", "deeper/b.nii"):
        save(tmp_path / name, heart())
    train, test = (nifti_cines(str(tmp_path), part, folds=2) for part in ("train", "test"))
    assert [Path(case["video"]).name for case in (*test, *train)] == ["a.nii.gz", "b.nii"]
    batch = next(iter(DataLoader(CineSlices(train, frames=5, size=(16, 16)), batch_size=3)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {"video": (3, 5, 1, 16, 16), "spacing": (3, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"spacing": -1.0}, r"spacing=-1\.0"),
        ({"frames": 11}, r"4d\.nii\.gz has 10 frames, a clip 11; take fewer"),
        ({"frames": 1}, "has labels of 2 frames, a clip 1 frames; take more"),
        ({"classes": 3}, r"frame01_gt\.nii\.gz holds labels outside the classes 0 to 2: 3"),
    ],
)
def test_settings_that_do_not_fit_the_cine_are_refused(change, message, acdc):
    with pytest.raises(ValueError, match=message):
        CineSlices(
            **{"cases": acdc_cines(str(acdc), "test", folds=3), "frames": 4, "size": (8, 8), "classes": 4} | change
        )


@pytest.mark.parametrize(
    ("name", "voxels", "message"),
    [
        ("4d", heart()[..., 0], r"4d\.nii\.gz has 3 dimensions \(20, 16, 3\); a cine has 4"),
        ("4d", np.full((20, 16, 3, 10), 7, np.int16), "has no contrast: most of its voxels are 7"),
        ("4d", heart(7), "has 7 frames, and there are labels of frame 8; remove them"),
        ("4d", np.full((20, 16, 3, 10), np.nan, np.float32), "holds 9600 NaN"),
        ("frame08_gt", labels(1)[:10], r"cine .* and label .*frame08.* differ in shape"),
    ],
)
def test_bad_cines_are_named(name, voxels, message, acdc):
    path = save(acdc / "patient001" / f"patient001_{name}.nii.gz", voxels)
    with pytest.raises(ValueError, match=message) as caught:
        CineSlices(acdc_cines(str(acdc), "test", folds=3), frames=4, size=(8, 8), classes=4)
    assert str(path) in str(caught.value)


def test_a_cine_that_lacks_something_is_named(acdc, tmp_path):
    cine = acdc / "patient001" / "patient001_4d.nii.gz"
    with pytest.raises(ValueError, match="comes without labels; leave out classes"):
        CineSlices([{"video": str(cine), "labels": {}}], frames=4, size=(8, 8), classes=4)
    cine.write_bytes(cine.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"patient001_4d\.nii\.gz is truncated or damaged"):
        CineSlices([{"video": str(cine), "labels": {}}], frames=4, size=(8, 8))
    cine.unlink()
    with pytest.raises(FileNotFoundError, match=r"patient001 needs one cine .*; it has patient001_frame01"):
        acdc_cines(str(acdc), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.nii or \.nii\.gz file; it has nothing"):
        nifti_cines(str(tmp_path / "empty"), "train")
