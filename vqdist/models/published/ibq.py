"""Tokenizers with index backpropagation of SEED-Voken (IBQ)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.published.files import AVERAGES, state_dict_in, with_averages
from vqdist.models.published.levels import number_of
from vqdist.models.published.network import check_middle_attention, check_taming, codebook_shape
from vqdist.models.published.taming import KNOWN, TamingFiles, says_ibq
from vqdist.models.quantizers import IBQ
from vqdist.models.vqgan import VQGanVAE

BLOCKS = 4
"""Residual blocks of each resolution of the published models, where taming and LDM have two."""
CODES = (1024, 8192, 16384, 262144)
"""Sizes of the published codebooks."""
FOUR = "four residual blocks a resolution as IBQ has, and sizes that nobody published"
AVERAGED = "moving averages as files of IBQ and of LDM have"
OPTIONS = ("beta", "entropy_temperature", "sample_minimization_weight", "batch_maximization_weight")
ENTROPY_WEIGHT = 0.05


class IBQFiles(TamingFiles):
    """VQGAN of SEED-Voken: taming's network and names, codes chosen by products."""

    aliases = ("seed_ibq",)
    title = "SEED-Voken (IBQ)"
    known = (*KNOWN, *OPTIONS[1:], "use_entropy_loss")

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tokenizer's tensors; of those that the file has an average of, the average, as published."""
        return with_averages(super(TamingFiles, self).weights(content, path))

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """Return whether these are IBQ's: by the configuration, else by the sizes that only it has published."""
        if not super().fits(tensors, config):
            return False
        of_ibq = says_ibq(config)
        return _has_its_blocks(tensors) and self._has_its_sizes(tensors) if of_ibq is None else of_ibq

    def recognises(self, content: Any, config: Mapping[str, Any], path: Path) -> bool:
        """Return whether a file is of IBQ; raise `UserError` where it may as well be one of taming or LDM.

        Their tensors have the same names, and other codes follow from them.
        """
        found = super().recognises(content, config, path)
        doubt = None if found or says_ibq(config) is False else self._doubt(content, path)
        if doubt is not None and (not config or doubt == FOUR):
            raise UserError(
                f"{path} has {doubt}, and the names of its tensors are the same; give --family ibq or --family "
                "taming_vqgan"
            )
        return found

    def _has_its_sizes(self, tensors: Mapping[str, Tensor]) -> bool:
        size, width = codebook_shape(tensors, self.codebook)
        of_network = tensors["encoder.conv_in.weight"].shape[0], number_of(tensors, "encoder.down")
        return size in CODES and (width, *of_network) == (256, 128, 5)

    def _doubt(self, content: Any, path: Path) -> str | None:
        """Return what a file of other sizes has in common with IBQ's; None where nothing speaks for it."""
        try:
            tensors = state_dict_in(content, self.keys, path)
        except UserError:
            return None
        if not super().fits(tensors, {}):
            return None
        if _has_its_blocks(tensors):
            return FOUR
        return AVERAGED if f"{AVERAGES}{self.codebook.replace('.', '')}" in tensors else None

    def quantizer(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
        size = options.get("n_embed") or codebook_shape(tensors, self.codebook)[0]
        losses = options.get("lossconfig") or options.get("loss") or {}
        losses = losses.get("init_args") or losses.get("params") or losses
        weight = losses.get("entropy_loss_weight", ENTROPY_WEIGHT) if options.get("use_entropy_loss", True) else 0.0
        said = {name: options[name] for name in OPTIONS if name in options}
        init_args = {"codebook_size": size, "entropy_weight": weight, **said}
        return {"class_path": "ibq", "init_args": init_args}

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title)
        if not isinstance(model.quantizer, IBQ):
            raise UserError(f"quantizer {type(model.quantizer).__name__} has no form in {self.title}; expected ibq")
        check_middle_attention(model, self.title)

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        quantizer = model.quantizer
        options = {name: getattr(quantizer, name) for name in OPTIONS}
        weight = getattr(quantizer, "entropy_weight", 0.0)
        loss = {"class_path": "src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"}
        init_args = {"disc_start": 0, "quant_loss_weight": 1.0, "entropy_loss_weight": weight}
        options |= {"use_entropy_loss": weight > 0, "lossconfig": {**loss, "init_args": init_args}}
        return {
            "model": {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": {**self.options_of(model), **options}}
        }


def _has_its_blocks(tensors: Mapping[str, Tensor]) -> bool:
    return f"encoder.down.0.block.{BLOCKS - 1}.conv1.weight" in tensors
