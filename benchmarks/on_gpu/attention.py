"""Self-attention of one layer with each fused kernel that torch has for it."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from on_gpu.cases import HEAD_SIZES, Case, free
from on_gpu.environment import seconds
from on_gpu.step import Context

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_MOST_SCORE_BYTES = 8e9


def measure(context: Context, case: Case) -> None:
    """Seconds and TFLOP/s of a forward and of a backward pass, or why a kernel refuses."""
    tokens, heads = (
        case.shape.num_tokens(case.latent_shape),
        case.shape.width // HEAD_SIZES[case.model],
    )
    context.record(tokens=tokens, heads=heads, num_frames=case.num_frames, backends={})
    flops = 4 * tokens**2 * case.shape.width
    for name, backend in BACKENDS.items():
        try:
            if name == "math" and 4 * heads * tokens**2 > _MOST_SCORE_BYTES:
                raise MemoryError(f"scores of {4 * heads * tokens**2 / 1e9:.0f} GB")
            forward_s, backward_s = _time(case, heads, tokens, backend)
            row = {
                "forward_s": forward_s,
                "backward_s": backward_s,
                "forward_tflops": flops / forward_s / 1e12,
                "backward_tflops": 2 * flops / backward_s / 1e12,
            }
        except Exception as error:  # A kernel that is not built in, or refuses the card.
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        context.record(backends=context.results["backends"] | {name: row})
        free(case.device)


def _time(case: Case, heads: int, tokens: int, backend: SDPBackend) -> tuple[float, float]:
    shape = (1, heads, tokens, HEAD_SIZES[case.model])
    inputs = [
        torch.randn(shape, device=case.device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs)

    out = attend()
    gradient = torch.randn_like(out)
    return seconds(case.device, attend, 5), seconds(
        case.device, lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True), 5
    )
