"""What all tests share: hypothesis profiles, chosen by HYPOTHESIS_PROFILE.

By default examples are the same each time: what fails once fails for everybody. ``deep`` draws
new ones.
"""

import os

import hypothesis

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
