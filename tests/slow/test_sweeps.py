"""Sweeps over processes: the same results as alone."""

import joblib
import pytest
from small_runs import same, three_methods

from deltarank.study.runs import stored, sweep


def test_a_sweep_over_processes_gives_the_same_spectra(store, monkeypatch, tmp_path):
    configs = three_methods()
    alone = sweep(configs)
    spectra = [result.spectra for result in alone]
    monkeypatch.setenv("BUILD", str(tmp_path / "parallel"))
    assert stored(configs[0]) is None
    with joblib.parallel_config(backend="loky", n_jobs=2):
        together = sweep(configs)
    for one, S, other in zip(alone, spectra, together, strict=True):
        assert one.config == other.config
        assert same(S, other.spectra)
        assert one.loss() == pytest.approx(other.loss(), rel=1e-6)
