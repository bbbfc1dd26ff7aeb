"""`evaluate`: every way of sampling measured alike, remembered, and judged by fixed criteria."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from pipelines.commands.evaluation_table import legend, table, verdict_lines
from pipelines.config.recipe import load_recipe
from pipelines.evaluation.plan import plan_evaluation, sampling_precision
from pipelines.evaluation.result import (
    GENERATOR,
    CriterionResult,
    Evaluation,
    EvaluationRow,
    Figure,
    evaluate_criteria,
)
from pipelines.evaluation.run import EVALUATION_FILE, EvaluationOptions, evaluate
from pipelines.media.inference import (
    InferenceSettings,
    read_inference_settings,
    write_inference_settings,
)
from pipelines.run.folder import RunFolder
from pipelines.shapes import ClipSplit, captions
from sgmd_core.errors import CheckpointError, ConfigError, DataError, ModelFolderError
from tests.helpers.tiny_wan import HEIGHT, NUM_FRAMES, TEXT_LENGTH, WIDTH, write_tiny_wan
from tests.workers.test_measures import thin_i3d
from workers.evaluator import TOKENS_SIDE_BY_SIDE, Evaluator
from workers.kept_clips import clip_facts
from workers.measures import CLIP_MEASURES, MOTION_MEASURES
from workers.models.content import model_digests
from workers.models.families import family_of
from workers.models.weight_digests import write_model_settings
from workers.samplings import FLOOR, REFERENCE, TEACHER_FEW

CAPTIONS = captions(ClipSplit.HELD_OUT)[:4]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
OPTIONS = EvaluationOptions(
    num_captions=8,
    batch_size=8,
    teacher_steps=3,
    guidance_scale=2.0,
    num_bootstraps=5,
    num_shown=2,
    num_threads=1,
)


def write_captions(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True)
    rows = {"sample_id": [str(index) for index in range(len(texts))], "caption": texts}
    pq.write_table(pa.table(rows), folder / "a.parquet")
    return str(folder)


def write_model(folder: Path, num_steps: int, seed: int) -> Path:
    write_tiny_wan(folder, WORDS, seed)
    settings = InferenceSettings(
        num_steps=num_steps,
        guidance_scale=1.0,
        flow_shift=5.0,
        text_length=TEXT_LENGTH,
        num_frames=NUM_FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=8,
    )
    write_inference_settings(folder, settings)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher, a generator and captions."""
    root = tmp_path_factory.mktemp("evaluate")
    write_model(root / "teacher", 3, seed=0)
    write_model(root / "generator", 2, seed=1)
    write_captions(root / "captions", CAPTIONS * 2)
    return root


@pytest.fixture(scope="module")
def evaluation(place) -> Evaluation:
    return run_evaluation(place, place / "result")


def run_evaluation(place: Path, output: Path, cache: Path | None = None, **changes) -> Evaluation:
    return evaluate(
        place / "generator",
        teacher=place / "teacher",
        captions=str(place / "captions"),
        output=output,
        cache=cache,
        options=replace(OPTIONS, **changes),
    )


@pytest.mark.slow
def test_fewer_clips_side_by_side_than_asked_for_are_told_and_recorded(place, evaluation, caplog):
    assert evaluation.batch_size == OPTIONS.batch_size
    subject = family_of(place / "generator").read_shape(place / "generator")
    latents = subject.geometry.latent_shape(NUM_FRAMES, HEIGHT, WIDTH)
    fewer = TOKENS_SIDE_BY_SIDE // subject.denoiser.num_tokens(latents)
    found = run_evaluation(place, place / "large batches", batch_size=fewer + 1)
    assert found.batch_size == fewer > (OPTIONS.num_captions or 0)
    assert f"{fewer} are sampled side by side, not {fewer + 1}" in caplog.text
    assert f"a clip at batch {fewer}," in legend(found)


def row(name: str, **figures) -> EvaluationRow:
    facts = {"label": name, "num_steps": 4, "guidance_scale": 1.0, "seed": 1}
    return EvaluationRow(name=name, seconds_per_clip=1.0, remembered=False, **facts, **figures)


def verdicts(generator: EvaluationRow, baseline_error: float = 0.1) -> list[bool | None]:
    baseline = row(TEACHER_FEW, above_floor=Figure(value=2.0, error=baseline_error))
    return [verdict.passed for verdict in evaluate_criteria([row(FLOOR), baseline, generator])]


def good_generator(**changes) -> EvaluationRow:
    figures = {
        "colour": 0.95,
        "direction": 0.9,
        "speed_ratio": 0.91,
        "above_floor": Figure(value=1.0, error=0.1),
        "ratio": Figure(value=0.5, error=0.05),
    }
    return row(GENERATOR, **{**figures, **changes})


@pytest.mark.parametrize("name", ["samples", "evaluation-cache", "evaluation-cache/a.npz.lease"])
def test_links_in_the_folder_of_the_results_lead_nothing_out_of_it(place, tmp_path, name):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "result" / name
    elsewhere.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    option = "--cache" if "cache" in name else "--output"
    with pytest.raises(ConfigError, match=f"a link that leads to {elsewhere}.*{option}"):
        run_evaluation(place, tmp_path / "result")
    assert list(elsewhere.iterdir()) == []


class TestRows:
    @pytest.mark.slow
    def test_every_way_of_sampling_has_a_row_with_its_steps_guidance_and_seed(self, evaluation):
        ways = [(row.num_steps, row.guidance_scale, row.seed) for row in evaluation.rows]
        assert ways == [(3, 2.0, 0), (3, 2.0, 1), (2, 1.0, 1), (2, 2.0, 1), (2, 1.0, 1)]

    @pytest.mark.slow
    def test_every_row_is_measured(self, evaluation):
        for found in evaluation.rows:
            assert 0 <= found.colour <= 1
            assert 0 <= found.direction <= 1
            assert -1 <= found.speed_spearman <= 1
            assert found.seconds_per_clip > 0
            assert (found.frechet is None) == (found.name == REFERENCE)
        assert evaluation.row(REFERENCE).speed_ratio == 1
        assert evaluation.row(TEACHER_FEW).ratio.value == 1
        assert evaluation.row(FLOOR).above_floor.value == 0

    @pytest.mark.slow
    def test_the_floor_is_above_zero_and_the_generator_is_not_its_teacher(self, evaluation):
        floor, generator = evaluation.row(FLOOR).frechet, evaluation.row(GENERATOR).frechet
        few = evaluation.row(TEACHER_FEW).frechet
        assert floor.value > 0
        assert generator.value != few.value

    @pytest.mark.slow
    def test_a_generator_that_is_its_teacher_has_its_teachers_distance(self, place, tmp_path):
        shutil.copytree(place / "teacher", place / "same")
        found = evaluate(
            place / "same",
            teacher=place / "teacher",
            captions=str(place / "captions"),
            output=tmp_path,
            options=OPTIONS,
        )
        assert found.row(GENERATOR).frechet == found.row(TEACHER_FEW).frechet

    @pytest.mark.slow
    def test_captions_of_another_world_leave_the_exact_columns_out(self, place, tmp_path):
        other = write_captions(tmp_path / "captions", ["a cat on a sofa", *CAPTIONS[:3]] * 2)
        found = evaluate(
            place / "generator",
            teacher=place / "teacher",
            captions=other,
            output=tmp_path / "result",
            options=OPTIONS,
        )
        assert {row.colour for row in found.rows} == {None}
        assert len(found.verdicts) == 1
        assert "colour" not in printed(found)

    @pytest.mark.slow
    def test_clips_of_the_open_world_are_read_by_its_rules(self, place, tmp_path):
        texts = ["a red circle", "a red circle and a blue bar"]
        open_captions = write_captions(tmp_path / "captions", texts * 4)
        found = evaluate(
            place / "generator",
            teacher=place / "teacher",
            captions=open_captions,
            output=tmp_path / "result",
            options=OPTIONS,
        )
        assert Evaluation.load(tmp_path / "result" / "evaluation.json") == found
        for each in found.rows:
            # No caption says a direction, and none has a speed to correlate with.
            assert (each.direction, each.speed_spearman) == (None, None)
            assert each.colour is not None
            assert 0 <= each.colour <= 1
        generator, floor = found.row(GENERATOR).measures, found.row(FLOOR).measures
        texture = generator["texture_distance"]
        assert texture.low <= texture.value <= texture.high
        assert texture.ratio is not None
        assert texture.ratio.value == pytest.approx(texture.value / floor["texture_distance"].value)
        assert "texture distance" in printed(found)


class TestMeasures:
    def test_every_row_has_every_measure_with_its_interval(self, evaluation):
        names = {*CLIP_MEASURES, "colour", "shape", "direction", "mean_speed_px_per_frame"}
        for found in evaluation.rows:
            of_sets = MOTION_MEASURES.keys() - {"texture_distance"}
            others = set() if found.name == REFERENCE else of_sets
            assert found.measures.keys() == names | {"diversity", "seconds_per_clip"} | others
            for measure in found.measures.values():
                assert measure.low <= measure.value <= measure.high
            assert found.measures["colour"].value == pytest.approx(found.colour)
            assert found.measures["diversity"].value > 0
            assert found.measures["seconds_per_clip"].value == found.seconds_per_clip

    def test_ratios_are_to_the_teacher_on_the_same_noise_and_the_teacher_has_none(self, evaluation):
        teacher, generator = evaluation.row(FLOOR), evaluation.row(GENERATOR)
        for row in (evaluation.row(REFERENCE), teacher):
            assert not any(measure.ratio for measure in row.measures.values())
        for name in ("flow", "saturation", "sharpness", "diversity"):
            own, theirs = generator.measures[name], teacher.measures[name]
            assert own.ratio.value == pytest.approx(own.value / theirs.value)
            assert own.ratio.low <= own.ratio.value <= own.ratio.high

    @pytest.mark.slow
    def test_a_generator_that_is_its_teacher_has_its_measures(self, place, tmp_path):
        # As many steps, and guided like it.
        folder = tmp_path / "same"
        shutil.copytree(place / "teacher", folder)
        settings = read_inference_settings(folder)
        write_inference_settings(folder, settings.model_copy(update={"guidance_scale": 2.0}))
        found = evaluate(
            folder,
            teacher=place / "teacher",
            captions=str(place / "captions"),
            output=tmp_path / "result",
            options=OPTIONS,
        ).row(GENERATOR)
        for name in CLIP_MEASURES:
            ratio = found.measures[name].ratio
            assert ratio is None or (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
        diversity = found.measures["diversity"].ratio
        assert diversity is not None
        assert (diversity.value, diversity.low, diversity.high) == (1, 1, 1)

    @pytest.mark.slow
    def test_a_network_from_a_file_describes_clips_for_distance_and_diversity(
        self, evaluation, place, tmp_path
    ):
        path = thin_i3d(tmp_path)
        found = run_evaluation(place, tmp_path / "result", features=path)
        assert found.features == str(path)
        assert "features of" in printed(found)
        own, usual = found.row(GENERATOR), evaluation.row(GENERATOR)
        assert own.frechet is not None
        assert usual.frechet is not None
        assert own.frechet.value != usual.frechet.value
        assert own.measures["diversity"] != usual.measures["diversity"]
        assert own.measures["flow"] == usual.measures["flow"]

    @pytest.mark.slow
    def test_generators_share_their_teacher_also_elsewhere_and_other_weights_are_another(
        self, place, tmp_path
    ):
        moved, cache = tmp_path / "place", tmp_path / "cache"
        first = run_evaluation(place, tmp_path / "first", cache=cache)
        assert not any(row.remembered for row in first.rows)
        assert not (tmp_path / "first" / "evaluation-cache").exists()
        shutil.copytree(place, moved, ignore=shutil.ignore_patterns("result"))
        (moved / "teacher" / "README.md").write_text("Decides no clip.")
        again = run_evaluation(moved, tmp_path / "second", cache=cache)
        assert [row.remembered for row in again.rows] == [True] * 4 + [False]
        (weights,) = (moved / "teacher" / "transformer").glob("*.safetensors")
        save_file({name: 1.05 * value for name, value in load_file(weights).items()}, weights)
        with pytest.raises(ModelFolderError, match="SHA-256"):
            run_evaluation(moved, tmp_path / "third", cache=cache)
        settings = json.loads((moved / "teacher" / "sgmd.json").read_text())
        settings.pop("sha256")
        write_model_settings(moved / "teacher", settings)
        other = run_evaluation(moved, tmp_path / "third", cache=cache)
        assert not any(row.remembered for row in other.rows)


class TestFiles:
    def test_the_result_is_read_back_from_its_file(self, evaluation, place):
        path = place / "result" / EVALUATION_FILE
        assert Evaluation.load(path) == evaluation
        assert json.loads(path.read_text())["num_distinct_captions"] == len(CAPTIONS)

    def test_the_contact_sheet_is_there_as_a_still_and_as_a_loop(self, evaluation, place):
        for name, form in ((evaluation.sheet_png, "PNG"), (evaluation.sheet_gif, "GIF")):
            with Image.open(place / "result" / name) as sheet:
                assert sheet.format == form

    @pytest.mark.slow
    def test_the_teacher_is_sampled_once_and_the_generator_every_time(self, evaluation, place):
        again = run_evaluation(place, place / "result")
        assert [row.remembered for row in again.rows] == [True] * 4 + [False]
        # Seconds of another command are not a measure of this machine.
        seconds = [row.measures["seconds_per_clip"].ratio for row in again.rows]
        assert seconds == [None] * 5
        timed = {"seconds_per_clip": True, "remembered": True, "measures": {"seconds_per_clip"}}
        figures = [row.model_dump(exclude=timed) for row in again.rows]
        assert figures == [row.model_dump(exclude=timed) for row in evaluation.rows]

    @pytest.mark.slow
    def test_only_one_model_is_in_memory_at_a_time(self, place, tmp_path, monkeypatch):
        alive: dict[str, int] = {}
        models: WeakSet[Evaluator] = WeakSet()
        make = Evaluator.__init__

        def made(model: Evaluator, *settings: Any, **named: Any) -> None:
            models.add(model)
            make(model, *settings, **named)

        def count(label: str, done: int, total: int) -> None:
            alive[label] = len(models)

        monkeypatch.setattr(Evaluator, "__init__", made)

        evaluate(
            place / "generator",
            teacher=place / "teacher",
            captions=str(place / "captions"),
            output=tmp_path,
            options=OPTIONS,
            on_progress=count,
        )
        sampled = {label: number for label, number in alive.items() if "steps" in label}
        assert {label.split(",")[0] for label in sampled} == {"teacher", "generator"}
        assert set(sampled.values()) == {1}

    @pytest.mark.slow
    def test_denoisers_are_sampled_in_the_type_of_a_gpu_only_there(self, place):
        subject = plan_evaluation(
            place / "generator", place / "teacher", str(place / "captions"), None, None, OPTIONS
        ).teacher
        assert subject.precision == sampling_precision(None)
        assert subject.precision == ("bf16" if torch.cuda.is_available() else "fp32")
        plain, narrow = (replace(subject, precision=precision) for precision in ("fp32", "bf16"))
        # Clips that were kept by earlier versions keep their names.
        assert plain.facts == clip_facts(subject.model, subject.video, subject.schedule)
        assert narrow.facts != plain.facts
        kinds = {
            precision: {value.dtype for value in one.evaluator(OPTIONS)._network.parameters()}
            for precision, one in (("fp32", plain), ("bf16", narrow))
        }
        assert kinds["fp32"] == {torch.float32}
        # Norms and the embedding of time stay wide, as in any bf16 folder.
        assert kinds["bf16"] == {torch.bfloat16, torch.float32}

    @pytest.mark.slow
    def test_another_seed_or_another_teacher_is_sampled_anew(self, evaluation, place, tmp_path):
        # In two batches a set.
        again = run_evaluation(place, place / "result", seed=7, batch_size=4)
        assert again.batch_size == 4
        assert not any(row.remembered for row in again.rows)
        other = evaluate(
            place / "generator",
            teacher=write_model(tmp_path / "teacher", 3, seed=2),
            captions=str(place / "captions"),
            output=place / "result",
            options=OPTIONS,
        )
        assert not any(row.remembered for row in other.rows)

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        (tmp_path / EVALUATION_FILE).write_text("{}")
        with pytest.raises(CheckpointError, match="fields"):
            Evaluation.load(tmp_path / EVALUATION_FILE)


class TestRuns:
    @pytest.mark.slow
    def test_a_run_knows_its_teacher_its_captions_and_its_guidance(self, place, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(place / "generator", run / "generator")
        config = load_recipe(
            "tiny",
            [
                f"model.folder={place / 'teacher'}",
                f"model.text_length={TEXT_LENGTH}",
                f"data.validation={place / 'captions'}",
                f"video={{num_frames: {NUM_FRAMES}, height: {HEIGHT}, width: {WIDTH}, fps: 8}}",
                "teacher.guidance_scale=4.0",
                "validation.teacher_steps=2",
            ],
        )
        (run / "config.yaml").write_text(config.to_yaml())
        options = replace(OPTIONS, teacher_steps=None, guidance_scale=None)
        found = evaluate(run, options=options)
        assert (found.rows[0].num_steps, found.rows[0].guidance_scale) == (2, 4.0)
        assert Evaluation.load(run / EVALUATION_FILE) == found

    @pytest.mark.slow
    def test_a_teacher_that_changed_since_the_run_is_refused_unless_it_is_given(
        self, place, tmp_path
    ):
        run, teacher = RunFolder(tmp_path / "run"), tmp_path / "teacher"
        shutil.copytree(place / "generator", run.generator)
        shutil.copytree(place / "teacher", teacher)
        config = load_recipe(
            "tiny", [f"model.folder={teacher}", f"data.validation={place / 'captions'}"]
        )
        run.config.write_text(config.to_yaml())
        before = model_digests(teacher)
        run.identity.write_text(json.dumps({"settings": {}, "model": before}))
        plan_evaluation(run.root, None, None, None, None, OPTIONS)
        (weights,) = (teacher / "transformer").glob("*.safetensors")
        save_file({name: 1.05 * value for name, value in load_file(weights).items()}, weights)
        # Rewritten, with its own digests, as another training would.
        write_inference_settings(teacher, read_inference_settings(teacher))
        after = model_digests(teacher)
        with pytest.raises(ModelFolderError, match="--teacher") as caught:
            evaluate(run.root, options=OPTIONS)
        assert (
            f'the transformer in model.folder has content "{after["transformer"]}", and had '
            f'"{before["transformer"]}"'
        ) in str(caught.value)
        plan_evaluation(run.root, teacher, None, None, None, OPTIONS)


class TestWrongRequests:
    def test_a_model_alone_does_not_know_its_teacher(self, place):
        with pytest.raises(ConfigError, match="a teacher to compare with"):
            evaluate(place / "generator", captions=str(place / "captions"))

    def test_too_few_captions_are_counted(self, place, tmp_path):
        with pytest.raises(ConfigError, match="8 rows"):
            run_evaluation(place, tmp_path, num_captions=9)

    @pytest.mark.slow
    def test_where_no_number_is_asked_for_all_of_a_small_set_are_taken(self, place, caplog):
        usual = replace(OPTIONS, num_captions=None)
        places = (place / "generator", place / "teacher", str(place / "captions"), None, None)
        assert len(plan_evaluation(*places, usual).captions) == 8
        assert "holds 8 captions, fewer than the usual 256" in caplog.text

    def test_a_folder_without_shards_is_named(self, place, tmp_path):
        with pytest.raises(DataError, match="nothing"):
            evaluate(
                place / "generator",
                teacher=place / "teacher",
                captions=str(tmp_path / "nothing"),
                output=tmp_path,
                options=OPTIONS,
            )

    @pytest.mark.parametrize("change", [{"num_captions": 1}, {"batch_size": 0}, {"num_shown": 0}])
    def test_options_out_of_range_are_named(self, change):
        (name,) = change
        with pytest.raises(ConfigError, match=name):
            replace(OPTIONS, **change)


class TestVerdicts:
    def test_a_generator_at_every_limit_passes(self):
        assert verdicts(good_generator()) == [True, True, True, True]

    @pytest.mark.parametrize(
        ("change", "criterion"),
        [
            ({"ratio": Figure(value=0.51, error=0.05)}, 0),
            ({"colour": 0.89}, 1),
            ({"direction": 0.89}, 2),
            ({"speed_ratio": 0.89}, 3),
            ({"speed_ratio": 1.11}, 3),
        ],
    )
    def test_each_criterion_can_fail_alone(self, change, criterion):
        found = verdicts(good_generator(**change))
        assert [index for index, passed in enumerate(found) if passed is False] == [criterion]

    def test_a_teacher_on_its_own_floor_tells_nothing(self, evaluation):
        assert verdicts(good_generator(), baseline_error=1.5)[0] is None

        def judged(*passed: bool | None) -> Evaluation:
            lines = [CriterionResult(criterion="c", passed=each, found="f") for each in passed]
            return evaluation.model_copy(update={"verdicts": tuple(lines)})

        told = judged(True, None, False)
        starts = ["met", "unknown", "NOT MET"]
        assert [line.split("  ")[0].strip() for line in verdict_lines(told)] == starts
        assert (told.passed, judged(True, None).passed, judged(True).passed) == (False, None, True)
        assert Evaluation.model_validate_json(told.model_dump_json()) == told

    def test_the_lines_name_criterion_and_figure(self, evaluation):
        lines = verdict_lines(evaluation)
        assert len(lines) == 4
        assert all(
            line.startswith(("met ", "NOT MET ", "unknown ")) and ": " in line for line in lines
        )


def printed(found: Evaluation) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(table(found))
    return file.getvalue()


def test_the_tables_fit_into_80_columns(evaluation):
    text = printed(evaluation)
    assert "…" not in text
    for found in evaluation.rows:
        assert found.label in text
