"""Own terms of the objective: one on pixels and one on features."""

from vqdist import Term


class EdgeLoss(Term):
    """Compare horizontal and vertical differences of neighbouring pixels."""

    def forward(self, recon, image, out):
        across = (recon.diff(dim=-1) - image.diff(dim=-1)).abs().mean()
        return across + (recon.diff(dim=-2) - image.diff(dim=-2)).abs().mean()


class SmallFeatures(Term):
    """Keep the encoder's features small."""

    acts_on = "features"

    def forward(self, recon, image, out):
        return out.features.float().square().mean()
