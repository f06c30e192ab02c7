"""Published files, small, written once. Tests that change them link or copy them first."""

import pytest

from tests.published import published_files as pf


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    return pf.write_all(tmp_path_factory.mktemp("published") / "one")


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    return pf.write_all(tmp_path_factory.mktemp("published") / "two", ranks=2)
