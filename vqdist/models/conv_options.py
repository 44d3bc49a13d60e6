"""The options of vqdist's own networks around a quantizer, by the names that `VQGanVAE` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vqdist.errors import UserError, an
from vqdist.models.networks.conv import ConvDecoder, ConvEncoder, check_widths, widths_of
from vqdist.models.networks.patch import PatchDiscriminator


@dataclass(frozen=True)
class ConvOptions:
    """Options of the networks `conv` and `patch`, see `VQGanVAE`."""

    dim: int | None
    layers: int
    encdec_layer_mults: list[int] | None
    encdec_num_resnet_blocks: int | list[int]
    encdec_resnet_groups: int
    encdec_first_conv_kernel_size: int
    discr_layers: int

    def check(self, given: Mapping[str, Any], *, with_gan: bool, defaults: Mapping[str, Any]) -> None:
        """Raise `UserError` for options that are missing, or that no network would read.

        Args:
            given: the parts of the model, those that are vqdist's own as None.
            with_gan: whether there is a discriminator.
            defaults: of the options.
        """
        discriminator = given["discriminator"]
        own_ends = given["encoder"] is None or given["decoder"] is None
        own_critic = with_gan and discriminator is None
        options = asdict(self)
        readers = dict.fromkeys(options, own_ends)
        readers |= {"encdec_first_conv_kernel_size": given["encoder"] is None, "discr_layers": own_critic}
        readers |= {"dim": own_ends or own_critic, "encdec_resnet_groups": own_ends or own_critic}
        for name, is_read in readers.items():
            # a model without a discriminator has always taken discr_layers
            if (
                not is_read
                and options[name] != defaults[name]
                and (name != "discr_layers" or discriminator is not None)
            ):
                raise UserError(
                    f"{name} {options[name]} does nothing: all networks that would read it are given; leave it out"
                )
        if discriminator is not None and not with_gan:
            raise UserError(
                "a discriminator is given but use_gan (or use_vgg_and_gan) is false; leave one of them out"
            )
        if not own_ends and not own_critic:
            return
        if self.dim is None:
            needs = "discriminator" if not own_ends else "encoder" if given["encoder"] is None else "decoder"
            raise UserError(f"dim is missing, and vqdist's own {needs} needs it; give it, or {an(needs)} of your own")
        check_widths(self.dim, self.layers if own_ends else 1, self.encdec_resnet_groups)

    @property
    def width(self) -> int:
        """Channels of the first convolution."""
        assert self.dim is not None  # see `check`
        return self.dim

    @property
    def features(self) -> int:
        """Width of the encoder's features."""
        return widths_of(self.width, self.layers, self.encdec_layer_mults)[-1]

    def encoder(self, channels: int) -> ConvEncoder:
        """Return the encoder of images with so many channels."""
        kernel = self.encdec_first_conv_kernel_size
        return ConvEncoder(self.width, **self._of_both(channels), first_kernel_size=kernel)

    def decoder(self, channels: int) -> ConvDecoder:
        """Return the decoder of images with so many channels."""
        return ConvDecoder(self.width, **self._of_both(channels))

    def discriminator(self, channels: int) -> nn.Module:
        """Return the discriminator of images with so many channels."""
        return PatchDiscriminator(
            self.width, channels=channels, layers=self.discr_layers, groups=self.encdec_resnet_groups
        )

    def _of_both(self, channels: int) -> dict[str, Any]:
        return {
            "channels": channels,
            "layers": self.layers,
            "layer_mults": self.encdec_layer_mults,
            "num_resnet_blocks": self.encdec_num_resnet_blocks,
            "groups": self.encdec_resnet_groups,
        }
