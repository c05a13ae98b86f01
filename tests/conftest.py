"""The same examples every time and no deadlines: a busy machine is no fault of the code."""

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
