"""A sweep on a dask cluster: two worker processes here, any dask cluster by the same lines."""

import dataclasses

import joblib
import pytest
import torch

from deltarank import store
from deltarank.study.runs import stored, sweep


@pytest.fixture
def cluster():
    """Two worker processes of one thread each, without network services."""
    distributed = pytest.importorskip("distributed")
    sizes = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**sizes) as cluster, distributed.Client(cluster):
        yield cluster


@pytest.fixture
def configs(config):
    return [dataclasses.replace(config, seed=seed) for seed in range(4)]


def test_a_sweep_on_a_cluster_gives_the_same_results(cluster, configs, monkeypatch, tmp_path):
    with joblib.parallel_config(backend="dask"):
        together = sweep(configs)
    spectra = [result.spectra for result in together]
    monkeypatch.setenv("BUILD", str(tmp_path / "alone"))
    assert stored(configs[0]) is None
    alone = sweep(configs)
    for one, S, other in zip(together, spectra, alone, strict=True):
        assert one.config == other.config
        assert one.loss() == pytest.approx(other.loss(), rel=1e-6)
        assert all(torch.equal(S[name], other.spectra[name]) for name in one.matrices)


def test_a_cluster_that_dies_in_mid_sweep_loses_only_what_it_had_not_returned(
    cluster, configs, monkeypatch
):
    save_entry = store.save_entry

    def save_and_lose_the_cluster(*arguments):
        save_entry(*arguments)
        cluster.close()

    monkeypatch.setattr(store, "save_entry", save_and_lose_the_cluster)
    with (
        joblib.parallel_config(backend="dask"),
        pytest.raises(Exception, match=r"(?i)cancel|close|kill"),
    ):
        sweep(configs)
    kept = [config for config in configs if stored(config)]
    assert 1 <= len(kept) < len(configs)

    monkeypatch.setattr(store, "save_entry", save_entry)
    before = {config: stored(config).record for config in kept}
    assert [result.config for result in sweep(configs)] == configs
    assert all(stored(config).record == before[config] for config in kept)
