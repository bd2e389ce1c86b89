"""Fixtures: the rank that fails, and a cluster of Dask's workers."""

import pytest


@pytest.fixture
def bad(ranks, at_fault):
    return 0 if at_fault == "first" else len(ranks) - 1


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=3,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            host="127.0.0.1",
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
