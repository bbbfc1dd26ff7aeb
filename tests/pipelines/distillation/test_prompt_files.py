"""Own prompts as training data: a dry run and a short run on files of captions."""

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill, dry_run
from pipelines.run.observer import RunObserver

WORDS = [
    f"a {colour} circle moves {way} quickly"
    for colour in ("red", "blue")
    for way in ("left", "right")
]


class Warnings(RunObserver):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.slow
def test_a_run_trains_on_a_file_of_prompts_and_says_which_words_the_model_does_not_know(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*WORDS, "a zebra moves left"]))
    config = load_recipe(
        "tiny",
        [
            f"data.train={prompts}",
            f"output={tmp_path}",
            "validation.every=0",
            "checkpoint.keep_best=0",
            "iterations=2",
            "batch.size=2",
            "batch.micro_batches=1",
            "topology.mode=local",
        ],
    )
    planned = dry_run(config)
    assert (planned["training_rows"], planned["training_shards_hold"]) == (5, "captions")
    assert planned["unknown_words"]["num_affected"] == 1
    assert tuple(planned["unknown_words"]["words"]) == ("zebra",)
    warnings = Warnings()
    summary = distill(config, observer=warnings)
    assert summary["samples_seen"] == 4
    assert any("'zebra'" in text for text in warnings.texts)
    found = audit(config.run_folder)
    assert (found.is_clean, found.samples) == (True, 4)
