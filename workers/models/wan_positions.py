"""Positions of Wan's tokens, which turn queries and keys of self-attention.

    (x1 + i x2) (cos + i sin)  =  (x1 cos - x2 sin) + i (x1 sin + x2 cos)

diffusers writes the two halves into every second entry of a new tensor, and in the backward pass
each of these writes copies the whole gradient. One complex product makes the same numbers in a
quarter of the time. On a processor of x86 the bits are the same, forward and backward; but where
products are in bfloat16, gradients are rounded to it once here and twice there.

The tables of a size of clips are made once, and kept until another size comes.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
)
from torch import Tensor

_COMPLEX_PARTS = (torch.float32, torch.float64)
"""Types that complex numbers are made of."""


def turn_by_products(transformer: WanTransformer3DModel) -> None:
    """Makes a network keep the tables of its positions, and turn by complex products.

    Args:
        transformer: Changed in place; its parameters and buffers stay what they are.
    """
    factors = _Factors()
    # The annotation of diffusers lists its own classes alone.
    own: Any = {name: TurningAttention(factors) for name in transformer.attn_processors}
    transformer.set_attn_processor(own)
    transformer.rope = KeptPositions(transformer.rope)


class KeptPositions(WanRotaryPosEmbed):
    """Wan's tables of positions, those of the last size kept.

    Args:
        rope: The module in whose place it is put.
    """

    def __init__(self, rope: WanRotaryPosEmbed) -> None:
        super().__init__(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
        self.freqs_cos, self.freqs_sin = rope.freqs_cos, rope.freqs_sin
        self._made: tuple[object, tuple[Any, ...], Any] | None = None

    def forward(self, hidden_states: Tensor) -> Any:  # noqa: ANN401 - diffusers says a tensor
        """Returns cosines and sines (1, tokens, 1, width of a head), each number twice in a row."""
        buffers: tuple[Any, ...] = self.freqs_cos, self.freqs_sin
        # A buffer that is moved is another one, one that is written to has another version. Those
        # that tables were made from are kept, so that no other has their id.
        now = hidden_states.shape[2:], [(id(each), each._version) for each in buffers]
        if self._made is None or self._made[0] != now:
            self._made = now, buffers, super().forward(hidden_states)
        return self._made[2]


class _Factors:
    """Complex factors of the tables that a network was called with last."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Factors of a token's pairs (1, tokens, 1, half the width of a head)."""
        if self._made is None or self._made[0] is not cos:
            self._made = cos, torch.complex(cos[..., 0::2], sin[..., 1::2])
        return self._made[1]


class TurningAttention(WanAttnProcessor):
    """Wan's attention, in which one complex product turns queries, and one keys.

    Args:
        factors: Shared by the layers of a network.
    """

    def __init__(self, factors: _Factors) -> None:
        super().__init__()
        self._factors = factors

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of tokens to tokens; without positions, or compiled, that of diffusers."""
        # Compilers make one kernel of diffusers' own form, and none of complex numbers.
        if (
            rotary_emb is None
            or rotary_emb[0].dtype not in _COMPLEX_PARTS
            or torch.compiler.is_compiling()
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        factors, heads = self._factors.of(*rotary_emb), (attn.heads, -1)
        query = turned(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads), factors)
        key = turned(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads), factors)
        attended = dispatch_attention_fn(
            query,
            key,
            attn.to_v(hidden_states).unflatten(2, heads),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


def turned(value: Tensor, factors: Tensor) -> Tensor:
    """Pairs of neighbouring entries of heads, multiplied as complex numbers.

    Args:
        value: Queries or keys (B, tokens, heads, width of a head).
        factors: Complex, (1, tokens, 1, half that width).

    Returns:
        Their type is that of `value`; half types are widened for the product.
    """
    wide = value.to(torch.promote_types(value.dtype, factors.real.dtype))
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).type_as(value)
