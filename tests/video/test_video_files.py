"""Clips in files of videos, and folders of them."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop

from vision_ssm.data import video_files, video_folder
from vision_ssm.data.video_files import index_video, read_clip, read_video
from vision_ssm.data.video_folder import VideoFolder, video_paths
from vision_ssm.engine.video.encoding import ENCODINGS, write_video

av = pytest.importorskip("av")


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
