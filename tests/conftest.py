"""The same examples every time and no deadlines: a busy machine is no fault of the code."""

import logging

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def logging_as_in_a_new_process():
    """Commands set up logging for their process, which here is that of all tests."""
    logging.getLogger().setLevel(logging.WARNING)
