"""An own model of codes: each code is predicted from its class, its place and the code before it."""

import torch
from torch import nn

from vqdist import CodePrediction, SecondStage, draw


class Chain(SecondStage):
    """Predict every code by a small network of the class, the place and the code before.

    Args:
        tokenizer: makes the codes; vqdist passes it.
        width: of the hidden layer.
        num_classes: classes to condition on; 0 for none.
    """

    def __init__(self, tokenizer, *, width: int = 32, num_classes: int = 0):
        super().__init__(tokenizer)
        self.num_classes = num_classes
        self.num_codes = tokenizer.num_codes
        self.classes = nn.Embedding(num_classes + 1, width)  # the last one stands for no class
        self.places = nn.Embedding(self.num_codes, width)
        self.before = nn.Embedding(self.codebook_size + 1, width)  # the last one stands for no code
        self.to_logits = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.codebook_size))

    def inputs(self, item, label):
        """Images or codes, and classes (b,) -> what `forward` takes."""
        return self.codes_of(item), label

    def forward(self, codes, label):
        """Codes (b, n) and classes (b,) -> logits (b, n, v) of each code."""
        none = torch.full_like(codes[:, :1], self.codebook_size)
        before = torch.cat([none, codes[:, :-1]], dim=1)
        return CodePrediction(self._logits(before, torch.arange(self.num_codes, device=codes.device), label), codes)

    @torch.no_grad()
    def draw_codes(self, uniform, label, options, *, use_cache=True):
        """Draw code after code; `uniform` (b, n) in [0, 1) is the randomness of each."""
        code = torch.full_like(label, self.codebook_size)
        codes = []
        for place in range(self.num_codes):
            logits = self._logits(code[:, None], torch.tensor([place], device=label.device), label)[:, 0]
            code = draw(logits, uniform[:, place], options)
            codes.append(code)
        return torch.stack(codes, dim=1)

    def decode_codes(self, codes):
        return self.tokenizer.decode(codes)

    def _logits(self, before, places, label):
        return self.to_logits(self.before(before) + self.places(places) + self.classes(label)[:, None])
