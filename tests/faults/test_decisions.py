"""Faults while releases are decided about: promotions, refusals, the way back."""

import pytest

from tests.faults import protocols
from tests.faults.sweep import check_any_one_or_two_faults, check_any_two_faults_of_all_kinds

pytestmark = pytest.mark.usefixtures("fast_files")


def test_any_one_or_two_faults_are_harmless(tmp_path, monkeypatch, tiny_data):
    scenario = protocols.decisions_scenario(tmp_path, monkeypatch, tiny_data)
    check_any_one_or_two_faults(scenario, share=0.4, at_least=400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_two_faults_of_all_kinds_are_harmless(tmp_path, monkeypatch, tiny_data):
    scenario = protocols.decisions_scenario(tmp_path, monkeypatch, tiny_data)
    check_any_two_faults_of_all_kinds(scenario)
