"""Files that ask for too much, and files whose look a plain decoder changes."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipelines.data.clips.clip_decoding import decode_clip, read_facts, read_first_frame, read_look
from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.clip_format import ClipFormat, ClipLimits, FitPolicy
from pipelines.data.clips.transcoding import transcode
from sgmd_core.errors import ConfigError
from tests.helpers.video_files import grey_frames, sound_file, video_file

RED = (200, 30, 0)


def coloured(height: int, width: int, num_frames: int = 2) -> np.ndarray:
    return np.broadcast_to(np.array(RED, np.uint8), (num_frames, height, width, 3)).copy()


def tagged(
    frames: np.ndarray,
    *,
    matrix: int,
    full_range: bool = False,
    transfer: int = 2,
    primaries: int = 2,
    tag: bool = True,
) -> bytes:
    """H.264 whose pixels are converted with this matrix and range, with or without the tags."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        if tag:
            context.colorspace, context.color_range = matrix, 2 if full_range else 1
            context.color_trc, context.color_primaries = transfer, primaries
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full_range else 1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def encoded(frames: np.ndarray, container_format: str, codec: str, pix_fmt: str) -> bytes:
    """A file of any codec with its default settings."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def as_a_player_shows(data: bytes) -> np.ndarray:
    """The first frame with BT.709 of limited range wherever the file does not say another."""
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        matrix = 1 if frame.colorspace == 2 else frame.colorspace
        return frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray()


class TestColours:
    @pytest.mark.parametrize("full_range", [False, True])
    @pytest.mark.parametrize("matrix", [1, 5])
    def test_tags_decide_the_matrix_and_the_range(self, matrix, full_range):
        data = tagged(coloured(32, 48), matrix=matrix, full_range=full_range)
        assert np.abs(decode_clip(data, ClipFormat()).astype(int) - RED).max() <= 3

    @pytest.mark.slow
    @pytest.mark.parametrize(("size", "matrix"), [((32, 48), 5), ((720, 1280), 1)])
    def test_without_tags_the_size_decides_the_matrix(self, size, matrix):
        data = tagged(coloured(*size), matrix=matrix, tag=False)
        assert np.abs(decode_clip(data, ClipFormat()).astype(int) - RED).max() <= 3
        # The other matrix is far off.
        other = tagged(coloured(*size), matrix=6 - matrix, tag=False)
        assert np.abs(decode_clip(other, ClipFormat()).astype(int) - RED).max() > 9

    @pytest.mark.parametrize("size", [(32, 48), (33, 47)])
    def test_a_new_encoding_shows_its_colours_in_a_player(self, size):
        data = tagged(coloured(64, 96), matrix=5)
        # A player that takes the wrong matrix is 10 off; two rounds of rounding are 5 off.
        assert (
            np.abs(
                as_a_player_shows(tagged(coloured(64, 96), matrix=5, tag=False))[0, 0] - RED
            ).max()
            > 9
        )
        again, _ = transcode(data, ClipFormat(fps=5, height=size[0], width=size[1]))
        for shown in (as_a_player_shows(again), decode_clip(again, ClipFormat())):
            assert np.abs(shown.astype(int) - RED).max() <= 5
        assert read_look(again) == ()


class TestLook:
    @pytest.mark.parametrize(
        ("data", "look"),
        [
            (tagged(coloured(32, 48), matrix=1), ()),
            (tagged(coloured(32, 48), matrix=9, transfer=16), ("hdr_pq",)),
            (tagged(coloured(32, 48), matrix=9, transfer=18), ("hdr_hlg",)),
            (tagged(coloured(32, 48), matrix=1, primaries=12), ("wide_gamut",)),
            (tagged(coloured(32, 48), matrix=9, transfer=14, primaries=9), ("wide_gamut",)),
            (tagged(coloured(32, 48), matrix=9, transfer=16, primaries=9), ("hdr_pq",)),
            (video_file(grey_frames([90]), rotation=90), ("rotated", "no_colour_tags")),
            (
                video_file(grey_frames([90]), pixel_aspect=Fraction(2)),
                ("non_square_pixels", "no_colour_tags"),
            ),
            (encoded(coloured(32, 48), "mov", "qtrle", "argb"), ("alpha",)),
            (encoded(coloured(32, 48), "nut", "ffv1", "yuva420p"), ("alpha", "no_colour_tags")),
        ],
        ids=[
            "plain",
            "pq",
            "hlg",
            "p3",
            "bt2020",
            "pq of bt2020",
            "rotated",
            "aspect",
            "argb",
            "yuva",
        ],
    )
    def test_properties_that_change_the_look_are_named(self, data, look):
        assert read_look(data) == read_facts(data).look == read_first_frame(data).look == look

    def test_interlaced_frames_are_named(self):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            options = {"x264-params": "interlaced=1:tff=1"}
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            for pixels in grey_frames([40, 80], 64, 64):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        assert "interlaced" in read_look(buffer.getvalue())

    def test_a_cover_is_no_clip(self):
        with pytest.raises(ClipError, match="cover") as caught:
            read_facts(with_cover(None))
        assert caught.value.fault == ClipFault.NO_FRAMES

    def test_a_cover_in_front_of_a_video_is_not_taken_for_it(self):
        facts = read_facts(with_cover(grey_frames([10, 60, 110])))
        assert (facts.height, facts.width, facts.num_frames) == (32, 48, 3)


def with_cover(frames: np.ndarray | None) -> bytes:
    """A Matroska file with a large cover first, then a small video or sound."""
    other = sound_file() if frames is None else video_file(frames, container_format="matroska")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container, av.open(io.BytesIO(other)) as source:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 480, 640, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        track = container.add_stream_from_template(source.streams[0])
        picture = av.VideoFrame.from_ndarray(coloured(480, 640)[0], format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = track
                container.mux(packet)
    return buffer.getvalue()


class TestBounds:
    @pytest.mark.parametrize(
        ("limits", "found", "setting"),
        [
            ({"max_pixels": 1535}, "32x48", "1535 .*max_pixels, --max-pixels"),
            ({"max_frames": 9}, "10 frames", "9 .*max_frames, --max-frames"),
            ({"max_seconds": 0.5}, r"1\.000 s", r"0\.5 s .*max_seconds, --max-seconds"),
            ({"max_decode_s": 1e-9}, "decoded in", "max_decode_s, --max-decode-seconds"),
        ],
    )
    @pytest.mark.parametrize(
        "read",
        [
            read_facts,
            lambda data, limits: transcode(data, ClipFormat(fps=10), limits=limits),
            lambda data, limits: decode_clip(data, ClipFormat(), limits),
        ],
        ids=["facts", "transcode", "decode"],
    )
    def test_the_bound_the_value_and_the_setting_are_named(self, read, limits, found, setting):
        data = video_file(grey_frames(range(0, 100, 10)), fps=10)
        with pytest.raises(ClipError, match=f"(?s){found}.*{setting}"):
            read(data, ClipLimits(**limits))
        assert len(decode_clip(data, ClipFormat(), ClipLimits(1536, 10, 1.0))) == 10

    def test_a_long_file_serves_a_short_clip(self):
        data = video_file(grey_frames(range(0, 100, 10)), fps=10)
        limits = ClipLimits(max_frames=4, max_seconds=0.4)
        assert len(decode_clip(data, ClipFormat(num_frames=3), limits)) == 3
        with pytest.raises(ClipError):
            decode_clip(data, ClipFormat(num_frames=9), limits)

    def test_a_rate_that_multiplies_the_frames_is_bounded(self):
        data = video_file(grey_frames([10, 20]), fps=10)
        with pytest.raises(ClipError, match="max_frames"):
            transcode(data, ClipFormat(fps=1_000_000))

    def test_a_header_alone_is_enough_to_refuse_a_flood_of_frames(self):
        data = video_file(grey_frames([90] * 50), fps=10, pix_fmt="yuv420p")
        start = data.index(b"mdat") + 200
        broken = (
            data[:start] + bytes(data.index(b"moov") - 4 - start) + data[data.index(b"moov") - 4 :]
        )
        with pytest.raises(ClipError) as caught:
            read_facts(broken, ClipLimits(max_frames=49))
        assert caught.value.fault == ClipFault.TOO_MANY_FRAMES

    @pytest.mark.parametrize("side", [9000, 12000, 100_000])
    def test_pictures_of_too_many_pixels_are_refused_by_their_header(self, side):
        header = f"YUV4MPEG2 W{side} H{side} F25:1 Ip A1:1 C420jpeg\nFRAME\n".encode()
        for read in (read_facts, read_first_frame, read_look):
            with pytest.raises(ClipError) as caught:
                read(header + bytes(1000))
            # FFmpeg itself reads no header of 100,000 x 100,000.
            said = f"{side}x{side}.*max_pixels" if side < 100_000 else "FFmpeg says"
            assert re.search(said, str(caught.value))

    @pytest.mark.parametrize("wrong", [{"max_pixels": 0}, {"max_seconds": float("inf")}])
    def test_bounds_are_positive_and_finite(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ClipLimits(**wrong)


def test_an_unknown_codec_is_the_fault_of_its_clip():
    data = video_file(grey_frames([90]), pix_fmt="yuv420p")
    stsd = data.index(b"stsd")
    data = data[:stsd] + data[stsd:].replace(b"avc1", b"zzzz", 1)
    for read in (read_facts, read_first_frame, lambda data: transcode(data, ClipFormat(fps=5))):
        with pytest.raises(ClipError, match="codec") as caught:
            read(data)
        assert caught.value.fault == ClipFault.UNDECODABLE


def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.mkv").write_bytes(
        video_file(grey_frames([90]), container_format="matroska")
    )
    with pytest.raises(ClipError):
        decode_clip(b"ffconcat version 1.0\nfile secret.mkv\n", ClipFormat())


@pytest.mark.parametrize(
    ("container_format", "codec", "pix_fmt"),
    [
        ("gif", "gif", "rgb8"),
        ("apng", "apng", "rgba"),
        ("mpegts", "mpeg2video", "yuv420p"),
        ("asf", "wmv2", "yuv420p"),
        ("flv", "flv1", "yuv420p"),
        ("vob", "mpeg2video", "yuv420p"),
        ("3g2", "mpeg4", "yuv420p"),
        ("mxf", "mpeg2video", "yuv420p"),
        ("ivf", "libvpx", "yuv420p"),
        ("ogg", "libvpx", "yuv420p"),
        ("mjpeg", "mjpeg", "yuvj420p"),
        ("swf", "flv1", "yuv420p"),
        ("nut", "ffv1", "yuv420p"),
    ],
)
def test_containers_of_every_age_come_out_right(container_format, codec, pix_fmt):
    levels = [20, 90, 160, 230]
    rate = 25 if codec == "mpeg2video" else 10
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = 64, 96, pix_fmt
        stream.bit_rate = 4_000_000
        for pixels in grey_frames(levels, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    clip = decode_clip(buffer.getvalue(), ClipFormat(height=32, width=48, policy=FitPolicy.RESIZE))
    assert clip.shape == (4, 32, 48, 3)
    assert clip.mean(axis=(1, 2, 3)) == pytest.approx(levels, abs=18)
