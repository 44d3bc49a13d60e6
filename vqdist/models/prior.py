"""A prior over the codes of a frozen tokenizer: a decoder-only transformer.

It is that of VQGAN (arXiv 2012.09841) and LlamaGen (arXiv 2406.06525).

Shapes: b batch, n positions, q codes per position, v codebook size, d width. A model with several codes per position
predicts them one after the other, position by position: its sequences have n * q codes.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vqdist.errors import UserError
from vqdist.models.arguments import check_generator, check_whole_numbers
from vqdist.models.attention import Decoder, check_heads
from vqdist.models.autoregressive import CodePrediction, SecondStage
from vqdist.models.tokenizer import Tokenizer
from vqdist.sampling import DrawOptions, draw, guide


class Prior(
    SecondStage,
    coders={Tokenizer: (Tokenizer.fingerprint, str)},
    library_name="vqdist",
    tags=["image-generation", "autoregressive"],
):
    """Predicts the codes of an image in the order of its rows, from its class and the codes before.

    Args:
        tokenizer: makes the codes; frozen.
        dim: width of the transformer.
        depth: its blocks.
        heads: attention heads of each block.
        dim_head: width of a head; at least 32, as its rotary positions need.
        num_classes: classes to condition on; 0 for none.
        dropout: share of the activations of attention and feed-forward layers that are dropped while training.
    """

    model_type = "prior"
    num_codes: int

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dim: int = 512,
        depth: int = 8,
        heads: int = 8,
        dim_head: int = 64,
        num_classes: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__(tokenizer)
        _check_options(dim=dim, depth=depth, heads=heads, dim_head=dim_head, num_classes=num_classes, dropout=dropout)
        check_heads(dim, heads, dim_head)
        if tokenizer.network.scales is not None:
            raise UserError(
                f"the tokenizer has {len(tokenizer.network.scales)} scales, which a prior cannot predict code by "
                "code; train var over it, or a prior over a tokenizer with one scale"
            )
        self.num_classes = num_classes
        self.num_levels = tokenizer.num_levels
        self.num_codes = tokenizer.num_codes * tokenizer.num_levels
        self.start = nn.Embedding(num_classes + 1, dim)  # the last one stands for no class
        self.embedding = nn.Embedding(self.num_levels * self.codebook_size, dim)  # a table for each level
        self.transformer = Decoder(
            dim=dim,
            depth=depth,
            heads=heads,
            attn_dim_head=dim_head,
            rotary_pos_emb=True,
            rotary_emb_dim=max(32, dim_head // 2),
            attn_flash=True,
            attn_dropout=dropout,
            ff_dropout=dropout,
        )
        self.to_logits = nn.ModuleList(nn.Linear(dim, self.codebook_size) for _ in range(self.num_levels))
        for table in (self.start, self.embedding):
            nn.init.normal_(table.weight, std=0.02)

    def inputs(self, item: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (b, n * q) and labels (b,)."""
        codes = self.codes_of(item)
        return (rearrange(codes, "b n q -> b (n q)") if self.num_levels > 1 else codes), label

    def forward(self, codes: Tensor, label: Tensor) -> CodePrediction:
        """Codes (b, n * q) and labels (b,) from 0 to num_classes (no class) -> the prediction of each code."""
        tokens = torch.cat([self.start(label)[:, None], self._embed(codes[:, :-1])], dim=1)
        return CodePrediction(self._logits(self.transformer(tokens)), codes)

    @torch.no_grad()
    def draw_codes(self, uniform: Tensor, label: Tensor, options: DrawOptions, *, use_cache: bool = True) -> Tensor:
        guided = options.cfg != 1
        if guided:  # both in one batch
            label = torch.cat([label, torch.full_like(label, self.num_classes)])
        tokens, codes, cache = self.start(label)[:, None], [], None
        for step in range(self.num_codes):
            if use_cache:
                hidden, cache = self.transformer(
                    tokens[:, -1:], cache=cache, return_hiddens=True, input_not_include_cache=True
                )
            else:
                hidden = self.transformer(tokens)
            logits = self.to_logits[step % self.num_levels](hidden[:, -1])
            if guided:
                with_class, without = logits.chunk(2)
                logits = guide(with_class, without, options.cfg)
            codes.append(draw(logits, uniform[:, step], options))
            new = self._embed(codes[-1][:, None], first=step)
            tokens = torch.cat([tokens, repeat(new, "b n d -> (r b) n d", r=2 if guided else 1)], dim=1)
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        if self.num_levels > 1:
            codes = rearrange(codes, "b (n q) -> b n q", q=self.num_levels)
        return self.tokenizer.decode(codes)

    def _embed(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes (b, m) at places first .. first + m - 1 of the sequence -> (b, m, d)."""
        level = torch.arange(first, first + codes.shape[1], device=codes.device) % self.num_levels
        return self.embedding(codes + level * self.codebook_size)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (b, n * q, d) -> (b, n * q, v): each level of a position has a head of its own."""
        if self.num_levels == 1:
            return self.to_logits[0](hidden)
        by_level = [head(hidden[:, level :: self.num_levels]) for level, head in enumerate(self.to_logits)]
        return rearrange(torch.stack(by_level, dim=2), "b n q v -> b (n q) v")


def _check_options(*, num_classes: int, dropout: float, dim_head: int, **sizes: int) -> None:
    check_whole_numbers(**{name: (value, 1) for name, value in sizes.items()})
    if dim_head < 32 or dim_head % 2:
        raise UserError(f"dim_head {dim_head} is not possible; rotary positions need an even number of at least 32")
    check_generator(num_classes, dropout)
