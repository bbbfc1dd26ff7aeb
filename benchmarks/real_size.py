"""Peak memory and seconds of two iterations of `sgmd distill` at a real size, on a CPU.

    python benchmarks/real_size.py lora --output lora.json     Wan 2.1 1.3B, adapters, one base
    python benchmarks/real_size.py full --output full.json     a Wan of 282 M, all weights trained

The networks have true configurations and random weights: the denoiser in bfloat16 (`lora`) or
float32 (`full`), the released autoencoder, and a text encoder of the released width with one layer
and few words. One process (`topology.mode=local`) makes clips of 5 frames of 128 x 128 pixels.
Products of `lora` are in float32 over its bfloat16 weights unless the CPU is faster in bfloat16,
which is tried; --precision chooses.

Measured: the largest anonymous memory (RssAnon, every 5 ms) from before the run's first network to
its last update, less that of interpreter and libraries. Mapped files are not in it; writing the
results at the end of the run is not either. Predicted: a rank of all roles as `sgmd plan` has it,
and the text encoder's weights.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from documents import write_document
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.run import distill
from pipelines.planning.pool_maps import fused_memory
from pipelines.planning.workload import Workload
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord

WORDS = ("a", "red", "circle", "blue", "square", "moves", "left", "right", "slowly", "quickly")
NUM_ITERATIONS = 2
_SHAPES: dict[str, dict[str, int]] = {
    "lora": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "full": {"num_attention_heads": 8, "ffn_dim": 4096, "num_layers": 16},
}
_TRIED = ((64, 1536), (1536, 1536))
_LEARNERS = ("generator", "fake_score")
_CHECKPOINTED = [f"{role}.compute.checkpointing=true" for role in _LEARNERS]
_SETTINGS: dict[str, list[str]] = {
    "lora": [
        *(f"{role}.lora.rank=64" for role in _LEARNERS),
        *(f"{role}.compute.weights=bf16" for role in (*_LEARNERS, "teacher")),
        *_CHECKPOINTED,
    ],
    "full": _CHECKPOINTED,
}


def faster_precision() -> str:
    """Returns bf16 or fp32: what this CPU computes a layer and its gradients faster in."""
    seconds: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        inputs = [torch.ones(*shape, dtype=dtype, requires_grad=True) for shape in _TRIED]
        turns: list[float] = []
        for _ in range(5):
            began_s = time.perf_counter()
            torch.autograd.grad(linear(*inputs).sum(), inputs)
            turns.append(time.perf_counter() - began_s)
        seconds[name] = min(turns)
    return min(seconds, key=seconds.__getitem__)


class PeakMemory:
    """The largest anonymous memory of this process since it was made."""

    def __init__(self) -> None:
        self.before_bytes = self.peak_bytes = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())


class Iterations(RunObserver):
    """Seconds of each iteration by stage, and the peak up to the last one."""

    def __init__(self, peak: PeakMemory) -> None:
        self.records: list[dict[str, Any]] = []
        self._peak = peak

    def iteration(self, record: IterationRecord) -> None:
        """Takes the figures of one."""
        self.records.append(
            {
                "seconds_total": record.seconds_total,
                "seconds": dict(record.seconds),
                "exit_steps": list(record.exit_steps),
                "peak_bytes": self._peak.peak_bytes - self._peak.before_bytes,
            }
        )
        if len(self.records) == NUM_ITERATIONS:
            self._peak.stop()


def main() -> None:
    """Measures, and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(_SHAPES))
    parser.add_argument("--model", type=Path, help="keep the model in this folder, or take it")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="products of `lora`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / "model"
        precision = options.precision or faster_precision()
        measured = measure(Path(folder), model, options.kind, precision)
    write_document("real_size", measured, options.output)


def measure(folder: Path, model: Path, kind: str, precision: str) -> dict[str, Any]:
    """Prediction, and what a run has taken.

    Args:
        folder: Empty; for the run.
        model: Model folder, written where it is missing.
        kind: `lora` or `full`.
        precision: Of the products of `lora`.
    """
    if not (model / "model_index.json").exists():
        _write_in_a_process(model, kind)
    text_bytes = (model / "text_encoder" / "model.safetensors").stat().st_size
    (folder / "captions.txt").write_text("a red circle moves left\na blue square moves right\n")
    config = load_recipe("tiny", _overrides(folder, model, kind, precision))
    work = Workload.of(config)
    memory = fused_memory(work, 1)
    predicted = memory.total + text_bytes
    peak = PeakMemory()
    iterations = Iterations(peak)
    began_s = time.monotonic()
    distill(config, observer=iterations)
    measured = iterations.records[-1]["peak_bytes"]
    return {
        "kind": kind,
        "parameters": work.shape.num_parameters,
        "trained": {role: work.num_trained(role) for role in _LEARNERS},
        "latent_shape": list(work.latent_shape),
        "settings": _told(config),
        "threads": config.topology.threads_per_rank,
        "plan_gb": memory.to_json(),
        "text_encoder_bytes": text_bytes,
        "predicted_bytes": predicted,
        "libraries_bytes": peak.before_bytes,
        "peak_bytes": measured,
        "peak_over_predicted": measured / predicted,
        "results": iterations.records,
        "run_s": time.monotonic() - began_s,
    }


def _overrides(folder: Path, model: Path, kind: str, precision: str) -> list[str]:
    of_products = [f"{role}.compute.precision={precision}" for role in (*_LEARNERS, "teacher")]
    return [
        *_SETTINGS[kind],
        *(of_products if kind == "lora" else ()),
        f"output={folder / 'runs'}",
        f"model.folder={model}",
        "model.text_length=64",
        "model.encoder_dtype=bf16",
        f"data.train={folder / 'captions.txt'}",
        "data.validation=''",
        "video={num_frames: 5, height: 128, width: 128, fps: 8}",
        "batch={size: 1, micro_batches: 1}",
        f"iterations={NUM_ITERATIONS}",
        "topology.mode=local",
        "topology.address=null",
        f"topology.threads_per_rank={torch.get_num_threads()}",
        "validation.every=0",
        "checkpoint.keep=1",
        "checkpoint.keep_best=0",
        f"checkpoint.every={NUM_ITERATIONS}",
    ]


def _told(config: DistillConfig) -> dict[str, Any]:
    """Settings that decide memory, by role."""
    return {
        role: config.model_dump(mode="json", include={role: True})[role]
        for role in ("generator", "fake_score", "teacher")
    }


def _write_in_a_process(folder: Path, kind: str) -> None:
    """Writes the model in another process, whose memory is freed with it."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(write_model, (folder, kind))


def write_model(folder: Path, kind: str) -> None:
    """Writes a model folder of random weights."""
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=3 + len(WORDS),
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=1,
        num_heads=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.set_default_dtype(torch.bfloat16)
    text_encoder = UMT5EncoderModel(text)
    torch.set_default_dtype(torch.bfloat16 if kind == "lora" else torch.float32)
    transformer = WanTransformer3DModel(**_SHAPES[kind])
    torch.set_default_dtype(torch.float32)
    pipeline = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=text_encoder,
        vae=AutoencoderKLWan(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("RssAnon is not in /proc/self/status: this benchmark needs Linux")


if __name__ == "__main__":
    main()
