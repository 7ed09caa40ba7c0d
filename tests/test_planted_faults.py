"""The faults that `make mutants` plants can still be planted."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from planted_faults import FAULTS
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return FAULTS


def test_the_text_of_every_planted_fault_stands_in_its_file(faults):
    package = ROOT / "src" / "elva_hf"
    missing = [fault.name for fault in faults if fault.old not in (package / fault.file).read_text()]
    assert not missing


def test_the_tests_that_should_see_a_planted_fault_exist(faults):
    named = {test for fault in faults for test in fault.tests if test.endswith(".py")}
    assert named
    assert sorted(test for test in named if not (ROOT / test).is_file()) == []


def test_no_two_planted_faults_have_one_name(faults):
    assert len({fault.name for fault in faults}) == len(faults)
