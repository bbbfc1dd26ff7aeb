"""`sgmd prepare` from a server that is busy, or that does not serve one object, or none."""

import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.s3.settings import S3Settings
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encode
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.making.caption_file import open_set, read_prompts
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.data.shards.index import read_index
from pipelines.data.stream.inspect import inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from sgmd_core.errors import DataError
from tests.helpers.faulty_proxy import ProxyBook, Trouble, every
from tests.helpers.s3_server import S3Server, serve_s3
from tests.helpers.video_files import grey_frames, video_file

TROUBLES = (Trouble.SLOW_DOWN, Trouble.RESET, Trouble.INTERNAL, Trouble.DRIBBLE)
NAMES = ("a.mp4", "b.mp4", "c.mp4")
HERE = PrepareOptions(
    num_processes=0,
    max_bad_fraction=0.5,
    s3=S3Settings(read_timeout_s=2.0, max_attempts=2, read_attempts=3, backoff_s=0.05),
)


def write_source(raw: Path, video: bytes) -> None:
    """The same clips as a folder, a folder with a tar in it, a tar and a manifest; prompts."""
    for folder in ("folder", "mixed"):
        (raw / folder).mkdir(parents=True)
        for name in NAMES:
            (raw / folder / name).write_bytes(video)
            (raw / folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    for path in (raw / "clips.tar", raw / "mixed" / "a.tar"):
        with tarfile.open(path, "w") as tar:
            for part in sorted((raw / "folder").iterdir()):
                tar.add(part, part.name)
    lines = [f"folder/{name},caption of {name}" for name in NAMES]
    (raw / "list.csv").write_text("\n".join(["path,caption", *lines]) + "\n")
    (raw / "labels.csv").write_text("path,label\nfolder/a.mp4,7\n")
    (raw / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(50)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    write_source(root / "clips" / "raw", video_file(grey_frames(range(40, 240, 20))))
    with serve_s3(root) as running:
        yield running


def healthy(number: int) -> Trouble:
    return Trouble.NONE


def for_path(*parts: str, trouble: Trouble, book: ProxyBook) -> Callable[[int], Trouble]:
    """Trouble for the source's objects whose path holds one of some words; sets are written."""
    return lambda number: (
        trouble
        if "/raw/" in book.current and any(part in book.current for part in parts)
        else Trouble.NONE
    )


def unserved(folder: Path, reason: str = "unserved") -> dict[str, str]:
    rows = pq.read_table(folder / "quarantine.parquet").to_pylist()
    return {row["sample_id"]: row["detail"] for row in rows if row["reason"] == reason}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "clips.tar", "list.csv", "prompts.txt"])
def test_a_busy_server_changes_nothing_in_what_prepare_and_check_make(
    through: Callable[..., ProxyBook],
    server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def made(place: str) -> tuple[object, ...]:
        report = prepare(f"s3://clips/raw/{name}", f"s3://clips/{place}", HERE)
        checked = check_shards(f"s3://clips/{place}", CheckOptions(num_processes=0))
        folder = server.root / "clips" / place
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "_"}
        facts = asdict(checked)
        facts.pop("folder", None)
        told = [] if name in ("folder", "clips.tar") else read_prompts(f"s3://clips/raw/{name}")
        return report.num_clips, report.rejected, files, str(facts).replace(place, "SET"), told

    through(healthy)
    calm = made(f"calm-{name}")
    assert calm[:2] == (50 if name == "prompts.txt" else 3, {})
    book = through(every(3, *TROUBLES))
    assert made(f"busy-{name}") == calm
    assert all(book.troubles.get(trouble, 0) >= 2 for trouble in TROUBLES), book.troubles
    if calm[-1]:
        opened = open_set(f"s3://clips/raw/{name}")
        index = read_index(opened.filesystem, opened.root)
        assert sum(shard.num_rows for shard in index or ()) == calm[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bad", "num_processes"),
    [
        ("folder", "a.mp4", 0),
        ("folder", "a.txt", 0),
        ("list.csv", "a.mp4", 0),
        ("mixed", "a.tar", 0),
        pytest.param("folder", "a.mp4", 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("forked_libraries")
def test_one_object_that_is_refused_is_one_rejected_clip(
    through: Callable[..., ProxyBook], tmp_path: Path, name: str, bad: str, num_processes: int
) -> None:
    """It comes first, so nothing was read when it fails."""
    book = through(healthy)
    book.plan = for_path(bad, trouble=Trouble.DENIED, book=book)
    options = replace(HERE, num_processes=num_processes)
    report = prepare(f"s3://clips/raw/{name}", str(tmp_path), options)
    is_tar = bad.endswith(".tar")
    reason = "unreadable_archive" if is_tar else "unserved"
    assert report.rejected == {reason: 1}
    assert report.num_clips == (3 if is_tar else 2)
    assert len(report.unread) == is_tar
    (detail,) = unserved(tmp_path, reason).values()
    assert detail.startswith("cannot be read, while other files can: PermissionError")
    assert book.troubles[Trouble.DENIED] >= 1


@pytest.mark.slow
def test_one_object_that_is_never_answered_is_one_rejected_clip_within_its_budget(
    through: Callable[..., ProxyBook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = through(healthy, stall_s=60.0)
    book.plan = for_path("b.mp4", trouble=Trouble.SILENCE, book=book)
    options = replace(HERE, s3=S3Settings(read_budget_s=4.0))
    started = time.monotonic()
    report = prepare("s3://clips/raw/folder", str(tmp_path), options)
    assert (report.num_clips, report.rejected) == (2, {"unserved": 1})
    assert time.monotonic() - started < 50.0
    assert any("raw/folder/b.mp4" in one.getMessage() for one in caplog.records)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [(Trouble.DENIED, "AWS_ACCESS_KEY_ID"), (Trouble.INTERNAL, "not overloaded or failing")],
)
def test_a_server_that_serves_no_video_stops_the_command_and_rejects_nothing(
    through: Callable[..., ProxyBook], tmp_path: Path, trouble: Trouble, words: str
) -> None:
    book = through(healthy)
    book.plan = for_path(".mp4", trouble=trouble, book=book)
    with pytest.raises(DataError, match=words):
        prepare("s3://clips/raw/folder", str(tmp_path), HERE)
    assert not (tmp_path / "quarantine.parquet").exists()
    book.plan = healthy
    assert prepare("s3://clips/raw/folder", str(tmp_path), HERE).num_clips == 3


def test_a_local_video_that_leads_nowhere_is_one_rejected_clip(
    server: S3Server, tmp_path: Path
) -> None:
    """A link to itself: the system refuses to open it, whoever asks."""
    source = tmp_path / "source"
    source.mkdir()
    for name in NAMES:
        (source / name).write_bytes((server.root / "clips" / "raw" / "folder" / name).read_bytes())
        (source / name).with_suffix(".txt").write_text("caption")
    (source / "a.mp4").unlink()
    (source / "a.mp4").symlink_to("a.mp4")
    report = prepare(str(source), str(tmp_path / "set"), HERE)
    assert (report.num_clips, report.rejected) == (2, {"missing_video": 1})


@pytest.mark.slow
def test_a_clip_whose_decoder_hangs_is_rejected(server: S3Server, tmp_path: Path) -> None:
    """Every call of the decoder takes longer than the limit of the second run."""
    source = tmp_path / "source"
    source.mkdir()
    video = (server.root / "clips" / "raw" / "folder" / "a.mp4").read_bytes()
    options = replace(HERE, num_processes=1)
    for name, max_hang_s in (("a.mp4", 60.0), ("b.mp4", 1e-6)):
        (source / name).write_bytes(video)
        (source / name).with_suffix(".txt").write_text("caption")
        limited = replace(options, max_hang_s=max_hang_s)
        report = prepare(str(source), str(tmp_path / "set"), limited)
    assert (report.num_clips, report.rejected) == (1, {"too_slow": 1})
    (row,) = pq.read_table(tmp_path / "set" / "quarantine.parquet").to_pylist()
    assert "--max-hang-seconds" in row["detail"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder/a.mp4", "a file that is neither a Parquet shard nor a list of captions.*prepare"),
        ("clips.tar", "a file that is neither a Parquet shard nor a list of captions.*prepare"),
        ("labels.csv", "the columns path, label; no column caption, prompt or text"),
        ("folder", r"no \.parquet file among the 6 there, such as a\.mp4.*prepare"),
        ("nowhere", "no such folder, or no file in it.*Check the address"),
    ],
)
def test_what_is_no_set_on_s3_is_refused_by_what_it_is(
    through: Callable[..., ProxyBook], tmp_path: Path, name: str, words: str
) -> None:
    through(healthy)
    url, model = f"s3://clips/raw/{name}", Path(__file__).parents[4] / "assets" / "tiny-wan"
    for work in (
        lambda: check_shards(url, CheckOptions(num_processes=0)),
        lambda: encode(url, str(tmp_path), str(model), EncodeOptions(ClipFormat(5, 32, 32, 8))),
        lambda: inspect_folder(Source(url), 0, ShuffleSettings()),
    ):
        with pytest.raises(DataError, match=words):
            work()
    assert not [*tmp_path.iterdir()]
