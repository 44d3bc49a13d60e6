"""Next-scale prediction: a transformer that predicts all codes of a scale at once from the scales before (VAR).

The model of arXiv 2404.02905, over a tokenizer of scales. Shapes: `b` batch, `K` scales, `L` codes of an image over
all scales, `L_1` those of the first scale, `v` codebook size, `d` width of the tokenizer's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_generator, check_whole_numbers
from vqdist.models.attention import AttentionLayers
from vqdist.models.autoregressive import CodePrediction, SecondStage
from vqdist.models.multiscale import scale_lengths, split_scales
from vqdist.models.scale_attention import attend_by_scale
from vqdist.models.tokenizer import Tokenizer
from vqdist.sampling import DrawOptions, draw, guide

WIDTH_PER_BLOCK = 64  # VAR's rule: a model of depth D is 64 * D wide and has D heads


class VAR(
    SecondStage,
    coders={Tokenizer: (Tokenizer.fingerprint, str)},
    library_name="vqdist",
    tags=["image-generation", "autoregressive"],
):
    """Predicts the codes of an image scale by scale, from its class and the picture that the coarser scales make.

    Args:
        tokenizer: makes the codes, at several scales; frozen.
        depth: blocks of the transformer.
        dim: its width; by default 64 * depth.
        heads: attention heads of each block; by default depth.
        num_classes: classes to condition on; 0 for none.
        dropout: share of the activations of attention and feed-forward layers that are dropped while training.
    """

    model_type = "var"
    scale_lengths: tuple[int, ...]
    num_codes: int
    level_of: Tensor  # (L,), the scale of each code

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        depth: int = 16,
        dim: int | None = None,
        heads: int | None = None,
        num_classes: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(tokenizer)
        dim = WIDTH_PER_BLOCK * depth if dim is None else dim
        heads = depth if heads is None else heads
        _check_options(depth=depth, dim=dim, heads=heads, num_classes=num_classes, dropout=dropout)
        self.scales = _scales_of(tokenizer)
        self.scale_lengths = tuple(scale_lengths(self.scales))
        self.num_codes = sum(self.scale_lengths)
        self.num_classes = num_classes
        self.classes = nn.Embedding(num_classes + 1, dim)  # the last one stands for no class
        self.positions = nn.Parameter(torch.empty(self.num_codes, dim))
        self.levels = nn.Embedding(len(self.scales), dim)
        self.embed = nn.Linear(tokenizer.network.quantizer.dim, dim)
        self.transformer = AttentionLayers(
            dim=dim,
            depth=depth,
            heads=heads,
            attn_dim_head=dim // heads,
            causal=False,
            use_adaptive_layernorm=True,
            use_adaptive_layerscale=True,
            dim_condition=dim,
            attn_flash=True,
            attn_dropout=dropout,
            ff_dropout=dropout,
        )
        attend_by_scale(self.transformer, self.scale_lengths, dropout)
        self.to_logits = nn.Linear(dim, self.codebook_size)
        for weight in (self.classes.weight, self.levels.weight, self.positions):
            nn.init.normal_(weight, std=0.02)
        lengths = torch.tensor(self.scale_lengths)
        level_of = torch.arange(len(self.scales)).repeat_interleave(lengths, output_size=self.num_codes)
        self.register_buffer("level_of", level_of, persistent=False)  # (L,)

    def inputs(self, item: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (b, L), what predicts the scales after the first (b, L - L_1, d) float32, and labels (b,)."""
        codes = self.codes_of(item)
        return codes, self.tokenizer.idxBl_to_var_input(split_scales(codes, self.scales)), label

    def forward(self, codes: Tensor, var_input: Tensor, label: Tensor) -> CodePrediction:
        """Map what `inputs` gives to the prediction of each code; label num_classes stands for no class."""
        return CodePrediction(self.to_logits(self._hidden(self._tokens(var_input, label), label)), codes)

    @torch.no_grad()
    def draw_codes(self, uniform: Tensor, label: Tensor, options: DrawOptions, *, use_cache: bool = True) -> Tensor:
        """See `AutoregressiveModel.draw_codes`; guidance grows from scale to scale, see `guidance_at`."""
        guided = options.cfg != 1
        if guided:  # both in one batch
            label = torch.cat([label, torch.full_like(label, self.num_classes)])
        codes: list[Tensor] = []
        cache: Any = None
        with _caching(self.transformer):
            for scale, part in enumerate(uniform.split(self.scale_lengths, dim=1)):
                tokens = self._tokens(self._input_after(codes, guided), label)
                if use_cache:
                    hidden, cache = self._hidden_of_next(tokens[:, -part.shape[1] :], label, cache)
                else:
                    hidden = self._hidden(tokens, label)[:, -part.shape[1] :]
                logits = self.to_logits(hidden)
                if guided:
                    of_class, of_none = logits.chunk(2)
                    logits = guide(of_class, of_none, guidance_at(options.cfg, scale, len(self.scales)))
                codes.append(draw(logits, part, options))
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode(codes)

    def _tokens(self, var_input: Tensor | None, label: Tensor) -> Tensor:
        """Return what the transformer sees of the first scales: the class at the first one, pictures at the others.

        Args:
            var_input: (b, m, d), m the codes of some scales after the first; None for none of them.
            label: (b,).

        Returns:
            (b, L_1 + m, dim).
        """
        tokens = repeat(self.classes(label), "b d -> b n d", n=self.scale_lengths[0])
        if var_input is not None:
            tokens = torch.cat([tokens, self.embed(var_input.to(self.embed.weight.dtype))], dim=1)
        number = tokens.shape[1]
        return tokens + self.positions[:number] + self.levels(self.level_of[:number])

    def _hidden(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Tokens (b, n, dim) of the first scales -> (b, n, dim), each from its own scale and those before."""
        return self.transformer(tokens, condition=self.classes(label))

    def _hidden_of_next(self, tokens: Tensor, label: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return what `_hidden` does, for the tokens (b, n, dim) of one scale only; and the cache for the next.

        Args:
            tokens: of the scale.
            label: (b,).
            cache: keys and values of the scales before, None at the first.
        """
        return self.transformer(
            tokens,
            condition=self.classes(label),
            cache=cache,
            cache_age=tokens.shape[1],
            return_hiddens=True,
            input_not_include_cache=True,
        )

    def _input_after(self, codes: list[Tensor], guided: bool) -> Tensor | None:
        """Return the var_input of the scales after the given ones, twice over the batch if guided; None after none."""
        if not codes:
            return None
        return repeat(self.tokenizer.idxBl_to_var_input(codes), "b n d -> (r b) n d", r=2 if guided else 1)


def guidance_at(cfg: float, scale: int, num_scales: int) -> float:
    """Guidance at a scale (from 0): it rises linearly from 1, none, at the first scale to `cfg` at the last.

    The coarse scales lay out the picture, where strong guidance costs variety. VAR writes (1 + t) conditional - t
    unconditional with t rising to its own `cfg`: its 1.5 is 2.5 here.
    """
    return cfg if num_scales == 1 else 1 + (cfg - 1) * scale / (num_scales - 1)


@contextmanager
def _caching(transformer: AttentionLayers) -> Iterator[None]:
    # x-transformers gives its cache to causal layers only. The name is all it checks: attention within a scale is not
    # masked, since each block took its own `causal` at construction.
    transformer.causal = True
    try:
        yield
    finally:
        transformer.causal = False


def _scales_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    if tokenizer.network.scales is None:
        raise UserError(
            "the tokenizer codes images at one scale, which leaves VAR nothing to predict from; train one with "
            "quantizer multiscale_vq, or train a prior over this one"
        )
    return tokenizer.network.scales


def _check_options(*, depth: int, dim: int, heads: int, num_classes: int, dropout: float) -> None:
    check_whole_numbers(depth=(depth, 1), dim=(dim, 1), heads=(heads, 1))
    if dim % heads:
        raise UserError(f"dim {dim} is not a multiple of heads {heads}; try {max(heads, dim - dim % heads)}")
    check_generator(num_classes, dropout)
