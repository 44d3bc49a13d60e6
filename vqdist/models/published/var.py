"""The multi-scale tokenizer of VAR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqdist.errors import UserError
from vqdist.models.multiscale import MOST_PHIS, V_PATCH_NUMS, MultiScaleResidual, VectorQuantizer, phi_of_scale
from vqdist.models.published.base import NetworkFamily
from vqdist.models.published.files import options_in, state_dict_in, unsaid
from vqdist.models.published.names import Names
from vqdist.models.published.network import (
    ENDS,
    check_attention_at_the_lowest,
    check_taming,
    codebook_shape,
    ddconfig_of,
    parts_of,
)
from vqdist.models.vqgan import VQGanVAE

NAMES = Names([*ENDS, ("quantizer.inner.codebook.", "quantize.")])
PHIS = "quantizer.inner.phis."
RESIDUAL = "quantize.quant_resi."
HITS = "quantize.ema_vocab_hit_SV"
ONE_EACH = r"^quantize\.quant_resi\.(\d+)\."  # where every scale has a convolution of its own
CODEBOOK = "quantize.embedding.weight"
KNOWN = ("v_patch_nums", "vocab_size", "share_quant_resi", "quant_resi", "using_znorm")


class VARTokenizer(NetworkFamily):
    """VQVAE of VAR: taming's network, one codebook over maps of growing sides."""

    aliases = ("var",)
    title = "VAR"
    keys = ("state_dict", "trainer", "model")
    prefixes = ("vae_local.", "vae.")
    ignored = rf"{re.escape(HITS)}$"

    def fits(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        return "encoder.mid.attn_1.qkv.weight" in tensors and CODEBOOK in tensors

    def assumed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return unsaid(config, KNOWN, v_patch_nums=list(V_PATCH_NUMS), quant_resi=0.5, using_znorm=False)

    def weights(self, content: Any, path: Path) -> dict[str, Tensor]:
        """Return the tokenizer's tensors; of VAR's own training file those of `vae_local`."""
        trainer = content.get("trainer") if isinstance(content, Mapping) else None
        inner = trainer.get("vae_local") if isinstance(trainer, Mapping) else None
        found = super().weights(content if inner is None else inner, path)
        return {re.sub(ONE_EACH, rf"{RESIDUAL}qresi_ls.\1.", name): one for name, one in found.items()}

    def arguments(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        options = options_in(config, KNOWN)
        sides = list(options.get("v_patch_nums") or V_PATCH_NUMS)
        phis = sum(name.startswith(RESIDUAL) and name.endswith(".weight") for name in tensors)
        ratio = abs(options.get("quant_resi", 0.5))
        init_args = {
            "codebook_size": options.get("vocab_size") or codebook_shape(tensors, CODEBOOK)[0],
            "v_patch_nums": sides,
            "beta": options.get("beta", 0.25),
            "learnable_codebook": True,
            "use_cosine_sim": options.get("using_znorm", False),
            "phi_ratio": ratio if phis else 0,
            **({"num_phis": phis} if phis else {}),
            "phi_rule": "ticks",
        }
        return parts_of(self.ours(tensors), options, {"class_path": "multiscale_vq", "init_args": init_args})

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, one in tensors.items():
            before, qkv, after = name.partition(".qkv.")
            if qkv:
                found |= {f"{before}.{part}.{after}": some for part, some in zip("qkv", one.chunk(3), strict=True)}
            else:
                found[_ours(name)] = one
        return found

    def theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        phis = sum(name.startswith(PHIS) and name.endswith(".weight") for name in tensors)
        form = f"{RESIDUAL}qresi." if phis == 1 else f"{RESIDUAL}qresi_ls.{{}}."
        found: dict[str, Tensor] = {}
        for name, one in tensors.items():
            attention = re.fullmatch(r"(.*\.attn(?:_1|\.\d+))\.([qkv])\.(weight|bias)", name)
            if attention is None:
                found[_theirs(name, form)] = one
            elif attention[2] == "q":
                parts = [tensors[f"{attention[1]}.{part}.{attention[3]}"] for part in "qkv"]
                found[f"{attention[1]}.qkv.{attention[3]}"] = torch.cat(parts)
        return found

    def read(self, content: Any, config: Mapping[str, Any], path: Path) -> VQGanVAE:
        """Return the model; raise `UserError` where the file has another number of scales than the published one."""
        said = options_in(config, KNOWN).get("v_patch_nums")
        bare = state_dict_in(content, self.keys, path)
        hits = next((one for name, one in bare.items() if name.endswith(HITS)), None)
        if said is None and (hits is None or len(hits) != len(V_PATCH_NUMS)):
            number = "several" if hits is None else len(hits)
            raise UserError(
                f"{path} has {number} scales, whose sides stand in no tensor; say "
                "v_patch_nums in a file for --peer_config"
            )
        return super().read(content, config, path)

    def image_size(self, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        levels = len(arguments["encoder"]["init_args"]["ch_mult"])
        return arguments["quantizer"]["init_args"]["v_patch_nums"][-1] << (levels - 1)

    def check_writable(self, model: VQGanVAE) -> None:
        check_taming(model, self.title, kernel=None)
        quantizer = model.quantizer
        inner = getattr(quantizer, "inner", None)
        if not isinstance(inner, MultiScaleResidual) or not isinstance(inner.codebook, VectorQuantizer):
            raise UserError(
                f"quantizer {type(quantizer).__name__} has no form in {self.title}; expected multiscale_vq with "
                "learnable_codebook"
            )
        check_attention_at_the_lowest(model, self.title)
        if inner.phi_of != phi_of_scale(len(inner.scales), len(inner.phis)):
            raise UserError(
                "this model was trained with phi_rule proportional, by which other convolutions serve the scales than "
                f"in {self.title}: its codes would give other images there"
            )

    def peer_config(self, model: VQGanVAE, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `VQVAE`, and two sizes that its code fixes where they are others."""
        inner: Any = model.quantizer.inner  # a `MultiScaleResidual`, see `check_writable`
        network, scales, phis = ddconfig_of(model), len(inner.scales), len(inner.phis)
        literals = {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2}
        kernel: Any = model.network.encoder.quant_conv
        return {
            "vocab_size": inner.codebook_size,
            "z_channels": network["z_channels"],
            "ch": network["ch"],
            "dropout": network["dropout"],
            "beta": inner.codebook.beta,
            "using_znorm": inner.codebook.use_cosine_sim,
            "quant_conv_ks": kernel.kernel_size[0],
            "quant_resi": inner.phi_ratio if phis else 0.0,
            "share_quant_resi": 0 if phis == scales != MOST_PHIS else phis,
            "v_patch_nums": list(inner.scales),
            **{name: network[name] for name, only in literals.items() if network[name] != only},
        }

    def save(self, tensors: dict[str, Tensor], model: VQGanVAE, path: Path) -> None:
        """Write the tensors and the counts of uses that the project's files have, all 0."""
        quantizer: Any = model.quantizer  # a `MultiScaleQuantizer`, see `check_writable`
        scales, phis = len(quantizer.scales), len(quantizer.inner.phis)
        if phis == scales != MOST_PHIS:
            tensors = {name.replace(f"{RESIDUAL}qresi_ls.", RESIDUAL): one for name, one in tensors.items()}
        torch.save({**tensors, HITS: torch.zeros(scales, codebook_shape(tensors, CODEBOOK)[0])}, path)


def _ours(name: str) -> str:
    numbered = re.fullmatch(rf"{re.escape(RESIDUAL)}(?:qresi_ls\.|qresi\.)?(?:(\d+)\.)?(weight|bias)", name)
    return f"{PHIS}{numbered[1] or 0}.{numbered[2]}" if numbered else NAMES.ours(name, 0)


def _theirs(name: str, form: str) -> str:
    numbered = re.fullmatch(rf"{re.escape(PHIS)}(\d+)\.(weight|bias)", name)
    return form.format(numbered[1]) + numbered[2] if numbered else NAMES.theirs(name, 0)
