"""A server that is slow, busy or breaks off costs time and no sample; one that is gone is told."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.index import read_index, write_index
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.reading import Fault, Range, fetch, fetch_file
from pipelines.data.shards.schema import parquet_options, video_schema
from pipelines.data.shards.shard_writing import write_file
from pipelines.data.stream.batch import Batch
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings
from pipelines.data.stream.source import Source
from sgmd_core.errors import DataError
from tests.helpers.faulty_proxy import ProxyBook, Trouble, every, serve_faulty
from tests.helpers.forked_python import forked_python
from tests.helpers.s3_server import S3Access, S3Server, free_port, serve_s3, use_server
from tests.helpers.shards import write_folder

SIZES = (7, 7, 5, 12, 9)
SMALL = ShuffleSettings(shards=2, row_groups=2)
# Waits are short here; how often is tried again is what ships.
PATIENT = S3Settings(read_timeout_s=0.5, connect_timeout_s=1.0, backoff_s=0.05)
ALL_TROUBLES = (
    Trouble.SLOW_DOWN,
    Trouble.RESET,
    Trouble.INTERNAL,
    Trouble.DRIBBLE,
)


def write_videos(folder: Path) -> None:
    """One shard of eight rows and 8 MiB, nearly all of it video."""
    folder.mkdir(parents=True)
    schema = video_schema()
    columns = {"sample_id": [str(row) for row in range(8)], "caption": ["c"] * 8}
    columns |= {"video": [bytes([row]) * 2**20 for row in range(8)], "fps": [8.0] * 8}
    table = pa.table(columns, schema=schema)
    pq.write_table(table, folder / "one.parquet", row_group_size=4, **parquet_options(schema))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_access: S3Access) -> Iterator[S3Server]:
    """With the keys of Ray's processes, but not at their address: a proxy may stand there."""
    root = tmp_path_factory.mktemp("s3")
    write_folder(root / "clips" / "set", SIZES)
    write_videos(root / "clips" / "large")
    write_folder(root / "clips" / "lone", (5,))
    for name in ("_index.json", "quarantine.parquet"):
        (root / "clips" / "lone" / name).write_bytes(b"{}")
    (root / "clips" / "many").mkdir()
    for number in range(2100):
        (root / "clips" / "many" / f"{number:05d}.parquet").write_bytes(b"x")
    with serve_s3(root, replace(s3_access, port=free_port())) as running:
        yield running


def healthy(number: int) -> Trouble:
    return Trouble.NONE


def feed(s3: S3Settings = PATIENT, ahead: ReadAheadSettings | None = None) -> Feed:
    settings = StreamSettings(Source("s3://clips/set", s3), 0, SMALL, ahead=ahead)
    return Feed(settings, FeedProgress(), 2 * sum(SIZES))


def epoch(stream: Feed) -> list[Batch]:
    return [stream.take(8) for _ in range(sum(SIZES) // 8)]


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_busy_breaking_and_slow_servers_cost_no_sample(
    through: Callable[..., ProxyBook], native: bool
) -> None:
    through(healthy)
    expected = ids(epoch(feed()))
    book = through(every(3, *ALL_TROUBLES))
    batches = epoch(feed(replace(PATIENT, native_reads=native)))
    assert ids(batches) == expected
    assert len(set(expected)) == sum(SIZES)
    assert not any(batch.rejects for batch in batches)
    assert all(book.troubles.get(trouble, 0) >= 1 for trouble in ALL_TROUBLES)


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_a_server_that_falls_silent_is_asked_again(
    through: Callable[..., ProxyBook], native: bool
) -> None:
    through(healthy)
    expected = ids(epoch(feed()))
    # The first requests probe and list; then one in ten falls silent for longer than we wait.
    # Arrow's client gives such an answer up after three seconds, whatever the settings say.
    stall_s = 5.0 if native else 2.0
    book = through(lambda number: Trouble.STALL if number % 10 == 9 else Trouble.NONE, stall_s)
    batches = epoch(feed(replace(PATIENT, native_reads=native)))
    assert ids(batches) == expected
    assert book.troubles[Trouble.STALL] >= 1
    assert not any(batch.rejects for batch in batches)


@pytest.mark.slow
def test_a_server_that_is_gone_stops_the_run_and_quarantines_nothing(
    through: Callable[..., ProxyBook],
) -> None:
    book = through(healthy)
    impatient = S3Settings(max_attempts=1, read_attempts=2, backoff_s=0.01)
    stream = feed(impatient)
    first = stream.take(8)
    book.plan = lambda number: Trouble.INTERNAL
    with pytest.raises(DataError, match=r"clips/set/part-\d+\.parquet \(try 2\)") as caught:
        stream.take(sum(SIZES))
    assert "overloaded or failing" in str(caught.value)
    assert first.rejects == ()


@pytest.mark.parametrize("trouble", [Trouble.INTERNAL, Trouble.STALL])
@pytest.mark.slow
def test_one_object_that_is_not_served_is_a_fault_within_its_budget(
    through: Callable[..., ProxyBook], trouble: Trouble
) -> None:
    book = through(healthy)
    quick = S3Settings(max_attempts=2, read_attempts=2, read_budget_s=1.5, backoff_s=0.01)
    filesystem, root = open_folder("s3://clips/set", quick)
    book.plan = lambda number: trouble if "part-001" in book.current else Trouble.NONE
    names = [f"{root}/part-{number:03d}.parquet" for number in range(3)]
    found = fetch(filesystem, [Range(name, 0, 50) for name in names], quick)
    assert [type(one) for one in found] == [bytes, Fault, bytes]
    assert isinstance(found[1], Fault)
    assert found[1].is_unanswered
    assert 1 <= book.troubles[trouble] <= quick.max_attempts * quick.read_attempts
    book.plan = lambda number: trouble
    with pytest.raises(DataError, match=r"part-001\.parquet \(try"):
        fetch(filesystem, [Range(names[1], 0, 50)], quick)


@pytest.mark.slow
def test_the_first_object_that_is_read_and_not_served_is_a_fault_if_those_beside_it_are(
    through: Callable[..., ProxyBook],
) -> None:
    """A process that begins with it has read nothing that could show that the server answers."""
    book = through(healthy)
    quick = S3Settings(max_attempts=1, read_attempts=1, backoff_s=0.01)
    filesystem, root = open_folder("s3://clips/set", quick)
    wanted = [Range(f"{root}/part-000.parquet", 0, 50)]
    book.plan = lambda number: Trouble.DENIED if "part-" in book.current else Trouble.NONE
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        fetch(filesystem, wanted, quick)
    book.plan = lambda number: Trouble.DENIED if "part-000" in book.current else Trouble.NONE
    (found,) = fetch(filesystem, wanted, quick)
    assert isinstance(found, Fault)
    assert found.is_unanswered


@pytest.mark.slow
def test_files_that_we_write_beside_the_data_do_not_show_that_the_data_is_served(
    through: Callable[..., ProxyBook],
) -> None:
    book = through(healthy)
    quick = S3Settings(max_attempts=1, read_attempts=1, backoff_s=0.01)
    filesystem, root = open_folder("s3://clips/lone", quick)
    book.plan = lambda number: Trouble.DENIED if "part-" in book.current else Trouble.NONE
    assert fetch_file(filesystem, f"{root}/_index.json", quick) == b"{}"
    with pytest.raises(DataError, match="AWS_ACCESS_KEY_ID"):
        fetch(filesystem, [Range(f"{root}/part-000.parquet", 0, 50)], quick)


@pytest.mark.slow
def test_an_index_whose_answer_breaks_off_is_asked_for_again(
    through: Callable[..., ProxyBook],
) -> None:
    book = through(healthy)
    filesystem, root = open_folder("s3://clips/set", PATIENT)
    shards = tuple(shard for chapter in list_chapters(filesystem, root, 9) for shard in chapter)
    named = [replace(shard, rows=(size,)) for shard, size in zip(shards, SIZES, strict=True)]
    write_index(filesystem, "clips/indexed", named)
    breaks = [Trouble.RESET, Trouble.INTERNAL, Trouble.RESET]
    book.plan = lambda number: breaks.pop() if breaks else Trouble.NONE
    assert read_index(filesystem, "clips/indexed", PATIENT) == tuple(named)
    assert book.troubles[Trouble.RESET] == 2
    assert read_index(filesystem, root, PATIENT) is None
    book.plan = lambda number: Trouble.RESET
    with pytest.raises(DataError, match=r"_index\.json \(try 4\)") as raised:
        read_index(filesystem, "clips/indexed", PATIENT)
    assert "a server that answers" in str(raised.value)


@pytest.mark.slow
def test_folder_markers_are_no_shards(
    through: Callable[..., ProxyBook], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    S3FileSystem.clear_instance_cache()
    try:
        client = S3FileSystem(skip_instance_cache=True)
        client.mkdir("marked")
        for key in ("set/", "set/deep/", "set/deep/a.parquet"):
            client.call_s3("put_object", Bucket="marked", Key=key, Body=b"x" * ("." in key))
        (chapter,) = list_chapters(*open_folder("s3://marked/set"), 10)
    finally:
        moto.stop()
    assert [shard.path for shard in chapter] == ["deep/a.parquet"]


@pytest.mark.slow
def test_the_first_batch_comes_before_the_listing_ends(through: Callable[..., ProxyBook]) -> None:
    book = through(healthy)
    filesystem, root = open_folder("s3://clips/many")
    catalogue = Catalogue(filesystem, root, chapter_shards=500)
    first = catalogue.chapter(0)
    assert first is not None
    assert [len(first), first[0].path, first[-1].path] == [500, "00000.parquet", "00499.parquet"]
    # One to probe, one for the first thousand paths, and what s3fs asks about a missing index.
    before = book.lists()
    assert before <= 3
    assert catalogue.num_chapters() == 5
    assert book.lists() == before + 2


@pytest.mark.slow
def test_listing_goes_on_after_any_path(through: Callable[..., ProxyBook]) -> None:
    through(healthy)
    filesystem, root = open_folder("s3://clips/many")
    listed = [shard for chapter in list_chapters(filesystem, root, 1000) for shard in chapter]
    assert [shard.path for shard in listed] == [f"{number:05d}.parquet" for number in range(2100)]
    assert {shard.num_bytes for shard in listed} == {1}
    rest = [
        shard
        for chapter in list_chapters(filesystem, root, 1000, after="01049.parquet")
        for shard in chapter
    ]
    assert rest == listed[1050:]


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_captions_of_a_large_shard_do_not_fetch_its_videos(
    through: Callable[..., ProxyBook], native: bool
) -> None:
    book = through(healthy)
    settings = StreamSettings(Source("s3://clips/large", S3Settings(native_reads=native)), 0)
    assert len(set(Feed(settings, FeedProgress(), 8).take(8).sample_ids)) == 8
    assert 0 < book.sent < 600_000


@pytest.mark.slow
def test_a_large_shard_is_written_in_parts_and_a_part_that_fails_again(
    through: Callable[..., ProxyBook], server: S3Server
) -> None:
    book = through(healthy)
    filesystem, _ = open_folder("s3://clips/set")
    book.plan = every(2, Trouble.SLOW_DOWN, Trouble.INTERNAL)
    data = bytes(range(256)) * (33 * 2**12)
    write_file(filesystem, "clips/large/written.bin", data)
    assert (server.root / "clips" / "large" / "written.bin").read_bytes() == data
    parts = [path for method, path in book.requests if method == "PUT" and "partNumber" in path]
    assert len({path.split("partNumber=")[1].split("&")[0] for path in parts}) == 3
    assert len(parts) > 3


@pytest.mark.slow
def test_moto_lists_and_reads_alike(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    endpoint = {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    use_server(server.environment | endpoint, monkeypatch)
    try:
        filesystem = S3FileSystem(skip_instance_cache=True)
        filesystem.mkdir("clips")
        filesystem.put(str(server.root / "clips" / "set") + "/", "clips/set/", recursive=True)
        remote = ids(epoch(feed()))
    finally:
        moto.stop()
    local = Feed(
        StreamSettings(Source(str(Path(server.root) / "clips" / "set")), 0, SMALL),
        FeedProgress(),
        80,
    )
    assert remote == ids(epoch(local))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_hands_out_the_same_rows_through_the_same_troubles(
    through: Callable[..., ProxyBook], server: S3Server, s3_access: S3Access, monkeypatch
) -> None:
    """Closed in the middle of what is read ahead, and Ray goes on."""
    through(healthy)
    expected = ids(epoch(feed()))
    with serve_faulty(
        server.environment["AWS_ENDPOINT_URL"], every(4, *ALL_TROUBLES), port=s3_access.port
    ) as book:
        monkeypatch.setenv("AWS_ENDPOINT_URL", book.endpoint)
        S3FileSystem.clear_instance_cache()
        with feed(ahead=ReadAheadSettings()) as stream:
            batches = epoch(stream)
    assert not any(batch.rejects for batch in batches)
    assert ids(batches) == expected
    assert all(book.troubles.get(trouble, 0) >= 1 for trouble in ALL_TROUBLES)


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_a_process_ends_in_the_middle_of_reading_from_s3(
    through: Callable[..., ProxyBook], native: bool
) -> None:
    """Once a batch is there, the next window is under way, and its answer comes slowly."""
    through(lambda number: Trouble.DRIBBLE)
    script = (
        "import sys\n"
        "from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings\n"
        "from pipelines.data.shards.filesystem import S3Settings\n"
        "from pipelines.data.stream.plan import ShuffleSettings\n"
        "from pipelines.data.stream.source import Source\n"
        f"source = Source('s3://clips/set', S3Settings(native_reads={native}))\n"
        "shuffle = ShuffleSettings(shards=2, row_groups=1)\n"
        "feed = Feed(StreamSettings(source, 0, shuffle), FeedProgress(), 10_000)\n"
        "print(len(feed.take(1).captions))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_process_ends_although_it_has_not_closed_its_feeds(tmp_path: Path) -> None:
    """One that processes of Ray Data read ahead for, and one that a thread does."""
    write_folder(tmp_path / "set", (9,) * 8)
    script = (
        "import sys\n"
        "from cluster.runtime import start_ray\n"
        "from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings\n"
        "from pipelines.data.stream.plan import ShuffleSettings\n"
        "from pipelines.data.stream.ray_stream import ReadAheadSettings\n"
        "from pipelines.data.stream.source import Source\n"
        # The process is an interpreter of its own, those of its cluster need not be.
        "sys.executable = sys.argv[2]\n"
        "ray = start_ray(num_cpus=2, object_store_memory=100 * 2**20)\n"
        "ray.__enter__()\n"
        "shuffle = ShuffleSettings(shards=2, row_groups=2)\n"
        "feeds = []\n"
        "for readers in (2, 0):\n"
        "    ahead = ReadAheadSettings(readers=readers)\n"
        "    settings = StreamSettings(Source(sys.argv[1]), 0, shuffle, ahead=ahead)\n"
        "    feeds.append(Feed(settings, FeedProgress(), 10_000))\n"
        "    print(f'{readers} readers:', len(feeds[-1].take(50).captions))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "set"), forked_python()]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Under load a raylet may have something to say there, too.
    assert {"2 readers: 50", "0 readers: 50"} <= {*done.stdout.splitlines()}
