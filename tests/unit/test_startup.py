"""Which modules a start imports: what takes seconds is imported by those who need it only."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
import typing

import pytest

from vqdist import VQGanVAE
from vqdist.cli.loading import loading
from vqdist.cli.models import MODELS
from vqdist.declared import declared

SLOW = ("einx", "sympy", "torch._dynamo", "torch._inductor", "torchvision", "torchmetrics", "matplotlib", "scipy")


def imported_after(code: str, *of: str) -> list[str]:
    """Return those of the modules that a new interpreter has imported when it has run the code."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {of!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["vq", "lfq"])
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    options = {"codebook_size": 16, "vq_kwargs": {"kmeans_init": False}} if request.param == "vq" else {}
    model = VQGanVAE(
        dim=16, layers=1, use_vgg_and_gan=False, quantizer=request.param, **{"codebook_size": 16, **options}
    )
    model.image_size = 8
    model.save_pretrained(folder)
    return folder


def test_a_tokenizer_encodes_and_measures_without_a_compiler(export):
    code = (
        "import torch\n"  # before vqdist, since einx tells torch's compiler of itself where torch is there already
        "from vqdist import Tokenizer\n"
        f"tokenizer = Tokenizer.from_pretrained({str(export)!r}, 8)\n"
        "images = torch.rand(2, 3, 8, 8)\n"
        "tokenizer.decode(tokenizer.encode(images))\n"
        "from vqdist.backends import create_backend\n"
        "from vqdist.evaluation import evaluate_reconstruction\n"
        "backend = create_backend('local')\n"
        "evaluate_reconstruction(tokenizer.network, [images], backend, image_size=8)"
    )
    assert imported_after(code, *SLOW) == []


def test_a_trainer_imports_no_more_than_its_optimizer():
    assert imported_after("from vqdist import ARTrainer, DiscreteVAETrainer, VQGanVAETrainer", *SLOW) == []


def test_a_prior_of_codes_is_imported_without_a_compiler():
    assert imported_after("from vqdist import VAR, Prior, VQImageAutoregressiveAutoencoder", *SLOW) == []


def test_einx_is_itself_after_a_library_was_imported_without_it():
    code = (
        "import torch, vqdist.models.quantizers.vector_quantize as library\n"
        "import sys; assert 'einx' not in sys.modules\n"
        "quantizer = library.SimVQ(dim=4, codebook_size=8)\n"
        "assert quantizer(torch.randn(1, 4, 4))[0].shape == (1, 4, 4)\n"  # calls get_at of einx
        "import einx; assert einx.__version__\n"
        "assert einx.get_at('[c] d, n -> n d', torch.eye(3), torch.arange(3)).sum() == 3"
    )
    assert imported_after(code, "einx") == ["einx"]


# ------------------------------------------------------------------------------------------- the command line

TRAIN = "train vqgan --data digits --image_size 32 --out RUN --trainer.batch_size 4 --trainer.num_train_steps 2"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code and output of each line, from one process, and whether torch was imported."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "bad.yaml").write_text("trainer: {lr: [1\n")
    (folder / "unknown.yaml").write_text("trainer:\n  lrr: 1\n")
    code = (
        "import contextlib, io, json, sys\n"
        "from vqdist.cli import main\n"
        "def run(line):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: code = main(line.split())\n"
        "        except SystemExit as end: code = end.code\n"
        "    return [code, out.getvalue() + err.getvalue(), 'torch' in sys.modules]\n"
        f"print(json.dumps([run(line) for line in {[line for line, _ in LINES]!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip([line for line, _ in LINES], json.loads(done.stdout.splitlines()[-1]), strict=True))


HELP = {
    "vqgan": "channels of the first convolution",
    "dvae": "dimension of a code's vector.",
    "vq_ar": "pixels per code along each side.",
    "prior": "attention heads of each block.",
    "var": "its width; by default 64 * depth.",
}
LINES = [
    ("--help", "commands:"),
    *((f"train {model} --help", HELP[model]) for model in MODELS),
    *((f"{command} --help", "usage: vqdist") for command in ("sample", "encode", "evaluate", "reconstruct", "report")),
    (f"{TRAIN} --print_config", "num_train_steps: 2"),
    (f"{TRAIN} --trainer.lrr 1", "no option --trainer.lrr; nearest: "),
    (f"{TRAIN} --trainer.on_nonfinite maybe", "choose one of raise, skip"),
    (f"{TRAIN} --lr x", "--lr 'x' is not possible; give a number"),
    (f"{TRAIN} --trainer.lr -1", "lr -1.0 is not possible"),
    (f"{TRAIN} --trainer.discr_adam_betas [0.9]", "give two decays"),
    ("train vqgan --data digits --out RUN", "missing: --image_size"),
    ("train vqgan --data /nowhere/images", "(1) missing: --image_size (2) no such folder: /nowhere"),
    ("train prior --data codes:/nowhere --out RUN", "(1) there are no codes in /nowhere"),
    (f"{TRAIN} --data /nowhere/images", "no such folder: /nowhere/images"),
    (f"{TRAIN} --data digitz", "nearest: digits"),
    (f"{TRAIN} --config nowhere.yaml", "nowhere.yaml"),
    (f"{TRAIN} --config bad.yaml", "parsing"),
    (f"{TRAIN} --config unknown.yaml", "nearest: trainer.lr"),
    (f"{TRAIN} --backend horse", "backend 'horse' is not known"),
    (f"{TRAIN} --model.quantizer vqq", "no quantizer 'vqq'; nearest: vq"),
    (f"{TRAIN} --model.perceptual nowhere.pth", "no such file: nowhere.pth, which --model.perceptual"),
    (f"{TRAIN} --model.perceptual lpips-alex:/nowhere/alex.pth", "no such file: /nowhere/alex.pth"),
    (f"{TRAIN} --model.terms [lpipz]", "no term 'lpipz'; nearest: lpips"),
    (f"{TRAIN} --trainer.optimizer adamm", "no optimizer 'adamm'; nearest: adam"),
    (f"{TRAIN} --validate_with rfidd,lpips", "there is no measure 'rfidd'; nearest: rfid"),
    (f"{TRAIN} --validate_with lpips:/nowhere.pth", "no such file: /nowhere.pth, which validate_with lpips names"),
    (f"{TRAIN} --validate_with rfid --features /nowhere.pth", "--features /nowhere.pth is neither a file nor a known"),
    (f"{TRAIN} --keep_best valid/psnrr", "by 'psnrr'; nearest: psnr"),
    (f"{TRAIN} --patience 0", "patience 0 is not possible"),
    (f"{TRAIN} --data.valid /nowhere/valid", "no such folder: /nowhere/valid"),
    (f"{TRAIN} --data.valid digits --data.valid_frac 0.1", "valid_frac 0.1 does nothing, because images to validate"),
    (f"{TRAIN} --trainer.lr_schedule cosin", "nearest: cosine"),
    (f"{TRAIN} --trainer.trackers [wandbb]", "no tracker 'wandbb'; nearest: wandb"),
    (TRAIN.replace("vqgan", "vqgann"), "no model 'vqgann'; nearest: vqgan"),
    (
        f"{TRAIN.replace('vqgan', 'prior').replace(' --image_size 32', '')} --tokenizer /nowhere",
        "no such run, export or file",
    ),
    ("trian", "no command 'trian'; nearest: train"),
    ("convert /nowhere.pt --out EXPORT", "no such file: /nowhere.pt; expected a checkpoint"),
    ("convert /nowhere --to taming --out FILE", "no such run, export or file: /nowhere"),
    ("models llamagen_vq17", "no preset 'llamagen_vq17'; nearest: llamagen_vq16"),
    ("sample /nowhere", "no such run, export or file: /nowhere"),
    ("sample /nowhere --temperature -1", "temperature -1.0 is not possible"),
    ("encode /nowhere --data digits --out codes", "no such run, export or file: /nowhere"),
    ("evaluate /nowhere --data digits", "no such run, export or file: /nowhere"),
    ("reconstruct /nowhere --data digits", "no such run, export or file: /nowhere"),
    ("statistics --data /nowhere --features inception --out a.npz", "no such folder: /nowhere"),
    ("fidelity digits --reference /nowhere.npz --features inception", "there is no file /nowhere.npz"),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_help_and_mistakes_are_answered_without_torch(answers, line, words):
    code, said, with_torch = answers[line]
    assert words in said
    assert code == (0 if line.endswith(("--help", "--print_config")) else 2)
    assert not with_torch


@pytest.mark.parametrize("name", MODELS)
def test_options_read_from_the_file_are_those_of_the_class(name):
    """Annotations that name a class of torch, or one of vqdist that needs torch, are `Any`: no option is of these."""
    module, cls = MODELS[name].model.split(":")
    read, real = declared(module, cls), MODELS[name].load()[0]
    assert read.__module__ == "vqdist.declared" and inspect.getdoc(read) == inspect.getdoc(real)
    assert getattr(read, "part_options", None) == getattr(real, "part_options", None)
    parameters = {key: one for key, one in inspect.signature(real).parameters.items() if one.kind != one.VAR_KEYWORD}
    hints = typing.get_type_hints(real.__init__)
    stood_in = inspect.signature(read).parameters
    assert list(stood_in) == list(parameters)
    for key, parameter in parameters.items():
        assert (stood_in[key].default, stood_in[key].kind) == (parameter.default, parameter.kind), key
        if key not in MODELS[name].no_options:
            assert stood_in[key].annotation == hints[key], key
    assert MODELS[name].options()[1] is MODELS[name].load()[1].config_class


@pytest.mark.parametrize(
    ("seconds", "rank", "imported", "said"),
    [(0.5, 0, False, True), (0, 0, False, False), (0.5, 1, False, False), (0.5, 0, True, False)],
)
def test_a_long_import_is_announced_once_by_rank_0(seconds, rank, imported, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    if not imported:
        monkeypatch.delitem(sys.modules, "torch")
    with loading("torch and the run", after=0.05):
        time.sleep(seconds)
    assert capsys.readouterr().err == ("vqdist: loading torch and the run ...\n" if said else "")
