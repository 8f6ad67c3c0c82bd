"""Energy: of packages alone, past the end of a counter, and none where it cannot be read."""

import pytest

from benchmarks import energy


@pytest.fixture
def powercap(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "LEAST_S", 0)
    for zone, value in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 9_999_000), ("intel-rapl:0:0", 7)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
        (tmp_path / zone / "name").write_text("package-0\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("9999999\n")
    (tmp_path / "intel-rapl:2").mkdir()
    (tmp_path / "intel-rapl:2" / "name").write_text("psys\n")
    return tmp_path


def test_joules(powercap):
    def call():
        (powercap / "intel-rapl:0" / "energy_uj").write_text("8000000\n")
        (powercap / "intel-rapl:1" / "energy_uj").write_text("999000\n")
        (powercap / "intel-rapl:0:0" / "energy_uj").write_text("9000000\n")

    assert energy.joules(call) == pytest.approx(4)


def test_short_calls_are_repeated(powercap, monkeypatch):
    monkeypatch.setattr(energy, "LEAST_S", 0.01)
    calls = []

    def call():
        calls.append(1)
        (powercap / "intel-rapl:0" / "energy_uj").write_text(f"{5_000_000 + 1000 * len(calls)}\n")

    assert energy.joules(call) == pytest.approx(0.001)
    assert len(calls) > 1


def test_none_where_nothing_can_be_read(powercap, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", powercap / "absent")
    assert energy.joules(lambda: pytest.fail("called for nothing")) is None
