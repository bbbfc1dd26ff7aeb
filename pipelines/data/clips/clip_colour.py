"""Colours of decoded frames: the right matrix in, the right tags out, and what is not converted."""

import av
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)
from av.video.stream import VideoStream

# AVColorSpace: 0 is RGB, 2 unspecified, 3 reserved.
_UNSPECIFIED = (2, 3)
_HD_WIDTH = 1280
_SD_HEIGHT = 576
_TRANSFERS = {16: "hdr_pq", 18: "hdr_hlg"}
# AVColorPrimaries: BT.2020, SMPTE 428, DCI-P3, Display P3. AVColorSpace: BT.2020.
_WIDE_PRIMARIES = (9, 10, 11, 12)
_WIDE_MATRICES = (9, 10)
_SQUARE = (None, 0, 1)


def matrix_of(frame: av.VideoFrame) -> Colorspace | None:
    """Matrix to convert a frame with; None follows its tag.

    A file without a tag means BT.709 where it is HD and BT.601 otherwise, as players have it.
    """
    if frame.colorspace not in _UNSPECIFIED or frame.format.is_rgb:
        return None
    is_hd = frame.width >= _HD_WIDTH or frame.height > _SD_HEIGHT
    return Colorspace.ITU709 if is_hd else Colorspace.ITU601


def look_of(stream: VideoStream, frame: av.VideoFrame) -> tuple[str, ...]:
    """Properties of a clip that change its look, by its first frame.

    hdr_pq, hdr_hlg      high dynamic range; it is not tone-mapped, so it looks flat and dull
    wide_gamut           primaries beyond BT.709's; they are not mapped, so it looks pale
    interlaced           two half-pictures in one; it is not deinterlaced, so edges show combs
    alpha                transparency; it is dropped
    rotated              turned by its header; frames are turned when they are decoded
    non_square_pixels    stretched by players; only the policy `crop` takes account of it
    no_colour_tags       the matrix is guessed by the picture's size
    """
    is_wide = frame.color_primaries in _WIDE_PRIMARIES or frame.colorspace in _WIDE_MATRICES
    found = {
        _TRANSFERS.get(frame.color_trc, ""): True,
        # What is of high dynamic range has wide primaries as a rule.
        "wide_gamut": is_wide and frame.color_trc not in _TRANSFERS,
        "interlaced": bool(frame.interlaced_frame),
        "alpha": _has_alpha(frame),
        "rotated": round(frame.rotation / 90) % 4 != 0,
        "non_square_pixels": stream.sample_aspect_ratio not in _SQUARE,
        "no_colour_tags": matrix_of(frame) is not None,
    }
    return tuple(name for name, is_so in found.items() if name and is_so)


def _has_alpha(frame: av.VideoFrame) -> bool:
    name = frame.format.name
    return (
        name == "pal8"
        or name.startswith(("yuva", "gbrap", "ya"))
        or (frame.format.is_rgb and "a" in name)
    )


def tag_as_bt709(stream: VideoStream) -> None:
    """Writes into a new file that its colours are BT.709 of limited range."""
    context = stream.codec_context
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709


def to_bt709(
    frame: av.VideoFrame, pix_fmt: str | None, converter: VideoReformatter
) -> av.VideoFrame:
    """An RGB frame in the colours that `tag_as_bt709` names."""
    return converter.reformat(
        frame,
        format=pix_fmt,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation="BICUBIC",
        threads=1,
    )
