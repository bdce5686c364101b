"""Common to all tests."""

from hypothesis import settings

# By default an example of more than 0.2 s is a failure: on a busy machine, at random.
settings.register_profile("launcher", deadline=None)
settings.load_profile("launcher")
