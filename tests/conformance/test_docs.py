"""The pages of docs/ say what is so: links, keys of metrics.jsonl, public names, commands of the tutorial."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT
from scenarios import MULTISCALE, build_ar_trainer, build_dvae_trainer, build_trainer

import vqdist
from benchmarks.pictures import PAGE as TUTORIAL
from benchmarks.pictures import commands
from vqdist.cli import main

DOCS = ROOT / "docs"
RECIPES = ROOT / "launch" / "recipes"
PAGES = sorted(DOCS.rglob("*.md"))
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s#]*)(?:#[^)]*)?\)")


# Links. `make docs` checks those between pages, and their anchors


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_pictures_that_a_page_links_to_are_there(page):
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in LINK.findall(prose) if target and "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_picture_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"])
    pictures = sorted(path.name for path in (DOCS / "images").iterdir())
    assert pictures and [name for name in pictures if f"images/{name})" not in text] == []


def test_every_page_is_in_the_navigation():
    named = re.findall(r'= "([\w/]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(named) == [page.relative_to(DOCS).as_posix() for page in PAGES]


MISTAKES = {
    "nothing": ("[there](other.md#below)", None),
    "a page": ("[gone](gone.md)", "page does not exist"),
    "an anchor": ("[gone](other.md#above)", "anchor does not exist"),
    "a name of the API": ("[gone][vqdist.Gone]", "unresolved autoref"),
    "an included file": ('--8<-- "gone.py"', "could not be found"),
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Zensical needs Python 3.11")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_building_the_site_fails_for_what_is_gone(mistake, tmp_path):
    """With the settings of the real one, but for its navigation."""
    line, message = MISTAKES[mistake]
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    (tmp_path / "zensical.toml").write_text(re.sub(r"^nav = \[.*?^\]\n", "", settings, flags=re.DOTALL | re.MULTILINE))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# One\n\n{line}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## Below\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (message is None)
    assert message is None or message in done.stdout + done.stderr


# Reading metrics.jsonl


def build_vqgan_trainer(folder: Path, **options):
    """Return a trainer of a VQGAN whose every part logs something."""
    model = {
        "codebook_size": 32,
        "quantizer_kwargs": MULTISCALE,
        "vgg": None,
        "perceptual": "none",
        "terms": ["reconstruction", OwnTerm({"value": 1.0, "start": 1})],
    }
    losses = {"lecam_weight": 0.1, "quantizer_weight": {"value": 1.0, "initial": 3.0, "ramp_steps": 2}}
    return build_trainer(
        folder,
        quantizer="multiscale_vq",
        model=model,
        apply_grad_penalty_every=1,
        discr_lr_warmup_steps=1,
        **losses,
        **options,
    )


class OwnTerm(vqdist.Term):
    def forward(self, recon, image, out):
        return (recon - image).square().mean()


BUILDERS = {
    "vqgan": build_vqgan_trainer,
    "dvae": lambda folder, **options: build_dvae_trainer(folder, model={"kl_div_loss_weight": 0.1}, **options),
    **{
        kind: lambda folder, kind=kind, **options: build_ar_trainer(folder, kind, **options)
        for kind in ("prior", "var", "vq_ar")
    },
}
# the first needs VGG16's weights, and its name is that of a term; the second is of a quantizer that draws, and the
# others are of TiTok's first stage
OF_THE_FIRST_STAGE = {"proxy_loss", "valid/proxy_loss", "valid/proxy_accuracy"}
OF_LEVELS = {f"{where}codebook_{name}_level_I" for where in ("", "valid/") for name in ("usage", "perplexity")}
NOT_TRAINED_HERE = {"vqgan": {"perceptual_loss", "temperature", *OF_THE_FIRST_STAGE, *OF_LEVELS}}


def documented_keys(model: str) -> set[str]:
    """Return the keys that the tables of docs/metrics.md give to a model."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {key for key, models in rows if model in models.split(", ") or models == "all"}


@pytest.mark.parametrize("model", BUILDERS)
def test_the_page_has_every_key_that_a_trainer_logs(model, tmp_path):
    trainer = BUILDERS[model](tmp_path, num_train_steps=2, on_nonfinite="skip", on_bad_image="skip")
    trainer.train()
    trainer.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    logged = {re.sub(r"_scale_\d+$", "_scale_I", key) for line in lines for key in line}
    logged = {key.replace("own_", "NAME_") for key in logged}
    assert logged == documented_keys(model) - NOT_TRAINED_HERE.get(model, set())


# API


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: vqdist\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(set(vqdist.__all__) - {"__version__"})


# When GAN training breaks


def test_the_table_of_recipes_is_that_of_the_files():
    table = re.search(
        r"^\| option \| .*?\n\n", (DOCS / "gan.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = table[0].strip().splitlines()
    head, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    recipes = [yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))["trainer"] for name in head[1:]]
    for option, *shown in rows:
        assert [yaml.safe_load(cell) if cell else None for cell in shown] == [r.get(option) for r in recipes], option


# First tokenizer


def test_options_of_the_tutorial_are_options(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    trainings = [arguments for arguments in commands() if arguments[0] == "train"]
    assert len(trainings) == 2
    for arguments in trainings:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--print_config"])
        assert ended.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["num_train_steps"] == 600


@pytest.mark.nightly  # the tutorial, with two steps for each training
def test_commands_of_the_tutorial_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)
    for arguments in commands():
        shorter = ["--trainer.num_train_steps", "2"] if arguments[0] == "train" else []
        assert main([*arguments, *shorter]) == 0
    assert (tmp_path / "runs" / "first" / "samples.png").stat().st_size > 1000
    (code,) = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (4, 1, 32, 32) and names["codes"].shape == (4, 64)
    assert names["digits"].shape == (10, 1, 32, 32)


# Extend


def test_the_page_shows_every_part_of_somebody_else():
    shown = re.findall(
        r'^--8<-- "tests/foreign/(\S+)"$', (DOCS / "extend.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    there = [path.name for path in (ROOT / "tests" / "foreign").iterdir()]
    assert sorted(shown) == sorted(name for name in there if re.match(r"my_\w+\.py$|\w+\.yaml$", name))


# Decisions


def test_code_and_tests_that_a_page_names_are_there():
    text = "".join(FENCED.sub("", page.read_text(encoding="utf-8")) for page in PAGES)
    modules = set(re.findall(r"`(vqdist(?:\.[a-z_0-9]+)+)`", text))
    tests = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(modules) > 10 and len(tests) > 10
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [(file, name) for file, name in tests if f"def {name}(" not in files.get(file, "")] == []


def test_the_map_of_the_tree_names_every_module_and_none_that_is_gone():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The map")[2].partition("\n## ")[0]
    named = {name.removeprefix("vqdist/") for name in re.findall(r"`([\w/]+(?:\.py|/))`", text)}
    modules = {path.name for path in (ROOT / "vqdist").glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.parent.name}/" for path in (ROOT / "vqdist").glob("*/__init__.py")}
    assert sorted((modules | folders) - named) == [], "say in CONTRIBUTING.md where these stand"
    places = ((ROOT, ""), (ROOT / "vqdist", "**/"), (ROOT / "docs", ""))
    assert sorted(name for name in named if not any(any(at.glob(below + name)) for at, below in places)) == []
