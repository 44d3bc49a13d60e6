"""Values of an export's config.json that cannot be: one line with file, key and expectation, and nothing is built."""

from __future__ import annotations

import json
import time

import pytest
from scenarios import build_dvae, build_prior, build_vae, build_vq_ar

from vqdist import UserError, VQGanVAE
from vqdist.models.pretrained import load_model_of_any_type

BUILD = {"vqgan": build_vae, "dvae": build_dvae, "prior": build_prior, "vq_ar": build_vq_ar}
WRONG = [
    ("vqgan", "image_size", "x", "image_size 'x' is not possible"),
    ("vqgan", "image_size", 65_536, "image_size is 65536; expected sides from 1 to 16384 pixels"),
    ("vqgan", "image_size", [16, 0], "image_size [16, 0] is not possible"),
    ("vqgan", "layers", 10**9, "layers is 1000000000; expected at most"),
    ("vqgan", "discr_layers", 10**9, "discr_layers is 1000000000; expected at most"),
    ("vqgan", "dim", "a", "dim is 'a'; expected a whole number or null"),
    ("vqgan", "dim", 10**12, "dim is 1000000000000; expected at most"),
    ("vqgan", "use_gan", 1, "use_gan is 1; expected true or false"),
    ("vqgan", "encdec_layer_mults", [1, "b"], "encdec_layer_mults is [1, 'b']; expected a list"),
    ("vqgan", "encdec_layer_mults", [1, 10**12], "encdec_layer_mults is [1, 1000000000000]; expected at most"),
    ("vqgan", "codebook_size", 2**40, "codebook_size is 1099511627776; expected at most"),
    ("dvae", "num_layers", 10**9, "num_layers is 1000000000; expected at most"),
    ("dvae", "hidden_dim", 1.5, "hidden_dim is 1.5; expected a whole number"),
    ("dvae", "kl_reduction", None, "kl_reduction is None; expected a string"),
    ("prior", "depth", 10**9, "depth is 1000000000; expected at most"),
    ("prior", "num_classes", "3", "num_classes is '3'; expected a whole number"),
    ("vq_ar", "dim_head", 10**12, "dim_head is 1000000000000; expected at most"),
]


@pytest.mark.parametrize("kind, key, value, message", WRONG)
def test_a_value_that_cannot_be_is_one_line_at_once(kind, key, value, message, tmp_path):
    BUILD[kind]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    began = time.process_time()
    with pytest.raises(UserError) as error:
        load_model_of_any_type(tmp_path)
    assert time.process_time() - began < 5
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", BUILD)
def test_what_was_written_is_loaded(kind, tmp_path):
    BUILD[kind]().save_pretrained(tmp_path)
    load_model_of_any_type(tmp_path)


NETWORK = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "z_channels": 4}
WRONG_OF_PART = [
    ("num_res_blocks", 10**8, "num_res_blocks is 100000000; expected at most"),
    ("ch", 10**9, "ch is 1000000000; expected at most"),
    ("ch_mult", [1, 10**9], "ch_mult is [1, 1000000000]; expected at most"),
    ("z_channels", 10**12, "z_channels is 1000000000000; expected at most"),
]


@pytest.mark.parametrize("key, value, message", WRONG_OF_PART)
def test_a_value_of_a_part_that_cannot_be_is_one_line_at_once(key, value, message, tmp_path):
    parts = {half: {"class_path": "taming", "init_args": NETWORK} for half in ("encoder", "decoder")}
    quantizer = {"class_path": "gradient_vq", "init_args": {"codebook_size": 8}}
    VQGanVAE(**parts, quantizer=quantizer, use_vgg_and_gan=False).save_pretrained(tmp_path)
    load_model_of_any_type(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    written["encoder"]["init_args"][key] = value
    path.write_text(json.dumps(written))
    with pytest.raises(UserError) as error:
        load_model_of_any_type(tmp_path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
