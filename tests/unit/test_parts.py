"""Parts by name, by import path and as objects, and the one line that each mistake gets."""

from __future__ import annotations

import importlib
import json
import pkgutil
import runpy
import sys
from typing import Protocol, runtime_checkable

import pytest

import vqdist
from vqdist.cli.parts import joined
from vqdist.errors import LONGEST_LINE, UserError, an
from vqdist.parts import Registry, Spec, import_path, path_of, recorded, trusting, unknown
from vqdist.stopping import Stopped


class Shape:
    def __init__(self, size: int = 1):
        self.size = size


class Named:
    pass


@runtime_checkable
class Sided(Protocol):
    sides: int

    def area(self) -> float: ...


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> Registry[Shape]:
    (tmp_path / "my_shapes.py").write_text(
        "from test_parts import Shape\n"
        "class Wide(Shape):\n"
        "    def __init__(self, width, size=3):\n"
        "        super().__init__(size)\n"
        "        self.width = width\n"
        "class Other:\n"
        "    pass\n"
        "def make(size):\n"
        "    return Shape(size)\n"
        "def make_other():\n"
        "    return Other()\n"
        "def fail(error='ValueError'):\n"
        "    import builtins\n"
        "    raise getattr(builtins, error)('two\\nlines')\n"
    )
    (tmp_path / "broken.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "raises.py").write_text("raise ValueError('at\\nimport')\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("shape", Shape)
    registry.add("plain")(Shape)
    yield registry
    for name in ("my_shapes", "broken", "raises", "leaves"):
        sys.modules.pop(name, None)


def test_three_forms_give_the_same_kind_of_part(shapes):
    assert shapes.build("plain").size == 1
    assert shapes.build({"class_path": "plain", "init_args": {"size": 5}}).size == 5
    wide = shapes.build({"class_path": "my_shapes.Wide", "init_args": {"width": 2}})
    assert (type(wide).__name__, wide.width, wide.size) == ("Wide", 2, 3)
    assert shapes.build({"class_path": "my_shapes.make", "init_args": {"size": 7}}).size == 7
    assert shapes.build(wide) is wide


def test_context_goes_to_parts_that_ask_for_it_and_gives_way(shapes):
    assert shapes.build("plain", size=9, unknown=1).size == 9
    assert shapes.build({"class_path": "plain", "init_args": {"size": 2}}, size=9).size == 2


@pytest.mark.parametrize(
    "given, expected",
    [
        ("plane", ["shape", "'plane'", "nearest: plain", "import path"]),
        ("my_shape.Wide", ["no module 'my_shape'", "PYTHONPATH"]),
        ("my_shapes.Wied", ["my_shapes has no 'Wied'", "nearest: Wide"]),
        ("my_shapes.Other", ["shape my_shapes.Other", "no Shape", "test_parts.Shape"]),
        ("my_shapes.make_other", ["no Shape"]),
        ("broken.Wide", ["a_module_that_nobody_has"]),
        ("raises.Wide", ["cannot be imported", "ValueError: at import", "raises.py, line 1"]),
        ("leaves.Wide", ["cannot be imported", "SystemExit: 0", "leaves.py, line 2"]),
        ({"class_path": "my_shapes.Wide"}, ["width", "init_args"]),
        (
            {"class_path": "my_shapes.Wide", "init_args": {"width": 1, "siez": 2}},
            ["no argument 'siez'", "nearest: size", "width, size"],
        ),
        ({"class_path": "plain", "init_arg": {}}, ["'init_arg'", "init_args"]),
        ({"init_args": {}}, ["class_path"]),
        ({"class_path": 3}, ["class_path", "3"]),
        ({"class_path": "plain", "init_args": [1]}, ["init_args", "[1]"]),
        (Named(), ["Named", "no Shape"]),
        ("", ["''", "no"]),
    ],
)
def test_a_mistake_is_one_line(shapes, given, expected):
    with pytest.raises(UserError) as raised:
        shapes.build(given)
    message = str(raised.value)
    assert "\n" not in message
    for words in expected:
        assert words in message


@pytest.mark.parametrize("error", ["ValueError", "TypeError", "AssertionError", "KeyError", "OSError", "SystemExit"])
def test_a_constructor_that_raises_is_one_line_with_its_place(shapes, error):
    with pytest.raises(UserError) as raised:
        shapes.build({"class_path": "my_shapes.fail", "init_args": {"error": error}})
    message = str(raised.value)
    assert message.startswith(f"shape my_shapes.fail cannot be built ({error}: ") and "\n" not in message
    assert message.endswith("my_shapes.py, line 14)")
    assert type(raised.value.__cause__).__name__ == error


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError"])
def test_what_no_constructor_is_to_blame_for_passes(shapes, error):
    with pytest.raises(BaseException) as raised:
        shapes.build({"class_path": "my_shapes.fail", "init_args": {"error": error}})
    assert type(raised.value).__name__ == error


def test_a_stop_while_a_part_is_built_is_a_stop():
    def stopped():
        raise Stopped(15, 3, "runs/a")

    registry = Registry("shape", Shape)
    registry.add("stopped")(stopped)
    with pytest.raises(Stopped):
        registry.build("stopped")


def test_words_on_the_command_line_are_no_numbers():
    given = {"mode": "nan", "other": "infinity", "rate": "1e-3", "rest": ".nan"}
    pieces = [(f"model.shape.{name}", value) for name, value in given.items()]
    ((_, value),) = joined([("model.shape", "a.B"), *pieces], {"model.shape": Registry("shape")})[-1:]
    arguments = json.loads(value)["init_args"]
    assert (arguments["mode"], arguments["other"], arguments["rate"]) == ("nan", "infinity", 0.001)
    assert arguments["rest"] != arguments["rest"]  # YAML's own word for it


def test_a_protocol_says_what_an_object_lacks():
    registry = Registry("figure", Sided)
    with pytest.raises(UserError, match=r"figure Named is no Sided; it lacks area, sides"):
        registry.build(Named())


class Delegating:
    """Gives its members as `torch.nn.Module` gives submodules, which `isinstance` does not see from Python 3.12 on."""

    def __getattr__(self, name):
        if name in ("sides", "area"):
            return 4
        raise AttributeError(name)


def test_members_that_are_given_by_getattr_count(monkeypatch):
    monkeypatch.setattr(type(Sided), "__instancecheck__", lambda *_: False)  # as Python 3.12 answers
    given = Delegating()
    assert Registry("figure", Sided).build(given) is given


def test_a_name_is_given_once(shapes):
    with pytest.raises(UserError, match="'plain' already"):
        shapes.add("plain")(Named)
    shapes.add("plain")(Shape)  # the same again: its module was imported twice


def test_code_from_elsewhere_is_built_only_if_trusted(shapes):
    with trusting(False):
        assert shapes.build("plain").size == 1
        assert shapes.build("test_parts.Shape").size == 1  # registered, by its path
        for given in ("my_shapes.Wide", {"class_path": "my_shapes.make"}, {"class_path": "os.getcwd"}):
            with pytest.raises(UserError, match="trust_code"):
                shapes.build(given)
        assert "my_shapes" not in sys.modules
    assert shapes.build({"class_path": "my_shapes.make", "init_args": {"size": 7}}).size == 7


def test_what_is_recorded_builds_the_part_again_or_asks_for_it(shapes):
    given = {"class_path": "my_shapes.Wide", "init_args": {"width": 2}}
    assert recorded(given) == given and recorded("plain") == "plain" and recorded(None) is None
    written = recorded(shapes.build(given))
    assert written["class_path"] == "my_shapes.Wide"
    with pytest.raises(UserError, match="object of my_shapes.Wide.*give the object again"):
        shapes.build(written)


def test_a_specification_reads_back_what_it_writes():
    for spec in (Spec("fsq"), Spec("my_nets.Encoder"), Spec("fsq", {"levels": [8, 5]})):
        assert Spec.of(spec.as_config()) == spec


def test_import_paths_reach_into_classes():
    assert import_path("test_parts.Shape.__init__") is Shape.__init__


def test_an_unknown_name_is_told_with_the_nearest_and_with_all_where_they_are_few():
    options = ["trainer.lr", "trainer.batch_size", "data.folder"]
    assert str(unknown("option", "lr", options, written="--lr")) == (
        "there is no option --lr; nearest: trainer.lr; there are trainer.lr, trainer.batch_size, data.folder"
    )
    many = [f"name_{number}" for number in range(20)] + ["MNIST"]
    assert str(unknown("dataset", "mnsit", many, of="torchvision")) == (
        "torchvision has no dataset 'mnsit'; nearest: MNIST"
    )
    assert str(unknown("key", "zzz", many, "; see the manual")) == (
        f"there is no key 'zzz'; there are {', '.join(many)}; see the manual"  # nothing is near: all that can be said
    )
    assert str(unknown("key", "zzz", [*many, *map(str, range(100))])) == "there is no key 'zzz'"


def test_every_part_of_vqdist_is_known_by_name_before_its_module_is_imported():
    from vqdist import registries

    for module in pkgutil.walk_packages(vqdist.__path__, "vqdist."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    fresh = runpy.run_path(str(registries.__file__))  # as it is before anything registers itself
    kinds = [name for name, value in vars(registries).items() if isinstance(value, Registry)]
    assert len(kinds) >= 8
    for kind in kinds:
        known = getattr(registries, kind)
        assert [name for name in known if known.place(name).startswith(("vqdist.", "torch."))] == fresh[kind].names()
        for name, factory in fresh[kind].items():
            assert fresh[kind].place(name) == path_of(factory), name


def test_a_message_keeps_both_ends_of_a_value_of_any_length():
    for given in ("x" * 100_000, "my." + "y" * 100_000, {"class_path": "z" * 100_000}, ["word " * 30_000]):
        with pytest.raises(UserError) as error:
            Registry("encoder").factory(Spec.of(given, "encoder").target)
        assert len(str(error.value)) <= LONGEST_LINE and "characters)..." in str(error.value)
    assert str(UserError("x" * 400 + " and what to do")) == "x" * 400 + " and what to do"
    message = str(UserError(f"option {'x' * 5000} is not possible; give a name"))
    assert message.startswith("option xxx") and message.endswith("xxx is not possible; give a name")
    assert len(message) < 450


@pytest.mark.parametrize(
    "noun, spoken",
    [("encoder", "an encoder"), ("optimizer", "an optimizer"), ("decoder", "a decoder"), ("int", "an int")]
    + [("UNet", "a UNet"), ("Unfold", "an Unfold"), ("user", "a user"), ("ImageFolder", "an ImageFolder")],
)
def test_an_article_is_that_of_the_word_behind_it(noun, spoken):
    assert an(noun) == spoken
