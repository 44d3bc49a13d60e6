"""Each mutation that `make test-mutations` makes is possible, and the tests that should notice it are there."""

from __future__ import annotations

import ast

import pytest
from launching import ROOT
from mutations.run import PROMISES, found, main, place_of


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_stands_once_in_the_package_and_its_tests_exist(name):
    promise = PROMISES[name]
    place = place_of(promise)
    ast.parse(place.read_text().replace(promise.text, promise.instead))
    for path, _, test in (test.partition("::") for test in found(promise.tests)):
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert not test or test in functions


def test_an_unknown_promise_is_named(capsys):
    assert main(["adaptive"]) == 2
    assert capsys.readouterr().err.startswith("there is no promise adaptive; there are: adaptive_weight, no_sync, ")
