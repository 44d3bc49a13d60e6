"""An own source of images: coloured stripes that are computed from their index."""

from PIL import Image

from vqdist import Source


class Stripes(Source):
    """Draw vertical stripes whose number is the class of the image.

    Args:
        length: number of images.
        classes: number of classes.
    """

    flip = False  # a mirrored image would be another one

    def __init__(self, length: int = 64, classes: int = 4):
        self.spec = "stripes"
        self.length, self.classes = length, classes

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Image.Image:
        picture = Image.new("RGB", (20, 20), (index * 37 % 256, index * 91 % 256, 60))
        for stripe in range(self.label(index) + 1):
            picture.paste((250, 250, index % 200), (stripe * 5, 0, stripe * 5 + 2, 20))
        return picture

    def label(self, index: int) -> int:
        return index % self.classes

    def fingerprint(self) -> str:
        """Say what the images are: a resumed run compares it."""
        return f"{self.length:030x}{self.classes:034x}"
