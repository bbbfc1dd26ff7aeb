"""Decoding: which frame is shown when, which way up, and what is said about bad bytes."""

import gc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.clips.clip_decoding import (
    decode_clip,
    read_facts,
    read_first_frame,
    sample_frames,
)
from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy, place, samples_before
from pipelines.data.clips.transcoding import transcode
from sgmd_core.errors import ConfigError
from tests.helpers.video_files import grey_frames, real_clips, sound_file, video_file

TEN_LEVELS = [20 * step + 20 for step in range(10)]


def levels(data: bytes, wanted: ClipFormat) -> list[int]:
    """The grey level of each decoded frame, to the nearest ten."""
    return [round(float(pixels.mean()) / 10) * 10 for pixels in sample_frames(data, wanted)]


class TestSampling:
    def test_all_frames_come_when_no_rate_is_wanted(self):
        data = video_file(grey_frames(TEN_LEVELS), fps=10)
        assert levels(data, ClipFormat()) == TEN_LEVELS

    @pytest.mark.parametrize(
        ("fps", "expected"),
        [
            (10, TEN_LEVELS),
            (5, TEN_LEVELS[::2]),
            (20, [level for level in TEN_LEVELS for _ in range(2)]),
            # Shown at 0, 1/3, 2/3 s: the frames from 0.0, 0.3 and 0.6 s on.
            (3, [20, 80, 140]),
            # k / 7.5 s = 0, .133, .267, .4, .533, .667, .8, .933 s.
            (7.5, [20, 40, 60, 100, 120, 140, 180, 200]),
        ],
    )
    def test_another_rate_shows_the_frame_of_each_moment(self, fps, expected):
        data = video_file(grey_frames(TEN_LEVELS), fps=10)
        assert levels(data, ClipFormat(fps=fps)) == expected

    def test_a_variable_rate_is_sampled_by_time_and_not_by_number(self):
        # Frames appear at 0, 0.1, 0.5 and 0.6 s; the second one is shown for 0.4 s.
        data = video_file(grey_frames([40, 80, 120, 160]), times_s=[0, 0.1, 0.5, 0.6])
        assert levels(data, ClipFormat(fps=10, num_frames=7)) == [40, 80, 80, 80, 80, 120, 160]

    def test_a_clip_that_starts_late_starts_with_its_first_frame(self):
        data = video_file(grey_frames([40, 80]), times_s=[5.0, 5.1], container_format="matroska")
        assert levels(data, ClipFormat(fps=10, num_frames=2)) == [40, 80]

    @pytest.mark.parametrize("container_format", ["mp4", "matroska"])
    def test_a_third_of_the_rate_takes_every_third_frame_in_spite_of_rounded_time_stamps(
        self, container_format
    ):
        shown = [10 * (number % 25) for number in range(90)]
        data = video_file(grey_frames(shown), fps=30, container_format=container_format)
        assert levels(data, ClipFormat(fps=10)) == shown[::3]

    def test_decoding_stops_at_the_last_wanted_frame(self):
        data = video_file(grey_frames(TEN_LEVELS), fps=10)
        assert levels(data, ClipFormat(num_frames=3)) == TEN_LEVELS[:3]

    def test_times_before_the_end_are_counted_exactly(self):
        assert samples_before(Fraction(1), Fraction(25)) == 25
        assert samples_before(Fraction(101, 100), Fraction(25)) == 26
        assert samples_before(Fraction(10005, 10000), Fraction(25)) == 25
        assert samples_before(Fraction(0), Fraction(25)) == 0


class TestFitting:
    def halves(self, height: int, width: int) -> np.ndarray:
        """Left half dark, right half bright, with a bright square in the upper left corner."""
        frame = np.zeros((1, height, width, 3), np.uint8)
        frame[:, :, width // 2 :] = 200
        frame[:, : height // 4, : width // 4] = 100
        return np.repeat(frame, 2, axis=0)

    @pytest.mark.parametrize("turns", [0, 1, 2, 3])
    def test_rotation_in_the_header_is_honoured(self, turns):
        frames = self.halves(32, 64)
        data = video_file(frames, rotation=90 * turns)
        decoded = decode_clip(data, ClipFormat())
        expected = np.rot90(frames, turns, axes=(1, 2))
        assert decoded.shape == expected.shape
        assert np.abs(decoded.astype(int) - expected).max() < 10

    def test_a_turned_clip_is_scaled_as_it_stands(self):
        data = video_file(self.halves(32, 64), rotation=90)
        decoded = decode_clip(data, ClipFormat(height=32, width=16, policy=FitPolicy.RESIZE))
        assert decoded.shape == (2, 32, 16, 3)
        # Turned against the clock, the bright right half is on top.
        assert decoded[0, 2:12].mean() > 190
        assert decoded[0, 20:, 8:].mean() < 10

    def test_crop_keeps_the_centre_and_the_proportions(self):
        frames = np.zeros((1, 40, 80, 3), np.uint8)
        frames[:, 10:30, 30:50] = 240  # a square of half the height in the centre
        decoded = decode_clip(
            video_file(frames), ClipFormat(height=20, width=20, policy=FitPolicy.CROP)
        )[0, :, :, 0]
        assert decoded[6:14, 6:14].min() > 220
        assert decoded[:4].max() < 20
        assert decoded[:, :4].max() < 20
        assert decoded[:, -4:].max() < 20

    def test_resize_changes_the_proportions(self):
        frames = np.zeros((1, 40, 80, 3), np.uint8)
        frames[:, 10:30, 32:48] = 240
        decoded = decode_clip(
            video_file(frames), ClipFormat(height=20, width=20, policy=FitPolicy.RESIZE)
        )[0, :, :, 0]
        bright = decoded > 120
        assert bright.any(axis=1).sum() == 10
        assert bright.any(axis=0).sum() == 4

    def test_refuse_names_both_sizes(self):
        data = video_file(grey_frames([100]))
        with pytest.raises(ClipError, match=r"32x48.*20x20") as caught:
            decode_clip(data, ClipFormat(height=20, width=20, policy=FitPolicy.REFUSE))
        assert caught.value.fault == ClipFault.WRONG_SIZE
        fitting = ClipFormat(height=32, width=48, policy=FitPolicy.REFUSE)
        assert decode_clip(data, fitting).shape == (1, 32, 48, 3)

    def test_odd_sizes_survive(self):
        data = video_file(grey_frames([100], height=33, width=47))
        assert decode_clip(data, ClipFormat()).shape == (1, 33, 47, 3)
        wanted = ClipFormat(height=17, width=19, policy=FitPolicy.CROP)
        assert decode_clip(data, wanted).shape == (1, 17, 19, 3)

    def test_pixels_that_are_not_square_count_in_a_crop(self):
        # Stored 40x40, shown 40 rows by 80 columns: a crop to a square keeps the middle half.
        frames = np.zeros((1, 40, 40, 3), np.uint8)
        frames[:, :, 10:30] = 200
        data = video_file(frames, pixel_aspect=Fraction(2, 1))
        decoded = decode_clip(data, ClipFormat(height=40, width=40, policy=FitPolicy.CROP))
        assert decoded[0, :, 2:-2].min() > 180

    @pytest.mark.parametrize("size", [(480, 832), (33, 47), (1, 1), (720, 90)])
    def test_a_placement_covers_the_wanted_size_from_the_centre(self, size):
        spot = place(*size, 64, 96)
        assert spot.scaled_height >= 64
        assert spot.scaled_width >= 96
        assert spot.scaled_height == 64 or spot.scaled_width == 96
        assert abs(spot.scaled_height - 64 - 2 * spot.top) <= 1
        assert abs(spot.scaled_width - 96 - 2 * spot.left) <= 1

    @pytest.mark.parametrize(
        "wrong", [{"num_frames": 0}, {"fps": -1.0}, {"height": 8}, {"fps": float("inf")}]
    )
    def test_a_format_that_makes_no_sense_is_refused(self, wrong):
        with pytest.raises(ConfigError):
            ClipFormat(**wrong)


class TestKinds:
    @pytest.mark.parametrize("with_audio", [False, True])
    @pytest.mark.parametrize(
        ("codec", "container_format", "name"),
        [("libx264", "mp4", "h264"), ("libvpx-vp9", "webm", "vp9")],
    )
    def test_codecs_with_and_without_sound(self, codec, container_format, name, with_audio):
        data = video_file(
            grey_frames(TEN_LEVELS, height=34, width=50),
            codec=codec,
            container_format=container_format,
            pix_fmt="yuv420p",
            with_audio=with_audio,
        )
        assert levels(data, ClipFormat(fps=5, height=16, width=16)) == TEN_LEVELS[::2]
        facts = read_facts(data)
        assert (facts.codec, facts.has_audio) == (name, with_audio)
        assert (facts.height, facts.width, facts.num_frames) == (34, 50, 10)
        assert facts.fps == pytest.approx(10, rel=0.01)
        assert facts.is_steady

    def test_a_variable_rate_is_told(self):
        data = video_file(grey_frames([40, 80, 120]), times_s=[0, 0.1, 0.5])
        assert not read_facts(data).is_steady

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "size", "num_frames", "fps", "has_audio"),
        [
            ("bigbuckbunny.mp4", (720, 1280), 132, 25, True),
            ("bikes.mp4", (272, 640), 250, 25, False),
            ("carphone_pristine.mp4", (144, 176), 120, 30000 / 1001, False),
            ("carphone_distorted.mp4", (144, 176), 120, 30000 / 1001, False),
        ],
    )
    def test_real_clips(self, name, size, num_frames, fps, has_audio):
        data = real_clips()[name].read_bytes()
        facts = read_facts(data)
        assert (facts.height, facts.width) == size
        assert (facts.num_frames, facts.has_audio) == (num_frames, has_audio)
        assert facts.fps == pytest.approx(fps)
        assert read_first_frame(data) == facts
        clip = decode_clip(data, ClipFormat(num_frames=33, height=48, width=80, fps=16))
        assert clip.shape == (33, 48, 80, 3)
        # Pictures of a real scene: neither empty nor still.
        assert clip.std() > 20
        assert np.abs(clip[0].astype(int) - clip[-1]).mean() > 1


class TestBadBytes:
    @pytest.mark.parametrize(
        ("data", "fault"),
        [
            (b"", ClipFault.UNDECODABLE),
            (b"not a video at all" * 20, ClipFault.UNDECODABLE),
            (real_clips()["bikes.mp4"].read_bytes()[:200_000], ClipFault.UNDECODABLE),
            (video_file(grey_frames(TEN_LEVELS))[:-200], ClipFault.NO_FRAMES),
            (sound_file(), ClipFault.NO_FRAMES),
            # A codec that FFmpeg does not know.
            (video_file(grey_frames([40])).replace(b"avc1", b"zzzz"), ClipFault.UNDECODABLE),
            (
                video_file(
                    grey_frames([])[:0],
                    codec="libvpx-vp9",
                    container_format="webm",
                    pix_fmt="yuv420p",
                ),
                ClipFault.NO_FRAMES,
            ),
        ],
        ids=["empty", "text", "cut", "cut index", "sound alone", "unknown codec", "no frame"],
    )
    @pytest.mark.parametrize("read", [read_facts, read_first_frame])
    def test_the_reason_is_told(self, read, data, fault):
        with pytest.raises(ClipError) as caught:
            read(data)
        assert caught.value.fault == fault
        with pytest.raises(ClipError):
            decode_clip(data, ClipFormat())

    def test_a_damaged_middle_is_noticed_where_it_is_decoded(self):
        noise = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
        whole = video_file(noise)
        data = bytearray(whole)
        data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
        with pytest.raises(ClipError) as caught:
            read_facts(bytes(data))
        assert caught.value.fault == ClipFault.UNDECODABLE
        assert len(decode_clip(bytes(data), ClipFormat(num_frames=3))) == 3

    def test_a_clip_that_is_too_short_says_how_long_it_is(self):
        data = video_file(grey_frames(TEN_LEVELS), fps=10)
        with pytest.raises(ClipError, match=r"1\.000 s .*8 frames.*9 frames at 8 fps") as caught:
            decode_clip(data, ClipFormat(num_frames=9, fps=8))
        assert caught.value.fault == ClipFault.TOO_SHORT
        assert len(decode_clip(data, ClipFormat(num_frames=8, fps=8))) == 8


class TestTranscoding:
    def test_a_transcoded_clip_has_the_wanted_rate_size_and_frames(self):
        data = video_file(grey_frames(TEN_LEVELS), fps=10, with_audio=True)
        wanted = ClipFormat(fps=5, num_frames=4, height=16, width=16)
        encoded, fps = transcode(data, wanted)
        facts = read_facts(encoded)
        assert fps == facts.fps == 5
        assert (facts.height, facts.width, facts.num_frames) == (16, 16, 4)
        assert not facts.has_audio
        assert levels(encoded, ClipFormat()) == TEN_LEVELS[:8:2]

    def test_the_rate_of_the_file_is_kept_when_none_is_wanted(self):
        data = real_clips()["carphone_distorted.mp4"].read_bytes()
        encoded, fps = transcode(data, ClipFormat(height=33, width=47))
        assert fps == pytest.approx(30000 / 1001)
        facts = read_facts(encoded)
        assert (facts.height, facts.width, facts.num_frames) == (33, 47, 120)

    def test_the_same_clip_becomes_the_same_bytes(self):
        # With x264's macroblock tree, 150 times of such a clip made 25 different files.
        time, row, column = np.ogrid[:13, :32, :32]
        grey = (5 * time + 3 * row + 2 * column) % 256
        data = video_file(np.repeat(grey[..., None], 3, axis=3).astype(np.uint8), fps=8)
        made = {transcode(data, ClipFormat(fps=8))[0] for _ in range(12)}
        assert len(made) == 1

    @pytest.mark.parametrize("data", [b"no video", video_file(grey_frames([40]))])
    def test_what_is_bad_stays_bad(self, data):
        with pytest.raises(ClipError):
            transcode(data, ClipFormat(num_frames=5, fps=10))


@pytest.mark.slow
def test_memory_stays_flat_over_many_clips():
    # A clip that leaked one of its pictures would show within a hundred.
    data = video_file(grey_frames([10, 200], height=144, width=176))
    wanted = ClipFormat(num_frames=2, height=96, width=96)
    resident = []
    # What was there before is not looked at again each time.
    gc.collect()
    gc.freeze()
    for _ in range(20):
        for _ in range(10):
            decode_clip(data, wanted)
            with pytest.raises(ClipError):
                decode_clip(data[: len(data) // 2], wanted)
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert max(resident[5:]) <= 1.03 * resident[5]
